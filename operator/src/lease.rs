//! Leader election by a Lease, with an expiry that writers check.
//!
//! The algorithm is that of client-go: the holder renews with the resource version that it read, so that two can never both
//! succeed; others take over once they have *seen* the Lease unchanged for its whole duration, by their own clock. The holder
//! counts its time from before the renewing request was sent: whatever the network does, it stops before another can start.

use std::{
    sync::{Arc, OnceLock},
    time::Duration,
};

use anyhow::{Context as _, bail};
use jiff::Timestamp;
use k8s_openapi::{
    api::coordination::v1::{Lease, LeaseSpec},
    apimachinery::pkg::apis::meta::v1::MicroTime,
};
use kube::{
    Api, Client,
    api::{ObjectMeta, PostParams},
};
use tokio::{
    sync::watch,
    time::{Instant, sleep, timeout},
};
use tokio_util::sync::CancellationToken;
use tracing::{info, warn};

const DURATION: Duration = Duration::from_secs(15);
const RETRY: Duration = Duration::from_secs(2);
/// A writer may still be busy with a request when it looks; others take over only after this much more.
const MARGIN: Duration = Duration::from_secs(3);
/// One request may take this long: an answer that never comes leaves time for another attempt.
const ANSWER: Duration = Duration::from_secs(4);

/// What a writer asks before it writes.
#[derive(Clone, Debug)]
pub struct Claim {
    until: watch::Receiver<Option<Instant>>,
    since: Arc<OnceLock<Timestamp>>,
}

impl Claim {
    /// A claim that never ends, for tests and for one-off tools.
    pub fn forever() -> Self {
        let far = Instant::now() + Duration::from_secs(86_400 * 365);
        Self {
            until: watch::channel(Some(far)).1,
            since: Arc::new(Timestamp::UNIX_EPOCH.into()),
        }
    }

    /// A claim that is never held.
    pub fn never() -> Self {
        Self {
            until: watch::channel(None).1,
            since: Arc::default(),
        }
    }

    /// Whether this process leads now.
    pub fn is_held(&self) -> bool {
        self.until.borrow().is_some_and(|until| Instant::now() < until)
    }

    /// When this process began to lead; now, if it does not.
    pub fn since(&self) -> Timestamp {
        self.since.get().copied().unwrap_or_else(Timestamp::now)
    }

    /// Waits until this process leads; for ever if it never does.
    pub async fn held(&mut self) {
        if self.until.wait_for(Option::is_some).await.is_err() {
            std::future::pending().await
        }
    }
}

/// Competes for a Lease.
pub struct Elector {
    api: Api<Lease>,
    name: String,
    identity: String,
    claim: watch::Sender<Option<Instant>>,
    since: Arc<OnceLock<Timestamp>>,
    /// The Lease of somebody else as last seen to change, and when.
    seen: Option<(String, Instant)>,
    /// Our Lease, as it was last written.
    ours: Option<Lease>,
}

impl Elector {
    /// Competes for the Lease `name` as `identity`, which must be unique to this process.
    pub fn new(client: Client, namespace: &str, name: &str, identity: &str) -> (Self, Claim) {
        let (claim, until) = watch::channel(None);
        let since = Arc::<OnceLock<Timestamp>>::default();
        let api = Api::namespaced(client, namespace);
        (
            Self {
                api,
                name: name.to_owned(),
                identity: identity.to_owned(),
                claim,
                since: since.clone(),
                seen: None,
                ours: None,
            },
            Claim { until, since },
        )
    }

    /// Competes until `shutdown`, then gives the Lease back.
    ///
    /// # Errors
    /// When the Lease was held and is lost. The process must end: whatever it still does, it does as nobody.
    pub async fn run(mut self, shutdown: CancellationToken) -> anyhow::Result<()> {
        loop {
            let asked = Instant::now();
            let attempt = shutdown.run_until_cancelled(self.acquire()).await;
            let held_until = *self.claim.borrow();
            match attempt {
                None => break,
                Some(Ok(true)) => {
                    if held_until.is_none() {
                        info!(identity = self.identity, "this operator leads");
                        self.since.get_or_init(Timestamp::now);
                    }
                    self.claim.send_replace(Some(asked + DURATION - MARGIN));
                }
                Some(Ok(false)) if held_until.is_some() => bail!("another operator holds the lease {}", self.name),
                Some(Ok(false)) => {}
                Some(Err(error)) => warn!("cannot take or renew the lease: {error:#}"),
            }
            if self.claim.borrow().is_some_and(|until| Instant::now() >= until) {
                bail!("the lease {} could not be renewed in time", self.name);
            }
            if shutdown.run_until_cancelled(sleep(RETRY)).await.is_none() {
                break;
            }
        }
        Ok(())
    }

    /// Gives the Lease back, so that the next leader need not wait for it to expire. To be called when nothing writes any more.
    pub async fn release(api: Api<Lease>, name: &str, identity: &str) -> kube::Result<()> {
        let Some(mut lease) = api.get_opt(name).await? else {
            return Ok(());
        };
        if let Some(spec) = lease
            .spec
            .as_mut()
            .filter(|spec| spec.holder_identity.as_deref() == Some(identity))
        {
            spec.holder_identity = Some(String::new());
            api.replace(name, &PostParams::default(), &lease).await?;
        }
        Ok(())
    }

    /// Whether the Lease is ours after this attempt; if not, it shows another holder.
    async fn acquire(&mut self) -> anyhow::Result<bool> {
        let now = MicroTime(Timestamp::now());
        // Whoever wrote since, perhaps nothing but a label, makes this fail; then it is read.
        if let Some(mut lease) = self.ours.take() {
            if let Some(spec) = &mut lease.spec {
                spec.renew_time = Some(now.clone());
            }
            if self.write(&lease).await.is_ok() {
                return Ok(true);
            }
        }
        let Some(mut lease) = answered(self.api.get_opt(&self.name)).await?? else {
            let lease = Lease {
                metadata: ObjectMeta {
                    name: Some(self.name.clone()),
                    ..ObjectMeta::default()
                },
                spec: Some(self.spec(now, 0)),
            };
            let created = answered(self.api.create(&PostParams::default(), &lease)).await?;
            self.ours = Some(created?);
            return Ok(true);
        };
        let spec = lease.spec.clone().unwrap_or_default();
        let holder = spec.holder_identity.as_deref().unwrap_or_default();
        if holder != self.identity && !holder.is_empty() && !self.expired(&lease) {
            return Ok(false);
        }
        let transitions = spec.lease_transitions.unwrap_or(0);
        lease.spec = Some(if holder == self.identity {
            LeaseSpec {
                renew_time: Some(now),
                ..spec
            }
        } else {
            self.spec(now, transitions + 1)
        });
        // The resource version in `lease` makes this fail if anybody wrote since.
        self.write(&lease).await?;
        Ok(true)
    }

    /// That it conflicts is an error like another, and does not say that another one holds it: what was written meanwhile can be our own, of an
    /// attempt whose answer was lost.
    async fn write(&mut self, lease: &Lease) -> anyhow::Result<()> {
        self.ours = Some(answered(self.api.replace(&self.name, &PostParams::default(), lease)).await??);
        Ok(())
    }

    fn spec(&self, now: MicroTime, transitions: i32) -> LeaseSpec {
        LeaseSpec {
            holder_identity: Some(self.identity.clone()),
            lease_duration_seconds: i32::try_from(DURATION.as_secs()).ok(),
            acquire_time: Some(now.clone()),
            renew_time: Some(now),
            lease_transitions: Some(transitions),
            ..LeaseSpec::default()
        }
    }

    fn expired(&mut self, lease: &Lease) -> bool {
        let version = lease.metadata.resource_version.clone().unwrap_or_default();
        match &self.seen {
            Some((seen, since)) if *seen == version => since.elapsed() > DURATION,
            _ => {
                self.seen = Some((version, Instant::now()));
                false
            }
        }
    }
}

/// The answer to a request, if it comes in time.
async fn answered<T>(request: impl Future<Output = kube::Result<T>>) -> anyhow::Result<kube::Result<T>> {
    timeout(ANSWER, request).await.context("the API server does not answer")
}

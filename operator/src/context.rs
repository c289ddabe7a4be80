//! What every reconcile shares.

use std::{
    collections::HashMap,
    future::Future,
    sync::{Arc, Mutex, MutexGuard, PoisonError},
    time::Duration,
};

use backon::{BackoffBuilder as _, ExponentialBackoff, ExponentialBuilder};
use k8s_openapi::{NamespaceResourceScope, api::networking::v1::NetworkPolicyPeer};
use kube::{
    Api, Client, Resource,
    runtime::{
        controller::Action,
        reflector::{Lookup, ObjectRef, Store},
    },
};
use tokio::time::{Instant, timeout};
use tracing::{Instrument as _, field::Empty, info, info_span, warn};

use crate::{
    apply::Object,
    cache::Caches,
    conditions::READY,
    error::{Error, Reason},
    events::Events,
    lease::Claim,
    metrics::Metrics,
    pipeline::{rollout::Rollout, status::SILENCE},
    progress::{Kind, Observation, ResourceKey, Tracker},
    tls::Trust,
};

/// Reconciles of one kind that run at once: few, so that each is short where the API server has no more than a core or two, and enough for it to
/// be busy all the same, since each has several requests under way.
pub const CONCURRENCY: u16 = 3;
/// A reconcile that takes longer is given up.
const DEADLINE: Duration = Duration::from_secs(30);
/// A missing dependency is looked for at least this often.
const WAITING_AT_MOST: Duration = Duration::from_secs(8);
/// A spec that can never work is looked at again this often.
const INVALID: Duration = Duration::from_secs(300);
/// A failure that lasts is logged again after this long: the status that says it may be what cannot be written.
const LOGGED_AGAIN: Duration = Duration::from_secs(600);
/// A cluster in trouble is left alone for up to this long.
const TRANSIENT_AT_MOST: Duration = Duration::from_secs(60);
/// A resource is looked at this often where nothing tells of it.
const SELDOM: Duration = Duration::from_secs(60);

/// What the operator was started with.
#[derive(Clone, Debug)]
pub struct Settings {
    /// Namespace that is watched; all of them where it is none.
    pub namespace: Option<String>,
    /// Image of runtime pods whose spec names none.
    pub runtime_image: String,
    /// Pull policy of runtime pods.
    pub runtime_image_pull_policy: String,
    /// Names of Secrets, in the namespace of each pod, with credentials for its image.
    pub runtime_image_pull_secrets: Vec<String>,
    /// Where runtime pods report: `https://host:port`.
    pub progress_endpoint: String,
    /// By what they know whom they report to.
    pub trust: Trust,
    /// Who may read their health and metrics; where it is none, they have no NetworkPolicy.
    pub metrics_from: Option<Vec<NetworkPolicyPeer>>,
    /// The variables by which they find a collector of traces, if there is one, with their values.
    pub tracing: Vec<(&'static str, String)>,
}

/// What every reconcile shares.
#[derive(Clone)]
pub struct Context {
    /// The API server.
    pub client: Client,
    /// What the operator was started with.
    pub settings: Arc<Settings>,
    /// What runtime pods report, and what they are told.
    pub tracker: Arc<Tracker>,
    /// Asked before every write.
    pub claim: Claim,
    /// The one recorder.
    pub events: Events,
    /// What the operator counts.
    pub metrics: Arc<Metrics>,
    /// What the watches show.
    pub caches: Arc<Caches>,
    /// How far the operator's image of the runtime has come.
    pub rollout: Arc<Rollout>,
    failing: Arc<Mutex<HashMap<ResourceKey, Failing>>>,
    settled: Arc<Mutex<HashMap<Place, Settled>>>,
}

/// A resource whose last reconcile failed.
struct Failing {
    error: Error,
    logged: Instant,
    delays: ExponentialBackoff,
}

/// Names an object of a resource.
#[derive(Clone, Debug, PartialEq, Eq, Hash)]
pub struct Place {
    /// The resource.
    pub key: ResourceKey,
    /// Kind of the object.
    pub kind: String,
    /// Its name.
    pub name: String,
}

/// What was asked of an object, and the resource version at which that is how it is.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Settled {
    /// Digest of what was asked.
    pub hash: String,
    /// The resource version.
    pub version: Option<String>,
}

impl Context {
    /// A context in which nothing has failed yet.
    pub fn new(
        client: Client,
        settings: Settings,
        tracker: Arc<Tracker>,
        claim: Claim,
        events: Events,
        metrics: Arc<Metrics>,
        caches: Arc<Caches>,
    ) -> Self {
        Self {
            client,
            settings: Arc::new(settings),
            tracker,
            claim,
            events,
            metrics,
            caches,
            rollout: Arc::default(),
            failing: Arc::default(),
            settled: Arc::default(),
        }
    }

    /// Refuses to go on when another operator may lead.
    ///
    /// # Errors
    /// When the lease is not held.
    pub fn may_write(&self, condition: &'static str) -> Result<(), Error> {
        if self.claim.is_held() {
            Ok(())
        } else {
            Err(Error::transient(
                condition,
                Reason::LeaseLost,
                "another operator may hold the lease",
            ))
        }
    }

    /// The resource as it is: as the watch shows it, and read anew where the watch is behind what this operator wrote itself.
    pub async fn current<K>(&self, known: &Store<K>, key: &ResourceKey) -> Result<Option<K>, Error>
    where
        K: Object + Lookup<DynamicType = ()> + 'static,
    {
        let Some(seen) = known.get(&ObjectRef::new(&key.name).within(&key.namespace)) else {
            return Ok(None);
        };
        if self
            .tracker
            .wrote_nothing_after(key, seen.resource_version().as_deref())
        {
            return Ok(Some((*seen).clone()));
        }
        let api: Api<K> = Api::namespaced(self.client.clone(), &key.namespace);
        api.get_opt(&key.name)
            .await
            .map_err(|error| Error::from_api(READY, "reading the resource", &error))
    }

    /// Runs a reconcile under the deadline, and counts it. What it returns, or why it failed, decides when the next one is.
    pub async fn reconcile(&self, key: &ResourceKey, work: impl Future<Output = Result<Action, Error>>) -> Action {
        let kind = key.kind.as_str();
        let started = Instant::now();
        let span = info_span!(
            "reconcile",
            kind,
            namespace = key.namespace,
            name = key.name,
            otel.status_code = Empty,
            otel.status_description = Empty,
        );
        let result = timeout(DEADLINE, work.instrument(span.clone()))
            .await
            .unwrap_or_else(|_| {
                let seconds = DEADLINE.as_secs();
                let message = format!("the reconcile took longer than {seconds} s");
                Err(Error::transient(READY, Reason::DeadlineExceeded, message))
            });
        self.metrics
            .reconcile_seconds
            .with_label_values(&[kind])
            .observe(started.elapsed().as_secs_f64());
        if let Err(error) = &result {
            span.record("otel.status_code", "ERROR");
            span.record("otel.status_description", error.to_string());
        }
        let label = result
            .as_ref()
            .err()
            .map_or_else(|| "Ok".to_owned(), |error| error.problem().reason.to_string());
        self.metrics.reconciles.with_label_values(&[kind, &label]).inc();
        match result {
            Ok(action) => {
                if self.failing().remove(key).is_some() {
                    info!(kind, namespace = key.namespace, name = key.name, "goes on");
                }
                action
            }
            Err(error) => Action::requeue(self.failed(key, error)),
        }
    }

    /// When to try again after a failure. It is logged when it is another one than the last time, and seldom otherwise: its condition says it
    /// meanwhile.
    fn failed(&self, key: &ResourceKey, error: Error) -> Duration {
        let mut all = self.failing();
        let before = all.remove(key);
        let logged = before
            .as_ref()
            .filter(|before| before.error == error && before.logged.elapsed() < LOGGED_AGAIN)
            .map(|before| before.logged);
        let mut delays = before.map_or_else(backoff, |before| before.delays);
        let mut next = |longest| delays.next().unwrap_or(longest).min(longest);
        let delay = match &error {
            // Nothing but a change of the spec helps, and that is watched.
            Error::Invalid(_) => INVALID,
            Error::Waiting(_) => next(WAITING_AT_MOST),
            Error::Transient(_) => next(TRANSIENT_AT_MOST),
        };
        let kind = key.kind.as_str();
        match &error {
            _ if logged.is_some() => {}
            Error::Invalid(problem) => info!(kind, namespace = key.namespace, name = key.name, %problem, "invalid"),
            error => warn!(kind, namespace = key.namespace, name = key.name, %error, ?delay, "cannot finish"),
        }
        let logged = logged.unwrap_or_else(Instant::now);
        all.insert(key.clone(), Failing { error, logged, delays });
        delay
    }

    fn failing(&self) -> MutexGuard<'_, HashMap<ResourceKey, Failing>> {
        self.failing.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// Forgets everything about a resource that is gone.
    pub fn forget(&self, key: &ResourceKey) {
        self.tracker.forget(key);
        self.failing().remove(key);
        self.settled().retain(|place, _| place.key != *key);
    }

    /// The same of those of a kind that the watch does not show, once it has shown all.
    pub fn forget_missing(&self, kind: Kind, is_there: impl Fn(&ResourceKey) -> bool) {
        let is_gone = |key: &ResourceKey| key.kind == kind && !is_there(key);
        self.tracker.forget_missing(kind, &is_there);
        self.failing().retain(|key, _| !is_gone(key));
        self.settled().retain(|place, _| !is_gone(&place.key));
    }

    /// What an apply came to, of each object that the API server keeps in other words than it was told.
    pub fn settled(&self) -> MutexGuard<'_, HashMap<Place, Settled>> {
        self.settled.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

/// When a resource is to be looked at again for which nothing but time is missing: when its runtime has been silent for too long.
pub fn until_silent(observation: &Observation) -> Duration {
    match SILENCE.checked_sub(observation.silence) {
        Some(left) => left + Duration::from_secs(1),
        None => SELDOM,
    }
}

/// The API of a kind in the namespace that is watched, or in all of them.
pub fn api_of<K>(context: &Context) -> Api<K>
where
    K: Resource<DynamicType = (), Scope = NamespaceResourceScope>,
{
    match &context.settings.namespace {
        Some(namespace) => Api::namespaced(context.client.clone(), namespace),
        None => Api::all(context.client.clone()),
    }
}

fn backoff() -> ExponentialBackoff {
    ExponentialBuilder::default()
        .with_min_delay(Duration::from_secs(1))
        .with_max_delay(TRANSIENT_AT_MOST)
        .with_jitter()
        .without_max_times()
        .build()
}

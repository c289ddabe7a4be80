//! Keeps the operator's certificate: looks at its Secret, and, where the operator is to make it, does so.

use std::{sync::Arc, time::Duration};

use clap::ValueEnum;
use jiff::Timestamp;
use k8s_openapi::api::core::v1::Secret;
use kube::{
    Api, Client,
    api::{Patch, PatchParams},
};
use prometheus::IntGauge;
use rustls::sign::CertifiedKey;
use serde_json::json;
use tokio::{
    sync::watch,
    time::{sleep, timeout},
};
use tokio_rustls::TlsAcceptor;
use tokio_util::sync::CancellationToken;
use tracing::{info, warn};

use super::{
    Trust, issued,
    served::{Data, Served, Unusable},
    server,
};
use crate::{lease::Claim, naming::FIELD_MANAGER};

/// How often the Secret is looked at. The kubelet takes longer to tell the pods of a change.
const LOOK: Duration = Duration::from_secs(15);
/// While there is no certificate, nobody can call.
const RETRY: Duration = Duration::from_secs(1);
/// An answer that takes longer is given up.
const DEADLINE: Duration = Duration::from_secs(10);

/// Who makes the certificate.
#[derive(Clone, Copy, Debug, PartialEq, Eq, ValueEnum)]
pub enum Management {
    /// The operator that leads.
    Managed,
    /// Somebody else, such as cert-manager.
    External,
}

/// Why there is no certificate, or none that is new.
#[derive(Debug, thiserror::Error)]
enum Trouble {
    #[error("cannot read it: {0}; check the operator's Role")]
    Read(kube::Error),
    #[error("cannot write it: {0}; check the operator's Role")]
    Write(kube::Error),
    #[error("the API server does not answer")]
    NoAnswer,
    #[error(
        "it does not exist; create it with tls.crt, tls.key and ca.crt, by hand or by a Certificate of cert-manager"
    )]
    Missing,
    #[error("the operator that leads has not made it yet")]
    NotYet,
    #[error("{0}")]
    Unusable(#[from] Unusable),
    #[error("a certificate cannot be made: {0}")]
    Issue(#[from] rcgen::Error),
}

/// Keeps the certificate.
pub struct Keeper {
    secrets: Api<Secret>,
    /// Name of the Secret.
    secret: String,
    management: Management,
    /// What a certificate that is made here is for; pods call the first.
    names: Vec<String>,
    claim: Claim,
    certificate: watch::Sender<Option<Arc<CertifiedKey>>>,
    authorities: watch::Sender<Option<Arc<str>>>,
    /// When the certificate ends, in seconds since 1970.
    ends: IntGauge,
}

impl Keeper {
    /// Keeps the certificate in the Secret for pods that call `host`. What it keeps is shown by the server and trusted by the pods.
    ///
    /// # Errors
    /// When rustls has no way to serve, which would be a bug here.
    pub fn new(
        client: Client,
        namespace: &str,
        secret: &str,
        management: Management,
        host: &str,
        claim: Claim,
    ) -> anyhow::Result<(Self, TlsAcceptor, Trust)> {
        let (certificate, shown) = watch::channel(None);
        let (authorities, trusted) = watch::channel(None);
        let keeper = Self {
            secrets: Api::namespaced(client, namespace),
            secret: secret.to_owned(),
            management,
            names: names(host),
            claim,
            certificate,
            authorities,
            ends: Self::end_gauge()?,
        };
        Ok((keeper, server(shown)?, Trust(Some(trusted))))
    }

    /// The metric of [`Self::ends`], not set yet.
    ///
    /// # Errors
    /// When its name is none, which would be a bug here.
    pub fn end_gauge() -> prometheus::Result<IntGauge> {
        IntGauge::new(
            "meander_operator_certificate_end_timestamp_seconds",
            "When the certificate of the gRPC port ends, in seconds since 1970; 0 while there is none.",
        )
    }

    /// When the certificate ends, in seconds since 1970; 0 while there is none.
    pub fn ends(&self) -> IntGauge {
        self.ends.clone()
    }

    /// Keeps it until `shutdown`.
    pub async fn run(self, shutdown: CancellationToken) {
        let mut said = String::new();
        loop {
            let look = async { timeout(DEADLINE, self.look()).await.unwrap_or(Err(Trouble::NoAnswer)) };
            let Some(result) = shutdown.run_until_cancelled(look).await else {
                return;
            };
            let says = result.err().map(|trouble| trouble.to_string()).unwrap_or_default();
            if says != said && !says.is_empty() {
                warn!(
                    secret = self.secret,
                    "no certificate to serve with, or no newer one: {says}"
                );
            }
            said = says;
            let pause = if self.certificate.borrow().is_some() {
                LOOK
            } else {
                RETRY
            };
            if shutdown.run_until_cancelled(sleep(pause)).await.is_none() {
                return;
            }
        }
    }

    /// Takes over what the Secret holds, and before that renews it where that is due.
    async fn look(&self) -> Result<(), Trouble> {
        let found = self.secrets.get_opt(&self.secret).await.map_err(Trouble::Read)?;
        let now = Timestamp::now().as_second();
        match (self.management, found) {
            (Management::Managed, found) if self.claim.is_held() => {
                let old = found.as_ref().and_then(|secret| secret.data.clone());
                match (self.renewed(found, now).await, old) {
                    (Ok(data), _) => self.take(&data, now),
                    // What cannot be replaced may be good for weeks.
                    (Err(trouble), Some(old)) => self.take(&old, now).and(Err(trouble)),
                    (Err(trouble), None) => Err(trouble),
                }
            }
            (_, Some(secret)) => self.take(&secret.data.unwrap_or_default(), now),
            (Management::Managed, None) => Err(Trouble::NotYet),
            (Management::External, None) => Err(Trouble::Missing),
        }
    }

    /// Shows this certificate from now on, and has its authorities be trusted.
    fn take(&self, data: &Data, now: i64) -> Result<(), Trouble> {
        let host = self.names.first().map(String::as_str).unwrap_or_default();
        let served = Served::read(data, host, now)?;
        self.ends.set(served.ends);
        // First who is to be trusted, then who has to be.
        self.authorities.send_if_modified(|known| {
            let is_new = known.as_deref() != Some(&served.authorities);
            if is_new {
                info!(secret = self.secret, "the authorities that pods trust are new");
                *known = Some(served.authorities.into());
            }
            is_new
        });
        self.certificate.send_replace(Some(served.certified));
        Ok(())
    }

    /// What the Secret holds once it is as it should be now.
    async fn renewed(&self, found: Option<Secret>, now: i64) -> Result<Data, Trouble> {
        let version = found
            .as_ref()
            .and_then(|secret| secret.metadata.resource_version.clone());
        let current = found.and_then(|secret| secret.data);
        let Some(data) = issued::renewed(current.as_ref(), &self.names, now)? else {
            return Ok(current.unwrap_or_default());
        };
        // With the version that was read, it fails if anybody wrote since. Two that both make the first one would have to lead both;
        // then the later one holds, and the other takes it over at its next look.
        let secret = json!({
            "apiVersion": "v1",
            "kind": "Secret",
            "metadata": {
                "name": self.secret,
                "resourceVersion": version,
                "labels": {"app.kubernetes.io/managed-by": FIELD_MANAGER},
            },
            "type": "kubernetes.io/tls",
            "data": data,
        });
        let params = PatchParams::apply(FIELD_MANAGER).force();
        self.secrets
            .patch(&self.secret, &params, &Patch::Apply(secret))
            .await
            .map_err(Trouble::Write)?;
        info!(secret = self.secret, "a new certificate is made");
        Ok(data)
    }
}

/// What the host is called: a Service has four names, of which pods elsewhere use the longer ones.
fn names(host: &str) -> Vec<String> {
    let mut names = vec![host.to_owned()];
    if let Some((service, namespace)) = host.strip_suffix(".svc").and_then(|host| host.split_once('.')) {
        names.extend([
            service.to_owned(),
            format!("{service}.{namespace}"),
            format!("{host}.cluster.local"),
        ]);
    }
    names
}

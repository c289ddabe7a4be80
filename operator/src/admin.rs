//! `/livez`, `/readyz` and `/metrics`.

use std::sync::{
    Arc,
    atomic::{AtomicBool, Ordering},
};

use axum::{Router, extract::State, http::StatusCode, routing::get};
use tokio::net::TcpListener;
use tokio_util::sync::CancellationToken;

use crate::{metrics::Metrics, tls::Trust};

/// What `/readyz` tells.
#[derive(Clone, Debug)]
pub struct Readiness {
    started: Arc<AtomicBool>,
    trust: Trust,
}

impl Readiness {
    /// One that is not ready, and will not be before it can be called.
    pub fn new(trust: Trust) -> Self {
        let started = Arc::default();
        Self { started, trust }
    }

    /// The process does its part: it leads and knows every resource, or it stands by for the leader.
    pub fn set(&self, ready: bool) {
        self.started.store(ready, Ordering::Release);
    }

    fn get(&self) -> Result<&'static str, &'static str> {
        if !self.trust.is_settled() {
            Err("no certificate for the gRPC port yet; the log says why\n")
        } else if !self.started.load(Ordering::Acquire) {
            Err("starting\n")
        } else {
            Ok("ok\n")
        }
    }
}

/// Serves until `shutdown`.
///
/// # Errors
/// When the listener breaks.
pub async fn serve(
    listener: TcpListener,
    readiness: Readiness,
    metrics: Arc<Metrics>,
    shutdown: CancellationToken,
) -> anyhow::Result<()> {
    let router = Router::new()
        .route("/livez", get(|| async { "ok\n" }))
        .route("/readyz", get(ready).with_state(readiness))
        .route("/metrics", get(text).with_state(metrics));
    axum::serve(listener, router)
        .with_graceful_shutdown(shutdown.cancelled_owned())
        .await?;
    Ok(())
}

async fn ready(State(readiness): State<Readiness>) -> (StatusCode, &'static str) {
    match readiness.get() {
        Ok(text) => (StatusCode::OK, text),
        Err(text) => (StatusCode::SERVICE_UNAVAILABLE, text),
    }
}

async fn text(State(metrics): State<Arc<Metrics>>) -> Result<String, StatusCode> {
    metrics.text().map_err(|_| StatusCode::INTERNAL_SERVER_ERROR)
}

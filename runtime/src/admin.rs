//! The administrative HTTP server: `/livez`, `/readyz` and `/metrics`.

use std::{io, net::SocketAddr};

use axum::{Router, extract::State, http::StatusCode, response::IntoResponse, routing::get};
use prometheus::{Registry, TextEncoder};
use tokio::{net::TcpListener, sync::watch, task::JoinHandle};
use tokio_util::sync::CancellationToken;

/// What the server tells.
#[derive(Clone)]
pub struct Admin {
    /// `/metrics`.
    pub registry: Registry,
    /// `/readyz`.
    pub ready: watch::Receiver<bool>,
}

impl Admin {
    /// Listens, and serves on a task of its own until `shutdown`.
    ///
    /// # Errors
    /// When the address cannot be listened on.
    pub async fn serve(self, address: SocketAddr, shutdown: CancellationToken) -> io::Result<JoinHandle<()>> {
        let listener = TcpListener::bind(address).await?;
        let router = Router::new()
            // Whoever answers lives.
            .route("/livez", get(|| async { "ok\n" }))
            .route("/readyz", get(readyz))
            .route("/metrics", get(metrics))
            .with_state(self);
        Ok(tokio::spawn(async move {
            // Not a graceful shutdown: an idle keep-alive connection of a scraper must not hold up the process.
            tokio::select! {
                () = shutdown.cancelled() => {}
                result = axum::serve(listener, router) => {
                    if let Err(error) = result {
                        tracing::error!(%error, "the administrative server ended");
                    }
                }
            }
        }))
    }
}

async fn readyz(State(admin): State<Admin>) -> (StatusCode, &'static str) {
    if *admin.ready.borrow() {
        (StatusCode::OK, "ok\n")
    } else {
        (StatusCode::SERVICE_UNAVAILABLE, "not ready\n")
    }
}

async fn metrics(State(admin): State<Admin>) -> impl IntoResponse {
    match TextEncoder::new().encode_to_string(&admin.registry.gather()) {
        Ok(text) => (StatusCode::OK, [("content-type", prometheus::TEXT_FORMAT)], text),
        Err(error) => (
            StatusCode::INTERNAL_SERVER_ERROR,
            [("content-type", "text/plain")],
            error.to_string(),
        ),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn admin(ready: watch::Receiver<bool>) -> Admin {
        Admin {
            registry: Registry::new(),
            ready,
        }
    }

    #[tokio::test]
    async fn readiness_follows_its_channel() {
        let (ready, seen) = watch::channel(false);
        let admin = admin(seen);
        assert_eq!(readyz(State(admin.clone())).await.0, StatusCode::SERVICE_UNAVAILABLE);
        ready.send_replace(true);
        assert_eq!(readyz(State(admin)).await.0, StatusCode::OK);
    }
}

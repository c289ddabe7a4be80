//! The administrative HTTP server: `/livez`, `/readyz` and `/metrics`.

use std::{
    collections::BTreeMap,
    fmt::Write as _,
    io,
    net::SocketAddr,
    sync::{Arc, Mutex, PoisonError},
    time::{Duration, Instant},
};

use axum::{Router, extract::State, http::StatusCode, response::IntoResponse, routing::get};
use prometheus::{Registry, TextEncoder};
use tokio::{net::TcpListener, sync::watch, task::JoinHandle};
use tokio_util::sync::CancellationToken;

/// The pulses of the process's tasks. The process is alive while each of them beats.
#[derive(Clone, Default)]
pub struct Liveness(Arc<Mutex<BTreeMap<&'static str, Beat>>>);

struct Beat {
    last: Instant,
    longest_silence: Duration,
}

impl Liveness {
    /// Watches a task from now on, until its pulse is dropped. A name stands for one task.
    #[must_use]
    pub fn watch(&self, task: &'static str, longest_silence: Duration) -> Pulse {
        let pulse = Pulse {
            task,
            longest_silence,
            liveness: self.clone(),
        };
        pulse.beat();
        pulse
    }

    /// The tasks that are silent for too long, with how long they are.
    fn silent(&self) -> Vec<(&'static str, Duration)> {
        self.lock()
            .iter()
            .map(|(task, beat)| (*task, beat.last.elapsed(), beat.longest_silence))
            .filter(|(_, silence, longest)| silence > longest)
            .map(|(task, silence, _)| (task, silence))
            .collect()
    }

    fn lock(&self) -> std::sync::MutexGuard<'_, BTreeMap<&'static str, Beat>> {
        self.0.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

/// What a task shows its life by.
pub struct Pulse {
    task: &'static str,
    longest_silence: Duration,
    liveness: Liveness,
}

impl Pulse {
    /// Says that the task lives. Cheap enough for every turn of its loop.
    pub fn beat(&self) {
        let beat = Beat {
            last: Instant::now(),
            longest_silence: self.longest_silence,
        };
        self.liveness.lock().insert(self.task, beat);
    }
}

impl Drop for Pulse {
    fn drop(&mut self) {
        self.liveness.lock().remove(self.task);
    }
}

/// What the server tells.
#[derive(Clone)]
pub struct Admin {
    /// `/metrics`.
    pub registry: Registry,
    /// `/livez`.
    pub liveness: Liveness,
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
            .route("/livez", get(livez))
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

async fn livez(State(admin): State<Admin>) -> (StatusCode, String) {
    let silent = admin.liveness.silent();
    if silent.is_empty() {
        return (StatusCode::OK, "ok\n".to_owned());
    }
    let mut text = String::new();
    for (task, silence) in silent {
        let _ = writeln!(text, "{task} is silent for {} s", silence.as_secs());
    }
    (StatusCode::SERVICE_UNAVAILABLE, text)
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
            liveness: Liveness::default(),
            ready,
        }
    }

    #[tokio::test]
    async fn it_is_alive_while_every_pulse_beats_and_forgets_those_that_ended() {
        let admin = admin(watch::channel(false).1);
        let steady = admin.liveness.watch("steady", Duration::from_secs(3600));
        assert_eq!(livez(State(admin.clone())).await.0, StatusCode::OK);

        let stuck = admin.liveness.watch("stuck", Duration::ZERO);
        let (status, text) = livez(State(admin.clone())).await;
        assert_eq!(status, StatusCode::SERVICE_UNAVAILABLE);
        assert!(text.contains("stuck") && !text.contains("steady"), "{text}");

        drop(stuck);
        assert_eq!(livez(State(admin.clone())).await.0, StatusCode::OK);
        steady.beat();
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

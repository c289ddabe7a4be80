//! What a replay is told to do while it runs.

use std::future::pending;

use meander_config::{ReplayConfig, Speed};
use meander_proto::v1::Directive;
use tokio::sync::watch;

/// What is asked for now.
#[derive(Clone, Copy, Debug, PartialEq)]
pub struct Order {
    /// Hold delivery.
    pub paused: bool,
    /// The pace.
    pub speed: Speed,
    /// End now.
    pub cancel: bool,
}

/// The newest order: the configuration's, until a directive of the operator replaces it.
#[derive(Clone)]
pub struct Orders {
    order: Order,
    configured: Speed,
    directives: watch::Receiver<Option<Directive>>,
}

impl Orders {
    /// Starts with what the configuration says.
    #[must_use]
    pub fn new(config: &ReplayConfig, directives: watch::Receiver<Option<Directive>>) -> Self {
        Self {
            order: Order {
                paused: config.suspended,
                speed: config.speed,
                cancel: false,
            },
            configured: config.speed,
            directives,
        }
    }

    /// What is asked for now.
    pub fn current(&mut self) -> Order {
        if let Some(directive) = &*self.directives.borrow_and_update() {
            self.order.paused = directive.paused;
            self.order.cancel = directive.cancel;
            if directive.speed.is_empty() {
                self.order.speed = self.configured;
            } else {
                match directive.speed.parse() {
                    Ok(speed) => self.order.speed = speed,
                    Err(error) => tracing::warn!(%error, "the operator's directive; the speed stays as it was"),
                }
            }
        }
        self.order
    }

    /// Waits for another order; for ever if nobody is there to give one.
    pub async fn changed(&mut self) -> Order {
        if self.directives.changed().await.is_err() {
            pending::<()>().await;
        }
        self.current()
    }
}

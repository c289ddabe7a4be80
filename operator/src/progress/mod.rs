//! What runtime pods report, and what they are told.

mod auth;
mod control;
mod service;
mod tracker;

pub use auth::Authenticator;
pub use service::ProgressTrackerService;
pub use tracker::{Kind, Observation, Pokes, ResourceKey, Tracker};

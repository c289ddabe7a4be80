//! The Kubernetes operator of Meander.
//!
//! A resource enters at [`pipeline`] or [`replay`], passes the same five stages in both, and leaves as objects and status. What a
//! runtime pod knows enters at [`progress`]. Only the holder of the lease ([`lease`]) writes anything.

pub mod admin;
pub mod apply;
pub mod cache;
pub mod check;
pub mod client;
pub mod conditions;
pub mod context;
pub mod error;
pub mod events;
pub mod format;
mod job;
pub mod lease;
pub mod metrics;
pub mod naming;
pub mod operator;
pub mod pipeline;
pub mod pod;
pub mod progress;
pub mod replay;
pub mod secrets;
pub mod status;
pub mod tls;

//! Starts the real services that tests run against.
//!
//! Each service is a process of its own on free loopback ports, with its files in a temporary folder. It ends, and its files go,
//! when its handle is dropped; when the whole test process ends, however it does, a guard ends what is left (see [`process`]).
//!
//! ```no_run
//! # async fn example() {
//! use meander_test_support::{Kafka, Postgres, Redis, unique_name};
//!
//! let postgres = Postgres::start(&[]).await;
//! let redis = Redis::start().await;
//! let kafka = Kafka::shared().await; // takes seconds to start: one for all tests of a binary
//! let prefix = unique_name("shop"); // keeps their topics apart
//! # }
//! ```
//!
//! Where a test would return an error, this crate panics with the service's log: there is nobody to handle it.

// A failure here is the test's failure.
#![allow(clippy::unwrap_used, clippy::expect_used, clippy::panic)]

pub mod collector;
mod config;
mod debezium;
pub mod disk;
pub mod instrumentation;
mod kafka;
mod ports;
mod postgres;
pub mod process;
mod redis;
pub mod relay;
mod runtime;
mod tls;
mod wait;

use std::{
    env,
    path::PathBuf,
    sync::atomic::{AtomicU64, Ordering},
};

/// What [`process::Process::signal`] sends.
pub use rustix::process::Signal;
/// What [`process::folder`] makes.
pub use tempfile::TempDir;

pub use crate::{
    config::capture_config,
    debezium::Debezium,
    kafka::{Brokers, Kafka, read_topics},
    ports::free_address,
    postgres::Postgres,
    redis::Redis,
    runtime::Runtime,
    tls::{Authority, Identity},
    wait::eventually,
};

/// Where `tests/setup.sh` puts what it fetches and builds.
fn cache() -> PathBuf {
    env::var_os("MEANDER_CACHE").map(PathBuf::from).unwrap_or_else(|| {
        let base = env::var_os("XDG_CACHE_HOME").map(PathBuf::from);
        let base = base.or_else(|| Some(PathBuf::from(env::var_os("HOME")?).join(".cache")));
        base.expect("HOME is not set").join("meander")
    })
}

/// A name that no other test uses, of characters that topics, streams, slots and publications all allow.
#[must_use]
pub fn unique_name(stem: &str) -> String {
    static NEXT: AtomicU64 = AtomicU64::new(1);
    format!("{stem}_{}_{}", std::process::id(), NEXT.fetch_add(1, Ordering::Relaxed))
}

//! Waiting for a condition. Tests never wait for a length of time.

use std::{
    fmt::Display,
    time::{Duration, Instant},
};

/// How often a condition is looked at.
pub(crate) const INTERVAL: Duration = Duration::from_millis(20);

/// Tries until it succeeds, and returns what it got.
///
/// # Panics
/// With the last error when `limit` has passed.
pub async fn eventually<T, E: Display>(
    what: &str,
    limit: Duration,
    mut attempt: impl AsyncFnMut() -> Result<T, E>,
) -> T {
    let deadline = Instant::now() + limit;
    loop {
        match attempt().await {
            Ok(value) => return value,
            Err(error) if Instant::now() >= deadline => panic!("{what}: not within {limit:?}: {error}"),
            Err(_) => tokio::time::sleep(INTERVAL).await,
        }
    }
}

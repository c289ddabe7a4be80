//! Writes a mark into the WAL every so often, and knows when it comes back through the slot.
//!
//! On a database in which nothing happens there is nothing else to tell a capture that keeps up from one that stands still. One mark is
//! under way at a time, so what is known of it is bounded. It is a message outside of transactions, which nobody but the captures of
//! this database see. That it cannot be written is said, and ends nothing.

use std::{future::pending, sync::Arc, time::Duration};

use tokio::{
    sync::watch,
    time::{MissedTickBehavior, interval},
};

use crate::{
    capture::{Context, stream::now_micros},
    source::postgres::preflight::{Catalog, Credentials, SourceError},
};

/// The marks' prefix. Every capture of the database sees them, so each names its slot.
pub(super) const PREFIX: &str = "meander.heartbeat";

/// What is known of this pipeline's marks. Clones share it.
#[derive(Clone, Default)]
pub(super) struct Heartbeats(Arc<watch::Sender<State>>);

#[derive(Default)]
struct State {
    /// When the mark was written that has not come back yet, in microseconds since the Unix epoch.
    under_way: Option<i64>,
    /// Why the last one could not be written.
    failure: Option<String>,
}

impl Heartbeats {
    /// When the mark was written that has not come back yet.
    pub(super) fn under_way(&self) -> Option<i64> {
        self.0.borrow().under_way
    }

    /// Why no mark can be written.
    pub(super) fn failure(&self) -> Option<String> {
        self.0.borrow().failure.clone()
    }

    /// One has come back.
    pub(super) fn came(&self, time_micros: i64) {
        self.0.send_if_modified(|state| {
            let ours = state.under_way.is_some_and(|under_way| under_way <= time_micros);
            if ours {
                state.under_way = None;
            }
            ours
        });
    }

    /// Waits until none is under way.
    async fn idle(&self) {
        // It cannot fail: a sender is held here.
        drop(self.0.subscribe().wait_for(|state| state.under_way.is_none()).await);
    }
}

/// When a message was written that is a mark for this slot.
pub(super) fn time_of(prefix: &str, content: &[u8], slot: &str) -> Option<i64> {
    let content = std::str::from_utf8(content).ok().filter(|_| prefix == PREFIX)?;
    content.strip_prefix(slot)?.strip_prefix(' ')?.parse().ok()
}

/// Writes marks for as long as it is polled, if any are asked for.
pub(super) async fn run(context: &Context) {
    let Some(seconds) = context.config.source.heartbeat_interval_seconds else {
        return pending().await;
    };
    let heartbeats = &context.heartbeats;
    // What a session before this one wrote may have come back to nobody.
    heartbeats.0.send_replace(State::default());
    let mut ticks = interval(Duration::from_secs(seconds.get().into()));
    ticks.set_missed_tick_behavior(MissedTickBehavior::Delay);
    let mut catalog = None;
    loop {
        ticks.tick().await;
        heartbeats.idle().await;
        let now = now_micros();
        // First, since it can come back before the answer does.
        heartbeats.0.send_modify(|state| state.under_way = Some(now));
        let (written, failure) = match write(context, catalog, now).await {
            Ok(catalog) => (Some(catalog), None),
            Err(error) => {
                let failure = format!(
                    "no heartbeat can be written: {error}; let source.postgres.host name the primary, and the role execute pg_logical_emit_message, or leave heartbeatIntervalSeconds out"
                );
                tracing::warn!(reason = "HeartbeatFailed", "{failure}");
                (None, Some(failure))
            }
        };
        catalog = written;
        heartbeats.0.send_modify(|state| {
            if failure.is_some() {
                state.under_way = None;
            }
            state.failure = failure;
        });
    }
}

async fn write(context: &Context, catalog: Option<Catalog>, now: i64) -> Result<Catalog, SourceError> {
    let source = &context.config.source;
    let catalog = match catalog {
        Some(catalog) => catalog,
        None => Catalog::connect(source, &Credentials::read(&source.server())?).await?,
    };
    catalog
        .emit_message(PREFIX, &format!("{} {now}", source.slot_name))
        .await?;
    Ok(catalog)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn only_a_mark_of_the_slot_is_one() {
        assert_eq!(time_of(PREFIX, b"a_slot 17", "a_slot"), Some(17));
        for (prefix, content) in [
            ("meander.other", &b"a_slot 17"[..]),
            (PREFIX, b"a_slot_2 17"),
            (PREFIX, b"a_slot 17 "),
            (PREFIX, b"a_slot "),
            (PREFIX, b"\xff 17"),
        ] {
            assert_eq!(time_of(prefix, content, "a_slot"), None, "{content:?}");
        }
    }

    #[test]
    fn a_mark_of_an_earlier_session_is_not_taken_for_the_one_under_way() {
        let heartbeats = Heartbeats::default();
        heartbeats.0.send_modify(|state| state.under_way = Some(20));
        heartbeats.came(10);
        assert_eq!(heartbeats.under_way(), Some(20));
        heartbeats.came(20);
        assert_eq!(heartbeats.under_way(), None);
    }
}

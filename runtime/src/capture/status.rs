//! Tells PostgreSQL what was received and what it may forget, on a task of its own: a reader that waits for a sink must not look
//! dead to the server.

use std::{
    sync::{
        Arc,
        atomic::{AtomicU64, Ordering::Relaxed},
    },
    time::Duration,
};

use tokio::{
    sync::{Notify, watch},
    task::JoinHandle,
    time::{MissedTickBehavior, interval, timeout},
};

use crate::{
    position::Lsn,
    source::postgres::wire::{StatusWriter, WireError},
};

/// A sixth of the shortest `wal_sender_timeout` that is asked for.
const INTERVAL: Duration = Duration::from_millis(500);
/// Every so many times the server is asked to answer, which shows that it lives, and how far its WAL has grown.
const ASK_EVERY: u32 = 4;
const FINISH_DEADLINE: Duration = Duration::from_secs(2);

/// What the reader has seen. Clones share it.
#[derive(Clone, Default)]
pub(super) struct Received(Arc<Places>);

#[derive(Default)]
struct Places {
    received: AtomicU64,
    server: AtomicU64,
    reply: Notify,
}

impl Received {
    /// The reader has everything before this.
    pub(super) fn set_received(&self, lsn: Lsn) {
        self.0.received.fetch_max(lsn.0, Relaxed);
    }

    /// The server's WAL has grown to this.
    pub(super) fn set_server(&self, lsn: Lsn) {
        self.0.server.fetch_max(lsn.0, Relaxed);
    }

    /// The server waits for a status.
    pub(super) fn reply_soon(&self) {
        self.0.reply.notify_one();
    }

    /// What the reader has.
    pub(super) fn received(&self) -> Lsn {
        Lsn(self.0.received.load(Relaxed))
    }

    /// How far the server's WAL has grown.
    pub(super) fn server(&self) -> Lsn {
        Lsn(self.0.server.load(Relaxed))
    }
}

/// The task that sends.
pub(super) struct Task(JoinHandle<WireError>, watch::Sender<bool>);

impl Task {
    /// Starts sending. While `acknowledged` is none, nothing is acknowledged.
    pub(super) fn start(
        mut writer: StatusWriter,
        received: Received,
        mut acknowledged: watch::Receiver<Option<Lsn>>,
    ) -> Self {
        let (finish, mut finished) = watch::channel(false);
        let task = tokio::spawn(async move {
            let mut ticks = interval(INTERVAL);
            ticks.set_missed_tick_behavior(MissedTickBehavior::Delay);
            let mut count = 0_u32;
            loop {
                let mut ask = false;
                tokio::select! {
                    _ = ticks.tick() => {
                        count = count.wrapping_add(1);
                        ask = count.is_multiple_of(ASK_EVERY);
                    }
                    () = received.0.reply.notified() => {}
                    Ok(()) = acknowledged.changed() => {}
                    _ = finished.changed() => {}
                }
                let flushed = acknowledged.borrow_and_update().unwrap_or(Lsn::ZERO);
                let sent = writer.send(received.received().max(flushed), flushed, ask).await;
                if let Err(error) = sent {
                    return error;
                }
                if *finished.borrow_and_update() {
                    return WireError::Protocol("finished".to_owned());
                }
            }
        });
        Self(task, finish)
    }

    /// Waits until sending fails.
    pub(super) async fn failed(&mut self) -> WireError {
        match (&mut self.0).await {
            Ok(error) => error,
            Err(error) => WireError::Protocol(error.to_string()),
        }
    }

    /// Sends the last status and ends.
    pub(super) async fn finish(mut self) {
        self.1.send_replace(true);
        if !self.0.is_finished() && timeout(FINISH_DEADLINE, &mut self.0).await.is_err() {
            self.0.abort();
        }
    }
}

impl Drop for Task {
    fn drop(&mut self) {
        self.0.abort();
    }
}

//! What is on its way to Redis. Whoever offers may wait for room, for a moment: what finds none then is dropped, and so is everything after
//! it, until the feed collects again.

use std::{collections::VecDeque, sync::Arc, time::Duration};

use tokio::{
    sync::watch,
    time::{Instant, timeout},
};

use crate::{batch::Batch, position::Position, sink::redis::BUFFER_BYTES};

/// How long one batch waits for room. A Redis that is so slow is refilled later.
const LONGEST_WAIT: Duration = Duration::from_millis(500);
/// How long all of them wait, from one time that Redis had everything to the next. To copy from Kafka what it lacks takes several times as long
/// as to wait for a Redis that is a little slower than Kafka; but one that stays slower must not keep PostgreSQL's WAL.
const PATIENCE: Duration = Duration::from_secs(60);

/// The buffer. Clones share it.
#[derive(Clone)]
pub struct Live(Arc<watch::Sender<State>>);

#[derive(Default)]
struct State {
    phase: Phase,
    /// Nothing more is offered.
    closed: bool,
    batches: VecDeque<Arc<Batch>>,
    bytes: usize,
    /// How long batches have waited for room since the buffer was last empty.
    waited: Duration,
    /// Batches offered since the start; those in the buffer are the last of them.
    offered: u64,
    /// The last change that was offered.
    last: Option<Position>,
}

/// Invariant: from `Collecting` on, the buffer holds everything that was offered since, less what was taken.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
enum Phase {
    /// What is offered is dropped.
    Detached,
    /// It is kept, while Redis is brought to where the buffer begins. So it is from the start, before anything is offered.
    #[default]
    Collecting,
    /// It is taken out.
    Attached,
}

/// What is taken out of the buffer.
pub(super) enum Taken {
    /// Batches in order, and the number of the last of them.
    Batches(Vec<Arc<Batch>>, u64),
    /// The buffer was full, and is empty now.
    Overflowed,
    /// There is nothing more, and there will be nothing more.
    Closed,
}

/// The end that offers. When it is dropped, the buffer is closed.
pub struct Offers(Live);

impl Offers {
    /// The end that offers into this buffer.
    #[must_use]
    pub fn new(live: Live) -> Self {
        Self(live)
    }

    /// Waits until there is room for a batch, or none is needed: for [`LONGEST_WAIT`] at most, and for [`PATIENCE`] in all. Cancel safe.
    pub async fn room(&self, batch: &Batch) {
        let is_full = |state: &State| {
            let may_get_room = state.phase != Phase::Detached && !state.batches.is_empty();
            may_get_room && state.bytes + batch.memory() > BUFFER_BYTES
        };
        let patience = {
            let state = self.0.0.borrow();
            if !is_full(&state) {
                return;
            }
            PATIENCE.saturating_sub(state.waited)
        };
        let mut changes = self.0.0.subscribe();
        let _waiting = Waiting {
            live: &self.0,
            since: Instant::now(),
        };
        // Without room, what is offered says that Redis is slow.
        let room = changes.wait_for(|state| !is_full(state));
        drop(timeout(patience.min(LONGEST_WAIT), room).await);
    }

    /// Puts a batch into the buffer, or drops it. Never waits.
    pub fn offer(&self, batch: &Arc<Batch>) {
        self.0.0.send_modify(|state| {
            state.offered += 1;
            state.last = state.last.max(batch.last());
            if state.phase == Phase::Detached {
                return;
            }
            if state.bytes + batch.memory() > BUFFER_BYTES {
                state.detach();
            } else {
                state.bytes += batch.memory();
                state.batches.push_back(Arc::clone(batch));
            }
        });
    }
}

/// Somebody waits for room. It counts until it is dropped.
struct Waiting<'a> {
    live: &'a Live,
    since: Instant,
}

impl Drop for Waiting<'_> {
    fn drop(&mut self) {
        self.live.0.send_if_modified(|state| {
            state.waited += self.since.elapsed();
            false
        });
    }
}

impl Drop for Offers {
    fn drop(&mut self) {
        self.0.0.send_modify(|state| state.closed = true);
    }
}

impl State {
    fn detach(&mut self) {
        self.phase = Phase::Detached;
        self.batches = VecDeque::new();
        self.bytes = 0;
        self.waited = Duration::ZERO;
    }
}

impl Default for Live {
    fn default() -> Self {
        Self(Arc::new(watch::Sender::new(State::default())))
    }
}

impl Live {
    /// True if everything that was ever offered is here.
    pub(super) fn has_all(&self) -> bool {
        let state = self.0.borrow();
        state.phase == Phase::Collecting && state.offered == state.batches.len() as u64
    }

    /// Keeps what is offered from now on. Returns the last change that was offered before.
    pub(super) fn collect(&self) -> Option<Position> {
        let mut last = None;
        self.0.send_modify(|state| {
            state.detach();
            state.phase = Phase::Collecting;
            last = state.last;
        });
        last
    }

    /// Goes on to take out what was collected. False if it overflowed meanwhile.
    pub(super) fn attach(&self) -> bool {
        self.0.send_if_modified(|state| {
            let collected = state.phase == Phase::Collecting;
            if collected {
                state.phase = Phase::Attached;
            }
            collected
        })
    }

    /// Drops what is in the buffer, and what is offered from now on.
    pub(super) fn detach(&self) {
        self.0.send_modify(State::detach);
    }

    /// Waits for the next batches, and takes them out until they are `limit` bytes.
    pub(super) async fn take(&self, limit: usize) -> Taken {
        let mut changes = self.0.subscribe();
        let something = |state: &State| !state.batches.is_empty() || state.phase == Phase::Detached || state.closed;
        // It cannot fail: a sender is held here.
        drop(changes.wait_for(something).await);
        let mut taken = Taken::Closed;
        self.0.send_if_modified(|state| {
            let mut somebody_may_wait = false;
            if state.phase == Phase::Detached {
                taken = Taken::Overflowed;
            } else if !state.batches.is_empty() {
                somebody_may_wait = state.bytes > BUFFER_BYTES / 2;
                let (mut batches, mut bytes) = (Vec::new(), 0);
                while bytes < limit
                    && let Some(batch) = state.batches.pop_front()
                {
                    bytes += batch.memory();
                    batches.push(batch);
                }
                state.bytes -= bytes;
                if state.batches.is_empty() {
                    state.waited = Duration::ZERO;
                }
                taken = Taken::Batches(batches, state.offered - state.batches.len() as u64);
            }
            somebody_may_wait
        });
        taken
    }

    /// Waits until the buffer overflows.
    pub(super) async fn overflowed(&self) {
        drop(
            self.0
                .subscribe()
                .wait_for(|state| state.phase == Phase::Detached)
                .await,
        );
    }

    /// Waits until the buffer is closed and nobody takes out what is in it.
    pub(super) async fn abandoned(&self) {
        let abandoned = |state: &State| state.closed && state.phase != Phase::Attached;
        drop(self.0.subscribe().wait_for(abandoned).await);
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::{batch::Destination, position::Epoch};

    fn batch(ordinal: u64, bytes: usize) -> Arc<Batch> {
        let mut batch = Batch::new();
        let position = Position {
            ordinal,
            ..Position::end_of_transaction(Epoch::FIRST, crate::position::Lsn(16))
        };
        let destination = Arc::new(Destination {
            topic: "t".to_owned(),
            stream: "t".to_owned(),
            ..Destination::default()
        });
        batch
            .push::<()>(
                position,
                0,
                0,
                &destination,
                |_| Ok(false),
                |value| {
                    value.resize(value.len() + bytes, 0);
                    Ok(true)
                },
            )
            .unwrap();
        Arc::new(batch)
    }

    async fn ordinals(live: &Live) -> (Vec<u64>, u64) {
        match live.take(usize::MAX).await {
            Taken::Batches(batches, number) => (
                batches.iter().filter_map(|batch| Some(batch.last()?.ordinal)).collect(),
                number,
            ),
            _ => panic!("there is something"),
        }
    }

    #[tokio::test]
    async fn what_is_collected_begins_after_the_last_that_was_dropped() {
        let live = Live::default();
        let offers = Offers::new(live.clone());
        offers.offer(&batch(1, 10));
        assert!(live.has_all());
        live.detach();
        offers.offer(&batch(2, 10));
        assert!(!live.has_all());
        assert_eq!(live.collect().map(|position| position.ordinal), Some(2));
        offers.offer(&batch(3, 10));
        assert!(live.attach());
        offers.offer(&batch(4, 10));
        assert_eq!(ordinals(&live).await, (vec![3, 4], 4));
        drop(offers);
        assert!(matches!(live.take(1).await, Taken::Closed));
    }

    #[tokio::test]
    async fn a_full_buffer_drops_everything_and_says_so() {
        let live = Live::default();
        let offers = Offers::new(live.clone());
        live.collect();
        for ordinal in 0..3 {
            offers.offer(&batch(ordinal, BUFFER_BYTES / 2));
        }
        assert!(!live.has_all());
        assert!(!live.attach(), "what was collected has a hole");
        live.overflowed().await;
        assert!(matches!(live.take(1).await, Taken::Overflowed));
        assert_eq!(live.collect().map(|position| position.ordinal), Some(2));
    }

    #[tokio::test(start_paused = true)]
    async fn a_full_buffer_is_waited_for_while_somebody_takes_from_it_and_no_longer_than_a_moment() {
        let live = Live::default();
        let offers = Offers::new(live.clone());
        let third = batch(1, BUFFER_BYTES / 3);
        offers.offer(&third);
        offers.offer(&third);
        let waited = || live.0.borrow().waited;
        live.attach();
        tokio::join!(offers.room(&third), async { drop(live.take(1).await) });
        offers.offer(&third);
        assert_eq!(waited(), Duration::ZERO, "there was room at once");
        offers.room(&third).await;
        assert!(
            waited() >= LONGEST_WAIT && waited() < 2 * LONGEST_WAIT,
            "nobody took from it"
        );
        while waited() < PATIENCE {
            offers.room(&third).await;
        }
        let mut now = Instant::now();
        offers.room(&third).await;
        assert!(now.elapsed() < LONGEST_WAIT, "it was waited for enough");
        drop(live.take(usize::MAX).await);
        assert_eq!(waited(), Duration::ZERO, "Redis has everything");
        offers.offer(&third);
        offers.offer(&third);
        live.detach();
        now = Instant::now();
        offers.room(&third).await;
        assert_eq!(now.elapsed(), Duration::ZERO, "it has no need of room");
    }

    #[tokio::test]
    async fn a_closed_buffer_is_abandoned_unless_somebody_takes_from_it() {
        let live = Live::default();
        let offers = Offers::new(live.clone());
        live.collect();
        offers.offer(&batch(1, 10));
        live.attach();
        drop(offers);
        assert_eq!(ordinals(&live).await.0, [1]);
        live.detach();
        live.abandoned().await;
    }
}

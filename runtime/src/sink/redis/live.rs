//! What is on its way to Redis. Whoever offers may wait for room, for a moment: what finds none then is dropped, and so is everything after
//! it, until the feed collects again.

use std::{collections::VecDeque, sync::Arc, time::Duration};

use tokio::{
    sync::watch,
    time::{Instant, timeout_at},
};

use crate::{batch::Batch, position::Position, sink::redis::BUFFER_BYTES};

/// How long one batch waits for room. A Redis that is so slow is refilled later.
const LONGEST_WAIT: Duration = Duration::from_millis(500);
/// How long batches wait in all; what passes without waiting is won back. So Kafka is held up for this long, and then for half of the time at most.
/// To copy from Kafka what Redis lacks takes several times as long as to wait for a Redis that is a little slower than Kafka; but one that stays
/// slower must not keep PostgreSQL's WAL.
const PATIENCE: Duration = Duration::from_secs(5);

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
    waits: Waits,
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

    /// Waits until there is room for a batch, or none is needed: for [`LONGEST_WAIT`] at most, however often it is begun anew, and for
    /// [`PATIENCE`] in all. Cancel safe.
    pub async fn room(&self, batch: &Batch) {
        let memory = batch.memory();
        let mut deadline = None;
        self.0.0.send_if_modified(|state| {
            if state.is_full_for(memory) {
                deadline = Some(state.waits.deadline(Instant::now()));
            }
            false
        });
        if let Some(deadline) = deadline {
            let mut changes = self.0.0.subscribe();
            // Without room, what is offered says that Redis is slow.
            drop(timeout_at(deadline, changes.wait_for(|state| !state.is_full_for(memory))).await);
        }
    }

    /// Puts a batch into the buffer, or drops it. Never waits.
    pub fn offer(&self, batch: &Arc<Batch>) {
        self.0.0.send_modify(|state| {
            state.waits.end(Instant::now());
            state.offered += 1;
            state.last = state.last.max(batch.last());
            if state.phase == Phase::Detached {
                return;
            }
            // A larger one finds room in an empty buffer.
            if !state.batches.is_empty() && state.bytes + batch.memory() > BUFFER_BYTES {
                state.detach();
            } else {
                state.bytes += batch.memory();
                state.batches.push_back(Arc::clone(batch));
            }
        });
    }
}

/// How long was waited for room.
#[derive(Default)]
struct Waits {
    /// Since when the next batch waits.
    since: Option<Instant>,
    /// What of [`PATIENCE`] was used up when the last wait ended, and when that was.
    spent: Duration,
    ended: Option<Instant>,
}

impl Waits {
    /// Until when the next batch waits.
    fn deadline(&mut self, now: Instant) -> Instant {
        let since = *self.since.get_or_insert(now);
        since + LONGEST_WAIT.min(PATIENCE.saturating_sub(self.spent_at(since)))
    }

    fn spent_at(&self, time: Instant) -> Duration {
        self.spent
            .saturating_sub(self.ended.map_or(Duration::ZERO, |ended| time - ended))
    }

    /// The batch waits no more.
    fn end(&mut self, now: Instant) {
        if let Some(since) = self.since.take() {
            self.spent = self.spent_at(since) + (now - since);
            self.ended = Some(now);
        }
    }
}

impl Drop for Offers {
    fn drop(&mut self) {
        self.0.0.send_modify(|state| state.closed = true);
    }
}

impl State {
    /// Whether it is worth while to wait for room: somebody takes from the buffer, or begins to, the session being young.
    fn is_full_for(&self, memory: usize) -> bool {
        let is_emptied = self.phase == Phase::Attached || self.has_all();
        is_emptied && !self.batches.is_empty() && self.bytes + memory > BUFFER_BYTES
    }

    fn has_all(&self) -> bool {
        self.phase == Phase::Collecting && self.offered == self.batches.len() as u64
    }

    fn detach(&mut self) {
        self.phase = Phase::Detached;
        self.batches = VecDeque::new();
        self.bytes = 0;
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
        self.0.borrow().has_all()
    }

    /// True if there is nothing to take.
    pub(super) fn is_empty(&self) -> bool {
        self.0.borrow().batches.is_empty()
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
            let mut is_room = false;
            if state.phase == Phase::Detached {
                taken = Taken::Overflowed;
            } else if !state.batches.is_empty() {
                is_room = true;
                let (mut batches, mut bytes) = (Vec::new(), 0);
                while bytes < limit
                    && let Some(batch) = state.batches.pop_front()
                {
                    bytes += batch.memory();
                    batches.push(batch);
                }
                state.bytes -= bytes;
                taken = Taken::Batches(batches, state.offered - state.batches.len() as u64);
            }
            is_room
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
    use tokio::time::timeout;

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
        live.attach();
        let start = Instant::now();
        tokio::join!(offers.room(&third), async { drop(live.take(1).await) });
        offers.offer(&third);
        assert_eq!(start.elapsed(), Duration::ZERO, "there was room at once");
        // A wait that is broken off goes on with the next one.
        let wait = async { while timeout(LONGEST_WAIT / 5, offers.room(&third)).await.is_err() {} };
        wait.await;
        assert_eq!(start.elapsed(), LONGEST_WAIT, "nobody took from it");
        offers.offer(&third);
        live.overflowed().await;
        offers.room(&third).await;
        assert_eq!(start.elapsed(), LONGEST_WAIT, "it has no need of room");
    }

    #[test]
    fn batches_wait_for_half_of_the_time_at_most() {
        let (mut waits, mut now) = (Waits::default(), Instant::now());
        let mut wait = |now: &mut Instant| {
            let waited = waits.deadline(*now) - *now;
            *now += waited;
            waits.end(*now);
            waited
        };
        let all: Duration = (0..100).map(|_| wait(&mut now)).sum();
        assert_eq!(all, PATIENCE);
        now += LONGEST_WAIT / 4;
        assert_eq!(wait(&mut now), LONGEST_WAIT / 4);
        now += 10 * PATIENCE;
        assert_eq!(wait(&mut now), LONGEST_WAIT);
    }

    #[tokio::test]
    async fn a_batch_of_any_size_finds_room_in_an_empty_buffer() {
        let live = Live::default();
        let offers = Offers::new(live.clone());
        offers.offer(&batch(1, 2 * BUFFER_BYTES));
        assert!(live.attach());
        assert_eq!(ordinals(&live).await.0, [1]);
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

//! What is delivered so far, shared between a target and whoever reports.

use std::{
    collections::{HashMap, VecDeque},
    sync::{Arc, Mutex, MutexGuard, PoisonError},
    time::Duration,
};

use tokio::{sync::watch, time::Instant};

use super::{
    checkpoint::Done,
    patience::NOTICE,
    record::{Coordinate, Passed, Record},
    target::{Batch, Mark},
};

/// Counts what a target has taken.
#[derive(Clone)]
pub struct Tally {
    ledger: Arc<Mutex<Ledger>>,
    open: watch::Sender<bool>,
    trouble: Arc<Mutex<Option<Trouble>>>,
}

/// Why nothing gets into the target at the moment, while it is tried.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Trouble {
    /// In one word.
    pub reason: &'static str,
    /// In one sentence.
    pub message: String,
}

impl Trouble {
    /// The target was given something and has not answered.
    #[must_use]
    pub fn silence() -> Self {
        Self {
            reason: "TargetSilent",
            message: format!(
                "The target was given changes and has not answered for more than {NOTICE:?}; see what keeps it."
            ),
        }
    }
}

/// What is delivered so far.
#[derive(Clone, Copy, Debug, Default)]
pub struct Counts {
    /// Records.
    pub delivered: u64,
    /// Bytes of keys and values, since this process began.
    pub bytes: u64,
    /// What else is behind.
    pub passed: Passed,
    /// The first delivered record: its event time and when it was handed over.
    pub first: Option<(i64, Instant)>,
    /// The last delivered record: its event time and when it was handed over.
    pub last: Option<(i64, Instant)>,
    /// The last record.
    pub coordinate: Option<Coordinate>,
}

/// What is delivered of a topic, since this process began.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct TopicCounts {
    /// The topic; each table has one of its own.
    pub topic: Arc<str>,
    /// Records.
    pub delivered: u64,
    /// Bytes of keys and values.
    pub bytes: u64,
    /// Commit time of the first record, in microseconds.
    pub first_time: i64,
    /// Commit time of the last record.
    pub last_time: i64,
}

/// Invariant: `handed` holds what was handed over and not credited, in order. A target credits in that order, if not in the same batches.
#[derive(Default)]
struct Ledger {
    counts: Counts,
    topics: Vec<TopicCounts>,
    index: HashMap<Arc<str>, usize>,
    /// The index of the topic that was looked up last.
    last: usize,
    handed: VecDeque<Handed>,
    /// When the first of them was handed over, or the one before it was credited.
    waiting: Option<Instant>,
}

/// A record without what it holds.
#[derive(Clone, Copy)]
struct Handed {
    /// The index of its topic.
    topic: usize,
    bytes: u64,
    commit_time: i64,
}

impl Default for Tally {
    fn default() -> Self {
        Self {
            ledger: Arc::default(),
            open: watch::channel(false).0,
            trouble: Arc::default(),
        }
    }
}

impl Tally {
    /// The destination can be delivered to. The clock of the replay does not start before this.
    pub fn open(&self) {
        self.open.send_replace(true);
    }

    /// Says why nothing gets into the target, or that this is over, as it is whenever something does.
    pub fn set_trouble(&self, trouble: Option<Trouble>) {
        *self.trouble.lock().unwrap_or_else(PoisonError::into_inner) = trouble;
    }

    /// Why nothing gets into the target at the moment.
    #[must_use]
    pub fn trouble(&self) -> Option<Trouble> {
        self.trouble.lock().unwrap_or_else(PoisonError::into_inner).clone()
    }

    /// Follows whether the destination was opened.
    #[must_use]
    pub fn opened(&self) -> watch::Receiver<bool> {
        self.open.subscribe()
    }

    /// Begins to count for a target that has this already; `offsets` of the range are before it. What was handed over and never credited
    /// will be handed over again.
    pub fn begin(&self, done: Option<&Done>, offsets: u64) {
        let now = Instant::now();
        self.open.send_replace(false);
        let mut ledger = self.lock();
        ledger.handed.clear();
        let bytes = ledger.counts.bytes;
        ledger.counts = match done {
            Some(done) => Counts {
                delivered: done.delivered,
                bytes,
                passed: Passed {
                    offsets,
                    filtered: done.filtered,
                },
                first: Some((done.first_time, now)),
                last: Some((done.resume.timestamp.saturating_mul(1000), now)),
                coordinate: Some(done.resume.coordinate),
            },
            None => Counts {
                bytes,
                passed: Passed { offsets, filtered: 0 },
                ..Counts::default()
            },
        };
    }

    /// Notes what is handed over.
    pub fn hand(&self, batch: &Batch) {
        let mut ledger = self.lock();
        if ledger.handed.is_empty() {
            ledger.waiting = Some(Instant::now());
        }
        for record in &batch.records {
            let handed = Handed {
                topic: ledger.topic(record),
                bytes: (record.key.len() + record.value.len()) as u64,
                commit_time: record.commit_time,
            };
            ledger.handed.push_back(handed);
        }
    }

    /// Counts a batch as delivered.
    pub fn credit(&self, mark: &Mark) {
        let mut ledger = self.lock();
        for _ in 0..mark.records {
            let Some(handed) = ledger.handed.pop_front() else { break };
            ledger.counts.bytes += handed.bytes;
            ledger.topics[handed.topic].count(&handed);
        }
        let counts = &mut ledger.counts;
        counts.delivered += mark.records;
        counts.passed += mark.passed;
        counts.first.get_or_insert((mark.first_time, mark.handed));
        counts.last = Some((mark.last_time, mark.handed));
        counts.coordinate = Some(mark.resume.coordinate);
        ledger.waiting = Some(Instant::now());
        drop(ledger);
        self.set_trouble(None);
    }

    /// How long it is since the target was given something, or had taken something, of which more is to be taken.
    #[must_use]
    pub fn silence(&self) -> Duration {
        let ledger = self.lock();
        (ledger.waiting.filter(|_| !ledger.handed.is_empty())).map_or(Duration::ZERO, |since| since.elapsed())
    }

    /// What is delivered so far.
    #[must_use]
    pub fn counts(&self) -> Counts {
        self.lock().counts
    }

    /// What is delivered so far of each topic of which something is.
    #[must_use]
    pub fn topics(&self) -> Vec<TopicCounts> {
        let ledger = self.lock();
        (ledger.topics.iter())
            .filter(|topic| topic.delivered > 0)
            .cloned()
            .collect()
    }

    fn lock(&self) -> MutexGuard<'_, Ledger> {
        self.ledger.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

impl Ledger {
    fn topic(&mut self, record: &Record) -> usize {
        // Most often it is that of the record before.
        if (self.topics.get(self.last)).is_some_and(|last| last.topic == record.topic) {
            return self.last;
        }
        if let Some(known) = self.index.get(&record.topic) {
            self.last = *known;
            return *known;
        }
        self.index.insert(Arc::clone(&record.topic), self.topics.len());
        self.topics.push(TopicCounts {
            topic: Arc::clone(&record.topic),
            delivered: 0,
            bytes: 0,
            first_time: record.commit_time,
            last_time: record.commit_time,
        });
        self.topics.len() - 1
    }
}

impl TopicCounts {
    fn count(&mut self, handed: &Handed) {
        self.delivered += 1;
        self.bytes += handed.bytes;
        self.first_time = self.first_time.min(handed.commit_time);
        self.last_time = self.last_time.max(handed.commit_time);
    }
}

//! Where a bulk snapshot takes its place in the stream.
//!
//! The stream stands still while the snapshot is made, so that nothing of it is published whose place may be after that of the
//! snapshot. Then it goes on up to that place, which is before the first transaction that the snapshot does not see, and stands still
//! again until every row is published there. Nothing is remembered of a snapshot but the tables that were read to their end: after a
//! crash, what the stream had before the next snapshot comes before that one's rows, and is in them.

use std::{
    collections::{BTreeMap, BTreeSet},
    future::pending,
    time::Duration,
};

use meander_config::{PostgresSource, SnapshotMode};
use meander_proto::v1::{SnapshotProgress, TableSnapshot, table_snapshot};
use tokio::{
    sync::watch,
    task::JoinHandle,
    time::{Instant, sleep_until},
};

use super::{Stream, now_micros};
use crate::{
    capture::{CaptureError, snapshot::SHOWN_TABLES},
    log::Checkpoint,
    position::{Epoch, Lsn, Position},
    source::{
        Operation, Snapshot,
        postgres::{
            pgoutput::{LogicalMessage, decode},
            preflight::{Catalog, SourceError},
            snapshot::{
                bulk::{self, Attempt, Export, Order},
                session::Candidate,
            },
            wire::Frame,
        },
    },
};

/// How long it is waited before the next attempt, at first and at most.
const SHORTEST_PAUSE: Duration = Duration::from_secs(1);
const LONGEST_PAUSE: Duration = Duration::from_secs(30);
/// How often the progress is said.
const REPORT_INTERVAL: Duration = Duration::from_millis(500);

/// A bulk snapshot that is to be taken, or is being taken.
pub(in crate::capture) struct Bulk {
    source: PostgresSource,
    generation: u64,
    attempts: u64,
    pause: Duration,
    step: Step,
    /// What is to be read, in the order of the names.
    tables: Vec<Candidate>,
    reading: BTreeMap<u32, Reading>,
    /// Tables that were read to their end.
    read: BTreeSet<u32>,
    refused: BTreeMap<u32, String>,
    /// Why it does not begin.
    waiting: Option<String>,
    /// When the progress was last said.
    reported: Instant,
    progress: watch::Sender<Option<SnapshotProgress>>,
}

enum Step {
    Due(Instant),
    Attempted(JoinHandle<Attempt>),
    /// The stream goes on up to its place.
    Placed(Export, i64),
    /// The stream is there; the next of its records has this position.
    Here(Export, i64, Position),
}

/// How far a table is.
struct Reading {
    snapshot: Snapshot,
    rows: u64,
    blocks: u64,
    blocks_read: u64,
}

pub(super) enum Event {
    Due,
    Attempted(Result<Attempt, tokio::task::JoinError>),
    /// None when everything was read.
    Read(Option<bulk::Event>),
}

impl Bulk {
    /// None when there is none to be taken.
    pub(in crate::capture) fn new(
        source: &PostgresSource,
        checkpoint: &Checkpoint,
        progress: watch::Sender<Option<SnapshotProgress>>,
    ) -> Option<Self> {
        let wanted = source.snapshot.mode == SnapshotMode::Bulk && !checkpoint.snapshot.bulk_is_over;
        wanted.then(|| Self {
            source: source.clone(),
            generation: checkpoint.owner_generation,
            attempts: 0,
            pause: SHORTEST_PAUSE,
            step: Step::Due(Instant::now()),
            tables: Vec::new(),
            reading: BTreeMap::new(),
            read: BTreeSet::new(),
            refused: BTreeMap::new(),
            waiting: None,
            reported: Instant::now(),
            progress,
        })
    }

    /// True while nothing of the stream may be published.
    pub(super) fn holds(&self) -> bool {
        matches!(self.step, Step::Attempted(_) | Step::Here(..))
    }

    /// True if a message of the stream shows that everything before the snapshot's place was sent, and is not to be taken before the
    /// snapshot.
    pub(super) fn comes_before(&self, frame: &Frame<'_>, in_transaction: bool) -> bool {
        let Step::Placed(export, _) = &self.step else {
            return false;
        };
        let at = match *frame {
            _ if in_transaction => return false,
            Frame::Keepalive { wal_end, .. } => Some(wal_end),
            // What cannot be decoded is told when it is taken.
            Frame::Data { message, .. } => match decode(message) {
                Ok(LogicalMessage::Begin { final_lsn, .. }) => Some(final_lsn),
                // Its place is its last byte.
                Ok(LogicalMessage::Message { end_lsn, .. }) => Some(Lsn(end_lsn.0.saturating_sub(1))),
                _ => None,
            },
        };
        at.is_some_and(|at| at >= export.at)
    }

    /// The stream has come to the snapshot's place.
    pub(super) fn is_here(&mut self, epoch_at: impl Fn(Lsn) -> Epoch) {
        self.step = match std::mem::replace(&mut self.step, Step::Due(Instant::now())) {
            Step::Placed(export, time_micros) => {
                let commit_lsn = Lsn(export.at.0.saturating_sub(1));
                let first = Position {
                    epoch: epoch_at(commit_lsn),
                    commit_lsn,
                    ordinal: 0,
                };
                Step::Here(export, time_micros, first)
            }
            other => other,
        };
    }

    /// Waits for what comes next. Cancel safe.
    pub(super) async fn event(&mut self) -> Event {
        match &mut self.step {
            Step::Due(at) => {
                sleep_until(*at).await;
                Event::Due
            }
            Step::Attempted(task) => Event::Attempted(task.await),
            Step::Placed(..) => pending().await,
            Step::Here(export, ..) => Event::Read(export.next().await),
        }
    }

    fn attempt(&mut self, done: BTreeMap<u32, u32>) {
        self.attempts += 1;
        self.step = Step::Attempted(tokio::spawn(bulk::begin(Order {
            source: self.source.clone(),
            parallelism: self.source.snapshot.parallelism,
            done,
            number: format!("{}_{}", self.generation, self.attempts),
        })));
    }

    fn again(&mut self, cause: &SourceError) {
        tracing::warn!(%cause, "the snapshot cannot be taken yet");
        self.waiting = Some(cause.to_string());
        self.step = Step::Due(Instant::now() + self.pause);
        self.pause = (self.pause * 2).min(LONGEST_PAUSE);
        self.report();
    }

    fn give_up(&mut self, oid: u32, cause: String) {
        let table = self.tables.iter().find(|table| table.oid == oid).map(Candidate::name);
        tracing::warn!(
            table,
            cause,
            "a table was left out of the snapshot, and will be read in chunks"
        );
        self.reading.remove(&oid);
        self.refused.insert(oid, cause);
        self.report();
    }

    fn report_now_and_then(&mut self) {
        if self.reported.elapsed() >= REPORT_INTERVAL {
            self.report();
        }
    }

    fn report(&mut self) {
        self.reported = Instant::now();
        #[allow(clippy::cast_precision_loss)]
        let part = |oid: &u32| match self.reading.get(oid) {
            Some(reading) => reading.blocks_read as f64 / reading.blocks.max(1) as f64,
            None if self.read.contains(oid) => 1.0,
            None => 0.0,
        };
        let total: f64 = self.tables.iter().map(|table| table.estimate).sum();
        let read: f64 = self.tables.iter().map(|table| part(&table.oid) * table.estimate).sum();
        let mut tables: Vec<TableSnapshot> = self
            .tables
            .iter()
            .filter(|table| !self.read.contains(&table.oid))
            .take(SHOWN_TABLES)
            .map(|table| {
                let (state, message) = match (
                    self.reading.get(&table.oid),
                    self.refused.get(&table.oid),
                    &self.waiting,
                ) {
                    (Some(_), ..) => (table_snapshot::State::Reading, String::new()),
                    (None, Some(cause), _) => (table_snapshot::State::Refused, cause.clone()),
                    (None, None, Some(cause)) => (table_snapshot::State::Waiting, cause.clone()),
                    (None, None, None) => (table_snapshot::State::Pending, String::new()),
                };
                TableSnapshot {
                    table: table.name(),
                    state: state.into(),
                    rows: self.reading.get(&table.oid).map_or(0, |reading| reading.rows),
                    percent: part(&table.oid) * 100.0,
                    message,
                }
            })
            .collect();
        tables.sort_by_key(|table| table.rows == 0);
        let count = |tables: usize| u32::try_from(tables).unwrap_or(u32::MAX);
        self.progress.send_replace(Some(SnapshotProgress {
            tables_total: count(self.tables.len()),
            tables_done: count(self.read.len()),
            percent: 100.0 * read / total.max(1.0),
            tables,
        }));
    }
}

impl Drop for Bulk {
    fn drop(&mut self) {
        if let Step::Attempted(task) = &self.step {
            task.abort();
        }
    }
}

/// The next event of the snapshot, if there is one to be taken. Cancel safe.
pub(super) async fn event(bulk: Option<&mut Bulk>) -> Event {
    match bulk {
        Some(bulk) => bulk.event().await,
        None => pending().await,
    }
}

impl Stream<'_> {
    /// Takes what comes of the snapshot.
    pub(super) async fn take_bulk(&mut self, event: Event, catalog: &Catalog) -> Result<(), CaptureError> {
        let last = self.published.max(self.complete);
        let Some(bulk) = &mut self.bulk else { return Ok(()) };
        match event {
            Event::Due => {
                let state = self.snapshot.as_ref().map(super::Incremental::state);
                bulk.attempt(state.unwrap_or_default().done);
            }
            Event::Attempted(attempt) => {
                let Attempt { tables, outcome } = attempt?;
                bulk.tables = tables;
                match outcome {
                    // What was published so far has its place before the snapshot, since nothing was while it was made.
                    Ok(Some(export)) if last.is_none_or(|last| last.commit_lsn < export.at) => {
                        tracing::info!(at = %export.at, tables = bulk.tables.len(), "took a snapshot");
                        bulk.waiting = None;
                        bulk.pause = SHORTEST_PAUSE;
                        bulk.step = Step::Placed(export, now_micros());
                        bulk.report();
                    }
                    Ok(Some(_)) => bulk.again(&catalog.confused("it took a snapshot of an earlier time")),
                    Ok(None) => self.end_bulk(None),
                    Err(error) => bulk.again(&error),
                }
            }
            Event::Read(None) => {
                let at = match &bulk.step {
                    Step::Here(export, _, _) => Some(export.at),
                    _ => None,
                };
                self.end_bulk(at);
            }
            Event::Read(Some(event)) => self.take_read(event, catalog).await?,
        }
        Ok(())
    }

    async fn take_read(&mut self, event: bulk::Event, catalog: &Catalog) -> Result<(), CaptureError> {
        if let bulk::Event::Begin { shape, .. } = &event {
            self.learn_shape(shape, catalog).await?;
            self.ensure_topic(shape.oid, 0).await?;
        }
        if let bulk::Event::Rows(oid, rows) = &event {
            self.ensure_topic(*oid, rows.largest()).await?;
        }
        let Some(bulk) = &mut self.bulk else { return Ok(()) };
        let Step::Here(_, time_micros, position) = &bulk.step else {
            return Ok(());
        };
        let (time_micros, position) = (*time_micros, *position);
        let records = match event {
            bulk::Event::Begin { shape, blocks } => {
                let snapshot = Snapshot {
                    id: position.to_string(),
                    incremental: false,
                };
                let reading = Reading {
                    snapshot: snapshot.clone(),
                    rows: 0,
                    blocks,
                    blocks_read: 0,
                };
                bulk.reading.insert(shape.oid, reading);
                let begin = Operation::SnapshotBegin { snapshot: &snapshot };
                self.read(shape.oid, position, time_micros, [begin])?
            }
            bulk::Event::Rows(oid, rows) => {
                let Some(reading) = bulk.reading.get_mut(&oid) else {
                    return Ok(());
                };
                reading.rows += rows.len() as u64;
                let snapshot = reading.snapshot.clone();
                let snapshot = &snapshot;
                let reads = rows.iter().map(|new| Operation::Read { new, snapshot });
                self.read(oid, position, time_micros, reads)?
            }
            bulk::Event::Read(oid, blocks) => {
                if let Some(reading) = bulk.reading.get_mut(&oid) {
                    reading.blocks_read += blocks;
                }
                0
            }
            bulk::Event::End(oid) => {
                let Some(reading) = bulk.reading.remove(&oid) else {
                    return Ok(());
                };
                bulk.read.insert(oid);
                let end = Operation::SnapshotEnd {
                    snapshot: &reading.snapshot,
                    rows: reading.rows,
                };
                let records = self.read(oid, position, time_micros, [end])?;
                if let Some(snapshot) = &mut self.snapshot
                    && let Some(table) = self
                        .bulk
                        .iter()
                        .flat_map(|bulk| &bulk.tables)
                        .find(|table| table.oid == oid)
                {
                    snapshot.was_read(table);
                    self.batch.snapshot = Some(snapshot.state());
                }
                records
            }
            bulk::Event::GivenUp(oid, cause) => {
                bulk.give_up(oid, cause);
                0
            }
            bulk::Event::Failed(error) => return Err(error.into()),
        };
        if let Some(bulk) = &mut self.bulk {
            if let Step::Here(_, _, position) = &mut bulk.step {
                position.ordinal += records;
            }
            bulk.report_now_and_then();
        }
        Ok(())
    }

    /// Nothing is left to read at once. Everything before the snapshot's place was published, and the snapshot.
    fn end_bulk(&mut self, at: Option<Lsn>) {
        self.bulk = None;
        if let Some(snapshot) = &mut self.snapshot {
            snapshot.bulk_is_over();
            self.batch.snapshot = Some(snapshot.state());
        }
        if let Some(at) = at {
            let before = Lsn(at.0.saturating_sub(1));
            self.complete = self.complete.max(Some(Position::end_of_transaction(
                self.assembler.epoch_at(before),
                before,
            )));
            self.safe = self.safe.max(at);
            self.received.set_received(at);
        }
        self.news = true;
        tracing::info!("the snapshot is over");
    }
}

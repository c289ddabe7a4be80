//! Drives an incremental snapshot beside the stream: which table is next, which chunk, and what becomes of it.
//!
//! It never holds up the stream: a chunk is asked for when the stream has nothing to do, and one is under way at a time. Everything
//! that has to survive is in the [`SnapshotState`], which goes into Kafka in one transaction with the rows it speaks of.

use std::{
    collections::{BTreeMap, BTreeSet, HashSet},
    time::Duration,
};

use meander_config::{CaptureConfig, PostgresSource, SnapshotMode, SnapshotRequest, TableSelection};
use meander_proto::v1::{SnapshotProgress, TableSnapshot, table_snapshot};
use tokio::{sync::watch, time::Instant};

use crate::{
    log::{Checkpoint, SnapshotState, TableCursor},
    source::{
        Change, Operation,
        postgres::{
            pgoutput::{Datum, Tuple},
            preflight::{Selection, SourceError},
            snapshot::{
                WATERMARK_PREFIX,
                chunks::{Answer, CHUNK_BYTES, CHUNK_ROWS, Chunk, ChunkReader, Request, Which},
                overlap::{Again, Overlap, Stale},
                session::Candidate,
                shape::Shape,
            },
        },
    },
};

/// How often the tables are looked at: one may have joined, as a request may wait for, or be readable by now.
const LOOK_AGAIN: Duration = Duration::from_secs(30);
/// How long a chunk waits that cannot be taken yet.
const SHORTEST_PAUSE: Duration = Duration::from_millis(10);
const LONGEST_PAUSE: Duration = Duration::from_secs(1);
/// How long it waits for a new connection after one that failed.
const RECONNECT_PAUSE: Duration = Duration::from_secs(5);
/// Rows of the first chunk, before anything is known of their size.
const FIRST_ROWS: u32 = 32;
/// Rows that are come back to in one chunk. They are those with large values.
const COME_BACK_ROWS: usize = 8;
/// How much the keys to come back to take together, and how many tables are put aside: they ride in every checkpoint.
const MOST_JUMPED_BYTES: usize = 64 << 10;
const MOST_ASIDE: usize = 16;
/// Tables that the progress names at most.
pub(super) const SHOWN_TABLES: usize = 100;
/// Tables that a message names at most.
const NAMED_TABLES: usize = 5;

enum Step {
    /// The next question is asked at this time.
    Due(Instant),
    /// A question was asked.
    Asked,
    /// The answer is there, and its watermark not yet.
    Answered(Box<Answer>),
}

/// A snapshot that is read while changes stream.
pub(super) struct Incremental {
    source: PostgresSource,
    initial: bool,
    requests: Vec<Wanted>,
    /// Requests that wait, each with what of it is no captured table.
    unmatched: Vec<(String, String)>,
    reader: ChunkReader,
    overlap: Overlap,
    state: SnapshotState,
    /// A table was given up, and the log does not know it yet.
    given_up: bool,
    /// Captured tables, in the order of their names, as last seen.
    tables: Vec<Candidate>,
    /// When they are looked at again.
    look_at: Instant,
    /// Tables that could not be read when that was last tried, and why.
    refused: BTreeMap<u32, String>,
    /// Those of them that were tried since there was nothing else to read.
    tried: BTreeSet<u32>,
    /// Why the table in hand does not go on.
    waiting: Option<String>,
    step: Step,
    /// The table that the last question is about, and the request that it is read for.
    asked: Option<(u32, Option<String>)>,
    /// The table whose chunk is under way.
    window: Option<u32>,
    /// The stream described that table anew meanwhile.
    described: bool,
    /// Begins every watermark of this session, and of no other.
    session: String,
    count: u64,
    watermark: String,
    rows: u32,
    pause: Duration,
    progress: watch::Sender<Option<SnapshotProgress>>,
    problems: Problems,
}

/// What a person has to know of the snapshot: reason and message of each.
pub(super) type Problems = watch::Sender<Vec<(&'static str, String)>>;

/// A request, with the selection that each of its entries is.
struct Wanted {
    id: String,
    entries: Vec<(String, Selection)>,
}

impl Wanted {
    fn new(request: &SnapshotRequest) -> Result<Self, SourceError> {
        let entries = request.tables.iter().map(|glob| {
            let alone = TableSelection {
                include: vec![glob.clone()],
                exclude: vec![],
            };
            Ok((glob.clone(), Selection::new(&alone)?))
        });
        Ok(Self {
            id: request.id.clone(),
            entries: entries.collect::<Result<_, SourceError>>()?,
        })
    }

    /// Everything that is captured.
    fn all(id: String, source: &PostgresSource) -> Result<Self, SourceError> {
        Ok(Self {
            id,
            entries: vec![("*.*".to_owned(), Selection::new(&source.tables)?)],
        })
    }

    /// The tables that it names.
    ///
    /// # Errors
    /// With the first entry that names none: somebody meant a table by it, and would take the request for done.
    fn tables(&self, captured: &[Candidate]) -> Result<Vec<u32>, String> {
        let holds = |selection: &Selection, table: &Candidate| selection.holds(&table.schema, &table.table);
        for (glob, selection) in &self.entries {
            if !captured.iter().any(|table| holds(selection, table)) {
                return Err(glob.clone());
            }
        }
        let named = captured
            .iter()
            .filter(|table| self.entries.iter().any(|(_, selection)| holds(selection, table)));
        Ok(named.map(|table| table.oid).collect())
    }
}

impl Incremental {
    /// None when there is nothing to read, now or later.
    pub(super) fn new(
        config: &CaptureConfig,
        checkpoint: &Checkpoint,
        progress: watch::Sender<Option<SnapshotProgress>>,
        problems: Problems,
    ) -> Result<Option<Self>, SourceError> {
        let source = &config.source;
        let initial = source.snapshot.mode != SnapshotMode::Never;
        // With a mode that reads, the epoch after a gap begins with that anyway.
        let after_gap = checkpoint
            .accepted_gap
            .as_ref()
            .filter(|gap| gap.read_anew && !initial)
            // No request of a user can have such a name.
            .map(|gap| Wanted::all(format!("gap {}", gap.id), source));
        problems.send_replace(vec![]);
        if !initial && after_gap.is_none() && source.snapshot.requests.is_empty() {
            return Ok(None);
        }
        let asked_for = source.snapshot.requests.iter().map(Wanted::new);
        let requests = after_gap.into_iter().chain(asked_for).collect::<Result<_, _>>()?;
        Ok(Some(Self {
            source: source.clone(),
            initial,
            requests,
            unmatched: Vec::new(),
            reader: ChunkReader::start(source.clone()),
            overlap: Overlap::default(),
            state: checkpoint.snapshot.clone(),
            given_up: false,
            tables: Vec::new(),
            look_at: Instant::now(),
            refused: BTreeMap::new(),
            tried: BTreeSet::new(),
            waiting: None,
            step: Step::Due(Instant::now()),
            asked: None,
            window: None,
            described: false,
            session: format!("{}/{}", source.slot_name, checkpoint.owner_generation),
            count: 0,
            watermark: String::new(),
            rows: FIRST_ROWS,
            pause: SHORTEST_PAUSE,
            progress,
            problems,
        }))
    }

    /// When the next question is due; none while one is open.
    pub(super) fn due(&self) -> Option<Instant> {
        match self.step {
            Step::Due(at) => Some(at),
            _ => None,
        }
    }

    /// Puts off the next question: something else comes first.
    pub(super) fn put_off(&mut self) {
        self.step = Step::Due(Instant::now() + SHORTEST_PAUSE);
    }

    /// Asks the next question. To be called when the stream has nothing to do.
    pub(super) fn ask(&mut self) {
        if self.state.reading.is_none()
            && let Some((oid, request)) = self.next_table()
        {
            let begun = |cursor: &TableCursor| cursor.oid == oid && cursor.request == request;
            if let Some(place) = self.state.aside.iter().position(begun) {
                self.state.reading = Some(self.state.aside.remove(place));
            }
        }
        let reading = self.state.reading.as_ref();
        let next = reading
            .map(|cursor| (cursor.oid, cursor.request.clone()))
            .or_else(|| self.next_table());
        let request = match (reading, &next) {
            _ if self.look_at <= Instant::now() => Request::Tables,
            (None, None) => {
                // Nothing is to be read, so nothing needs to be noted.
                self.overlap = Overlap::default();
                self.report();
                self.step = Step::Due(self.look_at);
                return;
            }
            _ if self.overlap.needs_barrier() => {
                self.overlap.watch();
                Request::Barrier
            }
            (Some(cursor), _) => {
                let (oid, order) = (cursor.oid, cursor.order.clone());
                let which = if cursor.swept {
                    Which::Keys(cursor.jumped.iter().take(COME_BACK_ROWS).cloned().collect())
                } else {
                    Which::After(cursor.after.clone())
                };
                self.overlap.open();
                self.window = Some(oid);
                self.described = false;
                Request::Chunk {
                    oid,
                    which,
                    order,
                    rows: self.rows,
                    watermark: self.next_watermark(),
                }
            }
            (None, Some((oid, _))) => Request::Describe {
                oid: *oid,
                watermark: self.next_watermark(),
            },
        };
        self.asked = next;
        self.reader.ask(request);
        self.step = Step::Asked;
    }

    fn next_watermark(&mut self) -> String {
        self.count += 1;
        self.watermark = format!("{}/{}", self.session, self.count);
        self.watermark.clone()
    }

    /// The table that is read next, and the request that it is read for.
    fn next_table(&self) -> Option<(u32, Option<String>)> {
        let readable = |oid: &u32| !self.tried.contains(oid);
        let first = self
            .tables
            .iter()
            .map(|table| table.oid)
            .find(|oid| self.initial && !self.state.done.contains_key(oid) && readable(oid));
        first.map(|oid| (oid, None)).or_else(|| {
            self.state.requests.iter().find_map(|(id, tables)| {
                let oid = tables.iter().find(|oid| readable(oid))?;
                Some((*oid, Some(id.clone())))
            })
        })
    }

    /// Waits for an answer. Cancel safe.
    pub(super) async fn answer(&mut self) -> Answer {
        match self.step {
            // After an answer that has a watermark, only the failure to write it can come.
            Step::Asked | Step::Answered(_) => self.reader.answer().await,
            Step::Due(_) => std::future::pending().await,
        }
    }

    /// Takes an answer.
    pub(super) fn take(&mut self, answer: Answer) {
        match answer {
            answer @ (Answer::Described(_) | Answer::Chunk(_)) => self.step = Step::Answered(Box::new(answer)),
            Answer::Tables(tables) => {
                let membership = |table: &Candidate| (table.oid, table.member);
                let known: HashSet<_> = self.tables.iter().map(membership).collect();
                if !tables.iter().map(membership).all(|table| known.contains(&table)) {
                    // What was noted before says nothing of a table that has joined since.
                    self.overlap = Overlap::default();
                }
                self.look_at = Instant::now() + LOOK_AGAIN;
                self.plan(tables);
                self.go_on();
            }
            Answer::Barrier(xid) => {
                self.overlap.set_barrier(xid);
                self.go_on();
            }
            Answer::Gone => {
                let oid = self.asked.as_ref().map(|(oid, _)| *oid);
                self.tables.retain(|table| Some(table.oid) != oid);
                for tables in self.state.requests.values_mut() {
                    tables.retain(|table| Some(*table) != oid);
                }
                self.put_down();
            }
            Answer::Reordered => self.put_down(),
            Answer::Refused(cause) => {
                if let Some((oid, _)) = self.asked {
                    self.refused.insert(oid, cause);
                    self.tried.insert(oid);
                }
                // The others come first.
                self.state.aside.extend(self.state.reading.take());
                let too_many = self.state.aside.len().saturating_sub(MOST_ASIDE);
                self.state.aside.drain(..too_many);
                self.put_down();
            }
            Answer::Busy(cause) => self.wait(cause, LONGEST_PAUSE),
            // The stream goes on without it. If the watermark was written all the same, it means nothing any more.
            Answer::Failed(error) => {
                let cause = error.to_string();
                if self.waiting.as_ref() != Some(&cause) {
                    tracing::warn!(cause, "the snapshot waits for a new connection");
                }
                self.watermark.clear();
                self.reader = ChunkReader::start(self.source.clone());
                self.wait(cause, RECONNECT_PAUSE);
            }
        }
        self.report();
    }

    /// Gives up the table in hand; where it is still wanted, it begins anew.
    pub(super) fn put_down(&mut self) {
        self.state.reading = None;
        self.given_up = true;
        self.window = None;
        self.rows = FIRST_ROWS;
        self.go_on();
    }

    fn go_on(&mut self) {
        self.pause = SHORTEST_PAUSE;
        self.waiting = None;
        self.step = Step::Due(Instant::now());
    }

    fn wait(&mut self, cause: String, pause: Duration) {
        self.window = None;
        self.waiting = Some(cause);
        self.step = Step::Due(Instant::now() + pause);
    }

    fn plan(&mut self, tables: Vec<Candidate>) {
        if self.asked.is_none() {
            // There is nothing else to read.
            self.tried.clear();
        }
        self.refused
            .retain(|oid, _| tables.iter().any(|table| table.oid == *oid));
        // What left the selection missed changes, and is read again when it comes back.
        self.state
            .done
            .retain(|oid, member| tables.iter().any(|table| table.oid == *oid && table.member == *member));
        let requests = &self.requests;
        self.state
            .requests
            .retain(|id, _| requests.iter().any(|request| request.id == *id));
        self.unmatched.clear();
        for request in requests {
            if self.state.requests.contains_key(&request.id) {
                continue;
            }
            match request.tables(&tables) {
                Ok(tables) => {
                    self.state.requests.insert(request.id.clone(), tables);
                }
                Err(glob) => self.unmatched.push((request.id.clone(), glob)),
            }
        }
        let SnapshotState {
            done,
            requests,
            reading,
            aside,
            ..
        } = &mut self.state;
        let wanted = |cursor: &TableCursor| {
            let wanted = match &cursor.request {
                None => self.initial && !done.contains_key(&cursor.oid),
                Some(request) => requests.contains_key(request),
            };
            wanted && tables.iter().any(|table| table.oid == cursor.oid)
        };
        reading.take_if(|cursor| !wanted(cursor));
        aside.retain(wanted);
        self.given_up = true;
        self.tables = tables;
    }

    /// A transaction comes out of the stream.
    pub(super) fn began(&mut self, xid: u32) {
        self.overlap.began(xid);
    }

    /// The stream describes a table.
    pub(super) fn described(&mut self, oid: u32) {
        self.described |= self.window == Some(oid);
    }

    /// A change comes out of the stream; one that the log has already, with what follows from it here, is not `new`. True if the state has
    /// changed: it must go into Kafka no later than the change.
    pub(super) fn changed(&mut self, change: &Change<'_>, new: bool) -> bool {
        self.touched(change);
        new && (self.jumped(change) | std::mem::take(&mut self.given_up))
    }

    /// Notes a row to come back to. See [`TableCursor::jumped`].
    fn jumped(&mut self, change: &Change<'_>) -> bool {
        let Operation::Update { old: Some(old), new } = change.operation else {
            return false;
        };
        let relation = change.relation;
        let SnapshotState { reading, aside, .. } = &mut self.state;
        let begun = |cursor: &TableCursor| cursor.oid == relation.oid;
        if !reading.iter().chain(aside.iter()).any(begun) {
            return false;
        }
        let left_out = new.values().any(|value| value == Datum::UnchangedToast);
        if !left_out || !crate::encode::key::differs(relation, old.tuple(), new) {
            return false;
        }
        let key: Option<Vec<String>> = relation
            .columns
            .iter()
            .zip(old.tuple().values().zip(new.values()))
            .filter(|(column, _)| column.key)
            .map(|(_, values)| match values {
                (_, Datum::Text(text)) | (Datum::Text(text), Datum::UnchangedToast) => Some(text.to_owned()),
                _ => None,
            })
            .collect();
        let size = |key: &Vec<String>| key.iter().map(|value| value.len() + 3).sum::<usize>();
        let all = |cursor: &TableCursor| cursor.jumped.iter().map(size).sum::<usize>();
        let in_hand = reading.as_ref().map_or(0, all);
        let room = key.as_ref().map(|key| MOST_JUMPED_BYTES.saturating_sub(size(key)));
        // Too many to come back to, or one that is not known: a table begins anew, and sooner one that waits than the one in hand.
        let mut changed = false;
        if room.is_none_or(|room| in_hand + aside.iter().map(all).sum::<usize>() > room) {
            aside.clear();
            changed = true;
        }
        if room.is_none_or(|room| in_hand > room) {
            changed |= reading.take_if(|cursor| begun(cursor)).is_some();
        }
        for cursor in reading.iter_mut().chain(aside).filter(|cursor| begun(cursor)) {
            // What is being come back to may have to be come back to once more.
            let under_way = if cursor.swept && self.window.is_some() {
                cursor.jumped.len().min(COME_BACK_ROWS)
            } else {
                0
            };
            if let Some(key) = key.as_ref().filter(|key| !cursor.jumped[under_way..].contains(key)) {
                cursor.jumped.push(key.clone());
                changed = true;
            }
        }
        changed
    }

    fn touched(&mut self, change: &Change<'_>) {
        if self.window != Some(change.relation.oid) {
            return;
        }
        let xid = change.transaction_id;
        let mut touch = |row: Tuple<'_>, fallback: Option<Tuple<'_>>, told: bool| {
            let mut key = Vec::new();
            match crate::encode::key::write(change.relation, row, fallback, &mut key) {
                Ok(true) => self.overlap.touched(xid, &key, told),
                // Rows without a key cannot be found again in the chunk.
                Ok(false) | Err(_) => self.overlap.disturbed(xid),
            }
        };
        match change.operation {
            Operation::Update { old, new } => {
                let told = !new.values().any(|value| value == Datum::UnchangedToast);
                let old = old.map(|old| old.tuple());
                touch(new, old, told);
                if let Some(old) = old {
                    touch(old, None, told);
                }
            }
            Operation::Delete { old } => touch(old.tuple(), None, true),
            Operation::Truncate => self.overlap.disturbed(xid),
            // Without a key, what a chunk has replaces all that came before it.
            Operation::Insert { .. } if !change.relation.columns.iter().any(|column| column.key) => {
                self.overlap.disturbed(xid);
            }
            // A chunk that does not see an insertion has no such row, or one that ended before it, and that was noted.
            Operation::Insert { .. }
            | Operation::Read { .. }
            | Operation::SnapshotBegin { .. }
            | Operation::SnapshotEnd { .. }
            | Operation::SchemaChange { .. }
            | Operation::SourceGap { .. } => {}
        }
    }

    /// The answer that a message is the watermark of; none if it is no watermark of this session.
    pub(super) fn watermark(&mut self, prefix: &str, content: &[u8]) -> Option<Answer> {
        if prefix != WATERMARK_PREFIX || content != self.watermark.as_bytes() {
            return None;
        }
        self.watermark.clear();
        match std::mem::replace(&mut self.step, Step::Asked) {
            Step::Answered(answer) => Some(*answer),
            // It was sent before the watermark was written.
            Step::Asked => self.reader.answered(),
            due @ Step::Due(_) => {
                self.step = due;
                None
            }
        }
    }

    /// A table begins.
    pub(super) fn begin(&mut self, shape: &Shape, snapshot: String) {
        self.refused.remove(&shape.oid);
        let request = self.asked.take().and_then(|(_, request)| request);
        self.state.reading = Some(TableCursor {
            oid: shape.oid,
            snapshot,
            request,
            order: shape.order(),
            after: None,
            swept: false,
            jumped: Vec::new(),
            rows: 0,
        });
        self.rows = FIRST_ROWS;
        self.go_on();
        self.report();
    }

    /// Which rows of a chunk are stale; none if it is to be read again.
    pub(super) fn judge(&mut self, chunk: &Chunk) -> Option<Stale> {
        self.window = None;
        match self.overlap.close(&chunk.seen) {
            Ok(stale) => Some(stale),
            Err(again) => {
                self.again(again);
                None
            }
        }
    }

    /// True if the stream described the table anew while its chunk was under way.
    pub(super) fn was_described(&self) -> bool {
        self.described
    }

    /// The chunk is to be read again.
    pub(super) fn again(&mut self, again: Again) {
        let cause = match again {
            Again::Undecided => "it waits for transactions that began before it to end",
            Again::Disturbed => "the table changes too much to be read in large chunks",
            Again::Overflow => "the stream is behind",
        };
        if again != Again::Undecided {
            // A smaller chunk is read in less time, and less happens meanwhile.
            self.rows = (self.rows / 2).max(1);
        }
        self.wait(cause.to_owned(), self.pause);
        self.pause = (self.pause * 2).min(LONGEST_PAUSE);
        self.report();
    }

    /// The table that is being read.
    pub(super) fn cursor(&self) -> Option<&TableCursor> {
        self.state.reading.as_ref()
    }

    /// These rows of a chunk were published. Returns the number of the table's rows if they were the last.
    pub(super) fn published(&mut self, chunk: &Chunk, rows: &[Tuple<'_>]) -> Option<u64> {
        let cursor = self.state.reading.as_mut()?;
        self.refused.remove(&cursor.oid);
        cursor.rows += rows.len() as u64;
        let so_far = cursor.rows;
        if cursor.swept {
            cursor.jumped.drain(..chunk.keys_asked.min(cursor.jumped.len()));
        } else if !cursor.jumped.is_empty() {
            // A row that jumped ahead is met where it is now.
            for row in rows {
                let key = chunk.shape.key_of(*row);
                cursor.jumped.retain(|jumped| Some(jumped) != key.as_ref());
            }
        }
        cursor.swept |= chunk.complete;
        if cursor.swept && cursor.jumped.is_empty() {
            let (oid, request) = (cursor.oid, cursor.request.take());
            self.state.reading = None;
            self.rows = FIRST_ROWS;
            match request {
                None => {
                    self.state.done.insert(oid, chunk.shape.member);
                }
                Some(request) => {
                    if let Some(tables) = self.state.requests.get_mut(&request) {
                        tables.retain(|table| *table != oid);
                    }
                }
            }
        } else if !cursor.swept {
            cursor.after.clone_from(&chunk.last_key);
            // The next chunk shall have as many rows as make it full.
            let fitting = CHUNK_BYTES / (chunk.rows.size() / chunk.rows.len().max(1)).max(1);
            self.rows = u32::try_from(fitting)
                .unwrap_or(u32::MAX)
                .min(self.rows.saturating_mul(2))
                .clamp(1, CHUNK_ROWS);
        }
        self.go_on();
        self.report();
        self.state.reading.is_none().then_some(so_far)
    }

    /// A bulk snapshot has read this table to its end.
    pub(super) fn was_read(&mut self, table: &Candidate) {
        let SnapshotState {
            done, reading, aside, ..
        } = &mut self.state;
        done.insert(table.oid, table.member);
        // It may have been read in chunks before.
        let begun = |cursor: &TableCursor| cursor.oid == table.oid && cursor.request.is_none();
        reading.take_if(|cursor| begun(cursor));
        aside.retain(|cursor| !begun(cursor));
    }

    /// What is not read by now is read in chunks.
    pub(super) fn bulk_is_over(&mut self) {
        self.state.bulk_is_over = true;
    }

    /// What goes into the checkpoint.
    pub(super) fn state(&self) -> SnapshotState {
        self.state.clone()
    }

    /// What a person has to look after: the state of the tables says it too, for as long as it shows them.
    fn problems(&self) -> Vec<(&'static str, String)> {
        let unmatched = self.unmatched.iter().map(|(id, glob)| {
            let mut captured: Vec<String> = self.tables.iter().take(NAMED_TABLES).map(Candidate::name).collect();
            if self.tables.len() > NAMED_TABLES {
                captured.push(format!("{} more", self.tables.len() - NAMED_TABLES));
            }
            let message = format!(
                "the snapshot request {id} waits, for {glob} is no captured table (those are {}): correct it in snapshot.requests, or have the table captured",
                captured.join(", ")
            );
            ("SnapshotRequestWaits", message)
        });
        let refused = self.refused.first_key_value().map(|(oid, cause)| {
            let more = match self.refused.len() - 1 {
                0 => String::new(),
                more => format!("; and {more} more, see status.snapshot"),
            };
            let message = format!(
                "the rows of {} cannot be read for the snapshot, which tries again once the other tables are read: {cause}{more}",
                self.name(*oid)
            );
            ("SnapshotRefused", message)
        });
        unmatched.chain(refused).collect()
    }

    fn report(&self) {
        let problems = self.problems();
        self.problems.send_if_modified(|known| {
            let changed = *known != problems;
            if changed {
                for (reason, message) in &problems {
                    tracing::warn!(reason, "{message}");
                }
                *known = problems;
            }
            changed
        });
        let reading = self.state.reading.as_ref();
        let requested = || self.state.requests.values().flatten().copied();
        let initial = self.tables.iter().map(|table| table.oid).filter(|_| self.initial);
        let unread = initial.clone().filter(|oid| !self.state.done.contains_key(oid));
        let mut open: Vec<u32> = unread.chain(requested()).collect();
        // What goes on is shown before what does not.
        open.sort_by_key(|oid| self.refused.contains_key(oid));
        let estimate = |oid: u32| {
            let table = self.tables.iter().find(|table| table.oid == oid);
            table.map_or(1.0, |table| table.estimate)
        };
        // The rows of a table that outgrows its estimate count as all but done.
        let read = |oid: u32| match reading {
            #[allow(clippy::cast_precision_loss)]
            Some(cursor) if cursor.oid == oid => (cursor.rows as f64).min(estimate(oid) * 0.99),
            _ => 0.0,
        };
        let total: f64 = initial.clone().chain(requested()).map(estimate).sum();
        let left: f64 = open.iter().map(|oid| estimate(*oid) - read(*oid)).sum();
        let in_hand = self.asked.as_ref().map(|(oid, _)| *oid);
        let mut tables: Vec<TableSnapshot> = open
            .iter()
            .copied()
            .take(SHOWN_TABLES)
            .map(|oid| {
                let is_read = reading.is_some_and(|cursor| cursor.oid == oid);
                let (state, message) = match (&self.refused.get(&oid), &self.waiting) {
                    (Some(cause), _) => (table_snapshot::State::Refused, (*cause).clone()),
                    (None, Some(cause)) if in_hand == Some(oid) => (table_snapshot::State::Waiting, cause.clone()),
                    _ if is_read => (table_snapshot::State::Reading, String::new()),
                    _ => (table_snapshot::State::Pending, String::new()),
                };
                TableSnapshot {
                    table: self.name(oid),
                    state: state.into(),
                    rows: reading.filter(|_| is_read).map_or(0, |cursor| cursor.rows),
                    percent: read(oid) / estimate(oid) * 100.0,
                    message,
                }
            })
            .collect();
        tables.sort_by_key(|table| table.rows == 0);
        let count = |tables: usize| u32::try_from(tables).unwrap_or(u32::MAX);
        let (all, unfinished) = (initial.count() + requested().count(), open.len());
        self.progress.send_replace(Some(SnapshotProgress {
            tables_total: count(all),
            tables_done: count(all - unfinished),
            percent: if unfinished == 0 {
                100.0
            } else {
                100.0 * (1.0 - left / total.max(1.0))
            },
            tables,
        }));
    }

    fn name(&self, oid: u32) -> String {
        self.tables
            .iter()
            .find(|table| table.oid == oid)
            .map(Candidate::name)
            .unwrap_or_default()
    }
}

#[cfg(test)]
mod tests {
    use std::sync::Arc;

    use serde_json::json;

    use super::*;
    use crate::{
        position::{Epoch, Lsn, Position},
        source::{Column, Relation, postgres::pgoutput::OldTuple},
    };

    const TABLE: u32 = 16_384;

    /// A snapshot in the midst of [`TABLE`].
    fn reading() -> Incremental {
        let config = serde_json::from_value(json!({
            "pipeline": {"namespace": "n", "name": "p"},
            "source": {
                "host": "127.0.0.1", "database": "d", "usernameFile": "/", "passwordFile": "/",
                "tables": {"include": ["public.*"]}, "publication": {"name": "p"}, "slotName": "s",
                "snapshot": {"mode": "Incremental", "requests": [{"id": "again", "tables": ["public.u"]}]},
            },
            "kafka": {"bootstrapServers": ["127.0.0.1:1"], "topicPrefix": "p"},
        }));
        let checkpoint = Checkpoint {
            epoch: 1,
            partings: vec![],
            system_identifier: "7".to_owned(),
            timeline: 1,
            major_version: 17,
            database_oid: 5,
            ended_at: None,
            owner_generation: 1,
            published: None,
            complete: None,
            redis: None,
            acknowledged: Lsn(16),
            high_time_micros: 0,
            events_total: 0,
            snapshot: SnapshotState {
                reading: Some(TableCursor {
                    oid: TABLE,
                    snapshot: "one".to_owned(),
                    request: None,
                    order: String::new(),
                    after: None,
                    swept: false,
                    jumped: vec![],
                    rows: 1,
                }),
                ..SnapshotState::default()
            },
            records_total: 0,
            partitions: None,
            released: false,
            accepted_gap: None,
            oversized: Default::default(),
        };
        Incremental::new(
            &config.unwrap(),
            &checkpoint,
            watch::Sender::new(None),
            Problems::new(vec![]),
        )
        .unwrap()
        .unwrap()
    }

    /// A change of the key from one text to another, which leaves out a large value. True if the state has to be kept.
    fn jump(snapshot: &mut Incremental, from: &str, to: &str, new: bool) -> bool {
        let column = |name: &str, key| Column {
            name: name.to_owned(),
            type_oid: 25,
            type_name: "text".to_owned(),
            type_modifier: -1,
            key,
        };
        let relation = Arc::new(Relation {
            oid: TABLE,
            schema: "public".to_owned(),
            table: "t".to_owned(),
            columns: vec![column("id", true), column("note", false)],
        });
        let row = |key: &str, note: u8| {
            let length = u32::try_from(key.len()).unwrap().to_be_bytes();
            [b"t", &length[..], key.as_bytes(), &[note]].concat()
        };
        let (old, row) = (row(from, b'n'), row(to, b'u'));
        let change = Change {
            relation: &relation,
            schema_version: 1,
            operation: Operation::Update {
                old: Some(OldTuple::Key(Tuple::checked(2, &old).unwrap())),
                new: Tuple::checked(2, &row).unwrap(),
            },
            position: Position::end_of_transaction(Epoch::FIRST, Lsn(32)),
            commit_time_micros: 0,
            transaction_id: 7,
            lsn: Lsn(32),
            previous_end: None,
            origin: None,
        };
        snapshot.changed(&change, new)
    }

    #[tokio::test]
    async fn a_row_is_come_back_to_once_though_its_change_is_sent_again() {
        let mut snapshot = reading();
        assert!(!jump(&mut snapshot, "a", "b", false), "the log has that already");
        assert_eq!(snapshot.cursor().unwrap().jumped, Vec::<Vec<String>>::new());
        assert!(jump(&mut snapshot, "a", "b", true));
        assert!(!jump(&mut snapshot, "c", "b", true), "it is noted");
        assert_eq!(snapshot.cursor().unwrap().jumped, [["b"]]);
    }

    #[tokio::test]
    async fn a_request_is_looked_at_in_the_midst_of_a_table_which_goes_on_at_once_if_none_has_joined() {
        let mut snapshot = reading();
        let tables = |oids: &[u32]| {
            let candidate = |oid: &u32| Candidate {
                oid: *oid,
                schema: "public".to_owned(),
                table: if *oid == TABLE { "t" } else { "u" }.to_owned(),
                member: 1,
                estimate: 1.0,
            };
            Answer::Tables(oids.iter().map(candidate).collect())
        };
        let busy = || Answer::Busy("busy".to_owned());
        let asks_for_rows = |snapshot: &mut Incremental| {
            snapshot.ask();
            snapshot.window == Some(TABLE)
        };
        assert!(!asks_for_rows(&mut snapshot), "it asks for the tables");
        snapshot.take(tables(&[TABLE]));
        assert_eq!(snapshot.problems()[0].0, "SnapshotRequestWaits");
        assert!(!asks_for_rows(&mut snapshot), "it asks for a barrier");
        snapshot.take(Answer::Barrier(10));
        assert!(asks_for_rows(&mut snapshot));
        snapshot.take(busy());

        snapshot.look_at = Instant::now();
        assert!(!asks_for_rows(&mut snapshot), "it asks for the tables");
        snapshot.take(tables(&[TABLE]));
        assert!(asks_for_rows(&mut snapshot));
        snapshot.take(busy());

        snapshot.look_at = Instant::now();
        assert!(!asks_for_rows(&mut snapshot), "it asks for the tables");
        snapshot.take(tables(&[TABLE, TABLE + 1]));
        assert_eq!(snapshot.problems(), []);
        assert!(!asks_for_rows(&mut snapshot), "it asks for a barrier");
        snapshot.take(Answer::Barrier(20));
        assert!(asks_for_rows(&mut snapshot));
    }

    #[tokio::test]
    async fn rows_to_come_back_to_never_make_a_checkpoint_that_is_too_large() {
        let mut snapshot = reading();
        let mut number = 0;
        // In the end the table begins anew, rather than that.
        while snapshot.cursor().is_some() {
            assert!(number < 1000);
            let size = serde_json::to_vec(&snapshot.state()).unwrap().len();
            assert!(size < 2 * MOST_JUMPED_BYTES, "{size} bytes");
            number += 1;
            jump(&mut snapshot, "old", &format!("{number:0>300}"), true);
        }
        assert!(number > 100, "{number}");
    }
}

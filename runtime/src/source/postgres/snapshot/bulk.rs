//! Reads whole tables under one snapshot, by several connections at once.
//!
//! The snapshot is the one that PostgreSQL exports when it makes a replication slot, here a temporary one. It sees exactly those
//! transactions whose commit record lies before the slot's consistent point: that is decided by the WAL, not by what happens to be
//! visible. So its rows belong at that place of the stream and at no other.
//!
//! Each connection imports the snapshot and reads stretches of blocks (`ctid`), which they take from one list; whoever finds the list
//! empty opens the next table. What they read goes into one bounded channel, so a reader that is faster than the log waits.
//!
//! A snapshot does not see through what replaces a table's file: after TRUNCATE, and after an ALTER TABLE that writes the rows anew, the
//! table looks empty to it. So each stretch is read under a lock, with a check that the file is the one that the snapshot knows. What
//! changed under the reading is given up, and left for chunks to read.

use std::{
    collections::{BTreeMap, HashMap},
    num::NonZeroU8,
    pin::pin,
    sync::Arc,
};

use futures::StreamExt as _;
use meander_config::PostgresSource;
use meander_traces::step;
use tokio::{
    runtime::Handle,
    sync::{
        Mutex,
        mpsc::{self, Receiver, Sender},
    },
    task::spawn_blocking,
};
use tokio_postgres::SimpleQueryMessage;

use crate::{
    position::Lsn,
    source::postgres::{
        preflight::{Catalog, Credentials, Selection, SourceError, wire_failure},
        snapshot::{
            copy::{Lines, Rows},
            session::{self, Candidate, NO_TIMEOUT, ReadError, Unreadable},
            shape::Shape,
        },
        wire::{ReplicationConnection, WireError, quote_identifier, quote_literal},
    },
};

/// Blocks that are read at a time: 16 MiB.
const STRETCH: u32 = 2048;
/// Rows are handed on in pieces of this size.
const PIECE_BYTES: usize = 256 << 10;
/// A transaction that has written and is open for this many seconds is waited for before the stream is held up to make the slot.
const OLD: i32 = 5;
/// Characters of the pipeline's slot name in the temporary slot's, which has at most 63.
const NAME_PART: usize = 24;

/// A snapshot that is being read.
pub struct Export {
    /// The transactions are in it whose commit record lies before this.
    pub at: Lsn,
    /// The readers end when nobody listens any more.
    events: Receiver<Event>,
}

impl Export {
    /// What was read next; none when everything was. Cancel safe.
    pub async fn next(&mut self) -> Option<Event> {
        self.events.recv().await
    }
}

/// What the readers have to say, in the order in which it is to be published. Tables are told apart by their OID.
pub enum Event {
    /// A table begins.
    Begin {
        /// What it looks like to the snapshot.
        shape: Box<Shape>,
        /// Blocks to read.
        blocks: u64,
    },
    /// Rows of a table that has begun.
    Rows(u32, Rows),
    /// So many of its blocks were read.
    Read(u32, u64),
    /// All its rows were read.
    End(u32),
    /// Nothing more of this table comes, though not all of it did.
    GivenUp(u32, String),
    /// The connection failed.
    Failed(SourceError),
}

/// An attempt to begin.
pub struct Attempt {
    /// The tables that are to be read, as far as they are known.
    pub tables: Vec<Candidate>,
    /// None if there are none.
    pub outcome: Result<Option<Export>, SourceError>,
}

/// What an attempt is about.
pub struct Order {
    /// The database.
    pub source: PostgresSource,
    /// How many connections read.
    pub parallelism: NonZeroU8,
    /// Tables that are in the log already, by OID, with their membership of the publication.
    pub done: BTreeMap<u32, u32>,
    /// Tells this attempt's slot from those of others.
    pub number: String,
}

/// Makes the snapshot, in bounded time, and begins to read. Whatever it has made goes away with the result.
pub async fn begin(order: Order) -> Attempt {
    let mut tables = Vec::new();
    let outcome = order.begin(&mut tables).await;
    Attempt { tables, outcome }
}

impl Order {
    async fn begin(self, tables: &mut Vec<Candidate>) -> Result<Option<Export>, SourceError> {
        let source = &self.source;
        let credentials = Credentials::read(&source.server())?;
        let catalog = Catalog::connect(source, &credentials).await?;
        let selection = Selection::new(&source.tables)?;
        // Before the slot is made: whoever wrote to a table before it was published has ended at the consistent point, since making a
        // slot waits for all transactions that are older than the attempt.
        let published = session::tables(catalog.client(), &source.publication.name, &selection).await;
        *tables = published.map_err(|error| catalog.failed(&error))?;
        tables.retain(|table| self.done.get(&table.oid) != Some(&table.member));
        if tables.is_empty() {
            return Ok(None);
        }
        if let Some(blocker) = catalog.oldest_writer(OLD).await? {
            return Err(SourceError::SlotWaitsForTransaction(blocker));
        }
        let wire = |error| wire_failure(source, &credentials.user, error);
        let mut exporter = ReplicationConnection::connect(source, &credentials)
            .await
            .map_err(wire)?;
        exporter.query(NO_TIMEOUT).await.map_err(wire)?;
        let slot: String = source.slot_name.chars().take(NAME_PART).collect();
        let slot = format!("{slot}_snapshot_{}", self.number);
        // As version 14 understands it.
        let sql = format!(
            "CREATE_REPLICATION_SLOT {} TEMPORARY LOGICAL pgoutput EXPORT_SNAPSHOT",
            quote_identifier(&slot)
        );
        let made = match exporter.query(&sql).await {
            Ok(rows) => rows,
            // Each transaction is waited for as long as lock_timeout says, and all of them as long as a request may take.
            Err(WireError::Timeout(_)) => return Err(catalog.give_up_slot(&slot).await?),
            Err(WireError::Server { code, .. }) if code == "55P03" => return Err(catalog.give_up_slot(&slot).await?),
            Err(error) => return Err(wire(error)),
        };
        let field = |index: usize| made.first().and_then(|row| row.get(index)?.clone());
        let (Some(Ok(at)), Some(snapshot)) = (field(1).map(|at| at.parse::<Lsn>()), field(2)) else {
            return Err(catalog.confused("it made a slot without a consistent point or a snapshot"));
        };
        let (events, received) = mpsc::channel(usize::from(self.parallelism.get()));
        let plan = Arc::new(Plan {
            publication: source.publication.name.clone(),
            events,
            state: Mutex::new(State {
                tables: tables.iter().map(|table| table.oid).rev().collect(),
                stretches: Vec::new(),
                open: HashMap::new(),
            }),
        });
        for _ in 0..self.parallelism.get() {
            let catalog = Catalog::connect(source, &credentials).await?;
            let import = format!(
                "BEGIN ISOLATION LEVEL REPEATABLE READ READ ONLY; SET TRANSACTION SNAPSHOT {}",
                quote_literal(&snapshot)
            );
            let failed = |error: tokio_postgres::Error| catalog.failed(&error);
            session::prepare(catalog.client()).await.map_err(failed)?;
            // A stretch is read as a stretch, whatever the planner thinks of the table.
            let client = catalog.client();
            client.batch_execute("SET enable_seqscan = off").await.map_err(failed)?;
            client.batch_execute(&import).await.map_err(failed)?;
            let plan = Arc::clone(&plan);
            let read = async move {
                tokio::select! {
                    read = plan.read(&catalog) => if let Err(error) = read {
                        // Nobody listens when the session ended first.
                        let _ = plan.events.send(Event::Failed(error)).await;
                    },
                    () = plan.events.closed() => {}
                }
            };
            // A thread for each, since the changes of the database have a single one.
            let runtime = Handle::current();
            spawn_blocking(move || runtime.block_on(read));
        }
        // Everybody has the snapshot: its slot, which keeps WAL, has done its work.
        drop(exporter);
        Ok(Some(Export { at, events: received }))
    }
}

/// What is left to read. The readers share it.
struct Plan {
    publication: String,
    events: Sender<Event>,
    state: Mutex<State>,
}

struct State {
    /// Tables that nobody has opened yet, the next one last.
    tables: Vec<u32>,
    /// Stretches of the table that was opened last, the next one last.
    stretches: Vec<Stretch>,
    /// How many stretches of a table are not read yet. A table that was given up is not in it.
    open: HashMap<u32, usize>,
}

/// Some blocks of a table.
#[derive(Clone)]
struct Stretch {
    shape: Arc<Shape>,
    /// The table itself, or one of its partitions.
    relation: Arc<Relation>,
    from: u32,
    /// None for the last, since nothing says that every kind of table counts as heaps do.
    before: Option<u32>,
    blocks: u32,
}

/// What rows are stored in.
struct Relation {
    oid: u32,
    /// Its quoted name.
    name: String,
    /// The file that the snapshot knows.
    file: u32,
}

/// Why a stretch or a table was not read: it ends the reader, or only the table.
enum Failure {
    Reader(ReadError),
    Table(String),
}

impl<E: Into<ReadError>> From<E> for Failure {
    fn from(error: E) -> Self {
        let error = error.into();
        match error.unreadable() {
            None => Self::Reader(error),
            Some(Unreadable::Busy(cause) | Unreadable::Refused(cause)) => Self::Table(cause),
            Some(Unreadable::Gone) => Self::Table(CHANGED.to_owned()),
        }
    }
}

const CHANGED: &str = "the table was changed after the snapshot was taken";

impl Plan {
    /// Reads until nothing is left, or nobody listens.
    async fn read(&self, catalog: &Catalog) -> Result<(), SourceError> {
        while let Some(stretch) = self.next(catalog).await? {
            let oid = stretch.shape.oid;
            let span = step!("snapshot stretch", table = oid, blocks = stretch.blocks);
            let read = async { settle(catalog, self.stretch(catalog, &stretch).await).await };
            let cause = step(span, read).await?.err();
            let mut state = self.state.lock().await;
            let Some(left) = state.open.get_mut(&oid) else { continue };
            *left -= 1;
            let is_last = *left == 0;
            if is_last || cause.is_some() {
                state.open.remove(&oid);
            }
            // In the lock, so that the end comes after all rows.
            let blocks = Event::Read(oid, stretch.blocks.into());
            let sent = match cause {
                Some(cause) => self.events.send(Event::GivenUp(oid, cause)).await,
                None if is_last => self.events.send(Event::End(oid)).await,
                None => self.events.send(blocks).await,
            };
            if sent.is_err() {
                break;
            }
        }
        Ok(())
    }

    /// The next stretch to read; none if there is none left, or nobody listens.
    async fn next(&self, catalog: &Catalog) -> Result<Option<Stretch>, SourceError> {
        let mut state = self.state.lock().await;
        loop {
            while let Some(stretch) = state.stretches.pop() {
                // A table that was given up is read no further.
                if state.open.contains_key(&stretch.shape.oid) {
                    return Ok(Some(stretch));
                }
            }
            let Some(oid) = state.tables.pop() else { return Ok(None) };
            let opened = self.open(catalog, oid).await;
            let event = match settle(catalog, opened).await? {
                Ok((shape, mut stretches)) => {
                    stretches.reverse();
                    state.open.insert(oid, stretches.len());
                    state.stretches = stretches;
                    Event::Begin {
                        shape: Box::new(shape),
                        blocks: state.stretches.iter().map(|stretch| u64::from(stretch.blocks)).sum(),
                    }
                }
                Err(cause) => Event::GivenUp(oid, cause),
            };
            if self.events.send(event).await.is_err() {
                return Ok(None);
            }
        }
    }

    /// What the snapshot knows of a table, and the stretches that it is read in.
    async fn open(&self, catalog: &Catalog, oid: u32) -> Result<(Shape, Vec<Stretch>), Failure> {
        let client = catalog.client();
        client.batch_execute("SAVEPOINT stretch").await?;
        let shape = Shape::read(client, &self.publication, oid).await?;
        let shape = shape.ok_or_else(|| Failure::Table(CHANGED.to_owned()))?;
        if shape.is_hypertable() {
            return Err(Failure::Table("a hypertable is not read by its blocks".to_owned()));
        }
        // The catalog's rows are those that the snapshot sees; the size is that of now, and so never too small.
        let rows = client
            .query(
                "WITH RECURSIVE tree AS (
                     SELECT $1::oid AS oid
                     UNION ALL
                     SELECT c.oid FROM tree
                     JOIN pg_catalog.pg_inherits i ON i.inhparent = tree.oid AND NOT i.inhdetachpending
                     JOIN pg_catalog.pg_class c ON c.oid = i.inhrelid AND c.relispartition)
                 SELECT c.oid, quote_ident(n.nspname) || '.' || quote_ident(c.relname), c.relkind = 'r', c.relfilenode,
                        (pg_catalog.pg_relation_size(c.oid) / pg_catalog.current_setting('block_size')::int8)::int8
                 FROM tree JOIN pg_catalog.pg_class c ON c.oid = tree.oid
                 JOIN pg_catalog.pg_namespace n ON n.oid = c.relnamespace
                 WHERE c.relkind <> 'p' ORDER BY c.oid",
                &[&oid],
            )
            .await?;
        let mut stretches = Vec::new();
        let whole = Arc::new(shape.clone());
        for row in &rows {
            let name: String = row.get(1);
            if !row.get::<_, bool>(2) {
                return Err(Failure::Table(format!("{name} is not an ordinary table")));
            }
            let relation = Arc::new(Relation {
                oid: row.get(0),
                name,
                file: row.get(3),
            });
            let blocks = row.get::<_, Option<i64>>(4).unwrap_or(0);
            let blocks = u32::try_from(blocks).unwrap_or(u32::MAX);
            let mut from = 0_u32;
            loop {
                let before = from.checked_add(STRETCH).filter(|before| *before < blocks);
                stretches.push(Stretch {
                    shape: Arc::clone(&whole),
                    relation: Arc::clone(&relation),
                    from,
                    before,
                    blocks: before.unwrap_or(blocks.max(from)) - from,
                });
                match before {
                    Some(before) => from = before,
                    None => break,
                }
            }
        }
        if stretches.is_empty() {
            return Err(Failure::Table("it has no partitions".to_owned()));
        }
        Ok((shape, stretches))
    }

    /// Reads a stretch, and hands on its rows.
    async fn stretch(&self, catalog: &Catalog, stretch: &Stretch) -> Result<(), Failure> {
        let client = catalog.client();
        let Relation { oid, name, file } = &*stretch.relation;
        // These functions tell of now what the catalog's rows tell of then.
        let checked = client
            .simple_query(&format!(
                "SAVEPOINT stretch; LOCK TABLE ONLY {name} IN ACCESS SHARE MODE;
                 SELECT pg_catalog.to_regclass({})::oid = {oid} AND pg_catalog.pg_relation_filenode({oid}) = {file}",
                quote_literal(name)
            ))
            .await?;
        let same = checked
            .iter()
            .any(|message| matches!(message, SimpleQueryMessage::Row(row) if row.get(0) == Some("t")));
        if !same {
            return Err(Failure::Table(CHANGED.to_owned()));
        }
        let sql = stretch.shape.copy_blocks(name, stretch.from, stretch.before);
        let mut lines = pin!(client.copy_out(&sql).await?);
        let mut cutter = Lines::default();
        let mut rows = Rows::new(stretch.shape.width());
        while let Some(bytes) = lines.next().await {
            cutter.cut(&bytes?, |line| rows.push(line))?;
            if rows.size() >= PIECE_BYTES {
                let full = std::mem::replace(&mut rows, Rows::new(stretch.shape.width()));
                self.hand_on(stretch, full).await;
            }
        }
        self.hand_on(stretch, rows).await;
        Ok(())
    }

    async fn hand_on(&self, stretch: &Stretch, rows: Rows) {
        if !rows.is_empty() {
            // If nobody listens, the reader is ended with the session.
            let _ = self.events.send(Event::Rows(stretch.shape.oid, rows)).await;
        }
    }
}

/// Gives back the lock on a table, whatever became of the reading, and tells what concerns the table from what concerns the connection.
async fn settle<T>(catalog: &Catalog, read: Result<T, Failure>) -> Result<Result<T, String>, SourceError> {
    let read = match read {
        Err(Failure::Reader(error)) => return Err(error.into_source(catalog)),
        Err(Failure::Table(cause)) => Err(cause),
        Ok(read) => Ok(read),
    };
    let given_back = catalog
        .client()
        .batch_execute("ROLLBACK TO SAVEPOINT stretch; RELEASE SAVEPOINT stretch")
        .await;
    given_back.map_err(|error| catalog.failed(&error))?;
    Ok(read)
}

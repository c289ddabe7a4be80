//! Reads chunks, on a connection and a task of its own, one at a time.
//!
//! A chunk is sent to whoever asked before its watermark is written: so it is always there when the watermark comes out of the stream.

use std::pin::pin;

use futures::StreamExt as _;
use meander_config::PostgresSource;
use meander_traces::step;
use tokio::{
    sync::mpsc::{self, Receiver, Sender},
    task::JoinHandle,
};
use tokio_postgres::Error;
use tracing::field::Empty;

use crate::source::postgres::{
    pgoutput::Datum,
    preflight::{Catalog, Credentials, Selection, SourceError},
    snapshot::{
        WATERMARK_PREFIX,
        copy::{Lines, Rows},
        session::{self, Candidate, ReadError, Unreadable},
        shape::Shape,
        visibility::Visibility,
    },
    wire::quote_literal,
};

/// A chunk ends with the row that makes it this large.
pub const CHUNK_BYTES: usize = 2 << 20;
/// A table without a key is read as one chunk, if it takes no more room than this.
const WHOLE_TABLE_BYTES: i64 = 8 << 20;
/// On disk it may be compressed: this is how much its rows take at most.
const WHOLE_TABLE_TEXT: usize = 32 << 20;
/// A chunk has at most this many rows.
pub const CHUNK_ROWS: u32 = 8192;

/// What is asked of the reader.
#[derive(Clone, Debug)]
pub enum Request {
    /// Which tables there are.
    Tables,
    /// A transaction id that is greater than that of every transaction which began to write before the question.
    Barrier,
    /// What a table looks like, and a watermark.
    Describe {
        /// OID of the table.
        oid: u32,
        /// Content of the watermark.
        watermark: String,
    },
    /// The next rows of a table, and a watermark.
    Chunk {
        /// OID of the table.
        oid: u32,
        /// Which rows.
        which: Which,
        /// The [order](Shape::order) that this is said in.
        order: String,
        /// At most this many.
        rows: u32,
        /// Content of the watermark.
        watermark: String,
    },
}

/// Which rows of a table.
#[derive(Clone, Debug)]
pub enum Which {
    /// Those after the one with this key, in the order of the key; without it from the first.
    After(Option<Vec<String>>),
    /// Those with these keys, whose values are in the order of the table's columns.
    Keys(Vec<Vec<String>>),
}

/// What the reader answers. Only after a description or a chunk a watermark comes.
#[derive(Debug)]
pub enum Answer {
    /// Selected tables that the publication holds, in the order of their names.
    Tables(Vec<Candidate>),
    /// A transaction id.
    Barrier(u64),
    /// A table.
    Described(Shape),
    /// Rows.
    Chunk(Chunk),
    /// The table is gone, or not captured any more.
    Gone,
    /// Not now: somebody holds a lock on the table, or cancelled the statement.
    Busy(String),
    /// The table cannot be read.
    Refused(String),
    /// The order of the rows is another one than before.
    Reordered,
    /// The connection does not work any more.
    Failed(SourceError),
}

/// Rows that were read at one moment.
#[derive(Debug)]
pub struct Chunk {
    /// The table.
    pub shape: Shape,
    /// What they see.
    pub seen: Visibility,
    /// When they were read, in microseconds since the Unix epoch.
    pub time_micros: i64,
    /// The key of the last row; none without rows, or without a key.
    pub last_key: Option<Vec<String>>,
    /// There are no more.
    pub complete: bool,
    /// How many keys were asked for; 0 for a chunk in the order of the key.
    pub keys_asked: usize,
    /// The rows, in the order of the key.
    pub rows: Rows,
}

/// The task.
pub struct ChunkReader {
    requests: Sender<Request>,
    answers: Receiver<Answer>,
    task: JoinHandle<()>,
}

impl Drop for ChunkReader {
    fn drop(&mut self) {
        self.task.abort();
    }
}

impl ChunkReader {
    /// Starts a reader. It connects when it is first asked.
    #[must_use]
    pub fn start(source: PostgresSource) -> Self {
        let (requests, mut asked) = mpsc::channel(1);
        let (answer, answers) = mpsc::channel(1);
        let task = tokio::spawn(async move {
            if let Err(error) = serve(&source, &mut asked, &answer).await {
                // Nobody listens when the session ended first.
                let _ = answer.send(Answer::Failed(error)).await;
            }
        });
        Self {
            requests,
            answers,
            task,
        }
    }

    /// Asks. One request is open at a time.
    pub fn ask(&self, request: Request) {
        // There is room for it. If the reader has ended, its last answer says why.
        let _ = self.requests.try_send(request);
    }

    /// Waits for the answer. Cancel safe.
    pub async fn answer(&mut self) -> Answer {
        self.answers.recv().await.unwrap_or_else(|| {
            Answer::Failed(SourceError::Server {
                address: String::new(),
                cause: "the reader of the snapshot ended".to_owned(),
            })
        })
    }

    /// The answer, if it is there.
    pub fn answered(&mut self) -> Option<Answer> {
        self.answers.try_recv().ok()
    }
}

async fn serve(
    source: &PostgresSource,
    asked: &mut Receiver<Request>,
    answer: &Sender<Answer>,
) -> Result<(), SourceError> {
    let Some(mut request) = asked.recv().await else {
        return Ok(());
    };
    let credentials = Credentials::read(&source.server())?;
    let catalog = Catalog::connect(source, &credentials).await?;
    let reader = Reader {
        selection: Selection::new(&source.tables)?,
        source,
        catalog: &catalog,
    };
    let failed = |error: Error| catalog.failed(&error);
    session::prepare(catalog.client()).await.map_err(failed)?;
    loop {
        let (said, watermark) = match request {
            Request::Tables => (reader.tables().await.map_err(failed)?, None),
            Request::Barrier => (reader.barrier().await.map_err(failed)?, None),
            Request::Describe { oid, watermark } => (reader.settle(reader.describe(oid).await).await?, Some(watermark)),
            Request::Chunk {
                oid,
                which,
                order,
                rows,
                watermark,
            } => {
                let span = step!("snapshot chunk", table = oid, rows = Empty, bytes = Empty);
                let chunk = async { reader.settle(reader.chunk(oid, which, &order, rows).await).await };
                let said = step(span.clone(), chunk).await?;
                if let Answer::Chunk(chunk) = &said {
                    span.record("rows", chunk.rows.len()).record("bytes", chunk.rows.size());
                }
                (said, Some(watermark))
            }
        };
        let marks = matches!(said, Answer::Described(_) | Answer::Chunk(_));
        if answer.send(said).await.is_err() {
            return Ok(());
        }
        if let Some(watermark) = watermark.filter(|_| marks) {
            reader.emit(&watermark).await.map_err(failed)?;
        }
        match asked.recv().await {
            Some(next) => request = next,
            None => return Ok(()),
        }
    }
}

impl From<Unreadable> for Answer {
    fn from(unreadable: Unreadable) -> Self {
        match unreadable {
            Unreadable::Busy(cause) => Self::Busy(cause),
            Unreadable::Gone => Self::Gone,
            Unreadable::Refused(cause) => Self::Refused(cause),
        }
    }
}

fn too_large() -> String {
    format!(
        "it has no key and takes more than {} MiB, or {} MiB as text, so its rows cannot be read in chunks; add a primary key",
        WHOLE_TABLE_BYTES >> 20,
        WHOLE_TABLE_TEXT >> 20
    )
}

struct Reader<'a> {
    source: &'a PostgresSource,
    selection: Selection,
    catalog: &'a Catalog,
}

impl Reader<'_> {
    /// Ends the transaction of a read that failed, and tells what concerns the table from what concerns the connection.
    async fn settle(&self, read: Result<Answer, ReadError>) -> Result<Answer, SourceError> {
        match read {
            Ok(said) => Ok(said),
            Err(error) => {
                let said = error.unreadable().ok_or_else(|| error.into_source(self.catalog))?;
                let rolled_back = self.catalog.client().batch_execute("ROLLBACK").await;
                rolled_back.map_err(|error| self.catalog.failed(&error))?;
                Ok(said.into())
            }
        }
    }

    async fn tables(&self) -> Result<Answer, Error> {
        let publication = &self.source.publication.name;
        let tables = session::tables(self.catalog.client(), publication, &self.selection).await?;
        Ok(Answer::Tables(tables))
    }

    async fn barrier(&self) -> Result<Answer, Error> {
        let client = self.catalog.client();
        let standby = client.query_one("SELECT pg_catalog.pg_is_in_recovery()", &[]).await?;
        if standby.get(0) {
            return Ok(Answer::Busy(
                "the server is a standby, into whose WAL no watermark can be written; capture from the primary, or set snapshot.mode to Never"
                    .to_owned(),
            ));
        }
        let xid: String = client
            .query_one("SELECT pg_catalog.pg_current_xact_id()::text", &[])
            .await?
            .get(0);
        // Of what cannot be read, nothing is decided.
        Ok(Answer::Barrier(xid.parse().unwrap_or(u64::MAX)))
    }

    /// Begins a transaction in which the table cannot change its shape, and which sees everything that committed before. None if the
    /// table is gone.
    async fn begin(&self, oid: u32) -> Result<Option<Shape>, ReadError> {
        let client = self.catalog.client();
        let publication = &self.source.publication.name;
        let Some(before) = Shape::read(client, publication, oid).await? else {
            return Ok(None);
        };
        // The lock comes first, since the transaction's snapshot is taken by the first statement after it.
        client
            .batch_execute(&format!(
                "BEGIN ISOLATION LEVEL REPEATABLE READ READ ONLY; LOCK TABLE {} IN ACCESS SHARE MODE",
                before.from_clause()
            ))
            .await?;
        let shape = Shape::read(client, publication, oid).await?;
        // If it was renamed in between, another table was locked. Its new name need not be one that is captured.
        Ok(shape
            .filter(|shape| shape.from_clause() == before.from_clause())
            .filter(|shape| self.selection.holds(&shape.schema, &shape.table)))
    }

    async fn end(&self, said: Answer) -> Result<Answer, ReadError> {
        self.catalog.client().batch_execute("COMMIT").await?;
        Ok(said)
    }

    async fn describe(&self, oid: u32) -> Result<Answer, ReadError> {
        let Some(shape) = self.begin(oid).await? else {
            return self.end(Answer::Gone).await;
        };
        // What a chunk would be refused for is refused before anything is published of the table.
        if let Some(cause) = self.refuses(&shape).await? {
            return self.end(Answer::Refused(cause)).await;
        }
        let client = self.catalog.client();
        let mut lines = pin!(client.copy_out(&shape.copy_nothing()).await?);
        while let Some(nothing) = lines.next().await {
            nothing?;
        }
        self.end(Answer::Described(shape)).await
    }

    /// Why a table cannot be read in chunks, nor as one.
    async fn refuses(&self, shape: &Shape) -> Result<Option<String>, Error> {
        if shape.has_key() {
            return Ok(None);
        }
        if shape.is_hypertable() {
            return Ok(Some(
                "a hypertable is only read by its key, and it has none: add a primary key".to_owned(),
            ));
        }
        let size = self
            .catalog
            .client()
            .query_one(
                "SELECT (pg_catalog.pg_table_size($1::oid) + coalesce(
                     (SELECT sum(pg_catalog.pg_table_size(relid)) FROM pg_catalog.pg_partition_tree($1::oid)), 0))::int8",
                &[&shape.oid],
            )
            .await?;
        Ok((size.get::<_, i64>(0) > WHOLE_TABLE_BYTES).then(too_large))
    }

    async fn chunk(&self, oid: u32, which: Which, order: &str, limit: u32) -> Result<Answer, ReadError> {
        let Some(shape) = self.begin(oid).await? else {
            return self.end(Answer::Gone).await;
        };
        if shape.order() != order {
            return self.end(Answer::Reordered).await;
        }
        if let Some(cause) = self.refuses(&shape).await? {
            return self.end(Answer::Refused(cause)).await;
        }
        let client = self.catalog.client();
        let now = client
            .query_one(
                "SELECT pg_catalog.pg_current_snapshot()::text,
                        (extract(epoch FROM pg_catalog.clock_timestamp()) * 1000000)::int8",
                &[],
            )
            .await?;
        let (largest, limit) = match which {
            Which::After(_) if shape.has_key() => (CHUNK_BYTES, limit),
            Which::After(_) => (WHOLE_TABLE_TEXT, u32::MAX),
            Which::Keys(_) => (usize::MAX, u32::MAX),
        };
        let mut chunk = Chunk {
            seen: now.get::<_, String>(0).parse()?,
            time_micros: now.get(1),
            last_key: None,
            complete: false,
            keys_asked: 0,
            rows: Rows::new(shape.width()),
            shape,
        };
        let sql = match &which {
            Which::After(after) => chunk.shape.copy_chunk(after.as_deref(), limit),
            Which::Keys(keys) => chunk.shape.copy_rows(keys),
        };
        let lines = client.copy_out(&sql).await?;
        let mut lines = pin!(lines);
        let (mut cutter, mut full) = (Lines::default(), false);
        while let Some(bytes) = lines.next().await {
            cutter.cut(&bytes?, |line| {
                if !full {
                    chunk.rows.push(line)?;
                    full = chunk.rows.size() >= largest;
                }
                Ok(())
            })?;
        }
        // Rows that were asked for by their keys are all taken: what is left out would not be asked for again.
        chunk.complete = matches!(which, Which::Keys(_)) || (!full && chunk.rows.len() < limit as usize);
        if full && !chunk.shape.has_key() {
            return self.end(Answer::Refused(too_large())).await;
        }
        chunk.last_key = chunk.key_of_last();
        chunk.keys_asked = match which {
            Which::After(_) => 0,
            Which::Keys(keys) => keys.len(),
        };
        self.end(Answer::Chunk(chunk)).await
    }

    /// Writes a watermark. A transaction that has an id makes the server write the WAL to disk when it ends, and so send it, now.
    async fn emit(&self, content: &str) -> Result<(), Error> {
        let sql = format!(
            "SELECT pg_catalog.pg_current_xact_id(), pg_catalog.pg_logical_emit_message(false, '{WATERMARK_PREFIX}', {})",
            quote_literal(content)
        );
        self.catalog.client().batch_execute(&sql).await
    }
}

impl Chunk {
    fn key_of_last(&self) -> Option<Vec<String>> {
        let last = self.rows.iter().last().filter(|_| self.shape.has_key())?;
        let values: Vec<Datum<'_>> = last.values().collect();
        self.shape
            .key()
            .iter()
            .map(|index| match values.get(*index)? {
                Datum::Text(text) => Some((*text).to_owned()),
                _ => None,
            })
            .collect()
    }
}

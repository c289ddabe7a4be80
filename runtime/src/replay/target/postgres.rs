//! Makes the changes in a PostgreSQL database: each transaction of the source is one of the target, exactly once.
//!
//! How far the replay is stands in a table of the target, and moves in the same transaction as the rows. A replication origin would keep
//! it too, but a role needs a superuser's leave for that; a table needs none. Whoever moves it says where it was: should a transaction
//! before it have failed, or somebody else have moved it, that fails. So everything can be sent without waiting for answers, and of two
//! that deliver the same replay, one stops.
//!
//! Commits do not wait for the disk, but for the last: if the server crashes, rows and place are lost together, and made again.
//!
//! Where the role may, the session has a replication origin, so that a pipeline with `origin: None` leaves these changes out. Where it may
//! not, a table that is published is not written.

mod rows;
mod table;

use std::{
    collections::{BTreeMap, HashMap, HashSet, VecDeque},
    pin::{Pin, pin},
    sync::Arc,
    time::Duration,
};

use bytes::Bytes;
use meander_config::{PostgresServer, ResourceIdentity};
use meander_proto::v1::{Absence, ChangeRecord, Operation, Relation, Row, Value, value::Kind};
use prost::Message as _;
use tokio::{sync::mpsc, task::JoinHandle};
use tokio_postgres::{Client, Error, Statement, error::SqlState, types::ToSql, types::Type};

use self::{
    rows::TextArray,
    table::{LookUp, Shape, Table, Verb, quoted},
};
use super::{Batch, Mark, Resumable, Tally, Target, TargetError, Trouble, job_id};
use crate::{
    replay::{
        checkpoint::{Checkpoint, Done, Reached},
        patience::{NOTICE, Silence, Silent},
        record::{InvalidResumeToken, Record, ResumeToken},
    },
    source::postgres::{
        preflight::{Credentials, connect, with_cause},
        wire::{quote_identifier, quote_literal},
    },
};

/// Where the place is kept.
const PLACE: &str = "meander.replays";
/// What a request is about that is not about a table.
const WHOLE: &str = "a transaction";
/// Bounds of one statement.
const RUN_ROWS: usize = 1024;
const RUN_BYTES: usize = 1 << 20;
/// Bounds of what is sent and not answered.
const WINDOW_STATEMENTS: usize = 512;
const WINDOW_BYTES: usize = 8 << 20;
/// How long an answer may take: rows can have triggers, and keys that refer to others without an index.
const LONGEST_ANSWER: Duration = Duration::from_secs(600);
/// How long it may take where a whole table is read.
const LONGEST_SCAN: Duration = Duration::from_secs(3600);
/// Replays that can be marked at the same time; each has an origin of its own meanwhile.
const ORIGINS: u32 = 16;

/// A server that is gone is noticed by both sides, and what it held is given up. One that is there and does not answer is given up by
/// this side.
const SETTINGS: &str = "SET tcp_keepalives_idle = 5; SET tcp_keepalives_interval = 2; SET tcp_keepalives_count = 5; \
                        SET synchronous_commit = off";
const SCHEMA: &str = "CREATE SCHEMA meander";
/// The row of a replay is written again with each transaction: room for that on its page.
const TABLE: &str = "CREATE TABLE IF NOT EXISTS meander.replays (
    job text PRIMARY KEY,
    range text NOT NULL,
    next bigint[] NOT NULL,
    resume text,
    delivered bigint NOT NULL DEFAULT 0,
    filtered bigint NOT NULL DEFAULT 0,
    first_time bigint,
    snapshots jsonb NOT NULL DEFAULT '{}',
    updated_at timestamptz NOT NULL DEFAULT now()
) WITH (fillfactor = 20)";
const COMMENT: &str =
    "COMMENT ON TABLE meander.replays IS 'How far each replay is. The row of one that has ended can be deleted.'";
const LOAD: &str = "SELECT range, next, resume, delivered, first_time, filtered FROM meander.replays WHERE job = $1";
const BEGIN: &str = "INSERT INTO meander.replays (job, range, next) VALUES ($1, $2, $3)";
/// Fails, by a division by zero, if the place is not where it was left.
const MOVE: &str = "WITH moved AS (
        UPDATE meander.replays SET resume = $3, delivered = $4, first_time = $5, filtered = $6, next = $7, updated_at = now()
        WHERE job = $1 AND resume IS NOT DISTINCT FROM $2 RETURNING 1)
    SELECT 1 / count(*) FROM moved";
const SNAPSHOT_BEGIN: &str = "UPDATE meander.replays
    SET snapshots = jsonb_set(snapshots, ARRAY[$2], to_jsonb(pg_current_xact_id()::xid::text)) WHERE job = $1";
const SNAPSHOT_END: &str = "UPDATE meander.replays SET snapshots = snapshots - $2 WHERE job = $1";
const SNAPSHOT_BEGUN: &str = "SELECT snapshots ->> $2 FROM meander.replays WHERE job = $1";

/// A connection to the target, and how far the replay is there.
pub struct Postgres {
    client: Arc<Client>,
    driver: JoinHandle<()>,
    /// The process that serves the connection.
    backend: i32,
    user: String,
    job: String,
    marked: bool,
    reached: Reached,
    moves: Statement,
    tables: HashMap<(String, String), Table>,
    sent: Sent,
    /// Since when the first of them has been without an answer.
    silence: Silence,
    /// A transaction is open in the target.
    open: bool,
    /// Rows that go into the next statement.
    run: Option<Run>,
    /// Tables that are emptied by the next statement, all together: one that others refer to cannot be emptied alone.
    emptied: Vec<String>,
    /// Tables without a key that a snapshot in this transaction has emptied.
    renewed: HashSet<String>,
    /// The first half of a change of a key.
    leaving: Option<Leaving>,
    /// What is delivered with the transaction that is open.
    carried: Option<Mark>,
    /// Where partitions go on after it.
    passed: BTreeMap<usize, i64>,
}

impl Drop for Postgres {
    fn drop(&mut self) {
        // What is not committed is rolled back.
        self.driver.abort();
    }
}

/// Rows of one table to which the same is done.
struct Run {
    table: (String, String),
    shape: Shape,
    parameters: Vec<TextArray>,
    rows: usize,
    /// A statement can write each row only once.
    keys: HashSet<Bytes>,
}

struct Leaving {
    change: ChangeRecord,
    key: Bytes,
    record: Record,
}

impl Resumable for Postgres {
    type Settings = PostgresServer;

    async fn open(server: &PostgresServer, job: &ResourceIdentity) -> Result<(Self, Option<Checkpoint>), TargetError> {
        let credentials = Credentials::read(server)?;
        let (client, driver) = connect(server, &credentials).await?;
        let user = credentials.user;
        let failed = |error: Error| failure(&error, PLACE, &user);
        client.batch_execute(SETTINGS).await.map_err(failed)?;
        prepare_place(&client, &user).await?;
        let marked = mark(&client).await.map_err(failed)?;
        let moves = client
            .prepare_typed(
                MOVE,
                &[
                    Type::TEXT,
                    Type::TEXT,
                    Type::TEXT,
                    Type::INT8,
                    Type::INT8,
                    Type::INT8,
                    Type::INT8_ARRAY,
                ],
            )
            .await
            .map_err(failed)?;
        let backend = client
            .query_one("SELECT pg_backend_pid()", &[])
            .await
            .map_err(failed)?
            .get(0);
        let job = job_id(job);
        let checkpoint = match client.query_opt(LOAD, &[&job]).await.map_err(failed)? {
            None => None,
            Some(row) => Some(
                read_checkpoint(&row).map_err(|cause| TargetError::CheckpointUnreadable {
                    place: format!("the table meander.replays, under the job {job:?}"),
                    cause,
                })?,
            ),
        };
        let reached = (checkpoint.as_ref()).map_or_else(Reached::default, |checkpoint| checkpoint.reached.clone());
        let postgres = Self {
            client: Arc::new(client),
            driver,
            backend,
            user,
            job,
            marked,
            reached,
            moves,
            tables: HashMap::new(),
            sent: Sent::default(),
            silence: Silence::default(),
            open: false,
            run: None,
            emptied: Vec::new(),
            renewed: HashSet::new(),
            leaving: None,
            carried: None,
            passed: BTreeMap::new(),
        };
        Ok((postgres, checkpoint))
    }

    async fn begin(&mut self, checkpoint: &Checkpoint) -> Result<(), TargetError> {
        let range = serde_json::to_string(&checkpoint.range).map_err(|error| TargetError::CheckpointUnreadable {
            place: "this replay".to_owned(),
            cause: error.to_string(),
        })?;
        self.reached = checkpoint.reached.clone();
        let next = &self.reached.next;
        match self.client.execute(BEGIN, &[&self.job, &range, next]).await {
            Ok(_) => Ok(()),
            Err(error) if error.code() == Some(&SqlState::UNIQUE_VIOLATION) => Err(TargetError::TakenOver),
            Err(error) => Err(failure(&error, PLACE, &self.user)),
        }
    }
}

/// What a row that was asked for by [`LOAD`] says.
fn read_checkpoint(row: &tokio_postgres::Row) -> Result<Checkpoint, String> {
    let range = serde_json::from_str(row.get(0)).map_err(|error| error.to_string())?;
    let resume: Option<ResumeToken> = (row.get::<_, Option<&str>>(2).map(str::parse).transpose())
        .map_err(|error: InvalidResumeToken| error.to_string())?;
    let count = |column: usize| u64::try_from(row.get::<_, i64>(column)).unwrap_or_default();
    let reached = Reached {
        next: row.get(1),
        done: resume.map(|resume| Done {
            resume,
            delivered: count(3),
            filtered: count(5),
            first_time: row.get::<_, Option<i64>>(4).unwrap_or_default(),
        }),
    };
    Checkpoint::kept(range, reached)
}

/// Makes the table for the place, if it is missing.
async fn prepare_place(client: &Client, user: &str) -> Result<(), TargetError> {
    let failed = |error: Error| failure(&error, PLACE, user);
    let found = client
        .query_one(
            "SELECT to_regnamespace('meander') IS NULL, to_regclass('meander.replays') IS NULL",
            &[],
        )
        .await
        .map_err(failed)?;
    let (no_schema, no_table): (bool, bool) = (found.get(0), found.get(1));
    if !no_table {
        return Ok(());
    }
    let schema = if no_schema { SCHEMA } else { "" };
    match client.batch_execute(&format!("{schema}; {TABLE}; {COMMENT}")).await {
        Ok(()) => Ok(()),
        Err(error) if error.code() == Some(&SqlState::INSUFFICIENT_PRIVILEGE) => Err(TargetError::NoPlace {
            user: quote_identifier(user),
        }),
        Err(error)
            if [
                SqlState::DUPLICATE_SCHEMA,
                SqlState::DUPLICATE_TABLE,
                SqlState::UNIQUE_VIOLATION,
            ]
            .iter()
            .any(|code| error.code() == Some(code)) =>
        {
            Err(TargetError::Disturbed(
                "another replay made the table meander.replays at the same moment".to_owned(),
            ))
        }
        Err(error) => Err(failed(error)),
    }
}

/// Gives the session an origin that no other has, if the role may. They are few and stay: whoever comes next takes them again.
async fn mark(client: &Client) -> Result<bool, Error> {
    let allowed = client
        .query_one(
            "SELECT bool_and(has_function_privilege(name, 'EXECUTE')) FROM unnest(ARRAY[
                'pg_replication_origin_oid(text)', 'pg_replication_origin_create(text)',
                'pg_replication_origin_session_setup(text)']) name",
            &[],
        )
        .await?;
    if !allowed.get::<_, bool>(0) {
        return Ok(false);
    }
    for number in 1..=ORIGINS {
        let origin = format!("meander_replay_{number}");
        let made = client
            .execute(
                "SELECT pg_replication_origin_create($1) WHERE pg_replication_origin_oid($1) IS NULL",
                &[&origin],
            )
            .await;
        let set_up = match made {
            Ok(_) => {
                client
                    .execute("SELECT pg_replication_origin_session_setup($1)", &[&origin])
                    .await
            }
            // Another replay made it at the same moment, and has it.
            Err(error) if error.code() == Some(&SqlState::UNIQUE_VIOLATION) => continue,
            Err(error) => Err(error),
        };
        match set_up {
            Ok(_) => return Ok(true),
            Err(error) if error.code() == Some(&SqlState::OBJECT_IN_USE) => {}
            // No room for another origin, or none for any (max_replication_slots).
            Err(error) if error.as_db_error().is_some() => {
                tracing::warn!(error = with_cause(&error), "what is written carries no origin");
                return Ok(false);
            }
            Err(error) => return Err(error),
        }
    }
    Ok(false)
}

impl Target for Postgres {
    const WHOLE_TRANSACTIONS: bool = true;
    /// A transaction that has come in part is not committed.
    const FINISHES: bool = true;
    /// A transaction that has come in part waits for its rest, and the destination for nothing.
    const TELLS_SILENCE: bool = true;

    async fn run(mut self, mut batches: mpsc::Receiver<Batch>, tally: Tally) -> Result<(), TargetError> {
        tally.open();
        loop {
            tokio::select! {
                batch = batches.recv() => match batch {
                    Some(batch) => self.deliver(batch, &tally).await?,
                    None => break,
                },
                heard = self.hear(&tally), if !self.sent.is_empty() => heard?,
            }
        }
        // Waits for the disk, and for a standby where commits wait for one, and so for everything before it.
        let job = quote_literal(&self.job);
        let last =
            format!("SET synchronous_commit = on; UPDATE meander.replays SET updated_at = now() WHERE job = {job}");
        let client = Arc::clone(&self.client);
        let last = async move { client.batch_execute(&last).await.map(|()| 0) };
        self.send(last, About::of(PLACE), &tally).await?;
        self.settle(&tally).await
    }
}

impl Postgres {
    async fn deliver(&mut self, batch: Batch, tally: &Tally) -> Result<(), TargetError> {
        let mark = batch.mark;
        let mut records = batch.records.into_iter().peekable();
        while let Some(record) = records.next() {
            let is_last = match records.peek() {
                Some(next) => next.transaction() != record.transaction(),
                None => batch.whole,
            };
            let first_time = self.carried.map_or(mark.first_time, |carried| carried.first_time);
            let mut passed = self.carried.map(|carried| carried.passed).unwrap_or_default();
            passed += record.passed;
            self.passed.extend(record.places());
            self.carried = Some(Mark {
                records: self.carried.map_or(0, |carried| carried.records) + 1,
                passed,
                first_time,
                last_time: mark.last_time,
                resume: (&record).into(),
                handed: mark.handed,
            });
            if !self.open {
                let client = Arc::clone(&self.client);
                let begin = async move { client.batch_execute("BEGIN").await.map(|()| 0) };
                self.send(begin, About::of(WHOLE), tally).await?;
                self.open = true;
            }
            self.change(record, tally).await?;
            if is_last {
                self.commit(tally).await?;
            }
        }
        Ok(())
    }

    async fn commit(&mut self, tally: &Tally) -> Result<(), TargetError> {
        self.leave(tally).await?;
        self.flush(tally).await?;
        let Some(mark) = self.carried.take() else { return Ok(()) };
        let before = self.reached.done.map(|done| done.resume.to_string());
        let done = self.reached.go_on(std::mem::take(&mut self.passed), &mark);
        let next = self.reached.next.clone();
        let (client, moves, job) = (Arc::clone(&self.client), self.moves.clone(), self.job.clone());
        let move_on = async move {
            let after = done.resume.to_string();
            let delivered = i64::try_from(done.delivered).unwrap_or(i64::MAX);
            let filtered = i64::try_from(done.filtered).unwrap_or(i64::MAX);
            client
                .execute(
                    &moves,
                    &[&job, &before, &after, &delivered, &done.first_time, &filtered, &next],
                )
                .await
        };
        self.send(move_on, About::of(PLACE), tally).await?;
        let client = Arc::clone(&self.client);
        let commit = async move { client.batch_execute("COMMIT").await.map(|()| 0) };
        let about = About {
            mark: Some(mark),
            ..About::of(WHOLE)
        };
        self.open = false;
        self.renewed.clear();
        self.send(commit, about, tally).await
    }

    async fn change(&mut self, record: Record, tally: &Tally) -> Result<(), TargetError> {
        if record.value.first() == Some(&b'{') || record.value.is_empty() {
            return Err(TargetError::NotExact {
                topic: record.topic.to_string(),
            });
        }
        let change = ChangeRecord::decode(record.value.as_ref()).map_err(|error| undecodable(&record, &error))?;
        // Both halves of a change of a key, if the second one is there.
        if let Some(leaving) = &self.leaving
            && !(change.key_changed
                && change.operation() == Operation::Update
                && leaving.record.coordinate.position == record.coordinate.position)
        {
            self.leave(tally).await?;
        }
        let relation = change.relation.clone().unwrap_or_default();
        match change.operation() {
            // The tables of the target are somebody else's: a column that is missing is told when a row has it.
            Operation::Message | Operation::SourceGap | Operation::SchemaChange => Ok(()),
            Operation::Delete if change.key_changed => {
                self.leaving = Some(Leaving {
                    change,
                    key: record.key.clone(),
                    record,
                });
                Ok(())
            }
            Operation::Insert | Operation::Read => {
                if change.operation() == Operation::Read {
                    self.renew(&relation, tally).await?;
                }
                require_values(change.after.as_ref(), &record)?;
                let after = values(&relation, change.after.as_ref(), None, &record)?;
                let verb = if self.table(&relation, tally).await?.key.is_empty() {
                    Verb::Insert
                } else {
                    Verb::Upsert
                };
                self.row(&relation, verb, &[], &after, record.key, tally).await
            }
            Operation::Update => {
                self.leaving = None;
                self.update(&relation, &change, record, tally).await
            }
            Operation::Delete => {
                let before = values(&relation, change.before.as_ref(), None, &record)?;
                let verb = if self.table(&relation, tally).await?.key.is_empty() {
                    require_values(change.before.as_ref(), &record)?;
                    Verb::DeleteOne
                } else {
                    Verb::Delete
                };
                self.row(&relation, verb, &before, &[], record.key, tally).await
            }
            Operation::Truncate => {
                if self.run.is_some() {
                    self.flush(tally).await?;
                }
                let table = self.table(&relation, tally).await?.name.clone();
                self.emptied.push(table);
                Ok(())
            }
            Operation::SnapshotBegin => self.snapshot_begins(&relation, tally).await,
            Operation::SnapshotEnd => self.snapshot_ends(&relation, tally).await,
            Operation::Unspecified => Err(undecodable(&record, &"an operation that this version does not know")),
        }
    }

    async fn update(
        &mut self,
        relation: &Relation,
        change: &ChangeRecord,
        record: Record,
        tally: &Tally,
    ) -> Result<(), TargetError> {
        require_values(change.after.as_ref(), &record)?;
        let after = values(relation, change.after.as_ref(), change.before.as_ref(), &record)?;
        let whole = !after.iter().any(is_absent);
        if self.table(relation, tally).await?.key.is_empty() {
            require_values(change.before.as_ref(), &record)?;
            let before = values(relation, change.before.as_ref(), None, &record)?;
            return self
                .row(relation, Verb::UpdateOne, &before, &after, record.key, tally)
                .await;
        }
        if !change.key_changed {
            let verb = if whole { Verb::Upsert } else { Verb::Update };
            return self.row(relation, verb, &[], &after, record.key, tally).await;
        }
        let before = values(relation, change.before.as_ref(), None, &record)?;
        if whole {
            self.row(relation, Verb::Delete, &before, &[], Bytes::new(), tally)
                .await?;
            return self.row(relation, Verb::Upsert, &[], &after, record.key, tally).await;
        }
        // What the change left out is in the row, so it cannot be deleted and inserted.
        self.row(relation, Verb::MakeRoom, &before, &after, Bytes::new(), tally)
            .await?;
        self.row(relation, Verb::Rekey, &before, &after, record.key, tally)
            .await
    }

    /// The first half of a change of a key whose second half is not part of the replay: the row is gone.
    async fn leave(&mut self, tally: &Tally) -> Result<(), TargetError> {
        let Some(Leaving { change, key, record }) = self.leaving.take() else {
            return Ok(());
        };
        let relation = change.relation.clone().unwrap_or_default();
        let before = values(&relation, change.before.as_ref(), None, &record)?;
        self.row(&relation, Verb::Delete, &before, &[], key, tally).await
    }

    /// What the target held of the table before, and is not written until the snapshot ends, is gone. The rows themselves say when they
    /// were written.
    async fn snapshot_begins(&mut self, relation: &Relation, tally: &Tally) -> Result<(), TargetError> {
        self.flush(tally).await?;
        let table = self.table(relation, tally).await?;
        let name = table.name.clone();
        if table.key.is_empty() {
            // Rows without a key are read all at once, right after this, and could not be told from those that are there.
            return self
                .statement(format!("DELETE FROM {name}"), Vec::new(), name, tally)
                .await;
        }
        let parameters = vec![self.job.clone(), name.clone()];
        self.statement(SNAPSHOT_BEGIN.to_owned(), parameters, name, tally).await
    }

    /// Rows without a key are read all at once, those of a table in one transaction with its end marker, and replace what the target has:
    /// they could not be told from it.
    async fn renew(&mut self, relation: &Relation, tally: &Tally) -> Result<(), TargetError> {
        let table = self.table(relation, tally).await?;
        let name = table.name.clone();
        if !table.key.is_empty() || !self.renewed.insert(name.clone()) {
            return Ok(());
        }
        self.flush(tally).await?;
        self.statement(format!("DELETE FROM {name}"), Vec::new(), name, tally)
            .await
    }

    async fn snapshot_ends(&mut self, relation: &Relation, tally: &Tally) -> Result<(), TargetError> {
        self.renew(relation, tally).await?;
        self.flush(tally).await?;
        let table = self.table(relation, tally).await?;
        let name = table.name.clone();
        let Some(sweep) = table.sweep().filter(|_| !table.key.is_empty()) else {
            return Ok(());
        };
        self.settle(tally).await?;
        let asked: [&(dyn ToSql + Sync); 2] = [&self.job, &name];
        let begun = answer(self.client.query_opt(SNAPSHOT_BEGUN, &asked), self.backend, tally)
            .await?
            .map_err(|error| failure(&error, &name, &self.user))?
            .and_then(|row| row.get::<_, Option<String>>(0));
        // A range that starts in a snapshot does not know what came before.
        let Some(begun) = begun else { return Ok(()) };
        self.statement(sweep, vec![begun], name.clone(), tally).await?;
        let parameters = vec![self.job.clone(), name.clone()];
        self.statement(SNAPSHOT_END.to_owned(), parameters, name, tally).await
    }

    async fn table(&mut self, relation: &Relation, tally: &Tally) -> Result<&mut Table, TargetError> {
        let name = (relation.schema.clone(), relation.table.clone());
        if self.tables.get(&name).is_none_or(|table| !table.is_for(relation)) {
            if self.tables.contains_key(&name) {
                // What is waiting counts on the table as it was.
                self.flush(tally).await?;
            }
            self.settle(tally).await?;
            let looked = Table::look_up(&self.client, relation, self.marked, &self.user);
            let table = match answer(looked, self.backend, tally).await? {
                Ok(table) => table,
                Err(LookUp::Unfit(error)) => return Err(*error),
                Err(LookUp::Failed(error)) => return Err(failure(&error, &quoted(relation), &self.user)),
            };
            self.tables.insert(name.clone(), table);
        }
        self.tables.get_mut(&name).ok_or_else(|| TargetError::NoTable {
            table: quoted(relation),
        })
    }

    /// Does something to a row, together with the rows before it to which the same is done.
    async fn row(
        &mut self,
        relation: &Relation,
        verb: Verb,
        before: &[Value],
        after: &[Value],
        key: Bytes,
        tally: &Tally,
    ) -> Result<(), TargetError> {
        let table = self.table(relation, tally).await?;
        let told = |index: &usize| !is_absent(&after[*index]);
        // A fixed value has not changed, but in a row that is found by it: that is for the server to refuse.
        let set = |index: &usize| {
            let finds = verb == Verb::UpdateOne || table.key.contains(index);
            !table.is_fixed(*index) || (finds && before[*index] != after[*index])
        };
        let written: Vec<usize> = match verb {
            Verb::Delete | Verb::DeleteOne => Vec::new(),
            Verb::MakeRoom => table.key.clone(),
            Verb::Rekey | Verb::UpdateOne => table.written().filter(told).filter(set).collect(),
            _ => table.written().filter(told).collect(),
        };
        let idle = match verb {
            Verb::Update => table.set_in_place(&written).is_empty(),
            Verb::UpdateOne => written.is_empty(),
            _ => false,
        };
        if idle {
            // Nothing of it can be another than it is.
            return Ok(());
        }
        let found = table.found_by(verb);
        let shape = Shape { verb, written };
        let name = (relation.schema.clone(), relation.table.clone());
        let joins = |run: &Run| {
            run.shape == shape
                && verb.takes_many()
                && run.table == name
                && run.rows < RUN_ROWS
                && run.size() < RUN_BYTES
                && (verb == Verb::Insert || !run.keys.contains(&key))
        };
        if !self.run.as_ref().is_some_and(joins) {
            self.flush(tally).await?;
        }
        let run = self.run.get_or_insert_with(|| Run {
            table: name,
            parameters: (0..found.len() + shape.written.len())
                .map(|_| TextArray::default())
                .collect(),
            shape: shape.clone(),
            rows: 0,
            keys: HashSet::new(),
        });
        let values =
            (found.iter().map(|&index| &before[index])).chain(shape.written.iter().map(|&index| &after[index]));
        for (parameter, value) in run.parameters.iter_mut().zip(values) {
            parameter.push(value.kind.as_ref());
        }
        run.rows += 1;
        run.keys.insert(key);
        Ok(())
    }

    /// Sends what is waiting.
    async fn flush(&mut self, tally: &Tally) -> Result<(), TargetError> {
        if !self.emptied.is_empty() {
            let tables = std::mem::take(&mut self.emptied).join(", ");
            let sql = format!("TRUNCATE {tables}");
            return self.statement(sql, Vec::new(), tables, tally).await;
        }
        let Some(run) = self.run.take() else { return Ok(()) };
        let prepared = (self.tables.get(&run.table)).is_some_and(|table| table.is_prepared(&run.shape));
        if !prepared {
            self.settle(tally).await?;
        }
        let Some(table) = self.tables.get_mut(&run.table) else {
            return Ok(());
        };
        let name = table.name.clone();
        let statement = answer(table.statement(&self.client, &run.shape), self.backend, tally)
            .await?
            .map_err(|error| failure(&error, &name, &self.user))?;
        let about = About {
            table: name,
            bytes: run.size(),
            mark: None,
            limit: LONGEST_ANSWER,
        };
        let client = Arc::clone(&self.client);
        let execute = async move {
            let parameters = run.parameters.iter().map(|parameter| parameter as &(dyn ToSql + Sync));
            client.execute_raw(&statement, parameters).await
        };
        self.send(execute, about, tally).await
    }

    /// A statement about a whole table.
    async fn statement(
        &mut self,
        sql: String,
        parameters: Vec<String>,
        table: String,
        tally: &Tally,
    ) -> Result<(), TargetError> {
        let client = Arc::clone(&self.client);
        let execute = async move {
            let parameters: Vec<_> =
                (parameters.iter().map(|text| (text as &(dyn ToSql + Sync), Type::TEXT))).collect();
            client.execute_typed(&sql, &parameters).await
        };
        let about = About {
            limit: LONGEST_SCAN,
            ..About::of(&table)
        };
        self.send(execute, about, tally).await
    }

    async fn send(
        &mut self,
        request: impl Future<Output = Result<u64, Error>> + Send + 'static,
        about: About,
        tally: &Tally,
    ) -> Result<(), TargetError> {
        if self.sent.is_empty() {
            self.silence.end();
        }
        self.sent.push(Box::pin(request), about).await;
        while self.sent.is_full() {
            self.hear(tally).await?;
        }
        Ok(())
    }

    /// Hears the next answer to what was sent. Cancel safe.
    async fn hear(&mut self, tally: &Tally) -> Result<(), TargetError> {
        let limit = self.sent.limit();
        loop {
            tokio::select! {
                answer = self.sent.next() => {
                    if self.silence.end() {
                        tally.set_trouble(None);
                    }
                    return self.answered(answer, tally);
                }
                silent = self.silence.lasts(limit) => notice(&silent, self.backend, limit, tally)?,
            }
        }
    }

    /// Hears every answer to what was sent. In a transaction that has failed everything else fails too: so this comes before a question,
    /// and the first failure is the one that is told.
    async fn settle(&mut self, tally: &Tally) -> Result<(), TargetError> {
        while !self.sent.is_empty() {
            self.hear(tally).await?;
        }
        Ok(())
    }

    fn answered(&self, (answer, about): (Result<u64, Error>, About), tally: &Tally) -> Result<(), TargetError> {
        match answer {
            Ok(_) => {
                if let Some(mark) = &about.mark {
                    tally.credit(mark);
                }
                Ok(())
            }
            Err(error) => Err(failure(&error, &about.table, &self.user)),
        }
    }
}

/// The answer to a question that is asked when nothing else is without one.
async fn answer<T>(asked: impl Future<Output = T>, backend: i32, tally: &Tally) -> Result<T, TargetError> {
    let (mut asked, mut silence) = (pin!(asked), Silence::default());
    loop {
        tokio::select! {
            answer = &mut asked => {
                if silence.end() {
                    tally.set_trouble(None);
                }
                return Ok(answer);
            }
            silent = silence.lasts(LONGEST_ANSWER) => notice(&silent, backend, LONGEST_ANSWER, tally)?,
        }
    }
}

fn notice(silent: &Silent, backend: i32, limit: Duration, tally: &Tally) -> Result<(), TargetError> {
    match silent {
        Silent::Noticed => {
            let message = format!(
                "The target database has not answered for more than {NOTICE:?}, and is waited for for {limit:?}; see there what its session waits \
                 for: SELECT wait_event_type, wait_event, query FROM pg_stat_activity WHERE pid = {backend};"
            );
            tracing::warn!("{message}");
            tally.set_trouble(Some(Trouble {
                reason: "TargetSilent",
                message,
            }));
            Ok(())
        }
        Silent::TooLong => Err(TargetError::Silent { waited: limit }),
    }
}

impl Run {
    fn size(&self) -> usize {
        self.parameters.iter().map(TextArray::size).sum()
    }
}

/// Refuses a row of which values were left out for their size: they are not what is there already, as what an UPDATE leaves out is.
fn require_values(row: Option<&Row>, record: &Record) -> Result<(), TargetError> {
    let omitted = |value: &Value| value.kind == Some(Kind::Absent(Absence::Oversized.into()));
    if row.is_some_and(|row| row.values.iter().any(omitted)) {
        return Err(TargetError::ValuesOmitted {
            topic: record.topic.to_string(),
            partition: record.partition,
            offset: record.offset,
        });
    }
    Ok(())
}

/// The values of a row. Those that it leaves out are taken from `fallback`, where that tells them.
fn values(
    relation: &Relation,
    row: Option<&Row>,
    fallback: Option<&Row>,
    record: &Record,
) -> Result<Vec<Value>, TargetError> {
    let values = row.map(|row| row.values.as_slice()).unwrap_or_default();
    if values.len() != relation.columns.len() {
        return Err(undecodable(record, &"it has not as many values as columns"));
    }
    let told = |index: usize| fallback?.values.get(index).filter(|value| !is_absent(value));
    Ok((values.iter().enumerate())
        .map(|(index, value)| {
            let value = if is_absent(value) {
                told(index).unwrap_or(value)
            } else {
                value
            };
            value.clone()
        })
        .collect())
}

fn is_absent(value: &Value) -> bool {
    matches!(value.kind, Some(Kind::Absent(_)))
}

fn undecodable(record: &Record, cause: &dyn std::fmt::Display) -> TargetError {
    TargetError::Undecodable {
        topic: record.topic.to_string(),
        partition: record.partition,
        offset: record.offset,
        cause: cause.to_string(),
    }
}

/// What a failure of a statement means, by its SQLSTATE.
fn failure(error: &Error, table: &str, user: &str) -> TargetError {
    let Some(database) = error.as_db_error() else {
        return TargetError::Disturbed(with_cause(error));
    };
    let code = database.code().code();
    let message = database.message().to_owned();
    match code {
        "22012" if table == PLACE => TargetError::TakenOver,
        // Serialization failures and deadlocks, lack of resources, a server that ends or only reads, a lock that was not to be had.
        "25006" | "55P03" => TargetError::Disturbed(message),
        _ if ["08", "40", "53", "57"].iter().any(|class| code.starts_with(class)) => TargetError::Disturbed(message),
        "42501" => TargetError::Refused {
            table: table.to_owned(),
            cause: format!(
                "{message}; run GRANT SELECT, INSERT, UPDATE, DELETE, TRUNCATE ON {table} TO {};",
                quote_identifier(user)
            ),
        },
        // The message can hold a value.
        _ if code.starts_with("22") => TargetError::Refused {
            table: table.to_owned(),
            cause: format!(
                "a value does not fit its column (SQLSTATE {code}); give the column the type that it has in the source"
            ),
        },
        _ => TargetError::Refused {
            table: table.to_owned(),
            cause: format!("{message} (SQLSTATE {code})"),
        },
    }
}

type Answer = Pin<Box<dyn Future<Output = Result<u64, Error>> + Send>>;

/// What a request is about.
struct About {
    /// The table.
    table: String,
    bytes: usize,
    /// What is delivered once it succeeds.
    mark: Option<Mark>,
    /// How long it is waited for.
    limit: Duration,
}

impl About {
    fn of(table: &str) -> Self {
        Self {
            table: table.to_owned(),
            bytes: 0,
            mark: None,
            limit: LONGEST_ANSWER,
        }
    }
}

/// Requests without an answer, in their order.
#[derive(Default)]
struct Sent {
    requests: VecDeque<(Answer, About)>,
    bytes: usize,
}

impl Sent {
    /// Sends a request, which happens when it is polled first.
    async fn push(&mut self, mut request: Answer, about: About) {
        let request = match futures::poll!(&mut request) {
            std::task::Poll::Pending => request,
            std::task::Poll::Ready(answer) => Box::pin(std::future::ready(answer)),
        };
        self.bytes += about.bytes;
        self.requests.push_back((request, about));
    }

    /// The next answer. Cancel safe.
    async fn next(&mut self) -> (Result<u64, Error>, About) {
        let Some((request, _)) = self.requests.front_mut() else {
            return std::future::pending().await;
        };
        let answer = request.await;
        let Some((_, about)) = self.requests.pop_front() else {
            return std::future::pending().await;
        };
        self.bytes -= about.bytes;
        (answer, about)
    }

    /// How long the next answer is waited for.
    fn limit(&self) -> Duration {
        (self.requests.front()).map_or(LONGEST_ANSWER, |(_, about)| about.limit)
    }

    fn is_empty(&self) -> bool {
        self.requests.is_empty()
    }

    fn is_full(&self) -> bool {
        self.requests.len() > WINDOW_STATEMENTS || self.bytes > WINDOW_BYTES
    }
}

//! The durable log: records and checkpoint in one Kafka transaction.
//!
//! Everything here blocks and runs on a thread of its own. No transaction is empty, and what PostgreSQL may be told is in a committed
//! checkpoint first.

use std::{
    collections::HashSet,
    thread,
    time::{Duration, Instant},
};

use meander_config::{Acknowledgement, CaptureConfig, Format, KafkaCluster};
use meander_traces::{note, step};
use rdkafka::{
    message::{Header, OwnedHeaders, OwnedMessage},
    producer::BaseRecord,
};
use tokio::{
    runtime::Handle,
    sync::{mpsc, watch},
    time::timeout,
};
use tracing::{
    Span,
    field::{Empty, display},
};

use crate::{
    batch::{Batch, Oversized, Record},
    checkpoint::Tail,
    log::{
        COMMIT_TIME_HEADER, Checkpoint, OversizedRecord, PART_HEADER, POSITION_HEADER, REPLAY_JOB_HEADER, RedisPlace,
        SnapshotState, checkpoint_key, checkpoint_topic, header, schema_key, schemas_topic,
    },
    position::{Lsn, Position},
    schema::Note,
    sink::{
        Durable, SinkError, left_open,
        partition::ByRow,
        producer::{PAUSE_AFTER_COMMIT, TransactionalProducer},
        queue::Queued,
        redis::feed::{Progress as RedisProgress, State as RedisState},
        topics::Remarks,
    },
};

/// A transaction is committed when it holds this much, or when nothing more is waiting.
const TRANSACTION_BYTES: usize = 4 * 1024 * 1024;
/// How long a transaction of changes that are late anyway, or of a bulk snapshot, waits for more of them. A transaction costs the brokers as much as thousands of records do.
const LATE_WAIT: Duration = Duration::from_millis(100);
/// How often an acknowledgement is written when no records carry it.
const ACKNOWLEDGE_INTERVAL: Duration = Duration::from_secs(5);
/// How often the brokers are asked whether they are still there while nothing is published.
const IDLE_INTERVAL: Duration = Duration::from_secs(4);
/// How long they may take to say so.
const IDLE_DEADLINE: Duration = Duration::from_secs(5);
/// How often that is looked at while nothing comes.
const TICK: Duration = Duration::from_secs(1);
/// How long the end waits for Redis to take what Kafka has, where that is required to acknowledge it.
const CLOSING_DEADLINE: Duration = Duration::from_secs(5);

/// The one writer of a pipeline's log.
pub struct KafkaSink {
    producer: TransactionalProducer,
    checkpoint_topic: String,
    checkpoint_key: String,
    schemas_topic: String,
    stream_prefix: Option<String>,
    /// PostgreSQL is acknowledged only what Redis has as well.
    redis_required: bool,
}

impl KafkaSink {
    /// Signs on. From here on no producer of this pipeline that was made earlier can commit anything. Blocks.
    ///
    /// # Errors
    /// When Kafka does not answer in time.
    pub fn open(config: &CaptureConfig, remarks: Remarks) -> Result<Self, SinkError> {
        let (namespace, name) = (&config.pipeline.namespace, &config.pipeline.name);
        let checkpoint_key = checkpoint_key(namespace, name, &config.source.slot_name);
        let partitioner = ByRow {
            schemas: matches!(config.format, Format::DebeziumJson { schemas: true, .. }),
            partitions: config.kafka.partitions,
            remarks,
        };
        let producer = TransactionalProducer::open(&config.kafka.cluster(), &checkpoint_key, partitioner)?;
        Ok(Self {
            producer,
            checkpoint_topic: checkpoint_topic(namespace, name),
            checkpoint_key,
            schemas_topic: schemas_topic(namespace, name),
            stream_prefix: config.redis.as_ref().map(|redis| redis.stream_prefix.clone()),
            redis_required: config
                .redis
                .as_ref()
                .is_some_and(|redis| redis.acknowledgement == Acknowledgement::Required),
        })
    }

    /// Aborts what Kafka has left open in these topics past what is published, so that it does not come to be there twice. To be called before
    /// anything is written. Blocks.
    ///
    /// # Errors
    /// When Kafka does not answer in time, or it stays open.
    pub fn abort_left_open(
        &self,
        cluster: &KafkaCluster,
        committed: &Tail,
        topics: &HashSet<String>,
        published: Option<Position>,
    ) -> Result<(), SinkError> {
        let is_past = |record: &OwnedMessage| {
            let position = header(record, POSITION_HEADER).and_then(|position| position.parse::<Position>().ok());
            header(record, REPLAY_JOB_HEADER).is_none() && position.is_some() && position > published
        };
        left_open::abort(
            cluster,
            &self.producer,
            committed,
            |name| topics.contains(name),
            is_past,
        )
    }

    /// Commits a checkpoint with no records. Blocks.
    ///
    /// # Errors
    /// When the transaction does not succeed, or may not have.
    pub fn commit_checkpoint(&self, checkpoint: &Checkpoint) -> Result<(), SinkError> {
        self.commit_batch(&Batch::default(), checkpoint)
    }

    /// Commits a batch and the checkpoint that speaks of it. Blocks.
    ///
    /// # Errors
    /// When the transaction does not succeed, or may not have.
    pub fn commit_batch(&self, batch: &Batch, checkpoint: &Checkpoint) -> Result<(), SinkError> {
        let deadline = self.producer.begin()?;
        for record in batch.records() {
            self.produce(batch, record, deadline)?;
        }
        self.note(&batch.schemas, deadline)?;
        self.commit(checkpoint, deadline)
    }

    /// Notes Redis's place in the checkpoint. Returns what may be acknowledged of what is `safe` in Kafka.
    fn note_redis(&self, checkpoint: &mut Checkpoint, redis: Durable, safe: Lsn) -> Lsn {
        if let (Some(position), Some(stream_prefix)) = (redis.position, &self.stream_prefix) {
            checkpoint.redis = Some(RedisPlace {
                stream_prefix: stream_prefix.clone(),
                position,
            });
        }
        if self.redis_required {
            safe.min(redis.safe)
        } else {
            safe
        }
    }

    fn commit(&self, checkpoint: &Checkpoint, deadline: Instant) -> Result<(), SinkError> {
        let value = serde_json::to_vec(checkpoint).map_err(|error| SinkError::KafkaTransaction(error.to_string()))?;
        self.producer.send(
            BaseRecord::to(&self.checkpoint_topic)
                .partition(0)
                .key(self.checkpoint_key.as_bytes())
                .payload(&value),
            deadline,
        )?;
        self.producer.commit(deadline)
    }

    /// Queues what is kept of tables.
    fn note(&self, notes: &[Note], deadline: Instant) -> Result<(), SinkError> {
        for note in notes {
            let key = schema_key(&self.checkpoint_key, note.oid);
            let value = note.kept.as_ref().map(serde_json::to_vec).transpose();
            let value = value.map_err(|error| SinkError::KafkaTransaction(error.to_string()))?;
            let mut record = BaseRecord::to(&self.schemas_topic).partition(0).key(key.as_bytes());
            if let Some(value) = &value {
                record = record.payload(&value[..]);
            }
            self.producer.send(record, deadline)?;
        }
        Ok(())
    }

    fn produce(&self, batch: &Batch, record: &Record, deadline: Instant) -> Result<(), SinkError> {
        let position = record.position.to_string();
        let commit_time = record.commit_time_micros.to_string();
        let part = record.part.to_string();
        let mut headers = OwnedHeaders::new_with_capacity(3)
            .insert(Header {
                key: POSITION_HEADER,
                value: Some(position.as_str()),
            })
            .insert(Header {
                key: COMMIT_TIME_HEADER,
                value: Some(commit_time.as_str()),
            });
        if record.part > 0 {
            headers = headers.insert(Header {
                key: PART_HEADER,
                value: Some(part.as_str()),
            });
        }
        for (key, value) in batch.headers(record) {
            headers = headers.insert(Header {
                key,
                value: Some(value),
            });
        }
        let mut base = BaseRecord::to(&record.destination.topic)
            .timestamp(record.timestamp_millis)
            .headers(headers);
        if let Some(value) = batch.value(record) {
            base = base.payload(value);
        }
        let base = match batch.key(record) {
            Some(key) => base.key(key),
            // A record without a key keeps its order only in a partition that is always the same.
            None => base.partition(0),
        };
        self.producer.send(base, deadline)
    }

    /// Publishes batches until there are no more, which is the end of the capture. Blocks.
    ///
    /// `redis` is how far Redis has come, if there is one. It is noted in the checkpoint; where it is required, PostgreSQL is
    /// acknowledged on the lesser of both, and otherwise on what Kafka has alone.
    ///
    /// # Errors
    /// When a transaction does not succeed, or may not have.
    pub fn publish(
        self,
        runtime: &Handle,
        mut checkpoint: Checkpoint,
        mut batches: mpsc::UnboundedReceiver<Queued>,
        mut redis: Option<watch::Receiver<RedisProgress>>,
        durable: &watch::Sender<Durable>,
        acknowledged: &watch::Sender<Checkpoint>,
    ) -> Result<(), SinkError> {
        let mut last_commit = Instant::now();
        let mut last_answer = last_commit;
        loop {
            let first = match runtime.block_on(timeout(TICK, batches.recv())) {
                Ok(Some(queued)) => Some(queued),
                Ok(None) => break,
                Err(_) => None,
            };
            let mut transaction = Transaction::default();
            let since = Instant::now();
            if let Some(first) = first {
                // Work gathers meanwhile, so this costs no throughput.
                thread::sleep(PAUSE_AFTER_COMMIT.saturating_sub(last_commit.elapsed()));
                transaction.take(&self, &checkpoint, &first.batch)?;
                drop(first);
                while transaction.bytes < TRANSACTION_BYTES {
                    let next = match batches.try_recv() {
                        // A timer would take a millisecond, however short it is.
                        Err(_) if transaction.is_late && since.elapsed() < LATE_WAIT => {
                            let wait = LATE_WAIT.saturating_sub(since.elapsed());
                            runtime.block_on(timeout(wait, batches.recv())).ok().flatten()
                        }
                        tried => tried.ok(),
                    };
                    let Some(next) = next else { break };
                    transaction.take(&self, &checkpoint, &next.batch)?;
                }
            }
            let mut state = *durable.borrow();
            transaction.advance(&mut state, &mut checkpoint);
            let mut safe = state.safe;
            if let Some(redis) = &redis {
                safe = self.note_redis(&mut checkpoint, redis.borrow().durable, safe);
            }
            // Who has taken Redis has fenced this producer before, and only a transaction finds that out.
            let is_taken = redis.as_ref().is_some_and(|redis| redis.borrow().is_taken());
            let says_more = safe > checkpoint.acknowledged || is_taken;
            let acknowledges = says_more && last_commit.elapsed() >= ACKNOWLEDGE_INTERVAL;
            if transaction.deadline.is_some() || acknowledges {
                checkpoint.acknowledged = checkpoint.acknowledged.max(safe);
                let committed = transaction
                    .begin(&self)
                    .and_then(|deadline| self.commit(&checkpoint, deadline));
                transaction.trace(&committed);
                committed?;
                last_commit = Instant::now();
                last_answer = last_commit;
                acknowledged.send_replace(checkpoint.clone());
            } else if last_answer.elapsed() >= IDLE_INTERVAL {
                self.require_answer()?;
                last_answer = Instant::now();
            }
            durable.send_replace(state);
        }
        self.close(runtime, checkpoint, redis.as_mut(), durable, acknowledged)
    }

    /// Without this a pipeline with nothing to publish would not notice that Kafka is down.
    fn require_answer(&self) -> Result<(), SinkError> {
        self.producer.require_answer(&self.checkpoint_topic, IDLE_DEADLINE)
    }

    /// The last acknowledgement, so that a restart has nothing to read again.
    fn close(
        &self,
        runtime: &Handle,
        mut checkpoint: Checkpoint,
        redis: Option<&mut watch::Receiver<RedisProgress>>,
        durable: &watch::Sender<Durable>,
        acknowledged: &watch::Sender<Checkpoint>,
    ) -> Result<(), SinkError> {
        let mut safe = durable.borrow().safe;
        if let Some(redis) = redis {
            if self.redis_required {
                // An error of this means that Redis has taken all it will, which is just as well.
                let caught_up =
                    redis.wait_for(|redis| redis.durable.safe >= safe || redis.state != RedisState::Attached);
                let _ = runtime.block_on(timeout(CLOSING_DEADLINE, caught_up));
            }
            safe = self.note_redis(&mut checkpoint, redis.borrow().durable, safe);
        }
        if safe > checkpoint.acknowledged {
            checkpoint.acknowledged = safe;
            self.commit_checkpoint(&checkpoint)?;
            acknowledged.send_replace(checkpoint);
        }
        Ok(())
    }
}

/// What the next transaction holds.
#[derive(Default)]
struct Transaction {
    /// When it has to be over, once it has begun.
    deadline: Option<Instant>,
    bytes: usize,
    events: u64,
    records: u64,
    batches: u64,
    first: Option<Position>,
    last: Option<Position>,
    complete: Option<Position>,
    safe: Lsn,
    high_time_micros: i64,
    is_late: bool,
    span: Option<Span>,
    snapshot: Option<SnapshotState>,
    ended_at: Option<Lsn>,
    oversized: Vec<Oversized>,
    mended: Vec<(u32, Position)>,
}

impl Transaction {
    /// Begins it, unless it has begun. Returns when it has to be over.
    fn begin(&mut self, sink: &KafkaSink) -> Result<Instant, SinkError> {
        match self.deadline {
            Some(deadline) => Ok(deadline),
            None => {
                let pipeline = &sink.checkpoint_key;
                self.span = Some(step!(
                    "transaction",
                    pipeline,
                    changes = Empty,
                    first = Empty,
                    last = Empty,
                    bytes = Empty
                ));
                Ok(*self.deadline.insert(sink.producer.begin()?))
            }
        }
    }

    /// Queues the records of a batch that Kafka does not have yet.
    fn take(&mut self, sink: &KafkaSink, checkpoint: &Checkpoint, batch: &Batch) -> Result<(), SinkError> {
        let queued = self.queue(sink, checkpoint, batch);
        if queued.is_err() {
            self.trace(&queued);
        }
        queued
    }

    fn queue(&mut self, sink: &KafkaSink, checkpoint: &Checkpoint, batch: &Batch) -> Result<(), SinkError> {
        for record in batch
            .records()
            .iter()
            .filter(|record| Some(record.position) > checkpoint.published)
        {
            sink.produce(batch, record, self.begin(sink)?)?;
            // A schema's change and the change that it comes before are one position, and one change.
            self.events += u64::from(record.part == 0);
            self.records += 1;
            self.first.get_or_insert(record.position);
            self.last = Some(record.position);
        }
        if !batch.schemas.is_empty() {
            sink.note(&batch.schemas, self.begin(sink)?)?;
        }
        if let Some(heartbeat) = &batch.heartbeat {
            let deadline = self.begin(sink)?;
            let record = BaseRecord::to(&heartbeat.topic)
                .partition(0)
                .timestamp(heartbeat.timestamp_millis)
                .key(&heartbeat.key[..])
                .payload(&heartbeat.value[..]);
            sink.producer.send(record, deadline)?;
        }
        // They are new: a snapshot's records are in one batch with its state, and only once in all.
        self.events = self.events.saturating_sub(batch.markers as u64);
        if batch.snapshot.is_some() {
            self.begin(sink)?;
            self.snapshot.clone_from(&batch.snapshot);
        }
        if batch.ended_at.is_some() {
            self.begin(sink)?;
            self.ended_at = batch.ended_at;
        }
        let is_new = |oversized: &&Oversized| Some(oversized.position) > checkpoint.published;
        self.oversized.extend(batch.oversized.iter().filter(is_new).cloned());
        self.mended.extend(&batch.mended);
        // Serves delivery reports, which would pile up otherwise.
        sink.producer.serve();
        self.bytes += batch.size();
        self.batches += 1;
        self.complete = batch.complete.max(self.complete);
        self.safe = self.safe.max(batch.safe);
        self.high_time_micros = self.high_time_micros.max(batch.high_time_micros);
        self.is_late = batch.is_late;
        Ok(())
    }

    /// What a trace shows of it, with the error that it ends with.
    fn trace(&self, result: &Result<(), SinkError>) {
        if let Some(span) = &self.span {
            span.record("changes", self.events).record("bytes", self.bytes);
            span.record("first", self.first.map(|first| display(first.commit_lsn)));
            span.record("last", self.last.map(|last| display(last.commit_lsn)));
            note(span, result);
        }
    }

    /// What is true once this is committed.
    fn advance(&self, durable: &mut Durable, checkpoint: &mut Checkpoint) {
        if let Some(snapshot) = &self.snapshot {
            checkpoint.snapshot.clone_from(snapshot);
        }
        checkpoint.ended_at = self.ended_at.or(checkpoint.ended_at);
        durable.position = self.last.max(durable.position);
        durable.safe = self.safe.max(durable.safe);
        durable.batches += self.batches;
        checkpoint.published = durable.position.max(checkpoint.published);
        checkpoint.complete = self.complete.max(checkpoint.complete);
        checkpoint.records_total += self.records;
        checkpoint.events_total += self.events;
        for oversized in &self.oversized {
            let record = OversizedRecord {
                table: oversized.table.clone(),
                topic: oversized.topic.clone(),
                position: oversized.position,
                bytes: oversized.bytes,
                limit: oversized.limit,
            };
            checkpoint.oversized.add(oversized.oid, record);
        }
        for (oid, before) in &self.mended {
            checkpoint.oversized.mended(*oid, *before);
        }
        checkpoint.high_time_micros = checkpoint.high_time_micros.max(self.high_time_micros);
    }
}

//! The durable log: records and checkpoint in one Kafka transaction.
//!
//! Everything here blocks and runs on a thread of its own. Invariants:
//! - nothing is in flight when a commit is called (a commit with deliveries in flight stalls for 100 ms), and no transaction is empty;
//! - after any error the producer is dropped and never used again: the next one fences it, and the checkpoint tells what became of
//!   its transaction;
//! - what PostgreSQL may be told is in a committed checkpoint first.

use std::{
    sync::{Arc, Mutex, PoisonError},
    thread,
    time::{Duration, Instant},
};

use meander_config::{Acknowledgement, CaptureConfig, Format};
use rdkafka::{
    ClientContext, Message as _,
    error::{KafkaError, RDKafkaErrorCode},
    message::{DeliveryResult, Header, OwnedHeaders},
    producer::{BaseProducer, BaseRecord, Producer as _, ProducerContext},
};
use tokio::{
    runtime::Handle,
    sync::{mpsc, watch},
    time::timeout,
};

use crate::{
    batch::{Batch, Record},
    kafka_client::{Hearing, probe, settings},
    log::{
        COMMIT_TIME_HEADER, Checkpoint, PART_HEADER, POSITION_HEADER, RedisPlace, SnapshotState, checkpoint_key,
        checkpoint_topic, schema_key, schemas_topic,
    },
    position::{Lsn, Position},
    schema::Note,
    sink::{
        Durable, SinkError,
        partition::ByRow,
        redis::feed::{Progress as RedisProgress, State as RedisState},
    },
};

/// How long signing on as the producer may take: the broker answers only when the transaction of the producer before is settled.
const INIT_DEADLINE: Duration = Duration::from_secs(30);
/// How long a record may take to be delivered.
const DELIVERY_DEADLINE: Duration = Duration::from_secs(30);
/// How long a transaction may take, from its begin to the answer to its commit.
const TRANSACTION_DEADLINE: Duration = Duration::from_secs(45);
/// The broker aborts a transaction that is open for longer, and then refuses its producer as it refuses one that another runtime has
/// fenced. So it is longer than [`TRANSACTION_DEADLINE`].
const TRANSACTION_TIMEOUT: Duration = Duration::from_secs(60);
/// A transaction that begins sooner after a commit is told CONCURRENT_TRANSACTIONS, and the client waits 20 ms: the coordinator is
/// still writing the markers of the one before.
const PAUSE_AFTER_COMMIT: Duration = Duration::from_millis(3);
/// A transaction is committed when it holds this much, or when nothing more is waiting.
const TRANSACTION_BYTES: usize = 8 * 1024 * 1024;
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

/// The first delivery that failed since the producer was made, and what else it has heard.
struct Deliveries {
    partitioner: ByRow,
    failed: Mutex<Option<(String, KafkaError)>>,
    hearing: Hearing,
}

impl ClientContext for Deliveries {
    fn error(&self, error: KafkaError, reason: &str) {
        self.hearing.error(error, reason);
    }
}

impl ProducerContext<ByRow> for Deliveries {
    type DeliveryOpaque = ();

    fn get_custom_partitioner(&self) -> Option<&ByRow> {
        Some(&self.partitioner)
    }

    fn delivery(&self, result: &DeliveryResult<'_>, (): ()) {
        if let Err((error, message)) = result {
            self.failed
                .lock()
                .unwrap_or_else(PoisonError::into_inner)
                .get_or_insert_with(|| (message.topic().to_owned(), error.clone()));
        }
    }
}

/// A producer that has fenced every one before it.
pub struct KafkaSink {
    producer: BaseProducer<Deliveries, ByRow>,
    servers: String,
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
    pub fn open(config: &CaptureConfig) -> Result<Self, SinkError> {
        let servers = config.kafka.bootstrap_servers.join(",");
        let (namespace, name) = (&config.pipeline.namespace, &config.pipeline.name);
        let checkpoint_key = checkpoint_key(namespace, name, &config.source.slot_name);
        let failed = |error: KafkaError| super::topics::unreachable(&servers, &error);
        let producer: BaseProducer<Deliveries, ByRow> = settings(&config.kafka.cluster())?
            .set("transactional.id", &checkpoint_key)
            .set("transaction.timeout.ms", TRANSACTION_TIMEOUT.as_millis().to_string())
            .set("message.timeout.ms", DELIVERY_DEADLINE.as_millis().to_string())
            .set("acks", "all")
            .set("enable.idempotence", "true")
            .set("compression.type", "lz4")
            .set("linger.ms", "0")
            // TRANSACTION_BYTES bounds what is queued. This would refuse one record that is larger, for ever.
            .set("queue.buffering.max.kbytes", "1048576")
            // The topic decides what is too large; this only lets it.
            .set("message.max.bytes", "100000000")
            .set("batch.size", "1000000")
            .set("socket.nagle.disable", "true")
            .create_with_context(Deliveries {
                partitioner: ByRow {
                    schemas: matches!(config.format, Format::DebeziumJson { schemas: true, .. }),
                },
                failed: Mutex::default(),
                hearing: Hearing::default(),
            })
            .map_err(failed)?;
        producer.init_transactions(INIT_DEADLINE).map_err(failed)?;
        Ok(Self {
            producer,
            servers,
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
        let deadline = self.begin()?;
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

    /// Begins a transaction. Returns when it has to be over.
    fn begin(&self) -> Result<Instant, SinkError> {
        // The broker's clock for it starts later, with the first record.
        let deadline = Instant::now() + TRANSACTION_DEADLINE;
        self.producer.begin_transaction().map_err(|error| self.failed(&error))?;
        Ok(deadline)
    }

    fn commit(&self, checkpoint: &Checkpoint, deadline: Instant) -> Result<(), SinkError> {
        let value = serde_json::to_vec(checkpoint).map_err(|error| SinkError::KafkaTransaction(error.to_string()))?;
        self.send(
            BaseRecord::to(&self.checkpoint_topic)
                .partition(0)
                .key(self.checkpoint_key.as_bytes())
                .payload(&value),
            deadline,
        )?;
        self.wait_for_deliveries(deadline)?;
        self.producer
            .commit_transaction(deadline.saturating_duration_since(Instant::now()))
            .map_err(|error| self.failed(&error))
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
            self.send(record, deadline)?;
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
        self.send(base, deadline)
    }

    /// Queues a record, and waits while the client's own queue is full.
    fn send(&self, mut record: BaseRecord<'_, [u8], [u8]>, deadline: Instant) -> Result<(), SinkError> {
        loop {
            match self.producer.send(record) {
                Ok(()) => return Ok(()),
                Err((KafkaError::MessageProduction(RDKafkaErrorCode::QueueFull), returned))
                    if Instant::now() < deadline =>
                {
                    record = returned;
                    self.producer.poll(Duration::from_millis(10));
                    self.check_deliveries()?;
                }
                Err((KafkaError::MessageProduction(RDKafkaErrorCode::MessageSizeTooLarge), returned)) => {
                    return Err(SinkError::RecordTooLarge {
                        topic: returned.topic.to_owned(),
                    });
                }
                Err((error, _)) => return Err(self.failed(&error)),
            }
        }
    }

    fn wait_for_deliveries(&self, deadline: Instant) -> Result<(), SinkError> {
        while self.producer.in_flight_count() > 0 {
            self.producer.poll(Duration::from_millis(10));
            self.check_deliveries()?;
            if Instant::now() > deadline {
                return Err(SinkError::KafkaUnreachable {
                    servers: self.servers.clone(),
                    cause: format!(
                        "records were not acknowledged within {} s",
                        TRANSACTION_DEADLINE.as_secs()
                    ),
                });
            }
        }
        self.check_deliveries()
    }

    fn check_deliveries(&self) -> Result<(), SinkError> {
        let failure = self
            .producer
            .context()
            .failed
            .lock()
            .unwrap_or_else(PoisonError::into_inner)
            .take();
        match failure {
            None => Ok(()),
            Some((topic, error)) => Err(match error.rdkafka_error_code() {
                Some(RDKafkaErrorCode::MessageSizeTooLarge) => SinkError::RecordTooLarge { topic },
                _ => self.failed(&error),
            }),
        }
    }

    fn failed(&self, error: &KafkaError) -> SinkError {
        match error.rdkafka_error_code() {
            Some(
                RDKafkaErrorCode::Fenced | RDKafkaErrorCode::ProducerFenced | RDKafkaErrorCode::InvalidProducerEpoch,
            ) => SinkError::Fenced(error.to_string()),
            Some(RDKafkaErrorCode::TransactionalIdAuthorizationFailed) => SinkError::KafkaForbidden {
                what: format!("use the transactional id {}", self.checkpoint_key),
                acl: format!(
                    "--operation Write --operation Describe --transactional-id {}",
                    self.checkpoint_key
                ),
            },
            Some(
                RDKafkaErrorCode::OperationTimedOut
                | RDKafkaErrorCode::MessageTimedOut
                | RDKafkaErrorCode::AllBrokersDown
                | RDKafkaErrorCode::BrokerTransportFailure,
            ) => super::topics::unreachable(&self.servers, error),
            _ => SinkError::KafkaTransaction(error.to_string()),
        }
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
        mut batches: mpsc::Receiver<Arc<Batch>>,
        mut redis: Option<watch::Receiver<RedisProgress>>,
        durable: &watch::Sender<Durable>,
        acknowledged: &watch::Sender<Checkpoint>,
    ) -> Result<(), SinkError> {
        let mut last_commit = Instant::now();
        let mut last_answer = last_commit;
        loop {
            let first = match runtime.block_on(timeout(TICK, batches.recv())) {
                Ok(Some(batch)) => Some(batch),
                Ok(None) => break,
                Err(_) => None,
            };
            let mut transaction = Transaction::default();
            if let Some(first) = first {
                // Work gathers meanwhile, so this costs no throughput.
                thread::sleep(PAUSE_AFTER_COMMIT.saturating_sub(last_commit.elapsed()));
                transaction.take(&self, &checkpoint, &first)?;
                while transaction.bytes < TRANSACTION_BYTES {
                    let Ok(next) = batches.try_recv() else { break };
                    transaction.take(&self, &checkpoint, &next)?;
                }
            }
            let mut state = *durable.borrow();
            transaction.advance(&mut state, &mut checkpoint);
            let mut safe = state.safe;
            if let Some(redis) = &redis {
                safe = self.note_redis(&mut checkpoint, redis.borrow().durable, safe);
            }
            let acknowledges = safe > checkpoint.acknowledged && last_commit.elapsed() >= ACKNOWLEDGE_INTERVAL;
            if transaction.deadline.is_some() || acknowledges {
                let deadline = transaction.deadline.map_or_else(|| self.begin(), Ok)?;
                checkpoint.acknowledged = checkpoint.acknowledged.max(safe);
                self.commit(&checkpoint, deadline)?;
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
        let hearing = &self.producer.context().hearing;
        let serve = |limit: Duration| self.producer.poll(limit);
        probe(
            self.producer.client(),
            hearing,
            serve,
            &self.checkpoint_topic,
            IDLE_DEADLINE,
        )
        .map_err(|refusal| SinkError::refused(&self.servers, refusal))
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
    last: Option<Position>,
    complete: Option<Position>,
    safe: Lsn,
    high_time_micros: i64,
    snapshot: Option<SnapshotState>,
}

impl Transaction {
    /// Begins it, unless it has begun. Returns when it has to be over.
    fn begin(&mut self, sink: &KafkaSink) -> Result<Instant, SinkError> {
        match self.deadline {
            Some(deadline) => Ok(deadline),
            None => Ok(*self.deadline.insert(sink.begin()?)),
        }
    }

    /// Queues the records of a batch that Kafka does not have yet.
    fn take(&mut self, sink: &KafkaSink, checkpoint: &Checkpoint, batch: &Batch) -> Result<(), SinkError> {
        for record in batch
            .records()
            .iter()
            .filter(|record| Some(record.position) > checkpoint.published)
        {
            sink.produce(batch, record, self.begin(sink)?)?;
            // A schema's change and the change that it comes before are one position, and one change.
            self.events += u64::from(record.part == 0);
            self.records += 1;
            self.last = Some(record.position);
        }
        if !batch.schemas.is_empty() {
            sink.note(&batch.schemas, self.begin(sink)?)?;
        }
        if let Some(heartbeat) = &batch.heartbeat {
            let deadline = self.deadline.map_or_else(|| sink.begin(), Ok)?;
            self.deadline = Some(deadline);
            let record = BaseRecord::to(&heartbeat.topic)
                .partition(0)
                .timestamp(heartbeat.timestamp_millis)
                .key(&heartbeat.key[..])
                .payload(&heartbeat.value[..]);
            sink.send(record, deadline)?;
        }
        // They are new: a snapshot's records are in one batch with its state, and only once in all.
        self.events = self.events.saturating_sub(batch.markers as u64);
        if batch.snapshot.is_some() {
            self.begin(sink)?;
            self.snapshot.clone_from(&batch.snapshot);
        }
        // Serves delivery reports, which would pile up otherwise.
        sink.producer.poll(Duration::ZERO);
        self.bytes += batch.size();
        self.batches += 1;
        self.complete = batch.complete.max(self.complete);
        self.safe = self.safe.max(batch.safe);
        self.high_time_micros = self.high_time_micros.max(batch.high_time_micros);
        Ok(())
    }

    /// What is true once this is committed.
    fn advance(&self, durable: &mut Durable, checkpoint: &mut Checkpoint) {
        if let Some(snapshot) = &self.snapshot {
            checkpoint.snapshot.clone_from(snapshot);
        }
        durable.position = self.last.max(durable.position);
        durable.safe = self.safe.max(durable.safe);
        durable.batches += self.batches;
        checkpoint.published = durable.position.max(checkpoint.published);
        checkpoint.complete = self.complete.max(checkpoint.complete);
        checkpoint.records_total += self.records;
        checkpoint.events_total += self.events;
        checkpoint.high_time_micros = checkpoint.high_time_micros.max(self.high_time_micros);
    }
}

//! A producer of Kafka transactions.
//!
//! Everything here blocks. Invariants:
//! - nothing is in flight when a commit is called: a commit with deliveries in flight stalls for 100 ms;
//! - after any error the producer is dropped and never used again: the next one fences it, and what was written in the same transaction as
//!   the records tells what became of them.

use std::{
    sync::{Mutex, PoisonError},
    thread,
    time::{Duration, Instant},
};

use meander_config::KafkaCluster;
use rdkafka::{
    ClientContext, Message as _,
    error::{KafkaError, RDKafkaErrorCode},
    message::DeliveryResult,
    producer::{BaseProducer, BaseRecord, Producer as _, ProducerContext},
};

use crate::{
    kafka_client::{EndedAside, Hearing, probe, settings},
    sink::{SinkError, partition::ByRow, topics::unreachable},
    size_limit::MOST_BYTES,
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
pub const PAUSE_AFTER_COMMIT: Duration = Duration::from_millis(3);
/// Records that are on their way to the brokers at a time. Each takes half a kilobyte beside its content.
const UNDER_WAY: usize = 8000;
/// Requests that a broker has of us at a time. With more, a request that it refuses for now, as one for a partition that it is only just told to
/// lead, can be overtaken by the next one of that partition; where it knows nothing of this producer yet it takes that for the first, and
/// the one that comes again for one that it has already, which it says is delivered (seen with Kafka 4.3.1). A broker works on one request of a connection at a time
/// in any case, but the ways there and back no longer overlap: a request is for one partition, so the partitions of a transaction cost a round trip each.
const REQUESTS: &str = "1";
/// Bytes of a request, before they are compressed. A broker with the heap of Kafka's own script, 1 GiB, keeps what is larger than half a MiB in a
/// place of its own, which costs it much; compressed, this is less.
const REQUEST_BYTES: &str = "700000";
/// When delivery reports are first looked for: adding partitions to the transaction and then the records are two answers of the broker, so hardly
/// any comes sooner.
const FIRST_REPORT: Duration = Duration::from_millis(2);
/// How often they are looked for from then on. The client's own wait would take its whole time, whatever comes meanwhile, and keep a
/// processor busy in its last millisecond.
const REPORT_INTERVAL: Duration = Duration::from_micros(500);

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

/// A producer that has fenced every one of its transactional id before it.
pub struct TransactionalProducer {
    producer: EndedAside<BaseProducer<Deliveries, ByRow>>,
    servers: String,
    id: String,
}

impl TransactionalProducer {
    /// Signs on. From here on no producer of this id that was made earlier can commit anything.
    ///
    /// # Errors
    /// When Kafka does not answer in time.
    pub fn open(cluster: &KafkaCluster, id: &str, partitioner: ByRow) -> Result<Self, SinkError> {
        let servers = cluster.bootstrap_servers.join(",");
        let failed = |error: KafkaError| unreachable(&servers, &error);
        let producer: BaseProducer<Deliveries, ByRow> = settings(cluster)?
            .set("transactional.id", id)
            .set("transaction.timeout.ms", TRANSACTION_TIMEOUT.as_millis().to_string())
            .set("message.timeout.ms", DELIVERY_DEADLINE.as_millis().to_string())
            .set("acks", "all")
            .set("enable.idempotence", "true")
            .set("max.in.flight.requests.per.connection", REQUESTS)
            .set("compression.type", "lz4")
            .set("linger.ms", "0")
            // A transaction that is committed says it of all its records; so they take no memory until somebody looks.
            .set("delivery.report.only.error", "true")
            .set("queue.buffering.max.messages", UNDER_WAY.to_string())
            // Whoever writes bounds what is queued in bytes. This would refuse one record that is larger, for ever.
            .set("queue.buffering.max.kbytes", "1048576")
            // The topic decides what is too large; this only lets it.
            .set("message.max.bytes", MOST_BYTES.to_string())
            .set("batch.size", REQUEST_BYTES)
            .set("socket.nagle.disable", "true")
            .create_with_context(Deliveries {
                partitioner,
                failed: Mutex::default(),
                hearing: Hearing::default(),
            })
            .map_err(failed)?;
        producer.init_transactions(INIT_DEADLINE).map_err(failed)?;
        Ok(Self {
            // It is fenced by its successor, whichever of them lives longer.
            producer: EndedAside::new(producer),
            servers,
            id: id.to_owned(),
        })
    }

    /// Begins a transaction. Returns when it has to be over.
    ///
    /// # Errors
    /// When the producer cannot be used any more.
    pub fn begin(&self) -> Result<Instant, SinkError> {
        // The broker's clock for it starts later, with the first record.
        let deadline = Instant::now() + TRANSACTION_DEADLINE;
        self.producer.begin_transaction().map_err(|error| self.failed(&error))?;
        Ok(deadline)
    }

    /// Commits the transaction, which must not be empty.
    ///
    /// # Errors
    /// When it does not succeed, or may not have.
    pub fn commit(&self, deadline: Instant) -> Result<(), SinkError> {
        self.wait_for_deliveries(deadline)?;
        self.producer
            .commit_transaction(deadline.saturating_duration_since(Instant::now()))
            .map_err(|error| self.failed(&error))
    }

    /// Has these partitions abort what they hold of this producer that is not settled: by a transaction that has a record in each, which nobody
    /// sees, and is aborted.
    ///
    /// # Errors
    /// When it does not succeed, or may not have.
    pub fn abort_in<'a>(&self, partitions: impl IntoIterator<Item = (&'a str, i32)>) -> Result<(), SinkError> {
        let deadline = self.begin()?;
        for (topic, partition) in partitions {
            // A topic that is compacted takes no record without a key.
            let record = BaseRecord::to(topic).partition(partition).key(&b"aborted"[..]);
            self.send(record.payload(&[]), deadline)?;
        }
        self.wait_for_deliveries(deadline)?;
        self.producer
            .abort_transaction(deadline.saturating_duration_since(Instant::now()))
            .map_err(|error| self.failed(&error))
    }

    /// Serves delivery reports, which would pile up otherwise.
    pub fn serve(&self) {
        self.producer.poll(Duration::ZERO);
    }

    /// Finds out whether the brokers are still there, by asking for a topic.
    ///
    /// # Errors
    /// When they refuse, or none answers in time.
    pub fn require_answer(&self, topic: &str, limit: Duration) -> Result<(), SinkError> {
        let hearing = &self.producer.context().hearing;
        let serve = |limit: Duration| {
            self.producer.poll(limit);
        };
        probe(self.producer.client(), hearing, serve, topic, limit)
            .map_err(|refusal| SinkError::refused(&self.servers, refusal))
    }

    /// Queues a record, and waits while the client's own queue is full.
    ///
    /// # Errors
    /// When it is too large, or a delivery before it failed.
    pub fn send(&self, mut record: BaseRecord<'_, [u8], [u8]>, deadline: Instant) -> Result<(), SinkError> {
        loop {
            match self.producer.send(record) {
                Ok(()) => return Ok(()),
                Err((KafkaError::MessageProduction(RDKafkaErrorCode::QueueFull), returned))
                    if Instant::now() < deadline =>
                {
                    record = returned;
                    thread::sleep(REPORT_INTERVAL);
                    self.serve();
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
        let mut known = i32::MAX;
        let mut pause = FIRST_REPORT;
        loop {
            self.serve();
            self.check_deliveries()?;
            let in_flight = self.producer.in_flight_count();
            if in_flight == 0 {
                return Ok(());
            }
            if in_flight < known {
                // There may be more reports.
                known = in_flight;
                continue;
            }
            if Instant::now() > deadline {
                return Err(SinkError::KafkaUnreachable {
                    servers: self.servers.clone(),
                    cause: format!(
                        "records were not acknowledged within {} s",
                        TRANSACTION_DEADLINE.as_secs()
                    ),
                });
            }
            thread::sleep(pause);
            pause = REPORT_INTERVAL;
        }
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
        // What ended the client for good, whatever it says of the records that it dropped for that.
        if let Some((RDKafkaErrorCode::Fenced, cause)) = self.producer.client().fatal_error() {
            return SinkError::Fenced(cause);
        }
        match error.rdkafka_error_code() {
            Some(
                RDKafkaErrorCode::Fenced | RDKafkaErrorCode::ProducerFenced | RDKafkaErrorCode::InvalidProducerEpoch,
            ) => SinkError::Fenced(error.to_string()),
            Some(RDKafkaErrorCode::TransactionalIdAuthorizationFailed) => SinkError::KafkaForbidden {
                what: format!("use the transactional id {}", self.id),
                acl: format!("--operation Write --operation Describe --transactional-id {}", self.id),
            },
            Some(
                RDKafkaErrorCode::OperationTimedOut
                | RDKafkaErrorCode::MessageTimedOut
                | RDKafkaErrorCode::AllBrokersDown
                | RDKafkaErrorCode::BrokerTransportFailure,
            ) => unreachable(&self.servers, error),
            _ => SinkError::KafkaTransaction(error.to_string()),
        }
    }
}

#[cfg(test)]
mod tests {
    use rdkafka::{
        ClientConfig, Offset, TopicPartitionList,
        consumer::{BaseConsumer, Consumer as _},
        mocking::MockCluster,
        types::{RDKafkaApiKey, RDKafkaRespErr},
    };

    use super::*;

    const LIMIT: Duration = Duration::from_secs(120);
    const COUNT: u8 = 6;

    #[test]
    fn a_request_that_is_refused_for_now_is_not_overtaken_by_the_next_one() {
        let mock = MockCluster::new(1).unwrap();
        mock.create_topic("t", 1, 1).unwrap();
        // So that one request is under way when the next one could follow.
        mock.broker_round_trip_time(1, Duration::from_millis(100)).unwrap();
        let cluster = KafkaCluster {
            bootstrap_servers: vec![mock.bootstrap_servers()],
            tls: None,
            sasl: None,
        };
        let by_row = ByRow {
            schemas: false,
            partitions: 1,
            remarks: Default::default(),
        };
        let producer = TransactionalProducer::open(&cluster, "id", by_row).unwrap();
        let refusal = RDKafkaRespErr::RD_KAFKA_RESP_ERR_UNKNOWN_TOPIC_OR_PART;
        mock.request_errors(RDKafkaApiKey::Produce, &[refusal]);
        let deadline = producer.begin().unwrap();
        for number in 0..COUNT {
            // No two fit into one request.
            let value = vec![number; 600_000];
            let record = BaseRecord::to("t").partition(0).key(&b"key"[..]);
            producer.send(record.payload(&value[..]), deadline).unwrap();
        }
        producer.commit(deadline).unwrap();

        let consumer: BaseConsumer = ClientConfig::new()
            .set("bootstrap.servers", mock.bootstrap_servers())
            .set("group.id", "test")
            .create()
            .unwrap();
        let mut from = TopicPartitionList::new();
        from.add_partition_offset("t", 0, Offset::Beginning).unwrap();
        consumer.assign(&from).unwrap();
        let values: Vec<u8> = (0..COUNT)
            .map(|_| consumer.poll(LIMIT).unwrap().unwrap().payload().unwrap()[0])
            .collect();
        assert_eq!(values, (0..COUNT).collect::<Vec<_>>());
    }
}

//! Keeps what the endpoint does not take: records that it refuses for what they are, and not for the state that it is in.
//!
//! They go into a topic in the log's cluster, as they are, and the replay goes on behind them.

use std::time::Duration;

use meander_config::{KafkaLog, KafkaSink, ResourceIdentity, TopicManagement};
use rdkafka::{
    message::Header,
    producer::{FutureProducer, FutureRecord},
    util::Timeout,
};

use super::super::{TargetError, marks};
use crate::{
    kafka_client::{ClientError, settings},
    log::dead_letters_topic,
    replay::record::Record,
    sink::{
        SinkError,
        topics::{Topics, unreachable},
    },
};

/// How many a process keeps: an endpoint that refuses more than this refuses the replay.
const MOST: usize = 1000;
const DEADLINE: Duration = Duration::from_secs(30);
/// Header of a dead letter: what the endpoint said of it.
const REFUSAL_HEADER: &str = "meander-replay-refusal";

/// Where dead letters go. Nothing is made before the first.
pub(super) struct DeadLetters {
    kafka: KafkaLog,
    topic: String,
    job: String,
    open: Option<FutureProducer>,
    kept: usize,
}

impl DeadLetters {
    /// Those of a job. `id` names it in the marks.
    pub(super) fn new(kafka: KafkaLog, job: &ResourceIdentity, id: String) -> Self {
        Self {
            kafka,
            topic: dead_letters_topic(&job.namespace, &job.name),
            job: id,
            open: None,
            kept: 0,
        }
    }

    /// Keeps a record, and what the endpoint said of it.
    ///
    /// # Errors
    /// When Kafka does not take it, or there are too many.
    pub(super) async fn keep(&mut self, record: &Record, url: &str, refusal: &str) -> Result<(), TargetError> {
        self.kept += 1;
        if self.kept > MOST {
            return Err(TargetError::TooManyDeadLetters {
                endpoint: url.to_owned(),
                kept: MOST,
                topic: self.topic.clone(),
                refusal: refusal.to_owned(),
            });
        }
        let (topic, offset, dead_letters) = (&record.topic, record.offset, &self.topic);
        tracing::warn!(%topic, partition = record.partition, offset, refusal, dead_letters, "the endpoint does not take a record");
        let headers = marks::headers(record, &self.job, None).insert(Header {
            key: REFUSAL_HEADER,
            value: Some(refusal),
        });
        let mut letter = FutureRecord::to(&self.topic)
            .partition(0)
            .timestamp(record.timestamp)
            .headers(headers);
        if !record.key.is_empty() {
            letter = letter.key(&record.key[..]);
        }
        if !record.value.is_empty() {
            letter = letter.payload(&record.value[..]);
        }
        let producer = match self.open.take() {
            Some(producer) => producer,
            None => self.open().await?,
        };
        let sent = producer.send(letter, Timeout::After(DEADLINE)).await;
        self.open = Some(producer);
        sent.map(drop)
            .map_err(|(error, _)| unreachable(&self.kafka.bootstrap_servers.join(","), &error).into())
    }

    async fn open(&self) -> Result<FutureProducer, TargetError> {
        let log = self.kafka.clone();
        let mut topics = Topics::new(&KafkaSink {
            bootstrap_servers: log.bootstrap_servers,
            tls: log.tls,
            sasl: log.sasl,
            topic_prefix: String::new(),
            partitions: 1,
            replication_factor: None,
            // They keep the timestamps of the changes, by which Kafka counts.
            topic_config: [("retention.ms".to_owned(), "-1".to_owned())].into(),
            topic_management: TopicManagement::Managed,
        })?;
        topics.ensure_data(&self.topic, &self.topic).await?;
        let producer = settings(&self.kafka.cluster())
            .map_err(SinkError::from)?
            .set("acks", "all")
            .set("enable.idempotence", "true")
            .set("message.timeout.ms", DEADLINE.as_millis().to_string())
            .set("message.max.bytes", "100000000")
            .create()
            .map_err(ClientError::from)
            .map_err(SinkError::from)?;
        Ok(producer)
    }
}

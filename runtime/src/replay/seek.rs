//! Finds places in partitions by what their records say.
//!
//! Kafka finds places by time, and not exactly. But positions and timestamps never fall along a partition, so bisection finds theirs with a few
//! reads. Each is mostly waiting: so they are made for all partitions side by side.

use std::{
    ops::Range,
    sync::Arc,
    time::{Duration, Instant},
};

use bytes::BytesMut;
use meander_config::KafkaLog;
use rdkafka::{
    Offset, TopicPartitionList,
    consumer::{BaseConsumer, Consumer as _, base_consumer::PartitionQueue},
    error::KafkaError,
    message::Message,
    types::RDKafkaErrorCode,
};
use tokio_util::sync::CancellationToken;

use super::{
    error::{ReplayError, is_fatal, no_client},
    record::Record,
};
use crate::{
    checkpoint::{Tail, client_config},
    kafka_client::Hearing,
};

/// How long Kafka may take to show the next record of each partition.
const TIMEOUT: Duration = Duration::from_secs(30);
/// Memory for what comes with the first record of a partition.
const PARTITION_BYTES: usize = 16 << 10;
/// How long one partition is waited for before it is looked whether the client has something to say.
const POLL: Duration = Duration::from_millis(100);

/// A stretch of a partition that ends at or before its last stable offset.
#[derive(Clone, Debug)]
pub struct Part {
    /// The topic.
    pub topic: Arc<str>,
    /// The partition.
    pub partition: i32,
    /// The offsets.
    pub offsets: Range<i64>,
}

impl Part {
    /// The first record that can be read.
    ///
    /// # Errors
    /// When Kafka does not answer, or the record is not a pipeline's.
    pub fn first(&self, tail: &Tail) -> Result<Option<Record>, ReplayError> {
        let found = tail.first_in(&self.topic, self.partition, self.offsets.clone());
        let found = found.map_err(ReplayError::TailUnreadable)?;
        found.map(|found| self.record(&found)).transpose()
    }

    /// The last record that can be read.
    ///
    /// # Errors
    /// When Kafka does not answer, or the record is not a pipeline's.
    pub fn last(&self, tail: &Tail) -> Result<Option<Record>, ReplayError> {
        let found = tail.find_last_in(&self.topic, self.partition, self.offsets.clone(), |_| true);
        let found = found.map_err(ReplayError::TailUnreadable)?;
        found.map(|found| self.record(&found)).transpose()
    }

    fn record(&self, message: &impl Message) -> Result<Record, ReplayError> {
        Record::read(&self.topic, message, &mut BytesMut::new()).map_err(|source| ReplayError::ForeignRecord {
            topic: self.topic.to_string(),
            partition: self.partition,
            offset: message.offset(),
            source,
        })
    }
}

/// Where a partition is parted.
#[derive(Clone, Debug)]
pub struct Parting {
    /// No record at or after this offset is before the parting, and all that are before it are at smaller ones.
    pub offset: i64,
    /// Timestamp of the last record before it that was read on the way: the last that there is, unless the part began after it.
    pub last: Option<i64>,
}

/// Reads the first records of many partitions at once.
pub struct Probe(Arc<BaseConsumer<Hearing>>);

impl Probe {
    /// Connects when it is first used.
    ///
    /// # Errors
    /// When the client cannot be made from its settings.
    pub fn new(kafka: &KafkaLog) -> Result<Self, ReplayError> {
        client_config(&kafka.cluster(), "meander-replay")
            .map_err(no_client)?
            .set("queued.max.messages.kbytes", (PARTITION_BYTES / 1024).to_string())
            // One that is larger comes all the same.
            .set("fetch.message.max.bytes", PARTITION_BYTES.to_string())
            .set("fetch.queue.backoff.ms", "2")
            .create_with_context(Hearing::default())
            .map(|consumer| Self(Arc::new(consumer)))
            .map_err(unreachable)
    }

    /// Of each part the first record that can be read. Blocks; ends early when `stop` is cancelled.
    ///
    /// # Errors
    /// When Kafka does not answer, or a record is not a pipeline's.
    pub fn first(&self, parts: &[Part], stop: &CancellationToken) -> Result<Vec<Option<Record>>, ReplayError> {
        let deadline = Instant::now() + TIMEOUT;
        let filled = || parts.iter().filter(|part| !part.offsets.is_empty());
        let mut assignment = TopicPartitionList::new();
        let mut queues = Vec::new();
        for Part {
            topic,
            partition,
            offsets,
        } in filled()
        {
            assignment
                .add_partition_offset(topic, *partition, Offset::Offset(offsets.start))
                .map_err(unreachable)?;
            // As in the reader, before the assignment.
            let queue = (self.0.split_partition_queue(topic, *partition))
                .ok_or_else(|| unreachable(KafkaError::Subscription(topic.to_string())))?;
            queues.push(queue);
        }
        self.0.assign(&assignment).map_err(unreachable)?;
        let mut queues = queues.iter();
        (parts.iter())
            .map(|part| match part.offsets.is_empty() {
                true => Ok(None),
                // All are fetched at the same time, whichever is waited for.
                false => queues
                    .next()
                    .map_or(Ok(None), |queue| self.first_of(part, queue, deadline, stop)),
            })
            .collect()
    }

    fn first_of(
        &self,
        part: &Part,
        queue: &PartitionQueue<Hearing>,
        deadline: Instant,
        stop: &CancellationToken,
    ) -> Result<Option<Record>, ReplayError> {
        let mut failure = KafkaError::MessageConsumption(RDKafkaErrorCode::OperationTimedOut);
        loop {
            if stop.is_cancelled() {
                return Err(ReplayError::Interrupted);
            }
            match queue.poll(POLL) {
                Some(Ok(message)) if message.offset() >= part.offsets.end => return Ok(None),
                // What was asked for before.
                Some(Ok(message)) if message.offset() < part.offsets.start => {}
                Some(Ok(message)) => return part.record(&message).map(Some),
                // It is sent at the last stable offset, which never falls, and the part ends at or before it.
                Some(Err(KafkaError::PartitionEOF(_))) => return Ok(None),
                // Also where the start was deleted since it was looked up: the next attempt looks it up anew, so the range is not lost by that.
                Some(Err(error)) if is_fatal(&error) => return Err(unreachable(error)),
                Some(Err(error)) => failure = error,
                None => {
                    if let Some(Err(error)) = self.0.poll(Duration::ZERO) {
                        failure = error;
                    }
                }
            }
            if Instant::now() >= deadline {
                return Err(unreachable(failure));
            }
        }
    }

    /// Where records cease to be `before`: in each part, all that are come first. With `near`, the first record of a part is looked at first. Blocks;
    /// ends early when `stop` is cancelled.
    ///
    /// # Errors
    /// When Kafka does not answer, or a record is not a pipeline's.
    pub fn part(
        &self,
        mut parts: Vec<Part>,
        mut near: bool,
        before: impl Fn(&Record) -> bool,
        stop: &CancellationToken,
    ) -> Result<Vec<Parting>, ReplayError> {
        let mut timestamps = vec![None; parts.len()];
        while parts.iter().any(|part| !part.offsets.is_empty()) {
            let middle = |Part { offsets, .. }: &Part| offsets.start + (offsets.end - offsets.start) / 2;
            let probed: Vec<_> = (parts.iter())
                .map(|part| Part {
                    offsets: if near { part.offsets.start } else { middle(part) }..part.offsets.end,
                    ..part.clone()
                })
                .collect();
            near = false;
            let found = probed.iter().zip(self.first(&probed, stop)?);
            for ((part, timestamp), (probed, first)) in parts.iter_mut().zip(&mut timestamps).zip(found) {
                match first.filter(&before) {
                    Some(record) => {
                        part.offsets.start = record.offset + 1;
                        *timestamp = Some(record.timestamp);
                    }
                    None => part.offsets.end = probed.offsets.start,
                }
            }
        }
        let partings = parts.iter().zip(timestamps).map(|(part, last)| Parting {
            offset: part.offsets.end,
            last,
        });
        Ok(partings.collect())
    }
}

fn unreachable(source: KafkaError) -> ReplayError {
    ReplayError::KafkaUnreachable {
        doing: "looking for the ends of the range",
        source,
    }
}

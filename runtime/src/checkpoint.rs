//! Reads the end of the log: a pipeline's checkpoint, and the last record of any partition.
//!
//! Everything here blocks, each call no longer than the reader's timeout: call it on a thread of its own
//! (`tokio::task::spawn_blocking`).

use std::{
    collections::{BTreeMap, HashMap},
    ops::{ControlFlow, Range},
    sync::Arc,
    time::{Duration, Instant},
};

use meander_config::KafkaCluster;
use rdkafka::{
    ClientConfig, Message as _, Offset, TopicPartitionList,
    consumer::{BaseConsumer, Consumer as _},
    error::KafkaError,
    message::{BorrowedMessage, OwnedMessage},
    types::RDKafkaErrorCode,
};

use crate::{
    kafka_client::{ClientError, EndedAside, Hearing, settings},
    log::Checkpoint,
    schema::Kept,
};

/// How many offsets the first look back from the end takes in, and how much further each next one goes.
const FIRST_STEP: i64 = 16;
const STEP_GROWTH: i64 = 8;
/// Partitions whose ends are fetched at the same time. Each can bring a batch of a megabyte.
const FETCHED_TOGETHER: usize = 32;
/// How long a broker may hold back its answer that nothing more has come. Every other request of the same client waits for that answer.
const FETCH_WAIT_MILLIS: &str = "2";
/// Pause between two tries of a request that a broker could not answer.
const RETRY_PAUSE: Duration = Duration::from_millis(100);

/// The end of the log cannot be read.
#[derive(Debug, thiserror::Error)]
pub enum TailError {
    /// The topic or the partition does not exist.
    #[error("the topic {topic} does not have a partition {partition}")]
    NoSuchPartition {
        /// The topic.
        topic: String,
        /// The partition.
        partition: i32,
    },
    /// This client may not read the topic. To Kafka's other clients that looks as if it did not exist, which would be a pipeline's
    /// beginning: so it is told apart.
    #[error(
        "Kafka does not allow this pipeline to read topic {topic:?}; run kafka-acls.sh --add --allow-principal User:… --operation Read --topic {topic}"
    )]
    Forbidden {
        /// The topic.
        topic: String,
    },
    /// Kafka did not answer in time, or answered with an error until the time was over.
    #[error("cannot read the end of partition {partition} of the topic {topic} within {timeout:?}: {source}")]
    Unreadable {
        /// The topic.
        topic: String,
        /// The partition.
        partition: i32,
        /// How long it was tried.
        timeout: Duration,
        /// The last answer.
        source: Box<KafkaError>,
    },
    /// The client cannot be made from its settings.
    #[error("cannot set up a Kafka client: {0}")]
    Client(#[source] Box<ClientError>),
    /// The record is there and is no checkpoint.
    #[error("the checkpoint at offset {offset} of the topic {topic} is not readable: {source}")]
    NotACheckpoint {
        /// The topic.
        topic: String,
        /// Where the record is.
        offset: i64,
        /// What is wrong with it.
        source: serde_json::Error,
    },
    /// The record is there and is not what is kept of a table.
    #[error("a record of the topic {topic} says nothing of a table's schema: {source}")]
    NotASchema {
        /// The topic.
        topic: String,
        /// What is wrong with it.
        source: serde_json::Error,
    },
}

/// The settings that every reader of the log shares: committed records only, partitions assigned by hand, nothing committed to
/// the group, and never a silent jump to another offset.
pub(crate) fn client_config(cluster: &KafkaCluster, group: &str) -> Result<ClientConfig, ClientError> {
    let mut config = settings(cluster)?;
    config
        .set("group.id", group)
        .set("isolation.level", "read_committed")
        .set("enable.auto.commit", "false")
        .set("enable.auto.offset.store", "false")
        .set("auto.offset.reset", "error")
        .set("enable.partition.eof", "true")
        .set("allow.auto.create.topics", "false")
        // A request for partitions that are at their end comes back after this time, and holds up the others meanwhile.
        .set("fetch.wait.max.ms", "50");
    Ok(config)
}

/// Reads partitions from their end.
pub struct Tail {
    consumer: EndedAside<Arc<BaseConsumer<Hearing>>>,
    timeout: Duration,
    /// A topic that is not known yet is waited for.
    waits: bool,
}

impl Tail {
    /// A reader whose calls each take at most `timeout`. Connects when it is first used.
    ///
    /// # Errors
    /// When the client cannot be made from its settings.
    pub fn new(cluster: &KafkaCluster, timeout: Duration) -> Result<Self, TailError> {
        Self::of("read_committed", cluster, timeout)
    }

    /// A reader that sees what is not committed as well, and what was aborted.
    ///
    /// # Errors
    /// When the client cannot be made from its settings.
    pub fn of_everything(cluster: &KafkaCluster, timeout: Duration) -> Result<Self, TailError> {
        Self::of("read_uncommitted", cluster, timeout)
    }

    fn of(isolation: &str, cluster: &KafkaCluster, timeout: Duration) -> Result<Self, TailError> {
        let consumer = client_config(cluster, "meander-tail")
            .and_then(|mut config| {
                config.set("isolation.level", isolation);
                config.set("fetch.wait.max.ms", FETCH_WAIT_MILLIS);
                Ok(config.create_with_context(Hearing::default())?)
            })
            .map_err(|error| TailError::Client(Box::new(error)))?;
        Ok(Self {
            consumer: EndedAside::new(Arc::new(consumer)),
            timeout,
            waits: false,
        })
    }

    /// For topics that are known to exist: a broker may not have heard yet of one that was just made.
    #[must_use]
    pub fn waiting(self) -> Self {
        Self { waits: true, ..self }
    }

    /// The partitions of a topic; none if it does not exist.
    ///
    /// # Errors
    /// When Kafka does not answer in time.
    pub fn partitions(&self, topic: &str) -> Result<Vec<i32>, TailError> {
        let deadline = Instant::now() + self.timeout;
        self.known_partitions(topic, 0, deadline)
    }

    /// The partitions of a topic; none if it does not exist. `partition` is for the error.
    fn known_partitions(&self, topic: &str, partition: i32, deadline: Instant) -> Result<Vec<i32>, TailError> {
        let metadata = retry_until(deadline, |left| self.consumer.fetch_metadata(Some(topic), left))
            .map_err(|source| self.unreadable(topic, partition, source))?;
        let Some(known) = metadata.topics().iter().find(|known| known.name() == topic) else {
            return Ok(Vec::new());
        };
        if known.error().map(RDKafkaErrorCode::from) == Some(RDKafkaErrorCode::TopicAuthorizationFailed) {
            return Err(TailError::Forbidden {
                topic: topic.to_owned(),
            });
        }
        Ok(known.partitions().iter().map(|partition| partition.id()).collect())
    }

    /// The keys of a partition's committed records, each once, in the order in which they came first; without those that a tombstone
    /// withdrew. For small topics: all of it is read.
    ///
    /// # Errors
    /// When the partition does not exist or cannot be read in time.
    pub fn keys(&self, topic: &str, partition: i32) -> Result<Vec<Vec<u8>>, TailError> {
        let deadline = Instant::now() + self.timeout;
        let (low, end) = self.watermarks(topic, partition, deadline)?;
        let mut keys = Vec::<Vec<u8>>::new();
        self.read(topic, partition, low..end, deadline, |record| {
            let key = record.key().unwrap_or_default();
            if record.payload().is_none() {
                keys.retain(|known| known != key);
            } else if !keys.iter().any(|known| known == key) {
                keys.push(key.to_vec());
            }
            ControlFlow::Continue(())
        })?;
        Ok(keys)
    }

    /// The newest committed value under each key that is `wanted`, without those that a tombstone withdrew. For compacted topics: all of
    /// it is read.
    ///
    /// # Errors
    /// When the partition does not exist or cannot be read in time.
    pub fn newest(
        &self,
        topic: &str,
        partition: i32,
        wanted: impl Fn(&[u8]) -> bool,
    ) -> Result<HashMap<Vec<u8>, Vec<u8>>, TailError> {
        let deadline = Instant::now() + self.timeout;
        let (low, end) = self.watermarks(topic, partition, deadline)?;
        let mut newest = HashMap::new();
        self.read(topic, partition, low..end, deadline, |record| {
            let key = record.key().unwrap_or_default();
            if wanted(key) {
                match record.payload() {
                    None => newest.remove(key),
                    Some(value) => newest.insert(key.to_vec(), value.to_vec()),
                };
            }
            ControlFlow::Continue(())
        })?;
        Ok(newest)
    }

    /// The last committed record of a partition; none if there is none.
    ///
    /// # Errors
    /// When the partition does not exist or cannot be read in time.
    pub fn last_record(&self, topic: &str, partition: i32) -> Result<Option<OwnedMessage>, TailError> {
        self.find_last(topic, partition, |_| true)
    }

    /// What `what` makes of the last committed record of each partition of these topics that has one, with its topic.
    ///
    /// Many are fetched at the same time: at the end of a partition a broker waits for what is still to come, and one after the other that
    /// adds up where a pipeline has a thousand tables. So many, and no more, that their ends fit into memory. A partition is to be read here or by
    /// the other calls of one reader, not by both: what it has of a queue of its own stays there.
    ///
    /// # Errors
    /// When a partition cannot be read in time.
    pub fn last_records<T>(
        &self,
        topics: Vec<String>,
        what: impl Fn(&BorrowedMessage<'_>) -> T,
    ) -> Result<Vec<(String, T)>, TailError> {
        let mut ends = Vec::new();
        for topic in topics {
            for partition in self.partitions(&topic)? {
                let deadline = Instant::now() + self.timeout;
                let (low, end) = self.offsets(&topic, partition, deadline)?;
                ends.push((topic.clone(), partition, low..end));
            }
        }
        let mut found = Vec::new();
        let read = (ends.chunks(FETCHED_TOGETHER)).try_for_each(|ends| self.last_of(ends.to_vec(), &what, &mut found));
        self.put_down();
        read.map(|()| found)
    }

    fn last_of<T>(
        &self,
        mut open: Vec<(String, i32, Range<i64>)>,
        what: &impl Fn(&BorrowedMessage<'_>) -> T,
        found: &mut Vec<(String, T)>,
    ) -> Result<(), TailError> {
        let mut step = FIRST_STEP;
        loop {
            open.retain(|(_, _, stretch)| !stretch.is_empty());
            if open.is_empty() {
                return Ok(());
            }
            let mut assignment = TopicPartitionList::new();
            let mut queues = Vec::new();
            for (topic, partition, stretch) in &open {
                let from = stretch.start.max(stretch.end.saturating_sub(step));
                // Before the assignment, so that nothing goes into the shared queue first.
                let queue = self
                    .consumer
                    .split_partition_queue(topic, *partition)
                    .ok_or_else(|| self.unreadable(topic, *partition, KafkaError::Subscription(topic.clone())))?;
                queues.push((from, queue));
                assignment
                    .add_partition_offset(topic, *partition, Offset::Offset(from))
                    .map_err(|source| self.unreadable(topic, *partition, source))?;
            }
            self.consumer
                .assign(&assignment)
                .map_err(|source| self.unreadable(&open[0].0, open[0].1, source))?;
            let mut rest = Vec::new();
            for ((topic, partition, stretch), (from, queue)) in open.into_iter().zip(queues) {
                let deadline = Instant::now() + self.timeout;
                let mut last = None;
                let poll = |left: Duration| {
                    queue
                        .poll(left.min(RETRY_PAUSE))
                        .or_else(|| match self.consumer.poll(Duration::ZERO)? {
                            // What concerns no partition comes here.
                            Err(error) if !matches!(error, KafkaError::PartitionEOF(_)) => Some(Err(error)),
                            _ => None,
                        })
                };
                take(poll, from..stretch.end, deadline, |record| {
                    last = Some(what(record));
                    ControlFlow::Continue(())
                })
                .map_err(|source| self.unreadable(&topic, partition, source))?;
                match last {
                    Some(last) => found.push((topic, last)),
                    None => rest.push((topic, partition, stretch.start..from)),
                }
            }
            open = rest;
            step = step.saturating_mul(STEP_GROWTH);
        }
    }

    /// The last committed record of a partition that is `wanted`.
    ///
    /// The last offsets can be control records and aborted records, which no consumer sees, and compaction leaves holes: so it
    /// looks back by growing steps until it has found one, or has read the whole partition.
    ///
    /// # Errors
    /// When the partition does not exist or cannot be read in time.
    pub fn find_last(
        &self,
        topic: &str,
        partition: i32,
        wanted: impl Fn(&BorrowedMessage<'_>) -> bool,
    ) -> Result<Option<OwnedMessage>, TailError> {
        let (low, end) = self.watermarks(topic, partition, Instant::now() + self.timeout)?;
        self.find_last_in(topic, partition, low..end, wanted)
    }

    /// As [`Tail::find_last`], in a stretch of the partition that ends at or before its last stable offset.
    ///
    /// # Errors
    /// When the partition cannot be read in time.
    pub fn find_last_in(
        &self,
        topic: &str,
        partition: i32,
        stretch: Range<i64>,
        wanted: impl Fn(&BorrowedMessage<'_>) -> bool,
    ) -> Result<Option<OwnedMessage>, TailError> {
        let deadline = Instant::now() + self.timeout;
        let low = stretch.start;
        let mut from = stretch.end;
        let mut step = FIRST_STEP;
        while from > low {
            let until = from;
            from = low.max(until.saturating_sub(step));
            step = step.saturating_mul(STEP_GROWTH);
            if let Some(record) = self.last_in(topic, partition, from..until, &wanted, deadline)? {
                return Ok(Some(record));
            }
        }
        Ok(None)
    }

    /// The offsets that a partition holds, up to its last stable offset.
    ///
    /// # Errors
    /// When the partition does not exist, or Kafka does not answer in time.
    pub fn stretch(&self, topic: &str, partition: i32) -> Result<Range<i64>, TailError> {
        let (low, end) = self.watermarks(topic, partition, Instant::now() + self.timeout)?;
        Ok(low..end)
    }

    /// The end of each partition of the topics that are `wanted` and exist, as this reader sees it: one request to each broker.
    ///
    /// # Errors
    /// When Kafka does not tell in time, which it does not of a partition without a leader.
    pub fn ends(&self, wanted: impl Fn(&str) -> bool) -> Result<BTreeMap<(String, i32), i64>, TailError> {
        let deadline = Instant::now() + self.timeout;
        let mut silent = None;
        let ends = retry_until(deadline, |left| {
            silent = None;
            let metadata = self.consumer.fetch_metadata(None, left)?;
            let mut asked = TopicPartitionList::new();
            for topic in metadata.topics().iter().filter(|topic| wanted(topic.name())) {
                // It is there, and shows no partitions while their leaders are elected.
                if let Some(error) = topic.error() {
                    silent = Some((topic.name().to_owned(), 0));
                    return Err(KafkaError::MetadataFetch(error.into()));
                }
                for partition in topic.partitions() {
                    // In the place of a timestamp, this stands for the end.
                    asked.add_partition_offset(topic.name(), partition.id(), Offset::End)?;
                }
            }
            let mut ends = BTreeMap::new();
            if asked.count() == 0 {
                return Ok(ends);
            }
            let left = deadline.saturating_duration_since(Instant::now());
            for partition in self.consumer.offsets_for_times(asked, left)?.elements() {
                let place = (partition.topic().to_owned(), partition.partition());
                // Of what no broker has answered, the client leaves what it was asked, and calls that no error.
                let end = partition.error().and_then(|()| match partition.offset() {
                    Offset::Offset(end) => Ok(end),
                    _ => Err(KafkaError::OffsetFetch(RDKafkaErrorCode::LeaderNotAvailable)),
                });
                match end {
                    Ok(end) => drop(ends.insert(place, end)),
                    Err(error) => {
                        silent = Some(place);
                        return Err(error);
                    }
                }
            }
            Ok(ends)
        });
        ends.map_err(|source| {
            let (topic, partition) = silent.unwrap_or_else(|| ("*".to_owned(), 0));
            self.unreadable(&topic, partition, source)
        })
    }

    /// The first committed record in a stretch of a partition that ends at or before its last stable offset.
    ///
    /// # Errors
    /// When the partition cannot be read in time.
    pub fn first_in(
        &self,
        topic: &str,
        partition: i32,
        stretch: Range<i64>,
    ) -> Result<Option<OwnedMessage>, TailError> {
        let mut first = None;
        self.read(topic, partition, stretch, Instant::now() + self.timeout, |record| {
            first = Some(record.detach());
            ControlFlow::Break(())
        })?;
        Ok(first)
    }

    /// The last record in a stretch of a partition that ends at or before its last stable offset.
    fn last_in(
        &self,
        topic: &str,
        partition: i32,
        stretch: Range<i64>,
        wanted: impl Fn(&BorrowedMessage<'_>) -> bool,
        deadline: Instant,
    ) -> Result<Option<OwnedMessage>, TailError> {
        let mut last = None;
        self.read(topic, partition, stretch, deadline, |record| {
            if wanted(record) {
                last = Some(record.detach());
            }
            ControlFlow::Continue(())
        })?;
        Ok(last)
    }

    /// Shows the committed records in a stretch of a partition that ends at or before its last stable offset, in their order.
    fn read(
        &self,
        topic: &str,
        partition: i32,
        stretch: Range<i64>,
        deadline: Instant,
        see: impl FnMut(&BorrowedMessage<'_>) -> ControlFlow<()>,
    ) -> Result<(), TailError> {
        let unreadable = |source| self.unreadable(topic, partition, source);
        let mut assignment = TopicPartitionList::new();
        assignment
            .add_partition_offset(topic, partition, Offset::Offset(stretch.start))
            .and_then(|()| self.consumer.assign(&assignment))
            .map_err(unreadable)?;
        let taken = take(|left| self.consumer.poll(left), stretch, deadline, see).map_err(unreadable);
        self.put_down();
        taken
    }

    /// Fetches no more, since every other request would have to wait for the answer.
    fn put_down(&self) {
        // What goes on being fetched is only slower.
        let _ = self.consumer.unassign();
    }

    /// The first offset and the last stable offset.
    fn watermarks(&self, topic: &str, partition: i32, deadline: Instant) -> Result<(i64, i64), TailError> {
        self.require(topic, partition, deadline)?;
        self.offsets(topic, partition, deadline)
    }

    /// The same of a partition that is known.
    fn offsets(&self, topic: &str, partition: i32, deadline: Instant) -> Result<(i64, i64), TailError> {
        retry_until(deadline, |left| self.consumer.fetch_watermarks(topic, partition, left))
            .map_err(|source| self.unreadable(topic, partition, source))
    }

    /// Asks for the topic's metadata, since a question for the offsets of an unknown topic is only answered by a timeout.
    fn require(&self, topic: &str, partition: i32, deadline: Instant) -> Result<(), TailError> {
        while !self.known_partitions(topic, partition, deadline)?.contains(&partition) {
            if !self.waits || Instant::now() + RETRY_PAUSE >= deadline {
                return Err(TailError::NoSuchPartition {
                    topic: topic.to_owned(),
                    partition,
                });
            }
            std::thread::sleep(RETRY_PAUSE);
        }
        Ok(())
    }

    fn unreadable(&self, topic: &str, partition: i32, source: KafkaError) -> TailError {
        TailError::Unreadable {
            topic: topic.to_owned(),
            partition,
            timeout: self.timeout,
            source: Box::new(source),
        }
    }
}

/// Shows the committed records in a stretch of a partition that ends at or before its last stable offset, in their order, as `poll` gives them
/// when it is told how much time is left.
fn take<'a>(
    mut poll: impl FnMut(Duration) -> Option<Result<BorrowedMessage<'a>, KafkaError>>,
    stretch: Range<i64>,
    deadline: Instant,
    mut see: impl FnMut(&BorrowedMessage<'_>) -> ControlFlow<()>,
) -> Result<(), KafkaError> {
    let mut failure = KafkaError::MessageConsumption(RDKafkaErrorCode::OperationTimedOut);
    loop {
        match poll(deadline.saturating_duration_since(Instant::now())) {
            Some(Ok(record)) if record.offset() >= stretch.end => return Ok(()),
            Some(Ok(record)) if record.offset() < stretch.start => {}
            Some(Ok(record)) if see(&record).is_break() => return Ok(()),
            Some(Ok(_)) => {}
            // It is sent at the last stable offset, which never falls, and the stretch ends at or before it.
            Some(Err(KafkaError::PartitionEOF(_))) => return Ok(()),
            // The client goes on by itself after every other error.
            Some(Err(error)) => failure = error,
            None => {}
        }
        if Instant::now() >= deadline {
            return Err(failure);
        }
    }
}

/// Asks again after an error, until the deadline; `ask` is told how much time is left.
pub(crate) fn retry_until<T>(
    deadline: Instant,
    mut ask: impl FnMut(Duration) -> Result<T, KafkaError>,
) -> Result<T, KafkaError> {
    loop {
        let left = deadline.saturating_duration_since(Instant::now());
        match ask(left) {
            Ok(answer) => return Ok(answer),
            Err(error) if Instant::now() + RETRY_PAUSE >= deadline => return Err(error),
            Err(_) => std::thread::sleep(RETRY_PAUSE),
        }
    }
}

/// The last committed checkpoint under `key`; none if there is none yet.
///
/// A topic that does not exist is an error, [`TailError::NoSuchPartition`]: what that means, the caller knows.
///
/// # Errors
/// When the topic does not exist, cannot be read within `timeout`, or holds something else.
pub fn read_checkpoint(
    cluster: &KafkaCluster,
    topic: &str,
    key: &str,
    timeout: Duration,
) -> Result<Option<Checkpoint>, TailError> {
    last_checkpoint(&Tail::new(cluster, timeout)?, topic, key)
}

/// As [`read_checkpoint`], by a reader of the caller's.
///
/// # Errors
/// As there.
pub fn last_checkpoint(tail: &Tail, topic: &str, key: &str) -> Result<Option<Checkpoint>, TailError> {
    let record = tail.find_last(topic, 0, |record| record.key() == Some(key.as_bytes()))?;
    // A tombstone, by which somebody deleted the checkpoint on purpose, is none.
    let Some((offset, value)) = record
        .as_ref()
        .and_then(|record| Some((record.offset(), record.payload()?)))
    else {
        return Ok(None);
    };
    serde_json::from_slice(value)
        .map(Some)
        .map_err(|source| TailError::NotACheckpoint {
            topic: topic.to_owned(),
            offset,
            source,
        })
}

/// What is kept of the tables of the pipeline with this checkpoint key.
///
/// # Errors
/// When the topic does not exist, cannot be read in time, or holds something else.
pub fn read_schemas(tail: &Tail, topic: &str, key: &str) -> Result<Vec<Kept>, TailError> {
    let ours = format!("{key}/");
    let newest = tail.newest(topic, 0, |key| key.starts_with(ours.as_bytes()))?;
    let kept = newest.into_values().map(|value| serde_json::from_slice(&value));
    kept.collect::<Result<_, _>>().map_err(|source| TailError::NotASchema {
        topic: topic.to_owned(),
        source,
    })
}

//! Writes the records into topics beside the log, each exactly once.
//!
//! How far the replay is stands in a topic of its own, and moves in the same Kafka transaction as the records. It is in the target's
//! cluster and not in the consumer group of whoever reads: source and target can be two clusters, and no transaction spans both. A producer
//! that signs on fences the one before it and settles its transaction; only then the place is read. So after a crash nothing is missing
//! and nothing is there twice, and of two that deliver the same replay, one stops.
//!
//! A topic that a pipeline publishes to is never written: whoever reads a log finds places in it by positions and timestamps that only rise.

use std::{
    collections::{HashMap, HashSet},
    sync::Arc,
    thread,
    time::{Duration, Instant},
};

use meander_config::{KafkaCluster, KafkaSink, ResourceIdentity, TopicManagement};
use rdkafka::{Message as _, message::OwnedMessage, producer::BaseRecord};
use serde::{Deserialize, Serialize};
use tokio::{
    runtime::Handle,
    sync::mpsc::{self, error::TryRecvError},
    task::{block_in_place, spawn_blocking},
};
use tokio_util::sync::CancellationToken;

use super::{Batch, Resumable, Tally, Target, TargetError, job_id, marks};
use crate::{
    checkpoint::Tail,
    kafka_client::require_admission,
    log::{
        REPLAY_JOB_HEADER, REPLAY_OFFSET_HEADER, REPLAY_PARTITION_HEADER, REPLAY_TOPIC_HEADER, header, replay_topic,
        stream_of_topic,
    },
    replay::{
        checkpoint::{Checkpoint, Reached},
        range::Range,
        record::Record,
    },
    sink::{
        SinkError, claims, left_open,
        partition::{ByRow, partition_of},
        producer::{PAUSE_AFTER_COMMIT, TransactionalProducer},
        topics::{Remarks, Topics},
    },
};

/// A transaction is committed when it holds this much, or when nothing more is waiting.
const TRANSACTION_BYTES: usize = 8 << 20;
/// How long Kafka may take to tell the place.
const READ_DEADLINE: Duration = Duration::from_secs(15);

/// Where the records go.
#[derive(Clone, Debug)]
pub struct Settings {
    /// The cluster, the prefix of the topics, and how they are made.
    pub cluster: KafkaSink,
    /// The prefix of the topics that are replayed.
    pub log_prefix: String,
}

/// A producer that has fenced every one of this replay before it, and how far the replay is.
pub struct Kafka {
    producer: TransactionalProducer,
    topics: Topics,
    settings: Settings,
    place_topic: String,
    job: String,
    attempt: u32,
    reached: Reached,
    /// The topic of each topic of the log that was met, which is there and fits.
    ensured: HashMap<Arc<str>, String>,
}

/// How far a replay is, as JSON under its name. Its range, which stays as it is, is under [`range_key`].
#[derive(Debug, Default, Serialize, Deserialize)]
#[serde(rename_all = "camelCase")]
struct Place {
    /// How many times it has begun or gone on.
    attempt: u32,
    #[serde(flatten)]
    reached: Reached,
}

impl Resumable for Kafka {
    type Settings = Settings;

    async fn open(settings: &Settings, job: &ResourceIdentity) -> Result<(Self, Option<Checkpoint>), TargetError> {
        let mut settings = settings.clone();
        let config = &mut settings.cluster;
        if config.topic_management == TopicManagement::Managed {
            // Records keep their timestamps, so that Kafka would delete old ones as soon as they are written.
            let retention = config.topic_config.entry("retention.ms".to_owned());
            retention.or_insert_with(|| "-1".to_owned());
        }
        let place_topic = replay_topic(&job.namespace, &job.name);
        blocking({
            let (cluster, prefix, topic) = (config.cluster(), config.topic_prefix.clone(), place_topic.clone());
            move || require_no_pipeline(&cluster, prefix, &topic)
        })
        .await?;
        let mut topics = Topics::new(config)?;
        topics.ensure_compacted(&place_topic).await?;
        // With the UID: a job of the same name in another Kubernetes cluster is none of this one's.
        let id = format!("meander-replay.{}.{}.{}", job.namespace, job.name, job.uid);
        let job = job_id(job);
        blocking(move || {
            let cluster = settings.cluster.cluster();
            let by_row = ByRow {
                schemas: false,
                partitions: settings.cluster.partitions,
                remarks: Remarks::default(),
            };
            let producer = TransactionalProducer::open(&cluster, &id, by_row)?;
            let tail = Tail::new(&cluster, READ_DEADLINE)
                .map_err(SinkError::Checkpoint)?
                .waiting();
            let (place, checkpoint) = read_place(&tail, &place_topic, &job)?;
            if let Some(checkpoint) = &checkpoint {
                topics.begun();
                let topics = written(&settings, &checkpoint.range);
                let is_to_come = |record: &OwnedMessage| is_to_come(record, &job, checkpoint);
                left_open::abort(&cluster, &producer, &tail, |name| topics.contains(name), is_to_come)?;
            }
            let kafka = Self {
                producer,
                topics,
                settings,
                place_topic,
                job,
                attempt: place.attempt + 1,
                reached: place.reached,
                ensured: HashMap::new(),
            };
            if checkpoint.is_some() {
                let deadline = kafka.producer.begin()?;
                kafka.commit(None, deadline)?;
            }
            Ok((kafka, checkpoint))
        })
        .await
    }

    async fn begin(&mut self, checkpoint: &Checkpoint) -> Result<(), TargetError> {
        let range = json(&checkpoint.range)?;
        self.reached = checkpoint.reached.clone();
        block_in_place(|| {
            let deadline = self.producer.begin()?;
            self.commit(Some(&range), deadline)
        })
    }
}

impl Target for Kafka {
    const FINISHES: bool = true;

    async fn run(self, batches: mpsc::Receiver<Batch>, tally: Tally) -> Result<(), TargetError> {
        tally.open();
        let runtime = Handle::current();
        let stop = CancellationToken::new();
        // When this is dropped the replay is over, and its thread is not.
        let _stop_on_drop = stop.clone().drop_guard();
        blocking(move || self.deliver(&runtime, batches, &tally, &stop)).await
    }
}

impl Kafka {
    /// Writes batches until there are no more, or commits none of them any more once it is stopped.
    fn deliver(
        mut self,
        runtime: &Handle,
        mut batches: mpsc::Receiver<Batch>,
        tally: &Tally,
        stop: &CancellationToken,
    ) -> Result<(), TargetError> {
        let mut last_commit: Option<Instant> = None;
        while let Some(batch) = batches.blocking_recv() {
            // Work gathers meanwhile, so this costs no throughput.
            let since = last_commit.map_or(PAUSE_AFTER_COMMIT, |at| at.elapsed());
            thread::sleep(PAUSE_AFTER_COMMIT.saturating_sub(since));
            let size = |batch: &Batch| batch.records.iter().map(Record::size).sum::<usize>();
            let mut bytes = size(&batch);
            let mut gathered = vec![batch];
            while bytes < TRANSACTION_BYTES {
                let batch = match batches.try_recv() {
                    Ok(batch) => batch,
                    Err(TryRecvError::Empty | TryRecvError::Disconnected) => break,
                };
                bytes += size(&batch);
                gathered.push(batch);
            }
            // Not in the transaction, which has to be over in time, however many there are.
            for record in gathered.iter().flat_map(|batch| &batch.records) {
                self.ensure(runtime, record)?;
            }
            let deadline = self.producer.begin()?;
            for batch in &gathered {
                self.take(batch, deadline)?;
            }
            if stop.is_cancelled() {
                break;
            }
            self.commit(None, deadline)?;
            last_commit = Some(Instant::now());
            gathered.iter().for_each(|batch| tally.credit(&batch.mark));
        }
        Ok(())
    }

    /// Makes sure of the topic that a record goes to.
    fn ensure(&mut self, runtime: &Handle, record: &Record) -> Result<(), TargetError> {
        if !self.ensured.contains_key(&record.topic) {
            let (cluster, from) = (&self.settings.cluster, &self.settings.log_prefix);
            let topic = stream_of_topic(&record.topic, from, &cluster.topic_prefix).unwrap_or_default();
            runtime.block_on(self.topics.ensure_data(&topic, &record.topic))?;
            self.ensured.insert(Arc::clone(&record.topic), topic);
        }
        Ok(())
    }

    /// Queues the records of a batch.
    fn take(&mut self, batch: &Batch, deadline: Instant) -> Result<(), TargetError> {
        for record in &batch.records {
            self.produce(&self.ensured[&record.topic], record, deadline)?;
        }
        let places = batch.records.iter().flat_map(Record::places);
        self.reached.go_on(places, &batch.mark);
        self.producer.serve();
        Ok(())
    }

    fn produce(&self, topic: &str, record: &Record, deadline: Instant) -> Result<(), SinkError> {
        let headers = marks::headers(record, &self.job, Some(self.attempt));
        let mut base = BaseRecord::to(topic).timestamp(record.timestamp).headers(headers);
        // No format has an empty key or an empty value. A record without a key is in the first partition, as in the log.
        if !record.value.is_empty() {
            base = base.payload(&record.value[..]);
        }
        let base = if record.key.is_empty() {
            base.partition(0)
        } else {
            let partition = partition_of(&record.key, self.settings.cluster.partitions);
            base.key(&record.key[..]).partition(partition)
        };
        self.producer.send(base, deadline)
    }

    /// Commits the transaction with the place after it, and with the range where the replay begins.
    fn commit(&self, range: Option<&[u8]>, deadline: Instant) -> Result<(), TargetError> {
        let note = |key: &str, value: &[u8]| {
            let record = BaseRecord::to(&self.place_topic).partition(0).key(key.as_bytes());
            self.producer.send(record.payload(value), deadline)
        };
        if let Some(range) = range {
            note(&range_key(&self.job), range)?;
        }
        let place = json(&Place {
            attempt: self.attempt,
            reached: self.reached.clone(),
        })?;
        note(&self.job, &place)?;
        Ok(self.producer.commit(deadline)?)
    }
}

/// Key of the range of a replay, beside that of its place.
fn range_key(job: &str) -> String {
    format!("{job}/range")
}

/// No pipeline may publish where the replay writes, nor where its topics would be taken for the pipeline's.
fn require_no_pipeline(cluster: &KafkaCluster, prefix: String, topic: &str) -> Result<(), TargetError> {
    require_admission(cluster, topic)?;
    match claims::holder(cluster, &prefix)? {
        None => Ok(()),
        Some((taken, owner)) => Err(TargetError::TopicsAreLive { prefix, taken, owner }),
    }
}

/// The topics that a replay of this range writes to.
fn written(settings: &Settings, range: &Range) -> HashSet<String> {
    let (from, to) = (&settings.log_prefix, &settings.cluster.topic_prefix);
    let topics = range.partitions.iter();
    topics
        .filter_map(|stretch| stream_of_topic(&stretch.topic, from, to))
        .collect()
}

/// Whether this replay has written the record, and delivers it once more.
fn is_to_come(record: &OwnedMessage, job: &str, checkpoint: &Checkpoint) -> bool {
    let number = |name| header(record, name)?.parse::<i64>().ok();
    let is_ours = header(record, REPLAY_JOB_HEADER).is_some_and(|by| by == job);
    let topic = header(record, REPLAY_TOPIC_HEADER).unwrap_or_default();
    let (partition, offset) = (number(REPLAY_PARTITION_HEADER), number(REPLAY_OFFSET_HEADER));
    let mut places = checkpoint.range.partitions.iter().zip(&checkpoint.reached.next);
    let place = places.find(|(stretch, _)| *stretch.topic == *topic && Some(i64::from(stretch.partition)) == partition);
    is_ours && place.is_some_and(|(_, next)| offset >= Some(*next))
}

/// What an earlier process of the replay left.
fn read_place(tail: &Tail, topic: &str, job: &str) -> Result<(Place, Option<Checkpoint>), TargetError> {
    let unreadable = |cause: &dyn std::fmt::Display| TargetError::CheckpointUnreadable {
        place: format!("the topic {topic} of the target, under the key {job:?}"),
        cause: cause.to_string(),
    };
    let newest = |key: &str| {
        tail.find_last(topic, 0, |record| record.key() == Some(key.as_bytes()))
            .map(|found| found.and_then(|record| record.payload().map(<[u8]>::to_vec)))
            .map_err(SinkError::Checkpoint)
    };
    let Some(place) = newest(job)? else {
        return Ok((Place::default(), None));
    };
    let place: Place = serde_json::from_slice(&place).map_err(|error| unreadable(&error))?;
    let range = newest(&range_key(job))?.ok_or_else(|| unreadable(&"its range is missing"))?;
    let range: Range = serde_json::from_slice(&range).map_err(|error| unreadable(&error))?;
    let checkpoint = Checkpoint::kept(range, place.reached.clone()).map_err(|cause| unreadable(&cause))?;
    Ok((place, Some(checkpoint)))
}

fn json(value: &impl Serialize) -> Result<Vec<u8>, TargetError> {
    serde_json::to_vec(value).map_err(|error| SinkError::KafkaTransaction(error.to_string()).into())
}

/// Does what blocks on a thread of its own.
async fn blocking<T: Send + 'static>(
    work: impl FnOnce() -> Result<T, TargetError> + Send + 'static,
) -> Result<T, TargetError> {
    let done = spawn_blocking(work).await;
    done.unwrap_or_else(|error| Err(SinkError::KafkaTransaction(error.to_string()).into()))
}

#[cfg(test)]
mod tests {
    use bytes::Bytes;
    use rdkafka::Timestamp;

    use super::*;
    use crate::{
        position::{Epoch, Lsn, Position},
        replay::record::{Coordinate, Passed},
    };

    /// What the target holds of a record of the log that was replayed.
    fn replayed(topic: &str, partition: i32, offset: i64, job: &str) -> OwnedMessage {
        let record = Record {
            coordinate: Coordinate {
                position: Position::end_of_transaction(Epoch::FIRST, Lsn(16)),
                part: 0,
            },
            timestamp: 0,
            commit_time: 0,
            topic: topic.into(),
            partition,
            offset,
            key: Bytes::new(),
            value: Bytes::new(),
            headers: Vec::new(),
            passed: Passed::default(),
            next: (0, offset + 1),
            others: Vec::new(),
        };
        let headers = marks::headers(&record, job, Some(1));
        let topic = format!("copy.{topic}");
        OwnedMessage::new(None, None, topic, Timestamp::NotAvailable, 0, 0, Some(headers))
    }

    #[test]
    fn what_is_aborted_is_what_this_replay_wrote_and_writes_once_more() {
        let range = Range::of([("a", 0), ("a", 1), ("b", 0)], 100);
        let reached = Reached {
            next: vec![10, 20, 30],
            done: None,
        };
        let checkpoint = Checkpoint::kept(range, reached).unwrap();
        let aborts = |topic, partition, offset, job| {
            let record = replayed(topic, partition, offset, job);
            is_to_come(&record, "ours", &checkpoint)
        };
        for (topic, partition, next) in [("a", 0, 10), ("a", 1, 20), ("b", 0, 30)] {
            assert!(aborts(topic, partition, next, "ours"));
            assert!(aborts(topic, partition, next + 1, "ours"));
            assert!(!aborts(topic, partition, next - 1, "ours"), "it is delivered");
            assert!(!aborts(topic, partition, next, "another's"));
        }
        assert!(
            !aborts("b", 1, 30, "ours") && !aborts("c", 0, 30, "ours"),
            "it is not of the range"
        );
        let foreign = OwnedMessage::new(None, None, "a".to_owned(), Timestamp::NotAvailable, 0, 0, None);
        assert!(!is_to_come(&foreign, "ours", &checkpoint), "somebody else wrote it");
    }
}

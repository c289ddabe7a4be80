//! Sees when records become visible to consumers, in the same way for every contestant and at next to no cost.

use std::time::{Duration, Instant};

use anyhow::Context as _;
use meander_test_support::{Kafka, Redis};
use rdkafka::{
    Message as _, Offset, TopicPartitionList,
    consumer::{BaseConsumer, Consumer as _},
    error::{KafkaError, RDKafkaErrorCode},
};
use redis::{AsyncCommands as _, streams::StreamRangeReply};
use tokio::task::spawn_blocking;

use crate::{
    LIMIT,
    contestant::{Capture, is_end_of_snapshot},
    stage::Stage,
};

/// How often it is looked whether there is something new.
const LOOK: Duration = Duration::from_millis(5);
/// In the last row, in a column of text.
pub(crate) const LAST: &str = "the-last-row";

/// What the last record is.
#[derive(Clone, Copy, Debug)]
pub(crate) enum Last {
    /// The one of the row that has [`LAST`].
    Marked,
    /// That of the last row, in whatever order; or the marker that a snapshot has ended, where the contestant writes one.
    OfRows,
}

/// When the first record was in any of the sinks, committed or not, and when the last one was visible in all of them.
#[derive(Clone, Copy, Debug)]
pub(crate) struct Seen {
    pub(crate) first: Instant,
    pub(crate) last: Instant,
}

/// Waits until all changes of `trades` are in every sink of the contestant.
pub(crate) async fn all_are_there(capture: &Capture, stage: &Stage, changes: u64, last: Last) -> anyhow::Result<Seen> {
    let in_kafka = async {
        let Some(topic) = capture.topic("trades") else {
            return Ok(None);
        };
        let watch = Watch::new(&stage.kafka, &topic)?;
        // Of a contestant that writes no such marker, the last row is where that many records are.
        let marker = match last {
            Last::Marked => Marker::Row,
            Last::OfRows if capture.marks_ends() => Marker::EndOfSnapshot,
            Last::OfRows => Marker::Any,
        };
        let seen = spawn_blocking(move || watch.until(changes, marker)).await??;
        anyhow::Ok(Some(seen))
    };
    let in_redis = async {
        let Some(stream) = capture.stream("trades") else {
            return Ok(None);
        };
        anyhow::Ok(Some(watch_redis(&stage.redis, &stream).await?))
    };
    let (in_kafka, in_redis) = tokio::try_join!(in_kafka, in_redis)?;
    let seen = [in_kafka, in_redis];
    let seen = seen.iter().flatten();
    Ok(Seen {
        first: seen.clone().map(|seen| seen.first).min().context("it has no sink")?,
        last: seen.map(|seen| seen.last).max().context("it has no sink")?,
    })
}

/// Fails unless each sink has so many changes.
pub(crate) async fn count(capture: &Capture, stage: &Stage, changes: u64) -> anyhow::Result<()> {
    if let Some(topic) = capture.topic("trades") {
        let mut seen = 0;
        let mut wrong = None;
        tokio::task::block_in_place(|| {
            stage.kafka.read(
                |name| name == topic,
                |message| match capture.is_change(message.payload().unwrap_or_default()) {
                    Ok(is_change) => seen += u64::from(is_change),
                    Err(error) => wrong = Some(error),
                },
            );
        });
        if let Some(error) = wrong {
            return Err(error);
        }
        anyhow::ensure!(seen == changes, "{seen} of {changes} changes are in Kafka");
    }
    if let Some(stream) = capture.stream("trades") {
        let seen: u64 = stage.redis.connection().await.xlen(&stream).await?;
        anyhow::ensure!(seen >= changes, "{seen} of {changes} changes are in Redis");
    }
    Ok(())
}

#[derive(Clone, Copy)]
enum Marker {
    Row,
    EndOfSnapshot,
    Any,
}

impl Marker {
    fn is(self, value: &[u8]) -> bool {
        match self {
            Self::Row => contains(value, LAST.as_bytes()),
            Self::EndOfSnapshot => is_end_of_snapshot(value),
            Self::Any => true,
        }
    }
}

struct Watch {
    topic: String,
    /// Sees records as they are written.
    any: BaseConsumer,
    /// Sees what is committed.
    committed: BaseConsumer,
}

impl Watch {
    fn new(kafka: &Kafka, topic: &str) -> anyhow::Result<Self> {
        let consumer = |isolation| {
            kafka
                .client_config()
                .set("group.id", "observer")
                .set("enable.auto.commit", "false")
                .set("isolation.level", isolation)
                .set("fetch.wait.max.ms", "5")
                .create::<BaseConsumer>()
        };
        Ok(Self {
            topic: topic.to_owned(),
            any: consumer("read_uncommitted")?,
            committed: consumer("read_committed")?,
        })
    }

    /// The topic is made by who writes it; to ask for the end of one that is not there takes long.
    fn is_there(&self) -> bool {
        let metadata = self.any.fetch_metadata(Some(&self.topic), LIMIT);
        metadata.is_ok_and(|metadata| metadata.topics().iter().any(|topic| !topic.partitions().is_empty()))
    }

    /// How many records the only partition has, markers of transactions among them.
    fn end(&self, consumer: &BaseConsumer) -> u64 {
        let (_, end) = consumer.fetch_watermarks(&self.topic, 0, LIMIT).unwrap_or_default();
        u64::try_from(end).unwrap_or(0)
    }

    fn until(&self, changes: u64, last: Marker) -> anyhow::Result<Seen> {
        wait("a topic", || self.is_there())?;
        let first = wait("a record", || self.end(&self.any) > 0)?;
        wait("all records", || self.end(&self.committed) >= changes)?;
        // There are at least as many records as changes, so none of what comes before is the last one.
        let mut from = TopicPartitionList::new();
        from.add_partition_offset(&self.topic, 0, Offset::Offset(i64::try_from(changes)? - 1))?;
        self.committed.assign(&from)?;
        loop {
            match self.committed.poll(LIMIT).context("the last record does not come")? {
                Ok(message) if last.is(message.payload().unwrap_or_default()) => {
                    return Ok(Seen {
                        first,
                        last: Instant::now(),
                    });
                }
                Ok(_) | Err(KafkaError::MessageConsumption(RDKafkaErrorCode::PartitionEOF)) => {}
                Err(error) => return Err(error.into()),
            }
        }
    }
}

fn wait(what: &str, is_there: impl Fn() -> bool) -> anyhow::Result<Instant> {
    let deadline = Instant::now() + LIMIT;
    while !is_there() {
        anyhow::ensure!(Instant::now() < deadline, "{what} is not there within {LIMIT:?}");
        std::thread::sleep(LOOK);
    }
    Ok(Instant::now())
}

async fn watch_redis(redis: &Redis, stream: &str) -> anyhow::Result<Seen> {
    let mut connection = redis.connection().await;
    let (mut first, deadline) = (None, Instant::now() + LIMIT);
    loop {
        let newest: StreamRangeReply = connection.xrevrange_count(stream, "+", "-", 1).await?;
        if let Some(entry) = newest.ids.first() {
            let first = *first.get_or_insert_with(Instant::now);
            let mut values = entry.map.values().filter_map(|value| match value {
                redis::Value::BulkString(bytes) => Some(bytes),
                _ => None,
            });
            if values.any(|value| contains(value, LAST.as_bytes())) {
                return Ok(Seen {
                    first,
                    last: Instant::now(),
                });
            }
        }
        anyhow::ensure!(Instant::now() < deadline, "the last entry does not come");
        tokio::time::sleep(LOOK).await;
    }
}

fn contains(value: &[u8], part: &[u8]) -> bool {
    value.windows(part.len()).any(|window| window == part)
}

//! Which records a replay holds: resolved once, at its start, and frozen.

use std::{
    collections::HashMap,
    sync::Arc,
    time::{Duration, Instant},
};

use jiff::Timestamp;
use meander_config::{KafkaLog, RecordOffset, ReplayConfig, ReplayEnd, ReplayStart};
use rdkafka::{
    Offset, TopicPartitionList,
    consumer::{BaseConsumer, Consumer as _},
    error::KafkaError,
    types::RDKafkaErrorCode,
};
use serde::{Deserialize, Serialize};
use tokio_util::sync::CancellationToken;

use super::{
    error::{ReplayError, no_client},
    record::{Record, ResumeToken},
    seek::{Part, Parting, Probe},
};
use crate::{
    checkpoint::{Tail, TailError, client_config, read_checkpoint, retry_until},
    kafka_client::{Hearing, require_admission},
    log::{checkpoint_key, checkpoint_topic},
    position::Position,
};

/// How long Kafka may take for each question.
const TIMEOUT: Duration = Duration::from_secs(30);
/// Brokers let no transaction stay open for longer than `transaction.max.timeout.ms`, 15 minutes unless changed.
const LONGEST_TRANSACTION: Duration = Duration::from_secs(16 * 60);
const SETTLE_PAUSE: Duration = Duration::from_millis(20);

/// The frozen range.
///
/// A record belongs to it if its timestamp is in `[from, to)` and its change is neither before `first` nor after `end`. Timestamps are the running
/// maximum of the commit times in commit order, in milliseconds, and all changes of a transaction have the same: so the range is
/// one stretch of commit order, holds whole transactions only, and ranges that touch share nothing and leave nothing out.
#[derive(Clone, Debug, Serialize, Deserialize)]
#[serde(rename_all = "camelCase")]
pub struct Range {
    /// Timestamp of the first records; none: whatever is the oldest.
    pub from: Option<i64>,
    /// Timestamp before which the last records are; none: bounded by `end` alone.
    pub to: Option<i64>,
    /// The beginning of the first transaction; none: bounded by `from` alone.
    pub first: Option<Position>,
    /// The end of the last transaction that may be in the range: the one that was asked for, if the log had reached it when the range was
    /// resolved, and otherwise that of the log. None in an empty log.
    pub end: Option<Position>,
    /// The greatest commit time up to `end`, in microseconds.
    pub high_time: i64,
    /// Every partition of the log, whether it holds something of the range or not.
    pub partitions: Vec<Stretch>,
    /// What of its start Kafka has deleted.
    pub missing: Option<Missing>,
}

#[cfg(test)]
impl Range {
    /// All of these partitions, each of them to this offset.
    pub(crate) fn of<'a>(partitions: impl IntoIterator<Item = (&'a str, i32)>, end: i64) -> Self {
        let stretch = |(topic, partition): (&str, i32)| Stretch {
            topic: topic.into(),
            partition,
            start: 0,
            end,
            truncated: false,
        };
        Self {
            from: None,
            to: None,
            first: None,
            end: None,
            high_time: 0,
            partitions: partitions.into_iter().map(stretch).collect(),
            missing: None,
        }
    }
}

/// What is known of the start of a range that Kafka no longer holds.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "camelCase")]
pub enum Missing {
    /// From this timestamp on it is whole.
    Before(i64),
    /// Nothing is left of this partition, or nothing that can be read, and of so many more: nobody can say whether some of it was in the range.
    Unknown {
        /// The topic.
        topic: Arc<str>,
        /// The partition.
        partition: i32,
        /// How many others.
        others: usize,
    },
}

/// A stretch of a partition.
#[derive(Clone, Debug, Serialize, Deserialize)]
#[serde(rename_all = "camelCase")]
pub struct Stretch {
    /// The topic.
    pub topic: Arc<str>,
    /// The partition.
    pub partition: i32,
    /// No record of the range is before this offset.
    pub start: i64,
    /// No record of the range is at or after this offset: at most the high watermark when it was resolved. Where it is `start`, there is none.
    pub end: i64,
    /// Something before `start` was deleted, and the range would start there.
    pub truncated: bool,
}

impl Stretch {
    /// Whether no record of the range is in it.
    #[must_use]
    pub fn is_empty(&self) -> bool {
        self.start >= self.end
    }

    fn part(&self) -> Part {
        Part {
            topic: Arc::clone(&self.topic),
            partition: self.partition,
            offsets: self.start..self.end,
        }
    }

    fn is_truncated(&self) -> ReplayError {
        ReplayError::LogTruncated {
            topic: self.topic.to_string(),
            partition: self.partition,
        }
    }
}

/// Where a record is with regard to a range.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Place {
    /// Before it starts.
    Before,
    /// In it.
    Inside,
    /// After its end, as is everything that follows in the same partition.
    Beyond,
}

impl Range {
    /// Where a record is.
    #[must_use]
    pub fn place(&self, timestamp: i64, position: Position) -> Place {
        let within = self.end.is_some_and(|end| position <= end);
        if !within || self.to.is_some_and(|to| timestamp >= to) {
            Place::Beyond
        } else if self.from.is_some_and(|from| timestamp < from) || self.first.is_some_and(|first| position < first) {
            Place::Before
        } else {
            Place::Inside
        }
    }

    /// Whether the range begins before a record's transaction.
    #[must_use]
    pub fn begins_before(&self, timestamp: i64, position: Position) -> bool {
        let transaction = beginning(position);
        self.from.is_some_and(|from| from < timestamp) || self.first.is_some_and(|first| first < transaction)
    }

    /// Whether it has a beginning of its own, and not what Kafka happens to hold.
    #[must_use]
    pub fn has_start(&self) -> bool {
        self.from.is_some() || self.first.is_some()
    }

    fn parts(&self) -> Vec<Part> {
        self.partitions.iter().map(Stretch::part).collect()
    }

    /// Cuts the beginnings of its stretches.
    fn begin_at(&mut self, starts: Vec<Parting>) {
        for (stretch, start) in self.partitions.iter_mut().zip(starts) {
            stretch.truncated &= start.offset == stretch.start;
            stretch.start = start.offset;
        }
    }

    /// An upper bound of the records to come.
    #[must_use]
    pub fn offsets(&self) -> u64 {
        self.partitions
            .iter()
            .map(|stretch| u64::try_from(stretch.end - stretch.start).unwrap_or(0))
            .sum()
    }

    /// Where each partition ended when it was resolved.
    #[must_use]
    pub fn ends(&self) -> Ends {
        let ends = self.partitions.iter();
        ends.map(|stretch| ((Arc::clone(&stretch.topic), stretch.partition), stretch.end))
            .collect()
    }

    /// Whether the log goes on after it.
    #[must_use]
    pub fn ends_before_the_log(&self) -> bool {
        self.to.is_some_and(|to| to.saturating_mul(1000) <= self.high_time)
    }

    /// The event time that it ends at, in microseconds.
    #[must_use]
    pub fn end_time(&self) -> i64 {
        self.to
            .map_or(self.high_time, |to| self.high_time.min(to.saturating_mul(1000)))
    }
}

/// Resolves the range of a replay. Blocks; ends early when `stop` is cancelled.
///
/// The order is what makes it exact. The checkpoint is read first: every change up to its last whole transaction is in a
/// transaction that is decided, in a topic that exists, at an offset below a high watermark that is read afterwards.
///
/// # Errors
/// When the range makes no sense, there is no log, or Kafka cannot say where it is.
pub fn resolve(config: &ReplayConfig, stop: &CancellationToken) -> Result<Range, ReplayError> {
    let from = match &config.from {
        ReplayStart::Time(text) => Some(milliseconds("from", text)?),
        _ => None,
    };
    let to = match &config.to {
        ReplayEnd::Time(text) => Some(milliseconds("to", text)?),
        _ => None,
    };
    if from.zip(to).is_some_and(|(from, to)| to < from) {
        return Err(ReplayError::EmptyRange);
    }

    let pipeline = &config.pipeline;
    let checkpoint_topic = checkpoint_topic(&pipeline.namespace, &pipeline.name);
    require_admission(&config.kafka.cluster(), &checkpoint_topic)?;
    let key = checkpoint_key(&pipeline.namespace, &pipeline.name, &config.slot_name);
    let checkpoint = match read_checkpoint(&config.kafka.cluster(), &checkpoint_topic, &key, TIMEOUT) {
        Ok(Some(checkpoint)) => checkpoint,
        Ok(None) | Err(TailError::NoSuchPartition { .. }) => {
            return Err(ReplayError::NoDurableLog {
                topic: checkpoint_topic,
            });
        }
        Err(error) => return Err(ReplayError::TailUnreadable(error)),
    };
    let mut range = Range {
        from,
        to,
        first: None,
        end: checkpoint.complete,
        high_time: checkpoint.high_time_micros,
        partitions: Vec::new(),
        missing: None,
    };
    if let Some(end) = range.end {
        let kafka = &config.kafka;
        range.first = match &config.from {
            ReplayStart::Position(text) => Some(position("from", text)?),
            ReplayStart::Offset(record) => Some(position_at(kafka, "from", record, |tail, part| {
                let offsets = record.offset..part.offsets.end;
                Part { offsets, ..part }.first(tail)
            })?),
            ReplayStart::Time(_) | ReplayStart::Beginning => None,
        }
        .map(beginning);
        let last = match &config.to {
            ReplayEnd::Position(text) => Some(position("to", text)?),
            ReplayEnd::Offset(record) => Some(position_at(kafka, "to", record, |tail, part| {
                let offsets = part.offsets.start..record.offset + 1;
                Part { offsets, ..part }.last(tail)
            })?),
            ReplayEnd::Time(_) | ReplayEnd::Now | ReplayEnd::Live => None,
        }
        .map(|last| Position::end_of_transaction(last.epoch, last.commit_lsn));
        if range.first.zip(last).is_some_and(|(first, last)| last < first) {
            return Err(ReplayError::EmptyRange);
        }
        let last = last.filter(|last| *last < end);
        range.end = last.or(range.end);
        let (brokers, probe) = (Brokers::connect(kafka, &checkpoint_topic)?, Probe::new(kafka)?);
        locate(&mut range, &brokers, &probe, stop)?;
        narrow(&mut range, &brokers, &probe, last, stop)?;
        range.missing = missing(&range, &probe, stop)?;
    }
    Ok(range)
}

/// What of the start of a range is gone, by the first records of the partitions that have lost something.
fn missing(range: &Range, probe: &Probe, stop: &CancellationToken) -> Result<Option<Missing>, ReplayError> {
    let suspects: Vec<_> = range.partitions.iter().filter(|stretch| stretch.truncated).collect();
    if !range.has_start() || suspects.is_empty() {
        return Ok(None);
    }
    let parts: Vec<_> = suspects.iter().map(|stretch| stretch.part()).collect();
    let mut whole_from = None;
    let mut unknown = Vec::new();
    for (stretch, first) in suspects.into_iter().zip(probe.first(&parts, stop)?) {
        match first {
            Some(first) if range.begins_before(first.timestamp, first.coordinate.position) => {
                whole_from = whole_from.max(Some(first.timestamp));
            }
            Some(_) => {}
            None => unknown.push(stretch),
        }
    }
    let unknown = unknown.split_first().map(|(first, others)| Missing::Unknown {
        topic: Arc::clone(&first.topic),
        partition: first.partition,
        others: others.len(),
    });
    Ok(whole_from.map(Missing::Before).or(unknown))
}

/// Where the transaction of a change begins.
fn beginning(position: Position) -> Position {
    Position { ordinal: 0, ..position }
}

/// The position of a record in Kafka, or of the one that `meant` finds where none can be read there. `field` is for the error.
fn position_at(
    kafka: &KafkaLog,
    field: &'static str,
    wanted: &RecordOffset,
    meant: impl FnOnce(&Tail, Part) -> Result<Option<Record>, ReplayError>,
) -> Result<Position, ReplayError> {
    let missing = |cause: String| ReplayError::NoSuchRecord {
        field,
        topic: wanted.topic.clone(),
        partition: wanted.partition,
        offset: wanted.offset,
        cause,
    };
    let prefix = format!("{}.", kafka.topic_prefix);
    if !wanted.topic.starts_with(&prefix) {
        return Err(missing(format!("the topics of this pipeline begin with {prefix:?}")));
    }
    let tail = Tail::new(&kafka.cluster(), TIMEOUT).map_err(ReplayError::TailUnreadable)?;
    let stretch = match tail.stretch(&wanted.topic, wanted.partition) {
        Ok(stretch) => stretch,
        Err(error @ TailError::NoSuchPartition { .. }) => return Err(missing(error.to_string())),
        Err(error) => return Err(ReplayError::TailUnreadable(error)),
    };
    if !stretch.contains(&wanted.offset) {
        return Err(missing(format!("Kafka holds {} to {}", stretch.start, stretch.end - 1)));
    }
    let part = Part {
        topic: wanted.topic.as_str().into(),
        partition: wanted.partition,
        offsets: stretch,
    };
    meant(&tail, part)?
        .map(|record| record.coordinate.position)
        .ok_or_else(|| missing("nothing there can be read".to_owned()))
}

/// Cuts the stretches of a range that is bounded by positions, or ends in the past, and finds the commit time of its end.
fn narrow(
    range: &mut Range,
    brokers: &Brokers,
    probe: &Probe,
    last: Option<Position>,
    stop: &CancellationToken,
) -> Result<(), ReplayError> {
    if let Some(last) = last {
        let ends = probe.part(range.parts(), false, |record| record.coordinate.position <= last, stop)?;
        let high_time = ends.iter().filter_map(|end| end.last).max();
        range.high_time = high_time
            .map_or(0, |time| time.saturating_mul(1000).saturating_add(999))
            .min(range.high_time);
        for (stretch, end) in range.partitions.iter_mut().zip(ends) {
            stretch.end = end.offset;
        }
    }
    if let Some(to) = range.to.filter(|_| range.ends_before_the_log()) {
        let partitions: Vec<_> = (range.partitions.iter())
            .map(|stretch| (Arc::clone(&stretch.topic), stretch.partition))
            .collect();
        let near = brokers.committed.since(&partitions, to)?;
        let mut parts = range.parts();
        for (part, near) in parts.iter_mut().zip(near) {
            // Without an answer, and most often rightly so, everything that is there is before.
            let start = near.unwrap_or(part.offsets.end);
            part.offsets.start = start.clamp(part.offsets.start, part.offsets.end);
        }
        let ends = probe.part(parts, true, |record| record.timestamp < to, stop)?;
        for (stretch, end) in range.partitions.iter_mut().zip(ends) {
            stretch.end = end.offset;
        }
    }
    if let Some(first) = range.first {
        let starts = probe.part(range.parts(), false, |record| record.coordinate.position < first, stop)?;
        range.begin_at(starts);
    }
    Ok(())
}

/// Where each partition of the log ends.
pub type Ends = HashMap<(Arc<str>, i32), i64>;

/// The range that follows one, up to the newer end of the log, for whoever has taken everything before the offsets in `reached`, or before a
/// timestamp after them. Blocks; ends early when `stop` is cancelled.
///
/// # Errors
/// When something is missing, or Kafka cannot say where it is.
pub fn following(
    brokers: &Brokers,
    before: &Range,
    reached: &Ends,
    since: Option<i64>,
    end: Position,
    stop: &CancellationToken,
) -> Result<Range, ReplayError> {
    let (partitions, ends) = brokers.settled(stop)?;
    let lows = brokers.committed.list(&partitions, Offset::Beginning)?;
    let starts = match since {
        Some(since) => brokers.committed.since(&partitions, since)?,
        None => vec![None; partitions.len()],
    };
    let mut range = Range {
        from: before.from,
        to: None,
        first: before.first,
        end: Some(end),
        high_time: 0,
        partitions: Vec::with_capacity(partitions.len()),
        missing: None,
    };
    for (index, (topic, partition)) in partitions.into_iter().enumerate() {
        let (low, end) = (lows[index], ends[index]);
        let reached = reached.get(&(Arc::clone(&topic), partition)).copied().unwrap_or(0);
        // An answer of nothing can be wrong (see `locate`); then what was taken is read again and passed over.
        let start = starts[index].unwrap_or(reached).max(reached).max(low);
        let stretch = Stretch {
            topic,
            partition,
            start,
            end,
            truncated: low > reached && start == low,
        };
        if stretch.truncated && stretch.is_empty() {
            return Err(stretch.is_truncated());
        }
        range.partitions.push(stretch);
    }
    Ok(range)
}

/// The range from a timestamp, or from the oldest change that Kafka holds, to the end of the log, which is in a committed checkpoint.
/// Blocks; ends early when `stop` is cancelled.
///
/// # Errors
/// When Kafka cannot say where it is.
pub fn up_to(
    kafka: &KafkaLog,
    checkpoint_topic: &str,
    from: Option<i64>,
    end: Position,
    stop: &CancellationToken,
) -> Result<Range, ReplayError> {
    let mut range = Range {
        from,
        to: None,
        first: None,
        end: Some(end),
        high_time: 0,
        partitions: Vec::new(),
        missing: None,
    };
    locate(
        &mut range,
        &Brokers::connect(kafka, checkpoint_topic)?,
        &Probe::new(kafka)?,
        stop,
    )?;
    Ok(range)
}

/// Finds the partitions of a range, and its stretches of them.
fn locate(range: &mut Range, brokers: &Brokers, probe: &Probe, stop: &CancellationToken) -> Result<(), ReplayError> {
    let (partitions, ends) = brokers.settled(stop)?;
    let committed = &brokers.committed;
    // Only now, since neither question sees what is at or after the last stable offset.
    let lows = committed.list(&partitions, Offset::Beginning)?;
    let from = range.from;
    let starts = match from {
        Some(from) => committed.since(&partitions, from)?,
        None => lows.iter().copied().map(Some).collect(),
    };
    for (index, (topic, partition)) in partitions.into_iter().enumerate() {
        let (low, end) = (lows[index], ends[index]);
        let start = match starts[index] {
            _ if low >= end => end,
            Some(start) => start.clamp(low, end),
            // Brokers also say that there is nothing from a timestamp on when the first such record was deleted, whatever comes after it. Only
            // the records tell the two apart.
            None if low > 0 => low,
            None => end,
        };
        range.partitions.push(Stretch {
            topic,
            partition,
            start,
            end,
            // Also where nothing is left.
            truncated: low > 0 && start <= low,
        });
    }
    if let Some(from) = from {
        let starts = probe.part(range.parts(), true, |record| record.timestamp < from, stop)?;
        range.begin_at(starts);
    }
    Ok(())
}

/// The range as somebody takes it who goes on after `token`. Whether it is the same one that the token is of, or was resolved again since,
/// is `frozen`. Blocks.
///
/// # Errors
/// When something is missing that may not have been taken, or Kafka cannot say where it is.
pub fn resume(range: &Range, kafka: &KafkaLog, token: ResumeToken, frozen: bool) -> Result<Range, ReplayError> {
    let partitions: Vec<_> = range
        .partitions
        .iter()
        .map(|stretch| (Arc::clone(&stretch.topic), stretch.partition))
        .collect();
    let offsets = Offsets::connect(kafka, "read_committed")?;
    let lows = offsets.list(&partitions, Offset::Beginning)?;
    let starts = offsets.since(&partitions, token.timestamp)?;
    let mut rest = range.clone();
    for (stretch, (low, start)) in rest.partitions.iter_mut().zip(lows.into_iter().zip(starts)) {
        let begun = stretch.start;
        // What was deleted before a range began is no part of it.
        let deleted = match frozen {
            true => low > begun && !stretch.is_empty(),
            false => stretch.truncated || low > begun,
        };
        // An answer of nothing can be wrong (see `resolve`); then what was taken is read again and passed over.
        stretch.start = begun.max(low).max(start.unwrap_or(begun));
        // Something was deleted since, and it may not have been taken: the first record that is left tells.
        stretch.truncated = deleted && stretch.start == low;
        if deleted && low >= stretch.end {
            return Err(stretch.is_truncated());
        }
    }
    Ok(rest)
}

/// Every partition of every topic of the pipeline. Blocks.
///
/// # Errors
/// When Kafka does not say.
pub(super) fn partitions(kafka: &KafkaLog, checkpoint_topic: &str) -> Result<Vec<(Arc<str>, i32)>, ReplayError> {
    Offsets::connect(kafka, "read_committed")?.partitions(&kafka.topic_prefix, checkpoint_topic)
}

/// Waits until every transaction that has records below the frozen ends is decided and marked.
///
/// Invariant for the reader: from here on the last stable offset of each partition is at or after its frozen end, and it never
/// falls. A consumer of committed records is told of the end of a partition only at the last stable offset. So whenever it is
/// told so, it has been given every committed record before the frozen end, whatever control records and aborted records stand
/// there. This wait is usually the rest of one of the pipeline's short transactions; at most it is the transaction timeout of
/// a pipeline that died.
fn settle(
    committed: &Offsets,
    partitions: &[(Arc<str>, i32)],
    ends: &[i64],
    stop: &CancellationToken,
) -> Result<(), ReplayError> {
    let started = Instant::now();
    loop {
        let stable = committed.list(partitions, Offset::End)?;
        let open = stable.iter().zip(ends).position(|(stable, end)| stable < end);
        let Some(open) = open else { return Ok(()) };
        if stop.is_cancelled() {
            return Err(ReplayError::Interrupted);
        }
        if started.elapsed() > LONGEST_TRANSACTION {
            let (topic, partition) = &partitions[open];
            return Err(ReplayError::HangingTransaction {
                topic: topic.to_string(),
                partition: *partition,
                waited: LONGEST_TRANSACTION,
            });
        }
        std::thread::sleep(SETTLE_PAUSE);
    }
}

/// Who is asked where the log is.
pub struct Brokers {
    committed: Offsets,
    uncommitted: Offsets,
    topic_prefix: String,
    checkpoint_topic: String,
}

impl Brokers {
    /// Clients of the log's cluster.
    ///
    /// # Errors
    /// When they cannot be made from their settings.
    pub fn connect(kafka: &KafkaLog, checkpoint_topic: &str) -> Result<Self, ReplayError> {
        Ok(Self {
            committed: Offsets::connect(kafka, "read_committed")?,
            uncommitted: Offsets::connect(kafka, "read_uncommitted")?,
            topic_prefix: kafka.topic_prefix.clone(),
            checkpoint_topic: checkpoint_topic.to_owned(),
        })
    }

    /// The partitions of the log, and where each ends, once everything before that is decided.
    fn settled(&self, stop: &CancellationToken) -> Result<(Partitions, Vec<i64>), ReplayError> {
        let partitions = self.committed.partitions(&self.topic_prefix, &self.checkpoint_topic)?;
        let ends = self.uncommitted.list(&partitions, Offset::End)?;
        settle(&self.committed, &partitions, &ends, stop)?;
        Ok((partitions, ends))
    }
}

type Partitions = Vec<(Arc<str>, i32)>;

/// Asks brokers for offsets.
struct Offsets(BaseConsumer<Hearing>);

impl Offsets {
    fn connect(kafka: &KafkaLog, isolation: &str) -> Result<Self, ReplayError> {
        client_config(&kafka.cluster(), "meander-replay")
            .map_err(no_client)?
            .set("isolation.level", isolation)
            .create_with_context(Hearing::default())
            .map(Self)
            .map_err(unreachable("setting up a client"))
    }

    /// The partitions of every topic of the pipeline.
    ///
    /// A topic whose leader is being elected is there and shows no partitions, so an error of one topic is an error.
    fn partitions(&self, prefix: &str, checkpoint_topic: &str) -> Result<Vec<(Arc<str>, i32)>, ReplayError> {
        let prefix = format!("{prefix}.");
        retry_until(Instant::now() + TIMEOUT, |left| {
            let metadata = self.0.fetch_metadata(None, left)?;
            let mut partitions = Vec::new();
            for topic in metadata.topics() {
                if !topic.name().starts_with(&prefix) || topic.name() == checkpoint_topic {
                    continue;
                }
                if let Some(error) = topic.error() {
                    return Err(KafkaError::MetadataFetch(error.into()));
                }
                let name: Arc<str> = topic.name().into();
                for partition in topic.partitions() {
                    partitions.push((Arc::clone(&name), partition.id()));
                }
            }
            Ok(partitions)
        })
        .map_err(unreachable("listing the pipeline's topics"))
    }

    /// The first offset of each partition, or its end, in the same order.
    fn list(&self, partitions: &[(Arc<str>, i32)], asked: Offset) -> Result<Vec<i64>, ReplayError> {
        self.ask(partitions, asked, |answer| told(asked, answer)?.ok_or(UNANSWERED))
    }

    /// The first offset of each partition at or after a timestamp, in the same order; none where there is none.
    ///
    /// The answer takes control records into account, whose timestamps are the broker's own time. So it can be too early, never too late, and it
    /// cannot say where a range ends.
    fn since(&self, partitions: &[(Arc<str>, i32)], timestamp: i64) -> Result<Vec<Option<i64>>, ReplayError> {
        // No database committed anything before 1970. In this the answer could be what was asked.
        let asked = match timestamp {
            ..=0 => Offset::Beginning,
            _ => Offset::Offset(timestamp),
        };
        self.ask(partitions, asked, |answer| told(asked, answer))
    }

    fn ask<T>(
        &self,
        partitions: &[(Arc<str>, i32)],
        asked: Offset,
        told: impl Fn(Offset) -> Result<T, KafkaError>,
    ) -> Result<Vec<T>, ReplayError> {
        if partitions.is_empty() {
            return Ok(Vec::new());
        }
        retry_until(Instant::now() + TIMEOUT, |left| {
            let mut query = TopicPartitionList::with_capacity(partitions.len());
            for (topic, partition) in partitions {
                query.add_partition_offset(topic, *partition, asked)?;
            }
            let answer = self.0.offsets_for_times(query, left)?;
            let offset = |(topic, partition): &(Arc<str>, i32)| {
                let element = answer.find_partition(topic, *partition).ok_or(UNANSWERED)?;
                element.error()?;
                told(element.offset())
            };
            partitions.iter().map(offset).collect()
        })
        .map_err(unreachable("asking for offsets"))
    }
}

/// Of what no broker has answered, the client leaves what it was asked, and calls that no error.
const UNANSWERED: KafkaError = KafkaError::OffsetFetch(RDKafkaErrorCode::LeaderNotAvailable);

/// The offset that the client tells; none where it tells that there is nothing from the timestamp on that it was asked for.
fn told(asked: Offset, answer: Offset) -> Result<Option<i64>, KafkaError> {
    match answer {
        answer if answer == asked => Err(UNANSWERED),
        Offset::Offset(offset) => Ok(Some(offset)),
        Offset::End => Ok(None),
        _ => Err(UNANSWERED),
    }
}

fn unreachable(doing: &'static str) -> impl FnOnce(KafkaError) -> ReplayError {
    move |source| ReplayError::KafkaUnreachable { doing, source }
}

fn position(field: &'static str, text: &str) -> Result<Position, ReplayError> {
    text.parse()
        .map_err(|source| ReplayError::InvalidPosition { field, source })
}

/// Parses a time to the granularity of Kafka's timestamps.
fn milliseconds(field: &'static str, text: &str) -> Result<i64, ReplayError> {
    text.parse::<Timestamp>()
        // Kafka gives negative timestamps meanings of their own, and no database committed anything before 1970.
        .map(|time| time.as_millisecond().max(0))
        .map_err(|source| ReplayError::InvalidTime {
            field,
            text: text.to_owned(),
            source,
        })
}

#[cfg(test)]
mod tests {
    use super::*;

    fn range(from: Option<i64>, to: Option<i64>, end: &str) -> Range {
        Range {
            from,
            to,
            first: None,
            end: Some(end.parse().unwrap()),
            high_time: 0,
            partitions: Vec::new(),
            missing: None,
        }
    }

    #[test]
    fn a_record_is_placed_by_its_timestamp_and_its_transaction() {
        let range = range(Some(100), Some(200), "1:0/50:18446744073709551615");
        let place = |timestamp, position: &str| range.place(timestamp, position.parse().unwrap());
        assert_eq!(place(99, "1:0/10:0"), Place::Before);
        assert_eq!(place(100, "1:0/10:0"), Place::Inside);
        assert_eq!(
            place(199, "1:0/50:9"),
            Place::Inside,
            "the last transaction is taken as a whole"
        );
        assert_eq!(place(200, "1:0/20:0"), Place::Beyond);
        assert_eq!(place(150, "1:0/51:0"), Place::Beyond);
        assert_eq!(place(99, "2:0/1:0"), Place::Beyond);
    }

    #[test]
    fn what_no_broker_has_answered_is_never_taken_for_an_offset_or_for_nothing() {
        let timestamp = Offset::Offset(1_763_632_800_000);
        for asked in [Offset::Beginning, Offset::End, timestamp] {
            assert_eq!(told(asked, asked), Err(UNANSWERED));
            assert_eq!(told(asked, Offset::Invalid), Err(UNANSWERED));
            assert_eq!(told(asked, Offset::Offset(7)), Ok(Some(7)));
        }
        assert_eq!(told(timestamp, Offset::End), Ok(None));
    }

    #[test]
    fn times_are_cut_to_milliseconds() {
        assert_eq!(milliseconds("from", "2026-11-20T10:00:00.123456Z").unwrap() % 1000, 123);
        assert_eq!(milliseconds("from", "1960-01-01T00:00:00Z").unwrap(), 0);
        assert!(matches!(
            milliseconds("to", "yesterday"),
            Err(ReplayError::InvalidTime { field: "to", .. })
        ));
    }
}

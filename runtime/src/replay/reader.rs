//! Reads the partitions of a range and merges them into commit order, or side by side, in bounded memory.

use std::{
    cmp::Reverse,
    collections::BinaryHeap,
    sync::Arc,
    time::{Duration, Instant},
};

use bytes::BytesMut;
use meander_config::{KafkaLog, ResourceIdentity};
use rdkafka::{
    Message as _, Offset, TopicPartitionList,
    consumer::{BaseConsumer, Consumer as _, base_consumer::PartitionQueue},
    error::KafkaError,
    types::RDKafkaErrorCode,
};
use tokio::sync::mpsc;

use super::{
    error::{ReplayError, is_fatal, no_client},
    filter::{Filter, FilterError, Judge, STACK},
    merge::{Merge, Step},
    range::{Ends, Place, Range, Stretch},
    record::{Coordinate, Next, Passed, Record},
};
use crate::{checkpoint::client_config, kafka_client::Hearing};

/// Memory for what is fetched ahead, over all partitions.
const PREFETCH_BYTES: usize = 64 << 20;
/// Bounds of one partition's share of it. With the smallest a partition is fetched in small pieces, and so slowly; with less hardly at all.
const PARTITION_BYTES: std::ops::RangeInclusive<usize> = (16 << 10)..=(8 << 20);
/// Bounds of one chunk, and how many may wait to be delivered. A reader with less memory for what is fetched has smaller ones.
const CHUNK_RECORDS: usize = 2048;
const CHUNK_BYTES: usize = 1 << 20;
const CHUNK_SHARE: usize = 16;
const CHUNKS: usize = 4;
/// About how much it takes besides what is fetched: as measured, with records of 100 kB in batches of ten.
const HANDING_ON: usize = 16 << 20;
/// How many records may be left out in a row before it is said.
const LEFT_OUT: u64 = 4096;
/// How long the reader waits before it looks whether anybody still listens.
const POLL: Duration = Duration::from_millis(100);
/// A partition that is not at its end always has something to say; if it does not for this long, something is broken.
const LONGEST_SILENCE: Duration = Duration::from_secs(300);

/// What a reader gives.
#[derive(Debug)]
pub enum Read {
    /// Records in order, at least one.
    Records(Vec<Record>),
    /// What comes after them, and is not delivered.
    LeftOut(Passed),
    /// The range is at its end, and what was captured later follows ([`super::follow`]).
    Live,
    /// The range is at its end, and each partition goes on at this offset. Without this the reader broke off.
    End(Ends),
}

/// What is read, and how.
pub struct Reading {
    /// The range.
    pub range: Range,
    /// The last record in commit order that is left out.
    pub after: Option<Coordinate>,
    /// What is given of the rest; all of it if there is none.
    pub filter: Option<Arc<Filter>>,
    /// Partitions are read side by side, each in its order, and not merged into commit order.
    pub side_by_side: bool,
    /// It is kept how far each partition is: so a record waits until it is known where its own goes on.
    pub places: bool,
}

/// Starts to read.
///
/// The thread ends with the range, with an error, or soon after the receiver is dropped.
pub fn start(kafka: &KafkaLog, job: &ResourceIdentity, reading: Reading) -> mpsc::Receiver<Result<Read, ReplayError>> {
    let group = format!("meander-replay.{}.{}", job.namespace, job.name);
    start_with(kafka, group, PREFETCH_BYTES, reading)
}

/// As [`start`], under a name of its own and with `prefetch` bytes of memory for what is fetched ahead.
pub fn start_with(
    kafka: &KafkaLog,
    // Nothing is ever committed to the group and nobody joins it; the name shows up in quotas and in the brokers' logs.
    group: String,
    prefetch: usize,
    reading: Reading,
) -> mpsc::Receiver<Result<Read, ReplayError>> {
    let (out, reads) = mpsc::channel(CHUNKS);
    let kafka = kafka.clone();
    let failed = out.clone();
    let read = move || {
        let result = Reader::connect(&kafka, &group, prefetch, reading, out.clone()).and_then(Reader::run);
        match result {
            Ok(()) | Err(Stop::Unheard) => {}
            Err(Stop::Failed(error)) => {
                let _ = out.blocking_send(Err(*error));
            }
        }
    };
    let thread = std::thread::Builder::new()
        .name("replay-reader".to_owned())
        .stack_size(STACK);
    if let Err(error) = thread.spawn(read) {
        tracing::error!(%error, "cannot start the reader");
        let _ = failed.try_send(Err(ReplayError::TaskStopped("the reader")));
    }
    reads
}

/// About how much memory it takes to read so many partitions with [`start_with`] and to hand them on.
#[must_use]
pub fn memory(partitions: usize, prefetch: usize) -> usize {
    // A fetch can come on top of what was just short of the limit.
    2 * share(prefetch, partitions) * partitions + HANDING_ON
}

fn chunk_bytes(prefetch: usize) -> usize {
    CHUNK_BYTES.min(prefetch / CHUNK_SHARE)
}

fn share(prefetch: usize, partitions: usize) -> usize {
    (prefetch / partitions.max(1)).clamp(*PARTITION_BYTES.start(), *PARTITION_BYTES.end())
}

/// Why a reader ended before its range.
enum Stop {
    /// Nobody listens any more.
    Unheard,
    Failed(Box<ReplayError>),
}

impl From<FilterError> for Stop {
    fn from(error: FilterError) -> Self {
        ReplayError::from(error).into()
    }
}

impl From<ReplayError> for Stop {
    fn from(error: ReplayError) -> Self {
        Self::Failed(Box::new(error))
    }
}

struct Reader {
    consumer: Arc<BaseConsumer<Hearing>>,
    range: Range,
    after: Option<Coordinate>,
    filter: Option<Arc<Filter>>,
    side_by_side: bool,
    places: bool,
    sources: Vec<Source>,
    merge: Merge<Coordinate>,
    /// Where what is read is copied to.
    memory: BytesMut,
    chunk: Vec<Record>,
    chunk_bytes: usize,
    most_bytes: usize,
    /// What is behind since the last record of the chunk.
    passed: Passed,
    /// Sources whose position has moved since then without a record that was given.
    moved: Vec<usize>,
    out: mpsc::Sender<Result<Read, ReplayError>>,
}

struct Source {
    /// Which partition of the range it is.
    index: usize,
    stretch: Stretch,
    /// The partition's own queue. Its size is bounded by the client for each partition by itself, which a queue shared by all is
    /// not: there one partition could fill the queue while the merge waits for another.
    queue: PartitionQueue<Hearing>,
    /// Where it goes on after what was given or left out.
    position: i64,
    /// It is among those that have moved.
    moved: bool,
    /// The first offset that was not looked at, once its stretch is at its end.
    reached: i64,
    /// Its next record; none at the end of its stretch.
    head: Option<Record>,
    judge: Judge,
}

impl Reader {
    fn connect(
        kafka: &KafkaLog,
        group: &str,
        prefetch: usize,
        reading: Reading,
        out: mpsc::Sender<Result<Read, ReplayError>>,
    ) -> Result<Self, Stop> {
        let Reading {
            range,
            after,
            filter,
            side_by_side,
            places,
        } = reading;
        let unreachable = |source| ReplayError::KafkaUnreachable {
            doing: "starting to read the log",
            source,
        };
        let stretches = || (range.partitions.iter().enumerate()).filter(|(_, stretch)| !stretch.is_empty());
        let share = share(prefetch, stretches().count());
        let consumer: Arc<BaseConsumer<Hearing>> = Arc::new(
            client_config(&kafka.cluster(), group)
                .map_err(no_client)?
                .set("queued.max.messages.kbytes", (share / 1024).to_string())
                .set("fetch.message.max.bytes", share.min(1 << 20).to_string())
                // An answer stays in memory for as long as one of its records does. Less than a message may have is refused.
                .set("fetch.max.bytes", prefetch.clamp(1 << 20, 50 << 20).to_string())
                // How long a partition whose queue was full waits for its next fetch; the default is a second.
                .set("fetch.queue.backoff.ms", "2")
                .create_with_context(Hearing::default())
                .map_err(unreachable)?,
        );
        let mut assignment = TopicPartitionList::new();
        let mut sources = Vec::new();
        for (index, stretch) in stretches() {
            assignment
                .add_partition_offset(&stretch.topic, stretch.partition, Offset::Offset(stretch.start))
                .map_err(unreachable)?;
            // Before the assignment, so that nothing goes into the shared queue first.
            let queue = consumer
                .split_partition_queue(&stretch.topic, stretch.partition)
                .ok_or_else(|| unreachable(KafkaError::Subscription(stretch.topic.to_string())))?;
            sources.push(Source {
                index,
                position: stretch.start,
                moved: false,
                reached: stretch.end,
                stretch: stretch.clone(),
                queue,
                head: None,
                judge: Judge::default(),
            });
        }
        consumer.assign(&assignment).map_err(unreachable)?;
        Ok(Self {
            consumer,
            merge: Merge::new(sources.len()),
            memory: BytesMut::new(),
            range,
            after,
            filter,
            side_by_side,
            places,
            sources,
            chunk: Vec::new(),
            chunk_bytes: 0,
            most_bytes: chunk_bytes(prefetch),
            passed: Passed::default(),
            moved: Vec::new(),
            out,
        })
    }

    fn run(mut self) -> Result<(), Stop> {
        for source in 0..self.sources.len() {
            self.advance(source)?;
            if self.places {
                self.go_on(source);
            }
        }
        if self.side_by_side {
            self.read_side_by_side()?;
        } else {
            self.read_merged()?;
        }
        let mut reached = self.range.ends();
        for source in &self.sources {
            self.passed.offsets += between(source.position, source.stretch.end);
            let Stretch { topic, partition, .. } = &source.stretch;
            reached.insert((Arc::clone(topic), *partition), source.reached);
        }
        self.flush()?;
        self.send(Read::End(reached))
    }

    /// A chunk of one partition after the other. The one whose next record is the earliest comes next, so that they stay close together.
    ///
    /// A record without a key (TRUNCATE, another schema, the markers of a snapshot) is about every row of its topic, and in partition 0. So no
    /// other partition of the topic goes past the next record of that one, and a record without a key waits until none is before it.
    fn read_side_by_side(&mut self) -> Result<(), Stop> {
        let same_topic = |one: usize, other: &usize| {
            one != *other && self.sources[one].stretch.topic == self.sources[*other].stretch.topic
        };
        let all = 0..self.sources.len();
        let others: Vec<Vec<usize>> = (all.clone())
            .map(|source| all.clone().filter(|other| same_topic(source, other)).collect())
            .collect();
        let is_first = |other: &usize| self.sources[*other].stretch.partition == 0;
        let first: Vec<Option<usize>> = (others.iter())
            .map(|others| others.iter().copied().find(is_first))
            .collect();
        let mut open: BinaryHeap<_> = all
            .filter_map(|source| Some(Reverse((self.coordinate(source)?, source))))
            .collect();
        while let Some(Reverse((_, source))) = open.pop() {
            let mut given = 0;
            let mut last = None;
            while let Some(head) = &self.sources[source].head {
                let coordinate = head.coordinate;
                let bound = match head.key.is_empty() {
                    true => (others[source].iter())
                        .filter_map(|other| self.coordinate(*other))
                        .min(),
                    false => first[source].and_then(|first| self.coordinate(first)),
                };
                // The records of one change stay together: the filter judges them as one.
                let is_whole = last != Some(coordinate.position);
                if bound.is_some_and(|bound| bound < coordinate) || (given >= CHUNK_RECORDS && is_whole) {
                    open.push(Reverse((coordinate, source)));
                    break;
                }
                self.take(source)?;
                given += 1;
                last = Some(coordinate.position);
            }
        }
        Ok(())
    }

    fn read_merged(&mut self) -> Result<(), Stop> {
        loop {
            match self.merge.step() {
                Step::Want(source) => match self.coordinate(source) {
                    Some(next) => self.merge.offer(source, next),
                    None => self.merge.finish(source),
                },
                Step::Head(source) => self.take(source)?,
                Step::Disorder {
                    previous,
                    found,
                    source,
                } => {
                    let Source {
                        stretch,
                        position,
                        head,
                        ..
                    } = &self.sources[source];
                    return Err(ReplayError::Disorder {
                        topic: stretch.topic.to_string(),
                        partition: stretch.partition,
                        offset: head.as_ref().map_or(*position, |head| head.offset),
                        previous,
                        found,
                    }
                    .into());
                }
                Step::End => return Ok(()),
            }
        }
    }

    /// The coordinate of a partition's next record; none at its end.
    fn coordinate(&self, source: usize) -> Option<Coordinate> {
        self.sources[source].head.as_ref().map(|head| head.coordinate)
    }

    /// Gives the next record of a partition, and fetches the one after it.
    fn take(&mut self, source: usize) -> Result<(), Stop> {
        let Some(record) = self.sources[source].head.take() else {
            return Ok(());
        };
        if self.places {
            self.advance(source)?;
            self.give(source, record)
        } else {
            self.give(source, record)?;
            self.advance(source)
        }
    }

    /// Fetches the next record of a partition. At its end it is released.
    fn advance(&mut self, source: usize) -> Result<(), Stop> {
        let head = self.next(source)?;
        if head.is_none() {
            self.release(source);
        }
        self.sources[source].head = head;
        Ok(())
    }

    /// Moves the position of a partition to its next record, or its end.
    fn go_on(&mut self, source: usize) {
        let Source {
            stretch,
            position,
            moved,
            head,
            ..
        } = &mut self.sources[source];
        let next = head.as_ref().map_or(stretch.end, |head| head.offset);
        self.passed.offsets += between(*position, next);
        if std::mem::replace(position, next) != next && !std::mem::replace(moved, true) {
            self.moved.push(source);
        }
    }

    /// Where the partitions that have moved go on.
    fn take_moved(&mut self) -> Vec<Next> {
        let sources = &mut self.sources;
        (self.moved.drain(..))
            .map(|source| {
                sources[source].moved = false;
                (sources[source].index, sources[source].position)
            })
            .collect()
    }

    /// The next record of a partition that is in the range; none at the end of its stretch.
    ///
    /// The end is a record beyond the range, a record at or after the frozen end (it was written later, and what is later is
    /// after the range), or the end of the partition: see `range::settle` for why that proves that nothing is missing.
    fn next(&mut self, source: usize) -> Result<Option<Record>, Stop> {
        // Since when Kafka says nothing.
        let mut silent: Option<Instant> = None;
        let mut failure = None;
        loop {
            let Source { stretch, queue, .. } = &mut self.sources[source];
            // What can be had at once is taken at once; before the reader waits, it hands on what it has.
            let polled = match queue.poll(Duration::ZERO) {
                None if self.chunk.is_empty() => queue.poll(POLL),
                polled => polled,
            };
            match polled {
                Some(Ok(message)) if message.offset() >= stretch.end => return self.at_end(source),
                Some(Ok(message)) => {
                    let record = Record::read(&stretch.topic, &message, &mut self.memory).map_err(|error| {
                        ReplayError::ForeignRecord {
                            topic: stretch.topic.to_string(),
                            partition: stretch.partition,
                            offset: message.offset(),
                            source: error,
                        }
                    })?;
                    let first_of_truncated = std::mem::take(&mut stretch.truncated);
                    let (timestamp, position) = (record.timestamp, record.coordinate.position);
                    if first_of_truncated && self.after.is_some_and(|after| record.coordinate > after) {
                        return Err(truncated(stretch).into());
                    }
                    if let Some(filter) = &self.filter
                        && self.after == Some(record.coordinate)
                    {
                        // What comes next may share its fate.
                        self.sources[source].judge.keeps(filter, &record)?;
                    }
                    match self.range.place(timestamp, position) {
                        Place::Beyond => {
                            self.sources[source].reached = record.offset;
                            return Ok(None);
                        }
                        Place::Inside if self.after.is_none_or(|after| record.coordinate > after) => {
                            return Ok(Some(record));
                        }
                        Place::Inside | Place::Before => silent = None,
                    }
                }
                Some(Err(KafkaError::PartitionEOF(_))) => return self.at_end(source),
                Some(Err(error)) => {
                    if let Some(error) = fatal(&error, stretch) {
                        return Err(error.into());
                    }
                    failure = Some(error);
                }
                None => {
                    // Waiting for whoever takes the records is not Kafka's silence.
                    let waiting = Instant::now();
                    self.flush()?;
                    let since = silent.unwrap_or(waiting) + waiting.elapsed();
                    silent = Some(since);
                    // Errors that concern no partition come here; the client goes on by itself after them.
                    if let Some(Err(error)) = self.consumer.poll(Duration::ZERO) {
                        failure = Some(error);
                    }
                    if self.out.is_closed() {
                        return Err(Stop::Unheard);
                    }
                    let stretch = &self.sources[source].stretch;
                    if since.elapsed() > LONGEST_SILENCE {
                        return Err(ReplayError::LogStalled {
                            topic: stretch.topic.to_string(),
                            partition: stretch.partition,
                            silence: LONGEST_SILENCE,
                            source: failure,
                        }
                        .into());
                    }
                }
            }
        }
    }

    /// The end of a stretch. If its start was deleted and no record is left to tell how much, something may be missing.
    fn at_end(&self, source: usize) -> Result<Option<Record>, Stop> {
        let stretch = &self.sources[source].stretch;
        if stretch.truncated && self.after.is_some() {
            return Err(truncated(stretch).into());
        }
        Ok(None)
    }

    /// Stops fetching a partition: at its end, its requests would be the ones that brokers hold back, and the others with them.
    fn release(&mut self, source: usize) {
        let stretch = &self.sources[source].stretch;
        let mut partition = TopicPartitionList::new();
        partition.add_partition(&stretch.topic, stretch.partition);
        if let Err(error) = self.consumer.pause(&partition) {
            tracing::debug!(%error, topic = %stretch.topic, partition = stretch.partition, "cannot pause");
        }
    }

    fn give(&mut self, source: usize, mut record: Record) -> Result<(), Stop> {
        if self.places {
            self.go_on(source);
        } else {
            let position = &mut self.sources[source].position;
            self.passed.offsets += between(std::mem::replace(position, record.offset + 1), record.offset + 1);
        }
        // What is left out counts too: it lies in the memory of those beside it for as long as they are there.
        self.chunk_bytes += record.size();
        if let Some(filter) = &self.filter
            && !self.sources[source].judge.keeps(filter, &record)?
        {
            self.passed.filtered += 1;
        } else {
            record.passed = std::mem::take(&mut self.passed);
            if self.places {
                let Source { index, position, .. } = self.sources[source];
                record.next = (index, position);
                // Most often nothing else has moved.
                if self.moved.last() == Some(&source) {
                    self.moved.pop();
                    self.sources[source].moved = false;
                }
                record.others = self.take_moved();
            }
            self.chunk.push(record);
        }
        if self.chunk.len() >= CHUNK_RECORDS || self.chunk_bytes >= self.most_bytes || self.passed.offsets >= LEFT_OUT {
            self.flush()?;
        }
        Ok(())
    }

    fn flush(&mut self) -> Result<(), Stop> {
        self.chunk_bytes = 0;
        if !self.chunk.is_empty() {
            let chunk = std::mem::take(&mut self.chunk);
            self.send(Read::Records(chunk))?;
        }
        let passed = std::mem::take(&mut self.passed);
        if passed != Passed::default() {
            self.send(Read::LeftOut(passed))?;
        }
        Ok(())
    }

    fn send(&self, read: Read) -> Result<(), Stop> {
        self.out.blocking_send(Ok(read)).map_err(|_| Stop::Unheard)
    }
}

/// How many offsets lie between two; none where the range was resumed past its end.
fn between(from: i64, to: i64) -> u64 {
    u64::try_from(to - from).unwrap_or(0)
}

fn truncated(stretch: &Stretch) -> ReplayError {
    ReplayError::LogTruncated {
        topic: stretch.topic.to_string(),
        partition: stretch.partition,
    }
}

/// What an error means after which nothing more comes from a partition.
fn fatal(error: &KafkaError, stretch: &Stretch) -> Option<ReplayError> {
    is_fatal(error).then(|| match error {
        KafkaError::MessageConsumption(RDKafkaErrorCode::AutoOffsetReset | RDKafkaErrorCode::OffsetOutOfRange) => {
            truncated(stretch)
        }
        _ => ReplayError::KafkaUnreachable {
            doing: "reading the log",
            source: error.clone(),
        },
    })
}

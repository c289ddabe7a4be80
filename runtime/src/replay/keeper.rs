//! Keeps how far a replay is, for targets that cannot keep it beside what they were given.
//!
//! It is kept in Kafka, as the committed offsets of a consumer group of the job's own, which nobody ever joins: for each partition of the
//! range the offset that it goes on at, with its stretch in the offset's metadata, and under the topic of the pipeline's checkpoint what they
//! have in common. All of it goes in one request, which the broker stores as one batch, so nobody finds half of it.
//!
//! Invariant: what is kept is never ahead of what the target has taken. Whoever goes on from it repeats what was taken since, and leaves
//! nothing out.

use std::{
    collections::{BTreeMap, VecDeque},
    convert::Infallible,
    future::pending,
    pin::pin,
    sync::Arc,
    time::Duration,
};

use meander_config::{KafkaLog, ResourceIdentity};
use rdkafka::{
    Offset, TopicPartitionList,
    consumer::{BaseConsumer, CommitMode, Consumer as _},
    error::{KafkaError, RDKafkaErrorCode},
};
use serde::{Deserialize, Serialize};
use tokio::{
    sync::{mpsc, watch},
    task::{JoinHandle, spawn_blocking},
    time::{Instant, MissedTickBehavior, interval},
};
use tokio_util::sync::CancellationToken;

use super::{
    checkpoint::{Checkpoint, Done, Reached},
    follow::Taken,
    range::{self, Range, Stretch},
    record::{Record, ResumeToken},
    target::{Batch, Mark, Resumable, Tally, Target, TargetError},
};
use crate::{
    checkpoint::client_config,
    kafka_client::{Hearing, require_admission},
    log::checkpoint_topic,
};

/// How often it is noted what was taken.
const INTERVAL: Duration = Duration::from_secs(1);
/// How often it is looked, once the process is asked to end, whether everything that was handed over is taken.
const ENDING_INTERVAL: Duration = Duration::from_millis(20);
/// Brokers forget offsets that nobody has committed for `offsets.retention.minutes`, a week unless changed: so those of a replay that is
/// paused, or whose next change is far away, are committed again.
const RENEWAL: Duration = Duration::from_secs(3600);
/// How long Kafka may take for each question, and to find who keeps the group.
const DEADLINE: Duration = Duration::from_secs(10);

/// A target that is given again what it took shortly before a crash, and does not know how far the replay is.
pub trait AtLeastOnce: Target {
    /// Where it goes.
    type Settings: Sync;

    /// A target that has been given nothing. `attempt` says how many times the replay has begun or gone on.
    fn new(settings: &Self::Settings, attempt: u32) -> Self;
}

/// Where the place of a replay is kept, and where it goes.
#[derive(Clone, Debug)]
pub struct Keeping<S> {
    /// The log; the group is in the same cluster.
    pub kafka: KafkaLog,
    /// The pipeline whose log it is.
    pub pipeline: ResourceIdentity,
    /// Where it goes.
    pub target: S,
    /// The process is asked to end.
    pub ending: CancellationToken,
}

/// A target whose place is kept for it.
pub struct Kept<T> {
    target: T,
    keeper: Keeper,
    place: Option<Place>,
    ending: CancellationToken,
}

impl<T: AtLeastOnce> Resumable for Kept<T> {
    type Settings = Keeping<T::Settings>;

    async fn open(
        keeping: &Keeping<T::Settings>,
        job: &ResourceIdentity,
    ) -> Result<(Self, Option<Checkpoint>), TargetError> {
        let (keeper, place) = Keeper::open(&keeping.kafka, &keeping.pipeline, job).await?;
        let checkpoint = place.as_ref().map(|place| Checkpoint {
            range: Range::clone(&place.range),
            reached: place.reached.clone(),
        });
        let attempt = place.as_ref().map_or(1, |place| place.attempt);
        let kept = Self {
            target: T::new(&keeping.target, attempt),
            keeper,
            place,
            ending: keeping.ending.clone(),
        };
        Ok((kept, checkpoint))
    }

    async fn begin(&mut self, checkpoint: &Checkpoint) -> Result<(), TargetError> {
        self.place = Some(self.keeper.begin(checkpoint.clone()).await?);
        Ok(())
    }
}

impl<T: Target> Target for Kept<T> {
    const WHOLE_TRANSACTIONS: bool = T::WHOLE_TRANSACTIONS;
    const PACED: bool = T::PACED;
    const FINISHES: bool = true;
    const TELLS_SILENCE: bool = T::TELLS_SILENCE;
    const MOST_RECORDS: usize = T::MOST_RECORDS;

    async fn run(self, mut batches: mpsc::Receiver<Batch>, tally: Tally) -> Result<(), TargetError> {
        let Some(place) = self.place else {
            return self.target.run(batches, tally).await;
        };
        let mut diary = Diary::new(place, tally.counts().delivered);
        let mut saves = Saves::new(self.keeper);
        let (handing, handed) = mpsc::channel(1);
        let mut handing = Some(handing);
        // No more batches come, though the range has not ended: the target must not take the one for the other.
        let mut interrupted = false;
        let mut looks = interval(INTERVAL);
        looks.set_missed_tick_behavior(MissedTickBehavior::Delay);
        let mut running = pin!(self.target.run(handed, tally.clone()));
        let end = loop {
            tokio::select! {
                end = &mut running => break end,
                passed = pass(handing.as_ref(), &mut batches), if !interrupted => match passed {
                    Some((permit, batch)) => {
                        diary.hand(&batch);
                        permit.send(batch);
                    }
                    None if self.ending.is_cancelled() => {
                        interrupted = true;
                        looks = interval(ENDING_INTERVAL);
                    }
                    None => handing = None,
                },
                () = saves.ended() => {}
                _ = looks.tick() => {
                    let moved = diary.take(tally.counts().delivered);
                    saves.start(&diary.place, moved);
                    if interrupted && diary.batches.is_empty() {
                        break Ok(());
                    }
                }
            }
        };
        // Also if the target cannot go on: another pod will.
        saves.ended_or_none().await;
        if diary.take(tally.counts().delivered) || saves.behind {
            saves.start(&diary.place, true);
            saves.ended_or_none().await;
        }
        end
    }
}

/// Keeps the range of a replay whose subscribers keep their own places.
pub struct RangeKeeper {
    keeper: Keeper,
    place: Option<Place>,
}

impl RangeKeeper {
    /// Finds what an earlier process of the job has left.
    ///
    /// # Errors
    /// When Kafka does not tell.
    pub async fn open(
        kafka: &KafkaLog,
        pipeline: &ResourceIdentity,
        job: &ResourceIdentity,
    ) -> Result<Self, TargetError> {
        let (keeper, place) = Keeper::open(kafka, pipeline, job).await?;
        Ok(Self { keeper, place })
    }

    /// The range, once it was resolved.
    #[must_use]
    pub fn range(&self) -> Option<&Range> {
        self.place.as_ref().map(|place| &*place.range)
    }

    /// Keeps the range of a replay that begins.
    ///
    /// # Errors
    /// When Kafka does not take it.
    pub async fn begin(&mut self, range: &Range) -> Result<(), TargetError> {
        let checkpoint = Checkpoint::at_the_start_of(range.clone());
        self.place = Some(self.keeper.begin(checkpoint).await?);
        Ok(())
    }

    /// How far an earlier process was in what follows the range.
    #[must_use]
    pub fn taken(&self) -> Option<Taken> {
        let place = self.place.as_ref()?;
        let partitions = place.range.partitions.iter().zip(&place.reached.next);
        let ends = partitions.map(|(stretch, next)| ((Arc::clone(&stretch.topic), stretch.partition), *next));
        Some(Taken {
            last: place.taken?,
            ends: ends.collect(),
        })
    }

    /// Keeps for ever what is `taken` after the range, and sees that Kafka does not forget it.
    pub async fn keep(self, mut taken: Option<watch::Receiver<Option<Taken>>>) -> Infallible {
        let Some(mut place) = self.place else {
            return pending().await;
        };
        let mut saves = Saves::new(self.keeper);
        let mut looks = interval(INTERVAL);
        loop {
            tokio::select! {
                () = saves.ended() => {}
                _ = looks.tick() => {
                    let news = taken.as_mut().filter(|taken| taken.has_changed().unwrap_or(false));
                    let moved = news.and_then(|taken| taken.borrow_and_update().clone());
                    let has_moved = moved.is_some();
                    if let Some(taken) = moved {
                        for (stretch, next) in place.range.partitions.iter().zip(&mut place.reached.next) {
                            let end = taken.ends.get(&(Arc::clone(&stretch.topic), stretch.partition));
                            *next = end.copied().unwrap_or(*next);
                        }
                        place.taken = Some(taken.last);
                    }
                    saves.start(&place, has_moved);
                }
            }
        }
    }
}

/// The next batch, and room for it; none after the last.
async fn pass(
    handing: Option<&mpsc::Sender<Batch>>,
    batches: &mut mpsc::Receiver<Batch>,
) -> Option<(mpsc::OwnedPermit<Batch>, Batch)> {
    let room = match handing {
        Some(handing) => handing.clone().reserve_owned().await,
        None => pending().await,
    };
    match room {
        Ok(permit) => batches.recv().await.map(|batch| (permit, batch)),
        // The target has ended; its result comes next.
        Err(_) => pending().await,
    }
}

/// How far a replay is in each partition of its range.
#[derive(Clone, Debug)]
struct Place {
    range: Arc<Range>,
    reached: Reached,
    /// Where subscribers keep their own places, and what follows the range is taken as well: how far that is, at `reached.next`.
    taken: Option<ResumeToken>,
    /// How many times the replay has begun or gone on.
    attempt: u32,
}

impl Place {
    fn of_the_first_attempt(Checkpoint { range, reached }: Checkpoint) -> Self {
        Self {
            range: Arc::new(range),
            reached,
            taken: None,
            attempt: 1,
        }
    }
}

/// What is handed to the target, and how much of it is taken.
struct Diary {
    place: Place,
    /// The count of records up to the end of the last batch.
    handed: u64,
    /// Batches that are not taken yet: the count up to the end of each, what it is told by, and where its partitions go on after it.
    batches: VecDeque<(u64, Mark, BTreeMap<usize, i64>)>,
}

impl Diary {
    /// `delivered` is what earlier processes have delivered, which the tally counts too.
    fn new(place: Place, delivered: u64) -> Self {
        Self {
            place,
            handed: delivered,
            batches: VecDeque::new(),
        }
    }

    fn hand(&mut self, batch: &Batch) {
        self.handed += batch.mark.records;
        // Of each partition the last one stays.
        let ends = batch.records.iter().flat_map(Record::places).collect();
        self.batches.push_back((self.handed, batch.mark, ends));
    }

    /// Whether the place has moved by what is delivered now. Targets take batches in their order, so a count tells which.
    fn take(&mut self, delivered: u64) -> bool {
        let mut moved = false;
        while let Some((_, mark, ends)) = self.batches.pop_front_if(|(until, ..)| *until <= delivered) {
            self.place.reached.go_on(ends, &mark);
            moved = true;
        }
        moved
    }
}

/// Saves places, one at a time. A place that cannot be saved does no harm but that a crash repeats more.
struct Saves {
    keeper: Keeper,
    running: Option<JoinHandle<Result<(), KafkaError>>>,
    last: Instant,
    /// The newest place is not saved.
    behind: bool,
    failing: bool,
}

impl Saves {
    fn new(keeper: Keeper) -> Self {
        Self {
            keeper,
            running: None,
            last: Instant::now(),
            behind: false,
            failing: false,
        }
    }

    /// Saves a place, unless it is saved already, or another is being saved.
    fn start(&mut self, place: &Place, moved: bool) {
        self.behind |= moved || self.last.elapsed() >= RENEWAL;
        if self.behind && self.running.is_none() {
            let (keeper, place) = (self.keeper.clone(), place.clone());
            self.running = Some(spawn_blocking(move || keeper.save(&place)));
            self.behind = false;
            self.last = Instant::now();
        }
    }

    /// Waits for the end of what is being saved; for ever if nothing is. Cancel safe.
    async fn ended(&mut self) {
        let Some(running) = &mut self.running else {
            return pending().await;
        };
        let result = running.await;
        self.running = None;
        let failure = match result {
            Ok(Ok(())) => None,
            Ok(Err(error)) => Some(error.to_string()),
            Err(error) => Some(error.to_string()),
        };
        self.behind |= failure.is_some();
        match (failure, self.failing) {
            (Some(error), false) => {
                let group = self.keeper.group.as_str();
                tracing::warn!(
                    error,
                    group,
                    "it cannot be kept how far the replay is: a crash would repeat more than a second of it"
                );
                self.failing = true;
            }
            (None, true) => {
                tracing::info!("it is kept again how far the replay is");
                self.failing = false;
            }
            _ => {}
        }
    }

    async fn ended_or_none(&mut self) {
        if self.running.is_some() {
            self.ended().await;
        }
    }
}

/// What the partitions have in common, as the metadata of an offset. Brokers take 4096 bytes, unless `offset.metadata.max.bytes` says
/// otherwise; this is a few hundred.
#[derive(Serialize, Deserialize)]
#[serde(rename_all = "camelCase")]
struct Common {
    /// Without the partitions.
    range: Range,
    /// How many partitions hold something of it, so that one that was deleted is missed.
    partitions: usize,
    done: Option<Done>,
    /// See [`Place::taken`].
    taken: Option<ResumeToken>,
    /// See [`Place::attempt`].
    attempt: u32,
}

/// A partition's own part of the range.
#[derive(Serialize, Deserialize)]
#[serde(rename_all = "camelCase")]
struct Part {
    /// See [`Stretch::start`].
    start: i64,
    /// See [`Stretch::end`].
    end: i64,
    /// See [`Stretch::truncated`].
    truncated: bool,
}

/// Commits the offsets of the job's group. Everything blocks.
#[derive(Clone)]
struct Keeper {
    consumer: Arc<BaseConsumer<Hearing>>,
    group: String,
    checkpoints: String,
}

impl Keeper {
    /// Opens the group of a job. With it comes what an earlier process has left, if there was one, as another attempt.
    async fn open(
        kafka: &KafkaLog,
        pipeline: &ResourceIdentity,
        job: &ResourceIdentity,
    ) -> Result<(Self, Option<Place>), TargetError> {
        let group = format!("meander-replay.{}.{}.{}", job.namespace, job.name, job.uid);
        let checkpoints = checkpoint_topic(&pipeline.namespace, &pipeline.name);
        let (kafka, name) = (kafka.clone(), group.clone());
        let opened = spawn_blocking(move || {
            let keeper = Self::connect(&kafka, name, checkpoints)?;
            let mut place = keeper.load(&kafka)?;
            if let Some(place) = &mut place {
                place.attempt += 1;
                keeper.save(place).map_err(|error| keeper.failed(&error))?;
            }
            Ok((keeper, place))
        });
        opened.await.map_err(|error| not_kept(&group, error))?
    }

    /// Saves the place of a replay that begins.
    async fn begin(&self, checkpoint: Checkpoint) -> Result<Place, TargetError> {
        let (keeper, place) = (self.clone(), Place::of_the_first_attempt(checkpoint));
        let begun = spawn_blocking(move || keeper.create(&place).map(|()| place));
        begun.await.map_err(|error| not_kept(&self.group, error))?
    }

    fn connect(kafka: &KafkaLog, group: String, checkpoints: String) -> Result<Self, TargetError> {
        require_admission(&kafka.cluster(), &checkpoints).map_err(TargetError::NotAdmitted)?;
        let deadline = DEADLINE.as_millis().to_string();
        let consumer = client_config(&kafka.cluster(), &group)
            .and_then(|mut config| {
                config
                    .set("socket.timeout.ms", &deadline)
                    // Nobody joins the group; it is also how long the client looks for whoever keeps it.
                    .set("session.timeout.ms", &deadline);
                Ok(config.create_with_context(Hearing::default())?)
            })
            .map_err(|error| not_kept(&group, error))?;
        Ok(Self {
            consumer: Arc::new(consumer),
            group,
            checkpoints,
        })
    }

    /// What an earlier process has left; none if there was none.
    fn load(&self, kafka: &KafkaLog) -> Result<Option<Place>, TargetError> {
        let known = range::partitions(kafka, &self.checkpoints).map_err(|error| not_kept(&self.group, error))?;
        let mut wanted = TopicPartitionList::with_capacity(known.len() + 1);
        wanted.add_partition(&self.checkpoints, 0);
        for (topic, partition) in &known {
            wanted.add_partition(topic, *partition);
        }
        let committed = self
            .consumer
            .committed_offsets(wanted, DEADLINE)
            .map_err(|error| self.failed(&error))?;
        self.place(&committed)
    }

    fn place(&self, committed: &TopicPartitionList) -> Result<Option<Place>, TargetError> {
        let unreadable = |cause: String| TargetError::CheckpointUnreadable {
            place: format!("the consumer group {} of Kafka", self.group),
            cause,
        };
        let mut common = None;
        let (mut partitions, mut next) = (Vec::new(), Vec::new());
        for element in committed.elements() {
            element.error().map_err(|error| self.failed(&error))?;
            let Offset::Offset(offset) = element.offset() else {
                continue;
            };
            let note = element.metadata();
            if element.topic() == self.checkpoints {
                common = Some(serde_json::from_str::<Common>(note).map_err(|error| unreadable(error.to_string()))?);
                continue;
            }
            let topic: Arc<str> = element.topic().into();
            let partition = element.partition();
            let Part { start, end, truncated } =
                serde_json::from_str(note).map_err(|error| unreadable(error.to_string()))?;
            next.push(offset);
            partitions.push(Stretch {
                topic,
                partition,
                start,
                end,
                truncated,
            });
        }
        let Some(common) = common else { return Ok(None) };
        let range = Range {
            partitions,
            ..common.range
        };
        if common.partitions != filled(&range) {
            return Err(unreadable(format!(
                "the range has {} partitions, and {} are left: a topic was deleted",
                common.partitions,
                filled(&range)
            )));
        }
        Ok(Some(Place {
            range: Arc::new(range),
            reached: Reached {
                next,
                done: common.done,
            },
            taken: common.taken,
            attempt: common.attempt,
        }))
    }

    /// Saves a first place, and sees that it can be read again: an answer to a commit is an error only if it failed for every partition.
    fn create(&self, place: &Place) -> Result<(), TargetError> {
        let offsets = self.offsets(place).map_err(|error| self.failed(&error))?;
        self.commit(&offsets).map_err(|error| self.failed(&error))?;
        let mut wanted = TopicPartitionList::with_capacity(offsets.count());
        for element in offsets.elements() {
            wanted.add_partition(element.topic(), element.partition());
        }
        let committed = self
            .consumer
            .committed_offsets(wanted, DEADLINE)
            .map_err(|error| self.failed(&error))?;
        match self.place(&committed)? {
            Some(_) => Ok(()),
            None => Err(not_kept(&self.group, "what was committed is not there")),
        }
    }

    fn save(&self, place: &Place) -> Result<(), KafkaError> {
        self.commit(&self.offsets(place)?)
    }

    fn commit(&self, offsets: &TopicPartitionList) -> Result<(), KafkaError> {
        let committed = self.consumer.commit(offsets, CommitMode::Sync);
        // What the client has to say of its connections goes to the log, and must not pile up.
        while self.consumer.poll(Duration::ZERO).is_some() {}
        committed
    }

    fn offsets(&self, place: &Place) -> Result<TopicPartitionList, KafkaError> {
        let range = &place.range;
        let mut offsets = TopicPartitionList::with_capacity(range.partitions.len() + 1);
        let mut add = |topic: &str, partition, offset, note: serde_json::Result<String>| {
            let mut element = offsets.add_partition(topic, partition);
            element.set_offset(Offset::Offset(offset))?;
            // Nothing here has no form in JSON; if it had, it would be found out when it is read again.
            element.set_metadata(note.unwrap_or_else(|error| error.to_string()));
            Ok::<_, KafkaError>(())
        };
        let common = Common {
            range: Range {
                partitions: Vec::new(),
                ..Range::clone(range)
            },
            partitions: filled(range),
            done: place.reached.done,
            taken: place.taken,
            attempt: place.attempt,
        };
        add(&self.checkpoints, 0, 0, serde_json::to_string(&common))?;
        for (stretch, next) in range.partitions.iter().zip(&place.reached.next) {
            let part = Part {
                start: stretch.start,
                end: stretch.end,
                truncated: stretch.truncated,
            };
            add(&stretch.topic, stretch.partition, *next, serde_json::to_string(&part))?;
        }
        Ok(offsets)
    }

    fn failed(&self, error: &KafkaError) -> TargetError {
        match error.rdkafka_error_code() {
            Some(RDKafkaErrorCode::GroupAuthorizationFailed) => TargetError::GroupForbidden {
                group: self.group.clone(),
            },
            _ => not_kept(&self.group, error),
        }
    }
}

fn filled(range: &Range) -> usize {
    range.partitions.iter().filter(|stretch| !stretch.is_empty()).count()
}

fn not_kept(group: &str, cause: impl std::fmt::Display) -> TargetError {
    TargetError::PlaceNotKept {
        group: group.to_owned(),
        cause: cause.to_string(),
    }
}

#[cfg(test)]
mod tests {
    use bytes::Bytes;

    use super::*;
    use crate::replay::record::{Coordinate, Passed};

    fn place() -> Place {
        let stretch = |partition| Stretch {
            topic: "shop.public.trades".into(),
            partition,
            start: 10,
            end: 1000,
            truncated: false,
        };
        Place::of_the_first_attempt(Checkpoint::at_the_start_of(Range {
            from: None,
            to: None,
            first: None,
            end: Some("1:0/50:9".parse().unwrap()),
            high_time: 0,
            partitions: vec![stretch(0), stretch(1)],
            missing: None,
        }))
    }

    fn batch(records: &[(i32, i64)]) -> Batch {
        let record = |(number, (partition, offset)): (usize, &(i32, i64))| Record {
            coordinate: Coordinate {
                position: format!("1:0/{offset:X}:{number}").parse().unwrap(),
                part: 0,
            },
            timestamp: 1,
            commit_time: 1000,
            topic: "shop.public.trades".into(),
            partition: *partition,
            offset: *offset,
            key: Bytes::new(),
            value: Bytes::new(),
            passed: Passed::default(),
            next: (usize::try_from(*partition).unwrap(), offset + 1),
            others: Vec::new(),
            headers: Vec::new(),
        };
        let records: Vec<_> = records.iter().enumerate().map(record).collect();
        let mark = Mark {
            records: u64::try_from(records.len()).unwrap(),
            passed: Passed::default(),
            first_time: 1000,
            last_time: 1000,
            resume: ResumeToken::from(records.last().unwrap()),
            handed: Instant::now(),
        };
        Batch {
            records,
            whole: true,
            mark,
        }
    }

    #[test]
    fn the_place_moves_by_what_was_taken_and_never_by_what_was_only_handed_over() {
        // Five were delivered by an earlier process.
        let mut diary = Diary::new(place(), 5);
        diary.hand(&batch(&[(0, 10), (1, 12), (0, 14)]));
        diary.hand(&batch(&[(1, 20)]));
        assert!(!diary.take(5) && !diary.take(7));
        let reached = &diary.place.reached;
        assert_eq!((reached.next.as_slice(), reached.done), (&[10, 10][..], None));
        assert!(diary.take(8));
        assert_eq!(diary.place.reached.next, [15, 13]);
        assert_eq!(
            diary.place.reached.done.unwrap().resume.coordinate.position.to_string(),
            "1:0/E:2"
        );
        assert!(diary.take(9) && !diary.take(9));
        assert_eq!(diary.place.reached.next, [15, 21]);
        assert_eq!(diary.place.range.partitions[0].start, 10, "the range stays as it was");
    }
}

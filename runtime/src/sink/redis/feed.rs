//! Keeps Redis fed, for as long as a session lives.
//!
//! Redis is attached while it is written to from the live buffer. After any failure, and at the start, the buffer begins to collect,
//! Redis is brought to where the buffer begins by copying from Kafka what it lacks, and goes on from the buffer; if the buffer was
//! full by then, the same again. Neither gap nor double is possible: what is copied ends at or after the first change that the buffer
//! has, what is in the buffer and copied already is passed over, and the mark admits only what follows it.

use std::{sync::Arc, time::Duration};

use backon::{BackoffBuilder as _, ExponentialBuilder};
use meander_config::{CaptureConfig, RedisSink as Config};
use meander_traces::step;
use prometheus::{IntCounter, IntCounterVec, IntGauge};
use tokio::{
    sync::watch,
    time::{Instant, sleep, timeout},
};
use tracing::field::Empty;

use crate::{
    batch::Batch,
    log::{Checkpoint, checkpoint_key, checkpoint_topic},
    position::{Epoch, Lsn, Position},
    sink::{
        Durable, SinkError,
        redis::{
            Entry, Rival, TAKEN_BYTES, Writer,
            live::{Live, Taken},
            refill::{Source, missing},
            said,
        },
    },
};

/// How often it is looked whether Redis is as it was left, while there is nothing to write.
const CHECK_INTERVAL: Duration = Duration::from_secs(3);
/// How often the settings of the server are looked at, whether or not there is something to write. That takes it a tenth of a millisecond.
const SERVER_CHECK_INTERVAL: Duration = Duration::from_secs(10);
/// Pauses between two tries to reach Redis.
const SHORTEST_PAUSE: Duration = Duration::from_millis(250);
const LONGEST_PAUSE: Duration = Duration::from_secs(10);
/// An attachment that lived this long was a success, after which the pauses start short again.
const HEALTHY: Duration = Duration::from_secs(10);

/// How Redis is doing.
#[derive(Clone, Debug, Default)]
pub struct Progress {
    /// How far it has come. While it is not attached, that is a place in the past.
    pub durable: Durable,
    /// Whether it gets changes as they come.
    pub state: State,
    /// What went wrong last, whether or not it is mended.
    pub last_error: Option<Arc<SinkError>>,
    /// What a person has to know of entries that stand for nothing.
    pub phantoms: Option<String>,
}

impl Progress {
    /// A later owner has the mark.
    pub(in crate::sink) fn is_taken(&self) -> bool {
        let is_told = matches!(self.last_error.as_deref(), Some(SinkError::RedisTaken(_)));
        self.state == State::Taken || self.state == State::Detached && is_told
    }
}

/// Whether Redis gets changes as they come.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub enum State {
    /// It was not tried yet.
    #[default]
    Starting,
    /// It does.
    Attached,
    /// It gets from Kafka what it lacks.
    Refilling,
    /// A later owner writes to it. Most often that one has taken over, which Kafka is asked.
    Taken,
    /// It gets nothing; [`Progress::last_error`] is why.
    Detached,
}

/// What the feed counts.
#[derive(Clone)]
pub struct Metrics {
    /// 1 while Redis is attached.
    pub attached: IntGauge,
    /// Entries copied from Kafka.
    pub refilled: IntCounter,
    /// Times that Redis was detached, by reason.
    pub detachments: IntCounterVec,
}

/// The one who writes to Redis.
pub struct Feed {
    config: Config,
    pipeline: String,
    generation: u64,
    source: Source,
    live: Live,
    kafka: watch::Receiver<Durable>,
    log: watch::Receiver<Checkpoint>,
    progress: watch::Sender<Progress>,
    metrics: Metrics,
    rival: Rival,
    /// The log as the session found it, where Redis has only that to catch up with as long as the buffer holds all that came since. None where
    /// timelines have parted: what Kafka will never have is known later.
    beginning: Option<Checkpoint>,
    /// The last change that Redis is known to have had.
    acknowledged: Option<Position>,
    /// A gap that nobody has accepted yet, so that it is not counted again and again.
    gap: Option<(Option<Position>, u64)>,
    /// A later owner has taken Redis, and Kafka takes transactions all the same.
    owns_the_log: bool,
}

impl Feed {
    /// The feed of a session: `live` is what is offered to it, `kafka` how far Kafka has come, `log` the committed checkpoints.
    #[must_use]
    pub fn new(
        capture: &CaptureConfig,
        config: &Config,
        live: Live,
        kafka: watch::Receiver<Durable>,
        log: watch::Receiver<Checkpoint>,
        metrics: Metrics,
        rival: Rival,
    ) -> (Self, watch::Receiver<Progress>) {
        let (namespace, name) = (&capture.pipeline.namespace, &capture.pipeline.name);
        let checkpoint = log.borrow().clone();
        // Streams under another prefix are new ones.
        let acknowledged = (checkpoint.redis.as_ref())
            .filter(|redis| redis.stream_prefix == config.stream_prefix)
            .map(|redis| redis.position);
        let (progress, watched) = watch::channel(Progress {
            durable: Durable {
                position: acknowledged,
                ..Durable::default()
            },
            ..Progress::default()
        });
        let feed = Self {
            pipeline: checkpoint_key(namespace, name, &capture.source.slot_name),
            generation: checkpoint.owner_generation,
            source: Source {
                kafka: capture.kafka.log(),
                checkpoint_topic: checkpoint_topic(namespace, name),
                group: format!("meander-refill.{namespace}.{name}"),
                stream_prefix: config.stream_prefix.clone(),
            },
            config: config.clone(),
            live,
            kafka,
            log,
            progress,
            metrics,
            rival,
            beginning: checkpoint.partings.is_empty().then_some(checkpoint),
            acknowledged,
            gap: None,
            owns_the_log: false,
        };
        (feed, watched)
    }

    /// Feeds Redis until nothing more is offered. What is in the buffer then is written if Redis is attached; otherwise the next
    /// session refills it.
    pub async fn run(mut self) {
        let live = self.live.clone();
        let new_pauses = || {
            ExponentialBuilder::default()
                .with_min_delay(SHORTEST_PAUSE)
                .with_max_delay(LONGEST_PAUSE)
                .with_jitter()
                .without_max_times()
                .build()
        };
        let mut pauses = new_pauses();
        loop {
            let started = Instant::now();
            let ended = tokio::select! {
                ended = self.feed() => ended,
                () = live.abandoned() => return,
            };
            live.detach();
            let Err(error) = ended else { return };
            if matches!(error, SinkError::RedisTaken(_)) && !self.owns_the_log {
                self.owns_the_log = tokio::select! {
                    goes_on = self.log_goes_on() => goes_on,
                    () = live.abandoned() => false,
                };
                if !self.owns_the_log {
                    return;
                }
            }
            self.detached(error);
            if started.elapsed() >= HEALTHY {
                pauses = new_pauses();
            }
            tokio::select! {
                () = sleep(pauses.next().unwrap_or(LONGEST_PAUSE)) => {}
                () = live.abandoned() => return,
            }
        }
    }

    /// Finds out by Kafka's transactions whether a later owner has taken over, which takes Kafka before it takes Redis: then the session ends.
    async fn log_goes_on(&mut self) -> bool {
        tracing::info!("a later owner writes to Redis: Kafka is asked whether it has taken over");
        self.metrics.attached.set(0);
        self.progress.send_modify(|progress| progress.state = State::Taken);
        self.log.mark_unchanged();
        // The first may have been committed before the later owner came.
        self.log.changed().await.is_ok() && self.log.changed().await.is_ok()
    }

    /// Brings Redis to where the buffer begins, and goes on from the buffer, until nothing more is offered.
    async fn feed(&mut self) -> Result<(), SinkError> {
        let mut writer = Writer::open(&self.config, &self.pipeline, self.generation, &self.rival).await?;
        self.check_gap(&writer)?;
        if writer.place.position < self.acknowledged {
            self.detached(SinkError::RedisLost {
                found: said(writer.place.position),
                expected: said(self.acknowledged),
            });
            self.acknowledged = writer.place.position;
        }
        loop {
            let beginning = self.beginning.take().filter(|_| self.live.has_all());
            let (log, kafka) = match beginning {
                Some(log) => {
                    let kafka = Durable {
                        position: log.published,
                        safe: log.acknowledged,
                        batches: 0,
                    };
                    (log, kafka)
                }
                None => match self.collect().await {
                    Some(both) => both,
                    None => return Ok(()),
                },
            };
            self.bring_up(&mut writer, &log).await?;
            if !self.live.attach() {
                continue;
            }
            self.attached(&writer, kafka);
            if self.go_on(&mut writer).await? {
                return Ok(());
            }
        }
    }

    /// Begins to collect, and waits until the log has what was offered before. None when Kafka's sink has ended.
    async fn collect(&mut self) -> Option<(Checkpoint, Durable)> {
        let offered = self.live.collect();
        // Until Kafka has all that there is of an epoch before, nobody knows which of Redis's entries it lacks for ever.
        let parted = self
            .log
            .borrow()
            .partings
            .last()
            .map_or(Lsn::ZERO, |parting| parting.at);
        // Kafka's place is told after the checkpoint that holds it, so the checkpoint that is read second has it too.
        let kafka = self
            .kafka
            .wait_for(|kafka| kafka.position >= offered && kafka.safe >= parted)
            .await
            .map(|kafka| *kafka)
            .ok()?;
        Some((self.log.borrow().clone(), kafka))
    }

    /// Copies what Redis lacks of the log. Afterwards Redis has every change that the log counts, or an error says what is missing.
    async fn bring_up(&mut self, writer: &mut Writer, log: &Checkpoint) -> Result<(), SinkError> {
        let position = writer.place.position;
        if position > log.published && position.is_some_and(|position| position.epoch >= Epoch(log.epoch)) {
            // It is ahead: the WAL will bring the same changes again, and Kafka will have them then. What it had of an earlier epoch
            // nobody brings again: that slot or that server is gone, and only the count is put right.
            return Ok(());
        }
        if let Some(parting) = position.and_then(|position| log.lost_with(position)) {
            // The time of what was lost says nothing of when the others came.
            let time = parting.high_time_micros.div_euclid(1000);
            writer.place.timestamp_millis = writer.place.timestamp_millis.min(Some(time));
        }
        let result = async {
            if position < log.published {
                let (progress, metrics) = (&self.progress, &self.metrics);
                let copied = |writer: &Writer, count: usize| {
                    metrics.refilled.inc_by(count as u64);
                    progress.send_modify(|progress| {
                        progress.state = State::Refilling;
                        progress.durable.position = writer.confirmed;
                    });
                };
                let from = said(writer.place.position);
                let span = step!("refill Redis", from, to = log.published.map(display), records = Empty);
                let before = writer.place.records;
                step(span.clone(), self.source.refill(writer, log, copied)).await?;
                span.record("records", writer.place.records.saturating_sub(before));
            }
            missing(writer, log, 0).await
        }
        .await;
        if let Err(SinkError::RedisGap { missing, .. }) = &result {
            self.gap = Some((writer.place.position, *missing));
        }
        self.acknowledged = self.acknowledged.max(writer.confirmed);
        result
    }

    /// A gap stays one until somebody accepts it or Redis changes: only that is looked at, since counting reads all of the log.
    fn check_gap(&mut self, writer: &Writer) -> Result<(), SinkError> {
        match self.gap {
            Some((position, missing)) if position == writer.place.position && writer.place.accept != Some(missing) => {
                Err(writer.gap(missing))
            }
            _ => {
                self.gap = None;
                Ok(())
            }
        }
    }

    /// Writes from the buffer. True at its end, false when it overflowed.
    async fn go_on(&mut self, writer: &mut Writer) -> Result<bool, SinkError> {
        // Of what was written, whether or not it is confirmed.
        let mut safe = Lsn::ZERO;
        let mut server_checked = Instant::now();
        loop {
            if server_checked.elapsed() >= SERVER_CHECK_INTERVAL {
                writer.check_server().await?;
                server_checked = Instant::now();
            }
            let Ok(taken) = timeout(CHECK_INTERVAL, self.live.take(TAKEN_BYTES)).await else {
                writer.check().await?;
                self.progress.send_if_modified(|progress| {
                    let phantoms = writer.phantoms();
                    let modified = progress.phantoms != phantoms;
                    progress.phantoms = phantoms;
                    modified
                });
                continue;
            };
            let (batches, number) = match taken {
                Taken::Batches(batches, number) => (batches, number),
                Taken::Closed => return Ok(true),
                Taken::Overflowed => {
                    self.detached(SinkError::RedisSlow);
                    return Ok(false);
                }
            };
            // Together, since a call costs as much as tens of records: but what waits for Kafka does not hold up what came before it.
            for batches in batches.chunk_by(|_, next| !next.kafka_first) {
                if let Some(first) = batches.first()
                    && first.kafka_first
                    && self
                        .kafka
                        .wait_for(|kafka| kafka.position >= first.last())
                        .await
                        .is_err()
                {
                    // Kafka took all it will, and the session is at its end.
                    return Ok(true);
                }
                let entries = entries(batches, writer.place.position);
                let writing = writer.append(&entries);
                tokio::pin!(writing);
                // A Redis that hangs is said to be slow once the buffer is full; whether it answers in the end is another thing.
                tokio::select! {
                    written = &mut writing => written?,
                    () = self.live.overflowed() => {
                        self.detached(SinkError::RedisSlow);
                        return writing.await.map(|()| false);
                    }
                }
                safe = batches.iter().map(|batch| batch.safe).fold(safe, Lsn::max);
            }
            if self.live.is_empty() {
                writer.confirm().await?;
            } else if !writer.confirm_some().await? {
                continue;
            }
            self.acknowledged = writer.confirmed;
            self.progress.send_modify(|progress| {
                progress.phantoms = writer.phantoms();
                progress.durable.position = writer.confirmed;
                progress.durable.safe = progress.durable.safe.max(safe);
                progress.durable.batches = progress.durable.batches.max(number);
            });
        }
    }

    fn attached(&self, writer: &Writer, kafka: Durable) {
        tracing::info!(position = said(writer.place.position), "Redis is attached");
        self.metrics.attached.set(1);
        self.progress.send_modify(|progress| {
            progress.state = State::Attached;
            progress.phantoms = writer.phantoms();
            // What Kafka has, Redis has now.
            progress.durable = Durable {
                position: writer.confirmed,
                safe: kafka.safe.max(progress.durable.safe),
                batches: kafka.batches.max(progress.durable.batches),
            };
        });
    }

    fn detached(&self, error: SinkError) {
        tracing::warn!(%error, reason = error.reason(), "Redis is detached");
        self.metrics.attached.set(0);
        self.metrics.detachments.with_label_values(&[error.reason()]).inc();
        self.progress.send_modify(|progress| {
            progress.state = State::Detached;
            progress.last_error = Some(Arc::new(error));
        });
    }
}

impl Drop for Feed {
    fn drop(&mut self) {
        self.metrics.attached.set(0);
    }
}

/// The records of batches that Redis does not have yet.
fn entries(batches: &[Arc<Batch>], after: Option<Position>) -> Vec<Entry<'_>> {
    let records = batches
        .iter()
        .flat_map(|batch| batch.records().iter().map(move |record| (batch, record)));
    let new = records.filter(|(_, record)| Some(record.position) > after);
    new.map(|(batch, record)| Entry {
        stream: &record.destination.stream,
        position: record.position,
        part: record.part,
        timestamp_millis: record.timestamp_millis,
        key: batch.key(record),
        value: batch.value(record),
        headers: batch.headers(record).collect(),
    })
    .collect()
}

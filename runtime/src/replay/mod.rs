//! Replay: takes a stretch of the log out again, in commit order, at a chosen pace.
//!
//! [`range`] says what is replayed, [`reader`] reads it partition by partition, puts it in order with [`merge`] and gives what the
//! [`filter`] keeps, [`drive`] hands that to a [`target`] when [`pace`] says that it is due, [`orders`] carry pause, speed and cancel,
//! [`tally`] and [`meter`] say how far it is. Here they are joined, and the end of it is told.

pub mod checkpoint;
pub mod drive;
pub mod error;
pub mod filter;
pub mod follow;
pub mod keeper;
pub mod merge;
pub mod meter;
pub mod orders;
pub mod pace;
pub mod patience;
pub mod range;
pub mod reader;
pub mod record;
pub mod seek;
pub mod tally;
pub mod target;
mod word;

use std::{future::pending, pin::pin, sync::Arc, time::Duration};

use jiff::Timestamp;
use meander_config::{ReplayConfig, ReplayEnd, ReplayOrder, ReplayTarget, Speed};
use meander_proto::{
    FinalWord,
    v1::{ReplayProgress, replay_progress::Phase},
};
use meander_traces::step;
use prometheus::{Gauge, IntCounter, IntGauge, Registry, core::Collector};
use tokio::{
    sync::{mpsc, watch},
    task::spawn_blocking,
    time::{sleep, timeout},
};
use tokio_util::sync::CancellationToken;

use self::{
    checkpoint::Checkpoint,
    drive::{Course, Report, drive},
    error::ReplayError,
    filter::Filter,
    follow::Live,
    keeper::{AtLeastOnce, Keeping, Kept, RangeKeeper},
    meter::Meter,
    orders::Orders,
    patience::{PATIENCE, Patience},
    range::{Missing, Range},
    reader::Reading,
    tally::Tally,
    target::{
        Resumable, Target, TargetError, Trouble,
        dry_run::DryRun,
        grpc_call::GrpcCall,
        grpc_serve,
        http::{self, Http},
        kafka::{self, Kafka},
        log::Log,
        postgres::Postgres,
        redis::{self, Redis},
    },
};
use crate::{
    admin::Admin,
    position::Position,
    progress::{self, ConditionType, ProgressReporter},
};

const PAUSING: &str = "Delivery is held as soon as the transaction that is open in the target has come to its end.";

/// How a replay ended, if nothing went wrong.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum End {
    /// Everything in the range is delivered.
    Complete,
    /// It was told to end.
    Cancelled,
}

/// How a range is delivered, wherever it goes.
#[derive(Clone)]
pub struct Plan {
    /// What of it is delivered; none: all.
    pub filter: Option<Arc<Filter>>,
    /// Silences that are longer are cut to this.
    pub max_gap: Option<Duration>,
    /// In which order. Commit order is one in which those of a key are in order, and the one that keeps time.
    pub order: ReplayOrder,
}

impl Plan {
    fn new(config: &ReplayConfig) -> Result<Self, ReplayError> {
        let takes_any_order = matches!(
            config.target,
            ReplayTarget::GrpcCall { .. } | ReplayTarget::Log | ReplayTarget::DryRun
        );
        if config.order != ReplayOrder::Commit && !takes_any_order {
            return Err(ReplayError::CommitOrderNeeded);
        }
        Ok(Self {
            order: config.order,
            filter: config.filter.as_ref().map(Filter::new).transpose()?.map(Arc::new),
            max_gap: config
                .max_gap_seconds
                .map(|seconds| Duration::from_secs(seconds.get().into())),
        })
    }
}

/// Runs a replay to its end, and tells it: to the operator, in the termination message and in the log.
///
/// # Errors
/// When the replay did not come to its end.
pub async fn run(config: ReplayConfig, shutdown: CancellationToken) -> Result<End, ReplayError> {
    let (reporter, directives, link) = progress::start(&config.job, config.operator.clone());
    let orders = Orders::new(&config, directives);
    // Their names are constants that are valid and differ; if one were not, a replay without metrics is better than none.
    let metrics = Metrics::new()
        .inspect_err(|error| tracing::error!(%error, "there are no metrics"))
        .ok();
    let report = JobReport {
        reporter,
        metrics: metrics.map(Arc::new),
    };
    let job = &config.job;
    let span = step!("replay", namespace = job.namespace, replay = job.name);
    let result = step(span, Box::pin(replay(&config, orders, &report, &shutdown))).await;
    let word = report.conclude(&config, &result);
    if let Some(path) = &config.termination_message_file {
        word::write(path, word).await;
    }
    link.finish().await;
    result
}

async fn replay(
    config: &ReplayConfig,
    orders: Orders,
    report: &JobReport,
    shutdown: &CancellationToken,
) -> Result<End, ReplayError> {
    let (ready, readiness) = watch::channel(false);
    let admin_end = CancellationToken::new();
    let _admin_guard = admin_end.clone().drop_guard();
    let admin = Admin {
        registry: report
            .metrics
            .as_ref()
            .map(|metrics| metrics.registry.clone())
            .unwrap_or_default(),
        ready: readiness,
    };
    let address = config.admin_address;
    admin
        .serve(address, admin_end)
        .await
        .map_err(|source| ReplayError::Listen { address, source })?;

    if config.to == ReplayEnd::Live && !matches!(config.target, ReplayTarget::GrpcServe { .. }) {
        return Err(ReplayError::NobodyFollows);
    }
    let job = Job {
        config,
        plan: Plan::new(config)?,
        orders,
        report,
        ready,
        shutdown,
    };
    match &config.target {
        ReplayTarget::GrpcCall(receiver) => job.deliver_kept::<GrpcCall>(receiver).await,
        ReplayTarget::Log => job.deliver(Log::stdout()).await,
        ReplayTarget::GrpcServe {
            address,
            token_file,
            certificate,
        } => {
            let place = grpc_serve::Place {
                address: *address,
                token_file: token_file.clone(),
                certificate: certificate.clone(),
            };
            job.serve(place).await
        }
        ReplayTarget::Postgres(server) => job.deliver_resumably::<Postgres>(server).await,
        ReplayTarget::Kafka(cluster) => {
            let settings = kafka::Settings {
                cluster: cluster.clone(),
                log_prefix: config.kafka.topic_prefix.clone(),
            };
            job.deliver_resumably::<Kafka>(&settings).await
        }
        ReplayTarget::Redis(streams) => {
            let settings = redis::Settings {
                streams: streams.clone(),
                log_prefix: config.kafka.topic_prefix.clone(),
            };
            job.deliver_resumably::<Redis>(&settings).await
        }
        ReplayTarget::Http(endpoint) => {
            let settings = http::Settings {
                endpoint: endpoint.clone(),
                job: config.job.clone(),
                pipeline: config.pipeline.clone(),
                log: config.kafka.clone(),
            };
            job.deliver_kept::<Http>(&settings).await
        }
        ReplayTarget::DryRun => job.deliver(DryRun).await,
    }
}

/// A replay that is under way.
struct Job<'a> {
    config: &'a ReplayConfig,
    plan: Plan,
    orders: Orders,
    report: &'a JobReport,
    /// Set once there is something to deliver.
    ready: watch::Sender<bool>,
    shutdown: &'a CancellationToken,
}

impl Job<'_> {
    /// Delivers the range to a target that knows nothing of an earlier process of this job.
    async fn deliver<T: Target>(mut self, target: T) -> Result<End, ReplayError> {
        let Some(range) = self.resolve().await? else {
            return Ok(End::Cancelled);
        };
        let meter = Meter::new(&range, Tally::default(), &self.plan);
        self.report.resolved(&range, &meter);
        self.ready.send_replace(true);
        let reads = self.read::<T>(range, false);
        let delivering = drive(
            reads,
            target,
            self.orders,
            meter,
            &self.plan,
            self.report,
            self.shutdown,
        );
        step(step!("deliver"), delivering).await
    }

    /// Serves the range to subscribers.
    async fn serve(mut self, place: grpc_serve::Place) -> Result<End, ReplayError> {
        let Some((range, keeper)) = self.frozen().await? else {
            return Ok(End::Cancelled);
        };
        self.report
            .resolved(&range, &Meter::new(&range, Tally::default(), &self.plan));
        self.ready.send_replace(true);
        let taken = keeper.as_ref().and_then(RangeKeeper::taken);
        let live = (self.config.to == ReplayEnd::Live).then(|| Live::start(self.config, taken));
        let offer = grpc_serve::Offer {
            kafka: self.config.kafka.clone(),
            job: self.config.job.clone(),
            range,
            plan: self.plan,
            orders: self.orders,
            report: self.report.clone(),
            live: live.clone(),
            frozen: keeper.is_some(),
        };
        let keeping = async {
            match keeper {
                Some(keeper) => keeper.keep(live.as_ref().map(Live::taken)).await,
                None => pending().await,
            }
        };
        tokio::select! {
            end = step(step!("serve"), grpc_serve::serve(offer, place, self.shutdown)) => end,
            never = keeping => match never {},
        }
    }

    /// The range of a replay that is served, and who keeps it for the processes that follow; none if the replay is cancelled meanwhile.
    async fn frozen(&mut self) -> Result<Option<(Range, Option<RangeKeeper>)>, ReplayError> {
        // As in `deliver_kept`.
        if self.config.job.uid.is_empty() {
            return Ok(self.resolve().await?.map(|range| (range, None)));
        }
        let config = self.config;
        let open = RangeKeeper::open(&config.kafka, &config.pipeline, &config.job);
        let Some(keeper) = self.unless_told(OPENING, open).await? else {
            return Ok(None);
        };
        let mut keeper = keeper?;
        if let Some(range) = keeper.range() {
            return Ok(Some((range.clone(), Some(keeper))));
        }
        let Some(range) = self.resolve().await? else {
            return Ok(None);
        };
        keeper.begin(&range).await?;
        Ok(Some((range, Some(keeper))))
    }

    /// Delivers the range to a target for which it is kept how far it is.
    async fn deliver_kept<T: AtLeastOnce<Settings: Clone>>(self, settings: &T::Settings) -> Result<End, ReplayError> {
        // Without a UID nobody can tell this replay from an earlier one of its name, which it must not go on with.
        if self.config.job.uid.is_empty() {
            return self.deliver(T::new(settings, 1)).await;
        }
        let keeping = Keeping {
            kafka: self.config.kafka.clone(),
            pipeline: self.config.pipeline.clone(),
            target: settings.clone(),
            ending: self.shutdown.clone(),
        };
        self.deliver_resumably::<Kept<T>>(&keeping).await
    }

    /// Delivers the range to a target that knows how far it is, in sessions: whatever befalls the target ends one, and the next goes on
    /// from what the target has, as after a crash.
    async fn deliver_resumably<T: Resumable>(mut self, settings: &T::Settings) -> Result<End, ReplayError> {
        let mut patience = Patience::default();
        let mut reached = None;
        let tally = Tally::default();
        loop {
            let error = match Box::pin(self.session::<T>(settings, &tally)).await {
                Err(ReplayError::Target(error)) if error.is_passing() => error,
                ended => return ended,
            };
            if let Some(now) = tally.counts().coordinate
                && reached.replace(now) != Some(now)
            {
                patience.renew();
            }
            let failed = Trouble {
                reason: error.reason(),
                message: format!("{error}. It is tried again."),
            };
            // It is over when something gets into the target.
            let Some(pause) = patience.failed(failed, |failed| tally.set_trouble(Some(failed))) else {
                return Err(error.into());
            };
            let trouble = tally.trouble();
            let standing = trouble.as_ref().map_or(OPENING, Standing::because);
            if self.unless_told(standing, sleep(pause)).await?.is_none() {
                return Ok(End::Cancelled);
            }
        }
    }

    async fn session<T: Resumable>(&mut self, settings: &T::Settings, tally: &Tally) -> Result<End, ReplayError> {
        let trouble = tally.trouble();
        let standing = trouble.as_ref().map_or(OPENING, Standing::because);
        let opening = step(step!("open target"), answered(T::open(settings, &self.config.job)));
        let Some(opened) = self.unless_told(standing, opening).await? else {
            return Ok(End::Cancelled);
        };
        let (mut target, checkpoint) = opened?;
        let checkpoint = match checkpoint {
            Some(checkpoint) => checkpoint,
            None => {
                let Some(range) = self.resolve().await? else {
                    return Ok(End::Cancelled);
                };
                let checkpoint = Checkpoint::at_the_start_of(range);
                let Some(begun) = self.unless_told(standing, answered(target.begin(&checkpoint))).await? else {
                    return Ok(End::Cancelled);
                };
                begun?;
                checkpoint
            }
        };
        let (range, done, rest) = (&checkpoint.range, checkpoint.reached.done, checkpoint.rest());
        if let Some(done) = &done {
            tracing::info!(after = %done.resume.coordinate, delivered = done.delivered, "going on");
        }
        tally.begin(done.as_ref(), range.offsets().saturating_sub(rest.offsets()));
        let meter = Meter::new(range, tally.clone(), &self.plan);
        self.report.resolved(range, &meter);
        self.ready.send_replace(true);
        let reads = self.read::<T>(rest, true);
        let orders = self.orders.clone();
        let delivering = drive(reads, target, orders, meter, &self.plan, self.report, self.shutdown);
        step(step!("deliver"), delivering).await
    }

    /// Starts to read what is left of the range. `places` says whether the target keeps how far each partition is.
    fn read<T: Target>(&mut self, range: Range, places: bool) -> mpsc::Receiver<Result<reader::Read, ReplayError>> {
        let per_key = self.plan.order == ReplayOrder::PerKey;
        let reading = Reading {
            range,
            after: None,
            filter: self.plan.filter.clone(),
            side_by_side: per_key && (!T::PACED || self.orders.current().speed == Speed::Max),
            places,
        };
        reader::start(&self.config.kafka, &self.config.job, reading)
    }

    /// The range; none if the replay is cancelled meanwhile.
    async fn resolve(&mut self) -> Result<Option<Range>, ReplayError> {
        let stop = CancellationToken::new();
        let _stop_on_return = stop.clone().drop_guard();
        let config = self.config.clone();
        let resolving = async {
            spawn_blocking(move || range::resolve(&config, &stop))
                .await
                .map_err(|_| ReplayError::TaskStopped("resolving the range"))?
        };
        self.unless_told(RESOLVING, step(step!("resolve range"), resolving))
            .await?
            .transpose()
    }

    /// What comes of `doing`, while which the state says how the replay stands; none if it is cancelled meanwhile.
    async fn unless_told<T>(
        &mut self,
        standing: Standing<'_>,
        doing: impl Future<Output = T>,
    ) -> Result<Option<T>, ReplayError> {
        let mut doing = pin!(doing);
        let mut order = self.orders.current();
        while !order.cancel {
            self.report.stands(order.paused, standing);
            tokio::select! {
                done = &mut doing => return Ok(Some(done)),
                changed = self.orders.changed() => order = changed,
                () = self.shutdown.cancelled() => return Err(ReplayError::Interrupted),
            }
        }
        Ok(None)
    }
}

/// What a target says, if it does.
async fn answered<T>(asked: impl Future<Output = Result<T, TargetError>>) -> Result<T, TargetError> {
    let answer = timeout(PATIENCE, asked).await;
    answer.unwrap_or(Err(TargetError::Silent { waited: PATIENCE }))
}

/// How a replay stands while nothing can be delivered.
#[derive(Clone, Copy)]
struct Standing<'a> {
    /// Whether that is its course, and not for something that is wrong.
    progressing: bool,
    reason: &'static str,
    message: &'a str,
}

const OPENING: Standing<'_> = Standing {
    progressing: false,
    reason: "Opening",
    message: "The target is opened, and it is looked up how far the replay is.",
};
const RESOLVING: Standing<'_> = Standing {
    progressing: true,
    reason: "Resolving",
    message: "Kafka is asked where the range begins and ends.",
};
const UNATTENDED: Standing<'_> = Standing {
    progressing: true,
    reason: "WaitingForSubscriber",
    message: "No subscriber has come yet.",
};

impl<'a> Standing<'a> {
    fn because(trouble: &'a Trouble) -> Self {
        Self {
            progressing: false,
            reason: trouble.reason,
            message: &trouble.message,
        }
    }
}

/// Where the state of the job is kept: for the operator, the metrics and the final word.
#[derive(Clone)]
pub struct JobReport {
    reporter: ProgressReporter<ReplayProgress>,
    metrics: Option<Arc<Metrics>>,
}

impl JobReport {
    /// Nobody is there to take it.
    pub fn unattended(&self, paused: bool) {
        self.stands(paused, UNATTENDED);
    }

    /// Nothing is delivered at the moment.
    fn stands(&self, paused: bool, standing: Standing<'_>) {
        let Standing {
            progressing,
            reason,
            message,
        } = standing;
        self.reporter.update(|state| {
            let progress = &mut state.progress;
            progress.set_phase(if paused { Phase::Paused } else { Phase::Pending });
            progress.events_per_second = 0.0;
            progress.actual_speed = 0.0;
            progress.behind_millis = 0;
            progress.eta_seconds = 0;
            state
                .conditions
                .set(ConditionType::Progressing, progressing && !paused, reason, message);
        });
        self.measure(&self.reporter.state().progress);
    }

    fn resolved(&self, range: &Range, meter: &Meter) {
        tracing::info!(
            from = range.from.map(|from| micros(from.saturating_mul(1000))),
            first = range.first.map(|first| first.to_string()),
            to = micros(range.end_time()),
            end = range.end.map(|end| end.to_string()),
            partitions = range.partitions.iter().filter(|stretch| !stretch.is_empty()).count(),
            offsets = range.offsets(),
            "the range is resolved"
        );
        let progress = meter.at_the_start(self.reporter.state().progress.phase());
        self.reporter.update(|state| state.progress = progress);
        let missing = match &range.missing {
            None => return,
            Some(Missing::Before(timestamp)) => format!(
                "Kafka has deleted the start of the range; it is whole from {} on. Give the topics a longer retention, or replay from there.",
                micros(timestamp.saturating_mul(1000))
            ),
            Some(Missing::Unknown {
                topic,
                partition,
                others,
            }) => format!(
                "Kafka has deleted everything in partition {partition} of {topic} (and {others} more like it), so nobody can say whether \
                 some of it was in the range; give the topics a longer retention."
            ),
        };
        tracing::warn!(message = missing, "the range is truncated");
        self.reporter.update(|state| {
            state
                .conditions
                .set(ConditionType::TruncatedRange, true, "RetentionPassed", missing)
        });
    }

    fn measure(&self, progress: &ReplayProgress) {
        if let Some(metrics) = &self.metrics {
            metrics.set(progress);
        }
    }

    /// Sets the last state, and says it.
    fn conclude(&self, config: &ReplayConfig, result: &Result<End, ReplayError>) -> FinalWord {
        let (phase, reason, message) = match result {
            Ok(End::Complete) => {
                let state = self.reporter.state();
                let truncated = state.conditions.get(ConditionType::TruncatedRange);
                let (reason, message) = completion(config, &state.progress, truncated.is_some());
                (Some(Phase::Succeeded), reason, message)
            }
            Ok(End::Cancelled) => (
                Some(Phase::Cancelled),
                "Cancelled",
                "The replay was told to end.".to_owned(),
            ),
            // It goes on when the process is started again.
            Err(error @ ReplayError::Interrupted) => (None, error.reason(), error.to_string()),
            Err(error) => (Some(Phase::Failed), error.reason(), error.to_string()),
        };
        self.reporter.update(|state| {
            if let Some(phase) = phase {
                state.progress.set_phase(phase);
            }
            state.progress.eta_seconds = 0;
            state.progress.behind_millis = 0;
            state
                .conditions
                .set(ConditionType::Progressing, false, reason, message.clone());
            match phase {
                Some(Phase::Succeeded) => {
                    state.progress.percent = 100.0;
                    state.progress.percent_by_events = 100.0;
                    state
                        .conditions
                        .set(ConditionType::Complete, true, reason, message.clone());
                }
                Some(Phase::Failed) => state
                    .conditions
                    .set(ConditionType::Failed, true, reason, message.clone()),
                _ => {}
            }
        });
        let state = self.reporter.state();
        self.measure(&state.progress);
        let truncated = state.conditions.get(ConditionType::TruncatedRange);
        let word = FinalWord {
            phase: phase_name(state.progress.phase()).to_owned(),
            reason: reason.to_owned(),
            message,
            truncated: truncated.map(|truncated| truncated.message.clone()).unwrap_or_default(),
            progress: state.progress,
        };
        let progress = &word.progress;
        tracing::info!(
            phase = word.phase,
            delivered = progress.delivered,
            position = progress.current_position,
            first_event_time = (progress.delivered > 0).then(|| micros(progress.first_event_time_micros)),
            last_event_time = (progress.delivered > 0).then(|| micros(progress.current_time_micros)),
            delivery_seconds = progress.delivery_micros as f64 / 1e6,
            reason,
            "the replay ended"
        );
        word
    }
}

impl Report for JobReport {
    fn progress(&self, progress: ReplayProgress, course: Course<'_>) {
        self.measure(&progress);
        let judged = match (course, progress.phase()) {
            (Course::Troubled(trouble), _) => Some((false, trouble.reason, trouble.message.as_str())),
            (Course::Pausing, _) => Some((true, "Pausing", PAUSING)),
            (Course::Normal, Phase::Running) => Some((true, "Replaying", "Changes are delivered.")),
            (Course::Normal, Phase::Paused) => Some((false, "Paused", "Delivery is held.")),
            (Course::Normal, _) => None,
        };
        self.reporter.update(|state| {
            if let Some((progressing, reason, message)) = judged {
                state
                    .conditions
                    .set(ConditionType::Progressing, progressing, reason, message);
            }
            state.progress = progress;
        });
    }
}

/// What is said of a replay that came to its end: also that there was nothing, or less than was asked for.
fn completion(config: &ReplayConfig, progress: &ReplayProgress, truncated: bool) -> (&'static str, String) {
    let range = progress.resolved_range.as_ref();
    let end = range.map_or(0, |range| range.to_time_micros);
    let last: Option<Position> = range.and_then(|range| range.to_position.parse().ok());
    let asked_for_more = match &config.to {
        ReplayEnd::Time(to) => to.parse::<Timestamp>().is_ok_and(|to| to.as_microsecond() > end),
        ReplayEnd::Position(to) => to.parse::<Position>().is_ok_and(|to| last < Some(to)),
        _ => false,
    };
    let (reason, delivered) = match progress.delivered {
        0 if progress.filtered > 0 => (
            "NothingKept",
            "The filter left out every change of the range, so nothing was delivered.",
        ),
        0 => (
            "NothingInRange",
            "No change was committed in the range, so nothing was delivered.",
        ),
        _ if config.target == ReplayTarget::DryRun => (
            "DryRun",
            "Nothing was delivered: the progress says what would have been.",
        ),
        _ if truncated => (
            "Delivered",
            "What Kafka still holds of the range was delivered; the condition TruncatedRange says what it does not.",
        ),
        _ => ("Delivered", "The whole range was delivered."),
    };
    if asked_for_more && end > 0 {
        let end = micros(end);
        let last = format!("{delivered} The last change in the log when the replay started was committed at {end}.");
        return (reason, last);
    }
    (reason, delivered.to_owned())
}

/// As in `.status.phase`.
fn phase_name(phase: Phase) -> &'static str {
    match phase {
        Phase::Unspecified | Phase::Pending => "Pending",
        Phase::Running => "Running",
        Phase::Paused => "Paused",
        Phase::Succeeded => "Succeeded",
        Phase::Failed => "Failed",
        Phase::Cancelled => "Cancelled",
    }
}

/// RFC 3339; the number itself if no calendar holds it.
fn micros(time: i64) -> String {
    Timestamp::from_microsecond(time).map_or_else(|_| time.to_string(), |time| time.to_string())
}

/// Metrics of a replay.
struct Metrics {
    registry: Registry,
    delivered: IntCounter,
    delivered_bytes: IntCounter,
    filtered: IntCounter,
    records: IntGauge,
    progress: Gauge,
    progress_by_events: Gauge,
    speed: Gauge,
    behind: Gauge,
    event_time: Gauge,
    paused: IntGauge,
}

impl Metrics {
    fn new() -> prometheus::Result<Self> {
        let metrics = Self {
            registry: Registry::new(),
            delivered: IntCounter::new(
                "meander_replay_delivered_records_total",
                "Records that the target has taken.",
            )?,
            delivered_bytes: IntCounter::new(
                "meander_replay_delivered_bytes_total",
                "Bytes of the keys and values that the target has taken.",
            )?,
            filtered: IntCounter::new(
                "meander_replay_filtered_records_total",
                "Records that the filter has left out.",
            )?,
            records: IntGauge::new(
                "meander_replay_records",
                "Records of the range, as an upper bound that falls to their number by the end.",
            )?,
            progress_by_events: Gauge::new(
                "meander_replay_progress_by_events_ratio",
                "How much of the range is behind, by offsets.",
            )?,
            speed: Gauge::new(
                "meander_replay_speed",
                "Event time that is delivered per time, over the last seconds.",
            )?,
            progress: Gauge::new(
                "meander_replay_progress_ratio",
                "How much of the range is delivered, by event time.",
            )?,
            behind: Gauge::new(
                "meander_replay_behind_seconds",
                "How far delivery is behind its schedule.",
            )?,
            event_time: Gauge::new(
                "meander_replay_event_time_seconds",
                "Commit time of the last delivered record.",
            )?,
            paused: IntGauge::new("meander_replay_paused", "1 while delivery is held.")?,
        };
        for collector in metrics.collectors() {
            metrics.registry.register(collector)?;
        }
        Ok(metrics)
    }

    fn collectors(&self) -> Vec<Box<dyn Collector>> {
        vec![
            Box::new(self.delivered.clone()),
            Box::new(self.delivered_bytes.clone()),
            Box::new(self.filtered.clone()),
            Box::new(self.records.clone()),
            Box::new(self.progress_by_events.clone()),
            Box::new(self.speed.clone()),
            Box::new(self.progress.clone()),
            Box::new(self.behind.clone()),
            Box::new(self.event_time.clone()),
            Box::new(self.paused.clone()),
        ]
    }

    fn set(&self, progress: &ReplayProgress) {
        // They can only fall when another subscriber takes the lead.
        for (counter, count) in [
            (&self.delivered, progress.delivered),
            (&self.delivered_bytes, progress.bytes),
            (&self.filtered, progress.filtered),
        ] {
            counter.inc_by(count.saturating_sub(counter.get()));
        }
        self.records.set(i64::try_from(progress.total).unwrap_or(i64::MAX));
        self.progress_by_events.set(progress.percent_by_events / 100.0);
        self.speed.set(progress.actual_speed);
        self.progress.set(progress.percent / 100.0);
        self.behind.set(progress.behind_millis as f64 / 1e3);
        self.event_time.set(progress.current_time_micros as f64 / 1e6);
        self.paused.set(i64::from(progress.phase() == Phase::Paused));
    }
}

#[cfg(test)]
mod tests {
    #![allow(clippy::unwrap_used)]
    use meander_test_support::instrumentation::assert_documented;

    use super::*;

    #[test]
    fn every_metric_is_documented_and_there_are_no_others() {
        assert_documented("meander_replay_", &Metrics::new().unwrap().collectors());
    }
}

//! Replay: takes a stretch of the log out again, in commit order, at a chosen pace.
//!
//! [`range`] says what is replayed, [`reader`] reads it partition by partition and puts it in order with [`merge`], [`drive`]
//! hands it to a [`target`] when [`pace`] says that it is due, [`orders`] carry pause, speed and cancel, [`meter`] says how far
//! it is. Here they are joined, and the end of it is told.

pub mod drive;
pub mod error;
pub mod merge;
pub mod meter;
pub mod orders;
pub mod pace;
pub mod range;
pub mod reader;
pub mod record;
pub mod seek;
pub mod target;

use std::{path::Path, sync::Arc, time::Duration};

use jiff::Timestamp;
use meander_config::{ReplayConfig, ReplayEnd, ReplayTarget};
use meander_proto::v1::{ReplayProgress, replay_progress::Phase};
use prometheus::{Gauge, IntCounter, IntGauge, Registry};
use serde::Serialize;
use tokio::{sync::watch, task::spawn_blocking};
use tokio_util::sync::CancellationToken;

use self::{
    drive::{Report, drive},
    error::ReplayError,
    meter::Meter,
    orders::Orders,
    range::Range,
    target::{Target, grpc_call::GrpcCall, grpc_serve, log::Log},
};
use crate::{
    admin::Admin,
    progress::{self, ConditionType, ProgressReporter},
};

/// Kubernetes keeps 4096 bytes of a termination message.
const LONGEST_MESSAGE: usize = 2048;

/// How a replay ended, if nothing went wrong.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum End {
    /// Everything in the range is delivered.
    Complete,
    /// It was told to end.
    Cancelled,
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
    let result = replay(&config, orders, &report, &shutdown).await;
    let word = report.conclude(&config, &result);
    if let Some(path) = &config.termination_message_file {
        write_word(path, &word).await;
    }
    link.finish().await;
    result
}

async fn replay(
    config: &ReplayConfig,
    mut orders: Orders,
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

    report.resolving(orders.current().paused);
    let Some(range) = resolve(config, &mut orders, shutdown).await? else {
        return Ok(End::Cancelled);
    };
    report.resolved(&range);
    ready.send_replace(true);

    match &config.target {
        ReplayTarget::GrpcCall { endpoint } => {
            deliver(config, range, GrpcCall::new(endpoint.clone()), orders, report, shutdown).await
        }
        ReplayTarget::Log => deliver(config, range, Log::stdout(), orders, report, shutdown).await,
        ReplayTarget::GrpcServe { address, token_file } => {
            let offer = grpc_serve::Offer {
                kafka: config.kafka.clone(),
                job: config.job.clone(),
                range,
                orders,
                report: report.clone(),
            };
            grpc_serve::serve(offer, *address, token_file.clone(), shutdown).await
        }
    }
}

/// The range; none if the replay is cancelled meanwhile.
async fn resolve(
    config: &ReplayConfig,
    orders: &mut Orders,
    shutdown: &CancellationToken,
) -> Result<Option<Range>, ReplayError> {
    let stop = CancellationToken::new();
    let _stop_on_return = stop.clone().drop_guard();
    let config = config.clone();
    let mut resolving = spawn_blocking(move || range::resolve(&config, &stop));
    let mut order = orders.current();
    while !order.cancel {
        tokio::select! {
            range = &mut resolving => {
                return range.map_err(|_| ReplayError::TaskStopped("resolving the range"))?.map(Some);
            }
            changed = orders.changed() => order = changed,
            () = shutdown.cancelled() => return Err(ReplayError::Interrupted),
        }
    }
    Ok(None)
}

/// One delivery of the range to one target.
async fn deliver(
    config: &ReplayConfig,
    range: Range,
    target: impl Target,
    orders: Orders,
    report: &JobReport,
    shutdown: &CancellationToken,
) -> Result<End, ReplayError> {
    let meter = Meter::new(&range);
    let reads = reader::start(&config.kafka, &config.job, range, None);
    drive(reads, target, orders, meter, report, shutdown).await
}

/// Where the state of the job is kept: for the operator, the metrics and the final word.
#[derive(Clone)]
pub struct JobReport {
    reporter: ProgressReporter<ReplayProgress>,
    metrics: Option<Arc<Metrics>>,
}

impl JobReport {
    /// The range is being resolved.
    fn resolving(&self, paused: bool) {
        self.waiting(paused, "Resolving", "Kafka is asked where the range begins and ends.");
    }

    /// Nobody is there to take it.
    pub fn unattended(&self, paused: bool) {
        self.waiting(paused, "WaitingForSubscriber", "No subscriber has come yet.");
    }

    fn waiting(&self, paused: bool, reason: &'static str, message: &str) {
        self.reporter.update(|state| {
            state
                .progress
                .set_phase(if paused { Phase::Paused } else { Phase::Pending });
            state
                .conditions
                .set(ConditionType::Progressing, !paused, reason, message.to_owned());
        });
    }

    fn resolved(&self, range: &Range) {
        tracing::info!(
            from = range.from.map(|from| micros(from.saturating_mul(1000))),
            first = range.first.map(|first| first.to_string()),
            to = micros(range.end_time()),
            end = range.end.map(|end| end.to_string()),
            partitions = range.partitions.len(),
            offsets = range.offsets(),
            "the range is resolved"
        );
        let progress = Meter::new(range).report(
            self.reporter.state().progress.phase(),
            Duration::ZERO,
            None,
            tokio::time::Instant::now(),
        );
        self.reporter.update(|state| state.progress = progress);
        if let Some((topic, partition)) = range.emptied.first().filter(|_| range.has_start()) {
            let others = range.emptied.len() - 1;
            self.set_truncated(format!(
                "Kafka has deleted everything in partition {partition} of {topic} (and {others} more like it), so nobody can say \
                 whether some of it was in the range; give the topics a longer retention."
            ));
        }
    }

    fn measure(&self, progress: &ReplayProgress) {
        if let Some(metrics) = &self.metrics {
            metrics.set(progress);
        }
    }

    fn set_truncated(&self, message: String) {
        tracing::warn!(message, "the range is truncated");
        self.reporter.update(|state| {
            state
                .conditions
                .set(ConditionType::TruncatedRange, true, "RetentionPassed", message)
        });
    }

    /// Sets the last state, and says it.
    fn conclude(&self, config: &ReplayConfig, result: &Result<End, ReplayError>) -> FinalWord {
        let (phase, reason, message) = match result {
            Ok(End::Complete) => {
                let (reason, message) = completion(config, &self.reporter.state().progress);
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
        let progress = self.reporter.state().progress;
        self.measure(&progress);
        let word = FinalWord {
            phase: phase_name(progress.phase()),
            delivered: progress.delivered,
            current_position: progress.current_position,
            first_event_time_micros: progress.first_event_time_micros,
            current_time_micros: progress.current_time_micros,
            delivery_micros: progress.delivery_micros,
            reason,
            message: shortened(message),
        };
        tracing::info!(
            phase = word.phase,
            delivered = word.delivered,
            position = word.current_position,
            first_event_time = (word.delivered > 0).then(|| micros(word.first_event_time_micros)),
            last_event_time = (word.delivered > 0).then(|| micros(word.current_time_micros)),
            delivery_seconds = word.delivery_micros as f64 / 1e6,
            reason,
            "the replay ended"
        );
        word
    }
}

impl Report for JobReport {
    fn progress(&self, progress: ReplayProgress) {
        self.measure(&progress);
        self.reporter.update(|state| {
            match progress.phase() {
                Phase::Running => {
                    state
                        .conditions
                        .set(ConditionType::Progressing, true, "Replaying", "Changes are delivered.")
                }
                Phase::Paused => state
                    .conditions
                    .set(ConditionType::Progressing, false, "Paused", "Delivery is held."),
                _ => {}
            }
            state.progress = progress;
        });
    }

    fn truncated(&self, earliest: i64) {
        let earliest = micros(earliest.saturating_mul(1000));
        self.set_truncated(format!(
            "Kafka has deleted the start of the range; it is whole from {earliest} on. Give the topics a longer retention, or \
             replay from there."
        ));
    }
}

/// What is said of a replay that came to its end: also that there was nothing, or less than was asked for.
fn completion(config: &ReplayConfig, progress: &ReplayProgress) -> (&'static str, String) {
    let end = progress.resolved_range.as_ref().map_or(0, |range| range.to_time_micros);
    let asked_for_more = match &config.to {
        ReplayEnd::Time(to) => to.parse::<Timestamp>().is_ok_and(|to| to.as_microsecond() > end),
        _ => false,
    };
    let (reason, delivered) = match progress.delivered {
        0 => (
            "NothingInRange",
            "No change was committed in the range, so nothing was delivered.",
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

/// What a replay leaves behind, as JSON.
#[derive(Clone, Debug, PartialEq, Eq, Serialize)]
#[serde(rename_all = "camelCase")]
struct FinalWord {
    phase: &'static str,
    delivered: u64,
    current_position: String,
    first_event_time_micros: i64,
    current_time_micros: i64,
    delivery_micros: i64,
    reason: &'static str,
    message: String,
}

async fn write_word(path: &Path, word: &FinalWord) {
    let written = match serde_json::to_vec(word) {
        Ok(json) => tokio::fs::write(path, json).await,
        Err(error) => Err(error.into()),
    };
    if let Err(error) = written {
        tracing::warn!(%error, path = %path.display(), "cannot write the termination message");
    }
}

fn shortened(mut message: String) -> String {
    if message.len() > LONGEST_MESSAGE {
        message.truncate(message.floor_char_boundary(LONGEST_MESSAGE));
        message.push('…');
    }
    message
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
    progress: Gauge,
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
        let registry = &metrics.registry;
        registry.register(Box::new(metrics.delivered.clone()))?;
        registry.register(Box::new(metrics.progress.clone()))?;
        registry.register(Box::new(metrics.behind.clone()))?;
        registry.register(Box::new(metrics.event_time.clone()))?;
        registry.register(Box::new(metrics.paused.clone()))?;
        Ok(metrics)
    }

    fn set(&self, progress: &ReplayProgress) {
        // It can only fall when another subscriber takes the lead.
        self.delivered
            .inc_by(progress.delivered.saturating_sub(self.delivered.get()));
        self.progress.set(progress.percent / 100.0);
        self.behind.set(progress.behind_millis as f64 / 1e3);
        self.event_time.set(progress.current_time_micros as f64 / 1e6);
        self.paused.set(i64::from(progress.phase() == Phase::Paused));
    }
}

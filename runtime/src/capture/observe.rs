//! Says how the capture is doing: to the operator, and as metrics.

use std::{
    collections::VecDeque,
    sync::{Arc, Mutex, PoisonError},
    time::Duration,
};

use meander_proto::v1::CaptureProgress;
use prometheus::{IntCounterVec, IntGauge, Opts, Registry, core::Collector};
use tokio::{sync::watch, time::interval};

use crate::{
    capture::{status::Received, stream::now_micros},
    log::Checkpoint,
    progress::ProgressReporter,
    sink::Durable,
};

const INTERVAL: Duration = Duration::from_millis(500);

/// Batches that were handed to the sinks and are not yet in all of them, with the commit time of their first change. The queues bound
/// how many there are.
#[derive(Clone, Default)]
pub(super) struct Inflight(Arc<Mutex<VecDeque<(u64, i64)>>>);

impl Inflight {
    pub(super) fn push(&self, batch: u64, commit_time_micros: i64) {
        self.0
            .lock()
            .unwrap_or_else(PoisonError::into_inner)
            .push_back((batch, commit_time_micros));
    }

    /// Commit time of the oldest change that is not in every sink, after `done` batches are.
    fn oldest(&self, done: u64) -> Option<i64> {
        let mut batches = self.0.lock().unwrap_or_else(PoisonError::into_inner);
        while batches.front().is_some_and(|(batch, _)| *batch <= done) {
            batches.pop_front();
        }
        batches.front().map(|(_, commit_time)| *commit_time)
    }
}

/// Names and units as Prometheus wants them.
#[derive(Clone)]
pub(super) struct Metrics {
    pub(super) failures: IntCounterVec,
    events: IntGauge,
    lag_bytes: IntGauge,
    lag_millis: IntGauge,
    received: IntGauge,
    acknowledged: IntGauge,
}

impl Metrics {
    pub(super) fn register(registry: &Registry) -> Self {
        let gauge = |name: &str, help: &str| IntGauge::new(name, help);
        // Names are constants that are valid and differ, so neither making nor registering can fail; a metric that could not be
        // registered would only be missing.
        let made = || -> prometheus::Result<Self> {
            Ok(Self {
                failures: IntCounterVec::new(
                    Opts::new(
                        "meander_capture_failures_total",
                        "Sessions that ended with an error, by reason.",
                    ),
                    &["reason"],
                )?,
                events: gauge(
                    "meander_capture_events",
                    "Changes published since the pipeline was created.",
                )?,
                lag_bytes: gauge(
                    "meander_capture_lag_bytes",
                    "WAL that the source keeps for this pipeline.",
                )?,
                lag_millis: gauge(
                    "meander_capture_lag_milliseconds",
                    "Age of the oldest change that is received and not in every sink.",
                )?,
                received: gauge(
                    "meander_capture_received_lsn",
                    "Everything before this LSN was received.",
                )?,
                acknowledged: gauge("meander_capture_acknowledged_lsn", "PostgreSQL was told this LSN.")?,
            })
        };
        match made() {
            Ok(metrics) => {
                let collectors: [Box<dyn Collector>; 6] = [
                    Box::new(metrics.failures.clone()),
                    Box::new(metrics.events.clone()),
                    Box::new(metrics.lag_bytes.clone()),
                    Box::new(metrics.lag_millis.clone()),
                    Box::new(metrics.received.clone()),
                    Box::new(metrics.acknowledged.clone()),
                ];
                for collector in collectors {
                    if let Err(error) = registry.register(collector) {
                        tracing::error!(%error, "a metric is missing");
                    }
                }
                metrics
            }
            Err(error) => unreachable!("a metric's name is not valid: {error}"),
        }
    }
}

/// Observes a session until its publisher ends. `sinks` are Kafka, then Redis if there is one.
pub(super) async fn run(
    reporter: ProgressReporter<CaptureProgress>,
    metrics: Metrics,
    sinks: Vec<watch::Receiver<Durable>>,
    mut checkpoint: watch::Receiver<Checkpoint>,
    received: Received,
    inflight: Inflight,
) {
    let mut ticks = interval(INTERVAL);
    loop {
        // The last look comes after the publisher's end, so that the last numbers are the true ones.
        let ended = tokio::select! {
            _ = ticks.tick() => false,
            ended = async { while checkpoint.changed().await.is_ok() {} } => { let () = ended; true }
        };
        let sinks: Vec<Durable> = sinks.iter().map(|sink| *sink.borrow()).collect();
        let checkpoint = checkpoint.borrow().clone();
        let done = sinks.iter().map(|sink| sink.batches).min().unwrap_or(0);
        let lag_micros = inflight
            .oldest(done)
            .map_or(0, |oldest| now_micros().saturating_sub(oldest).max(0));
        let lag_bytes = received.server().0.saturating_sub(checkpoint.acknowledged.0);
        let text = |sink: Option<&Durable>| {
            sink.and_then(|sink| sink.position)
                .map(|position| position.to_string())
                .unwrap_or_default()
        };
        let published_lsn = sinks
            .iter()
            .map(|sink| sink.safe)
            .min()
            .unwrap_or_default()
            .max(checkpoint.acknowledged);
        metrics.events.set(signed(checkpoint.events_total));
        metrics.lag_bytes.set(signed(lag_bytes));
        metrics.lag_millis.set(lag_micros / 1000);
        metrics.received.set(signed(received.received().0));
        metrics.acknowledged.set(signed(checkpoint.acknowledged.0));
        reporter.update(|state| {
            state.progress = CaptureProgress {
                received_lsn: received.received().0,
                published_lsn: published_lsn.0,
                confirmed_flush_lsn: checkpoint.acknowledged.0,
                lag_bytes,
                lag_millis: (lag_micros / 1000).cast_unsigned(),
                last_event_time_micros: checkpoint.high_time_micros,
                events_total: checkpoint.events_total,
                epoch: u32::from(checkpoint.epoch),
                owner_generation: checkpoint.owner_generation,
                slot_name: std::mem::take(&mut state.progress.slot_name),
                kafka_position: text(sinks.first()),
                redis_position: text(sinks.get(1)),
            };
        });
        if ended {
            return;
        }
    }
}

fn signed(value: u64) -> i64 {
    i64::try_from(value).unwrap_or(i64::MAX)
}

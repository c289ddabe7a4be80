//! Says how the capture is doing: to the operator, and as metrics.

use std::{
    collections::VecDeque,
    sync::{Arc, Mutex, PoisonError},
    time::Duration,
};

use meander_proto::v1::{AcceptedGap, CaptureProgress, OversizedRecords, RedisState, SchemaVersion, SnapshotProgress};
use prometheus::{Gauge, IntCounter, IntCounterVec, IntGauge, Opts, Registry, core::Collector};
use tokio::{sync::watch, time::interval};

use crate::{
    capture::{Context, status::Received, stream::now_micros},
    log::Checkpoint,
    progress::ConditionType,
    sink::{
        Durable, SinkError,
        redis::feed::{self, Progress as RedisProgress, State},
    },
    source::postgres::{prerequisites::Tables, standbys::Standbys, start::SlotState},
};

const INTERVAL: Duration = Duration::from_millis(500);

/// Batches that were handed to the sinks and are not yet in all that are attached, with the commit time of their first change, or that of
/// a heartbeat. Queue and buffer bound how many there are.
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
    pub(super) owns_slot: IntGauge,
    events: IntCounter,
    checkpoint_events: IntGauge,
    oversized: IntCounter,
    lag_bytes: IntGauge,
    lag: Gauge,
    received: IntGauge,
    acknowledged: IntGauge,
    pub(super) redis: feed::Metrics,
    slot_retained: IntGauge,
    slot_safe: IntGauge,
    absent_standbys: IntGauge,
    tables: IntGauge,
    tables_refused: IntGauge,
    tables_untold: IntGauge,
}

impl Metrics {
    /// Those of Redis are there where Redis is: it would look like one that is away for ever.
    pub(super) fn register(registry: &Registry, with_redis: bool) -> Self {
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
                owns_slot: gauge(
                    "meander_capture_owns_slot",
                    "1 while this process captures, 0 while it stands by or cannot.",
                )?,
                events: IntCounter::new("meander_capture_events_total", "Changes that this process published.")?,
                checkpoint_events: gauge(
                    "meander_capture_checkpoint_events",
                    "Changes published since the pipeline was created, as the checkpoint counts them.",
                )?,
                oversized: IntCounter::new(
                    "meander_capture_oversized_records_total",
                    "Records that this process published without their large values, since their topics would not take them.",
                )?,
                lag_bytes: gauge(
                    "meander_capture_lag_bytes",
                    "WAL that the source keeps for this pipeline.",
                )?,
                lag: Gauge::new(
                    "meander_capture_lag_seconds",
                    "Age of the oldest change that is received and not in Kafka, or not in Redis while that is attached; or of a heartbeat that has not come back.",
                )?,
                received: gauge(
                    "meander_capture_received_lsn",
                    "Everything before this LSN was received.",
                )?,
                acknowledged: gauge("meander_capture_acknowledged_lsn", "PostgreSQL was told this LSN.")?,
                redis: feed::Metrics {
                    attached: gauge(
                        "meander_capture_redis_attached",
                        "1 while Redis gets changes as they come, 0 while it is away or refilled.",
                    )?,
                    refilled: IntCounter::new(
                        "meander_capture_redis_refilled_entries_total",
                        "Entries that were copied from Kafka to Redis.",
                    )?,
                    detachments: IntCounterVec::new(
                        Opts::new(
                            "meander_capture_redis_detachments_total",
                            "Times that Redis was detached or could not be attached, by reason.",
                        ),
                        &["reason"],
                    )?,
                },
                slot_retained: gauge(
                    "meander_capture_slot_retained_wal_bytes",
                    "WAL that PostgreSQL keeps for the slot.",
                )?,
                slot_safe: gauge(
                    "meander_capture_slot_safe_wal_bytes",
                    "WAL that can be written before the slot is in danger; -1 without a limit.",
                )?,
                absent_standbys: gauge(
                    "meander_capture_slot_absent_standbys",
                    "Slots that synchronized_standby_slots names and nobody confirms by: the capture stands still for them.",
                )?,
                tables: gauge("meander_capture_tables", "Tables that are captured.")?,
                tables_refused: gauge(
                    "meander_capture_tables_refused",
                    "Tables that are selected and cannot be captured.",
                )?,
                tables_untold: gauge(
                    "meander_capture_tables_untold",
                    "Tables that are captured, and whose changes may not all be told.",
                )?,
            })
        };
        match made() {
            Ok(metrics) => {
                for collector in metrics.collectors(with_redis) {
                    if let Err(error) = registry.register(collector) {
                        tracing::error!(%error, "a metric is missing");
                    }
                }
                metrics
            }
            Err(error) => unreachable!("a metric's name is not valid: {error}"),
        }
    }

    fn collectors(&self, with_redis: bool) -> Vec<Box<dyn Collector>> {
        let mut collectors: Vec<Box<dyn Collector>> = vec![
            Box::new(self.failures.clone()),
            Box::new(self.owns_slot.clone()),
            Box::new(self.events.clone()),
            Box::new(self.checkpoint_events.clone()),
            Box::new(self.oversized.clone()),
            Box::new(self.lag_bytes.clone()),
            Box::new(self.lag.clone()),
            Box::new(self.received.clone()),
            Box::new(self.acknowledged.clone()),
            Box::new(self.slot_retained.clone()),
            Box::new(self.slot_safe.clone()),
            Box::new(self.absent_standbys.clone()),
            Box::new(self.tables.clone()),
            Box::new(self.tables_refused.clone()),
            Box::new(self.tables_untold.clone()),
        ];
        if with_redis {
            collectors.push(Box::new(self.redis.attached.clone()));
            collectors.push(Box::new(self.redis.refilled.clone()));
            collectors.push(Box::new(self.redis.detachments.clone()));
        }
        collectors
    }

    /// Changes that a session finds published when it begins: by the ones before it, or by another process.
    pub(super) fn found(&self, events_total: u64) {
        self.checkpoint_events.set(signed(events_total));
    }

    /// Counts what was published since the last look. A checkpoint that was lost counts from the beginning.
    fn published(&self, events_total: u64) {
        let total = signed(events_total);
        let more = total.saturating_sub(self.checkpoint_events.get());
        self.events.inc_by(u64::try_from(more).unwrap_or(0));
        self.checkpoint_events.set(total);
    }

    pub(super) fn slot(&self, slot: Option<&SlotState>) {
        self.slot_retained
            .set(signed(slot.and_then(|slot| slot.retained).unwrap_or(0)));
        self.slot_safe.set(slot.and_then(|slot| slot.safe).map_or(-1, signed));
    }

    pub(super) fn standbys(&self, standbys: &Standbys) {
        self.absent_standbys.set(signed(standbys.absent() as u64));
    }

    pub(super) fn tables(&self, tables: &Tables) {
        self.tables.set(signed(tables.captured.len() as u64));
        self.tables_refused.set(signed(tables.refused.len() as u64));
        self.tables_untold.set(signed(tables.untold.len() as u64));
    }
}

/// Observes a session until its publisher ends.
pub(super) async fn run(
    context: Context,
    kafka: watch::Receiver<Durable>,
    mut redis: Option<watch::Receiver<RedisProgress>>,
    mut checkpoint: watch::Receiver<Checkpoint>,
    received: Received,
    inflight: Inflight,
    (snapshot, schemas): (
        watch::Receiver<Option<SnapshotProgress>>,
        watch::Receiver<Vec<SchemaVersion>>,
    ),
) {
    let Context { reporter, metrics, .. } = &context;
    let mut ticks = interval(INTERVAL);
    let mut redis_state = State::default();
    let mut known_oversized = checkpoint.borrow().oversized.total;
    loop {
        // The last look comes after the publisher's end, so that the last numbers are the true ones.
        let ended = tokio::select! {
            _ = ticks.tick() => false,
            () = another_state(redis.as_mut(), redis_state) => false,
            ended = async { while checkpoint.changed().await.is_ok() {} } => { let () = ended; true }
        };
        let kafka = *kafka.borrow();
        let redis = redis.as_mut().map(|redis| redis.borrow_and_update().clone());
        if let Some(redis) = &redis {
            redis_state = redis.state;
            context.judge(redis);
        }
        let checkpoint = checkpoint.borrow().clone();
        // A Redis that is detached is no longer waited for.
        let done = match &redis {
            Some(redis) if redis.state == State::Attached => kafka.batches.min(redis.durable.batches),
            _ => kafka.batches,
        };
        let oldest = inflight
            .oldest(done)
            .into_iter()
            .chain(context.heartbeats.under_way())
            .min();
        let lag_micros = oldest.map_or(0, |oldest| now_micros().saturating_sub(oldest).max(0));
        let lag_bytes = received.server().0.saturating_sub(checkpoint.acknowledged.0);
        let text = |sink: Durable| sink.position.map(|position| position.to_string()).unwrap_or_default();
        metrics.published(checkpoint.events_total);
        metrics
            .oversized
            .inc_by(checkpoint.oversized.total.saturating_sub(known_oversized));
        known_oversized = checkpoint.oversized.total;
        context.oversized.send_if_modified(|known| {
            let message = checkpoint.oversized.message();
            let news = *known != message;
            *known = message;
            news
        });
        metrics.lag_bytes.set(signed(lag_bytes));
        metrics.lag.set(lag_micros as f64 / 1e6);
        metrics.received.set(signed(received.received().0));
        metrics.acknowledged.set(signed(checkpoint.acknowledged.0));
        reporter.update(|state| {
            state.progress = CaptureProgress {
                received_lsn: received.received().0,
                published_lsn: kafka.safe.max(checkpoint.acknowledged).0,
                confirmed_flush_lsn: checkpoint.acknowledged.0,
                lag_bytes,
                lag_millis: (lag_micros / 1000).cast_unsigned(),
                last_event_time_micros: checkpoint.high_time_micros,
                events_total: checkpoint.events_total,
                epoch: u32::from(checkpoint.epoch),
                owner_generation: checkpoint.owner_generation,
                kafka_position: text(kafka),
                redis_position: redis.as_ref().map(|redis| text(redis.durable)).unwrap_or_default(),
                redis_state: redis.as_ref().map_or(RedisState::Unspecified, reported).into(),
                redis_last_error: redis
                    .as_ref()
                    .and_then(|redis| Some(redis.last_error.as_ref()?.to_string()))
                    .unwrap_or_default(),
                accepted_gap: checkpoint.accepted_gap.as_ref().map(|gap| AcceptedGap {
                    id: gap.id.clone(),
                    reason: gap.reason.clone(),
                    lost_after_lsn: gap.lost_after.0,
                    resumed_lsn: gap.resumed_at.0,
                    time_micros: gap.time_micros,
                }),
                oversized: checkpoint.oversized.last.as_ref().map(|last| OversizedRecords {
                    records_total: checkpoint.oversized.total,
                    last_table: last.table.clone(),
                    last_position: last.position.to_string(),
                    last_bytes: last.bytes,
                }),
                snapshot: snapshot.borrow().clone(),
                schemas: schemas.borrow().clone(),
                // What others report.
                ..std::mem::take(&mut state.progress)
            };
        });
        if ended {
            return;
        }
    }
}

/// Waits until Redis's state is another one. Never ends without a Redis, or once nobody feeds it.
async fn another_state(redis: Option<&mut watch::Receiver<RedisProgress>>, known: State) {
    if let Some(redis) = redis
        && redis.wait_for(|redis| redis.state != known).await.is_ok()
    {
        return;
    }
    std::future::pending().await
}

fn reported(redis: &RedisProgress) -> RedisState {
    match redis.state {
        State::Starting | State::Detached | State::Taken => RedisState::Detached,
        State::Attached => RedisState::Attached,
        State::Refilling => RedisState::Refilling,
    }
}

impl Context {
    /// Says how Redis is. Nothing is said of a Redis that was not tried yet, nor where another owner seems to have taken over.
    fn judge(&self, redis: &RedisProgress) {
        let (gap, sinks) = (ConditionType::RedisGap, ConditionType::SinksReady);
        if redis.state == State::Attached {
            // The next look at the source says it, with all else that makes the pipeline Degraded.
            self.phantoms.send_replace(redis.phantoms.clone());
        }
        match (redis.state, redis.last_error.as_deref()) {
            (State::Starting | State::Taken, _) | (State::Detached, None) => {}
            (State::Attached, _) => {
                self.sinks_are_ready();
                self.set(gap, false, "NoGap", "Redis has everything that Kafka has.");
            }
            (State::Refilling, error) => {
                let cause = error.map(|error| format!(" Before: {error}.")).unwrap_or_default();
                let message = format!("Redis gets from Kafka what it lacks; capture into Kafka goes on.{cause}");
                self.set(sinks, false, "RedisRefilling", message);
            }
            (State::Detached, Some(error)) => {
                let message = format!("{error}. Capture into Kafka goes on.");
                if matches!(error, SinkError::RedisGap { .. }) {
                    self.set(gap, true, error.reason(), message.clone());
                }
                self.set(sinks, false, error.reason(), message);
            }
        }
    }
}

fn signed(value: u64) -> i64 {
    i64::try_from(value).unwrap_or(i64::MAX)
}

#[cfg(test)]
mod tests {
    use meander_test_support::instrumentation::assert_documented;

    use super::*;

    #[test]
    fn every_metric_is_documented_and_there_are_no_others() {
        let metrics = Metrics::register(&Registry::new(), true);
        assert_documented("meander_capture_", &metrics.collectors(true));
    }

    #[test]
    fn the_counter_has_what_this_process_published_and_the_gauge_what_all_have() {
        let metrics = Metrics::register(&Registry::new(), false);
        let both = || (metrics.events.get(), metrics.checkpoint_events.get());
        metrics.found(2_000_000_000);
        metrics.published(2_000_000_000);
        assert_eq!(both(), (0, 2_000_000_000));
        metrics.published(2_000_000_007);
        assert_eq!(both(), (7, 2_000_000_007));
        // Another process had its turn.
        metrics.found(2_000_500_000);
        metrics.published(2_000_500_003);
        assert_eq!(both(), (10, 2_000_500_003));
        metrics.found(0);
        metrics.published(2);
        assert_eq!(both(), (12, 2));
    }
}

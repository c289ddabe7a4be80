//! What the operator counts about itself.

use prometheus::{
    Encoder as _, HistogramOpts, HistogramVec, IntCounter, IntCounterVec, IntGauge, Opts, Registry, TextEncoder,
    core::Collector,
};

/// The operator's metrics.
#[derive(Clone, Debug)]
pub struct Metrics {
    registry: Registry,
    /// Reconciles by `kind` and `result`: `Ok`, or the reason of what went wrong.
    pub reconciles: IntCounterVec,
    /// How long a reconcile took, by `kind`.
    pub reconcile_seconds: HistogramVec,
    /// Objects by `outcome`: `written` or `unchanged`.
    pub applies: IntCounterVec,
    /// Statuses by `kind` and `outcome`: `written`, `unchanged`, `deferred` or `failed`.
    pub statuses: IntCounterVec,
    /// Replays that came to their end, by `phase`.
    pub replays_ended: IntCounterVec,
    /// Pods of replays that ended in an error.
    pub replay_attempts_failed: IntCounter,
    /// Open streams of runtime pods.
    pub progress_streams: IntGauge,
    /// 1 while this process leads.
    pub leader: IntGauge,
}

impl Metrics {
    /// Registers everything.
    ///
    /// # Errors
    /// When two metrics have one name, which would be a bug here.
    pub fn new() -> prometheus::Result<Self> {
        let opts = |name: &str, help: &str| Opts::new(format!("meander_operator_{name}"), help);
        let metrics = Self {
            registry: Registry::new(),
            reconciles: IntCounterVec::new(
                opts(
                    "reconciles_total",
                    "Reconciles by result: Ok, or the reason of what went wrong.",
                ),
                &["kind", "result"],
            )?,
            reconcile_seconds: HistogramVec::new(
                HistogramOpts::new("meander_operator_reconcile_seconds", "How long a reconcile took.")
                    // From one that asks nobody to one that meets its deadline.
                    .buckets(vec![0.001, 0.005, 0.02, 0.05, 0.1, 0.2, 0.5, 1.0, 2.0, 5.0, 10.0, 30.0]),
                &["kind"],
            )?,
            applies: IntCounterVec::new(
                opts("applies_total", "Objects looked at, by what was done."),
                &["outcome"],
            )?,
            statuses: IntCounterVec::new(
                opts("status_updates_total", "Statuses computed, by what was done with them."),
                &["kind", "outcome"],
            )?,
            replays_ended: IntCounterVec::new(
                opts("replays_ended_total", "ReplayJobs that came to their end, by how."),
                &["phase"],
            )?,
            replay_attempts_failed: IntCounter::with_opts(opts(
                "replay_attempts_failed_total",
                "Pods of replays that ended in an error.",
            ))?,
            progress_streams: IntGauge::with_opts(opts("progress_streams", "Open streams of runtime pods."))?,
            leader: IntGauge::with_opts(opts("leader", "1 while this process leads."))?,
        };
        // A counter that is not there yet cannot be seen to grow.
        for phase in ["Succeeded", "Failed", "Cancelled"] {
            metrics.replays_ended.with_label_values(&[phase]);
        }
        for collector in metrics.collectors() {
            metrics.registry.register(collector)?;
        }
        Ok(metrics)
    }

    fn collectors(&self) -> Vec<Box<dyn Collector>> {
        vec![
            Box::new(self.reconciles.clone()),
            Box::new(self.reconcile_seconds.clone()),
            Box::new(self.applies.clone()),
            Box::new(self.statuses.clone()),
            Box::new(self.replays_ended.clone()),
            Box::new(self.replay_attempts_failed.clone()),
            Box::new(self.progress_streams.clone()),
            Box::new(self.leader.clone()),
        ]
    }

    /// Adds what is counted when somebody asks.
    ///
    /// # Errors
    /// When there is one of that name, which would be a bug here.
    pub fn register(&self, collector: impl Collector + 'static) -> prometheus::Result<()> {
        self.registry.register(Box::new(collector))
    }

    /// Everything, as Prometheus reads it.
    ///
    /// # Errors
    /// When a metric cannot be written as text, which would be a bug in the library.
    pub fn text(&self) -> prometheus::Result<String> {
        let mut out = Vec::new();
        TextEncoder::new().encode(&self.registry.gather(), &mut out)?;
        Ok(String::from_utf8_lossy(&out).into_owned())
    }
}

#[cfg(test)]
mod tests {
    #![allow(clippy::unwrap_used)]
    use kube::runtime::reflector;
    use meander_test_support::instrumentation::assert_documented;

    use super::*;
    use crate::{pipeline, replay, tls};

    #[test]
    fn every_metric_is_documented_and_there_are_no_others() {
        let mut collectors = Metrics::new().unwrap().collectors();
        let pipelines = reflector::store().0;
        collectors.push(Box::new(pipeline::metrics::Readiness::new(pipelines).unwrap()));
        let replays = reflector::store().0;
        collectors.push(Box::new(replay::metrics::Phases::new(replays).unwrap()));
        collectors.push(Box::new(tls::Keeper::end_gauge().unwrap()));
        assert_documented("meander_operator_", &collectors);
    }
}

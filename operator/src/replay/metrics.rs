//! How many replays there are in each phase, counted when somebody asks.

use kube::runtime::reflector::Store;
use meander_crds::{ReplayJob, ReplayPhase};
use prometheus::{
    IntGaugeVec, Opts,
    core::{Collector, Desc},
    proto::MetricFamily,
};

/// The gauge of the phases.
pub struct Phases {
    replays: Store<ReplayJob>,
    gauge: IntGaugeVec,
}

impl Phases {
    /// Counts what is in the store.
    ///
    /// # Errors
    /// When the name is none, which would be a bug here.
    pub fn new(replays: Store<ReplayJob>) -> prometheus::Result<Self> {
        let opts = Opts::new("meander_operator_replays", "ReplayJobs by phase.");
        let gauge = IntGaugeVec::new(opts, &["phase"])?;
        Ok(Self { replays, gauge })
    }
}

impl Collector for Phases {
    fn desc(&self) -> Vec<&Desc> {
        self.gauge.desc()
    }

    fn collect(&self) -> Vec<MetricFamily> {
        use ReplayPhase::{Cancelled, Failed, Paused, Pending, Running, Succeeded};
        let replays = self.replays.state();
        for phase in [Pending, Running, Paused, Succeeded, Failed, Cancelled] {
            let count = replays
                .iter()
                .filter(|replay| {
                    let status = replay.status.as_ref();
                    status.and_then(|status| status.phase).unwrap_or(Pending) == phase
                })
                .count();
            let count = i64::try_from(count).unwrap_or(i64::MAX);
            self.gauge.with_label_values(&[&format!("{phase:?}")]).set(count);
        }
        self.gauge.collect()
    }
}

#[cfg(test)]
mod tests {
    #![allow(clippy::unwrap_used)]
    use kube::runtime::{reflector, watcher};
    use serde_json::{from_value, json};

    use super::*;

    #[test]
    fn each_phase_is_counted_as_it_is_now() {
        let (store, mut writer) = reflector::store::<ReplayJob>();
        let registry = prometheus::Registry::new();
        registry.register(Box::new(Phases::new(store).unwrap())).unwrap();
        let lines = || {
            prometheus::TextEncoder::new()
                .encode_to_string(&registry.gather())
                .unwrap()
        };
        let replay = |phase: Option<&str>| {
            from_value(json!({
                "apiVersion": "meander.dev/v1alpha1",
                "kind": "ReplayJob",
                "metadata": {"name": "r", "namespace": "ns"},
                "spec": {"pipelineRef": {"name": "p"}, "from": {"at": "Beginning"}, "to": {"at": "Now"}, "target": {"log": {}}},
                "status": {"phase": phase},
            }))
            .unwrap()
        };
        for (phase, line) in [
            (None, r#"{phase="Pending"} 1"#),
            (Some("Failed"), r#"{phase="Failed"} 1"#),
        ] {
            writer.apply_watcher_event(&watcher::Event::Apply(replay(phase)));
            let lines = lines();
            assert!(lines.contains(line), "{lines}");
            assert_eq!(lines.matches("} 1").count(), 1, "{lines}");
        }
    }
}

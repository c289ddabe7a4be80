//! Which pipelines are ready, told when somebody asks.

use kube::{ResourceExt as _, runtime::reflector::Store};
use meander_crds::CdcPipeline;
use prometheus::{
    IntGaugeVec, Opts,
    core::{Collector, Desc},
    proto::MetricFamily,
};

use crate::conditions::{READY, state};

/// The gauge of readiness.
pub struct Readiness {
    pipelines: Store<CdcPipeline>,
    /// Never set: what is gone shall not be told of any more, so each answer has a gauge of its own.
    empty: IntGaugeVec,
}

fn gauge() -> prometheus::Result<IntGaugeVec> {
    let opts = Opts::new(
        "meander_operator_pipeline_ready",
        "1 while the condition Ready is True, 0 while it is not; a pipeline that is suspended has none.",
    );
    IntGaugeVec::new(opts, &["namespace", "pipeline"])
}

impl Readiness {
    /// Tells of what is in the store.
    ///
    /// # Errors
    /// When the name is none, which would be a bug here.
    pub fn new(pipelines: Store<CdcPipeline>) -> prometheus::Result<Self> {
        let empty = gauge()?;
        Ok(Self { pipelines, empty })
    }
}

impl Collector for Readiness {
    fn desc(&self) -> Vec<&Desc> {
        self.empty.desc()
    }

    fn collect(&self) -> Vec<MetricFamily> {
        let Ok(gauge) = gauge() else { return Vec::new() };
        let pipelines = self.pipelines.state();
        for pipeline in pipelines.iter().filter(|pipeline| !pipeline.spec.suspend) {
            let ready = pipeline
                .status
                .as_ref()
                .and_then(|status| state(&status.conditions, READY));
            let namespace = pipeline.namespace().unwrap_or_default();
            gauge
                .with_label_values(&[&namespace, &pipeline.name_any()])
                .set(i64::from(ready.is_some_and(|(status, _)| status == "True")));
        }
        gauge.collect()
    }
}

#[cfg(test)]
mod tests {
    #![allow(clippy::unwrap_used)]
    use kube::runtime::{reflector, watcher::Event};
    use serde_json::{from_value, json};

    use super::*;

    #[test]
    fn each_pipeline_is_told_of_as_it_is_now() {
        let (store, mut writer) = reflector::store::<CdcPipeline>();
        let registry = prometheus::Registry::new();
        registry.register(Box::new(Readiness::new(store).unwrap())).unwrap();
        let pipeline = |suspend: bool, ready: &str| -> CdcPipeline {
            let condition = json!({
                "type": "Ready", "status": ready, "reason": "R", "message": "", "lastTransitionTime": "2026-11-22T00:00:00Z",
            });
            from_value(json!({
                "apiVersion": "meander.dev/v1alpha1",
                "kind": "CdcPipeline",
                "metadata": {"name": "trades", "namespace": "shop"},
                "spec": {
                    "source": {"postgres": {
                        "host": "h", "database": "d", "credentialsSecretRef": {"name": "s"}, "tables": {"include": ["*.*"]},
                    }},
                    "sinks": {"kafka": {"bootstrapServers": ["k:9092"], "topicPrefix": "shop"}},
                    "suspend": suspend,
                },
                "status": {"conditions": [condition]},
            }))
            .unwrap()
        };
        let mut now = |event| {
            writer.apply_watcher_event(&event);
            let text = prometheus::TextEncoder::new()
                .encode_to_string(&registry.gather())
                .unwrap();
            text.lines()
                .find(|line| !line.starts_with('#'))
                .unwrap_or_default()
                .to_owned()
        };
        let series = r#"meander_operator_pipeline_ready{namespace="shop",pipeline="trades"}"#;
        assert_eq!(now(Event::Apply(pipeline(false, "True"))), format!("{series} 1"));
        assert_eq!(now(Event::Apply(pipeline(false, "Unknown"))), format!("{series} 0"));
        assert_eq!(now(Event::Apply(pipeline(true, "False"))), "");
        assert_eq!(now(Event::Apply(pipeline(false, "False"))), format!("{series} 0"));
        assert_eq!(now(Event::Delete(pipeline(false, "False"))), "");
    }
}

//! From a valid pipeline to the objects that it needs.

use std::collections::BTreeMap;

use k8s_openapi::{
    api::{
        apps::v1::{Deployment, DeploymentSpec, DeploymentStrategy, RollingUpdateDeployment},
        batch::v1::{Job, JobSpec},
        core::v1::{ConfigMap, Pod, ServiceAccount, TopologySpreadConstraint},
        networking::v1::NetworkPolicy,
        policy::v1::{PodDisruptionBudget, PodDisruptionBudgetSpec},
    },
    apimachinery::pkg::{
        apis::meta::v1::{LabelSelector, ObjectMeta},
        util::intstr::IntOrString,
    },
};
use kube::ResourceExt as _;
use meander_crds::CdcPipeline;

use super::validate::ValidPipeline;
use crate::{
    context::Settings,
    naming::{self, COMPONENT_LABEL, CONFIG_HASH_ANNOTATION, PIPELINE_LABEL, labels},
    pod::{self, RuntimePod},
};

const CAPTURE: &str = "capture";
const CLEANUP: &str = "cleanup";

/// What a running pipeline needs.
#[derive(Clone, Debug)]
pub struct Objects {
    /// Whose token the pod shows.
    pub service_account: ServiceAccount,
    /// The runtime's configuration.
    pub config_map: ConfigMap,
    /// The pod that captures, and the one that stands by.
    pub deployment: Deployment,
    /// Where one stands by, a drain leaves the other alone until then.
    pub disruption_budget: Option<PodDisruptionBudget>,
    /// Who may connect to its pods.
    pub network_policy: Option<NetworkPolicy>,
}

/// What a deleted pipeline needs.
#[derive(Clone, Debug)]
pub struct CleanupObjects {
    /// Whose name the pod runs under.
    pub service_account: ServiceAccount,
    /// The runtime's configuration.
    pub config_map: ConfigMap,
    /// The pod that drops the slot and a managed publication.
    pub job: Job,
}

/// Name of the Deployment, its ConfigMap and its ServiceAccount.
pub fn capture_name(pipeline: &CdcPipeline) -> String {
    naming::capture_name(&pipeline.name_any())
}

/// Name of the Job that cleans up.
pub fn cleanup_name(pipeline: &CdcPipeline) -> String {
    format!("{}-{CLEANUP}", pipeline.name_any())
}

/// Selects the pods that capture.
pub fn capture_selector(pipeline: &CdcPipeline) -> String {
    format!("{PIPELINE_LABEL}={},{COMPONENT_LABEL}={CAPTURE}", pipeline.name_any())
}

/// Whether a pod of the pipeline is one that captures.
pub fn is_capture(pod: &Pod) -> bool {
    pod.labels()
        .get(COMPONENT_LABEL)
        .is_some_and(|component| component == CAPTURE)
}

/// Builds what a running pipeline needs.
pub fn build(pipeline: &CdcPipeline, valid: &ValidPipeline, settings: &Settings) -> Objects {
    let name = capture_name(pipeline);
    let labels = labels(PIPELINE_LABEL, &pipeline.name_any(), CAPTURE);
    // A Deployment's selector can never change: it has only what identifies the pods.
    let selector: BTreeMap<_, _> = [PIPELINE_LABEL, COMPONENT_LABEL]
        .into_iter()
        .filter_map(|key| labels.get(key).map(|value| (key.to_owned(), value.clone())))
        .collect();
    let annotations = BTreeMap::from([(CONFIG_HASH_ANNOTATION.to_owned(), valid.config_hash.clone())]);
    let pod = RuntimePod {
        command: CAPTURE,
        image: &valid.image,
        resources: valid.resources.as_ref(),
        log_level: valid.log_level,
        service_account: &name,
        config_map: &name,
        secrets: &valid.secrets,
        probes: true,
        restart_policy: "Always",
        port: None,
    };
    let selector = LabelSelector {
        match_labels: Some(selector),
        match_expressions: None,
    };
    let mut template = pod.template(settings, labels.clone(), annotations);
    if let Some(spec) = template.spec.as_mut().filter(|_| valid.config.standby) {
        spec.topology_spread_constraints = Some(vec![apart(&selector)]);
    }
    Objects {
        service_account: service_account(&name, &labels),
        config_map: config_map(&name, &labels, valid, settings),
        network_policy: pod::network_policy(
            metadata(&name, &labels),
            (PIPELINE_LABEL, pipeline.name_any()),
            None,
            settings,
        ),
        disruption_budget: valid.config.standby.then(|| PodDisruptionBudget {
            metadata: metadata(&name, &labels),
            spec: Some(PodDisruptionBudgetSpec {
                min_available: Some(IntOrString::Int(1)),
                selector: Some(selector.clone()),
                ..PodDisruptionBudgetSpec::default()
            }),
            status: None,
        }),
        deployment: Deployment {
            metadata: metadata(&name, &labels),
            spec: Some(DeploymentSpec {
                replicas: Some(match (valid.suspend, valid.config.standby) {
                    (true, _) => 0,
                    (false, false) => 1,
                    (false, true) => 2,
                }),
                strategy: Some(strategy(valid.config.standby)),
                revision_history_limit: Some(2),
                selector,
                template,
                ..DeploymentSpec::default()
            }),
            status: None,
        },
    }
}

/// The ConfigMap of pods that run with this configuration, whatever the spec has become since.
pub fn config_of_running(pipeline: &CdcPipeline, data: BTreeMap<String, String>) -> ConfigMap {
    let labels = labels(PIPELINE_LABEL, &pipeline.name_any(), CAPTURE);
    ConfigMap {
        metadata: metadata(&capture_name(pipeline), &labels),
        data: Some(data),
        ..ConfigMap::default()
    }
}

/// One writer per slot: without a standby, the old pod goes before the new one comes. With one, a new pod stands by before an old one goes.
fn strategy(standby: bool) -> DeploymentStrategy {
    DeploymentStrategy {
        type_: Some(if standby { "RollingUpdate" } else { "Recreate" }.to_owned()),
        rolling_update: standby.then_some(RollingUpdateDeployment {
            max_surge: Some(IntOrString::Int(1)),
            max_unavailable: Some(IntOrString::Int(0)),
        }),
    }
}

/// A node of its own for each pod where there is one.
fn apart(selector: &LabelSelector) -> TopologySpreadConstraint {
    TopologySpreadConstraint {
        max_skew: 1,
        topology_key: "kubernetes.io/hostname".to_owned(),
        when_unsatisfiable: "ScheduleAnyway".to_owned(),
        label_selector: Some(selector.clone()),
        match_label_keys: Some(vec!["pod-template-hash".to_owned()]),
        ..TopologySpreadConstraint::default()
    }
}

/// Builds what a deleted pipeline needs.
pub fn build_cleanup(pipeline: &CdcPipeline, valid: &ValidPipeline, settings: &Settings) -> CleanupObjects {
    // The capture's own: they exist already, and a third pair of names would have to be swept.
    let shared = capture_name(pipeline);
    let shared_labels = labels(PIPELINE_LABEL, &pipeline.name_any(), CAPTURE);
    let labels = labels(PIPELINE_LABEL, &pipeline.name_any(), CLEANUP);
    let pod = RuntimePod {
        command: CLEANUP,
        image: &valid.image,
        resources: valid.resources.as_ref(),
        log_level: valid.log_level,
        service_account: &shared,
        config_map: &shared,
        secrets: &valid.secrets,
        probes: false,
        restart_policy: "Never",
        port: None,
    };
    CleanupObjects {
        service_account: service_account(&shared, &shared_labels),
        config_map: config_map(&shared, &shared_labels, valid, settings),
        job: Job {
            metadata: metadata(&cleanup_name(pipeline), &labels),
            spec: Some(JobSpec {
                backoff_limit: Some(2),
                // A database that does not answer must not keep the resource from going.
                active_deadline_seconds: Some(170),
                template: pod.template(settings, labels.clone(), BTreeMap::new()),
                ..JobSpec::default()
            }),
            status: None,
        },
    }
}

fn metadata(name: &str, labels: &BTreeMap<String, String>) -> ObjectMeta {
    ObjectMeta {
        name: Some(name.to_owned()),
        labels: Some(labels.clone()),
        ..ObjectMeta::default()
    }
}

fn service_account(name: &str, labels: &BTreeMap<String, String>) -> ServiceAccount {
    ServiceAccount {
        metadata: metadata(name, labels),
        automount_service_account_token: Some(false),
        ..ServiceAccount::default()
    }
}

fn config_map(name: &str, labels: &BTreeMap<String, String>, valid: &ValidPipeline, settings: &Settings) -> ConfigMap {
    let url = valid.redis_url.as_ref();
    let config = [("config.yaml".to_owned(), valid.config_yaml.clone())]
        .into_iter()
        .chain(url.map(|url| ("redis-url".to_owned(), url.clone())));
    pod::config_map(metadata(name, labels), config, settings)
}

//! From a valid pipeline to the objects that it needs.

use std::collections::BTreeMap;

use k8s_openapi::{
    api::{
        apps::v1::{Deployment, DeploymentSpec, DeploymentStrategy},
        batch::v1::{Job, JobSpec},
        core::v1::{ConfigMap, ServiceAccount},
    },
    apimachinery::pkg::apis::meta::v1::{LabelSelector, ObjectMeta},
};
use kube::ResourceExt as _;
use meander_crds::CdcPipeline;

use super::validate::ValidPipeline;
use crate::{
    context::Settings,
    naming::{self, COMPONENT_LABEL, CONFIG_HASH_ANNOTATION, PIPELINE_LABEL, labels},
    pod::RuntimePod,
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
    /// The pod that captures.
    pub deployment: Deployment,
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

/// Selects everything of the pipeline.
pub fn selector(pipeline: &CdcPipeline) -> String {
    format!("{PIPELINE_LABEL}={}", pipeline.name_any())
}

/// Selects the pods that capture.
pub fn capture_selector(pipeline: &CdcPipeline) -> String {
    format!("{},{COMPONENT_LABEL}={CAPTURE}", selector(pipeline))
}

/// Builds what a running pipeline needs.
pub fn build(pipeline: &CdcPipeline, valid: &ValidPipeline, settings: &Settings) -> Objects {
    let name = capture_name(pipeline);
    let labels = labels(PIPELINE_LABEL, &pipeline.name_any(), CAPTURE);
    // A Deployment's selector can never change: it has only what identifies the pods.
    let selector = [PIPELINE_LABEL, COMPONENT_LABEL]
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
    Objects {
        service_account: service_account(&name, &labels),
        config_map: config_map(&name, &labels, valid),
        deployment: Deployment {
            metadata: metadata(&name, &labels),
            spec: Some(DeploymentSpec {
                replicas: Some(if valid.suspend { 0 } else { 1 }),
                // One writer per slot: the old pod goes before the new one comes.
                strategy: Some(DeploymentStrategy {
                    type_: Some("Recreate".to_owned()),
                    rolling_update: None,
                }),
                revision_history_limit: Some(2),
                selector: LabelSelector {
                    match_labels: Some(selector),
                    match_expressions: None,
                },
                template: pod.template(settings, labels.clone(), annotations),
                ..DeploymentSpec::default()
            }),
            status: None,
        },
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
        config_map: config_map(&shared, &shared_labels, valid),
        job: Job {
            metadata: metadata(&cleanup_name(pipeline), &labels),
            spec: Some(JobSpec {
                backoff_limit: Some(2),
                // A database that does not answer must not keep the resource from going.
                active_deadline_seconds: Some(60),
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

fn config_map(name: &str, labels: &BTreeMap<String, String>, valid: &ValidPipeline) -> ConfigMap {
    let mut data = BTreeMap::from([("config.yaml".to_owned(), valid.config_yaml.clone())]);
    if let Some(url) = &valid.redis_url {
        data.insert("redis-url".to_owned(), url.clone());
    }
    ConfigMap {
        metadata: metadata(name, labels),
        data: Some(data),
        ..ConfigMap::default()
    }
}

//! From a valid replay to the objects that it needs.

use std::collections::BTreeMap;

use k8s_openapi::{
    api::{
        batch::v1::{Job, JobSpec, PodFailurePolicy, PodFailurePolicyOnExitCodesRequirement, PodFailurePolicyRule},
        core::v1::{ConfigMap, Service, ServiceAccount, ServicePort, ServiceSpec},
    },
    apimachinery::pkg::{apis::meta::v1::ObjectMeta, util::intstr::IntOrString},
};
use kube::ResourceExt as _;
use meander_crds::ReplayJob;

use super::validate::ValidReplay;
use crate::{
    context::Settings,
    naming::{self, REPLAY_LABEL, labels},
    pod::RuntimePod,
};

const REPLAY: &str = "replay";
const GRPC: &str = "grpc";

/// What a replay needs.
#[derive(Clone, Debug)]
pub struct Objects {
    /// Whose token the pod shows.
    pub service_account: ServiceAccount,
    /// The runtime's configuration.
    pub config_map: ConfigMap,
    /// Where subscribers find the replay, if it serves.
    pub service: Option<Service>,
    /// The pod that replays.
    pub job: Job,
}

/// Name of everything that a replay needs.
pub fn replay_name(replay: &ReplayJob) -> String {
    naming::replay_name(&replay.name_any())
}

/// Selects everything of the replay.
pub fn selector(replay: &ReplayJob) -> String {
    format!("{REPLAY_LABEL}={}", replay.name_any())
}

/// Builds what a replay needs.
pub fn build(replay: &ReplayJob, valid: &ValidReplay, settings: &Settings) -> Objects {
    let name = replay_name(replay);
    let labels = labels(REPLAY_LABEL, &replay.name_any(), REPLAY);
    let metadata = || ObjectMeta {
        name: Some(name.clone()),
        labels: Some(labels.clone()),
        ..ObjectMeta::default()
    };
    let pod = RuntimePod {
        command: REPLAY,
        image: &valid.image,
        resources: valid.resources.as_ref(),
        log_level: valid.log_level,
        service_account: &name,
        config_map: &name,
        secrets: &valid.secrets,
        probes: true,
        restart_policy: "Never",
        port: valid.serve_port.map(|port| (GRPC, port)),
    };
    Objects {
        service_account: ServiceAccount {
            metadata: metadata(),
            automount_service_account_token: Some(false),
            ..ServiceAccount::default()
        },
        config_map: ConfigMap {
            metadata: metadata(),
            data: Some(BTreeMap::from([("config.yaml".to_owned(), valid.config_yaml.clone())])),
            ..ConfigMap::default()
        },
        service: valid.serve_port.map(|port| Service {
            metadata: metadata(),
            spec: Some(ServiceSpec {
                selector: Some(BTreeMap::from([(REPLAY_LABEL.to_owned(), replay.name_any())])),
                ports: Some(vec![ServicePort {
                    name: Some(GRPC.to_owned()),
                    app_protocol: Some("kubernetes.io/h2c".to_owned()),
                    port: i32::from(port),
                    target_port: Some(IntOrString::String(GRPC.to_owned())),
                    protocol: Some("TCP".to_owned()),
                    ..ServicePort::default()
                }]),
                ..ServiceSpec::default()
            }),
            status: None,
        }),
        job: Job {
            metadata: metadata(),
            spec: Some(JobSpec {
                backoff_limit: Some(3),
                // One pod delivers at a time: one that is told to go goes on delivering until it has gone.
                pod_replacement_policy: Some("Failed".to_owned()),
                pod_failure_policy: Some(PodFailurePolicy {
                    rules: vec![PodFailurePolicyRule {
                        action: "FailJob".to_owned(),
                        on_exit_codes: Some(PodFailurePolicyOnExitCodesRequirement {
                            container_name: Some(REPLAY.to_owned()),
                            operator: "In".to_owned(),
                            values: vec![i32::from(meander_config::EXIT_PERMANENT)],
                        }),
                        on_pod_conditions: None,
                    }],
                }),
                template: pod.template(settings, labels.clone(), BTreeMap::new()),
                ..JobSpec::default()
            }),
            status: None,
        },
    }
}

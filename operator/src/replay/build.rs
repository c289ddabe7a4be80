//! From a valid replay to the objects that it needs.

use std::collections::BTreeMap;

use k8s_openapi::{
    api::{
        batch::v1::{
            Job, JobSpec, PodFailurePolicy, PodFailurePolicyOnExitCodesRequirement,
            PodFailurePolicyOnPodConditionsPattern, PodFailurePolicyRule,
        },
        core::v1::{ConfigMap, Service, ServiceAccount, ServicePort, ServiceSpec},
        networking::v1::NetworkPolicy,
    },
    apimachinery::pkg::{apis::meta::v1::ObjectMeta, util::intstr::IntOrString},
};
use kube::ResourceExt as _;
use meander_crds::{ReplayJob, Serve};

use super::validate::ValidReplay;
use crate::{
    context::Settings,
    naming::{self, REPLAY_LABEL, labels},
    pod::{self, RuntimePod},
};

const REPLAY: &str = "replay";
const GRPC: &str = "grpc";
/// Name of the configuration in the ConfigMap.
pub const CONFIG_FILE: &str = "config.yaml";
/// The condition of a pod that Kubernetes itself ended.
pub const DISRUPTED: &str = "DisruptionTarget";

/// What a replay needs.
#[derive(Clone, Debug)]
pub struct Objects {
    /// Whose token the pod shows.
    pub service_account: ServiceAccount,
    /// The runtime's configuration.
    pub config_map: ConfigMap,
    /// Where subscribers find the replay, if it serves.
    pub service: Option<Service>,
    /// Who may connect to its pod.
    pub network_policy: Option<NetworkPolicy>,
    /// The pod that replays; none where it is there already, since a Job's template can never change.
    pub job: Option<Job>,
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
    let metadata = metadata(replay);
    let labels = metadata.labels.clone().unwrap_or_default();
    let job = Job {
        metadata,
        spec: Some(JobSpec {
            backoff_limit: i32::try_from(replay.spec.backoff_limit).ok(),
            active_deadline_seconds: replay.spec.active_deadline_seconds.map(i64::from),
            // One pod delivers at a time: one that is told to go goes on delivering until it has gone.
            pod_replacement_policy: Some("Failed".to_owned()),
            pod_failure_policy: Some(pod_failure_policy()),
            template: pod.template(settings, labels, BTreeMap::new()),
            ..JobSpec::default()
        }),
        status: None,
    };
    Objects {
        job: Some(job),
        ..around(replay, &valid.config_yaml, settings)
    }
}

/// What is spoken at the port, as Gateways and meshes want to know it.
fn protocol(serve: &Serve) -> &'static str {
    match serve.tls_secret_ref {
        Some(_) => "https",
        None => "kubernetes.io/h2c",
    }
}

/// Builds what a replay needs whose Job is there.
pub fn around(replay: &ReplayJob, config_yaml: &str, settings: &Settings) -> Objects {
    let target = replay.spec.delivers_to();
    let serve = target.grpc.as_ref().and_then(|grpc| grpc.serve.as_ref());
    Objects {
        service_account: ServiceAccount {
            metadata: metadata(replay),
            automount_service_account_token: Some(false),
            ..ServiceAccount::default()
        },
        config_map: pod::config_map(
            metadata(replay),
            [(CONFIG_FILE.to_owned(), config_yaml.to_owned())],
            settings,
        ),
        service: serve.map(|serve| Service {
            metadata: metadata(replay),
            spec: Some(ServiceSpec {
                selector: Some(BTreeMap::from([(REPLAY_LABEL.to_owned(), replay.name_any())])),
                ports: Some(vec![ServicePort {
                    name: Some(GRPC.to_owned()),
                    app_protocol: Some(protocol(serve).to_owned()),
                    port: i32::from(serve.port),
                    target_port: Some(IntOrString::String(GRPC.to_owned())),
                    protocol: Some("TCP".to_owned()),
                    ..ServicePort::default()
                }]),
                ..ServiceSpec::default()
            }),
            status: None,
        }),
        network_policy: pod::network_policy(
            metadata(replay),
            (REPLAY_LABEL, replay.name_any()),
            serve.map(|serve| serve.port),
            settings,
        ),
        job: None,
    }
}

fn metadata(replay: &ReplayJob) -> ObjectMeta {
    ObjectMeta {
        name: Some(replay_name(replay)),
        labels: Some(labels(REPLAY_LABEL, &replay.name_any(), REPLAY)),
        ..ObjectMeta::default()
    }
}

fn pod_failure_policy() -> PodFailurePolicy {
    let permanent = PodFailurePolicyRule {
        action: "FailJob".to_owned(),
        on_exit_codes: Some(PodFailurePolicyOnExitCodesRequirement {
            container_name: Some(REPLAY.to_owned()),
            operator: "In".to_owned(),
            values: vec![i32::from(meander_config::EXIT_PERMANENT)],
        }),
        on_pod_conditions: None,
    };
    // A drained node, an eviction: not the replay's fault.
    let disrupted = PodFailurePolicyRule {
        action: "Ignore".to_owned(),
        on_exit_codes: None,
        on_pod_conditions: Some(vec![PodFailurePolicyOnPodConditionsPattern {
            type_: DISRUPTED.to_owned(),
            status: "True".to_owned(),
        }]),
    };
    PodFailurePolicy {
        rules: vec![permanent, disrupted],
    }
}

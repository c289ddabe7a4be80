//! What all runtime pods have in common.

use std::collections::BTreeMap;

use k8s_openapi::{
    api::{
        core::v1::{
            Capabilities, ConfigMap, ConfigMapVolumeSource, Container, ContainerPort, ContainerStateTerminated, EnvVar,
            HTTPGetAction, KeyToPath, LocalObjectReference, Pod, PodSecurityContext, PodSpec, PodTemplateSpec, Probe,
            ProjectedVolumeSource, ResourceRequirements, SeccompProfile, SecretVolumeSource, SecurityContext,
            ServiceAccountTokenProjection, Volume, VolumeMount, VolumeProjection,
        },
        networking::v1::{
            NetworkPolicy, NetworkPolicyIngressRule, NetworkPolicyPeer, NetworkPolicyPort, NetworkPolicySpec,
        },
    },
    apimachinery::pkg::{
        api::resource::Quantity,
        apis::meta::v1::{LabelSelector, ObjectMeta},
        util::intstr::IntOrString,
    },
};
use meander_config::{ClientCertificate, KafkaLog, KafkaSasl, KafkaTls, OperatorLink, SaslMechanism};
use meander_crds::{KafkaSink, LogLevel, Resources};

use crate::{
    context::Settings,
    naming::AUDIENCE,
    secrets::{KAFKA_FOLDERS, SecretFiles},
};

/// Where a pod finds its configuration.
pub const CONFIG_FOLDER: &str = "/etc/meander";
/// Where a pod finds its Secrets, each in a folder of its own.
pub const SECRETS_FOLDER: &str = "/var/run/secrets/meander.dev";
/// The one user of the runtime's image.
const USER: i64 = 65532;
const ADMIN_PORT: &str = "admin";
/// Of health and metrics.
const ADMIN: u16 = 9464;
/// The ConfigMap's key, and so the file, with the authorities by which the pod knows the operator.
const OPERATOR_AUTHORITIES: &str = "operator-ca.crt";

/// A pod that runs one command of `meander-runtime`.
#[derive(Clone, Debug)]
pub struct RuntimePod<'a> {
    /// `capture`, `replay` or `cleanup`: the command, the container's name and the component.
    pub command: &'static str,
    /// The image.
    pub image: &'a str,
    /// CPU and memory.
    pub resources: Option<&'a Resources>,
    /// How much it logs.
    pub log_level: LogLevel,
    /// Name of the ServiceAccount.
    pub service_account: &'a str,
    /// Name of the ConfigMap.
    pub config_map: &'a str,
    /// Secrets.
    pub secrets: &'a [SecretFiles],
    /// Whether it serves `/livez` and `/readyz`, and is killed and waited for accordingly.
    pub probes: bool,
    /// `Always` for a Deployment, `Never` for a Job.
    pub restart_policy: &'static str,
    /// A port beside the admin port, by name.
    pub port: Option<(&'static str, u16)>,
}

/// Where a pod with the projected token reports.
pub fn operator_link(settings: &Settings) -> OperatorLink {
    let encrypted = settings.progress_endpoint.starts_with("https:");
    OperatorLink {
        endpoint: settings.progress_endpoint.clone(),
        ca_file: encrypted.then(|| format!("{CONFIG_FOLDER}/{OPERATOR_AUTHORITIES}").into()),
        token_file: format!("{SECRETS_FOLDER}/operator/token").into(),
    }
}

/// A pod's ConfigMap: its configuration, and by what it knows the operator. The latter reaches a pod that runs, which reads it for each
/// connection: it is not a part of the configuration that a pod is started with.
pub fn config_map(
    metadata: ObjectMeta,
    config: impl IntoIterator<Item = (String, String)>,
    settings: &Settings,
) -> ConfigMap {
    let authorities = settings.trust.authorities();
    let authorities = authorities.map(|authorities| (OPERATOR_AUTHORITIES.to_owned(), (*authorities).to_owned()));
    ConfigMap {
        metadata,
        data: Some(config.into_iter().chain(authorities).collect()),
        ..ConfigMap::default()
    }
}

/// Who may connect to these pods: those who read metrics, and whoever wants to at the port that is served, where there is one. What the pods
/// themselves connect to may be anywhere. The pods are those with this label.
pub fn network_policy(
    metadata: ObjectMeta,
    (label, name): (&str, String),
    served: Option<u16>,
    settings: &Settings,
) -> Option<NetworkPolicy> {
    let rule = |port: u16, from: Option<&Vec<NetworkPolicyPeer>>| NetworkPolicyIngressRule {
        ports: Some(vec![NetworkPolicyPort {
            port: Some(IntOrString::Int(i32::from(port))),
            protocol: Some("TCP".to_owned()),
            ..NetworkPolicyPort::default()
        }]),
        from: from.cloned(),
    };
    let readers = settings.metrics_from.as_ref()?;
    // A rule that names nobody would let everybody in.
    let metrics = (!readers.is_empty()).then(|| rule(ADMIN, Some(readers)));
    let rules: Vec<_> = metrics.into_iter().chain(served.map(|port| rule(port, None))).collect();
    Some(NetworkPolicy {
        metadata,
        spec: Some(NetworkPolicySpec {
            pod_selector: Some(LabelSelector {
                match_labels: Some(BTreeMap::from([(label.to_owned(), name)])),
                ..LabelSelector::default()
            }),
            policy_types: Some(vec!["Ingress".to_owned()]),
            // The API server leaves out an empty list.
            ingress: (!rules.is_empty()).then_some(rules),
            ..NetworkPolicySpec::default()
        }),
    })
}

/// The file of a Secret in the pod.
pub fn secret_file(folder: &str, file: &str) -> std::path::PathBuf {
    format!("{SECRETS_FOLDER}/{folder}/{file}").into()
}

/// The certificate and the key that [`SecretFiles::certificate`] puts there.
pub fn client_certificate(folder: &str) -> ClientCertificate {
    ClientCertificate {
        certificate_file: secret_file(folder, "tls.crt"),
        key_file: secret_file(folder, "tls.key"),
    }
}

/// How the runtime reaches the pipeline's Kafka, and what its topics are called.
pub fn kafka_log(kafka: &KafkaSink) -> KafkaLog {
    let [signing_in, trusting, showing] = KAFKA_FOLDERS;
    KafkaLog {
        bootstrap_servers: kafka.bootstrap_servers.clone(),
        tls: kafka.tls.as_ref().map(|tls| kafka_tls(tls, trusting, showing)),
        sasl: kafka.sasl.as_ref().map(|sasl| kafka_sasl(sasl, signing_in)),
        topic_prefix: kafka.topic_prefix.clone(),
    }
}

/// The files of TLS with Kafka, in the folders of the authority that is trusted and of the certificate that is shown.
pub fn kafka_tls(tls: &meander_crds::KafkaTls, trusting: &str, showing: &str) -> KafkaTls {
    KafkaTls {
        ca_file: tls.ca_secret_ref.as_ref().map(|_| secret_file(trusting, "ca.crt")),
        client_certificate: tls.client_cert_secret_ref.as_ref().map(|_| client_certificate(showing)),
    }
}

/// The files that sign in to Kafka.
pub fn kafka_sasl(sasl: &meander_crds::KafkaSasl, folder: &str) -> KafkaSasl {
    KafkaSasl {
        mechanism: match sasl.mechanism {
            meander_crds::SaslMechanism::Plain => SaslMechanism::Plain,
            meander_crds::SaslMechanism::ScramSha256 => SaslMechanism::ScramSha256,
            meander_crds::SaslMechanism::ScramSha512 => SaslMechanism::ScramSha512,
        },
        username_file: secret_file(folder, "username"),
        password_file: secret_file(folder, "password"),
    }
}

impl RuntimePod<'_> {
    /// The template of a Deployment or a Job.
    pub fn template(
        &self,
        settings: &Settings,
        labels: BTreeMap<String, String>,
        annotations: BTreeMap<String, String>,
    ) -> PodTemplateSpec {
        let pull_secrets: Vec<_> = settings
            .runtime_image_pull_secrets
            .iter()
            .map(|name| LocalObjectReference { name: name.clone() })
            .collect();
        PodTemplateSpec {
            metadata: Some(ObjectMeta {
                labels: Some(labels),
                annotations: (!annotations.is_empty()).then_some(annotations),
                ..ObjectMeta::default()
            }),
            spec: Some(PodSpec {
                service_account_name: Some(self.service_account.to_owned()),
                // The token below is the only one: this pod has nothing to say to the API server.
                automount_service_account_token: Some(false),
                enable_service_links: Some(false),
                image_pull_secrets: (!pull_secrets.is_empty()).then_some(pull_secrets),
                restart_policy: Some(self.restart_policy.to_owned()),
                termination_grace_period_seconds: Some(30),
                security_context: Some(PodSecurityContext {
                    run_as_non_root: Some(true),
                    run_as_user: Some(USER),
                    run_as_group: Some(USER),
                    // Projected tokens are readable by their group only.
                    fs_group: Some(USER),
                    seccomp_profile: Some(SeccompProfile {
                        type_: "RuntimeDefault".to_owned(),
                        ..SeccompProfile::default()
                    }),
                    ..PodSecurityContext::default()
                }),
                containers: vec![self.container(settings)],
                volumes: Some(self.volumes()),
                ..PodSpec::default()
            }),
        }
    }

    fn container(&self, settings: &Settings) -> Container {
        let probe = |path: &str, period_seconds, failure_threshold| {
            self.probes.then(|| Probe {
                http_get: Some(HTTPGetAction {
                    path: Some(path.to_owned()),
                    port: IntOrString::String(ADMIN_PORT.to_owned()),
                    ..HTTPGetAction::default()
                }),
                period_seconds: Some(period_seconds),
                timeout_seconds: Some(3),
                failure_threshold: Some(failure_threshold),
                ..Probe::default()
            })
        };
        // One that does its work and ends has nothing to trace.
        let tracing = settings.tracing.iter().filter(|_| self.probes).cloned();
        let variables = std::iter::once(("RUST_LOG", self.log_level.to_string())).chain(tracing);
        let variables = variables.map(|(name, value)| EnvVar {
            name: name.to_owned(),
            value: Some(value),
            ..EnvVar::default()
        });
        let admin = self.probes.then_some((ADMIN_PORT, ADMIN));
        let ports: Vec<ContainerPort> = admin
            .into_iter()
            .chain(self.port)
            .map(|(name, port)| ContainerPort {
                name: Some(name.to_owned()),
                container_port: i32::from(port),
                protocol: Some("TCP".to_owned()),
                ..ContainerPort::default()
            })
            .collect();
        Container {
            name: self.command.to_owned(),
            image: Some(self.image.to_owned()),
            image_pull_policy: Some(settings.runtime_image_pull_policy.clone()),
            args: Some(
                [self.command, "--config", &format!("{CONFIG_FOLDER}/config.yaml")]
                    .map(str::to_owned)
                    .to_vec(),
            ),
            env: Some(variables.collect()),
            ports: (!ports.is_empty()).then_some(ports),
            liveness_probe: probe("/livez", 10, 6),
            readiness_probe: probe("/readyz", 2, 3),
            resources: Some(requirements(self.resources)),
            security_context: Some(SecurityContext {
                allow_privilege_escalation: Some(false),
                read_only_root_filesystem: Some(true),
                capabilities: Some(Capabilities {
                    drop: Some(vec!["ALL".to_owned()]),
                    ..Capabilities::default()
                }),
                ..SecurityContext::default()
            }),
            volume_mounts: Some(self.mounts()),
            ..Container::default()
        }
    }

    fn volumes(&self) -> Vec<Volume> {
        let config = Volume {
            name: "config".to_owned(),
            config_map: Some(ConfigMapVolumeSource {
                name: self.config_map.to_owned(),
                ..ConfigMapVolumeSource::default()
            }),
            ..Volume::default()
        };
        let token = Volume {
            name: "operator".to_owned(),
            projected: Some(ProjectedVolumeSource {
                sources: Some(vec![VolumeProjection {
                    service_account_token: Some(ServiceAccountTokenProjection {
                        audience: Some(AUDIENCE.to_owned()),
                        expiration_seconds: Some(3600),
                        path: "token".to_owned(),
                    }),
                    ..VolumeProjection::default()
                }]),
                ..ProjectedVolumeSource::default()
            }),
            ..Volume::default()
        };
        let secrets = self.secrets.iter().map(|files| Volume {
            name: files.folder.to_owned(),
            secret: Some(SecretVolumeSource {
                secret_name: Some(files.secret.clone()),
                items: Some(
                    files
                        .files
                        .iter()
                        .map(|(key, file)| KeyToPath {
                            key: key.clone(),
                            path: (*file).to_owned(),
                            ..KeyToPath::default()
                        })
                        .collect(),
                ),
                ..SecretVolumeSource::default()
            }),
            ..Volume::default()
        });
        [config, token].into_iter().chain(secrets).collect()
    }

    fn mounts(&self) -> Vec<VolumeMount> {
        let mount = |name: &str, path: String| VolumeMount {
            name: name.to_owned(),
            mount_path: path,
            read_only: Some(true),
            ..VolumeMount::default()
        };
        let secret = |folder: &str| mount(folder, format!("{SECRETS_FOLDER}/{folder}"));
        [mount("config", CONFIG_FOLDER.to_owned()), secret("operator")]
            .into_iter()
            .chain(self.secrets.iter().map(|files| secret(files.folder)))
            .collect()
    }
}

fn requirements(resources: Option<&Resources>) -> ResourceRequirements {
    let quantities = |pairs: &[(&str, &str)]| -> BTreeMap<String, Quantity> {
        pairs
            .iter()
            .map(|(name, value)| ((*name).to_owned(), Quantity((*value).to_owned())))
            .collect()
    };
    match resources {
        Some(resources) => ResourceRequirements {
            requests: (!resources.requests.is_empty()).then(|| resources.requests.clone()),
            limits: (!resources.limits.is_empty()).then(|| resources.limits.clone()),
            ..ResourceRequirements::default()
        },
        None => ResourceRequirements {
            requests: Some(quantities(&[("cpu", "50m"), ("memory", "64Mi")])),
            limits: Some(quantities(&[("memory", "512Mi")])),
            ..ResourceRequirements::default()
        },
    }
}

/// Why the newest of these pods does not run, in the kubelet's or the scheduler's own words.
pub fn trouble(pods: &[Pod]) -> Option<String> {
    let pod = newest(pods)?;
    let status = pod.status.as_ref()?;
    let name = pod.metadata.name.as_deref().unwrap_or_default();
    for container in status.container_statuses.iter().flatten() {
        let Some(state) = &container.state else { continue };
        if let Some(waiting) = &state.waiting {
            let reason = waiting.reason.as_deref().unwrap_or_default();
            if reason.is_empty() || reason == "ContainerCreating" || reason == "PodInitializing" {
                continue;
            }
            let last = container.last_state.as_ref().and_then(|last| last.terminated.as_ref());
            let detail = match last {
                Some(last) => format!("the last attempt {}", end(pod, last, " --previous")),
                None => format!(
                    "{}; see {} describe pod {name}",
                    waiting.message.as_deref().unwrap_or("the kubelet says no more"),
                    kubectl(pod)
                ),
            };
            return Some(format!("pod {name}: {reason}: {detail}"));
        }
        if let Some(terminated) = &state.terminated
            && terminated.exit_code != 0
        {
            return Some(format!("pod {name} {}", end(pod, terminated, "")));
        }
    }
    status
        .conditions
        .iter()
        .flatten()
        .find(|condition| condition.type_ == "PodScheduled" && condition.status == "False")
        .map(|condition| {
            format!(
                "pod {name} is not scheduled: {}",
                condition.message.as_deref().unwrap_or_default()
            )
        })
}

/// How a container of the pod ended, and where to read more: one that never ran has no log, and the kubelet's words instead.
pub fn end(pod: &Pod, terminated: &ContainerStateTerminated, which: &str) -> String {
    let reason = terminated.reason.as_deref().unwrap_or("Error");
    if matches!(reason, "StartError" | "ContainerCannotRun") {
        let message = terminated.message.as_deref().unwrap_or("the kubelet says no more");
        return format!("could not be started: {reason}: {message}");
    }
    let why = if reason == "Error" {
        String::new()
    } else {
        format!(" ({reason})")
    };
    let name = pod.metadata.name.as_deref().unwrap_or_default();
    let code = terminated.exit_code;
    format!(
        "ended with exit code {code}{why}; see {} logs {name}{which}",
        kubectl(pod)
    )
}

/// The command, in the pod's namespace.
fn kubectl(pod: &Pod) -> String {
    format!("kubectl -n {}", pod.metadata.namespace.as_deref().unwrap_or("default"))
}

/// Where the log of the newest of these pods is read, if it has one: a container that has not run yet has none.
pub fn log_of(pods: &[Pod]) -> Option<String> {
    let pod = newest(pods)?;
    let mut containers = pod.status.as_ref()?.container_statuses.iter().flatten();
    let runs = containers.any(|container| container.state.as_ref().is_some_and(|state| state.running.is_some()));
    runs.then(|| {
        format!(
            "{} logs {}",
            kubectl(pod),
            pod.metadata.name.as_deref().unwrap_or_default()
        )
    })
}

/// The pod that was created last.
pub fn newest(pods: &[Pod]) -> Option<&Pod> {
    pods.iter()
        .max_by_key(|pod| pod.metadata.creation_timestamp.as_ref().map(|time| time.0))
}

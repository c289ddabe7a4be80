//! From a spec and facts to a pipeline that can be built, or the reason why not.

use kube::ResourceExt as _;
use meander_config::{
    CaptureConfig, Durability, Format, KafkaSink, OnOversizedRow, OnSourceGap, Origin, Partitions, PostgresSource,
    Publication, PublicationManagement, RedisSink, ResourceIdentity, Snapshot, SnapshotMode, SnapshotRequest, SslMode,
    TableSelection, TopicManagement,
};
use meander_crds::{
    Acknowledgement, CdcPipeline, LogLevel, PipelineFormat, PublicationManagement as Management, RedisDurability,
    Resources, SnapshotMode as Reading, SslMode as Mode, Standby,
};

use super::dereference::Facts;
use crate::{
    conditions::{SOURCE_READY, SPEC_VALID},
    context::Settings,
    error::{Error, Reason},
    naming::{digest, slot_name},
    pod::{self, CONFIG_FOLDER},
    secrets::{self, SecretFiles},
};

/// The annotation by which somebody accepts a gap in the source, with the name of the gap as its value.
pub const ACCEPT_SOURCE_GAP: &str = "meander.dev/accept-source-gap";

/// A pipeline that can be built.
#[derive(Clone, Debug)]
pub struct ValidPipeline {
    /// What the runtime reads.
    pub config: CaptureConfig,
    /// The same as YAML.
    pub config_yaml: String,
    /// The Redis URL, where it is no secret.
    pub redis_url: Option<String>,
    /// Digest of all configuration.
    pub config_hash: String,
    /// Secrets that the pod mounts.
    pub secrets: Vec<SecretFiles>,
    /// Image of the pod.
    pub image: String,
    /// CPU and memory of the pod.
    pub resources: Option<Resources>,
    /// How much the pod logs.
    pub log_level: LogLevel,
    /// Whether the pod is not wanted.
    pub suspend: bool,
}

/// The name of a pipeline's slot.
pub fn slot_of(pipeline: &CdcPipeline) -> String {
    let default = || slot_name(&pipeline.namespace().unwrap_or_default(), &pipeline.name_any());
    pipeline.spec.source.postgres.slot.name.clone().unwrap_or_else(default)
}

/// Who the resource is, to the runtime.
pub fn identity_of(pipeline: &CdcPipeline) -> ResourceIdentity {
    ResourceIdentity {
        namespace: pipeline.namespace().unwrap_or_default(),
        name: pipeline.name_any(),
        uid: pipeline.uid().unwrap_or_default(),
    }
}

/// As the runtime calls it.
pub fn ssl_mode(mode: Mode) -> SslMode {
    match mode {
        Mode::Disable => SslMode::Disable,
        Mode::Require => SslMode::Require,
        Mode::VerifyCa => SslMode::VerifyCa,
        Mode::VerifyFull => SslMode::VerifyFull,
    }
}

/// As the runtime calls it.
pub fn topic_management(management: meander_crds::TopicManagement) -> TopicManagement {
    match management {
        meander_crds::TopicManagement::Managed => TopicManagement::Managed,
        meander_crds::TopicManagement::External => TopicManagement::External,
    }
}

/// Judges the spec by the facts.
///
/// # Errors
/// Waiting when the slot is another pipeline's, or a Secret is missing.
pub fn validate(pipeline: &CdcPipeline, facts: &Facts, settings: &Settings) -> Result<ValidPipeline, Error> {
    let namespace = pipeline.namespace().unwrap_or_default();
    let spec = &pipeline.spec;
    let postgres = &spec.source.postgres;
    if let Some(holder) = &facts.slot_held_by {
        let message = format!(
            "replication slot {} of {}:{} is that of pipeline {holder}, which came first: delete one of the two, and create it with another slot.name",
            slot_of(pipeline),
            postgres.host,
            postgres.port
        );
        return Err(Error::waiting(SOURCE_READY, Reason::SlotConflict, message));
    }
    let mounted = secrets::of_pipeline(pipeline);
    if let Some(keys) = &facts.secrets {
        secrets::require(keys, &namespace, &mounted)?;
    }

    let mut redis_url = None;
    let redis = match &spec.sinks.redis {
        None => None,
        Some(redis) => {
            let url_file = match (&redis.url_secret_ref, &redis.url) {
                (Some(_), _) => pod::secret_file("redis", "url"),
                (None, Some(url)) => {
                    redis_url = Some(url.clone());
                    format!("{CONFIG_FOLDER}/redis-url").into()
                }
                (None, None) => {
                    let message = "write exactly one of redis.urlSecretRef and redis.url";
                    return Err(Error::invalid(SPEC_VALID, Reason::InvalidValue, message));
                }
            };
            Some(RedisSink {
                url_file,
                ca_file: redis
                    .ca_secret_ref
                    .as_ref()
                    .map(|_| pod::secret_file("redis-ca", "ca.crt")),
                stream_prefix: redis.stream_prefix.clone(),
                max_length: redis.retention.as_ref().map(|retention| retention.max_length),
                durability: match redis.durability {
                    RedisDurability::None => Durability::None,
                    RedisDurability::Aof => Durability::Aof,
                    RedisDurability::Replica => Durability::Replica,
                },
                acknowledgement: match redis.acknowledgement {
                    Acknowledgement::BestEffort => meander_config::Acknowledgement::BestEffort,
                    Acknowledgement::Required => meander_config::Acknowledgement::Required,
                },
            })
        }
    };
    let kafka = &spec.sinks.kafka;
    let log = pod::kafka_log(kafka);
    let config = CaptureConfig {
        pipeline: identity_of(pipeline),
        source: PostgresSource {
            host: postgres.host.clone(),
            port: postgres.port,
            database: postgres.database.clone(),
            username_file: pod::secret_file("postgres", "username"),
            password_file: pod::secret_file("postgres", "password"),
            ssl_mode: ssl_mode(postgres.ssl_mode),
            ca_file: postgres
                .ca_secret_ref
                .as_ref()
                .map(|_| pod::secret_file("postgres-ca", "ca.crt")),
            client_certificate: postgres
                .client_cert_secret_ref
                .as_ref()
                .map(|_| pod::client_certificate("postgres-client")),
            tables: TableSelection {
                include: postgres.tables.include.clone(),
                exclude: postgres.tables.exclude.clone(),
            },
            publication: Publication {
                name: postgres
                    .publication
                    .name
                    .clone()
                    .unwrap_or_else(|| slot_name(&namespace, &pipeline.name_any())),
                management: match postgres.publication.management {
                    Management::Managed => PublicationManagement::Managed,
                    Management::External => PublicationManagement::External,
                },
                partitions: match postgres.publication.partitions {
                    meander_crds::Partitions::Root => Partitions::Root,
                    meander_crds::Partitions::Leaf => Partitions::Leaf,
                },
            },
            message_prefixes: postgres.message_prefixes.clone(),
            origin: match postgres.origin {
                meander_crds::Origin::Any => Origin::Any,
                meander_crds::Origin::None => Origin::None,
            },
            slot_name: slot_of(pipeline),
            slot_failover: postgres.slot.failover,
            heartbeat_interval_seconds: postgres.heartbeat_interval_seconds,
            snapshot: Snapshot {
                mode: match postgres.snapshot.mode {
                    Reading::Bulk => SnapshotMode::Bulk,
                    Reading::Incremental => SnapshotMode::Incremental,
                    Reading::Never => SnapshotMode::Never,
                },
                parallelism: postgres.snapshot.parallelism.unwrap_or(Snapshot::default().parallelism),
                requests: postgres
                    .snapshot
                    .requests
                    .iter()
                    .map(|request| SnapshotRequest {
                        id: request.id.clone(),
                        tables: request.tables.clone(),
                    })
                    .collect(),
            },
        },
        format: match spec.format {
            PipelineFormat::Protobuf => Format::Protobuf,
            PipelineFormat::DebeziumJson => {
                let debezium = spec.debezium.unwrap_or_default();
                Format::DebeziumJson {
                    schemas: debezium.schemas,
                    transaction_metadata: debezium.transaction_metadata,
                }
            }
        },
        kafka: KafkaSink {
            bootstrap_servers: log.bootstrap_servers,
            tls: log.tls,
            sasl: log.sasl,
            topic_prefix: log.topic_prefix,
            partitions: kafka.topics.partitions,
            replication_factor: kafka.topics.replication_factor,
            topic_config: kafka.topics.config.clone(),
            topic_management: topic_management(kafka.topics.management),
        },
        redis,
        accept_source_gap: pipeline.annotations().get(ACCEPT_SOURCE_GAP).cloned(),
        on_source_gap: match spec.on_source_gap {
            meander_crds::OnSourceGap::Stop => OnSourceGap::Stop,
            meander_crds::OnSourceGap::Resnapshot => OnSourceGap::Resnapshot,
        },
        on_oversized_row: match spec.on_oversized_row {
            meander_crds::OnOversizedRow::Stop => OnOversizedRow::Stop,
            meander_crds::OnOversizedRow::OmitValues => OnOversizedRow::OmitValues,
        },
        standby: spec.runtime.standby == Standby::Hot,
        operator: Some(pod::operator_link(settings)),
        admin_address: ([0, 0, 0, 0], 9464).into(),
    };
    let config_yaml = meander_config::to_yaml(&config).map_err(|error| {
        Error::invalid(
            SPEC_VALID,
            Reason::InvalidValue,
            format!("the spec has no form in YAML: {error}"),
        )
    })?;
    let config_hash = digest(
        &format!("{config_yaml}\n{}", redis_url.as_deref().unwrap_or_default()),
        16,
    );
    Ok(ValidPipeline {
        config,
        config_yaml,
        redis_url,
        config_hash,
        secrets: mounted,
        image: spec
            .runtime
            .image
            .clone()
            .unwrap_or_else(|| settings.runtime_image.clone()),
        resources: spec.runtime.resources.clone(),
        log_level: spec.runtime.log_level,
        suspend: spec.suspend,
    })
}

//! From a spec and facts to a replay that can be built, or the reason why not.

use std::num::NonZeroU32;

use jiff::Timestamp;
use kube::ResourceExt as _;
use meander_config::{
    GrpcReceiver, HttpEndpoint, KafkaLog, PostgresServer, RedisStreams, ReplayConfig, ReplayEnd, ReplayStart,
    ReplayTarget as Target, ResourceIdentity, Speed, TableSelection,
};
use meander_crds::{
    ChangePosition, EndAt, KafkaSink, KafkaTarget, LogLevel, PipelineFormat, PostgresTarget, RecordOffset,
    ReplayFilter, ReplayJob, ReplayOperation, ReplayOrder, ReplayTarget, Resources, RowKey,
};

use super::dereference::Facts;
use crate::{
    conditions::ACCEPTED,
    context::Settings,
    error::{Error, Reason},
    pipeline::validate::{identity_of, slot_of, ssl_mode, topic_management},
    pod,
    secrets::{self, SecretFiles, TARGET_FOLDERS},
};

/// A replay that can be built.
#[derive(Clone, Debug)]
pub struct ValidReplay {
    /// What the runtime reads.
    pub config: ReplayConfig,
    /// The same as YAML.
    pub config_yaml: String,
    /// Secrets that the pod mounts.
    pub secrets: Vec<SecretFiles>,
    /// Port for subscribers, if the replay serves.
    pub serve_port: Option<u16>,
    /// Image of the pod: the pipeline's, so that who wrote the log reads it.
    pub image: String,
    /// CPU and memory of the pod.
    pub resources: Option<Resources>,
    /// How much the pod logs.
    pub log_level: LogLevel,
}

/// Judges the spec by the facts.
///
/// # Errors
/// Invalid when a value means nothing; Waiting when the pipeline or a Secret is not as it must be.
pub fn validate(replay: &ReplayJob, facts: &Facts, settings: &Settings) -> Result<ValidReplay, Error> {
    let namespace = replay.namespace().unwrap_or_default();
    let spec = &replay.spec;
    let invalid = |message: String| Error::invalid(ACCEPTED, Reason::InvalidValue, message);
    let name = &spec.pipeline_ref.name;
    let Some(pipeline) = &facts.pipeline else {
        let message =
            format!("CdcPipeline {name} does not exist in the namespace {namespace}; create it, or name another");
        return Err(Error::waiting(ACCEPTED, Reason::PipelineNotFound, message));
    };
    // Whether it is suspended does not matter: the log is in Kafka.
    if facts.job.is_none() && pipeline.metadata.deletion_timestamp.is_some() {
        let message = format!(
            "CdcPipeline {name} is being deleted, so the replay does not start; create it again, or delete this replay"
        );
        return Err(Error::waiting(ACCEPTED, Reason::PipelineTerminating, message));
    }
    let time = |field: &str, time: &str| {
        time.parse::<Timestamp>()
            .map(|_| time.to_owned())
            .map_err(|_| invalid(format!("{field} is not a time; write it like 2026-11-20T10:00:00Z")))
    };
    // The API server admits exactly one of each.
    let from = if let Some(from) = &spec.from.time {
        ReplayStart::Time(time("from.time", from)?)
    } else if let Some(ChangePosition(from)) = &spec.from.position {
        ReplayStart::Position(from.clone())
    } else if let Some(from) = &spec.from.offset {
        ReplayStart::Offset(record(from))
    } else {
        ReplayStart::Beginning
    };
    let to = if let Some(to) = &spec.to.time {
        ReplayEnd::Time(time("to.time", to)?)
    } else if let Some(ChangePosition(to)) = &spec.to.position {
        ReplayEnd::Position(to.clone())
    } else if let Some(to) = &spec.to.offset {
        ReplayEnd::Offset(record(to))
    } else if spec.to.at == Some(EndAt::Live) {
        ReplayEnd::Live
    } else {
        ReplayEnd::Now
    };
    let speed = speed(replay)?;

    let mounted = secrets::of_replay(replay, Some(pipeline));
    if let Some(keys) = &facts.secrets {
        secrets::require(keys, &namespace, &mounted)?;
    }
    let mut serve_port = None;
    // What is written is told from what other replays write, and from what a pipeline does.
    let default_prefix = || format!("replay.{namespace}.{}", replay.name_any());
    // The API server admits exactly one.
    let target = match &spec.delivers_to() {
        _ if spec.dry_run => Target::DryRun,
        ReplayTarget { log: Some(_), .. } => Target::Log,
        ReplayTarget { grpc: Some(grpc), .. } => match (&grpc.endpoint, &grpc.serve) {
            (Some(endpoint), None) => Target::GrpcCall(GrpcReceiver {
                endpoint: endpoint.clone(),
                ca_file: (grpc.ca_secret_ref.as_ref()).map(|_| pod::secret_file("target-ca", "ca.crt")),
                client_certificate: (grpc.client_cert_secret_ref.as_ref())
                    .map(|_| pod::client_certificate("target-client")),
                token_file: (grpc.token_secret_ref.as_ref()).map(|_| pod::secret_file("target", "token")),
            }),
            (None, Some(serve)) => {
                serve_port = Some(serve.port);
                Target::GrpcServe {
                    address: ([0, 0, 0, 0], serve.port).into(),
                    token_file: pod::secret_file("subscribers", "token"),
                    certificate: (serve.tls_secret_ref.as_ref()).map(|_| pod::client_certificate("serving")),
                }
            }
            _ => return Err(invalid("write exactly one of grpc.endpoint and grpc.serve".to_owned())),
        },
        ReplayTarget {
            postgres: Some(postgres),
            ..
        } => {
            if pipeline.spec.format == PipelineFormat::DebeziumJson {
                let message = format!(
                    "CdcPipeline {name} has the format DebeziumJson, which does not hold every value as a database needs it; replay it \
                     over gRPC, or a pipeline of the format Protobuf into PostgreSQL"
                );
                return Err(Error::invalid(ACCEPTED, Reason::FormatNotExact, message));
            }
            Target::Postgres(postgres_server(postgres))
        }
        ReplayTarget { kafka: Some(kafka), .. } => {
            Target::Kafka(kafka_sink(kafka, default_prefix(), &pipeline.spec.sinks.kafka))
        }
        ReplayTarget { redis: Some(redis), .. } => Target::Redis(RedisStreams {
            url_file: pod::secret_file("target", "url"),
            ca_file: redis
                .ca_secret_ref
                .as_ref()
                .map(|_| pod::secret_file("target-ca", "ca.crt")),
            stream_prefix: redis.stream_prefix.clone().unwrap_or_else(default_prefix),
        }),
        ReplayTarget { http: Some(http), .. } => Target::Http(HttpEndpoint {
            url: http.url.clone(),
            token_file: http
                .token_secret_ref
                .as_ref()
                .map(|_| pod::secret_file("target", "token")),
            ca_file: http
                .ca_secret_ref
                .as_ref()
                .map(|_| pod::secret_file("target-ca", "ca.crt")),
        }),
        _ => return Err(invalid("write exactly one target".to_owned())),
    };
    let filter = spec.filter.as_ref().map(filter);
    if pipeline.spec.format == PipelineFormat::DebeziumJson
        && filter.as_ref().is_some_and(|filter| filter.expression.is_some())
    {
        let message = format!(
            "CdcPipeline {name} has the format DebeziumJson, which does not hold every value as filter.expression needs it; leave the \
             expression out, or replay a pipeline of the format Protobuf"
        );
        return Err(Error::invalid(ACCEPTED, Reason::FormatNotExact, message));
    }
    let config = ReplayConfig {
        job: ResourceIdentity {
            namespace,
            name: replay.name_any(),
            uid: replay.uid().unwrap_or_default(),
        },
        pipeline: identity_of(pipeline),
        slot_name: slot_of(pipeline),
        kafka: pod::kafka_log(&pipeline.spec.sinks.kafka),
        from,
        to,
        speed,
        suspended: spec.suspend,
        order: match spec.order {
            ReplayOrder::Commit => meander_config::ReplayOrder::Commit,
            ReplayOrder::PerKey => meander_config::ReplayOrder::PerKey,
        },
        filter,
        max_gap_seconds: spec.max_gap_seconds.and_then(NonZeroU32::new),
        target,
        operator: Some(pod::operator_link(settings)),
        admin_address: ([0, 0, 0, 0], 9464).into(),
        termination_message_file: Some("/dev/termination-log".into()),
    };
    let config_yaml = yaml(&config)?;
    let image = pipeline
        .spec
        .runtime
        .image
        .clone()
        .unwrap_or_else(|| settings.runtime_image.clone());
    Ok(ValidReplay {
        config,
        config_yaml,
        secrets: mounted,
        serve_port,
        image,
        resources: spec.runtime.resources.clone(),
        log_level: spec.runtime.log_level,
    })
}

/// What a replay that was started goes on with, as YAML: what it was started with, whatever has become of its pipeline since, but for
/// what the spec asks of a running replay.
///
/// # Errors
/// Invalid when a value means nothing.
pub fn started(replay: &ReplayJob, config: ReplayConfig, settings: &Settings) -> Result<String, Error> {
    let config = ReplayConfig {
        speed: speed(replay)?,
        suspended: replay.spec.suspend,
        operator: Some(pod::operator_link(settings)),
        ..config
    };
    yaml(&config)
}

fn speed(replay: &ReplayJob) -> Result<Speed, Error> {
    let speed = replay.spec.speed.to_string();
    speed
        .parse()
        .map_err(|error| Error::invalid(ACCEPTED, Reason::InvalidValue, format!("speed: {error}")))
}

fn yaml(config: &ReplayConfig) -> Result<String, Error> {
    meander_config::to_yaml(config).map_err(|error| {
        let message = format!("the spec has no form in YAML: {error}");
        Error::invalid(ACCEPTED, Reason::InvalidValue, message)
    })
}

fn record(offset: &RecordOffset) -> meander_config::RecordOffset {
    meander_config::RecordOffset {
        topic: offset.topic.clone(),
        partition: offset.partition,
        offset: offset.offset,
    }
}

fn filter(filter: &ReplayFilter) -> meander_config::ReplayFilter {
    meander_config::ReplayFilter {
        tables: filter.tables.as_ref().map(|tables| TableSelection {
            include: tables.include.clone(),
            exclude: tables.exclude.clone(),
        }),
        operations: filter.operations.iter().copied().map(operation).collect(),
        keys: filter.keys.iter().map(|RowKey(key)| key.clone()).collect(),
        expression: filter.expression.clone(),
    }
}

fn operation(operation: ReplayOperation) -> meander_config::ReplayOperation {
    use meander_config::ReplayOperation as Operation;
    match operation {
        ReplayOperation::Insert => Operation::Insert,
        ReplayOperation::Update => Operation::Update,
        ReplayOperation::Delete => Operation::Delete,
        ReplayOperation::Truncate => Operation::Truncate,
        ReplayOperation::Read => Operation::Read,
        ReplayOperation::Message => Operation::Message,
        ReplayOperation::SchemaChange => Operation::SchemaChange,
        ReplayOperation::SourceGap => Operation::SourceGap,
    }
}

/// The cluster is the pipeline's unless another is named.
fn kafka_sink(target: &KafkaTarget, default_prefix: String, log: &KafkaSink) -> meander_config::KafkaSink {
    let [signing_in, trusting, showing] = TARGET_FOLDERS;
    let cluster = match &target.bootstrap_servers {
        None => pod::kafka_log(log),
        Some(servers) => KafkaLog {
            bootstrap_servers: servers.clone(),
            tls: target.tls.as_ref().map(|tls| pod::kafka_tls(tls, trusting, showing)),
            sasl: target.sasl.as_ref().map(|sasl| pod::kafka_sasl(sasl, signing_in)),
            topic_prefix: String::new(),
        },
    };
    meander_config::KafkaSink {
        bootstrap_servers: cluster.bootstrap_servers,
        tls: cluster.tls,
        sasl: cluster.sasl,
        topic_prefix: target.topic_prefix.clone().unwrap_or(default_prefix),
        partitions: target.topics.partitions.unwrap_or(log.topics.partitions),
        replication_factor: target.topics.replication_factor,
        topic_config: target.topics.config.clone(),
        topic_management: topic_management(target.topics.management),
    }
}

fn postgres_server(target: &PostgresTarget) -> PostgresServer {
    PostgresServer {
        host: target.host.clone(),
        port: target.port,
        database: target.database.clone(),
        username_file: pod::secret_file("target", "username"),
        password_file: pod::secret_file("target", "password"),
        ssl_mode: ssl_mode(target.ssl_mode),
        ca_file: target
            .ca_secret_ref
            .as_ref()
            .map(|_| pod::secret_file("target-ca", "ca.crt")),
        client_certificate: target
            .client_cert_secret_ref
            .as_ref()
            .map(|_| pod::client_certificate("target-client")),
    }
}

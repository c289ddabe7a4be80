//! `ReplayJob`: a stretch of a pipeline's log, out again at a chosen pace.

use std::{collections::BTreeMap, fmt};

use k8s_openapi::{apimachinery::pkg::apis::meta::v1::Condition, apimachinery::pkg::util::intstr::IntOrString};
use kube::{CustomResource, KubeSchema};
use schemars::{JsonSchema, Schema, SchemaGenerator, json_schema};
use serde::{Deserialize, Serialize};

use crate::{
    common::{LogLevel, Resources, SecretKeyReference, SecretReference, conditions},
    pipeline::{KafkaSasl, KafkaTls, SslMode, TableSelection, TopicManagement},
};

/// Which stretch of which pipeline's log is replayed, how fast, and where to.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize, CustomResource, KubeSchema)]
#[kube(
    group = "meander.dev",
    version = "v1alpha1",
    kind = "ReplayJob",
    plural = "replayjobs",
    namespaced,
    category = "cdc",
    shortname = "rpj",
    status = "ReplayJobStatus",
    derive = "PartialEq",
    doc = "A ReplayJob takes a stretch of a CdcPipeline's log back out of Kafka, in commit order and at a chosen pace, and delivers it.",
    validation = Rule::new("self.metadata.name.size() <= 50").message("metadata.name must have at most 50 characters: the names of the pods are made from it"),
    validation = Rule::new("self.metadata.name.matches('^[a-z][a-z0-9-]*$')").message("metadata.name must start with a letter and have no dot: it becomes the name of a Service"),
    validation = Rule::new("!has(oldSelf.status) || !has(oldSelf.status.phase) || !(oldSelf.status.phase in ['Succeeded', 'Failed', 'Cancelled']) || (self.spec.speed == oldSelf.spec.speed && self.spec.suspend == oldSelf.spec.suspend && self.spec.cancel == oldSelf.spec.cancel)").message("this replay has ended, and does nothing with another speed, suspend or cancel: create another ReplayJob"),
    printcolumn(name = "Pipeline", type_ = "string", json_path = ".spec.pipelineRef.name"),
    printcolumn(name = "Phase", type_ = "string", json_path = ".status.phase"),
    printcolumn(name = "Speed", type_ = "string", json_path = ".spec.speed"),
    printcolumn(name = "Progress", type_ = "string", json_path = ".status.progress.progress"),
    printcolumn(name = "Delivered", type_ = "integer", json_path = ".status.progress.delivered"),
    printcolumn(name = "Reason", type_ = "string", json_path = ".status.conditions[?(@.type==\"Progressing\")].reason", priority = 1),
    printcolumn(name = "Age", type_ = "date", json_path = ".metadata.creationTimestamp")
)]
#[x_kube(
    validation = Rule::new("!has(self.from.time) || !has(self.to.time) || self.from.time < self.to.time").message("from.time must be before to.time"),
    validation = Rule::new("has(self.activeDeadlineSeconds) == has(oldSelf.activeDeadlineSeconds) && (!has(self.activeDeadlineSeconds) || self.activeDeadlineSeconds == oldSelf.activeDeadlineSeconds)").message("activeDeadlineSeconds is immutable: create another ReplayJob"),
    validation = Rule::new("!has(self.to.at) || self.to.at != 'Live' || (has(self.target) && has(self.target.grpc) && has(self.target.grpc.serve) && !self.dryRun)").message("to.at Live is for subscribers, who come and go: write target.grpc.serve, or to.at Now"),
    validation = Rule::new("has(self.target) || self.dryRun").message("write in target where the changes go, or set dryRun"),
    validation = Rule::new("has(self.target) == has(oldSelf.target) && (!has(self.target) || self.target == oldSelf.target)").message("target is immutable: create another ReplayJob"),
    validation = Rule::new("self.order != 'PerKey' || !has(self.target) || has(self.target.log) || (has(self.target.grpc) && has(self.target.grpc.endpoint))").message("order PerKey is for target.log and target.grpc.endpoint: the others need commit order"),
    validation = Rule::new("has(self.filter) == has(oldSelf.filter) && (!has(self.filter) || self.filter == oldSelf.filter)").message("filter is immutable: create another ReplayJob"),
    validation = Rule::new("has(self.maxGapSeconds) == has(oldSelf.maxGapSeconds) && (!has(self.maxGapSeconds) || self.maxGapSeconds == oldSelf.maxGapSeconds)").message("maxGapSeconds is immutable: create another ReplayJob")
)]
#[serde(rename_all = "camelCase")]
pub struct ReplayJobSpec {
    /// The pipeline whose log is replayed. Immutable.
    #[x_kube(validation = Rule::new("self == oldSelf").message("pipelineRef is immutable: create another ReplayJob"))]
    pub pipeline_ref: PipelineReference,
    /// The first change. Immutable.
    #[x_kube(validation = Rule::new("self == oldSelf").message("from is immutable: create another ReplayJob"))]
    pub from: ReplayStart,
    /// The end. Immutable.
    #[x_kube(validation = Rule::new("self == oldSelf").message("to is immutable: create another ReplayJob"))]
    pub to: ReplayEnd,
    /// How many times faster than the original: a whole number (`10`), a decimal in quotes (`"0.5"`), or `max` for as fast as the
    /// target takes it. A change takes effect on the running replay.
    #[serde(default)]
    #[x_kube(validation = Rule::new("type(self) == int ? self > 0 : self == 'max' || (self.matches('^[0-9]{1,7}([.][0-9]{1,6})?$') && double(self) > 0.0)").message("speed is a positive number such as 10 or \"0.5\", or \"max\""))]
    pub speed: Speed,
    /// In which order changes are delivered. `PerKey` is for target.log and target.grpc.endpoint, and pays at the speed `max`. Immutable.
    #[serde(default)]
    #[x_kube(validation = Rule::new("self == oldSelf").message("order is immutable: create another ReplayJob"))]
    pub order: ReplayOrder,
    /// Cut every silence between two changes that are delivered to this many seconds of the original time, before the speed is applied;
    /// no silence where this is left out. Immutable.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    #[schemars(range(min = 1, max = 31_536_000))]
    pub max_gap_seconds: Option<u32>,
    /// Which of the changes are delivered; all where it is left out. Immutable.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub filter: Option<ReplayFilter>,
    /// Where the changes go. Immutable.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub target: Option<ReplayTarget>,
    /// Deliver nothing, and count what would be: everything is read and filtered at the speed `max`, and `target` is left alone. Immutable.
    #[serde(default)]
    #[x_kube(validation = Rule::new("self == oldSelf").message("dryRun is immutable: create another ReplayJob"))]
    pub dry_run: bool,
    /// Hold delivery. A job that is created suspended starts when this is set to false.
    #[serde(default)]
    pub suspend: bool,
    /// End the replay now, for good.
    #[serde(default)]
    #[x_kube(validation = Rule::new("self || !oldSelf").message("cancel cannot be taken back: create another ReplayJob"))]
    pub cancel: bool,
    /// How many pods of the replay are replaced after they ended in an error, the first after 10 s, each further one after twice as
    /// long. One that a drained node or an eviction ended is replaced in any case, and does not count. Immutable.
    #[serde(default = "default_backoff_limit")]
    #[schemars(range(min = 0, max = 1000))]
    #[x_kube(validation = Rule::new("self == oldSelf").message("backoffLimit is immutable: create another ReplayJob"))]
    pub backoff_limit: u32,
    /// The replay has failed if it has not ended this many seconds after its pod was first started, whether it was held meanwhile or
    /// not; it may take as long as it does where this is left out. Immutable.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    #[schemars(range(min = 1, max = 31_536_000))]
    pub active_deadline_seconds: Option<u32>,
    /// Delete the finished job after this many seconds; it stays where this is left out.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    #[schemars(range(min = 0, max = 31_536_000))]
    pub ttl_seconds_after_finished: Option<u32>,
    /// The pod that replays. Immutable.
    #[serde(default)]
    #[x_kube(validation = Rule::new("self == oldSelf").message("runtime is immutable: create another ReplayJob"))]
    pub runtime: ReplayRuntime,
}

impl ReplayJobSpec {
    /// Where the changes go: nowhere in a dry run.
    #[must_use]
    pub fn delivers_to(&self) -> ReplayTarget {
        self.target.clone().filter(|_| !self.dry_run).unwrap_or_default()
    }
}

/// Names a CdcPipeline in the same namespace.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize, KubeSchema)]
#[serde(rename_all = "camelCase")]
pub struct PipelineReference {
    /// Name of the CdcPipeline.
    #[schemars(length(min = 1, max = 253))]
    pub name: String,
}

/// Where a replay starts.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize, KubeSchema)]
#[x_kube(validation = Rule::new("[has(self.time), has(self.position), has(self.offset), has(self.at)].exists_one(given, given)").message("write exactly one of from.time, from.position, from.offset and from.at"))]
#[serde(rename_all = "camelCase")]
pub struct ReplayStart {
    /// With the first change committed at or after this time, such as `2026-11-20T10:00:00Z`.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    #[schemars(extend("format" = "date-time"), length(max = 40))]
    pub time: Option<String>,
    /// With the transaction of the change at this position, such as `1:0/19BF3A0:0`: what the header `meander-position` of a record
    /// says, and the field `position` of an entry in Redis.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub position: Option<ChangePosition>,
    /// With the transaction of a record in Kafka.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub offset: Option<RecordOffset>,
    /// With the oldest change that Kafka still holds.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub at: Option<Beginning>,
}

/// The coordinate of a change: `epoch:LSN:ordinal`.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(transparent)]
pub struct ChangePosition(pub String);

impl JsonSchema for ChangePosition {
    fn schema_name() -> std::borrow::Cow<'static, str> {
        "ChangePosition".into()
    }

    fn inline_schema() -> bool {
        true
    }

    fn json_schema(_: &mut SchemaGenerator) -> Schema {
        json_schema!({
            "type": "string",
            "maxLength": 48,
            "x-kubernetes-validations": [{
                "rule": "self.matches('^[0-9]{1,3}:[0-9A-Fa-f]{1,8}/[0-9A-Fa-f]{1,8}:[0-9]{1,20}$') && int(self.split(':')[0]) > 0 && int(self.split(':')[0]) < 256",
                "message": "position is epoch:LSN:ordinal with an epoch from 1 to 255, such as 1:0/19BF3A0:0, as the header meander-position of a record says it",
            }],
        })
    }
}

/// A record in one of the pipeline's topics.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize, KubeSchema)]
#[serde(rename_all = "camelCase")]
pub struct RecordOffset {
    /// Its topic.
    #[schemars(length(min = 1, max = 249))]
    pub topic: String,
    /// Its partition.
    #[serde(default)]
    #[schemars(range(min = 0))]
    pub partition: i32,
    /// Its offset. Where nobody can read a record there, such as the mark of a transaction's end, the next one is meant where a range
    /// begins, and the one before where it ends.
    #[schemars(range(min = 0))]
    pub offset: i64,
}

/// A start that is no time: with the oldest change that Kafka still holds.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize, JsonSchema)]
pub enum Beginning {
    /// The oldest change that Kafka still holds.
    Beginning,
}

/// Where a replay ends.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize, KubeSchema)]
#[x_kube(validation = Rule::new("[has(self.time), has(self.position), has(self.offset), has(self.at)].exists_one(given, given)").message("write exactly one of to.time, to.position, to.offset and to.at"))]
#[serde(rename_all = "camelCase")]
pub struct ReplayEnd {
    /// Before the first change committed at or after this time, such as `2026-11-20T11:00:00Z`. A time later than what is
    /// published when the replay starts ends the range there: a replay does not wait for changes to come.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    #[schemars(extend("format" = "date-time"), length(max = 40))]
    pub time: Option<String>,
    /// With the transaction of the change at this position, such as `1:0/19BF3A0:0`, as a whole.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub position: Option<ChangePosition>,
    /// With the transaction of a record in Kafka, as a whole.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub offset: Option<RecordOffset>,
    /// `Now`: with the last transaction that is published when the replay starts. `Live`: never; what is captured later follows, as it
    /// comes, until `cancel` (for `target.grpc.serve`).
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub at: Option<EndAt>,
}

/// An end that is no time.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize, JsonSchema)]
pub enum EndAt {
    /// The last transaction that is published when the replay starts.
    Now,
    /// None: what is captured later follows.
    Live,
}

/// In which order changes are delivered.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize, Deserialize, JsonSchema)]
pub enum ReplayOrder {
    /// As they were committed, transaction by transaction, over all tables and partitions.
    #[default]
    Commit,
    /// Those of a row as they were committed; those of different rows in any order, as fast as they can be read.
    PerKey,
}

/// Which changes are delivered: those that every part of it keeps. What is left out is counted, and paces nothing.
#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize, Deserialize, KubeSchema)]
#[x_kube(validation = Rule::new("has(self.tables) || has(self.operations) || has(self.keys) || has(self.expression)").message("filter needs tables, operations, keys or expression: leave it out to deliver everything"))]
#[serde(rename_all = "camelCase")]
pub struct ReplayFilter {
    /// Changes of these tables. Logical messages are of none.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub tables: Option<TableSelection>,
    /// Changes of these kinds. An UPDATE of a key is a Delete of the old key and an Update under the new one. The markers of a snapshot are
    /// kept where Insert, Update and Read are.
    #[serde(default, skip_serializing_if = "Vec::is_empty")]
    #[schemars(length(min = 1, max = 8))]
    pub operations: Vec<ReplayOperation>,
    /// Changes of rows that have one of these keys: the names of key columns, and their values as the record's key in Kafka says them, such as
    /// `{trade_id: "7"}`. A column that is not named may have any value. TRUNCATE, SchemaChange and SourceGap, which touch every row, are
    /// kept; messages and the markers of snapshots are not.
    #[serde(default, skip_serializing_if = "Vec::is_empty")]
    #[schemars(length(min = 1, max = 64))]
    pub keys: Vec<RowKey>,
    /// Changes of rows for which this is true: an expression in CEL over `before` and `after` (column name to value, or null), `op`, `table`,
    /// `schema` and `commitTime`, such as `op != 'Delete' && double(after.price) > 100.0`. What it cannot answer for a change ends the
    /// replay. Needs a pipeline of the format Protobuf. TRUNCATE, SchemaChange and SourceGap are kept, messages and the markers of
    /// snapshots are not.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    #[schemars(length(min = 1, max = 2048))]
    pub expression: Option<String>,
}

/// What a change does.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize, JsonSchema)]
pub enum ReplayOperation {
    /// A row comes.
    Insert,
    /// A row changes.
    Update,
    /// A row goes.
    Delete,
    /// All rows of a table go.
    Truncate,
    /// A row, as a snapshot found it.
    Read,
    /// A logical message.
    Message,
    /// A table has another schema.
    SchemaChange,
    /// Changes were lost before this.
    SourceGap,
}

/// Names of key columns, and values.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(transparent)]
pub struct RowKey(pub BTreeMap<String, String>);

impl JsonSchema for RowKey {
    fn schema_name() -> std::borrow::Cow<'static, str> {
        "RowKey".into()
    }

    fn inline_schema() -> bool {
        true
    }

    fn json_schema(_: &mut SchemaGenerator) -> Schema {
        json_schema!({
            "type": "object",
            "minProperties": 1,
            "maxProperties": 16,
            "additionalProperties": {"type": "string", "maxLength": 1024},
        })
    }
}

/// An integer, or a string with a decimal or `max`.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(transparent)]
pub struct Speed(pub IntOrString);

impl Default for Speed {
    fn default() -> Self {
        Self(IntOrString::Int(1))
    }
}

impl fmt::Display for Speed {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match &self.0 {
            IntOrString::Int(number) => write!(f, "{number}"),
            IntOrString::String(text) => f.write_str(text),
        }
    }
}

impl JsonSchema for Speed {
    fn schema_name() -> std::borrow::Cow<'static, str> {
        "Speed".into()
    }

    fn inline_schema() -> bool {
        true
    }

    fn json_schema(_: &mut SchemaGenerator) -> Schema {
        json_schema!({
            "x-kubernetes-int-or-string": true,
            "maxLength": 14,
        })
    }
}

/// Where the changes go.
#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize, Deserialize, KubeSchema)]
#[x_kube(validation = Rule::new("[has(self.log), has(self.grpc), has(self.postgres), has(self.kafka), has(self.redis), has(self.http)].exists_one(given, given)").message("write exactly one of target.log, target.grpc, target.postgres, target.kafka, target.redis and target.http"))]
#[serde(rename_all = "camelCase")]
pub struct ReplayTarget {
    /// Into the pod's own log, one line of JSON for each change: `kubectl logs job/<name>-replay`.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub log: Option<LogTarget>,
    /// Over gRPC.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub grpc: Option<GrpcTarget>,
    /// Into the tables of a PostgreSQL database, exactly once.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub postgres: Option<PostgresTarget>,
    /// Into Kafka topics beside the log, exactly once.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub kafka: Option<KafkaTarget>,
    /// Into Redis streams of the replay's own, exactly once.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub redis: Option<RedisTarget>,
    /// To an HTTP endpoint, at least once.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub http: Option<HttpTarget>,
}

/// Into the pod's own log; there is nothing to set.
#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize, Deserialize, KubeSchema)]
pub struct LogTarget {}

/// A PostgreSQL database, version 14 or later, in which the changes are made: each transaction of the source is one of it. Its tables have
/// to exist. The pipeline's format has to be Protobuf.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize, KubeSchema)]
#[x_kube(
    validation = Rule::new("!has(self.caSecretRef) || self.sslMode in ['VerifyCA', 'VerifyFull']").message("target.postgres.caSecretRef is for checking the server's certificate: set sslMode to VerifyFull, or leave caSecretRef out"),
    validation = Rule::new("self.sslMode != 'VerifyCA' || has(self.caSecretRef)").message("target.postgres.sslMode VerifyCA needs caSecretRef: without the host name a certificate of any public authority would do"),
    validation = Rule::new("!has(self.clientCertSecretRef) || self.sslMode != 'Disable'").message("target.postgres.clientCertSecretRef needs TLS: set sslMode to VerifyFull, or leave clientCertSecretRef out")
)]
#[serde(rename_all = "camelCase")]
pub struct PostgresTarget {
    /// Host name or address.
    #[schemars(length(min = 1, max = 253))]
    #[x_kube(validation = Rule::new("!self.matches('[/@, ]') && !self.matches('^[^:]*:[^:]*$')").message("target.postgres.host is a bare host name or address, such as postgres.shop.svc; the port, user and database have fields of their own"))]
    pub host: String,
    /// TCP port.
    #[serde(default = "default_postgres_port")]
    #[schemars(range(min = 1, max = 65535))]
    pub port: u16,
    /// Name of the database.
    #[schemars(length(min = 1, max = 63))]
    pub database: String,
    /// Secret with the keys `username` and `password`. The user needs SELECT, INSERT, UPDATE, DELETE and TRUNCATE on the tables, and a
    /// schema `meander` of its own, where the place of the replay is kept.
    pub credentials_secret_ref: SecretReference,
    /// Whether the connection is encrypted, and what the server has to prove. `Require` wants SCRAM-SHA-256 with channel binding of it.
    #[serde(default)]
    pub ssl_mode: SslMode,
    /// Key of a Secret that holds the certificates of the authorities which the server's certificate may come from, PEM; those of
    /// Mozilla's list where it is left out.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub ca_secret_ref: Option<SecretKeyReference>,
    /// Secret of type `kubernetes.io/tls` with the certificate that the replay shows to the server.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub client_cert_secret_ref: Option<SecretReference>,
}

/// Topics of a Kafka cluster, one for each topic of the log. Key, value, headers and timestamp of each record are as they are in the log;
/// more headers tell where it comes from (`meander-replay-job` and others). Readers need `isolation.level=read_committed`.
#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize, Deserialize, KubeSchema)]
#[x_kube(
    validation = Rule::new("has(self.bootstrapServers) || (!has(self.tls) && !has(self.sasl))").message("target.kafka.tls and target.kafka.sasl are for another cluster: add bootstrapServers, or leave them out to use the pipeline's cluster as the pipeline does"),
    validation = Rule::new("!has(self.sasl) || self.sasl.mechanism != 'Plain' || has(self.tls)").message("target.kafka.sasl.mechanism Plain sends the password itself: add tls (tls: {} trusts Mozilla's list of authorities), or use ScramSha512")
)]
#[serde(rename_all = "camelCase")]
pub struct KafkaTarget {
    /// Brokers to start from, each `host:port`; where they are left out, it is the pipeline's cluster, with the pipeline's `tls` and `sasl`.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    #[schemars(length(min = 1, max = 16), inner(length(min = 3, max = 260)))]
    #[x_kube(validation = Rule::new("self.all(server, server.matches('^[^/@, ]+:[1-9][0-9]{0,4}$') && int(server.substring(server.lastIndexOf(':') + 1)) < 65536)").message("each entry of target.kafka.bootstrapServers is host:port, such as kafka:9092"))]
    pub bootstrap_servers: Option<Vec<String>>,
    /// Encrypts the connections to `bootstrapServers`; they are in plain text where it is left out.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub tls: Option<KafkaTls>,
    /// Signs in to `bootstrapServers` with user and password.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub sasl: Option<KafkaSasl>,
    /// The changes of a table go to `<topicPrefix>.<schema>.<table>`; `replay.<namespace>.<name>` where it is left out. It must not overlap the
    /// prefix of a pipeline.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    #[schemars(length(min = 1, max = 160))]
    #[x_kube(
        validation = Rule::new("self.matches('^[A-Za-z0-9_-]([A-Za-z0-9._-]*[A-Za-z0-9_-])?$')").message("target.kafka.topicPrefix has letters, digits, dots, underscores and dashes only, and neither starts nor ends with a dot"),
        validation = Rule::new("!self.startsWith('__')").message("target.kafka.topicPrefix must not start with two underscores: topics of such names are Kafka's own, and Meander's")
    )]
    pub topic_prefix: Option<String>,
    /// How topics are created.
    #[serde(default)]
    pub topics: KafkaTargetTopics,
}

/// How the topics of a replay are created. Topics that exist already keep what they have.
#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize, Deserialize, KubeSchema)]
#[serde(rename_all = "camelCase")]
pub struct KafkaTargetTopics {
    /// Partitions of each topic; changes of one key are always in one partition. As many as the pipeline's topics have where it is left
    /// out: then each record is in the partition that it has in the log.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    #[schemars(range(min = 1, max = 1000))]
    pub partitions: Option<i32>,
    /// Replicas of each topic; the broker's default where it is left out.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    #[schemars(range(min = 1, max = 16))]
    pub replication_factor: Option<i32>,
    /// Settings of each topic. `retention.ms` is -1 unless it is set here: Kafka counts from the timestamps, which are as old as the changes.
    #[serde(default, skip_serializing_if = "BTreeMap::is_empty")]
    #[schemars(extend("maxProperties" = 32))]
    #[x_kube(
        validation = Rule::new("!('cleanup.policy' in self) && !('message.timestamp.type' in self)").message("target.kafka.topics.config cannot set cleanup.policy and message.timestamp.type: every record is to be kept, with its timestamp")
    )]
    pub config: BTreeMap<String, String>,
    /// Who makes the topics, and that of the replay's place, `__meander.<namespace>.<name>.replay`.
    #[serde(default)]
    pub management: TopicManagement,
}

/// Streams of a Redis server, one for each topic of the log. Ids, positions, keys and values of the entries are as in the streams of a pipeline; more
/// fields tell where each comes from (`meander-replay-job` and others).
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize, KubeSchema)]
#[serde(rename_all = "camelCase")]
pub struct RedisTarget {
    /// Secret that holds the URL, `redis://user:password@host:port/database`; `rediss://` for TLS.
    pub url_secret_ref: SecretKeyReference,
    /// Key of a Secret that holds the certificates of the authorities which the server's certificate may come from, PEM, for a URL
    /// that starts with `rediss://`; those of Mozilla's list where it is left out.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub ca_secret_ref: Option<SecretKeyReference>,
    /// The changes of a table go to `<streamPrefix>.<schema>.<table>`; `replay.<namespace>.<name>` where it is left out. No such stream may be
    /// there before the replay.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    #[schemars(length(min = 1, max = 160))]
    #[x_kube(validation = Rule::new("self.matches('^[A-Za-z0-9._:-]+$')").message("target.redis.streamPrefix has letters, digits, dots, colons, underscores and dashes only"))]
    pub stream_prefix: Option<String>,
}

/// An HTTP endpoint that takes batches of CloudEvents in JSON by POST: `docs/targets.md` says what its answers mean.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize, KubeSchema)]
#[x_kube(
    validation = Rule::new("!has(self.tokenSecretRef) || self.url.startsWith('https://')").message("target.http.tokenSecretRef is sent with every request: use a URL that starts with https://"),
    validation = Rule::new("!has(self.caSecretRef) || self.url.startsWith('https://')").message("target.http.caSecretRef is for TLS: use a URL that starts with https://, or leave it out")
)]
#[serde(rename_all = "camelCase")]
pub struct HttpTarget {
    /// Where the changes are posted.
    #[schemars(length(min = 1, max = 2048))]
    #[x_kube(validation = Rule::new("self.matches('^https?://[^/@ ]+(/[^ ]*)?$')").message("target.http.url is http://host/path or https://host/path, without user and password"))]
    pub url: String,
    /// Key of a Secret with the bearer token that is shown with every request.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub token_secret_ref: Option<SecretKeyReference>,
    /// Key of a Secret that holds the certificates of the authorities which the server's certificate may come from, PEM; those of
    /// Mozilla's list where it is left out.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub ca_secret_ref: Option<SecretKeyReference>,
}

/// Over gRPC, one way or the other.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize, KubeSchema)]
#[x_kube(
    validation = Rule::new("has(self.endpoint) != has(self.serve)").message("write exactly one of grpc.endpoint, to be called, and grpc.serve, to call"),
    validation = Rule::new("!(has(self.caSecretRef) || has(self.clientCertSecretRef) || has(self.tokenSecretRef)) || (has(self.endpoint) && self.endpoint.startsWith('https://'))").message("grpc.caSecretRef, clientCertSecretRef and tokenSecretRef need TLS: write an endpoint https://host:port, or leave them out")
)]
#[serde(rename_all = "camelCase")]
pub struct GrpcTarget {
    /// Your server of `meander.v1.ReplayReceiver`, which the replay calls: `http://host:port`, or `https://host:port` for TLS.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    #[schemars(length(max = 512))]
    #[x_kube(validation = Rule::new("self.matches('^https?://[^/@ ]+:[1-9][0-9]{0,4}$') && int(self.substring(self.lastIndexOf(':') + 1)) < 65536").message("endpoint is http://host:port or https://host:port, such as http://receiver:50051"))]
    pub endpoint: Option<String>,
    /// Key of a Secret that holds the certificates of the authorities which your server's certificate may come from, PEM; those of
    /// Mozilla's list where it is left out.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub ca_secret_ref: Option<SecretKeyReference>,
    /// Secret of type `kubernetes.io/tls` with the certificate that the replay shows to your server.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub client_cert_secret_ref: Option<SecretReference>,
    /// Secret with the bearer token that the replay shows to your server.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub token_secret_ref: Option<SecretKeyReference>,
    /// Serve `meander.v1.Replayer` at the Service `<name>-replay`, and wait for a subscriber.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub serve: Option<Serve>,
}

/// A server of `meander.v1.Replayer`.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize, KubeSchema)]
#[x_kube(
    validation = Rule::new("has(self.tlsSecretRef) != self.insecure").message("subscribers send a token: write grpc.serve.tlsSecretRef, or grpc.serve.insecure: true to have token and changes cross the network in plain text")
)]
#[serde(rename_all = "camelCase")]
pub struct Serve {
    /// TCP port.
    #[serde(default = "default_serve_port")]
    #[schemars(range(min = 1024, max = 65535))]
    #[x_kube(validation = Rule::new("self != 9464").message("port 9464 is the pod's own, for its probes and metrics: choose another"))]
    pub port: u16,
    /// Secret with the bearer token that subscribers must show.
    pub token_secret_ref: SecretKeyReference,
    /// Secret of type `kubernetes.io/tls` with the certificate that the server shows.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub tls_secret_ref: Option<SecretReference>,
    /// Serve in plain text, without a certificate.
    #[serde(default)]
    pub insecure: bool,
}

/// The pod that replays.
#[derive(Clone, Debug, Default, PartialEq, Serialize, Deserialize, KubeSchema)]
#[serde(rename_all = "camelCase")]
pub struct ReplayRuntime {
    /// CPU and memory; small requests and a memory limit where it is left out.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub resources: Option<Resources>,
    /// How much the pod logs.
    #[serde(default)]
    pub log_level: LogLevel,
}

/// What the replay does, as last seen.
#[derive(Clone, Debug, Default, PartialEq, Serialize, Deserialize, KubeSchema)]
#[serde(rename_all = "camelCase")]
pub struct ReplayJobStatus {
    /// The metadata.generation that this status is about.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub observed_generation: Option<i64>,
    /// One word for people; programs read the conditions. Succeeded, Failed and Cancelled are final.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub phase: Option<ReplayPhase>,
    /// When the replay's pod was started.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    #[schemars(extend("format" = "date-time"))]
    pub start_time: Option<String>,
    /// When it ended.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    #[schemars(extend("format" = "date-time"))]
    pub completion_time: Option<String>,
    /// What `from` and `to` came to, fixed when the replay started.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub resolved_range: Option<ReplayRange>,
    /// How far delivery has come.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub progress: Option<ReplayProgress>,
    /// The attempts that failed; left out as long as none did.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub failures: Option<ReplayFailures>,
    /// Accepted, Progressing, Complete, Failed, Suspended, TruncatedRange; Reconciling and Stalled for tools that read kstatus.
    #[serde(default, skip_serializing_if = "Vec::is_empty")]
    #[schemars(schema_with = "conditions")]
    pub conditions: Vec<Condition>,
}

/// The state in one word for people; programs read the conditions. Succeeded, Failed and Cancelled are final.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize, JsonSchema)]
pub enum ReplayPhase {
    /// Nothing can be delivered yet, or again; the Progressing condition says why.
    Pending,
    /// Changes are delivered.
    Running,
    /// `spec.suspend` is set.
    Paused,
    /// The whole range was delivered.
    Succeeded,
    /// It gave up; the Failed condition says why.
    Failed,
    /// `spec.cancel` was set.
    Cancelled,
}

impl ReplayPhase {
    /// Whether it can never change again.
    #[must_use]
    pub fn is_terminal(self) -> bool {
        matches!(self, Self::Succeeded | Self::Failed | Self::Cancelled)
    }
}

/// The attempts that failed. An attempt is a pod: one that ends in an error is replaced, up to `spec.backoffLimit` times.
#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize, Deserialize, KubeSchema)]
#[serde(rename_all = "camelCase")]
pub struct ReplayFailures {
    /// How many.
    #[serde(default)]
    pub count: u32,
    /// Why the last one failed, in one word.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub last_reason: Option<String>,
    /// Why the last one failed, and what to do, in one sentence.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub last_message: Option<String>,
    /// When the last one failed.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    #[schemars(extend("format" = "date-time"))]
    pub last_time: Option<String>,
}

/// A resolved range.
#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize, Deserialize, KubeSchema)]
#[serde(rename_all = "camelCase")]
pub struct ReplayRange {
    /// Commit time of the start.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    #[schemars(extend("format" = "date-time"))]
    pub from_time: Option<String>,
    /// Commit time of the end.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    #[schemars(extend("format" = "date-time"))]
    pub to_time: Option<String>,
    /// The range holds no position (`epoch:LSN:ordinal`) after this one. Left out where it ends at a time that the log is past: which change is the last before it
    /// is not looked for.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub to_position: Option<String>,
    /// Kafka offsets in the range: an upper bound of the changes to come.
    #[serde(default)]
    pub offsets: u64,
}

/// How far delivery has come.
#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize, Deserialize, KubeSchema)]
#[serde(rename_all = "camelCase")]
pub struct ReplayProgress {
    /// Changes handed over and, where the target answers, answered. In a dry run: those that would be.
    #[serde(default)]
    pub delivered: u64,
    /// Changes up to there that the filter left out.
    #[serde(default)]
    pub filtered: u64,
    /// Changes of the range: those that are behind, and the offsets that are ahead. Some of these are marks of Kafka's transactions, so it
    /// is an upper bound, which falls to the number itself by the end.
    #[serde(default)]
    pub total: u64,
    /// Bytes of the keys and values that the pod has delivered.
    #[serde(default)]
    pub bytes: u64,
    /// Between 0 and 100, by event time within the range.
    #[serde(default)]
    pub percent: u32,
    /// Between 0 and 100, by offsets within the range, filtered ones among them.
    #[serde(default)]
    pub percent_by_events: u32,
    /// `percent` for people: `64%`.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub progress: Option<String>,
    /// Commit time of the last delivered change.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    #[schemars(extend("format" = "date-time"))]
    pub current_time: Option<String>,
    /// Position (`epoch:LSN:ordinal`) of the last delivered change.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub current_position: Option<String>,
    /// Mean of the last seconds.
    #[serde(default)]
    pub events_per_second: u64,
    /// The speed that is asked of the pod.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub speed: Option<String>,
    /// Original time delivered per time, mean of the last seconds, such as `9.98`.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub actual_speed: Option<String>,
    /// How far delivery is behind its schedule; 0 at speed `max`.
    #[serde(default)]
    pub behind_millis: u64,
    /// Estimate until completion.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub eta_seconds: Option<u64>,
    /// Commit time of the first delivered change.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    #[schemars(extend("format" = "date-time"))]
    pub first_event_time: Option<String>,
    /// How long delivery took from the first change to the last.
    #[serde(default)]
    pub delivery_millis: u64,
    /// What the pod has delivered of each topic, of which each table has one: at most 50, those with the most changes first.
    #[serde(default, skip_serializing_if = "Vec::is_empty")]
    #[schemars(length(max = 50))]
    pub topics: Vec<TopicProgress>,
    /// The sum of the others.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub other_topics: Option<OtherTopics>,
}

/// What is delivered of a topic.
#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize, Deserialize, KubeSchema)]
#[serde(rename_all = "camelCase")]
pub struct TopicProgress {
    /// The topic in Kafka: `<topicPrefix>.<schema>.<table>`.
    pub topic: String,
    /// Changes.
    #[serde(default)]
    pub delivered: u64,
    /// Bytes of keys and values.
    #[serde(default)]
    pub bytes: u64,
    /// The earliest commit time.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    #[schemars(extend("format" = "date-time"))]
    pub first_time: Option<String>,
    /// The latest commit time.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    #[schemars(extend("format" = "date-time"))]
    pub last_time: Option<String>,
}

/// What is delivered of some topics together.
#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize, Deserialize, KubeSchema)]
#[serde(rename_all = "camelCase")]
pub struct OtherTopics {
    /// How many topics.
    #[serde(default)]
    pub topics: u64,
    /// Changes.
    #[serde(default)]
    pub delivered: u64,
    /// Bytes of keys and values.
    #[serde(default)]
    pub bytes: u64,
}

fn default_backoff_limit() -> u32 {
    3
}

fn default_postgres_port() -> u16 {
    5432
}

fn default_serve_port() -> u16 {
    50052
}

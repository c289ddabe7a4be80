//! `CdcPipeline`: changes of one PostgreSQL database, out to Kafka and Redis.

use std::{
    collections::BTreeMap,
    num::{NonZeroU8, NonZeroU32},
};

use k8s_openapi::apimachinery::pkg::apis::meta::v1::Condition;
use kube::{CustomResource, KubeSchema};
use schemars::JsonSchema;
use serde::{Deserialize, Serialize};

use crate::common::{LogLevel, Resources, SecretKeyReference, SecretReference, conditions};

/// Which database is captured, and where its changes go.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize, CustomResource, KubeSchema)]
#[kube(
    group = "meander.dev",
    version = "v1alpha1",
    kind = "CdcPipeline",
    plural = "cdcpipelines",
    namespaced,
    category = "cdc",
    shortname = "cdcp",
    status = "CdcPipelineStatus",
    derive = "PartialEq",
    doc = "A CdcPipeline captures every committed change of a PostgreSQL database from its WAL and publishes it to Kafka, the durable log, and to Redis Streams, the fast path.",
    validation = Rule::new("self.metadata.name.size() <= 50").message("metadata.name must have at most 50 characters: the names of the pods are made from it"),
    validation = Rule::new("!self.metadata.name.contains('.')").message("metadata.name must not contain a dot: names of labels and volumes are made from it; use a dash"),
    printcolumn(name = "Ready", type_ = "string", json_path = ".status.conditions[?(@.type==\"Ready\")].status"),
    printcolumn(name = "Phase", type_ = "string", json_path = ".status.phase"),
    printcolumn(name = "Lag", type_ = "string", json_path = ".status.replication.lag", description = "Age of the oldest change that is not yet in Kafka, or in Redis while that is attached"),
    printcolumn(name = "Events", type_ = "integer", json_path = ".status.replication.eventsTotal", description = "Changes published, as the checkpoint counts them"),
    printcolumn(name = "Slot", type_ = "string", json_path = ".status.slot.name", priority = 1),
    printcolumn(name = "Confirmed LSN", type_ = "string", json_path = ".status.replication.confirmedFlushLsn", priority = 1),
    printcolumn(name = "Reason", type_ = "string", json_path = ".status.reason", description = "Why it is in this phase; the condition with this reason says what to do", priority = 1),
    printcolumn(name = "Age", type_ = "date", json_path = ".metadata.creationTimestamp")
)]
#[x_kube(
    validation = Rule::new("!has(self.debezium) || self.format == 'DebeziumJson'").message("debezium is for the format DebeziumJson only: remove it, or set format"),
    validation = Rule::new("has(self.debezium) == has(oldSelf.debezium) && (!has(self.debezium) || self.debezium == oldSelf.debezium)").message("debezium is immutable: create another CdcPipeline, with another topicPrefix")
)]
#[serde(rename_all = "camelCase")]
pub struct CdcPipelineSpec {
    /// The database that is captured.
    pub source: Source,
    /// Where changes are published.
    pub sinks: Sinks,
    /// What keys and values look like, in both sinks. Immutable.
    #[serde(default)]
    #[x_kube(validation = Rule::new("self == oldSelf").message("format is immutable: create another CdcPipeline, with another topicPrefix"))]
    pub format: PipelineFormat,
    /// For the format DebeziumJson. Immutable.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub debezium: Option<Debezium>,
    /// What becomes of a gap in the source: of changes that were lost because the slot was dropped, lost or moved, its publication dropped,
    /// or a standby promoted that lacks them. Where the host leads to another server, or to one that was set back, it is `Stop` anyway.
    #[serde(default)]
    pub on_source_gap: OnSourceGap,
    /// What becomes of a row whose record is larger than its topic takes (`max.message.bytes`), in Kafka and in Redis alike.
    #[serde(default)]
    pub on_oversized_row: OnOversizedRow,
    /// Stop capturing. The slot stays, and with it the WAL that has not been read: the database's disk fills while a busy
    /// pipeline is suspended.
    #[serde(default)]
    pub suspend: bool,
    /// The pod that captures.
    #[serde(default)]
    pub runtime: Runtime,
}

/// What becomes of a gap in the source.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize, Deserialize, JsonSchema)]
pub enum OnSourceGap {
    /// Capture stands still until somebody accepts the gap, by the annotation that the condition SourceGap gives.
    #[default]
    Stop,
    /// The gap is accepted, which is recorded as if somebody had done it, and every captured table is read anew, in chunks beside the
    /// changes, whatever `snapshot.mode` says.
    Resnapshot,
}

/// What becomes of a row whose record is larger than its topic takes.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize, Deserialize, JsonSchema)]
pub enum OnOversizedRow {
    /// Capture stands still before it until the topic takes more: `RecordTooLarge`. Kafka judges it as it is sent, which is compressed.
    #[default]
    Stop,
    /// It is published in its place without its large values, which are marked as left out, if it is larger before it is compressed; `status.oversized` counts such records, and the condition Degraded
    /// says how the rows are read again. What is too large even so, as a logical message is, stops the capture all the same.
    OmitValues,
}

/// What keys and values look like.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize, Deserialize, JsonSchema)]
pub enum PipelineFormat {
    /// `meander.v1.ChangeRecord`: every value exactly, and small.
    #[default]
    Protobuf,
    /// The events of Debezium's PostgreSQL connector with its default settings, for consumers that read those. What its types
    /// cannot hold (NaN in a numeric, types that it does not know) is missing.
    DebeziumJson,
}

/// How Debezium's events are written.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize, KubeSchema)]
#[serde(rename_all = "camelCase")]
pub struct Debezium {
    /// Each key and value is an object of `schema` and `payload`, as Kafka Connect's JSON converter writes them by default; sinks
    /// of Kafka Connect need it. Without it they are the payload alone, which is a fraction of the size.
    #[serde(default = "default_schemas")]
    pub schemas: bool,
    /// Each event says which transaction it is part of and its place there, and the topic `<topicPrefix>.transaction` where each
    /// transaction begins and ends, with the number of its events: what Debezium does with `provide.transaction.metadata`.
    #[serde(default)]
    pub transaction_metadata: bool,
}

impl Default for Debezium {
    fn default() -> Self {
        Self {
            schemas: default_schemas(),
            transaction_metadata: false,
        }
    }
}

/// The database that is captured.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize, KubeSchema)]
#[serde(rename_all = "camelCase")]
pub struct Source {
    /// A PostgreSQL database, version 14 or later, with `wal_level = logical`.
    pub postgres: PostgresSource,
}

/// A PostgreSQL database.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize, KubeSchema)]
#[x_kube(
    validation = Rule::new("!has(self.caSecretRef) || self.sslMode in ['VerifyCA', 'VerifyFull']").message("caSecretRef is for checking the server's certificate: set sslMode to VerifyFull, or leave caSecretRef out"),
    validation = Rule::new("self.sslMode != 'VerifyCA' || has(self.caSecretRef)").message("sslMode VerifyCA needs caSecretRef: without the host name a certificate of any public authority would do"),
    validation = Rule::new("!has(self.clientCertSecretRef) || self.sslMode != 'Disable'").message("clientCertSecretRef needs TLS: set sslMode to VerifyFull, or leave clientCertSecretRef out")
)]
#[serde(rename_all = "camelCase")]
pub struct PostgresSource {
    /// Host name or address. It may change, as long as it leads to the same database.
    #[schemars(length(min = 1, max = 253))]
    #[x_kube(validation = Rule::new("!self.matches('[/@, ]') && !self.matches('^[^:]*:[^:]*$')").message("host is a bare host name or address, such as postgres.shop.svc; the port, user and database have fields of their own"))]
    pub host: String,
    /// TCP port.
    #[serde(default = "default_port")]
    #[schemars(range(min = 1, max = 65535))]
    pub port: u16,
    /// Name of the database. Immutable.
    #[schemars(length(min = 1, max = 63))]
    #[x_kube(validation = Rule::new("self == oldSelf").message("database is immutable: create another CdcPipeline for another database"))]
    pub database: String,
    /// Secret with the keys `username` and `password`. The user needs the attribute REPLICATION, SELECT on the captured tables,
    /// and, for a managed publication, CREATE on the database and ownership of the tables.
    pub credentials_secret_ref: SecretReference,
    /// Whether the connection is encrypted, and what the server has to prove. `Require` wants SCRAM-SHA-256 with channel binding of it.
    #[serde(default)]
    pub ssl_mode: SslMode,
    /// Key of a Secret that holds the certificates of the authorities which the server's certificate may come from, PEM; those of
    /// Mozilla's list where it is left out.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub ca_secret_ref: Option<SecretKeyReference>,
    /// Secret of type `kubernetes.io/tls` with the certificate that the pipeline shows to the server, which has to ask for one
    /// (`clientcert` in its pg_hba.conf).
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub client_cert_secret_ref: Option<SecretReference>,
    /// Which tables are captured.
    pub tables: TableSelection,
    /// Prefixes of the logical messages (`pg_logical_emit_message`) that are published, to the topic `<topicPrefix>.message`; `*` stands
    /// for any characters, `?` for any one. None are where it is left out.
    #[serde(default, skip_serializing_if = "Vec::is_empty")]
    #[schemars(length(max = 32), inner(length(min = 1, max = 128)))]
    #[x_kube(validation = Rule::new("self.all(prefix, !prefix.startsWith('meander.'))").message("messagePrefixes must not begin with meander.: those messages are the pipeline's own"))]
    pub message_prefixes: Vec<String>,
    /// Which transactions are captured, by where they come from. Immutable: it decides how changes are counted.
    #[serde(default)]
    #[x_kube(validation = Rule::new("self == oldSelf").message("origin is immutable: create another CdcPipeline"))]
    pub origin: Origin,
    /// The publication that the slot is read through. Immutable.
    #[serde(default)]
    #[x_kube(validation = Rule::new("self == oldSelf").message("publication is immutable: create another CdcPipeline"))]
    pub publication: Publication,
    /// The replication slot.
    #[serde(default)]
    pub slot: Slot,
    /// What becomes of the rows that are there when a table's capture begins.
    #[serde(default)]
    pub snapshot: Snapshot,
    /// How often a heartbeat is written into the WAL, by `pg_logical_emit_message`, so that `lagMillis` tells also on an idle database
    /// whether the capture keeps up. With the format DebeziumJson each is a record of the topic `__debezium-heartbeat.<topicPrefix>`.
    /// None is written where it is left out; no slot needs one to let go of WAL.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    #[schemars(range(min = 1, max = 3600))]
    pub heartbeat_interval_seconds: Option<NonZeroU32>,
}

/// What becomes of the rows that are there when a table's capture begins. It may be changed at any time.
#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize, Deserialize, KubeSchema)]
#[serde(rename_all = "camelCase")]
#[x_kube(validation = Rule::new("!has(self.parallelism) || self.mode == 'Bulk'").message("parallelism is for the mode Bulk: the others read with one connection, or not at all"))]
pub struct Snapshot {
    /// How they are read. From `Never` to another mode, the tables are read that were not yet; to `Never`, what is not read yet is not
    /// read.
    #[serde(default)]
    pub mode: SnapshotMode,
    /// How many connections read at the same time in the mode `Bulk`; 2 where it is left out.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    #[schemars(range(min = 1, max = 16))]
    pub parallelism: Option<NonZeroU8>,
    /// Tables to read once more, or for the first time, in any mode. Each request runs once: what was done under an id is not done
    /// again, also when its tables change. A request waits until each entry of its tables names a captured one. It may be taken out of the list when it is done.
    #[serde(default, skip_serializing_if = "Vec::is_empty")]
    #[schemars(length(max = 16), extend("x-kubernetes-list-type" = "map", "x-kubernetes-list-map-keys" = ["id"]))]
    pub requests: Vec<SnapshotRequest>,
}

/// How the rows are read that are there when a table's capture begins.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize, Deserialize, JsonSchema)]
pub enum SnapshotMode {
    /// At once, by several connections, under one snapshot of the database: the fastest way. Changes wait until it is done, and the
    /// database keeps their WAL meanwhile. No key is needed. After a crash the tables that were not done are read anew, so that some of
    /// their rows are published again, as `READ`; changes never are. A table that joins later is read in chunks, and so is one that an
    /// ALTER TABLE or TRUNCATE comes to in the middle.
    Bulk,
    /// In chunks in the order of the key, while changes are captured. A restart goes on at the chunk; each row is published once, and is
    /// never older than the changes before it. A table that joins later is read as well. A table without a key is read if it is small.
    #[default]
    Incremental,
    /// Not at all: only what changes from now on is published.
    Never,
}

/// Asks for the rows of some tables.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize, KubeSchema)]
#[serde(rename_all = "camelCase")]
pub struct SnapshotRequest {
    /// Names the request, such as `2026-11-21-repair`.
    #[schemars(length(min = 1, max = 63))]
    #[x_kube(validation = Rule::new("self.matches('^[A-Za-z0-9._-]+$')").message("id has letters, digits, dots, underscores and dashes only"))]
    pub id: String,
    /// Which of the captured tables are read; written like those of `tables.include`.
    #[schemars(length(min = 1, max = 100), inner(length(min = 3, max = 256)))]
    #[x_kube(validation = Rule::new(GLOBS).message("each entry of tables is schema.table, such as public.* or public.orders"))]
    pub tables: Vec<String>,
}

/// Whether a connection to PostgreSQL is encrypted, and what the server has to prove; the modes of libpq, without those that go on in
/// plain text when the server, or somebody in between, says so.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize, Deserialize, JsonSchema)]
pub enum SslMode {
    /// Nothing is encrypted: for a network that can be trusted.
    Disable,
    /// Encrypted, and no plain text is accepted. The server's certificate is not checked; with SCRAM, the password is bound to it.
    #[default]
    Require,
    /// And the server's certificate comes from an authority in `caSecretRef`.
    #[serde(rename = "VerifyCA")]
    VerifyCa,
    /// And it comes from an authority and is for `host`.
    VerifyFull,
}

/// Which transactions are captured, by where they come from.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize, Deserialize, JsonSchema)]
pub enum Origin {
    /// All. A record says the replication origin of its transaction, if there is one.
    #[default]
    Any,
    /// Those that the database did not get by replication itself, so that two databases can be captured that replicate each other. Needs
    /// PostgreSQL 16.
    None,
}

/// Globs over `schema.table`.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize, KubeSchema)]
#[serde(rename_all = "camelCase")]
pub struct TableSelection {
    /// Tables to take, such as `public.*` or `public."Order Lines"`: globs over schema and table. Each of the two is an SQL
    /// identifier: without quotes it is folded to lower case, and `*` stands for any characters, `?` for any one; inside double
    /// quotes everything stands for itself.
    #[schemars(length(min = 1, max = 100), inner(length(min = 3, max = 256)))]
    #[x_kube(validation = Rule::new(GLOBS).message("each entry of include is schema.table, such as public.* or public.orders"))]
    pub include: Vec<String>,
    /// Tables to leave out, even when `include` names them; written like those.
    #[serde(default, skip_serializing_if = "Vec::is_empty")]
    #[schemars(length(max = 100), inner(length(min = 3, max = 256)))]
    #[x_kube(validation = Rule::new(GLOBS).message("each entry of exclude is schema.table, such as audit.* or public.sessions"))]
    pub exclude: Vec<String>,
}

const GLOBS: &str = r#"self.all(glob, glob.matches('^("([^"]|"")+"|[^".]+)[.]("([^"]|"")+"|[^".]+)$'))"#;

/// The publication that the slot is read through.
#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize, Deserialize, KubeSchema)]
#[x_kube(validation = Rule::new("self.management != 'External' || has(self.name)").message("publication.name is required when management is External: write the name of the publication that you created"))]
#[serde(rename_all = "camelCase")]
pub struct Publication {
    /// Name of the publication; the slot's default name where it is left out.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    #[schemars(length(min = 1, max = 63))]
    #[x_kube(validation = Rule::new("self.matches('^[a-z_][a-z0-9_]*$')").message("publication.name has lower-case letters, digits and underscores only, and does not start with a digit"))]
    pub name: Option<String>,
    /// Who creates and changes it.
    #[serde(default)]
    pub management: PublicationManagement,
    /// What a partitioned table is captured as. It is for a managed publication; an external one says it by its own
    /// `publish_via_partition_root`.
    #[serde(default)]
    pub partitions: Partitions,
}

/// What a partitioned table is captured as.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize, Deserialize, JsonSchema)]
pub enum Partitions {
    /// One table, whatever partition a row is in. `tables` names the partitioned table. PostgreSQL does not tell which rows come or go
    /// with a whole partition (ATTACH, DETACH, TRUNCATE or DROP of it): `snapshot.requests` reads the table again.
    #[default]
    Root,
    /// Each partition as a table of its own, with its own name, topic and stream. `tables` names the partitions.
    Leaf,
}

/// Who creates and changes the publication.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize, Deserialize, JsonSchema)]
pub enum PublicationManagement {
    /// The pipeline, which keeps it to the selected tables and drops it when the pipeline is deleted.
    #[default]
    Managed,
    /// Somebody else; the pipeline only checks it.
    External,
}

/// The replication slot.
#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize, Deserialize, KubeSchema)]
#[x_kube(validation = Rule::new("has(self.name) == has(oldSelf.name) && (!has(self.name) || self.name == oldSelf.name)").message("slot.name is immutable: create another CdcPipeline"))]
#[serde(rename_all = "camelCase")]
pub struct Slot {
    /// Name of the slot; `meander_<namespace>_<name>` where it is left out, with `_` for what PostgreSQL does not take; where that changes a
    /// name, or makes it longer than 63 bytes, eight digits follow that tell such names apart. `status.slot.name` has it. Immutable.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    #[schemars(length(min = 1, max = 63))]
    #[x_kube(validation = Rule::new("self.matches('^[a-z0-9_]+$')").message("slot.name has lower-case letters, digits and underscores only"))]
    pub name: Option<String>,
    /// What happens to the slot, and to a managed publication, when the pipeline is deleted.
    #[serde(default)]
    pub reclaim_policy: SlotReclaimPolicy,
    /// Keep the slot on the standbys too (PostgreSQL 17 or later), so that capture goes on after a failover. The standbys need
    /// `sync_replication_slots`, and the primary should name them in `synchronized_standby_slots`. A slot that is there stays as it
    /// is where this is left out.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub failover: Option<bool>,
}

/// What happens to the slot when the pipeline is deleted.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize, Deserialize, JsonSchema)]
pub enum SlotReclaimPolicy {
    /// It is dropped: a slot that nobody reads keeps WAL until the database's disk is full.
    #[default]
    Delete,
    /// It stays, for a pipeline of the same name to go on from, and keeps WAL until then.
    Retain,
}

/// Where changes are published.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize, KubeSchema)]
#[x_kube(validation = Rule::new("has(self.redis) == has(oldSelf.redis)").message("the set of sinks is immutable: create another CdcPipeline to add or remove Redis"))]
#[serde(rename_all = "camelCase")]
pub struct Sinks {
    /// The durable log, from which changes are replayed. Every pipeline needs it; Redis alone is not supported yet.
    pub kafka: KafkaSink,
    /// The fast path.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub redis: Option<RedisSink>,
}

/// A Kafka cluster.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize, KubeSchema)]
#[x_kube(validation = Rule::new("!has(self.sasl) || self.sasl.mechanism != 'Plain' || has(self.tls)").message("sasl.mechanism Plain sends the password itself: add tls (tls: {} trusts Mozilla's list of authorities), or use ScramSha512"))]
#[serde(rename_all = "camelCase")]
pub struct KafkaSink {
    /// Brokers to start from, each `host:port`.
    #[schemars(length(min = 1, max = 16), inner(length(min = 3, max = 260)))]
    #[x_kube(validation = Rule::new("self.all(server, server.matches('^[^/@, ]+:[1-9][0-9]{0,4}$') && int(server.substring(server.lastIndexOf(':') + 1)) < 65536)").message("each entry of bootstrapServers is host:port, such as kafka:9092"))]
    pub bootstrap_servers: Vec<String>,
    /// Encrypts the connections; they are in plain text where it is left out. `{}` is enough for brokers whose certificates come from
    /// an authority of Mozilla's list.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub tls: Option<KafkaTls>,
    /// Signs in with user and password.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub sasl: Option<KafkaSasl>,
    /// Topics are named `<topicPrefix>.<schema>.<table>`. The prefix belongs to this pipeline alone, and no other topic may begin
    /// with `<topicPrefix>.`, for a replay reads every one that does: not `shop.eu` beside `shop`. Immutable.
    #[schemars(length(min = 1, max = 100))]
    #[x_kube(
        validation = Rule::new("self.matches('^[A-Za-z0-9_-]([A-Za-z0-9._-]*[A-Za-z0-9_-])?$')").message("topicPrefix has letters, digits, dots, underscores and dashes only, and neither starts nor ends with a dot"),
        validation = Rule::new("!self.startsWith('__')").message("topicPrefix must not start with two underscores: topics of such names are Kafka's own, and Meander's"),
        validation = Rule::new("self == oldSelf").message("topicPrefix is immutable: create another CdcPipeline to publish elsewhere")
    )]
    pub topic_prefix: String,
    /// How topics are created.
    #[serde(default)]
    pub topics: KafkaTopics,
}

/// TLS with Kafka. The brokers' certificates have to be for the host names by which the brokers are reached.
#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize, Deserialize, KubeSchema)]
#[serde(rename_all = "camelCase")]
pub struct KafkaTls {
    /// Key of a Secret that holds the certificates of the authorities which the brokers' certificates may come from, PEM; those of
    /// Mozilla's list where it is left out.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub ca_secret_ref: Option<SecretKeyReference>,
    /// Secret of type `kubernetes.io/tls` with the certificate that the pipeline shows to the brokers.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub client_cert_secret_ref: Option<SecretReference>,
}

/// Signing in to Kafka.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize, KubeSchema)]
#[serde(rename_all = "camelCase")]
pub struct KafkaSasl {
    /// How the password is proven.
    pub mechanism: SaslMechanism,
    /// Secret with the keys `username` and `password`.
    pub credentials_secret_ref: SecretReference,
}

/// How a password is proven to Kafka.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize, JsonSchema)]
pub enum SaslMechanism {
    /// The password itself is sent; over TLS only.
    Plain,
    /// SCRAM-SHA-256.
    ScramSha256,
    /// SCRAM-SHA-512.
    ScramSha512,
}

/// Who makes the topics.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize, Deserialize, JsonSchema)]
pub enum TopicManagement {
    /// The pipeline makes those that are missing. What is there already is checked, and never changed.
    #[default]
    Managed,
    /// Somebody else; the pipeline only checks them. `docs/security.md` names them.
    External,
}

/// How topics are created. Topics that exist already keep what they have.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize, KubeSchema)]
#[serde(rename_all = "camelCase")]
pub struct KafkaTopics {
    /// Partitions of each topic; changes of one key are always in one partition. Immutable.
    #[serde(default = "default_partitions")]
    #[schemars(range(min = 1, max = 1000))]
    #[x_kube(validation = Rule::new("self == oldSelf").message("topics.partitions is immutable: the order of each key depends on it"))]
    pub partitions: i32,
    /// Replicas of each topic; the broker's default where it is left out.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    #[schemars(range(min = 1, max = 16))]
    pub replication_factor: Option<i32>,
    /// Settings of each table's topic, such as `retention.ms: "604800000"`. They take effect when a topic is created.
    #[serde(default, skip_serializing_if = "BTreeMap::is_empty")]
    #[schemars(extend("maxProperties" = 32))]
    #[x_kube(
        validation = Rule::new("self.all(name, name.matches('^[a-z][a-z0-9.]{0,127}$'))").message("each name in topics.config is a setting of Kafka's topics, such as retention.ms"),
        validation = Rule::new("!('cleanup.policy' in self) && !('message.timestamp.type' in self)").message("topics.config cannot set cleanup.policy and message.timestamp.type: the log needs delete and CreateTime")
    )]
    pub config: BTreeMap<String, String>,
    /// Who makes the topics.
    #[serde(default)]
    pub management: TopicManagement,
}

impl Default for KafkaTopics {
    fn default() -> Self {
        Self {
            partitions: default_partitions(),
            replication_factor: None,
            config: BTreeMap::new(),
            management: TopicManagement::Managed,
        }
    }
}

/// A Redis server.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize, KubeSchema)]
#[x_kube(validation = Rule::new("has(self.urlSecretRef) != has(self.url)").message("write exactly one of redis.urlSecretRef and redis.url"))]
#[serde(rename_all = "camelCase")]
pub struct RedisSink {
    /// Secret that holds the URL, `redis://user:password@host:port/database`; `rediss://` for TLS.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub url_secret_ref: Option<SecretKeyReference>,
    /// The URL, where it holds no user and no password: `redis://host:port/database`.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    #[schemars(length(max = 512))]
    #[x_kube(
        validation = Rule::new("self.startsWith('redis://') || self.startsWith('rediss://')").message("redis.url starts with redis://, or with rediss:// for TLS, such as redis://redis:6379/0"),
        validation = Rule::new("!self.matches('^[^/]*//[^/]*:[0-9]+(/|$)') || (self.matches('^[^/]*//[^/]*:[1-9][0-9]{0,4}(/|$)') && int(self.split('/')[2].substring(self.split('/')[2].lastIndexOf(':') + 1)) < 65536)").message("redis.url has a port up to 65535, such as redis://redis:6379/0"),
        validation = Rule::new("!self.contains('@')").message("redis.url must not hold a user or password: put the whole URL into a Secret and name it in urlSecretRef")
    )]
    pub url: Option<String>,
    /// Key of a Secret that holds the certificates of the authorities which the server's certificate may come from, PEM, for a URL
    /// that starts with `rediss://`; those of Mozilla's list where it is left out.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub ca_secret_ref: Option<SecretKeyReference>,
    /// Streams are named `<streamPrefix>.<schema>.<table>`. The prefix belongs to this pipeline alone, and another one may
    /// have a prefix that begins with it and a dot; keep all other keys out of it.
    /// Immutable.
    #[schemars(length(min = 1, max = 100))]
    #[x_kube(
        validation = Rule::new("self.matches('^[A-Za-z0-9._:-]+$')").message("streamPrefix has letters, digits, dots, colons, underscores and dashes only"),
        validation = Rule::new("self == oldSelf").message("streamPrefix is immutable: create another CdcPipeline to publish elsewhere")
    )]
    pub stream_prefix: String,
    /// How much each stream keeps; everything where it is left out.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub retention: Option<RedisRetention>,
    /// When a change counts as being in Redis.
    #[serde(default)]
    pub durability: RedisDurability,
    /// Whether PostgreSQL keeps its WAL until Redis has the changes.
    #[serde(default)]
    pub acknowledgement: Acknowledgement,
}

/// When a change counts as being in Redis.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize, Deserialize, JsonSchema)]
pub enum RedisDurability {
    /// When Redis has answered. What it loses in a crash is noticed, and refilled from Kafka.
    #[default]
    None,
    /// When it is in the append-only file on disk. Needs `appendonly yes`, and before Redis 7.2 `appendfsync always`.
    Aof,
    /// When a replica has it.
    Replica,
}

/// Whether PostgreSQL keeps its WAL until Redis has the changes.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize, Deserialize, JsonSchema)]
pub enum Acknowledgement {
    /// It does not: what Kafka has is acknowledged, and a Redis that was away is refilled from Kafka.
    #[default]
    BestEffort,
    /// It does: while Redis is away, the database's disk fills.
    Required,
}

/// How much each stream keeps.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize, KubeSchema)]
#[serde(rename_all = "camelCase")]
pub struct RedisRetention {
    /// About this many entries, the newest ones.
    #[schemars(range(min = 1, max = 1_000_000_000_000_i64))]
    pub max_length: u64,
}

/// The pod that captures.
#[derive(Clone, Debug, Default, PartialEq, Serialize, Deserialize, KubeSchema)]
#[serde(rename_all = "camelCase")]
pub struct Runtime {
    /// Image of `meander-runtime`; the operator's default where it is left out.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    #[schemars(length(min = 1, max = 512))]
    pub image: Option<String>,
    /// CPU and memory; small requests and a memory limit where it is left out.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub resources: Option<Resources>,
    /// How much the pod logs.
    #[serde(default)]
    pub log_level: LogLevel,
    /// Whether a second pod stands by, on another node where there is one, to take over within seconds when the first is gone.
    #[serde(default)]
    pub standby: Standby,
}

/// What stands by for the pod that captures.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize, Deserialize, JsonSchema)]
pub enum Standby {
    /// Nothing: Kubernetes starts the pod anew, which after the loss of a node takes minutes.
    #[default]
    None,
    /// A second pod that runs and waits for the replication slot to be free.
    Hot,
}

/// What the pipeline does, as last seen.
#[derive(Clone, Debug, Default, PartialEq, Serialize, Deserialize, KubeSchema)]
#[serde(rename_all = "camelCase")]
pub struct CdcPipelineStatus {
    /// The metadata.generation that this status is about.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub observed_generation: Option<i64>,
    /// One word for people; programs read the conditions.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub phase: Option<PipelinePhase>,
    /// Why it is in this phase, in one word: the reason of the condition Degraded where the phase is Degraded and Ready is True, and that of Ready otherwise.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub reason: Option<String>,
    /// Ready, SpecValid, SourceReady, SinksReady, RuntimeAvailable and Progressing; SourceGap, RedisGap, Degraded and ReconciliationPaused while there is one.
    #[serde(default, skip_serializing_if = "Vec::is_empty")]
    #[schemars(schema_with = "conditions")]
    pub conditions: Vec<Condition>,
    /// How far capture has come.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub replication: Option<Replication>,
    /// How often capture began anew; left out when it has gone on for 10 minutes since.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub restarts: Option<Restarts>,
    /// The replication slot.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub slot: Option<SlotStatus>,
    /// The tables that `tables` selects.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub tables: Option<TablesStatus>,
    /// The last gap that was accepted, by the annotation `meander.dev/accept-source-gap` or by `onSourceGap`.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub accepted_gap: Option<AcceptedGap>,
    /// Records without their large values, by `onOversizedRow: OmitValues`; left out where there are none.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub oversized: Option<OversizedStatus>,
    /// The rows that are read beside the changes; left out when nothing is to be read.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub snapshot: Option<SnapshotStatus>,
    /// How far each sink has come.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub sinks: Option<SinkPositions>,
    /// Digest of the configuration that the runtime pod has; the pod is replaced when it changes.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub config_hash: Option<String>,
}

/// The state in one word for people; programs read the conditions.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize, JsonSchema)]
pub enum PipelinePhase {
    /// Something that the spec refers to is missing, so nothing was started.
    Pending,
    /// The runtime is starting, or has not yet said how it is.
    Starting,
    /// Changes flow, and rows that were there before are read.
    Snapshotting,
    /// Changes flow.
    Streaming,
    /// Changes flow, and something needs a look: the condition Degraded says what, or Ready, where they flow into Kafka and not into Redis, or as
    /// an older spec has it.
    Degraded,
    /// Changes do not flow; the condition Ready says why. It heals when the cause is gone.
    Interrupted,
    /// `spec.suspend` is set.
    Suspended,
    /// It cannot go on without somebody's decision; the Ready condition says which.
    Failed,
    /// It is being deleted, and its slot cleaned up.
    Terminating,
}

/// How far capture has come.
#[derive(Clone, Debug, Default, PartialEq, Serialize, Deserialize, KubeSchema)]
#[serde(rename_all = "camelCase")]
pub struct Replication {
    /// Position in the WAL up to which changes were received, as PostgreSQL writes it (`0/16B3748`).
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub received_lsn: Option<String>,
    /// Position up to which changes are in Kafka.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub published_lsn: Option<String>,
    /// Position up to which PostgreSQL may forget its WAL.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub confirmed_flush_lsn: Option<String>,
    /// The source's WAL position less the confirmed one, in bytes. Left out while `lag` is `unknown`.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub lag_bytes: Option<u64>,
    /// Age of the oldest change that is received and not yet in Kafka, or in Redis while that is attached, in milliseconds. Left out
    /// while `lag` is `unknown`.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub lag_millis: Option<u64>,
    /// `lagMillis` for people: `0s`, `12s`, `3m`; `unknown` while the capture is down, held or silent.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub lag: Option<String>,
    /// Commit time of the last published change.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    #[schemars(extend("format" = "date-time"))]
    pub last_event_time: Option<String>,
    /// Changes published, as the checkpoint counts them: a pipeline that is created again under its name goes on counting.
    #[serde(default)]
    pub events_total: u64,
    /// Grows whenever WAL positions stop being comparable with those before.
    #[serde(default)]
    pub epoch: u32,
    /// Grows whenever another process takes the slot over.
    #[serde(default)]
    pub owner_generation: u64,
}

/// How often capture began anew.
#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize, Deserialize, KubeSchema)]
#[serde(rename_all = "camelCase")]
pub struct Restarts {
    /// How often since it last went on for 10 minutes: by itself after a failure, in a new pod, or in the one that stood by. Attempts that did
    /// not come to read the slot are not counted.
    pub count: u64,
    /// When the last one was seen.
    #[schemars(extend("format" = "date-time"))]
    pub last_time: String,
}

/// The replication slot.
#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize, Deserialize, KubeSchema)]
#[serde(rename_all = "camelCase")]
pub struct SlotStatus {
    /// Its name in PostgreSQL.
    pub name: String,
    /// `reserved`, `extended`, `unreserved` or `lost`, as in pg_replication_slots.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub wal_status: Option<String>,
    /// WAL that PostgreSQL keeps for the slot, in bytes.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub retained_wal_bytes: Option<u64>,
    /// WAL that can still be written before the slot is in danger, in bytes. Left out where `max_slot_wal_keep_size` sets no limit.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub safe_wal_bytes: Option<u64>,
    /// The oldest WAL that the slot needs.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub restart_lsn: Option<String>,
    /// Where the slot goes on.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub confirmed_flush_lsn: Option<String>,
    /// The server's process that sends its changes.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub active_pid: Option<i32>,
    /// The slot is kept on the standbys (PostgreSQL 17).
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub failover: Option<bool>,
    /// The slot came from a primary (PostgreSQL 17).
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub synced: Option<bool>,
    /// Why the slot cannot be used any more.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub invalidation_reason: Option<String>,
    /// Since when nobody reads the slot (PostgreSQL 17).
    #[serde(default, skip_serializing_if = "Option::is_none")]
    #[schemars(extend("format" = "date-time"))]
    pub inactive_since: Option<String>,
}

/// Changes that are lost to the pipeline, and that somebody accepted.
#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize, Deserialize, KubeSchema)]
#[serde(rename_all = "camelCase")]
pub struct AcceptedGap {
    /// The name by which it was accepted.
    pub id: String,
    /// Why, as in the condition SourceGap.
    pub reason: String,
    /// Changes were captured up to here, in the epoch before.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub lost_after_lsn: Option<String>,
    /// They are captured again from here, in the epoch that began then.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub resumed_lsn: Option<String>,
    /// When capture went on.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    #[schemars(extend("format" = "date-time"))]
    pub time: Option<String>,
}

/// Records that were published without their large values, since their topics would not take them.
#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize, Deserialize, KubeSchema)]
#[serde(rename_all = "camelCase")]
pub struct OversizedStatus {
    /// How many, since the pipeline was created. It does not fall when rows are read again.
    pub records: u64,
    /// The table of the last one.
    pub last_table: String,
    /// `epoch:LSN:ordinal` of the last one.
    pub last_position: String,
    /// What the last one would have taken, in bytes.
    pub last_bytes: u64,
}

/// The tables that `tables` selects.
#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize, Deserialize, KubeSchema)]
#[serde(rename_all = "camelCase")]
pub struct TablesStatus {
    /// How many are captured.
    pub captured: u64,
    /// How many are left out, so that the others can be captured.
    #[serde(default)]
    pub refused_total: u64,
    /// The first of those.
    #[serde(default, skip_serializing_if = "Vec::is_empty")]
    #[schemars(length(max = 20))]
    pub refused: Vec<RefusedTable>,
    /// The schemas that captured tables have now, those of the last 100 tables that got another one, the newest first.
    #[serde(default, skip_serializing_if = "Vec::is_empty")]
    #[schemars(length(max = 100))]
    pub schemas: Vec<SchemaVersion>,
}

/// The version of a table's schema, as the table's records have it.
#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize, Deserialize, KubeSchema)]
#[serde(rename_all = "camelCase")]
pub struct SchemaVersion {
    /// The table, as SQL writes it.
    pub table: String,
    /// Counts the schemas of the table, from 1.
    pub version: u32,
    /// Position of the first change that has it.
    pub since: String,
}

/// A table that is selected and not captured.
#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize, Deserialize, KubeSchema)]
#[serde(rename_all = "camelCase")]
pub struct RefusedTable {
    /// The table, as SQL writes it.
    pub table: String,
    /// Why, in one word; the condition Degraded has the remedy.
    pub reason: String,
}

/// The rows that are read beside the changes.
#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize, Deserialize, KubeSchema)]
#[serde(rename_all = "camelCase")]
pub struct SnapshotStatus {
    /// By the database's estimates of the rows; 100 only when nothing is left to read.
    pub percent: u32,
    /// Tables that were read to their end.
    pub tables_done: u32,
    /// Tables to read.
    pub tables_total: u32,
    /// Tables that are not done, at most 100.
    #[serde(default, skip_serializing_if = "Vec::is_empty")]
    #[schemars(length(max = 100))]
    pub tables: Vec<TableSnapshot>,
}

/// How far the reading of a table has come.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize, KubeSchema)]
#[serde(rename_all = "camelCase")]
pub struct TableSnapshot {
    /// `schema.table`.
    pub name: String,
    /// Whether it is being read.
    pub state: TableSnapshotState,
    /// Rows that were published.
    pub rows: u64,
    /// By the database's estimate of its rows.
    pub percent: u32,
    /// Why it does not go on.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub message: Option<String>,
}

/// Whether a table is being read.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize, JsonSchema)]
pub enum TableSnapshotState {
    /// Its turn will come.
    Pending,
    /// It is being read.
    Reading,
    /// It does not go on for now; the message says why.
    Waiting,
    /// It cannot be read; the message says why. It is tried again every 30 seconds.
    Refused,
}

/// How far each sink has come.
#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize, Deserialize, KubeSchema)]
#[serde(rename_all = "camelCase")]
pub struct SinkPositions {
    /// Kafka.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub kafka: Option<SinkPosition>,
    /// Redis.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub redis: Option<RedisStatus>,
}

/// How far a sink has come.
#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize, Deserialize, KubeSchema)]
#[serde(rename_all = "camelCase")]
pub struct SinkPosition {
    /// `epoch:LSN:ordinal` of the last change in the sink.
    pub position: String,
}

/// How Redis is doing.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize, KubeSchema)]
#[serde(rename_all = "camelCase")]
pub struct RedisStatus {
    /// `epoch:LSN:ordinal` of the last change in it; left out before the first. While it is not attached, that is a place in the past.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub position: Option<String>,
    /// Whether it gets changes as they come.
    pub state: RedisState,
    /// What went wrong last, whether or not it is mended.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub last_error: Option<String>,
}

/// Whether Redis gets changes as they come.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize, JsonSchema)]
pub enum RedisState {
    /// It does.
    Attached,
    /// It gets from Kafka what it lacks.
    Refilling,
    /// It gets nothing: the condition SinksReady says why.
    Detached,
}

fn default_port() -> u16 {
    5432
}

fn default_schemas() -> bool {
    true
}

fn default_partitions() -> i32 {
    1
}

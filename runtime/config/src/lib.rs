//! The configuration file of `meander-runtime`.
//!
//! The operator writes it into a ConfigMap; on a laptop it is written by hand. It is YAML, and unknown fields are refused, so
//! that a misspelt field never passes silently. It holds no secret: those are files that it names, read again at every
//! connection, so that a rotated password is picked up.

use std::{
    collections::BTreeMap,
    fs,
    net::SocketAddr,
    num::{NonZeroU8, NonZeroU32},
    path::{Path, PathBuf},
};

use serde::{Deserialize, Serialize, de::DeserializeOwned};

/// What `meander-runtime capture` does, and what `meander-runtime cleanup` takes away again.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "camelCase", deny_unknown_fields)]
pub struct CaptureConfig {
    /// The `CdcPipeline`; with the slot it names the checkpoint.
    pub pipeline: ResourceIdentity,
    /// Where changes come from.
    pub source: PostgresSource,
    /// What keys and values look like, in both sinks.
    #[serde(default)]
    pub format: Format,
    /// The `SourceGap` that somebody accepts, by the name that its message gives. It accepts that one, once, and no other.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub accept_source_gap: Option<String>,
    /// What becomes of a `SourceGap` that nobody has accepted.
    #[serde(default, skip_serializing_if = "OnSourceGap::is_stop")]
    pub on_source_gap: OnSourceGap,
    /// What becomes of a change whose record is larger than its topic takes.
    #[serde(default, skip_serializing_if = "OnOversizedRow::is_stop")]
    pub on_oversized_row: OnOversizedRow,
    /// The durable log.
    pub kafka: KafkaSink,
    /// The fast path.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub redis: Option<RedisSink>,
    /// Whether another process may have the same part: this one is ready while that one reads the slot, and takes over when it is gone.
    #[serde(default, skip_serializing_if = "is_false")]
    pub standby: bool,
    /// Where progress goes; without it the runtime keeps it to its metrics.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub operator: Option<OperatorLink>,
    /// Address of `/livez`, `/readyz` and `/metrics`.
    #[serde(default = "default_admin_address")]
    pub admin_address: SocketAddr,
}

/// What becomes of a gap in the source.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
pub enum OnSourceGap {
    /// Capture stands still until somebody accepts it.
    #[default]
    Stop,
    /// It is accepted, where a new start can follow it, and every captured table is read anew.
    Resnapshot,
}

/// What becomes of a change whose record is larger than its topic takes.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
pub enum OnOversizedRow {
    /// Capture stands still before it.
    #[default]
    Stop,
    /// It is published without its large values.
    OmitValues,
}

impl OnOversizedRow {
    fn is_stop(&self) -> bool {
        *self == Self::Stop
    }
}

fn is_false(value: &bool) -> bool {
    !value
}

impl OnSourceGap {
    fn is_stop(&self) -> bool {
        *self == Self::Stop
    }
}

/// What `meander-runtime replay` does.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "camelCase", deny_unknown_fields)]
pub struct ReplayConfig {
    /// The `ReplayJob`.
    pub job: ResourceIdentity,
    /// The pipeline whose log is replayed; its checkpoint says up to where the log is complete.
    pub pipeline: ResourceIdentity,
    /// The pipeline's slot, a part of the checkpoint's key.
    pub slot_name: String,
    /// The log.
    pub kafka: KafkaLog,
    /// The first change: the first one committed at or after this time.
    pub from: ReplayStart,
    /// The end: changes committed before this time.
    pub to: ReplayEnd,
    /// How fast; what the operator says later replaces it.
    #[serde(default)]
    pub speed: Speed,
    /// Hold delivery until the operator says otherwise.
    #[serde(default)]
    pub suspended: bool,
    /// In which order changes are delivered.
    #[serde(default)]
    pub order: ReplayOrder,
    /// Which of the changes are delivered; all where it is left out.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub filter: Option<ReplayFilter>,
    /// Event times that are further apart than this are paced as if they were this far apart.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub max_gap_seconds: Option<NonZeroU32>,
    /// Where the changes go.
    pub target: ReplayTarget,
    /// Where progress goes; without it the runtime keeps it to its metrics and its log.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub operator: Option<OperatorLink>,
    /// Address of `/livez`, `/readyz` and `/metrics`.
    #[serde(default = "default_admin_address")]
    pub admin_address: SocketAddr,
    /// File for the final word of the replay, which Kubernetes keeps as the container's termination message.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub termination_message_file: Option<PathBuf>,
}

/// Names a Kubernetes resource, or stands in for one on a laptop.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "camelCase", deny_unknown_fields)]
pub struct ResourceIdentity {
    /// Namespace of the resource.
    pub namespace: String,
    /// Name of the resource.
    pub name: String,
    /// UID of the resource; empty on a laptop.
    #[serde(default)]
    pub uid: String,
}

/// A PostgreSQL database.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "camelCase", deny_unknown_fields)]
pub struct PostgresSource {
    /// Host name or address.
    pub host: String,
    /// TCP port.
    #[serde(default = "default_postgres_port")]
    pub port: u16,
    /// Database name.
    pub database: String,
    /// File that holds the user name.
    pub username_file: PathBuf,
    /// File that holds the password.
    pub password_file: PathBuf,
    /// Whether the connection is encrypted, and what the server has to prove.
    #[serde(default)]
    pub ssl_mode: SslMode,
    /// File with the certificates of the authorities that the server's certificate may come from, PEM; those of Mozilla's list
    /// where it is left out.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub ca_file: Option<PathBuf>,
    /// What this client proves itself with, beside the password.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub client_certificate: Option<ClientCertificate>,
    /// Which tables are captured.
    pub tables: TableSelection,
    /// Globs over the prefixes of the logical messages that are published. Prefixes that begin with `meander.` are ours and never are.
    #[serde(default, skip_serializing_if = "Vec::is_empty")]
    pub message_prefixes: Vec<String>,
    /// Which transactions are captured, by where they come from.
    #[serde(default)]
    pub origin: Origin,
    /// The publication.
    pub publication: Publication,
    /// Name of the replication slot; at most 63 of `a-z`, `0-9` and `_`.
    pub slot_name: String,
    /// Whether the slot is kept on the standbys (PostgreSQL 17); as it is where it is left out.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub slot_failover: Option<bool>,
    /// What becomes of the rows that are there already.
    #[serde(default)]
    pub snapshot: Snapshot,
    /// How often a heartbeat is written into the WAL; none is where it is left out.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub heartbeat_interval_seconds: Option<NonZeroU32>,
}

impl PostgresSource {
    /// How to reach the server.
    #[must_use]
    pub fn server(&self) -> PostgresServer {
        PostgresServer {
            host: self.host.clone(),
            port: self.port,
            database: self.database.clone(),
            username_file: self.username_file.clone(),
            password_file: self.password_file.clone(),
            ssl_mode: self.ssl_mode,
            ca_file: self.ca_file.clone(),
            client_certificate: self.client_certificate.clone(),
        }
    }
}

/// How to reach a PostgreSQL database. [`PostgresSource`] has the same fields and not this: serde does not refuse unknown fields where one
/// struct is flattened into another.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "camelCase", deny_unknown_fields)]
pub struct PostgresServer {
    /// Host name or address.
    pub host: String,
    /// TCP port.
    #[serde(default = "default_postgres_port")]
    pub port: u16,
    /// Database name.
    pub database: String,
    /// File that holds the user name.
    pub username_file: PathBuf,
    /// File that holds the password.
    pub password_file: PathBuf,
    /// Whether the connection is encrypted, and what the server has to prove.
    #[serde(default)]
    pub ssl_mode: SslMode,
    /// File with the certificates of the authorities that the server's certificate may come from, PEM; those of Mozilla's list
    /// where it is left out.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub ca_file: Option<PathBuf>,
    /// What this client proves itself with, beside the password.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub client_certificate: Option<ClientCertificate>,
}

/// What becomes of the rows that are there when a table's capture begins.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "camelCase", deny_unknown_fields)]
pub struct Snapshot {
    /// How they are read.
    #[serde(default)]
    pub mode: SnapshotMode,
    /// How many connections read at the same time in the mode `Bulk`.
    #[serde(default = "default_parallelism", skip_serializing_if = "is_default_parallelism")]
    pub parallelism: NonZeroU8,
    /// Tables to read again, or for the first time, each request once.
    #[serde(default, skip_serializing_if = "Vec::is_empty")]
    pub requests: Vec<SnapshotRequest>,
}

impl Default for Snapshot {
    fn default() -> Self {
        Self {
            mode: SnapshotMode::default(),
            parallelism: default_parallelism(),
            requests: Vec::new(),
        }
    }
}

fn default_parallelism() -> NonZeroU8 {
    NonZeroU8::MIN.saturating_add(1)
}

#[allow(clippy::trivially_copy_pass_by_ref)] // As serde asks.
fn is_default_parallelism(parallelism: &NonZeroU8) -> bool {
    *parallelism == default_parallelism()
}

/// How the rows are read that are there when a table's capture begins.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
pub enum SnapshotMode {
    /// All at once, by several connections, while the stream stands still.
    Bulk,
    /// In chunks, while changes are captured.
    #[default]
    Incremental,
    /// Not at all.
    Never,
}

/// Asks for the rows of some tables.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "camelCase", deny_unknown_fields)]
pub struct SnapshotRequest {
    /// Names the request: what was done under a name is not done again.
    pub id: String,
    /// Globs over `schema.table`; those that are captured are read.
    pub tables: Vec<String>,
}

/// Whether a connection to PostgreSQL is encrypted, and what the server has to prove. There is no mode that asks for encryption and
/// goes on without: it would promise nothing.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
pub enum SslMode {
    /// Nothing is encrypted.
    Disable,
    /// Encrypted; the server's certificate is not checked.
    #[default]
    Require,
    /// And the server's certificate comes from the authority.
    #[serde(rename = "VerifyCA")]
    VerifyCa,
    /// And it is for the host name.
    VerifyFull,
}

/// What a client proves itself with in TLS, or a server that this is.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "camelCase", deny_unknown_fields)]
pub struct ClientCertificate {
    /// File with the certificate, and those between it and the authority, PEM.
    pub certificate_file: PathBuf,
    /// File with its private key, PEM, not encrypted.
    pub key_file: PathBuf,
}

/// Which transactions are captured, by where they come from.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
pub enum Origin {
    /// All.
    #[default]
    Any,
    /// Those that the server did not get by replication itself. PostgreSQL 16 and later.
    None,
}

/// Globs over `schema.table`; what is excluded stays excluded.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "camelCase", deny_unknown_fields)]
pub struct TableSelection {
    /// At least one.
    pub include: Vec<String>,
    /// Wins over `include`.
    #[serde(default, skip_serializing_if = "Vec::is_empty")]
    pub exclude: Vec<String>,
}

/// The publication that the slot is read through.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "camelCase", deny_unknown_fields)]
pub struct Publication {
    /// Name of the publication.
    pub name: String,
    /// Who creates and changes it.
    #[serde(default)]
    pub management: PublicationManagement,
    /// What a partitioned table is captured as, if the publication is managed.
    #[serde(default)]
    pub partitions: Partitions,
}

/// What a partitioned table is captured as.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
pub enum Partitions {
    /// One table, whatever partition a row is in.
    #[default]
    Root,
    /// Each partition as a table of its own.
    Leaf,
}

/// Who creates and changes the publication.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
pub enum PublicationManagement {
    /// The runtime, which keeps it to the selected tables.
    #[default]
    Managed,
    /// Somebody else; the runtime checks it.
    External,
}

/// What keys and values look like.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all_fields = "camelCase", deny_unknown_fields)]
pub enum Format {
    /// `meander.v1.ChangeRecord` under a key in JSON.
    #[default]
    Protobuf,
    /// The events of Debezium's PostgreSQL connector.
    DebeziumJson {
        /// Each key and value is an object of a schema and a payload.
        schemas: bool,
        /// Each event tells its place in its transaction, and a topic where transactions begin and end.
        #[serde(default)]
        transaction_metadata: bool,
    },
}

/// The Kafka cluster that changes are published to.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "camelCase", deny_unknown_fields)]
pub struct KafkaSink {
    /// `host:port`, at least one.
    pub bootstrap_servers: Vec<String>,
    /// How the connections are encrypted; not at all where it is left out.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub tls: Option<KafkaTls>,
    /// As whom to sign in; as nobody where it is left out.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub sasl: Option<KafkaSasl>,
    /// Topics are `<prefix>.<schema>.<table>`.
    pub topic_prefix: String,
    /// Partitions of each data topic.
    #[serde(default = "default_partitions")]
    pub partitions: i32,
    /// Replicas of each topic; the broker's default where it is left out.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub replication_factor: Option<i32>,
    /// Settings of each data topic, such as `retention.ms`.
    #[serde(default, skip_serializing_if = "BTreeMap::is_empty")]
    pub topic_config: BTreeMap<String, String>,
    /// Who makes the topics.
    #[serde(default)]
    pub topic_management: TopicManagement,
}

/// Who makes the topics.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
pub enum TopicManagement {
    /// The runtime makes those that are missing.
    #[default]
    Managed,
    /// Somebody else; the runtime checks them.
    External,
}

/// Whom to trust, and what to show, in TLS with Kafka.
#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "camelCase", deny_unknown_fields)]
pub struct KafkaTls {
    /// File with the certificates of the authorities that the brokers' certificates may come from, PEM; those of Mozilla's list where
    /// it is left out.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub ca_file: Option<PathBuf>,
    /// What this client proves itself with.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub client_certificate: Option<ClientCertificate>,
}

/// As whom to sign in to Kafka.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "camelCase", deny_unknown_fields)]
pub struct KafkaSasl {
    /// How the password is proven.
    pub mechanism: SaslMechanism,
    /// File that holds the user name.
    pub username_file: PathBuf,
    /// File that holds the password.
    pub password_file: PathBuf,
}

/// How a password is proven to Kafka.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub enum SaslMechanism {
    /// The password itself is sent.
    Plain,
    /// SCRAM-SHA-256.
    ScramSha256,
    /// SCRAM-SHA-512.
    ScramSha512,
}

/// How to reach a Kafka cluster: what every client needs to know.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct KafkaCluster {
    /// `host:port`, at least one.
    pub bootstrap_servers: Vec<String>,
    /// How the connections are encrypted.
    pub tls: Option<KafkaTls>,
    /// As whom to sign in.
    pub sasl: Option<KafkaSasl>,
}

impl KafkaSink {
    /// How to reach the cluster.
    #[must_use]
    pub fn cluster(&self) -> KafkaCluster {
        self.log().cluster()
    }

    /// Where the log is that this publishes.
    #[must_use]
    pub fn log(&self) -> KafkaLog {
        KafkaLog {
            bootstrap_servers: self.bootstrap_servers.clone(),
            tls: self.tls.clone(),
            sasl: self.sasl.clone(),
            topic_prefix: self.topic_prefix.clone(),
        }
    }
}

impl KafkaLog {
    /// How to reach the cluster.
    #[must_use]
    pub fn cluster(&self) -> KafkaCluster {
        KafkaCluster {
            bootstrap_servers: self.bootstrap_servers.clone(),
            tls: self.tls.clone(),
            sasl: self.sasl.clone(),
        }
    }
}

/// Where the log is.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "camelCase", deny_unknown_fields)]
pub struct KafkaLog {
    /// `host:port`, at least one.
    pub bootstrap_servers: Vec<String>,
    /// How the connections are encrypted; not at all where it is left out.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub tls: Option<KafkaTls>,
    /// As whom to sign in; as nobody where it is left out.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub sasl: Option<KafkaSasl>,
    /// Topics are `<prefix>.<schema>.<table>`.
    pub topic_prefix: String,
}

/// The Redis server that changes are published to.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "camelCase", deny_unknown_fields)]
pub struct RedisSink {
    /// File that holds the URL, `redis://user:password@host:port/database`; `rediss://` for TLS.
    pub url_file: PathBuf,
    /// File with the certificates of the authorities that the server's certificate may come from, PEM; those of Mozilla's list where
    /// it is left out.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub ca_file: Option<PathBuf>,
    /// Streams are `<prefix>.<schema>.<table>`.
    pub stream_prefix: String,
    /// Keep about this many entries in each stream; all where it is left out.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub max_length: Option<u64>,
    /// When a change counts as being in Redis.
    #[serde(default)]
    pub durability: Durability,
    /// What PostgreSQL is acknowledged on.
    #[serde(default)]
    pub acknowledgement: Acknowledgement,
}

/// Streams of a Redis server that a replay writes to.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "camelCase", deny_unknown_fields)]
pub struct RedisStreams {
    /// File that holds the URL, `redis://user:password@host:port/database`; `rediss://` for TLS.
    pub url_file: PathBuf,
    /// File with the certificates of the authorities that the server's certificate may come from, PEM; those of Mozilla's list where
    /// it is left out.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub ca_file: Option<PathBuf>,
    /// Streams are `<prefix>.<schema>.<table>`.
    pub stream_prefix: String,
}

/// When a change counts as being in Redis.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
pub enum Durability {
    /// When Redis has answered.
    #[default]
    None,
    /// When it is in the append-only file on disk.
    Aof,
    /// When a replica has it.
    Replica,
}

/// Whether PostgreSQL keeps its WAL until Redis has the changes.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
pub enum Acknowledgement {
    /// What Kafka has is acknowledged. Redis is refilled from there.
    #[default]
    BestEffort,
    /// Only what Redis has as well.
    Required,
}

/// The operator's ProgressTracker.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "camelCase", deny_unknown_fields)]
pub struct OperatorLink {
    /// `https://host:port`; `http://` for local use, where nothing is encrypted.
    pub endpoint: String,
    /// File with the certificates of the authorities that the operator's certificate may come from, PEM; those of Mozilla's list where it
    /// is left out.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub ca_file: Option<PathBuf>,
    /// File that holds the projected service-account token, which is shown to the operator.
    pub token_file: PathBuf,
}

/// Where a replay starts.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "camelCase", deny_unknown_fields)]
pub enum ReplayStart {
    /// With the first change at or after this commit time, RFC 3339.
    Time(String),
    /// With the transaction of the change at this position, `epoch:LSN:ordinal`.
    Position(String),
    /// With the transaction of this record, or of the next one that can be read.
    Offset(RecordOffset),
    /// With the oldest change that Kafka still holds.
    Beginning,
}

/// A record in Kafka.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "camelCase", deny_unknown_fields)]
pub struct RecordOffset {
    /// Its topic, one of the pipeline's.
    pub topic: String,
    /// Its partition.
    pub partition: i32,
    /// Its offset.
    pub offset: i64,
}

/// Where a replay ends.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "camelCase", deny_unknown_fields)]
pub enum ReplayEnd {
    /// Before the first change at or after this commit time, RFC 3339.
    Time(String),
    /// With the transaction of the change at this position, `epoch:LSN:ordinal`.
    Position(String),
    /// With the transaction of this record, or of the last one before it that can be read.
    Offset(RecordOffset),
    /// With the last transaction that is published when the replay starts.
    Now,
    /// Never: what is captured later follows. Only for [`ReplayTarget::GrpcServe`].
    Live,
}

/// In which order changes are delivered.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
pub enum ReplayOrder {
    /// As they were committed.
    #[default]
    Commit,
    /// Those of a key as they were committed; those of different keys in any order.
    PerKey,
}

/// Which changes are delivered: those that every part of it keeps.
#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "camelCase", deny_unknown_fields)]
pub struct ReplayFilter {
    /// Changes of these tables; of all where it is left out.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub tables: Option<TableSelection>,
    /// Changes of these kinds; of all where it is empty.
    #[serde(default, skip_serializing_if = "Vec::is_empty")]
    pub operations: Vec<ReplayOperation>,
    /// Changes of rows with one of these keys: names of key columns, and the values as they stand in the key of the record.
    #[serde(default, skip_serializing_if = "Vec::is_empty")]
    pub keys: Vec<BTreeMap<String, String>>,
    /// Changes of rows for which this expression, in CEL, is true.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub expression: Option<String>,
}

/// What a change does.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
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

/// A replay's pace relative to the original one.
#[derive(Clone, Copy, Debug, Default, PartialEq)]
pub enum Speed {
    /// The original pace.
    #[default]
    Original,
    /// A positive, finite factor.
    Factor(f64),
    /// As fast as the target takes it.
    Max,
}

impl Eq for Speed {}

/// The text is not a speed.
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
#[error("{0:?} is not a speed: write a positive number such as 10 or 0.5, or \"max\"")]
pub struct InvalidSpeed(String);

impl std::str::FromStr for Speed {
    type Err = InvalidSpeed;

    fn from_str(text: &str) -> Result<Self, Self::Err> {
        if text == "max" {
            return Ok(Self::Max);
        }
        match text.parse::<f64>() {
            Ok(1.0) => Ok(Self::Original),
            Ok(factor) if factor.is_finite() && factor > 0.0 => Ok(Self::Factor(factor)),
            _ => Err(InvalidSpeed(text.to_owned())),
        }
    }
}

impl std::fmt::Display for Speed {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        match self {
            Self::Original => f.write_str("1"),
            Self::Factor(factor) => write!(f, "{factor}"),
            Self::Max => f.write_str("max"),
        }
    }
}

impl Serialize for Speed {
    fn serialize<S: serde::Serializer>(&self, serializer: S) -> Result<S::Ok, S::Error> {
        serializer.collect_str(self)
    }
}

impl<'de> Deserialize<'de> for Speed {
    fn deserialize<D: serde::Deserializer<'de>>(deserializer: D) -> Result<Self, D::Error> {
        #[derive(Deserialize)]
        #[serde(untagged)]
        enum Written {
            Number(f64),
            Text(String),
        }
        let text = match Written::deserialize(deserializer)? {
            Written::Number(number) => number.to_string(),
            Written::Text(text) => text,
        };
        text.parse().map_err(serde::de::Error::custom)
    }
}

/// Where a replay goes.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "camelCase", deny_unknown_fields)]
pub enum ReplayTarget {
    /// Call the user's `ReplayReceiver`.
    GrpcCall(GrpcReceiver),
    /// Serve `Replayer` to subscribers.
    #[serde(rename_all = "camelCase")]
    GrpcServe {
        /// Where to listen.
        address: SocketAddr,
        /// File that holds the bearer token which subscribers must show.
        token_file: PathBuf,
        /// What the server proves itself with; without it, nothing is encrypted.
        #[serde(default, skip_serializing_if = "Option::is_none")]
        certificate: Option<ClientCertificate>,
    },
    /// Write each change as one line of JSON to standard output.
    Log,
    /// Make the changes in a PostgreSQL database.
    Postgres(PostgresServer),
    /// Write the records into topics of a prefix that no pipeline has.
    Kafka(KafkaSink),
    /// Append the records to streams of a prefix that no pipeline has.
    Redis(RedisStreams),
    /// Post the changes as CloudEvents.
    Http(HttpEndpoint),
    /// Nowhere: everything that is due is counted, at once.
    DryRun,
}

/// A user's `ReplayReceiver`.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "camelCase", deny_unknown_fields)]
pub struct GrpcReceiver {
    /// `http://host:port`, or `https://host:port`.
    pub endpoint: String,
    /// File with the certificates of the authorities that the server's certificate may come from, PEM; those of Mozilla's list where it
    /// is left out.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub ca_file: Option<PathBuf>,
    /// What the replay proves itself with.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub client_certificate: Option<ClientCertificate>,
    /// File that holds the bearer token which the receiver is shown.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub token_file: Option<PathBuf>,
}

impl GrpcReceiver {
    /// One that is called without TLS and shown nothing.
    #[must_use]
    pub fn plain(endpoint: String) -> Self {
        Self {
            endpoint,
            ca_file: None,
            client_certificate: None,
            token_file: None,
        }
    }
}

/// Where changes are posted.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "camelCase", deny_unknown_fields)]
pub struct HttpEndpoint {
    /// `http://…` or `https://…`.
    pub url: String,
    /// File that holds the bearer token which is shown with every request.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub token_file: Option<PathBuf>,
    /// File with the certificates of the authorities that the server's certificate may come from, PEM; those of Mozilla's list where
    /// it is left out.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub ca_file: Option<PathBuf>,
}

/// The exit code of a process that would fail in the same way if it were started again: it does not help to try.
pub const EXIT_PERMANENT: u8 = 3;

fn default_admin_address() -> SocketAddr {
    SocketAddr::from(([0, 0, 0, 0], 9464))
}

fn default_postgres_port() -> u16 {
    5432
}

fn default_partitions() -> i32 {
    1
}

/// The file cannot be used.
#[derive(Debug, thiserror::Error)]
pub enum ConfigError {
    /// It cannot be read.
    #[error("cannot read {path}: {source}")]
    Unreadable {
        /// The file.
        path: PathBuf,
        /// Why.
        source: std::io::Error,
    },
    /// It is not what is expected.
    #[error("{path} is not a valid configuration: {source}")]
    Invalid {
        /// The file.
        path: PathBuf,
        /// Where and why.
        source: Box<serde_saphyr::Error>,
    },
}

/// Reads a [`CaptureConfig`] or a [`ReplayConfig`] from a file.
///
/// # Errors
/// When the file cannot be read, or is not such a configuration.
pub fn load<T: DeserializeOwned>(path: &Path) -> Result<T, ConfigError> {
    let text = fs::read_to_string(path).map_err(|source| ConfigError::Unreadable {
        path: path.to_owned(),
        source,
    })?;
    from_yaml(&text).map_err(|source| ConfigError::Invalid {
        path: path.to_owned(),
        source: Box::new(source),
    })
}

/// Reads a configuration from YAML.
///
/// # Errors
/// When it is none.
pub fn from_yaml<T: DeserializeOwned>(text: &str) -> Result<T, serde_saphyr::Error> {
    serde_saphyr::from_str(text)
}

/// Writes a configuration as the YAML that [`load`] reads.
///
/// # Errors
/// When a value has no form in YAML; none of the types here has one.
pub fn to_yaml<T: Serialize>(config: &T) -> Result<String, serde_saphyr::ser::Error> {
    serde_saphyr::to_string(config)
}

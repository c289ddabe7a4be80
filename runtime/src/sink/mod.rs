//! Where records go. Each sink keeps its own place, so that after a crash each one drops exactly what it already has.

pub mod claims;
pub mod kafka;
pub mod left_open;
pub mod partition;
pub mod producer;
pub mod queue;
pub mod redis;
pub mod topics;

use crate::{
    checkpoint::TailError,
    kafka_client::Refusal,
    log::{CLAIMS_TOPIC, claim_key},
    position::{Lsn, Position},
};

/// How far a sink has come.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Durable {
    /// The last change that is in the sink; all before it are too.
    pub position: Option<Position>,
    /// Everything that committed before this is in the sink.
    pub safe: Lsn,
    /// Batches taken since the start.
    pub batches: u64,
}

/// What is wrong with a sink.
///
/// Where it is Kafka, the capture starts anew from its checkpoint, as it does after a crash: there is one way back. Where it is Redis,
/// capture into Kafka goes on, and Redis is refilled from there.
#[derive(Debug, thiserror::Error)]
pub enum SinkError {
    /// Kafka does not answer.
    #[error(
        "cannot reach Kafka at {servers}: {cause}; check sinks.kafka.bootstrapServers, and that the brokers run and admit this pod"
    )]
    KafkaUnreachable {
        /// Bootstrap servers.
        servers: String,
        /// Why.
        cause: String,
    },
    /// Kafka does not take user and password.
    #[error(
        "Kafka at {servers} refused to sign this pipeline in: {cause}; check sinks.kafka.sasl.mechanism, and user and password in the Secret that sinks.kafka.sasl.credentialsSecretRef names"
    )]
    KafkaAuthentication {
        /// Bootstrap servers.
        servers: String,
        /// The broker's words.
        cause: String,
    },
    /// No agreement on TLS with Kafka.
    #[error(
        "no TLS with Kafka at {servers}: {cause}; check that sinks.kafka.bootstrapServers names a listener for TLS, by a name that its certificate holds, and that sinks.kafka.tls.caSecretRef holds the authority that it comes from"
    )]
    KafkaTls {
        /// Bootstrap servers.
        servers: String,
        /// Why.
        cause: String,
    },
    /// What a client of Kafka needs cannot be read.
    #[error("{0}; check the Secrets that sinks.kafka.sasl and sinks.kafka.tls name")]
    KafkaClient(#[from] crate::kafka_client::ClientError),
    /// Kafka does not allow something.
    #[error("Kafka does not allow this pipeline to {what}; run kafka-acls.sh --add --allow-principal User:… {acl}")]
    KafkaForbidden {
        /// What it wanted.
        what: String,
        /// What allows it.
        acl: String,
    },
    /// A topic cannot be made or does not fit.
    #[error("topic {topic:?}: {cause}")]
    Topic {
        /// Its name.
        topic: String,
        /// What is wrong, and what to do.
        cause: String,
    },
    /// Two tables whose names become the same topic.
    #[error("tables {first} and {second} would both go to topic {topic:?}; exclude one of them")]
    TopicCollision {
        /// Name of the topic.
        topic: String,
        /// One table.
        first: String,
        /// The other.
        second: String,
    },
    /// The prefix is another pipeline's.
    #[error(
        "topicPrefix {prefix:?} is not free: pipeline {owner} publishes under {taken:?}, and nobody could tell the topics of both apart; topicPrefix is immutable, so delete this pipeline and create it with another, or delete that one with reclaimPolicy Delete; if it no longer exists, remove its claim, by a record with key {} and no value in topic {CLAIMS_TOPIC}",
        claim_key(.taken, .owner)
    )]
    TopicPrefixTaken {
        /// The prefix.
        prefix: String,
        /// That of the other pipeline: the same, or one that begins with the other and a dot.
        taken: String,
        /// `namespace/name/slot` of the other pipeline.
        owner: String,
    },
    /// A record is larger than the topic takes.
    #[error(
        "a record for topic {topic:?} is larger than the topic takes, and nothing after it is published; raise its max.message.bytes (kafka-configs.sh --bootstrap-server … --alter --entity-type topics --entity-name {topic} --add-config max.message.bytes=10485760), or set onOversizedRow: OmitValues, and it is published without its large values"
    )]
    RecordTooLarge {
        /// The topic.
        topic: String,
    },
    /// A change makes a record that no topic takes, or that is larger than its topic takes without its large values as well.
    #[error(
        "a change of {table} at {position} makes a record of {bytes} bytes, and topic {topic:?} takes {limit}; nothing after it is published; {remedy}"
    )]
    ChangeTooLarge {
        /// Whose change.
        table: String,
        /// Its position.
        position: Position,
        /// Its topic.
        topic: String,
        /// Key, value and headers.
        bytes: u64,
        /// What the topic takes.
        limit: u64,
        /// What to do.
        remedy: String,
    },
    /// A transaction failed, or its outcome is not known. The checkpoint tells.
    #[error("a Kafka transaction did not succeed: {0}")]
    KafkaTransaction(String),
    /// Another runtime took over.
    #[error(
        "another runtime publishes this pipeline, or this one was stopped for so long that Kafka gave up its transaction: {0}"
    )]
    Fenced(String),
    /// The checkpoint cannot be read.
    #[error("{0}")]
    Checkpoint(#[from] TailError),
    /// The log is ahead of the checkpoint that should describe it.
    #[error(
        "topic {topic:?} holds {found}, past the checkpoint at {checkpoint}: the checkpoint was lost, or a pipeline that is gone left the topic; delete the topic if nobody needs it, restore the topic {checkpoint_topic:?}, or delete this pipeline and create it with another topicPrefix, which is immutable"
    )]
    LogAhead {
        /// A data topic.
        topic: String,
        /// Its last position.
        found: String,
        /// That of the checkpoint.
        checkpoint: String,
        /// Where the checkpoint is kept.
        checkpoint_topic: String,
    },
    /// The URL of Redis cannot be read or parsed.
    #[error(
        "cannot use the Redis URL: {0}; the Secret that sinks.redis.urlSecretRef names must hold redis://user:password@host:port"
    )]
    RedisUrl(String),
    /// Redis does not answer, or refuses.
    #[error("cannot use Redis at {address}: {cause}; check that it runs and admits this pod with the user of its URL")]
    Redis {
        /// `host:port`.
        address: String,
        /// Why.
        cause: String,
    },
    /// Redis would throw entries away by itself.
    #[error(
        "Redis at {address} evicts keys (maxmemory-policy {policy}), and would lose whole streams; run CONFIG SET maxmemory-policy noeviction"
    )]
    RedisEvicts {
        /// `host:port`.
        address: String,
        /// The policy.
        policy: String,
    },
    /// A cluster spreads streams over hash slots, each with a mark of its own.
    #[error("Redis at {0} is a cluster, which is not supported yet; name a single server")]
    RedisCluster(String),
    /// Redis has no memory left.
    #[error("Redis at {0} is out of memory; raise maxmemory, or set sinks.redis.retention.maxLength")]
    RedisFull(String),
    /// Somebody else writes to a stream.
    #[error("stream {stream:?} ends with entry {id}, which this pipeline did not write; {remedy}")]
    ForeignWriter {
        /// Name of the stream.
        stream: String,
        /// Its last entry.
        id: String,
        /// What to do.
        remedy: String,
    },
    /// The streams under the prefix are another pipeline's.
    #[error(
        "streamPrefix {prefix:?} is not free: the streams under it are those of pipeline {owner}; create this pipeline with another streamPrefix, or delete that one with reclaimPolicy Delete; if it no longer exists, run HSET {claim} pipeline ''"
    )]
    StreamPrefixTaken {
        /// The prefix.
        prefix: String,
        /// `namespace/name/slot` of the other pipeline.
        owner: String,
        /// Name of the claim.
        claim: String,
    },
    /// A later owner has the mark.
    #[error(
        "Redis was taken by owner generation {0}, of which Kafka knows nothing: it lost the checkpoint; delete this pipeline and create it with another streamPrefix, which is immutable"
    )]
    RedisTaken(String),
    /// Redis lost entries that it had acknowledged.
    #[error(
        "Redis lost entries: it is complete up to {found}, and had acknowledged {expected}; what is missing is refilled from Kafka"
    )]
    RedisLost {
        /// What the mark says now.
        found: String,
        /// What it had said.
        expected: String,
    },
    /// A stream is gone, and the mark is not.
    #[error(
        "stream {stream:?} was deleted; if it is not wanted any more, run HDEL {mark} last:{stream}; to have every stream filled anew from Kafka, delete the others as well, and then the mark: DEL {mark}"
    )]
    RedisStreamLost {
        /// Name of the stream.
        stream: String,
        /// Name of the mark.
        mark: String,
    },
    /// Redis takes less than comes.
    #[error(
        "Redis does not take changes as fast as they come, and its buffer of {} MiB stayed full; what it lacks is refilled from Kafka",
        redis::BUFFER_BYTES >> 20
    )]
    RedisSlow,
    /// It does not keep entries as it should.
    #[error("Redis at {address} does not make entries durable as sinks.redis.durability asks: {cause}; {remedy}")]
    RedisNotDurable {
        /// `host:port`.
        address: String,
        /// Why not.
        cause: String,
        /// What to do.
        remedy: String,
    },
    /// Kafka cannot be read.
    #[error("Redis cannot be refilled: {0}")]
    Refill(String),
    /// Neither Redis nor Kafka has them.
    #[error(
        "Redis lacks {missing} entries after {after} that Kafka no longer holds; let the topics keep them longer than Redis may be away, and to go on without these entries run HSET {mark} accept {missing}"
    )]
    RedisGap {
        /// How many entries.
        missing: u64,
        /// The last change before them that Redis has.
        after: String,
        /// Name of the mark.
        mark: String,
    },
}

impl SinkError {
    /// What it means that the brokers cannot be worked with.
    #[must_use]
    pub fn refused(servers: &str, refusal: Refusal) -> Self {
        let servers = servers.to_owned();
        match refusal {
            Refusal::Authentication(cause) => Self::KafkaAuthentication { servers, cause },
            Refusal::Tls(cause) => Self::KafkaTls { servers, cause },
            Refusal::Unreachable(cause) => Self::KafkaUnreachable { servers, cause },
        }
    }

    /// One word for conditions and metrics.
    #[must_use]
    pub fn reason(&self) -> &'static str {
        match self {
            Self::KafkaUnreachable { .. } => "KafkaUnreachable",
            Self::KafkaAuthentication { .. } => "KafkaAuthenticationFailed",
            Self::KafkaTls { .. } => "KafkaTlsFailed",
            Self::KafkaClient(_) => "KafkaCredentialsUnreadable",
            Self::KafkaForbidden { .. } => "KafkaNotAuthorized",
            Self::Topic { .. } => "TopicNotUsable",
            Self::TopicCollision { .. } => "TopicCollision",
            Self::TopicPrefixTaken { .. } => "TopicPrefixTaken",
            Self::RecordTooLarge { .. } | Self::ChangeTooLarge { .. } => "RecordTooLarge",
            Self::KafkaTransaction(_) => "KafkaTransactionFailed",
            Self::Fenced(_) => "Fenced",
            Self::Checkpoint(TailError::Forbidden { .. }) => "KafkaNotAuthorized",
            Self::Checkpoint(_) => "CheckpointUnreadable",
            Self::LogAhead { .. } => "LogAheadOfCheckpoint",
            Self::RedisUrl(_) => "RedisUrlInvalid",
            Self::Redis { .. } => "RedisUnreachable",
            Self::RedisEvicts { .. } => "RedisEvicts",
            Self::RedisCluster(_) => "RedisClusterUnsupported",
            Self::RedisFull(_) => "RedisOutOfMemory",
            Self::ForeignWriter { .. } => "ForeignWriter",
            Self::StreamPrefixTaken { .. } => "StreamPrefixTaken",
            Self::RedisTaken(_) => "RedisTaken",
            Self::RedisLost { .. } => "EntriesLost",
            Self::RedisStreamLost { .. } => "StreamDeleted",
            Self::RedisSlow => "RedisSlow",
            Self::RedisNotDurable { .. } => "RedisNotDurable",
            Self::Refill(_) => "RefillFailed",
            Self::RedisGap { .. } => "HistoryMissing",
        }
    }
}

//! Why a replay ended without being complete.

use std::{net::SocketAddr, path::PathBuf, sync::Arc, time::Duration};

use rdkafka::{error::KafkaError, types::RDKafkaErrorCode};

use super::{
    filter::FilterError,
    record::{Coordinate, InvalidHeader},
    target::TargetError,
};
use crate::{checkpoint::TailError, kafka_client::ClientError, position::InvalidPosition, sink::SinkError};

/// A replay cannot go on. Each message says the cause and what to do.
#[derive(Debug, thiserror::Error)]
pub enum ReplayError {
    /// A time in the configuration cannot be understood.
    #[error("`{field}` is {text:?}, which is not a time: write it as in 2026-11-20T10:00:00Z: {source}")]
    InvalidTime {
        /// `from` or `to`.
        field: &'static str,
        /// What was written.
        text: String,
        /// What is wrong with it.
        source: jiff::Error,
    },
    /// A position in the configuration cannot be understood.
    #[error("`{field}`: {source}")]
    InvalidPosition {
        /// `from` or `to`.
        field: &'static str,
        /// What is wrong with it.
        source: InvalidPosition,
    },
    /// The record that a range is bounded by is not there.
    #[error(
        "`{field}` names offset {offset} in partition {partition} of {topic}, which is not there: {cause}; create another replay"
    )]
    NoSuchRecord {
        /// `from` or `to`.
        field: &'static str,
        /// The topic.
        topic: String,
        /// The partition.
        partition: i32,
        /// The offset.
        offset: i64,
        /// Why it is not.
        cause: String,
    },
    /// The range ends before it starts.
    #[error("the range would end before it starts: set `to` to something after `from`")]
    EmptyRange,
    /// The range has no end, and the target takes none of that.
    #[error(
        "`to` is live, which is for a target to which subscribers come: set `to` to now, or the target to grpcServe"
    )]
    NobodyFollows,
    /// The pipeline has not written a log.
    #[error(
        "there is no checkpoint of this pipeline in the Kafka topic {topic}: replay needs a pipeline with a Kafka sink that has \
         published; check the pipeline's name, its slot and the Kafka address"
    )]
    NoDurableLog {
        /// Where the checkpoint would be.
        topic: String,
    },
    /// The checkpoint, or the end of a partition, cannot be read.
    #[error("{0}; check that Kafka is up and that this client may read the topic")]
    TailUnreadable(#[source] TailError),
    /// The newest checkpoint could not be read for too long.
    #[error("{0}; check that Kafka is up and that this client may read the topic")]
    LogLost(#[source] Arc<TailError>),
    /// Kafka does not admit this replay.
    #[error(transparent)]
    NotAdmitted(#[from] SinkError),
    /// Kafka does not answer.
    #[error(
        "Kafka cannot be used while {doing}: {source}; check that it is up and that this client may read the topics"
    )]
    KafkaUnreachable {
        /// What was tried.
        doing: &'static str,
        /// What it said.
        source: KafkaError,
    },
    /// Nothing comes from a partition that is not at its end.
    #[error(
        "partition {partition} of {topic} has delivered nothing for {silence:?}{}; check that its leader is up",
        .source.as_ref().map(|source| format!(" ({source})")).unwrap_or_default()
    )]
    LogStalled {
        /// The topic.
        topic: String,
        /// The partition.
        partition: i32,
        /// How long.
        silence: Duration,
        /// What the client said last.
        source: Option<KafkaError>,
    },
    /// A transaction in the range stays open.
    #[error(
        "a transaction in partition {partition} of {topic} has been open for more than {waited:?}, so nobody can read past it; \
         find it with `kafka-transactions.sh --bootstrap-server … find-hanging` and abort it"
    )]
    HangingTransaction {
        /// The topic.
        topic: String,
        /// The partition.
        partition: i32,
        /// How long it was waited for.
        waited: Duration,
    },
    /// Retention took away what was still to be replayed.
    #[error(
        "Kafka has deleted records of partition {partition} of {topic} that were still to be replayed; give the topics a longer \
         retention, or replay a later range"
    )]
    LogTruncated {
        /// The topic.
        topic: String,
        /// The partition.
        partition: i32,
    },
    /// A record does not say what it is.
    #[error(
        "the record at offset {offset} of partition {partition} of {topic} is not from a pipeline: {source}; find out who writes there"
    )]
    ForeignRecord {
        /// The topic.
        topic: String,
        /// The partition.
        partition: i32,
        /// The offset.
        offset: i64,
        /// What is wrong with it.
        source: InvalidHeader,
    },
    /// The log is not in order.
    #[error(
        "the log is not in commit order: {found}, at offset {offset} of partition {partition} of {topic}, comes after {previous}; \
         something else wrote to the topic, or two pipelines share the prefix"
    )]
    Disorder {
        /// The topic.
        topic: String,
        /// The partition.
        partition: i32,
        /// The offset.
        offset: i64,
        /// The record that was replayed before.
        previous: Coordinate,
        /// The record that should have come earlier.
        found: Coordinate,
    },
    /// Changes in another order than that of commits would spoil the target.
    #[error("the target needs the changes in commit order: leave `order` out")]
    CommitOrderNeeded,
    /// The filter cannot be used, or cannot judge a record.
    #[error(transparent)]
    Filter(#[from] FilterError),
    /// A part of the replay ended without a word.
    #[error("{0} ended unexpectedly; this is a fault of Meander's, its cause is in the log")]
    TaskStopped(&'static str),
    /// The target cannot go on.
    #[error(transparent)]
    Target(#[from] TargetError),
    /// The token that subscribers have to show is not there.
    #[error("cannot read the token that subscribers have to show from {path}: {source}; without one nothing is served")]
    NoToken {
        /// The file.
        path: PathBuf,
        /// Why.
        source: std::io::Error,
    },
    /// The address cannot be listened on.
    #[error("cannot listen on {address}: {source}")]
    Listen {
        /// The address.
        address: SocketAddr,
        /// Why.
        source: std::io::Error,
    },
    /// The server for subscribers ended.
    #[error("the server for subscribers ended: {0}")]
    Server(#[source] Box<dyn std::error::Error + Send + Sync>),
    /// The process was asked to end.
    #[error("the process was asked to end before the replay was complete; start it again to replay the range")]
    Interrupted,
}

/// A client cannot be made.
pub(super) fn no_client(error: ClientError) -> ReplayError {
    ReplayError::TailUnreadable(TailError::Client(Box::new(error)))
}

/// Whether nothing more comes from a partition for which a consumer says so; after all else the client goes on by itself.
pub(super) fn is_fatal(error: &KafkaError) -> bool {
    match error {
        KafkaError::MessageConsumption(code) => matches!(
            code,
            RDKafkaErrorCode::AutoOffsetReset
                | RDKafkaErrorCode::OffsetOutOfRange
                | RDKafkaErrorCode::TopicAuthorizationFailed
                | RDKafkaErrorCode::UnknownTopic
                | RDKafkaErrorCode::UnknownPartition
        ),
        error => matches!(error, KafkaError::MessageConsumptionFatal(_)),
    }
}

impl ReplayError {
    /// Whether a replay of the same range into the same target would fail in the same way.
    #[must_use]
    pub fn is_permanent(&self) -> bool {
        match self {
            Self::InvalidTime { .. }
            | Self::InvalidPosition { .. }
            | Self::NoSuchRecord { .. }
            | Self::EmptyRange
            | Self::NobodyFollows
            | Self::LogTruncated { .. }
            | Self::Filter(_)
            | Self::CommitOrderNeeded
            | Self::ForeignRecord { .. }
            | Self::Disorder { .. } => true,
            Self::Target(error) => error.is_permanent(),
            Self::NoDurableLog { .. }
            | Self::TailUnreadable(_)
            | Self::LogLost(_)
            | Self::NotAdmitted(_)
            | Self::KafkaUnreachable { .. }
            | Self::LogStalled { .. }
            | Self::HangingTransaction { .. }
            | Self::TaskStopped(_)
            | Self::NoToken { .. }
            | Self::Listen { .. }
            | Self::Server(_)
            | Self::Interrupted => false,
        }
    }

    /// The reason, in PascalCase, as it stands in conditions and events.
    #[must_use]
    pub fn reason(&self) -> &'static str {
        match self {
            Self::InvalidTime { .. } => "InvalidTime",
            Self::InvalidPosition { .. } => "InvalidPosition",
            Self::NoSuchRecord { .. } => "NoSuchRecord",
            Self::EmptyRange => "EmptyRange",
            Self::NobodyFollows => "NobodyFollows",
            Self::NoDurableLog { .. } => "NoDurableLog",
            Self::NotAdmitted(error) => error.reason(),
            Self::TailUnreadable(TailError::Forbidden { .. }) => "KafkaNotAuthorized",
            Self::TailUnreadable(TailError::NotACheckpoint { .. }) => "CheckpointUnreadable",
            Self::TailUnreadable(_) | Self::LogLost(_) | Self::KafkaUnreachable { .. } => "KafkaUnreachable",
            Self::LogStalled { .. } => "LogStalled",
            Self::HangingTransaction { .. } => "HangingTransaction",
            Self::LogTruncated { .. } => "LogTruncated",
            Self::ForeignRecord { .. } => "ForeignRecord",
            Self::Disorder { .. } => "LogOutOfOrder",
            Self::Filter(error) => error.reason(),
            Self::CommitOrderNeeded => "CommitOrderNeeded",
            Self::TaskStopped(_) => "TaskStopped",
            Self::Target(error) => error.reason(),
            Self::NoToken { .. } => "NoToken",
            Self::Listen { .. } | Self::Server(_) => "ServerFailed",
            Self::Interrupted => "Interrupted",
        }
    }
}

//! Where a replay goes. A target is one file here, one variant of [`TargetError`] for each way it fails, and one line in the
//! `match` of [`super::run`].

pub mod dry_run;
mod event;
pub mod grpc_call;
pub mod grpc_serve;
pub mod http;
pub mod kafka;
pub mod log;
mod marks;
pub mod postgres;
pub mod redis;

use std::{future::Future, path::PathBuf, time::Duration};

use meander_config::ResourceIdentity;
use tokio::{sync::mpsc, time::Instant};

pub use super::tally::{Tally, Trouble};
use super::{
    checkpoint::Checkpoint,
    record::{Passed, Record, ResumeToken},
};
use crate::{checkpoint::TailError, sink::SinkError, source::postgres::preflight::SourceError, tls::TlsFileError};

/// Takes batches until there are no more.
pub trait Target: Send + 'static {
    /// Whether it has to be told where transactions end. Then one is never held half-way.
    const WHOLE_TRANSACTIONS: bool = false;
    /// Whether changes are delivered when they are due, and not all at once.
    const PACED: bool = true;
    /// Whether it keeps how far the replay is. Then, when the process is asked to end, its batches end before the range does, and it is
    /// given time to finish those that it has, so that whoever goes on repeats none of them.
    const FINISHES: bool = false;
    /// Whether it says by itself that the destination does not answer, because it knows more of it than when it was given something.
    const TELLS_SILENCE: bool = false;
    /// How many records it is handed together, at the most.
    const MOST_RECORDS: usize = 512;

    /// Opens the destination, says so by [`Tally::open`], takes every batch in order, and credits each to the tally once the
    /// destination has it. Returns when the batches have ended and all are credited, or when it cannot go on.
    fn run(self, batches: mpsc::Receiver<Batch>, tally: Tally) -> impl Future<Output = Result<(), TargetError>> + Send;
}

/// Keeps how far the replay is, or has it kept. One that does it together with what it delivers is exactly once.
pub trait Resumable: Target + Sized {
    /// Where it goes.
    type Settings: Sync;

    /// Opens the destination. Returns what an earlier process of the same job left there.
    fn open(
        settings: &Self::Settings,
        job: &ResourceIdentity,
    ) -> impl Future<Output = Result<(Self, Option<Checkpoint>), TargetError>> + Send;

    /// Notes that a replay begins.
    fn begin(&mut self, checkpoint: &Checkpoint) -> impl Future<Output = Result<(), TargetError>> + Send;
}

/// Names a job where it is kept how far it is, and on what it wrote. The UID tells it from an earlier one of its name.
fn job_id(job: &ResourceIdentity) -> String {
    format!("{}/{}/{}", job.namespace, job.name, job.uid)
}

/// An error with its causes, which tonic and hyper leave out of their own text.
fn chain(error: &dyn std::error::Error) -> String {
    std::iter::successors(error.source(), |error| error.source()).fold(error.to_string(), |text, source| {
        let source = source.to_string();
        // Some repeat what they are caused by.
        match text.ends_with(&source) {
            true => text,
            false => format!("{text}: {source}"),
        }
    })
}

/// Records in commit order that are handed over together; at least one.
#[derive(Debug)]
pub struct Batch {
    /// The records.
    pub records: Vec<Record>,
    /// The last of them ends its transaction. Only known to targets that have to be told.
    pub whole: bool,
    /// What the tally needs once they are delivered.
    pub mark: Mark,
}

/// What is told about a delivered batch.
#[derive(Clone, Copy, Debug)]
pub struct Mark {
    /// How many records.
    pub records: u64,
    /// What else is behind once they are delivered.
    pub passed: Passed,
    /// Event time of the first.
    pub first_time: i64,
    /// Event time of the last: not before that of any record up to it.
    pub last_time: i64,
    /// Names the place after the last.
    pub resume: ResumeToken,
    /// When they were handed to the target.
    pub handed: Instant,
}

/// A target cannot go on. Each message says the cause and what to do.
#[derive(Debug, thiserror::Error)]
pub enum TargetError {
    /// The endpoint is no address.
    #[error("the receiver's endpoint {endpoint:?} is not an address such as http://analytics:50051: {source}")]
    InvalidEndpoint {
        /// The endpoint.
        endpoint: String,
        /// What is wrong with it.
        source: tonic::transport::Error,
    },
    /// The user's server cannot be reached, or keeps breaking off.
    #[error(
        "nothing could be delivered to the receiver at {endpoint} for {tried:?}: {cause}; start it, or correct the endpoint, and \
         replay again"
    )]
    ReceiverUnreachable {
        /// The endpoint.
        endpoint: String,
        /// How long.
        tried: Duration,
        /// The last failure.
        cause: String,
    },
    /// The user's server takes messages and does not answer them.
    #[error(
        "the receiver at {endpoint} has not answered a message for {waited:?}; it must answer each with its resume token once it \
         has taken it"
    )]
    ReceiverSilent {
        /// The endpoint.
        endpoint: String,
        /// How long.
        waited: Duration,
    },
    /// The user's server says that it will not take it.
    #[error(
        "the receiver at {endpoint} refuses the replay: {status}; make it serve meander.v1.ReplayReceiver, and admit this caller"
    )]
    ReceiverRefused {
        /// The endpoint.
        endpoint: String,
        /// What it said.
        status: Box<tonic::Status>,
    },
    /// The user's server answers something else.
    #[error(
        "the receiver at {endpoint} answered {answer:?} where {expected:?} was expected; it must answer each message, in order, with its resume token"
    )]
    ReceiverConfused {
        /// The endpoint.
        endpoint: String,
        /// The answer.
        answer: String,
        /// The resume token of the oldest message without an answer.
        expected: String,
    },
    /// The URL is none that can be posted to.
    #[error("cannot post to {url:?}: {cause}; correct target.http.url")]
    InvalidUrl {
        /// The URL.
        url: String,
        /// What is wrong with it.
        cause: String,
    },
    /// What is to be shown to the endpoint cannot be read.
    #[error("cannot read the bearer token in {path}: {cause}; check the Secret that target.http.tokenSecretRef names")]
    NoBearerToken {
        /// The file.
        path: PathBuf,
        /// Why.
        cause: String,
    },
    /// The authorities that the endpoint's certificate may come from cannot be read.
    #[error("{0}; check the Secret that target.http.caSecretRef names")]
    NoAuthorities(#[from] TlsFileError),
    /// The endpoint takes nothing from this caller.
    #[error(
        "the endpoint {endpoint} refuses the replay: {status} {said}; make it take POST requests of application/cloudevents-batch+json, and \
         admit this caller"
    )]
    EndpointRefused {
        /// Its URL.
        endpoint: String,
        /// The status of its answer.
        status: String,
        /// The beginning of its answer.
        said: String,
    },
    /// The endpoint takes too little of what it gets.
    #[error(
        "the endpoint {endpoint} did not take {kept} records, which are kept in the topic {topic}, and refuses more: {refusal}; mend it, and \
         replay again"
    )]
    TooManyDeadLetters {
        /// Its URL.
        endpoint: String,
        /// How many are kept.
        kept: usize,
        /// Where.
        topic: String,
        /// What it said last.
        refusal: String,
    },
    /// A subscriber went away, or takes nothing.
    #[error("the subscriber went away, or took nothing for too long")]
    SubscriberGone,
    /// A row of the log lacks values.
    #[error(
        "the record at offset {offset} of partition {partition} of {topic} lacks values that the topic would not take (onOversizedRow: OmitValues), and the row cannot be made from it; begin the replay after it, or leave its key or its table out by filter"
    )]
    ValuesOmitted {
        /// The topic.
        topic: String,
        /// The partition.
        partition: i32,
        /// The offset.
        offset: i64,
    },
    /// A record cannot be shown.
    #[error(
        "the record at offset {offset} of partition {partition} of {topic} is neither a meander.v1.ChangeRecord nor JSON: {cause}; \
         somebody else writes to this topic"
    )]
    Undecodable {
        /// The topic.
        topic: String,
        /// The partition.
        partition: i32,
        /// The offset.
        offset: i64,
        /// What is wrong with it.
        cause: String,
    },
    /// The target database cannot be signed in to.
    #[error("the target: {0}")]
    Database(#[from] SourceError),
    /// The target does not answer.
    #[error("the target has not answered for {waited:?}; see what keeps it, and replay again")]
    Silent {
        /// How long it was waited for.
        waited: Duration,
    },
    /// The target failed in a way that passes.
    #[error("the target: {0}; check that it runs, has room and can be written to")]
    Disturbed(String),
    /// What is wrong with a target that a pipeline can publish to as well.
    #[error("the target: {}", said_of_target(.0))]
    Sink(SinkError),
    /// A pipeline publishes where the replay would write.
    #[error(
        "the target's topicPrefix {prefix:?} is not free: pipeline {owner} publishes under {taken:?}, where positions only rise, and what is \
         replayed would be taken for history; replay under another topicPrefix"
    )]
    TopicsAreLive {
        /// The prefix.
        prefix: String,
        /// That of the pipeline.
        taken: String,
        /// `namespace/name/slot` of the pipeline.
        owner: String,
    },
    /// A pipeline publishes to the streams that the replay would write.
    #[error(
        "the target's streamPrefix {prefix:?} is not free: pipeline {owner} publishes under {taken:?}, and what is replayed would be taken for news; replay \
         under another streamPrefix"
    )]
    StreamsAreLive {
        /// The prefix.
        prefix: String,
        /// That of the pipeline.
        taken: String,
        /// `namespace/name/slot` of the pipeline.
        owner: String,
    },
    /// A stream is somebody else's.
    #[error(
        "stream {stream:?} of the target was there before this replay; replay under another streamPrefix, or, if nobody needs it any more, delete \
         it: DEL {stream}"
    )]
    StreamExists {
        /// Its name.
        stream: String,
    },
    /// Somebody else delivers the same replay.
    #[error("another process goes on with this replay, so this one stops")]
    TakenOver,
    /// Kafka does not keep how far the replay is.
    #[error(
        "the place of the replay cannot be kept in the consumer group {group} of Kafka: {cause}; check that Kafka is up and that this \
         client may read the group and the pipeline's topics"
    )]
    PlaceNotKept {
        /// The group.
        group: String,
        /// What Kafka said.
        cause: String,
    },
    /// This client may not use the consumer group.
    #[error(
        "Kafka does not allow this client to keep the place of the replay in the consumer group {group}; run kafka-acls.sh --add \
         --allow-principal User:… --operation Read --group meander-replay. --resource-pattern-type prefixed"
    )]
    GroupForbidden {
        /// The group.
        group: String,
    },
    /// Kafka does not admit this replay.
    #[error(transparent)]
    NotAdmitted(SinkError),
    /// What an earlier process left cannot be read.
    #[error(
        "the place to go on from, in {place}, cannot be read: {cause}; create the replay anew to deliver its range from the beginning"
    )]
    CheckpointUnreadable {
        /// Where it is.
        place: String,
        /// What is wrong with it.
        cause: String,
    },
    /// The role may not make the table that the place is kept in.
    #[error(
        "user {user} may not make the table that the place of the replay is kept in; run CREATE SCHEMA meander AUTHORIZATION {user}; in the \
         target database"
    )]
    NoPlace {
        /// The role, quoted.
        user: String,
    },
    /// A table does not exist.
    #[error(
        "the target database has no table {table}; make it, for example with pg_dump --schema-only --table='{table}' from the source"
    )]
    NoTable {
        /// The table, quoted.
        table: String,
    },
    /// The role may not write to a table.
    #[error(
        "user {user} may not write to {table} of the target database; run GRANT USAGE ON SCHEMA {schema} TO {user}; \
         GRANT SELECT, INSERT, UPDATE, DELETE, TRUNCATE ON {table} TO {user};"
    )]
    TableNotWritable {
        /// The table, quoted.
        table: String,
        /// Its schema, quoted.
        schema: String,
        /// The role, quoted.
        user: String,
    },
    /// Row-level security would hide rows from the role.
    #[error(
        "row-level security hides rows of {table} of the target database from user {user}, so that changes would not meet them; run \
         ALTER ROLE {user} BYPASSRLS;"
    )]
    RowsHidden {
        /// The table, quoted.
        table: String,
        /// The role, quoted.
        user: String,
    },
    /// A pipeline may capture the table, and could not tell what the replay writes.
    #[error(
        "{table} of the target database is in a publication, so that what is replayed would be captured again, and this session has no \
         replication origin by which it could be told apart; run GRANT EXECUTE ON FUNCTION pg_replication_origin_oid(text), \
         pg_replication_origin_create(text), pg_replication_origin_session_setup(text) TO {user}; and set origin: None in the pipeline that \
         captures it (if the user may, the server has no room for another origin: raise max_replication_slots)"
    )]
    WouldBeCaptured {
        /// The table, quoted.
        table: String,
        /// The role, quoted.
        user: String,
    },
    /// A table lacks a column.
    #[error(
        "{table} of the target database has no column {column}; run ALTER TABLE {table} ADD COLUMN {column} {type_};"
    )]
    NoColumn {
        /// The table, quoted.
        table: String,
        /// The column, quoted.
        column: String,
        /// The type that it has in the source.
        type_: String,
    },
    /// Rows cannot be found by their key.
    #[error(
        "{table} of the target database has no unique index by which its rows are found; run CREATE UNIQUE INDEX ON {table} ({columns});"
    )]
    NoUniqueIndex {
        /// The table, quoted.
        table: String,
        /// The columns of the key.
        columns: String,
    },
    /// The target database refuses a change.
    #[error("the target database refuses a change of {table}: {cause}")]
    Refused {
        /// The table, quoted.
        table: String,
        /// What it says, and what to do.
        cause: String,
    },
    /// The format of the log does not hold every value.
    #[error(
        "{topic} holds no meander.v1.ChangeRecord: only the format Protobuf carries every value exactly, as a database needs it; replay a \
         pipeline of that format"
    )]
    NotExact {
        /// The topic.
        topic: String,
    },
    /// The output was closed.
    #[error("cannot write to the output: {0}; it was closed by whoever reads it")]
    Output(#[source] std::io::Error),
}

impl From<SinkError> for TargetError {
    fn from(error: SinkError) -> Self {
        match error {
            SinkError::Fenced(_) => Self::TakenOver,
            error => Self::Sink(error),
        }
    }
}

/// The fields of a target have the names of those of a sink.
fn said_of_target(error: &SinkError) -> String {
    error
        .to_string()
        .replace("sinks.", "target.")
        .replace("this pipeline", "this replay")
}

impl TargetError {
    /// Whether the same target would fail in the same way again.
    #[must_use]
    pub fn is_permanent(&self) -> bool {
        match self {
            Self::InvalidEndpoint { .. }
            | Self::InvalidUrl { .. }
            | Self::EndpointRefused { .. }
            | Self::TooManyDeadLetters { .. }
            | Self::ReceiverRefused { .. }
            | Self::ReceiverConfused { .. }
            | Self::Undecodable { .. }
            | Self::ValuesOmitted { .. }
            | Self::CheckpointUnreadable { .. }
            | Self::GroupForbidden { .. }
            | Self::TopicsAreLive { .. }
            | Self::StreamsAreLive { .. }
            | Self::StreamExists { .. }
            | Self::NoPlace { .. }
            | Self::NoTable { .. }
            | Self::TableNotWritable { .. }
            | Self::RowsHidden { .. }
            | Self::WouldBeCaptured { .. }
            | Self::NoColumn { .. }
            | Self::NoUniqueIndex { .. }
            | Self::Refused { .. }
            | Self::NotExact { .. } => true,
            Self::Sink(error) => matches!(
                error,
                SinkError::Topic { .. }
                    | SinkError::RecordTooLarge { .. }
                    | SinkError::RedisEvicts { .. }
                    | SinkError::RedisCluster(_)
                    | SinkError::ForeignWriter { .. }
                    | SinkError::RedisStreamLost { .. }
            ),
            Self::ReceiverUnreachable { .. }
            | Self::ReceiverSilent { .. }
            | Self::SubscriberGone
            | Self::NoBearerToken { .. }
            | Self::NoAuthorities(_)
            | Self::Database(_)
            | Self::Silent { .. }
            | Self::Disturbed(_)
            | Self::TakenOver
            | Self::PlaceNotKept { .. }
            | Self::NotAdmitted(_)
            | Self::Output(_) => false,
        }
    }

    /// The reason, in PascalCase, as it stands in conditions and events.
    #[must_use]
    pub fn reason(&self) -> &'static str {
        match self {
            Self::InvalidEndpoint { .. } => "InvalidEndpoint",
            Self::ReceiverUnreachable { .. } => "ReceiverUnreachable",
            Self::ReceiverSilent { .. } => "ReceiverSilent",
            Self::ReceiverRefused { .. } => "ReceiverRefused",
            Self::ReceiverConfused { .. } => "ReceiverConfused",
            Self::SubscriberGone => "SubscriberGone",
            Self::InvalidUrl { .. } => "InvalidEndpoint",
            Self::NoBearerToken { .. } => "NoToken",
            Self::NoAuthorities(_) => "CertificateUnreadable",
            Self::EndpointRefused { .. } => "EndpointRefused",
            Self::TooManyDeadLetters { .. } => "TooManyDeadLetters",
            Self::Undecodable { .. } => "UndecodableRecord",
            Self::ValuesOmitted { .. } => "ValuesOmitted",
            Self::Database(error) => error.reason(),
            Self::Silent { .. } => "TargetSilent",
            Self::Disturbed(_) => "TargetUnavailable",
            Self::TakenOver => "TakenOver",
            Self::PlaceNotKept { .. } => "PlaceNotKept",
            Self::GroupForbidden { .. } => "KafkaNotAuthorized",
            Self::NotAdmitted(error) => error.reason(),
            Self::Sink(error) => error.reason(),
            Self::TopicsAreLive { .. } => "TopicPrefixTaken",
            Self::StreamsAreLive { .. } => "StreamPrefixTaken",
            Self::StreamExists { .. } => "StreamExists",
            Self::CheckpointUnreadable { .. } => "CheckpointUnreadable",
            Self::NoPlace { .. } => "NoPlace",
            Self::NoTable { .. } => "NoTable",
            Self::TableNotWritable { .. } => "TableNotWritable",
            Self::RowsHidden { .. } => "RowsHidden",
            Self::WouldBeCaptured { .. } => "WouldBeCaptured",
            Self::NoColumn { .. } => "NoColumn",
            Self::NoUniqueIndex { .. } => "NoUniqueIndex",
            Self::Refused { .. } => "ChangeRefused",
            Self::NotExact { .. } => "FormatNotExact",
            Self::Output(_) => "OutputClosed",
        }
    }

    /// Whether it may pass, so that it is worth to go on from where the target is.
    #[must_use]
    pub fn is_passing(&self) -> bool {
        matches!(
            self,
            Self::Disturbed(_)
                | Self::PlaceNotKept { .. }
                | Self::Database(SourceError::Unreachable { .. } | SourceError::NoFreeConnection(_))
                | Self::Sink(
                    SinkError::Redis { .. }
                        | SinkError::KafkaUnreachable { .. }
                        | SinkError::KafkaTransaction(_)
                        | SinkError::Checkpoint(TailError::Unreadable { .. })
                )
        )
    }
}

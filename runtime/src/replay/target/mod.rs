//! Where a replay goes. A target is one file here, one variant of [`TargetError`] for each way it fails, and one line in the
//! `match` of [`super::run`].

pub mod grpc_call;
pub mod grpc_serve;
pub mod log;

use std::{
    future::Future,
    sync::{Arc, Mutex, PoisonError},
    time::Duration,
};

use meander_proto::v1::ReplayEvent;
use tokio::{
    sync::{mpsc, watch},
    time::Instant,
};

use super::record::{Coordinate, Record, ResumeToken};

/// Takes batches until there are no more.
pub trait Target: Send + 'static {
    /// Opens the destination, says so by [`Tally::open`], takes every batch in order, and credits each to the tally once the
    /// destination has it. Returns when the batches have ended and all are credited, or when it cannot go on.
    fn run(self, batches: mpsc::Receiver<Batch>, tally: Tally) -> impl Future<Output = Result<(), TargetError>> + Send;
}

/// Records in commit order that are handed over together; at least one.
#[derive(Debug)]
pub struct Batch {
    /// The records.
    pub records: Vec<Record>,
    /// What the tally needs once they are delivered.
    pub mark: Mark,
}

/// What is told about a delivered batch.
#[derive(Clone, Copy, Debug)]
pub struct Mark {
    /// How many records.
    pub records: u64,
    /// Event time of the first.
    pub first_time: i64,
    /// Event time of the last: not before that of any record up to it.
    pub last_time: i64,
    /// Names the place after the last.
    pub resume: ResumeToken,
    /// When they were handed to the target.
    pub handed: Instant,
}

impl Batch {
    /// As a message of `meander.v1`.
    #[must_use]
    pub fn into_event(self) -> ReplayEvent {
        ReplayEvent {
            resume_token: self.mark.resume.to_string(),
            records: self.records.into_iter().map(Into::into).collect(),
        }
    }
}

/// What is delivered so far, shared between a target and whoever reports.
#[derive(Clone)]
pub struct Tally {
    counts: Arc<Mutex<Counts>>,
    open: watch::Sender<bool>,
}

/// What is delivered so far.
#[derive(Clone, Copy, Debug, Default)]
pub struct Counts {
    /// Records.
    pub delivered: u64,
    /// The first delivered record: its event time and when it was handed over.
    pub first: Option<(i64, Instant)>,
    /// The last delivered record: its event time and when it was handed over.
    pub last: Option<(i64, Instant)>,
    /// The last record.
    pub coordinate: Option<Coordinate>,
}

impl Default for Tally {
    fn default() -> Self {
        Self {
            counts: Arc::default(),
            open: watch::channel(false).0,
        }
    }
}

impl Tally {
    /// The destination can be delivered to. The clock of the replay does not start before this.
    pub fn open(&self) {
        self.open.send_replace(true);
    }

    /// Follows whether the destination was opened.
    #[must_use]
    pub fn opened(&self) -> watch::Receiver<bool> {
        self.open.subscribe()
    }

    /// Counts a batch as delivered.
    pub fn credit(&self, mark: &Mark) {
        let mut counts = self.lock();
        counts.delivered += mark.records;
        counts.first.get_or_insert((mark.first_time, mark.handed));
        counts.last = Some((mark.last_time, mark.handed));
        counts.coordinate = Some(mark.resume.coordinate);
    }

    /// What is delivered so far.
    #[must_use]
    pub fn counts(&self) -> Counts {
        *self.lock()
    }

    fn lock(&self) -> std::sync::MutexGuard<'_, Counts> {
        self.counts.lock().unwrap_or_else(PoisonError::into_inner)
    }
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
    /// A subscriber went away, or takes nothing.
    #[error("the subscriber went away, or took nothing for too long")]
    SubscriberGone,
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
    /// The output was closed.
    #[error("cannot write to the output: {0}; it was closed by whoever reads it")]
    Output(#[source] std::io::Error),
}

impl TargetError {
    /// Whether the same target would fail in the same way again.
    #[must_use]
    pub fn is_permanent(&self) -> bool {
        match self {
            Self::InvalidEndpoint { .. }
            | Self::ReceiverRefused { .. }
            | Self::ReceiverConfused { .. }
            | Self::Undecodable { .. } => true,
            Self::ReceiverUnreachable { .. } | Self::ReceiverSilent { .. } | Self::SubscriberGone | Self::Output(_) => {
                false
            }
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
            Self::Undecodable { .. } => "UndecodableRecord",
            Self::Output(_) => "OutputClosed",
        }
    }
}

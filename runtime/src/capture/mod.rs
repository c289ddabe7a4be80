//! `meander-runtime capture`: from the slot to the sinks.
//!
//! A capture is a sequence of sessions. A session owns the slot from its start to its end; whatever goes wrong in it, the next
//! one starts from the checkpoint, as it does after a crash. So there is one way back, and it is used all the time.

mod cleanup;
mod dropped;
mod heartbeat;
mod messages;
mod monitor;
mod observe;
mod open;
mod session;
mod snapshot;
mod status;
mod stream;
mod versions;

use std::time::Duration;

use backon::{BackoffBuilder as _, ExponentialBuilder};
use meander_config::CaptureConfig;
use meander_proto::v1::CaptureProgress;
use prometheus::Registry;
use tokio::{sync::watch, time::Instant};
use tokio_util::sync::CancellationToken;

pub use cleanup::cleanup;

use crate::{
    admin::Admin,
    encode::{EncodeError, Keyless},
    progress::{self, ConditionType, ProgressReporter},
    sink::{SinkError, redis::Rival, topics::Remarks},
    source::postgres::{assemble::AssembleError, pgoutput::DecodeError, preflight::SourceError, start::SourceGap},
};

/// Why a session ended.
#[derive(Debug, thiserror::Error)]
pub enum CaptureError {
    /// The source is not fit for capture, or went away.
    #[error(transparent)]
    Source(#[from] SourceError),
    /// Changes are lost.
    #[error(transparent)]
    Gap(#[from] SourceGap),
    /// A sink does not take what it is given.
    #[error(transparent)]
    Sink(#[from] SinkError),
    /// The source sent what makes no sense.
    #[error(
        "PostgreSQL sent a message that cannot be understood: {0}; nothing after it is published; please report it"
    )]
    Decode(#[from] DecodeError),
    /// The source sent messages that make no sense together.
    #[error(
        "PostgreSQL sent messages that do not fit together: {0}; nothing after them is published; please report it"
    )]
    Assemble(#[from] AssembleError),
    /// A change that has no form in the pipeline's format.
    #[error("a change cannot be encoded: {0}; nothing after it is published")]
    Encode(#[from] EncodeError),
    /// The address of the administrative server cannot be listened on.
    #[error("cannot listen on adminAddress: {0}")]
    Admin(#[source] std::io::Error),
    /// A task of this process ended in a way that it never should.
    #[error("a task failed: {0}")]
    Task(#[from] tokio::task::JoinError),
}

impl CaptureError {
    /// The condition that this failure makes false (or, for a gap, true), and its reason.
    fn condition(&self) -> (ConditionType, &'static str) {
        match self {
            Self::Source(error) => (ConditionType::SourceReady, error.reason()),
            Self::Gap(gap) => (ConditionType::SourceGap, gap.reason()),
            Self::Sink(error) => (ConditionType::SinksReady, error.reason()),
            Self::Decode(_) | Self::Assemble(_) | Self::Encode(_) => (ConditionType::SourceReady, "UnexpectedMessage"),
            Self::Admin(_) | Self::Task(_) => (ConditionType::Progressing, "InternalError"),
        }
    }
}

/// Pause between two sessions: short at first, because most causes are short.
const SHORTEST_PAUSE: Duration = Duration::from_millis(500);
const LONGEST_PAUSE: Duration = Duration::from_secs(15);
/// A session that lived this long was a success, after which the pauses start short again.
const HEALTHY_SESSION: Duration = Duration::from_secs(30);
/// Why a standby does not go on: there is nothing wrong with it.
const STANDBY: &str = "Standby";
/// A runtime that waits for the slot asks often, because it is the one that takes over.
const STANDBY_PAUSE: Duration = Duration::from_secs(1);

/// What every session shares.
#[derive(Clone)]
struct Context {
    config: CaptureConfig,
    reporter: ProgressReporter<CaptureProgress>,
    metrics: observe::Metrics,
    ready: watch::Sender<bool>,
    /// What a person has to know of entries in Redis that stand for nothing.
    phantoms: watch::Sender<Option<String>>,
    /// What a person has to know of records that lack values for their size.
    oversized: watch::Sender<Option<String>>,
    /// What a person has to know of the snapshot.
    snapshot_problems: snapshot::Problems,
    /// What a person has to know of rows that are published without their key.
    keyless: Keyless,
    /// What a person has to know of topics.
    remarks: Remarks,
    heartbeats: heartbeat::Heartbeats,
    rival: Rival,
    /// The first chunk whose changes were left out, since nothing tells what hypertable it was of.
    ownerless: watch::Sender<Option<String>>,
}

impl Context {
    fn set(&self, condition: ConditionType, status: bool, reason: &str, message: impl Into<String>) {
        let message = message.into();
        self.reporter
            .update(|state| state.conditions.set(condition, status, reason, message));
    }

    fn sinks_are_ready(&self) {
        self.set(
            ConditionType::SinksReady,
            true,
            "Ready",
            "Every sink takes what it is given.",
        );
    }
}

impl Context {
    /// Another process of the pipeline reads the slot, and this one is ready to do so after it.
    fn stands_by(&self) {
        let slot = &self.config.source.slot_name;
        tracing::info!(slot, "another process reads the slot: standing by");
        self.ready.send_replace(true);
        self.reporter.update(|state| {
            // Who captures says how source and sinks are.
            state.conditions.unset(ConditionType::SourceReady);
            state.conditions.unset(ConditionType::SinksReady);
        });
        let message = format!(
            "Replication slot {slot:?} is read by another process; this one stands by, and takes over when the slot is free."
        );
        self.set(ConditionType::Progressing, false, STANDBY, message);
    }
}

/// Captures until `shutdown`. Whatever is wrong with the source or a sink is reported and tried again; it is no reason to end.
///
/// # Errors
/// When the process cannot do its work at all.
pub async fn run(config: CaptureConfig, shutdown: CancellationToken) -> Result<(), CaptureError> {
    let (reporter, _directives, link) = progress::start::<CaptureProgress>(&config.pipeline, config.operator.clone());
    let registry = Registry::new();
    let metrics = observe::Metrics::register(&registry, config.redis.is_some());
    let (ready, is_ready) = watch::channel(false);
    let admin = Admin {
        registry,
        ready: is_ready,
    };
    let server = admin
        .serve(config.admin_address, shutdown.clone())
        .await
        .map_err(CaptureError::Admin)?;
    let slot_name = config.source.slot_name.clone();
    reporter.update(|state| state.progress.slot_name = slot_name);
    let context = Context {
        config,
        reporter,
        metrics,
        ready,
        phantoms: watch::Sender::new(None),
        oversized: watch::Sender::new(None),
        snapshot_problems: snapshot::Problems::new(vec![]),
        keyless: Keyless::default(),
        remarks: Remarks::default(),
        heartbeats: heartbeat::Heartbeats::default(),
        rival: Rival::default(),
        ownerless: watch::Sender::new(None),
    };

    let new_pauses = || {
        ExponentialBuilder::default()
            .with_min_delay(SHORTEST_PAUSE)
            .with_max_delay(LONGEST_PAUSE)
            .with_jitter()
            .without_max_times()
            .build()
    };
    let mut pauses = new_pauses();
    while !shutdown.is_cancelled() {
        let started = Instant::now();
        let ended = Box::pin(session::run(&context, &shutdown)).await;
        context.ready.send_replace(false);
        let Err(error) = ended else { break };
        if shutdown.is_cancelled() {
            tracing::warn!(%error, "the session ended with an error during shutdown");
            break;
        }
        context.report(&error);
        let pause = if matches!(error, CaptureError::Source(SourceError::SlotActive { .. })) {
            STANDBY_PAUSE
        } else {
            if started.elapsed() >= HEALTHY_SESSION {
                pauses = new_pauses();
            }
            pauses.next().unwrap_or(LONGEST_PAUSE)
        };
        tokio::select! {
            () = tokio::time::sleep(pause) => {}
            () = shutdown.cancelled() => {}
        }
    }
    context.set(
        ConditionType::Progressing,
        false,
        "Stopped",
        "The runtime was told to stop.",
    );
    link.finish().await;
    Ok(server.await?)
}

impl Context {
    fn report(&self, error: &CaptureError) {
        let (condition, reason) = error.condition();
        let is_gap = condition == ConditionType::SourceGap;
        self.metrics.failures.with_label_values(&[reason]).inc();
        tracing::warn!(%error, reason, "the session ended");
        self.set(condition, is_gap, reason, error.to_string());
        let progress = if is_gap {
            "Capture stands still until somebody decides."
        } else {
            "Capture does not go on; it is tried again by itself."
        };
        self.set(ConditionType::Progressing, false, reason, progress);
        if condition != ConditionType::SinksReady {
            // What was last said of the sinks is true no longer than somebody looks at them.
            self.reporter
                .update(|state| state.conditions.unset(ConditionType::SinksReady));
        }
    }
}

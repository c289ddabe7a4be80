//! The link to the operator: progress goes there, directives come back.
//!
//! The data path writes what it knows into a [`ProgressReporter`], which never waits, and reads the newest [`Directive`] from a
//! watch channel. A task of its own carries both over one `ProgressTracker.ReportProgress` stream, opens it again whenever it
//! breaks, and sends the newest state only: what was overtaken while the operator was away is never sent. Without an operator
//! nothing is sent and no directive ever comes; everything else is the same.

use std::{
    io,
    path::Path,
    time::{Duration, SystemTime},
};

use backon::{BackoffBuilder as _, ExponentialBuilder};
use meander_config::{OperatorLink, ResourceIdentity};
use meander_proto::{
    NO_LEADER,
    v1::{
        CaptureProgress, Condition, Directive, ProgressUpdate, ReplayProgress, ResourceReference,
        progress_tracker_client::ProgressTrackerClient, progress_update,
    },
};
use tokio::{
    sync::{mpsc, watch},
    task::JoinHandle,
    time::{Instant, sleep, sleep_until, timeout},
};
use tokio_stream::wrappers::ReceiverStream;
use tokio_util::sync::CancellationToken;
use tonic::{
    Code, Request, Status, Streaming,
    metadata::{Ascii, MetadataValue, errors::InvalidMetadataValue},
    transport::{Certificate, ClientTlsConfig, Endpoint},
};

use crate::tls::{TlsFileError, authorities};

/// The shortest time between two updates that differ only in numbers.
const SHORTEST_INTERVAL: Duration = Duration::from_secs(1);
/// The longest time without an update, so that the operator can tell a quiet runtime from a dead one.
const HEARTBEAT: Duration = Duration::from_secs(10);
/// How long the end of the process waits for the operator to take the last state.
const FLUSH_DEADLINE: Duration = Duration::from_secs(5);
const CONNECT_TIMEOUT: Duration = Duration::from_secs(5);
/// How long the operator may take to accept a stream.
const CALL_TIMEOUT: Duration = Duration::from_secs(10);
/// How long a dead peer goes unnoticed on a quiet connection: the interval and the timeout together.
const KEEPALIVE_INTERVAL: Duration = Duration::from_secs(10);
const KEEPALIVE_TIMEOUT: Duration = Duration::from_secs(5);
const LONGEST_BACKOFF: Duration = Duration::from_secs(10);
/// By so much shorter is the wait after an operator has answered that it does not lead, which costs it nothing: the next call may come to the one that does.
const SHORTER_WITHOUT_LEADER: u32 = 10;
/// A stream that lived this long was a success, after which the back-off starts anew.
const HEALTHY_STREAM: Duration = Duration::from_secs(30);

/// What a runtime can judge about its resource.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum ConditionType {
    /// Capture: the source is connected and fit for capture.
    SourceReady,
    /// Capture: every sink takes what it is given.
    SinksReady,
    /// The work is going on.
    Progressing,
    /// Capture: the source lost changes that were not captured.
    SourceGap,
    /// Capture: Redis lost entries that Kafka no longer holds.
    RedisGap,
    /// Capture: changes flow, and something needs a look.
    Degraded,
    /// Replay: everything in the range is delivered.
    Complete,
    /// Replay: it cannot go on.
    Failed,
    /// Replay: Kafka no longer holds the start of the range.
    TruncatedRange,
}

impl ConditionType {
    /// The name of the condition in the resource's status.
    #[must_use]
    pub const fn name(self) -> &'static str {
        match self {
            Self::SourceReady => "SourceReady",
            Self::SinksReady => "SinksReady",
            Self::Progressing => "Progressing",
            Self::SourceGap => "SourceGap",
            Self::RedisGap => "RedisGap",
            Self::Degraded => "Degraded",
            Self::Complete => "Complete",
            Self::Failed => "Failed",
            Self::TruncatedRange => "TruncatedRange",
        }
    }
}

/// At most one condition of each type.
#[derive(Clone, Debug, Default, PartialEq)]
pub struct Conditions(Vec<Condition>);

impl Conditions {
    /// Sets a condition; `reason` is one PascalCase word, `message` one sentence that says the cause and what to do.
    pub fn set(&mut self, kind: ConditionType, status: bool, reason: &str, message: impl Into<String>) {
        let condition = Condition {
            r#type: kind.name().to_owned(),
            status,
            reason: reason.to_owned(),
            message: message.into(),
        };
        match self.0.iter_mut().find(|known| known.r#type == condition.r#type) {
            Some(known) => *known = condition,
            None => self.0.push(condition),
        }
    }

    /// Takes a condition back: nobody looks at it any more.
    pub fn unset(&mut self, kind: ConditionType) {
        self.0.retain(|known| known.r#type != kind.name());
    }

    /// The condition of a type, once it was set.
    #[must_use]
    pub fn get(&self, kind: ConditionType) -> Option<&Condition> {
        self.0.iter().find(|known| known.r#type == kind.name())
    }
}

/// The numbers that a kind of resource reports.
pub trait Progress: Clone + Default + Send + Sync + 'static {
    /// Kind of the resource.
    const KIND: &'static str;

    /// The phase, if there is one: a change of it is reported at once.
    fn phase(&self) -> Option<i32>;

    /// As it is put into a [`ProgressUpdate`].
    fn into_update(self) -> progress_update::Progress;
}

impl Progress for CaptureProgress {
    const KIND: &'static str = "CdcPipeline";

    fn phase(&self) -> Option<i32> {
        None
    }

    fn into_update(self) -> progress_update::Progress {
        progress_update::Progress::Capture(self)
    }
}

impl Progress for ReplayProgress {
    const KIND: &'static str = "ReplayJob";

    fn phase(&self) -> Option<i32> {
        Some(self.phase)
    }

    fn into_update(self) -> progress_update::Progress {
        progress_update::Progress::Replay(self)
    }
}

/// The full state of a resource as the runtime knows it.
#[derive(Clone, Debug, Default)]
pub struct State<P> {
    /// What the runtime judges.
    pub conditions: Conditions,
    /// What it counts.
    pub progress: P,
}

/// Where the data path writes what it knows. Clones write into the same state.
#[derive(Clone)]
pub struct ProgressReporter<P>(watch::Sender<State<P>>);

impl<P: Progress> ProgressReporter<P> {
    /// Changes the state. Never waits.
    pub fn update(&self, change: impl FnOnce(&mut State<P>)) {
        self.0.send_modify(change);
    }

    /// The state as it is now.
    #[must_use]
    pub fn state(&self) -> State<P> {
        self.0.borrow().clone()
    }

    /// Follows the state.
    #[must_use]
    pub fn watch(&self) -> watch::Receiver<State<P>> {
        self.0.subscribe()
    }
}

/// The task that carries progress and directives. It ends when this is dropped.
pub struct ProgressLink {
    ending: CancellationToken,
    task: Option<JoinHandle<()>>,
}

impl ProgressLink {
    /// Sends the last state, if the operator can be reached within a few seconds, and ends the link.
    pub async fn finish(mut self) {
        self.ending.cancel();
        if let Some(mut task) = self.task.take()
            && timeout(FLUSH_DEADLINE, &mut task).await.is_err()
        {
            tracing::warn!("the operator did not take the last state in time");
            task.abort();
        }
    }
}

impl Drop for ProgressLink {
    fn drop(&mut self) {
        if let Some(task) = &self.task {
            task.abort();
        }
    }
}

/// Starts the link of a resource to its operator.
///
/// The link outlives the signal that ends the process, so that it can carry the last state: end it by
/// [`ProgressLink::finish`].
#[must_use]
pub fn start<P: Progress>(
    resource: &ResourceIdentity,
    operator: Option<OperatorLink>,
) -> (ProgressReporter<P>, watch::Receiver<Option<Directive>>, ProgressLink) {
    let (state, states) = watch::channel(State::default());
    let (directive, directives) = watch::channel(None);
    let ending = CancellationToken::new();
    let task = operator.map(|operator| {
        let link = Link {
            resource: ResourceReference {
                kind: P::KIND.to_owned(),
                namespace: resource.namespace.clone(),
                name: resource.name.clone(),
                uid: resource.uid.clone(),
            },
            operator,
            states,
            directive,
            ending: ending.clone(),
        };
        tokio::spawn(link.run())
    });
    (ProgressReporter(state), directives, ProgressLink { ending, task })
}

/// One attempt to keep a stream open came to its end.
#[derive(Debug, thiserror::Error)]
enum LinkError {
    #[error("cannot read the token in {path}: {source}")]
    Token { path: String, source: io::Error },
    #[error("cannot tell the operator from others: {0}")]
    Authorities(#[from] TlsFileError),
    #[error("the token is not fit for a header: {0}")]
    TokenText(#[from] InvalidMetadataValue),
    #[error("cannot connect to the operator: {0:?}")]
    Connect(#[from] tonic::transport::Error),
    #[error("the operator ended the stream: {0}")]
    Stream(#[from] Box<Status>),
    #[error("the operator did not answer within {CALL_TIMEOUT:?}")]
    NoAnswer,
    #[error("the operator closed the stream")]
    Closed,
}

impl LinkError {
    /// How long to wait after this error, where it is `delay` after others.
    fn delay(&self, delay: Duration) -> Duration {
        match self {
            Self::Stream(status) if status.code() == Code::Unavailable && status.message() == NO_LEADER => {
                delay / SHORTER_WITHOUT_LEADER
            }
            _ => delay,
        }
    }
}

impl From<Status> for LinkError {
    fn from(status: Status) -> Self {
        Self::Stream(Box::new(status))
    }
}

struct Link<P> {
    resource: ResourceReference,
    operator: OperatorLink,
    states: watch::Receiver<State<P>>,
    directive: watch::Sender<Option<Directive>>,
    ending: CancellationToken,
}

impl<P: Progress> Link<P> {
    /// Keeps a stream open until the end.
    async fn run(mut self) {
        let backoff = ExponentialBuilder::default()
            .with_max_delay(LONGEST_BACKOFF)
            .without_max_times()
            .with_jitter();
        let mut delays = backoff.build();
        let mut told = String::new();
        loop {
            let started = Instant::now();
            let Err(error) = self.session().await else {
                return;
            };
            if started.elapsed() > HEALTHY_STREAM {
                delays = backoff.build();
                told.clear();
            }
            let message = error.to_string();
            if message != told {
                tracing::warn!(error = message, "no link to the operator; trying again");
                told = message;
            }
            // While the process ends, there is only one more try, and no time to wait before it.
            let delay = delays.next().unwrap_or(LONGEST_BACKOFF);
            tokio::select! {
                () = sleep(error.delay(delay)) => {}
                () = self.ending.cancelled() => {
                    if let Err(error) = self.session().await {
                        tracing::warn!(%error, "the operator did not take the last state");
                    }
                    return;
                }
            }
        }
    }

    /// Opens a stream and keeps to it until the end of the process (`Ok`) or of the stream.
    async fn session(&mut self) -> Result<(), LinkError> {
        // One update may wait for the connection; newer states wait in the watch channel, where they overtake each other.
        let (updates, sent) = mpsc::channel(1);
        // The first update goes in before the call is made: an operator may answer only once it knows who reports.
        let mut last = self.states.borrow_and_update().clone();
        let _ = updates.try_send(self.update(&last));
        let mut last_sent = Instant::now();
        let mut directives = timeout(CALL_TIMEOUT, self.call(sent))
            .await
            .map_err(|_| LinkError::NoAnswer)??;

        let mut dirty = false;
        loop {
            let urgent = {
                let state = self.states.borrow();
                state.conditions != last.conditions || state.progress.phase() != last.progress.phase()
            };
            let next = match (urgent, dirty) {
                (true, _) => last_sent,
                (false, true) => last_sent + SHORTEST_INTERVAL,
                (false, false) => last_sent + HEARTBEAT,
            };
            tokio::select! {
                biased;
                () = self.ending.cancelled() => break,
                directive = directives.message() => {
                    let directive = directive?.ok_or(LinkError::Closed)?;
                    tracing::info!(?directive, "the operator directs");
                    self.directive.send_if_modified(|current| take(current, directive));
                }
                // Fails when nobody can change the state any more; the heartbeat goes on.
                Ok(()) = self.states.changed() => dirty = true,
                permit = async { sleep_until(next).await; updates.reserve().await } => {
                    let permit = permit.map_err(|_| LinkError::Closed)?;
                    last = self.states.borrow_and_update().clone();
                    permit.send(self.update(&last));
                    last_sent = Instant::now();
                    dirty = false;
                }
            }
        }

        // The last state, then the end of our half of the stream; the operator ends the other half once it has read it all.
        let last = self.states.borrow().clone();
        if updates.send(self.update(&last)).await.is_err() {
            return Err(LinkError::Closed);
        }
        drop(updates);
        while directives.message().await?.is_some() {}
        Ok(())
    }

    async fn call(&self, updates: mpsc::Receiver<ProgressUpdate>) -> Result<Streaming<Directive>, LinkError> {
        let mut endpoint = Endpoint::from_shared(self.operator.endpoint.clone())?
            .connect_timeout(CONNECT_TIMEOUT)
            .http2_keep_alive_interval(KEEPALIVE_INTERVAL)
            .keep_alive_timeout(KEEPALIVE_TIMEOUT);
        if endpoint.uri().scheme_str() == Some("https") {
            // Read each time, as the token is: the operator's certificate and its authorities change while this runs.
            let trusted = Certificate::from_pem(authorities(self.operator.ca_file.as_deref())?);
            endpoint = endpoint.tls_config(ClientTlsConfig::new().ca_certificate(trusted))?;
        }
        let channel = endpoint.connect().await?;
        let mut request = Request::new(ReceiverStream::new(updates));
        request
            .metadata_mut()
            .insert("authorization", bearer(&self.operator.token_file).await?);
        Ok(ProgressTrackerClient::new(channel)
            .report_progress(request)
            .await?
            .into_inner())
    }

    fn update(&self, state: &State<P>) -> ProgressUpdate {
        ProgressUpdate {
            resource: Some(self.resource.clone()),
            time_micros: now_micros(),
            conditions: state.conditions.0.clone(),
            progress: Some(state.progress.clone().into_update()),
        }
    }
}

/// Takes a directive, unless it stands for an older spec than the one before: operators that take turns need not know the same. What is
/// cancelled is so for good.
fn take(current: &mut Option<Directive>, directive: Directive) -> bool {
    let news = (current.as_ref()).is_none_or(|current| directive.cancel || current.generation <= directive.generation);
    if news {
        *current = Some(directive);
    }
    news
}

/// The value of the `authorization` header. The file is read each time, since the kubelet replaces the token before it expires.
async fn bearer(path: &Path) -> Result<MetadataValue<Ascii>, LinkError> {
    let token = tokio::fs::read_to_string(path)
        .await
        .map_err(|source| LinkError::Token {
            path: path.display().to_string(),
            source,
        })?;
    Ok(format!("Bearer {}", token.trim()).parse()?)
}

fn now_micros() -> i64 {
    let since_epoch = SystemTime::now()
        .duration_since(SystemTime::UNIX_EPOCH)
        .unwrap_or_default();
    i64::try_from(since_epoch.as_micros()).unwrap_or(i64::MAX)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn who_does_not_lead_is_asked_again_soon_and_who_cannot_answer_is_not() {
        let (long, soon) = (2 * LONGEST_BACKOFF, Duration::from_secs(2));
        let no_leader = LinkError::from(Status::unavailable(NO_LEADER));
        assert_eq!(no_leader.delay(long), soon);
        // Each further call would ask an API server that is too busy already.
        let no_api_server = LinkError::from(Status::unavailable("the API server did not answer; try again"));
        assert_eq!(no_api_server.delay(long), long);
        assert_eq!(LinkError::NoAnswer.delay(long), long);
    }

    #[test]
    fn an_older_spec_asks_for_nothing_and_a_cancelled_replay_is_cancelled() {
        let directive = |generation: i64, cancel: bool| Directive {
            generation,
            cancel,
            ..Directive::default()
        };
        let mut current = None;
        assert!(take(&mut current, directive(2, false)));
        assert!(!take(&mut current, directive(1, false)));
        assert_eq!(current, Some(directive(2, false)));
        assert!(take(&mut current, directive(2, false)), "asked again");
        // One that is deleted is cancelled by whoever knows no spec of it.
        assert!(take(&mut current, directive(0, true)));
    }
}

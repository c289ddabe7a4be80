//! Serves `Replayer` to subscribers: each takes the whole range at the job's speed, with a reader and a clock of its own.

use std::{
    collections::BTreeMap,
    net::SocketAddr,
    path::{Path, PathBuf},
    pin::Pin,
    sync::{
        Arc, Mutex, PoisonError,
        atomic::{AtomicBool, AtomicU64, Ordering},
    },
    task::{Context, Poll, ready},
    time::Duration,
};

use futures::Stream;
use meander_config::{KafkaLog, ResourceIdentity};
use meander_proto::{
    FILE_DESCRIPTOR_SET,
    v1::{
        ReplayEvent, ReplayProgress, ReplayRequest,
        replay_progress::Phase,
        replayer_server::{self, Replayer, ReplayerServer},
    },
};
use tokio::{
    net::TcpListener,
    sync::{Semaphore, mpsc, oneshot},
    time::timeout,
};
use tokio_stream::wrappers::TcpListenerStream;
use tokio_util::sync::CancellationToken;
use tonic::{Request, Response, Status, transport::Server};

use super::{Batch, Tally, Target, TargetError};
use crate::replay::{
    End, JobReport, Plan,
    drive::{Report, drive},
    error::ReplayError,
    meter::Meter,
    orders::Orders,
    range::{self, Range},
    reader,
    record::ResumeToken,
};

/// Subscribers at a time; each has buffers of its own.
const SUBSCRIBERS: u32 = 16;
/// How long a subscriber may leave a message untaken.
const PATIENCE: Duration = Duration::from_secs(120);
const KEEPALIVE_INTERVAL: Duration = Duration::from_secs(10);
const KEEPALIVE_TIMEOUT: Duration = Duration::from_secs(5);
/// How long the server may take to send the rest of what it has.
const PARTING: Duration = Duration::from_secs(10);

/// What subscribers take.
pub struct Offer {
    /// Where the log is.
    pub kafka: KafkaLog,
    /// Whose replay it is.
    pub job: ResourceIdentity,
    /// The range.
    pub range: Range,
    /// How each subscriber is delivered it.
    pub plan: Plan,
    /// Pause, speed and cancel, for all subscribers alike.
    pub orders: Orders,
    /// Where progress goes.
    pub report: JobReport,
}

/// Serves until a subscriber has taken the range to its end, and those who were under way by then are done too.
///
/// # Errors
/// When it cannot be served, the log cannot be read, or the process is asked to end.
pub async fn serve(
    offer: Offer,
    address: SocketAddr,
    token_file: PathBuf,
    shutdown: &CancellationToken,
) -> Result<End, ReplayError> {
    expected_token(&token_file).map_err(|source| ReplayError::NoToken {
        path: token_file.clone(),
        source,
    })?;
    let listener = TcpListener::bind(address)
        .await
        .map_err(|source| ReplayError::Listen { address, source })?;
    let mut orders = offer.orders.clone();
    let report = offer.report.clone();

    let (results, mut ended) = mpsc::channel(1);
    let slots = Arc::new(Semaphore::new(SUBSCRIBERS as usize));
    let closed = Arc::new(AtomicBool::new(false));
    let stop = CancellationToken::new();
    let _stop_on_return = stop.clone().drop_guard();
    let subscriptions = Subscriptions {
        offer: Arc::new(offer),
        slots: Arc::clone(&slots),
        closed: Arc::clone(&closed),
        lead: Arc::new(Lead {
            report: report.clone(),
            times: Mutex::default(),
        }),
        next: AtomicU64::new(0),
        results,
        shutdown: shutdown.clone(),
    };
    let admit = move |request: Request<()>| admit(request, &token_file);
    let (health, health_service) = tonic_health::server::health_reporter();
    health.set_serving::<ReplayerServer<Subscriptions>>().await;
    let reflection = tonic_reflection::server::Builder::configure()
        .register_encoded_file_descriptor_set(FILE_DESCRIPTOR_SET)
        .register_encoded_file_descriptor_set(tonic_health::pb::FILE_DESCRIPTOR_SET)
        // Only what is served here, of all that the descriptors describe.
        .with_service_name(replayer_server::SERVICE_NAME)
        .with_service_name("grpc.health.v1.Health")
        .build_v1()
        .map_err(|error| ReplayError::Server(error.into()))?;
    let server = Server::builder()
        .tcp_nodelay(true)
        .http2_keepalive_interval(Some(KEEPALIVE_INTERVAL))
        .http2_keepalive_timeout(Some(KEEPALIVE_TIMEOUT))
        .add_service(health_service)
        .add_service(reflection)
        .add_service(ReplayerServer::with_interceptor(subscriptions, admit))
        .serve_with_incoming_shutdown(TcpListenerStream::new(listener), stop.clone().cancelled_owned());
    let mut server = tokio::spawn(server);
    tracing::info!(%address, "waiting for subscribers");
    report.unattended(orders.current().paused);

    let end = loop {
        tokio::select! {
            biased;
            () = shutdown.cancelled() => break Err(ReplayError::Interrupted),
            result = &mut server => {
                let cause = match result {
                    Ok(Ok(())) => "it was stopped".into(),
                    Ok(Err(error)) => error.into(),
                    Err(error) => error.into(),
                };
                return Err(ReplayError::Server(cause));
            }
            order = orders.changed() => {
                if order.cancel {
                    break Ok(End::Cancelled);
                }
                if slots.available_permits() == SUBSCRIBERS as usize {
                    report.unattended(order.paused);
                }
            }
            // Nobody else can be the first to end the job; the others are let finish.
            Some(result) = ended.recv(), if !closed.load(Ordering::Relaxed) => {
                if let Err(error) = result {
                    break Err(error);
                }
                closed.store(true, Ordering::Relaxed);
            }
            all = slots.acquire_many(SUBSCRIBERS), if closed.load(Ordering::Relaxed) => {
                drop(all);
                break Ok(End::Complete);
            }
        }
    };
    stop.cancel();
    if timeout(PARTING, &mut server).await.is_err() {
        server.abort();
    }
    end
}

/// The token that subscribers have to show. Read for each of them, so that a rotated one holds at once.
fn expected_token(path: &Path) -> std::io::Result<String> {
    let token = std::fs::read_to_string(path)?;
    match token.trim() {
        "" => Err(std::io::Error::new(
            std::io::ErrorKind::InvalidData,
            "the file is empty",
        )),
        token => Ok(token.to_owned()),
    }
}

// The type is tonic's.
#[allow(clippy::result_large_err)]
fn admit(request: Request<()>, token_file: &Path) -> Result<Request<()>, Status> {
    let expected = expected_token(token_file).map_err(|error| {
        tracing::error!(%error, path = %token_file.display(), "cannot read the subscribers' token");
        Status::unavailable("the server cannot read its token")
    })?;
    let shown = request
        .metadata()
        .get("authorization")
        .and_then(|value| value.as_bytes().strip_prefix(b"Bearer "))
        .unwrap_or_default();
    if same(shown, expected.as_bytes()) {
        Ok(request)
    } else {
        Err(Status::unauthenticated("show the token: `authorization: Bearer …`"))
    }
}

/// Compares in a time that depends on the lengths only.
fn same(shown: &[u8], expected: &[u8]) -> bool {
    let difference = shown
        .iter()
        .zip(expected)
        .fold(0, |difference, (a, b)| std::hint::black_box(difference | (a ^ b)));
    shown.len() == expected.len() && difference == 0
}

struct Subscriptions {
    offer: Arc<Offer>,
    slots: Arc<Semaphore>,
    /// Somebody was the first to take the range to its end; nobody starts any more.
    closed: Arc<AtomicBool>,
    lead: Arc<Lead>,
    next: AtomicU64,
    /// The first subscriber to end the job, for better or worse.
    results: mpsc::Sender<Result<(), ReplayError>>,
    shutdown: CancellationToken,
}

#[tonic::async_trait]
impl Replayer for Subscriptions {
    type ReplayEventStream = Events;

    async fn replay_event(&self, request: Request<ReplayRequest>) -> Result<Response<Events>, Status> {
        if self.closed.load(Ordering::Relaxed) {
            return Err(Status::unavailable("the replay is complete; its server ends"));
        }
        let slot = Arc::clone(&self.slots).try_acquire_owned().map_err(|_| {
            Status::resource_exhausted(format!("all {SUBSCRIBERS} subscriptions are taken; try again later"))
        })?;
        let offer = Arc::clone(&self.offer);
        let token = match request.get_ref().resume_token.as_str() {
            "" => None,
            text => Some(
                text.parse::<ResumeToken>()
                    .map_err(|error| Status::invalid_argument(error.to_string()))?,
            ),
        };
        let range = match token {
            None => offer.range.clone(),
            Some(token) => {
                let offer = Arc::clone(&offer);
                tokio::task::spawn_blocking(move || range::resume(&offer.range, &offer.kafka, token))
                    .await
                    .map_err(|error| Status::internal(error.to_string()))?
                    .map_err(|error| Status::unavailable(error.to_string()))?
            }
        };

        let (sending, sent) = mpsc::channel(1);
        let (taken, until_taken) = oneshot::channel();
        let subscriber = Subscriber {
            sending: sending.clone(),
            taken: until_taken,
        };
        let id = self.next.fetch_add(1, Ordering::Relaxed);
        let report = SubscriberReport {
            id,
            lead: Arc::clone(&self.lead),
            paused: offer.orders.clone(),
        };
        let results = self.results.clone();
        let shutdown = self.shutdown.clone();
        tokio::spawn(async move {
            let meter = Meter::new(&range, Tally::default(), &offer.plan);
            let after = token.map(|token| token.coordinate);
            let reads = reader::start(&offer.kafka, &offer.job, range, after, offer.plan.filter.clone());
            tracing::info!(subscriber = id, resumed = token.is_some(), "a subscriber came");
            let orders = offer.orders.clone();
            let end = drive(reads, subscriber, orders, meter, &offer.plan, &report, &shutdown).await;
            let farewell = match end {
                Ok(End::Complete) => {
                    tracing::info!(subscriber = id, "a subscriber took the range to its end");
                    let _ = results.try_send(Ok(()));
                    None
                }
                Ok(End::Cancelled) => Some(Status::cancelled("the replay was cancelled")),
                Err(ReplayError::Target(error)) => {
                    tracing::info!(subscriber = id, %error, "a subscriber is gone");
                    None
                }
                Err(error) => {
                    let status = Status::unavailable(format!("{error}; resume with your last token"));
                    let _ = results.try_send(Err(error));
                    Some(status)
                }
            };
            if let Some(status) = farewell {
                let _ = timeout(PARTING, sending.send(Err(status))).await;
            }
            drop(report);
            drop(slot);
        });
        Ok(Response::new(Events {
            sent,
            taken: Some(taken),
        }))
    }
}

/// `Ok(None)` is the end of the range: a channel that closes without it is a replay that broke off.
type Sent = Result<Option<ReplayEvent>, Status>;

/// One subscriber, as a target.
struct Subscriber {
    sending: mpsc::Sender<Sent>,
    /// Told when the end of the range was taken; dropped when the subscriber left before.
    taken: oneshot::Receiver<()>,
}

impl Target for Subscriber {
    async fn run(self, mut batches: mpsc::Receiver<Batch>, tally: Tally) -> Result<(), TargetError> {
        tally.open();
        loop {
            let batch = tokio::select! {
                batch = batches.recv() => batch,
                () = self.sending.closed() => return Err(TargetError::SubscriberGone),
            };
            let mark = batch.as_ref().map(|batch| batch.mark);
            match timeout(PATIENCE, self.sending.send(Ok(batch.map(Batch::into_event)))).await {
                Ok(Ok(())) => {}
                Ok(Err(_)) | Err(_) => return Err(TargetError::SubscriberGone),
            }
            match mark {
                Some(mark) => tally.credit(&mark),
                None => break,
            }
        }
        match timeout(PATIENCE, self.taken).await {
            Ok(Ok(())) => Ok(()),
            Ok(Err(_)) | Err(_) => Err(TargetError::SubscriberGone),
        }
    }
}

/// The stream of one subscriber's messages.
struct Events {
    sent: mpsc::Receiver<Sent>,
    taken: Option<oneshot::Sender<()>>,
}

impl Stream for Events {
    type Item = Result<ReplayEvent, Status>;

    fn poll_next(mut self: Pin<&mut Self>, context: &mut Context<'_>) -> Poll<Option<Self::Item>> {
        if self.taken.is_none() {
            return Poll::Ready(None);
        }
        Poll::Ready(match ready!(self.sent.poll_recv(context)) {
            Some(Ok(Some(event))) => Some(Ok(event)),
            Some(Ok(None)) => {
                if let Some(taken) = self.taken.take() {
                    let _ = taken.send(());
                }
                None
            }
            Some(Err(status)) => {
                self.taken = None;
                Some(Err(status))
            }
            None => {
                self.taken = None;
                Some(Err(Status::unavailable(
                    "the replay broke off; resume with your last token",
                )))
            }
        })
    }
}

/// The subscriber who is furthest speaks for the job.
struct Lead {
    report: JobReport,
    /// The event time that each subscriber has reached.
    times: Mutex<BTreeMap<u64, i64>>,
}

struct SubscriberReport {
    id: u64,
    lead: Arc<Lead>,
    paused: Orders,
}

impl SubscriberReport {
    fn times(&self) -> std::sync::MutexGuard<'_, BTreeMap<u64, i64>> {
        self.lead.times.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

impl Report for SubscriberReport {
    fn progress(&self, mut progress: ReplayProgress) {
        let mut times = self.times();
        times.insert(self.id, progress.current_time_micros);
        if times.values().all(|time| *time <= progress.current_time_micros) {
            // Whether the job is over is said by the job.
            if progress.phase() == Phase::Succeeded {
                progress.set_phase(Phase::Running);
            }
            self.lead.report.progress(progress);
        }
    }

    fn truncated(&self, earliest: i64) {
        self.lead.report.truncated(earliest);
    }
}

impl Drop for SubscriberReport {
    fn drop(&mut self) {
        let alone = {
            let mut times = self.times();
            times.remove(&self.id);
            times.is_empty()
        };
        if alone {
            self.lead.report.unattended(self.paused.current().paused);
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn only_the_same_token_is_the_same() {
        assert!(same(b"secret", b"secret"));
        for wrong in [&b""[..], b"secre", b"secret1", b"Secret"] {
            assert!(!same(wrong, b"secret"));
        }
    }
}

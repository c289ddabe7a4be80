//! Serves `Replayer` to subscribers: each takes the whole range at the job's speed, with a reader and a clock of its own.

use std::{
    collections::{BTreeMap, VecDeque},
    future::pending,
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

use futures::{Stream, StreamExt as _};
use meander_config::{ClientCertificate, KafkaLog, ResourceIdentity};
use meander_proto::{
    FILE_DESCRIPTOR_SET,
    v1::{
        ReplayEvent, ReplayProgress, ReplayRequest,
        replay_progress::Phase,
        replayer_server::{self, Replayer, ReplayerServer},
    },
};
use rustls::{ServerConfig, crypto::ring};
use tokio::{
    net::{TcpListener, TcpStream},
    sync::{Semaphore, mpsc, oneshot},
    time::{Instant, sleep, sleep_until, timeout},
};
use tokio_rustls::{TlsAcceptor, server::TlsStream};
use tokio_stream::wrappers::TcpListenerStream;
use tokio_util::sync::CancellationToken;
use tonic::{Request, Response, Status, Streaming, transport::Server};

use super::{Batch, Mark, Tally, Target, TargetError, Trouble};
use crate::{
    replay::{
        End, JobReport, Plan,
        checkpoint::Done,
        drive::{Course, Report, drive},
        error::ReplayError,
        follow::{Following, Live},
        meter::Meter,
        orders::Orders,
        range::{self, Range, Stretch},
        reader::{self, Reading},
    },
    tls::client_chain,
};

/// Subscribers at a time, and what their buffers may take together: where the log has so many partitions that each needs more, there are fewer.
const SUBSCRIBERS: u32 = 16;
const MEMORY: usize = 320 << 20;
/// Memory for what is fetched ahead for one of them.
const PREFETCH_BYTES: usize = 2 << 20;
/// Messages that one may leave unacknowledged, whatever its credit.
const WINDOW: usize = 1024;
/// How long one may take to say what it wants, and to agree on TLS.
const GREETING: Duration = Duration::from_secs(10);
/// Connections that may be agreeing on TLS at the same time.
const HANDSHAKES: usize = 64;
/// How long a subscriber may leave a message untaken.
const PATIENCE: Duration = Duration::from_secs(120);
/// How often it is looked, at the end, whether those who broke off have come back.
const COMEBACK: Duration = Duration::from_millis(500);
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
    /// The range is the same as that of the processes before: tokens are of this one.
    pub frozen: bool,
    /// What is captured after the range, where it is followed.
    pub live: Option<Live>,
}

/// Where subscribers come to, and what both show each other.
pub struct Place {
    /// Where to listen.
    pub address: SocketAddr,
    /// File with the token that subscribers show.
    pub token_file: PathBuf,
    /// What the server shows.
    pub certificate: Option<ClientCertificate>,
}

/// Serves until a subscriber has taken the range to its end, and those who were under way by then are done too; whoever broke off and
/// acknowledges what it takes has some time to come back.
///
/// # Errors
/// When it cannot be served, the log cannot be read, or the process is asked to end.
pub async fn serve(offer: Offer, place: Place, shutdown: &CancellationToken) -> Result<End, ReplayError> {
    let Place {
        address,
        token_file,
        certificate,
    } = place;
    if let Some(certificate) = &certificate {
        acceptor(certificate).map_err(ReplayError::Server)?;
    }
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
    let subscribers = subscribers(&offer.range, offer.live.is_some());
    let slots = Arc::new(Semaphore::new(subscribers as usize));
    let closed = Arc::new(AtomicBool::new(false));
    let missed = Arc::new(Missed::default());
    let stop = CancellationToken::new();
    let _stop_on_return = stop.clone().drop_guard();
    let subscriptions = Subscriptions {
        offer: Arc::new(offer),
        subscribers,
        slots: Arc::clone(&slots),
        closed: Arc::clone(&closed),
        missed: Arc::clone(&missed),
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
    let services = Server::builder()
        .tcp_nodelay(true)
        .http2_keepalive_interval(Some(KEEPALIVE_INTERVAL))
        .http2_keepalive_timeout(Some(KEEPALIVE_TIMEOUT))
        .add_service(health_service)
        .add_service(reflection)
        .add_service(ReplayerServer::with_interceptor(subscriptions, admit));
    let ending = stop.clone().cancelled_owned();
    let connections = TcpListenerStream::new(listener);
    let mut server = match certificate {
        None => tokio::spawn(services.serve_with_incoming_shutdown(connections, ending)),
        Some(certificate) => {
            tokio::spawn(services.serve_with_incoming_shutdown(encrypted(connections, certificate), ending))
        }
    };
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
                if slots.available_permits() == subscribers as usize {
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
            () = missed.wait(&slots, subscribers), if closed.load(Ordering::Relaxed) => break Ok(End::Complete),
        }
    };
    stop.cancel();
    if timeout(PARTING, &mut server).await.is_err() {
        server.abort();
    }
    end
}

/// Connections that have agreed on TLS. One that does not is no more than a line in the log.
fn encrypted(
    connections: TcpListenerStream,
    certificate: ClientCertificate,
) -> impl Stream<Item = std::io::Result<TlsStream<TcpStream>>> {
    connections
        .map(move |connection| {
            // Read for each of them, so that a rotated one holds at once.
            let acceptor = acceptor(&certificate);
            async move {
                let connection = connection?;
                let acceptor = acceptor.map_err(std::io::Error::other)?;
                timeout(GREETING, acceptor.accept(connection)).await?
            }
        })
        .buffer_unordered(HANDSHAKES)
        .filter_map(async |agreed| {
            let agreed = agreed.inspect_err(|error| tracing::info!(%error, "no TLS with a subscriber"));
            agreed.ok().map(Ok)
        })
}

fn acceptor(certificate: &ClientCertificate) -> Result<TlsAcceptor, Box<dyn std::error::Error + Send + Sync>> {
    let (chain, key) = client_chain(certificate)?;
    let mut config = ServerConfig::builder_with_provider(Arc::new(ring::default_provider()))
        .with_safe_default_protocol_versions()?
        .with_no_client_auth()
        .with_single_cert(chain, key)?;
    config.alpn_protocols = vec![b"h2".to_vec()];
    Ok(TlsAcceptor::from(Arc::new(config)))
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

/// How many can be served a range at a time, and what follows it.
fn subscribers(range: &Range, followed: bool) -> u32 {
    // What follows may be in every partition, whatever the range has there.
    let is_read = |stretch: &&Stretch| followed || !stretch.is_empty();
    let partitions = range.partitions.iter().filter(is_read).count();
    let room = MEMORY / reader::memory(partitions, PREFETCH_BYTES);
    u32::try_from(room).unwrap_or(SUBSCRIBERS).clamp(1, SUBSCRIBERS)
}

struct Subscriptions {
    offer: Arc<Offer>,
    subscribers: u32,
    slots: Arc<Semaphore>,
    /// Somebody was the first to take the range to its end; nobody starts any more, but who has begun may go on.
    closed: Arc<AtomicBool>,
    missed: Arc<Missed>,
    lead: Arc<Lead>,
    next: AtomicU64,
    /// The first subscriber to end the job, for better or worse.
    results: mpsc::Sender<Result<(), ReplayError>>,
    shutdown: CancellationToken,
}

#[tonic::async_trait]
impl Replayer for Subscriptions {
    type ReplayEventStream = Events;

    async fn replay_event(&self, request: Request<Streaming<ReplayRequest>>) -> Result<Response<Events>, Status> {
        let slot = Arc::clone(&self.slots).try_acquire_owned().map_err(|_| {
            let subscribers = self.subscribers;
            Status::resource_exhausted(format!("all {subscribers} subscriptions are taken; try again later"))
        })?;
        let offer = Arc::clone(&self.offer);
        let mut requests = request.into_inner();
        let first = timeout(GREETING, requests.message())
            .await
            .map_err(|_| Status::deadline_exceeded("the first request says where to begin; it did not come"))??
            // Whoever asks for nothing wants everything.
            .unwrap_or_default();
        let done = match first.resume_token.as_str() {
            "" => None,
            text => Some(
                text.parse::<Done>()
                    .map_err(|error| Status::invalid_argument(error.to_string()))?,
            ),
        };
        let token = done.map(|done| done.resume);
        if token.is_none() && self.closed.load(Ordering::Relaxed) {
            return Err(Status::unavailable("the replay is complete; its server ends"));
        }
        self.missed.come();
        let range = match token {
            Some(token) if offer.range.end.is_some_and(|end| token.coordinate.position <= end) => {
                let offer = Arc::clone(&offer);
                tokio::task::spawn_blocking(move || range::resume(&offer.range, &offer.kafka, token, offer.frozen))
                    .await
                    .map_err(|error| Status::internal(error.to_string()))?
                    .map_err(|error| told(&error))?
            }
            Some(_) if offer.live.is_none() => {
                return Err(Status::invalid_argument(
                    "the resume token is of another replay: it is past the end of this one",
                ));
            }
            _ => offer.range.clone(),
        };

        let (sending, sent) = mpsc::channel(1);
        let (taken, until_taken) = oneshot::channel();
        let subscriber = Subscriber {
            sending: sending.clone(),
            taken: until_taken,
            acknowledging: (first.credit > 0).then(|| Acknowledging::new(requests, first.credit)),
            done,
        };
        let id = self.next.fetch_add(1, Ordering::Relaxed);
        let report = SubscriberReport {
            id,
            lead: Arc::clone(&self.lead),
            paused: offer.orders.clone(),
        };
        let acknowledges = subscriber.acknowledging.is_some();
        let missed = Arc::clone(&self.missed);
        let results = self.results.clone();
        let shutdown = self.shutdown.clone();
        tokio::spawn(async move {
            let tally = Tally::default();
            let is_past = token.is_some_and(|token| offer.range.end < Some(token.coordinate.position));
            let ahead = if is_past { 0 } else { range.offsets() };
            tally.begin(done.as_ref(), offer.range.offsets().saturating_sub(ahead));
            let meter = Meter::new(&offer.range, tally, &offer.plan);
            let group = format!("meander-replay.{}.{}", offer.job.namespace, offer.job.name);
            let filter = offer.plan.filter.clone();
            let reads = match &offer.live {
                None => {
                    let reading = Reading {
                        range,
                        after: token.map(|token| token.coordinate),
                        filter,
                        side_by_side: false,
                        places: false,
                    };
                    reader::start_with(&offer.kafka, group, PREFETCH_BYTES, reading)
                }
                Some(live) => live.read(Following {
                    range,
                    token,
                    filter,
                    group,
                    prefetch: PREFETCH_BYTES,
                }),
            };
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
                    if acknowledges {
                        missed.leave();
                    }
                    None
                }
                Err(error) => {
                    let status = told(&error);
                    // What is gone of the rest of this one may not be missed by another.
                    if matches!(error, ReplayError::LogTruncated { .. }) && (token.is_some() || offer.live.is_some()) {
                        tracing::warn!(subscriber = id, %error, "a subscriber cannot go on");
                    } else {
                        let _ = results.try_send(Err(error));
                    }
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

/// Subscribers that broke off and have not come back: how many, and when the last did.
#[derive(Default)]
struct Missed(Mutex<(usize, Option<Instant>)>);

impl Missed {
    fn leave(&self) {
        let mut missed = self.0.lock().unwrap_or_else(PoisonError::into_inner);
        *missed = (missed.0 + 1, Some(Instant::now()));
    }

    /// Somebody comes: one of them, for all that is known.
    fn come(&self) {
        let mut missed = self.0.lock().unwrap_or_else(PoisonError::into_inner);
        missed.0 = missed.0.saturating_sub(1);
    }

    /// Waits until everybody who is there is done, and those who broke off have had their time.
    async fn wait(&self, slots: &Semaphore, subscribers: u32) {
        loop {
            drop(slots.acquire_many(subscribers).await);
            let missed = *self.0.lock().unwrap_or_else(PoisonError::into_inner);
            match missed {
                (1.., Some(last)) if last.elapsed() < PATIENCE => sleep(COMEBACK).await,
                _ => return,
            }
        }
    }
}

/// Why a subscriber cannot go on, or not now.
fn told(error: &ReplayError) -> Status {
    match error {
        ReplayError::LogTruncated { .. } => Status::out_of_range(error.to_string()),
        _ => Status::unavailable(format!("{error}; resume with your last token")),
    }
}

/// `Ok(None)` is the end of the range: a channel that closes without it is a replay that broke off.
type Sent = Result<Option<ReplayEvent>, Status>;

/// One subscriber, as a target.
struct Subscriber {
    sending: mpsc::Sender<Sent>,
    /// Told when the end of the range was taken; dropped when the subscriber left before.
    taken: oneshot::Receiver<()>,
    /// None if it gives no credit.
    acknowledging: Option<Acknowledging>,
    /// What it has once it has taken everything that was sent. It is told with each message, and so it is known where it goes on by that.
    done: Option<Done>,
}

impl Target for Subscriber {
    const TELLS_SILENCE: bool = true;

    async fn run(mut self, batches: mpsc::Receiver<Batch>, tally: Tally) -> Result<(), TargetError> {
        tally.open();
        match self.acknowledging.take() {
            None => self.send_all(batches, &tally).await?,
            Some(acknowledging) => self.send_for_credit(batches, acknowledging, &tally).await?,
        }
        self.send(Ok(None)).await?;
        match timeout(PATIENCE, self.taken).await {
            Ok(Ok(())) => Ok(()),
            Ok(Err(_)) | Err(_) => Err(TargetError::SubscriberGone),
        }
    }
}

impl Subscriber {
    /// Whatever HTTP/2 lets through.
    async fn send_all(&mut self, mut batches: mpsc::Receiver<Batch>, tally: &Tally) -> Result<(), TargetError> {
        loop {
            let batch = tokio::select! {
                batch = batches.recv() => batch,
                () = self.sending.closed() => return Err(TargetError::SubscriberGone),
            };
            let Some(batch) = batch else { return Ok(()) };
            let mark = batch.mark;
            let event = self.message(&batch);
            self.send(Ok(Some(event))).await?;
            tally.credit(&mark);
        }
    }

    /// As many messages as there is credit for, until all are acknowledged.
    async fn send_for_credit(
        &mut self,
        mut batches: mpsc::Receiver<Batch>,
        mut acknowledging: Acknowledging,
        tally: &Tally,
    ) -> Result<(), TargetError> {
        let mut waiting: Option<Batch> = None;
        let mut more = true;
        loop {
            if acknowledging.has_room()
                && let Some(batch) = waiting.take()
            {
                let mark = batch.mark;
                let event = self.message(&batch);
                acknowledging.sent(event.resume_token.clone(), mark);
                self.send(Ok(Some(event))).await?;
            }
            if !more && waiting.is_none() && acknowledging.unacknowledged.is_empty() {
                return Ok(());
            }
            tally.set_trouble(waiting.as_ref().filter(|_| acknowledging.credit == 0).map(|_| Trouble {
                reason: "WaitingForCredit",
                message: "The subscriber has given no credit for more messages; it does so in a request.".to_owned(),
            }));
            tokio::select! {
                batch = batches.recv(), if more && waiting.is_none() => match batch {
                    Some(batch) => waiting = Some(batch),
                    None => more = false,
                },
                heard = acknowledging.hear(tally) => if let Err(status) = heard {
                    let _ = timeout(PARTING, self.sending.send(Err(status))).await;
                    return Err(TargetError::SubscriberGone);
                },
                () = self.sending.closed() => return Err(TargetError::SubscriberGone),
            }
        }
    }

    fn message(&mut self, batch: &Batch) -> ReplayEvent {
        let done = self.done.insert(Done::and(self.done, &batch.mark));
        ReplayEvent {
            resume_token: done.to_string(),
            ..batch.event()
        }
    }

    async fn send(&self, sent: Sent) -> Result<(), TargetError> {
        match timeout(PATIENCE, self.sending.send(sent)).await {
            Ok(Ok(())) => Ok(()),
            Ok(Err(_)) | Err(_) => Err(TargetError::SubscriberGone),
        }
    }
}

/// What a subscriber can take, and what it was sent and has not acknowledged.
struct Acknowledging {
    requests: Streaming<ReplayRequest>,
    credit: u32,
    unacknowledged: VecDeque<(String, Mark)>,
    /// When it last had nothing to acknowledge, or acknowledged something.
    progress: Instant,
}

impl Acknowledging {
    fn new(requests: Streaming<ReplayRequest>, credit: u32) -> Self {
        Self {
            requests,
            credit,
            unacknowledged: VecDeque::new(),
            progress: Instant::now(),
        }
    }

    fn has_room(&self) -> bool {
        self.credit > 0 && self.unacknowledged.len() < WINDOW
    }

    fn sent(&mut self, token: String, mark: Mark) {
        self.credit -= 1;
        if self.unacknowledged.is_empty() {
            self.progress = Instant::now();
        }
        self.unacknowledged.push_back((token, mark));
    }

    /// Waits for the next request, and counts what it acknowledges. Cancel safe.
    async fn hear(&mut self, tally: &Tally) -> Result<(), Status> {
        let silent = async {
            match self.unacknowledged.is_empty() {
                true => pending().await,
                false => sleep_until(self.progress + PATIENCE).await,
            }
        };
        let request = tokio::select! {
            request = self.requests.message() => request?,
            () = silent => return Err(Status::deadline_exceeded(format!(
                "nothing was acknowledged for {PATIENCE:?}; resume with your last token"
            ))),
        };
        let request = request.ok_or_else(|| {
            Status::failed_precondition(
                "the requests ended before everything was acknowledged; resume with your last token",
            )
        })?;
        self.credit = self.credit.saturating_add(request.credit);
        if request.resume_token.is_empty() {
            return Ok(());
        }
        let known = self
            .unacknowledged
            .iter()
            .position(|(token, _)| *token == request.resume_token);
        let known = known.ok_or_else(|| {
            let token = &request.resume_token;
            Status::invalid_argument(format!(
                "{token:?} is not the token of a message that waits for its acknowledgement"
            ))
        })?;
        for (_, mark) in self.unacknowledged.drain(..=known) {
            tally.credit(&mark);
        }
        self.progress = Instant::now();
        Ok(())
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
    fn progress(&self, mut progress: ReplayProgress, course: Course<'_>) {
        let mut times = self.times();
        let own = progress.current_time_micros;
        times.insert(self.id, own);
        // Of those that are equally far, the one that came first.
        let is_behind = |(id, time): (&u64, &i64)| *time < own || (*time == own && *id >= self.id);
        if times.iter().all(is_behind) {
            // Whether the job is over is said by the job.
            if progress.phase() == Phase::Succeeded {
                progress.set_phase(Phase::Running);
            }
            self.lead.report.progress(progress, course);
        }
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
    fn a_range_that_is_followed_is_served_to_as_many_as_all_of_its_partitions_allow() {
        let range = Range::of((0..2000).map(|partition| ("shop.public.orders", partition)), 0);
        assert_eq!(subscribers(&range, false), SUBSCRIBERS);
        assert_eq!(subscribers(&range, true), 4);
    }

    #[test]
    fn only_the_same_token_is_the_same() {
        assert!(same(b"secret", b"secret"));
        for wrong in [&b""[..], b"secre", b"secret1", b"Secret"] {
            assert!(!same(wrong, b"secret"));
        }
    }
}

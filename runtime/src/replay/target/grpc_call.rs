//! Calls the user's `ReplayReceiver`.

use std::{collections::VecDeque, fs, future::pending, pin::pin, sync::Arc, time::Duration};

use meander_config::GrpcReceiver;
use meander_proto::v1::DeliverAck;
use tokio::{
    sync::mpsc,
    time::{sleep, timeout},
};
use tokio_stream::wrappers::ReceiverStream;
use tonic::{
    Code, Request, Status, Streaming,
    client::Grpc,
    codec::{Codec, EncodeBuf, Encoder},
    codegen::http::uri::PathAndQuery,
    metadata::MetadataValue,
    transport::{Certificate, ClientTlsConfig, Endpoint, Identity},
};
use tonic_prost::ProstDecoder;

use super::{Batch, Tally, Target, TargetError, Trouble, chain};
use crate::{
    log::REPLAY_ATTEMPT_HEADER,
    replay::{
        keeper::AtLeastOnce,
        patience::{NOTICE, PATIENCE, Patience, Silence, Silent},
    },
    tls::{authorities, client_pem},
};

/// The call of `ReplayReceiver`.
const DELIVER: &str = "/meander.v1.ReplayReceiver/Deliver";
/// Messages that may be without an answer.
const WINDOW: usize = 8;
const CONNECT_TIMEOUT: Duration = Duration::from_secs(5);
const KEEPALIVE_INTERVAL: Duration = Duration::from_secs(10);
/// How long the receiver may take to end its half of the stream after its last answer.
const PARTING: Duration = Duration::from_secs(5);

/// Delivers to a server of the user, at least once: a message that was not answered when a stream broke is sent again.
pub struct GrpcCall {
    receiver: GrpcReceiver,
    attempt: u32,
    /// Each is shared with the stream, which encodes it; from here it is sent again.
    unanswered: VecDeque<Arc<Batch>>,
    /// The batches have not ended.
    more: bool,
    patience: Patience,
}

/// Why a stream ended too early.
enum Broken {
    /// Another may work.
    Retry(String),
    Fatal(TargetError),
}

impl AtLeastOnce for GrpcCall {
    type Settings = GrpcReceiver;

    fn new(receiver: &GrpcReceiver, attempt: u32) -> Self {
        Self {
            receiver: receiver.clone(),
            attempt,
            unanswered: VecDeque::with_capacity(WINDOW),
            more: true,
            patience: Patience::default(),
        }
    }
}

impl Target for GrpcCall {
    const TELLS_SILENCE: bool = true;
    // Larger pieces for each other to work on: reader, sender and receiver then wait less for a turn of the processor.
    const MOST_RECORDS: usize = 2048;

    async fn run(mut self, mut batches: mpsc::Receiver<Batch>, tally: Tally) -> Result<(), TargetError> {
        let endpoint = Endpoint::from_shared(self.receiver.endpoint.clone())
            .map_err(|source| TargetError::InvalidEndpoint {
                endpoint: self.receiver.endpoint.clone(),
                source,
            })?
            .connect_timeout(CONNECT_TIMEOUT)
            // Not by HTTP/2: gRPC's own servers end a connection (`too_many_pings`) that is pinged more often than every five minutes while
            // no data moves, as in a pause. What is sent has to be answered in time anyway.
            .tcp_keepalive(Some(KEEPALIVE_INTERVAL))
            .tcp_nodelay(true);
        loop {
            let cause = match self.stream(&endpoint, &mut batches, &tally).await {
                Ok(()) => return Ok(()),
                Err(Broken::Fatal(error)) => return Err(error),
                Err(Broken::Retry(cause)) => cause,
            };
            let receiver = &self.receiver.endpoint;
            let trouble = Trouble {
                reason: "ReceiverUnreachable",
                message: format!(
                    "Nothing is delivered to the receiver at {receiver}: {cause}; start it, or correct the endpoint. It is tried again."
                ),
            };
            let Some(pause) = self
                .patience
                .failed(trouble, |trouble| tally.set_trouble(Some(trouble)))
            else {
                return Err(TargetError::ReceiverUnreachable {
                    endpoint: self.receiver.endpoint,
                    tried: PATIENCE,
                    cause,
                });
            };
            sleep(pause).await;
        }
    }
}

impl GrpcCall {
    /// One stream, up to its end or that of the batches. What is unanswered from the stream before is sent first.
    async fn stream(
        &mut self,
        endpoint: &Endpoint,
        batches: &mut mpsc::Receiver<Batch>,
        tally: &Tally,
    ) -> Result<(), Broken> {
        let endpoint = self.secured(endpoint.clone()).map_err(Broken::Retry)?;
        let channel = endpoint.connect().await.map_err(|error| Broken::Retry(chain(&error)))?;
        tally.open();
        if self.unanswered.is_empty() {
            self.patience.renew();
            tally.set_trouble(None);
        }

        // Holds all that may be unanswered, so that sending never waits: what waits is the next batch.
        let (events, sent) = mpsc::channel(WINDOW);
        for unanswered in &self.unanswered {
            let _ = events.try_send(Arc::clone(unanswered));
        }
        let mut client = Grpc::new(channel);
        client.ready().await.map_err(|error| Broken::Retry(chain(&error)))?;
        // A receiver may begin its answer only with its first message, so the call is not waited for before sending.
        let mut request = Request::new(ReceiverStream::new(sent));
        self.show_token(&mut request).map_err(Broken::Retry)?;
        request
            .metadata_mut()
            .insert(REPLAY_ATTEMPT_HEADER, MetadataValue::from(self.attempt));
        let mut call = pin!(client.streaming(request, PathAndQuery::from_static(DELIVER), Encoding));
        let mut answers: Option<Streaming<DeliverAck>> = None;
        let mut silence = Silence::default();

        while self.more || !self.unanswered.is_empty() {
            tokio::select! {
                result = &mut call, if answers.is_none() => {
                    answers = Some(result.map_err(|status| self.broken(status))?.into_inner());
                }
                answer = next(&mut answers) => {
                    let answer = answer
                        .map_err(|status| self.broken(status))?
                        .ok_or_else(|| Broken::Retry("it ended the stream before the replay was over".to_owned()))?;
                    self.answered(&answer, tally)?;
                    silence.end();
                }
                batch = batches.recv(), if self.more && self.unanswered.len() < WINDOW => match batch {
                    Some(batch) => {
                        if self.unanswered.is_empty() {
                            silence.end();
                        }
                        let batch = Arc::new(batch);
                        // If the stream is broken, its answers say so.
                        let _ = events.try_send(Arc::clone(&batch));
                        self.unanswered.push_back(batch);
                    }
                    None => self.more = false,
                },
                silent = silence.lasts(PATIENCE), if !self.unanswered.is_empty() => {
                    let endpoint = &self.receiver.endpoint;
                    match silent {
                        Silent::Noticed => tally.set_trouble(Some(Trouble {
                            reason: "ReceiverSilent",
                            message: format!(
                                "The receiver at {endpoint} has taken a message and not answered it for more than {NOTICE:?}; it must \
                                 answer each with its resume token."
                            ),
                        })),
                        Silent::TooLong => return Err(Broken::Fatal(TargetError::ReceiverSilent {
                            endpoint: endpoint.clone(),
                            waited: PATIENCE,
                        })),
                    }
                }
            }
        }

        // Everything is answered. Part in good order, if the receiver does too.
        drop(events);
        let _ = timeout(PARTING, async {
            if answers.is_none() {
                answers = call.await.ok().map(tonic::Response::into_inner);
            }
            if let Some(answers) = &mut answers {
                while let Ok(Some(_)) = answers.message().await {}
            }
        })
        .await;
        Ok(())
    }

    /// With TLS, if that is asked for. The files are read for each connection, so that rotated ones hold at once.
    fn secured(&self, endpoint: Endpoint) -> Result<Endpoint, String> {
        if !self.receiver.endpoint.starts_with("https:") {
            return Ok(endpoint);
        }
        let trusted = authorities(self.receiver.ca_file.as_deref()).map_err(|error| error.to_string())?;
        let mut tls = ClientTlsConfig::new().ca_certificate(Certificate::from_pem(trusted));
        if let Some(client) = &self.receiver.client_certificate {
            let (certificate, key) = client_pem(client).map_err(|error| error.to_string())?;
            tls = tls.identity(Identity::from_pem(certificate, key));
        }
        endpoint.tls_config(tls).map_err(|error| chain(&error))
    }

    fn show_token<T>(&self, request: &mut Request<T>) -> Result<(), String> {
        let Some(path) = &self.receiver.token_file else {
            return Ok(());
        };
        let token = fs::read_to_string(path).map_err(|error| format!("cannot read {}: {error}", path.display()))?;
        let value = format!("Bearer {}", token.trim());
        let value = value
            .parse()
            .map_err(|_| format!("{} holds no token", path.display()))?;
        request.metadata_mut().insert("authorization", value);
        Ok(())
    }

    fn answered(&mut self, answer: &DeliverAck, tally: &Tally) -> Result<(), Broken> {
        let expected = self.unanswered.front().map(|oldest| oldest.mark.resume.to_string());
        if expected.as_ref() != Some(&answer.resume_token) {
            return Err(Broken::Fatal(TargetError::ReceiverConfused {
                endpoint: self.receiver.endpoint.clone(),
                answer: answer.resume_token.clone(),
                expected: expected.unwrap_or_else(|| "no answer".to_owned()),
            }));
        }
        if let Some(oldest) = self.unanswered.pop_front() {
            tally.credit(&oldest.mark);
        }
        self.patience.renew();
        Ok(())
    }

    fn broken(&self, status: Status) -> Broken {
        match status.code() {
            Code::Unimplemented | Code::Unauthenticated | Code::PermissionDenied | Code::InvalidArgument => {
                Broken::Fatal(TargetError::ReceiverRefused {
                    endpoint: self.receiver.endpoint.clone(),
                    status: Box::new(status),
                })
            }
            // What is too large stays so: until the receiver's limit is raised.
            Code::ResourceExhausted | Code::OutOfRange => {
                let sizes = self.unanswered.iter().map(|unanswered| unanswered.size());
                let largest = sizes.max().unwrap_or_default();
                let cause = chain(&status);
                Broken::Retry(format!(
                    "{cause} (the largest message that it has not answered has about {largest} bytes)"
                ))
            }
            _ => Broken::Retry(chain(&status)),
        }
    }
}

/// Messages that are encoded straight into what is sent, and answers.
struct Encoding;

impl Codec for Encoding {
    type Encode = Arc<Batch>;
    type Decode = DeliverAck;
    type Encoder = Self;
    type Decoder = ProstDecoder<DeliverAck>;

    fn encoder(&mut self) -> Self::Encoder {
        Self
    }

    fn decoder(&mut self) -> Self::Decoder {
        ProstDecoder::default()
    }
}

impl Encoder for Encoding {
    type Item = Arc<Batch>;
    type Error = Status;

    fn encode(&mut self, batch: Arc<Batch>, buffer: &mut EncodeBuf<'_>) -> Result<(), Status> {
        buffer.reserve(batch.size());
        batch
            .encode(buffer)
            .map_err(|error| Status::internal(error.to_string()))
    }
}

async fn next(answers: &mut Option<Streaming<DeliverAck>>) -> Result<Option<DeliverAck>, Status> {
    match answers {
        Some(answers) => answers.message().await,
        None => pending().await,
    }
}

//! The gRPC service `meander.v1.ProgressTracker`.

use std::{future::ready, pin::Pin, sync::Arc, time::Duration};

use futures::{Stream, StreamExt as _, stream};
use meander_proto::{
    NO_LEADER,
    v1::{
        ControlReplayRequest, ControlReplayResponse, Directive, ProgressUpdate, ResourceReference,
        StreamProgressRequest, progress_tracker_server::ProgressTracker,
    },
};
use prometheus::IntGauge;
use tokio::time::timeout;
use tokio_stream::wrappers::WatchStream;
use tokio_util::sync::CancellationToken;
use tonic::{Request, Response, Status, Streaming};

use super::{
    Authenticator, Kind, ResourceKey, Tracker,
    control::control,
    tracker::{Shown, StreamId},
};
use crate::context::Context;

/// A call that changes something is answered within this time.
const ANSWER: Duration = Duration::from_secs(20);
/// The first update must come within this time.
const INTRODUCTION: Duration = Duration::from_secs(10);

/// `meander.v1.ProgressTracker`.
pub struct ProgressTrackerService {
    /// What every reconcile shares.
    pub context: Arc<Context>,
    /// Who may call.
    pub authenticator: Authenticator,
    /// Ends every stream.
    pub shutdown: CancellationToken,
}

type Responses<T> = Pin<Box<dyn Stream<Item = Result<T, Status>> + Send>>;

impl ProgressTrackerService {
    fn leading(&self) -> Result<(), Status> {
        if self.context.claim.is_held() {
            Ok(())
        } else {
            Err(Status::unavailable(NO_LEADER))
        }
    }
}

fn key(reference: Option<ResourceReference>) -> Result<(ResourceKey, String), Status> {
    let reference = reference.ok_or_else(|| Status::invalid_argument("resource is missing"))?;
    let kind = Kind::parse(&reference.kind)
        .ok_or_else(|| Status::invalid_argument("resource.kind is CdcPipeline or ReplayJob"))?;
    Ok((
        ResourceKey {
            kind,
            namespace: reference.namespace,
            name: reference.name,
        },
        reference.uid,
    ))
}

fn unknown(key: &ResourceKey) -> Status {
    Status::not_found(format!(
        "{} {}/{} is not known (yet)",
        key.kind.as_str(),
        key.namespace,
        key.name
    ))
}

/// Keeps count of one stream.
struct Connection {
    tracker: Arc<Tracker>,
    key: ResourceKey,
    uid: String,
    stream: StreamId,
    streams: IntGauge,
}

impl Drop for Connection {
    fn drop(&mut self) {
        self.tracker.disconnect(&self.key, &self.uid, self.stream);
        self.streams.dec();
    }
}

#[tonic::async_trait]
impl ProgressTracker for ProgressTrackerService {
    type ReportProgressStream = Responses<Directive>;
    type StreamProgressStream = Responses<ProgressUpdate>;

    async fn report_progress(
        &self,
        request: Request<Streaming<ProgressUpdate>>,
    ) -> Result<Response<Self::ReportProgressStream>, Status> {
        self.leading()?;
        let (metadata, _, mut updates) = request.into_parts();
        let first = timeout(INTRODUCTION, updates.message())
            .await
            .map_err(|_| Status::deadline_exceeded("the first update did not come"))??
            .ok_or_else(|| Status::invalid_argument("the first update names the resource"))?;
        let (key, uid) = key(first.resource.clone())?;
        self.authenticator.reporter(&metadata, &key, &uid).await?;
        let tracker = self.context.tracker.clone();
        let (stream, directives) = tracker.connect(&key, &uid).ok_or_else(|| unknown(&key))?;
        let streams = self.context.metrics.progress_streams.clone();
        streams.inc();
        let connection = Connection {
            tracker,
            key: key.clone(),
            uid,
            stream,
            streams,
        };
        tracing::info!(
            kind = key.kind.as_str(),
            namespace = key.namespace,
            name = key.name,
            "a runtime reports"
        );

        // Some(answer) is sent; None ends the stream, and with it the other half.
        let reports = stream::once(ready(Ok(first))).chain(updates).filter_map(move |update| {
            let failure = match update {
                // The resource was checked once; a stream cannot turn to another one.
                Ok(update) => {
                    let Connection {
                        tracker,
                        key,
                        uid,
                        stream,
                        ..
                    } = &connection;
                    (!tracker.accept(key, uid, *stream, update)).then(|| unknown(key))
                }
                Err(status) => Some(status),
            };
            ready(failure.map(|status| Some(Err(status))))
        });
        let directives = WatchStream::new(directives).filter_map(|directive| ready(directive.map(|d| Some(Ok(d)))));
        let responses = stream::select(reports.chain(stream::once(ready(None))), directives)
            .take_while(|answer| ready(answer.is_some()))
            .filter_map(ready)
            .take_until(self.shutdown.clone().cancelled_owned());
        Ok(Response::new(Box::pin(responses)))
    }

    async fn stream_progress(
        &self,
        request: Request<StreamProgressRequest>,
    ) -> Result<Response<Self::StreamProgressStream>, Status> {
        self.leading()?;
        let (metadata, _, request) = request.into_parts();
        let (key, _) = key(request.resource)?;
        self.authenticator.permitted(&metadata, "get", &key).await?;
        let shown = self.context.tracker.follow(&key).ok_or_else(|| unknown(&key))?;
        let updates = WatchStream::new(shown)
            .flat_map(|Shown { update, last }| {
                // None ends the stream.
                let end = last.then_some(None);
                stream::iter(update.map(|update| Some(Ok(update))).into_iter().chain(end))
            })
            .take_while(|update| ready(update.is_some()))
            .filter_map(ready)
            .take_until(self.shutdown.clone().cancelled_owned());
        Ok(Response::new(Box::pin(updates)))
    }

    async fn control_replay(
        &self,
        request: Request<ControlReplayRequest>,
    ) -> Result<Response<ControlReplayResponse>, Status> {
        self.leading()?;
        let (metadata, _, request) = request.into_parts();
        let key = ResourceKey {
            kind: Kind::ReplayJob,
            namespace: request.namespace.clone(),
            name: request.name.clone(),
        };
        let answer = timeout(ANSWER, async {
            let user = self.authenticator.permitted(&metadata, "patch", &key).await?;
            // Only what a controller has seen is asked for: a name from elsewhere could be anything.
            if self.context.tracker.follow(&key).is_none() {
                return Err(unknown(&key));
            }
            control(&self.context, &key, &user, request).await
        });
        let generation = answer
            .await
            .map_err(|_| Status::deadline_exceeded("the API server did not answer in time; see the spec"))??;
        Ok(Response::new(ControlReplayResponse { generation }))
    }
}

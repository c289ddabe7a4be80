//! An operator that stands in for the user's.
#![allow(dead_code)] // No test needs all of it.

use std::{collections::BTreeMap, net::SocketAddr, time::Duration};

use meander_config::OperatorLink;
use meander_proto::v1::{
    Condition, ControlReplayRequest, ControlReplayResponse, Directive, ProgressUpdate, ReplayProgress,
    StreamProgressRequest,
    progress_tracker_server::{ProgressTracker, ProgressTrackerServer},
    progress_update,
};
use tokio::{
    net::TcpListener,
    sync::{mpsc, watch},
    time::timeout,
};
use tokio_stream::{
    StreamExt as _,
    wrappers::{ReceiverStream, TcpListenerStream},
};
use tonic::{Request, Response, Status, Streaming, transport::Server};

/// Whatever is waited for either comes well before this, or never.
const LIMIT: Duration = Duration::from_secs(240);

/// An operator that shows what was reported and directs what it is told.
#[derive(Clone)]
pub struct Operator {
    pub address: SocketAddr,
    pub directive: watch::Sender<Directive>,
    pub update: watch::Sender<ProgressUpdate>,
}

const OPERATOR_TOKEN: &str = "a-projected-token";

impl Operator {
    pub async fn start(directive: Directive) -> Self {
        let listener = TcpListener::bind("127.0.0.1:0").await.unwrap();
        let operator = Self {
            address: listener.local_addr().unwrap(),
            directive: watch::channel(directive).0,
            update: watch::channel(ProgressUpdate::default()).0,
        };
        let server = Server::builder()
            .add_service(ProgressTrackerServer::new(operator.clone()))
            .serve_with_incoming(TcpListenerStream::new(listener));
        tokio::spawn(server);
        operator
    }

    pub fn link(&self, folder: &tempfile::TempDir) -> Option<OperatorLink> {
        let token_file = folder.path().join("token");
        std::fs::write(&token_file, format!("{OPERATOR_TOKEN}\n")).unwrap();
        Some(OperatorLink {
            endpoint: format!("http://{}", self.address),
            ca_file: None,
            token_file,
        })
    }

    /// The first report, from now on, that is as wanted.
    pub async fn reported(&self, wanted: impl Fn(&ReplayProgress) -> bool) -> ReplayProgress {
        let mut updates = self.update.subscribe();
        let update = timeout(
            LIMIT,
            updates.wait_for(|update| replay_progress(update).is_some_and(&wanted)),
        )
        .await;
        replay_progress(&update.unwrap().unwrap()).unwrap().clone()
    }

    /// A condition, once it has this reason.
    pub async fn condition(&self, kind: &str, reason: &str) -> Condition {
        let is_it = |condition: &&Condition| condition.r#type == kind && condition.reason == reason;
        let mut updates = self.update.subscribe();
        let update = updates.wait_for(|update| update.conditions.iter().any(|condition| is_it(&condition)));
        let update = timeout(LIMIT, update).await.unwrap().unwrap();
        update.conditions.iter().find(is_it).unwrap().clone()
    }

    /// True conditions of the last report, with their reasons.
    pub fn conditions(&self) -> BTreeMap<String, String> {
        let update = self.update.borrow();
        let set = update.conditions.iter().filter(|condition| condition.status);
        set.map(|condition| (condition.r#type.clone(), condition.reason.clone()))
            .collect()
    }
}

fn replay_progress(update: &ProgressUpdate) -> Option<&ReplayProgress> {
    match &update.progress {
        Some(progress_update::Progress::Replay(progress)) => Some(progress),
        _ => None,
    }
}

#[tonic::async_trait]
impl ProgressTracker for Operator {
    type ReportProgressStream = ReceiverStream<Result<Directive, Status>>;
    type StreamProgressStream = ReceiverStream<Result<ProgressUpdate, Status>>;

    async fn report_progress(
        &self,
        request: Request<Streaming<ProgressUpdate>>,
    ) -> Result<Response<Self::ReportProgressStream>, Status> {
        let token = request.metadata().get("authorization").unwrap().to_str().unwrap();
        assert_eq!(token, format!("Bearer {OPERATOR_TOKEN}"));
        let mut updates = request.into_inner();
        let (directives, answer) = mpsc::channel(1);
        let operator = self.clone();
        tokio::spawn(async move {
            let mut directive = operator.directive.subscribe();
            directive.mark_changed();
            loop {
                tokio::select! {
                    update = updates.next() => match update {
                        Some(Ok(update)) => {
                            operator.update.send_replace(update);
                        }
                        _ => return,
                    },
                    _ = directive.changed() => {
                        let newest = directive.borrow_and_update().clone();
                        let _ = directives.send(Ok(newest)).await;
                    }
                }
            }
        });
        Ok(Response::new(ReceiverStream::new(answer)))
    }

    async fn stream_progress(
        &self,
        _: Request<StreamProgressRequest>,
    ) -> Result<Response<Self::StreamProgressStream>, Status> {
        Err(Status::unimplemented("not here"))
    }

    async fn control_replay(
        &self,
        _: Request<ControlReplayRequest>,
    ) -> Result<Response<ControlReplayResponse>, Status> {
        Err(Status::unimplemented("not here"))
    }
}

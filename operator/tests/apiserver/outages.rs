//! What befalls the API server, and the way to it: the operator goes on, and puts right what changed meanwhile.

use std::{
    collections::BTreeSet,
    future::pending,
    io,
    net::SocketAddr,
    sync::{Arc, Mutex},
    time::Duration,
};

use futures::StreamExt as _;
use http_body_util::{BodyExt as _, Full, StreamBody, combinators::UnsyncBoxBody};
use hyper::{
    Request, Response,
    body::{Bytes, Frame, Incoming},
    server::conn::http1,
    service::service_fn,
};
use hyper_util::rt::TokioIo;
use k8s_openapi::api::apps::v1::Deployment;
use kube::{
    Client, Config, ResourceExt as _,
    api::{DeleteParams, ListParams, Patch, PatchParams},
};
use meander_crds::CdcPipeline;
use meander_operator::{client::client, conditions::state};
use serde_json::{Value, json};
use tokio::{net::TcpListener, sync::watch, task::JoinHandle};
use tokio_util::sync::CancellationToken;

use super::{ApiServer, Cluster, Operator, merged, pipeline_json, support::eventually};

/// What befalls requests.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Fault {
    /// They are answered with 429.
    TooMany,
    /// Their connections are closed.
    Closed,
    /// Nothing comes any more, on connections that stay open; what was asked then is never answered.
    Silent,
    /// Watches hear that what they know is too old.
    Expired,
}

/// What was struck by a fault.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord)]
enum Struck {
    Lease,
    BeginOfWatch,
    Watch,
}

/// Stands between the operator and the API server.
struct Way {
    address: SocketAddr,
    fault: watch::Sender<Option<Fault>>,
    struck: Arc<Mutex<BTreeSet<Struck>>>,
}

impl Way {
    async fn to(server: Client) -> Self {
        let listener = TcpListener::bind("127.0.0.1:0").await.unwrap();
        let way = Self {
            address: listener.local_addr().unwrap(),
            fault: watch::Sender::new(None),
            struck: Arc::default(),
        };
        let (faults, struck) = (way.fault.subscribe(), way.struck.clone());
        tokio::spawn(async move {
            while let Ok((connection, _)) = listener.accept().await {
                let (server, faults, struck) = (server.clone(), faults.clone(), struck.clone());
                let pass = service_fn(move |request| pass(request, server.clone(), faults.clone(), struck.clone()));
                tokio::spawn(http1::Builder::new().serve_connection(TokioIo::new(connection), pass));
            }
        });
        way
    }

    fn strike(&self, fault: Fault) {
        self.struck.lock().unwrap().clear();
        self.fault.send_replace(Some(fault));
    }

    fn clear(&self) {
        self.fault.send_replace(None);
    }

    fn has_struck(&self, what: &[Struck]) -> bool {
        let struck = self.struck.lock().unwrap();
        what.iter().all(|what| struck.contains(what))
    }
}

type Answer = Response<UnsyncBoxBody<Bytes, io::Error>>;

fn answer(status: u16, body: &Value) -> Answer {
    let body = Full::from(format!("{body}\n"))
        .map_err(|never| match never {})
        .boxed_unsync();
    let answer = Response::builder()
        .status(status)
        .header("content-type", "application/json");
    answer.header("retry-after", "1").body(body).unwrap()
}

fn refusal(code: u16, reason: &str) -> Value {
    json!({"kind": "Status", "apiVersion": "v1", "status": "Failure", "message": "because", "reason": reason, "code": code})
}

/// One request. An error closes its connection.
async fn pass(
    request: Request<Incoming>,
    server: Client,
    mut faults: watch::Receiver<Option<Fault>>,
    struck: Arc<Mutex<BTreeSet<Struck>>>,
) -> io::Result<Answer> {
    let query = request.uri().query().unwrap_or_default();
    let is_watch = query.contains("watch=true");
    let is_lease = request.uri().path().contains("/leases/");
    // Of the watches, this one falls silent; the others are closed, and those that begin anew are never answered.
    let falls_silent = request.uri().path().contains("/cdcpipelines");
    let fault = *faults.borrow_and_update();
    if fault.is_some_and(|fault| fault != Fault::Expired || is_watch) {
        let what = [(is_lease, Struck::Lease), (is_watch, Struck::BeginOfWatch)];
        let what = what.into_iter().filter(|(is, _)| *is);
        struck.lock().unwrap().extend(what.map(|(_, what)| what));
    }
    match fault {
        Some(Fault::TooMany) => return Ok(answer(429, &refusal(429, "TooManyRequests"))),
        Some(Fault::Closed) => return Err(io::Error::other("closed")),
        Some(Fault::Silent) => pending().await,
        Some(Fault::Expired) if is_watch => {
            return Ok(answer(
                200,
                &json!({"type": "ERROR", "object": refusal(410, "Expired")}),
            ));
        }
        Some(Fault::Expired) | None => {}
    }
    let (parts, body) = request.into_parts();
    let body = body.collect().await.map_err(io::Error::other)?.to_bytes();
    let request = Request::from_parts(parts, kube::client::Body::from(body));
    let response = server.send(request).await.map_err(io::Error::other)?;
    if !is_watch {
        let (parts, body) = response.into_parts();
        return Ok(Response::from_parts(
            parts,
            body.map_err(io::Error::other).boxed_unsync(),
        ));
    }
    let (parts, body) = response.into_parts();
    let frames = futures::stream::unfold((body.into_data_stream(), faults), move |(mut frames, mut faults)| {
        let struck = struck.clone();
        async move {
            tokio::select! {
                biased;
                changed = faults.changed() => {
                    struck.lock().unwrap().insert(Struck::Watch);
                    if changed.is_ok() && falls_silent && *faults.borrow() == Some(Fault::Silent) {
                        pending::<()>().await;
                    }
                    Some((Err(io::Error::other("closed")), (frames, faults)))
                }
                frame = frames.next() => {
                    let frame = frame?.map(Frame::data).map_err(io::Error::other);
                    Some((frame, (frames, faults)))
                }
            }
        }
    });
    Ok(Response::from_parts(parts, StreamBody::new(frames).boxed_unsync()))
}

/// An operator that is started again when it ends, as the kubelet does.
struct Kept {
    keeper: JoinHandle<()>,
    end: CancellationToken,
    ended: watch::Receiver<u32>,
}

impl Kept {
    fn start(cluster: Arc<Cluster>) -> Self {
        let end = CancellationToken::new();
        let (ends, ended) = watch::channel(0);
        let keeper = tokio::spawn({
            let end = end.clone();
            async move {
                loop {
                    let mut operator = Operator::start(&cluster);
                    tokio::select! {
                        result = &mut operator.task => {
                            result.unwrap().expect_err("nobody told it to end");
                            ends.send_modify(|ends| *ends += 1);
                        }
                        () = end.cancelled() => return operator.stop().await,
                    }
                }
            }
        });
        Self { keeper, end, ended }
    }

    async fn stop(self) {
        self.end.cancel();
        self.keeper.await.unwrap();
    }
}

/// Of this number: something is made, something is taken away, and something is changed that is not the changer's.
async fn change(cluster: &Cluster, number: usize) {
    let retained = json!({"spec": {"source": {"postgres": {"slot": {"reclaimPolicy": "Retain"}}}}});
    let body = merged(pipeline_json(&format!("made-{number}")), &retained);
    cluster.create::<CdcPipeline>(body).await;
    if let Some(before) = number.checked_sub(1) {
        let pipelines = cluster.api::<CdcPipeline>();
        let name = format!("made-{before}");
        pipelines.delete(&name, &DeleteParams::default()).await.unwrap();
    }
    let more = Patch::Merge(json!({"spec": {"replicas": 5}}));
    let deployments = cluster.api::<Deployment>();
    let name = "stays-capture";
    deployments.patch(name, &PatchParams::default(), &more).await.unwrap();
}

async fn is_right(cluster: &Cluster, number: usize) -> bool {
    let pipelines = cluster.api::<CdcPipeline>();
    let deployments = cluster.api::<Deployment>();
    let made = format!("made-{number}");
    let pipeline = pipelines.get(&made).await.unwrap();
    let conditions = pipeline.status.unwrap_or_default().conditions;
    let stays = deployments.get_opt("stays-capture").await.unwrap();
    let all = pipelines.list(&ListParams::default()).await.unwrap().items;
    let names: BTreeSet<_> = all.iter().map(|pipeline| pipeline.name_any()).collect();
    deployments.get_opt(&format!("{made}-capture")).await.unwrap().is_some()
        && state(&conditions, "Ready") == Some(("False", "PodNotReady"))
        && stays.and_then(|stays| stays.spec?.replicas) == Some(1)
        && names == [made, "stays".to_owned()].into()
}

#[tokio::test(flavor = "multi_thread")]
async fn whatever_befalls_the_api_server_what_changed_meanwhile_is_put_right() {
    let server = tokio::task::spawn_blocking(ApiServer::own).await.unwrap();
    let cluster = Cluster::on(Arc::new(server)).await;
    let way = Way::to(cluster.operator.clone()).await;
    let config = Config::new(format!("http://{}", way.address).parse().unwrap());
    let cluster = Arc::new(Cluster {
        operator: client(config).unwrap(),
        ..cluster
    });
    cluster.secrets().await;
    cluster.create::<CdcPipeline>(pipeline_json("stays")).await;
    let operator = Kept::start(cluster.clone());
    let deployments = cluster.api::<Deployment>();
    eventually("the operator is at work", async || {
        deployments.get_opt("stays-capture").await.unwrap().is_some()
    })
    .await;

    let all = [Struck::Lease, Struck::BeginOfWatch, Struck::Watch];
    let faults: [(Fault, &[Struck]); 4] = [
        (Fault::TooMany, &all),
        (Fault::Closed, &all),
        (Fault::Expired, &[Struck::BeginOfWatch, Struck::Watch]),
        (Fault::Silent, &all),
    ];
    for (number, (fault, strikes)) in faults.into_iter().enumerate() {
        way.strike(fault);
        eventually(&format!("{fault:?} strikes"), async || way.has_struck(strikes)).await;
        change(&cluster, number).await;
        way.clear();
        eventually(&format!("after {fault:?} all is right"), async || {
            is_right(&cluster, number).await
        })
        .await;
    }

    // For longer than a lease lasts, there is no API server at all.
    let mut ended = operator.ended.clone();
    let before = *ended.borrow_and_update();
    let run = async |what: fn(&ApiServer)| {
        let server = cluster.server.clone();
        tokio::task::spawn_blocking(move || what(&server)).await.unwrap();
    };
    run(ApiServer::stop).await;
    tokio::time::timeout(Duration::from_secs(240), ended.wait_for(|ended| *ended > before))
        .await
        .expect("an operator without a lease ends")
        .unwrap();
    run(ApiServer::start).await;
    change(&cluster, faults.len()).await;
    eventually("after the API server all is right", async || {
        is_right(&cluster, faults.len()).await
    })
    .await;
    operator.stop().await;
}

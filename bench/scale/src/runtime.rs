//! Plays the runtime of every resource: a pod in the API, its token, and a connection of its own that reports.

use std::time::{Duration, SystemTime, UNIX_EPOCH};

use anyhow::Context as _;
use futures::{StreamExt as _, TryStreamExt as _, stream};
use k8s_openapi::api::{
    apps::v1::Deployment,
    authentication::v1::TokenRequest,
    batch::v1::Job,
    core::v1::{Pod, ServiceAccount},
};
use kube::{
    Api, Client, Resource as _, ResourceExt as _,
    api::{ListParams, Patch, PatchParams, PostParams},
};
use meander_crds::{CdcPipeline, PipelinePhase, ReplayJob, ReplayPhase};
use meander_proto::v1::{
    CaptureProgress, Condition, ProgressUpdate, ReplayProgress, ResourceReference,
    progress_tracker_client::ProgressTrackerClient, progress_update::Progress, replay_progress::Phase,
};
use serde_json::{Value, json};
use tokio::{
    sync::{mpsc, watch},
    task::JoinSet,
    time::timeout,
};
use tokio_stream::wrappers::ReceiverStream;
use tonic::Request;

use crate::{AT_ONCE, NAMESPACE, pipeline_name, replay_name};

/// What the runtimes have to do.
#[derive(Clone, Copy, PartialEq, Eq)]
pub(crate) enum Load {
    /// Nothing changes; a report every 10 s says that they are there.
    Idle,
    /// Changes come all the time; a report a second says how far they are.
    Streaming,
}

struct Resource {
    kind: &'static str,
    name: String,
}

/// Connects a runtime for each resource.
pub(crate) async fn start_all(
    client: &Client,
    endpoint: String,
    pipelines: usize,
    replays: usize,
    load: watch::Receiver<Load>,
) -> anyhow::Result<JoinSet<()>> {
    let captures = (0..pipelines).map(|number| Resource {
        kind: "CdcPipeline",
        name: pipeline_name(number),
    });
    let jobs = (0..replays).map(|number| Resource {
        kind: "ReplayJob",
        name: replay_name(number),
    });
    let connected: Vec<_> = stream::iter(captures.chain(jobs))
        .map(|resource| start(client, &endpoint, resource, load.clone()))
        .buffer_unordered(AT_ONCE)
        .try_collect()
        .await?;
    let mut tasks = JoinSet::new();
    for runtime in connected {
        tasks.spawn(runtime);
    }
    Ok(tasks)
}

async fn start(
    client: &Client,
    endpoint: &str,
    resource: Resource,
    load: watch::Receiver<Load>,
) -> anyhow::Result<impl Future<Output = ()> + use<>> {
    let name = &resource.name;
    let (uid, account, token) = match resource.kind {
        "CdcPipeline" => {
            let account = format!("{name}-capture");
            make_available(client, &account).await?;
            let pipelines: Api<CdcPipeline> = Api::namespaced(client.clone(), NAMESPACE);
            let labels = json!({"meander.dev/pipeline": name, "app.kubernetes.io/component": "capture"});
            let token = pod_and_token(client, &account, labels, json!([])).await?;
            (pipelines.get_metadata(name).await?.uid(), account, token)
        }
        _ => {
            let account = format!("{name}-replay");
            let jobs: Api<Job> = Api::namespaced(client.clone(), NAMESPACE);
            let owner = jobs.get(&account).await?.owner_ref(&()).context("the Job has no uid")?;
            let replays: Api<ReplayJob> = Api::namespaced(client.clone(), NAMESPACE);
            let labels = json!({"meander.dev/replay": name, "app.kubernetes.io/component": "replay"});
            let token = pod_and_token(client, &account, labels, json!([owner])).await?;
            (replays.get_metadata(name).await?.uid(), account, token)
        }
    };
    let reference = ResourceReference {
        kind: resource.kind.to_owned(),
        namespace: NAMESPACE.to_owned(),
        name: name.clone(),
        uid: uid.with_context(|| format!("{account} has no uid"))?,
    };
    let (reports, receiver) = mpsc::channel(4);
    reports.send(update(&reference, 0)).await?;
    let mut request = Request::new(ReceiverStream::new(receiver));
    let bearer = format!("Bearer {token}").parse()?;
    request.metadata_mut().insert("authorization", bearer);
    let mut operator = ProgressTrackerClient::connect(endpoint.to_owned()).await?;
    let directives = operator.report_progress(request).await?.into_inner();
    Ok(report(reports, directives, reference, load))
}

async fn report(
    reports: mpsc::Sender<ProgressUpdate>,
    mut directives: tonic::Streaming<meander_proto::v1::Directive>,
    reference: ResourceReference,
    mut load: watch::Receiver<Load>,
) {
    let mut round = 0;
    loop {
        let interval = match *load.borrow_and_update() {
            Load::Idle => Duration::from_secs(10),
            Load::Streaming => {
                round += 1;
                Duration::from_secs(1)
            }
        };
        if reports.send(update(&reference, round)).await.is_err() {
            return;
        }
        let news = async {
            tokio::select! {
                changed = load.changed() => changed.is_ok(),
                directive = directives.message() => matches!(directive, Ok(Some(_))),
            }
        };
        if timeout(interval, news).await == Ok(false) {
            return;
        }
    }
}

fn update(reference: &ResourceReference, round: u64) -> ProgressUpdate {
    let now = SystemTime::now().duration_since(UNIX_EPOCH).unwrap_or_default();
    let time_micros = i64::try_from(now.as_micros()).unwrap_or(i64::MAX);
    let good = |type_: &str| Condition {
        r#type: type_.to_owned(),
        status: true,
        reason: "Connected".to_owned(),
        message: "It is.".to_owned(),
    };
    let progress = match reference.kind.as_str() {
        "CdcPipeline" => Progress::Capture(CaptureProgress {
            received_lsn: 1 << 32 | round,
            published_lsn: 1 << 32 | round,
            confirmed_flush_lsn: 1 << 32 | round,
            events_total: round * 1000,
            epoch: 1,
            owner_generation: 1,
            kafka_position: format!("1:1/{round:X}:0"),
            captured_tables: 20,
            ..CaptureProgress::default()
        }),
        _ => Progress::Replay(ReplayProgress {
            phase: Phase::Running.into(),
            delivered: round * 1000,
            percent: 1.0,
            ..ReplayProgress::default()
        }),
    };
    ProgressUpdate {
        resource: Some(reference.clone()),
        time_micros,
        conditions: ["SourceReady", "SinksReady", "Progressing"].map(good).into(),
        progress: Some(progress),
    }
}

/// Plays the Deployment controller.
async fn make_available(client: &Client, name: &str) -> anyhow::Result<()> {
    let deployments: Api<Deployment> = Api::namespaced(client.clone(), NAMESPACE);
    let generation = deployments.get_metadata(name).await?.metadata.generation;
    let status = json!({"status": {
        "observedGeneration": generation, "replicas": 1, "updatedReplicas": 1, "readyReplicas": 1, "availableReplicas": 1,
    }});
    deployments
        .patch_status(name, &PatchParams::default(), &Patch::Merge(&status))
        .await?;
    Ok(())
}

/// A pod as the template makes it, as far as the operator looks at it, and the token that would be mounted.
async fn pod_and_token(client: &Client, account: &str, mut labels: Value, owners: Value) -> anyhow::Result<String> {
    labels["app.kubernetes.io/managed-by"] = json!("meander-operator");
    let name = format!("{account}-x");
    let pod: Pod = serde_json::from_value(json!({
        "metadata": {"name": name, "labels": labels, "ownerReferences": owners},
        "spec": {
            "serviceAccountName": account,
            "automountServiceAccountToken": false,
            "containers": [{"name": "runtime", "image": "meander-runtime:none"}],
        },
    }))?;
    let pods: Api<Pod> = Api::namespaced(client.clone(), NAMESPACE);
    let pod = pods.create(&PostParams::default(), &pod).await?;
    let request: TokenRequest = serde_json::from_value(json!({"spec": {
        "audiences": ["meander.dev"],
        "boundObjectRef": {"apiVersion": "v1", "kind": "Pod", "name": name, "uid": pod.uid()},
    }}))?;
    let accounts: Api<ServiceAccount> = Api::namespaced(client.clone(), NAMESPACE);
    let answer = accounts
        .create_token_request(account, &PostParams::default(), &request)
        .await?;
    Ok(answer.status.context("no token")?.token)
}

/// Whether the statuses say that everything runs.
pub(crate) async fn all_run(client: &Client) -> anyhow::Result<bool> {
    let pipelines: Api<CdcPipeline> = Api::namespaced(client.clone(), NAMESPACE);
    let replays: Api<ReplayJob> = Api::namespaced(client.clone(), NAMESPACE);
    let all = ListParams::default();
    let streams = |pipeline: &CdcPipeline| {
        let status = pipeline.status.as_ref();
        status.and_then(|status| status.phase) == Some(PipelinePhase::Streaming)
    };
    let runs = |replay: &ReplayJob| {
        let status = replay.status.as_ref();
        status.and_then(|status| status.phase) == Some(ReplayPhase::Running)
    };
    Ok(pipelines.list(&all).await?.iter().all(streams) && replays.list(&all).await?.iter().all(runs))
}

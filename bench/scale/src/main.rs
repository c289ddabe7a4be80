//! Measures the operator with many resources, whose pods exist in the API only, against a real API server with nothing behind it.
//!
//! The resources are there before the operator is. Once it has made everything for them, a client plays the runtime of each: first of an
//! idle pipeline or a paused replay, which says the same every 10 s, then of one with changes, which reports every second. What the operator
//! asks of the API server is counted by the API server's own audit log. `bench/run.sh scale` builds and runs it.

// A failure here is the measurement's failure.
#![allow(clippy::unwrap_used, clippy::expect_used, clippy::panic)]

mod audit;
mod operator;
#[path = "../../src/process.rs"]
mod process;
mod runtime;

use std::{
    fs,
    path::{Path, PathBuf},
    time::{Duration, Instant},
};

use anyhow::Context as _;
use clap::Parser;
use futures::{StreamExt as _, TryStreamExt as _, stream};
use k8s_openapi::{
    NamespaceResourceScope,
    api::{
        apps::v1::Deployment,
        batch::v1::Job,
        core::v1::{Namespace, Secret, ServiceAccount},
        rbac::v1::ClusterRoleBinding,
    },
    apiextensions_apiserver::pkg::apis::apiextensions::v1::CustomResourceDefinition,
};
use kube::{
    Api, Client, Resource, ResourceExt as _,
    api::{ListParams, Patch, PatchParams, PostParams},
    config::{KubeConfigOptions, Kubeconfig},
    runtime::wait::{await_condition, conditions::is_crd_established},
};
use meander_crds::{CdcPipeline, ReplayJob, generate::definitions};
use operator::Operator;
use serde::de::DeserializeOwned;
use serde_json::{Value, json};
use tokio::{sync::watch, time::sleep};

const NAMESPACE: &str = "scale";
const LIMIT: Duration = Duration::from_secs(600);
/// What is written in turns, as statuses are, has had its turn by then. Nothing that can be asked says so.
const TURNS: Duration = Duration::from_secs(15);
/// Requests of this client that are under way at once.
const AT_ONCE: usize = 16;

#[derive(Parser)]
struct Arguments {
    /// What `tests/cluster/apiserver.sh up` has made
    #[arg(long)]
    api_server: PathBuf,
    /// The operator's binary
    #[arg(long)]
    operator: PathBuf,
    /// How many CdcPipelines
    #[arg(long, default_value_t = 1000)]
    pipelines: usize,
    /// How many ReplayJobs
    #[arg(long, default_value_t = 1000)]
    replays: usize,
    /// How long requests are counted, in seconds, in each of the two states
    #[arg(long, default_value_t = 60)]
    window: u64,
}

#[tokio::main]
async fn main() -> anyhow::Result<()> {
    let arguments = Arguments::parse();
    let kubeconfig = Kubeconfig::read_from(arguments.api_server.join("kubeconfig"))?;
    let config = kube::Config::from_custom_kubeconfig(kubeconfig.clone(), &KubeConfigOptions::default()).await?;
    let client = Client::try_from(config)?;
    prepare(&client).await?;
    create::<CdcPipeline>(&client, pipelines(arguments.pipelines)?).await?;
    create::<ReplayJob>(&client, replays(arguments.replays)?).await?;

    let of_server = ServerCpu::of(&arguments.api_server)?;
    let operator = Operator::start(&arguments.operator, &arguments.api_server, &kubeconfig, &client).await?;
    let started = Instant::now();
    // A ServiceAccount, a ConfigMap and what runs.
    let objects = 3 * (arguments.pipelines + arguments.replays);
    eventually("everything is applied", async || {
        Ok(operator.metrics().await?.applied >= objects as f64)
    })
    .await?;
    let applied = started.elapsed();
    let start_cpu = operator.cpu_seconds()?;
    let of_server = ServerCpu::of(&arguments.api_server)?.since(&of_server);
    let found = count::<Deployment>(&client).await? + count::<Job>(&client).await?;
    anyhow::ensure!(
        found == arguments.pipelines + arguments.replays,
        "{found} Deployments and Jobs"
    );
    let at_start = operator.metrics().await?;
    let start_memory = operator.peak_resident()?;
    println!(
        "applied in {:.1} s, reconciles p50 {} p99 {}, peak resident {start_memory:.0} MiB, processor time: {start_cpu:.1} s, the API server {:.1} s, etcd {:.1} s",
        applied.as_secs_f64(),
        at_start.reconciles.quantile(0.5),
        at_start.reconciles.quantile(0.99),
        of_server.api_server,
        of_server.etcd,
    );

    let (load, rounds) = watch::channel(runtime::Load::Idle);
    let runtimes = runtime::start_all(&client, operator.grpc(), arguments.pipelines, arguments.replays, rounds).await?;
    eventually("everything runs", async || runtime::all_run(&client).await).await?;
    sleep(TURNS).await;
    let mut audit = audit::Audit::open(&arguments.api_server.join("audit.log"))?;
    // What is asked in a stretch of time is what is measured.
    let window = Duration::from_secs(arguments.window);
    sleep(window).await;
    let idle = audit.requests()?;
    idle.print("idle");

    load.send_replace(runtime::Load::Streaming);
    sleep(TURNS).await;
    audit.requests()?;
    let (before, cpu) = (operator.metrics().await?, operator.cpu_seconds()?);
    sleep(window).await;
    let streaming = audit.requests()?;
    streaming.print("streaming");
    let reconciles = operator.metrics().await?.reconciles.since(&before.reconciles);
    let cores = (operator.cpu_seconds()? - cpu) / window.as_secs_f64();
    let memory = operator.peak_resident()?;
    println!(
        "streaming: reconciles p99 {}, {cores:.2} cores, peak resident {memory:.0} MiB",
        reconciles.quantile(0.99)
    );
    let per_minute = |requests: u64| requests as f64 * 60.0 / window.as_secs_f64();
    println!(
        "{}",
        json!({
            "pipelines": arguments.pipelines,
            "replays": arguments.replays,
            "applied_seconds": applied.as_secs_f64(),
            "reconcile_p99_seconds": at_start.reconciles.quantile(0.99).to_string(),
            "start_cpu_seconds": start_cpu,
            "start_api_server_cpu_seconds": of_server.api_server,
            "start_etcd_cpu_seconds": of_server.etcd,
            "idle_requests_per_minute": per_minute(idle.total()),
            "streaming_status_patches_per_minute": per_minute(streaming.status_patches()),
            "streaming_most_patches_of_one": streaming.most_of_one(),
            "streaming_other_requests_per_minute": per_minute(streaming.total() - streaming.status_patches()),
            "streaming_reconcile_p99_seconds": reconciles.quantile(0.99).to_string(),
            "streaming_cores": cores,
            "start_peak_resident_mib": start_memory,
            "peak_resident_mib": memory,
        })
    );
    drop(runtimes);
    operator.stop().await
}

/// Processor time that the cluster's own parts have used, in seconds.
struct ServerCpu {
    api_server: f64,
    etcd: f64,
}

impl ServerCpu {
    /// Of those that `tests/cluster/apiserver.sh` has started: it keeps a list of number, time of start and name.
    fn of(folder: &Path) -> anyhow::Result<Self> {
        let started = fs::read_to_string(folder.join("processes"))?;
        let used = |name: &str| {
            let line = started.lines().find(|line| line.ends_with(name));
            let number = line
                .and_then(|line| line.split(' ').next())
                .context("no such process")?;
            process::cpu_seconds(number.parse()?)
        };
        Ok(Self {
            api_server: used(" kube-apiserver")?,
            etcd: used(" etcd")?,
        })
    }

    fn since(self, before: &Self) -> Self {
        Self {
            api_server: self.api_server - before.api_server,
            etcd: self.etcd - before.etcd,
        }
    }
}

/// Definitions, a namespace, and what every resource refers to.
async fn prepare(client: &Client) -> anyhow::Result<()> {
    let crds: Api<CustomResourceDefinition> = Api::all(client.clone());
    for definition in definitions()? {
        let name = definition.name_any();
        crds.patch(&name, &PatchParams::apply("bench").force(), &Patch::Apply(&definition))
            .await?;
        await_condition(crds.clone(), &name, is_crd_established()).await?;
    }
    let new = PostParams::default();
    let namespace: Namespace = serde_json::from_value(json!({"metadata": {"name": NAMESPACE}}))?;
    Api::<Namespace>::all(client.clone()).create(&new, &namespace).await?;
    let binding: ClusterRoleBinding = serde_json::from_value(json!({
        "metadata": {"name": "operator"},
        "roleRef": {"apiGroup": "rbac.authorization.k8s.io", "kind": "ClusterRole", "name": "cluster-admin"},
        "subjects": [{"kind": "ServiceAccount", "name": "operator", "namespace": NAMESPACE}],
    }))?;
    Api::<ClusterRoleBinding>::all(client.clone())
        .create(&new, &binding)
        .await?;
    create::<ServiceAccount>(client, vec![json!({"metadata": {"name": "operator"}})]).await?;
    let secrets = vec![
        json!({"metadata": {"name": "shop-cdc"}, "stringData": {"username": "u", "password": "p"}}),
        json!({"metadata": {"name": "shop-redis"}, "stringData": {"url": "redis://redis:6379"}}),
    ];
    create::<Secret>(client, secrets).await
}

async fn create<K>(client: &Client, values: Vec<Value>) -> anyhow::Result<()>
where
    K: Resource<DynamicType = (), Scope = NamespaceResourceScope>
        + Clone
        + std::fmt::Debug
        + DeserializeOwned
        + serde::Serialize,
{
    let api: Api<K> = Api::namespaced(client.clone(), NAMESPACE);
    stream::iter(values)
        .map(|value| {
            let api = api.clone();
            async move {
                let object: K = serde_json::from_value(value)?;
                api.create(&PostParams::default(), &object).await?;
                anyhow::Ok(())
            }
        })
        .buffer_unordered(AT_ONCE)
        .try_collect()
        .await
}

fn pipeline_name(number: usize) -> String {
    format!("p{number}")
}

fn replay_name(number: usize) -> String {
    format!("r{number}")
}

fn pipelines(count: usize) -> anyhow::Result<Vec<Value>> {
    let example: Value = serde_saphyr::from_str(include_str!("../../../deploy/examples/pipeline.yaml"))?;
    Ok((0..count)
        .map(|number| {
            let mut pipeline = example.clone();
            pipeline["metadata"]["name"] = json!(pipeline_name(number));
            pipeline["spec"]["sinks"]["kafka"]["topicPrefix"] = json!(pipeline_name(number));
            pipeline["spec"]["sinks"]["redis"]["streamPrefix"] = json!(pipeline_name(number));
            pipeline
        })
        .collect())
}

/// Each of a pipeline of its own, as far as there are so many.
fn replays(count: usize) -> anyhow::Result<Vec<Value>> {
    let example: Value = serde_saphyr::from_str(include_str!("../../../deploy/examples/replayjob-log.yaml"))?;
    Ok((0..count)
        .map(|number| {
            let mut replay = example.clone();
            replay["metadata"]["name"] = json!(replay_name(number));
            replay["spec"]["pipelineRef"]["name"] = json!(pipeline_name(number));
            replay
        })
        .collect())
}

async fn count<K>(client: &Client) -> anyhow::Result<usize>
where
    K: Resource<DynamicType = (), Scope = NamespaceResourceScope> + Clone + std::fmt::Debug + DeserializeOwned,
{
    let api: Api<K> = Api::namespaced(client.clone(), NAMESPACE);
    Ok(api.list_metadata(&ListParams::default()).await?.items.len())
}

/// Waits until something is so.
async fn eventually(what: &'static str, mut check: impl AsyncFnMut() -> anyhow::Result<bool>) -> anyhow::Result<()> {
    let deadline = Instant::now() + LIMIT;
    loop {
        let result = check().await;
        if let Ok(true) = result {
            return Ok(());
        }
        if Instant::now() > deadline {
            result.context(what)?;
            anyhow::bail!("never: {what}");
        }
        sleep(Duration::from_millis(200)).await;
    }
}

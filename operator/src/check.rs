//! Looks once whether an installation works: what `helm test` runs.

use std::time::Duration;

use anyhow::{Context as _, bail, ensure};
use http_body_util::Empty;
use hyper::{Request, StatusCode, Uri, body::Bytes};
use hyper_util::{
    client::legacy::{Client as HttpClient, connect::HttpConnector},
    rt::TokioExecutor,
};
use kube::Client;
use meander_crds::generate;
use serde_json::{Map, Value};
use tokio::time::{Instant, sleep, timeout_at};
use tracing::info;

/// A Service knows its pods a moment after they are ready.
const PATIENCE: Duration = Duration::from_secs(30);
const AGAIN: Duration = Duration::from_millis(500);
/// Of fields that are missing, as many are named.
const NAMED: usize = 5;
const REMEDY: &str = "run `kubectl apply --server-side --force-conflicts -f <chart>/crds/`";

/// What is looked at.
#[derive(Clone, Debug, clap::Args)]
pub struct Options {
    /// Where the operator says that it is ready, such as `http://meander-operator.meander-system.svc:9464/readyz`.
    #[arg(long)]
    pub ready_url: Uri,
}

/// Looks at the resources' definitions and at the operator.
///
/// # Errors
/// When something is not as it has to be; what to do is in the error.
pub async fn run(client: Client, options: &Options) -> anyhow::Result<()> {
    definitions(&client).await?;
    info!("the API server has every field of the resources");
    ready(&options.ready_url).await?;
    info!("the operator is ready");
    Ok(())
}

/// Whether the API server has every field that this operator knows. What it does not know, it drops without a word.
///
/// # Errors
/// When it cannot be asked, or lacks some.
pub async fn definitions(client: &Client) -> anyhow::Result<()> {
    let request = Request::get("/openapi/v3/apis/meander.dev/v1alpha1").body(Vec::new())?;
    let served: Value = match client.request(request).await {
        Err(kube::Error::Api(status)) if status.code == 404 => {
            bail!("the API server does not serve meander.dev/v1alpha1; {REMEDY}")
        }
        answer => answer.context("asking the API server for its definitions")?,
    };
    let mut missing = Vec::new();
    for definition in generate::definitions()? {
        let kind = &definition.spec.names.kind;
        let own = serde_json::to_value(&definition)?;
        let own = &own["spec"]["versions"][0]["schema"]["openAPIV3Schema"];
        let served = &served["components"]["schemas"][format!("dev.meander.v1alpha1.{kind}")];
        lacking(kind, own, served, &mut missing);
    }
    let named = missing.iter().take(NAMED).cloned().collect::<Vec<_>>().join(", ");
    ensure!(
        missing.is_empty(),
        "the API server drops {} fields of the resources, such as {named}: their definitions are older than this operator; {REMEDY}",
        missing.len(),
    );
    Ok(())
}

/// The fields that one schema has and another lacks.
fn lacking(path: &str, own: &Value, served: &Value, missing: &mut Vec<String>) {
    let fields = own.get("properties").and_then(Value::as_object);
    for (name, field) in fields.into_iter().flat_map(Map::iter) {
        let path = format!("{path}.{name}");
        match served.get("properties").and_then(|served| served.get(name)) {
            Some(served) => lacking(&path, field, served, missing),
            None => missing.push(path),
        }
    }
    for inner in ["items", "additionalProperties"] {
        if let (Some(own), Some(served)) = (own.get(inner), served.get(inner)) {
            lacking(path, own, served, missing);
        }
    }
}

async fn ready(url: &Uri) -> anyhow::Result<()> {
    let client: HttpClient<HttpConnector, Empty<Bytes>> = HttpClient::builder(TokioExecutor::new()).build_http();
    let end = Instant::now() + PATIENCE;
    loop {
        let answer = match timeout_at(end, client.get(url.clone())).await {
            Ok(Ok(response)) if response.status() == StatusCode::OK => return Ok(()),
            Ok(Ok(response)) => format!("says {}", response.status()),
            Ok(Err(error)) => format!("cannot be reached: {:#}", anyhow::Error::from(error)),
            Err(_) => "does not answer".to_owned(),
        };
        ensure!(
            Instant::now() + AGAIN < end,
            "the operator at {url} {answer}; see the logs of its pods"
        );
        // Nothing tells when it will be.
        sleep(AGAIN).await;
    }
}

//! The operator as a process, what it costs and what it counts.

use std::{fmt, fs, net::TcpListener, path::Path, process::Stdio};

use anyhow::Context as _;
use k8s_openapi::api::{authentication::v1::TokenRequest, core::v1::ServiceAccount};
use kube::{Api, Client, api::PostParams, config::Kubeconfig};
use serde_json::json;
use tokio::{
    io::{AsyncReadExt as _, AsyncWriteExt as _},
    net::TcpStream,
    process::{Child, Command},
};

use crate::{NAMESPACE, process};

pub(crate) struct Operator {
    process: Child,
    grpc: String,
    admin: String,
}

impl Operator {
    /// Starts it as a service account, which the audit log knows it by. Its own log goes to `operator.log` in `folder`.
    pub(crate) async fn start(
        binary: &Path,
        folder: &Path,
        kubeconfig: &Kubeconfig,
        client: &Client,
    ) -> anyhow::Result<Self> {
        let accounts: Api<ServiceAccount> = Api::namespaced(client.clone(), NAMESPACE);
        let request: TokenRequest = serde_json::from_value(json!({"spec": {"audiences": []}}))?;
        let token = accounts
            .create_token_request("operator", &PostParams::default(), &request)
            .await?;
        let token = token.status.context("no token")?.token;
        // The same cluster, as another user.
        let mut config = serde_json::to_value(kubeconfig)?;
        config["users"][0]["user"] = json!({"token": token});
        let path = folder.join("operator-kubeconfig");
        fs::write(&path, config.to_string())?;
        let free = || anyhow::Ok(TcpListener::bind("127.0.0.1:0")?.local_addr()?.to_string());
        let (grpc, admin) = (free()?, free()?);
        let log = fs::File::create(folder.join("operator.log"))?;
        let process = Command::new(binary)
            .env("KUBECONFIG", &path)
            .args([
                "--runtime-image",
                "meander-runtime:none",
                "--lease-namespace",
                NAMESPACE,
                "--identity",
                "bench",
            ])
            .args([
                "--progress-endpoint",
                &format!("http://{grpc}"),
                "--grpc-address",
                &grpc,
                "--admin-address",
                &admin,
            ])
            .stdin(Stdio::null())
            .stdout(log.try_clone()?)
            .stderr(log)
            .kill_on_drop(true)
            .spawn()?;
        Ok(Self { process, grpc, admin })
    }

    pub(crate) fn grpc(&self) -> String {
        format!("http://{}", self.grpc)
    }

    pub(crate) async fn metrics(&self) -> anyhow::Result<Metrics> {
        let mut stream = TcpStream::connect(&self.admin).await?;
        let request = format!(
            "GET /metrics HTTP/1.1\r\nhost: {}\r\nconnection: close\r\n\r\n",
            self.admin
        );
        stream.write_all(request.as_bytes()).await?;
        let mut text = String::new();
        stream.read_to_string(&mut text).await?;
        Ok(Metrics::parse(&text))
    }

    pub(crate) fn cpu_seconds(&self) -> anyhow::Result<f64> {
        process::cpu_seconds(self.process.id().context("it has ended")?)
    }

    pub(crate) fn peak_resident(&self) -> anyhow::Result<f64> {
        process::peak_resident(self.process.id().context("it has ended")?)
    }

    pub(crate) async fn stop(mut self) -> anyhow::Result<()> {
        Ok(self.process.kill().await?)
    }
}

/// What the operator counts, as far as it matters here.
#[derive(Default)]
pub(crate) struct Metrics {
    pub(crate) applied: f64,
    pub(crate) reconciles: Histogram,
}

impl Metrics {
    fn parse(text: &str) -> Self {
        let mut metrics = Self::default();
        for line in text.lines() {
            let Some((name, value)) = line.rsplit_once(' ') else {
                continue;
            };
            let Ok(value) = value.parse::<f64>() else { continue };
            if name.starts_with("meander_operator_applies_total{") && name.contains("\"written\"") {
                metrics.applied = value;
            } else if name.starts_with("meander_operator_reconcile_seconds_bucket{") {
                let bound = name.split("le=\"").nth(1).and_then(|rest| rest.split('"').next());
                let bound = bound.map_or(f64::INFINITY, |bound| bound.parse().unwrap_or(f64::INFINITY));
                metrics.reconciles.add(bound, value);
            }
        }
        metrics
    }
}

/// Counts up to each bound, of both kinds together.
#[derive(Default)]
pub(crate) struct Histogram(Vec<(f64, f64)>);

/// A quantile is known by the bounds around it.
pub(crate) struct Within(f64);

impl fmt::Display for Within {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "<= {} s", self.0)
    }
}

impl Histogram {
    fn add(&mut self, bound: f64, count: f64) {
        match self.0.iter_mut().find(|(known, _)| *known == bound) {
            Some((_, sum)) => *sum += count,
            None => self.0.push((bound, count)),
        }
    }

    pub(crate) fn since(&self, before: &Self) -> Self {
        let count_before = |bound| {
            before
                .0
                .iter()
                .find(|(known, _)| *known == bound)
                .map_or(0.0, |(_, count)| *count)
        };
        Self(
            self.0
                .iter()
                .map(|(bound, count)| (*bound, count - count_before(*bound)))
                .collect(),
        )
    }

    pub(crate) fn quantile(&self, quantile: f64) -> Within {
        let total = self.0.iter().map(|(_, count)| *count).fold(0.0, f64::max);
        let bounds = self.0.iter().filter(|(_, count)| *count >= total * quantile);
        Within(bounds.map(|(bound, _)| *bound).fold(f64::INFINITY, f64::min))
    }
}

//! What the operator's process tells a collector of traces.

use std::{fs::File, process::Stdio};

use meander_crds::CdcPipeline;
use meander_test_support::collector::{Collector, Span, attribute};
use tokio::process::Command;

use super::{Cluster, TcpListener, eventually, pipeline_json, reconciles};

#[tokio::test(flavor = "multi_thread")]
async fn a_reconcile_is_a_trace_with_its_requests_once_the_collector_is_there() {
    let cluster = Cluster::new().await;
    // Its Secrets are missing, so that it is reconciled again and again.
    cluster.create::<CdcPipeline>(pipeline_json("trades")).await;
    let free = || TcpListener::bind("127.0.0.1:0").unwrap().local_addr().unwrap();
    let (collector, grpc, admin) = (free(), free().to_string(), free());
    let endpoint = format!("http://{grpc}");
    let log = cluster.server.folder.join(format!("{}.log", cluster.namespace));
    let operator = Command::new(env!("CARGO_BIN_EXE_meander-operator"))
        .env("KUBECONFIG", cluster.server.folder.join("kubeconfig"))
        .env("OTEL_EXPORTER_OTLP_ENDPOINT", format!("http://{collector}"))
        .env("OTEL_BSP_SCHEDULE_DELAY", "200")
        .args([
            "--namespace",
            &cluster.namespace,
            "--lease-namespace",
            &cluster.namespace,
        ])
        .args(["--identity", "test", "--runtime-image", "meander-runtime:test"])
        .args([
            "--progress-endpoint",
            &endpoint,
            "--grpc-address",
            &grpc,
            "--admin-address",
            &admin.to_string(),
        ])
        .stdin(Stdio::null())
        .stdout(File::create(&log).unwrap())
        .kill_on_drop(true)
        .spawn()
        .unwrap();
    let says = |words: &str| std::fs::read_to_string(&log).unwrap().matches(words).count();
    eventually("it is said that nobody takes them", async || {
        says("traces are lost") == 1
    })
    .await;
    eventually("the work goes on", async || reconciles(admin).await >= 3).await;
    assert_eq!(says("traces are lost"), 1);

    let collector = Collector::start(collector).await;
    eventually("a reconcile and what it asked for are told", async || {
        let spans = collector.spans();
        let has = |span: &Span, key: &str, text: &str| attribute(span, key).is_some_and(|value| value.contains(text));
        let reconcile = |span: &&Span| {
            span.name == "reconcile"
                && has(span, "kind", "CdcPipeline")
                && has(span, "namespace", &cluster.namespace)
                && has(span, "name", "trades")
                && span
                    .status
                    .as_ref()
                    .is_some_and(|status| status.message.contains("shop-cdc"))
        };
        spans.iter().filter(reconcile).any(|reconcile| {
            let part =
                |span: &Span| span.parent_span_id == reconcile.span_id && has(span, "http.url", "/secrets/shop-cdc");
            spans.iter().any(part)
        })
    })
    .await;
    drop(operator);
}

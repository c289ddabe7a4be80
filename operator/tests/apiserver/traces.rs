//! What the operator's process tells a collector of traces.

use std::{fs::File, process::Stdio};

use meander_crds::CdcPipeline;
use opentelemetry_proto::tonic::{
    collector::trace::v1::{
        ExportTraceServiceRequest, ExportTraceServiceResponse,
        trace_service_server::{TraceService, TraceServiceServer},
    },
    common::v1::any_value::Value,
    trace::v1::Span,
};
use tokio::{process::Command, sync::watch};
use tokio_stream::wrappers::TcpListenerStream;
use tonic::{Response, Status, transport::Server};

use super::{Cluster, Request, TcpListener, eventually, pipeline_json};

/// Keeps every span.
struct Collector(watch::Sender<Vec<Span>>);

#[tonic::async_trait]
impl TraceService for Collector {
    async fn export(
        &self,
        request: Request<ExportTraceServiceRequest>,
    ) -> Result<Response<ExportTraceServiceResponse>, Status> {
        let resources = request.into_inner().resource_spans.into_iter();
        let scopes = resources.flat_map(|resource| resource.scope_spans);
        let spans = scopes.flat_map(|scope| scope.spans);
        self.0.send_modify(|kept| kept.extend(spans));
        Ok(Response::new(ExportTraceServiceResponse::default()))
    }
}

fn has(span: &Span, key: &str, text: &str) -> bool {
    span.attributes.iter().any(|attribute| {
        let value = attribute.value.as_ref().and_then(|value| value.value.as_ref());
        attribute.key == key && matches!(value, Some(Value::StringValue(value)) if value.contains(text))
    })
}

#[tokio::test(flavor = "multi_thread")]
async fn a_reconcile_is_a_trace_with_its_requests_once_the_collector_is_there() {
    let cluster = Cluster::new().await;
    // Its Secrets are missing, so that it is reconciled again and again.
    cluster.create::<CdcPipeline>(pipeline_json("trades")).await;
    let free = || TcpListener::bind("127.0.0.1:0").unwrap().local_addr().unwrap();
    let (collector, grpc, admin) = (free(), free().to_string(), free().to_string());
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
            &admin,
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
    eventually("the work goes on", async || says("cannot finish") >= 3).await;
    assert_eq!(says("traces are lost"), 1);

    let (kept, spans) = watch::channel(Vec::new());
    let listener = tokio::net::TcpListener::bind(collector).await.unwrap();
    let service = TraceServiceServer::new(Collector(kept));
    let server = tokio::spawn(
        Server::builder()
            .add_service(service)
            .serve_with_incoming(TcpListenerStream::new(listener)),
    );
    eventually("a reconcile and what it asked for are told", async || {
        let spans = spans.borrow();
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
    server.abort();
}

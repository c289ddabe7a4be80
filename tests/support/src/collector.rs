//! A collector of traces that keeps what it is told.

use std::net::SocketAddr;

/// What it is told.
pub use opentelemetry_proto::tonic::trace::v1::Span;
use opentelemetry_proto::tonic::{
    collector::trace::v1::{
        ExportTraceServiceRequest, ExportTraceServiceResponse,
        trace_service_server::{TraceService, TraceServiceServer},
    },
    common::v1::any_value::Value,
};
use tokio::{net::TcpListener, sync::watch, task::JoinHandle};
use tokio_stream::wrappers::TcpListenerStream;
use tonic::{Request, Response, Status, transport::Server};

/// Keeps every span.
pub struct Collector {
    spans: watch::Receiver<Vec<Span>>,
    server: JoinHandle<Result<(), tonic::transport::Error>>,
}

impl Collector {
    /// One that takes OTLP over gRPC at this address.
    ///
    /// # Panics
    /// When the address is taken.
    pub async fn start(address: SocketAddr) -> Self {
        let (kept, spans) = watch::channel(Vec::new());
        let listener = TcpListener::bind(address).await.unwrap();
        let server = Server::builder()
            .add_service(TraceServiceServer::new(Kept(kept)))
            .serve_with_incoming(TcpListenerStream::new(listener));
        Self {
            spans,
            server: tokio::spawn(server),
        }
    }

    /// The spans that it was told so far.
    #[must_use]
    pub fn spans(&self) -> Vec<Span> {
        self.spans.borrow().clone()
    }
}

impl Drop for Collector {
    fn drop(&mut self) {
        self.server.abort();
    }
}

/// An attribute of a span, as text; none if it has none of this name.
#[must_use]
pub fn attribute(span: &Span, name: &str) -> Option<String> {
    let attribute = span.attributes.iter().find(|attribute| attribute.key == name)?;
    match attribute.value.as_ref()?.value.as_ref()? {
        Value::StringValue(text) => Some(text.clone()),
        Value::IntValue(number) => Some(number.to_string()),
        other => Some(format!("{other:?}")),
    }
}

struct Kept(watch::Sender<Vec<Span>>);

#[tonic::async_trait]
impl TraceService for Kept {
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

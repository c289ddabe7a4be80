//! Traces, by OTLP over gRPC, to a collector that is named as OpenTelemetry has it: by `OTEL_EXPORTER_OTLP_ENDPOINT`.
//!
//! Every reconcile is a trace, and each request of the API server that it makes is a part of that. Other requests are traces of their own.

use std::{
    env,
    sync::atomic::{AtomicBool, Ordering},
    time::Duration,
};

use anyhow::Context as _;
use opentelemetry::trace::TracerProvider as _;
use opentelemetry_otlp::{OTEL_EXPORTER_OTLP_ENDPOINT, OTEL_EXPORTER_OTLP_TRACES_ENDPOINT, WithTonicConfig as _};
use opentelemetry_sdk::{
    Resource,
    error::OTelSdkResult,
    trace::{SdkTracerProvider, SpanData, SpanExporter},
};
use tonic::transport::ClientTlsConfig;
use tracing::{Level, Subscriber, info, warn};
use tracing_subscriber::{Layer, filter::Targets, registry::LookupSpan};

use crate::naming::FIELD_MANAGER;

/// What is left at the end has this long to go out.
const PARTING: Duration = Duration::from_secs(2);

/// What reconciles do, on its way to a collector. What that does not take in time is dropped.
#[derive(Debug)]
pub struct Traces(SdkTracerProvider);

impl Traces {
    /// None where no collector is named. One that cannot be reached is no error.
    ///
    /// # Errors
    /// When what the environment says of it makes no sense.
    pub fn configured() -> anyhow::Result<Option<Self>> {
        let is_named = |name| env::var_os(name).is_some_and(|endpoint| !endpoint.is_empty());
        if !is_named(OTEL_EXPORTER_OTLP_TRACES_ENDPOINT) && !is_named(OTEL_EXPORTER_OTLP_ENDPOINT) {
            return Ok(None);
        }
        let exporter = opentelemetry_otlp::SpanExporter::builder()
            .with_tonic()
            .with_tls_config(ClientTlsConfig::new().with_webpki_roots())
            .build()
            .context("the collector of traces that OTEL_EXPORTER_OTLP_ENDPOINT names")?;
        let mut resource = Resource::builder();
        if !is_named("OTEL_SERVICE_NAME") {
            resource = resource.with_service_name(FIELD_MANAGER);
        }
        let provider = SdkTracerProvider::builder()
            .with_resource(resource.build())
            .with_batch_exporter(Telling {
                exporter,
                fails: AtomicBool::new(false),
            })
            .build();
        Ok(Some(Self(provider)))
    }

    /// What takes the spans of the operator, and of its requests.
    pub fn layer<S: Subscriber + for<'a> LookupSpan<'a>>(&self) -> impl Layer<S> + use<S> {
        let spans = Targets::new()
            .with_target("meander_operator", Level::INFO)
            .with_target("kube_client::client::builder", Level::DEBUG);
        tracing_opentelemetry::layer()
            .with_tracer(self.0.tracer(FIELD_MANAGER))
            .with_location(false)
            .with_threads(false)
            .with_filter(spans)
    }

    /// Sends what is left.
    pub fn end(&self) {
        // Whoever did not take it has been told of.
        let _ = self.0.shutdown_with_timeout(PARTING);
    }
}

/// Says once that nobody takes the spans, and once that somebody does again.
#[derive(Debug)]
struct Telling<E> {
    exporter: E,
    fails: AtomicBool,
}

impl<E: SpanExporter> SpanExporter for Telling<E> {
    async fn export(&self, batch: Vec<SpanData>) -> OTelSdkResult {
        let result = self.exporter.export(batch).await;
        match (&result, self.fails.swap(result.is_err(), Ordering::Relaxed)) {
            (Err(error), false) => warn!(%error, "traces are lost: their collector does not take them"),
            (Ok(()), true) => info!("traces are taken again"),
            _ => {}
        }
        result
    }

    fn set_resource(&mut self, resource: &Resource) {
        self.exporter.set_resource(resource);
    }
}

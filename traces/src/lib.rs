//! Traces, by OTLP over gRPC, to a collector that is named as OpenTelemetry has it: by `OTEL_EXPORTER_OTLP_ENDPOINT`.
//!
//! What does not reach the collector in time is dropped: nothing waits for it, and what waits to be sent is bounded.

use std::{
    env,
    fmt::Display,
    sync::atomic::{AtomicBool, Ordering},
    time::Duration,
};

use opentelemetry::trace::TracerProvider as _;
use opentelemetry_otlp::{
    ExporterBuildError, OTEL_EXPORTER_OTLP_ENDPOINT, OTEL_EXPORTER_OTLP_TRACES_ENDPOINT, WithTonicConfig as _,
};
use opentelemetry_sdk::{
    Resource,
    error::OTelSdkResult,
    trace::{SdkTracerProvider, SpanData, SpanExporter},
};
use tonic::transport::ClientTlsConfig;
use tracing::{Instrument as _, Span, Subscriber, field::display, info, warn};
use tracing_subscriber::{Layer, filter::Targets, registry::LookupSpan};

const PASSED_ON: [&str; 4] = [
    OTEL_EXPORTER_OTLP_ENDPOINT,
    OTEL_EXPORTER_OTLP_TRACES_ENDPOINT,
    "OTEL_TRACES_SAMPLER",
    "OTEL_TRACES_SAMPLER_ARG",
];

/// What is left at the end has this long to go out.
const PARTING: Duration = Duration::from_secs(2);

/// The variables by which a process that this one starts tells the same collector, and as much of what it does, with their values. Headers are none
/// of them: they can be secret.
#[must_use]
pub fn passed_on() -> Vec<(&'static str, String)> {
    let values = PASSED_ON.map(|name| Some((name, env::var(name).ok()?)));
    values
        .into_iter()
        .flatten()
        .filter(|(_, value)| !value.is_empty())
        .collect()
}

/// What the environment says of a collector makes no sense.
#[derive(Debug, thiserror::Error)]
#[error("the collector of traces that OTEL_EXPORTER_OTLP_ENDPOINT names: {0}")]
pub struct Misnamed(#[from] ExporterBuildError);

/// Spans on their way to a collector.
#[derive(Debug)]
pub struct Traces {
    provider: SdkTracerProvider,
    service: &'static str,
}

impl Traces {
    /// Those of a service; none where no collector is named. One that cannot be reached is no error. To be called within a Tokio runtime.
    ///
    /// # Errors
    /// When what the environment says of it makes no sense.
    pub fn configured(service: &'static str) -> Result<Option<Self>, Misnamed> {
        let is_named = |name| env::var_os(name).is_some_and(|endpoint| !endpoint.is_empty());
        if !is_named(OTEL_EXPORTER_OTLP_TRACES_ENDPOINT) && !is_named(OTEL_EXPORTER_OTLP_ENDPOINT) {
            return Ok(None);
        }
        let exporter = opentelemetry_otlp::SpanExporter::builder()
            .with_tonic()
            .with_tls_config(ClientTlsConfig::new().with_webpki_roots())
            .build()?;
        let mut resource = Resource::builder();
        if !is_named("OTEL_SERVICE_NAME") {
            resource = resource.with_service_name(service);
        }
        let provider = SdkTracerProvider::builder()
            .with_resource(resource.build())
            .with_batch_exporter(Telling {
                exporter,
                fails: AtomicBool::new(false),
            })
            .build();
        Ok(Some(Self { provider, service }))
    }

    /// What takes the spans of these targets.
    pub fn layer<S: Subscriber + for<'a> LookupSpan<'a>>(&self, targets: Targets) -> impl Layer<S> + use<S> {
        tracing_opentelemetry::layer()
            .with_tracer(self.provider.tracer(self.service))
            .with_location(false)
            .with_threads(false)
            .with_filter(targets)
    }

    /// Sends what is left. Blocks, for two seconds at the most.
    pub fn end(&self) {
        // Whoever did not take it has been told of.
        let _ = self.provider.shutdown_with_timeout(PARTING);
    }
}

/// A span of a step that can fail, with more fields where it has some. It costs nothing where nobody traces.
#[macro_export]
macro_rules! step {
    ($name:literal $(, $($fields:tt)+)?) => {
        tracing::info_span!(
            $name,
            otel.status_code = tracing::field::Empty,
            otel.status_description = tracing::field::Empty
            $(, $($fields)+)?
        )
    };
}

/// Does the work of a [`step!`], and notes the error that it ends with.
///
/// # Errors
/// As the work.
pub async fn step<T, E: Display>(span: Span, work: impl Future<Output = Result<T, E>>) -> Result<T, E> {
    let result = work.instrument(span.clone()).await;
    note(&span, &result);
    result
}

/// Notes the error that a [`step!`] ends with.
pub fn note<T, E: Display>(span: &Span, result: &Result<T, E>) {
    if let Err(error) = result {
        span.record("otel.status_code", "ERROR");
        span.record("otel.status_description", display(error));
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

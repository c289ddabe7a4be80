//! The operator's binary.

use std::env;

use anyhow::Context as _;
use clap::{Parser, Subcommand};
use kube::Config;
use meander_operator::{
    check,
    client::client,
    naming::FIELD_MANAGER,
    operator::{Options, run},
};
use meander_traces::Traces;
use mimalloc::MiMalloc;
use tokio::{
    signal::unix::{SignalKind, signal},
    task::spawn_blocking,
};
use tokio_util::sync::CancellationToken;
use tracing::{Level, warn};
use tracing_subscriber::{
    EnvFilter, Layer as _,
    filter::{ParseError, Targets},
    layer::SubscriberExt as _,
    util::SubscriberInitExt as _,
};

#[global_allocator]
static ALLOCATOR: MiMalloc = MiMalloc;

/// The Kubernetes operator of Meander.
#[derive(Parser)]
#[command(version, subcommand_negates_reqs = true)]
struct Arguments {
    #[command(flatten)]
    options: Option<Options>,
    #[command(subcommand)]
    command: Option<Command>,
}

#[derive(Subcommand)]
enum Command {
    /// Look once whether an installation works.
    Check(check::Options),
}

#[tokio::main]
async fn main() -> anyhow::Result<()> {
    let arguments = Arguments::parse();
    let (filter, refused) = filter();
    let log = tracing_subscriber::fmt::layer()
        .json()
        .flatten_event(true)
        // What a line is about is said in its own fields.
        .with_current_span(false)
        .with_span_list(false)
        .with_filter(filter);
    let (traces, untraced) = match Traces::configured(FIELD_MANAGER) {
        Ok(traces) => (traces, None),
        Err(error) => (None, Some(error)),
    };
    tracing_subscriber::registry()
        .with(log)
        .with(traces.as_ref().map(|traces| traces.layer(traced())))
        .init();
    if let Some(error) = refused {
        warn!(%error, "RUST_LOG cannot be read: the level is info");
    }
    if let Some(error) = untraced {
        warn!(%error, "there are no traces");
    }
    let config = Config::infer().await.context("finding the cluster")?;
    let client = client(config).context("finding the cluster")?;
    if let Some(Command::Check(options)) = arguments.command {
        return check::run(client, &options).await;
    }
    let options = arguments.options.context("nothing says how to run; see --help")?;
    let (mut terminate, mut interrupt) = (signal(SignalKind::terminate())?, signal(SignalKind::interrupt())?);
    let shutdown = CancellationToken::new();
    let signalled = async {
        tokio::select! {
            _ = terminate.recv() => {}
            _ = interrupt.recv() => {}
        }
        shutdown.cancel();
        std::future::pending().await
    };
    let result = tokio::select! {
        result = run(options, client, shutdown.clone()) => result,
        () = signalled => Ok(()),
    };
    if let Some(traces) = traces {
        spawn_blocking(move || traces.end()).await?;
    }
    result
}

/// What the operator does is told, and what it asks of the API server for that.
fn traced() -> Targets {
    Targets::new()
        .with_target("meander_operator", Level::INFO)
        .with_target("kube_client::client::builder", Level::DEBUG)
}

/// What is logged, by RUST_LOG, and why that cannot be read.
fn filter() -> (EnvFilter, Option<ParseError>) {
    let asked = env::var_os(EnvFilter::DEFAULT_ENV).unwrap_or_else(|| "info".into());
    match EnvFilter::try_new(asked.to_string_lossy()) {
        Ok(filter) => (filter, None),
        Err(error) => (EnvFilter::new("info"), Some(error)),
    }
}

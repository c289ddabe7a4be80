//! The command line of `meander-runtime`.

use std::{env, error::Error, io::IsTerminal as _, path::PathBuf, process::ExitCode, time::Duration};

use clap::{Parser, Subcommand};
use meander_runtime::{
    capture,
    replay::{self, error::ReplayError},
};
use meander_traces::Traces;
use tokio::{
    signal::unix::{SignalKind, signal},
    task::spawn_blocking,
};
use tokio_util::sync::CancellationToken;
use tracing::Level;
use tracing_subscriber::{
    EnvFilter, Layer as _,
    filter::{FilterExt as _, LevelFilter, ParseError, Targets, filter_fn},
    fmt,
    layer::{Filter, SubscriberExt as _},
    util::SubscriberInitExt as _,
};

#[global_allocator]
static ALLOCATOR: mimalloc::MiMalloc = mimalloc::MiMalloc;

/// How long the process waits at its end for calls that block, such as a write to a pipe that nobody reads.
const PARTING: Duration = Duration::from_secs(1);

/// What it is called in traces, unless OTEL_SERVICE_NAME says something else.
const SERVICE: &str = "meander-runtime";

/// Captures the changes of a PostgreSQL database, publishes them to Kafka and Redis, and replays them.
#[derive(Parser)]
#[command(version)]
struct Arguments {
    #[command(subcommand)]
    command: Command,
}

#[derive(Subcommand)]
enum Command {
    /// Capture changes until told to stop.
    Capture(Config),
    /// Replay a stretch of the log, and end.
    Replay(Config),
    /// Take away the replication slot and the managed publication of a capture.
    Cleanup(Config),
}

impl Command {
    /// A change that comes alone wakes whoever reads it, whoever writes it to Redis, and whoever hears the answer. On one thread that takes no switch
    /// from one to the other, which costs as much as what there is to do. Publishing into Kafka blocks, and has a thread of its own.
    fn threads(&self) -> tokio::runtime::Builder {
        match self {
            Self::Capture(_) => tokio::runtime::Builder::new_current_thread(),
            Self::Replay(_) | Self::Cleanup(_) => tokio::runtime::Builder::new_multi_thread(),
        }
    }
}

#[derive(clap::Args)]
struct Config {
    /// The configuration file, YAML.
    #[arg(long)]
    config: PathBuf,
}

fn main() -> ExitCode {
    // A dozen threads take memory in small pieces: most of each huge page would be held for nothing, and a replay has the kernel clear
    // one after the other. A kernel that has none refuses, which is as good.
    let _ = rustix::thread::disable_transparent_huge_pages(true);
    let command = Arguments::parse().command;
    let runtime = match command.threads().enable_all().build() {
        Ok(runtime) => runtime,
        Err(error) => {
            eprintln!("cannot start: {error}");
            return ExitCode::FAILURE;
        }
    };
    let traces = {
        let _runtime = runtime.enter();
        log()
    };
    let result = runtime.block_on(run(command));
    let code = match result {
        Ok(()) => ExitCode::SUCCESS,
        Err(error) => {
            tracing::error!(error = chain(error.as_ref()), "ended");
            match error.downcast_ref::<ReplayError>() {
                Some(error) if error.is_permanent() => ExitCode::from(meander_config::EXIT_PERMANENT),
                _ => ExitCode::FAILURE,
            }
        }
    };
    if let Some(traces) = traces {
        // While the runtime runs, which has its connection. What it says of its end has been told of.
        let _ = runtime.block_on(async { spawn_blocking(move || traces.end()).await });
    }
    runtime.shutdown_timeout(PARTING);
    code
}

/// Begins to log, and to trace where that is asked for.
fn log() -> Option<Traces> {
    let (filter, refused) = filter();
    let (traces, untraced) = match Traces::configured(SERVICE) {
        Ok(traces) => (traces, None),
        Err(error) => (None, Some(error)),
    };
    // Standard output belongs to a replay into the log.
    let lines = fmt::layer().with_writer(std::io::stderr);
    let lines = if std::io::stderr().is_terminal() {
        lines.with_filter(without_spans(filter)).boxed()
    } else {
        lines
            .json()
            .flatten_event(true)
            .with_filter(without_spans(filter))
            .boxed()
    };
    let traced = || Targets::new().with_target("meander_runtime", Level::INFO);
    tracing_subscriber::registry()
        .with(lines)
        .with(traces.as_ref().map(|traces| traces.layer(traced())))
        .init();
    if let Some(error) = refused {
        tracing::warn!(%error, "RUST_LOG cannot be read: the level is info");
    }
    if let Some(error) = untraced {
        tracing::warn!(%error, "there are no traces");
    }
    traces
}

/// Spans are no lines. Where nobody traces, nobody takes them then, and so they cost nothing.
fn without_spans<S>(filter: EnvFilter) -> impl Filter<S> {
    // Of itself it has no highest level, and then neither has the whole.
    filter.and(filter_fn(|metadata| !metadata.is_span()).with_max_level_hint(LevelFilter::TRACE))
}

/// What is logged, by RUST_LOG, and why that cannot be read.
fn filter() -> (EnvFilter, Option<ParseError>) {
    let asked = env::var_os(EnvFilter::DEFAULT_ENV).unwrap_or_else(|| "info".into());
    match EnvFilter::try_new(asked.to_string_lossy()) {
        Ok(filter) => (filter, None),
        Err(error) => (EnvFilter::new("info"), Some(error)),
    }
}

async fn run(command: Command) -> Result<(), Box<dyn Error>> {
    let shutdown = CancellationToken::new();
    let (mut terminate, mut interrupt) = (signal(SignalKind::terminate())?, signal(SignalKind::interrupt())?);
    tokio::spawn({
        let shutdown = shutdown.clone();
        async move {
            tokio::select! {
                _ = terminate.recv() => {}
                _ = interrupt.recv() => {}
            }
            tracing::info!("told to stop");
            shutdown.cancel();
        }
    });
    match command {
        Command::Capture(file) => capture::run(meander_config::load(&file.config)?, shutdown).await?,
        Command::Replay(file) => {
            replay::run(meander_config::load(&file.config)?, shutdown).await?;
        }
        Command::Cleanup(file) => capture::cleanup(meander_config::load(&file.config)?).await?,
    }
    Ok(())
}

/// An error with those of its causes that its text does not tell already.
fn chain(error: &dyn Error) -> String {
    std::iter::successors(error.source(), |error| (*error).source()).fold(error.to_string(), |text, source| {
        let source = source.to_string();
        if text.contains(&source) {
            text
        } else {
            format!("{text}: {source}")
        }
    })
}

#[cfg(test)]
mod tests {
    use tracing_subscriber::Registry;

    use super::*;

    #[test]
    fn what_is_logged_is_what_libraries_are_asked_for_and_spans_are_made_for_nobody() {
        let filter = || without_spans::<Registry>(EnvFilter::new("info"));
        assert_eq!(filter().max_level_hint(), Some(LevelFilter::INFO));
        let lines = fmt::layer().with_writer(std::io::sink).with_filter(filter());
        tracing::subscriber::with_default(tracing_subscriber::registry().with(lines), || {
            assert!(tracing::enabled!(target: "librdkafka", Level::INFO));
            assert!(!tracing::enabled!(target: "librdkafka", Level::DEBUG));
            assert!(tracing::info_span!("step").is_disabled());
        });
    }
}

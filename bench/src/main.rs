//! Measures Meander, beside what a user would pick instead and beside what bounds everybody, against real services on loopback, which it
//! starts itself.
//!
//! `bench/run.sh` builds and runs it; `docs/benchmarks.md` says what was measured where.

// A failure here is the measurement's failure.
#![allow(clippy::unwrap_used, clippy::expect_used, clippy::panic)]

mod capture;
mod contestant;
mod idle;
mod latency;
mod limits;
mod meter;
mod observer;
mod pacing;
mod peers;
mod plot;
mod process;
mod report;
mod snapshot;
mod stage;
mod throughput;

use std::{path::PathBuf, time::Duration};

use clap::{Parser, Subcommand, ValueEnum};

use crate::{contestant::Variant, report::Report};

/// How long anything may take. A peer is at a snapshot of 20,000,000 rows for six minutes, and for more where the machine is slower.
pub(crate) const LIMIT: Duration = Duration::from_secs(1800);

#[derive(Parser)]
struct Arguments {
    /// Gets a line of JSON for each contestant in each round, behind what is there
    #[arg(long, default_value = "dist/bench.jsonl", global = true)]
    results: PathBuf,
    #[command(subcommand)]
    work: Work,
}

/// How often, and with whom.
#[derive(clap::Args)]
struct Rounds {
    #[arg(long, default_value_t = 5)]
    rounds: u32,
    /// How the peers are set up: each of these ways is a contestant
    #[arg(long, value_delimiter = ',', default_value = "default,tuned")]
    peers: Vec<Peers>,
}

#[derive(Clone, Copy, PartialEq, Eq, ValueEnum)]
enum Peers {
    /// No peers
    None,
    /// As they come
    Default,
    /// For rate: larger batches and queues, a shorter wait, compression
    Tuned,
    /// For latency: the shortest wait, whatever it costs
    LowLatency,
}

impl Rounds {
    fn variants(&self) -> Vec<Variant> {
        let variant = |peers: &Peers| match peers {
            Peers::None => None,
            Peers::Default => Some(Variant::Default),
            Peers::Tuned => Some(Variant::Tuned),
            Peers::LowLatency => Some(Variant::LowLatency),
        };
        self.peers.iter().filter_map(variant).collect()
    }
}

#[derive(Subcommand)]
enum Work {
    /// Catch-up with changes that were made before the start
    CatchUp {
        #[arg(long, value_enum, default_value = "inserts")]
        load: capture::Load,
        /// How many; by default 1,000,000, or 200,000 wide ones, or 30,000 large ones
        #[arg(long)]
        changes: Option<u64>,
        #[command(flatten)]
        rounds: Rounds,
    },
    /// Snapshot of a table that nobody writes to, into Kafka
    Snapshot {
        #[arg(long, default_value_t = 1_000_000)]
        rows: u64,
        #[command(flatten)]
        rounds: Rounds,
    },
    /// From the commit of a change until consumers of Kafka and of Redis have it
    Latency {
        /// Commits per second, in all
        #[arg(long, default_value_t = 1000.0)]
        rate: f64,
        #[arg(long, default_value_t = 8)]
        clients: u32,
        /// Seconds that are thrown away: a Java machine takes that long to get going
        #[arg(long, default_value_t = 20)]
        warm_up: u64,
        #[arg(long, default_value_t = 60)]
        seconds: u64,
        #[command(flatten)]
        rounds: Rounds,
    },
    /// Many tables, and no change
    Idle {
        #[arg(long, default_value_t = 1000)]
        tables: u32,
        #[arg(long, default_value_t = 60)]
        seconds: u64,
        #[command(flatten)]
        rounds: Rounds,
    },
    /// From the start of the process until the first change is in every sink
    Start {
        #[command(flatten)]
        rounds: Rounds,
    },
    /// What Kafka and Redis take from their own tools
    Limits {
        #[arg(long, default_value_t = 5)]
        rounds: u32,
    },
    /// Replay of a recorded load at several speeds, and how far each delivery is from its due time
    Pacing {
        #[arg(long, default_value_t = 10_000)]
        changes: u64,
        #[arg(long, default_value_t = 250.0)]
        rate: f64,
        #[arg(long, value_delimiter = ',', default_value = "0.5,1,10,100")]
        speeds: Vec<f64>,
    },
    /// Replay at the speed max into a gRPC receiver, in both orders, beside a plain consumer of the same records
    Throughput {
        #[arg(long, default_value_t = 1_000_000)]
        records: u64,
        #[arg(long, default_value_t = 4)]
        partitions: i32,
        #[arg(long, default_value_t = 3)]
        rounds: u32,
    },
    /// Tables of everything that was measured
    Summary {
        /// A folder that gets plots
        #[arg(long)]
        plots: Option<PathBuf>,
    },
}

#[tokio::main]
async fn main() -> anyhow::Result<()> {
    let Arguments { results, work } = Arguments::parse();
    let report = Report::new(results);
    match work {
        Work::CatchUp { load, changes, rounds } => {
            capture::catch_up(&report, load, changes, &rounds.variants(), rounds.rounds).await
        }
        Work::Snapshot { rows, rounds } => snapshot::measure(&report, rows, &rounds.variants(), rounds.rounds).await,
        Work::Latency {
            rate,
            clients,
            warm_up,
            seconds,
            rounds,
        } => {
            let load = latency::Load {
                rate,
                clients,
                warm_up,
                seconds,
            };
            latency::measure(&report, load, &rounds.variants(), rounds.rounds).await
        }
        Work::Idle {
            tables,
            seconds,
            rounds,
        } => idle::measure(&report, tables, seconds, &rounds.variants(), rounds.rounds).await,
        Work::Start { rounds } => capture::start(&report, &rounds.variants(), rounds.rounds).await,
        Work::Limits { rounds } => limits::measure(&report, rounds).await,
        Work::Pacing { changes, rate, speeds } => pacing::measure(&report, changes, rate, &speeds).await,
        Work::Throughput {
            records,
            partitions,
            rounds,
        } => throughput::measure(&report, records, partitions, rounds).await,
        Work::Summary { plots } => report.summarize(plots.as_deref()),
    }
}

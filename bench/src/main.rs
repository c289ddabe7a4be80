//! Measures Meander against real services on loopback, which it starts itself.
//!
//! `bench/run.sh` builds and runs it. Each measurement ends with one line of JSON; `docs/benchmarks.md` says what was measured where.

// A failure here is the measurement's failure.
#![allow(clippy::unwrap_used, clippy::expect_used, clippy::panic)]

mod capture;
mod latency;
mod pacing;
mod process;
mod throughput;

use clap::{Parser, Subcommand};
use meander_config::CaptureConfig;
use meander_test_support::{Kafka, Postgres, Redis, capture_config};

#[derive(Parser)]
struct Arguments {
    #[command(subcommand)]
    measurement: Measurement,
}

#[derive(Subcommand)]
enum Measurement {
    /// Catch-up with rows that were inserted before the capture started
    Capture {
        #[arg(long, default_value_t = 1_000_000)]
        rows: u64,
        #[arg(long, default_value_t = 5)]
        rounds: u32,
    },
    /// From the commit of a change until consumers of Kafka and of Redis have it
    Latency {
        /// Commits per second, in all
        #[arg(long, default_value_t = 1000.0)]
        rate: f64,
        #[arg(long, default_value_t = 8)]
        clients: u32,
        /// Seconds that are thrown away
        #[arg(long, default_value_t = 10)]
        warm_up: u64,
        #[arg(long, default_value_t = 60)]
        seconds: u64,
        #[arg(long, default_value_t = 3)]
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
}

#[tokio::main]
async fn main() -> anyhow::Result<()> {
    match Arguments::parse().measurement {
        Measurement::Capture { rows, rounds } => capture::measure(rows, rounds).await,
        Measurement::Latency {
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
            latency::measure(load, rounds).await
        }
        Measurement::Throughput {
            records,
            partitions,
            rounds,
        } => throughput::measure(records, partitions, rounds).await,
        Measurement::Pacing { changes, rate, speeds } => pacing::measure(changes, rate, &speeds).await,
    }
}

/// A capture of `public.trades` under names that nobody else uses.
fn config(postgres: &Postgres, kafka: &Kafka, redis: Option<&Redis>) -> CaptureConfig {
    let mut config = capture_config(postgres, kafka, redis);
    config.source.tables.include = vec!["public.trades".to_owned()];
    config.kafka.partitions = 1;
    config
}

//! Catch-up: the rows are there first, then the capture starts.

use std::{
    fs,
    time::{Duration, Instant},
};

use anyhow::Context as _;
use meander_test_support::{Kafka, Postgres, Redis, Runtime, eventually};
use serde::Serialize;

use crate::process::{cpu_seconds, peak_resident};

const LIMIT: Duration = Duration::from_secs(600);

#[derive(Serialize)]
struct Round {
    sinks: &'static str,
    rows: u64,
    /// From the start of the process until every row is in every sink.
    seconds: f64,
    rows_per_second: f64,
    /// Processor time of the runtime.
    cpu_seconds: f64,
    postgres_cpu_seconds: f64,
    kafka_cpu_seconds: f64,
    redis_cpu_seconds: f64,
    peak_resident_mebibytes: f64,
}

pub(crate) async fn measure(rows: u64, rounds: u32) -> anyhow::Result<()> {
    let mut kafka = Kafka::start().await;
    for _ in 0..rounds {
        // Alternating, so that a machine that drifts does so for both.
        println!("{}", serde_json::to_string(&round(&mut kafka, None, rows).await?)?);
        let mut redis = Redis::start().await;
        println!(
            "{}",
            serde_json::to_string(&round(&mut kafka, Some(&mut redis), rows).await?)?
        );
    }
    Ok(())
}

async fn round(kafka: &mut Kafka, redis: Option<&mut Redis>, rows: u64) -> anyhow::Result<Round> {
    let mut postgres = Postgres::start(&[("max_wal_size", "8GB"), ("shared_buffers", "1GB")]).await;
    let client = postgres.client().await;
    client
        .batch_execute(
            "CREATE TABLE trades (trade_id uuid, symbol text, price numeric(12,2), quantity int, side text,
                                  traded_at timestamptz, PRIMARY KEY (trade_id, traded_at))",
        )
        .await?;
    let config = crate::config(&postgres, kafka, redis.as_deref());
    // The first session makes the slot.
    let mut runtime = Runtime::capture(&config);
    runtime.ready(LIMIT).await;
    runtime.terminate(LIMIT);
    for _ in 0..rows / 1000 {
        client
            .batch_execute(
                "INSERT INTO trades SELECT gen_random_uuid(), (ARRAY['AAPL','MSFT','GOOG','AMZN'])[1 + i % 4],
                     round((10 + random() * 990)::numeric, 2), 1 + i, (ARRAY['buy','sell'])[1 + i % 2], clock_timestamp()
                 FROM generate_series(1, 1000) i",
            )
            .await?;
    }
    client.batch_execute("CHECKPOINT").await?;

    let server = postgres.process().id().context("PostgreSQL has ended")?;
    let broker = kafka.process().id().context("Kafka has ended")?;
    let (sinks, redis) = match redis {
        Some(redis) => ("kafka+redis", Some(redis.process().id().context("Redis has ended")?)),
        None => ("kafka", None),
    };
    let used = || -> anyhow::Result<[f64; 3]> {
        Ok([
            cpu_seconds_with_children(server)?,
            cpu_seconds(broker)?,
            redis.map_or(Ok(0.0), cpu_seconds)?,
        ])
    };
    let before = used()?;
    let started = Instant::now();
    runtime.start_again();
    let done = format!("meander_capture_checkpoint_events {rows}\n");
    let lag = "meander_capture_lag_seconds 0\n";
    eventually("every row is in every sink", LIMIT, async || {
        let (_, metrics) = runtime.get("/metrics").await.map_err(|error| error.to_string())?;
        if metrics.contains(&done) && metrics.contains(lag) {
            Ok(())
        } else {
            Err(metrics)
        }
    })
    .await;
    let seconds = started.elapsed().as_secs_f64();
    let process = runtime.process().id().context("the runtime has ended")?;
    let after = used()?;
    let [postgres_cpu_seconds, kafka_cpu_seconds, redis_cpu_seconds] =
        [0, 1, 2].map(|index| after[index] - before[index]);
    let round = Round {
        sinks,
        rows,
        seconds,
        rows_per_second: rows as f64 / seconds,
        cpu_seconds: cpu_seconds(process)?,
        postgres_cpu_seconds,
        kafka_cpu_seconds,
        redis_cpu_seconds,
        peak_resident_mebibytes: peak_resident(process)?,
    };
    runtime.terminate(LIMIT);
    Ok(round)
}

/// Processor time of a process and of those that it started, as PostgreSQL's are.
fn cpu_seconds_with_children(process: u32) -> anyhow::Result<f64> {
    let mut seconds = cpu_seconds(process)?;
    for entry in fs::read_dir("/proc")? {
        let Some(child) = entry?.file_name().to_str().and_then(|name| name.parse::<u32>().ok()) else {
            continue;
        };
        let status = fs::read_to_string(format!("/proc/{child}/status")).unwrap_or_default();
        let parent = status.lines().find_map(|line| line.strip_prefix("PPid:"));
        if parent.and_then(|parent| parent.trim().parse().ok()) == Some(process) {
            seconds += cpu_seconds(child).unwrap_or(0.0);
        }
    }
    Ok(seconds)
}

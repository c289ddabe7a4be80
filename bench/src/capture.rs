//! Catch-up: the rows are there first, then the capture starts.

use std::time::{Duration, Instant};

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
    peak_resident_mebibytes: f64,
}

pub(crate) async fn measure(rows: u64, rounds: u32) -> anyhow::Result<()> {
    let kafka = Kafka::start().await;
    for _ in 0..rounds {
        // Alternating, so that a machine that drifts does so for both.
        println!("{}", serde_json::to_string(&round(&kafka, None, rows).await?)?);
        let redis = Redis::start().await;
        println!("{}", serde_json::to_string(&round(&kafka, Some(&redis), rows).await?)?);
    }
    Ok(())
}

async fn round(kafka: &Kafka, redis: Option<&Redis>, rows: u64) -> anyhow::Result<Round> {
    let postgres = Postgres::start(&[("max_wal_size", "8GB"), ("shared_buffers", "1GB")]).await;
    let client = postgres.client().await;
    client
        .batch_execute(
            "CREATE TABLE trades (trade_id uuid, symbol text, price numeric(12,2), quantity int, side text,
                                  traded_at timestamptz, PRIMARY KEY (trade_id, traded_at))",
        )
        .await?;
    let config = crate::config(&postgres, kafka, redis);
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

    let started = Instant::now();
    runtime.start_again();
    let done = format!("meander_capture_events_total {rows}\n");
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
    let round = Round {
        sinks: if redis.is_some() { "kafka+redis" } else { "kafka" },
        rows,
        seconds,
        rows_per_second: rows as f64 / seconds,
        cpu_seconds: cpu_seconds(process)?,
        peak_resident_mebibytes: peak_resident(process)?,
    };
    runtime.terminate(LIMIT);
    Ok(round)
}

//! What bounds anybody: the same services, read and written by their own tools.

use std::{process::Stdio, time::Instant};

use anyhow::Context as _;
use meander_test_support::{Postgres, unique_name};
use tokio::process::Command;

use crate::{
    contestant::text_of,
    meter::ended_children_cpu,
    report::{Figure, Figures, Report},
    stage::Stage,
};

const SIZE: usize = 250;

/// Adds what a tool did.
pub(crate) fn report(report: &Report, work: &str, tool: &str, figures: Figures) -> anyhow::Result<()> {
    report.add(work, tool, "", figures)
}

/// `pg_recvlogical` with pgoutput, which throws away what it reads.
pub(crate) struct ReceiveLogical {
    name: String,
}

impl ReceiveLogical {
    /// It will read what is committed from now on.
    pub(crate) async fn new(stage: &Stage) -> anyhow::Result<Self> {
        let name = unique_name("limit");
        let client = stage.postgres.client().await;
        client
            .batch_execute(&format!("CREATE PUBLICATION {name} FOR TABLES IN SCHEMA public"))
            .await?;
        client
            .execute(
                "SELECT pg_create_logical_replication_slot($1::text::name, 'pgoutput')",
                &[&name],
            )
            .await?;
        Ok(Self { name })
    }

    /// Reads until now.
    pub(crate) async fn run(&self, stage: &mut Stage, changes: u64, bytes: Option<f64>) -> anyhow::Result<Figures> {
        let client = stage.postgres.client().await;
        // It ends at the first record that begins there or after.
        let end: String = client.query_one("SELECT pg_current_wal_lsn()::text", &[]).await?.get(0);
        client
            .query("SELECT pg_logical_emit_message(false, 'meander.bench', '')", &[])
            .await?;
        let mut command = tool(stage, "pg_recvlogical")?;
        command
            .args([
                "--dbname",
                stage.postgres.database(),
                "--slot",
                &self.name,
                "--start",
                "--no-loop",
            ])
            .args(["--file", "/dev/null", "--fsync-interval", "0", "--endpos", &end])
            .args(["--option", "proto_version=1", "--option"])
            .arg(format!("publication_names={}", self.name));
        let (seconds, mut figures, _) = run(stage, &mut command).await?;
        figures.insert(Figure::EventsPerSecond, changes as f64 / seconds);
        if let Some(bytes) = bytes {
            figures.insert(Figure::MegabytesPerSecond, bytes / seconds / 1e6);
        }
        client
            .execute("SELECT pg_drop_replication_slot($1::text::name)", &[&self.name])
            .await?;
        Ok(figures)
    }
}

/// `COPY trades TO STDOUT` by psql, which throws away what it reads.
pub(crate) async fn copy(stage: &mut Stage, rows: u64) -> anyhow::Result<Figures> {
    let mut command = tool(stage, "psql")?;
    command.args(["--output", "/dev/null", "--command", "COPY trades TO STDOUT"]);
    let (seconds, mut figures, _) = run(stage, &mut command).await?;
    figures.insert(Figure::EventsPerSecond, rows as f64 / seconds);
    Ok(figures)
}

/// A program of PostgreSQL's, which connects to it.
fn tool(stage: &Stage, program: &str) -> anyhow::Result<Command> {
    let mut command = Command::new(Postgres::program(program));
    command
        .env("PGHOST", "127.0.0.1")
        .env("PGPORT", stage.postgres.port().to_string())
        .env("PGDATABASE", stage.postgres.database())
        .env("PGUSER", text_of(stage.postgres.username_file())?)
        .env("PGPASSWORD", text_of(stage.postgres.password_file())?);
    Ok(command)
}

/// Kafka's own producer and Redis's own benchmark, with values of 250 bytes.
pub(crate) async fn measure(report_to: &Report, rounds: u32) -> anyhow::Result<()> {
    let mut stage = Stage::start().await;
    for _ in 0..rounds {
        for (how, settings) in [
            ("Kafka's producer tool, defaults", &[][..]),
            (
                "Kafka's producer tool, batches of 256 KiB",
                &["batch.size=262144", "buffer.memory=67108864"],
            ),
        ] {
            report(report_to, "limits", how, produce(&mut stage, settings).await?)?;
        }
        for (how, pipeline) in [
            ("redis-benchmark XADD, 500 in a pipeline", 500),
            ("redis-benchmark XADD, one by one", 1),
        ] {
            report(report_to, "limits", how, append(&mut stage, pipeline).await?)?;
        }
    }
    Ok(())
}

async fn produce(stage: &mut Stage, settings: &[&str]) -> anyhow::Result<Figures> {
    let prefix = unique_name("limit");
    let topic = format!("{prefix}.records");
    stage
        .kafka
        .tool(
            "org.apache.kafka.tools.TopicCommand",
            &format!("--create --topic {topic} --partitions 1"),
        )
        .await;
    let mut command = Command::new("kafka-run-class.sh");
    command
        .env("KAFKA_HEAP_OPTS", "-Xmx512M")
        .arg("org.apache.kafka.tools.ProducerPerformance")
        .args(["--topic", &topic, "--num-records", "3000000"])
        .args([
            "--record-size",
            &SIZE.to_string(),
            "--throughput",
            "-1",
            "--producer-props",
        ])
        .arg(format!("bootstrap.servers={}", stage.kafka.bootstrap()))
        .args(settings);
    let (_, mut figures, output) = run(stage, &mut command).await?;
    // 3000000 records sent, 593824.228029 records/sec (141.58 MB/sec), …
    let rate = output
        .lines()
        .last()
        .and_then(|line| line.split(", ").nth(1)?.split(' ').next()?.parse().ok())
        .with_context(|| format!("no rate in {output}"))?;
    figures.insert(Figure::EventsPerSecond, rate);
    stage.clear(&prefix).await?;
    Ok(figures)
}

async fn append(stage: &mut Stage, pipeline: u32) -> anyhow::Result<Figures> {
    let entries = if pipeline == 1 { 100_000 } else { 1_000_000 };
    let mut command = Command::new("redis-benchmark");
    command
        .args([
            "-p",
            &stage.redis.port().to_string(),
            "-c",
            "1",
            "-P",
            &pipeline.to_string(),
        ])
        .args(["-n", &entries.to_string(), "--csv", "XADD", "limit", "*", "value"])
        .arg("v".repeat(SIZE));
    let (_, mut figures, output) = run(stage, &mut command).await?;
    // "XADD limit * value …","604594.88","0.159",…
    let rate = output
        .lines()
        .last()
        .and_then(|line| line.split("\",\"").nth(1)?.parse().ok())
        .with_context(|| format!("no rate in {output}"))?;
    figures.insert(Figure::EventsPerSecond, rate);
    stage.clear("limit").await?;
    Ok(figures)
}

/// Seconds, what the parts used, and the output.
async fn run(stage: &mut Stage, command: &mut Command) -> anyhow::Result<(f64, Figures, String)> {
    let meter = stage.meter(None)?;
    let before = ended_children_cpu()?;
    let started = Instant::now();
    let output = command.stdin(Stdio::null()).kill_on_drop(true).output().await;
    let output = output.with_context(|| format!("{command:?}"))?;
    let seconds = started.elapsed().as_secs_f64();
    anyhow::ensure!(
        output.status.success(),
        "{command:?}: {}",
        String::from_utf8_lossy(&output.stderr)
    );
    let mut figures = meter.read()?;
    figures.insert(Figure::Cpu, ended_children_cpu()? - before);
    figures.insert(Figure::Seconds, seconds);
    Ok((seconds, figures, String::from_utf8_lossy(&output.stdout).into_owned()))
}

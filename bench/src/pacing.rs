//! How well a replay keeps time.

use std::{
    io::{BufRead as _, BufReader},
    path::PathBuf,
    process::{Child, Command, Stdio},
};

use anyhow::Context as _;
use meander_config::{GrpcReceiver, ReplayConfig, ReplayEnd, ReplayOrder, ReplayStart, ReplayTarget, ResourceIdentity};
use meander_test_support::{Kafka, Postgres, Runtime, capture_config, eventually, free_address};
use meander_workload::load::{self, Load};
use serde::Deserialize;

use crate::{
    LIMIT, contestant,
    report::{Figure, Figures, Report},
};

pub(crate) async fn measure(report: &Report, changes: u64, rate: f64, speeds: &[f64]) -> anyhow::Result<()> {
    let kafka = Kafka::start().await;
    let postgres = Postgres::start(&[]).await;
    let database: tokio_postgres::Config = postgres.url().parse()?;
    load::prepare(&load::connect(&database).await?, "public.trades").await?;
    let mut config = capture_config(&postgres, &kafka, None);
    config.kafka.partitions = 1;
    let mut runtime = Runtime::capture(&config);
    runtime.ready(LIMIT).await;
    let load = Load {
        table: "public.trades".to_owned(),
        changes,
        rate,
        seed: 1,
        clients: 4,
        key_changes: false,
    };
    let made = load::run(&database, &load).await?;
    let done = format!("meander_capture_checkpoint_events {}\n", made.changes);
    eventually("every change is in Kafka", LIMIT, async || {
        let (_, metrics) = runtime.get("/metrics").await.map_err(|error| error.to_string())?;
        if metrics.contains(&done) { Ok(()) } else { Err(metrics) }
    })
    .await;
    runtime.terminate(LIMIT);

    for speed in speeds {
        let address = free_address();
        let mut receiver = Receiver::start(&address.to_string(), *speed)?;
        let mut replay = Runtime::replay(&ReplayConfig {
            job: ResourceIdentity {
                name: format!("speed-{speed}"),
                ..config.pipeline.clone()
            },
            pipeline: config.pipeline.clone(),
            slot_name: config.source.slot_name.clone(),
            kafka: config.kafka.log(),
            from: ReplayStart::Beginning,
            to: ReplayEnd::Now,
            speed: speed.to_string().parse()?,
            suspended: false,
            filter: None,
            max_gap_seconds: None,
            order: ReplayOrder::Commit,
            target: ReplayTarget::GrpcCall(GrpcReceiver::plain(format!("http://{address}"))),
            operator: None,
            admin_address: free_address(),
            termination_message_file: None,
        });
        let status = tokio::task::block_in_place(|| replay.process().wait(LIMIT));
        anyhow::ensure!(status.success(), "the replay failed:\n{}", replay.process().log_tail());
        let contestant = format!("replay at the speed {speed}");
        report.add(
            "pace of a replay",
            &contestant,
            &contestant::our_version(),
            receiver.figures(made.changes)?,
        )?;
    }
    Ok(())
}

/// `meander-workload receive`, which judges what it is sent.
struct Receiver {
    process: Child,
    lines: std::io::Lines<BufReader<std::process::ChildStdout>>,
}

impl Receiver {
    fn start(address: &str, speed: f64) -> anyhow::Result<Self> {
        let dist = std::env::var_os("MEANDER_DIST").context("MEANDER_DIST is not set: use bench/run.sh")?;
        let program = PathBuf::from(dist).join("meander-workload");
        let mut process = Command::new(&program)
            .args(["receive", "--listen", address, "--speed", &speed.to_string()])
            .stdout(Stdio::piped())
            .spawn()
            .with_context(|| format!("cannot start {}", program.display()))?;
        let mut lines = BufReader::new(process.stdout.take().context("no output")?).lines();
        lines.next().context("the receiver ended")??;
        Ok(Self { process, lines })
    }

    fn figures(&mut self, changes: u64) -> anyhow::Result<Figures> {
        for line in self.lines.by_ref() {
            let line = line?;
            if !line.starts_with('{') {
                continue;
            }
            let summary: Summary = serde_json::from_str(&line)?;
            anyhow::ensure!(
                summary.records >= changes && summary.order_ok,
                "the replay is not whole: {line}"
            );
            let error = summary.pacing_error_ms.context("no pace was judged")?;
            return Ok(Figures::from([
                (Figure::Seconds, summary.wall_seconds),
                (Figure::Speed, summary.ratio.context("no time passed")?),
                (Figure::P50, error.p50),
                (Figure::P99, error.p99),
                (Figure::Max, error.max),
            ]));
        }
        anyhow::bail!("the receiver ended without a summary")
    }
}

/// What the receiver says in the end, as far as it is wanted here.
#[derive(Deserialize)]
#[serde(rename_all = "camelCase")]
struct Summary {
    records: u64,
    order_ok: bool,
    wall_seconds: f64,
    ratio: Option<f64>,
    pacing_error_ms: Option<Error>,
}

#[derive(Deserialize)]
struct Error {
    p50: f64,
    p99: f64,
    max: f64,
}

impl Drop for Receiver {
    fn drop(&mut self) {
        // It has no state; if it has ended already, there is nothing to end.
        let _ = self.process.kill();
        let _ = self.process.wait();
    }
}

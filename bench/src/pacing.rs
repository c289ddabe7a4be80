//! How well a replay keeps time.

use std::{
    io::{BufRead as _, BufReader},
    path::PathBuf,
    process::{Child, Command, Stdio},
    time::Duration,
};

use anyhow::Context as _;
use meander_config::{GrpcReceiver, ReplayConfig, ReplayEnd, ReplayOrder, ReplayStart, ReplayTarget, ResourceIdentity};
use meander_test_support::{Kafka, Postgres, Runtime, eventually, free_address};
use meander_workload::load::{self, Load};

const LIMIT: Duration = Duration::from_secs(600);

pub(crate) async fn measure(changes: u64, rate: f64, speeds: &[f64]) -> anyhow::Result<()> {
    let kafka = Kafka::start().await;
    let postgres = Postgres::start(&[]).await;
    let database: tokio_postgres::Config = postgres.url().parse()?;
    load::prepare(&load::connect(&database).await?, "public.trades").await?;
    let config = crate::config(&postgres, &kafka, None);
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
        println!("{{\"speed\":{speed},\"replay\":{}}}", receiver.summary()?);
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

    fn summary(&mut self) -> anyhow::Result<String> {
        for line in self.lines.by_ref() {
            let line = line?;
            if line.starts_with('{') {
                return Ok(line);
            }
        }
        anyhow::bail!("the receiver ended without a summary")
    }
}

impl Drop for Receiver {
    fn drop(&mut self) {
        // It has no state; if it has ended already, there is nothing to end.
        let _ = self.process.kill();
        let _ = self.process.wait();
    }
}

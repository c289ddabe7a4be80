//! Idle: many tables, and nothing changes.

use std::time::Duration;

use meander_config::Format;
use meander_test_support::eventually;

use crate::{
    LIMIT,
    contestant::{Capture, Contestant, Variant},
    meter::resident,
    process::peak_resident,
    report::{Figure, Report},
    stage::Stage,
};

/// What comes after the start settles meanwhile.
const SETTLE: Duration = Duration::from_secs(10);

/// Of each contestant for so many seconds, with so many tables.
pub(crate) async fn measure(
    report: &Report,
    tables: u32,
    seconds: u64,
    peers: &[Variant],
    rounds: u32,
) -> anyhow::Result<()> {
    let mut contestants = Contestant::with(&[Contestant::Kafka(Format::Protobuf), Contestant::KafkaAndRedis], peers);
    let mut stage = Stage::start().await;
    let client = stage.postgres.client().await;
    for table in 0..tables {
        let sql = format!(
            "CREATE TABLE idle_{table} (id bigint PRIMARY KEY, symbol text, price numeric(12,2), quantity int)"
        );
        client.batch_execute(&sql).await?;
    }
    for _ in 0..rounds {
        Contestant::take_turns(&mut contestants);
        for contestant in &contestants {
            let mut capture = Capture::of_changes(*contestant, &stage).await?;
            capture.start();
            let sql = "SELECT FROM pg_replication_slots WHERE slot_name = $1 AND active";
            eventually("the slot is read", LIMIT, async || {
                match client.query(sql, &[&capture.prefix]).await {
                    Ok(rows) if !rows.is_empty() => Ok(()),
                    Ok(_) => Err("it is not".to_owned()),
                    Err(error) => Err(error.to_string()),
                }
            })
            .await;
            // A stretch of time is what is measured.
            tokio::time::sleep(SETTLE).await;
            let process = capture.process_id()?;
            let meter = stage.meter(Some(process))?;
            tokio::time::sleep(Duration::from_secs(seconds)).await;
            let mut figures = meter.read()?;
            let used = figures.get(&Figure::Cpu).copied().unwrap_or_default();
            figures.insert(Figure::Cores, used / seconds as f64);
            figures.insert(Figure::Resident, resident(process)?);
            figures.insert(Figure::PeakResident, peak_resident(process)?);
            let work = format!("idle, {tables} tables");
            capture.conclude(&stage, report, &work, figures).await?;
        }
    }
    Ok(())
}

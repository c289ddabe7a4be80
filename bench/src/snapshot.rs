//! Snapshot: the rows are there, and none changes.

use std::time::Instant;

use meander_config::Format;

use crate::{
    capture::{TRADES, insert_trades},
    contestant::{Capture, Contestant, Variant},
    limits,
    observer::{self, Last},
    process::peak_resident,
    report::{Figure, Report},
    stage::Stage,
};

/// Of a table of so many rows, into Kafka.
pub(crate) async fn measure(report: &Report, rows: u64, peers: &[Variant], rounds: u32) -> anyhow::Result<()> {
    let work = if rows == 1_000_000 {
        "snapshot".to_owned()
    } else {
        format!("snapshot of {rows} rows")
    };
    let peers = peers.iter().copied().map(Contestant::Connect);
    let mut contestants: Vec<Contestant> = [Contestant::Kafka(Format::Protobuf)].into_iter().chain(peers).collect();
    let mut stage = Stage::start().await;
    let client = stage.postgres.client().await;
    client.batch_execute(TRADES).await?;
    client.batch_execute(&insert_trades(1, rows)).await?;
    client.batch_execute("VACUUM (ANALYZE) trades").await?;
    client.batch_execute("CHECKPOINT").await?;
    for round in 0..=rounds {
        let (report, contestants) = match round {
            0 => (&Report::of_warm_up(), &mut contestants[..1]),
            _ => (report, &mut contestants[..]),
        };
        limits::report(
            report,
            &work,
            "COPY TO STDOUT to nowhere",
            limits::copy(&mut stage, rows).await?,
        )?;
        Contestant::take_turns(contestants);
        for contestant in contestants.iter() {
            let mut capture = Capture::of_rows(*contestant, &stage).await?;
            let started = Instant::now();
            capture.start();
            let process = capture.process_id()?;
            let meter = stage.meter(Some(process))?;
            let seen = observer::all_are_there(&capture, &stage, rows, Last::OfRows).await?;
            let mut figures = meter.read()?;
            let rate = |since: Instant| rows as f64 / (seen.last - since).as_secs_f64();
            figures.insert(Figure::EventsPerSecond, rate(seen.first));
            figures.insert(Figure::EventsPerSecondWithStart, rate(started));
            figures.insert(Figure::FirstRecordSeconds, (seen.first - started).as_secs_f64());
            figures.insert(Figure::PeakResident, peak_resident(process)?);
            observer::count(&capture, &stage, rows).await?;
            capture.conclude(&stage, report, &work, figures).await?;
        }
    }
    Ok(())
}

//! Catch-up: the changes are there first, then the contestant starts. And the start itself: one change, and nothing else to do.

use std::time::Instant;

use clap::ValueEnum;

use crate::{
    contestant::{Capture, Contestant, DEBEZIUM_JSON, Variant},
    limits,
    observer::{self, LAST, Last, Seen},
    process::peak_resident,
    report::{Figure, Figures, Report},
    stage::Stage,
};
use meander_config::Format;

/// What has changed.
#[derive(Clone, Copy, Debug, PartialEq, Eq, ValueEnum)]
pub(crate) enum Load {
    /// Rows of six columns, inserted by 1,000 to the transaction
    Inserts,
    /// Half inserts, 30 % updates, 20 % deletes, of the same rows
    Mixed,
    /// Rows of 100 columns, inserted by 100 to the transaction
    Wide,
    /// Rows with a value of 10,000 bytes that is stored out of line, inserted by 100 to the transaction
    Large,
}

impl Load {
    fn work(self) -> &'static str {
        match self {
            Self::Inserts => "catch-up, inserts",
            Self::Mixed => "catch-up, mixed",
            Self::Wide => "catch-up, 100 columns",
            Self::Large => "catch-up, 10 kB values",
        }
    }

    fn changes(self) -> u64 {
        match self {
            Self::Inserts | Self::Mixed => 1_000_000,
            Self::Wide => 200_000,
            Self::Large => 30_000,
        }
    }

    fn per_transaction(self) -> u64 {
        match self {
            Self::Inserts | Self::Mixed => 1000,
            Self::Wide | Self::Large => 100,
        }
    }

    fn table(self) -> String {
        match self {
            Self::Inserts | Self::Mixed => TRADES.to_owned(),
            Self::Wide => {
                let columns: Vec<String> = (0..49).map(|i| format!("n{i} bigint, t{i} text")).collect();
                format!(
                    "CREATE TABLE trades (trade_id bigint PRIMARY KEY, symbol text, {})",
                    columns.join(", ")
                )
            }
            Self::Large => "CREATE TABLE trades (trade_id bigint PRIMARY KEY, symbol text, document text);
                            ALTER TABLE trades ALTER document SET STORAGE EXTERNAL"
                .to_owned(),
        }
    }

    /// The transaction of a number, from 1 on.
    fn transaction(self, number: u64) -> String {
        let rows = self.per_transaction();
        let (first, last) = ((number - 1) * rows + 1, number * rows);
        match self {
            Self::Inserts => insert_trades(first, last),
            Self::Mixed => {
                // Rows of the transaction before are updated and deleted; number 0 is there before the slot.
                let (first, last) = (number * 500, number * 500 + 499);
                let of = |from: u64, to: u64| {
                    format!("trade_id IN (SELECT md5(i::text)::uuid FROM generate_series({from}, {to}) i)")
                };
                format!(
                    "BEGIN; {}; UPDATE trades SET quantity = quantity + 1, price = price + 0.01 WHERE {}; DELETE FROM trades WHERE {}; COMMIT",
                    insert_trades(first, last),
                    of(first - 500, first - 201),
                    of(first - 200, first - 1),
                )
            }
            Self::Wide => {
                let columns: Vec<String> = (0..49).map(|i| format!("i * {} , 'text-' || i + {i}", i + 1)).collect();
                format!(
                    "INSERT INTO trades SELECT i, 'AAPL', {} FROM generate_series({first}, {last}) i",
                    columns.join(", ")
                )
            }
            Self::Large => format!(
                "INSERT INTO trades SELECT i, 'AAPL',
                     left((SELECT string_agg(md5(i::text || j), '') FROM generate_series(1, 313) j), 10000)
                 FROM generate_series({first}, {last}) i"
            ),
        }
    }

    fn last(self) -> String {
        match self {
            Self::Inserts | Self::Mixed => {
                format!("INSERT INTO trades VALUES (gen_random_uuid(), '{LAST}', 1, 1, 'buy', clock_timestamp())")
            }
            Self::Wide | Self::Large => format!("INSERT INTO trades (trade_id, symbol) VALUES (0, '{LAST}')"),
        }
    }
}

pub(crate) const TRADES: &str =
    "CREATE TABLE trades (trade_id uuid, symbol text, price numeric(12,2), quantity int, side text,
                                                      traded_at timestamptz, PRIMARY KEY (trade_id, traded_at))";

/// Rows whose keys are made of these numbers.
pub(crate) fn insert_trades(first: u64, last: u64) -> String {
    format!(
        "INSERT INTO trades SELECT md5(i::text)::uuid, (ARRAY['AAPL','MSFT','GOOG','AMZN'])[1 + i % 4],
             round((10 + random() * 990)::numeric, 2), 1 + i % 1000, (ARRAY['buy','sell'])[1 + i % 2], clock_timestamp()
         FROM generate_series({first}, {last}) i"
    )
}

/// Catch-up with a load of so many changes.
pub(crate) async fn catch_up(
    report: &Report,
    load: Load,
    changes: Option<u64>,
    peers: &[Variant],
    rounds: u32,
) -> anyhow::Result<()> {
    let ours = [
        Contestant::Kafka(Format::Protobuf),
        Contestant::KafkaAndRedis,
        Contestant::Kafka(DEBEZIUM_JSON),
    ];
    let contestants = match load {
        Load::Inserts => Contestant::with(&ours, peers),
        // The formats and Redis make no difference of another kind here.
        _ => Contestant::with(&ours[..1], peers)
            .into_iter()
            .filter(|contestant| !matches!(contestant, Contestant::Server(_)))
            .collect(),
    };
    let transactions = changes.unwrap_or(load.changes()) / load.per_transaction();
    let mut stage = Stage::start().await;
    let client = stage.postgres.client().await;
    for round in 0..=rounds {
        let (report, contestants) = match round {
            0 => (&Report::of_warm_up(), &ours[..2]),
            _ => (report, &contestants[..]),
        };
        client.batch_execute("DROP TABLE IF EXISTS trades").await?;
        client.batch_execute(&load.table()).await?;
        if load == Load::Mixed {
            client.batch_execute(&insert_trades(0, 499)).await?;
        }
        let captures = slots(contestants, &stage).await?;
        let limit = limits::ReceiveLogical::new(&stage).await?;
        for number in 1..=transactions {
            client.batch_execute(&load.transaction(number)).await?;
        }
        client.batch_execute(&load.last()).await?;
        client.batch_execute("VACUUM (ANALYZE) trades").await?;
        client.batch_execute("CHECKPOINT").await?;
        let changes = transactions * load.per_transaction() + 1;
        // The rows are only all that was read where none of them changed.
        let bytes: i64 = client
            .query_one("SELECT sum(octet_length(trades::text)) FROM trades", &[])
            .await?
            .get(0);
        let bytes = (load != Load::Mixed).then_some(bytes as f64);
        limits::report(
            report,
            load.work(),
            "pg_recvlogical to nowhere",
            limit.run(&mut stage, changes, bytes).await?,
        )?;
        for mut capture in captures {
            let (seen, started, mut figures) = run(&mut capture, &mut stage, changes).await?;
            let rate = |since: Instant| changes as f64 / (seen.last - since).as_secs_f64();
            figures.insert(Figure::EventsPerSecond, rate(seen.first));
            figures.insert(Figure::EventsPerSecondWithStart, rate(started));
            if let Some(bytes) = bytes {
                let seconds = (seen.last - seen.first).as_secs_f64();
                figures.insert(Figure::MegabytesPerSecond, bytes / seconds / 1e6);
            }
            observer::count(&capture, &stage, changes).await?;
            capture.conclude(&stage, report, load.work(), figures).await?;
        }
    }
    Ok(())
}

/// How long a process takes from its start until its first change is in every sink.
pub(crate) async fn start(report: &Report, peers: &[Variant], rounds: u32) -> anyhow::Result<()> {
    let ours = [Contestant::Kafka(Format::Protobuf), Contestant::KafkaAndRedis];
    let contestants = Contestant::with(&ours, peers);
    let mut stage = Stage::start().await;
    let client = stage.postgres.client().await;
    for round in 0..=rounds {
        let (report, contestants) = match round {
            0 => (&Report::of_warm_up(), &ours[..]),
            _ => (report, &contestants[..]),
        };
        client.batch_execute("DROP TABLE IF EXISTS trades").await?;
        client.batch_execute(TRADES).await?;
        let captures = slots(contestants, &stage).await?;
        client.batch_execute(&Load::Inserts.last()).await?;
        for mut capture in captures {
            let (seen, started, mut figures) = run(&mut capture, &mut stage, 1).await?;
            // The first record is the last one.
            figures.insert(Figure::FirstRecordSeconds, (seen.last - started).as_secs_f64());
            capture.conclude(&stage, report, "start", figures).await?;
        }
    }
    Ok(())
}

/// A slot for each, at the same place.
async fn slots(contestants: &[Contestant], stage: &Stage) -> anyhow::Result<Vec<Capture>> {
    let mut captures = Vec::new();
    for contestant in contestants {
        captures.push(Capture::of_changes(*contestant, stage).await?);
    }
    Contestant::take_turns(&mut captures);
    Ok(captures)
}

async fn run(capture: &mut Capture, stage: &mut Stage, changes: u64) -> anyhow::Result<(Seen, Instant, Figures)> {
    let started = Instant::now();
    capture.start();
    let process = capture.process_id()?;
    let meter = stage.meter(Some(process))?;
    let seen = observer::all_are_there(capture, stage, changes, Last::Marked).await?;
    let mut figures = meter.read()?;
    figures.insert(Figure::FirstRecordSeconds, (seen.first - started).as_secs_f64());
    figures.insert(Figure::PeakResident, peak_resident(process)?);
    Ok((seen, started, figures))
}

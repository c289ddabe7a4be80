//! `kill -9` at random places in the middle of snapshots, under load: nothing is lost, nothing comes twice that must not, and the order
//! is kept.
//!
//! Two tables change and are read. What the log holds of `trades`, whose larger values are stored apart, is folded and compared with the
//! table; of `orders` the ledger is kept as well, and `tests/verifier`, which shares no code with the runtime, compares it with Kafka and
//! Redis.
#![allow(clippy::unwrap_used, clippy::expect_used, clippy::panic)]

mod common;
#[path = "common/fold.rs"]
mod fold;
#[path = "common/tables.rs"]
mod tables;
#[path = "common/verifier.rs"]
mod verifier;

use std::time::{Duration, Instant};

use common::LIMIT;
use fold::{Entry, assert_read_once, fold};
use meander_config::{CaptureConfig, SnapshotMode, SnapshotRequest};
use meander_proto::v1::Operation;
use meander_runtime::log::Checkpoint;
use meander_test_support::{Kafka, Postgres, Redis, Runtime, eventually};
use meander_workload::ledger;
use tables::{LARGE_TABLE, count, disturb, execute, table, wait_until_equal};
use verifier::verify;

/// Slow enough that the log of fifty kills can be read as a whole.
const PAUSE: Duration = Duration::from_millis(20);

#[tokio::test(flavor = "multi_thread")]
async fn three_kills_during_an_incremental_snapshot_lose_and_double_nothing() {
    kill_incremental(3).await;
}

#[tokio::test(flavor = "multi_thread")]
async fn three_kills_during_a_bulk_snapshot_lose_nothing_and_repeat_only_its_rows() {
    kill_bulk(3).await;
}

/// The long forms; `make test-long` runs them.
#[tokio::test(flavor = "multi_thread")]
#[ignore = "takes minutes: make test-long"]
async fn fifty_kills_during_an_incremental_snapshot_lose_and_double_nothing() {
    kill_incremental(50).await;
}

#[tokio::test(flavor = "multi_thread")]
#[ignore = "takes minutes: make test-long"]
async fn fifty_kills_during_a_bulk_snapshot_lose_nothing_and_repeat_only_its_rows() {
    kill_bulk(50).await;
}

async fn kill_incremental(kills: usize) {
    // As many snapshots, each by a request of its own, as it takes for every kill to come in the middle of one.
    let requests = (0..kills.div_ceil(4)).map(|number| SnapshotRequest {
        id: format!("again-{number}"),
        tables: vec!["public.*".to_owned()],
    });
    let snapshots = 1 + requests.len();
    let reads = |checkpoint: &Checkpoint| {
        let reading = checkpoint.snapshot.reading.as_ref();
        reading.is_some_and(|cursor| cursor.rows > 0)
    };
    let run = run(
        SnapshotMode::Incremental,
        requests.collect(),
        kills,
        20_000,
        3000,
        reads,
    )
    .await;
    for log in [&run.trades, &run.orders] {
        assert_read_once(log);
        assert_eq!(count(log, Operation::SnapshotEnd), snapshots);
    }
    println!(
        "{kills} kills, {snapshots} snapshots of two tables: {} changes, {} rows read, each once in its snapshot, in {:?}",
        run.changes,
        count(&run.trades, Operation::Read) + count(&run.orders, Operation::Read),
        run.took
    );
}

async fn kill_bulk(kills: usize) {
    // Rows of a snapshot have the place before its consistent point, where no commit record can begin.
    let reads = |checkpoint: &Checkpoint| {
        let place = checkpoint.published.map_or(0, |published| published.commit_lsn.0);
        place % 8 == 7 && !checkpoint.snapshot.bulk_is_over
    };
    let run = run(SnapshotMode::Bulk, vec![], kills, 100_000, 5000, reads).await;
    let (begun, ended) = (
        count(&run.orders, Operation::SnapshotBegin),
        count(&run.orders, Operation::SnapshotEnd),
    );
    assert_eq!(
        (begun, ended),
        (kills + 1, 1),
        "each kill came in the middle of the same table"
    );
    for log in [&run.trades, &run.orders] {
        assert_read_once(log);
        // Every row is between the last begin and the end: the whole table as it was there, whatever was read before.
        let begin = log
            .iter()
            .rposition(|entry| entry.operation == Operation::SnapshotBegin)
            .unwrap();
        let end = log
            .iter()
            .position(|entry| entry.operation == Operation::SnapshotEnd)
            .unwrap();
        assert_eq!(log[end].rows, count(&log[begin..end], Operation::Read) as u64);
        assert!(fold(&log[begin..end]).len() as u64 == log[end].rows);
    }
    println!(
        "{kills} kills, one bulk snapshot of two tables: {} changes, each once; {} rows read for {}, in {:?}",
        run.changes,
        count(&run.trades, Operation::Read) + count(&run.orders, Operation::Read),
        run.trades
            .iter()
            .chain(&run.orders)
            .map(|entry| entry.rows)
            .sum::<u64>(),
        run.took
    );
}

struct Run {
    trades: Vec<Entry>,
    orders: Vec<Entry>,
    changes: u64,
    took: Duration,
}

/// Kills as often as asked, each time while `reads` holds and after up to `most` more records than at the kill before.
async fn run(
    mode: SnapshotMode,
    requests: Vec<SnapshotRequest>,
    kills: usize,
    rows: u32,
    most: u64,
    reads: impl Fn(&Checkpoint) -> bool,
) -> Run {
    let (postgres, redis, kafka) = (Postgres::start(&[]).await, Redis::start().await, Kafka::shared().await);
    execute(&postgres, LARGE_TABLE).await;
    execute(
        &postgres,
        &format!(
            "CREATE TABLE orders (id bigint PRIMARY KEY, price bigint, note text);
             INSERT INTO orders SELECT n, 0, repeat('o', 160) FROM generate_series(1, {rows}) n"
        ),
    )
    .await;
    let client = postgres.client().await;
    ledger::create(&client).await.unwrap();
    ledger::watch(&client, "public.orders").await.unwrap();
    let mut config = common::config(&postgres, kafka, Some(&redis));
    config.source.snapshot.mode = mode;
    config.source.snapshot.requests = requests;

    let start = Instant::now();
    let mut runtime = Runtime::capture(&config);
    runtime.ready(LIMIT).await;
    // Every change is in the log: those that the ledger knows have to be.
    let loads = [disturb(&postgres, "trades", PAUSE), disturb(&postgres, "orders", PAUSE)];
    let mut random = fastrand::Rng::with_seed(7);
    let mut generation = 0;
    for kill in 0..kills {
        // What the owner before has written is settled then, and what comes more is this one's.
        let begun = eventually("the next owner has begun", LIMIT, async || {
            let checkpoint = common::checkpoint(&config);
            checkpoint
                .filter(|checkpoint| checkpoint.owner_generation > generation)
                .ok_or("not yet")
        })
        .await;
        generation = begun.owner_generation;
        let goal = begun.events_total + random.u64(1..=most);
        eventually(&format!("kill {kill} finds a snapshot under way"), LIMIT, async || {
            let checkpoint = common::checkpoint(&config).unwrap();
            let published = checkpoint.events_total;
            if published >= goal && reads(&checkpoint) {
                Ok(())
            } else {
                Err(format!("{published} of {goal} records, {:?}", checkpoint.snapshot))
            }
        })
        .await;
        runtime.kill9();
        runtime.start_again();
        runtime.ready(LIMIT).await;
    }
    wait_for_snapshots(&config).await;
    let mut changes = 0;
    for (stop, clients) in loads {
        stop.send_replace(true);
        for client in clients {
            changes += client.await.unwrap();
        }
    }
    let mut logs = Vec::new();
    for name in ["trades", "orders"] {
        let rows = table(&client, name, "price note").await;
        logs.push(wait_until_equal(kafka, &config, name, &rows).await);
    }
    let took = start.elapsed();
    let verified = verify(&postgres, kafka, &redis, &config, "300s");
    let said = String::from_utf8_lossy(&verified.stdout);
    assert!(
        verified.status.success(),
        "{said}\n{}",
        String::from_utf8_lossy(&verified.stderr)
    );
    println!("{said}");
    let generation = common::checkpoint(&config).unwrap().owner_generation;
    assert!(generation > kills as u64, "each start is an owner of its own");
    let orders = logs.pop().unwrap();
    let trades = logs.pop().unwrap();
    Run {
        trades,
        orders,
        changes,
        took,
    }
}

/// Waits until nothing is left to read, for as long as it goes on.
async fn wait_for_snapshots(config: &CaptureConfig) {
    let mut before = None;
    loop {
        let state = eventually("the snapshots go on", LIMIT, async || {
            let state = common::checkpoint(config).unwrap().snapshot;
            if before.as_ref() == Some(&state) {
                Err(format!("{state:?}"))
            } else {
                Ok(state)
            }
        })
        .await;
        let requested = config.source.snapshot.requests.len();
        if state.reading.is_none()
            && state.done.len() == 2
            && state.requests.len() == requested
            && state.requests.values().all(Vec::is_empty)
        {
            return;
        }
        before = Some(state);
    }
}

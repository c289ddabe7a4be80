//! Every version of PostgreSQL that is supported, through the life of a capture.
//!
//! Judged by `tests/verifier` and the ledger, as in `crash.rs`.
#![allow(clippy::unwrap_used, clippy::expect_used, clippy::panic)]

mod common;
#[path = "common/verifier.rs"]
mod verifier;

use common::{LIMIT, checkpoint, config};
use meander_test_support::{Kafka, Postgres, Redis, Runtime, eventually};
use meander_workload::{
    ledger,
    load::{self, Load},
};
use verifier::verify;

/// Changes of every kind, each transaction in one string. TOAST: `large` is stored out of line, and most updates leave it alone.
const CHANGES: &[&str] = &[
    "INSERT INTO keyed SELECT i, 'note ' || i, repeat(chr(64 + i % 26), 5000) FROM generate_series(1, 60) i;
     INSERT INTO whole SELECT i, i * 1.5 FROM generate_series(1, 20) i",
    "UPDATE keyed SET note = note || '!' WHERE id % 3 = 0; SAVEPOINT s; DELETE FROM keyed; ROLLBACK TO s;
     UPDATE keyed SET id = id + 1000 WHERE id < 10; UPDATE whole SET amount = 'NaN' WHERE id < 5",
    "DELETE FROM keyed WHERE id BETWEEN 40 AND 50; UPDATE keyed SET large = 'small' WHERE id = 20; DELETE FROM whole WHERE id = 7",
    "ALTER TABLE keyed ADD COLUMN extra int DEFAULT 5; SELECT meander_ledger.watch('keyed')",
    "INSERT INTO keyed VALUES (2000, 'after ADD', NULL, 6); UPDATE keyed SET note = 'n' WHERE id = 30",
    "ALTER TABLE keyed DROP COLUMN note; SELECT meander_ledger.watch('keyed')",
    "UPDATE keyed SET extra = 7 WHERE id IN (30, 2000)",
    "ALTER TABLE keyed RENAME COLUMN extra TO more; ALTER TABLE keyed ALTER more TYPE bigint USING more + 3000000000; SELECT meander_ledger.watch('keyed')",
    "UPDATE keyed SET more = more + 1 WHERE id IN (31, 2000)",
    "TRUNCATE keyed, whole",
    "INSERT INTO keyed SELECT i, repeat('z', 5000), i FROM generate_series(1, 10) i; UPDATE keyed SET more = -more; INSERT INTO whole VALUES (1, 'Infinity')",
];
/// After this many transactions the runtime is killed.
const KILL_AFTER: usize = 5;

/// Waits until a session has ended for this reason.
async fn wait_for_failure(runtime: &Runtime, reason: &str) {
    let wanted = format!("meander_capture_failures_total{{reason=\"{reason}\"}}");
    eventually(&wanted, LIMIT, async || {
        let (_, metrics) = runtime.get("/metrics").await.map_err(|error| error.to_string())?;
        metrics.contains(&wanted).then_some(()).ok_or(metrics)
    })
    .await;
}

async fn a_capture_lives_on(major: u32) {
    let (postgres, redis, kafka) = (
        Postgres::start_version(major, &[]).await,
        Redis::start().await,
        Kafka::shared().await,
    );
    let client = postgres.client().await;
    ledger::create(&client).await.unwrap();
    client
        .batch_execute(
            "CREATE TABLE keyed (id int PRIMARY KEY, note text, large text); ALTER TABLE keyed ALTER large SET STORAGE EXTERNAL;
             CREATE TABLE whole (id int PRIMARY KEY, amount numeric); ALTER TABLE whole REPLICA IDENTITY FULL",
        )
        .await
        .unwrap();
    for table in ["keyed", "whole"] {
        ledger::watch(&client, table).await.unwrap();
    }
    let database: tokio_postgres::Config = postgres.url().parse().unwrap();
    load::prepare(&load::connect(&database).await.unwrap(), "public.trades")
        .await
        .unwrap();
    let config = config(&postgres, kafka, Some(&redis));
    let mut runtime = Runtime::capture(&config);
    runtime.ready(LIMIT).await;

    let load = tokio::spawn({
        let load = Load {
            table: "public.trades".to_owned(),
            changes: 300,
            rate: 0.0,
            seed: u64::from(major),
            clients: 2,
            key_changes: true,
        };
        async move { load::run(&database, &load).await.unwrap() }
    });
    for (number, changes) in CHANGES.iter().enumerate() {
        if number == KILL_AFTER {
            eventually("changes are published", LIMIT, async || {
                checkpoint(&config)
                    .filter(|checkpoint| checkpoint.events_total > 0)
                    .ok_or("none")
            })
            .await;
            runtime.kill9();
            runtime.start_again();
        }
        client
            .batch_execute(&format!("BEGIN; {changes}; COMMIT"))
            .await
            .unwrap();
    }
    load.await.unwrap();
    let verified = tokio::task::block_in_place(|| verify(&postgres, kafka, &redis, &config, "60s"));
    assert!(
        verified.status.success(),
        "{}\n{}",
        String::from_utf8_lossy(&verified.stdout),
        String::from_utf8_lossy(&verified.stderr)
    );

    assert!(runtime.terminate(LIMIT).success());
    client
        .batch_execute("SELECT pg_drop_replication_slot(slot_name) FROM pg_replication_slots")
        .await
        .unwrap();
    runtime.start_again();
    wait_for_failure(&runtime, "SlotMissing").await;
}

#[tokio::test(flavor = "multi_thread")]
async fn a_capture_from_postgresql_14_loses_and_doubles_nothing() {
    a_capture_lives_on(14).await;
}

#[tokio::test(flavor = "multi_thread")]
async fn a_capture_from_postgresql_15_loses_and_doubles_nothing() {
    a_capture_lives_on(15).await;
}

#[tokio::test(flavor = "multi_thread")]
async fn a_capture_from_postgresql_16_loses_and_doubles_nothing() {
    a_capture_lives_on(16).await;
}

#[tokio::test(flavor = "multi_thread")]
async fn a_capture_from_postgresql_17_loses_and_doubles_nothing() {
    a_capture_lives_on(17).await;
}

#[tokio::test(flavor = "multi_thread")]
async fn a_capture_from_postgresql_18_loses_and_doubles_nothing() {
    a_capture_lives_on(18).await;
}

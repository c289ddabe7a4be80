//! One transaction that is far larger than memory, with a crash in the middle of it.
//!
//! `make test` runs it with few rows; `make test-long` with ten million, which MEANDER_LARGE_ROWS says.
#![allow(clippy::unwrap_used, clippy::expect_used, clippy::panic)]

mod common;

use std::{collections::HashMap, env, time::Duration};

use common::{checkpoint, config};
use meander_runtime::{log::POSITION_HEADER, position::Position};
use meander_test_support::{Kafka, Postgres, Runtime, eventually};
use rdkafka::{
    Message as _,
    message::{BorrowedMessage, Headers as _},
};

const ROWS: u64 = 150_000;
/// Ten million rows take minutes to decode, publish and read back.
const LIMIT: Duration = Duration::from_secs(3600);
/// What the runtime may take, whatever the size of a transaction.
const MEMORY_MIB: u64 = 192;

/// Waits until Kafka has the transaction's changes before this ordinal.
async fn wait_until_published(config: &meander_config::CaptureConfig, ordinal: u64) {
    eventually("changes are published", LIMIT, async || {
        let published = checkpoint(config).and_then(|checkpoint| checkpoint.published);
        published
            .filter(|published| published.ordinal >= ordinal)
            .map(drop)
            .ok_or_else(|| format!("{published:?}"))
    })
    .await;
}

/// Reads the topic and checks that each change of the one transaction is in it once, and in order in each partition.
fn check(kafka: &Kafka, topic: &str, rows: u64) {
    let mut seen = vec![false; usize::try_from(rows).unwrap()];
    let mut last = HashMap::new();
    let check = |message: &BorrowedMessage<'_>| {
        let headers = message.headers().unwrap();
        let header = headers.iter().find(|header| header.key == POSITION_HEADER).unwrap();
        let position: Position = std::str::from_utf8(header.value.unwrap()).unwrap().parse().unwrap();
        let last = last.insert(message.partition(), position);
        assert!(last < Some(position), "{position} comes after {last:?}");
        // The rows were inserted in the order of their ids.
        let key = format!("{{\"id\":\"{}\"}}", position.ordinal + 1);
        assert_eq!(message.key().unwrap(), key.as_bytes());
        let place = &mut seen[usize::try_from(position.ordinal).unwrap()];
        assert!(!*place, "{position} is there twice");
        *place = true;
    };
    kafka.read(|name| name == topic, check);
    let missing = seen.iter().filter(|seen| !**seen).count();
    assert_eq!(missing, 0, "changes are missing");
}

#[tokio::test(flavor = "multi_thread")]
async fn a_transaction_far_larger_than_memory_is_captured_once_and_in_order_through_a_crash() {
    let rows = env::var("MEANDER_LARGE_ROWS").map_or(ROWS, |rows| rows.parse().unwrap());
    let (postgres, kafka) = (Postgres::start(&[]).await, Kafka::shared().await);
    let client = postgres.client().await;
    client
        .batch_execute("CREATE TABLE large (id int PRIMARY KEY, note text)")
        .await
        .unwrap();
    let config = config(&postgres, kafka, None);
    let mut runtime = Runtime::capture(&config);
    runtime.ready(LIMIT).await;
    client
        .execute(
            &format!("INSERT INTO large SELECT i, 'the note of row ' || i FROM generate_series(1, {rows}) i"),
            &[],
        )
        .await
        .unwrap();

    wait_until_published(&config, rows / 3).await;
    let before_the_crash = runtime.peak_memory();
    runtime.kill9();
    runtime.start_again();
    wait_until_published(&config, rows * 2 / 3).await;
    let walsender = "SELECT pid FROM pg_stat_replication";
    let walsender_before: i32 = client.query_one(walsender, &[]).await.unwrap().get(0);
    wait_until_published(&config, rows - 1).await;
    let walsender_after: i32 = client.query_one(walsender, &[]).await.unwrap().get(0);
    assert_eq!(
        walsender_before, walsender_after,
        "the server was answered all the time"
    );
    let peak = before_the_crash.max(runtime.peak_memory());
    println!("{rows} rows in one transaction: the runtime took {peak} MiB of memory at most");
    assert!(peak < MEMORY_MIB, "{peak} MiB of memory");

    let topic = format!("{}.public.large", config.kafka.topic_prefix);
    tokio::task::block_in_place(|| check(kafka, &topic, rows));
    let checkpoint = checkpoint(&config).unwrap();
    assert_eq!(checkpoint.events_total, rows);
    let complete = checkpoint.complete.unwrap();
    assert_eq!(
        complete,
        Position::end_of_transaction(complete.epoch, complete.commit_lsn)
    );
    assert!(runtime.terminate(LIMIT).success());
}

//! Bulk snapshots against a real PostgreSQL and Kafka: every row that was there is in the log, at the place of the snapshot, and what a
//! crash repeats is rows of snapshots alone.
#![allow(clippy::unwrap_used, clippy::expect_used, clippy::panic)]

mod common;
#[path = "common/fold.rs"]
mod fold;
#[path = "common/tables.rs"]
mod tables;

use std::{
    collections::{BTreeMap, BTreeSet},
    process::Command,
    time::Duration,
};

use common::LIMIT;
use fold::{Entry, difference, fold, read_log};
use meander_config::{CaptureConfig, SnapshotMode};
use meander_proto::v1::Operation;
use meander_test_support::{Kafka, Postgres, Runtime, eventually};
use tables::{LARGE_TABLE, count, disturb, execute, table, topic, wait_for_ends, wait_until_equal};
use tokio_postgres::Client;

fn config(postgres: &Postgres, kafka: &Kafka) -> CaptureConfig {
    let mut config = common::config(postgres, kafka, None);
    config.source.snapshot.mode = SnapshotMode::Bulk;
    config
}

fn reads(log: &[Entry]) -> Vec<&Entry> {
    log.iter().filter(|entry| entry.operation == Operation::Read).collect()
}

/// A begin, the rows, and an end that knows how many there are.
fn assert_whole(log: &[Entry], rows: usize) {
    let of_snapshot: Vec<_> = log.iter().filter(|entry| !entry.snapshot.is_empty()).collect();
    let (first, last) = (of_snapshot.first().unwrap(), of_snapshot.last().unwrap());
    assert_eq!(first.operation, Operation::SnapshotBegin);
    assert_eq!((last.operation, last.rows), (Operation::SnapshotEnd, rows as u64));
    assert_eq!(reads(log).len(), rows);
    assert!(of_snapshot.iter().all(|entry| entry.snapshot == first.snapshot));
    // By the row, since not all have a key.
    let distinct: BTreeSet<_> = reads(log).iter().map(|entry| &entry.row).collect();
    assert_eq!(distinct.len(), rows);
}

const TABLES: &str = "CREATE TABLE trades (id int PRIMARY KEY, price numeric, at timestamptz, note text);
    INSERT INTO trades SELECT n, n * 1.5, '2026-11-21 10:00:00.123456+02', CASE WHEN n % 2 = 0 THEN E'a\\tb\\\\' || n END
      FROM generate_series(1, 1500) n;
    CREATE TABLE empty (id int PRIMARY KEY);
    CREATE TABLE keyless (note text); ALTER TABLE keyless REPLICA IDENTITY FULL;
    INSERT INTO keyless SELECT repeat('x', 1000) || n FROM generate_series(1, 40000) n;
    CREATE TABLE parts (id int, note text, PRIMARY KEY (id)) PARTITION BY RANGE (id);
    CREATE TABLE parts_1 PARTITION OF parts FOR VALUES FROM (0) TO (1000);
    CREATE TABLE parts_2 (note text, gone int, id int NOT NULL); ALTER TABLE parts_2 DROP COLUMN gone;
    ALTER TABLE parts ATTACH PARTITION parts_2 FOR VALUES FROM (1000) TO (3000);
    INSERT INTO parts SELECT n, 'p' || n FROM generate_series(1, 2000) n;
    CREATE TABLE parent (id int PRIMARY KEY, note text); CREATE TABLE child (PRIMARY KEY (id)) INHERITS (parent);
    INSERT INTO parent VALUES (1, 'a'); INSERT INTO child VALUES (2, 'b')";

async fn reads_every_table_once(version: u32) {
    let (postgres, kafka) = (Postgres::start_version(version, &[]).await, Kafka::shared().await);
    let client = postgres.client().await;
    client.batch_execute(TABLES).await.unwrap();
    // Nothing that the role is set to cuts the reading short or changes how values look.
    let settings = [
        ("statement_timeout", "50"),
        ("idle_in_transaction_session_timeout", "50"),
        ("idle_session_timeout", "50"),
    ];
    let newer = [("transaction_timeout", "1000")];
    for (name, value) in settings.iter().chain(newer.iter().filter(|_| version >= 17)) {
        client
            .batch_execute(&format!("ALTER ROLE postgres SET {name} = {value}"))
            .await
            .unwrap();
    }
    client
        .batch_execute("ALTER ROLE postgres SET TimeZone = 'Asia/Tokyo'; SET TimeZone = 'UTC'")
        .await
        .unwrap();
    let mut config = config(&postgres, kafka);
    let mut runtime = Runtime::capture(&config);
    runtime.ready(LIMIT).await;
    let trades = wait_for_ends(kafka, &config, "trades", 1).await;
    assert_whole(&trades, 1500);
    for (table, rows) in [
        ("empty", 0),
        ("keyless", 40_000),
        ("parts", 2000),
        ("parent", 1),
        ("child", 1),
    ] {
        assert_whole(&wait_for_ends(kafka, &config, table, 1).await, rows);
    }
    let slots = client
        .query_one("SELECT count(*) FROM pg_replication_slots", &[])
        .await
        .unwrap();
    assert_eq!(slots.get::<_, i64>(0), 1, "the snapshot's slot is gone");
    let state = common::checkpoint(&config).unwrap().snapshot;
    assert_eq!((state.done.len(), state.reading), (6, None));

    // The stream says the same values in the same words.
    client
        .batch_execute("UPDATE trades SET id = id; UPDATE parts SET id = id")
        .await
        .unwrap();
    for (name, columns) in [("trades", "price at note"), ("parts", "note")] {
        let rows = table(&client, name, columns).await;
        let log = eventually("all updates are in the log", LIMIT, async || {
            let log = tokio::task::block_in_place(|| read_log(kafka, &topic(&config, name)));
            let updates = count(&log, Operation::Update);
            if updates == rows.len() { Ok(log) } else { Err(updates) }
        })
        .await;
        assert_eq!(difference(&fold(&log), &rows), None);
        let said = |operation| -> BTreeMap<_, _> {
            log.iter()
                .filter(|entry| entry.operation == operation)
                .map(|entry| (entry.key.clone(), entry.row.clone()))
                .collect()
        };
        assert_eq!(said(Operation::Read), said(Operation::Update));
    }

    // A restart reads nothing again. What joins now is read in chunks, and so is what is asked for.
    assert!(runtime.terminate(LIMIT).success(), "{}", runtime.process().log_tail());
    client
        .batch_execute("CREATE TABLE late (id int PRIMARY KEY); INSERT INTO late VALUES (1)")
        .await
        .unwrap();
    config.source.snapshot.requests = vec![meander_config::SnapshotRequest {
        id: "repair".to_owned(),
        tables: vec!["public.child".to_owned()],
    }];
    let mut runtime = Runtime::capture(&config);
    runtime.ready(LIMIT).await;
    assert_whole(&wait_for_ends(kafka, &config, "late", 1).await, 1);
    assert_eq!(reads(&wait_for_ends(kafka, &config, "child", 2).await).len(), 2);
    let log = tokio::task::block_in_place(|| read_log(kafka, &topic(&config, "trades")));
    assert_eq!(count(&log, Operation::Read), 1500);
}

#[tokio::test(flavor = "multi_thread")]
async fn every_kind_of_table_is_read_once_from_the_oldest_version() {
    reads_every_table_once(14).await;
}

#[tokio::test(flavor = "multi_thread")]
async fn every_kind_of_table_is_read_once_from_the_newest_version() {
    reads_every_table_once(18).await;
}

#[tokio::test(flavor = "multi_thread")]
async fn a_bulk_snapshot_under_concurrent_changes_comes_to_what_the_table_holds() {
    let (postgres, kafka) = (Postgres::start(&[]).await, Kafka::shared().await);
    execute(&postgres, LARGE_TABLE).await;
    let config = config(&postgres, kafka);
    let (stop, clients) = disturb(&postgres, "trades", Duration::from_millis(4));
    let mut runtime = Runtime::capture(&config);
    runtime.ready(LIMIT).await;
    wait_for_ends(kafka, &config, "trades", 1).await;
    stop.send_replace(true);
    let mut made = 0;
    for client in clients {
        made += client.await.unwrap();
    }
    let rows = table(&postgres.client().await, "trades", "price note").await;
    let log = wait_until_equal(kafka, &config, "trades", &rows).await;
    assert_whole(&log, reads(&log).len());
    // Every row has one place, between two transactions.
    let places: BTreeSet<_> = reads(&log).iter().map(|entry| entry.coordinate.1).collect();
    assert_eq!(places.len(), 1);
    println!("{made} changes beside the snapshot, {} rows read", reads(&log).len());
}

/// Waits until a transaction waits for another process.
async fn wait_for_process(client: &Client, what: &str, condition: &str) -> i32 {
    let sql = format!("SELECT pid FROM pg_stat_activity WHERE {condition}");
    eventually(what, LIMIT, async || {
        let rows = client.query(&sql, &[]).await.unwrap();
        rows.first().map(|row| row.get(0)).ok_or("not yet")
    })
    .await
}

#[tokio::test(flavor = "multi_thread")]
async fn a_commit_that_is_in_the_wal_and_not_yet_visible_is_in_the_snapshot() {
    let (postgres, kafka) = (
        Postgres::start(&[("synchronous_standby_names", "nobody"), ("synchronous_commit", "local")]).await,
        Kafka::shared().await,
    );
    execute(
        &postgres,
        "CREATE TABLE trades (id bigint PRIMARY KEY, price bigint, note text);
         INSERT INTO trades SELECT n, 0, '' FROM generate_series(1, 100) n;
         CREATE SCHEMA aside; CREATE TABLE aside.writers (number bigint, xid xid)",
    )
    .await;
    let mut config = config(&postgres, kafka);
    config.source.snapshot.mode = SnapshotMode::Never;
    let mut runtime = Runtime::capture(&config);
    runtime.ready(LIMIT).await;
    assert!(runtime.terminate(LIMIT).success());

    // Making a slot looks twice for transactions that run, and waits each time for those that it finds. What commits in between is in
    // the slot's snapshot by the WAL, also if it waits for a standby and no other snapshot sees it.
    let watcher = postgres.client().await;
    let writer = |value: i64, ends: bool| {
        let (postgres, noted) = (postgres.url(), &watcher);
        async move {
            let (client, driver) = tokio_postgres::connect(&postgres, tokio_postgres::NoTls).await.unwrap();
            tokio::spawn(driver);
            let sql =
                format!("SET synchronous_commit = on; BEGIN; UPDATE trades SET price = {value} WHERE id = {value}");
            client.batch_execute(&sql).await.unwrap();
            let xid = client
                .query_one("SELECT pg_current_xact_id()::text", &[])
                .await
                .unwrap();
            let note = format!(
                "INSERT INTO aside.writers VALUES ({value}, '{}')",
                xid.get::<_, &str>(0)
            );
            noted.batch_execute(&note).await.unwrap();
            if ends {
                drop(tokio::spawn(async move { client.batch_execute("COMMIT").await }));
                None
            } else {
                Some(client)
            }
        }
    };
    config.source.snapshot.mode = SnapshotMode::Bulk;
    let mut runtime = Runtime::capture(&config);
    // After this the log is opened, and only then the snapshot is taken. A transaction that is open for long would be waited for before.
    wait_for_process(&watcher, "the capture owns its slot", "query LIKE 'START_REPLICATION%'").await;
    let first = writer(1, false).await.unwrap();
    let waits_for = |number: i64| {
        format!(
            "wait_event = 'transactionid' AND EXISTS (SELECT FROM pg_locks l JOIN aside.writers w ON w.xid = l.transactionid
             WHERE l.pid = pg_stat_activity.pid AND NOT l.granted AND w.number = {number})"
        )
    };
    wait_for_process(&watcher, "the slot waits for the first", &waits_for(1)).await;
    let second = writer(2, false).await.unwrap();
    first
        .batch_execute("SET LOCAL synchronous_commit = local; COMMIT")
        .await
        .unwrap();
    wait_for_process(&watcher, "the slot waits for the second", &waits_for(2)).await;
    writer(3, true).await;
    wait_for_process(&watcher, "the third waits for a standby", "wait_event = 'SyncRep'").await;
    second
        .batch_execute("SET LOCAL synchronous_commit = local; COMMIT")
        .await
        .unwrap();

    // Newer minor versions also wait for what is not visible yet before they hand out the snapshot, the others do not. Either way no
    // row comes that is older than what was streamed.
    let is_read = eventually("the third is read, or waited for", LIMIT, async || {
        let log = tokio::task::block_in_place(|| read_log(kafka, &topic(&config, "trades")));
        let waiting = format!("SELECT FROM pg_stat_activity WHERE {}", waits_for(3));
        match (reads(&log).len(), watcher.query(&waiting, &[]).await.unwrap().len()) {
            (0, 0) => Err("neither"),
            (rows, _) => Ok(rows > 0),
        }
    })
    .await;
    let price = "SELECT price FROM trades WHERE id = 3";
    let price: i64 = watcher.query_one(price, &[]).await.unwrap().get(0);
    assert_eq!(price, 0, "it must not be visible, or this test shows nothing");
    if !is_read {
        // The server is told to wait no longer.
        let cancel = "SELECT pg_cancel_backend(pid) FROM pg_stat_activity WHERE wait_event = 'SyncRep'";
        watcher.batch_execute(cancel).await.unwrap();
    }
    let log = wait_for_ends(kafka, &config, "trades", 1).await;
    assert_whole(&log, 100);
    let read = reads(&log).into_iter().find(|entry| entry.row[0] == "3").unwrap();
    assert_eq!(read.row[1], "3");
    let rows = (1..=100).map(|id| {
        let price = if id <= 3 { id } else { 0 };
        (
            format!("{{\"id\":\"{id}\"}}"),
            vec![id.to_string(), price.to_string(), String::new()],
        )
    });
    assert_eq!(difference(&fold(&log), &rows.collect()), None);
    let updates = log.iter().filter(|entry| entry.operation == Operation::Update);
    assert!(updates.clone().count() == 3 && updates.clone().all(|update| update.coordinate < read.coordinate));
    runtime.ready(LIMIT).await;
}

/// Sends a signal to processes of the test's own server.
fn signal(signal: &str, processes: &[i32]) {
    let processes = processes.iter().map(ToString::to_string);
    assert!(
        Command::new("kill")
            .arg(signal)
            .args(processes)
            .status()
            .unwrap()
            .success()
    );
}

#[tokio::test(flavor = "multi_thread")]
async fn changes_wait_for_as_long_as_it_reads_and_what_is_rewritten_meanwhile_is_read_in_chunks() {
    let (postgres, kafka) = (Postgres::start(&[]).await, Kafka::shared().await);
    execute(
        &postgres,
        "CREATE TABLE first (id int PRIMARY KEY, note text);
         INSERT INTO first SELECT n, repeat('x', 1000) || n FROM generate_series(1, 40000) n;
         CREATE TABLE second (id int PRIMARY KEY, note int); INSERT INTO second SELECT n, n FROM generate_series(1, 1000) n;
         CREATE TABLE third (id int PRIMARY KEY, note text); INSERT INTO third SELECT n, n FROM generate_series(1, 1000) n",
    )
    .await;
    let mut config = config(&postgres, kafka);
    config.source.snapshot.parallelism = std::num::NonZeroU8::MIN;
    let mut runtime = Runtime::capture(&config);
    runtime.ready(LIMIT).await;
    let client = postgres.client().await;
    let reader = wait_for_process(&client, "a table is read", "state = 'active' AND query LIKE 'COPY%'").await;
    signal("-STOP", &[reader]);
    let log = eventually("rows are published", LIMIT, async || {
        let log = tokio::task::block_in_place(|| read_log(kafka, &topic(&config, "first")));
        if reads(&log).is_empty() { Err("none") } else { Ok(log) }
    })
    .await;
    assert_eq!(
        count(&log, Operation::SnapshotEnd),
        0,
        "it must be in the middle, or this test shows nothing"
    );

    // The server gives up on a walsender whose client says nothing for ten seconds: that is what the session asks for.
    let sender = "SELECT active_pid, clock_timestamp() FROM pg_replication_slots";
    let (walsender, stopped): (i32, std::time::SystemTime) = {
        let row = client.query_one(sender, &[]).await.unwrap();
        (row.get(0), row.get(1))
    };
    client
        .batch_execute(
            "UPDATE first SET note = 'late' WHERE id = 1;
             ALTER TABLE second ALTER note TYPE text USING 'n' || note; UPDATE second SET note = 'late' WHERE id = 1;
             TRUNCATE third; INSERT INTO third VALUES (7, 'new')",
        )
        .await
        .unwrap();
    eventually("more than wal_sender_timeout has passed", LIMIT, async || {
        let row = client.query_one(sender, &[]).await.unwrap();
        assert_eq!(
            row.get::<_, Option<i32>>(0),
            Some(walsender),
            "{}",
            runtime.process().log_tail()
        );
        let now: std::time::SystemTime = row.get(1);
        let passed = now.duration_since(stopped).unwrap();
        if passed > Duration::from_secs(12) {
            Ok(())
        } else {
            Err(format!("{passed:?}"))
        }
    })
    .await;
    signal("-CONT", &[reader]);

    let log = wait_for_ends(kafka, &config, "first", 1).await;
    assert_whole(&log, 40_000);
    for (name, rows) in [("first", 40_000), ("second", 1000), ("third", 1)] {
        wait_for_ends(kafka, &config, name, 1).await;
        let rows = {
            let held = table(&client, name, "note").await;
            assert_eq!(held.len(), rows);
            held
        };
        let log = wait_until_equal(kafka, &config, name, &rows).await;
        let end = log
            .iter()
            .rfind(|entry| entry.operation == Operation::SnapshotEnd)
            .unwrap();
        let late = log.iter().find(|entry| entry.operation == Operation::Update);
        // A change comes after the rows of the snapshot that does not see it, and before those of a chunk that does.
        assert!(late.is_none_or(|late| (late.coordinate > end.coordinate) == (name == "first")));
    }
    let checkpoint = common::checkpoint(&config).unwrap();
    assert_eq!(checkpoint.owner_generation, 1, "no session has failed");
    assert!(checkpoint.snapshot.bulk_is_over);
}

#[tokio::test(flavor = "multi_thread")]
async fn a_snapshot_that_cannot_be_taken_is_waited_for_and_changes_go_on() {
    let (postgres, kafka) = (
        Postgres::start(&[("max_replication_slots", "2")]).await,
        Kafka::shared().await,
    );
    execute(
        &postgres,
        "CREATE TABLE trades (id int PRIMARY KEY); INSERT INTO trades VALUES (1)",
    )
    .await;
    let mut config = config(&postgres, kafka);
    config.source.snapshot.mode = SnapshotMode::Never;
    let mut runtime = Runtime::capture(&config);
    runtime.ready(LIMIT).await;
    assert!(runtime.terminate(LIMIT).success());
    let client = postgres.client().await;
    let other = "SELECT pg_create_physical_replication_slot('other')";
    client.batch_execute(other).await.unwrap();
    config.source.snapshot.mode = SnapshotMode::Bulk;
    let mut runtime = Runtime::capture(&config);
    runtime.ready(LIMIT).await;
    eventually("the cause is told", LIMIT, async || {
        let log = runtime.process().log_tail();
        if log.contains("too few replication slots are free") {
            Ok(())
        } else {
            Err(log)
        }
    })
    .await;
    client.batch_execute("INSERT INTO trades VALUES (2)").await.unwrap();
    let log = eventually("changes go on", LIMIT, async || {
        let log = tokio::task::block_in_place(|| read_log(kafka, &topic(&config, "trades")));
        if log.is_empty() { Err("nothing") } else { Ok(log) }
    })
    .await;
    assert_eq!(log[0].operation, Operation::Insert);
    client
        .batch_execute("SELECT pg_drop_replication_slot('other')")
        .await
        .unwrap();
    assert_whole(&wait_for_ends(kafka, &config, "trades", 1).await, 2);
}

//! Snapshots against a real PostgreSQL and Kafka: every row that was there is in the log, once, and never older than what the log has.
#![allow(clippy::unwrap_used, clippy::expect_used, clippy::panic)]

mod common;
#[path = "common/fold.rs"]
mod fold;
#[path = "common/tables.rs"]
mod tables;

use std::time::Duration;

use common::LIMIT;
use fold::{assert_read_once, difference, fold, read_log};
use meander_config::{CaptureConfig, SnapshotMode, SnapshotRequest};
use meander_proto::v1::Operation;
use meander_test_support::{Kafka, Postgres, Runtime, eventually};
use tables::{LARGE_TABLE, count, disturb, execute, table, topic, wait_for_ends, wait_until_equal};

fn config(postgres: &Postgres, kafka: &Kafka) -> CaptureConfig {
    let mut config = common::config(postgres, kafka, None);
    config.source.snapshot.mode = SnapshotMode::Incremental;
    config
}

#[tokio::test(flavor = "multi_thread")]
async fn rows_that_were_there_are_read_between_markers_and_never_again() {
    let (postgres, kafka) = (Postgres::start(&[]).await, Kafka::shared().await);
    execute(
        &postgres,
        "CREATE TABLE trades (id int PRIMARY KEY, price numeric, note text);
         INSERT INTO trades SELECT n, n * 1.5, CASE WHEN n % 2 = 0 THEN E'a\\tb\\\\' || n END FROM generate_series(1, 1500) n;
         CREATE TABLE empty (id int PRIMARY KEY);
         CREATE TABLE pairs (b text COLLATE \"C\", a numeric(8,2), c char(3), PRIMARY KEY (a, b, c));
         INSERT INTO pairs SELECT chr(97 + n % 26) || n, n % 7, 'x' FROM generate_series(1, 1200) n;
         CREATE TABLE keyless (note text); ALTER TABLE keyless REPLICA IDENTITY FULL;
         INSERT INTO keyless SELECT 'same' FROM generate_series(1, 3)",
    )
    .await;
    let config = config(&postgres, kafka);
    let mut runtime = Runtime::capture(&config);
    runtime.ready(LIMIT).await;
    let log = wait_for_ends(kafka, &config, "trades", 1).await;
    let (begin, end) = (log.first().unwrap(), log.last().unwrap());
    assert_eq!(begin.operation, Operation::SnapshotBegin);
    assert_eq!((end.operation, end.rows), (Operation::SnapshotEnd, 1500));
    assert_eq!(begin.snapshot, end.snapshot);
    assert_read_once(&log);
    let rows = table(&postgres.client().await, "trades", "price note").await;
    assert_eq!(difference(&fold(&log), &rows), None);

    let pairs = wait_for_ends(kafka, &config, "pairs", 1).await;
    assert_eq!(
        (pairs.last().unwrap().rows, count(&pairs, Operation::Read)),
        (1200, 1200)
    );
    assert_read_once(&pairs);
    assert_eq!(wait_for_ends(kafka, &config, "empty", 1).await.len(), 2);
    assert_eq!(
        count(&wait_for_ends(kafka, &config, "keyless", 1).await, Operation::Read),
        3
    );

    // A restart reads nothing again, and goes on with changes.
    assert!(runtime.terminate(LIMIT).success(), "{}", runtime.process().log_tail());
    runtime.start_again();
    runtime.ready(LIMIT).await;
    execute(
        &postgres,
        "UPDATE trades SET price = 0 WHERE id = 7; DELETE FROM trades WHERE id = 8",
    )
    .await;
    let rows = table(&postgres.client().await, "trades", "price note").await;
    let after = wait_until_equal(kafka, &config, "trades", &rows).await;
    assert_eq!(after.len(), log.len() + 2);
}

#[tokio::test(flavor = "multi_thread")]
async fn a_snapshot_under_concurrent_changes_comes_to_what_the_table_holds() {
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
    assert_read_once(&log);
    println!(
        "{made} changes beside the snapshot, {} rows read",
        count(&log, Operation::Read)
    );
}

#[tokio::test(flavor = "multi_thread")]
async fn a_commit_that_is_in_the_wal_and_not_yet_visible_is_not_overwritten_by_the_snapshot() {
    let (postgres, kafka) = (
        Postgres::start(&[("synchronous_standby_names", "nobody"), ("synchronous_commit", "local")]).await,
        Kafka::shared().await,
    );
    execute(
        &postgres,
        "CREATE TABLE trades (id bigint PRIMARY KEY, price bigint, note text);
         INSERT INTO trades SELECT n, 0, '' FROM generate_series(1, 100) n",
    )
    .await;
    let mut config = config(&postgres, kafka);
    config.source.snapshot.mode = SnapshotMode::Never;
    let mut runtime = Runtime::capture(&config);
    runtime.ready(LIMIT).await;

    // It waits for a standby that does not exist: its commit is in the WAL, and is streamed; but no snapshot sees it.
    let waiting = postgres.client().await;
    let commit = tokio::spawn(async move {
        waiting
            .batch_execute("SET synchronous_commit = on; UPDATE trades SET price = 7 WHERE id = 50")
            .await
    });
    let streamed = eventually("the change is streamed", LIMIT, async || {
        let log = tokio::task::block_in_place(|| read_log(kafka, &topic(&config, "trades")));
        if log.is_empty() { Err("nothing yet") } else { Ok(log) }
    })
    .await;
    assert_eq!(streamed[0].row[1], "7");
    let client = postgres.client().await;
    let price = client
        .query_one("SELECT price FROM trades WHERE id = 50", &[])
        .await
        .unwrap();
    assert_eq!(
        price.get::<_, i64>(0),
        0,
        "it must not be visible, or this test shows nothing"
    );

    // The runtime that reads the snapshot is another process than the one that streamed the change.
    assert!(runtime.terminate(LIMIT).success());
    config.source.snapshot.mode = SnapshotMode::Incremental;
    let mut runtime = Runtime::capture(&config);
    runtime.ready(LIMIT).await;
    let log = eventually("the snapshot waits", LIMIT, async || {
        let log = tokio::task::block_in_place(|| read_log(kafka, &topic(&config, "trades")));
        if count(&log, Operation::SnapshotBegin) == 1 {
            Ok(log)
        } else {
            Err(format!("{} records", log.len()))
        }
    })
    .await;
    assert_eq!(count(&log, Operation::Read), 0);
    // The server is told to wait no longer.
    client
        .batch_execute("SELECT pg_cancel_backend(pid) FROM pg_stat_activity WHERE wait_event = 'SyncRep'")
        .await
        .unwrap();
    commit.await.unwrap().unwrap();
    let log = wait_for_ends(kafka, &config, "trades", 1).await;
    assert_eq!(count(&log, Operation::Read), 100);
    let rows = table(&client, "trades", "price note").await;
    assert_eq!(difference(&fold(&log), &rows), None);
}

#[tokio::test(flavor = "multi_thread")]
async fn a_table_that_joins_later_and_one_that_is_asked_for_are_read_while_others_stream() {
    let (postgres, kafka) = (Postgres::start(&[]).await, Kafka::shared().await);
    execute(
        &postgres,
        "CREATE TABLE trades (id int PRIMARY KEY, note text); INSERT INTO trades VALUES (1, 'a'), (2, 'b')",
    )
    .await;
    let mut config = config(&postgres, kafka);
    let mut runtime = Runtime::capture(&config);
    runtime.ready(LIMIT).await;
    wait_for_ends(kafka, &config, "trades", 1).await;
    assert!(runtime.terminate(LIMIT).success());
    execute(
        &postgres,
        "CREATE TABLE late (id int PRIMARY KEY, note text); INSERT INTO late VALUES (1, 'x')",
    )
    .await;
    config.source.snapshot.requests = vec![SnapshotRequest {
        id: "repair".to_owned(),
        tables: vec!["public.trades".to_owned()],
    }];
    let mut runtime = Runtime::capture(&config);
    runtime.ready(LIMIT).await;
    assert_eq!(
        count(&wait_for_ends(kafka, &config, "late", 1).await, Operation::Read),
        1
    );
    let log = wait_for_ends(kafka, &config, "trades", 2).await;
    assert_eq!(count(&log, Operation::Read), 4);
    assert_read_once(&log);
    assert!(runtime.terminate(LIMIT).success());
    let state = common::checkpoint(&config).unwrap().snapshot;
    assert_eq!(
        (state.done.len(), &state.requests["repair"][..], state.reading),
        (2, &[][..], None)
    );

    // What was done under a name is not done again, nor is anything else.
    let mut runtime = Runtime::capture(&config);
    runtime.ready(LIMIT).await;
    execute(&postgres, "INSERT INTO trades VALUES (3, 'c')").await;
    let rows = table(&postgres.client().await, "trades", "note").await;
    assert_eq!(
        wait_until_equal(kafka, &config, "trades", &rows).await.len(),
        log.len() + 1
    );
}

/// Waits until the runtime's log has this word.
async fn wait_for_word(runtime: &mut Runtime, word: &str) {
    eventually(word, LIMIT, async || {
        let log = std::fs::read_to_string(runtime.process().log()).unwrap();
        if log.contains(word) { Ok(()) } else { Err(log) }
    })
    .await;
}

#[tokio::test(flavor = "multi_thread")]
async fn a_request_for_what_is_not_captured_waits_and_says_so() {
    let (postgres, kafka) = (Postgres::start(&[]).await, Kafka::shared().await);
    execute(
        &postgres,
        "CREATE TABLE trades (id int PRIMARY KEY, note text); INSERT INTO trades VALUES (1, 'a')",
    )
    .await;
    let mut config = config(&postgres, kafka);
    config.source.snapshot.requests = vec![SnapshotRequest {
        id: "repair".to_owned(),
        tables: vec!["public.trades".to_owned(), "public.late".to_owned()],
    }];
    let mut runtime = Runtime::capture(&config);
    runtime.ready(LIMIT).await;
    wait_for_word(
        &mut runtime,
        "the snapshot request repair waits, for public.late is no captured table (those are public.trades)",
    )
    .await;
    let log = wait_for_ends(kafka, &config, "trades", 1).await;
    assert_eq!(count(&log, Operation::Read), 1, "nothing of it is read meanwhile");
    execute(&postgres, "CREATE TABLE late (id int PRIMARY KEY, note text)").await;
    common::wait_for_metric(&runtime, "meander_capture_tables", |tables| tables == 2).await;
    assert!(runtime.terminate(LIMIT).success());
    assert!(
        !common::checkpoint(&config)
            .unwrap()
            .snapshot
            .requests
            .contains_key("repair")
    );
    runtime.start_again();
    let log = wait_for_ends(kafka, &config, "trades", 2).await;
    assert_eq!(count(&log, Operation::Read), 2);
    assert!(runtime.terminate(LIMIT).success());
}

/// Starts a capture of [`LARGE_TABLE`], grown to 200000 rows, and kills it while that is read.
async fn interrupted(config: &CaptureConfig) -> Runtime {
    let mut runtime = Runtime::capture(config);
    runtime.ready(LIMIT).await;
    eventually("the reading is under way", LIMIT, async || {
        let reading = common::checkpoint(config).and_then(|checkpoint| checkpoint.snapshot.reading);
        if reading.is_some_and(|cursor| cursor.rows > 0) {
            Ok(())
        } else {
            Err("not yet")
        }
    })
    .await;
    runtime.kill9();
    let reading = common::checkpoint(config).unwrap().snapshot.reading;
    assert!(
        reading.is_some_and(|cursor| !cursor.swept),
        "the kill came too late to show anything"
    );
    runtime
}

/// See [`interrupted`].
async fn make_large_table(postgres: &Postgres) {
    execute(postgres, LARGE_TABLE).await;
    execute(
        postgres,
        "INSERT INTO trades SELECT n, 0, 'short' FROM generate_series(20001, 200000) n;
         UPDATE trades SET note = repeat('x', 5000) WHERE id = 199999",
    )
    .await;
}

#[tokio::test(flavor = "multi_thread")]
async fn a_row_that_jumps_over_the_reading_keeps_its_large_values() {
    let (postgres, kafka) = (Postgres::start(&[]).await, Kafka::shared().await);
    make_large_table(&postgres).await;
    let config = config(&postgres, kafka);
    let mut runtime = interrupted(&config).await;
    // From what is still to be read to what was read already, and the other way; the changes do not tell the note.
    execute(
        &postgres,
        "UPDATE trades SET id = -id WHERE id = 199999; UPDATE trades SET id = 300000 WHERE id = 10",
    )
    .await;
    runtime.start_again();
    let rows = table(&postgres.client().await, "trades", "price note").await;
    wait_for_ends(kafka, &config, "trades", 1).await;
    let log = wait_until_equal(kafka, &config, "trades", &rows).await;
    assert_eq!(
        log.last().unwrap().operation,
        Operation::SnapshotEnd,
        "nothing comes after the end"
    );
    assert_read_once(&log);
}

/// Captures the publication `p` as a role that is no superuser, and reads its tables. Its name and password are in the folder.
async fn capture_as_a_role(postgres: &Postgres, config: &mut CaptureConfig) -> tempfile::TempDir {
    execute(
        postgres,
        "CREATE ROLE capture LOGIN REPLICATION PASSWORD 'secret'; GRANT SELECT ON ALL TABLES IN SCHEMA public TO capture",
    )
    .await;
    config.source.publication.name = "p".to_owned();
    config.source.publication.management = meander_config::PublicationManagement::External;
    let files = tempfile::tempdir().unwrap();
    for (name, text) in [("username", "capture"), ("password", "secret")] {
        std::fs::write(files.path().join(name), text).unwrap();
    }
    config.source.username_file = files.path().join("username");
    config.source.password_file = files.path().join("password");
    files
}

#[tokio::test(flavor = "multi_thread")]
async fn what_cannot_be_read_is_left_out_and_does_not_hold_up_the_rest() {
    let (postgres, kafka) = (Postgres::start(&[]).await, Kafka::shared().await);
    execute(
        &postgres,
        "CREATE TABLE a_hidden (id int PRIMARY KEY, note text); INSERT INTO a_hidden VALUES (1, 'a');
         CREATE TABLE trades (id int PRIMARY KEY, note text); INSERT INTO trades VALUES (1, 'a');
         CREATE TABLE a_packed (note text); ALTER TABLE a_packed REPLICA IDENTITY FULL;
         INSERT INTO a_packed SELECT repeat('x', 1000000) FROM generate_series(1, 40);
         CREATE PUBLICATION p FOR TABLE a_hidden, a_packed, trades",
    )
    .await;
    let mut config = config(&postgres, kafka);
    let files = capture_as_a_role(&postgres, &mut config).await;
    // Once there is a slot, a table that becomes unreadable stops nothing.
    config.source.snapshot.mode = SnapshotMode::Never;
    let mut runtime = Runtime::capture(&config);
    runtime.ready(LIMIT).await;
    assert!(runtime.terminate(LIMIT).success());
    execute(&postgres, "ALTER TABLE a_hidden ENABLE ROW LEVEL SECURITY").await;
    config.source.snapshot.mode = SnapshotMode::Incremental;
    let mut runtime = Runtime::capture(&config);
    runtime.ready(LIMIT).await;
    let log = wait_for_ends(kafka, &config, "trades", 1).await;
    assert_eq!(count(&log, Operation::Read), 1);
    wait_for_word(&mut runtime, "SnapshotRefused").await;
    let hidden = read_log(kafka, &topic(&config, "a_hidden"));
    assert_eq!(
        hidden.len(),
        0,
        "rows that a policy hides are not taken for gone, and what is not read does not begin"
    );
    // Small on disk, and too large for one chunk: it is seen while it is read.
    let packed = read_log(kafka, &topic(&config, "a_packed"));
    assert_eq!((packed.len(), packed[0].operation), (1, Operation::SnapshotBegin));
    drop(files);
}

#[tokio::test(flavor = "multi_thread")]
async fn keys_of_any_type_are_read_in_the_order_of_their_index() {
    let (postgres, kafka) = (Postgres::start(&[]).await, Kafka::shared().await);
    // By the bytes of their text, the capital letters come first; by the index they do not.
    execute(
        &postgres,
        "CREATE SCHEMA ext; CREATE EXTENSION citext SCHEMA ext; CREATE EXTENSION ltree SCHEMA ext;
         CREATE TYPE state AS ENUM ('z', 'a');
         CREATE TABLE people (email ext.citext PRIMARY KEY);
         INSERT INTO people SELECT chr(97 + n % 26 - n % 2 * 32) || n FROM generate_series(1, 500) n;
         CREATE TABLE mixed (n int, email ext.citext, s state, at ext.ltree, PRIMARY KEY (n, email, s, at));
         INSERT INTO mixed SELECT n % 3, chr(97 + n % 26 - n % 2 * 32) || n % 50, (ARRAY['z', 'a'])[1 + n % 2]::state,
             ('a.' || n)::ext.ltree FROM generate_series(1, 500) n;
         CREATE TABLE backwards (a text NOT NULL, b text NOT NULL);
         CREATE UNIQUE INDEX i ON backwards (a text_pattern_ops DESC, b); ALTER TABLE backwards REPLICA IDENTITY USING INDEX i;
         INSERT INTO backwards SELECT n % 7, n FROM generate_series(1, 500) n",
    )
    .await;
    let config = config(&postgres, kafka);
    let mut runtime = Runtime::capture(&config);
    runtime.ready(LIMIT).await;
    for table in ["people", "mixed", "backwards"] {
        let log = wait_for_ends(kafka, &config, table, 1).await;
        assert_eq!(count(&log, Operation::Read), 500, "{table}");
        assert_read_once(&log);
    }
}

#[tokio::test(flavor = "multi_thread")]
async fn a_key_that_is_not_published_in_full_hides_no_row() {
    let (postgres, kafka) = (Postgres::start(&[]).await, Kafka::shared().await);
    execute(
        &postgres,
        "CREATE TABLE trades (tenant int, half int, whole int GENERATED ALWAYS AS (half * 2) STORED, PRIMARY KEY (tenant, whole));
         INSERT INTO trades SELECT n % 2, n FROM generate_series(1, 200) n;
         CREATE PUBLICATION p FOR TABLE trades",
    )
    .await;
    let mut config = config(&postgres, kafka);
    config.source.publication.name = "p".to_owned();
    config.source.publication.management = meander_config::PublicationManagement::External;
    let mut runtime = Runtime::capture(&config);
    runtime.ready(LIMIT).await;
    let log = wait_for_ends(kafka, &config, "trades", 1).await;
    assert_eq!(count(&log, Operation::Read), 200);
}

#[tokio::test(flavor = "multi_thread")]
async fn a_connection_that_fails_holds_up_the_snapshot_and_not_the_capture() {
    let (postgres, kafka) = (Postgres::start(&[]).await, Kafka::shared().await);
    make_large_table(&postgres).await;
    // Before the role is set to that: it has no time to say that it wants another.
    let client = postgres.client().await;
    execute(&postgres, "ALTER ROLE postgres SET idle_session_timeout = '10ms'").await;
    let config = config(&postgres, kafka);
    let mut runtime = Runtime::capture(&config);
    runtime.ready(LIMIT).await;
    for _ in 0..2 {
        eventually("the connection of the snapshot is cut", LIMIT, async || {
            let cut = client
                .query(
                    "SELECT pg_terminate_backend(pid) FROM pg_stat_activity WHERE query ~ '^(COPY|.*emit_message)' AND pid <> pg_backend_pid()",
                    &[],
                )
                .await
                .unwrap();
            if cut.is_empty() { Err("it reads nothing") } else { Ok(()) }
        })
        .await;
    }
    let log = wait_for_ends(kafka, &config, "trades", 1).await;
    assert_read_once(&log);
    assert_eq!(
        (count(&log, Operation::SnapshotBegin), count(&log, Operation::Read)),
        (1, 200_000)
    );
    assert_eq!(
        common::checkpoint(&config).unwrap().owner_generation,
        1,
        "one session did it all"
    );
}

#[tokio::test(flavor = "multi_thread")]
async fn a_table_that_cannot_be_read_any_further_goes_on_from_there_once_it_can() {
    let (postgres, kafka) = (Postgres::start(&[]).await, Kafka::shared().await);
    make_large_table(&postgres).await;
    execute(
        &postgres,
        "CREATE TABLE zebras (id int PRIMARY KEY); INSERT INTO zebras VALUES (1);
         CREATE PUBLICATION p FOR TABLE trades, zebras",
    )
    .await;
    let mut config = config(&postgres, kafka);
    let files = capture_as_a_role(&postgres, &mut config).await;
    let mut runtime = interrupted(&config).await;
    execute(&postgres, "ALTER TABLE trades ENABLE ROW LEVEL SECURITY").await;
    runtime.start_again();
    wait_for_ends(kafka, &config, "zebras", 1).await;
    assert!(runtime.terminate(LIMIT).success());
    execute(&postgres, "ALTER TABLE trades DISABLE ROW LEVEL SECURITY").await;
    runtime.start_again();
    let log = wait_for_ends(kafka, &config, "trades", 1).await;
    assert_read_once(&log);
    assert_eq!(
        (count(&log, Operation::SnapshotBegin), count(&log, Operation::Read)),
        (1, 200_000)
    );
    drop(files);
}

#[tokio::test(flavor = "multi_thread")]
async fn a_table_that_was_renamed_begins_anew_under_its_new_name() {
    let (postgres, kafka) = (Postgres::start(&[]).await, Kafka::shared().await);
    make_large_table(&postgres).await;
    let config = config(&postgres, kafka);
    let mut runtime = interrupted(&config).await;
    execute(&postgres, "ALTER TABLE trades RENAME TO deals").await;
    runtime.start_again();
    let log = wait_for_ends(kafka, &config, "deals", 1).await;
    assert_eq!(
        (count(&log, Operation::SnapshotBegin), count(&log, Operation::Read)),
        (1, 200_000)
    );
    let before = read_log(kafka, &topic(&config, "trades"));
    assert_eq!(count(&before, Operation::SnapshotEnd), 0);
}

#[tokio::test(flavor = "multi_thread")]
async fn a_table_that_nobody_watched_for_a_while_is_read_anew() {
    let (postgres, kafka) = (Postgres::start(&[]).await, Kafka::shared().await);
    make_large_table(&postgres).await;
    execute(
        &postgres,
        "CREATE TABLE zebras (id int PRIMARY KEY); INSERT INTO zebras VALUES (1)",
    )
    .await;
    let mut config = config(&postgres, kafka);
    interrupted(&config).await;
    // Without a snapshot, nobody notes that this row jumps over the place that the reading had come to.
    config.source.snapshot.mode = SnapshotMode::Never;
    let mut runtime = Runtime::capture(&config);
    runtime.ready(LIMIT).await;
    execute(&postgres, "UPDATE trades SET id = -id WHERE id = 199999").await;
    eventually("the table is given up", LIMIT, async || {
        let reading = common::checkpoint(&config).unwrap().snapshot.reading;
        reading.map_or(Ok(()), |cursor| Err(cursor.rows))
    })
    .await;
    assert!(runtime.terminate(LIMIT).success());
    config.source.snapshot.mode = SnapshotMode::Incremental;
    let mut runtime = Runtime::capture(&config);
    runtime.ready(LIMIT).await;
    wait_for_ends(kafka, &config, "trades", 1).await;
    let rows = table(&postgres.client().await, "trades", "price note").await;
    let log = wait_until_equal(kafka, &config, "trades", &rows).await;
    assert_eq!(count(&log, Operation::SnapshotBegin), 2);
    wait_for_ends(kafka, &config, "zebras", 1).await;
    assert!(runtime.terminate(LIMIT).success());

    // Nobody is told what happens to a table that is not in the publication.
    let publication = &config.source.publication.name;
    execute(
        &postgres,
        &format!(
            "ALTER PUBLICATION \"{publication}\" DROP TABLE zebras; UPDATE zebras SET id = 2;
             ALTER PUBLICATION \"{publication}\" ADD TABLE ONLY zebras"
        ),
    )
    .await;
    runtime.start_again();
    let log = wait_for_ends(kafka, &config, "zebras", 2).await;
    let read: Vec<_> = log.iter().filter(|entry| entry.operation == Operation::Read).collect();
    assert_eq!((read.len(), &read[1].row[..]), (2, &["2".to_owned()][..]));
}

#[tokio::test(flavor = "multi_thread")]
async fn a_table_that_gains_a_primary_key_under_the_identity_full_is_read_with_its_keys() {
    let (postgres, kafka) = (Postgres::start(&[]).await, Kafka::shared().await);
    execute(
        &postgres,
        "CREATE TABLE t (id int NOT NULL, note text); ALTER TABLE t REPLICA IDENTITY FULL; INSERT INTO t VALUES (1, 'a'), (2, 'b')",
    )
    .await;
    let mut config = config(&postgres, kafka);
    config.source.snapshot.mode = SnapshotMode::Never;
    let mut runtime = Runtime::capture(&config);
    runtime.ready(LIMIT).await;
    assert!(runtime.terminate(LIMIT).success());
    // A transaction of before the session holds up the reading.
    let mut holding = postgres.client().await;
    let held = holding.transaction().await.unwrap();
    held.execute("SELECT pg_current_xact_id()", &[]).await.unwrap();
    config.source.snapshot.mode = SnapshotMode::Incremental;
    let mut runtime = Runtime::capture(&config);
    runtime.ready(LIMIT).await;
    // The stream describes the table without a key, and not again before the next change.
    execute(&postgres, "INSERT INTO t VALUES (3, 'c')").await;
    eventually("the change is in Kafka", LIMIT, async || {
        match read_log(kafka, &topic(&config, "t")).len() {
            0 => Err("not yet"),
            _ => Ok(()),
        }
    })
    .await;
    execute(&postgres, "ALTER TABLE t ADD PRIMARY KEY (id)").await;
    held.commit().await.unwrap();
    let log = wait_for_ends(kafka, &config, "t", 1).await;
    let read: Vec<String> = log
        .iter()
        .filter(|entry| entry.operation == Operation::Read)
        .map(|entry| entry.key.clone().unwrap_or_default())
        .collect();
    assert_eq!(read, [r#"{"id":"1"}"#, r#"{"id":"2"}"#, r#"{"id":"3"}"#]);
}

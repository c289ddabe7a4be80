//! Hypertables of TimescaleDB. The extension is not part of the servers that tests start: its catalog, its chunks and the messages that it
//! writes into the WAL are made here in plain SQL, as version 2.28 makes them.
#![allow(clippy::unwrap_used, clippy::expect_used, clippy::panic)]

mod common;
#[path = "common/log.rs"]
mod log;

use common::{LIMIT, cluster, config};
use log::wait_for_records;
use meander_config::SnapshotMode;
use meander_proto::v1::{Operation, value::Kind};
use meander_runtime::checkpoint::Tail;
use meander_test_support::{Kafka, Postgres, Runtime, eventually};
use tokio_postgres::Client;

async fn execute(client: &Client, sql: &str) {
    client
        .batch_execute(sql)
        .await
        .unwrap_or_else(|error| panic!("{sql}: {error:?}"));
}

/// Waits until a runtime names a setting, and ends it.
async fn says(runtime: &mut Runtime, setting: &str) {
    eventually(&format!("the runtime to name {setting}"), LIMIT, async || {
        let log = runtime.process().log_tail();
        if log.contains(setting) { Ok(()) } else { Err(log) }
    })
    .await;
    runtime.kill9();
}

/// A hypertable with one chunk, which has one row.
const HYPERTABLE: &str = "CREATE SCHEMA _timescaledb_catalog; CREATE SCHEMA _timescaledb_internal;
    CREATE TABLE _timescaledb_catalog.hypertable (id int PRIMARY KEY, schema_name name, table_name name, associated_schema_name name,
        associated_table_prefix name, compression_state smallint);
    CREATE TABLE m (at int PRIMARY KEY, value int);
    INSERT INTO _timescaledb_catalog.hypertable VALUES (1, 'public', 'm', '_timescaledb_internal', '_hyper_1', 1);
    CREATE TABLE _timescaledb_internal._hyper_1_1_chunk (CHECK (at < 10), PRIMARY KEY (at)) INHERITS (m);
    CREATE TABLE _timescaledb_internal.compress_hyper_2_2_chunk (at int PRIMARY KEY);
    INSERT INTO _timescaledb_internal._hyper_1_1_chunk VALUES (0, 0);
    CREATE TABLE k (at int PRIMARY KEY);
    INSERT INTO _timescaledb_catalog.hypertable VALUES (3, 'public', 'k', '_timescaledb_internal', '_hyper_3', 1);
    CREATE TABLE _timescaledb_internal._hyper_3_5_chunk (PRIMARY KEY (at)) INHERITS (k)";

#[tokio::test(flavor = "multi_thread")]
async fn a_hypertable_is_captured_under_its_own_name_and_moving_its_rows_is_no_change() {
    let (postgres, kafka) = (Postgres::start(&[]).await, Kafka::shared().await);
    let client = postgres.client().await;
    execute(&client, HYPERTABLE).await;
    let mut config = config(&postgres, kafka, None);
    config.source.tables.include = vec!["*.*".to_owned()];
    config.source.snapshot.mode = SnapshotMode::Incremental;
    let mut refused = Runtime::capture(&config);
    says(&mut refused, "timescaledb.enable_chunk_auto_publication").await;
    execute(
        &client,
        "ALTER DATABASE postgres SET timescaledb.enable_chunk_auto_publication = on;
         ALTER DATABASE postgres SET timescaledb.enable_compression_wal_markers = on;
         ALTER DATABASE postgres SET timescaledb.enable_compressed_direct_batch_delete = on",
    )
    .await;
    let mut refused = Runtime::capture(&config);
    says(&mut refused, "timescaledb.enable_compressed_direct_batch_delete").await;
    execute(
        &client,
        "ALTER DATABASE postgres SET timescaledb.enable_compressed_direct_batch_delete = off",
    )
    .await;

    let mut runtime = Runtime::capture(&config);
    runtime.ready(LIMIT).await;
    let topic = format!("{}.public.m", config.kafka.topic_prefix);
    // A snapshot of one row.
    wait_for_records(kafka, &topic, 3).await;
    let join = |chunk: u32| {
        let publication = &config.source.publication.name;
        format!("ALTER PUBLICATION {publication} ADD TABLE ONLY _timescaledb_internal._hyper_1_{chunk}_chunk")
    };
    let message = |what: &str| format!("SELECT pg_logical_emit_message(true, '::timescaledb-{what}', '')");
    let moved = [
        // An INSERT makes a chunk.
        "BEGIN".to_owned(),
        "CREATE TABLE _timescaledb_internal._hyper_1_3_chunk (CHECK (at >= 10), PRIMARY KEY (at)) INHERITS (m)"
            .to_owned(),
        join(3),
        "INSERT INTO _timescaledb_internal._hyper_1_3_chunk VALUES (10, 1)".to_owned(),
        "COMMIT".to_owned(),
        "UPDATE m SET value = 2 WHERE at = 0".to_owned(),
        // A chunk is compressed, and what an UPDATE needs of it is decompressed.
        "BEGIN".to_owned(),
        message("compression-start"),
        "INSERT INTO _timescaledb_internal.compress_hyper_2_2_chunk VALUES (0)".to_owned(),
        "DELETE FROM _timescaledb_internal._hyper_1_1_chunk".to_owned(),
        message("compression-end"),
        "COMMIT; BEGIN".to_owned(),
        message("decompression-start"),
        "DELETE FROM _timescaledb_internal.compress_hyper_2_2_chunk".to_owned(),
        "INSERT INTO _timescaledb_internal._hyper_1_1_chunk VALUES (0, 2)".to_owned(),
        message("decompression-end"),
        "UPDATE m SET value = 3 WHERE at = 0".to_owned(),
        "COMMIT".to_owned(),
        "TRUNCATE ONLY _timescaledb_internal._hyper_1_1_chunk".to_owned(),
    ];
    execute(&client, &moved.join("; ")).await;
    wait_for_records(kafka, &topic, 6).await;
    // What is captured stays so when a setting is turned round; it is said.
    let member = "SELECT prrelid FROM pg_publication_rel WHERE prrelid = 'm'::regclass";
    execute(
        &client,
        "ALTER DATABASE postgres SET timescaledb.enable_chunk_auto_publication = off",
    )
    .await;
    let degraded = async |runtime: &Runtime, expected: &str| {
        eventually("what is said of the hypertable", LIMIT, async || {
            let (_, metrics) = runtime.get("/metrics").await.map_err(|error| error.to_string())?;
            if metrics.contains(expected) {
                Ok(())
            } else {
                Err(metrics)
            }
        })
        .await;
    };
    degraded(&runtime, "meander_capture_tables_untold 2").await;
    assert_eq!(client.query(member, &[]).await.unwrap().len(), 1);
    execute(
        &client,
        "ALTER DATABASE postgres SET timescaledb.enable_chunk_auto_publication = on",
    )
    .await;
    degraded(&runtime, "meander_capture_tables_untold 0").await;
    // A session made a chunk and did not let it join.
    execute(
        &client,
        "CREATE TABLE _timescaledb_internal._hyper_1_4_chunk (PRIMARY KEY (at)) INHERITS (m)",
    )
    .await;
    eventually("the chunk to join, and to be noted", LIMIT, async || {
        let row = client
            .query_one(
                "SELECT count(*), coalesce(obj_description(p.oid, 'pg_publication'), '') FROM pg_publication p
                 JOIN pg_publication_rel r ON r.prpubid = p.oid AND r.prrelid::regclass::text ~ '_hyper_1_4_chunk' GROUP BY 2",
                &[],
            )
            .await
            .map_err(|error| error.to_string())?;
        let comment: String = row.get(1);
        if comment.ends_with("\"public\".\"m\"") { Ok(()) } else { Err(comment) }
    })
    .await;
    // Its rows are read anew.
    wait_for_records(kafka, &topic, 9).await;
    execute(&client, "INSERT INTO _timescaledb_internal._hyper_3_5_chunk VALUES (1)").await;
    let gone = format!("{}.public.k", config.kafka.topic_prefix);
    wait_for_records(kafka, &gone, 3).await;
    runtime.kill9();
    // A hypertable is gone when its last change is read.
    execute(
        &client,
        "INSERT INTO _timescaledb_internal._hyper_3_5_chunk VALUES (2); DROP TABLE k CASCADE;
         DELETE FROM _timescaledb_catalog.hypertable WHERE table_name = 'k'",
    )
    .await;
    // The chunk is gone when its changes are read.
    execute(
        &client,
        "INSERT INTO _timescaledb_internal._hyper_1_3_chunk VALUES (11, 4); TRUNCATE m; DROP TABLE _timescaledb_internal._hyper_1_3_chunk",
    )
    .await;
    runtime.start_again();
    let of_the_gone = wait_for_records(kafka, &gone, 4).await;
    assert_eq!(of_the_gone[3].2.operation(), Operation::Insert);
    let records = wait_for_records(kafka, &topic, 11).await;
    let seen: Vec<_> = records
        .iter()
        .map(|(_, _, record)| {
            assert_eq!(record.schema_version, 1, "{record:?}");
            let values = record.after.as_ref().map(|row| {
                row.values
                    .iter()
                    .map(|value| match value.kind {
                        Some(Kind::Integer(integer)) => integer,
                        _ => panic!("{record:?}"),
                    })
                    .collect()
            });
            (record.operation(), values.unwrap_or_default())
        })
        .collect();
    assert_eq!(
        seen,
        [
            (Operation::SnapshotBegin, vec![]),
            (Operation::Read, vec![0, 0]),
            (Operation::SnapshotEnd, vec![]),
            (Operation::Insert, vec![10, 1]),
            (Operation::Update, vec![0, 2]),
            (Operation::Update, vec![0, 3]),
            (Operation::SnapshotBegin, vec![]),
            (Operation::Read, vec![10, 1]),
            (Operation::SnapshotEnd, vec![]),
            (Operation::Insert, vec![11, 4]),
            (Operation::Truncate, vec![]),
        ]
    );
    for other in ["_hyper_1_1_chunk", "_hyper_1_3_chunk", "compress_hyper_2_2_chunk"] {
        let topic = format!("{}._timescaledb_internal.{other}", config.kafka.topic_prefix);
        let partitions = Tail::new(&cluster(kafka), LIMIT).unwrap().partitions(&topic).unwrap();
        assert!(partitions.is_empty(), "{topic}");
    }

    // One that was attached with its columns in another order stops the capture, by its name.
    execute(
        &client,
        "BEGIN; CREATE TABLE _timescaledb_internal._hyper_1_6_chunk (value int, at int PRIMARY KEY);
         ALTER TABLE _timescaledb_internal._hyper_1_6_chunk INHERIT m",
    )
    .await;
    execute(&client, &format!("{}; COMMIT", join(6))).await;
    execute(
        &client,
        "INSERT INTO _timescaledb_internal._hyper_1_6_chunk VALUES (7, 20)",
    )
    .await;
    eventually("the chunk to be named", LIMIT, async || {
        let log = runtime.process().log_tail();
        let says = log.contains("chunk _timescaledb_internal._hyper_1_6_chunk has its columns in another order");
        if says { Ok(()) } else { Err(log) }
    })
    .await;
    let leave = join(6).replace("ADD", "DROP");
    let detach = "ALTER TABLE _timescaledb_internal._hyper_1_6_chunk NO INHERIT m";
    execute(&client, &format!("{detach}; {leave}")).await;
    runtime.ready(LIMIT).await;

    // Its chunks leave with it: without a key, the application's own UPDATE would fail for them.
    execute(&client, "ALTER TABLE m DROP CONSTRAINT m_pkey").await;
    eventually("the chunks to leave", LIMIT, async || {
        let sql = "SELECT count(*) FROM pg_publication_rel";
        match client
            .query_one(sql, &[])
            .await
            .map_err(|error| error.to_string())?
            .get(0)
        {
            0_i64 => Ok(()),
            some => Err(format!("{some} are in the publication")),
        }
    })
    .await;
}

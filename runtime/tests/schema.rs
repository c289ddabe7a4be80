//! Schemas that change in the stream: each change of one is an event in its place, once, and no other record has another schema than the
//! events before it say.
#![allow(clippy::unwrap_used, clippy::expect_used, clippy::panic)]

mod common;
#[path = "common/log.rs"]
#[allow(dead_code)] // What waits for a number of records is for others.
mod log;

use std::collections::HashMap;

use common::{LIMIT, checkpoint, config, stream_entries};
use log::read_topic;
use meander_config::{CaptureConfig, SnapshotMode, SnapshotRequest};
use meander_proto::v1::{ChangeRecord, Operation, ReplicaIdentity, TableSchema, value::Kind};
use meander_runtime::{
    checkpoint::{Tail, read_schemas},
    log::{checkpoint_key, schemas_topic},
};
use meander_test_support::{Kafka, Postgres, Redis, Runtime, eventually};
use prost::Message as _;
use tokio_postgres::Client;

async fn execute(client: &Client, sql: &str) {
    client
        .batch_execute(sql)
        .await
        .unwrap_or_else(|error| panic!("{sql}: {error:?}"));
}

/// What all topics of these tables hold, in the order of coordinates.
fn read_log(kafka: &Kafka, config: &CaptureConfig, tables: &[&str]) -> Vec<ChangeRecord> {
    let topics = tables
        .iter()
        .map(|table| format!("{}.public.{table}", config.kafka.topic_prefix));
    let mut log: Vec<ChangeRecord> = topics
        .flat_map(|topic| read_topic(kafka, &topic))
        .map(|(_, key, record)| {
            let keyless = record.operation() == Operation::SchemaChange;
            assert!(!keyless || key.is_none(), "{record:?}");
            record
        })
        .collect();
    log.sort_by_key(coordinate);
    let twice = log.windows(2).find(|pair| coordinate(&pair[0]) == coordinate(&pair[1]));
    assert!(twice.is_none(), "doubled: {twice:?}");
    log
}

fn coordinate(record: &ChangeRecord) -> (u32, u64, u64, u32) {
    let at = record.coordinate.unwrap();
    (at.epoch, at.commit_lsn, at.ordinal, at.part)
}

/// Waits until the tables' topics hold this many changes of rows.
async fn wait_for_changes(kafka: &Kafka, config: &CaptureConfig, tables: &[&str], changes: usize) -> Vec<ChangeRecord> {
    eventually("the changes are in Kafka", LIMIT, async || {
        let log = tokio::task::block_in_place(|| read_log(kafka, config, tables));
        let found = log.iter().filter(|record| !is_event(record)).count();
        if found >= changes {
            Ok(log)
        } else {
            Err(format!("{found} of {changes}"))
        }
    })
    .await
}

fn is_event(record: &ChangeRecord) -> bool {
    record.operation() == Operation::SchemaChange
}

/// A schema in short: `table(column type, …) version`.
fn short(schema: Option<&TableSchema>) -> String {
    let Some(schema) = schema else { return String::new() };
    let relation = schema.relation.as_ref().unwrap();
    let columns: Vec<String> = relation
        .columns
        .iter()
        .map(|column| format!("{} {}", column.name, column.type_name))
        .collect();
    format!("{}({}) {}", relation.table, columns.join(", "), schema.version)
}

/// Checks that every record has the schema that the last event before it said, and that each event comes right before a change that is the
/// first with its schema. Returns the events, the old and the new schema in short.
fn check(log: &[ChangeRecord]) -> Vec<(String, String)> {
    let mut schemas: HashMap<u32, TableSchema> = HashMap::new();
    let mut names: HashMap<String, u32> = HashMap::new();
    let mut events = Vec::new();
    for (index, record) in log.iter().enumerate() {
        let relation = record.relation.as_ref().unwrap();
        if let Some(change) = &record.schema_change {
            assert!(is_event(record));
            let Some(after) = &change.after else {
                // Nothing of the table comes after its end.
                let before = change.before.as_ref().unwrap();
                assert!(schemas.remove(&before.oid).is_none_or(|known| known == *before));
                names.retain(|_, oid| *oid != before.oid);
                events.push((short(Some(before)), String::new()));
                continue;
            };
            assert_eq!(
                (after.relation.as_ref().unwrap(), after.version),
                (relation, record.schema_version)
            );
            let before = change.before.as_ref();
            if let (Some(known), Some(before)) = (schemas.get(&after.oid), before) {
                assert_eq!(known, before);
            }
            assert_eq!(after.version, before.map_or(0, |before| before.version) + 1);
            let next = log.get(index + 1).expect("an event comes before a change");
            assert_eq!(
                (next.relation.as_ref().unwrap(), next.schema_version),
                (relation, after.version)
            );
            let (at, then) = (record.coordinate.unwrap(), next.coordinate.unwrap());
            if next.snapshot.is_none() {
                // They are parts of one coordinate.
                assert_eq!((at.commit_lsn, at.ordinal, at.part), (then.commit_lsn, then.ordinal, 0));
                assert_eq!((then.part, record.transaction_id), (1, next.transaction_id));
            } else {
                // A snapshot numbers what it publishes by itself.
                assert_eq!((at.commit_lsn, at.ordinal + 1), (then.commit_lsn, then.ordinal));
            }
            events.push((short(before), short(Some(after))));
            schemas.insert(after.oid, after.clone());
            names.insert(relation.table.clone(), after.oid);
            continue;
        }
        match names.get(&relation.table).and_then(|oid| schemas.get(oid)) {
            Some(schema) => assert_eq!(
                (schema.relation.as_ref().unwrap(), schema.version),
                (relation, record.schema_version),
                "{:?}",
                coordinate(record)
            ),
            None => assert_eq!(record.schema_version, 1, "{:?}", coordinate(record)),
        }
    }
    events
}

fn pair(before: &str, after: &str) -> (String, String) {
    (before.to_owned(), after.to_owned())
}

#[tokio::test(flavor = "multi_thread")]
async fn each_change_of_a_schema_is_an_event_right_before_the_first_change_that_has_it() {
    let (postgres, redis, kafka) = (Postgres::start(&[]).await, Redis::start().await, Kafka::shared().await);
    let client = postgres.client().await;
    execute(
        &client,
        "CREATE TABLE t (id int PRIMARY KEY, note text); CREATE TABLE still (id int PRIMARY KEY)",
    )
    .await;
    let config = config(&postgres, kafka, Some(&redis));
    let mut runtime = Runtime::capture(&config);
    runtime.ready(LIMIT).await;

    // Between transactions.
    execute(&client, "INSERT INTO t VALUES (1, 'a')").await;
    execute(&client, "ALTER TABLE t ADD price numeric(8,2)").await;
    execute(&client, "INSERT INTO t VALUES (2, 'b', 1.5)").await;
    // Inside of one, with and without changes between them, and in what is rolled back.
    execute(
        &client,
        "BEGIN; UPDATE t SET note = 'c' WHERE id = 1; ALTER TABLE t DROP note; ALTER TABLE t ADD wide text;
         UPDATE t SET id = 3 WHERE id = 2; INSERT INTO still VALUES (1);
         SAVEPOINT s; ALTER TABLE t ADD gone text; INSERT INTO t VALUES (4); ROLLBACK TO s;
         ALTER TABLE t ALTER id TYPE bigint; ALTER TABLE t RENAME price TO cost; DELETE FROM t WHERE id = 3; COMMIT",
    )
    .await;
    // What the log does not tell is no change of a schema, nor is one that is taken back before it has a change.
    execute(
        &client,
        "ALTER TABLE t ALTER wide SET DEFAULT 'x', ADD CHECK (id > 0); ALTER TABLE t ADD brief int; ALTER TABLE t DROP brief;
         INSERT INTO t VALUES (5)",
    )
    .await;
    execute(
        &client,
        "ALTER TABLE t ALTER cost TYPE numeric(10,2); TRUNCATE t, still",
    )
    .await;
    execute(&client, "ALTER TABLE t REPLICA IDENTITY FULL; INSERT INTO t VALUES (6)").await;
    execute(&client, "ALTER TABLE t RENAME TO renamed").await;
    eventually("the table joins under its new name", LIMIT, async || {
        let names = "SELECT count(*) FROM pg_publication_tables WHERE tablename = 'renamed'";
        let count: i64 = client.query_one(names, &[]).await.unwrap().get(0);
        if count == 1 { Ok(()) } else { Err("it has not") }
    })
    .await;
    execute(&client, "INSERT INTO renamed VALUES (7)").await;
    // A table that is made while the capture goes on.
    execute(&client, "CREATE TABLE fresh (id uuid PRIMARY KEY)").await;
    common::wait_for_metric(&runtime, "meander_capture_tables ", |tables| tables == 3).await;
    execute(&client, "INSERT INTO fresh VALUES (gen_random_uuid())").await;

    let tables = ["t", "renamed", "still", "fresh"];
    wait_for_changes(kafka, &config, &["fresh"], 1).await;
    let log = wait_for_changes(kafka, &config, &tables, 13).await;
    let v2 = "t(id int4, note text, price numeric) 2";
    let v3 = "t(id int4, price numeric, wide text) 3";
    let v4 = "t(id int8, cost numeric, wide text) 4";
    let v6 = "t(id int8, cost numeric, wide text) 6";
    assert_eq!(
        check(&log),
        [
            pair("t(id int4, note text) 1", v2),
            pair(v2, v3),
            pair(v3, v4),
            pair(v4, "t(id int8, cost numeric, wide text) 5"),
            pair("t(id int8, cost numeric, wide text) 5", v6),
            pair(v6, "renamed(id int8, cost numeric, wide text) 7"),
            pair("", "fresh(id uuid) 1"),
        ]
    );
    let operations: Vec<_> = log.iter().map(|record| record.operation()).collect();
    let truncate = operations
        .iter()
        .position(|operation| *operation == Operation::Truncate)
        .unwrap();
    let [alters, identity]: [&TableSchema; 2] = [truncate - 1, truncate + 2].map(|event| {
        let change = log[event].schema_change.as_ref().unwrap();
        change.after.as_ref().unwrap()
    });
    let modifier = |schema: &TableSchema| schema.relation.as_ref().unwrap().columns[1].type_modifier;
    assert_eq!(
        modifier(alters),
        (10 << 16 | 2) + 4,
        "an event comes before a TRUNCATE too"
    );
    assert_eq!(identity.replica_identity(), ReplicaIdentity::Full);
    // The ordinals of changes are what they would be without the events: an UPDATE that changes the key is still one, of two records.
    let moved = log.iter().position(|record| record.key_changed).unwrap();
    let places: Vec<_> = log[moved - 1..moved + 3]
        .iter()
        .map(|record| (coordinate(record).2, coordinate(record).3))
        .collect();
    assert_eq!(places, [(1, 0), (1, 1), (1, 2), (2, 0)]);
    let changes = 12;
    assert_eq!(
        checkpoint(&config).unwrap().events_total,
        changes,
        "events are no changes of rows"
    );

    // Redis has the same bytes.
    for table in tables {
        let topic = format!("{}.public.{table}", config.kafka.topic_prefix);
        let records = tokio::task::block_in_place(|| read_topic(kafka, &topic));
        let expected: Vec<Vec<u8>> = records.iter().map(|(_, _, record)| record.encode_to_vec()).collect();
        eventually("the entries are in Redis", LIMIT, async || {
            let entries = stream_entries(&redis, &topic).await;
            let values: Vec<_> = entries
                .into_iter()
                .map(|(_, mut fields)| fields.remove("value").unwrap())
                .collect();
            if values == expected {
                Ok(())
            } else {
                Err(format!("{} of {}", values.len(), expected.len()))
            }
        })
        .await;
    }

    // A restart is told of every table anew, and makes no event; what happened meanwhile is one.
    assert!(runtime.terminate(LIMIT).success(), "{}", runtime.process().log_tail());
    execute(&client, "INSERT INTO renamed VALUES (8); INSERT INTO still VALUES (2)").await;
    runtime.start_again();
    runtime.ready(LIMIT).await;
    let after = wait_for_changes(kafka, &config, &tables, 15).await;
    assert_eq!(after.len(), log.len() + 2);
    runtime.kill9();
    execute(
        &client,
        "ALTER TABLE renamed DROP wide; INSERT INTO renamed VALUES (9); INSERT INTO still VALUES (3)",
    )
    .await;
    runtime.start_again();
    let events = check(&wait_for_changes(kafka, &config, &tables, 17).await);
    assert_eq!(
        events.last().unwrap(),
        &pair(
            "renamed(id int8, cost numeric, wide text) 7",
            "renamed(id int8, cost numeric) 8"
        )
    );
    assert_eq!(events.len(), 8);
}

/// Rows between two changes of the schema, large enough for several Kafka transactions.
const ROWS: u64 = 40_000;

#[tokio::test(flavor = "multi_thread")]
async fn kills_inside_a_transaction_that_changes_its_table_twice_lose_and_double_no_event() {
    let (postgres, kafka) = (Postgres::start(&[]).await, Kafka::shared().await);
    let client = postgres.client().await;
    execute(&client, "CREATE TABLE t (id int PRIMARY KEY, pad text)").await;
    let config = config(&postgres, kafka, None);
    let mut runtime = Runtime::capture(&config);
    runtime.ready(LIMIT).await;
    let insert = |from: u64| {
        let to = from + ROWS - 1;
        format!("INSERT INTO t (id, pad) SELECT n, repeat(n::text, 100) FROM generate_series({from}, {to}) n;")
    };
    let (first, second, third) = (insert(0), insert(ROWS), insert(2 * ROWS));
    execute(
        &client,
        &format!("BEGIN; {first} ALTER TABLE t ADD a int; {second} ALTER TABLE t DROP a, ADD b int; {third} COMMIT"),
    )
    .await;
    for part in 0..3 {
        let published = eventually("the transaction is on its way", LIMIT, async || {
            let published = checkpoint(&config).and_then(|checkpoint| checkpoint.published);
            published
                .filter(|published| published.ordinal >= part * ROWS + ROWS / 8)
                .ok_or_else(|| format!("{published:?}"))
        })
        .await;
        println!("killed at {published}");
        assert!(published.ordinal < 3 * ROWS - 1, "the kill came too late");
        runtime.kill9();
        runtime.start_again();
    }
    let log = wait_for_changes(kafka, &config, &["t"], usize::try_from(3 * ROWS).unwrap()).await;
    let (one, two, three) = (
        "t(id int4, pad text) 1",
        "t(id int4, pad text, a int4) 2",
        "t(id int4, pad text, b int4) 3",
    );
    assert_eq!(check(&log), [pair(one, two), pair(two, three)]);
    let ordinals: Vec<u64> = log
        .iter()
        .filter(|record| !is_event(record))
        .map(|record| record.coordinate.unwrap().ordinal)
        .collect();
    assert_eq!(ordinals, (0..3 * ROWS).collect::<Vec<_>>());
    assert_eq!(checkpoint(&config).unwrap().events_total, 3 * ROWS);
}

#[tokio::test(flavor = "multi_thread")]
async fn rows_of_a_snapshot_have_the_schema_that_the_events_say() {
    let (postgres, kafka) = (Postgres::start(&[]).await, Kafka::shared().await);
    let client = postgres.client().await;
    execute(
        &client,
        "CREATE TABLE busy (id int PRIMARY KEY, note text); INSERT INTO busy SELECT n, 'x' FROM generate_series(1, 20000) n;
         CREATE TABLE idle (id int PRIMARY KEY)",
    )
    .await;
    let mut config = config(&postgres, kafka, None);
    config.source.snapshot.mode = SnapshotMode::Incremental;
    let mut runtime = Runtime::capture(&config);
    // While the rows are read, the schema changes, with and without a change that tells so, and the runtime is killed.
    for round in 0..6 {
        runtime.ready(LIMIT).await;
        execute(&client, &format!("ALTER TABLE busy ADD c{round} int")).await;
        if round % 2 == 0 {
            execute(&client, &format!("UPDATE busy SET note = 'y' WHERE id = {}", 1 + round)).await;
        }
        if round == 3 {
            runtime.kill9();
            runtime.start_again();
        }
    }
    let ended = async |table: &str, ends: usize| {
        eventually("the snapshot has ended", LIMIT, async || {
            let log = tokio::task::block_in_place(|| read_log(kafka, &config, &[table]));
            let found = log
                .iter()
                .filter(|record| record.operation() == Operation::SnapshotEnd)
                .count();
            if found == ends {
                Ok(log)
            } else {
                Err(format!("{} records, {found} ends", log.len()))
            }
        })
        .await
    };
    let busy = ended("busy", 1).await;
    let events = check(&busy);
    assert!((3..=6).contains(&events.len()), "{events:?}");
    assert!(events.windows(2).all(|pair| pair[0].1 == pair[1].0), "{events:?}");
    let idle = ended("idle", 1).await;
    assert!(check(&idle).is_empty());

    // Nothing but the rows of the next snapshot can tell that this table has another schema.
    execute(&client, "ALTER TABLE idle ADD note text").await;
    assert!(runtime.terminate(LIMIT).success(), "{}", runtime.process().log_tail());
    let mut again = config.clone();
    again.source.snapshot.requests = vec![SnapshotRequest {
        id: "again".to_owned(),
        tables: vec!["public.idle".to_owned()],
    }];
    let _runtime = Runtime::capture(&again);
    let idle = ended("idle", 2).await;
    assert_eq!(check(&idle), [pair("idle(id int4) 1", "idle(id int4, note text) 2")]);
    let operations: Vec<_> = idle[2..].iter().map(|record| record.operation()).collect();
    let marked = [
        Operation::SchemaChange,
        Operation::SnapshotBegin,
        Operation::SnapshotEnd,
    ];
    assert_eq!(operations, marked);
}

#[tokio::test(flavor = "multi_thread")]
async fn columns_that_come_go_and_change_between_the_chunks_of_a_snapshot_leave_no_row_out() {
    const ROWS: u64 = 200_000;
    let (postgres, kafka) = (Postgres::start(&[]).await, Kafka::shared().await);
    let client = postgres.client().await;
    execute(
        &client,
        &format!(
            "CREATE TABLE busy (id int PRIMARY KEY, price int, gone text);
             INSERT INTO busy SELECT n, n, repeat('x', 100) FROM generate_series(1, {ROWS}) n"
        ),
    )
    .await;
    let mut config = config(&postgres, kafka, None);
    config.source.snapshot.mode = SnapshotMode::Incremental;
    let mut runtime = Runtime::capture(&config);
    runtime.ready(LIMIT).await;
    let snapshot = || {
        checkpoint(&config)
            .map(|checkpoint| checkpoint.snapshot)
            .unwrap_or_default()
    };
    // One after another, each between two chunks; no change follows that would tell it.
    let mut before = 0;
    for ddl in [
        "ALTER TABLE busy ADD came int DEFAULT 7",
        "ALTER TABLE busy DROP gone",
        "ALTER TABLE busy ALTER price TYPE text USING 'p' || price",
        "ALTER TABLE busy RENAME price TO cost",
    ] {
        before = eventually("more rows are read", LIMIT, async || {
            let snapshot = snapshot();
            assert!(
                snapshot.done.is_empty(),
                "the reading was over too soon to show anything"
            );
            match snapshot.reading.map(|cursor| cursor.rows) {
                Some(rows) if rows > before => Ok(rows),
                rows => Err(format!("{rows:?}")),
            }
        })
        .await;
        execute(&client, ddl).await;
    }
    eventually("the rows are read", LIMIT, async || match snapshot().done.len() {
        0 => Err("not yet"),
        _ => Ok(()),
    })
    .await;
    let log = read_log(kafka, &config, &["busy"]);
    let events = check(&log);
    assert_eq!(
        events.last().unwrap().1.split_once(") ").unwrap().0,
        "busy(id int4, cost text, came int4"
    );
    let end = log.last().unwrap();
    assert_eq!(end.operation(), Operation::SnapshotEnd);
    let id = &end.snapshot.as_ref().unwrap().id;
    let rows: Vec<&ChangeRecord> = log
        .iter()
        .filter(|record| record.operation() == Operation::Read && record.snapshot.as_ref().unwrap().id == *id)
        .collect();
    let values = |record: &ChangeRecord| record.after.as_ref().unwrap().values.clone();
    let ids: Vec<_> = rows
        .iter()
        .map(|record| values(record)[0].kind.clone().unwrap())
        .collect();
    assert_eq!(ids, (1..=ROWS.cast_signed()).map(Kind::Integer).collect::<Vec<_>>());
    // Each is as it was under the schema that it says.
    for (record, id) in rows.iter().zip(1_i64..) {
        let columns = &record.relation.as_ref().unwrap().columns;
        for (column, value) in columns.iter().zip(values(record)) {
            let expected = match (column.name.as_str(), column.type_name.as_str()) {
                ("id", _) | ("price", "int4") => Kind::Integer(id),
                ("price" | "cost", _) => Kind::Text(format!("p{id}")),
                ("came", _) => Kind::Integer(7),
                _ => Kind::Text("x".repeat(100)),
            };
            assert_eq!(value.kind, Some(expected), "{} of {id}", column.name);
        }
    }
}

#[tokio::test(flavor = "multi_thread")]
async fn a_dropped_table_ends_with_an_event_also_if_nobody_looked_when_it_was_dropped() {
    let (postgres, redis, kafka) = (Postgres::start(&[]).await, Redis::start().await, Kafka::shared().await);
    let client = postgres.client().await;
    execute(
        &client,
        "CREATE TABLE t (id int PRIMARY KEY); CREATE TABLE unused (id int PRIMARY KEY); CREATE TABLE stays (id int PRIMARY KEY)",
    )
    .await;
    let config = config(&postgres, kafka, Some(&redis));
    let mut runtime = Runtime::capture(&config);
    runtime.ready(LIMIT).await;
    execute(
        &client,
        "ALTER TABLE t ADD note text; INSERT INTO t VALUES (1); INSERT INTO stays VALUES (1)",
    )
    .await;
    let events = async |count: usize| {
        eventually("the events are in Kafka", LIMIT, async || {
            let log = tokio::task::block_in_place(|| read_log(kafka, &config, &["t"]));
            let found = log.iter().filter(|record| is_event(record)).count();
            if found >= count {
                Ok(check(&log))
            } else {
                Err(format!("{found} of {count}"))
            }
        })
        .await
    };
    events(0).await;
    runtime.kill9();
    // Whoever forges the message drops no table.
    execute(
        &client,
        "INSERT INTO t VALUES (2); DROP TABLE t, unused;
         SELECT pg_logical_emit_message(false, 'meander.dropped', 'stays'::regclass::oid::text)",
    )
    .await;
    runtime.start_again();
    let (one, gone) = ("t(id int4, note text) 1", "");
    assert_eq!(events(1).await, [pair(one, gone)]);
    assert_eq!(
        checkpoint(&config).unwrap().events_total,
        3,
        "an event is no change of a row"
    );

    // A table of that name is another one.
    runtime.kill9();
    execute(&client, "CREATE TABLE t (id int PRIMARY KEY)").await;
    runtime.start_again();
    runtime.ready(LIMIT).await;
    eventually("the new table joins", LIMIT, async || {
        let sql = "SELECT count(*) FROM pg_publication_tables WHERE tablename = 't'";
        let count: i64 = client.query_one(sql, &[]).await.unwrap().get(0);
        if count == 1 { Ok(()) } else { Err("it has not") }
    })
    .await;
    execute(&client, "INSERT INTO t VALUES (3)").await;
    assert_eq!(events(2).await, [pair(one, gone), pair("", "t(id int4) 1")]);
    let (namespace, name) = (&config.pipeline.namespace, &config.pipeline.name);
    let kept = tokio::task::block_in_place(|| {
        let key = checkpoint_key(namespace, name, &config.source.slot_name);
        let tail = Tail::new(&config.kafka.cluster(), LIMIT).unwrap();
        read_schemas(&tail, &schemas_topic(namespace, name), &key).unwrap()
    });
    let mut kept: Vec<_> = kept.into_iter().map(|kept| kept.oid).collect();
    kept.sort_unstable();
    let oids = "SELECT ARRAY['stays'::regclass::oid, 't'::regclass::oid]";
    let expected: Vec<u32> = client.query_one(oids, &[]).await.unwrap().get(0);
    assert_eq!(kept, expected, "nothing is left of what was dropped");
}

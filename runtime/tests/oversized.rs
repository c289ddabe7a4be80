//! Rows whose records are larger than their topics take.
#![allow(clippy::unwrap_used, clippy::expect_used, clippy::panic)]

mod common;
#[path = "common/log.rs"]
mod log;
#[path = "common/operator.rs"]
mod operator;
#[path = "common/replay.rs"]
mod replaying;

use std::collections::BTreeMap;

use common::{LIMIT, checkpoint, config, stream_entries, wait_for_metric};
use log::{read_topic, wait_for_records};
use meander_config::{
    CaptureConfig, KafkaSink, OnOversizedRow, PostgresServer, ReplayTarget, SnapshotRequest, SslMode,
};
use meander_proto::v1::{Absence, ChangeRecord, Directive, Operation, Row, value::Kind};
use meander_runtime::{
    log::OVERSIZED_HEADER,
    replay::{End, error::ReplayError},
};
use meander_test_support::{Kafka, Postgres, Redis, Runtime, eventually, unique_name};
use operator::Operator;
use prost::Message as _;
use rdkafka::{Message as _, message::Headers as _};
use replaying::{everything, replay};
use tokio_postgres::Client;

/// The topics take 1 MiB. Random digits hardly compress.
const LARGE: &str = "CREATE TABLE docs (id int PRIMARY KEY, title text, body text);
    CREATE SCHEMA aside;
    CREATE TABLE aside.large AS SELECT string_agg(md5(random()::text), '') AS body FROM generate_series(1, 98304);";
const LARGE_BYTES: usize = 3 * 1024 * 1024;

async fn run(client: &Client, sql: &str) {
    client.batch_execute(sql).await.unwrap();
}

async fn raise_limit(kafka: &Kafka, topic: &str) {
    let arguments =
        format!("--alter --entity-type topics --entity-name {topic} --add-config max.message.bytes=10485760");
    kafka.tool("kafka.admin.ConfigCommand", &arguments).await;
}

fn topic(config: &CaptureConfig) -> String {
    format!("{}.public.docs", config.kafka.topic_prefix)
}

/// How a value of the row is told: its bytes, or why not.
fn told(row: Option<&Row>, column: usize) -> Result<usize, Absence> {
    match row.unwrap().values[column].kind.as_ref().unwrap() {
        Kind::Absent(absence) => Err(Absence::try_from(*absence).unwrap()),
        Kind::Text(text) => Ok(text.len()),
        other => panic!("{other:?}"),
    }
}

#[tokio::test(flavor = "multi_thread")]
async fn a_row_that_its_topic_does_not_take_stops_the_capture_until_it_takes_it() {
    let (postgres, kafka) = (Postgres::start(&[]).await, Kafka::shared().await);
    let client = postgres.client().await;
    run(&client, LARGE).await;
    let operator = Operator::start(Directive::default()).await;
    let folder = tempfile::tempdir().unwrap();
    let mut config = config(&postgres, kafka, None);
    config.operator = operator.link(&folder);
    let topic = topic(&config);
    let mut runtime = Runtime::capture(&config);
    runtime.ready(LIMIT).await;
    // It is three times the limit, and a small part of it as it is sent.
    run(&client, "INSERT INTO docs VALUES (1, 'text', repeat('x', 3000000))").await;
    wait_for_records(kafka, &topic, 1).await;
    run(&client, "INSERT INTO docs SELECT 2, 'noise', body FROM aside.large").await;

    let condition = operator.condition("SinksReady", "RecordTooLarge").await;
    for named in [&topic, "max.message.bytes=", "onOversizedRow: OmitValues"] {
        assert!(condition.message.contains(named), "{named}: {}", condition.message);
    }
    assert!(!condition.message.contains("noise"), "{}", condition.message);
    assert_eq!(tokio::task::block_in_place(|| read_topic(kafka, &topic)).len(), 1);

    raise_limit(kafka, &topic).await;
    let records = wait_for_records(kafka, &topic, 2).await;
    assert_eq!(told(records[1].2.after.as_ref(), 2), Ok(LARGE_BYTES));
    assert!(checkpoint(&config).unwrap().oversized.is_empty());
    operator.condition("SinksReady", "Ready").await;
    assert!(runtime.terminate(LIMIT).success());
}

/// Every record of the topic by its place, and the size that its header says it would have had.
fn read(kafka: &Kafka, topic: &str) -> BTreeMap<(String, u32), (ChangeRecord, Option<u64>)> {
    let mut found = BTreeMap::new();
    kafka.read(
        |name| name == topic,
        |message| {
            let record = ChangeRecord::decode(message.payload().unwrap()).unwrap();
            let key = message.key().map(|key| String::from_utf8(key.to_vec()).unwrap());
            assert!(key.is_some_and(|key| key.starts_with("{\"id\":")));
            let headers: BTreeMap<&str, &[u8]> = (message.headers().unwrap().iter())
                .map(|header| (header.key, header.value.unwrap()))
                .collect();
            let position = String::from_utf8(headers["meander-position"].to_vec()).unwrap();
            let size = headers.get(OVERSIZED_HEADER);
            let size = size.map(|size| std::str::from_utf8(size).unwrap().parse().unwrap());
            let part = record.coordinate.unwrap().part;
            let before = found.insert((position, part), (record, size));
            assert!(before.is_none(), "doubled: {before:?}");
        },
    );
    found
}

#[tokio::test(flavor = "multi_thread")]
async fn without_its_large_values_a_row_is_in_its_place_once_in_both_sinks_through_three_kills() {
    const ROUNDS: u64 = 12;
    const RECORDS: u64 = 6;
    const OVERSIZED: u64 = 5;
    let (postgres, redis, kafka) = (Postgres::start(&[]).await, Redis::start().await, Kafka::shared().await);
    let client = postgres.client().await;
    run(&client, LARGE).await;
    run(&client, "ALTER TABLE docs REPLICA IDENTITY FULL").await;
    let operator = Operator::start(Directive::default()).await;
    let folder = tempfile::tempdir().unwrap();
    let mut config = config(&postgres, kafka, Some(&redis));
    config.operator = operator.link(&folder);
    config.on_oversized_row = OnOversizedRow::OmitValues;
    let topic = topic(&config);
    let mut runtime = Runtime::capture(&config);
    runtime.ready(LIMIT).await;
    let load = tokio::spawn({
        let client = postgres.client().await;
        async move {
            for n in 1..=ROUNDS {
                let sql = format!(
                    "BEGIN;
                     INSERT INTO docs VALUES ({n}, 'small', 'body');
                     INSERT INTO docs SELECT 1000 + {n}, 'title', body FROM aside.large;
                     UPDATE docs SET title = 'other' WHERE id = 1000 + {n};
                     UPDATE docs SET id = 2000 + {n} WHERE id = 1000 + {n};
                     DELETE FROM docs WHERE id = 2000 + {n};
                     COMMIT"
                );
                run(&client, &sql).await;
            }
        }
    });
    for kill in 1..=3 {
        eventually("records flow", LIMIT, async || {
            let published = checkpoint(&config).map_or(0, |checkpoint| checkpoint.records_total);
            (published >= kill * ROUNDS).then_some(()).ok_or(published)
        })
        .await;
        runtime.kill9();
        runtime.start_again();
    }
    load.await.unwrap();
    eventually("everything is in Kafka", LIMIT, async || {
        let checkpoint = checkpoint(&config).unwrap();
        let published = checkpoint.records_total;
        (published == ROUNDS * RECORDS).then_some(()).ok_or(published)
    })
    .await;
    let found = tokio::task::block_in_place(|| read(kafka, &topic));
    assert_eq!(found.len() as u64, ROUNDS * RECORDS);
    for (record, size) in found.values() {
        let tells = |row: &Option<Row>| row.as_ref().map(|row| told(Some(row), 2));
        let (before, after) = (tells(&record.before), tells(&record.after));
        let omitted = Some(Err(Absence::Oversized));
        match (record.operation(), record.key_changed) {
            (Operation::Insert, _) if size.is_none() => assert_eq!(after, Some(Ok(4))),
            (Operation::Insert, _) => assert_eq!((before, after), (None, omitted)),
            (Operation::Delete, _) => assert_eq!((before, after), (omitted, None)),
            // What the UPDATE left alone is still said to be what it was.
            (Operation::Update, _) => assert_eq!((before, after), (omitted, Some(Err(Absence::UnchangedToast)))),
            other => panic!("{other:?}"),
        }
        if let Some(row) = &record.after {
            assert!(told(Some(row), 1).is_ok(), "what is small is told");
        }
        assert!(size.is_none_or(|size| size > LARGE_BYTES as u64));
    }
    let oversized = found.values().filter(|(_, size)| size.is_some()).count() as u64;
    assert_eq!(oversized, ROUNDS * OVERSIZED);
    let noted = checkpoint(&config).unwrap().oversized;
    assert_eq!(noted.total, oversized, "each is counted once, whoever published it");
    assert_eq!(noted.last.unwrap().table, "public.docs");

    // Redis has the same.
    eventually("everything is in Redis", LIMIT, async || {
        let entries = stream_entries(&redis, &topic).await;
        if (entries.len() as u64) < ROUNDS * RECORDS {
            return Err(entries.len());
        }
        assert_eq!(entries.len(), found.len());
        for (_, entry) in entries {
            let record = ChangeRecord::decode(&entry["value"][..]).unwrap();
            let place = (
                String::from_utf8(entry["position"].clone()).unwrap(),
                record.coordinate.unwrap().part,
            );
            let size: Option<u64> = entry
                .get(&OVERSIZED_HEADER.to_uppercase())
                .map(|size| std::str::from_utf8(size).unwrap().parse().unwrap());
            assert_eq!(found[&place], (record, size));
        }
        Ok(())
    })
    .await;

    // It is said, with what ends it, and without a value.
    let condition = operator.condition("Degraded", "ValuesOmitted").await;
    for named in ["public.docs", &topic, "max.message.bytes", "snapshot.requests"] {
        assert!(condition.message.contains(named), "{named}: {}", condition.message);
    }
    assert!(!condition.message.contains("title"), "{}", condition.message);

    // A replay delivers each as it is; where rows are made of them it says that this cannot be.
    let prefix = unique_name("copy");
    let target = KafkaSink {
        topic_prefix: prefix.clone(),
        ..config.kafka.clone()
    };
    let end = replay(&everything(&config, ReplayTarget::Kafka(target))).await;
    assert!(matches!(end, Ok(End::Complete)), "{end:?}");
    let copy = tokio::task::block_in_place(|| read(kafka, &format!("{prefix}.public.docs")));
    assert_eq!(copy, found);
    let other = Postgres::start(&[]).await;
    run(
        &other.client().await,
        "CREATE SCHEMA meander; CREATE TABLE docs (id int PRIMARY KEY, title text, body text)",
    )
    .await;
    let server = PostgresServer {
        host: "127.0.0.1".to_owned(),
        port: other.port(),
        database: other.database().to_owned(),
        username_file: other.username_file(),
        password_file: other.password_file(),
        ssl_mode: SslMode::Disable,
        ca_file: None,
        client_certificate: None,
    };
    match replay(&everything(&config, ReplayTarget::Postgres(server))).await {
        Err(ReplayError::Target(error)) => assert_eq!(error.reason(), "ValuesOmitted", "{error}"),
        other => panic!("{other:?}"),
    }

    // Once the topic takes more, a row that is read again is whole, and nothing is lacking any more.
    run(&client, "INSERT INTO docs SELECT 5000, 'last', body FROM aside.large").await;
    eventually("it is published", LIMIT, async || {
        let total = checkpoint(&config).unwrap().oversized.total;
        (total == oversized + 1).then_some(()).ok_or(total)
    })
    .await;
    wait_for_metric(&runtime, "meander_capture_oversized_records_total", |count| count > 0).await;
    raise_limit(kafka, &topic).await;
    assert!(runtime.terminate(LIMIT).success());
    config.source.snapshot.requests = vec![SnapshotRequest {
        id: "whole".to_owned(),
        tables: vec!["public.docs".to_owned()],
    }];
    let mut runtime = Runtime::capture(&config);
    eventually("the rows were read again", LIMIT, async || {
        let oversized = checkpoint(&config).unwrap().oversized;
        oversized
            .tables
            .is_empty()
            .then_some(())
            .ok_or_else(|| format!("{oversized:?}"))
    })
    .await;
    let records = tokio::task::block_in_place(|| read_topic(kafka, &topic));
    let row = records
        .iter()
        .find(|(_, key, record)| record.operation() == Operation::Read && key.as_deref() == Some(r#"{"id":"5000"}"#));
    assert_eq!(told(row.unwrap().2.after.as_ref(), 2), Ok(LARGE_BYTES));
    operator.condition("Degraded", "Sound").await;
    assert_eq!(checkpoint(&config).unwrap().oversized.total, oversized + 1);
    assert!(runtime.terminate(LIMIT).success());
}

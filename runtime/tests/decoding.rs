//! A second decoder's opinion: the same random workload read by PostgreSQL's own `test_decoding` and by a capture.
//!
//! Each captured record is written as `test_decoding` would have written it, so the two are compared as text, change by change.
#![allow(clippy::unwrap_used, clippy::expect_used, clippy::panic)]

mod common;
#[path = "common/log.rs"]
mod log;

use std::{collections::HashMap, fmt::Write as _};

use bytes::Bytes;
use common::{LIMIT, config};
use fastrand::Rng;
use futures::SinkExt as _;
use log::{read_topic, wait_for_records};
use meander_proto::v1::{Absence, ChangeRecord, Operation, Row, value::Kind};
use meander_runtime::source::postgres::wire::SESSION_SETTINGS;
use meander_test_support::{Kafka, Postgres, Runtime};
use tokio_postgres::Client;

/// Statements of the workload; about a fifth of them end a transaction.
const STATEMENTS: usize = 700;
/// Ids that the workload uses; few, so that most statements meet rows.
const IDS: i32 = 30;

/// One connection with tables of its own, so that transactions of several lie across each other and nobody waits for a lock.
struct Worker {
    client: Client,
    number: usize,
    /// Open savepoints; None outside of a transaction.
    savepoints: Option<usize>,
}

impl Worker {
    const TABLES: [&str; 4] = ["simple", "composed", "whole", "indexed"];

    async fn new(postgres: &Postgres, number: usize) -> Self {
        let client = postgres.client().await;
        let n = number;
        client
            .batch_execute(&format!(
                "CREATE TABLE simple_{n} (id int PRIMARY KEY, amount numeric, note text, large text, flag bool, bits varbit);
                 ALTER TABLE simple_{n} ALTER large SET STORAGE EXTERNAL;
                 CREATE TABLE composed_{n} (id int, part text, at timestamptz, raw bytea, PRIMARY KEY (id, part));
                 CREATE TABLE whole_{n} (id int, note text, large text); ALTER TABLE whole_{n} REPLICA IDENTITY FULL;
                 ALTER TABLE whole_{n} ALTER large SET STORAGE EXTERNAL;
                 CREATE TABLE indexed_{n} (id int PRIMARY KEY, code text NOT NULL UNIQUE, note text);
                 ALTER TABLE indexed_{n} REPLICA IDENTITY USING INDEX indexed_{n}_code_key"
            ))
            .await
            .unwrap();
        Self {
            client,
            number,
            savepoints: None,
        }
    }

    async fn execute(&self, sql: &str) {
        self.client
            .batch_execute(sql)
            .await
            .unwrap_or_else(|error| panic!("{sql}: {error:?}"));
    }

    /// Begins or ends a transaction or a savepoint, or makes a change.
    async fn step(&mut self, random: &mut Rng) {
        let Some(savepoints) = self.savepoints else {
            self.execute("BEGIN").await;
            self.savepoints = Some(0);
            return;
        };
        match random.u32(..100) {
            0..14 => self.end("COMMIT").await,
            14..18 => self.end("ROLLBACK").await,
            18..30 => {
                self.execute(&format!("SAVEPOINT s{savepoints}")).await;
                self.savepoints = Some(savepoints + 1);
            }
            30..40 if savepoints > 0 => {
                let to = random.usize(..savepoints);
                let verb = if random.bool() { "ROLLBACK TO" } else { "RELEASE" };
                self.execute(&format!("{verb} SAVEPOINT s{to}")).await;
                self.savepoints = Some(if verb == "RELEASE" { to } else { to + 1 });
            }
            _ => self.change(random).await,
        }
    }

    async fn end(&mut self, verb: &str) {
        self.execute(verb).await;
        self.savepoints = None;
    }

    async fn change(&self, random: &mut Rng) {
        let n = self.number;
        let id = random.i32(1..=IDS);
        let table = random.choice(Self::TABLES).unwrap();
        let word = ["a", "it''s", "b\\", "", "ü\n"][random.usize(..5)];
        let sql = match random.u32(..24) {
            0..4 => format!(
                "INSERT INTO simple_{n} (id, amount, note, large, flag, bits)
                 SELECT i, i / 7.0, '{word}', repeat(chr(65 + i % 26), {}), i % 2 = 0, B'1011' FROM generate_series({id}, {}) i ON CONFLICT DO NOTHING",
                random.u32(1..6000),
                id + random.i32(0..4)
            ),
            // Appends to a value that is stored out of line, and writes some rows twice.
            4 => format!("INSERT INTO simple_{n} (id, large) VALUES ({id}, repeat('x', 2500)) ON CONFLICT (id) DO UPDATE SET large = simple_{n}.large || excluded.large"),
            5 | 6 => format!("UPDATE simple_{n} SET note = '{word}', amount = NULL WHERE id <= {id}"),
            7 => format!("UPDATE simple_{n} s SET id = -id WHERE id % 5 = {} AND NOT EXISTS (SELECT FROM simple_{n} o WHERE o.id = -s.id)", id % 5),
            8 => format!("DELETE FROM {table}_{n} WHERE id = {id}"),
            9 => format!("INSERT INTO composed_{n} VALUES ({id}, '{word}', '2026-11-21 12:00:00+03', '\\x00{id:02x}') ON CONFLICT DO NOTHING"),
            10 => format!("UPDATE composed_{n} SET part = part || clock_timestamp(), at = 'infinity' WHERE id = {id}"),
            11 | 12 => format!("INSERT INTO whole_{n} VALUES ({id}, '{word}', repeat('w', {})), ({id}, NULL, NULL)", random.u32(1..5000)),
            13 | 14 => format!("UPDATE whole_{n} SET note = '{word}' WHERE id >= {id}"),
            15 => format!("INSERT INTO indexed_{n} VALUES ({id}, 'code {id}', '{word}') ON CONFLICT DO NOTHING"),
            16 => format!("UPDATE indexed_{n} SET note = '{word}' WHERE id <= {id}"),
            17 => format!("UPDATE indexed_{n} SET code = code || '+' WHERE id = {id}"),
            18 if id % 3 == 0 => format!("TRUNCATE {table}_{n}, composed_{n}"),
            18 => format!("TRUNCATE {table}_{n} RESTART IDENTITY CASCADE"),
            19 => format!("ALTER TABLE {table}_{n} ADD COLUMN IF NOT EXISTS extra int DEFAULT {id}"),
            20 => format!("ALTER TABLE {table}_{n} DROP COLUMN IF EXISTS extra, DROP COLUMN IF EXISTS renamed"),
            21 => format!(
                "DO $$ BEGIN ALTER TABLE {table}_{n} RENAME COLUMN extra TO renamed; EXCEPTION WHEN OTHERS THEN NULL; END $$"
            ),
            // Writes the table anew.
            22 => format!(
                "DO $$ BEGIN ALTER TABLE {table}_{n} ALTER COLUMN renamed TYPE text USING renamed || '!'; EXCEPTION WHEN OTHERS THEN NULL; END $$"
            ),
            _ => format!("SELECT pg_logical_emit_message(true, 'test', 'message {id}')"),
        };
        self.execute(&sql).await;
    }

    /// COPY writes several rows into one WAL record.
    async fn copy(&self, rows: std::ops::Range<i32>) {
        let text: String = rows
            .map(|id| format!("{id}\tcopied\t{}\n", "c".repeat((id as usize * 37) % 5000)))
            .collect();
        let sink = self
            .client
            .copy_in(&format!("COPY whole_{} (id, note, large) FROM STDIN", self.number))
            .await
            .unwrap();
        let mut sink = Box::pin(sink);
        sink.send(Bytes::from(text)).await.unwrap();
        sink.as_mut().finish().await.unwrap();
    }
}

/// What a change looks like in the output of `test_decoding`.
fn line(record: &ChangeRecord, types: &HashMap<u32, String>) -> String {
    let relation = record.relation.as_ref().unwrap();
    let row = |row: &Row, skip_nulls: bool| {
        let mut out = String::new();
        for (column, value) in relation.columns.iter().zip(&row.values) {
            let quoted = |text: &str| format!("'{}'", text.replace('\'', "''"));
            let text = match &value.kind {
                None if skip_nulls => continue,
                Some(Kind::Absent(absence)) if *absence == i32::from(Absence::NotInReplicaIdentity) => continue,
                None => "null".to_owned(),
                Some(Kind::Absent(_)) => "unchanged-toast-datum".to_owned(),
                Some(Kind::Integer(integer)) => integer.to_string(),
                Some(Kind::Boolean(boolean)) => boolean.to_string(),
                Some(Kind::Text(text)) => match column.type_name.as_str() {
                    "numeric" => text.clone(),
                    "varbit" => format!("B'{text}'"),
                    _ => quoted(text),
                },
                Some(Kind::Binary(bytes)) => {
                    bytes.iter().fold("'\\x".to_owned(), |mut hex, byte| {
                        write!(hex, "{byte:02x}").unwrap();
                        hex
                    }) + "'"
                }
                Some(other) => panic!("{other:?}"),
            };
            write!(out, " {}[{}]:{text}", column.name, types[&column.type_oid]).unwrap();
        }
        out
    };
    let (before, after) = (record.before.as_ref(), record.after.as_ref());
    let change = match record.operation() {
        Operation::Insert => format!("INSERT:{}", row(after.unwrap(), false)),
        Operation::Update => match before {
            Some(before) => format!(
                "UPDATE: old-key:{} new-tuple:{}",
                row(before, true),
                row(after.unwrap(), false)
            ),
            None => format!("UPDATE:{}", row(after.unwrap(), false)),
        },
        Operation::Delete => format!("DELETE:{}", row(before.unwrap(), true)),
        Operation::Truncate => "TRUNCATE".to_owned(),
        other => panic!("{other:?}"),
    };
    format!("table {}.{}: {change}", relation.schema, relation.table)
}

/// The changes that `test_decoding` reads: transaction, number within it, and text. A TRUNCATE of several tables is several changes.
async fn other_opinion(client: &Client) -> Vec<(u32, u64, String)> {
    for (name, value) in SESSION_SETTINGS {
        client.batch_execute(&format!("SET {name} = '{value}'")).await.unwrap();
    }
    let rows = client
        .query(
            "SELECT xid::text::bigint, data FROM pg_logical_slot_get_changes('other', NULL, NULL)",
            &[],
        )
        .await
        .unwrap();
    let (mut changes, mut number) = (Vec::new(), 0);
    for row in &rows {
        let (xid, text): (i64, String) = (row.get(0), row.get(1));
        let xid = u32::try_from(xid).unwrap();
        if text.starts_with("COMMIT") {
            continue;
        }
        if text.starts_with("BEGIN") {
            number = 0;
            continue;
        }
        let lines: Vec<String> = match text.split_once(": TRUNCATE") {
            Some((tables, _)) => tables
                .trim_start_matches("table ")
                .split(", ")
                .map(|table| format!("table {table}: TRUNCATE"))
                .collect(),
            None => vec![text],
        };
        for line in lines {
            changes.push((xid, number, line));
            number += 1;
        }
    }
    changes
}

async fn the_two_agree(postgres: &Postgres, seed: u64) {
    println!("seed {seed}");
    let kafka = Kafka::shared().await;
    let mut random = Rng::with_seed(seed);
    let mut workers = Vec::new();
    for number in 0..3 {
        workers.push(Worker::new(postgres, number).await);
    }
    let client = postgres.client().await;
    client
        .batch_execute("CREATE TABLE the_end (id int PRIMARY KEY)")
        .await
        .unwrap();
    let mut config = config(postgres, kafka, None);
    config.kafka.partitions = 1;
    let mut runtime = Runtime::capture(&config);
    runtime.ready(LIMIT).await;
    client
        .batch_execute("SELECT pg_create_logical_replication_slot('other', 'test_decoding')")
        .await
        .unwrap();

    for _ in 0..STATEMENTS {
        let worker = random.usize(..workers.len());
        workers[worker].step(&mut random).await;
    }
    for worker in &mut workers {
        if worker.savepoints.is_some() {
            worker.end("COMMIT").await;
        }
        worker.copy(100..400).await;
    }
    // Eighty savepoints, one inside the other, with a change in each.
    let nested: String = (0..80)
        .map(|depth| format!("SAVEPOINT n{depth}; INSERT INTO whole_0 (id) VALUES ({depth});"))
        .collect();
    workers[0]
        .execute(&format!(
            "BEGIN; {nested} ROLLBACK TO n40; INSERT INTO whole_0 (id) VALUES (-1); COMMIT"
        ))
        .await;
    client.batch_execute("INSERT INTO the_end VALUES (1)").await.unwrap();

    wait_for_records(kafka, &format!("{}.public.the_end", config.kafka.topic_prefix), 1).await;
    let expected = other_opinion(&client).await;
    let types: HashMap<u32, String> = client
        .query("SELECT oid, format_type(oid, NULL) FROM pg_type", &[])
        .await
        .unwrap()
        .iter()
        .map(|row| (row.get(0), row.get(1)))
        .collect();
    let mut seen = Vec::new();
    for worker in &workers {
        for table in Worker::TABLES {
            let topic = format!("{}.public.{table}_{}", config.kafka.topic_prefix, worker.number);
            seen.extend(read_topic(kafka, &topic));
        }
    }
    seen.extend(read_topic(
        kafka,
        &format!("{}.public.the_end", config.kafka.topic_prefix),
    ));
    // The first half of a change of the key says nothing that the second does not, and the other plugin tells of no schema.
    seen.retain(|(_, _, record)| {
        !(record.key_changed && record.operation() == Operation::Delete)
            && record.operation() != Operation::SchemaChange
    });
    seen.sort_by_key(|(_, _, record)| {
        let at = record.coordinate.unwrap();
        (at.epoch, at.commit_lsn, at.ordinal)
    });
    let mut seen = seen.iter().map(|(_, _, record)| {
        (
            record.transaction_id,
            record.coordinate.unwrap().ordinal,
            line(record, &types),
        )
    });
    let mut compared = 0;
    // Messages have their place in the order, and are not published.
    for expected in expected
        .into_iter()
        .filter(|(_, _, text)| !text.starts_with("message:"))
    {
        assert_eq!(seen.next(), Some(expected), "seed {seed}, change {compared}");
        compared += 1;
    }
    assert_eq!(seen.next(), None, "seed {seed}");
    assert!(compared > 500, "seed {seed}: only {compared} changes were made");
    println!("seed {seed}: {compared} changes agree");
}

#[tokio::test(flavor = "multi_thread")]
async fn test_decoding_reads_the_same_changes_from_the_oldest_version() {
    the_two_agree(&Postgres::start_version(14, &[]).await, fastrand::u64(..)).await;
}

#[tokio::test(flavor = "multi_thread")]
async fn test_decoding_reads_the_same_changes_from_the_newest_version() {
    the_two_agree(&Postgres::start_version(18, &[]).await, fastrand::u64(..)).await;
}

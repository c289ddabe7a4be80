//! What the tests of snapshots share: tables, changes beside the reading, and looks at the log.
#![allow(dead_code)]

use std::time::Duration;

use meander_config::CaptureConfig;
use meander_proto::v1::Operation;
use meander_test_support::{Kafka, Postgres, eventually};
use tokio_postgres::Client;

use crate::{
    common::LIMIT,
    fold::{Entry, State, difference, fold, read_log},
};

pub async fn execute(postgres: &Postgres, sql: &str) {
    postgres.client().await.batch_execute(sql).await.unwrap();
}

pub fn count(log: &[Entry], operation: Operation) -> usize {
    log.iter().filter(|entry| entry.operation == operation).count()
}

pub fn topic(config: &CaptureConfig, table: &str) -> String {
    format!("{}.public.{table}", config.kafka.topic_prefix)
}

/// Waits until the log holds this many ends of snapshots of the table, and reads it.
pub async fn wait_for_ends(kafka: &Kafka, config: &CaptureConfig, table: &str, ends: usize) -> Vec<Entry> {
    let topic = topic(config, table);
    eventually("the snapshot has ended", LIMIT, async || {
        let log = tokio::task::block_in_place(|| read_log(kafka, &topic));
        let found = count(&log, Operation::SnapshotEnd);
        if found >= ends {
            Ok(())
        } else {
            Err(format!("{} records, {found} ends", log.len()))
        }
    })
    .await;
    // A partition shows the end of a transaction before another one does.
    kafka.settle(&topic, LIMIT).await;
    tokio::task::block_in_place(|| read_log(kafka, &topic))
}

/// Reads the log until it comes to what the table holds.
pub async fn wait_until_equal(kafka: &Kafka, config: &CaptureConfig, table: &str, rows: &State) -> Vec<Entry> {
    eventually("the log comes to what the table holds", LIMIT, async || {
        let log = tokio::task::block_in_place(|| read_log(kafka, &topic(config, table)));
        difference(&fold(&log), rows).map_or(Ok(log), Err)
    })
    .await
}

/// What a table holds whose key is `id` and comes first. The other columns are named.
pub async fn table(client: &Client, name: &str, columns: &str) -> State {
    let others: Vec<String> = columns
        .split(' ')
        .map(|column| format!("coalesce({column}::text, '')"))
        .collect();
    let sql = format!("SELECT id::text, ARRAY[{}] FROM {name}", others.join(", "));
    let rows = client.query(&sql, &[]).await.unwrap();
    rows.iter()
        .map(|row| {
            let id: String = row.get(0);
            let key = format!("{{\"id\":\"{id}\"}}");
            (key, [vec![id], row.get(1)].concat())
        })
        .collect()
}

/// Twenty thousand rows, of which each tenth has a value that is stored apart.
pub const LARGE_TABLE: &str = "CREATE TABLE trades (id bigint PRIMARY KEY, price bigint, note text);
    ALTER TABLE trades ALTER note SET STORAGE EXTERNAL;
    INSERT INTO trades SELECT n, 0, CASE WHEN n % 10 = 0 THEN repeat(n::text || ' ', 600) ELSE 'short' END
      FROM generate_series(1, 20000) n";

/// Changes rows of every kind until told to stop, four at a time, each with this pause between two changes: values, keys in both
/// directions, deletions, insertions.
pub fn disturb(
    postgres: &Postgres,
    table: &'static str,
    pause: Duration,
) -> (tokio::sync::watch::Sender<bool>, Vec<tokio::task::JoinHandle<u64>>) {
    let (stop, stopped) = tokio::sync::watch::channel(false);
    let url = postgres.url();
    let clients = (0..4_i64)
        .map(|client| {
            let (url, stopped) = (url.clone(), stopped.clone());
            tokio::spawn(async move {
                let (connection, driver) = tokio_postgres::connect(&url, tokio_postgres::NoTls).await.unwrap();
                tokio::spawn(driver);
                let mut made = 0_i64;
                // A simple generator, so that a run can be had again.
                let mut random = client * 7_919 + 17;
                // What changes while nobody looks is bounded: the log is read as a whole in the end.
                let mut pace = tokio::time::interval(pause);
                while !*stopped.borrow() {
                    pace.tick().await;
                    random = (random * 1_103_515_245 + 12_345) & 0x7fff_ffff;
                    // Rows of their own for each client, so that none waits for another for long.
                    let id = random % 5_000 * 4 + client + 1;
                    let new = 100_000 + made * 4 + client;
                    let sql = match random / 5_000 % 10 {
                        0 => format!("UPDATE {table} SET id = -{new}, price = price + 1 WHERE id = {id}"),
                        1 => format!("UPDATE {table} SET id = {new}, price = price + 1 WHERE id = {id}"),
                        2 => format!("DELETE FROM {table} WHERE id = {id}"),
                        3 => format!("INSERT INTO {table} VALUES ({new}, 1, 'new'), (-{new}, 1, 'new')"),
                        4 => format!("BEGIN; UPDATE {table} SET price = -1 WHERE id = {id}; ROLLBACK"),
                        5 => format!("UPDATE {table} SET note = 'b', price = price + 1 WHERE id = {id}"),
                        _ => format!("UPDATE {table} SET price = price + 1 WHERE id = {id}"),
                    };
                    connection.batch_execute(&sql).await.unwrap();
                    made += 1;
                }
                made.cast_unsigned()
            })
        })
        .collect();
    (stop, clients)
}

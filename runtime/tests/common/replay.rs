//! What the tests of replays into a target share.
#![allow(dead_code)]

use meander_config::{
    CaptureConfig, Format, ReplayConfig, ReplayEnd, ReplayOrder, ReplayStart, ReplayTarget, ResourceIdentity, Speed,
};
use meander_runtime::{
    log::checkpoint_key,
    position::Lsn,
    replay::{self, End, error::ReplayError},
    sink::redis::mark_key,
};
use meander_test_support::{Kafka, Postgres, Redis, Runtime, eventually, free_address, unique_name};
use tokio_postgres::Client;
use tokio_util::sync::CancellationToken;

use crate::common::{LIMIT, checkpoint, config};

/// A table whose changes follow all others: see [`published`].
pub const LAST: &str = "CREATE TABLE last (id int PRIMARY KEY, n int); INSERT INTO last VALUES (1, 0);";

/// Keys of two columns, one of which is named as a part of Debezium's keys is.
pub const TABLES: &str = "CREATE TABLE trades (id int, payload text, note text, PRIMARY KEY (id, payload));
    CREATE TABLE orders (id int PRIMARY KEY, n int);";

/// Transactions of some records each: changes of keys, which are several records of one change, among them.
pub const CHANGES: &str = "DO $$ BEGIN FOR i IN 1..1500 LOOP
        INSERT INTO trades VALUES (i % 50, 'p' || i, repeat('x', i % 300));
        INSERT INTO orders VALUES (i, 0);
        UPDATE orders SET n = n + 1 WHERE id = i / 2;
        UPDATE trades SET payload = 'q' || i WHERE id = (i - 1) % 50 AND payload = 'p' || (i - 1);
        IF i % 3 = 0 THEN DELETE FROM orders WHERE id = i / 3; END IF;
        COMMIT;
        PERFORM pg_sleep(0.002);
    END LOOP; END $$";

/// A replay of everything that the pipeline has published, as fast as it goes.
pub fn everything(pipeline: &CaptureConfig, target: ReplayTarget) -> ReplayConfig {
    ReplayConfig {
        job: ResourceIdentity {
            namespace: "test".to_owned(),
            name: unique_name("job"),
            uid: "42".to_owned(),
        },
        pipeline: pipeline.pipeline.clone(),
        slot_name: pipeline.source.slot_name.clone(),
        kafka: pipeline.kafka.log(),
        from: ReplayStart::Beginning,
        to: ReplayEnd::Now,
        speed: Speed::Max,
        suspended: false,
        filter: None,
        max_gap_seconds: None,
        order: ReplayOrder::Commit,
        target,
        operator: None,
        admin_address: free_address(),
        termination_message_file: None,
    }
}

pub async fn replay(config: &ReplayConfig) -> Result<End, ReplayError> {
    tokio::time::timeout(LIMIT, replay::run(config.clone(), CancellationToken::new()))
        .await
        .expect("the replay does not end")
}

/// Waits until everything that is committed is in Kafka, and the snapshots of so many tables. Returns how many records that is.
pub async fn published(source: &Client, config: &CaptureConfig, snapshots: usize) -> u64 {
    let row = source
        .query_one("SELECT pg_current_wal_insert_lsn()::text", &[])
        .await
        .unwrap();
    let end: Lsn = row.get::<_, String>(0).parse().unwrap();
    source.batch_execute("UPDATE last SET n = n + 1").await.unwrap();
    eventually("everything is published", LIMIT, async || match checkpoint(config) {
        Some(checkpoint)
            if checkpoint.snapshot.done.len() >= snapshots
                && checkpoint.complete.is_some_and(|at| at.commit_lsn >= end) =>
        {
            Ok(checkpoint.records_total)
        }
        other => Err(format!("{other:?}")),
    })
    .await
}

/// A pipeline that has published what [`CHANGES`] made, and how many records that is.
pub async fn recorded(kafka: &Kafka, redis: Option<&Redis>, format: Format) -> (CaptureConfig, u64) {
    let source = Postgres::start(&[]).await;
    let client = source.client().await;
    client.batch_execute(TABLES).await.unwrap();
    client.batch_execute(LAST).await.unwrap();
    let mut pipeline = config(&source, kafka, redis);
    pipeline.format = format;
    let mut capture = Runtime::capture(&pipeline);
    capture.ready(LIMIT).await;
    client.batch_execute(CHANGES).await.unwrap();
    let records = published(&client, &pipeline, 0).await;
    if let Some(redis) = redis {
        let mark = mark_key(
            &pipeline.kafka.topic_prefix,
            &checkpoint_key(
                &pipeline.pipeline.namespace,
                &pipeline.pipeline.name,
                &pipeline.source.slot_name,
            ),
        );
        let mut connection = redis.connection().await;
        eventually("everything is in Redis", LIMIT, async || {
            let written: Option<u64> = redis::cmd("HGET")
                .arg(&mark)
                .arg("records")
                .query_async(&mut connection)
                .await
                .unwrap();
            if written >= Some(records) {
                Ok(())
            } else {
                Err(format!("{written:?} of {records}"))
            }
        })
        .await;
    }
    assert!(capture.terminate(LIMIT).success());
    (pipeline, records)
}

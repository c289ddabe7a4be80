//! Heartbeats: what they show on an idle database, and that they are no more than that.
#![allow(clippy::unwrap_used, clippy::expect_used, clippy::panic)]

mod common;
#[path = "common/log.rs"]
mod log;

use std::fs;

use common::{LIMIT, checkpoint, config, wait_for_metric};
use log::wait_for_records;
use meander_config::{CaptureConfig, Format};
use meander_runtime::{checkpoint::Tail, log::message_topic};
use meander_test_support::{Kafka, Postgres, Runtime, eventually};
use rdkafka::Message as _;
use rustix::process::{Pid, Signal, kill_process};
use serde_json::{Value, json};

use crate::common::cluster;

async fn execute(postgres: &Postgres, sql: &str) {
    postgres.client().await.batch_execute(sql).await.unwrap();
}

fn beating(postgres: &Postgres, kafka: &Kafka) -> CaptureConfig {
    let mut config = config(postgres, kafka, None);
    config.source.heartbeat_interval_seconds = Some(1.try_into().unwrap());
    config
}

#[tokio::test(flavor = "multi_thread")]
async fn on_an_idle_database_the_lag_shows_that_the_slot_stands_still() {
    let (postgres, kafka) = (Postgres::start(&[]).await, Kafka::shared().await);
    execute(&postgres, "CREATE TABLE t (id int PRIMARY KEY)").await;
    let mut config = beating(&postgres, kafka);
    config.source.message_prefixes = vec!["*".to_owned()];
    let mut runtime = Runtime::capture(&config);
    runtime.ready(LIMIT).await;
    let client = postgres.client().await;
    let sql = "SELECT active_pid FROM pg_replication_slots WHERE active";
    let walsender: i32 = client.query_one(sql, &[]).await.unwrap().get(0);
    let walsender = Pid::from_raw(walsender).unwrap();

    kill_process(walsender, Signal::STOP).unwrap();
    wait_for_metric(&runtime, "meander_capture_lag_seconds", |lag| lag > 1).await;
    kill_process(walsender, Signal::CONT).unwrap();
    wait_for_metric(&runtime, "meander_capture_lag_seconds", |lag| lag == 0).await;

    // They are nobody's messages.
    execute(&postgres, "INSERT INTO t VALUES (1)").await;
    wait_for_records(kafka, &format!("{}.public.t", config.kafka.topic_prefix), 1).await;
    let messages = message_topic(&config.kafka.topic_prefix);
    let partitions = tokio::task::block_in_place(|| Tail::new(&cluster(kafka), LIMIT).unwrap().partitions(&messages));
    assert_eq!(partitions.unwrap(), Vec::<i32>::new());
    assert_eq!(checkpoint(&config).unwrap().events_total, 1);
}

#[tokio::test(flavor = "multi_thread")]
async fn a_heartbeat_that_cannot_be_written_is_said_and_ends_nothing() {
    let (postgres, kafka) = (Postgres::start(&[]).await, Kafka::shared().await);
    let function = "pg_logical_emit_message";
    execute(
        &postgres,
        &format!(
            "CREATE ROLE meander LOGIN REPLICATION PASSWORD 'its password'; GRANT CREATE ON DATABASE postgres TO meander;
             CREATE TABLE t (id int PRIMARY KEY); ALTER TABLE t OWNER TO meander; GRANT USAGE ON SCHEMA public TO meander;
             DO $$ DECLARE f regprocedure; BEGIN FOR f IN SELECT oid FROM pg_proc WHERE proname = '{function}' LOOP
                 EXECUTE 'REVOKE EXECUTE ON FUNCTION ' || f || ' FROM PUBLIC'; END LOOP; END $$"
        ),
    )
    .await;
    let mut config = beating(&postgres, kafka);
    let folder = tempfile::tempdir().unwrap();
    config.source.username_file = folder.path().join("username");
    config.source.password_file = folder.path().join("password");
    fs::write(&config.source.username_file, "meander").unwrap();
    fs::write(&config.source.password_file, "its password").unwrap();
    let mut runtime = Runtime::capture(&config);
    runtime.ready(LIMIT).await;
    let log = runtime.process().log().to_owned();
    let said = eventually("the cause", LIMIT, async || {
        let text = fs::read_to_string(&log).unwrap();
        text.lines()
            .find(|line| line.contains("HeartbeatFailed"))
            .map(str::to_owned)
            .ok_or(text)
    })
    .await;
    assert!(said.contains("permission denied for function"), "{said}");
    let topic = format!("{}.public.t", config.kafka.topic_prefix);
    execute(&postgres, "INSERT INTO t VALUES (1)").await;
    wait_for_records(kafka, &topic, 1).await;
    assert_eq!(checkpoint(&config).unwrap().owner_generation, 1, "the session goes on");
}

/// Times in the heartbeat topic, and its first record.
fn heartbeats(kafka: &Kafka, prefix: &str) -> (Vec<i64>, Option<(Value, Value)>) {
    let topic = format!("__debezium-heartbeat.{prefix}");
    let (mut times, mut first) = (Vec::new(), None);
    kafka.read(
        |name| name == topic,
        |message| {
            let json = |bytes: Option<&[u8]>| -> Value { serde_json::from_slice(bytes.unwrap()).unwrap() };
            let (key, value) = (json(message.key()), json(message.payload()));
            times.push(value["ts_ms"].as_i64().unwrap());
            first.get_or_insert((key, value));
        },
    );
    (times, first)
}

#[tokio::test(flavor = "multi_thread")]
async fn with_debezium_json_each_is_a_record_of_its_topic_once_also_after_a_crash() {
    let (postgres, kafka) = (Postgres::start(&[]).await, Kafka::shared().await);
    execute(&postgres, "CREATE TABLE t (id int PRIMARY KEY)").await;
    let mut config = beating(&postgres, kafka);
    config.format = Format::DebeziumJson {
        schemas: false,
        transaction_metadata: false,
    };
    let prefix = &config.kafka.topic_prefix;
    let mut runtime = Runtime::capture(&config);
    for crash in 0..3 {
        runtime.ready(LIMIT).await;
        let before = tokio::task::block_in_place(|| heartbeats(kafka, prefix)).0.len();
        eventually("two more heartbeats", LIMIT, async || {
            let (times, _) = tokio::task::block_in_place(|| heartbeats(kafka, prefix));
            if times.len() >= before + 2 {
                Ok(())
            } else {
                Err(format!("{times:?}"))
            }
        })
        .await;
        if crash < 2 {
            runtime.kill9();
            runtime.start_again();
        }
    }
    runtime.terminate(LIMIT);
    let (times, first) = tokio::task::block_in_place(|| heartbeats(kafka, prefix));
    assert!(times.is_sorted_by(|one, next| one < next), "{times:?}");
    let (key, value) = first.unwrap();
    assert_eq!(key, json!({"serverName": prefix}));
    assert_eq!(value, json!({"ts_ms": times[0]}));
    assert_eq!(checkpoint(&config).unwrap().records_total, 0, "they are not counted");
}

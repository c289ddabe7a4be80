//! The source's own life: prerequisites, tables that come and go, and the slot, against a real PostgreSQL.
#![allow(clippy::unwrap_used, clippy::expect_used, clippy::panic)]

mod common;

use common::{LIMIT, checkpoint, config};
use meander_config::CaptureConfig;
use meander_test_support::{Kafka, Postgres, Runtime, eventually};

async fn execute(postgres: &Postgres, sql: &str) {
    postgres.client().await.batch_execute(sql).await.unwrap();
}

/// Waits until the log of the runtime says this.
async fn wait_for_log(runtime: &mut Runtime, wanted: &str) -> String {
    let log = runtime.process().log().to_owned();
    eventually(wanted, LIMIT, async || {
        let text = std::fs::read_to_string(&log).unwrap();
        match text.lines().find(|line| line.contains(wanted)) {
            Some(line) => Ok(line.to_owned()),
            None => Err(text),
        }
    })
    .await
}

/// A role of its own for the capture, with no more than it is given.
fn with_role(config: &mut CaptureConfig, folder: &std::path::Path, role: &str) {
    config.source.username_file = folder.join("username");
    config.source.password_file = folder.join("password");
    std::fs::write(&config.source.username_file, role).unwrap();
    std::fs::write(&config.source.password_file, "its password").unwrap();
}

async fn slots(postgres: &Postgres) -> Vec<String> {
    let client = postgres.client().await;
    let rows = client
        .query("SELECT slot_name::text FROM pg_replication_slots", &[])
        .await
        .unwrap();
    rows.iter().map(|row| row.get(0)).collect()
}

#[tokio::test(flavor = "multi_thread")]
async fn everything_that_is_missing_is_said_at_once_and_what_is_said_mends_it() {
    let (postgres, kafka) = (
        Postgres::start(&[("max_replication_slots", "1")]).await,
        Kafka::shared().await,
    );
    execute(
        &postgres,
        "CREATE TABLE t (id int PRIMARY KEY); CREATE TABLE keyless (id int);
         CREATE ROLE meander LOGIN PASSWORD 'its password'; SELECT pg_create_physical_replication_slot('taken')",
    )
    .await;
    let folder = tempfile::tempdir().unwrap();
    let mut config = config(&postgres, kafka, None);
    with_role(&mut config, folder.path(), "meander");
    let mut runtime = Runtime::capture(&config);
    let said = wait_for_log(&mut runtime, "ReplicationSlotsExhausted").await;
    let remedies = [
        r#"GRANT CREATE ON DATABASE "postgres" TO "meander";"#,
        r#"ALTER TABLE "public"."t" OWNER TO "meander";"#,
        r#"ALTER TABLE "public"."keyless" REPLICA IDENTITY FULL;"#,
        r#"ALTER ROLE "meander" REPLICATION;"#,
    ];
    for remedy in remedies {
        assert!(said.replace("\\\"", "\"").contains(remedy), "{remedy} is not in {said}");
        assert_eq!(
            slots(&postgres).await,
            ["taken"],
            "nothing is made before everything is there"
        );
        execute(&postgres, remedy).await;
    }
    execute(
        &postgres,
        r#"GRANT USAGE ON SCHEMA public TO meander; ALTER TABLE keyless OWNER TO meander; SELECT pg_drop_replication_slot('taken')"#,
    )
    .await;
    runtime.ready(LIMIT).await;
    assert_eq!(slots(&postgres).await, [config.source.slot_name.clone()]);
    let generation = checkpoint(&config).unwrap().owner_generation;
    assert_eq!(generation, 1, "who was refused owned nothing");
}

//! The source's own life: prerequisites, tables that come and go, and the slot, against a real PostgreSQL.
#![allow(clippy::unwrap_used, clippy::expect_used, clippy::panic)]

mod common;
#[path = "common/log.rs"]
mod log;

use std::collections::BTreeMap;

use common::{LIMIT, checkpoint, config, stream_entries, wait_for_metric};
use log::{read_topic, wait_for_records};
use meander_config::{Acknowledgement, CaptureConfig, OnSourceGap, PublicationManagement, SnapshotMode};
use meander_proto::v1::{ChangeRecord, Operation, value::Kind};
use meander_runtime::{log::checkpoint_key, position::Lsn, sink::redis::mark_key};
use meander_test_support::{Kafka, Postgres, Redis, Runtime, Signal, eventually};

async fn execute(postgres: &Postgres, sql: &str) {
    postgres.client().await.batch_execute(sql).await.unwrap();
}

fn quote(name: &str) -> String {
    format!("\"{name}\"")
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

/// Waits until the first column of a query's only row is true.
async fn wait_for(postgres: &Postgres, what: &str, sql: &str) {
    let client = postgres.client().await;
    eventually(what, LIMIT, async || {
        let row = client.query_one(sql, &[]).await.map_err(|error| error.to_string())?;
        // What is compared may not be there yet.
        match row.get(0) {
            Some(true) => Ok(()),
            answer => Err(format!("{answer:?}")),
        }
    })
    .await;
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
        r#"GRANT CREATE ON DATABASE "postgres" TO "meander""#,
        r#"ALTER TABLE "public"."t" OWNER TO "meander""#,
        r#"ALTER TABLE "public"."keyless" REPLICA IDENTITY FULL"#,
        r#"ALTER TABLE "public"."keyless" OWNER TO "meander""#,
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
        "GRANT USAGE ON SCHEMA public TO meander; SELECT pg_drop_replication_slot('taken')",
    )
    .await;
    runtime.ready(LIMIT).await;
    assert_eq!(slots(&postgres).await, [config.source.slot_name.clone()]);
    let generation = checkpoint(&config).unwrap().owner_generation;
    assert_eq!(generation, 1, "who was refused owned nothing");
}

#[tokio::test(flavor = "multi_thread")]
async fn the_role_of_the_docs_is_all_that_a_capture_with_a_snapshot_needs() {
    let docs = include_str!("../../docs/security.md");
    let sql: String = docs
        .lines()
        .skip_while(|line| !line.starts_with("    CREATE ROLE meander"))
        .take_while(|line| !line.is_empty())
        .collect();
    let sql = sql.replace("'secret'", "'its password'").replace("shop", "postgres");
    let kafka = Kafka::shared().await;
    for version in [14, 18] {
        let postgres = Postgres::start_version(version, &[]).await;
        // What everybody may by default is not what makes it work.
        execute(
            &postgres,
            "REVOKE ALL ON DATABASE postgres FROM PUBLIC; REVOKE ALL ON SCHEMA public FROM PUBLIC;
             CREATE TABLE trades (id int PRIMARY KEY); CREATE TABLE orders (id int PRIMARY KEY); INSERT INTO trades VALUES (1)",
        )
        .await;
        execute(&postgres, &sql).await;
        execute(
            &postgres,
            "REVOKE SELECT ON trades FROM meander; REVOKE USAGE ON SCHEMA public FROM meander;
             ALTER TABLE orders ENABLE ROW LEVEL SECURITY",
        )
        .await;
        let folder = tempfile::tempdir().unwrap();
        let mut config = config(&postgres, kafka, None);
        with_role(&mut config, folder.path(), "meander");
        config.source.publication.name = "meander".to_owned();
        config.source.publication.management = PublicationManagement::External;
        config.source.snapshot.mode = SnapshotMode::Incremental;
        let mut runtime = Runtime::capture(&config);
        let said = wait_for_log(&mut runtime, "TableNotReadable").await;
        assert!(
            slots(&postgres).await.is_empty(),
            "nothing is made before it may be read"
        );
        for remedy in [
            r#"GRANT USAGE ON SCHEMA "public" TO "meander";"#,
            r#"GRANT SELECT ON "public"."trades" TO "meander";"#,
        ] {
            assert!(said.replace("\\\"", "\"").contains(remedy), "{remedy} is not in {said}");
            execute(&postgres, remedy).await;
        }
        assert!(said.contains("BYPASSRLS;"), "{said}");
        execute(&postgres, "ALTER TABLE orders DISABLE ROW LEVEL SECURITY").await;
        runtime.ready(LIMIT).await;
        let topic = format!("{}.public.trades", config.kafka.topic_prefix);
        wait_for_records(kafka, &topic, 3).await;
        execute(&postgres, "INSERT INTO trades VALUES (2)").await;
        let records = wait_for_records(kafka, &topic, 4).await;
        let mut told: Vec<_> = records.iter().map(|(_, _, record)| record.operation()).collect();
        told.sort_unstable();
        assert_eq!(
            told,
            [
                Operation::Insert,
                Operation::Read,
                Operation::SnapshotBegin,
                Operation::SnapshotEnd
            ]
        );
    }
}

#[tokio::test(flavor = "multi_thread")]
async fn tables_join_and_leave_a_running_capture_and_one_without_identity_breaks_nothing() {
    let (postgres, kafka) = (Postgres::start(&[]).await, Kafka::shared().await);
    execute(
        &postgres,
        "CREATE TABLE t (id int PRIMARY KEY); CREATE TABLE keyless (id int, n int)",
    )
    .await;
    let config = config(&postgres, kafka, None);
    let topic = |table: &str| format!("{}.public.{table}", config.kafka.topic_prefix);
    let published = async |tables: &str| {
        let sql = format!(
            "SELECT coalesce(string_agg(tablename, ',' ORDER BY tablename), '') = '{tables}' FROM pg_publication_tables"
        );
        wait_for(&postgres, tables, &sql).await;
    };
    let mut runtime = Runtime::capture(&config);
    runtime.ready(LIMIT).await;
    published("t").await;
    wait_for_metric(&runtime, "meander_capture_tables_refused", |refused| refused == 1).await;
    // Were it published, this would fail in the application.
    execute(&postgres, "INSERT INTO keyless VALUES (1, 1); UPDATE keyless SET n = 2").await;

    execute(
        &postgres,
        "CREATE TABLE joins (id int PRIMARY KEY); CREATE TABLE j_1 (id int PRIMARY KEY)",
    )
    .await;
    published("j_1,joins,t").await;
    execute(&postgres, "INSERT INTO joins VALUES (1); INSERT INTO t VALUES (1)").await;
    // A table that joins begins with its schema.
    wait_for_records(kafka, &topic("joins"), 2).await;
    // One whose topic would be another's is left out, and stops nothing.
    execute(
        &postgres,
        "ALTER TABLE keyless ADD PRIMARY KEY (id); CREATE TABLE \"j 1\" (id int PRIMARY KEY)",
    )
    .await;
    published("j_1,joins,keyless,t").await;
    execute(&postgres, "INSERT INTO j_1 VALUES (1); DROP TABLE \"j 1\"").await;
    wait_for_records(kafka, &topic("j_1"), 2).await;
    execute(&postgres, "UPDATE keyless SET n = 3; DROP TABLE t").await;
    assert_eq!(wait_for_records(kafka, &topic("keyless"), 2).await.len(), 2);
    // A key that goes would make the application's next UPDATE fail.
    execute(&postgres, "ALTER TABLE joins DROP CONSTRAINT joins_pkey").await;
    published("j_1,keyless").await;
    wait_for_metric(&runtime, "meander_capture_tables ", |captured| captured == 2).await;
    let generation = checkpoint(&config).unwrap().owner_generation;
    assert_eq!(generation, 1, "all of that without a new session");
}

#[tokio::test(flavor = "multi_thread")]
async fn making_a_slot_does_not_hang_behind_an_old_transaction_and_names_it() {
    let (postgres, kafka) = (Postgres::start(&[]).await, Kafka::shared().await);
    execute(&postgres, "CREATE TABLE t (id int PRIMARY KEY)").await;
    let old = postgres.client().await;
    old.batch_execute("BEGIN; INSERT INTO t VALUES (1)").await.unwrap();
    let pid: i32 = old.query_one("SELECT pg_backend_pid()", &[]).await.unwrap().get(0);
    let mut runtime = Runtime::capture(&config(&postgres, kafka, None));
    let said = wait_for_log(&mut runtime, "SlotWaitsForTransaction").await;
    assert!(said.contains(&format!("process {pid} of user")), "{said}");
    wait_for(
        &postgres,
        "neither a slot nor a walsender is left",
        "SELECT NOT EXISTS (SELECT FROM pg_replication_slots) AND NOT EXISTS (SELECT FROM pg_stat_replication)",
    )
    .await;
    old.batch_execute("COMMIT").await.unwrap();
    runtime.ready(LIMIT).await;
}

#[tokio::test(flavor = "multi_thread")]
async fn an_idle_database_in_a_busy_cluster_pins_no_wal() {
    let (postgres, kafka) = (Postgres::start(&[]).await, Kafka::shared().await);
    execute(&postgres, "CREATE TABLE t (id int PRIMARY KEY)").await;
    execute(&postgres, "CREATE DATABASE busy").await;
    let mut runtime = Runtime::capture(&config(&postgres, kafka, None));
    runtime.ready(LIMIT).await;
    let url = format!("{}/busy", postgres.url().rsplit_once('/').unwrap().0);
    let (busy, connection) = tokio_postgres::connect(&url, tokio_postgres::NoTls).await.unwrap();
    tokio::spawn(connection);
    busy.batch_execute("CREATE TABLE load (note text)").await.unwrap();
    for _ in 0..8 {
        busy.batch_execute("INSERT INTO load SELECT repeat('x', 1000) FROM generate_series(1, 30000)")
            .await
            .unwrap();
    }
    // No heartbeat is needed: the server says how far it is, and that is acknowledged.
    wait_for(
        &postgres,
        "the slot lets go of what others wrote",
        "SELECT pg_current_wal_lsn() > '0/C000000' AND pg_wal_lsn_diff(pg_current_wal_lsn(), restart_lsn) < 32 << 20
         FROM pg_replication_slots",
    )
    .await;
}

#[tokio::test(flavor = "multi_thread")]
async fn the_slot_is_looked_at_on_every_version_and_kept_on_standbys_where_that_is_asked() {
    let kafka = Kafka::shared().await;
    for version in Postgres::VERSIONS {
        let postgres = Postgres::start_version(version, &[("max_slot_wal_keep_size", "64MB")]).await;
        execute(&postgres, "CREATE TABLE t (id int PRIMARY KEY)").await;
        let mut config = config(&postgres, kafka, None);
        config.source.slot_failover = Some(true);
        if version == 18 {
            execute(&postgres, "SELECT pg_create_physical_replication_slot('gone')").await;
            execute(&postgres, "ALTER SYSTEM SET synchronized_standby_slots = 'gone'").await;
            execute(&postgres, "SELECT pg_reload_conf()").await;
        }
        let mut runtime = Runtime::capture(&config);
        if version < 17 {
            wait_for_log(&mut runtime, "FailoverUnsupported").await;
            assert!(slots(&postgres).await.is_empty());
            runtime.terminate(LIMIT);
            config.source.slot_failover = None;
            runtime = Runtime::capture(&config);
        }
        runtime.ready(LIMIT).await;
        // In whole segments, and the one that is being written comes on top.
        let budget = |bytes| (1..=96 << 20).contains(&bytes);
        wait_for_metric(&runtime, "meander_capture_slot_safe_wal_bytes", budget).await;
        if version < 17 {
            continue;
        }
        let failover =
            |is: bool| format!("SELECT failover = {is} FROM pg_replication_slots WHERE slot_type = 'logical'");
        wait_for(&postgres, "a failover slot", &failover(true)).await;
        if version == 18 {
            // The standby that the slot waits for is not there.
            let absent = "meander_capture_slot_absent_standbys";
            wait_for_metric(&runtime, absent, |absent| absent == 1).await;
            execute(&postgres, "ALTER SYSTEM SET synchronized_standby_slots = ''").await;
            execute(&postgres, "SELECT pg_reload_conf()").await;
            wait_for_metric(&runtime, absent, |absent| absent == 0).await;
            execute(&postgres, "SELECT pg_drop_replication_slot('gone')").await;
        }
        assert!(runtime.terminate(LIMIT).success());
        config.source.slot_failover = Some(false);
        runtime = Runtime::capture(&config);
        runtime.ready(LIMIT).await;
        wait_for(&postgres, "no failover slot any more", &failover(false)).await;
    }
}

/// `pg_upgrade` itself is no part of the servers that the tests have, so its steps are made here: a new cluster with the same tables under
/// the same OIDs, new WAL past that of the old one, and then, before anybody else writes, the slot.
#[tokio::test(flavor = "multi_thread")]
async fn an_upgrade_loses_nothing_if_the_slot_came_along_and_is_said_if_that_is_not_certain() {
    const TABLE: &str = "CREATE TABLE t (id int PRIMARY KEY)";
    let (mut old, kafka) = (Postgres::start_version(17, &[]).await, Kafka::shared().await);
    execute(&old, TABLE).await;
    execute(&old, "INSERT INTO t VALUES (1), (2)").await;
    let mut config = config(&old, kafka, None);
    config.source.snapshot.mode = SnapshotMode::Incremental;
    let topic = format!("{}.public.t", config.kafka.topic_prefix);
    let mut runtime = Runtime::capture(&config);
    runtime.ready(LIMIT).await;
    wait_for_records(kafka, &topic, 4).await;
    execute(&old, "INSERT INTO t VALUES (3)").await;
    // It ends when the capture has told it that everything is in Kafka, which knows that from then on.
    old.stop();
    let ended = eventually("the end of the server is noted", LIMIT, async || {
        let checkpoint = checkpoint(&config).unwrap();
        checkpoint.ended_at.map(|_| checkpoint).ok_or("not yet".to_owned())
    })
    .await;
    runtime.terminate(LIMIT);

    let mut new = Postgres::start_version(18, &[]).await;
    let name = config.source.slot_name.clone();
    let publication = quote(&config.source.publication.name);
    execute(&new, TABLE).await;
    execute(&new, "INSERT INTO t VALUES (1), (2), (3)").await;
    execute(&new, &format!("CREATE PUBLICATION {publication} FOR TABLE t")).await;
    new.stop();
    new.begin_wal_after(&old);
    new.start_again().await;
    config.source.port = new.port();
    let make = format!("SELECT pg_create_logical_replication_slot('{name}', 'pgoutput')");
    let refused = async |why: &str| {
        let mut runtime = Runtime::capture(&config);
        let said = wait_for_log(&mut runtime, "ServerUpgraded").await;
        assert!(
            said.contains("from PostgreSQL 17 to 18") && said.contains(why),
            "{said}"
        );
        runtime.terminate(LIMIT);
    };
    refused("was not brought along").await;
    // Somebody was faster than who made it.
    execute(&new, "SELECT txid_current()").await;
    execute(&new, &make).await;
    refused("make none by hand").await;
    execute(&new, &format!("SELECT pg_drop_replication_slot('{name}')")).await;
    assert_eq!(checkpoint(&config).unwrap(), ended);

    new.stop();
    new.begin_wal_after(&old);
    new.start_again().await;
    execute(&new, &make).await;
    new.restart().await;
    execute(&new, "INSERT INTO t VALUES (4)").await;
    for (row, count) in [(5, 7), (6, 8)] {
        let mut runtime = Runtime::capture(&config);
        runtime.ready(LIMIT).await;
        execute(&new, &format!("INSERT INTO t VALUES ({row})")).await;
        wait_for_records(kafka, &topic, count).await;
        runtime.terminate(LIMIT);
    }
    let records = read_topic(kafka, &topic);
    let told: Vec<_> = records.iter().map(|(_, _, record)| record.operation()).collect();
    let read = [
        Operation::SnapshotBegin,
        Operation::Read,
        Operation::Read,
        Operation::SnapshotEnd,
    ];
    assert_eq!(
        told,
        [&read[..], &[Operation::Insert; 4]].concat(),
        "no row is read again"
    );
    let epochs = records.iter().map(|(_, _, record)| record.coordinate.unwrap().epoch);
    assert!(epochs.eq([1; 8]));
    let now = checkpoint(&config).unwrap();
    assert_eq!((now.epoch, now.major_version, now.ended_at), (1, 18, None));
    assert_ne!(now.system_identifier, ended.system_identifier);
}

/// Waits until a slot of the primary is fit for use on its standby.
async fn slot_is_synced(primary: &Postgres, standby: &Postgres) {
    let (primary, standby) = (primary.client().await, standby.client().await);
    eventually("the standby has the slot", LIMIT, async || {
        // It is once the standby has seen the primary's running transactions.
        let logged = primary.batch_execute("SELECT pg_log_standby_snapshot()").await;
        logged.map_err(|error| error.to_string())?;
        let rows = standby
            .query(
                "SELECT FROM pg_replication_slots WHERE synced AND NOT temporary AND NOT conflicting",
                &[],
            )
            .await;
        match rows.map_err(|error| error.to_string())?.len() {
            1 => Ok(()),
            slots => Err(format!("{slots} slots")),
        }
    })
    .await;
}

async fn promote(standby: &Postgres) {
    execute(standby, "SELECT pg_promote()").await;
    wait_for(standby, "the standby is the primary", "SELECT NOT pg_is_in_recovery()").await;
}

/// Position and id of every entry in a stream.
async fn entries(redis: &Redis, stream: &str) -> Vec<(String, String)> {
    let entries = stream_entries(redis, stream).await;
    entries
        .into_iter()
        .map(|(id, fields)| (String::from_utf8(fields["position"].clone()).unwrap(), id))
        .collect()
}

#[tokio::test(flavor = "multi_thread")]
async fn after_a_failover_capture_goes_on_in_the_same_epoch_with_nothing_lost_or_doubled() {
    let kafka = Kafka::shared().await;
    let mut primary = Postgres::start_version(17, &[("hot_standby_feedback", "on")]).await;
    execute(&primary, "CREATE TABLE t (id int PRIMARY KEY)").await;
    let standby = primary
        .standby(&[("sync_replication_slots", "on"), ("hot_standby_feedback", "on")])
        .await;
    // What the standby does not have is not sent to the capture either.
    execute(&primary, "ALTER SYSTEM SET synchronized_standby_slots = 'standby'").await;
    execute(&primary, "SELECT pg_reload_conf()").await;
    let mut config = config(&primary, kafka, None);
    config.source.slot_failover = Some(true);
    let topic = format!("{}.public.t", config.kafka.topic_prefix);
    let mut runtime = Runtime::capture(&config);
    runtime.ready(LIMIT).await;
    execute(&primary, "INSERT INTO t SELECT generate_series(1, 500)").await;
    wait_for_records(kafka, &topic, 500).await;
    slot_is_synced(&primary, &standby).await;
    execute(&primary, "INSERT INTO t SELECT generate_series(501, 1000)").await;
    wait_for_records(kafka, &topic, 1000).await;
    runtime.kill9();
    primary.kill9();
    promote(&standby).await;
    execute(&standby, "INSERT INTO t SELECT generate_series(1001, 1500)").await;

    // A service leads to it, as in life.
    config.source.port = standby.port();
    let mut runtime = Runtime::capture(&config);
    runtime.ready(LIMIT).await;
    let records = wait_for_records(kafka, &topic, 1500).await;
    let ids: Vec<_> = records
        .iter()
        .map(|(_, _, record)| record.after.as_ref().unwrap().values[0].kind.clone().unwrap())
        .collect();
    assert_eq!(ids, (1..=1500).map(Kind::Integer).collect::<Vec<_>>());
    let checkpoint = checkpoint(&config).unwrap();
    assert_eq!((checkpoint.epoch, checkpoint.timeline), (1, 2));
}

#[tokio::test(flavor = "multi_thread")]
async fn a_standby_that_was_started_again_is_waited_for_and_taken_for_no_other() {
    let kafka = Kafka::shared().await;
    let mut primary = Postgres::start_version(17, &[]).await;
    execute(
        &primary,
        "CREATE TABLE t (id int PRIMARY KEY); CREATE PUBLICATION p FOR TABLE t",
    )
    .await;
    let mut standby = primary.standby(&[("hot_standby_feedback", "on")]).await;
    let mut config = config(&standby, kafka, None);
    config.source.publication.name = "p".to_owned();
    config.source.publication.management = PublicationManagement::External;
    let topic = format!("{}.public.t", config.kafka.topic_prefix);
    let mut runtime = Runtime::capture(&config);
    eventually("the standby has the slot", LIMIT, async || {
        execute(&primary, "SELECT pg_log_standby_snapshot()").await;
        match slots(&standby).await.len() {
            1 => Ok(()),
            _ => Err("not yet"),
        }
    })
    .await;
    runtime.ready(LIMIT).await;
    for id in 1..=3 {
        execute(&primary, &format!("INSERT INTO t VALUES ({id})")).await;
    }
    wait_for_records(kafka, &topic, 3).await;
    assert!(runtime.terminate(LIMIT).success());
    // It replays the commits that it had an hour after they were made.
    execute(&standby, "ALTER SYSTEM SET recovery_min_apply_delay = '1h'").await;
    standby.kill9();
    standby.start_again().await;
    runtime.start_again();
    wait_for_log(&mut runtime, "StandbyBehind").await;
    execute(&standby, "ALTER SYSTEM RESET recovery_min_apply_delay").await;
    execute(&standby, "SELECT pg_reload_conf()").await;
    runtime.ready(LIMIT).await;
    execute(&primary, "INSERT INTO t VALUES (4)").await;
    wait_for_records(kafka, &topic, 4).await;
    assert_eq!(checkpoint(&config).unwrap().epoch, 1);
}

/// Starts a server that has no standby of those that every commit waits for.
async fn without_its_standby() -> Postgres {
    Postgres::start(&[("synchronous_standby_names", "nobody")]).await
}

#[tokio::test(flavor = "multi_thread")]
async fn a_commit_that_waits_for_a_standby_which_is_gone_holds_up_no_change_of_the_publication() {
    let (postgres, kafka) = (without_its_standby().await, Kafka::shared().await);
    // What the test writes is not to wait either.
    let local = |sql: &str| format!("SET synchronous_commit = local; {sql}");
    execute(&postgres, &local("CREATE TABLE t (id int PRIMARY KEY)")).await;
    let config = config(&postgres, kafka, None);
    let mut runtime = Runtime::capture(&config);
    runtime.ready(LIMIT).await;
    execute(&postgres, &local("CREATE TABLE late (id int PRIMARY KEY)")).await;
    wait_for_metric(&runtime, "meander_capture_tables", |tables| tables == 2).await;
    execute(&postgres, &local("INSERT INTO late VALUES (1)")).await;
    wait_for_records(kafka, &format!("{}.public.late", config.kafka.topic_prefix), 1).await;
}

#[tokio::test(flavor = "multi_thread")]
async fn a_table_that_cannot_join_is_named_and_holds_up_no_other() {
    let (postgres, kafka) = (Postgres::start(&[]).await, Kafka::shared().await);
    execute(&postgres, "CREATE TABLE held (id int PRIMARY KEY)").await;
    let config = config(&postgres, kafka, None);
    let topic = |table: &str| format!("{}.public.{table}", config.kafka.topic_prefix);
    let mut runtime = Runtime::capture(&config);
    runtime.ready(LIMIT).await;
    // Its writer is in the way of the lock under which it would join again.
    let mut writer = postgres.client().await;
    let transaction = writer.transaction().await.unwrap();
    transaction.batch_execute("INSERT INTO held VALUES (1)").await.unwrap();
    let publication = quote(&config.source.publication.name);
    execute(
        &postgres,
        &format!("CREATE TABLE later (id int PRIMARY KEY); ALTER PUBLICATION {publication} DROP TABLE held"),
    )
    .await;
    let joined = |table: &str| format!("SELECT count(*) = 1 FROM pg_publication_tables WHERE tablename = '{table}'");
    wait_for(&postgres, "the other joins", &joined("later")).await;
    execute(&postgres, "INSERT INTO later VALUES (1)").await;
    wait_for_records(kafka, &topic("later"), 1).await;
    wait_for_metric(&runtime, "meander_capture_tables_refused", |tables| tables == 1).await;
    wait_for_metric(&runtime, "meander_capture_slot_retained_wal_bytes", |bytes| bytes > 0).await;
    transaction.commit().await.unwrap();
    wait_for(&postgres, "it joins once it can", &joined("held")).await;
    execute(&postgres, "INSERT INTO held VALUES (2)").await;
    wait_for_records(kafka, &topic("held"), 1).await;
}

#[tokio::test(flavor = "multi_thread")]
async fn what_redis_alone_has_of_a_server_that_died_hides_nothing_of_the_one_that_took_over_and_is_named() {
    let (mut kafka, redis) = (Kafka::start().await, Redis::start().await);
    let mut primary = Postgres::start_version(17, &[("hot_standby_feedback", "on")]).await;
    execute(&primary, "CREATE TABLE t (id int PRIMARY KEY)").await;
    let mut standby = primary
        .standby(&[("sync_replication_slots", "on"), ("hot_standby_feedback", "on")])
        .await;
    let mut config = config(&primary, &kafka, Some(&redis));
    config.source.slot_failover = Some(true);
    config.redis.as_mut().unwrap().acknowledgement = Acknowledgement::Required;
    let topic = format!("{}.public.t", config.kafka.topic_prefix);
    let in_redis = async |count: usize| {
        eventually("the changes are in Redis", LIMIT, async || {
            match entries(&redis, &topic).await.len() {
                found if found == count => Ok(()),
                found => Err(format!("{found} of {count}")),
            }
        })
        .await;
    };
    let mut runtime = Runtime::capture(&config);
    runtime.ready(LIMIT).await;
    execute(&primary, "INSERT INTO t SELECT generate_series(1, 10)").await;
    wait_for_records(&kafka, &topic, 10).await;
    in_redis(10).await;
    slot_is_synced(&primary, &standby).await;

    // Redis has these, Kafka does not, and the standby has only the first of them.
    kafka.process().signal(Signal::STOP);
    execute(&primary, "INSERT INTO t SELECT generate_series(11, 15)").await;
    wait_for(&standby, "the standby has them", "SELECT count(*) = 15 FROM t").await;
    standby.stop();
    // What the new primary writes is to be at places that the old one has used.
    let filler = "SELECT pg_logical_emit_message(false, 'filler', repeat('x', 4 << 20))";
    execute(
        &primary,
        &format!("{filler}; INSERT INTO t SELECT generate_series(16, 18)"),
    )
    .await;
    in_redis(18).await;
    runtime.kill9();
    primary.kill9();
    kafka.process().signal(Signal::CONT);
    standby.start_again().await;
    promote(&standby).await;
    let ahead = entries(&redis, &topic).await;

    config.source.port = standby.port();
    let mut runtime = Runtime::capture(&config);
    runtime.ready(LIMIT).await;
    runtime.kill9();
    execute(&standby, "INSERT INTO t SELECT generate_series(101, 103)").await;
    runtime.start_again();
    runtime.ready(LIMIT).await;
    let records = wait_for_records(&kafka, &topic, 18).await;
    let ids: Vec<_> = records
        .iter()
        .map(|(_, _, record)| record.after.as_ref().unwrap().values[0].kind.clone().unwrap())
        .collect();
    assert_eq!(ids, (1..=15).chain(101..=103).map(Kind::Integer).collect::<Vec<_>>());
    let positions: Vec<_> = records.into_iter().map(|(position, ..)| position).collect();
    let [epochs, lsns] = [0, 1].map(|part| {
        let of = |position: &String| position.split(':').nth(part).unwrap().to_owned();
        positions.iter().map(of).collect::<Vec<_>>()
    });
    assert_eq!(epochs, [["1"; 15].as_slice(), ["2"; 3].as_slice()].concat());
    let lost = ahead[15].0.split(':').nth(1).unwrap();
    assert!(
        lsns[17].parse::<Lsn>().unwrap() < lost.parse().unwrap(),
        "the places are not the same: {lsns:?}, {lost}"
    );
    in_redis(21).await;
    let found = entries(&redis, &topic).await;
    assert_eq!(found[..18], ahead);
    let of_both: Vec<_> = found[..15]
        .iter()
        .chain(&found[18..])
        .map(|(position, _)| position)
        .collect();
    assert_eq!(of_both, positions.iter().collect::<Vec<_>>());
    wait_for(
        &standby,
        "PostgreSQL is told of what both have",
        &format!(
            "SELECT confirmed_flush_lsn > '{}' FROM pg_replication_slots WHERE slot_type = 'logical'",
            lsns[17]
        ),
    )
    .await;
    let checkpoint = checkpoint(&config).unwrap();
    assert_eq!((checkpoint.epoch, checkpoint.timeline), (2, 2));

    // The mark names them, by what shows them.
    let CaptureConfig { pipeline, source, .. } = &config;
    let key = checkpoint_key(&pipeline.namespace, &pipeline.name, &source.slot_name);
    let (records, phantoms): (u64, String) = redis::cmd("HMGET")
        .arg(mark_key(&config.kafka.topic_prefix, &key))
        .arg(&["records", "phantoms"])
        .query_async(&mut redis.connection().await)
        .await
        .unwrap();
    assert_eq!(records, checkpoint.records_total);
    let (first, last) = phantoms.split_once(" to ").unwrap();
    let named: Vec<(String, BTreeMap<String, Vec<u8>>)> = redis::cmd("XRANGE")
        .arg(&topic)
        .arg(&[first, last])
        .query_async(&mut redis.connection().await)
        .await
        .unwrap();
    let named: Vec<_> = named.into_iter().map(|(id, _)| id).collect();
    assert_eq!(named, ahead[15..].iter().map(|(_, id)| id.clone()).collect::<Vec<_>>());
}

#[tokio::test(flavor = "multi_thread")]
async fn a_gap_that_is_accepted_by_its_name_is_noted_in_the_log_and_accepts_no_other() {
    let (postgres, redis, kafka) = (Postgres::start(&[]).await, Redis::start().await, Kafka::shared().await);
    execute(&postgres, "CREATE TABLE t (id int PRIMARY KEY)").await;
    let mut config = config(&postgres, kafka, Some(&redis));
    let topic = format!("{}.public.t", config.kafka.topic_prefix);
    let mut runtime = Runtime::capture(&config);
    runtime.ready(LIMIT).await;
    execute(&postgres, "INSERT INTO t VALUES (1)").await;
    wait_for_records(kafka, &topic, 1).await;
    assert!(runtime.terminate(LIMIT).success());
    let drop_slot = "SELECT pg_drop_replication_slot(slot_name) FROM pg_replication_slots";
    execute(&postgres, drop_slot).await;
    execute(&postgres, "INSERT INTO t VALUES (2)").await;
    runtime.start_again();
    let gap = format!("1:{}", checkpoint(&config).unwrap().acknowledged);
    let said = wait_for_log(&mut runtime, "SlotMissing").await;
    assert!(said.contains(&format!("meander.dev/accept-source-gap={gap}")), "{said}");
    assert!(runtime.terminate(LIMIT).success());

    config.accept_source_gap = Some(gap.clone());
    let mut runtime = Runtime::capture(&config);
    runtime.ready(LIMIT).await;
    execute(&postgres, "INSERT INTO t VALUES (3)").await;
    let records = wait_for_records(kafka, &topic, 3).await;
    let noted = checkpoint(&config).unwrap().accepted_gap.unwrap();
    assert_eq!(
        (noted.id.as_str(), noted.reason.as_str()),
        (gap.as_str(), "SlotMissing")
    );
    let (position, key, note) = &records[1];
    let told = note.source_gap.clone().unwrap();
    assert_eq!(
        (position.as_str(), key, note.operation()),
        ("2:0/0:0", &None, Operation::SourceGap)
    );
    assert_eq!((told.id, told.resumed_lsn), (gap, noted.resumed_at.0));
    assert_eq!(records[2].2.coordinate.unwrap().epoch, 2);
    // Redis has the same, in the same order.
    eventually("the entries are in Redis", LIMIT, async || {
        let entries = entries(&redis, &topic).await;
        let positions: Vec<_> = entries.into_iter().map(|(position, _)| position).collect();
        if positions
            == records
                .iter()
                .map(|(position, ..)| position.clone())
                .collect::<Vec<_>>()
        {
            Ok(())
        } else {
            Err(positions.join(" "))
        }
    })
    .await;

    assert!(runtime.terminate(LIMIT).success());
    execute(&postgres, drop_slot).await;
    runtime.start_again();
    wait_for_log(&mut runtime, "SlotMissing").await;
    assert!(slots(&postgres).await.is_empty(), "the second gap was not accepted");
}

#[tokio::test(flavor = "multi_thread")]
async fn a_gap_is_made_good_by_reading_every_table_anew_if_that_is_asked_for() {
    let (postgres, kafka) = (Postgres::start(&[]).await, Kafka::shared().await);
    execute(&postgres, "CREATE TABLE t (id int PRIMARY KEY)").await;
    for mode in [SnapshotMode::Never, SnapshotMode::Incremental] {
        let mut config = config(&postgres, kafka, None);
        config.source.snapshot.mode = mode;
        config.on_source_gap = OnSourceGap::Resnapshot;
        let topic = format!("{}.public.t", config.kafka.topic_prefix);
        let of_epoch = |epoch| -> Vec<ChangeRecord> {
            tokio::task::block_in_place(|| read_topic(kafka, &topic))
                .into_iter()
                .map(|(_, _, record)| record)
                .filter(|record| record.coordinate.unwrap().epoch == epoch)
                .collect()
        };
        let mut runtime = Runtime::capture(&config);
        runtime.ready(LIMIT).await;
        execute(&postgres, "INSERT INTO t VALUES (1)").await;
        eventually("the row is captured", LIMIT, async || {
            let rows = of_epoch(1).iter().filter(|record| record.after.is_some()).count();
            if rows > 0 { Ok(()) } else { Err("not yet") }
        })
        .await;
        assert!(runtime.terminate(LIMIT).success());
        execute(
            &postgres,
            "SELECT pg_drop_replication_slot(slot_name) FROM pg_replication_slots WHERE NOT active;
             DELETE FROM t; INSERT INTO t VALUES (2)",
        )
        .await;
        runtime.start_again();
        let expected = [
            Operation::SourceGap,
            Operation::SnapshotBegin,
            Operation::Read,
            Operation::SnapshotEnd,
        ];
        eventually("the table was read anew", LIMIT, async || {
            let told: Vec<_> = of_epoch(2).iter().map(ChangeRecord::operation).collect();
            if told == expected {
                Ok(())
            } else {
                Err(format!("{told:?}"))
            }
        })
        .await;
        let noted = checkpoint(&config).unwrap().accepted_gap.unwrap();
        assert_eq!(noted.reason, "SlotMissing");
        assert!(noted.id.starts_with("1:"), "{}", noted.id);

        // That was once: neither the gap nor the reading is repeated.
        runtime.kill9();
        runtime.start_again();
        runtime.ready(LIMIT).await;
        execute(&postgres, "INSERT INTO t VALUES (3)").await;
        eventually("changes flow", LIMIT, async || {
            let told: Vec<_> = of_epoch(2).iter().map(ChangeRecord::operation).collect();
            match told.as_slice() {
                [before @ .., Operation::Insert] if before == expected => Ok(()),
                _ => Err(format!("{told:?}")),
            }
        })
        .await;
        assert!(runtime.terminate(LIMIT).success());
        execute(&postgres, "TRUNCATE t").await;
    }
}

#[tokio::test(flavor = "multi_thread")]
async fn a_publication_that_was_dropped_is_a_gap_and_never_made_anew_in_silence() {
    let kafka = Kafka::shared().await;
    // The newest passes over what it has no publication for, and those before fail at it.
    for version in [17, 18] {
        let postgres = Postgres::start_version(version, &[]).await;
        execute(&postgres, "CREATE TABLE t (id int PRIMARY KEY)").await;
        let mut config = config(&postgres, kafka, None);
        let topic = format!("{}.public.t", config.kafka.topic_prefix);
        let mut runtime = Runtime::capture(&config);
        runtime.ready(LIMIT).await;
        execute(&postgres, "INSERT INTO t VALUES (1)").await;
        wait_for_records(kafka, &topic, 1).await;
        let name = quote(&config.source.publication.name);
        execute(&postgres, &format!("DROP PUBLICATION {name}; INSERT INTO t VALUES (2)")).await;
        let said = wait_for_log(&mut runtime, "to go on without them").await;
        assert!(said.contains("PublicationMissing"), "{said}");
        wait_for(&postgres, "none is made", "SELECT count(*) = 0 FROM pg_publication").await;
        assert!(runtime.terminate(LIMIT).success());

        config.accept_source_gap = Some(format!("1:{}", checkpoint(&config).unwrap().acknowledged));
        let mut runtime = Runtime::capture(&config);
        runtime.ready(LIMIT).await;
        execute(&postgres, "INSERT INTO t VALUES (3)").await;
        let records = wait_for_records(kafka, &topic, 3).await;
        let told: Vec<_> = records.iter().map(|(_, _, record)| record.operation()).collect();
        assert_eq!(told, [Operation::Insert, Operation::SourceGap, Operation::Insert]);
        assert_eq!(
            checkpoint(&config).unwrap().accepted_gap.unwrap().reason,
            "PublicationMissing"
        );
    }
}

#[tokio::test(flavor = "multi_thread")]
async fn a_publication_that_somebody_makes_again_says_what_to_do_where_its_slot_cannot_be_read() {
    let (postgres, kafka) = (Postgres::start_version(17, &[]).await, Kafka::shared().await);
    execute(&postgres, "CREATE TABLE t (id int PRIMARY KEY)").await;
    let config = config(&postgres, kafka, None);
    let mut runtime = Runtime::capture(&config);
    runtime.ready(LIMIT).await;
    runtime.kill9();
    let name = quote(&config.source.publication.name);
    execute(&postgres, &format!("DROP PUBLICATION {name}; INSERT INTO t VALUES (1)")).await;
    execute(&postgres, &format!("CREATE PUBLICATION {name} FOR TABLE t")).await;
    runtime.start_again();
    let said = wait_for_log(&mut runtime, "PublicationMissing").await;
    assert!(said.contains("SELECT pg_drop_replication_slot("), "{said}");
}

#[tokio::test(flavor = "multi_thread")]
async fn a_table_that_leaves_and_comes_back_is_named_until_a_person_removes_the_note() {
    let (postgres, kafka) = (Postgres::start(&[]).await, Kafka::shared().await);
    execute(
        &postgres,
        "CREATE TABLE t (id int PRIMARY KEY); CREATE TABLE u (id int PRIMARY KEY)",
    )
    .await;
    let config = config(&postgres, kafka, None);
    let name = quote(&config.source.publication.name);
    let mut runtime = Runtime::capture(&config);
    runtime.ready(LIMIT).await;
    execute(&postgres, "INSERT INTO t VALUES (1)").await;
    let topic = format!("{}.public.t", config.kafka.topic_prefix);
    wait_for_records(kafka, &topic, 1).await;
    runtime.terminate(LIMIT);
    // It is known by what the log holds, also when nobody was there to see it leave.
    execute(
        &postgres,
        &format!("ALTER PUBLICATION {name} DROP TABLE t; INSERT INTO t VALUES (2)"),
    )
    .await;
    let writer = postgres.client().await;
    writer.batch_execute("BEGIN; INSERT INTO t VALUES (3)").await.unwrap();
    let mut runtime = Runtime::capture(&config);
    runtime.ready(LIMIT).await;
    wait_for_metric(&runtime, "meander_capture_tables_refused", |refused| refused == 1).await;
    writer.batch_execute("COMMIT").await.unwrap();
    wait_for(
        &postgres,
        "it has joined, and that is noted",
        "SELECT obj_description(oid, 'pg_publication') = 'meander: left and came back: \"public\".\"t\"'
            AND EXISTS (SELECT FROM pg_publication_tables WHERE tablename = 't') FROM pg_publication",
    )
    .await;
    execute(&postgres, "INSERT INTO t VALUES (4)").await;
    assert_eq!(wait_for_records(kafka, &topic, 2).await.len(), 2);
    let generation = checkpoint(&config).unwrap().owner_generation;
    assert_eq!(generation, 2, "nothing of it ended the session");
}

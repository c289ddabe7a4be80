//! Replays into a real PostgreSQL, of what was captured from another.
#![allow(clippy::unwrap_used, clippy::expect_used, clippy::panic)]

mod common;
#[path = "common/operator.rs"]
mod operator;
#[path = "common/replay.rs"]
mod replaying;

use std::{fs, process::Command, time::Instant};

use common::{LIMIT, checkpoint, config};
use meander_config::{
    CaptureConfig, PostgresServer, ReplayConfig, ReplayTarget, ResourceIdentity, SnapshotMode, SslMode,
};
use meander_proto::v1::{Directive, replay_progress::Phase};
use meander_runtime::replay::{End, error::ReplayError};
use meander_test_support::{Kafka, Postgres, Runtime, eventually};
use operator::Operator;
use replaying::{everything, published, replay};
use tempfile::TempDir;
use tokio_postgres::Client;

const KILLS: u64 = 3;

/// The target, and a role that may do no more than it has to.
struct Target {
    postgres: Postgres,
    client: Client,
    folder: TempDir,
}

impl Target {
    /// On a server of this version, or the machine's own.
    async fn start(version: Option<u32>) -> Self {
        let postgres = match version {
            Some(version) => Postgres::start_version(version, &[]).await,
            None => Postgres::start(&[]).await,
        };
        let client = postgres.client().await;
        client
            .batch_execute(
                "CREATE ROLE replayer LOGIN PASSWORD 'of-the-replayer'; CREATE SCHEMA meander AUTHORIZATION replayer",
            )
            .await
            .unwrap();
        let folder = tempfile::tempdir().unwrap();
        fs::write(folder.path().join("username"), "replayer").unwrap();
        fs::write(folder.path().join("password"), "of-the-replayer").unwrap();
        Self {
            postgres,
            client,
            folder,
        }
    }

    async fn run(&self, sql: &str) {
        self.client.batch_execute(sql).await.unwrap();
    }

    /// Makes tables as the source has them, and lets the role write there.
    async fn tables(&self, sql: &str) {
        self.run(sql).await;
        self.run("GRANT SELECT, INSERT, UPDATE, DELETE, TRUNCATE ON ALL TABLES IN SCHEMA public TO replayer")
            .await;
    }

    /// A replay of everything that the pipeline has published.
    fn config(&self, pipeline: &CaptureConfig) -> ReplayConfig {
        let server = PostgresServer {
            host: "127.0.0.1".to_owned(),
            port: self.postgres.port(),
            database: self.postgres.database().to_owned(),
            username_file: self.folder.path().join("username"),
            password_file: self.folder.path().join("password"),
            ssl_mode: SslMode::Disable,
            ca_file: None,
            client_certificate: None,
        };
        everything(pipeline, ReplayTarget::Postgres(server))
    }

    /// How many records the replay has delivered, by its own account; none while the server is away.
    async fn delivered(&self) -> Option<u64> {
        let row = self
            .client
            .query_opt("SELECT delivered FROM meander.replays", &[])
            .await
            .ok()??;
        u64::try_from(row.get::<_, i64>(0)).ok()
    }
}

/// Number of rows and a digest of them, whatever their order.
async fn digest(client: &Client, table: &str) -> (i64, Option<String>) {
    let sql =
        format!("SELECT count(*), md5(string_agg(t::text, E'\\n' ORDER BY t::text COLLATE \"C\")) FROM {table} t");
    let row = client.query_one(&sql, &[]).await.unwrap();
    (row.get(0), row.get(1))
}

fn pgbench(postgres: &Postgres, arguments: &[&str]) {
    let output = Command::new("pgbench")
        .args(arguments)
        .arg(postgres.url())
        .output()
        .unwrap();
    assert!(output.status.success(), "{}", String::from_utf8_lossy(&output.stderr));
}

#[tokio::test(flavor = "multi_thread")]
async fn a_replay_into_an_empty_postgresql_equals_the_source_through_three_kills() {
    let (source, kafka) = (Postgres::start(&[]).await, Kafka::shared().await);
    let client = source.client().await;
    pgbench(&source, &["-i", "-q"]);
    client
        .batch_execute(
            "ALTER TABLE pgbench_history REPLICA IDENTITY FULL;
             CREATE TABLE last (id int PRIMARY KEY, n int); INSERT INTO last VALUES (1, 0)",
        )
        .await
        .unwrap();
    let mut pipeline = config(&source, kafka, None);
    pipeline.source.snapshot.mode = SnapshotMode::Incremental;
    let mut capture = Runtime::capture(&pipeline);
    capture.ready(LIMIT).await;
    // Three updates and an insert in each transaction.
    pgbench(&source, &["-c", "4", "-t", "2500"]);
    let records = published(&client, &pipeline, 5).await;

    let mut target = Target::start(None).await;
    pgbench(&target.postgres, &["-i", "-q", "-I", "dtp"]);
    target.tables("CREATE TABLE last (id int PRIMARY KEY, n int)").await;
    let operator = Operator::start(Directive::default()).await;
    let folder = tempfile::tempdir().unwrap();
    let config = ReplayConfig {
        operator: operator.link(&folder),
        ..target.config(&pipeline)
    };
    let started = Instant::now();
    let mut runtime = Runtime::replay(&config);
    for kill in 1..=KILLS {
        eventually("rows flow", LIMIT, async || match target.delivered().await {
            Some(delivered) if delivered >= records * kill / (KILLS + 3) => Ok(()),
            delivered => Err(format!("{delivered:?} of {records}")),
        })
        .await;
        runtime.kill9();
        let delivered = target.delivered().await.unwrap();
        println!("kill {kill} after {delivered} of {records} records");
        assert!(delivered < records, "the replay was over before it could be killed");
        runtime.start_again();
    }
    // And a crash of the target, which takes with it what it had not written to disk.
    eventually("rows flow", LIMIT, async || match target.delivered().await {
        Some(delivered) if delivered >= records * 5 / 7 => Ok(()),
        delivered => Err(format!("{delivered:?} of {records}")),
    })
    .await;
    target.postgres.kill9();
    let away = operator.condition("Progressing", "DatabaseUnreachable").await;
    assert!(!away.status, "{away:?}");
    // It can be held meanwhile, and that is shown.
    let held = Directive {
        paused: true,
        ..Directive::default()
    };
    operator.directive.send_replace(held);
    let progress = operator.reported(|progress| progress.phase() == Phase::Paused).await;
    assert_eq!((progress.events_per_second, progress.actual_speed), (0.0, 0.0));
    operator.directive.send_replace(Directive::default());
    target.postgres.start_again().await;
    target.client = target.postgres.client().await;
    // The end waits for a standby, where commits do. There is none, and that is said.
    target
        .run("ALTER SYSTEM SET synchronous_standby_names = 'nobody'")
        .await;
    target.run("SELECT pg_reload_conf()").await;
    let silent = operator.condition("Progressing", "TargetSilent").await;
    assert!(
        !silent.status && silent.message.contains("pg_stat_activity"),
        "{silent:?}"
    );
    assert_eq!(target.delivered().await, Some(records));
    target.run("ALTER SYSTEM RESET synchronous_standby_names").await;
    target.run("SELECT pg_reload_conf()").await;
    let status = runtime.process().wait(LIMIT);
    assert!(status.success(), "{}", runtime.process().log_tail());
    println!(
        "{records} records, four crashes: {:.1} s",
        started.elapsed().as_secs_f64()
    );

    assert_eq!(target.delivered().await, Some(records), "each record once");
    for table in [
        "pgbench_accounts",
        "pgbench_tellers",
        "pgbench_branches",
        "pgbench_history",
        "last",
    ] {
        let (there, here) = (digest(&client, table).await, digest(&target.client, table).await);
        println!("{table}: {} rows, {}", here.0, here.1.as_deref().unwrap_or_default());
        assert_eq!(here, there, "{table}");
    }
    let sums = target
        .client
        .query_one(
            "SELECT (SELECT sum(abalance) FROM pgbench_accounts), (SELECT sum(tbalance) FROM pgbench_tellers),
                    (SELECT sum(bbalance) FROM pgbench_branches), (SELECT sum(delta) FROM pgbench_history)",
            &[],
        )
        .await
        .unwrap();
    let sums: [i64; 4] = std::array::from_fn(|index| sums.get(index));
    assert_eq!(sums, [sums[0]; 4]);
    // One that is over has nothing more to do.
    assert_eq!(replay(&config).await.unwrap(), End::Complete);
    assert_eq!(target.delivered().await, Some(records));
}

/// Tables with keys of several kinds and without any, with values of many types.
const TABLES: &str = r#"
    CREATE TYPE mood AS ENUM ('sad', 'happy');
    CREATE TYPE pair AS (a int, b text);
    CREATE DOMAIN short AS varchar(8) CHECK (value <> '');
    CREATE TABLE "Every ""kind""" (
        id bigint GENERATED ALWAYS AS IDENTITY PRIMARY KEY,
        flag boolean, small smallint, price numeric, money_ money, r4 real, r8 double precision,
        code char(5), name varchar(20), bits bit(4), raw bytea, at timestamptz, local timestamp, day date, span interval,
        doc jsonb, exact json, addr inet, uid uuid, feeling mood, both_ pair, brief short, spot point,
        numbers int[], words text[], moods mood[], during tstzrange, one "char", large text);
    CREATE TABLE parent (id int PRIMARY KEY, name text);
    CREATE TABLE child (parent int REFERENCES parent, n numeric, large text, PRIMARY KEY (n, parent));
    ALTER TABLE child ALTER large SET STORAGE EXTERNAL;
    CREATE TABLE numbered (code text, kind int, seq bigint GENERATED ALWAYS AS IDENTITY, note text, large text, PRIMARY KEY (code, kind));
    ALTER TABLE numbered ALTER large SET STORAGE EXTERNAL;
    CREATE TABLE ids (id bigint GENERATED ALWAYS AS IDENTITY PRIMARY KEY);
    CREATE TABLE counted (a int, seq bigint GENERATED ALWAYS AS IDENTITY);
    ALTER TABLE counted REPLICA IDENTITY FULL;
    CREATE TABLE keys_only (a text, b date, PRIMARY KEY (b, a));
    CREATE TABLE bag (a int, spot point, large text);
    ALTER TABLE bag REPLICA IDENTITY FULL;
    CREATE TABLE last (id int PRIMARY KEY, n int); INSERT INTO last VALUES (1, 0);
"#;

/// Those that are compared.
const COMPARED: [&str; 8] = [
    r#""Every ""kind""""#,
    "parent",
    "child",
    "numbered",
    "ids",
    "counted",
    "keys_only",
    "bag",
];

/// What happens to them, each line a transaction of its own.
const HISTORY: &[&str] = &[
    r#"INSERT INTO "Every ""kind""" (flag, small, price, money_, r4, r8, code, name, bits, raw, at, local, day, span, doc, exact, addr,
        uid, feeling, both_, brief, spot, numbers, words, moods, during, one, large) VALUES
        (true, -1, 12345678901234567890.123456789, 12.34, 0.1, 1e-300, 'ab', 'größer', B'1010', '\x00ff', '2026-11-20 10:00:00.123456+02',
         'infinity', '0044-03-15 BC', '1 mon -2 days 03:04:05.6', '{"a": [1, null]}', '{"b" : 1.0,  "a":1}', '10.0.0.0/8',
         '67a87545-0000-0000-0000-000000000001', 'happy', '(1,"x,""y")', 'ok', '(1.5,-2)', '{1,NULL,3}', '{"a,b","NULL",NULL,""}',
         '{sad,happy}', '[2026-01-01 00:00+00,)', 'z', repeat('x', 100000)),
        (NULL, NULL, 'NaN', NULL, 'NaN', 'infinity', NULL, '', NULL, '', '-infinity', NULL, 'infinity', NULL, 'null', NULL, NULL,
         NULL, NULL, NULL, NULL, NULL, '{}', '{{a},{b}}', NULL, 'empty', NULL, NULL)"#,
    // Large values that are left as they are: by an update, and by changes of the key, also over what has just been deleted.
    r#"UPDATE "Every ""kind""" SET small = 7 WHERE id = 1"#,
    "INSERT INTO parent VALUES (1, 'one'), (2, 'two'), (3, 'three');
     INSERT INTO child SELECT 1, g, CASE WHEN g < 4 THEN repeat('y', 50000) || g END FROM generate_series(1, 5) g",
    "UPDATE child SET n = 100 WHERE n = 1; UPDATE child SET n = 1, parent = 2 WHERE n = 2",
    "DELETE FROM child WHERE n = 3; UPDATE child SET n = 3.0 WHERE n = 100; UPDATE child SET n = 4.50 WHERE n = 4",
    "BEGIN; UPDATE child SET n = -n; UPDATE child SET n = n - 1, parent = 3 WHERE n < -1; UPDATE child SET n = -n; COMMIT",
    "INSERT INTO keys_only VALUES ('a', '2026-01-01'), ('b', '2026-01-01'); UPDATE keys_only SET a = 'c' WHERE a = 'a'",
    "DELETE FROM keys_only; INSERT INTO keys_only VALUES ('b', '2026-01-01')",
    // Values that nobody may set, which are not the key, or only a part of it.
    "INSERT INTO numbered (code, kind, note, large) VALUES ('a', 1, 'x', repeat('y', 50000)), ('b', 1, 'x', NULL), ('c', 1, 'x', NULL)",
    "UPDATE numbered SET note = 'z'; UPDATE numbered SET kind = 2 WHERE code = 'a'; UPDATE numbered SET code = 'd' WHERE code = 'b'",
    "INSERT INTO ids SELECT FROM generate_series(1, 3); DELETE FROM ids WHERE id = 2",
    "INSERT INTO counted (a) VALUES (1), (2), (3); UPDATE counted SET a = 7 WHERE a = 2; DELETE FROM counted WHERE a = 3",
    // The same row many times within a transaction.
    "BEGIN; INSERT INTO parent VALUES (9, 'a'); UPDATE parent SET name = 'b' WHERE id = 9; DELETE FROM parent WHERE id = 9;
     INSERT INTO parent VALUES (9, 'c'); UPDATE parent SET id = 10 WHERE id = 9; UPDATE parent SET name = 'd' WHERE id = 10; COMMIT",
    // Equal rows without a key.
    "INSERT INTO bag SELECT g % 2, '(0,0)', repeat('z', 9000) FROM generate_series(1, 6) g; INSERT INTO bag VALUES (NULL, NULL, NULL)",
    "DELETE FROM bag WHERE ctid = (SELECT min(ctid) FROM bag); UPDATE bag SET spot = '(1,1)' WHERE a = 0; UPDATE bag SET a = 5 WHERE a IS NULL",
    // One statement empties both; neither could be emptied alone.
    "TRUNCATE parent, child; INSERT INTO parent VALUES (1, 'again')",
    "BEGIN; INSERT INTO child SELECT 1, g, 'w' FROM generate_series(1, 20000) g; ROLLBACK",
    "INSERT INTO child SELECT 1, g, 'w' FROM generate_series(1, 20000) g",
];

#[tokio::test(flavor = "multi_thread")]
async fn whatever_happens_to_rows_happens_to_them_in_the_target_and_values_are_the_same() {
    let (source, kafka) = (Postgres::start(&[]).await, Kafka::shared().await);
    let client = source.client().await;
    client.batch_execute(TABLES).await.unwrap();
    let pipeline = config(&source, kafka, None);
    let mut capture = Runtime::capture(&pipeline);
    capture.ready(LIMIT).await;
    for sql in HISTORY {
        client.batch_execute(sql).await.unwrap();
    }
    published(&client, &pipeline, 0).await;
    let target = Target::start(Some(18)).await;
    target.tables(TABLES).await;
    let config = target.config(&pipeline);
    assert_eq!(replay(&config).await.unwrap(), End::Complete);
    for table in COMPARED {
        assert_eq!(
            digest(&target.client, table).await,
            digest(&client, table).await,
            "{table}"
        );
    }
    let transactions = target
        .client
        .query_one("SELECT count(DISTINCT xmin::text) FROM child", &[])
        .await
        .unwrap();
    assert_eq!(
        transactions.get::<_, i64>(0),
        1,
        "a transaction of the source is one of the target"
    );

    // What the target held before, and a snapshot does not find in the source any more, is gone at its end.
    client
        .batch_execute("INSERT INTO keys_only SELECT g::text, '2026-02-02' FROM generate_series(1, 3) g")
        .await
        .unwrap();
    target
        .run("INSERT INTO parent VALUES (77, 'stray'); INSERT INTO bag VALUES (77, NULL, NULL)")
        .await;
    drop(capture);
    let mut again = pipeline.clone();
    again.source.snapshot.requests = vec![meander_config::SnapshotRequest {
        id: "again".to_owned(),
        tables: vec!["public.*".to_owned()],
    }];
    let mut capture = Runtime::capture(&again);
    capture.ready(LIMIT).await;
    eventually("the snapshot is over", LIMIT, async || match checkpoint(&again) {
        Some(checkpoint) if checkpoint.snapshot.requests.get("again").is_some_and(Vec::is_empty) => Ok(()),
        other => Err(format!("{other:?}")),
    })
    .await;
    let config = ReplayConfig {
        job: ResourceIdentity {
            uid: "43".to_owned(),
            ..config.job
        },
        ..target.config(&again)
    };
    assert_eq!(replay(&config).await.unwrap(), End::Complete);
    for table in COMPARED {
        assert_eq!(
            digest(&target.client, table).await,
            digest(&client, table).await,
            "{table}"
        );
    }
}

/// The SQL that a message tells to run.
fn remedy(message: &str) -> String {
    let (_, sql) = message.split_once("run ").expect(message);
    sql.rsplit_once(';').map_or(sql, |(sql, _)| sql).to_owned()
}

#[tokio::test(flavor = "multi_thread")]
async fn what_is_wrong_with_the_target_is_told_with_the_sql_that_mends_it() {
    let (source, kafka) = (Postgres::start(&[]).await, Kafka::shared().await);
    let client = source.client().await;
    client
        .batch_execute(
            "CREATE TABLE last (id int PRIMARY KEY, n int); INSERT INTO last VALUES (1, 0);
             CREATE TABLE goods (id int PRIMARY KEY, name text, price numeric)",
        )
        .await
        .unwrap();
    let pipeline = config(&source, kafka, None);
    let mut capture = Runtime::capture(&pipeline);
    capture.ready(LIMIT).await;
    client
        .batch_execute("INSERT INTO goods VALUES (1, 'a', 1.5), (2, 'b', 2.5)")
        .await
        .unwrap();
    published(&client, &pipeline, 0).await;

    let target = Target::start(Some(14)).await;
    target
        .run("DROP SCHEMA meander; CREATE TABLE last (id int PRIMARY KEY, n int); GRANT ALL ON last TO replayer")
        .await;
    let config = target.config(&pipeline);
    let refused = async || {
        let error = replay(&config).await.unwrap_err();
        let ReplayError::Target(target) = &error else {
            panic!("{error}")
        };
        assert!(!target.is_passing(), "{error}");
        println!("{}: {error}", error.reason());
        (error.reason(), error.to_string())
    };
    let (reason, message) = refused().await;
    assert_eq!(reason, "NoPlace");
    target.run(&remedy(&message)).await;
    assert_eq!(refused().await.0, "NoTable");
    target
        .run(
            "CREATE TABLE goods (id int, name text); ALTER TABLE goods ENABLE ROW LEVEL SECURITY;
             CREATE PUBLICATION other FOR TABLE goods WITH (publish = 'insert')",
        )
        .await;
    for expected in [
        "TableNotWritable",
        "RowsHidden",
        "WouldBeCaptured",
        "NoColumn",
        "NoUniqueIndex",
    ] {
        let (reason, message) = refused().await;
        assert_eq!(reason, expected, "{message}");
        target.run(&remedy(&message)).await;
    }
    // A value that does not fit is not shown.
    target.run("ALTER TABLE goods ALTER name TYPE int USING NULL").await;
    let (reason, message) = refused().await;
    assert_eq!(reason, "ChangeRefused");
    assert!(
        message.contains("SQLSTATE 22P02") && message.contains("\"goods\"") && !message.contains("\"a\""),
        "{message}"
    );
    target.run("ALTER TABLE goods ALTER name TYPE text").await;

    // What is written is marked, and so is not captured by who asks for what has no origin.
    target
        .run("SELECT pg_create_logical_replication_slot('other', 'test_decoding')")
        .await;
    assert_eq!(replay(&config).await.unwrap(), End::Complete);
    assert_eq!(digest(&target.client, "goods").await, digest(&client, "goods").await);
    target.run("INSERT INTO goods VALUES (3, 'own', 0)").await;
    let captured = async |option: &str| {
        let sql = format!(
            "SELECT count(*) FROM pg_logical_slot_peek_changes('other', NULL, NULL, 'only-local', '{option}')
             WHERE data LIKE 'table public.goods: INSERT%'"
        );
        target.client.query_one(&sql, &[]).await.unwrap().get::<_, i64>(0)
    };
    assert_eq!((captured("0").await, captured("1").await), (3, 1));
}

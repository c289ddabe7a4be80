//! What is captured besides rows of ordinary tables, and what a publication leaves out: logical messages, partitions, filters, origins.
#![allow(clippy::unwrap_used, clippy::expect_used, clippy::panic)]

mod common;
#[path = "common/log.rs"]
mod log;

use common::{LIMIT, cluster, config};
use log::{read_topic, wait_for_records};
use meander_config::{Origin, Partitions, PublicationManagement};
use meander_proto::v1::{LogicalMessage, Operation, Row, value::Kind};
use meander_runtime::checkpoint::Tail;
use meander_test_support::{Kafka, Postgres, Runtime, eventually};
use tokio_postgres::Client;

async fn execute(client: &Client, sql: &str) {
    client
        .batch_execute(sql)
        .await
        .unwrap_or_else(|error| panic!("{sql}: {error:?}"));
}

/// The values of a row as text, for short comparisons.
fn texts(row: Option<&Row>) -> Vec<String> {
    row.map(|row| &row.values[..])
        .unwrap_or_default()
        .iter()
        .map(|value| match &value.kind {
            None => "NULL".to_owned(),
            Some(Kind::Integer(integer)) => integer.to_string(),
            Some(Kind::Text(text)) => text.clone(),
            Some(other) => format!("{other:?}"),
        })
        .collect()
}

fn is_there(kafka: &Kafka, topic: &str) -> bool {
    let tail = Tail::new(&cluster(kafka), LIMIT).unwrap();
    !tail.partitions(topic).unwrap().is_empty()
}

#[tokio::test(flavor = "multi_thread")]
async fn messages_of_the_chosen_prefixes_are_published_once_and_in_their_place() {
    let (postgres, kafka) = (Postgres::start(&[]).await, Kafka::shared().await);
    let client = postgres.client().await;
    execute(&client, "CREATE TABLE t (id int PRIMARY KEY)").await;
    let mut config = config(&postgres, kafka, None);
    config.source.message_prefixes = vec!["app.*".to_owned(), "meander.*".to_owned()];
    let mut runtime = Runtime::capture(&config);
    runtime.ready(LIMIT).await;

    // Nothing was committed yet that would give the log a time.
    execute(&client, "SELECT pg_logical_emit_message(false, 'app.first', '')").await;
    execute(
        &client,
        r"BEGIN; INSERT INTO t VALUES (1); SELECT pg_logical_emit_message(true, 'app.order', '\xff00'::bytea);
          SELECT pg_logical_emit_message(true, 'meander.ours', 'x'); INSERT INTO t VALUES (2); COMMIT",
    )
    .await;
    execute(
        &client,
        "BEGIN; SELECT pg_logical_emit_message(true, 'app.gone', 'x'); ROLLBACK",
    )
    .await;
    execute(
        &client,
        "BEGIN; SELECT pg_logical_emit_message(false, 'app.stays', 'y'); ROLLBACK",
    )
    .await;
    // A commit has the server write its WAL out at once.
    execute(&client, "INSERT INTO t VALUES (3)").await;
    let topic = format!("{}.message", config.kafka.topic_prefix);
    wait_for_records(kafka, &topic, 3).await;
    runtime.kill9();
    execute(
        &client,
        "SELECT pg_logical_emit_message(false, 'app.last', ''), pg_logical_emit_message(true, 'other', 'x'); INSERT INTO t VALUES (4)",
    )
    .await;
    runtime.start_again();
    wait_for_records(kafka, &format!("{}.public.t", config.kafka.topic_prefix), 4).await;

    let records = wait_for_records(kafka, &topic, 4).await;
    let seen: Vec<_> = records
        .iter()
        .map(|(_, key, record)| {
            assert_eq!(record.operation(), Operation::Message);
            (key.clone().unwrap(), record.message.clone().unwrap())
        })
        .collect();
    let expected = |prefix: &str, content: &[u8], transactional| {
        (
            format!("{{\"prefix\":\"{prefix}\"}}"),
            LogicalMessage {
                prefix: prefix.to_owned(),
                content: content.to_vec(),
                transactional,
            },
        )
    };
    assert_eq!(
        seen,
        [
            expected("app.first", b"", false),
            expected("app.order", &[0xFF, 0], true),
            expected("app.stays", b"y", false),
            expected("app.last", b"", false),
        ]
    );
    let rows = wait_for_records(kafka, &format!("{}.public.t", config.kafka.topic_prefix), 4).await;
    let place = |position: usize| rows[position].2.coordinate.unwrap();
    let message = records[1].2.coordinate.unwrap();
    assert_eq!(message.commit_lsn, place(0).commit_lsn);
    assert_eq!(
        (place(0).ordinal, message.ordinal, place(1).ordinal),
        (0, 1, 3),
        "each message has its place"
    );
    assert_eq!(records[1].2.transaction_id, rows[0].2.transaction_id);
    let times: Vec<i64> = records.iter().map(|record| record.2.commit_time_micros).collect();
    assert!(times.iter().all(|time| *time > 0), "the log's own time: {times:?}");
}

#[tokio::test(flavor = "multi_thread")]
async fn a_partitioned_table_is_captured_as_one_or_as_its_partitions() {
    let (postgres, kafka) = (Postgres::start(&[]).await, Kafka::shared().await);
    let client = postgres.client().await;
    execute(
        &client,
        "CREATE TABLE m (id int, day date, note text, PRIMARY KEY (id, day)) PARTITION BY RANGE (day);
         CREATE TABLE m_1 PARTITION OF m FOR VALUES FROM ('2026-01-01') TO ('2026-02-01');
         CREATE TABLE m_2 PARTITION OF m FOR VALUES FROM ('2026-02-01') TO ('2026-03-01') PARTITION BY LIST (id);
         CREATE TABLE m_2_rest PARTITION OF m_2 DEFAULT;
         CREATE TABLE unsafe (id int PRIMARY KEY) PARTITION BY RANGE (id);
         CREATE TABLE unsafe_1 PARTITION OF unsafe DEFAULT; ALTER TABLE unsafe_1 REPLICA IDENTITY NOTHING",
    )
    .await;
    let one = config(&postgres, kafka, None);
    let mut many = config(&postgres, kafka, None);
    many.source.publication.partitions = Partitions::Leaf;
    let mut runtimes = [Runtime::capture(&one), Runtime::capture(&many)];
    for runtime in &mut runtimes {
        runtime.ready(LIMIT).await;
    }
    execute(
        &client,
        "INSERT INTO m VALUES (1, '2026-01-05', 'a'), (2, '2026-02-05', 'b');
         UPDATE m SET note = 'A' WHERE id = 1; UPDATE m SET day = '2026-02-07' WHERE id = 1;
         CREATE TABLE m_3 (note text, day date NOT NULL, id int NOT NULL, PRIMARY KEY (id, day));
         ALTER TABLE m ATTACH PARTITION m_3 FOR VALUES FROM ('2026-03-01') TO ('2026-04-01')",
    )
    .await;
    execute(
        &client,
        "INSERT INTO m VALUES (3, '2026-03-05', 'c'); DELETE FROM m WHERE id = 2",
    )
    .await;
    // It must not stop the application either.
    execute(&client, "INSERT INTO unsafe VALUES (1); UPDATE unsafe SET id = 2").await;
    execute(&client, "ALTER TABLE m DETACH PARTITION m_3").await;
    execute(
        &client,
        "INSERT INTO m_3 (id, day) VALUES (9, '2026-03-09'); TRUNCATE m",
    )
    .await;

    let root = format!("{}.public.m", one.kafka.topic_prefix);
    let records = wait_for_records(kafka, &root, 8).await;
    let seen: Vec<_> = records
        .iter()
        .map(|(_, _, record)| {
            (
                record.operation(),
                texts(record.after.as_ref().or(record.before.as_ref())).join(" "),
            )
        })
        .collect();
    let row = |operation, text: &str| (operation, text.to_owned());
    assert_eq!(
        seen,
        [
            row(Operation::Insert, "1 2026-01-05 a"),
            row(Operation::Insert, "2 2026-02-05 b"),
            row(Operation::Update, "1 2026-01-05 A"),
            // A row that changes its partition goes from one and comes to another.
            (Operation::Delete, seen[3].1.clone()),
            row(Operation::Insert, "1 2026-02-07 A"),
            row(Operation::Insert, "3 2026-03-05 c"),
            (Operation::Delete, seen[6].1.clone()),
            (Operation::Truncate, String::new()),
        ]
    );
    for other in ["m_1", "m_2", "m_2_rest", "unsafe"] {
        assert!(
            !is_there(kafka, &format!("{}.public.{other}", one.kafka.topic_prefix)),
            "{other}"
        );
    }

    let leaf = format!("{}.public.m", many.kafka.topic_prefix);
    let first = wait_for_records(kafka, &format!("{leaf}_1"), 4).await;
    assert_eq!(
        first
            .iter()
            .map(|(_, _, record)| record.operation())
            .collect::<Vec<_>>(),
        [
            Operation::Insert,
            Operation::Update,
            Operation::Delete,
            Operation::Truncate
        ]
    );
    wait_for_records(kafka, &format!("{leaf}_2_rest"), 4).await;
    assert!(!is_there(kafka, &leaf));
}

#[tokio::test(flavor = "multi_thread")]
async fn an_external_publication_decides_rows_and_columns_and_other_relations_are_left_alone() {
    let (postgres, kafka) = (Postgres::start(&[]).await, Kafka::shared().await);
    let client = postgres.client().await;
    execute(
        &client,
        "CREATE TABLE filtered (id int PRIMARY KEY, shown text, hidden text);
         CREATE TABLE parent (id int PRIMARY KEY, half int, whole int GENERATED ALWAYS AS (half * 2) STORED);
         CREATE TABLE child (extra text, PRIMARY KEY (id)) INHERITS (parent);
         CREATE TABLE by_generated (half int, whole int GENERATED ALWAYS AS (half * 2) STORED, PRIMARY KEY (half, whole));
         CREATE UNLOGGED TABLE fleeting (id int PRIMARY KEY); CREATE VIEW seen AS TABLE parent; CREATE MATERIALIZED VIEW kept AS TABLE parent;
         CREATE EXTENSION file_fdw; CREATE SERVER files FOREIGN DATA WRAPPER file_fdw;
         CREATE FOREIGN TABLE elsewhere (line text) SERVER files OPTIONS (filename '/dev/null');
         CREATE PUBLICATION theirs FOR TABLE filtered (id, shown) WHERE (id > 10) WITH (publish = 'insert, update, delete')",
    )
    .await;
    let mut external = config(&postgres, kafka, None);
    external.source.publication.name = "theirs".to_owned();
    external.source.publication.management = PublicationManagement::External;
    let mut managed = config(&postgres, kafka, None);
    managed.source.tables.exclude = vec!["public.filtered".to_owned()];
    let mut runtimes = [Runtime::capture(&external), Runtime::capture(&managed)];
    for runtime in &mut runtimes {
        runtime.ready(LIMIT).await;
    }
    let published = client
        .query(
            "SELECT tablename::text FROM pg_publication_tables WHERE pubname = $1 ORDER BY 1",
            &[&managed.source.publication.name],
        )
        .await
        .unwrap();
    let published: Vec<String> = published.iter().map(|row| row.get(0)).collect();
    assert_eq!(published, ["child", "parent"]);

    execute(
        &client,
        "INSERT INTO filtered VALUES (1, 'a', 'secret'), (11, 'b', 'secret'); UPDATE filtered SET hidden = 'x';
         UPDATE filtered SET id = 12 WHERE id = 1; UPDATE filtered SET id = 2 WHERE id = 11;
         INSERT INTO parent VALUES (1, 21); INSERT INTO child (id, half, extra) VALUES (2, 4, 'c'); UPDATE parent SET half = 5",
    )
    .await;
    let filtered = wait_for_records(kafka, &format!("{}.public.filtered", external.kafka.topic_prefix), 4).await;
    let seen: Vec<_> = filtered
        .iter()
        .map(|(_, key, record)| {
            let names: Vec<_> = record
                .relation
                .as_ref()
                .unwrap()
                .columns
                .iter()
                .map(|column| column.name.as_str())
                .collect();
            assert_eq!(names, ["id", "shown"]);
            (record.operation(), key.clone().unwrap())
        })
        .collect();
    let key = |id: u32| format!("{{\"id\":\"{id}\"}}");
    // A row that begins or ceases to fit the filter comes and goes.
    assert_eq!(
        seen,
        [
            (Operation::Insert, key(11)),
            (Operation::Update, key(11)),
            (Operation::Insert, key(12)),
            (Operation::Delete, key(11)),
        ]
    );
    // Each table of an inheritance has its own changes, and PostgreSQL computes a generated column for whoever reads it.
    let parents = wait_for_records(kafka, &format!("{}.public.parent", managed.kafka.topic_prefix), 2).await;
    assert_eq!(texts(parents[1].2.after.as_ref()), ["1", "5"]);
    let children = wait_for_records(kafka, &format!("{}.public.child", managed.kafka.topic_prefix), 2).await;
    assert_eq!(texts(children[1].2.after.as_ref()), ["2", "5", "c"]);
}

#[tokio::test(flavor = "multi_thread")]
async fn what_came_by_replication_says_so_or_is_left_out() {
    let (postgres, kafka) = (Postgres::start_version(16, &[]).await, Kafka::shared().await);
    let client = postgres.client().await;
    execute(
        &client,
        "CREATE TABLE t (id int PRIMARY KEY); SELECT pg_replication_origin_create('upstream')",
    )
    .await;
    let any = config(&postgres, kafka, None);
    let mut local = config(&postgres, kafka, None);
    local.source.origin = Origin::None;
    let mut runtimes = [Runtime::capture(&any), Runtime::capture(&local)];
    for runtime in &mut runtimes {
        runtime.ready(LIMIT).await;
    }
    execute(&client, "INSERT INTO t VALUES (1)").await;
    execute(&client, "SELECT pg_replication_origin_session_setup('upstream')").await;
    execute(&client, "INSERT INTO t VALUES (2)").await;
    execute(&client, "SELECT pg_replication_origin_session_reset()").await;
    execute(&client, "INSERT INTO t VALUES (3)").await;
    let of = async |prefix: &str, count| {
        let records = wait_for_records(kafka, &format!("{prefix}.public.t"), count).await;
        records
            .iter()
            .map(|(_, _, record)| (texts(record.after.as_ref()).concat(), record.origin.clone()))
            .collect::<Vec<_>>()
    };
    let change = |id: &str, origin: &str| (id.to_owned(), origin.to_owned());
    assert_eq!(
        of(&any.kafka.topic_prefix, 3).await,
        [change("1", ""), change("2", "upstream"), change("3", "")]
    );
    assert_eq!(
        of(&local.kafka.topic_prefix, 2).await,
        [change("1", ""), change("3", "")]
    );
    assert_eq!(
        read_topic(kafka, &format!("{}.public.t", local.kafka.topic_prefix)).len(),
        2
    );

    let older = Postgres::start_version(15, &[]).await;
    execute(&older.client().await, "CREATE TABLE t (id int PRIMARY KEY)").await;
    let mut refused = config(&older, kafka, None);
    refused.source.origin = Origin::None;
    let mut runtime = Runtime::capture(&refused);
    let log = runtime.process().log().to_owned();
    eventually("the refusal is said", LIMIT, async || {
        let text = std::fs::read_to_string(&log).unwrap();
        text.contains("OriginFilterUnsupported").then_some(()).ok_or(text)
    })
    .await;
}

//! What comes out of Kafka is what PostgreSQL stored, whatever the type.
//!
//! The judge is the server itself: each value of a record, written as a literal of its column's type, must be the stored value bit for
//! bit (`record_image_eq`), and print as the same text.
#![allow(clippy::unwrap_used, clippy::expect_used, clippy::panic)]

mod common;
#[path = "common/log.rs"]
mod log;

use std::{fmt::Write as _, fs, path::Path};

use common::{LIMIT, config};
use log::wait_for_records;
use meander_config::CaptureConfig;
use meander_proto::v1::{Absence, Operation, Relation, Row, Value, value::Kind};
use meander_runtime::{log::topic_name, source::postgres::wire::SESSION_SETTINGS};
use meander_test_support::{Kafka, Postgres, Runtime};
use proptest::{prelude::*, strategy::ValueTree as _, test_runner::TestRunner};
use tokio_postgres::{Client, Config, NoTls};

/// What a database team may have set, each of which changes how values are printed.
const OTHER_SETTINGS: &str = "ALTER DATABASE postgres SET DateStyle = 'German, DMY';
    ALTER DATABASE postgres SET IntervalStyle = 'sql_standard';
    ALTER DATABASE postgres SET search_path = 'fixture', 'public';
    ALTER ROLE postgres SET TimeZone = 'Asia/Kathmandu';
    ALTER ROLE postgres SET extra_float_digits = -15;
    ALTER ROLE postgres SET quote_all_identifiers = on;
    ALTER ROLE postgres IN DATABASE postgres SET bytea_output = 'escape'";

/// The value as a literal, which the server reads back.
fn literal(kind: &Kind) -> Option<String> {
    Some(match kind {
        Kind::Integer(integer) => integer.to_string(),
        Kind::Boolean(boolean) => boolean.to_string(),
        Kind::Float4(float) => float.to_string(),
        Kind::Float8(float) => float.to_string(),
        Kind::Binary(bytes) => bytes.iter().fold("\\x".to_owned(), |mut hex, byte| {
            write!(hex, "{byte:02x}").unwrap();
            hex
        }),
        Kind::Text(text) => text.clone(),
        Kind::Absent(_) => return None,
    })
}

fn quoted(text: &str) -> String {
    format!("'{}'", text.replace('\'', "''"))
}

fn identifier(name: &str) -> String {
    format!("\"{}\"", name.replace('"', "\"\""))
}

/// The server, asked with the settings that a capture has.
struct Judge {
    client: Client,
}

impl Judge {
    async fn new(postgres: &Postgres, database: &str) -> Self {
        let mut config: Config = postgres.url().parse().unwrap();
        config.dbname(database);
        let (client, connection) = config.connect(NoTls).await.unwrap();
        tokio::spawn(connection);
        for (name, value) in SESSION_SETTINGS {
            client
                .batch_execute(&format!("SET {name} = {}", quoted(value)))
                .await
                .unwrap();
        }
        Self { client }
    }

    /// Names and types of a table's columns, as SQL.
    async fn columns(&self, table: &str) -> Vec<(String, String)> {
        self.client
            .query(
                "SELECT attname, format_type(atttypid, atttypmod) FROM pg_attribute
                 WHERE attrelid = $1::text::regclass AND attnum > 0 AND NOT attisdropped ORDER BY attnum",
                &[&table],
            )
            .await
            .unwrap()
            .iter()
            .map(|row| (row.get(0), row.get(1)))
            .collect()
    }

    /// The columns of a captured row that are not what the row of `table` with the same id holds. Marks of unchanged values are left out.
    async fn differences(&self, table: &str, columns: &[(String, String)], row: &Row) -> Vec<String> {
        assert_eq!(row.values.len(), columns.len(), "{table}");
        let Some(Kind::Integer(id)) = row.values[0].kind else {
            panic!("{table}: the first column is the id")
        };
        let checks: Vec<String> = columns
            .iter()
            .zip(&row.values)
            .filter(|((name, _), _)| name != "touched")
            .filter_map(|((name, type_name), value)| {
                let column = identifier(name);
                let same = match value.kind.as_ref() {
                    None => format!("num_nulls({column}) = 1"),
                    Some(kind) => {
                        let literal = quoted(&literal(kind)?);
                        let mut same = format!(
                            "num_nulls({column}) = 0 AND record_image_eq(ROW({column}), ROW({literal}::{type_name}))"
                        );
                        if matches!(kind, Kind::Text(_)) {
                            write!(same, " AND format('%s', {column}) = {literal}").unwrap();
                        }
                        same
                    }
                };
                Some(format!("CASE WHEN {same} THEN NULL ELSE {} END", quoted(name)))
            })
            .collect();
        let query = format!(
            "SELECT array_remove(ARRAY[{}]::text[], NULL) FROM {table} WHERE id = {id}",
            checks.join(", ")
        );
        let result = self.client.query_one(&query, &[]).await.unwrap_or_else(|error| {
            panic!(
                "{table} row {id}: {}",
                error.as_db_error().map_or("", |error| error.message())
            )
        });
        let differ: Vec<String> = result.get(0);
        differ
            .iter()
            .map(|column| format!("{table} row {id} column {column}"))
            .collect()
    }

    /// The record's description of the table agrees with the catalog. A domain goes by the name of the type that it is over.
    async fn check_relation(&self, table: &str, relation: &Relation) {
        let described: Vec<(String, String, u32, i32)> = relation
            .columns
            .iter()
            .map(|column| {
                (
                    column.name.clone(),
                    column.type_name.clone(),
                    column.type_oid,
                    column.type_modifier,
                )
            })
            .collect();
        let catalog: Vec<(String, String, u32, i32)> = self
            .client
            .query(
                "WITH RECURSIVE over (oid, base) AS (
                    SELECT oid, oid FROM pg_type
                    UNION SELECT over.oid, t.typbasetype FROM over JOIN pg_type t ON t.oid = over.base WHERE t.typtype = 'd')
                 SELECT attname, CASE nspname WHEN 'pg_catalog' THEN '' ELSE nspname || '.' END || typname, atttypid, atttypmod
                 FROM pg_attribute JOIN over ON over.oid = atttypid JOIN pg_type t ON t.oid = over.base AND t.typtype <> 'd'
                 JOIN pg_namespace n ON n.oid = typnamespace
                 WHERE attrelid = $1::text::regclass AND attnum > 0 AND NOT attisdropped ORDER BY attnum",
                &[&table],
            )
            .await
            .unwrap()
            .iter()
            .map(|row| (row.get(0), row.get(1), row.get(2), row.get(3)))
            .collect();
        assert_eq!(described, catalog, "{table}");
    }

    /// Inserts, updates and deletes of all rows of `table` were captured with the values that `reference` has kept.
    async fn check_life(&self, config: &CaptureConfig, kafka: &Kafka, schema: &str, table: &str) -> usize {
        let reference = format!("kept.{}", identifier(table));
        let columns = self.columns(&reference).await;
        let rows: i64 = self
            .client
            .query_one(&format!("SELECT count(*) FROM {reference}"), &[])
            .await
            .unwrap()
            .get(0);
        let rows = usize::try_from(rows).unwrap();
        let topic = topic_name(&config.kafka.topic_prefix, schema, table);
        let records = wait_for_records(kafka, &topic, 3 * rows).await;
        assert_eq!(records.len(), 3 * rows, "{table}");
        let mut wrong = Vec::new();
        let mut unchanged = 0;
        let mut described = None;
        for (index, (_, _, record)) in records.iter().enumerate() {
            let operation = [Operation::Insert, Operation::Update, Operation::Delete][index / rows];
            assert_eq!(record.operation(), operation, "{table}");
            if described != record.relation.as_ref() {
                described = record.relation.as_ref();
                let qualified = format!("{}.{}", identifier(schema), identifier(table));
                self.check_relation(&qualified, described.unwrap()).await;
            }
            for row in [&record.before, &record.after].into_iter().flatten() {
                wrong.extend(self.differences(&reference, &columns, row).await);
            }
            if let (Some(before), Some(after)) = (&record.before, &record.after) {
                unchanged += count_marks(before, after);
            }
        }
        assert!(wrong.is_empty(), "{wrong:#?}");
        // The judge is no good if it always agrees.
        let mut other = records[rows - 1].2.after.clone().unwrap();
        let column = other.values.iter().skip(2).position(|value| value.kind.is_some());
        other.values[column.unwrap() + 2].kind = None;
        assert_eq!(self.differences(&reference, &columns, &other).await.len(), 1);
        unchanged
    }
}

/// Values of `after` that are marked as unchanged; `before` has each of them.
fn count_marks(before: &Row, after: &Row) -> usize {
    before
        .values
        .iter()
        .zip(&after.values)
        .filter(|(before, after)| {
            let marked = is_mark(after);
            assert!(!is_mark(before), "under REPLICA IDENTITY FULL the row before is whole");
            assert!(!marked || before.kind.is_some());
            marked
        })
        .count()
}

fn is_mark(value: &Value) -> bool {
    value.kind == Some(Kind::Absent(Absence::UnchangedToast.into()))
}

fn fixture(name: &str) -> String {
    fs::read_to_string(Path::new(env!("CARGO_MANIFEST_DIR")).join("tests/fixtures").join(name)).unwrap()
}

async fn tables(client: &Client, schema: &str) -> Vec<String> {
    client
        .query(
            "SELECT tablename FROM pg_tables WHERE schemaname = $1 ORDER BY 1",
            &[&schema],
        )
        .await
        .unwrap()
        .iter()
        .map(|row| row.get(0))
        .collect()
}

/// Captures inserts, updates and deletes of all rows of the fixture, and has the server judge them.
async fn every_value_survives(postgres: &Postgres) {
    let kafka = Kafka::shared().await;
    let client = postgres.client().await;
    client.batch_execute(&fixture("values.sql")).await.unwrap();
    client.batch_execute(OTHER_SETTINGS).await.unwrap();
    let mut config = config(postgres, kafka, None);
    config.source.tables.include = vec!["v.*".to_owned()];
    config.kafka.partitions = 1;
    let mut runtime = Runtime::capture(&config);
    runtime.ready(LIMIT).await;

    client.batch_execute(&fixture("values_rows.sql")).await.unwrap();
    client.batch_execute("CREATE SCHEMA kept").await.unwrap();
    let tables = tables(&client, "v").await;
    for table in &tables {
        client
            .batch_execute(&format!(
                "CREATE TABLE kept.{table} AS TABLE v.{table}; UPDATE v.{table} SET touched = 1; DELETE FROM v.{table}"
            ))
            .await
            .unwrap();
    }
    let judge = Judge::new(postgres, "postgres").await;
    let mut unchanged = 0;
    for table in &tables {
        unchanged += judge.check_life(&config, kafka, "v", table).await;
    }
    assert!(unchanged > 0, "some values were too large to be written again");
}

#[tokio::test(flavor = "multi_thread")]
async fn every_value_comes_out_as_it_is_stored_on_the_oldest_version() {
    every_value_survives(&Postgres::start_version(14, &[]).await).await;
}

#[tokio::test(flavor = "multi_thread")]
async fn every_value_comes_out_as_it_is_stored_on_the_newest_version() {
    every_value_survives(&Postgres::start_version(18, &[]).await).await;
}

/// Makes a copy of the table's rows for the judge, then updates and deletes them.
async fn live_and_die(client: &Client, table: &str, name: &str) {
    client
        .batch_execute(&format!(
            "CREATE TABLE kept.{} AS TABLE {table}; UPDATE {table} SET touched = 1; DELETE FROM {table}",
            identifier(name)
        ))
        .await
        .unwrap();
}

#[tokio::test(flavor = "multi_thread")]
async fn names_and_widths_of_any_kind_and_another_encoding_are_carried() {
    let (postgres, kafka) = (Postgres::start(&[]).await, Kafka::shared().await);
    let client = postgres.client().await;
    client
        .batch_execute("CREATE DATABASE latin ENCODING 'LATIN1' TEMPLATE template0 LOCALE 'C'")
        .await
        .unwrap();
    for (database, schema, name, columns) in [
        (
            "postgres",
            "Quoted_\" . Schema",
            "Quoted_\" . Table",
            "\"Quoted_\"\" . Text_Column\" text DEFAULT 'a', \"'quoted'\" text, \"col spaces\" int".to_owned(),
        ),
        (
            "postgres",
            "テスト",
            "café",
            "\"名前\" text DEFAULT '日本語テキスト', \"Ünï\" int".to_owned(),
        ),
        (
            "postgres",
            &"s".repeat(63),
            &"é".repeat(31),
            format!(
                "{} text DEFAULT 'x', {} int DEFAULT 1",
                "c".repeat(63),
                identifier(&"ß".repeat(31))
            ),
        ),
        (
            "postgres",
            "back\\slash",
            "tab\tle",
            "\"new\nline\" text DEFAULT E'\\\\'".to_owned(),
        ),
        (
            "postgres",
            "public",
            "wide",
            (3..=1600)
                .map(|n| format!("c{n} int2 DEFAULT {n}"))
                .collect::<Vec<_>>()
                .join(","),
        ),
        ("latin", "public", "größe", "\"ÿ\" text DEFAULT '¡é ÿ£'".to_owned()),
    ] {
        let judge = Judge::new(&postgres, database).await;
        let table = format!("{}.{}", identifier(schema), identifier(name));
        judge
            .client
            .batch_execute(&format!(
                "CREATE SCHEMA IF NOT EXISTS {}; CREATE SCHEMA IF NOT EXISTS kept;
                 CREATE TABLE {table} (id int PRIMARY KEY, touched int DEFAULT 0, {columns}); ALTER TABLE {table} REPLICA IDENTITY FULL",
                identifier(schema)
            ))
            .await
            .unwrap();
        let mut config = config(&postgres, kafka, None);
        config.source.database = database.to_owned();
        config.source.tables.include = vec![table.clone()];
        let mut runtime = Runtime::capture(&config);
        runtime.ready(LIMIT).await;
        judge
            .client
            .batch_execute(&format!("INSERT INTO {table} (id) VALUES (1), (2)"))
            .await
            .unwrap();
        live_and_die(&judge.client, &table, name).await;
        judge.check_life(&config, kafka, schema, name).await;
    }
}

#[tokio::test(flavor = "multi_thread")]
async fn a_large_value_that_an_update_left_alone_is_marked_and_never_made_up() {
    let (postgres, kafka) = (Postgres::start(&[]).await, Kafka::shared().await);
    let client = postgres.client().await;
    // Each of these is stored out of line, and so is the key of `toasted_key`.
    const LARGE: &[(&str, &str)] = &[
        ("text", "repeat('a', 9000)"),
        ("varchar[]", "array_fill('b'::varchar, ARRAY[3000])"),
        ("char(3000)", "'c'"),
        ("bytea", "decode(repeat('00', 9000), 'hex')"),
        ("int[]", "array_fill(1, ARRAY[3000])"),
        ("bigint[]", "array_fill(1::bigint, ARRAY[3000])"),
        ("date[]", "array_fill('infinity'::date, ARRAY[3000])"),
        ("uuid[]", "array_fill(gen_random_uuid(), ARRAY[1000])"),
        ("json", "('\"' || repeat('d', 9000) || '\"')::json"),
        ("jsonb", "('\"' || repeat('e', 9000) || '\"')::jsonb"),
        ("json[]", "array_fill('1'::json, ARRAY[3000])"),
        ("hstore", "hstore('k', repeat('f', 9000))"),
    ];
    let columns: String = LARGE
        .iter()
        .enumerate()
        .map(|(n, (kind, _))| format!(", c{n} {kind}"))
        .collect();
    let external: String = (0..LARGE.len())
        .map(|n| format!(", ALTER c{n} SET STORAGE EXTERNAL"))
        .collect();
    let values: String = LARGE.iter().map(|(_, value)| format!(", {value}")).collect();
    client
        .batch_execute("CREATE EXTENSION hstore; CREATE TABLE toasted_key (id text PRIMARY KEY, n int); ALTER TABLE toasted_key ALTER id SET STORAGE EXTERNAL;
                        CREATE TABLE padded_key (id char(8) PRIMARY KEY, n int)")
        .await
        .unwrap();
    for (table, identity) in [
        ("by_key", "DEFAULT"),
        ("by_index", "USING INDEX by_index_n_key"),
        ("whole", "FULL"),
    ] {
        client
            .batch_execute(&format!(
                "CREATE TABLE {table} (id int PRIMARY KEY, n int NOT NULL UNIQUE {columns});
                 ALTER TABLE {table} REPLICA IDENTITY {identity} {external}"
            ))
            .await
            .unwrap();
    }
    let config = config(&postgres, kafka, None);
    let mut runtime = Runtime::capture(&config);
    runtime.ready(LIMIT).await;

    for (table, key) in [
        ("by_key", "{\"id\":\"1\"}"),
        ("by_index", "{\"n\":\"1\"}"),
        ("whole", "{\"id\":\"1\"}"),
    ] {
        client
            .batch_execute(&format!(
                "INSERT INTO {table} VALUES (1, 1 {values}); UPDATE {table} SET {} = 2;
                 UPDATE {table} SET c0 = c0 || 'z', c5 = NULL",
                if table == "by_index" { "id" } else { "n" }
            ))
            .await
            .unwrap();
        let topic = format!("{}.public.{table}", config.kafka.topic_prefix);
        let records = wait_for_records(kafka, &topic, 3).await;
        let after = |index: usize| &records[index].2.after.as_ref().unwrap().values[2..];
        assert!(
            after(0).iter().all(|value| !is_mark(value)),
            "an INSERT has every value"
        );
        assert!(after(1).iter().all(is_mark), "{table}: {:?}", after(1));
        for (column, value) in after(2).iter().enumerate() {
            match column {
                0 => assert_eq!(value.kind, Some(Kind::Text("a".repeat(9000) + "z"))),
                5 => assert_eq!(value.kind, None, "NULL is not a mark"),
                _ => assert!(is_mark(value), "{table} c{column}"),
            }
        }
        for (_, key_text, record) in &records {
            assert_eq!(key_text.as_deref(), Some(key));
            assert!(!record.key_changed);
            // What the row was before is known under FULL alone, and then wholly.
            assert_eq!(
                record.before.is_some(),
                table == "whole" && record.operation() == Operation::Update
            );
        }
        if table == "whole" {
            let before = &records[1].2.before.as_ref().unwrap().values;
            assert_eq!(before[2..], *after(0));
        }
    }

    // Keys are written whole, whatever they are stored like.
    let (long, longer) = ("k".repeat(2500), "l".repeat(2600));
    client
        .batch_execute(&format!(
            "INSERT INTO toasted_key VALUES ('{long}', 1); UPDATE toasted_key SET n = 2; UPDATE toasted_key SET id = '{longer}'; DELETE FROM toasted_key;
             INSERT INTO padded_key VALUES ('ab', 1); UPDATE padded_key SET n = 2; DELETE FROM padded_key"
        ))
        .await
        .unwrap();
    let keys = |records: &[(String, Option<String>, meander_proto::v1::ChangeRecord)]| -> Vec<(Operation, String)> {
        records
            .iter()
            .map(|(_, key, record)| (record.operation(), key.clone().unwrap()))
            .collect()
    };
    let (long, longer) = (format!("{{\"id\":\"{long}\"}}"), format!("{{\"id\":\"{longer}\"}}"));
    assert_eq!(
        keys(&wait_for_records(kafka, &format!("{}.public.toasted_key", config.kafka.topic_prefix), 5).await),
        [
            (Operation::Insert, long.clone()),
            (Operation::Update, long.clone()),
            (Operation::Delete, long),
            (Operation::Update, longer.clone()),
            (Operation::Delete, longer),
        ]
    );
    let padded = "{\"id\":\"ab      \"}".to_owned();
    assert_eq!(
        keys(&wait_for_records(kafka, &format!("{}.public.padded_key", config.kafka.topic_prefix), 3).await),
        [
            (Operation::Insert, padded.clone()),
            (Operation::Update, padded.clone()),
            (Operation::Delete, padded)
        ]
    );
}

/// Expressions of random values, each with its type.
fn any_row() -> impl Strategy<Value = Vec<(&'static str, String)>> {
    fn bits(digits: std::ops::Range<usize>) -> impl Strategy<Value = String> {
        proptest::collection::vec("[01]", digits).prop_map(|bits| quoted(&bits.concat()))
    }
    fn text() -> impl Strategy<Value = String> {
        "(?s)[^\\x00]{0,30}".prop_map(|text| quoted(&text))
    }
    let day = -2_451_545..106_751_990_i32;
    let clock = || {
        (0..24_u8, 0..60_u8, 0..60_u8, 0..1_000_000_u32)
            .prop_map(|(hour, minute, second, micros)| format!("{hour:02}:{minute:02}:{second:02}.{micros:06}"))
    };
    let moment = (day, clock()).prop_map(|(day, clock)| format!("(date '2000-01-01' + {day}) + time '{clock}'"));
    let columns: Vec<(&'static str, BoxedStrategy<String>)> = vec![
        ("int2", any::<i16>().prop_map(|n| quoted(&n.to_string())).boxed()),
        ("int4", any::<i32>().prop_map(|n| quoted(&n.to_string())).boxed()),
        ("int8", any::<i64>().prop_map(|n| quoted(&n.to_string())).boxed()),
        ("oid", any::<u32>().prop_map(|n| quoted(&n.to_string())).boxed()),
        ("bool", any::<bool>().prop_map(|b| b.to_string()).boxed()),
        (
            "float4",
            proptest::num::f32::ANY.prop_map(|n| quoted(&n.to_string())).boxed(),
        ),
        (
            "float8",
            proptest::num::f64::ANY.prop_map(|n| quoted(&n.to_string())).boxed(),
        ),
        (
            "numeric",
            "-?[0-9]{1,80}(\\.[0-9]{1,80})?(e-?[0-9]{1,3})?"
                .prop_map(|n| quoted(&n))
                .boxed(),
        ),
        ("text", text().boxed()),
        ("char(30)", text().boxed()),
        (
            "bytea",
            proptest::collection::vec(any::<u8>(), 0..60)
                .prop_map(|bytes| quoted(&literal(&Kind::Binary(bytes)).unwrap()))
                .boxed(),
        ),
        (
            "date",
            (-2_451_545..2_145_031_948_i32)
                .prop_map(|day| format!("date '2000-01-01' + {day}"))
                .boxed(),
        ),
        ("timestamp", moment.clone().boxed()),
        (
            "timestamptz",
            moment
                .prop_map(|moment| format!("({moment}) AT TIME ZONE 'UTC'"))
                .boxed(),
        ),
        ("time", clock().prop_map(|clock| quoted(&clock)).boxed()),
        (
            "timetz",
            (clock(), "[+-]", 0..16_u8, 0..60_u8, 0..60_u8)
                .prop_map(|(clock, sign, h, m, s)| quoted(&format!("{clock}{sign}{h:02}:{m:02}:{s:02}")))
                .boxed(),
        ),
        (
            "interval",
            (any::<i32>(), any::<i32>(), "-?", 0..2_000_000_000_u32, clock())
                .prop_map(|(months, days, sign, hours, clock)| {
                    quoted(&format!("{months} mons {days} days {sign}{hours}{}", &clock[2..]))
                })
                .boxed(),
        ),
        ("bit(17)", bits(17..18).prop_map(|bits| format!("B{bits}")).boxed()),
        ("varbit", bits(0..90).prop_map(|bits| format!("B{bits}")).boxed()),
        ("uuid", any::<u128>().prop_map(|n| quoted(&format!("{n:032x}"))).boxed()),
        (
            "inet",
            (any::<std::net::IpAddr>(), 0..=32_u8)
                .prop_map(|(address, bits)| quoted(&format!("{address}/{bits}")))
                .boxed(),
        ),
        (
            "macaddr8",
            any::<u64>().prop_map(|n| quoted(&format!("{n:016x}"))).boxed(),
        ),
        (
            "jsonb",
            (text(), proptest::num::f64::NORMAL)
                .prop_map(|(text, n)| {
                    format!("jsonb_build_object({text}::text, ARRAY[{text}::text, NULL], 'n', {n}::numeric)")
                })
                .boxed(),
        ),
        (
            "text[]",
            proptest::collection::vec(text(), 0..5)
                .prop_map(|texts| format!("ARRAY[{}]::text[]", texts.join(",")))
                .boxed(),
        ),
        (
            "float8[]",
            proptest::collection::vec(proptest::num::f64::ANY, 0..5)
                .prop_map(|floats| {
                    quoted(&format!(
                        "{{{}}}",
                        floats.iter().map(f64::to_string).collect::<Vec<_>>().join(",")
                    ))
                })
                .boxed(),
        ),
        (
            "int8range",
            (any::<i64>(), any::<i64>())
                .prop_map(|(a, b)| format!("int8range('{}', '{}', '[)')", a.min(b), a.max(b)))
                .boxed(),
        ),
        (
            "point",
            (proptest::num::f64::ANY, proptest::num::f64::ANY)
                .prop_map(|(x, y)| format!("point(float8 '{x}', float8 '{y}')"))
                .boxed(),
        ),
        (
            "tsvector",
            proptest::collection::vec("[^\\x00]{1,10}", 0..5)
                .prop_map(|words| {
                    format!(
                        "array_to_tsvector(ARRAY[{}]::text[])",
                        words.iter().map(|word| quoted(word)).collect::<Vec<_>>().join(",")
                    )
                })
                .boxed(),
        ),
        (
            "pg_lsn",
            any::<u64>()
                .prop_map(|n| quoted(&meander_runtime::position::Lsn(n).to_string()))
                .boxed(),
        ),
        ("xid8", any::<u64>().prop_map(|n| quoted(&n.to_string())).boxed()),
        (
            "pair",
            (text(), proptest::num::f64::ANY)
                .prop_map(|(text, float)| format!("ROW({text}, '{float}', ARRAY[{text}]::text[])::pair"))
                .boxed(),
        ),
        (
            "pair[]",
            (text(), proptest::num::f64::ANY)
                .prop_map(|(text, float)| format!("ARRAY[ROW({text}, '{float}', ARRAY[{text}]::text[])::pair, NULL]"))
                .boxed(),
        ),
    ];
    let (types, strategies): (Vec<_>, Vec<_>) = columns.into_iter().unzip();
    strategies.prop_map(move |values| types.iter().copied().zip(values).collect())
}

#[tokio::test(flavor = "multi_thread")]
async fn any_value_that_postgresql_prints_comes_out_as_it_went_in() {
    const ROWS: usize = 150;
    let (postgres, kafka) = (Postgres::start(&[]).await, Kafka::shared().await);
    let mut runner = TestRunner::default();
    let rows: Vec<_> = std::iter::repeat_with(|| any_row().new_tree(&mut runner).unwrap().current())
        .take(ROWS)
        .collect();
    let judge = Judge::new(&postgres, "postgres").await;
    let columns: String = rows[0]
        .iter()
        .enumerate()
        .map(|(n, (kind, _))| format!(", c{n} {}", kind.replace("pair", "public.pair")))
        .collect();
    judge
        .client
        .batch_execute(&format!(
            "SET search_path = public; CREATE SCHEMA kept; CREATE TYPE pair AS (\"a\"\"b\" text, f float8, t text[]);
             CREATE TABLE any_values (id int PRIMARY KEY, touched int DEFAULT 0 {columns}); ALTER TABLE any_values REPLICA IDENTITY FULL"
        ))
        .await
        .unwrap();
    let config = config(&postgres, kafka, None);
    let mut runtime = Runtime::capture(&config);
    runtime.ready(LIMIT).await;
    for (id, row) in rows.iter().enumerate() {
        let values: String = row.iter().map(|(_, value)| format!(", {value}")).collect();
        let insert = format!("INSERT INTO any_values VALUES ({id}, 0 {values})");
        judge
            .client
            .batch_execute(&insert)
            .await
            .unwrap_or_else(|error| panic!("{insert}: {error:?}"));
        println!("{id}: {row:?}");
    }
    live_and_die(&judge.client, "any_values", "any_values").await;
    judge
        .client
        .batch_execute("SET search_path = pg_catalog")
        .await
        .unwrap();
    judge.check_life(&config, kafka, "public", "any_values").await;
}

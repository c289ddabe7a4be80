//! The ledger says of each committed transaction what PostgreSQL's logical decoding says of it.

#![allow(clippy::unwrap_used, clippy::expect_used, clippy::panic)]

use std::collections::BTreeMap;

use meander_test_support::Postgres;
use meander_workload::load::{self, Load};
use tokio_postgres::Client;

/// Operations in order, by transaction.
type Transactions = BTreeMap<i64, String>;

async fn ledger(client: &Client) -> Transactions {
    let query = "SELECT transaction_id, string_agg(operation, '' ORDER BY change_index),
                        array_agg(change_index ORDER BY change_index)
                 FROM meander_ledger.entries GROUP BY 1";
    client
        .query(query, &[])
        .await
        .unwrap()
        .iter()
        .map(|row| {
            let operations: String = row.get(1);
            let indices: Vec<i64> = row.get(2);
            assert!(
                indices.into_iter().eq(0..operations.len() as i64),
                "indices are not 0, 1, 2, …"
            );
            (row.get(0), operations)
        })
        .collect()
}

async fn decoded(client: &Client) -> Transactions {
    let query = "SELECT xid::text::bigint, convert_from(substr(data, 1, 1), 'SQL_ASCII')
                 FROM pg_logical_slot_get_binary_changes('s', NULL, NULL, 'proto_version', '1', 'publication_names', 'p')";
    let mut transactions = Transactions::new();
    for row in client.query(query, &[]).await.unwrap() {
        let kind: &str = row.get(1);
        if "IUDT".contains(kind) {
            transactions.entry(row.get(0)).or_default().push_str(kind);
        }
    }
    transactions
}

async fn prepared(table: &str) -> (Postgres, Client) {
    let postgres = Postgres::start(&[]).await;
    let client = postgres.client().await;
    load::prepare(&client, table).await.unwrap();
    client
        .batch_execute(&format!("CREATE PUBLICATION p FOR TABLE {table}"))
        .await
        .unwrap();
    client
        .execute("SELECT pg_create_logical_replication_slot('s', 'pgoutput')", &[])
        .await
        .unwrap();
    (postgres, client)
}

#[tokio::test]
async fn a_load_is_noted_change_by_change() {
    let (postgres, client) = prepared("public.trades").await;
    let config = postgres.url().parse().unwrap();
    let load = Load {
        table: "public.trades".to_owned(),
        changes: 2000,
        rate: 0.0,
        seed: 7,
        clients: 3,
        key_changes: true,
    };

    let summary = load::run(&config, &load).await.unwrap();

    let noted = ledger(&client).await;
    assert!(
        noted == decoded(&client).await,
        "the ledger differs from what is decoded"
    );
    assert_eq!(noted.len() as u64, summary.transactions);
    assert_eq!(noted.values().map(String::len).sum::<usize>(), 2000);
    assert!(summary.from < summary.to);
    let row = client
        .query_one(
            "SELECT count(*) FILTER (WHERE old_key IS NOT NULL), count(*) FILTER (WHERE operation = 'D')
             FROM meander_ledger.entries",
            &[],
        )
        .await
        .unwrap();
    assert!(
        row.get::<_, i64>(0) > 0 && row.get::<_, i64>(1) > 0,
        "no key change or no delete: {row:?}"
    );
}

#[tokio::test]
async fn what_is_rolled_back_is_not_noted_and_takes_no_number() {
    let (_postgres, client) = prepared("public.\"Odd name\"").await;
    let insert = "INSERT INTO public.\"Odd name\" (trade_id, symbol, price, quantity, side, traded_at)
                  VALUES (gen_random_uuid(), 'a', 1, 1, 'buy', now())";
    client
        .batch_execute(&format!(
            "BEGIN; {insert}; ROLLBACK;
             BEGIN; {insert}; SAVEPOINT s; {insert}; {insert}; ROLLBACK TO s; {insert}; COMMIT;
             BEGIN; TRUNCATE public.\"Odd name\"; {insert}; COMMIT"
        ))
        .await
        .unwrap();

    let noted = ledger(&client).await;
    assert_eq!(noted, decoded(&client).await);
    assert_eq!(noted.into_values().collect::<Vec<_>>(), ["II", "TI"]);
}

/// The verifier computes the same from what arrives, so the form is a contract.
#[tokio::test]
async fn keys_and_digests_have_the_form_that_capture_publishes() {
    let (_postgres, client) = prepared("public.trades").await;
    client
        .batch_execute(
            r#"SET TimeZone = 'Asia/Tokyo'; SET DateStyle = 'German';
               CREATE TABLE t (a "char", k text, "time" timestamptz, b bytea, f float8, yes bool, PRIMARY KEY ("time", k));
               SELECT meander_ledger.watch('t');
               INSERT INTO t VALUES (NULL, E'"ü\n', '2026-11-21 07:00:00.123456+00', '\x00ff', 0.1, true);
               UPDATE t SET k = 'x'"#,
        )
        .await
        .unwrap();
    let rows = client
        .query(
            "SELECT key, old_key, digest = md5(concat_ws(chr(31), $1::text, $2::text, $3::text, $4::text, $5::text, $6::text))
             FROM meander_ledger.entries ORDER BY transaction_id",
            &[
                &"a",
                &"k=x",
                &"time=2026-11-21 07:00:00.123456+00",
                &r"b=\x00ff",
                &"f=0.1",
                &"yes=t",
            ],
        )
        .await
        .unwrap();
    let first = r#"{"k":"\"ü\n","time":"2026-11-21 07:00:00.123456+00"}"#;
    let second = r#"{"k":"x","time":"2026-11-21 07:00:00.123456+00"}"#;
    let found: Vec<(&str, Option<&str>, bool)> = rows.iter().map(|row| (row.get(0), row.get(1), row.get(2))).collect();
    assert_eq!(found, [(first, None, false), (second, Some(first), true)]);
}

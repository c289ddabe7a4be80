//! `kill -9` in mid-stream loses nothing, doubles nothing and reorders nothing.
//!
//! Judged by `tests/verifier`, which shares no code with the runtime: it compares what Kafka and Redis hold with the ledger that
//! triggers wrote into the database in the same transactions.
#![allow(clippy::unwrap_used, clippy::expect_used, clippy::panic)]

mod common;
#[path = "common/verifier.rs"]
mod verifier;

use common::LIMIT;
use meander_test_support::{Kafka, Postgres, Redis, Runtime, eventually};
use meander_workload::load::{self, Load};
use verifier::verify;

const CHANGES: u64 = 30_000;
const KILLS: u64 = 5;

#[tokio::test(flavor = "multi_thread")]
async fn five_kills_in_mid_stream_lose_and_double_nothing() {
    let (postgres, redis, kafka) = (Postgres::start(&[]).await, Redis::start().await, Kafka::shared().await);
    let database: tokio_postgres::Config = postgres.url().parse().unwrap();
    load::prepare(&load::connect(&database).await.unwrap(), "public.trades")
        .await
        .unwrap();
    let config = common::config(&postgres, kafka, Some(&redis));
    let mut runtime = Runtime::capture(&config);
    runtime.ready(LIMIT).await;

    let load = tokio::spawn({
        let load = Load {
            table: "public.trades".to_owned(),
            changes: CHANGES,
            rate: 3000.0,
            seed: 7,
            clients: 4,
            key_changes: true,
        };
        async move { load::run(&database, &load).await.unwrap() }
    });
    // Each kill comes while changes flow: after some of them are out since the last one, and before the load has ended.
    for kill in 1..=KILLS {
        runtime.ready(LIMIT).await;
        let mark = CHANGES * kill / (KILLS + 2);
        eventually("changes flow", LIMIT, async || {
            let published = common::checkpoint(&config).map_or(0, |checkpoint| checkpoint.events_total);
            if published >= mark {
                Ok(())
            } else {
                Err(format!("{published} of {mark}"))
            }
        })
        .await;
        runtime.kill9();
        runtime.start_again();
    }
    let made = load.await.unwrap();
    runtime.ready(LIMIT).await;

    let verified = verify(&postgres, kafka, &redis, &config, "60s");
    let said = String::from_utf8_lossy(&verified.stdout);
    assert!(
        verified.status.success(),
        "{said}\n{}",
        String::from_utf8_lossy(&verified.stderr)
    );
    println!("{said}");
    assert!(made.changes >= CHANGES);
    let checkpoint = common::checkpoint(&config).unwrap();
    assert_eq!(checkpoint.events_total, made.changes);
    assert!(checkpoint.owner_generation > KILLS, "each start is an owner of its own");

    // The verifier is no good if it always agrees.
    let stream = format!("{}.public.trades", config.kafka.topic_prefix);
    let mut connection = redis.connection().await;
    let first: Vec<(String, Vec<Vec<u8>>)> = redis::cmd("XRANGE")
        .arg(&stream)
        .arg(&["-", "+", "COUNT", "1"])
        .query_async(&mut connection)
        .await
        .unwrap();
    let _: i64 = redis::cmd("XDEL")
        .arg(&stream)
        .arg(&first[0].0)
        .query_async(&mut connection)
        .await
        .unwrap();
    let verified = verify(&postgres, kafka, &redis, &config, "1s");
    assert_eq!(
        verified.status.code(),
        Some(1),
        "{}",
        String::from_utf8_lossy(&verified.stdout)
    );
}

//! Two runtimes on one slot: one owner at a time, whatever the other one believes.
#![allow(clippy::unwrap_used, clippy::expect_used, clippy::panic)]

mod common;
#[path = "common/verifier.rs"]
mod verifier;

use std::time::Instant;

use common::LIMIT;
use meander_config::CaptureConfig;
use meander_test_support::{Kafka, Postgres, Redis, Runtime, Signal, eventually, free_address};
use meander_workload::load::{self, Load};
use verifier::verify;

const CHANGES: u64 = 40_000;

#[tokio::test(flavor = "multi_thread")]
async fn an_owner_that_was_stopped_and_goes_on_finds_another_and_neither_loses_nor_doubles() {
    let (postgres, redis, kafka) = (Postgres::start(&[]).await, Redis::start().await, Kafka::shared().await);
    let database: tokio_postgres::Config = postgres.url().parse().unwrap();
    load::prepare(&load::connect(&database).await.unwrap(), "public.trades")
        .await
        .unwrap();
    let config = CaptureConfig {
        standby: true,
        ..common::config(&postgres, kafka, Some(&redis))
    };
    // The first one is of an earlier spec, which leaves a table out.
    let client = postgres.client().await;
    client
        .batch_execute("CREATE TABLE late (id int PRIMARY KEY)")
        .await
        .unwrap();
    let mut earlier = config.clone();
    earlier.source.tables.exclude = vec!["public.late".to_owned()];
    let owns = async |runtime: &Runtime| {
        let (_, metrics) = runtime.get("/metrics").await.map_err(|error| error.to_string())?;
        Ok::<_, String>(metrics.lines().any(|line| line == "meander_capture_owns_slot 1"))
    };
    let mut first = Runtime::capture(&earlier);
    first.ready(LIMIT).await;
    let mut second = Runtime::capture(&CaptureConfig {
        admin_address: free_address(),
        ..config.clone()
    });
    // To stand by is its part.
    second.ready(LIMIT).await;
    assert!(owns(&first).await.unwrap() && !owns(&second).await.unwrap());
    let load = tokio::spawn({
        let load = Load {
            table: "public.trades".to_owned(),
            changes: CHANGES,
            rate: 1500.0,
            seed: 5,
            clients: 4,
            key_changes: true,
        };
        async move { load::run(&database, &load).await.unwrap() }
    });
    let published = || common::checkpoint(&config).map_or(0, |checkpoint| checkpoint.events_total);
    let flow = async |past: u64| {
        eventually("changes flow", LIMIT, async || match published() {
            published if published > past => Ok(()),
            published => Err(format!("{published} of {past}")),
        })
        .await;
    };
    flow(CHANGES / 20).await;

    first.process().signal(Signal::STOP);
    let stopped = Instant::now();
    let before = published();
    eventually("the second owns the slot", LIMIT, async || {
        match owns(&second).await? {
            true => Ok(()),
            false => Err("it stands by".to_owned()),
        }
    })
    .await;
    flow(before).await;
    common::wait_for_metric(&second, "meander_capture_tables ", |captured| captured == 2).await;
    println!(
        "the other one took over {:.1} s after the stop",
        stopped.elapsed().as_secs_f64()
    );
    assert!(!load.is_finished(), "the load ended before it could show anything");
    // What it had in hand when it was stopped it now tries to finish, under the eyes of the new owner.
    first.process().signal(Signal::CONT);
    eventually("the first finds the slot taken, and stands by", LIMIT, async || {
        let (ready, _) = first.get("/readyz").await.map_err(|error| error.to_string())?;
        match (owns(&first).await?, ready) {
            (false, 200) => Ok(()),
            state => Err(format!("{state:?}")),
        }
    })
    .await;
    load.await.unwrap();
    flow(CHANGES - 1).await;
    // Of the publication it has left its hands off: a table that comes back to it is noted.
    let untouched = "SELECT count(*) = 2 AND bool_and(obj_description(p.oid, 'pg_publication') IS NULL)
         FROM pg_publication p JOIN pg_publication_rel ON prpubid = p.oid";
    assert!(client.query_one(untouched, &[]).await.unwrap().get::<_, bool>(0));

    let verified = verify(&postgres, kafka, &redis, &config, "60s");
    let said = String::from_utf8_lossy(&verified.stdout);
    assert!(
        verified.status.success(),
        "{said}{}",
        String::from_utf8_lossy(&verified.stderr)
    );
    println!("{said}");
    let checkpoint = common::checkpoint(&config).unwrap();
    assert_eq!(checkpoint.events_total, CHANGES);
    assert_eq!(
        checkpoint.owner_generation, 2,
        "the two do not fence each other by turns"
    );
    assert!(owns(&second).await.unwrap() && !owns(&first).await.unwrap());
}

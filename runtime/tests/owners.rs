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
    let config = common::config(&postgres, kafka, Some(&redis));
    let mut first = Runtime::capture(&config);
    first.ready(LIMIT).await;
    let mut second = Runtime::capture(&CaptureConfig {
        admin_address: free_address(),
        ..config.clone()
    });
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
    second.ready(LIMIT).await;
    flow(before).await;
    println!(
        "the other one took over {:.1} s after the stop",
        stopped.elapsed().as_secs_f64()
    );
    assert!(!load.is_finished(), "the load ended before it could show anything");
    // What it had in hand when it was stopped it now tries to finish, under the eyes of the new owner.
    first.process().signal(Signal::CONT);
    eventually("the first finds the slot taken", LIMIT, async || {
        let (_, metrics) = first.get("/metrics").await.map_err(|error| error.to_string())?;
        if metrics.contains("meander_capture_failures_total{reason=\"SlotActive\"}") {
            Ok(())
        } else {
            Err(metrics)
        }
    })
    .await;
    load.await.unwrap();
    flow(CHANGES - 1).await;

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
    let ready = async |runtime: &Runtime| runtime.get("/readyz").await.unwrap().0 == 200;
    assert!(ready(&second).await && !ready(&first).await);
}

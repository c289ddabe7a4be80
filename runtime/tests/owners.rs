//! Two runtimes on one slot: one owner at a time, whatever the other one believes.
#![allow(clippy::unwrap_used, clippy::expect_used, clippy::panic)]

mod common;
#[path = "common/verifier.rs"]
mod verifier;

use std::time::Instant;

use common::LIMIT;
use meander_config::CaptureConfig;
use meander_test_support::{
    Kafka, Postgres, Redis, Runtime, Signal, eventually, free_address,
    relay::{Relay, Way},
};
use meander_workload::load::{self, Load};
use tokio::task::JoinHandle;
use verifier::verify;

const CHANGES: u64 = 40_000;

#[tokio::test(flavor = "multi_thread")]
async fn an_owner_that_was_stopped_and_goes_on_finds_another_and_neither_loses_nor_doubles() {
    let (postgres, redis, kafka) = (Postgres::start(&[]).await, Redis::start().await, Kafka::shared().await);
    prepare(&postgres).await;
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
    let (mut first, second) = owner_and_standby(&earlier, &config).await;
    let load = changes(&postgres, 1500.0);
    flow(&config, CHANGES / 20).await;

    first.process().signal(Signal::STOP);
    takes_over(&second, &config).await;
    common::wait_for_metric(&second, "meander_capture_tables ", |captured| captured == 2).await;
    assert!(!load.is_finished(), "the load ended before it could show anything");
    // What it had in hand when it was stopped it now tries to finish, under the eyes of the new owner.
    first.process().signal(Signal::CONT);
    stands_by(&first).await;
    load.await.unwrap();
    flow(&config, CHANGES - 1).await;
    // Of the publication it has left its hands off: a table that comes back to it is noted.
    let untouched = "SELECT count(*) = 2 AND bool_and(obj_description(p.oid, 'pg_publication') IS NULL)
         FROM pg_publication p JOIN pg_publication_rel ON prpubid = p.oid";
    assert!(client.query_one(untouched, &[]).await.unwrap().get::<_, bool>(0));
    nothing_is_lost_or_doubled(&postgres, kafka, &redis, &config, 2);
    assert!(owns(&second).await.unwrap() && !owns(&first).await.unwrap());
}

#[tokio::test(flavor = "multi_thread")]
async fn an_owner_without_kafka_is_not_taken_for_dead_and_one_without_a_network_is_and_neither_loses_nor_doubles() {
    let (mut postgres, redis) = (Postgres::start(&[]).await, Redis::start().await);
    let local = |port: u16| ([127, 0, 0, 1], port).into();
    let address = free_address();
    let kafka = Kafka::start_behind(address.port()).await;
    let to_kafka = Relay::to(address, local(kafka.second_port())).await;
    let to_postgres = Relay::to(free_address(), local(postgres.port())).await;
    let to_redis = Relay::to(free_address(), local(redis.port())).await;
    prepare(&postgres).await;
    let config = CaptureConfig {
        standby: true,
        ..common::config(&postgres, &kafka, Some(&redis))
    };
    let mut behind_kafka = config.clone();
    behind_kafka.kafka.bootstrap_servers = vec![address.to_string()];
    let mut behind_network = config.clone();
    behind_network.source.port = to_postgres.port();
    let folder = tempfile::tempdir().unwrap();
    if let Some(sink) = &mut behind_network.redis {
        sink.url_file = folder.path().join("redis");
        std::fs::write(&sink.url_file, format!("redis://127.0.0.1:{}/0", to_redis.port())).unwrap();
    }
    let (first, second) = owner_and_standby(&behind_kafka, &behind_network).await;
    let load = changes(&postgres, 350.0);
    flow(&config, CHANGES / 20).await;
    let log = postgres.process().log().to_owned();
    let timed_out = || {
        let log = std::fs::read_to_string(&log).unwrap();
        log.contains("terminating walsender process due to replication timeout")
    };

    // It can do nothing with what it reads until it gives up, which takes it several times as long as PostgreSQL waits for one that is silent.
    to_kafka.set(Way::Silent);
    takes_over(&second, &config).await;
    assert!(!timed_out(), "it gave the slot up by itself");
    to_kafka.set(Way::Open);
    stands_by(&first).await;

    let ways = [&to_postgres, &to_redis];
    ways.iter().for_each(|way| way.set(Way::Silent));
    takes_over(&first, &config).await;
    assert!(timed_out());
    assert!(!load.is_finished(), "the load ended before it could show anything");
    // What it sent meanwhile arrives now.
    ways.iter().for_each(|way| way.set(Way::Open));
    stands_by(&second).await;
    load.await.unwrap();
    flow(&config, CHANGES - 1).await;
    nothing_is_lost_or_doubled(&postgres, &kafka, &redis, &config, 3);
    assert!(owns(&first).await.unwrap() && !owns(&second).await.unwrap());
}

async fn prepare(postgres: &Postgres) {
    load::prepare(&postgres.client().await, "public.trades").await.unwrap();
}

/// Changes, so many a second at the most.
fn changes(postgres: &Postgres, rate: f64) -> JoinHandle<()> {
    let database: tokio_postgres::Config = postgres.url().parse().unwrap();
    tokio::spawn(async move {
        let load = Load {
            table: "public.trades".to_owned(),
            changes: CHANGES,
            rate,
            seed: 5,
            clients: 4,
            key_changes: true,
        };
        load::run(&database, &load).await.unwrap();
    })
}

/// The first owns the slot, and the second one stands by.
async fn owner_and_standby(first: &CaptureConfig, second: &CaptureConfig) -> (Runtime, Runtime) {
    let mut first = Runtime::capture(first);
    first.ready(LIMIT).await;
    let mut second = Runtime::capture(&CaptureConfig {
        admin_address: free_address(),
        ..second.clone()
    });
    // To stand by is its part.
    second.ready(LIMIT).await;
    assert!(owns(&first).await.unwrap() && !owns(&second).await.unwrap());
    (first, second)
}

async fn owns(runtime: &Runtime) -> Result<bool, String> {
    let (_, metrics) = runtime.get("/metrics").await.map_err(|error| error.to_string())?;
    Ok(metrics.lines().any(|line| line == "meander_capture_owns_slot 1"))
}

/// Waits until it owns the slot, and changes flow.
async fn takes_over(second: &Runtime, config: &CaptureConfig) {
    let (since, before) = (Instant::now(), published(config));
    eventually("the second owns the slot", LIMIT, async || match owns(second).await? {
        true => Ok(()),
        false => Err("it stands by".to_owned()),
    })
    .await;
    flow(config, before).await;
    println!("changes flow again after {:.1} s", since.elapsed().as_secs_f64());
}

async fn stands_by(first: &Runtime) {
    eventually("the first finds the slot taken, and stands by", LIMIT, async || {
        let (ready, _) = first.get("/readyz").await.map_err(|error| error.to_string())?;
        match (owns(first).await?, ready) {
            (false, 200) => Ok(()),
            state => Err(format!("{state:?}")),
        }
    })
    .await;
}

fn published(config: &CaptureConfig) -> u64 {
    common::checkpoint(config).map_or(0, |checkpoint| checkpoint.events_total)
}

async fn flow(config: &CaptureConfig, past: u64) {
    eventually("changes flow", LIMIT, async || match published(config) {
        published if published > past => Ok(()),
        published => Err(format!("{published} of {past}")),
    })
    .await;
}

fn nothing_is_lost_or_doubled(postgres: &Postgres, kafka: &Kafka, redis: &Redis, config: &CaptureConfig, owners: u64) {
    let verified = verify(postgres, kafka, redis, config, "60s");
    let said = String::from_utf8_lossy(&verified.stdout);
    assert!(
        verified.status.success(),
        "{said}{}",
        String::from_utf8_lossy(&verified.stderr)
    );
    println!("{said}");
    let checkpoint = common::checkpoint(config).unwrap();
    assert_eq!(checkpoint.events_total, CHANGES);
    assert_eq!(
        checkpoint.owner_generation, owners,
        "the two do not fence each other by turns"
    );
}

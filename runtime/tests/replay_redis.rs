//! Replays into streams of a real Redis.
#![allow(clippy::unwrap_used, clippy::expect_used, clippy::panic)]

mod common;
#[path = "common/replay.rs"]
mod replaying;

use std::{collections::HashMap, fs};

use common::LIMIT;
use meander_config::{CaptureConfig, Format, RedisStreams, ReplayConfig, ReplayTarget, Speed};
use meander_runtime::replay::{
    End,
    target::{
        Resumable as _,
        redis::{Redis as Target, Settings, replay_mark_key},
    },
};
use meander_test_support::{Kafka, Redis, Runtime, eventually, free_address, unique_name};
use redis::streams::StreamRangeReply;
use replaying::{everything, recorded, replay};

const KILLS: u64 = 3;
const TABLES: [&str; 3] = ["public.trades", "public.orders", "public.last"];

/// The entries of a stream: id, and fields as text.
async fn read(redis: &Redis, stream: &str) -> Vec<(String, HashMap<String, Vec<u8>>)> {
    let mut connection = redis.connection().await;
    let mut found: Vec<(String, HashMap<String, Vec<u8>>)> = Vec::new();
    loop {
        // In pages: a connection waits half a second for an answer.
        let after = found.last().map_or("-".to_owned(), |(id, _)| format!("({id}"));
        let mut page = redis::cmd("XRANGE");
        page.arg(stream).arg(after).arg("+").arg("COUNT").arg(200);
        let page: StreamRangeReply = page.query_async(&mut connection).await.unwrap();
        if page.ids.is_empty() {
            return found;
        }
        found.extend(page.ids.into_iter().map(|entry| {
            let bytes = |value: &redis::Value| redis::from_redis_value_ref(value).unwrap();
            let fields = entry.map.iter().map(|(name, value)| (name.clone(), bytes(value)));
            (entry.id, fields.collect())
        }));
    }
}

async fn ask<T: redis::FromRedisValue>(redis: &Redis, command: &str) -> T {
    let words: Vec<&str> = command.split(' ').collect();
    let mut connection = redis.connection().await;
    redis::cmd(words[0])
        .arg(&words[1..])
        .query_async(&mut connection)
        .await
        .unwrap()
}

fn into_streams(pipeline: &CaptureConfig, redis: &Redis, prefix: &str) -> ReplayConfig {
    let streams = RedisStreams {
        url_file: redis.url_file(),
        ca_file: None,
        stream_prefix: prefix.to_owned(),
    };
    everything(pipeline, ReplayTarget::Redis(streams))
}

fn job(config: &ReplayConfig) -> String {
    format!("{}/{}/{}", config.job.namespace, config.job.name, config.job.uid)
}

/// How many records the replay has delivered, by its own account.
async fn delivered(redis: &Redis, config: &ReplayConfig, prefix: &str) -> Option<u64> {
    let mark = replay_mark_key(prefix, &job(config));
    let reached: Option<String> = ask(redis, &format!("HGET {mark} reached")).await;
    let reached: serde_json::Value = serde_json::from_str(&reached?).unwrap();
    reached["done"]["delivered"].as_u64()
}

#[tokio::test(flavor = "multi_thread")]
async fn a_replay_into_redis_is_the_streams_again_each_entry_once_through_kills_of_both_and_a_second_process() {
    let (kafka, mut redis) = (Kafka::shared().await, Redis::start_with(&["--appendonly", "yes"]).await);
    // It has headers, which are fields of the entries.
    let format = Format::DebeziumJson {
        schemas: false,
        transaction_metadata: false,
    };
    let (pipeline, records) = recorded(kafka, Some(&redis), format).await;
    let prefix = unique_name("copy");
    let mut config = into_streams(&pipeline, &redis, &prefix);
    config.speed = Speed::Factor(0.5);
    let wait_for = async |redis: &Redis, config: &ReplayConfig, records: u64| {
        eventually("records flow", LIMIT, async || {
            match delivered(redis, config, &prefix).await {
                Some(delivered) if delivered >= records => Ok(()),
                delivered => Err(format!("{delivered:?} of {records}")),
            }
        })
        .await;
    };
    let mut runtime = Runtime::replay(&config);
    for kill in 1..=KILLS {
        wait_for(&redis, &config, records * kill / (KILLS + 4)).await;
        runtime.kill9();
        let delivered = delivered(&redis, &config, &prefix).await.unwrap();
        println!("kill {kill} after {delivered} of {records} records");
        assert!(delivered < records, "the replay was over before it could be killed");
        runtime.start_again();
    }
    // A server that goes away is waited for.
    wait_for(&redis, &config, records * (KILLS + 1) / (KILLS + 4)).await;
    redis.restart().await;
    // Another process of the same replay goes on with it, and the one before stops.
    wait_for(&redis, &config, records * (KILLS + 2) / (KILLS + 4)).await;
    config.admin_address = free_address();
    let mut second = Runtime::replay(&config);
    assert!(!runtime.process().wait(LIMIT).success());
    let log = runtime.process().log_tail();
    assert!(log.contains("another process goes on with this replay"), "{log}");
    let status = second.process().wait(LIMIT);
    assert!(status.success(), "{}", second.process().log_tail());
    assert_eq!(delivered(&redis, &config, &prefix).await, Some(records));

    let live = &pipeline.kafka.topic_prefix;
    let (mut attempts, mut headers, mut offsets) = (0, 0, HashMap::<(String, String), i64>::new());
    for table in TABLES {
        let (there, here) = (
            read(&redis, &format!("{live}.{table}")).await,
            read(&redis, &format!("{prefix}.{table}")).await,
        );
        println!("{table}: {} entries", there.len());
        assert_eq!(here.len(), there.len(), "{table}");
        for (there, mut here) in there.into_iter().zip(here) {
            let mut mark =
                |name: &str| String::from_utf8(here.1.remove(&format!("meander-replay-{name}")).unwrap()).unwrap();
            assert_eq!(mark("job"), job(&config));
            attempts = attempts.max(mark("attempt").parse().unwrap());
            let (topic, partition, offset) = (mark("topic"), mark("partition"), mark("offset").parse().unwrap());
            assert_eq!(topic, format!("{live}.{table}"));
            let before = offsets.insert((topic, partition), offset);
            assert!(before < Some(offset), "{before:?} {offset}");
            headers += usize::from(here.1.contains_key("__DEBEZIUM.NEWKEY"));
            assert_eq!(here, there, "{table}");
        }
    }
    assert!(headers > 0);
    assert!(attempts >= KILLS + 2, "{attempts}");
    // One that is over has nothing more to do.
    assert_eq!(replay(&config).await.unwrap(), End::Complete);
    assert_eq!(delivered(&redis, &config, &prefix).await, Some(records));
}

#[tokio::test(flavor = "multi_thread")]
async fn streams_that_are_somebody_elses_are_never_written() {
    let (kafka, redis) = (Kafka::shared().await, Redis::start().await);
    let (pipeline, records) = recorded(kafka, Some(&redis), Format::Protobuf).await;
    let live = &pipeline.kafka.topic_prefix;
    let refused = async |config: &ReplayConfig| {
        let error = replay(config).await.unwrap_err();
        println!("{}: {error}", error.reason());
        assert!(error.is_permanent(), "{error}");
        (error.reason(), error.to_string())
    };
    for prefix in [live.clone(), format!("{live}.copy")] {
        let (reason, message) = refused(&into_streams(&pipeline, &redis, &prefix)).await;
        assert_eq!(reason, "StreamPrefixTaken");
        assert!(
            message.contains(&format!("pipeline test/{live}/{live} publishes under {live:?}")),
            "{message}"
        );
    }
    let prefix = unique_name("copy");
    let config = into_streams(&pipeline, &redis, &prefix);
    let _: String = ask(&redis, "CONFIG SET maxmemory-policy allkeys-lru").await;
    assert_eq!(refused(&config).await.0, "RedisEvicts");
    let _: String = ask(&redis, "CONFIG SET maxmemory-policy noeviction").await;
    let _: String = ask(&redis, &format!("XADD {prefix}.public.last 1-1 of somebody")).await;
    let (reason, message) = refused(&config).await;
    assert_eq!(reason, "StreamExists");
    let (_, remedy) = message.rsplit_once("delete it: ").unwrap();
    let _: u64 = ask(&redis, remedy).await;
    assert_eq!(replay(&config).await.unwrap(), End::Complete);
    assert_eq!(delivered(&redis, &config, &prefix).await, Some(records));

    let file = redis.url_file().with_file_name("nowhere");
    fs::write(&file, format!("redis://{}/0", free_address())).unwrap();
    let settings = Settings {
        streams: RedisStreams {
            url_file: file,
            ca_file: None,
            stream_prefix: prefix,
        },
        log_prefix: live.clone(),
    };
    let error = Target::open(&settings, &config.job).await.err().unwrap();
    assert!(error.is_passing(), "{error}");
}

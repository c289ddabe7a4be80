//! Replays into topics of a real Kafka.
#![allow(clippy::unwrap_used, clippy::expect_used, clippy::panic)]

mod common;
#[path = "common/replay.rs"]
mod replaying;

use std::collections::BTreeMap;

use common::{LIMIT, cluster};
use meander_config::{CaptureConfig, Format, KafkaSink, ReplayConfig, ReplayTarget, Speed};
use meander_runtime::{
    checkpoint::Tail,
    log::replay_topic,
    replay::{
        End,
        error::ReplayError,
        target::{Resumable as _, kafka},
    },
};
use meander_test_support::{Kafka, Runtime, eventually, free_address, unique_name};
use rdkafka::{
    Message as _,
    admin::{AdminClient, AdminOptions, NewTopic, TopicReplication},
    client::DefaultClientContext,
    message::Headers as _,
};
use replaying::{everything, recorded, replay};

const KILLS: u64 = 3;

/// A record without its place.
#[derive(Clone, Debug, PartialEq, Eq)]
struct Found {
    key: Option<Vec<u8>>,
    value: Option<Vec<u8>>,
    timestamp: Option<i64>,
    headers: BTreeMap<String, String>,
}

/// Everything that a `read_committed` consumer sees of a topic, by partition, with the offsets.
fn read(kafka: &Kafka, topic: &str) -> BTreeMap<i32, Vec<(i64, Found)>> {
    let mut found: BTreeMap<i32, Vec<(i64, Found)>> = BTreeMap::new();
    kafka.read(
        |name| name == topic,
        |message| {
            let text = |value: Option<&[u8]>| String::from_utf8(value.unwrap().to_vec()).unwrap();
            let headers = message.headers().into_iter().flat_map(|headers| headers.iter());
            let record = Found {
                key: message.key().map(<[u8]>::to_vec),
                value: message.payload().map(<[u8]>::to_vec),
                timestamp: message.timestamp().to_millis(),
                headers: headers
                    .map(|header| (header.key.to_owned(), text(header.value)))
                    .collect(),
            };
            found
                .entry(message.partition())
                .or_default()
                .push((message.offset(), record));
        },
    );
    found
}

/// A replay of the pipeline into topics under this prefix.
fn into_topics(pipeline: &CaptureConfig, prefix: &str, partitions: i32) -> ReplayConfig {
    let target = KafkaSink {
        topic_prefix: prefix.to_owned(),
        partitions,
        ..pipeline.kafka.clone()
    };
    everything(pipeline, ReplayTarget::Kafka(target))
}

/// How many records the replay has delivered, by its own account.
fn delivered(kafka: &Kafka, config: &ReplayConfig) -> Option<u64> {
    let topic = replay_topic(&config.job.namespace, &config.job.name);
    let key = format!("{}/{}/{}", config.job.namespace, config.job.name, config.job.uid);
    tokio::task::block_in_place(|| {
        let tail = Tail::new(&cluster(kafka), LIMIT).unwrap();
        let place = tail
            .find_last(&topic, 0, |record| record.key() == Some(key.as_bytes()))
            .ok()??;
        let place: serde_json::Value = serde_json::from_slice(place.payload()?).unwrap();
        place["done"]["delivered"].as_u64()
    })
}

async fn wait_for(kafka: &Kafka, config: &ReplayConfig, records: u64) {
    eventually("records flow", LIMIT, async || match delivered(kafka, config) {
        Some(delivered) if delivered >= records => Ok(()),
        delivered => Err(format!("{delivered:?} of {records}")),
    })
    .await;
}

#[tokio::test(flavor = "multi_thread")]
async fn a_replay_into_kafka_is_the_log_again_each_record_once_through_three_kills_and_a_second_process() {
    let kafka = Kafka::shared().await;
    // It has tombstones and headers of its own.
    let (pipeline, records) = recorded(
        kafka,
        None,
        Format::DebeziumJson {
            schemas: true,
            transaction_metadata: true,
        },
    )
    .await;
    let prefix = unique_name("copy");
    let mut config = into_topics(&pipeline, &prefix, 3);
    config.speed = Speed::Factor(0.5);
    let mut runtime = Runtime::replay(&config);
    let mut known = 0;
    for kill in 1..=KILLS {
        // Each attempt has delivered something before it is killed, so that it shows.
        wait_for(kafka, &config, (known + 1).max(records * kill / (KILLS + 3))).await;
        runtime.kill9();
        let delivered = delivered(kafka, &config).unwrap();
        known = delivered;
        println!("kill {kill} after {delivered} of {records} records");
        assert!(delivered < records, "the replay was over before it could be killed");
        runtime.start_again();
    }
    // Of two processes of the same replay one goes on with it, and the other stops: the second, but where the first was just about to sign on again.
    wait_for(kafka, &config, (known + 1).max(records * (KILLS + 1) / (KILLS + 3))).await;
    config.admin_address = free_address();
    let mut second = Runtime::replay(&config);
    let outcomes = [&mut runtime, &mut second].map(|runtime| {
        let process = runtime.process();
        (process.wait(LIMIT).success(), process.log_tail())
    });
    let stopped: Vec<&String> = outcomes.iter().filter(|(over, _)| !over).map(|(_, log)| log).collect();
    assert_eq!(stopped.len(), 1, "{outcomes:?}");
    assert!(
        stopped[0].contains("another process goes on with this replay"),
        "{outcomes:?}"
    );
    assert_eq!(delivered(kafka, &config), Some(records));

    let mut attempts = 0;
    for table in ["public.trades", "public.orders", "public.last", "transaction"] {
        let (topic, copied) = (
            format!("{}.{table}", pipeline.kafka.topic_prefix),
            format!("{prefix}.{table}"),
        );
        kafka.settle(&copied, LIMIT).await;
        let (log, copy) = (read(kafka, &topic), read(kafka, &copied));
        assert!(log.keys().eq(copy.keys()), "{table}: {log:?} {copy:?}");
        for (partition, log) in log {
            let copy = &copy[&partition];
            println!("{table}/{partition}: {} records", log.len());
            let is_missing = |(offset, _): &&(i64, Found)| {
                !copy
                    .iter()
                    .any(|(_, here)| here.headers["meander-replay-offset"] == offset.to_string())
            };
            let missing: Vec<i64> = log.iter().filter(is_missing).map(|(offset, _)| *offset).collect();
            assert_eq!(missing, [0; 0], "{table}, partition {partition}");
            assert_eq!(copy.len(), log.len(), "{table}, partition {partition}");
            for ((offset, there), (_, here)) in log.iter().zip(copy) {
                let mut here = here.clone();
                let mut mark = |name: &str| here.headers.remove(&format!("meander-replay-{name}")).unwrap();
                assert_eq!(mark("job"), format!("test/{}/42", config.job.name));
                attempts = attempts.max(mark("attempt").parse().unwrap());
                assert_eq!(
                    (mark("topic"), mark("partition")),
                    (topic.clone(), partition.to_string())
                );
                assert_eq!(mark("offset"), offset.to_string());
                assert_eq!(&here, there, "{table}, offset {offset} of partition {partition}");
            }
        }
    }
    assert!(attempts >= KILLS + 2, "{attempts}");
    // One that is over has nothing more to do.
    assert_eq!(replay(&config).await.unwrap(), End::Complete);
    assert_eq!(delivered(kafka, &config), Some(records));
}

#[tokio::test(flavor = "multi_thread")]
async fn topics_that_do_not_fit_or_are_a_pipelines_are_refused_and_what_was_replayed_is_no_history() {
    let kafka = Kafka::shared().await;
    let (pipeline, _) = recorded(kafka, None, Format::Protobuf).await;
    let live = &pipeline.kafka.topic_prefix;
    let refused = async |config: &ReplayConfig| {
        let error = replay(config).await.unwrap_err();
        println!("{}: {error}", error.reason());
        assert!(error.is_permanent(), "{error}");
        (error.reason(), error.to_string())
    };
    for prefix in [live.clone(), format!("{live}.copy")] {
        let (reason, message) = refused(&into_topics(&pipeline, &prefix, 3)).await;
        assert_eq!(reason, "TopicPrefixTaken");
        assert!(message.contains(&format!("pipeline test/{live}/{live}")), "{message}");
    }
    let prefix = unique_name("copy");
    let admin: AdminClient<DefaultClientContext> = kafka.client_config().create().unwrap();
    let compacted = format!("{prefix}.public.orders");
    let topic = NewTopic::new(&compacted, 3, TopicReplication::Fixed(1)).set("cleanup.policy", "compact");
    admin.create_topics([&topic], &AdminOptions::new()).await.unwrap();
    let (reason, message) = refused(&into_topics(&pipeline, &prefix, 3)).await;
    assert_eq!(reason, "TopicNotUsable");
    assert!(
        message.contains("cleanup.policy=compact") && message.contains("kafka-configs.sh"),
        "{message}"
    );
    let nowhere = KafkaSink {
        bootstrap_servers: vec![free_address().to_string()],
        ..pipeline.kafka.clone()
    };
    let settings = kafka::Settings {
        cluster: nowhere,
        log_prefix: live.clone(),
    };
    let error = kafka::Kafka::open(&settings, &pipeline.pipeline).await.err().unwrap();
    assert!(
        error.is_passing() && error.to_string().contains("target.kafka.bootstrapServers"),
        "{error}"
    );

    // In fewer partitions the order of each key stays.
    let prefix = unique_name("copy");
    let config = into_topics(&pipeline, &prefix, 2);
    assert_eq!(replay(&config).await.unwrap(), End::Complete);
    let by_key = |topic: &str| {
        let mut positions: BTreeMap<Option<Vec<u8>>, Vec<String>> = BTreeMap::new();
        for (_, record) in read(kafka, topic).into_values().flatten() {
            let position = record.headers["meander-position"].clone();
            positions.entry(record.key).or_default().push(position);
        }
        positions
    };
    assert_eq!(
        by_key(&format!("{prefix}.public.trades")),
        by_key(&format!("{live}.public.trades"))
    );

    // Whoever took the copy for a log is told whose it is.
    let mut again = into_topics(&pipeline, &unique_name("copy"), 3);
    again.kafka.topic_prefix = prefix;
    let error = replay(&again).await.unwrap_err();
    let ReplayError::ForeignRecord { .. } = &error else {
        panic!("{error}")
    };
    assert!(
        error
            .to_string()
            .contains(&format!("the replay test/{}/42 wrote it", config.job.name)),
        "{error}"
    );
}

//! Transactions that Kafka says are over, and that it has left open in partitions that had no leader.
#![allow(clippy::unwrap_used, clippy::expect_used, clippy::panic)]

mod common;

use std::{
    ops::Range,
    time::{Duration, Instant},
};

use common::config;
use meander_config::KafkaCluster;
use meander_runtime::{
    checkpoint::Tail,
    log::{POSITION_HEADER, checkpoint_key},
    sink::{left_open, partition::ByRow, producer::TransactionalProducer, topics::Remarks},
};
use meander_test_support::{Brokers, Postgres, Runtime, eventually, read_topics};
use rdkafka::{
    Message as _,
    admin::{AdminClient, AdminOptions, NewTopic, TopicReplication},
    client::DefaultClientContext,
    message::{BorrowedMessage, Header, OwnedHeaders},
    producer::BaseRecord,
};

const LIMIT: Duration = Duration::from_secs(60);
/// The broker that dies, by its place and by its id.
const BROKER: usize = 2;
const ID: i32 = 3;
/// A topic that only it has.
const TOPIC: &str = "t";
/// In this partition the checkpoint does not tell of what was left open, and it is written again.
const VOID: i32 = 0;
/// In this one it does, and what is written goes on after it.
const KEPT: i32 = 1;
const RECORDS: i32 = 20;

#[tokio::test(flavor = "multi_thread")]
async fn what_a_transaction_left_open_where_there_was_no_leader_is_aborted_unless_the_checkpoint_tells_of_it() {
    let mut brokers = Brokers::start().await;
    only_on_one(&brokers, TOPIC, 2).await;
    let cluster = KafkaCluster {
        bootstrap_servers: brokers.bootstrap_servers(),
        tls: None,
        sasl: None,
    };
    let everything = Tail::of_everything(&cluster, LIMIT).unwrap();
    let producer = open(&cluster, "left-open");
    producer.begin().unwrap();
    write(&producer, VOID, 0..RECORDS);
    write(&producer, KEPT, 0..RECORDS);
    holds(&everything, TOPIC, i64::from(RECORDS)).await;
    brokers.kill9(BROKER);
    drop(producer);
    // It aborts what the one before has begun. Kafka says that it has, and the partitions cannot know.
    drop(open(&cluster, "left-open"));
    brokers.start_again(BROKER).await;

    let producer = open(&cluster, "left-open");
    tokio::task::block_in_place(|| {
        let committed = Tail::new(&cluster, LIMIT).unwrap();
        left_open::abort(
            &cluster,
            &producer,
            &committed,
            |name| name == TOPIC,
            |record| record.partition() == VOID,
        )
        .unwrap();
    });
    let deadline = producer.begin().unwrap();
    write(&producer, VOID, 0..RECORDS);
    write(&producer, KEPT, RECORDS..2 * RECORDS);
    producer.commit(deadline).unwrap();

    let mut found = [Vec::new(), Vec::new()];
    let client = brokers.client_config();
    tokio::task::block_in_place(|| {
        read_topics(
            &client,
            |name| name == TOPIC,
            |record| {
                let number: i32 = String::from_utf8_lossy(record.payload().unwrap()).parse().unwrap();
                found[record.partition() as usize].push(number);
            },
        );
    });
    assert_eq!(found, [(0..RECORDS).collect::<Vec<_>>(), (0..2 * RECORDS).collect()]);
}

#[tokio::test(flavor = "multi_thread")]
async fn a_capture_aborts_what_its_predecessor_left_open_past_the_checkpoint() {
    let (postgres, mut brokers) = tokio::join!(Postgres::start(&[]), Brokers::start());
    let client = postgres.client().await;
    client
        .batch_execute("CREATE TABLE t (id bigint PRIMARY KEY)")
        .await
        .unwrap();
    let mut pipeline = config(&postgres, brokers.broker(0), None);
    pipeline.kafka.bootstrap_servers = brokers.bootstrap_servers();
    pipeline.kafka.partitions = 1;
    let topic = format!("{}.public.t", pipeline.kafka.topic_prefix);
    only_on_one(&brokers, &topic, 1).await;
    let cluster = pipeline.kafka.cluster();
    let (namespace, name) = (&pipeline.pipeline.namespace, &pipeline.pipeline.name);
    let id = checkpoint_key(namespace, name, &pipeline.source.slot_name);
    let mut capture = Runtime::capture(&pipeline);
    capture.ready(LIMIT).await;
    client.batch_execute("INSERT INTO t VALUES (1)").await.unwrap();
    let everything = Tail::of_everything(&cluster, LIMIT).unwrap();
    // The record, and the marker of its transaction.
    holds(&everything, &topic, 2).await;
    capture.terminate(LIMIT);

    let producer = open(&cluster, &id);
    let deadline = producer.begin().unwrap();
    let past = Header {
        key: POSITION_HEADER,
        value: Some("1:FF/0:0"),
    };
    let record = BaseRecord::to(&topic).partition(0).key(&b"left"[..]);
    let record = record.payload(&b"left"[..]).headers(OwnedHeaders::new().insert(past));
    producer.send(record, deadline).unwrap();
    holds(&everything, &topic, 3).await;
    brokers.kill9(BROKER);
    drop(producer);
    drop(open(&cluster, &id));
    brokers.start_again(BROKER).await;

    let mut capture = Runtime::capture(&pipeline);
    capture.ready(LIMIT).await;
    client.batch_execute("INSERT INTO t VALUES (2)").await.unwrap();
    let client = brokers.client_config();
    let keys = eventually("both rows are there", LIMIT, async || {
        let mut keys = Vec::new();
        let take =
            |record: &BorrowedMessage<'_>| keys.push(String::from_utf8_lossy(record.key().unwrap()).into_owned());
        tokio::task::block_in_place(|| read_topics(&client, |name| name == topic, take));
        let is_there = keys.iter().any(|key| key.contains('2'));
        if is_there { Ok(keys) } else { Err(format!("{keys:?}")) }
    })
    .await;
    assert!(!keys.iter().any(|key| key == "left"), "{keys:?}");
}

/// Makes a topic that one broker has alone.
async fn only_on_one(brokers: &Brokers, topic: &str, partitions: usize) {
    let admin: AdminClient<DefaultClientContext> = brokers.client_config().create().unwrap();
    let only = vec![&[ID][..]; partitions];
    let replication = TopicReplication::Variable(&only);
    let topic = NewTopic::new(topic, i32::try_from(partitions).unwrap(), replication).set("min.insync.replicas", "1");
    for made in admin.create_topics([&topic], &AdminOptions::new()).await.unwrap() {
        made.unwrap();
    }
}

/// Waits until so much is in each partition of the topic, whatever becomes of it.
async fn holds(everything: &Tail, topic: &str, least: i64) {
    eventually(
        "everything is written",
        LIMIT,
        async || match tokio::task::block_in_place(|| everything.ends(|name| name == topic)) {
            Ok(ends) if !ends.is_empty() && ends.values().all(|end| *end >= least) => Ok(()),
            other => Err(format!("{other:?}")),
        },
    )
    .await;
}

fn open(cluster: &KafkaCluster, id: &str) -> TransactionalProducer {
    let partitioner = ByRow {
        schemas: false,
        partitions: 2,
        remarks: Remarks::default(),
    };
    tokio::task::block_in_place(|| TransactionalProducer::open(cluster, id, partitioner).unwrap())
}

fn write(producer: &TransactionalProducer, partition: i32, numbers: Range<i32>) {
    for number in numbers {
        let value = number.to_string();
        let record = BaseRecord::to(TOPIC).partition(partition).key(&b"k"[..]);
        let deadline = Instant::now() + LIMIT;
        producer.send(record.payload(value.as_bytes()), deadline).unwrap();
    }
}

//! Transactions that Kafka says are over, and that it has left open in partitions that had no leader.
#![allow(clippy::unwrap_used, clippy::expect_used, clippy::panic)]

use std::{
    ops::Range,
    time::{Duration, Instant},
};

use meander_config::KafkaCluster;
use meander_runtime::{
    checkpoint::Tail,
    sink::{left_open, partition::ByRow, producer::TransactionalProducer, topics::Remarks},
};
use meander_test_support::{Brokers, eventually, read_topics};
use rdkafka::{
    Message as _,
    admin::{AdminClient, AdminOptions, NewTopic, TopicReplication},
    client::DefaultClientContext,
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
    let admin: AdminClient<DefaultClientContext> = brokers.client_config().create().unwrap();
    let only: &[&[i32]] = &[&[ID], &[ID]];
    let topic = NewTopic::new(TOPIC, 2, TopicReplication::Variable(only)).set("min.insync.replicas", "1");
    for made in admin.create_topics([&topic], &AdminOptions::new()).await.unwrap() {
        made.unwrap();
    }
    let cluster = KafkaCluster {
        bootstrap_servers: brokers.bootstrap_servers(),
        tls: None,
        sasl: None,
    };
    let everything = Tail::of_everything(&cluster, LIMIT).unwrap();
    let producer = open(&cluster);
    producer.begin().unwrap();
    write(&producer, VOID, 0..RECORDS);
    write(&producer, KEPT, 0..RECORDS);
    eventually(
        "everything is written",
        LIMIT,
        async || match tokio::task::block_in_place(|| everything.ends(|name| name == TOPIC)) {
            Ok(ends) if ends.len() == 2 && ends.values().all(|end| *end == i64::from(RECORDS)) => Ok(()),
            other => Err(format!("{other:?}")),
        },
    )
    .await;
    brokers.kill9(BROKER);
    drop(producer);
    // It aborts what the one before has begun. Kafka says that it has, and the partitions cannot know.
    drop(open(&cluster));
    brokers.start_again(BROKER).await;

    let producer = open(&cluster);
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

fn open(cluster: &KafkaCluster) -> TransactionalProducer {
    let partitioner = ByRow {
        schemas: false,
        partitions: 2,
        remarks: Remarks::default(),
    };
    tokio::task::block_in_place(|| TransactionalProducer::open(cluster, "left-open", partitioner).unwrap())
}

fn write(producer: &TransactionalProducer, partition: i32, numbers: Range<i32>) {
    for number in numbers {
        let value = number.to_string();
        let record = BaseRecord::to(TOPIC).partition(partition).key(&b"k"[..]);
        let deadline = Instant::now() + LIMIT;
        producer.send(record.payload(value.as_bytes()), deadline).unwrap();
    }
}

//! The services start, work, come back, and end with the test.

#![allow(clippy::unwrap_used, clippy::expect_used, clippy::panic)]

use std::{
    env,
    io::{BufRead as _, BufReader},
    net::TcpStream,
    path::Path,
    process::{Command, Stdio},
    time::Duration,
};

use meander_test_support::{Kafka, Postgres, Redis, eventually, unique_name};
use rdkafka::{
    ClientConfig, Message as _, Offset, TopicPartitionList,
    admin::{AdminClient, AdminOptions, NewTopic, TopicReplication},
    consumer::{BaseConsumer, Consumer as _},
    producer::{BaseRecord, DefaultProducerContext, Producer as _, ThreadedProducer},
};
use redis::AsyncCommands as _;

const LIMIT: Duration = Duration::from_secs(30);

#[tokio::test]
async fn postgres_decodes_its_wal_and_keeps_what_was_committed_through_a_crash() {
    let mut postgres = Postgres::start(&[]).await;
    let client = postgres.client().await;
    client
        .batch_execute("CREATE TABLE t (id int PRIMARY KEY); INSERT INTO t VALUES (1)")
        .await
        .unwrap();
    client
        .execute("SELECT pg_create_logical_replication_slot('s', 'pgoutput')", &[])
        .await
        .unwrap();
    client.execute("INSERT INTO t VALUES (2)", &[]).await.unwrap();

    postgres.kill9();
    assert!(client.execute("SELECT 1", &[]).await.is_err());
    postgres.start_again().await;
    postgres.restart().await;

    let client = postgres.client().await;
    let rows: i64 = client.query_one("SELECT count(*) FROM t", &[]).await.unwrap().get(0);
    assert_eq!(rows, 2);
    let slots: i64 = client
        .query_one("SELECT count(*) FROM pg_replication_slots", &[])
        .await
        .unwrap()
        .get(0);
    assert_eq!(slots, 1);
}

#[tokio::test]
async fn postgres_of_every_version_decodes_its_wal_and_has_its_contrib_modules() {
    for major in Postgres::VERSIONS {
        let postgres = Postgres::start_version(major, &[]).await;
        let client = postgres.client().await;
        let version: String = client.query_one("SHOW server_version_num", &[]).await.unwrap().get(0);
        assert_eq!(version.parse::<u32>().unwrap() / 10_000, major);
        client
            .batch_execute(
                "CREATE EXTENSION hstore; CREATE EXTENSION citext; CREATE EXTENSION ltree; CREATE EXTENSION isn; COMMIT;
                 SELECT pg_create_logical_replication_slot('a', 'pgoutput'), pg_create_logical_replication_slot('b', 'test_decoding')",
            )
            .await
            .unwrap();
    }
}

#[tokio::test]
async fn postgres_takes_settings_and_refuses_a_wrong_password() {
    let postgres = Postgres::start(&[("wal_level", "replica")]).await;
    let wal_level: String = postgres
        .client()
        .await
        .query_one("SHOW wal_level", &[])
        .await
        .unwrap()
        .get(0);
    assert_eq!(wal_level, "replica");
    let mut config: tokio_postgres::Config = postgres.url().parse().unwrap();
    let error = config
        .password("wrong")
        .connect(tokio_postgres::NoTls)
        .await
        .err()
        .unwrap();
    assert!(
        error
            .as_db_error()
            .unwrap()
            .message()
            .contains("password authentication failed"),
        "{error}"
    );
}

#[tokio::test]
async fn redis_is_empty_after_a_restart() {
    let mut redis = Redis::start().await;
    let () = redis.connection().await.set("key", "value").await.unwrap();
    redis.stop();
    assert!(redis::Client::open(redis.url()).unwrap().get_connection().is_err());
    redis.restart().await;
    let value: Option<String> = redis.connection().await.get("key").await.unwrap();
    assert_eq!(value, None);
}

#[tokio::test]
async fn kafka_takes_transactions_and_keeps_them_through_a_crash() {
    let mut kafka = Kafka::start().await;
    let topic = unique_name("topic");
    let admin: AdminClient<_> = kafka.client_config().create().unwrap();
    let new = NewTopic::new(&topic, 1, TopicReplication::Fixed(1));
    admin.create_topics([&new], &AdminOptions::new()).await.unwrap()[0]
        .as_ref()
        .unwrap();

    let producer: ThreadedProducer<DefaultProducerContext> =
        kafka.client_config().set("transactional.id", &topic).create().unwrap();
    producer.init_transactions(LIMIT).unwrap();
    producer.begin_transaction().unwrap();
    producer
        .send(BaseRecord::to(&topic).key("rolled back").payload(""))
        .map_err(|(error, _)| error)
        .unwrap();
    producer.abort_transaction(LIMIT).unwrap();
    producer.begin_transaction().unwrap();
    producer
        .send(BaseRecord::to(&topic).key("committed").payload(""))
        .map_err(|(error, _)| error)
        .unwrap();
    producer.commit_transaction(LIMIT).unwrap();

    assert_eq!(first_key(kafka.client_config(), &topic).await, b"committed");
    kafka.kill9();
    kafka.start_again().await;

    assert_eq!(first_key(kafka.client_config(), &topic).await, b"committed");
}

#[tokio::test]
async fn the_shared_kafka_is_one() {
    let (one, other) = tokio::join!(Kafka::shared(), Kafka::shared());
    assert_eq!(one.bootstrap(), other.bootstrap());
}

/// The key of the first record of a topic that a `read_committed` consumer sees.
async fn first_key(mut config: ClientConfig, topic: &str) -> Vec<u8> {
    config.set("group.id", topic).set("isolation.level", "read_committed");
    let mut partitions = TopicPartitionList::new();
    partitions.add_partition_offset(topic, 0, Offset::Beginning).unwrap();
    let consumer: BaseConsumer = config.create().unwrap();
    consumer.assign(&partitions).unwrap();
    eventually("the first record", LIMIT, async || {
        match consumer.poll(Duration::from_millis(100)) {
            Some(Ok(record)) => Ok(record.key().unwrap().to_vec()),
            Some(Err(error)) => Err(error.to_string()),
            None => Err("nothing yet".to_owned()),
        }
    })
    .await
}

#[tokio::test]
async fn nothing_is_left_of_a_test_process_that_is_killed() {
    let mut victim = Command::new(env::current_exe().unwrap())
        .args([
            "--exact",
            "--ignored",
            "--nocapture",
            "starts_a_service_and_waits_to_be_killed",
        ])
        .stdout(Stdio::piped())
        .spawn()
        .unwrap();
    let lines = BufReader::new(victim.stdout.take().unwrap())
        .lines()
        .map(Result::unwrap);
    // Where tests run one at a time, the name of the test is on the same line.
    let mut found = lines.filter_map(|line| Some(line.split_once("service ")?.1.to_owned()));
    let found = found.next().unwrap();
    let (port, folder) = found.split_once(' ').unwrap();
    let port: u16 = port.parse().unwrap();
    assert!(TcpStream::connect(("127.0.0.1", port)).is_ok());
    assert!(Path::new(folder).exists());

    victim.kill().unwrap();
    victim.wait().unwrap();

    eventually("the service and its files are gone", LIMIT, async || {
        match (TcpStream::connect(("127.0.0.1", port)), Path::new(folder).exists()) {
            (Err(_), false) => Ok(()),
            (port, folder) => Err(format!("port answers: {}, folder exists: {folder}", port.is_ok())),
        }
    })
    .await;
}

#[tokio::test]
#[ignore = "started and killed by another test"]
async fn starts_a_service_and_waits_to_be_killed() {
    let redis = Redis::start().await;
    println!(
        "service {} {}",
        redis.port(),
        redis.url_file().ancestors().nth(2).unwrap().display()
    );
    std::future::pending::<()>().await;
}

//! Capture against a real PostgreSQL, Kafka and Redis.
#![allow(clippy::unwrap_used, clippy::expect_used, clippy::panic)]

mod common;
#[path = "common/log.rs"]
mod log;
#[path = "common/operator.rs"]
mod operator;

use std::collections::{BTreeMap, BTreeSet};

use common::{LIMIT, checkpoint, cluster, config, stream_entries};
use log::{read_topic, wait_for_records};
use meander_config::{CaptureConfig, Format, PublicationManagement};
use meander_proto::v1::{Directive, Operation, value::Kind};
use meander_runtime::{
    checkpoint::Tail,
    log::{checkpoint_key, message_topic},
    sink::claims::Claims,
};
use meander_test_support::{Kafka, Postgres, Redis, Runtime, eventually, free_address, unique_name};
use operator::Operator;
use prost::Message as _;
use rdkafka::{
    Message as _,
    admin::{AdminClient, AdminOptions, NewPartitions},
    client::DefaultClientContext,
};
use tokio::{net::TcpListener, time::timeout};

async fn execute(postgres: &Postgres, sql: &str) {
    postgres.client().await.batch_execute(sql).await.unwrap();
}

/// Waits until a session has ended for this reason.
async fn wait_for_failure(runtime: &Runtime, reason: &str) {
    let wanted = format!("meander_capture_failures_total{{reason=\"{reason}\"}}");
    eventually(&wanted, LIMIT, async || {
        let (_, metrics) = runtime.get("/metrics").await.map_err(|error| error.to_string())?;
        if metrics.contains(&wanted) {
            Ok(())
        } else {
            Err(metrics)
        }
    })
    .await;
}

#[tokio::test(flavor = "multi_thread")]
async fn each_change_is_once_in_kafka_and_in_redis_under_the_same_coordinate() {
    let (postgres, redis, kafka) = (Postgres::start(&[]).await, Redis::start().await, Kafka::shared().await);
    execute(
        &postgres,
        "CREATE TABLE trades (id int PRIMARY KEY, price numeric(12,2), at timestamptz, note jsonb, raw bytea);
         CREATE TABLE keyed_whole (id int PRIMARY KEY, note text); ALTER TABLE keyed_whole REPLICA IDENTITY FULL",
    )
    .await;
    let config = config(&postgres, kafka, Some(&redis));
    let mut runtime = Runtime::capture(&config);
    runtime.ready(LIMIT).await;
    execute(
        &postgres,
        r#"BEGIN;
           INSERT INTO trades VALUES (1, 1.50, '2026-11-21 07:00:00.123456+02', '{"a": 1}', '\xff00'), (2, 'NaN', 'infinity', NULL, '');
           SAVEPOINT s; INSERT INTO trades VALUES (3); ROLLBACK TO s;
           UPDATE trades SET price = 2 WHERE id = 1;
           UPDATE trades SET id = 4 WHERE id = 2;
           INSERT INTO keyed_whole VALUES (1, 'a'); UPDATE keyed_whole SET note = 'b'; DELETE FROM keyed_whole;
           COMMIT;
           BEGIN; INSERT INTO trades VALUES (9); ROLLBACK;
           DELETE FROM trades WHERE id = 1"#,
    )
    .await;
    execute(&postgres, "TRUNCATE trades").await;
    let topic = format!("{}.public.trades", config.kafka.topic_prefix);
    let records = wait_for_records(kafka, &topic, 7).await;
    let seen: Vec<_> = records
        .iter()
        .map(|(position, key, record)| {
            let at = record.coordinate.unwrap();
            let ordinal = position.rsplit(':').next().unwrap().parse::<u64>().unwrap();
            assert_eq!((at.epoch, at.ordinal), (1, ordinal), "header and record agree");
            (record.operation(), ordinal, at.part, key.clone().unwrap_or_default())
        })
        .collect();
    let key = |id: u32| format!("{{\"id\":\"{id}\"}}");
    assert_eq!(
        seen,
        [
            (Operation::Insert, 0, 0, key(1)),
            (Operation::Insert, 1, 0, key(2)),
            (Operation::Update, 2, 0, key(1)),
            (Operation::Delete, 3, 0, key(2)),
            (Operation::Update, 3, 1, key(4)),
            (Operation::Delete, 0, 0, key(1)),
            (Operation::Truncate, 0, 0, String::new()),
        ]
    );
    let first = &records[0].2.after.as_ref().unwrap().values;
    let kinds: Vec<_> = first.iter().map(|value| value.kind.clone().unwrap()).collect();
    assert_eq!(
        kinds,
        [
            Kind::Integer(1),
            Kind::Text("1.50".to_owned()),
            Kind::Text("2026-11-21 05:00:00.123456+00".to_owned()),
            Kind::Text("{\"a\": 1}".to_owned()),
            Kind::Binary(vec![0xFF, 0]),
        ]
    );
    let whole = wait_for_records(kafka, &format!("{}.public.keyed_whole", config.kafka.topic_prefix), 3).await;
    let keys: Vec<_> = whole.iter().map(|(_, key, _)| key.clone().unwrap()).collect();
    assert_eq!(
        keys,
        [key(1), key(1), key(1)],
        "under REPLICA IDENTITY FULL the key is the primary key"
    );
    assert_eq!(
        whole[1].2.before.as_ref().unwrap().values[1].kind,
        Some(Kind::Text("a".to_owned()))
    );

    // Redis holds the same bytes under ids made of the same coordinates.
    let entries = eventually("the entries are in Redis", LIMIT, async || {
        let entries = stream_entries(&redis, &topic).await;
        if entries.len() >= 7 {
            Ok(entries)
        } else {
            Err(format!("{} of 7", entries.len()))
        }
    })
    .await;
    assert_eq!(entries.len(), 7);
    for ((id, fields), (position, _, record)) in entries.iter().zip(&records) {
        let at = record.coordinate.unwrap();
        let derived = format!(
            "{}-{}",
            u64::from(at.epoch) << 56 | at.commit_lsn,
            at.ordinal << 8 | u64::from(at.part)
        );
        assert_eq!(*id, derived);
        assert_eq!(fields["position"], position.as_bytes());
        assert_eq!(fields["value"], record.encode_to_vec());
    }

    // A clean end acknowledges everything: a restart has nothing to read again, and nothing is doubled.
    assert!(runtime.terminate(LIMIT).success(), "{}", runtime.process().log_tail());
    runtime.start_again();
    runtime.ready(LIMIT).await;
    execute(&postgres, "INSERT INTO trades VALUES (10)").await;
    let after = wait_for_records(kafka, &topic, 8).await;
    assert_eq!(after.len(), 8);
    assert_eq!(after[..7], records[..]);
}

#[tokio::test(flavor = "multi_thread")]
async fn an_idle_database_lets_postgresql_forget_its_wal() {
    let (postgres, kafka) = (Postgres::start(&[]).await, Kafka::shared().await);
    execute(
        &postgres,
        "CREATE TABLE t (id int PRIMARY KEY); CREATE TABLE other (id int)",
    )
    .await;
    let mut config = config(&postgres, kafka, None);
    config.source.tables.include = vec!["public.t".to_owned()];
    let mut runtime = Runtime::capture(&config);
    runtime.ready(LIMIT).await;
    // Nothing of this is captured, and still the slot must move past it.
    execute(&postgres, "INSERT INTO other SELECT generate_series(1, 1000)").await;
    let client = postgres.client().await;
    let written: String = client
        .query_one("SELECT pg_current_wal_insert_lsn()::text", &[])
        .await
        .unwrap()
        .get(0);
    let confirmed: String = eventually("the slot moves past what nobody captures", LIMIT, async || {
        let row = client
            .query_one(
                "SELECT confirmed_flush_lsn >= $1::text::pg_lsn, confirmed_flush_lsn::text FROM pg_replication_slots",
                &[&written],
            )
            .await
            .unwrap();
        if row.get(0) {
            Ok(row.get(1))
        } else {
            Err(row.get::<_, String>(1))
        }
    })
    .await;
    // It was persisted before PostgreSQL was told.
    assert!(checkpoint(&config).unwrap().acknowledged >= confirmed.parse().unwrap());
}

#[tokio::test(flavor = "multi_thread")]
async fn a_slot_that_lost_changes_stops_the_capture_before_a_byte_is_read() {
    let (postgres, kafka) = (Postgres::start(&[]).await, Kafka::shared().await);
    execute(&postgres, "CREATE TABLE t (id int PRIMARY KEY)").await;
    let config = config(&postgres, kafka, None);
    let topic = format!("{}.public.t", config.kafka.topic_prefix);
    let mut runtime = Runtime::capture(&config);
    runtime.ready(LIMIT).await;
    execute(&postgres, "INSERT INTO t VALUES (1)").await;
    wait_for_records(kafka, &topic, 1).await;
    assert!(runtime.terminate(LIMIT).success());

    // Somebody moves the slot past changes that were not captured.
    execute(&postgres, "INSERT INTO t VALUES (2)").await;
    execute(
        &postgres,
        "SELECT pg_replication_slot_advance(slot_name, pg_current_wal_lsn()) FROM pg_replication_slots",
    )
    .await;
    runtime.start_again();
    wait_for_failure(&runtime, "SlotAhead").await;
    assert!(runtime.terminate(LIMIT).success());

    // Somebody drops it.
    execute(
        &postgres,
        "SELECT pg_drop_replication_slot(slot_name) FROM pg_replication_slots",
    )
    .await;
    runtime.start_again();
    wait_for_failure(&runtime, "SlotMissing").await;
    assert_eq!(
        tokio::task::block_in_place(|| read_topic(kafka, &topic)).len(),
        1,
        "nothing is published past a gap"
    );
    let slots = postgres
        .client()
        .await
        .query("SELECT FROM pg_replication_slots", &[])
        .await
        .unwrap();
    assert!(slots.is_empty(), "no new slot hides the gap");
}

#[tokio::test(flavor = "multi_thread")]
async fn cleanup_waits_for_a_database_that_is_away() {
    let (mut postgres, kafka) = (Postgres::start(&[]).await, Kafka::shared().await);
    execute(&postgres, "CREATE TABLE t (id int PRIMARY KEY)").await;
    let config = config(&postgres, kafka, None);
    let mut runtime = Runtime::capture(&config);
    runtime.ready(LIMIT).await;
    assert!(runtime.terminate(LIMIT).success());

    postgres.stop();
    let attempts = TcpListener::bind(("127.0.0.1", postgres.port())).await.unwrap();
    let cleanup = tokio::spawn(meander_runtime::capture::cleanup(config));
    timeout(LIMIT, attempts.accept()).await.unwrap().unwrap();
    drop(attempts);
    postgres.start_again().await;
    timeout(LIMIT, cleanup).await.unwrap().unwrap().unwrap();
    let slots = "SELECT FROM pg_replication_slots";
    assert!(postgres.client().await.query(slots, &[]).await.unwrap().is_empty());
}

#[tokio::test(flavor = "multi_thread")]
async fn cleanup_takes_slot_and_publication_away_and_a_new_life_begins_a_new_epoch() {
    let (postgres, kafka) = (Postgres::start(&[]).await, Kafka::shared().await);
    execute(&postgres, "CREATE TABLE t (id int PRIMARY KEY)").await;
    let config = config(&postgres, kafka, None);
    let topic = format!("{}.public.t", config.kafka.topic_prefix);
    let mut runtime = Runtime::capture(&config);
    runtime.ready(LIMIT).await;
    execute(&postgres, "INSERT INTO t VALUES (1)").await;
    wait_for_records(kafka, &topic, 1).await;
    assert!(runtime.terminate(LIMIT).success());

    meander_runtime::capture::cleanup(config.clone()).await.unwrap();
    let client = postgres.client().await;
    assert!(
        client
            .query("SELECT FROM pg_replication_slots", &[])
            .await
            .unwrap()
            .is_empty()
    );
    assert!(
        client
            .query("SELECT FROM pg_publication", &[])
            .await
            .unwrap()
            .is_empty()
    );
    // Twice is as good as once: the operator may have to try again.
    meander_runtime::capture::cleanup(config.clone()).await.unwrap();

    runtime.start_again();
    runtime.ready(LIMIT).await;
    execute(&postgres, "INSERT INTO t VALUES (2)").await;
    let records = wait_for_records(kafka, &topic, 2).await;
    let epochs: Vec<_> = records
        .iter()
        .map(|(_, _, record)| record.coordinate.unwrap().epoch)
        .collect();
    assert_eq!(epochs, [1, 2]);
}

#[tokio::test(flavor = "multi_thread")]
async fn what_is_missing_is_said_and_heals_when_it_is_there() {
    let (mut postgres, kafka) = (Postgres::start(&[]).await, Kafka::shared().await);
    execute(&postgres, "CREATE TABLE keyless (id int)").await;
    let folder = tempfile::tempdir().unwrap();
    let mut config = config(&postgres, kafka, None);
    let good = std::fs::read_to_string(&config.source.password_file).unwrap();
    config.source.password_file = folder.path().join("password");

    let mut runtime = Runtime::capture(&config);
    wait_for_failure(&runtime, "CredentialsUnreadable").await;
    std::fs::write(&config.source.password_file, "wrong").unwrap();
    wait_for_failure(&runtime, "AuthenticationFailed").await;
    postgres.stop();
    wait_for_failure(&runtime, "DatabaseUnreachable").await;
    postgres.start_again().await;
    std::fs::write(&config.source.password_file, &good).unwrap();
    wait_for_failure(&runtime, "TableWithoutReplicaIdentity").await;
    execute(&postgres, "DROP TABLE keyless").await;
    wait_for_failure(&runtime, "NoTablesMatch").await;
    execute(&postgres, "CREATE TABLE t (id int PRIMARY KEY, n int)").await;
    runtime.ready(LIMIT).await;
    execute(&postgres, "INSERT INTO t VALUES (1); UPDATE t SET n = 2").await;
    wait_for_records(kafka, &format!("{}.public.t", config.kafka.topic_prefix), 2).await;
    let log = std::fs::read_to_string(runtime.process().log()).unwrap();
    assert!(!log.contains(good.trim()), "the password is in the log");
}

#[tokio::test(flavor = "multi_thread")]
async fn a_server_without_logical_decoding_is_told_from_any_other() {
    let (postgres, kafka) = (
        Postgres::start(&[("wal_level", "replica")]).await,
        Kafka::shared().await,
    );
    execute(&postgres, "CREATE TABLE t (id int PRIMARY KEY)").await;
    let runtime = Runtime::capture(&config(&postgres, kafka, None));
    wait_for_failure(&runtime, "WalLevelNotLogical").await;
}

#[tokio::test(flavor = "multi_thread")]
async fn an_external_publication_is_captured_as_far_as_it_is_selected() {
    let (postgres, kafka) = (Postgres::start(&[]).await, Kafka::shared().await);
    execute(
        &postgres,
        "CREATE TABLE t (id int PRIMARY KEY); CREATE TABLE secret (id int PRIMARY KEY); CREATE TABLE keyless (id int)",
    )
    .await;
    let mut config = config(&postgres, kafka, None);
    config.source.publication.management = PublicationManagement::External;
    config.source.tables.exclude = vec!["public.secret".to_owned()];
    let mut runtime = Runtime::capture(&config);
    wait_for_failure(&runtime, "PublicationNotFound").await;
    let publication = &config.source.publication.name;
    execute(
        &postgres,
        &format!("CREATE PUBLICATION {publication} FOR TABLE t, secret"),
    )
    .await;
    runtime.ready(LIMIT).await;
    execute(
        &postgres,
        "BEGIN; INSERT INTO secret VALUES (1); INSERT INTO t VALUES (1); COMMIT",
    )
    .await;
    let records = wait_for_records(kafka, &format!("{}.public.t", config.kafka.topic_prefix), 1).await;
    assert_eq!(
        records[0].2.coordinate.unwrap().ordinal,
        1,
        "what is left out is counted"
    );
    let secret = format!("{}.public.secret", config.kafka.topic_prefix);
    let partitions = tokio::task::block_in_place(|| Tail::new(&cluster(kafka), LIMIT).unwrap().partitions(&secret));
    assert_eq!(partitions.unwrap(), Vec::<i32>::new());
}

#[tokio::test(flavor = "multi_thread")]
async fn a_second_runtime_waits_for_the_slot_and_takes_over_without_loss_or_double() {
    let (postgres, redis, kafka) = (Postgres::start(&[]).await, Redis::start().await, Kafka::shared().await);
    execute(&postgres, "CREATE TABLE t (id int PRIMARY KEY)").await;
    let config = config(&postgres, kafka, Some(&redis));
    let topic = format!("{}.public.t", config.kafka.topic_prefix);
    let mut first = Runtime::capture(&config);
    first.ready(LIMIT).await;
    let second = Runtime::capture(&CaptureConfig {
        admin_address: free_address(),
        ..config.clone()
    });
    wait_for_failure(&second, "SlotActive").await;
    execute(&postgres, "INSERT INTO t SELECT generate_series(1, 1000)").await;
    first.kill9();
    execute(&postgres, "INSERT INTO t SELECT generate_series(1001, 2000)").await;
    let records = wait_for_records(kafka, &topic, 2000).await;
    let ids: Vec<_> = records
        .iter()
        .map(|(_, _, record)| record.after.as_ref().unwrap().values[0].kind.clone().unwrap())
        .collect();
    assert_eq!(ids, (1..=2000).map(Kind::Integer).collect::<Vec<_>>());
    assert_eq!(checkpoint(&config).unwrap().owner_generation, 2);
}

#[tokio::test(flavor = "multi_thread")]
async fn what_is_wrong_with_a_topic_is_said_before_there_is_a_slot() {
    let (postgres, kafka) = (Postgres::start(&[]).await, Kafka::shared().await);
    execute(&postgres, "CREATE TABLE t (id int PRIMARY KEY)").await;
    let mut config = config(&postgres, kafka, None);
    let settings = [
        ("retention.mss", "1"),
        ("segment.bytes", "many"),
        ("retention.ms", "3600000"),
    ];
    config.kafka.topic_config = settings.map(|(name, value)| (name.to_owned(), value.to_owned())).into();
    let refused = async |config: &CaptureConfig, named: &str| {
        let mut runtime = Runtime::capture(config);
        eventually(named, LIMIT, async || {
            let log = std::fs::read_to_string(runtime.process().log()).unwrap();
            if log.contains(named) { Ok(()) } else { Err(log) }
        })
        .await;
        assert!(runtime.terminate(LIMIT).success());
    };
    let named = "Kafka has no such setting or value: retention.mss=1, segment.bytes=many; correct topics.config";
    refused(&config, named).await;
    config.kafka.topic_config.clear();
    config.kafka.replication_factor = Some(3);
    config.kafka.topic_prefix = unique_name("shop");
    refused(
        &config,
        "with 3 replicas: Kafka has fewer brokers; set topics.replicationFactor",
    )
    .await;
    config.kafka.replication_factor = None;

    // Nor is a topic that no table has a surprise of the stream.
    config.format = Format::DebeziumJson {
        schemas: false,
        transaction_metadata: true,
    };
    config.source.heartbeat_interval_seconds = Some(1.try_into().unwrap());
    let room = 249 - "__debezium-heartbeat.".len();
    for (length, topic) in [
        (249 - ".public.t".len(), ".transaction"),
        (room + 1, "__debezium-heartbeat."),
    ] {
        config.kafka.topic_prefix = format!("{:a<length$}", unique_name("shop"));
        let mut runtime = Runtime::capture(&config);
        wait_for_failure(&runtime, "TopicNotUsable").await;
        let log = std::fs::read_to_string(runtime.process().log()).unwrap();
        assert!(
            log.lines().any(|line| line.contains(topic) && line.contains("249")),
            "{log}"
        );
        assert!(runtime.terminate(LIMIT).success());
    }
    let slots = postgres
        .client()
        .await
        .query("SELECT FROM pg_replication_slots", &[])
        .await;
    assert!(slots.unwrap().is_empty());
}

#[tokio::test(flavor = "multi_thread")]
async fn a_topic_prefix_belongs_to_one_pipeline() {
    let (postgres, kafka) = (Postgres::start(&[]).await, Kafka::shared().await);
    execute(
        &postgres,
        "CREATE TABLE t (id int PRIMARY KEY); CREATE TABLE u (id int PRIMARY KEY)",
    )
    .await;
    let mut first = config(&postgres, kafka, None);
    let mut second = config(&postgres, kafka, None);
    first.source.message_prefixes = vec!["app".to_owned()];
    second.source.message_prefixes = vec!["app".to_owned()];
    second.source.tables.include = vec!["public.u".to_owned()];
    second.kafka.topic_prefix.clone_from(&first.kafka.topic_prefix);
    let mut owner = Runtime::capture(&first);
    owner.ready(LIMIT).await;
    execute(
        &postgres,
        "INSERT INTO t VALUES (1); SELECT pg_logical_emit_message(true, 'app', 'hello')",
    )
    .await;
    let topic = format!("{}.public.t", first.kafka.topic_prefix);
    wait_for_records(kafka, &topic, 1).await;
    wait_for_records(kafka, &message_topic(&first.kafka.topic_prefix), 1).await;
    // Whose the prefix is says more than that its topics hold something.
    let mut other = Runtime::capture(&second);
    wait_for_failure(&other, "TopicPrefixTaken").await;
    // A slot of a pipeline that is refused would keep WAL for nobody.
    let no_slot_of_the_other = async || {
        let client = postgres.client().await;
        let rows = client
            .query(
                "SELECT FROM pg_replication_slots WHERE slot_name = $1",
                &[&second.source.slot_name],
            )
            .await;
        assert!(rows.unwrap().is_empty(), "the refused pipeline made a slot");
    };
    no_slot_of_the_other().await;

    // A prefix within it is no other prefix: whoever reads the first one's topics would read both.
    let mut within = config(&postgres, kafka, None);
    within.kafka.topic_prefix = format!("{}.eu", first.kafka.topic_prefix);
    let mut inner = Runtime::capture(&within);
    wait_for_failure(&inner, "TopicPrefixTaken").await;
    assert!(inner.terminate(LIMIT).success());

    // Once its owner is gone the prefix is free; but a topic holds what the other did not write, if only that of messages.
    assert!(owner.terminate(LIMIT).success());
    meander_runtime::capture::cleanup(first).await.unwrap();
    wait_for_failure(&other, "LogAheadOfCheckpoint").await;
    no_slot_of_the_other().await;
    assert!(other.terminate(LIMIT).success());
    assert_eq!(tokio::task::block_in_place(|| read_topic(kafka, &topic)).len(), 1);

    // A claim goes with its pipeline, also if that never got as far as a checkpoint.
    let claims = |owner: &str| Claims::new(second.kafka.cluster(), &second.kafka.topic_prefix, owner.to_owned());
    let pipeline = &second.pipeline;
    let key = checkpoint_key(&pipeline.namespace, &pipeline.name, &second.source.slot_name);
    claims(&key).claim().await.unwrap();
    let refused = claims("b/c/d").claim().await.unwrap_err();
    assert!(
        refused.to_string().contains(&format!(
            "record with key {}/{key} and no value",
            second.kafka.topic_prefix
        )),
        "{refused}"
    );
    meander_runtime::capture::cleanup(second.clone()).await.unwrap();
    claims("b/c/d").claim().await.unwrap();

    // Of two that come at the same time, one is refused, and takes nothing with it.
    let outer = unique_name("shop");
    let inner = format!("{outer}.eu");
    let claims = |prefix: &str, owner: &str| Claims::new(second.kafka.cluster(), prefix, owner.to_owned());
    let (one, other) = (claims(&outer, "b/c/d"), claims(&inner, "e/f/g"));
    let (its, others) = tokio::join!(one.claim(), other.claim());
    assert_ne!(its.is_ok(), others.is_ok(), "{its:?} {others:?}");
    let (holds, refused) = if its.is_ok() { (one, other) } else { (other, one) };
    refused.claim().await.unwrap_err();
    holds.withdraw().await.unwrap();
    refused.claim().await.unwrap();
}

#[tokio::test(flavor = "multi_thread")]
async fn a_key_stays_in_its_partition_when_somebody_adds_partitions() {
    let (postgres, kafka) = (Postgres::start(&[]).await, Kafka::shared().await);
    execute(&postgres, "CREATE TABLE t (id int PRIMARY KEY, n int)").await;
    let (operator, folder) = (
        Operator::start(Directive::default()).await,
        tempfile::tempdir().unwrap(),
    );
    let mut config = config(&postgres, kafka, None);
    config.kafka.partitions = 2;
    config.operator = operator.link(&folder);
    let topic = format!("{}.public.t", config.kafka.topic_prefix);
    let mut runtime = Runtime::capture(&config);
    runtime.ready(LIMIT).await;
    execute(&postgres, "INSERT INTO t SELECT id, 0 FROM generate_series(1, 20) id").await;
    wait_for_records(kafka, &topic, 20).await;
    assert!(runtime.terminate(LIMIT).success());

    let admin: AdminClient<DefaultClientContext> = kafka.client_config().create().unwrap();
    let more = NewPartitions::new(&topic, 5);
    let added = admin.create_partitions([&more], &AdminOptions::new()).await.unwrap();
    assert_eq!(added[0].as_deref(), Ok(topic.as_str()));
    eventually("the partitions are there", LIMIT, async || {
        let partitions = tokio::task::block_in_place(|| Tail::new(&cluster(kafka), LIMIT)?.partitions(&topic));
        match partitions {
            Ok(partitions) if partitions.len() == 5 => Ok(()),
            other => Err(format!("{other:?}")),
        }
    })
    .await;
    runtime.start_again();
    runtime.ready(LIMIT).await;
    execute(
        &postgres,
        "UPDATE t SET n = 1; INSERT INTO t SELECT id, 0 FROM generate_series(21, 60) id",
    )
    .await;
    wait_for_records(kafka, &topic, 80).await;
    let mut places: BTreeMap<Vec<u8>, BTreeSet<i32>> = BTreeMap::new();
    tokio::task::block_in_place(|| {
        kafka.read(
            |name| name == topic,
            |message| {
                let key = message.key().unwrap().to_vec();
                places.entry(key).or_default().insert(message.partition());
            },
        );
    });
    assert_eq!(places.len(), 60);
    assert!(places.values().all(|partitions| partitions.len() == 1), "{places:?}");
    let used: BTreeSet<i32> = places.into_values().flatten().collect();
    assert_eq!(used, BTreeSet::from([0, 1]), "what was added stays empty");
    let degraded = operator.condition("Degraded", "PartitionsAdded").await;
    assert!(degraded.message.contains("has 5 partitions and not 2"), "{degraded:?}");
    assert!(runtime.terminate(LIMIT).success());

    // Not even as a resource that was made again with what the topics have now.
    config.kafka.partitions = 5;
    let mut runtime = Runtime::capture(&config);
    let refused = operator.condition("SinksReady", "TopicNotUsable").await;
    assert!(refused.message.contains("keys go by 2 partitions since"), "{refused:?}");
    runtime.terminate(LIMIT);
}

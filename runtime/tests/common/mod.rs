//! What the tests of capture share; none of them needs all of it.
#![allow(dead_code)]

use std::time::Duration;

use meander_config::{
    Acknowledgement, CaptureConfig, Durability, Format, KafkaCluster, KafkaSink, Origin, Partitions, PostgresSource,
    Publication, PublicationManagement, RedisSink, ResourceIdentity, Snapshot, SnapshotMode, SslMode, TableSelection,
};
use meander_runtime::{
    checkpoint::read_checkpoint,
    log::{Checkpoint, checkpoint_key, checkpoint_topic},
};
use meander_test_support::{Kafka, Postgres, Redis, Runtime, eventually, free_address, unique_name};

/// For every wait.
pub const LIMIT: Duration = Duration::from_secs(60);

/// A capture of every table in `public`, under names that no other test uses.
pub fn config(postgres: &Postgres, kafka: &Kafka, redis: Option<&Redis>) -> CaptureConfig {
    let name = unique_name("shop");
    CaptureConfig {
        pipeline: ResourceIdentity {
            namespace: "test".to_owned(),
            name: name.clone(),
            uid: String::new(),
        },
        source: PostgresSource {
            host: "127.0.0.1".to_owned(),
            port: postgres.port(),
            database: postgres.database().to_owned(),
            username_file: postgres.username_file(),
            password_file: postgres.password_file(),
            ssl_mode: SslMode::Disable,
            ca_file: None,
            client_certificate: None,
            tables: TableSelection {
                include: vec!["public.*".to_owned()],
                exclude: vec![],
            },
            message_prefixes: vec![],
            origin: Origin::Any,
            publication: Publication {
                name: name.clone(),
                management: PublicationManagement::Managed,
                partitions: Partitions::Root,
            },
            slot_name: name.clone(),
            slot_failover: None,
            snapshot: Snapshot {
                mode: SnapshotMode::Never,
                ..Snapshot::default()
            },
            heartbeat_interval_seconds: None,
        },
        format: Format::Protobuf,
        kafka: KafkaSink {
            bootstrap_servers: vec![kafka.bootstrap()],
            tls: None,
            sasl: None,
            topic_prefix: name.clone(),
            partitions: 3,
            replication_factor: None,
            topic_config: Default::default(),
            topic_management: Default::default(),
        },
        redis: redis.map(|redis| RedisSink {
            url_file: redis.url_file(),
            ca_file: None,
            stream_prefix: name,
            max_length: None,
            durability: Durability::None,
            acknowledgement: Acknowledgement::BestEffort,
        }),
        accept_source_gap: None,
        on_source_gap: Default::default(),
        standby: false,
        operator: None,
        admin_address: free_address(),
    }
}

/// Waits until a metric of the runtime has such a value.
pub async fn wait_for_metric(runtime: &Runtime, name: &str, is: impl Fn(i64) -> bool) {
    eventually(name, LIMIT, async || {
        let (_, metrics) = runtime.get("/metrics").await.map_err(|error| error.to_string())?;
        let line = metrics
            .lines()
            .find_map(|line| line.strip_prefix(name)?.trim().parse().ok());
        line.filter(|value| is(*value)).map_or(Err(metrics), |_| Ok(()))
    })
    .await;
}

/// How to reach a broker without authentication.
pub fn cluster(kafka: &Kafka) -> KafkaCluster {
    KafkaCluster {
        bootstrap_servers: vec![kafka.bootstrap()],
        tls: None,
        sasl: None,
    }
}

/// The pipeline's checkpoint, if there is one.
pub fn checkpoint(config: &CaptureConfig) -> Option<Checkpoint> {
    let (namespace, name) = (&config.pipeline.namespace, &config.pipeline.name);
    tokio::task::block_in_place(|| {
        read_checkpoint(
            &config.kafka.cluster(),
            &checkpoint_topic(namespace, name),
            &checkpoint_key(namespace, name, &config.source.slot_name),
            LIMIT,
        )
        .unwrap()
    })
}

//! The configuration that tests start from.

use meander_config::{
    Acknowledgement, CaptureConfig, Durability, Format, KafkaSink, Origin, Partitions, PostgresSource, Publication,
    PublicationManagement, RedisSink, ResourceIdentity, Snapshot, SnapshotMode, SslMode, TableSelection,
};

use crate::{Kafka, Postgres, Redis, free_address, unique_name};

/// A capture of every table in `public`, under names that no other test uses.
#[must_use]
pub fn capture_config(postgres: &Postgres, kafka: &Kafka, redis: Option<&Redis>) -> CaptureConfig {
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
        on_oversized_row: Default::default(),
        standby: false,
        operator: None,
        admin_address: free_address(),
    }
}

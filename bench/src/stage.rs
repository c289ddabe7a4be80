//! The services that everything is measured with: each contestant has the same ones.

use anyhow::Context as _;
use meander_test_support::{Kafka, Postgres, Redis, process::Process};
use rdkafka::{
    admin::{AdminClient, AdminOptions},
    client::DefaultClientContext,
    consumer::{BaseConsumer, Consumer as _},
};

use crate::{LIMIT, meter::Meter, report::Figure};

/// Commits wait for the disk, as they do where it matters; memory and WAL are enough for the works.
const SETTINGS: &[(&str, &str)] = &[
    ("fsync", "on"),
    ("full_page_writes", "on"),
    ("max_wal_size", "8GB"),
    ("shared_buffers", "1GB"),
    ("max_connections", "200"),
    ("max_wal_senders", "20"),
    ("max_replication_slots", "20"),
];

pub(crate) struct Stage {
    pub(crate) postgres: Postgres,
    pub(crate) kafka: Kafka,
    pub(crate) redis: Redis,
}

impl Stage {
    pub(crate) async fn start() -> Self {
        Self {
            postgres: Postgres::start(SETTINGS).await,
            kafka: Kafka::start_as_shipped().await,
            redis: Redis::start().await,
        }
    }

    /// Measures the services, and this process as the contestant.
    pub(crate) fn meter(&mut self, contestant: Option<u32>) -> anyhow::Result<Meter> {
        let id = |process: &mut Process| process.id().context("a service has ended");
        let services = [
            (Figure::PostgresCpu, id(self.postgres.process())?),
            (Figure::KafkaCpu, id(self.kafka.process())?),
            (Figure::RedisCpu, id(self.redis.process())?),
        ];
        Meter::start(
            services
                .into_iter()
                .chain(contestant.map(|process| (Figure::Cpu, process))),
        )
    }

    /// Takes away what a contestant wrote, so that it is no burden for the next.
    pub(crate) async fn clear(&self, prefix: &str) -> anyhow::Result<()> {
        let consumer: BaseConsumer = self.kafka.client_config().create()?;
        let metadata = consumer.fetch_metadata(None, LIMIT)?;
        let topics: Vec<&str> = metadata.topics().iter().map(|topic| topic.name()).collect();
        let own = format!("{prefix}.");
        let topics: Vec<&str> = topics.into_iter().filter(|topic| topic.starts_with(&own)).collect();
        if !topics.is_empty() {
            let admin: AdminClient<DefaultClientContext> = self.kafka.client_config().create()?;
            for deleted in admin.delete_topics(&topics, &AdminOptions::new()).await? {
                deleted.map_err(|(topic, code)| anyhow::anyhow!("{topic}: {code}"))?;
            }
        }
        redis::cmd("FLUSHALL")
            .exec_async(&mut self.redis.connection().await)
            .await?;
        Ok(())
    }
}

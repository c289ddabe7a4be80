//! What the tests of capture share; none of them needs all of it.
#![allow(dead_code, unused_imports)]

use std::{collections::BTreeMap, time::Duration};

use meander_config::{CaptureConfig, KafkaCluster};
use meander_runtime::{
    checkpoint::read_checkpoint,
    log::{Checkpoint, checkpoint_key, checkpoint_topic},
};
pub use meander_test_support::capture_config as config;
use meander_test_support::{Kafka, Redis, Runtime, eventually};

/// For every wait.
pub const LIMIT: Duration = Duration::from_secs(240);

/// Waits until a metric, without its fraction, is so.
pub async fn wait_for_metric(runtime: &Runtime, name: &str, is: impl Fn(i64) -> bool) {
    eventually(name, LIMIT, async || {
        let (_, metrics) = runtime.get("/metrics").await.map_err(|error| error.to_string())?;
        let line = metrics
            .lines()
            .find_map(|line| line.strip_prefix(name)?.trim().parse::<f64>().ok());
        line.filter(|value| is(*value as i64)).map_or(Err(metrics), |_| Ok(()))
    })
    .await;
}

/// Every entry of a stream: its id, and its fields.
pub async fn stream_entries(redis: &Redis, stream: &str) -> Vec<(String, BTreeMap<String, Vec<u8>>)> {
    redis::cmd("XRANGE")
        .arg(stream)
        .arg(&["-", "+"])
        .query_async(&mut redis.connection().await)
        .await
        .unwrap()
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

//! What the tests share: the examples as resources, and settings.
#![allow(dead_code, clippy::unwrap_used, clippy::expect_used, clippy::panic)]

pub mod apiserver;

use std::{fs, path::Path, time::Duration};

use k8s_openapi::{api::networking::v1::NetworkPolicyPeer, apimachinery::pkg::apis::meta::v1::LabelSelector};
use meander_crds::{
    Acknowledgement, CdcPipeline, OnOversizedRow, OnSourceGap, Origin, PipelineFormat, RedisDurability, RedisSink,
    ReplayJob, SslMode,
};
use meander_operator::{context::Settings, progress::Observation, secrets::Keys, tls::Trust};
use serde::de::DeserializeOwned;
use serde_json::json;
use tokio::time::Instant;

pub fn settings() -> Settings {
    Settings {
        namespace: None,
        runtime_image: "meander-runtime:test".into(),
        runtime_image_pull_policy: "IfNotPresent".into(),
        runtime_image_pull_secrets: Vec::new(),
        progress_endpoint: "https://meander-operator.meander.svc:50051".into(),
        trust: Trust::plain(),
        metrics_from: Some(vec![NetworkPolicyPeer {
            namespace_selector: Some(LabelSelector::default()),
            ..NetworkPolicyPeer::default()
        }]),
        tracing: Vec::new(),
    }
}

/// One of `deploy/examples`, with the defaults that the API server would add.
pub fn example<K: DeserializeOwned>(file: &str) -> K {
    let path = Path::new(env!("CARGO_MANIFEST_DIR"))
        .join("../deploy/examples")
        .join(file);
    serde_saphyr::from_str(&fs::read_to_string(path).unwrap()).unwrap()
}

pub fn pipeline() -> CdcPipeline {
    let mut pipeline: CdcPipeline = example("pipeline.yaml");
    pipeline.metadata.namespace = Some("default".into());
    pipeline.metadata.uid = Some("11111111-1111-1111-1111-111111111111".into());
    pipeline.metadata.generation = Some(1);
    pipeline
}

/// A pipeline with a value in every field.
pub fn with_every_setting() -> CdcPipeline {
    let mut pipeline = pipeline();
    let annotation = ("meander.dev/accept-source-gap".into(), "1:0/16B3748".into());
    pipeline.metadata.annotations = Some([annotation].into());
    let spec = &mut pipeline.spec;
    spec.suspend = true;
    spec.on_source_gap = OnSourceGap::Resnapshot;
    spec.on_oversized_row = OnOversizedRow::OmitValues;
    spec.format = PipelineFormat::DebeziumJson;
    spec.debezium = serde_json::from_str(r#"{"schemas": false, "transactionMetadata": true}"#).unwrap();
    spec.runtime = serde_json::from_value(json!({
        "image": "elsewhere/runtime:1",
        "logLevel": "Debug",
        "resources": {"limits": {"cpu": 1}},
    }))
    .unwrap();
    spec.source.postgres.slot.name = Some("a_slot".into());
    spec.source.postgres.ssl_mode = SslMode::VerifyFull;
    spec.source.postgres.ca_secret_ref = serde_json::from_str(r#"{"name": "shop-ca", "key": "ca.crt"}"#).unwrap();
    spec.source.postgres.client_cert_secret_ref = serde_json::from_str(r#"{"name": "shop-client"}"#).unwrap();
    spec.source.postgres.slot.failover = Some(true);
    spec.source.postgres.heartbeat_interval_seconds = Some(10.try_into().unwrap());
    spec.source.postgres.publication =
        serde_json::from_str(r#"{"name": "a_pub", "management": "External", "partitions": "Leaf"}"#).unwrap();
    spec.source.postgres.tables.exclude = vec!["public.secrets".into()];
    spec.source.postgres.message_prefixes = vec!["app.*".into()];
    spec.source.postgres.origin = Origin::None;
    spec.source.postgres.snapshot = serde_json::from_str(
        r#"{"mode": "Bulk", "parallelism": 4, "requests": [{"id": "repair", "tables": ["public.orders"]}]}"#,
    )
    .unwrap();
    spec.sinks.kafka.topics = serde_json::from_value(json!({
        "partitions": 6, "replicationFactor": 3, "config": {"retention.ms": "1000"}, "management": "External",
    }))
    .unwrap();
    spec.sinks.kafka.tls = serde_json::from_value(json!({
        "caSecretRef": {"name": "shop-ca", "key": "ca.crt"}, "clientCertSecretRef": {"name": "shop-client"},
    }))
    .unwrap();
    spec.sinks.kafka.sasl = serde_json::from_value(json!({
        "mechanism": "ScramSha512", "credentialsSecretRef": {"name": "shop-cdc"},
    }))
    .unwrap();
    spec.sinks.redis = Some(RedisSink {
        url_secret_ref: None,
        url: Some("rediss://redis:6379/1".into()),
        ca_secret_ref: serde_json::from_str(r#"{"name": "shop-ca", "key": "ca.crt"}"#).unwrap(),
        stream_prefix: "s".into(),
        retention: serde_json::from_str(r#"{"maxLength": 1000}"#).unwrap(),
        durability: RedisDurability::Aof,
        acknowledgement: Acknowledgement::Required,
    });
    pipeline
}

pub fn replay(file: &str) -> ReplayJob {
    let mut replay: ReplayJob = example(file);
    replay.metadata.namespace = Some("default".into());
    replay.metadata.uid = Some("22222222-2222-2222-2222-222222222222".into());
    replay.metadata.generation = Some(1);
    replay
}

/// Every Secret that the examples name, whole.
pub fn keys() -> Keys {
    let secret = |name: &str, keys: &[&str]| (name.to_owned(), keys.iter().map(|key| (*key).to_owned()).collect());
    Keys::from([
        secret("shop-cdc", &["username", "password"]),
        secret("shop-redis", &["url"]),
        secret("shop-ca", &["ca.crt"]),
        secret("shop-client", &["tls.crt", "tls.key"]),
        secret("replay-token", &["token"]),
        secret("analytics", &["username", "password"]),
    ])
}

/// A resource that was seen just now for the first time.
pub fn nothing_reported() -> Observation {
    Observation {
        report: None,
        silence: Duration::ZERO,
        connected: false,
        since_written: None,
    }
}

/// Waits until something is so, at most for half a minute.
pub async fn eventually(what: &str, mut check: impl AsyncFnMut() -> bool) {
    let deadline = Instant::now() + Duration::from_secs(120);
    while !check().await {
        assert!(Instant::now() < deadline, "never: {what}");
        tokio::time::sleep(Duration::from_millis(50)).await;
    }
}

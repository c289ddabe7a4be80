//! What the tests share: the examples as resources, and settings.
#![allow(dead_code, clippy::unwrap_used, clippy::expect_used, clippy::panic)]

pub mod apiserver;

use std::{fs, path::Path, time::Duration};

use k8s_openapi::{api::networking::v1::NetworkPolicyPeer, apimachinery::pkg::apis::meta::v1::LabelSelector};
use meander_crds::{CdcPipeline, ReplayJob};
use meander_operator::{context::Settings, progress::Observation, secrets::Keys, tls::Trust};
use serde::de::DeserializeOwned;
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

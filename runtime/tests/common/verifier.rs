//! `tests/verifier`, which compares ledger, Kafka and Redis.

use std::{
    path::{Path, PathBuf},
    process::{Command, Output},
    sync::OnceLock,
};

use meander_config::CaptureConfig;
use meander_test_support::{Kafka, Postgres, Redis};

/// Runs the verifier, which waits this long for what is missing.
pub fn verify(postgres: &Postgres, kafka: &Kafka, redis: &Redis, config: &CaptureConfig, wait: &str) -> Output {
    Command::new(verifier())
        .args([
            "-postgres",
            &postgres.url(),
            "-kafka",
            &kafka.bootstrap(),
            "-redis",
            &redis.url(),
        ])
        .args([
            "-topic-prefix",
            &config.kafka.topic_prefix,
            "-stream-prefix",
            &config.kafka.topic_prefix,
        ])
        .args(["-wait", wait, "-proto"])
        .arg(root().join("proto"))
        .output()
        .unwrap()
}

fn root() -> PathBuf {
    Path::new(env!("CARGO_MANIFEST_DIR")).join("..")
}

/// The program, built once.
fn verifier() -> &'static Path {
    static BUILT: OnceLock<PathBuf> = OnceLock::new();
    BUILT.get_or_init(|| {
        let verifier = Path::new(env!("CARGO_TARGET_TMPDIR")).join("meander-verify");
        let built = Command::new("go")
            .args(["build", "-o"])
            .arg(&verifier)
            .arg(".")
            .current_dir(root().join("tests/verifier"))
            .status()
            .expect("go, which builds the verifier");
        assert!(built.success(), "go build: {built}");
        verifier
    })
}

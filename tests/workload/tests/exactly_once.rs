//! Whatever happens to the capture process, Kafka and Redis hold what the ledger says: each committed change once, in order.
//!
//! Needs the built `meander-runtime` and Go, which builds the verifier.

#![allow(clippy::unwrap_used, clippy::expect_used, clippy::panic)]

use std::{
    env,
    path::{Path, PathBuf},
    process::{Command, Output},
    time::Duration,
};

use meander_config::{
    CaptureConfig, KafkaSink, PostgresSource, Publication, PublicationManagement, RedisSink, ResourceIdentity,
    TableSelection,
};
use meander_test_support::{Kafka, Postgres, Redis, Runtime, eventually, free_address, unique_name};
use meander_workload::load::{self, Load};
use redis::{AsyncCommands as _, streams::StreamRangeReply};

const LIMIT: Duration = Duration::from_secs(60);
const CHANGES: u64 = 5000;

/// Builds the verifier, unless it is named by `MEANDER_VERIFY`.
fn verifier() -> PathBuf {
    if let Some(path) = env::var_os("MEANDER_VERIFY") {
        return path.into();
    }
    let binary = Path::new(env!("CARGO_TARGET_TMPDIR")).join("meander-verify");
    let built = Command::new("go")
        .args(["build", "-o"])
        .arg(&binary)
        .arg(".")
        .current_dir(Path::new(env!("CARGO_MANIFEST_DIR")).join("../verifier"))
        .status()
        .expect("go, which builds the verifier");
    assert!(built.success(), "go build: {built}");
    binary
}

/// Runs the verifier; it waits this long for what is missing.
fn verify(postgres: &Postgres, kafka: &Kafka, redis: &Redis, prefix: &str, wait: &str) -> Output {
    Command::new(verifier())
        .args(["-wait", wait])
        .args([
            "-postgres",
            &postgres.url(),
            "-kafka",
            &kafka.bootstrap(),
            "-topic-prefix",
            prefix,
        ])
        .args(["-redis", &redis.url(), "-stream-prefix", prefix, "-proto"])
        .arg(Path::new(env!("CARGO_MANIFEST_DIR")).join("../../proto"))
        .output()
        .unwrap()
}

fn config(postgres: &Postgres, kafka: &Kafka, redis: &Redis) -> CaptureConfig {
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
            tables: TableSelection {
                include: vec!["public.*".to_owned()],
                exclude: vec![],
            },
            publication: Publication {
                name: name.clone(),
                management: PublicationManagement::Managed,
            },
            slot_name: name.clone(),
        },
        kafka: KafkaSink {
            bootstrap_servers: vec![kafka.bootstrap()],
            topic_prefix: name.clone(),
            partitions: 3,
            replication_factor: None,
        },
        redis: Some(RedisSink {
            url_file: redis.url_file(),
            stream_prefix: name,
            max_length: None,
        }),
        operator: None,
        admin_address: free_address(),
    }
}

#[tokio::test(flavor = "multi_thread")]
async fn five_crashes_in_mid_stream_lose_and_repeat_nothing() {
    let postgres = Postgres::start(&[]).await;
    let redis = Redis::start().await;
    let kafka = Kafka::shared().await;
    load::prepare(&postgres.client().await, "public.trades").await.unwrap();
    let config = config(&postgres, kafka, &redis);
    let prefix = config.kafka.topic_prefix.clone();
    let mut capture = Runtime::capture(&config);
    capture.ready(LIMIT).await;

    let load = Load {
        table: "public.trades".to_owned(),
        changes: CHANGES,
        rate: 400.0,
        seed: 11,
        clients: 3,
        key_changes: true,
    };
    let database = postgres.url().parse().unwrap();
    let loading = tokio::spawn(async move { load::run(&database, &load).await });
    let mut connection = redis.connection().await;
    for crash in 1..=5 {
        let enough = crash * CHANGES / 6;
        eventually("a part of the changes is in Redis", LIMIT, async || {
            let length: u64 = redis::cmd("XLEN")
                .arg(format!("{prefix}.public.trades"))
                .query_async(&mut connection)
                .await
                .unwrap();
            if length >= enough {
                Ok(())
            } else {
                Err(format!("{length} of {enough}"))
            }
        })
        .await;
        capture.kill9();
        capture.start_again();
    }
    loading.await.unwrap().unwrap();

    let output = verify(&postgres, kafka, &redis, &prefix, "60s");
    let report = String::from_utf8_lossy(&output.stdout);
    assert!(
        output.status.success(),
        "{}\n{report}{}",
        output.status,
        String::from_utf8_lossy(&output.stderr)
    );

    // The verifier is no good if it always agrees.
    let stream = format!("{prefix}.public.trades");
    let entries: StreamRangeReply = connection.xrange_count(&stream, "-", "+", 1).await.unwrap();
    let () = connection.xdel(&stream, &[&entries.ids[0].id]).await.unwrap();
    let output = verify(&postgres, kafka, &redis, &prefix, "1s");
    let report = String::from_utf8_lossy(&output.stdout);
    assert_eq!(output.status.code(), Some(1), "{report}");
    assert!(report.contains("missing: transaction"), "{report}");
}

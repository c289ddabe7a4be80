//! A replay under which Kafka goes away.
#![allow(clippy::unwrap_used, clippy::expect_used, clippy::panic)]

mod common;

use common::{LIMIT, checkpoint, config};
use meander_config::{ReplayConfig, ReplayEnd, ReplayOrder, ReplayStart, ReplayTarget, ResourceIdentity, Speed};
use meander_proto::v1::{ReplayRequest, replayer_client::ReplayerClient};
use meander_runtime::{
    position::Position,
    replay::{self, End},
};
use meander_test_support::{Kafka, Postgres, Runtime, eventually, free_address};
use meander_workload::receive::position;
use tokio::{sync::mpsc, time::timeout};
use tokio_stream::wrappers::ReceiverStream;
use tokio_util::sync::CancellationToken;
use tonic::{Request, transport::Endpoint};

/// Far more than a replay fetches ahead: 40 MB.
const ROWS: usize = 40_000;

#[tokio::test(flavor = "multi_thread")]
async fn a_replay_survives_a_restart_of_kafka_with_nothing_left_out_or_doubled() {
    let (postgres, mut kafka) = (Postgres::start(&[]).await, Kafka::start().await);
    let client = postgres.client().await;
    client
        .batch_execute("CREATE TABLE t (id int PRIMARY KEY, filling text)")
        .await
        .unwrap();
    let pipeline = config(&postgres, &kafka, None);
    let mut capture = Runtime::capture(&pipeline);
    capture.ready(LIMIT).await;
    let insert = format!("INSERT INTO t SELECT id, repeat('x', 1000) FROM generate_series(1, {ROWS}) id");
    client.batch_execute(&insert).await.unwrap();
    eventually("everything is published", LIMIT, async || match checkpoint(&pipeline) {
        Some(checkpoint) if checkpoint.events_total >= ROWS as u64 && checkpoint.complete.is_some() => Ok(()),
        other => Err(format!("{other:?}")),
    })
    .await;
    capture.terminate(LIMIT);

    let folder = tempfile::tempdir().unwrap();
    let token_file = folder.path().join("token");
    std::fs::write(&token_file, "let-me-in").unwrap();
    let address = free_address();
    let replay = tokio::spawn(replay::run(
        ReplayConfig {
            job: ResourceIdentity {
                uid: "42".to_owned(),
                ..pipeline.pipeline.clone()
            },
            pipeline: pipeline.pipeline.clone(),
            slot_name: pipeline.source.slot_name.clone(),
            kafka: pipeline.kafka.log(),
            from: ReplayStart::Beginning,
            to: ReplayEnd::Now,
            speed: Speed::Max,
            suspended: false,
            filter: None,
            max_gap_seconds: None,
            order: ReplayOrder::Commit,
            target: ReplayTarget::GrpcServe {
                address,
                token_file,
                certificate: None,
            },
            operator: None,
            admin_address: free_address(),
            termination_message_file: None,
        },
        CancellationToken::new(),
    ));
    let channel = eventually("the replay serves", LIMIT, async || {
        let endpoint = Endpoint::from_shared(format!("http://{address}")).unwrap();
        endpoint.connect().await
    })
    .await;
    let (requests, sent) = mpsc::channel(16);
    let says = |resume_token: String, credit: u32| ReplayRequest { resume_token, credit };
    requests.send(says(String::new(), 2)).await.unwrap();
    let mut request = Request::new(ReceiverStream::new(sent));
    let token = "Bearer let-me-in".parse().unwrap();
    request.metadata_mut().insert("authorization", token);
    let answer = ReplayerClient::new(channel).replay_event(request).await;
    let mut events = answer.unwrap().into_inner();

    let mut taken: Vec<Position> = Vec::new();
    while let Some(event) = timeout(LIMIT, events.message()).await.unwrap().unwrap() {
        let first = taken.is_empty();
        taken.extend(event.records.iter().map(|record| {
            position(record.coordinate.as_ref().unwrap())
                .parse::<Position>()
                .unwrap()
        }));
        if first {
            kafka.kill9();
            kafka.start_again().await;
        }
        requests.send(says(event.resume_token, 2)).await.unwrap();
    }
    assert!(taken.is_sorted_by(|one, next| one < next), "out of order or doubled");
    assert_eq!(taken.len(), ROWS);
    assert_eq!(timeout(LIMIT, replay).await.unwrap().unwrap().unwrap(), End::Complete);
}

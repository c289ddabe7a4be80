//! The receiver answers as a replay expects it, and can be asked what it serves.

#![allow(clippy::unwrap_used, clippy::expect_used, clippy::panic)]

use std::time::Duration;

use meander_proto::v1::{Coordinate, ReplayEvent, ReplayedRecord, replay_receiver_client::ReplayReceiverClient};
use meander_test_support::{eventually, free_address};
use meander_workload::receive;
use tonic::transport::Endpoint;
use tonic_health::pb::{HealthCheckRequest, health_client::HealthClient};

#[tokio::test]
async fn each_message_is_answered_in_order() {
    let address = free_address();
    tokio::spawn(receive::serve(address, None));
    let url = format!("http://{address}");
    let mut client = eventually("the receiver answers", Duration::from_secs(10), async || {
        ReplayReceiverClient::connect(url.clone()).await
    })
    .await;

    let events = (0..5).map(|number| ReplayEvent {
        records: vec![ReplayedRecord {
            coordinate: Some(Coordinate {
                epoch: 1,
                commit_lsn: 0xA0,
                ordinal: number,
                part: 0,
            }),
            ..Default::default()
        }],
        resume_token: number.to_string(),
        topics: vec!["shop.public.trades".to_owned()],
    });
    let mut answers = client.deliver(tokio_stream::iter(events)).await.unwrap().into_inner();

    for number in 0..5 {
        assert_eq!(
            answers.message().await.unwrap().unwrap().resume_token,
            number.to_string()
        );
    }
    assert!(answers.message().await.unwrap().is_none());

    let mut health = HealthClient::new(Endpoint::from_shared(url).unwrap().connect().await.unwrap());
    let request = HealthCheckRequest {
        service: "meander.v1.ReplayReceiver".to_owned(),
    };
    assert_eq!(health.check(request).await.unwrap().into_inner().status, 1);
}

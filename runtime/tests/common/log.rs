//! Reads what a capture wrote to Kafka.

use meander_proto::v1::ChangeRecord;
use meander_runtime::log::POSITION_HEADER;
use meander_test_support::{Kafka, eventually};
use prost::Message as _;
use rdkafka::{Message as _, message::Headers as _};

use crate::common::LIMIT;

/// Everything that a `read_committed` consumer sees of a topic, in position order: position, key, record.
pub fn read_topic(kafka: &Kafka, topic: &str) -> Vec<(String, Option<String>, ChangeRecord)> {
    let mut records = Vec::new();
    kafka.read(
        |name| name == topic,
        |message| {
            let header = message
                .headers()
                .unwrap()
                .iter()
                .find(|header| header.key == POSITION_HEADER)
                .unwrap();
            records.push((
                String::from_utf8(header.value.unwrap().to_vec()).unwrap(),
                message.key().map(|key| String::from_utf8(key.to_vec()).unwrap()),
                ChangeRecord::decode(message.payload().unwrap()).unwrap(),
            ));
        },
    );
    records.sort_by_key(|(_, _, record)| {
        let at = record.coordinate.unwrap();
        (at.epoch, at.commit_lsn, at.ordinal, at.part)
    });
    records
}

/// Reads the topic until it holds this many records.
pub async fn wait_for_records(kafka: &Kafka, topic: &str, count: usize) -> Vec<(String, Option<String>, ChangeRecord)> {
    eventually("the records are in Kafka", LIMIT, async || {
        let records = tokio::task::block_in_place(|| read_topic(kafka, topic));
        if records.len() >= count {
            Ok(records)
        } else {
            Err(format!("{} of {count}", records.len()))
        }
    })
    .await
}

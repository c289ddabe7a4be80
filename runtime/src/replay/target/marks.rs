//! What a replayed record says of itself beside what it was.

use rdkafka::message::{Header, OwnedHeaders};

use crate::{
    log::{
        COMMIT_TIME_HEADER, PART_HEADER, POSITION_HEADER, REPLAY_ATTEMPT_HEADER, REPLAY_JOB_HEADER,
        REPLAY_OFFSET_HEADER, REPLAY_PARTITION_HEADER, REPLAY_TOPIC_HEADER,
    },
    replay::record::Record,
};

/// The headers of a record as it was, and those that say by which job and from where it was replayed.
pub(super) fn headers(record: &Record, job: &str, attempt: Option<u32>) -> OwnedHeaders {
    let [position, commit_time, partition, offset] = [
        record.coordinate.position.to_string(),
        record.commit_time.to_string(),
        record.partition.to_string(),
        record.offset.to_string(),
    ];
    let part = (record.coordinate.part > 0).then(|| record.coordinate.part.to_string());
    let attempt = attempt.map(|attempt| attempt.to_string());
    let own = [
        (POSITION_HEADER, Some(position.as_str())),
        (COMMIT_TIME_HEADER, Some(&commit_time)),
        (PART_HEADER, part.as_deref()),
        (REPLAY_JOB_HEADER, Some(job)),
        (REPLAY_ATTEMPT_HEADER, attempt.as_deref()),
        (REPLAY_TOPIC_HEADER, Some(&record.topic)),
        (REPLAY_PARTITION_HEADER, Some(&partition)),
        (REPLAY_OFFSET_HEADER, Some(&offset)),
    ];
    let own = own
        .iter()
        .filter_map(|(key, value)| Some((*key, value.as_ref()?.as_bytes())));
    let others = record.headers.iter().map(|(key, value)| (key.as_str(), &value[..]));
    own.chain(others).fold(OwnedHeaders::new(), |headers, (key, value)| {
        headers.insert(Header {
            key,
            value: Some(value),
        })
    })
}

//! A batch as a message of `meander.v1`.

use std::sync::Arc;

use bytes::BufMut;
use meander_proto::v1::{ReplayEvent, ReplayedRecord};
use prost::{
    EncodeError, Message as _,
    encoding::{WireType, encode_key, encode_varint, encoded_len_varint},
};

use super::Batch;
use crate::replay::record::Record;

/// Fields of `ReplayEvent` and of `ReplayedRecord`.
const RECORDS: u32 = 1;
const KEY: u32 = 6;
const VALUE: u32 = 7;

impl Batch {
    /// As a message of `meander.v1`.
    #[must_use]
    pub fn event(&self) -> ReplayEvent {
        let mut topics = Topics::default();
        let records = self.records.iter().map(|record| ReplayedRecord {
            key: record.key.clone(),
            value: record.value.clone(),
            ..topics.head(record)
        });
        ReplayEvent {
            records: records.collect(),
            resume_token: self.mark.resume.to_string(),
            topics: topics.names(),
        }
    }

    /// About how many bytes that message has.
    #[must_use]
    pub fn size(&self) -> usize {
        self.records.iter().map(Record::size).sum()
    }

    /// Writes the same message in its wire form; keys and values go into it from where they lie.
    ///
    /// # Errors
    /// When the buffer has no room.
    pub fn encode(&self, buffer: &mut impl BufMut) -> Result<(), EncodeError> {
        let mut topics = Topics::default();
        for record in &self.records {
            let head = topics.head(record);
            let bytes = [(KEY, &record.key), (VALUE, &record.value)];
            let lengths = bytes
                .iter()
                .map(|(_, bytes)| 1 + encoded_len_varint(bytes.len() as u64) + bytes.len());
            encode_key(RECORDS, WireType::LengthDelimited, buffer);
            encode_varint((head.encoded_len() + lengths.sum::<usize>()) as u64, buffer);
            head.encode(buffer)?;
            for (field, bytes) in bytes {
                encode_key(field, WireType::LengthDelimited, buffer);
                encode_varint(bytes.len() as u64, buffer);
                buffer.put_slice(bytes);
            }
        }
        let rest = ReplayEvent {
            records: Vec::new(),
            resume_token: self.mark.resume.to_string(),
            topics: topics.names(),
        };
        rest.encode(buffer)
    }
}

/// The topics of a message, each once.
#[derive(Default)]
struct Topics<'a> {
    topics: Vec<&'a Arc<str>>,
    /// That of the last record.
    last: usize,
}

impl<'a> Topics<'a> {
    /// A record without its key and its value.
    fn head(&mut self, record: &'a Record) -> ReplayedRecord {
        // Most often it is that of the record before.
        if self.topics.get(self.last).is_none_or(|last| **last != record.topic) {
            let known = self.topics.iter().position(|known| **known == record.topic);
            self.last = known.unwrap_or(self.topics.len());
            if known.is_none() {
                self.topics.push(&record.topic);
            }
        }
        ReplayedRecord {
            coordinate: Some(record.coordinate.into()),
            commit_time_micros: record.commit_time,
            topic: u32::try_from(self.last).unwrap_or(u32::MAX),
            partition: record.partition,
            offset: record.offset,
            ..ReplayedRecord::default()
        }
    }

    fn names(&self) -> Vec<String> {
        self.topics.iter().map(ToString::to_string).collect()
    }
}

#[cfg(test)]
mod tests {
    use bytes::Bytes;
    use tokio::time::Instant;

    use super::*;
    use crate::{
        position::{Epoch, Lsn, Position},
        replay::{
            record::{Coordinate, Passed},
            target::Mark,
        },
    };

    #[test]
    fn the_wire_form_is_that_of_the_message() {
        let record = |number: u8, topic: &str, key: &[u8], value: &[u8]| Record {
            coordinate: Coordinate {
                position: Position {
                    epoch: Epoch(number),
                    commit_lsn: Lsn(u64::MAX - u64::from(number)),
                    ordinal: number.into(),
                },
                part: number.into(),
            },
            timestamp: 1,
            commit_time: -i64::from(number),
            topic: Arc::from(topic),
            partition: number.into(),
            offset: number.into(),
            key: Bytes::copy_from_slice(key),
            value: Bytes::copy_from_slice(value),
            passed: Passed::default(),
            next: (0, 1),
            others: Vec::new(),
            headers: Vec::new(),
        };
        let records = vec![
            record(0, "shop.public.trades", b"", b""),
            record(1, "shop.public.orders", b"1", &[b'v'; 300]),
            record(255, "shop.public.trades", &[b'k'; 128], b"2"),
        ];
        let mark = Mark {
            records: 3,
            passed: Passed::default(),
            first_time: 0,
            last_time: 0,
            resume: (&records[2]).into(),
            handed: Instant::now(),
        };
        let batch = Batch {
            records,
            whole: true,
            mark,
        };
        let mut wire = Vec::new();
        batch.encode(&mut wire).unwrap();
        assert!(wire.len() <= batch.size() + 64, "{} of {}", wire.len(), batch.size());
        let message = ReplayEvent::decode(&*wire).unwrap();
        assert_eq!(message, batch.event());
        assert_eq!(message.topics, ["shop.public.trades", "shop.public.orders"]);
        assert_eq!(
            message.records.iter().map(|record| record.topic).collect::<Vec<_>>(),
            [0, 1, 0]
        );
    }
}

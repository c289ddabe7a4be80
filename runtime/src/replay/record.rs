//! One record of the log, as a replay carries it.

use std::{fmt, ops::AddAssign, str::FromStr, sync::Arc};

use bytes::{Bytes, BytesMut};
use meander_proto::v1;
use rdkafka::{Message, message::Headers as _};

use crate::{
    log::{COMMIT_TIME_HEADER, PART_HEADER, POSITION_HEADER, REPLAY_JOB_HEADER},
    position::{Epoch, Lsn, Position},
};

/// Bytes of a piece of memory that records are copied to.
const MEMORY: usize = 16 << 10;

/// The place of a record in commit order.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub struct Coordinate {
    /// The change.
    pub position: Position,
    /// Tells the records of one change apart.
    pub part: u32,
}

impl fmt::Display for Coordinate {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{}#{}", self.position, self.part)
    }
}

/// Tells the transactions of the source apart.
pub type Transaction = (Epoch, Lsn);

/// A record as it is stored in Kafka, with what its headers say.
#[derive(Clone, Debug)]
pub struct Record {
    /// Its place in commit order.
    pub coordinate: Coordinate,
    /// The record's own timestamp in milliseconds, which never falls in commit order.
    pub timestamp: i64,
    /// The source's commit time in microseconds, which can run backwards by a little.
    pub commit_time: i64,
    /// Its topic.
    pub topic: Arc<str>,
    /// Its partition.
    pub partition: i32,
    /// Its offset.
    pub offset: i64,
    /// Its key.
    pub key: Bytes,
    /// Its value.
    pub value: Bytes,
    /// Its headers, without those that the coordinate and the commit time are in.
    pub headers: Vec<(String, Bytes)>,
    /// What else of the range is behind once this record is delivered.
    pub passed: Passed,
    /// Where its partition goes on once it is delivered.
    pub next: Next,
    /// Where others go on that were passed over without a record.
    pub others: Vec<Next>,
}

/// Where a partition goes on: its index in the range, and an offset.
pub type Next = (usize, i64);

/// A stretch of the range, in the order of the replay.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Passed {
    /// Offsets of all partitions: those of records, of marks of Kafka's transactions, and of what was aborted.
    pub offsets: u64,
    /// Records that the filter leaves out.
    pub filtered: u64,
}

impl AddAssign for Passed {
    fn add_assign(&mut self, more: Self) {
        self.offsets += more.offsets;
        self.filtered += more.filtered;
    }
}

/// A header is missing or says nothing that can be understood.
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
pub enum InvalidHeader {
    /// It is not there.
    #[error("it has no header {0}")]
    Missing(&'static str),
    /// It cannot be understood.
    #[error("its header {name} is {value:?}")]
    Unreadable {
        /// The header.
        name: &'static str,
        /// What it holds.
        value: String,
    },
    /// It is no history.
    #[error("the replay {0} wrote it")]
    Replayed(String),
    /// The record carries no timestamp.
    #[error("it has no timestamp")]
    NoTimestamp,
}

impl Record {
    /// Copies a record out of the client's buffer, into `memory`. What is copied there lies side by side, so that not each record costs
    /// an allocation; a piece of memory is given back with the last record in it.
    ///
    /// # Errors
    /// When its headers do not say what it is.
    pub fn read(topic: &Arc<str>, message: &impl Message, memory: &mut BytesMut) -> Result<Self, InvalidHeader> {
        let (mut position, mut commit_time, mut part, mut others) = (None, None, 0, Vec::new());
        for header in message.headers().into_iter().flat_map(|headers| headers.iter()) {
            let value = header.value.unwrap_or_default();
            match header.key {
                POSITION_HEADER => position = Some(parse(POSITION_HEADER, value)?),
                COMMIT_TIME_HEADER => commit_time = Some(parse(COMMIT_TIME_HEADER, value)?),
                PART_HEADER => part = parse(PART_HEADER, value)?,
                REPLAY_JOB_HEADER => {
                    return Err(InvalidHeader::Replayed(String::from_utf8_lossy(value).into_owned()));
                }
                name => others.push((name.to_owned(), Bytes::copy_from_slice(value))),
            }
        }
        let position = position.ok_or(InvalidHeader::Missing(POSITION_HEADER))?;
        let commit_time = commit_time.ok_or(InvalidHeader::Missing(COMMIT_TIME_HEADER))?;
        let mut copied = |bytes: Option<&[u8]>| {
            let bytes = bytes.unwrap_or_default();
            if memory.capacity() < bytes.len() {
                *memory = BytesMut::with_capacity(bytes.len().max(MEMORY));
            }
            memory.extend_from_slice(bytes);
            memory.split().freeze()
        };
        Ok(Self {
            coordinate: Coordinate { position, part },
            timestamp: message.timestamp().to_millis().ok_or(InvalidHeader::NoTimestamp)?,
            commit_time,
            topic: Arc::clone(topic),
            partition: message.partition(),
            offset: message.offset(),
            key: copied(message.key()),
            value: copied(message.payload()),
            passed: Passed::default(),
            next: Next::default(),
            others: Vec::new(),
            headers: others,
        })
    }

    /// Where partitions go on once it is delivered.
    pub fn places(&self) -> impl Iterator<Item = Next> {
        self.others.iter().copied().chain([self.next])
    }

    /// The time that the replay is paced by: the commit time to the microsecond, kept within the millisecond of the timestamp,
    /// which is the running maximum and was bounded by the clock of whoever captured it.
    #[must_use]
    pub fn event_time(&self) -> i64 {
        let millisecond = self.timestamp.saturating_mul(1000);
        self.commit_time.clamp(millisecond, millisecond.saturating_add(999))
    }

    /// What all changes of its transaction have in common.
    #[must_use]
    pub fn transaction(&self) -> Transaction {
        (self.coordinate.position.epoch, self.coordinate.position.commit_lsn)
    }

    /// About how much memory it takes.
    #[must_use]
    pub fn size(&self) -> usize {
        let headers = self.headers.iter().map(|(name, value)| name.len() + value.len() + 64);
        self.key.len() + self.value.len() + headers.sum::<usize>() + 128
    }
}

impl From<Coordinate> for v1::Coordinate {
    fn from(coordinate: Coordinate) -> Self {
        Self {
            epoch: coordinate.position.epoch.0.into(),
            commit_lsn: coordinate.position.commit_lsn.0,
            ordinal: coordinate.position.ordinal,
            part: coordinate.part,
        }
    }
}

fn parse<T: FromStr>(name: &'static str, value: &[u8]) -> Result<T, InvalidHeader> {
    std::str::from_utf8(value)
        .ok()
        .and_then(|text| text.parse().ok())
        .ok_or_else(|| InvalidHeader::Unreadable {
            name,
            value: String::from_utf8_lossy(value).into_owned(),
        })
}

/// Where a subscriber goes on: after this record.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct ResumeToken {
    /// The last record that was taken.
    pub coordinate: Coordinate,
    /// Its timestamp, by which its neighbours are found without reading everything before them.
    pub timestamp: i64,
}

/// `position#part@timestamp`, for example `1:0/16B3748:3#0@1763632800000`.
impl fmt::Display for ResumeToken {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{}@{}", self.coordinate, self.timestamp)
    }
}

/// The text is not a resume token.
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
#[error("{0:?} is not a resume token: send one that a message of this replay carried, or none")]
pub struct InvalidResumeToken(pub String);

impl FromStr for ResumeToken {
    type Err = InvalidResumeToken;

    fn from_str(text: &str) -> Result<Self, Self::Err> {
        let parse = || {
            let (coordinate, timestamp) = text.split_once('@')?;
            let (position, part) = coordinate.split_once('#')?;
            Some(Self {
                coordinate: Coordinate {
                    position: position.parse().ok()?,
                    part: part.parse().ok()?,
                },
                timestamp: timestamp.parse().ok()?,
            })
        };
        parse().ok_or_else(|| InvalidResumeToken(text.to_owned()))
    }
}

impl serde::Serialize for ResumeToken {
    fn serialize<S: serde::Serializer>(&self, serializer: S) -> Result<S::Ok, S::Error> {
        serializer.collect_str(self)
    }
}

impl<'de> serde::Deserialize<'de> for ResumeToken {
    fn deserialize<D: serde::Deserializer<'de>>(deserializer: D) -> Result<Self, D::Error> {
        String::deserialize(deserializer)?
            .parse()
            .map_err(serde::de::Error::custom)
    }
}

impl From<&Record> for ResumeToken {
    fn from(record: &Record) -> Self {
        Self {
            coordinate: record.coordinate,
            timestamp: record.timestamp,
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_resume_token_reads_back_as_it_was_written() {
        let token = "1:0/16B3748:3#1@1763632800000";
        assert_eq!(token.parse::<ResumeToken>().unwrap().to_string(), token);
        for wrong in [
            "",
            "1:0/16B3748:3",
            "1:0/16B3748:3#1",
            "1:0/16B3748:3@1",
            "x#1@1",
            "1:0/1:1#-1@1",
        ] {
            assert!(wrong.parse::<ResumeToken>().is_err(), "{wrong}");
        }
    }
}

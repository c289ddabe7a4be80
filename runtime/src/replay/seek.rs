//! Finds the place of a position in a partition.
//!
//! Kafka finds places by time. But positions never fall along a partition, so bisection finds theirs with a few reads.

use std::sync::Arc;

use bytes::BytesMut;
use rdkafka::{Message as _, message::OwnedMessage};

use super::{error::ReplayError, record::Record};
use crate::{checkpoint::Tail, position::Position};

/// A stretch of a partition that ends at or before its last stable offset.
pub struct Seek<'a> {
    /// Reads it.
    pub tail: &'a Tail,
    /// The topic.
    pub topic: &'a Arc<str>,
    /// The partition.
    pub partition: i32,
    /// The offsets.
    pub stretch: std::ops::Range<i64>,
}

impl Seek<'_> {
    /// The first offset at or after which no record is `before`, where all that are come first.
    ///
    /// # Errors
    /// When Kafka does not answer, or a record is not a pipeline's.
    pub fn partition_point(&self, before: impl Fn(Position) -> bool) -> Result<i64, ReplayError> {
        let std::ops::Range { mut start, mut end } = self.stretch.clone();
        while start < end {
            let middle = start + (end - start) / 2;
            match self.first_in(middle..end)? {
                Some(record) if before(record.coordinate.position) => start = record.offset + 1,
                _ => end = middle,
            }
        }
        Ok(end)
    }

    /// The first record that can be read at or after an offset.
    ///
    /// # Errors
    /// When Kafka does not answer, or the record is not a pipeline's.
    pub fn first_from(&self, offset: i64) -> Result<Option<Record>, ReplayError> {
        self.first_in(offset..self.stretch.end)
    }

    /// The last record that can be read before an offset.
    ///
    /// # Errors
    /// When Kafka does not answer, or the record is not a pipeline's.
    pub fn last_before(&self, offset: i64) -> Result<Option<Record>, ReplayError> {
        let found = self
            .tail
            .find_last_in(self.topic, self.partition, self.stretch.start..offset, |_| true)
            .map_err(ReplayError::TailUnreadable)?;
        found.map(|found| self.record(&found)).transpose()
    }

    fn first_in(&self, stretch: std::ops::Range<i64>) -> Result<Option<Record>, ReplayError> {
        let found = self
            .tail
            .first_in(self.topic, self.partition, stretch)
            .map_err(ReplayError::TailUnreadable)?;
        found.map(|found| self.record(&found)).transpose()
    }

    fn record(&self, message: &OwnedMessage) -> Result<Record, ReplayError> {
        Record::read(self.topic, message, &mut BytesMut::new()).map_err(|source| ReplayError::ForeignRecord {
            topic: self.topic.to_string(),
            partition: self.partition,
            offset: message.offset(),
            source,
        })
    }
}

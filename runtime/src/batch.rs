//! A batch of encoded records: one piece of memory that both sinks read.

use std::{ops::Range, sync::Arc};

use crate::{
    log::SnapshotState,
    position::{Lsn, Position},
    schema::Note,
    size_limit::SizeLimit,
};

/// A batch is handed on when it holds this many bytes, so a batch is at most this much and one record.
const FULL_BYTES: usize = 512 * 1024;
/// A batch is handed on when it holds this many records.
const FULL_RECORDS: usize = 4096;

/// Where the records of one table go: the Kafka topic and the Redis stream.
#[derive(Clone, Debug, Default)]
pub struct Destination {
    /// Kafka topic.
    pub topic: String,
    /// Redis stream; empty without a Redis sink.
    pub stream: String,
    /// What the topic takes of one record; what is not in the one sink for its size is not in the other.
    pub limit: SizeLimit,
}

/// A record that would have been larger than its topic takes.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Oversized {
    /// OID of the table; 0 if it is no table's.
    pub oid: u32,
    /// The table, as people call it.
    pub table: String,
    /// Its topic.
    pub topic: String,
    /// The change.
    pub position: Position,
    /// What it would have taken, in bytes.
    pub bytes: u64,
    /// What the topic takes, in bytes.
    pub limit: u64,
    /// As it is in the batch, without its large values, the topic takes it.
    pub fits: bool,
}

/// A place in a batch to go back to.
#[derive(Clone, Copy, Debug)]
pub struct Mark {
    bytes: usize,
    records: usize,
}

/// One encoded record.
#[derive(Clone, Debug)]
pub struct Record {
    /// Identity and order.
    pub position: Position,
    /// Tells records made of one change apart.
    pub part: u8,
    /// The source's commit time, in microseconds since the Unix epoch.
    pub commit_time_micros: i64,
    /// Timestamp of the Kafka record: the running maximum of the commit times, in milliseconds.
    pub timestamp_millis: i64,
    /// Where it goes.
    pub destination: Arc<Destination>,
    key: Option<Range<usize>>,
    value: Option<Range<usize>>,
    headers: Vec<(&'static str, Range<usize>)>,
}

/// Says that the capture lives, as the format has it. It is no event, and no replay has it.
#[derive(Clone, Debug)]
pub struct Heartbeat {
    /// Kafka topic. Its name does not begin with the prefix of the log.
    pub topic: String,
    /// Key of the record.
    pub key: Vec<u8>,
    /// Value of the record.
    pub value: Vec<u8>,
    /// Timestamp of the record.
    pub timestamp_millis: i64,
}

/// Records in commit order, and what is safe once they are durable.
#[derive(Clone, Debug, Default)]
pub struct Batch {
    bytes: Vec<u8>,
    records: Vec<Record>,
    /// The last transaction that ends in this batch or before it.
    pub complete: Option<Position>,
    /// Everything committed before this LSN is in this batch or before it. [`Lsn::ZERO`] if that is not known.
    pub safe: Lsn,
    /// The running maximum of the commit times, in microseconds since the Unix epoch.
    pub high_time_micros: i64,
    /// The server sent its last change long after it was committed, or rows of a bulk snapshot come: capture is behind, and a moment more does
    /// not matter.
    pub is_late: bool,
    /// The records cannot be made again from the WAL, as those of a snapshot cannot. Redis gets them only once Kafka has committed
    /// them: a crash in between would leave it with rows that the log does not have.
    pub kafka_first: bool,
    /// Records that are no events, but say where a snapshot or a transaction begins or ends.
    pub markers: usize,
    /// A record beside the log, in Kafka only. Of several that come together the last says it all.
    pub heartbeat: Option<Heartbeat>,
    /// What of the snapshot is done once this batch is in Kafka, if it says anything of that.
    pub snapshot: Option<SnapshotState>,
    /// Where the server's WAL ends, if it was shut down in good order after this batch.
    pub ended_at: Option<Lsn>,
    /// Schemas of tables that the log knows once this batch is in Kafka.
    pub schemas: Vec<Note>,
    /// Records that lack values for their size, in the order of their positions.
    pub oversized: Vec<Oversized>,
    /// Tables, by OID, of which nothing is lacking any more that came before a place: every row was read after it, or is gone.
    pub mended: Vec<(u32, Position)>,
}

impl Batch {
    /// An empty batch.
    #[must_use]
    pub fn new() -> Self {
        Self {
            bytes: Vec::with_capacity(1024),
            ..Self::default()
        }
    }

    /// An empty batch with room for as much as this one holds: while there is much to do, they are all alike.
    #[must_use]
    pub fn next(&self) -> Self {
        Self {
            bytes: Vec::with_capacity(self.bytes.len()),
            records: Vec::with_capacity(self.records.len()),
            ..Self::default()
        }
    }

    /// Appends a record. `key` writes the key and says whether there is one; `value` does the same for the value. A record without a
    /// value is a tombstone: nothing is left under its key.
    ///
    /// # Errors
    /// Those of `key` and `value`; the batch is then as it was.
    pub fn push<E>(
        &mut self,
        position: Position,
        part: u8,
        commit_time_micros: i64,
        destination: &Arc<Destination>,
        key: impl FnOnce(&mut Vec<u8>) -> Result<bool, E>,
        value: impl FnOnce(&mut Vec<u8>) -> Result<bool, E>,
    ) -> Result<(), E> {
        let start = self.bytes.len();
        let written = key(&mut self.bytes).and_then(|has_key| {
            let middle = self.bytes.len();
            let has_value = value(&mut self.bytes)?;
            let end = self.bytes.len();
            Ok((has_key.then_some(start..middle), has_value.then_some(middle..end)))
        });
        match written {
            Ok((key, value)) => {
                self.records.push(Record {
                    position,
                    part,
                    commit_time_micros,
                    timestamp_millis: self.high_time_micros.div_euclid(1000),
                    destination: Arc::clone(destination),
                    key,
                    value,
                    headers: Vec::new(),
                });
                Ok(())
            }
            Err(error) => {
                self.bytes.truncate(start);
                Err(error)
            }
        }
    }

    /// The number of the next record that is made of the change at `position`.
    #[must_use]
    pub fn next_part(&self, position: Position) -> u8 {
        match self.records.last() {
            Some(last) if last.position == position => last.part.saturating_add(1),
            _ => 0,
        }
    }

    /// Adds a header of the format to the last record. `value` writes it.
    pub fn header(&mut self, name: &'static str, value: impl FnOnce(&mut Vec<u8>)) {
        let start = self.bytes.len();
        value(&mut self.bytes);
        if let Some(record) = self.records.last_mut() {
            record.headers.push((name, start..self.bytes.len()));
        }
    }

    /// The end as it is now.
    #[must_use]
    pub fn mark(&self) -> Mark {
        Mark {
            bytes: self.bytes.len(),
            records: self.records.len(),
        }
    }

    /// Keys, values and headers of the records since then.
    #[must_use]
    pub fn since(&self, mark: &Mark) -> &[u8] {
        &self.bytes[mark.bytes..]
    }

    /// Takes the records since then out again.
    pub fn rewind(&mut self, mark: &Mark) {
        self.bytes.truncate(mark.bytes);
        // What is left out is not to take its memory until the batch is published.
        self.bytes.shrink_to(FULL_BYTES);
        self.records.truncate(mark.records);
    }

    /// The records in commit order.
    #[must_use]
    pub fn records(&self) -> &[Record] {
        &self.records
    }

    /// The key of a record of this batch.
    #[must_use]
    pub fn key(&self, record: &Record) -> Option<&[u8]> {
        record.key.clone().map(|range| &self.bytes[range])
    }

    /// The value of a record of this batch; none for a tombstone.
    #[must_use]
    pub fn value(&self, record: &Record) -> Option<&[u8]> {
        record.value.clone().map(|range| &self.bytes[range])
    }

    /// The headers that the format gave a record of this batch.
    pub fn headers<'a>(&'a self, record: &'a Record) -> impl Iterator<Item = (&'static str, &'a [u8])> {
        record
            .headers
            .iter()
            .map(|(name, range)| (*name, &self.bytes[range.clone()]))
    }

    /// The position of the last record.
    #[must_use]
    pub fn last(&self) -> Option<Position> {
        self.records.last().map(|record| record.position)
    }

    /// True when it should be handed on whatever else is waiting.
    #[must_use]
    pub fn is_full(&self) -> bool {
        self.bytes.len() >= FULL_BYTES || self.records.len() >= FULL_RECORDS
    }

    /// Bytes of keys, values and headers.
    #[must_use]
    pub fn size(&self) -> usize {
        self.bytes.len()
    }

    /// About how much memory it takes.
    #[must_use]
    pub fn memory(&self) -> usize {
        self.bytes.capacity() + self.records.capacity() * size_of::<Record>() + size_of::<Self>()
    }
}

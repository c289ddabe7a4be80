//! Copies from Kafka what Redis lacks: a replay into Redis, of the stored bytes, in commit order, from the mark to the end of the log.

use std::cmp::Ordering;

use meander_config::KafkaLog;
use tokio::{sync::mpsc, task::spawn_blocking};
use tokio_util::sync::CancellationToken;

use crate::{
    log::{Checkpoint, stream_of_topic},
    position::Position,
    replay::{
        error::ReplayError,
        range::{self, Range},
        reader::{self, Read, Reading},
        record::{Coordinate, Record},
    },
    sink::{
        SinkError,
        redis::{Entry, Writer, said},
    },
};

/// Memory for what is fetched ahead, over all partitions.
const PREFETCH_BYTES: usize = 4 << 20;
/// How far the clocks of two machines that captured one after the other may differ: the timestamps of the log are bounded by them.
const CLOCK_DIFFERENCE_MILLIS: i64 = 5_000;

/// Where the log is, and what the streams are called.
#[derive(Clone, Debug)]
pub(super) struct Source {
    pub(super) kafka: KafkaLog,
    pub(super) checkpoint_topic: String,
    /// Name of the consumer.
    pub(super) group: String,
    pub(super) stream_prefix: String,
}

impl Source {
    /// Copies everything after the mark, up to the last change of a committed checkpoint. `copied` is told how many records were
    /// written, each time that some were.
    ///
    /// # Errors
    /// When Kafka cannot be read or Redis not be written to, or when Kafka no longer holds all of it: then nothing is written, unless
    /// somebody allowed it.
    pub(super) async fn refill(
        &self,
        writer: &mut Writer,
        log: &Checkpoint,
        mut copied: impl FnMut(&Writer, usize),
    ) -> Result<(), SinkError> {
        let Some(end) = log.published else { return Ok(()) };
        let range = self.range(writer.place.timestamp_millis, end).await?;
        // It is read twice, since nothing but the records themselves tells what is missing: a topic that was deleted leaves no trace.
        let held = self.count(range.clone(), writer.place.position).await?;
        missing(writer, log, held).await?;
        let mut reads = self.read(range, writer.place.position);
        let mut records: Vec<Record> = Vec::new();
        loop {
            // The records of one change can come in two pieces, and the mark speaks of whole changes.
            let whole = match next(&mut reads).await? {
                Some(mut more) => {
                    records.append(&mut more);
                    let last = records.last().map(|record| record.coordinate.position);
                    records.partition_point(|record| Some(record.coordinate.position) < last)
                }
                None => records.len(),
            };
            let rest = records.split_off(whole);
            self.write(writer, &records).await?;
            if rest.is_empty() {
                writer.confirm().await?;
            } else {
                writer.confirm_some().await?;
            }
            copied(writer, records.len());
            if rest.is_empty() {
                return Ok(());
            }
            records = rest;
        }
    }

    async fn range(&self, from: Option<i64>, end: Position) -> Result<Range, SinkError> {
        let stop = CancellationToken::new();
        let _stop_on_return = stop.clone().drop_guard();
        let source = self.clone();
        let from = from.map(|from| from.saturating_sub(CLOCK_DIFFERENCE_MILLIS).max(0));
        let mut range = spawn_blocking(move || range::up_to(&source.kafka, &source.checkpoint_topic, from, end, &stop))
            .await
            .map_err(|error| SinkError::Refill(error.to_string()))?
            .map_err(|error| failed(&error))?;
        // What is missing is found out by counting.
        for stretch in &mut range.partitions {
            stretch.truncated = false;
        }
        Ok(range)
    }

    fn read(&self, range: Range, after: Option<Position>) -> mpsc::Receiver<Result<Read, ReplayError>> {
        let after = after.map(|position| Coordinate {
            position,
            part: u32::MAX,
        });
        let reading = Reading {
            range,
            after,
            filter: None,
            side_by_side: false,
            places: false,
        };
        reader::start_with(&self.kafka, self.group.clone(), PREFETCH_BYTES, reading)
    }

    /// How many records Kafka holds.
    async fn count(&self, range: Range, after: Option<Position>) -> Result<u64, SinkError> {
        let mut reads = self.read(range, after);
        let mut count = 0;
        while let Some(records) = next(&mut reads).await? {
            count += records.len() as u64;
        }
        Ok(count)
    }

    async fn write(&self, writer: &mut Writer, records: &[Record]) -> Result<(), SinkError> {
        let stranger = |record: &Record| {
            let Record {
                topic,
                partition,
                offset,
                ..
            } = record;
            SinkError::Refill(format!(
                "the record at offset {offset} of partition {partition} of {topic} is not from this pipeline"
            ))
        };
        let streams: Vec<String> = records
            .iter()
            .map(|record| {
                stream_of_topic(&record.topic, &self.kafka.topic_prefix, &self.stream_prefix)
                    .ok_or_else(|| stranger(record))
            })
            .collect::<Result<_, _>>()?;
        let entries: Vec<Entry<'_>> = records
            .iter()
            .zip(&streams)
            .map(|(record, stream)| {
                Ok(Entry {
                    stream,
                    position: record.coordinate.position,
                    part: u8::try_from(record.coordinate.part).map_err(|_| stranger(record))?,
                    timestamp_millis: record.timestamp,
                    // No format has an empty key or value.
                    key: (!record.key.is_empty()).then_some(&record.key),
                    value: (!record.value.is_empty()).then_some(&record.value),
                    headers: record.headers.iter().map(|(name, value)| (&**name, &**value)).collect(),
                })
            })
            .collect::<Result<_, SinkError>>()?;
        writer.append(&entries).await
    }
}

/// Judges what is missing when Kafka holds so many of the records after the mark.
///
/// The mark counts the records up to it and the checkpoint those up to its own position, and none is counted twice: so the difference
/// is how many there must be. Records and not changes: those of one change can be in partitions that lose them at different times.
pub(super) async fn missing(writer: &mut Writer, log: &Checkpoint, held: u64) -> Result<(), SinkError> {
    let (counted, accept) = (writer.place.records, writer.place.accept);
    // What the mark counts if nothing is missing.
    let due = log.records_total.saturating_sub(held);
    let after = said(writer.place.position);
    let mut phantoms = None;
    match due.cmp(&counted) {
        Ordering::Equal if accept.is_none() => return Ok(()),
        // What was accepted is not missing.
        Ordering::Equal => {}
        Ordering::Greater if accept == Some(due - counted) => {
            tracing::warn!(
                missing = due - counted,
                after,
                "Redis goes on without entries, as somebody allowed"
            );
        }
        Ordering::Greater => return Err(writer.gap(due - counted)),
        // A runtime died after Redis had them and before Kafka did, and nobody can read them again: the slot was dropped, or the server
        // died as well and the standby that took over lacks them.
        Ordering::Less => {
            let more = counted - due;
            tracing::warn!(
                more,
                upto = after,
                "Redis holds entries that Kafka lacks, and that PostgreSQL no longer has"
            );
            phantoms = writer.place.position.and_then(|position| {
                let parting = log.lost_with(position)?;
                Some(Position {
                    commit_lsn: parting.at,
                    ordinal: 0,
                    ..position
                })
            });
        }
    }
    writer.set_count(due, phantoms).await
}

/// The next records in commit order; none at the end.
async fn next(reads: &mut mpsc::Receiver<Result<Read, ReplayError>>) -> Result<Option<Vec<Record>>, SinkError> {
    loop {
        match reads.recv().await {
            Some(Ok(Read::Records(records))) => return Ok(Some(records)),
            // What that means is judged by the count of records.
            Some(Ok(Read::LeftOut(_) | Read::Live)) => {}
            Some(Ok(Read::End(_))) => return Ok(None),
            Some(Err(error)) => return Err(failed(&error)),
            None => return Err(failed(&ReplayError::TaskStopped("the reader"))),
        }
    }
}

fn failed(error: &ReplayError) -> SinkError {
    SinkError::Refill(error.to_string())
}

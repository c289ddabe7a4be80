//! What the log in Kafka looks like: names of topics and headers, and the checkpoint.
//!
//! Capture writes it and replay reads it, so both find the rules here.

use std::{borrow::Cow, collections::BTreeMap};

use rdkafka::{Message, message::Headers as _};
use serde::{Deserialize, Serialize};

use crate::{
    position::{Epoch, Lsn, Position},
    size_limit::room_for,
};

/// Header of every data record: its [`Position`] as text.
pub const POSITION_HEADER: &str = "meander-position";
/// Header of the records of one change that was split, but for the first: the part number as decimal text.
pub const PART_HEADER: &str = "meander-part";
/// Header of every data record: the source's commit time in microseconds since the Unix epoch, as decimal text. The record's own
/// timestamp is the running maximum of these, in milliseconds.
pub const COMMIT_TIME_HEADER: &str = "meander-commit-time";

/// Header of a record that lacks values, since with them it would have been larger than its topic takes: its size with them in bytes, as decimal
/// text. The value says which they are.
pub const OVERSIZED_HEADER: &str = "meander-oversized";

/// Headers that a replay gives every record that it writes, beside those that the record had: `namespace/name/UID` of the `ReplayJob`,
/// and how many times it has begun or gone on. No reader of a log takes such a record for history.
pub const REPLAY_JOB_HEADER: &str = "meander-replay-job";
/// See [`REPLAY_JOB_HEADER`].
pub const REPLAY_ATTEMPT_HEADER: &str = "meander-replay-attempt";
/// Topic of the record that was replayed.
pub const REPLAY_TOPIC_HEADER: &str = "meander-replay-topic";
/// Its partition.
pub const REPLAY_PARTITION_HEADER: &str = "meander-replay-partition";
/// Its offset.
pub const REPLAY_OFFSET_HEADER: &str = "meander-replay-offset";

/// A header of a record, as text; the first of its name.
pub(crate) fn header<'a>(record: &'a impl Message, name: &str) -> Option<Cow<'a, str>> {
    let found = record.headers()?.iter().find(|header| header.key == name)?.value?;
    Some(String::from_utf8_lossy(found))
}

/// The topic that says whose each topic prefix is: compacted, one partition, a record under [`claim_key`] for each pipeline that claims
/// one. The first of those that overlap and were not withdrawn holds. Its name begins with no prefix, so that no replay takes it for data.
pub const CLAIMS_TOPIC: &str = "__meander.claims";

/// Name of the topic (or Redis stream) that holds the changes of a table.
///
/// Characters of schema and table that Kafka does not allow become `_`. Two tables whose names become one are told apart by the caller.
#[must_use]
pub fn topic_name(prefix: &str, schema: &str, table: &str) -> String {
    format!("{prefix}.{}.{}", allowed(schema), allowed(table))
}

/// Name of the Redis stream, or of another topic, that holds what a topic holds; none if the topic is not under the prefix.
#[must_use]
pub fn stream_of_topic(topic: &str, topic_prefix: &str, stream_prefix: &str) -> Option<String> {
    let rest = topic.strip_prefix(topic_prefix)?.strip_prefix('.')?;
    Some(format!("{stream_prefix}.{rest}"))
}

fn allowed(part: &str) -> String {
    part.chars()
        .map(|c| match c {
            'a'..='z' | 'A'..='Z' | '0'..='9' | '.' | '_' | '-' => c,
            _ => '_',
        })
        .collect()
}

/// Name of the topic (or Redis stream) of the logical messages. No table's has it: those have one dot more.
#[must_use]
pub fn message_topic(prefix: &str) -> String {
    format!("{prefix}.message")
}

/// Name of the topic (or Redis stream) that tells where transactions begin and end. No table's has it.
#[must_use]
pub fn transaction_topic(prefix: &str) -> String {
    format!("{prefix}.transaction")
}

/// Name of the topic that consumers of Debezium look for its heartbeats in. It does not begin with the prefix, so no replay has them.
#[must_use]
pub fn heartbeat_topic(prefix: &str) -> String {
    format!("__debezium-heartbeat.{prefix}")
}

/// Name of the pipeline's checkpoint topic: compacted, one partition.
#[must_use]
pub fn checkpoint_topic(namespace: &str, pipeline: &str) -> String {
    format!("__meander.{namespace}.{pipeline}.checkpoint")
}

/// Name of the topic in which a replay into Kafka keeps its place: compacted, one partition.
#[must_use]
pub fn replay_topic(namespace: &str, job: &str) -> String {
    format!("__meander.{namespace}.{job}.replay")
}

/// Name of the topic, in the log's cluster, of the records that the target of a replay did not take: one partition. No replay takes it for data.
#[must_use]
pub fn dead_letters_topic(namespace: &str, job: &str) -> String {
    format!("__meander.{namespace}.{job}.dead-letters")
}

/// Name of the topic of the tables' schemas: compacted, one partition, a record for each table, under [`schema_key`].
#[must_use]
pub fn schemas_topic(namespace: &str, pipeline: &str) -> String {
    format!("__meander.{namespace}.{pipeline}.schemas")
}

/// Key of what is kept of a table, after the key of the pipeline's checkpoint.
#[must_use]
pub fn schema_key(checkpoint_key: &str, oid: u32) -> String {
    format!("{checkpoint_key}/{oid}")
}

/// Key of a pipeline's claim on a topic prefix, after which comes the key of its checkpoint.
#[must_use]
pub fn claim_key(prefix: &str, checkpoint_key: &str) -> String {
    format!("{prefix}/{checkpoint_key}")
}

/// Key of the checkpoint record, and the producer's `transactional.id`.
///
/// It holds names and no UID, so that a resource that was deleted and created again finds it.
#[must_use]
pub fn checkpoint_key(namespace: &str, pipeline: &str, slot: &str) -> String {
    format!("{namespace}/{pipeline}/{slot}")
}

/// How far Redis has come.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "camelCase")]
pub struct RedisPlace {
    /// The streams it speaks of: under another prefix there is nothing yet, and nothing is missed.
    pub stream_prefix: String,
    /// The last change in them; all before it are there too, but for those from before the first.
    pub position: Position,
}

/// Which tables' rows are in the log, those that were there before the table's changes were.
///
/// It holds a number for each captured table, and more only for the one that is being read.
#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "camelCase")]
pub struct SnapshotState {
    /// A bulk snapshot was taken: the tables that are not done are read in chunks, in any mode.
    #[serde(default, skip_serializing_if = "std::ops::Not::not")]
    pub bulk_is_over: bool,
    /// Captured tables that were read to their end, by OID, with the OID of their membership of the publication. One that left and came
    /// back missed changes, and has another one.
    #[serde(default, skip_serializing_if = "BTreeMap::is_empty")]
    pub done: BTreeMap<u32, u32>,
    /// The tables that each request still has to read, by OID; none once it is done.
    #[serde(default, skip_serializing_if = "BTreeMap::is_empty")]
    pub requests: BTreeMap<String, Vec<u32>>,
    /// The table that is being read in chunks.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub reading: Option<TableCursor>,
    /// Tables that could not be read any further, and go on from there once they can be.
    #[serde(default, skip_serializing_if = "Vec::is_empty")]
    pub aside: Vec<TableCursor>,
}

impl SnapshotState {
    /// True if nothing was ever read.
    #[must_use]
    pub fn is_empty(&self) -> bool {
        *self == Self::default()
    }

    /// Gives up every table that was begun. Nobody notes any more what has to be come back to.
    pub fn put_down(&mut self) {
        self.reading = None;
        self.aside.clear();
    }
}

/// How far the reading of a table has come.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "camelCase")]
pub struct TableCursor {
    /// OID of the table.
    pub oid: u32,
    /// Id of the snapshot, as its records have it.
    pub snapshot: String,
    /// The request that it is read for, if any.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub request: Option<String>,
    /// The order of the rows, as SQL has it. In another order the place means nothing.
    pub order: String,
    /// Key of the last row that was read; none before the first.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub after: Option<Vec<String>>,
    /// Every row was read in the order of the key, but for those to come back to.
    #[serde(default, skip_serializing_if = "std::ops::Not::not")]
    pub swept: bool,
    /// Keys of rows to come back to: each changed its key, and so may have jumped over the reading, and the change left out a large
    /// value that nobody else would tell. The key's values are in the order of the table's columns.
    #[serde(default, skip_serializing_if = "Vec::is_empty")]
    pub jumped: Vec<Vec<String>>,
    /// Rows that were published.
    pub rows: u64,
}

/// Records that lack values, since with them they would have been larger than their topics take.
#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "camelCase")]
pub struct OversizedRecords {
    /// How many there are.
    pub total: u64,
    /// The last one.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub last: Option<OversizedRecord>,
    /// The last one of each table, by OID, whose rows were not read again since.
    #[serde(default, skip_serializing_if = "BTreeMap::is_empty")]
    pub tables: BTreeMap<u32, OversizedRecord>,
}

/// A record that lacks values.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "camelCase")]
pub struct OversizedRecord {
    /// Its table, as people call it.
    pub table: String,
    /// Its topic.
    pub topic: String,
    /// Its position.
    pub position: Position,
    /// What it would have taken, in bytes.
    pub bytes: u64,
    /// What the topic took, in bytes.
    pub limit: u64,
}

impl OversizedRecords {
    /// The most tables that are kept: the checkpoint is one record itself.
    const MOST_TABLES: usize = 100;

    /// True if there never was one.
    #[must_use]
    pub fn is_empty(&self) -> bool {
        self.total == 0
    }

    /// One more, of the table with this OID.
    pub fn add(&mut self, oid: u32, record: OversizedRecord) {
        self.total += 1;
        self.last = Some(record.clone());
        self.tables.insert(oid, record);
        if self.tables.len() > Self::MOST_TABLES
            && let Some((&oldest, _)) = self.tables.iter().min_by_key(|(_, record)| record.position)
        {
            self.tables.remove(&oldest);
        }
    }

    /// Nothing of the table is lacking any more that came before this place.
    pub fn mended(&mut self, oid: u32, before: Position) {
        if self.tables.get(&oid).is_some_and(|record| record.position < before) {
            self.tables.remove(&oid);
        }
    }

    /// What a person has to know, if a table lacks something.
    #[must_use]
    pub fn message(&self) -> Option<String> {
        let newest = self.tables.values().max_by_key(|record| record.position)?;
        let OversizedRecord {
            table,
            topic,
            position,
            bytes,
            limit,
        } = newest;
        let more = match self.tables.len() - 1 {
            0 => String::new(),
            more => format!(", and records of {more} more tables"),
        };
        let remedy = match room_for(*bytes) {
            Some(room) => format!(
                "raise the topics' max.message.bytes (kafka-configs.sh --bootstrap-server … --alter --entity-type topics --entity-name {topic} --add-config max.message.bytes={room}), and then read the tables again by an entry in snapshot.requests, which ends this"
            ),
            None => "no topic takes that: once there are no such rows any more, or the table is excluded, read it again by an entry in snapshot.requests, which ends this".to_owned(),
        };
        Some(format!(
            "records of {table}{more} lack values that their topics would not take, the last one at {position}: with them it would have {bytes} bytes, and topic {topic:?} takes {limit}; {remedy}"
        ))
    }
}

/// Where an epoch ended in the midst of a server's WAL: a standby took over, and its timeline parts there from the one captured before.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "camelCase")]
pub struct Parting {
    /// The epoch that ended.
    pub epoch: u8,
    /// What commits before this is still of that epoch. What it has past this was lost with the other timeline.
    pub at: Lsn,
    /// The running maximum of the commit times when that was found: no record that came later has a lower timestamp.
    pub high_time_micros: i64,
}

/// How far a pipeline has come, in the same Kafka transaction as the records it speaks of. Written as JSON.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "camelCase")]
pub struct Checkpoint {
    /// The epoch that new changes get.
    pub epoch: u8,
    /// The epochs before it of which the server still sends what is not in Kafka, in order.
    #[serde(default, skip_serializing_if = "Vec::is_empty")]
    pub partings: Vec<Parting>,
    /// The server that the epoch stands for.
    pub system_identifier: String,
    /// The server's timeline that the epoch stands for.
    pub timeline: u32,
    /// The server's major version.
    pub major_version: u32,
    /// OID of the database. An upgrade keeps it.
    pub database_oid: u32,
    /// Where the server's WAL ended, if it was shut down in good order and the capture read to that end.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub ended_at: Option<Lsn>,
    /// Grows by one with each owner of the slot, and fences the owners before it out of Redis.
    pub owner_generation: u64,
    /// The last change in Kafka; all before it are there too.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub published: Option<Position>,
    /// The last transaction that is in Kafka as a whole, as its commit position. A live replay ends here.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub complete: Option<Position>,
    /// What was known to be in Redis when this was written.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub redis: Option<RedisPlace>,
    /// What PostgreSQL may be told. The slot is never ahead of this, so a slot that is has lost changes.
    pub acknowledged: Lsn,
    /// The running maximum of the commit times, in microseconds since the Unix epoch: no later record has a lower timestamp.
    pub high_time_micros: i64,
    /// Changes published since the pipeline was created.
    pub events_total: u64,
    /// The rows that were read beside the changes.
    #[serde(default, skip_serializing_if = "SnapshotState::is_empty")]
    pub snapshot: SnapshotState,
    /// Records published since then: some changes are several.
    pub records_total: u64,
    /// Those of them that lack values for their size.
    #[serde(default, skip_serializing_if = "OversizedRecords::is_empty")]
    pub oversized: OversizedRecords,
    /// How many partitions of each topic the keys go by.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub partitions: Option<i32>,
    /// The slot was dropped on purpose after this; a new one starts a new epoch and is no gap.
    #[serde(default)]
    pub released: bool,
    /// The last gap that somebody accepted.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub accepted_gap: Option<AcceptedGap>,
}

/// Changes that were lost between the source and the log, and somebody's word to go on without them.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "camelCase")]
pub struct AcceptedGap {
    /// The name by which it was accepted: epoch and place up to which it was captured.
    pub id: String,
    /// One word, as in the condition.
    pub reason: String,
    /// Captured up to here, in the epoch before.
    pub lost_after: Lsn,
    /// Captured again from here, in the epoch that began then.
    pub resumed_at: Lsn,
    /// When capture went on, in microseconds since the Unix epoch.
    pub time_micros: i64,
    /// Every table that was captured then is read anew, whatever the mode of snapshots.
    #[serde(default, skip_serializing_if = "std::ops::Not::not")]
    pub read_anew: bool,
}

impl Checkpoint {
    /// The first epoch whose LSNs can be compared with the server's.
    #[must_use]
    pub fn first_comparable_epoch(&self) -> Epoch {
        Epoch(self.partings.first().map_or(self.epoch, |parting| parting.epoch))
    }

    /// Where the timeline was left that has this change past that place: no server has it any more.
    #[must_use]
    pub fn lost_with(&self, change: Position) -> Option<&Parting> {
        self.partings
            .iter()
            .find(|parting| Epoch(parting.epoch) == change.epoch && parting.at <= change.commit_lsn)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_stream_of_a_topic_is_that_of_its_table() {
        for (schema, table) in [("public", "trades"), ("a.b", "c"), ("Größe", "x y")] {
            let topic = topic_name("shop.eu", schema, table);
            let stream = topic_name("fast:shop", schema, table);
            assert!(stream.starts_with("fast:shop."));
            assert_eq!(stream_of_topic(&topic, "shop.eu", "fast:shop"), Some(stream));
        }
        assert_eq!(stream_of_topic("shop.eux.a.b", "shop.eu", "fast"), None);
    }
}

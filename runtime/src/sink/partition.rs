//! Which partition a key goes to.

use rdkafka::producer::Partitioner;

use crate::{encode::debezium_key_payload, sink::topics::Remarks};

/// Places keys as Java's producers do, so that topics of both can be joined.
///
/// A key that carries its schema is placed by its payload: the schema changes with the table, by a new default or another label of an
/// enum, and the row stays the same, and so in its partition and its order. So it does where somebody adds partitions to a topic: keys
/// go by the number that the pipeline began with, and what was added stays empty, and is remarked upon.
pub struct ByRow {
    /// The keys carry their schemas.
    pub schemas: bool,
    /// Partitions of each topic.
    pub partitions: i32,
    /// Where it is told of a topic that has more.
    pub remarks: Remarks,
}

impl Partitioner for ByRow {
    fn partition(&self, topic: &str, key: Option<&[u8]>, count: i32, _available: impl Fn(i32) -> bool) -> i32 {
        if count > self.partitions {
            self.remarks.partitions_added(topic, count, self.partitions);
        }
        place(key.unwrap_or_default(), self.schemas, self.partitions)
    }
}

/// The partition, of so many, of a key that was written by a pipeline of any format.
#[must_use]
pub fn partition_of(key: &[u8], count: i32) -> i32 {
    // Only a key with its schema begins so: elsewhere a column of this name has a value, and never this object.
    place(key, key.starts_with(b"{\"schema\":{\"type\":"), count)
}

fn place(key: &[u8], schemas: bool, count: i32) -> i32 {
    let row = if schemas { debezium_key_payload(key) } else { key };
    (murmur2(row).cast_signed() & i32::MAX) % count.max(1)
}

/// As Kafka's Java client computes it.
fn murmur2(data: &[u8]) -> u32 {
    const SEED: u32 = 0x9747_B28C;
    const M: u32 = 0x5BD1_E995;
    let (words, rest) = data.as_chunks::<4>();
    // What is cut off here makes no difference to any key that Kafka takes.
    let mut hash = SEED ^ data.len() as u32;
    for word in words {
        let mut word = u32::from_le_bytes(*word).wrapping_mul(M);
        word = (word ^ (word >> 24)).wrapping_mul(M);
        hash = hash.wrapping_mul(M) ^ word;
    }
    if !rest.is_empty() {
        let mut last = [0; 4];
        last[..rest.len()].copy_from_slice(rest);
        hash = (hash ^ u32::from_le_bytes(last)).wrapping_mul(M);
    }
    hash = (hash ^ (hash >> 13)).wrapping_mul(M);
    hash ^ (hash >> 15)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn keys_are_hashed_as_by_kafkas_java_client() {
        // Those of the client's own tests.
        for (key, hash) in [
            ("21", -973_932_308),
            ("foobar", -790_332_482),
            ("a-little-bit-long-string", -985_981_536),
            ("a-little-bit-longer-string", -1_486_304_829),
            ("lkjh234lh9fiuh90y23oiuhsafujhadof229phr9h19h89h8", -58_897_971),
            ("abc", 479_470_107),
        ] {
            assert_eq!(murmur2(key.as_bytes()).cast_signed(), hash, "{key}");
        }
    }

    #[test]
    fn a_row_stays_in_its_partition_whatever_becomes_of_its_schema() {
        let place = |schemas, key: &str| {
            let by_row = ByRow {
                schemas,
                partitions: 1000,
                remarks: Remarks::default(),
            };
            // Partitions that were added later are none of the row's.
            let placed = [1000, 1001, 3000].map(|count| by_row.partition("t", Some(key.as_bytes()), count, |_| true));
            assert_eq!(placed, [placed[0]; 3]);
            assert_eq!(by_row.remarks.first().unwrap().0, "PartitionsAdded");
            placed[0]
        };
        let payload = r#"{"id":1,"payload":{"schema":2}}"#;
        let with = |schema: &str| format!(r#"{{"schema":{schema},"payload":{payload}}}"#);
        let alone = place(false, payload);
        assert_eq!(place(true, &with(r#"{"default":1}"#)), alone);
        let told = with(r#"{"type":"struct","fields":[]}"#);
        assert_eq!(partition_of(told.as_bytes(), 1000), alone);
        assert_eq!(partition_of(payload.as_bytes(), 1000), alone);
        assert_eq!(place(true, &with(r#"{"default":",\"payload\":"}"#)), alone);
        assert_eq!(
            place(true, payload.replace("payload", "value").as_str()),
            place(false, &payload.replace("payload", "value"))
        );
        // Where keys carry no schemas, columns may have any name.
        let named = with(r#""x""#);
        assert_ne!(place(false, &named), alone);
    }
}

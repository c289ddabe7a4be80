//! How large a record may be. With `onOversizedRow: OmitValues` it is judged before anything is produced; with `Stop` the broker judges, as it knows best what
//! it takes.

use std::sync::{
    Arc,
    atomic::{AtomicU64, Ordering::Relaxed},
};

/// What the producer takes of one record, in bytes of key, value and headers, whatever its topic takes. Redis takes five times as much
/// of one value, as it comes (`proto-max-bulk-len`).
pub const MOST_BYTES: u64 = 100_000_000;
/// A record of so many bytes may be made otherwise when it is made again: what topics take may change. So it is in Redis only once it is in Kafka. Topics that
/// take less are not supported: the client sends more than this in one batch.
pub const LARGE_BYTES: usize = 256 * 1024;
/// About what Kafka, and the headers of every record, add to a record that is a batch of its own; rounded up.
const AROUND: u64 = 512;

/// What a topic takes of one record, before it is compressed. Clones share it, since somebody may change it while records are made.
#[derive(Clone, Debug, Default)]
pub struct SizeLimit(Arc<AtomicU64>);

impl SizeLimit {
    /// Notes the topic's `max.message.bytes`.
    pub fn set(&self, bytes: u64) {
        self.0.store(bytes, Relaxed);
    }

    /// The limit in bytes: that of the producer while none is known.
    #[must_use]
    pub fn bytes(&self) -> u64 {
        match self.0.load(Relaxed) {
            0 => MOST_BYTES,
            bytes => bytes.min(MOST_BYTES),
        }
    }

    /// True if a record of this content, which is key, value and headers one after another, is not too large.
    #[must_use]
    pub fn takes(&self, content: &[u8]) -> bool {
        content.len() as u64 + AROUND <= self.bytes()
    }
}

/// The `max.message.bytes` with which a topic takes a record of so many bytes; none if no topic can.
#[must_use]
pub fn room_for(bytes: u64) -> Option<u64> {
    let room = bytes + bytes / 64 + 1024;
    (room <= MOST_BYTES).then_some(room)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_topic_takes_no_more_than_it_says_and_no_topic_more_than_the_producer() {
        let limit = SizeLimit::default();
        let record = vec![0; 3_000_000];
        assert!(limit.takes(&record), "nothing is known of the topic");
        limit.set(1_048_588);
        assert!(limit.takes(&record[..1_048_000]) && !limit.takes(&record[..1_048_588]));
        limit.set(u64::MAX);
        assert!(
            limit.takes(&record) && !limit.takes(&vec![0; 100_000_000]),
            "the producer takes no more"
        );
        assert!(room_for(3_000_000).is_some_and(|room| room > 3_000_000 + AROUND) && room_for(MOST_BYTES).is_none());
    }
}

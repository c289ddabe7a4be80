//! How large a record may be. It is judged before anything is produced: a transaction that Kafka refuses has to be made anew, and would be
//! refused again.

use std::sync::{
    Arc,
    atomic::{AtomicBool, AtomicU64, Ordering::Relaxed},
};

/// What the producer takes of one record, in bytes of key, value and headers, whatever its topic takes. Redis takes five times as much
/// of one value, as it comes (`proto-max-bulk-len`).
pub const MOST_BYTES: u64 = 100_000_000;
/// About what Kafka, and the headers of every record, add to a record that is a batch of its own; rounded up.
const AROUND: u64 = 512;
/// The client compresses block by block, each on its own.
const BLOCK: usize = 64 * 1024;

/// What a topic takes of one record. Clones share it, since somebody may change it while records are made.
#[derive(Clone, Debug, Default)]
pub struct SizeLimit(Arc<Known>);

#[derive(Debug, Default)]
struct Known {
    /// The topic's `max.message.bytes`; 0 while it is not known, and then the broker judges.
    bytes: AtomicU64,
    compressed: AtomicBool,
}

impl SizeLimit {
    /// Notes the topic's `max.message.bytes`, and whether that is compared with what was compressed (`compression.type`).
    pub fn set(&self, bytes: u64, compressed: bool) {
        self.0.bytes.store(bytes, Relaxed);
        self.0.compressed.store(compressed, Relaxed);
    }

    /// The limit in bytes.
    #[must_use]
    pub fn bytes(&self) -> u64 {
        match self.0.bytes.load(Relaxed) {
            0 => MOST_BYTES,
            bytes => bytes.min(MOST_BYTES),
        }
    }

    /// True if a record of this content, which is key, value and headers one after another, is not too large.
    #[must_use]
    pub fn takes(&self, content: &[u8]) -> bool {
        let (size, most) = (content.len() as u64 + AROUND, self.bytes());
        size <= most || size <= MOST_BYTES && self.0.compressed.load(Relaxed) && compressed(content) + AROUND <= most
    }
}

/// About what the client makes of it; rounded up by an eighth, since another implementation of the same method does a little better or worse.
fn compressed(content: &[u8]) -> u64 {
    let block = |block: &[u8]| lz4_flex::block::compress(block).len().min(block.len()) + 4;
    let size: usize = content.chunks(BLOCK).map(block).sum();
    (size + size / 8) as u64
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn what_compresses_well_may_be_larger_where_the_topic_counts_that() {
        let limit = SizeLimit::default();
        let (text, noise) = (vec![b'x'; 3_000_000], std::iter::repeat_with(|| fastrand::u8(..)));
        let noise: Vec<u8> = noise.take(3_000_000).collect();
        assert!(limit.takes(&noise), "nothing is known of the topic");
        limit.set(1_048_588, true);
        assert!(limit.takes(&text) && !limit.takes(&noise));
        assert!(limit.takes(&noise[..1_048_000]) && !limit.takes(&noise[..1_048_588]));
        limit.set(1_048_588, false);
        assert!(!limit.takes(&text) && limit.takes(&text[..1_048_000]));
        limit.set(u64::MAX, true);
        assert!(!limit.takes(&vec![0; 100_000_000]), "the producer takes no more");
    }
}

//! No bytes that a server, or whoever sits between, can send make the decoder panic or take more memory than they are worth.
//!
//! Real messages (fixtures/pgoutput.hex) are taken apart and put together wrongly, then decoded, assembled and encoded as a session
//! does it, until the first error. A short run is part of `make test`; `make fuzz` runs for ten minutes.
#![allow(clippy::unwrap_used, clippy::expect_used, clippy::panic)]

use std::{
    env,
    sync::Arc,
    time::{Duration, Instant},
};

use fastrand::Rng;
use meander_runtime::{
    batch::{Batch, Destination},
    encode::{Encoder as _, ProtobufEncoder},
    position::Epoch,
    source::postgres::{
        assemble::{Assembled, Assembler},
        details::TableDetails,
        pgoutput::{LogicalMessage, decode},
    },
};
use peak_alloc::PeakAlloc;

#[global_allocator]
static ALLOCATED: PeakAlloc = PeakAlloc;

/// Streams of a short run.
const STREAMS: u64 = 30_000;
/// Memory that a stream may take: so much, and so much for each of its bytes. The first is what a description of 1600 columns takes.
const ALLOWANCE: (usize, usize) = (512 * 1024, 64);

fn corpus() -> Vec<Vec<u8>> {
    let hex = |line: &str| -> Vec<u8> {
        line.as_bytes()
            .chunks(2)
            .map(|pair| u8::from_str_radix(std::str::from_utf8(pair).unwrap(), 16).unwrap())
            .collect()
    };
    include_str!("fixtures/pgoutput.hex").lines().map(hex).collect()
}

/// Does with a stream what a session does; returns how many messages came through.
fn run(stream: &[Vec<u8>]) -> usize {
    let mut assembler = Assembler::new(Epoch::FIRST, false);
    let mut encoder = ProtobufEncoder::default();
    let destination = Arc::new(Destination {
        topic: "t".to_owned(),
        stream: "s".to_owned(),
        ..Destination::default()
    });
    for (index, bytes) in stream.iter().enumerate() {
        let Ok(message) = decode(bytes) else { return index };
        if let LogicalMessage::Relation(relation) = &message {
            let relation = assembler.describe(relation, &["id".to_owned()]);
            encoder.prepare(&relation, &TableDetails::default(), destination.clone());
            assembler.learn(relation.oid, relation);
            continue;
        }
        let mut batch = Batch::new();
        let taken = match assembler.take(&message) {
            Ok(Assembled::Changes(changes)) => {
                changes.for_each(|change| encoder.encode(&change, &mut batch).map_err(Failed::from))
            }
            Ok(Assembled::Message(message)) => {
                encoder.encode_message(&message, 0, &destination, &mut batch);
                Ok(())
            }
            Ok(_) => Ok(()),
            Err(error) => Err(error.into()),
        };
        if taken.is_err() {
            return index;
        }
    }
    stream.len()
}

/// Any of the errors that end a session.
struct Failed;

impl<E: std::error::Error> From<E> for Failed {
    fn from(_: E) -> Self {
        Self
    }
}

/// One to eight wrongs.
fn mutate(stream: &mut Vec<Vec<u8>>, corpus: &[Vec<u8>], random: &mut Rng) {
    for _ in 0..random.u32(1..=8) {
        let at = random.usize(..stream.len());
        let other = random.choice(corpus).unwrap().clone();
        let kind = random.u32(..10);
        match kind {
            0 => stream.swap(at, random.usize(..=at)),
            1 => stream.insert(at, other.clone()),
            2 if stream.len() > 1 => drop(stream.remove(at)),
            _ => {}
        }
        let at = random.usize(..stream.len());
        let message = &mut stream[at];
        let place = random.usize(..=message.len());
        match kind {
            0..3 => {}
            3 => message.truncate(place),
            4 => message.extend(&other[random.usize(..other.len())..]),
            5 => message.insert(place, random.u8(..)),
            // Lengths and counts: a number that is much too large, or off by one.
            6 if message.len() >= 4 => {
                let place = random.usize(..=message.len() - 4);
                let number: [u8; 4] = message[place..place + 4].try_into().unwrap();
                let number = u32::from_be_bytes(number);
                let other = [
                    number.wrapping_add(1),
                    number.wrapping_sub(1),
                    u32::MAX,
                    0x7FFF_FFFF,
                    random.u32(..),
                ];
                message[place..place + 4].copy_from_slice(&random.choice(other).unwrap().to_be_bytes());
            }
            7 => {
                let end = random.usize(place..=message.len());
                let piece = message[place..end].to_vec();
                message.splice(place..place, piece);
            }
            _ if !message.is_empty() => {
                let place = random.usize(..message.len());
                message[place] = if random.bool() {
                    random.u8(..)
                } else {
                    message[place] ^ (1 << random.u32(..8))
                };
            }
            _ => {}
        }
    }
}

#[test]
fn no_stream_makes_the_decoder_panic_or_take_memory_without_bound() {
    let corpus = corpus();
    assert_eq!(run(&corpus), corpus.len(), "the real messages are all understood");
    let seed = env::var("MEANDER_FUZZ_SEED").map_or_else(|_| fastrand::u64(..), |seed| seed.parse().unwrap());
    let end = env::var("MEANDER_FUZZ_SECONDS")
        .ok()
        .map(|seconds| Instant::now() + Duration::from_secs(seconds.parse().unwrap()));
    let mut random = Rng::with_seed(seed);
    let (mut streams, mut messages, mut most) = (0_u64, 0_u64, 0);
    while end.map_or(streams < STREAMS, |end| Instant::now() < end) {
        let mut stream = corpus.clone();
        mutate(&mut stream, &corpus, &mut random);
        let bytes: usize = stream.iter().map(Vec::len).sum();
        let before = ALLOCATED.current_usage();
        ALLOCATED.reset_peak_usage();
        messages += run(&stream) as u64;
        let taken = ALLOCATED.peak_usage().saturating_sub(before);
        assert!(
            taken <= ALLOWANCE.0 + ALLOWANCE.1 * bytes,
            "seed {seed}, stream {streams}: {taken} bytes of memory for {bytes}: {stream:?}"
        );
        most = most.max(taken);
        streams += 1;
    }
    assert!(messages > streams, "most streams get past their first message");
    println!(
        "seed {seed}: {streams} streams, {messages} messages understood, at most {most} bytes of memory for one stream"
    );
}

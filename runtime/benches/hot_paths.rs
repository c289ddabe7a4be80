//! What one change costs at each step of its way, on one thread and without a service: `bench/run.sh micro`.
#![allow(clippy::unwrap_used, clippy::expect_used, clippy::panic)]

use std::{hint::black_box, sync::Arc};

use bytes::BytesMut;
use criterion::{Criterion, Throughput};
use meander_runtime::{
    batch::{Batch, Destination},
    capture::CaptureError,
    encode::{DebeziumEncoder, Encoder, ProtobufEncoder},
    log::{COMMIT_TIME_HEADER, POSITION_HEADER},
    position::{Epoch, Position},
    replay::record::Record,
    source::postgres::{
        assemble::{Assembled, Assembler},
        details::TableDetails,
        pgoutput::{LogicalMessage, decode},
    },
};
use mimalloc::MiMalloc;
use rdkafka::{
    Timestamp,
    message::{Header, OwnedHeaders, OwnedMessage},
};

/// The one of the program.
#[global_allocator]
static ALLOCATOR: MiMalloc = MiMalloc;

/// OID of the table, and its columns with the OIDs of their types: bigint, text, numeric, timestamptz and boolean.
const TABLE: u32 = 16_384;
const COLUMNS: [(&str, u32); 5] = [
    ("id", 20),
    ("symbol", 25),
    ("price", 1700),
    ("at", 1184),
    ("settled", 16),
];
const ROW: [&str; 5] = ["4711", "MNDR", "1234.5678", "2026-11-20 10:00:00.123456+00", "f"];
const CHANGED: [&str; 5] = ["4711", "MNDR", "1234.5679", "2026-11-20 10:00:01.654321+00", "t"];

fn tuple(message: &mut Vec<u8>, row: [&str; 5]) {
    message.extend(b"N\0\x05");
    for value in row {
        message.push(b't');
        message.extend(u32::try_from(value.len()).unwrap().to_be_bytes());
        message.extend(value.as_bytes());
    }
}

fn change(tag: u8, row: [&str; 5]) -> Vec<u8> {
    let mut message = vec![tag];
    message.extend(TABLE.to_be_bytes());
    tuple(&mut message, row);
    message
}

fn relation() -> Vec<u8> {
    let mut message = vec![b'R'];
    message.extend(TABLE.to_be_bytes());
    message.extend(b"public\0trades\0d\0\x05");
    for (index, (name, oid)) in COLUMNS.iter().enumerate() {
        message.push(u8::from(index == 0));
        message.extend(name.as_bytes());
        message.push(0);
        message.extend(oid.to_be_bytes());
        message.extend((-1i32).to_be_bytes());
    }
    message
}

/// A table that is known, in a transaction that has begun.
fn assembler(encoder: &mut dyn Encoder) -> Assembler {
    let mut assembler = Assembler::new(Epoch::FIRST, false);
    let message = relation();
    let LogicalMessage::Relation(message) = decode(&message).unwrap() else {
        panic!("it is a description");
    };
    let relation = assembler.describe(&message, &[]);
    let destination = Arc::new(Destination {
        topic: "shop.public.trades".to_owned(),
        ..Destination::default()
    });
    encoder.prepare(&relation, &TableDetails::default(), destination);
    assembler.learn(TABLE, relation);
    let mut begin = vec![b'B'];
    begin.extend(0x0016_B374u64.to_be_bytes());
    begin.extend(816_000_000_000_000u64.to_be_bytes());
    begin.extend(7u32.to_be_bytes());
    assembler.take(&decode(&begin).unwrap()).map(drop).unwrap();
    assembler
}

/// From the message of the server to the record in the batch.
fn publish(message: &[u8], assembler: &mut Assembler, encoder: &mut dyn Encoder, batch: &mut Batch) {
    let message = decode(message).unwrap();
    let Ok(Assembled::Changes(changes)) = assembler.take(&message) else {
        panic!("it is a change");
    };
    changes
        .for_each::<CaptureError>(|change| Ok(encoder.encode(&change, batch)?))
        .unwrap();
}

fn capture(criterion: &mut Criterion) {
    let messages = [("insert", change(b'I', ROW)), ("update", change(b'U', CHANGED))];
    let mut group = criterion.benchmark_group("decode pgoutput");
    group.throughput(Throughput::Elements(1));
    for (name, message) in &messages {
        group.bench_function(*name, |bencher| {
            bencher.iter(|| match decode(black_box(message)).unwrap() {
                LogicalMessage::Insert { new, .. } | LogicalMessage::Update { new, .. } => {
                    new.values().map(black_box).count()
                }
                other => panic!("{other:?}"),
            });
        });
    }
    group.finish();

    for (format, debezium) in [("Protobuf", false), ("DebeziumJson", true)] {
        let mut group = criterion.benchmark_group(format!("decode, assemble and encode {format}"));
        group.throughput(Throughput::Elements(1));
        for (name, message) in &messages {
            let mut encoder: Box<dyn Encoder> = if debezium {
                Box::new(DebeziumEncoder::new("shop", "shop", false))
            } else {
                Box::new(ProtobufEncoder::default())
            };
            let mut assembler = assembler(&mut *encoder);
            let mut batch = Batch::new();
            group.bench_function(*name, |bencher| {
                bencher.iter(|| {
                    if batch.is_full() {
                        batch = batch.next();
                    }
                    publish(black_box(message), &mut assembler, &mut *encoder, &mut batch);
                });
            });
        }
        group.finish();
    }

    let destination = Arc::new(Destination::default());
    let (key, value) = ([b'k'; 16], [b'v'; 200]);
    let mut batch = Batch::new();
    let position = Position::end_of_transaction(Epoch::FIRST, "0/16B3748".parse().unwrap());
    criterion.bench_function("push a record of 216 bytes into a batch", |bencher| {
        bencher.iter(|| {
            if batch.is_full() {
                batch = batch.next();
            }
            let write = |bytes: &mut Vec<u8>, piece: &[u8]| {
                bytes.extend_from_slice(piece);
                Ok::<_, ()>(true)
            };
            batch
                .push(
                    position,
                    0,
                    0,
                    &destination,
                    |bytes| write(bytes, black_box(&key)),
                    |bytes| write(bytes, black_box(&value)),
                )
                .unwrap();
        });
    });
}

fn replay(criterion: &mut Criterion) {
    let mut encoder = ProtobufEncoder::default();
    let mut assembler = assembler(&mut encoder);
    let mut batch = Batch::new();
    publish(&change(b'I', ROW), &mut assembler, &mut encoder, &mut batch);
    let record = &batch.records()[0];
    let position = record.position.to_string();
    let headers = [
        (POSITION_HEADER, position.as_str()),
        (COMMIT_TIME_HEADER, "1763632800123456"),
    ]
    .into_iter()
    .fold(OwnedHeaders::new(), |headers, (key, value)| {
        headers.insert(Header {
            key,
            value: Some(value),
        })
    });
    let topic: Arc<str> = "shop.public.trades".into();
    let message = OwnedMessage::new(
        batch.value(record).map(<[u8]>::to_vec),
        batch.key(record).map(<[u8]>::to_vec),
        topic.to_string(),
        Timestamp::CreateTime(1_763_632_800_123),
        0,
        7,
        Some(headers),
    );
    let mut memory = BytesMut::new();
    criterion.bench_function("read a record of the log", |bencher| {
        bencher.iter(|| Record::read(&topic, black_box(&message), &mut memory).unwrap());
    });
}

fn main() {
    let mut criterion = Criterion::default().configure_from_args();
    capture(&mut criterion);
    replay(&mut criterion);
    criterion.final_summary();
}

//! No bytes that come from a file, from Kafka or over gRPC make what reads them panic, or take more memory than they are worth.
//!
//! Each kind of input begins with what is right, which is then cut, doubled, put together wrongly and changed, and read as the runtime or the
//! operator reads it. A short run is part of `make test`; `make fuzz` runs for minutes. The stream of PostgreSQL has `fuzz.rs`.
#![allow(clippy::unwrap_used, clippy::expect_used, clippy::panic)]

use std::{
    collections::BTreeMap,
    env,
    str::FromStr,
    sync::Arc,
    thread,
    time::{Duration, Instant},
};

use bytes::BytesMut;
use fastrand::Rng;
use meander_config::{CaptureConfig, ReplayConfig, ReplayFilter, from_yaml};
use meander_proto::v1::{
    CaptureProgress, Condition, ControlReplayRequest, DeliverAck, Directive, ProgressUpdate, ReplayRequest,
    ResourceReference, progress_update::Progress,
};
use meander_runtime::{
    batch::{Batch, Destination},
    capture::CaptureError,
    encode::{DebeziumEncoder, Encoder, ProtobufEncoder},
    log::{COMMIT_TIME_HEADER, Checkpoint, PART_HEADER, POSITION_HEADER},
    position::Epoch,
    replay::{
        checkpoint::Done,
        filter::{Filter, Judge},
        record::{Record, ResumeToken},
    },
    schema::Kept,
    source::postgres::{
        assemble::{Assembled, Assembler},
        details::TableDetails,
        pgoutput::{LogicalMessage, decode},
    },
};
use peak_alloc::PeakAlloc;
use prost::Message;
use rdkafka::{
    Timestamp,
    message::{Header, OwnedHeaders, OwnedMessage},
};
use serde::de::DeserializeOwned;

#[global_allocator]
static ALLOCATED: PeakAlloc = PeakAlloc;

/// Inputs of each kind in a short run.
const INPUTS: u64 = 5_000;
/// Memory that reading an input may take: so much, and so much for each of its bytes.
const ALLOWANCE: (usize, usize) = (1024 * 1024, 256);
/// As deep as a value may be nested, a filter goes into it.
const STACK: usize = 64 << 20;

/// Whether bytes are understood.
type Reader = dyn Fn(&[u8]) -> bool;

/// A kind of input: what is right, and who reads it.
struct Kind {
    name: &'static str,
    right: Vec<Vec<u8>>,
    understands: Box<Reader>,
}

impl Kind {
    fn new(
        name: &'static str,
        right: impl IntoIterator<Item = impl Into<Vec<u8>>>,
        understands: impl Fn(&[u8]) -> bool + 'static,
    ) -> Self {
        Self {
            name,
            right: right.into_iter().map(Into::into).collect(),
            understands: Box::new(understands),
        }
    }

    /// A message of gRPC, and what is parsed of it.
    fn message<M: Message + Default + 'static>(right: &M, reads: fn(&M) -> bool) -> Self {
        let name = std::any::type_name::<M>();
        let understands = move |bytes: &[u8]| M::decode(bytes).is_ok_and(|message| reads(&message));
        Self::new(name, [right.encode_to_vec()], understands)
    }

    fn yaml<T: DeserializeOwned + 'static>(right: &'static str) -> Self {
        let understands = |bytes: &[u8]| std::str::from_utf8(bytes).is_ok_and(|text| from_yaml::<T>(text).is_ok());
        Self::new(std::any::type_name::<T>(), [right], understands)
    }

    fn json<T: DeserializeOwned + 'static>(right: &'static str) -> Self {
        let understands = |bytes: &[u8]| serde_json::from_slice::<T>(bytes).is_ok();
        Self::new(std::any::type_name::<T>(), [right], understands)
    }

    fn word<T: FromStr + 'static>(right: &'static str) -> Self {
        let understands = |bytes: &[u8]| std::str::from_utf8(bytes).is_ok_and(|text| text.parse::<T>().is_ok());
        Self::new(std::any::type_name::<T>(), [right], understands)
    }
}

const CAPTURE: &str = "pipeline: {namespace: shop, name: trades, uid: u}
source:
  host: pg
  port: 5432
  database: shop
  usernameFile: /u
  passwordFile: /p
  sslMode: VerifyFull
  tables: {include: ['public.*'], exclude: ['public.secret']}
  publication: {name: shop, management: Managed}
  slotName: shop
  snapshot: {mode: Bulk, parallelism: 3, requests: [{id: a, tables: ['*.*']}]}
format: {DebeziumJson: {schemas: true}}
kafka: {bootstrapServers: ['kafka:9092'], topicPrefix: shop, partitions: 3, topicConfig: {retention.ms: '1000'}}
redis: {urlFile: /r, streamPrefix: shop, maxLength: 1000}
adminAddress: 127.0.0.1:9090
";

const REPLAY: &str = "job: {namespace: shop, name: last-hour}
pipeline: {namespace: shop, name: trades}
slotName: shop
kafka: {bootstrapServers: ['kafka:9092'], topicPrefix: shop}
from: {time: '2026-11-20T10:00:00Z'}
to: {time: '2026-11-20T11:00:00Z'}
speed: '10'
filter: {operations: [Insert], keys: [{id: '1'}], expression: 'after.price > 1.0'}
target: log
";

const CHECKPOINT: &str = r#"{"epoch":2,"partings":[{"epoch":1,"at":"0/16B3748","highTimeMicros":1763632800000000}],
"systemIdentifier":"7575","timeline":2,"majorVersion":18,"databaseOid":5,"endedAt":"0/16B3748","ownerGeneration":3,
"published":"1:0/16B3748:3","complete":"1:0/16B3748:3","redis":{"streamPrefix":"shop","position":"1:0/16B3748:3"},"acknowledged":"0/16B3750",
"highTimeMicros":1763632800000000,"eventsTotal":12,"snapshot":{"done":{"16384":16385},"requests":{"a":[1,2]},"reading":{"oid":1,
"snapshot":"s","order":"id","after":["7"],"jumped":[["1"]],"rows":3}},"recordsTotal":14,"released":false,"acceptedGap":{"id":"1:0/1",
"reason":"SlotLost","lostAfter":"0/1","resumedAt":"0/2","timeMicros":5}}"#;

const KEPT: &str = r#"{"systemIdentifier":"7575","oid":16384}"#;

/// Values as both formats write them of real changes.
fn values(mut encoder: impl Encoder) -> Vec<Vec<u8>> {
    let hex = |line: &str| -> Vec<u8> {
        let pairs = line.as_bytes().chunks(2);
        let byte = |pair| u8::from_str_radix(std::str::from_utf8(pair).unwrap(), 16).unwrap();
        pairs.map(byte).collect()
    };
    let (mut assembler, mut batch) = (Assembler::new(Epoch::FIRST, false), Batch::new());
    let destination = Arc::new(Destination {
        topic: "t".to_owned(),
        stream: "t".to_owned(),
        ..Destination::default()
    });
    for bytes in include_str!("fixtures/pgoutput.hex").lines().map(hex) {
        let message = decode(&bytes).unwrap();
        if let LogicalMessage::Relation(relation) = &message {
            let relation = assembler.describe(relation, &["id".to_owned()]);
            encoder.prepare(&relation, &TableDetails::default(), destination.clone());
            assembler.learn(relation.oid, relation);
        } else if let Assembled::Changes(changes) = assembler.take(&message).unwrap() {
            // Not every one has a form in every format, as the fixture knows no details of tables.
            let _ = changes.for_each(|change| encoder.encode(&change, &mut batch).map_err(CaptureError::from));
        }
    }
    let records = batch.records().iter();
    records
        .filter_map(|record| Some(batch.value(record)?.to_vec()))
        .collect()
}

/// A record of the log: three headers on a line each, then the value. It is read, and judged by a filter.
fn record(bytes: &[u8], filter: &Filter) -> bool {
    let mut parts = bytes.splitn(4, |byte| *byte == b'\n');
    let mut headers = OwnedHeaders::new();
    for key in [POSITION_HEADER, COMMIT_TIME_HEADER, PART_HEADER] {
        let value = parts.next();
        headers = headers.insert(Header { key, value });
    }
    let value = parts.next().map(<[u8]>::to_vec);
    let key = Some(br#"{"id":"1"}"#.to_vec());
    let time = Timestamp::CreateTime(1_763_632_800_000);
    let message = OwnedMessage::new(value, key, "t".to_owned(), time, 0, 7, Some(headers));
    let read = Record::read(&Arc::from("t"), &message, &mut BytesMut::new());
    read.is_ok_and(|record| Judge::default().keeps(filter, &record).is_ok())
}

fn kinds() -> Vec<Kind> {
    let filter = |keys: Vec<BTreeMap<String, String>>, expression: Option<&str>| {
        Filter::new(&ReplayFilter {
            tables: None,
            operations: vec![],
            keys,
            expression: expression.map(str::to_owned),
        })
        .unwrap()
    };
    let exact = filter(vec![], Some("after == null || !has(after.id) || after.id != 7"));
    let keys = filter(vec![BTreeMap::from([("id".to_owned(), "1".to_owned())])], None);
    let headed = |values: Vec<Vec<u8>>| {
        let head = b"1:0/16B3748:3\n1763632800000000\n1\n";
        values.into_iter().map(|value| [&head[..], &value].concat())
    };
    let resource = ResourceReference {
        kind: "CdcPipeline".to_owned(),
        namespace: "shop".to_owned(),
        name: "trades".to_owned(),
        uid: "u".to_owned(),
    };
    vec![
        Kind::message(
            &Directive {
                generation: 4,
                paused: true,
                speed: "2.5".to_owned(),
                cancel: false,
            },
            |directive| directive.speed.parse::<meander_config::Speed>().is_ok(),
        ),
        Kind::message(
            &ProgressUpdate {
                resource: Some(resource),
                time_micros: 1_763_632_800_000_000,
                conditions: vec![Condition {
                    r#type: "Progressing".to_owned(),
                    status: true,
                    reason: "Streaming".to_owned(),
                    message: "m".to_owned(),
                }],
                progress: Some(Progress::Capture(CaptureProgress {
                    slot_name: "shop".to_owned(),
                    events_total: 12,
                    ..CaptureProgress::default()
                })),
            },
            |_| true,
        ),
        Kind::message(
            &ControlReplayRequest {
                namespace: "shop".to_owned(),
                name: "last-hour".to_owned(),
                speed: Some("max".to_owned()),
                ..ControlReplayRequest::default()
            },
            |_| true,
        ),
        Kind::message(
            &ReplayRequest {
                resume_token: "1:0/16B3748:3#1@1763632800000+1204+17+1763632799000123".to_owned(),
                credit: 9,
            },
            |request| request.resume_token.parse::<Done>().is_ok(),
        ),
        Kind::message(
            &DeliverAck {
                resume_token: "1:0/16B3748:3#1@1763632800000".to_owned(),
            },
            |answer| answer.resume_token.parse::<ResumeToken>().is_ok(),
        ),
        Kind::word::<Done>("1:0/16B3748:3#1@1763632800000+1204+17+1763632799000123"),
        Kind::yaml::<CaptureConfig>(CAPTURE),
        Kind::yaml::<ReplayConfig>(REPLAY),
        Kind::json::<Checkpoint>(CHECKPOINT),
        Kind::json::<Kept>(KEPT),
        Kind::new(
            "a record of the format Protobuf",
            headed(values(ProtobufEncoder::default())),
            move |bytes| record(bytes, &exact),
        ),
        Kind::new(
            "a record of the format DebeziumJson",
            headed(values(DebeziumEncoder::new("shop", "shop", true))),
            move |bytes| record(bytes, &keys),
        ),
    ]
}

/// One to eight wrongs.
fn mutate(bytes: &mut Vec<u8>, right: &[Vec<u8>], random: &mut Rng) {
    for _ in 0..random.u32(1..=8) {
        let place = random.usize(..=bytes.len());
        let end = random.usize(place..=bytes.len());
        match random.u32(..7) {
            0 => bytes.truncate(place),
            1 => drop(bytes.drain(place..end)),
            2 => {
                let piece = bytes[place..end].to_vec();
                bytes.splice(place..place, piece);
            }
            3 => {
                let other = random.choice(right).unwrap();
                let from = random.usize(..=other.len());
                bytes.splice(place..end, other[from..].iter().copied());
            }
            // Numbers that are too large, as text and as lengths; what opens and never closes; names of what comes later.
            4 => {
                let worse: [&[u8]; 7] = [
                    b"18446744073709551616",
                    b"\xff\xff\xff\xff\xff\xff\xff\xff\xff\x01",
                    &[b'['; 300],
                    &[b'{'; 300],
                    b"*a",
                    b"&a [*a, *a, *a, *a, *a, *a, *a, *a]",
                    "\u{feff}\0é".as_bytes(),
                ];
                let worse = *random.choice(&worse).unwrap();
                bytes.splice(place..place, worse.iter().copied());
            }
            _ if !bytes.is_empty() => {
                let place = random.usize(..bytes.len());
                bytes[place] = if random.bool() {
                    random.u8(..)
                } else {
                    bytes[place] ^ (1 << random.u32(..8))
                };
            }
            _ => {}
        }
    }
    // Doubling and splicing must not outgrow what anybody sends.
    bytes.truncate(64 << 10);
}

fn fuzz() {
    let seed = env::var("MEANDER_FUZZ_SEED").map_or_else(|_| fastrand::u64(..), |seed| seed.parse().unwrap());
    let mut random = Rng::with_seed(seed);
    let kinds = kinds();
    let limit = env::var("MEANDER_FUZZ_SECONDS")
        .ok()
        .map(|seconds| Duration::from_secs(seconds.parse().unwrap()) / u32::try_from(kinds.len()).unwrap());
    for Kind {
        name,
        right,
        understands,
    } in kinds
    {
        assert!(!right.is_empty(), "{name}: there is something right");
        for bytes in &right {
            let text = String::from_utf8_lossy(bytes);
            assert!(understands(bytes), "{name}: what is right is understood: {text}");
        }
        let started = Instant::now();
        let (mut inputs, mut understood, mut most) = (0_u64, 0_u64, 0);
        while limit.map_or(inputs < INPUTS, |limit| started.elapsed() < limit) {
            let mut bytes = random.choice(&right).unwrap().clone();
            mutate(&mut bytes, &right, &mut random);
            let before = ALLOCATED.current_usage();
            ALLOCATED.reset_peak_usage();
            understood += u64::from(understands(&bytes));
            let taken = ALLOCATED.peak_usage().saturating_sub(before);
            assert!(
                taken <= ALLOWANCE.0 + ALLOWANCE.1 * bytes.len(),
                "seed {seed}, {name}, input {inputs}: {taken} bytes of memory for {}: {bytes:?}",
                bytes.len()
            );
            most = most.max(taken);
            inputs += 1;
        }
        println!(
            "seed {seed}: {name}: {inputs} inputs, {understood} understood, at most {most} bytes of memory for one"
        );
    }
}

#[test]
fn no_input_makes_its_reader_panic_or_take_memory_without_bound() {
    // As a replay does, which judges on threads with room.
    thread::Builder::new()
        .stack_size(STACK)
        .spawn(fuzz)
        .unwrap()
        .join()
        .unwrap();
}

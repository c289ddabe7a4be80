//! The format `Protobuf`: `meander.v1.ChangeRecord`.
//!
//! Written field by field straight from PostgreSQL's text. The table's description is encoded once and copied into each record.
//! The tests read everything back with the generated types.

use std::{collections::HashMap, convert::Infallible, sync::Arc};

use meander_proto::v1;
use prost::{
    Message as _,
    encoding::{WireType, encode_key, encode_varint, encoded_len_varint},
};

use crate::{
    batch::{Batch, Destination, Heartbeat},
    encode::{EncodeError, Encoder, json, key, oversized},
    schema::TableSchema,
    source::{
        Change, Column, Message, Operation, Relation, Snapshot, TransactionMark,
        postgres::{
            details::TableDetails,
            pgoutput::{Datum, OldTuple, Tuple},
        },
    },
};

/// Encodes changes as `meander.v1.ChangeRecord`.
#[derive(Default)]
pub struct ProtobufEncoder {
    prepared: HashMap<u32, Prepared>,
    /// A row is written here first, because Protobuf wants its length before it.
    scratch: Vec<u8>,
}

struct Prepared {
    destination: Arc<Destination>,
    /// Field `relation` of the record, with its tag and length.
    relation: Vec<u8>,
    kinds: Vec<Kind>,
}

/// How the text of a column is written.
#[derive(Clone, Copy, PartialEq, Eq)]
enum Kind {
    Integer,
    Boolean,
    Float4,
    Float8,
    Binary,
    Text,
}

impl Kind {
    fn of(column: &Column) -> Self {
        // By its name, which a domain shares with the type that it is over. Only built-in types have a name without a schema.
        match column.type_name.as_str() {
            "int2" | "int4" | "int8" | "oid" => Self::Integer,
            "bool" => Self::Boolean,
            "float4" => Self::Float4,
            "float8" => Self::Float8,
            "bytea" => Self::Binary,
            _ => Self::Text,
        }
    }
}

/// One record of a change.
struct Part<'a> {
    operation: v1::Operation,
    key: Option<(Tuple<'a>, Option<Tuple<'a>>)>,
    before: Option<OldTuple<'a>>,
    after: Option<Tuple<'a>>,
    key_changed: bool,
    snapshot: Option<v1::Snapshot>,
    schema_change: Option<v1::SchemaChange>,
    source_gap: Option<v1::SourceGap>,
}

fn relation_message(relation: &Relation) -> v1::Relation {
    v1::Relation {
        schema: relation.schema.clone(),
        table: relation.table.clone(),
        columns: relation
            .columns
            .iter()
            .map(|column| v1::Column {
                name: column.name.clone(),
                type_name: column.type_name.clone(),
                type_oid: column.type_oid,
                type_modifier: column.type_modifier,
                key: column.key,
            })
            .collect(),
    }
}

fn schema_message(schema: &TableSchema) -> v1::TableSchema {
    let identity = match schema.replica_identity {
        'd' => v1::ReplicaIdentity::Default,
        'n' => v1::ReplicaIdentity::Nothing,
        'f' => v1::ReplicaIdentity::Full,
        'i' => v1::ReplicaIdentity::Index,
        _ => v1::ReplicaIdentity::Unspecified,
    };
    v1::TableSchema {
        version: schema.version,
        oid: schema.relation.oid,
        relation: Some(relation_message(&schema.relation)),
        replica_identity: identity.into(),
    }
}

impl Encoder for ProtobufEncoder {
    fn wants_details(&self) -> bool {
        false
    }

    fn prepare(&mut self, relation: &Relation, _details: &TableDetails, destination: Arc<Destination>) {
        let mut bytes = Vec::new();
        prost::encoding::message::encode(field::RELATION, &relation_message(relation), &mut bytes);
        let kinds = relation.columns.iter().map(Kind::of).collect();
        self.prepared.insert(
            relation.oid,
            Prepared {
                destination,
                relation: bytes,
                kinds,
            },
        );
    }

    fn encode(&mut self, change: &Change<'_>, batch: &mut Batch) -> Result<(), EncodeError> {
        let part = |operation, key, before, after| Part {
            operation,
            key,
            before,
            after,
            key_changed: false,
            snapshot: None,
            schema_change: None,
            source_gap: None,
        };
        let of_snapshot = |snapshot: &Snapshot, rows| {
            Some(v1::Snapshot {
                id: snapshot.id.clone(),
                rows,
            })
        };
        match change.operation {
            Operation::Insert { new } => self.record(
                change,
                batch,
                &part(v1::Operation::Insert, Some((new, None)), None, Some(new)),
            ),
            Operation::Update { old: Some(old), new } if key::differs(change.relation, old.tuple(), new) => {
                // Whoever follows the old key, in its own partition, must learn of its end.
                self.record(
                    change,
                    batch,
                    &Part {
                        key_changed: true,
                        ..part(v1::Operation::Delete, Some((old.tuple(), None)), Some(old), None)
                    },
                )?;
                self.record(
                    change,
                    batch,
                    &Part {
                        key_changed: true,
                        ..part(
                            v1::Operation::Update,
                            Some((new, Some(old.tuple()))),
                            Some(old),
                            Some(new),
                        )
                    },
                )
            }
            Operation::Update { old, new } => {
                let key = Some((new, old.map(|old| old.tuple())));
                self.record(change, batch, &part(v1::Operation::Update, key, old, Some(new)))
            }
            Operation::Delete { old } => self.record(
                change,
                batch,
                &part(v1::Operation::Delete, Some((old.tuple(), None)), Some(old), None),
            ),
            Operation::Truncate => self.record(change, batch, &part(v1::Operation::Truncate, None, None, None)),
            Operation::SchemaChange { change: schemas } => self.record(
                change,
                batch,
                &Part {
                    schema_change: Some(v1::SchemaChange {
                        before: schemas.before.as_ref().map(schema_message),
                        after: schemas.after.as_ref().map(schema_message),
                    }),
                    ..part(v1::Operation::SchemaChange, None, None, None)
                },
            ),
            Operation::SourceGap { gap } => self.record(
                change,
                batch,
                &Part {
                    source_gap: Some(v1::SourceGap {
                        id: gap.id.clone(),
                        reason: gap.reason.clone(),
                        lost_after_lsn: gap.lost_after.0,
                        resumed_lsn: gap.resumed_at.0,
                    }),
                    ..part(v1::Operation::SourceGap, None, None, None)
                },
            ),
            Operation::Read { new, snapshot } => self.record(
                change,
                batch,
                &Part {
                    snapshot: of_snapshot(snapshot, 0),
                    ..part(v1::Operation::Read, Some((new, None)), None, Some(new))
                },
            ),
            Operation::SnapshotBegin { snapshot } => self.record(
                change,
                batch,
                &Part {
                    snapshot: of_snapshot(snapshot, 0),
                    ..part(v1::Operation::SnapshotBegin, None, None, None)
                },
            ),
            Operation::SnapshotEnd { snapshot, rows } => self.record(
                change,
                batch,
                &Part {
                    snapshot: of_snapshot(snapshot, rows),
                    ..part(v1::Operation::SnapshotEnd, None, None, None)
                },
            ),
        }
    }

    fn transactions(&self) -> Option<&Destination> {
        None
    }

    fn begin(&mut self, _mark: &TransactionMark, _known: bool) {}

    fn pass(&mut self, _change: &Change<'_>) {}

    fn pass_message(&mut self, _message: &Message<'_>) {}

    fn end(&mut self, _mark: &TransactionMark, _known: bool, _batch: &mut Batch) {}

    fn heartbeat(&self, _time_micros: i64) -> Option<Heartbeat> {
        None
    }

    fn encode_message(
        &mut self,
        message: &Message<'_>,
        commit_time_micros: i64,
        destination: &Arc<Destination>,
        batch: &mut Batch,
    ) {
        let Message {
            prefix,
            content,
            position,
            transaction,
            ..
        } = message;
        let written = batch.push::<Infallible>(
            *position,
            0,
            commit_time_micros,
            destination,
            |out| {
                out.extend_from_slice(b"{\"prefix\":");
                json::write_string(prefix, out);
                out.push(b'}');
                Ok(true)
            },
            |out| {
                let record = v1::ChangeRecord {
                    coordinate: Some(v1::Coordinate {
                        epoch: u32::from(position.epoch.0),
                        commit_lsn: position.commit_lsn.0,
                        ordinal: position.ordinal,
                        part: 0,
                    }),
                    operation: v1::Operation::Message.into(),
                    commit_time_micros,
                    transaction_id: transaction.as_ref().map_or(0, |transaction| transaction.id),
                    message: Some(v1::LogicalMessage {
                        prefix: (*prefix).to_owned(),
                        content: content.to_vec(),
                        transactional: transaction.is_some(),
                    }),
                    origin: transaction
                        .as_ref()
                        .and_then(|transaction| transaction.origin.as_ref())
                        .map(|origin| origin.name.clone())
                        .unwrap_or_default(),
                    ..v1::ChangeRecord::default()
                };
                record.encode_raw(out);
                Ok(true)
            },
        );
        let Ok(()) = written;
    }
}

/// Field numbers of `ChangeRecord`.
mod field {
    pub(super) const COORDINATE: u32 = 1;
    pub(super) const OPERATION: u32 = 2;
    pub(super) const RELATION: u32 = 3;
    pub(super) const BEFORE: u32 = 4;
    pub(super) const AFTER: u32 = 5;
    pub(super) const COMMIT_TIME_MICROS: u32 = 6;
    pub(super) const TRANSACTION_ID: u32 = 7;
    pub(super) const KEY_CHANGED: u32 = 8;
    pub(super) const SNAPSHOT: u32 = 9;
    pub(super) const SCHEMA_CHANGE: u32 = 11;
    pub(super) const ORIGIN: u32 = 12;
    pub(super) const SOURCE_GAP: u32 = 13;
    pub(super) const SCHEMA_VERSION: u32 = 14;
}

impl ProtobufEncoder {
    fn record(&mut self, change: &Change<'_>, batch: &mut Batch, part: &Part<'_>) -> Result<(), EncodeError> {
        let prepared = self
            .prepared
            .get(&change.relation.oid)
            .ok_or(EncodeError::Unprepared(change.relation.oid))?;
        let scratch = &mut self.scratch;
        let number = batch.next_part(change.position);
        oversized::fit(batch, change, &prepared.destination, |batch, most| {
            batch.push(
                change.position,
                number,
                change.commit_time_micros,
                &prepared.destination,
                |out| match part.key {
                    Some((row, fallback)) => key::write(change.relation, row, fallback, out),
                    None => Ok(false),
                },
                |out| {
                    let coordinate = v1::Coordinate {
                        epoch: u32::from(change.position.epoch.0),
                        commit_lsn: change.position.commit_lsn.0,
                        ordinal: change.position.ordinal,
                        part: u32::from(number),
                    };
                    encode_key(field::COORDINATE, WireType::LengthDelimited, out);
                    encode_varint(coordinate.encoded_len() as u64, out);
                    coordinate.encode_raw(out);
                    encode_key(field::OPERATION, WireType::Varint, out);
                    encode_varint(part.operation as u64, out);
                    out.extend_from_slice(&prepared.relation);
                    if let Some(old) = part.before {
                        scratch.clear();
                        let key_only = matches!(old, OldTuple::Key(_));
                        write_row(change.relation, &prepared.kinds, old.tuple(), key_only, most, scratch)?;
                        write_bytes(field::BEFORE, scratch, out);
                    }
                    if let Some(new) = part.after {
                        scratch.clear();
                        write_row(change.relation, &prepared.kinds, new, false, most, scratch)?;
                        write_bytes(field::AFTER, scratch, out);
                    }
                    if change.commit_time_micros != 0 {
                        encode_key(field::COMMIT_TIME_MICROS, WireType::Varint, out);
                        encode_varint(change.commit_time_micros.cast_unsigned(), out);
                    }
                    if change.transaction_id != 0 {
                        encode_key(field::TRANSACTION_ID, WireType::Varint, out);
                        encode_varint(u64::from(change.transaction_id), out);
                    }
                    if part.key_changed {
                        encode_key(field::KEY_CHANGED, WireType::Varint, out);
                        encode_varint(1, out);
                    }
                    if let Some(snapshot) = &part.snapshot {
                        prost::encoding::message::encode(field::SNAPSHOT, snapshot, out);
                    }
                    if let Some(schemas) = &part.schema_change {
                        prost::encoding::message::encode(field::SCHEMA_CHANGE, schemas, out);
                    }
                    if let Some(gap) = &part.source_gap {
                        prost::encoding::message::encode(field::SOURCE_GAP, gap, out);
                    }
                    if let Some(origin) = change.origin {
                        write_bytes(field::ORIGIN, origin.name.as_bytes(), out);
                    }
                    if change.schema_version != 0 {
                        encode_key(field::SCHEMA_VERSION, WireType::Varint, out);
                        encode_varint(u64::from(change.schema_version), out);
                    }
                    Ok(true)
                },
            )
        })
    }
}

fn write_bytes(field: u32, bytes: &[u8], out: &mut Vec<u8>) {
    encode_key(field, WireType::LengthDelimited, out);
    encode_varint(bytes.len() as u64, out);
    out.extend_from_slice(bytes);
}

/// Field numbers of `Value`, and `Row.values`.
mod value {
    pub(super) const VALUES: u32 = 1;
    pub(super) const INTEGER: u32 = 1;
    pub(super) const BOOLEAN: u32 = 2;
    pub(super) const FLOAT4: u32 = 3;
    pub(super) const FLOAT8: u32 = 4;
    pub(super) const BINARY: u32 = 5;
    pub(super) const TEXT: u32 = 6;
    pub(super) const ABSENT: u32 = 7;
}

/// Writes `Row.values`, without those of more than `most` bytes. Every field number of `Value` is below 16, so every tag is one byte.
fn write_row(
    relation: &Relation,
    kinds: &[Kind],
    row: Tuple<'_>,
    key_only: bool,
    most: usize,
    out: &mut Vec<u8>,
) -> Result<(), EncodeError> {
    for ((column, kind), datum) in relation.columns.iter().zip(kinds).zip(row.values()) {
        encode_key(value::VALUES, WireType::LengthDelimited, out);
        match datum {
            _ if key_only && !column.key => write_absence(v1::Absence::NotInReplicaIdentity, out),
            Datum::UnchangedToast => write_absence(v1::Absence::UnchangedToast, out),
            Datum::Null => out.push(0),
            Datum::Text(text) if text.len() > most && !column.key => write_absence(v1::Absence::Oversized, out),
            Datum::Text(text) => write_value(*kind, text, out).ok_or_else(|| EncodeError::Value {
                table: format!("{}.{}", relation.schema, relation.table),
                column: column.name.clone(),
                type_name: column.type_name.clone(),
            })?,
        }
    }
    Ok(())
}

fn write_absence(absence: v1::Absence, out: &mut Vec<u8>) {
    out.push(2);
    encode_key(value::ABSENT, WireType::Varint, out);
    encode_varint(absence as u64, out);
}

fn write_value(kind: Kind, text: &str, out: &mut Vec<u8>) -> Option<()> {
    match kind {
        Kind::Integer => {
            let integer: i64 = text.parse().ok()?;
            let zigzag = ((integer << 1) ^ (integer >> 63)).cast_unsigned();
            encode_varint(1 + encoded_len_varint(zigzag) as u64, out);
            encode_key(value::INTEGER, WireType::Varint, out);
            encode_varint(zigzag, out);
        }
        Kind::Boolean => {
            out.push(2);
            encode_key(value::BOOLEAN, WireType::Varint, out);
            out.push(match text {
                "t" => 1,
                "f" => 0,
                _ => return None,
            });
        }
        Kind::Float4 => {
            let float: f32 = text.parse().ok()?;
            out.push(5);
            encode_key(value::FLOAT4, WireType::ThirtyTwoBit, out);
            out.extend_from_slice(&float.to_le_bytes());
        }
        Kind::Float8 => {
            let float: f64 = text.parse().ok()?;
            out.push(9);
            encode_key(value::FLOAT8, WireType::SixtyFourBit, out);
            out.extend_from_slice(&float.to_le_bytes());
        }
        Kind::Binary => {
            let digits = text.strip_prefix("\\x")?.as_bytes();
            let (pairs, rest) = digits.as_chunks::<2>();
            if !rest.is_empty() {
                return None;
            }
            begin_value(value::BINARY, pairs.len(), out);
            for [high, low] in pairs {
                out.push(hex_digit(*high)? << 4 | hex_digit(*low)?);
            }
        }
        Kind::Text => {
            begin_value(value::TEXT, text.len(), out);
            out.extend_from_slice(text.as_bytes());
        }
    }
    Some(())
}

/// Length of the `Value`, then tag and length of its one field.
fn begin_value(field: u32, length: usize, out: &mut Vec<u8>) {
    let length = length as u64;
    encode_varint(1 + encoded_len_varint(length) as u64 + length, out);
    encode_key(field, WireType::LengthDelimited, out);
    encode_varint(length, out);
}

fn hex_digit(digit: u8) -> Option<u8> {
    match digit {
        b'0'..=b'9' => Some(digit - b'0'),
        b'a'..=b'f' => Some(digit - b'a' + 10),
        _ => None,
    }
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;
    use v1::value::Kind as Is;

    use super::*;
    use crate::{
        position::{Epoch, Lsn, Position},
        size_limit::{LARGE_BYTES, SizeLimit},
        source::{
            TransactionOrigin,
            postgres::pgoutput::{LogicalMessage, decode},
        },
    };

    const TYPES: [(&str, &str); 8] = [
        ("id", "int8"),
        ("flag", "bool"),
        ("single", "float4"),
        ("double", "float8"),
        ("payload", "bytea"),
        ("price", "numeric"),
        ("note", "text"),
        ("at", "timestamptz"),
    ];

    fn relation() -> Arc<Relation> {
        Arc::new(Relation {
            oid: 1,
            schema: "public".to_owned(),
            table: "trades".to_owned(),
            columns: TYPES
                .iter()
                .map(|(name, type_name)| Column {
                    name: (*name).to_owned(),
                    type_oid: 0,
                    type_name: (*type_name).to_owned(),
                    type_modifier: -1,
                    key: *name == "id",
                })
                .collect(),
        })
    }

    /// A tuple as pgoutput sends it: `None` is NULL, `Some("\0")` an unchanged TOAST value.
    fn tuple(values: &[Option<&str>]) -> Vec<u8> {
        let mut out = u16::try_from(values.len()).unwrap().to_be_bytes().to_vec();
        for value in values {
            match value {
                None => out.push(b'n'),
                Some("\0") => out.push(b'u'),
                Some(text) => {
                    out.push(b't');
                    out.extend(u32::try_from(text.len()).unwrap().to_be_bytes());
                    out.extend(text.as_bytes());
                }
            }
        }
        out
    }

    fn encode(message: &[u8]) -> Result<Vec<(Option<String>, v1::ChangeRecord)>, EncodeError> {
        encode_operation(match decode(message).unwrap() {
            LogicalMessage::Insert { new, .. } => Operation::Insert { new },
            LogicalMessage::Update { old, new, .. } => Operation::Update { old, new },
            LogicalMessage::Delete { old, .. } => Operation::Delete { old },
            other => panic!("{other:?}"),
        })
    }

    fn encode_operation(operation: Operation<'_>) -> Result<Vec<(Option<String>, v1::ChangeRecord)>, EncodeError> {
        Ok(encode_within(operation, &SizeLimit::default())?.0)
    }

    /// The records where the topic takes no more than this, and the batch that holds them.
    #[allow(clippy::type_complexity)]
    fn encode_within(
        operation: Operation<'_>,
        limit: &SizeLimit,
    ) -> Result<(Vec<(Option<String>, v1::ChangeRecord)>, Batch), EncodeError> {
        let relation = relation();
        let mut encoder = ProtobufEncoder::default();
        encoder.prepare(
            &relation,
            &TableDetails::default(),
            Arc::new(Destination {
                topic: "t".to_owned(),
                stream: "s".to_owned(),
                limit: limit.clone(),
            }),
        );
        let origin = TransactionOrigin {
            name: "upstream".to_owned(),
            lsn: Lsn(5),
        };
        let change = Change {
            relation: &relation,
            schema_version: 2,
            operation,
            position: Position {
                epoch: Epoch::FIRST,
                commit_lsn: Lsn(0x16B_3748),
                ordinal: 3,
            },
            commit_time_micros: 1_763_700_000_000_001,
            transaction_id: 777,
            lsn: Lsn(0x16B_3000),
            previous_end: None,
            origin: Some(&origin),
        };
        let mut batch = Batch::new();
        encoder.encode(&change, &mut batch)?;
        let records = (batch.records().iter())
            .map(|record| {
                (
                    batch.key(record).map(|key| String::from_utf8(key.to_vec()).unwrap()),
                    v1::ChangeRecord::decode(batch.value(record).unwrap()).unwrap(),
                )
            })
            .collect();
        Ok((records, batch))
    }

    fn insert(values: &[Option<&str>]) -> Result<v1::ChangeRecord, EncodeError> {
        encode(&[&b"I\0\0\0\x01N"[..], &tuple(values)].concat()).map(|mut records| records.remove(0).1)
    }

    fn values(row: Option<v1::Row>) -> Vec<Option<Is>> {
        row.unwrap().values.into_iter().map(|value| value.kind).collect()
    }

    const ROW: [Option<&str>; 8] = [
        Some("-7"),
        Some("t"),
        Some("1.1"),
        Some("-Infinity"),
        Some("\\x00ff10"),
        Some("NaN"),
        None,
        Some("2026-11-21 07:00:00.123456+00"),
    ];

    #[test]
    fn an_insert_reads_back_with_the_generated_types() {
        let records = encode(&[&b"I\0\0\0\x01N"[..], &tuple(&ROW)].concat()).unwrap();
        let [(key, record)] = &records[..] else {
            panic!("one record")
        };
        assert_eq!(key.as_deref(), Some(r#"{"id":"-7"}"#));
        assert_eq!(
            record.coordinate,
            Some(v1::Coordinate {
                epoch: 1,
                commit_lsn: 0x16B_3748,
                ordinal: 3,
                part: 0
            })
        );
        assert_eq!(record.operation(), v1::Operation::Insert);
        assert_eq!(
            (record.commit_time_micros, record.transaction_id, record.origin.as_str()),
            (1_763_700_000_000_001, 777, "upstream")
        );
        assert_eq!(record.schema_version, 2);
        assert_eq!(record.relation.as_ref().unwrap().columns.len(), 8);
        assert_eq!(record.before, None);
        assert_eq!(
            values(record.after.clone()),
            [
                Some(Is::Integer(-7)),
                Some(Is::Boolean(true)),
                Some(Is::Float4(1.1)),
                Some(Is::Float8(f64::NEG_INFINITY)),
                Some(Is::Binary(vec![0, 255, 16])),
                Some(Is::Text("NaN".to_owned())),
                None,
                Some(Is::Text("2026-11-21 07:00:00.123456+00".to_owned())),
            ]
        );
    }

    #[test]
    fn an_update_of_the_key_ends_the_old_key_and_begins_the_new_one() {
        let mut old = [None; 8];
        old[0] = Some("1");
        let mut new = ROW;
        new[6] = Some("\0");
        let records = encode(&[&b"U\0\0\0\x01K"[..], &tuple(&old), b"N", &tuple(&new)].concat()).unwrap();
        let [(old_key, delete), (new_key, update)] = &records[..] else {
            panic!("two records")
        };
        assert_eq!(
            (old_key.as_deref(), new_key.as_deref()),
            (Some(r#"{"id":"1"}"#), Some(r#"{"id":"-7"}"#))
        );
        assert_eq!(
            (delete.operation(), update.operation()),
            (v1::Operation::Delete, v1::Operation::Update)
        );
        assert_eq!(delete.coordinate.unwrap().part, 0);
        assert_eq!(update.coordinate.unwrap().part, 1);
        assert!(delete.key_changed && update.key_changed && delete.after.is_none());
        let before = values(update.before.clone());
        assert_eq!(before[0], Some(Is::Integer(1)));
        assert_eq!(before[1], Some(Is::Absent(v1::Absence::NotInReplicaIdentity.into())));
        assert_eq!(
            values(update.after.clone())[6],
            Some(Is::Absent(v1::Absence::UnchangedToast.into()))
        );
    }

    #[test]
    fn only_what_is_too_much_for_the_topic_is_left_out_and_never_of_the_key() {
        let limit = SizeLimit::default();
        limit.set(4000);
        let encode = |row: &[Option<&str>]| {
            let message = [&b"I\0\0\0\x01N"[..], &tuple(row)].concat();
            let LogicalMessage::Insert { new, .. } = decode(&message).unwrap() else {
                panic!("not an insert")
            };
            let (mut records, batch) = encode_within(Operation::Insert { new }, &limit).unwrap();
            let fits: Vec<bool> = batch.oversized.iter().map(|oversized| oversized.fits).collect();
            (values(records.remove(0).1.after), fits)
        };
        let (long, longer) = ("n".repeat(900), "1".repeat(6000));
        let mut row = ROW;
        (row[5], row[6]) = (Some(longer.as_str()), Some(long.as_str()));
        let (told, fits) = encode(&row);
        assert_eq!((&told[0], fits), (&Some(Is::Integer(-7)), vec![true]));
        assert_eq!(told[5], Some(Is::Absent(v1::Absence::Oversized.into())));
        assert_eq!(told[6], Some(Is::Text(long.clone())));
        // What is left is too much as well.
        limit.set(100);
        assert_eq!(encode(&ROW).1, [false]);
        limit.set(9000);
        assert!(encode(&row).1.is_empty());
    }

    #[test]
    fn a_record_that_may_be_made_otherwise_when_it_is_made_again_goes_to_kafka_first() {
        let waits = |bytes: usize| {
            let text = "n".repeat(bytes);
            let mut row = ROW;
            row[6] = Some(text.as_str());
            let message = [&b"I\0\0\0\x01N"[..], &tuple(&row)].concat();
            let LogicalMessage::Insert { new, .. } = decode(&message).unwrap() else {
                panic!("not an insert")
            };
            let (_, batch) = encode_within(Operation::Insert { new }, &SizeLimit::default()).unwrap();
            batch.kafka_first
        };
        // Whatever the topic takes now: it may take less by the time that a crash has it made again.
        assert_eq!((waits(1000), waits(LARGE_BYTES)), (false, true));
    }

    #[test]
    fn a_row_of_a_snapshot_says_which_one_and_its_markers_have_no_key() {
        let snapshot = Snapshot {
            id: "first".to_owned(),
            incremental: true,
        };
        let snapshot = &snapshot;
        let message = [&b"I\0\0\0\x01N"[..], &tuple(&ROW)].concat();
        let LogicalMessage::Insert { new, .. } = decode(&message).unwrap() else {
            panic!("not an insert")
        };
        let one = |operation| encode_operation(operation).unwrap().remove(0);
        let (key, read) = one(Operation::Read { new, snapshot });
        assert_eq!(key.as_deref(), Some(r#"{"id":"-7"}"#));
        assert_eq!((read.operation(), read.before), (v1::Operation::Read, None));
        assert_eq!(values(read.after)[0], Some(Is::Integer(-7)));
        assert_eq!(read.snapshot.unwrap().id, "first");
        let (key, end) = one(Operation::SnapshotEnd { snapshot, rows: 9 });
        assert_eq!(
            (key, end.operation(), end.after),
            (None, v1::Operation::SnapshotEnd, None)
        );
        assert_eq!(end.snapshot.unwrap().rows, 9);
        assert!(one(Operation::SnapshotBegin { snapshot }).1.relation.is_some());
    }

    #[test]
    fn a_value_that_is_not_of_its_type_is_an_error_and_leaves_no_record() {
        for (index, text) in [(0, "x"), (1, "true"), (2, "?"), (4, "00"), (4, "\\x0"), (4, "\\xZZ")] {
            let mut row = ROW;
            row[index] = Some(text);
            assert!(matches!(insert(&row), Err(EncodeError::Value { .. })), "{index} {text}");
        }
        let mut row = ROW;
        row[0] = Some("\0");
        assert!(matches!(insert(&row), Err(EncodeError::AbsentKey { .. })));
    }

    proptest! {
        #[test]
        fn what_postgresql_prints_comes_out_as_it_went_in(
            id in any::<i64>(), flag in any::<bool>(), single in any::<f32>(), double in any::<f64>(),
            payload in proptest::collection::vec(any::<u8>(), 0..300), price in "-?[0-9]{1,200}\\.[0-9]{0,50}", note in "[^\\x00]*",
        ) {
            let hex: String = payload.iter().map(|byte| format!("{byte:02x}")).collect();
            let texts = [
                id.to_string(), (if flag { "t" } else { "f" }).to_owned(), single.to_string(), double.to_string(),
                format!("\\x{hex}"), price.clone(), note.clone(), String::new(),
            ];
            let row: Vec<Option<&str>> = texts.iter().map(|text| Some(text.as_str())).collect();
            let read = values(insert(&row).unwrap().after);
            prop_assert_eq!(&read[0], &Some(Is::Integer(id)));
            prop_assert_eq!(&read[1], &Some(Is::Boolean(flag)));
            let Some(Is::Float4(read_single)) = read[2] else { panic!() };
            prop_assert!(read_single == single || single.is_nan());
            let Some(Is::Float8(read_double)) = read[3] else { panic!() };
            prop_assert!(read_double == double || double.is_nan());
            prop_assert_eq!(&read[4], &Some(Is::Binary(payload)));
            prop_assert_eq!(&read[5], &Some(Is::Text(price)));
            prop_assert_eq!(&read[6], &Some(Is::Text(note)));
        }
    }
}

//! Decoder of the messages of `pgoutput`, protocol version 1.
//!
//! <https://www.postgresql.org/docs/current/protocol-logicalrep-message-formats.html>
//!
//! Strict: a message that is cut, too long, or unknown is an error, because a change that is passed over is a change that is lost.
//! Nothing is copied: tuples borrow from the message.

use crate::position::Lsn;

/// Microseconds from 1970-01-01 to 2000-01-01.
const POSTGRES_EPOCH_MICROS: i64 = 946_684_800_000_000;

/// A time as PostgreSQL sends it, whose clock starts in 2000, in microseconds since the Unix epoch.
pub(super) fn unix_micros(time: u64) -> i64 {
    time.cast_signed().saturating_add(POSTGRES_EPOCH_MICROS)
}

/// The message is not what the protocol says.
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
#[error("pgoutput message {tag:?}: {problem}")]
pub struct DecodeError {
    tag: char,
    problem: &'static str,
}

/// A message of the output plugin.
#[derive(Clone, Debug, PartialEq)]
pub enum LogicalMessage<'a> {
    /// Start of a transaction.
    Begin {
        /// Start of the commit record.
        final_lsn: Lsn,
        /// Microseconds since 1970-01-01T00:00:00Z.
        commit_time_micros: i64,
        /// Transaction id.
        xid: u32,
    },
    /// End of a transaction.
    Commit {
        /// Start of the commit record: the same as `final_lsn`.
        commit_lsn: Lsn,
        /// End of the commit record.
        end_lsn: Lsn,
    },
    /// The shape of a table, before its first change and after each change of its shape.
    Relation(RelationMessage<'a>),
    /// The name of a type that is not built in, before the relation that uses it.
    Type {
        /// OID of the type.
        oid: u32,
        /// Its schema.
        schema: &'a str,
        /// Its name.
        name: &'a str,
    },
    /// A new row.
    Insert {
        /// OID of the table.
        relation: u32,
        /// The row.
        new: Tuple<'a>,
    },
    /// A changed row.
    Update {
        /// OID of the table.
        relation: u32,
        /// The row before, as far as the replica identity tells it.
        old: Option<OldTuple<'a>>,
        /// The row after.
        new: Tuple<'a>,
    },
    /// A deleted row.
    Delete {
        /// OID of the table.
        relation: u32,
        /// The row before, as far as the replica identity tells it.
        old: OldTuple<'a>,
    },
    /// Emptied tables.
    Truncate {
        /// OIDs of the tables, 4 bytes each.
        relations: Oids<'a>,
    },
    /// Where the transaction comes from, if it was replicated itself.
    Origin {
        /// Name of the replication origin.
        name: &'a str,
        /// Where it was committed there.
        commit_lsn: Lsn,
    },
    /// What `pg_logical_emit_message` wrote.
    Message {
        /// Part of a transaction, and gone with it when that is rolled back; otherwise sent as soon as it is in the WAL.
        transactional: bool,
        /// End of its WAL record.
        end_lsn: Lsn,
        /// Says whose it is.
        prefix: &'a str,
        /// Any bytes.
        content: &'a [u8],
    },
}

/// The shape of a table.
#[derive(Clone, Debug, PartialEq)]
pub struct RelationMessage<'a> {
    /// OID of the table.
    pub oid: u32,
    /// Its schema.
    pub schema: &'a str,
    /// Its name.
    pub table: &'a str,
    /// `d`efault, `n`othing, `f`ull or `i`ndex.
    pub replica_identity: u8,
    /// Published columns in their order.
    pub columns: Vec<ColumnMessage<'a>>,
}

/// A column of a table.
#[derive(Clone, Debug, PartialEq)]
pub struct ColumnMessage<'a> {
    /// Part of the replica identity (every column under FULL).
    pub key: bool,
    /// Name of the column.
    pub name: &'a str,
    /// OID of its type.
    pub type_oid: u32,
    /// `atttypmod`.
    pub type_modifier: i32,
}

/// A row before the change.
#[derive(Clone, Copy, Debug, PartialEq)]
pub enum OldTuple<'a> {
    /// Only the columns of the replica identity mean something.
    Key(Tuple<'a>),
    /// All columns (REPLICA IDENTITY FULL).
    Full(Tuple<'a>),
}

impl<'a> OldTuple<'a> {
    /// The tuple itself.
    #[must_use]
    pub fn tuple(&self) -> Tuple<'a> {
        match *self {
            Self::Key(tuple) | Self::Full(tuple) => tuple,
        }
    }
}

/// One value of a row.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Datum<'a> {
    /// SQL's NULL.
    Null,
    /// A TOASTed value that the UPDATE left as it was, and that is not in the WAL.
    UnchangedToast,
    /// PostgreSQL's text output, UTF-8.
    Text(&'a str),
}

/// A row. It was checked when it was made, so reading it cannot fail.
#[derive(Clone, Copy, Debug, PartialEq)]
pub struct Tuple<'a> {
    columns: u16,
    body: &'a [u8],
}

impl<'a> Tuple<'a> {
    /// A row whose values are laid out as in a message: `body` holds exactly `columns` of them.
    #[must_use]
    pub fn checked(columns: u16, body: &'a [u8]) -> Option<Self> {
        let mut rest = body;
        for _ in 0..columns {
            next_datum(&mut rest)?;
        }
        rest.is_empty().then_some(Self { columns, body })
    }

    /// Number of values.
    #[must_use]
    pub fn len(&self) -> usize {
        usize::from(self.columns)
    }

    /// True for a row of a table without columns.
    #[must_use]
    pub fn is_empty(&self) -> bool {
        self.columns == 0
    }

    /// The values in the order of the relation's columns.
    pub fn values(&self) -> impl Iterator<Item = Datum<'a>> + use<'a> {
        let mut rest = self.body;
        std::iter::from_fn(move || next_datum(&mut rest))
    }
}

fn next_datum<'a>(rest: &mut &'a [u8]) -> Option<Datum<'a>> {
    let (&kind, after) = rest.split_first()?;
    match kind {
        b'n' => {
            *rest = after;
            Some(Datum::Null)
        }
        b'u' => {
            *rest = after;
            Some(Datum::UnchangedToast)
        }
        b't' => {
            let (length, after) = after.split_first_chunk::<4>()?;
            let (value, after) = after.split_at_checked(u32::from_be_bytes(*length) as usize)?;
            *rest = after;
            Some(Datum::Text(std::str::from_utf8(value).ok()?))
        }
        _ => None,
    }
}

/// A list of OIDs.
#[derive(Clone, Copy, Debug, PartialEq)]
pub struct Oids<'a>(&'a [[u8; 4]]);

impl<'a> Oids<'a> {
    /// The OIDs in their order.
    pub fn iter(&self) -> impl Iterator<Item = u32> + use<'a> {
        self.0.iter().map(|bytes| u32::from_be_bytes(*bytes))
    }
}

/// Decodes one message.
///
/// # Errors
/// When it is not exactly one message of protocol version 1.
pub fn decode(message: &[u8]) -> Result<LogicalMessage<'_>, DecodeError> {
    let Some((&tag, body)) = message.split_first() else {
        return Err(DecodeError {
            tag: ' ',
            problem: "empty",
        });
    };
    let mut cursor = Cursor {
        rest: body,
        tag: char::from(tag),
    };
    let decoded = match tag {
        b'B' => LogicalMessage::Begin {
            final_lsn: Lsn(cursor.u64()?),
            commit_time_micros: unix_micros(cursor.u64()?),
            xid: cursor.u32()?,
        },
        b'C' => {
            let _flags = cursor.u8()?;
            let decoded = LogicalMessage::Commit {
                commit_lsn: Lsn(cursor.u64()?),
                end_lsn: Lsn(cursor.u64()?),
            };
            let _commit_time = cursor.u64()?;
            decoded
        }
        b'R' => LogicalMessage::Relation(relation(&mut cursor)?),
        b'Y' => LogicalMessage::Type {
            oid: cursor.u32()?,
            schema: schema(cursor.string()?),
            name: cursor.string()?,
        },
        b'I' => {
            let relation = cursor.u32()?;
            cursor.marker(b'N')?;
            LogicalMessage::Insert {
                relation,
                new: cursor.tuple()?,
            }
        }
        b'U' => {
            let relation = cursor.u32()?;
            let old = match cursor.u8()? {
                b'N' => None,
                kind => {
                    let old = cursor.old_tuple(kind)?;
                    cursor.marker(b'N')?;
                    Some(old)
                }
            };
            LogicalMessage::Update {
                relation,
                old,
                new: cursor.tuple()?,
            }
        }
        b'D' => {
            let relation = cursor.u32()?;
            let kind = cursor.u8()?;
            LogicalMessage::Delete {
                relation,
                old: cursor.old_tuple(kind)?,
            }
        }
        b'T' => {
            let count = cursor.u32()? as usize;
            let _options = cursor.u8()?;
            let (oids, after) = cursor.rest.as_chunks::<4>();
            if oids.len() != count {
                return Err(cursor.error("the number of tables is not what it says"));
            }
            cursor.rest = after;
            LogicalMessage::Truncate { relations: Oids(oids) }
        }
        b'O' => {
            let commit_lsn = Lsn(cursor.u64()?);
            let name = cursor.string()?;
            LogicalMessage::Origin { name, commit_lsn }
        }
        b'M' => {
            let transactional = cursor.u8()? & 1 == 1;
            let end_lsn = Lsn(cursor.u64()?);
            let prefix = cursor.string()?;
            let length = cursor.u32()? as usize;
            LogicalMessage::Message {
                transactional,
                end_lsn,
                prefix,
                content: cursor.bytes(length)?,
            }
        }
        _ => return Err(cursor.error("unknown kind")),
    };
    if !cursor.rest.is_empty() {
        return Err(cursor.error("longer than it should be"));
    }
    Ok(decoded)
}

fn relation<'a>(cursor: &mut Cursor<'a>) -> Result<RelationMessage<'a>, DecodeError> {
    let oid = cursor.u32()?;
    let schema = schema(cursor.string()?);
    let table = cursor.string()?;
    let replica_identity = cursor.u8()?;
    let count = cursor.u16()?;
    let mut columns = Vec::with_capacity(usize::from(count).min(1600));
    for _ in 0..count {
        columns.push(ColumnMessage {
            key: cursor.u8()? & 1 == 1,
            name: cursor.string()?,
            type_oid: cursor.u32()?,
            type_modifier: cursor.u32()?.cast_signed(),
        });
    }
    Ok(RelationMessage {
        oid,
        schema,
        table,
        replica_identity,
        columns,
    })
}

/// The protocol writes `pg_catalog` as the empty string.
fn schema(name: &str) -> &str {
    if name.is_empty() { "pg_catalog" } else { name }
}

struct Cursor<'a> {
    rest: &'a [u8],
    tag: char,
}

impl<'a> Cursor<'a> {
    fn error(&self, problem: &'static str) -> DecodeError {
        DecodeError { tag: self.tag, problem }
    }

    fn take<const N: usize>(&mut self) -> Result<[u8; N], DecodeError> {
        let (taken, rest) = self
            .rest
            .split_first_chunk::<N>()
            .ok_or_else(|| self.error("cut short"))?;
        self.rest = rest;
        Ok(*taken)
    }

    fn u8(&mut self) -> Result<u8, DecodeError> {
        self.take::<1>().map(|[byte]| byte)
    }

    fn u16(&mut self) -> Result<u16, DecodeError> {
        self.take().map(u16::from_be_bytes)
    }

    fn u32(&mut self) -> Result<u32, DecodeError> {
        self.take().map(u32::from_be_bytes)
    }

    fn u64(&mut self) -> Result<u64, DecodeError> {
        self.take().map(u64::from_be_bytes)
    }

    fn bytes(&mut self, length: usize) -> Result<&'a [u8], DecodeError> {
        let (bytes, rest) = self
            .rest
            .split_at_checked(length)
            .ok_or_else(|| self.error("cut short"))?;
        self.rest = rest;
        Ok(bytes)
    }

    fn marker(&mut self, expected: u8) -> Result<(), DecodeError> {
        if self.u8()? == expected {
            Ok(())
        } else {
            Err(self.error("the new row is not where it should be"))
        }
    }

    fn string(&mut self) -> Result<&'a str, DecodeError> {
        let end = self
            .rest
            .iter()
            .position(|byte| *byte == 0)
            .ok_or_else(|| self.error("a name without an end"))?;
        let text = std::str::from_utf8(&self.rest[..end]).map_err(|_| self.error("a name that is not UTF-8"))?;
        self.rest = &self.rest[end + 1..];
        Ok(text)
    }

    fn old_tuple(&mut self, kind: u8) -> Result<OldTuple<'a>, DecodeError> {
        match kind {
            b'K' => Ok(OldTuple::Key(self.tuple()?)),
            b'O' => Ok(OldTuple::Full(self.tuple()?)),
            _ => Err(self.error("the old row is of an unknown kind")),
        }
    }

    fn tuple(&mut self) -> Result<Tuple<'a>, DecodeError> {
        let columns = self.u16()?;
        let body = self.rest;
        for _ in 0..columns {
            next_datum(&mut self.rest)
                .ok_or_else(|| self.error("a value that is cut short, of an unknown kind, or not UTF-8"))?;
        }
        Ok(Tuple {
            columns,
            body: &body[..body.len() - self.rest.len()],
        })
    }
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;

    fn tuple_bytes(values: &[Option<&str>]) -> Vec<u8> {
        let mut out = u16::try_from(values.len()).unwrap().to_be_bytes().to_vec();
        for value in values {
            match value {
                None => out.push(b'n'),
                Some(text) => {
                    out.push(b't');
                    out.extend(u32::try_from(text.len()).unwrap().to_be_bytes());
                    out.extend(text.as_bytes());
                }
            }
        }
        out
    }

    #[test]
    fn an_update_with_its_old_key_is_read_value_by_value() {
        let mut message = b"U\0\0\0\x2AK".to_vec();
        message.extend(tuple_bytes(&[Some("1"), None]));
        message.push(b'N');
        message.extend(3_u16.to_be_bytes());
        message.extend(b"t\0\0\0\x012un");
        let LogicalMessage::Update {
            relation: 42,
            old: Some(OldTuple::Key(old)),
            new,
        } = decode(&message).unwrap()
        else {
            panic!("not an update");
        };
        assert_eq!(old.values().collect::<Vec<_>>(), [Datum::Text("1"), Datum::Null]);
        assert_eq!(
            new.values().collect::<Vec<_>>(),
            [Datum::Text("2"), Datum::UnchangedToast, Datum::Null]
        );
    }

    #[test]
    fn a_message_that_is_cut_anywhere_or_too_long_is_an_error() {
        let mut insert = b"I\0\0\0\x01N".to_vec();
        insert.extend(tuple_bytes(&[Some("abc"), None, Some("")]));
        let begin = [&b"B"[..], &[7; 20]].concat();
        let relation = b"R\0\0\0\x01public\0t\0d\0\x01\x01id\0\0\0\0\x17\xFF\xFF\xFF\xFF".to_vec();
        let truncate = b"T\0\0\0\x02\0\0\0\0\x01\0\0\0\x02".to_vec();
        let message = b"M\x01\0\0\0\0\0\0\0\x30app\0\0\0\0\x02\xFF\0".to_vec();
        for whole in [insert, begin, relation, truncate, message] {
            assert!(decode(&whole).is_ok());
            for cut in 0..whole.len() {
                assert!(decode(&whole[..cut]).is_err(), "{whole:?} cut at {cut}");
            }
            assert!(decode(&[&whole[..], b"\0"].concat()).is_err());
        }
    }

    proptest! {
        #[test]
        fn no_bytes_make_the_decoder_panic(bytes in proptest::collection::vec(any::<u8>(), 0..200), tag in "[BCRYIUDTOM]") {
            let _ = decode(&bytes);
            let _ = decode(&[tag.as_bytes(), &bytes].concat());
        }

        #[test]
        fn every_row_is_read_back_as_it_was_sent(values in proptest::collection::vec(proptest::option::of(".*"), 0..40)) {
            let values: Vec<Option<&str>> = values.iter().map(|value| value.as_deref()).collect();
            let mut message = b"I\0\0\0\x01N".to_vec();
            message.extend(tuple_bytes(&values));
            let LogicalMessage::Insert { new, .. } = decode(&message).unwrap() else { panic!("not an insert") };
            let read: Vec<_> = new.values().map(|datum| match datum { Datum::Text(text) => Some(text), _ => None }).collect();
            prop_assert_eq!(read, values);
        }
    }
}

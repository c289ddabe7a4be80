//! The block `source` of an event: where it comes from, and when it was committed.

use super::super::json::{self, write_string};
use crate::{position::Lsn, source::TransactionOrigin};

/// What of the block is the same for every event of a table.
pub(super) struct Source {
    /// From its name up to its first number.
    head: Vec<u8>,
    /// From the name of the database up to the sequence.
    middle: Vec<u8>,
    /// From the name of the schema up to the transaction's id.
    tail: Vec<u8>,
}

/// What differs.
pub(super) struct Place<'a> {
    pub(super) commit_time_micros: i64,
    /// One of Debezium's words.
    pub(super) snapshot: &'static str,
    pub(super) previous_end: Option<Lsn>,
    pub(super) lsn: Lsn,
    /// 0 for none.
    pub(super) transaction_id: u32,
    pub(super) origin: Option<&'a TransactionOrigin>,
}

impl Source {
    /// For the events of a table; schema and table are empty for those of none.
    pub(super) fn new(topic_prefix: &str, database: &str, schema: &str, table: &str) -> Self {
        let mut head = b"\"source\":{\"version\":".to_vec();
        write_string(env!("CARGO_PKG_VERSION"), &mut head);
        head.extend_from_slice(b",\"connector\":\"postgresql\",\"name\":");
        write_string(topic_prefix, &mut head);
        head.extend_from_slice(b",\"ts_ms\":");
        let mut middle = b",\"db\":".to_vec();
        write_string(database, &mut middle);
        middle.extend_from_slice(b",\"sequence\":\"[");
        let mut tail = b",\"schema\":".to_vec();
        write_string(schema, &mut tail);
        tail.extend_from_slice(b",\"table\":");
        write_string(table, &mut tail);
        tail.extend_from_slice(b",\"txId\":");
        Self { head, middle, tail }
    }

    pub(super) fn write(&self, place: &Place<'_>, out: &mut Vec<u8>) {
        let (micros, lsn) = (place.commit_time_micros, place.lsn.0);
        out.extend_from_slice(&self.head);
        json::write(
            out,
            format_args!("{},\"snapshot\":\"{}\"", micros.div_euclid(1000), place.snapshot),
        );
        out.extend_from_slice(&self.middle);
        match place.previous_end {
            Some(end) => json::write(out, format_args!("\\\"{}\\\"", end.0)),
            None => out.extend_from_slice(b"null"),
        }
        json::write(
            out,
            format_args!(
                ",\\\"{lsn}\\\"]\",\"ts_us\":{micros},\"ts_ns\":{}",
                micros.saturating_mul(1000)
            ),
        );
        out.extend_from_slice(&self.tail);
        match place.transaction_id {
            0 => out.extend_from_slice(b"null"),
            id => json::write(out, format_args!("{id}")),
        }
        json::write(out, format_args!(",\"lsn\":{lsn},\"xmin\":null,\"origin\":"));
        match place.origin {
            Some(origin) => {
                write_string(&origin.name, out);
                json::write(out, format_args!(",\"origin_lsn\":{}}}", origin.lsn.0));
            }
            None => out.extend_from_slice(b"null,\"origin_lsn\":null}"),
        }
    }
}

/// Its schema, as a field.
pub(super) const SCHEMA: &str = r#"{"type":"struct","fields":[{"type":"string","optional":false,"field":"version"},{"type":"string","optional":false,"field":"connector"},{"type":"string","optional":false,"field":"name"},{"type":"int64","optional":false,"field":"ts_ms"},{"type":"string","optional":true,"name":"io.debezium.data.Enum","version":1,"parameters":{"allowed":"true,first,first_in_data_collection,last_in_data_collection,last,false,incremental"},"default":"false","field":"snapshot"},{"type":"string","optional":false,"field":"db"},{"type":"string","optional":true,"field":"sequence"},{"type":"int64","optional":true,"field":"ts_us"},{"type":"int64","optional":true,"field":"ts_ns"},{"type":"string","optional":false,"field":"schema"},{"type":"string","optional":false,"field":"table"},{"type":"int64","optional":true,"field":"txId"},{"type":"int64","optional":true,"field":"lsn"},{"type":"int64","optional":true,"field":"xmin"},{"type":"string","optional":true,"field":"origin"},{"type":"int64","optional":true,"field":"origin_lsn"}],"optional":false,"name":"io.debezium.connector.postgresql.Source","version":1,"field":"source"}"#;

//! The key of a record: a JSON object of the key columns, every value as PostgreSQL prints it.
//!
//! `{"trade_id":"0b5c…","traded_at":"2026-11-21 07:00:00.123456+00"}` can be read with any tool, and equal keys are equal bytes, so
//! all changes of a row are in one partition.

use crate::{
    encode::{EncodeError, json::write_string},
    source::{
        Relation,
        postgres::pgoutput::{Datum, Tuple},
    },
};

/// Writes the key of `row`. Values that `row` leaves out as unchanged are taken from `fallback`. Returns false, and writes nothing,
/// when the table has no key.
pub(crate) fn write(
    relation: &Relation,
    row: Tuple<'_>,
    fallback: Option<Tuple<'_>>,
    out: &mut Vec<u8>,
) -> Result<bool, EncodeError> {
    let mut separator = b'{';
    for (index, (column, datum)) in relation.columns.iter().zip(row.values()).enumerate() {
        if !column.key {
            continue;
        }
        let datum = match (datum, fallback) {
            (Datum::UnchangedToast, Some(fallback)) => fallback.values().nth(index).unwrap_or(datum),
            _ => datum,
        };
        out.push(separator);
        separator = b',';
        write_string(&column.name, out);
        out.push(b':');
        match datum {
            Datum::Text(text) => write_string(text, out),
            Datum::Null => out.extend_from_slice(b"null"),
            Datum::UnchangedToast => {
                return Err(EncodeError::AbsentKey {
                    table: format!("{}.{}", relation.schema, relation.table),
                    column: column.name.clone(),
                });
            }
        }
    }
    if separator == b'{' {
        return Ok(false);
    }
    out.push(b'}');
    Ok(true)
}

/// True when `old` and `new` have different keys. An unchanged value is not a different one.
pub(crate) fn differs(relation: &Relation, old: Tuple<'_>, new: Tuple<'_>) -> bool {
    relation
        .columns
        .iter()
        .zip(old.values().zip(new.values()))
        .any(|(column, (old, new))| column.key && new != Datum::UnchangedToast && old != new)
}

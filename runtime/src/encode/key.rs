//! The key of a record: a JSON object of the key columns, every value as PostgreSQL prints it.
//!
//! `{"trade_id":"0b5c…","traded_at":"2026-11-21 07:00:00.123456+00"}` can be read with any tool, and equal keys are equal bytes, so
//! all changes of a row are in one partition.

use std::io::Write as _;

use crate::{
    encode::EncodeError,
    source::{
        Relation,
        postgres::pgoutput::{Datum, Tuple},
    },
};

/// Writes the key of `row`. Values that `row` leaves out as unchanged are taken from `fallback`. Returns false, and writes nothing,
/// when the table has no key.
pub(super) fn write(
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
        write_json_string(&column.name, out);
        out.push(b':');
        match datum {
            Datum::Text(text) => write_json_string(text, out),
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
pub(super) fn differs(relation: &Relation, old: Tuple<'_>, new: Tuple<'_>) -> bool {
    relation
        .columns
        .iter()
        .zip(old.values().zip(new.values()))
        .any(|(column, (old, new))| column.key && new != Datum::UnchangedToast && old != new)
}

fn write_json_string(text: &str, out: &mut Vec<u8>) {
    out.push(b'"');
    let mut rest = text.as_bytes();
    // RFC 8259 wants these escaped and nothing else.
    while let Some(at) = rest.iter().position(|byte| matches!(byte, b'"' | b'\\' | 0..0x20)) {
        out.extend_from_slice(&rest[..at]);
        match rest[at] {
            byte @ (b'"' | b'\\') => out.extend([b'\\', byte]),
            // Writing into memory cannot fail.
            byte => drop(write!(out, "\\u{byte:04x}")),
        }
        rest = &rest[at + 1..];
    }
    out.extend_from_slice(rest);
    out.push(b'"');
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;

    proptest! {
        #[test]
        fn any_text_is_a_json_string_that_reads_back(text in ".*") {
            let mut out = Vec::new();
            write_json_string(&text, &mut out);
            prop_assert_eq!(serde_json::from_slice::<String>(&out).unwrap(), text);
        }
    }
}

//! Rows as parameters: each column of a statement is one array of text, in PostgreSQL's binary form.

use std::{error::Error, fmt::Write as _};

use bytes::{BufMut as _, BytesMut};
use meander_proto::v1::value::Kind;
use tokio_postgres::types::{IsNull, ToSql, Type, to_sql_checked};

/// The header of an array of one dimension, in bytes.
const HEADER: usize = 20;

/// A column of rows. Written as `text[]`; the statement casts it to the type that the column has in the target.
#[derive(Debug, Default)]
pub struct TextArray {
    elements: BytesMut,
    count: i32,
    nulls: bool,
}

impl TextArray {
    /// Adds the value of one more row, as the text that PostgreSQL reads it from.
    pub fn push(&mut self, value: Option<&Kind>) {
        self.count += 1;
        let Some(kind) = value else {
            self.nulls = true;
            self.elements.put_i32(-1);
            return;
        };
        let at = self.elements.len();
        self.elements.put_i32(0);
        write(kind, &mut self.elements);
        let length = i32::try_from(self.elements.len() - at - 4).unwrap_or(i32::MAX);
        self.elements[at..at + 4].copy_from_slice(&length.to_be_bytes());
    }

    /// Memory that it takes.
    #[must_use]
    pub fn size(&self) -> usize {
        HEADER + self.elements.len()
    }
}

fn write(kind: &Kind, out: &mut BytesMut) {
    // Writing to memory does not fail.
    let _ = match kind {
        Kind::Integer(number) => write!(out, "{number}"),
        Kind::Boolean(flag) => out.write_str(if *flag { "true" } else { "false" }),
        // The shortest text that reads back as the same number; `NaN` and `inf` are what PostgreSQL calls them too.
        Kind::Float4(number) => write!(out, "{number:e}"),
        Kind::Float8(number) => write!(out, "{number:e}"),
        Kind::Binary(bytes) => {
            out.put_slice(b"\\x");
            for byte in bytes.iter() {
                let digit = |nibble: u8| b"0123456789abcdef"[usize::from(nibble)];
                out.put_slice(&[digit(byte >> 4), digit(byte & 15)]);
            }
            Ok(())
        }
        Kind::Text(text) => {
            out.put_slice(text.as_bytes());
            Ok(())
        }
        // Whoever makes the statement leaves out the columns that were not said.
        Kind::Absent(_) => Ok(()),
    };
}

impl ToSql for TextArray {
    fn to_sql(&self, _: &Type, out: &mut BytesMut) -> Result<IsNull, Box<dyn Error + Sync + Send>> {
        out.reserve(self.size());
        out.put_i32(1);
        out.put_i32(i32::from(self.nulls));
        out.put_u32(Type::TEXT.oid());
        out.put_i32(self.count);
        out.put_i32(1);
        out.put_slice(&self.elements);
        Ok(IsNull::No)
    }

    fn accepts(type_: &Type) -> bool {
        *type_ == Type::TEXT_ARRAY
    }

    to_sql_checked!();
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn every_kind_of_value_is_written_as_postgresql_reads_it() {
        let shown = |kind: Kind| {
            let mut out = BytesMut::new();
            write(&kind, &mut out);
            String::from_utf8(out.to_vec()).unwrap()
        };
        assert_eq!(shown(Kind::Integer(i64::MIN)), i64::MIN.to_string());
        assert_eq!(shown(Kind::Boolean(true)), "true");
        assert_eq!(shown(Kind::Float4(0.1)), "1e-1");
        assert_eq!(shown(Kind::Float8(f64::MAX)), "1.7976931348623157e308");
        assert_eq!(shown(Kind::Float8(f64::NAN)), "NaN");
        assert_eq!(shown(Kind::Float4(f32::NEG_INFINITY)), "-inf");
        assert_eq!(shown(Kind::Binary(vec![0, 171, 255])), "\\x00abff");
        assert_eq!(shown(Kind::Text("größer".to_owned())), "größer");
    }
}

//! Turns lines of `COPY … TO STDOUT` into the rows that `pgoutput` would send: both print values with the same functions.

use std::ops::Range;

use crate::source::postgres::{pgoutput::Tuple, snapshot::session::ReadError};

/// Rows in one piece of memory.
#[derive(Debug, Default)]
pub struct Rows {
    width: usize,
    bytes: Vec<u8>,
    rows: Vec<Range<usize>>,
}

impl Rows {
    /// No rows of so many columns.
    #[must_use]
    pub fn new(width: usize) -> Self {
        Self {
            width,
            ..Self::default()
        }
    }

    /// Appends the row of a line.
    pub(super) fn push(&mut self, line: &[u8]) -> Result<(), ReadError> {
        let start = self.bytes.len();
        if self.width > 0 {
            let columns = append_row(line, &mut self.bytes).ok_or(ReadError::Copy)?;
            if usize::from(columns) != self.width {
                return Err(ReadError::Copy);
            }
        }
        self.rows.push(start..self.bytes.len());
        Ok(())
    }

    /// The rows in their order.
    pub fn iter(&self) -> impl Iterator<Item = Tuple<'_>> {
        let columns = u16::try_from(self.width).unwrap_or(u16::MAX);
        // Each was checked when it was read.
        self.rows
            .iter()
            .filter_map(move |range| Tuple::checked(columns, &self.bytes[range.clone()]))
    }

    /// Bytes of the largest row; 0 without any.
    #[must_use]
    pub fn largest(&self) -> usize {
        self.rows.iter().map(ExactSizeIterator::len).max().unwrap_or(0)
    }

    /// Number of rows.
    #[must_use]
    pub fn len(&self) -> usize {
        self.rows.len()
    }

    /// True if there are no rows.
    #[must_use]
    pub fn is_empty(&self) -> bool {
        self.rows.is_empty()
    }

    /// Their size in bytes.
    #[must_use]
    pub fn size(&self) -> usize {
        self.bytes.len()
    }
}

/// Cuts what COPY sends into lines. The server sends a message for each, but need not.
#[derive(Default)]
pub(super) struct Lines(Vec<u8>);

impl Lines {
    /// Calls `take` for each line that is complete with this piece.
    pub(super) fn cut(
        &mut self,
        piece: &[u8],
        mut take: impl FnMut(&[u8]) -> Result<(), ReadError>,
    ) -> Result<(), ReadError> {
        self.0.extend_from_slice(piece);
        let mut start = 0;
        while let Some(length) = self.0[start..].iter().position(|byte| *byte == b'\n') {
            take(&self.0[start..start + length])?;
            start += length + 1;
        }
        self.0.drain(..start);
        Ok(())
    }
}

/// Appends the row's values in the form of [`Tuple`](crate::source::postgres::pgoutput::Tuple), and says how many there are. None for
/// what is not a line of COPY's text format.
pub fn append_row(line: &[u8], out: &mut Vec<u8>) -> Option<u16> {
    let mut columns: u16 = 0;
    // A table without columns prints empty lines, and so does one column that holds the empty string; the caller knows which.
    for field in line.split(|byte| *byte == b'\t') {
        columns = columns.checked_add(1)?;
        if field == b"\\N" {
            out.push(b'n');
            continue;
        }
        out.push(b't');
        let start = out.len();
        out.extend_from_slice(&[0; 4]);
        let mut rest = field;
        while let Some(at) = rest.iter().position(|byte| *byte == b'\\') {
            out.extend_from_slice(&rest[..at]);
            out.push(match rest.get(at + 1)? {
                b'b' => 8,
                b'f' => 12,
                b'n' => b'\n',
                b'r' => b'\r',
                b't' => b'\t',
                b'v' => 11,
                b'\\' => b'\\',
                _ => return None,
            });
            rest = &rest[at + 2..];
        }
        out.extend_from_slice(rest);
        let value = &out[start + 4..];
        std::str::from_utf8(value).ok()?;
        let length = u32::try_from(value.len()).ok()?;
        out[start..start + 4].copy_from_slice(&length.to_be_bytes());
    }
    Some(columns)
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;
    use crate::source::postgres::pgoutput::{Datum, Tuple};

    fn read(line: &[u8]) -> Option<Vec<Option<String>>> {
        let mut body = Vec::new();
        let columns = append_row(line, &mut body)?;
        let tuple = Tuple::checked(columns, &body).unwrap();
        Some(
            tuple
                .values()
                .map(|datum| match datum {
                    Datum::Text(text) => Some(text.to_owned()),
                    _ => None,
                })
                .collect(),
        )
    }

    #[test]
    fn nulls_and_escapes_are_read_as_copy_writes_them() {
        let text = |text: &str| Some(text.to_owned());
        assert_eq!(
            read(br"1	\N		a\tb\\N\n"),
            Some(vec![text("1"), None, text(""), text("a\tb\\N\n")])
        );
        assert_eq!(read(b"a\\"), None);
        assert_eq!(read(b"a\\x"), None);
        assert_eq!(read(b"\xff"), None);
    }

    proptest! {
        #[test]
        fn any_row_comes_out_as_it_went_in(values in proptest::collection::vec(proptest::option::of(".*"), 1..20)) {
            let line: Vec<String> = values
                .iter()
                .map(|value| match value {
                    None => "\\N".to_owned(),
                    Some(text) => text.chars().fold(String::new(), |mut line, c| {
                        match c {
                            '\\' => line.push_str("\\\\"),
                            '\t' => line.push_str("\\t"),
                            '\n' => line.push_str("\\n"),
                            '\r' => line.push_str("\\r"),
                            '\u{8}' => line.push_str("\\b"),
                            '\u{b}' => line.push_str("\\v"),
                            '\u{c}' => line.push_str("\\f"),
                            c => line.push(c),
                        }
                        line
                    }),
                })
                .collect();
            prop_assert_eq!(read(line.join("\t").as_bytes()), Some(values));
        }

        #[test]
        fn no_bytes_make_it_panic(line in proptest::collection::vec(any::<u8>(), 0..100)) {
            let _ = read(&line);
        }
    }
}

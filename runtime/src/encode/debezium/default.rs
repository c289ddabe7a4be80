//! The default of a column as the schema tells it: the constant that the catalog's expression is, or a stand-in for what an
//! expression computes. These are Debezium's rules, since the schema is what its consumers read.

use super::value::Kind;
use crate::source::postgres::details::TypeDetails;

/// The default as JSON, if the schema tells one.
pub(super) fn default(kind: &Kind, details: &TypeDetails, expression: &str) -> Option<Vec<u8>> {
    // Debezium finds its rule by the name of the type, and has none for domains and types of extensions.
    if details.domain || !(details.builtin || matches!(kind, Kind::Enum(_))) {
        return None;
    }
    let stand_in = match kind {
        Kind::Boolean => "f",
        Kind::Bit | Kind::Integer(_) | Kind::Float32 | Kind::Float64 | Kind::Decimal { .. } => "0",
        Kind::Bits(_) => "00",
        Kind::Text(Some("io.debezium.data.Json")) => "{}",
        Kind::Text(Some("io.debezium.data.Xml")) => "",
        Kind::Text(None) if matches!(details.name.as_str(), "text" | "varchar" | "bpchar") => "",
        Kind::Uuid => "00000000-0000-0000-0000-000000000000",
        Kind::Date => "1970-01-01",
        Kind::Time { .. } | Kind::Interval => "00:00:00",
        Kind::Timestamp { .. } => "1970-01-01 00:00:00",
        Kind::ZonedTimestamp { .. } => "1970-01-01 00:00:00+00",
        Kind::Enum(_) => return enum_default(kind, expression),
        _ => return None,
    };
    if matches!(details.name.as_str(), "oid") {
        return None;
    }
    let expression = expression.trim();
    let text = if is_computed(expression) {
        stand_in.to_owned()
    } else {
        constant(expression)?
    };
    let text = match (kind, text.as_str()) {
        (Kind::Boolean, "true") => "t".to_owned(),
        (Kind::Boolean, "false") => "f".to_owned(),
        (Kind::Uuid, _) if text.len() != stand_in.len() => return None,
        (Kind::Uuid, _) => text.to_lowercase(),
        _ => text,
    };
    written(kind, &text)
}

/// Only a plain constant counts.
fn enum_default(kind: &Kind, expression: &str) -> Option<Vec<u8>> {
    let (constant, _type) = expression.rsplit_once("::")?;
    let label = constant.strip_prefix('\'')?.strip_suffix('\'')?;
    written(kind, &label.replace("''", "'"))
}

fn written(kind: &Kind, text: &str) -> Option<Vec<u8>> {
    let mut out = Vec::new();
    kind.write(text, &mut out).ok().map(|()| out)
}

/// True for a function's call, and for the functions that SQL writes without parentheses.
fn is_computed(expression: &str) -> bool {
    let named = expression.strip_prefix('(').unwrap_or(expression);
    let end = named
        .bytes()
        .position(|byte| !(byte.is_ascii_alphanumeric() || matches!(byte, b'_' | b'.')));
    let is_call = end.is_some_and(|end| end > 0 && named[end..].starts_with('(') && named[end..].contains(')'));
    is_call
        || matches!(
            expression.to_lowercase().as_str(),
            "current_timestamp" | "current_time" | "current_date" | "localtime" | "localtimestamp"
        )
}

/// The first constant of an expression.
fn constant(expression: &str) -> Option<String> {
    let Some((_, quoted)) = expression.split_once('\'') else {
        return (!expression.starts_with("NULL::")).then(|| expression.to_owned());
    };
    let mut text = String::new();
    let mut rest = quoted;
    loop {
        let (part, after) = rest.split_once('\'')?;
        text.push_str(part);
        match after.strip_prefix('\'') {
            Some(after) => {
                text.push('\'');
                rest = after;
            }
            None => return Some(text),
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn told(name: &str, modifier: i32, expression: &str) -> Option<String> {
        let details = TypeDetails {
            name: name.to_owned(),
            builtin: true,
            ..TypeDetails::default()
        };
        let kind = Kind::of(&details, modifier).unwrap();
        default(&kind, &details, expression).map(|bytes| String::from_utf8(bytes).unwrap())
    }

    #[test]
    fn a_constant_is_told_as_a_value_of_its_column() {
        let some = |text: &str| Some(text.to_owned());
        assert_eq!(told("int4", -1, "'-5'::integer"), some("-5"));
        assert_eq!(told("bool", -1, "true"), some("true"));
        assert_eq!(told("text", -1, "'it''s'::text"), some("\"it's\""));
        assert_eq!(told("numeric", ((8 << 16) | 2) + 4, "3.1"), some("\"ATY=\""));
        assert_eq!(told("bit", 4, "'1010'::\"bit\""), some("\"Cg==\""));
        assert_eq!(
            told("timestamp", 3, "'2020-02-03 04:05:06.789'::timestamp without time zone"),
            some("1580702706789")
        );
        assert_eq!(told("interval", -1, "'1 day'::interval"), some("86400000000"));
        assert_eq!(told("text", -1, "NULL::text"), None);
        assert_eq!(told("numeric", -1, "1.25"), None);
    }

    #[test]
    fn for_what_is_computed_there_is_a_stand_in() {
        let some = |text: &str| Some(text.to_owned());
        assert_eq!(told("int4", -1, "nextval('t_id_seq'::regclass)"), some("0"));
        assert_eq!(told("text", -1, "upper('abc'::text)"), some("\"\""));
        assert_eq!(
            told("timestamptz", -1, "now()"),
            some("\"1970-01-01T00:00:00.000000Z\"")
        );
        assert_eq!(told("timestamp", -1, "CURRENT_TIMESTAMP"), some("0"));
        assert_eq!(
            told("uuid", -1, "gen_random_uuid()"),
            some("\"00000000-0000-0000-0000-000000000000\"")
        );
    }
}

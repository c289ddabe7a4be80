//! The types of columns, as Debezium maps them: what the schema says of each, and how PostgreSQL's text becomes its JSON.

use base64::{Engine as _, engine::general_purpose::STANDARD};

use super::{
    super::json::{self, write_string},
    decimal,
    geometry::{self, Shape},
    literal, time,
};
use crate::source::postgres::details::TypeDetails;

/// Stands for a value that an UPDATE left as it was and that is not in the WAL.
pub(super) const UNAVAILABLE: &str = "__debezium_unavailable_value";
/// The same as a UUID: version 3 of its bytes, without a namespace.
const UNAVAILABLE_UUID: &str = "b68a35a7-17ad-35b3-af2a-ae46edb4545a";

/// Why a text has no JSON.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Unfit {
    /// PostgreSQL has the value and the mapped type has not, as the decimals have no NaN.
    NoForm,
    /// It is not what PostgreSQL prints for the type.
    Malformed,
    /// A label that the enum did not have when its table was described.
    NewLabel,
}

/// How a type is carried.
#[derive(Clone, Debug, PartialEq)]
pub(super) enum Kind {
    Boolean,
    /// `bit(1)` and `bit varying(1)`.
    Bit,
    /// Longer ones, with their length.
    Bits(u32),
    /// With Connect's name of the width.
    Integer(&'static str),
    Float32,
    Float64,
    /// With the name of what it means, if it has one.
    Text(Option<&'static str>),
    Enum(Vec<String>),
    Uuid,
    Bytes,
    Decimal {
        precision: i32,
        scale: i32,
    },
    /// `numeric` without a scale.
    VariableDecimal,
    Money,
    Date,
    Time {
        millis: bool,
    },
    ZonedTime,
    Timestamp {
        millis: bool,
    },
    ZonedTimestamp {
        digits: usize,
    },
    Interval,
    Hstore,
    Point,
    Circle,
    Line,
    Shape(Shape),
    /// Of pgvector; with Connect's name of the numbers.
    Vector(&'static str, &'static str),
    Array(Box<Kind>, u8),
}

const MONEY_SCALE: i32 = 2;

/// OIDs of built-in types never change: src/include/catalog/pg_type.dat.
mod oid {
    pub(super) const BOX: u32 = 603;
}

impl Kind {
    /// The kind of a type, with the modifier of its column. None for types that Debezium leaves out.
    pub(super) fn of(details: &TypeDetails, modifier: i32) -> Option<Self> {
        if let Some(element) = &details.element {
            return Self::of(element, modifier).and_then(|kind| kind.array(element));
        }
        let precision = |most: i32| if (0..=most).contains(&modifier) { modifier } else { most };
        Some(match details.name.as_str() {
            _ if !details.labels.is_empty() => Self::Enum(details.labels.clone()),
            // Debezium knows the types of extensions by their names, wherever they are installed.
            "citext" | "isbn" => Self::Text(None),
            "ltree" => Self::Text(Some("io.debezium.data.Ltree")),
            "hstore" => Self::Hstore,
            "vector" => Self::Vector("io.debezium.data.DoubleVector", "double"),
            "halfvec" => Self::Vector("io.debezium.data.FloatVector", "float"),
            _ if !details.builtin => return None,
            "bool" => Self::Boolean,
            "bit" | "varbit" if modifier == 1 => Self::Bit,
            "bit" | "varbit" => Self::Bits(u32::try_from(modifier).unwrap_or(i32::MAX.unsigned_abs())),
            "int2" => Self::Integer("int16"),
            "int4" => Self::Integer("int32"),
            "int8" | "oid" => Self::Integer("int64"),
            "float4" => Self::Float32,
            "float8" => Self::Float64,
            "text" | "varchar" | "bpchar" | "char" | "name" | "inet" | "cidr" | "macaddr" | "macaddr8"
            | "int4range" | "int8range" | "numrange" | "daterange" | "tsrange" | "tstzrange" => Self::Text(None),
            "json" | "jsonb" => Self::Text(Some("io.debezium.data.Json")),
            "xml" => Self::Text(Some("io.debezium.data.Xml")),
            "tsvector" => Self::Text(Some("io.debezium.data.Tsvector")),
            "uuid" => Self::Uuid,
            "bytea" => Self::Bytes,
            "numeric" if modifier < 4 => Self::VariableDecimal,
            "numeric" => Self::Decimal {
                precision: ((modifier - 4) >> 16) & 0xFFFF,
                // Eleven bits with a sign.
                scale: (((modifier - 4) & 0x7FF) ^ 1024) - 1024,
            },
            "money" => Self::Money,
            "date" => Self::Date,
            "time" => Self::Time {
                millis: precision(6) <= 3,
            },
            "timetz" => Self::ZonedTime,
            "timestamp" => Self::Timestamp {
                millis: precision(6) <= 3,
            },
            "timestamptz" => Self::ZonedTimestamp {
                digits: usize::try_from(precision(6)).unwrap_or(6),
            },
            "interval" => Self::Interval,
            "point" => Self::Point,
            "circle" => Self::Circle,
            "line" => Self::Line,
            "box" => Self::Shape(Shape::Box),
            "lseg" => Self::Shape(Shape::Segment),
            "path" => Self::Shape(Shape::Path),
            "polygon" => Self::Shape(Shape::Polygon),
            _ => return None,
        })
    }

    /// Arrays of this kind. Debezium leaves some out although it has a form for their elements.
    fn array(self, element: &TypeDetails) -> Option<Self> {
        let left_out = element.domain
            || matches!(
                self,
                Self::Money
                    | Self::Interval
                    | Self::Bit
                    | Self::Bits(_)
                    | Self::Point
                    | Self::Vector(..)
                    | Self::Array(..)
            )
            || matches!(element.name.as_str(), "name" | "xml");
        let delimiter = if element.oid == oid::BOX { b';' } else { b',' };
        (!left_out).then(|| Self::Array(Box::new(self), delimiter))
    }

    /// Writes what Connect's converter says of a field of this kind, without braces and without its name.
    pub(super) fn write_schema(&self, optional: bool, default: Option<&[u8]>, out: &mut Vec<u8>) {
        let integer = |name: &'static str| ("\"int64\"", Some(name));
        let (connect_type, name) = match self {
            Self::Boolean | Self::Bit => ("\"boolean\"", None),
            Self::Integer("int16") => ("\"int16\"", None),
            Self::Integer("int32") => ("\"int32\"", None),
            Self::Integer(_) => ("\"int64\"", None),
            Self::Float32 => ("\"float\"", None),
            Self::Float64 => ("\"double\"", None),
            Self::Text(name) => ("\"string\"", *name),
            Self::Enum(_) => ("\"string\"", Some("io.debezium.data.Enum")),
            Self::Uuid => ("\"string\"", Some("io.debezium.data.Uuid")),
            Self::Hstore => ("\"string\"", Some("io.debezium.data.Json")),
            Self::ZonedTime => ("\"string\"", Some("io.debezium.time.ZonedTime")),
            Self::ZonedTimestamp { .. } => ("\"string\"", Some("io.debezium.time.ZonedTimestamp")),
            Self::Bytes => ("\"bytes\"", None),
            Self::Bits(_) => ("\"bytes\"", Some("io.debezium.data.Bits")),
            Self::Decimal { .. } | Self::Money => ("\"bytes\"", Some("org.apache.kafka.connect.data.Decimal")),
            Self::Date => ("\"int32\"", Some("io.debezium.time.Date")),
            Self::Time { millis: true } => ("\"int32\"", Some("io.debezium.time.Time")),
            Self::Time { millis: false } => integer("io.debezium.time.MicroTime"),
            Self::Timestamp { millis: true } => integer("io.debezium.time.Timestamp"),
            Self::Timestamp { millis: false } => integer("io.debezium.time.MicroTimestamp"),
            Self::Interval => integer("io.debezium.time.MicroDuration"),
            Self::VariableDecimal => (VARIABLE_DECIMAL, Some("io.debezium.data.VariableScaleDecimal")),
            Self::Point => (POINT, Some("io.debezium.data.geometry.Point")),
            Self::Circle => (CIRCLE, Some("io.debezium.data.geometry.Circle")),
            Self::Line => (LINE, Some("io.debezium.data.geometry.Line")),
            Self::Shape(_) => (GEOMETRY, Some("io.debezium.data.geometry.Geometry")),
            Self::Vector(name, "float") => (FLOATS, Some(*name)),
            Self::Vector(name, _) => (DOUBLES, Some(*name)),
            Self::Array(..) => ("\"array\"", None),
        };
        json::write(out, format_args!("\"type\":{connect_type}"));
        if let Self::Array(element, _) = self {
            out.extend_from_slice(b",\"items\":{");
            element.write_schema(true, None, out);
            out.push(b'}');
        }
        // These are so in Debezium, whatever the column says.
        let optional = optional || matches!(self, Self::Shape(_) | Self::Circle | Self::Line);
        json::write(out, format_args!(",\"optional\":{optional}"));
        if let Some(name) = name {
            let version = if matches!(self, Self::Shape(_)) { 2 } else { 1 };
            json::write(out, format_args!(",\"name\":\"{name}\",\"version\":{version}"));
        }
        match self {
            Self::VariableDecimal => out.extend_from_slice(b",\"doc\":\"Variable scaled decimal\""),
            Self::Point => out.extend_from_slice(b",\"doc\":\"Geometry (POINT)\""),
            Self::Circle => out.extend_from_slice(b",\"doc\":\"Geometry (CIRCLE)\""),
            Self::Line => out.extend_from_slice(b",\"doc\":\"Geometry (LINE)\""),
            Self::Shape(_) => out.extend_from_slice(b",\"doc\":\"Geometry\""),
            Self::Money => json::write(out, format_args!(",\"parameters\":{{\"scale\":\"{MONEY_SCALE}\"}}")),
            Self::Decimal { precision, scale } => json::write(
                out,
                format_args!(",\"parameters\":{{\"scale\":\"{scale}\",\"connect.decimal.precision\":\"{precision}\"}}"),
            ),
            Self::Bits(length) => json::write(out, format_args!(",\"parameters\":{{\"length\":\"{length}\"}}")),
            Self::Enum(labels) => {
                out.extend_from_slice(b",\"parameters\":{\"allowed\":");
                write_string(&labels.join(","), out);
                out.push(b'}');
            }
            _ => {}
        }
        if let Some(default) = default {
            out.extend_from_slice(b",\"default\":");
            out.extend_from_slice(default);
        }
    }

    /// Writes a value.
    ///
    /// # Errors
    /// When it has no form, or is none; what is in `out` then is of no use.
    pub(super) fn write(&self, text: &str, out: &mut Vec<u8>) -> Result<(), Unfit> {
        match self {
            Self::Boolean => out.extend_from_slice(match text {
                "t" => b"true".as_slice(),
                "f" => b"false",
                _ => return Err(Unfit::Malformed),
            }),
            Self::Bit => out.extend_from_slice(match text {
                "1" => b"true".as_slice(),
                "0" => b"false",
                "" => return Err(Unfit::NoForm),
                _ => return Err(Unfit::Malformed),
            }),
            Self::Bits(_) => write_base64(&bits(text)?, out),
            Self::Integer(_) => {
                let integer: i64 = text.parse().map_err(|_| Unfit::Malformed)?;
                write_integer(integer, out);
            }
            Self::Float32 | Self::Float64 => write_float(text, out)?,
            Self::Text(_) | Self::Uuid => write_string(text, out),
            Self::Enum(labels) => {
                if !labels.iter().any(|label| label == text) {
                    return Err(Unfit::NewLabel);
                }
                write_string(text, out);
            }
            Self::Bytes => write_base64(&hex(text)?, out),
            Self::Decimal { scale, .. } => write_base64(&decimal::with_scale(text, *scale)?, out),
            Self::VariableDecimal => {
                let (unscaled, scale) = decimal::with_own_scale(text)?;
                json::write(out, format_args!("{{\"scale\":{scale},\"value\":"));
                write_base64(&unscaled, out);
                out.push(b'}');
            }
            Self::Money => {
                // `-$1,234.50`, by the session's lc_monetary.
                let plain: String = text
                    .chars()
                    .filter(|character| !matches!(character, '$' | ','))
                    .collect();
                write_base64(&decimal::with_scale(&plain, MONEY_SCALE)?, out);
            }
            Self::Date => write_integer(time::date(text)?, out),
            Self::Time { millis } => write_integer(time::time(text)? / if *millis { 1000 } else { 1 }, out),
            Self::ZonedTime => time::write_zoned_time(text, out)?,
            Self::Timestamp { millis } => write_integer(time::timestamp(text, *millis)?, out),
            Self::ZonedTimestamp { digits } => time::write_zoned_timestamp(text, *digits, out)?,
            Self::Interval => write_integer(time::interval(text)?, out),
            Self::Hstore => {
                let mut object = vec![b'{'];
                literal::pairs(text, |key, value| {
                    if object.len() > 1 {
                        object.push(b',');
                    }
                    write_string(key, &mut object);
                    object.push(b':');
                    match value {
                        Some(value) => write_string(value, &mut object),
                        None => object.extend_from_slice(b"null"),
                    }
                })?;
                object.push(b'}');
                write_string(std::str::from_utf8(&object).map_err(|_| Unfit::Malformed)?, out);
            }
            Self::Point => geometry::write_point(text, out)?,
            Self::Circle => geometry::write_circle(text, out)?,
            Self::Line => geometry::write_line(text, out)?,
            Self::Shape(shape) => shape.write(text, out)?,
            Self::Vector(..) => {
                let numbers = text.strip_prefix('[').and_then(|text| text.strip_suffix(']'));
                for (index, number) in numbers.ok_or(Unfit::Malformed)?.split(',').enumerate() {
                    out.push(if index == 0 { b'[' } else { b',' });
                    write_float(number, out)?;
                }
                out.push(b']');
            }
            Self::Array(element, delimiter) => {
                out.push(b'[');
                let mut first = true;
                literal::elements(text, *delimiter, |text| {
                    if !std::mem::take(&mut first) {
                        out.push(b',');
                    }
                    match text {
                        Some(text) => element.write(&text, out),
                        None => {
                            out.extend_from_slice(b"null");
                            Ok(())
                        }
                    }
                })?;
                out.push(b']');
            }
        }
        Ok(())
    }

    /// What stands where the schema wants a value and the source told none: as Debezium fills a column that is NOT NULL in the
    /// `before` of a DELETE, where only the key is known.
    pub(super) fn filler(&self) -> Vec<u8> {
        match self {
            Self::Boolean | Self::Bit => b"false".to_vec(),
            Self::Integer(_) | Self::Date | Self::Time { .. } | Self::Timestamp { .. } | Self::Interval => {
                b"0".to_vec()
            }
            Self::Float32 | Self::Float64 => b"0.0".to_vec(),
            Self::Text(_) | Self::Uuid | Self::Enum(_) | Self::Bytes | Self::Bits(_) => b"\"\"".to_vec(),
            Self::Hstore => b"\"{}\"".to_vec(),
            Self::Decimal { .. } | Self::Money => b"\"AA==\"".to_vec(),
            Self::VariableDecimal => b"{\"scale\":0,\"value\":\"AA==\"}".to_vec(),
            Self::ZonedTime => b"\"00:00:00Z\"".to_vec(),
            Self::ZonedTimestamp { .. } => b"\"1970-01-01T00:00:00Z\"".to_vec(),
            Self::Vector(..) | Self::Array(..) => b"[]".to_vec(),
            Self::Point => self.written("(0,0)"),
            Self::Circle => self.written("<(0,0),0>"),
            Self::Line => self.written("{0,1,0}"),
            Self::Shape(shape) => shape.placeholder(),
        }
    }

    /// What stands for a value that an UPDATE left as it was and that is not in the WAL. None for kinds whose values are never so
    /// large, and those that have none that could not be a value.
    pub(super) fn unavailable(&self) -> Option<Vec<u8>> {
        let codes = || {
            let codes: Vec<String> = UNAVAILABLE.bytes().map(|byte| byte.to_string()).collect();
            format!("[{}]", codes.join(",")).into_bytes()
        };
        match self {
            Self::Text(_) => Some(format!("\"{UNAVAILABLE}\"").into_bytes()),
            Self::Uuid => Some(format!("\"{UNAVAILABLE_UUID}\"").into_bytes()),
            Self::Hstore => Some(self.written(&format!("\"{UNAVAILABLE}\"=>\"{UNAVAILABLE}\""))),
            Self::Bytes | Self::Bits(_) | Self::Decimal { .. } => {
                let mut out = Vec::new();
                write_base64(UNAVAILABLE.as_bytes(), &mut out);
                Some(out)
            }
            Self::VariableDecimal => {
                let mut out = b"{\"scale\":0,\"value\":".to_vec();
                write_base64(UNAVAILABLE.as_bytes(), &mut out);
                out.push(b'}');
                Some(out)
            }
            Self::Array(element, _) => match **element {
                Self::Integer(_)
                | Self::Float32
                | Self::Float64
                | Self::Date
                | Self::Time { .. }
                | Self::Timestamp { .. } => Some(codes()),
                Self::Enum(_) | Self::ZonedTime | Self::ZonedTimestamp { .. } => {
                    Some(format!("[\"{UNAVAILABLE}\"]").into_bytes())
                }
                ref element => element.unavailable().map(|element| [b"[", &element[..], b"]"].concat()),
            },
            _ => None,
        }
    }

    fn written(&self, text: &str) -> Vec<u8> {
        let mut out = Vec::new();
        let _ = self.write(text, &mut out);
        out
    }
}

const VARIABLE_DECIMAL: &str = r#""struct","fields":[{"type":"int32","optional":false,"field":"scale"},{"type":"bytes","optional":false,"field":"value"}]"#;
const POINT: &str = r#""struct","fields":[{"type":"double","optional":false,"field":"x"},{"type":"double","optional":false,"field":"y"},{"type":"bytes","optional":true,"field":"wkb"},{"type":"int32","optional":true,"field":"srid"}]"#;
const CIRCLE: &str = r#""struct","fields":[{"type":"struct","fields":[{"type":"double","optional":false,"field":"x"},{"type":"double","optional":false,"field":"y"},{"type":"bytes","optional":true,"field":"wkb"},{"type":"int32","optional":true,"field":"srid"}],"optional":false,"name":"io.debezium.data.geometry.Point","version":1,"doc":"Geometry (POINT)","field":"center"},{"type":"double","optional":false,"field":"radius"}]"#;
const LINE: &str = r#""struct","fields":[{"type":"double","optional":false,"field":"a"},{"type":"double","optional":false,"field":"b"},{"type":"double","optional":false,"field":"c"}]"#;
const GEOMETRY: &str = r#""struct","fields":[{"type":"bytes","optional":false,"field":"wkb"},{"type":"int32","optional":true,"field":"srid"},{"type":"map","keys":{"type":"string","optional":false},"values":{"type":"string","optional":false},"optional":true,"field":"extensions"}]"#;
const DOUBLES: &str = r#""array","items":{"type":"double","optional":false}"#;
const FLOATS: &str = r#""array","items":{"type":"float","optional":false}"#;

fn write_integer(integer: i64, out: &mut Vec<u8>) {
    json::write(out, format_args!("{integer}"));
}

/// Writes a number as PostgreSQL prints it, which is the shortest that reads back. JSON has no infinities and no NaN: those are
/// strings, as with Connect's converter.
pub(super) fn write_float(text: &str, out: &mut Vec<u8>) -> Result<(), Unfit> {
    if matches!(text, "NaN" | "Infinity" | "-Infinity") {
        write_string(text, out);
        return Ok(());
    }
    let is_number = text
        .bytes()
        .all(|byte| matches!(byte, b'0'..=b'9' | b'-' | b'+' | b'.' | b'e'));
    if !is_number || text.parse::<f64>().is_err() || text.starts_with(['.', '+']) || text.starts_with("-.") {
        return Err(Unfit::Malformed);
    }
    out.extend_from_slice(text.as_bytes());
    if !text.contains(['.', 'e']) {
        // So that a reader who goes by the look of a number sees no integer.
        out.extend_from_slice(b".0");
    }
    Ok(())
}

/// Writes bytes as a string of Base64.
pub(super) fn write_base64(bytes: &[u8], out: &mut Vec<u8>) {
    out.push(b'"');
    let start = out.len();
    out.resize(start + bytes.len().div_ceil(3) * 4, b'=');
    // There is room for it.
    drop(STANDARD.encode_slice(bytes, &mut out[start..]));
    out.push(b'"');
}

/// The bits of a bit string in little-endian bytes, the last bit first, up to the highest that is set.
fn bits(text: &str) -> Result<Vec<u8>, Unfit> {
    let mut bytes = vec![0_u8; text.len().div_ceil(8)];
    for (index, bit) in text.bytes().rev().enumerate() {
        match bit {
            b'1' => bytes[index / 8] |= 1 << (index % 8),
            b'0' => {}
            _ => return Err(Unfit::Malformed),
        }
    }
    let used = bytes.iter().rposition(|byte| *byte != 0).map_or(0, |last| last + 1);
    bytes.truncate(used);
    Ok(bytes)
}

fn hex(text: &str) -> Result<Vec<u8>, Unfit> {
    let digit = |digit: u8| char::from(digit).to_digit(16);
    let (pairs, rest) = text
        .strip_prefix("\\x")
        .ok_or(Unfit::Malformed)?
        .as_bytes()
        .as_chunks::<2>();
    if !rest.is_empty() {
        return Err(Unfit::Malformed);
    }
    pairs
        .iter()
        .map(|[high, low]| u8::try_from(digit(*high)? << 4 | digit(*low)?).ok())
        .collect::<Option<Vec<u8>>>()
        .ok_or(Unfit::Malformed)
}

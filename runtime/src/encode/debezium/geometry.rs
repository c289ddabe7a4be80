//! Geometric values: coordinates, and the well-known binary form (WKB) of the shapes that have one.

use super::{
    super::json,
    value::{Unfit, write_base64, write_float},
};

/// A type whose values are carried as WKB.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Shape {
    Box,
    Segment,
    Path,
    Polygon,
}

impl Shape {
    fn name(self) -> &'static str {
        match self {
            Self::Box => "box",
            Self::Segment => "lseg",
            Self::Path => "path",
            Self::Polygon => "polygon",
        }
    }

    /// Stands for a value that is not known where the schema wants one: the smallest shape that is valid.
    pub(super) fn placeholder(self) -> Vec<u8> {
        let text = match self {
            Self::Box => "(0,0),(1,1)",
            Self::Segment | Self::Path => "(0,0),(1,0)",
            Self::Polygon => "(0,0),(1,0),(0,1)",
        };
        let mut out = Vec::new();
        // It is written by the same rule as a value, but for the path, of which nobody knows whether it is closed.
        let _ = self.write_parts(text, None, &mut out);
        out
    }

    pub(super) fn write(self, text: &str, out: &mut Vec<u8>) -> Result<(), Unfit> {
        let closed = (self == Self::Path).then(|| !text.starts_with('['));
        self.write_parts(text, closed, out)
    }

    fn write_parts(self, text: &str, closed: Option<bool>, out: &mut Vec<u8>) -> Result<(), Unfit> {
        let points: Vec<[f64; 2]> = numbers(text)?.as_chunks::<2>().0.to_vec();
        let wkb = match self {
            Self::Segment | Self::Path => wkb(LINE_STRING, &points),
            Self::Box => {
                let [[x1, y1], [x2, y2]] = points[..] else {
                    return Err(Unfit::Malformed);
                };
                wkb(POLYGON, &[[x1, y1], [x1, y2], [x2, y2], [x2, y1], [x1, y1]])
            }
            Self::Polygon => {
                let mut ring = points;
                if let (Some(first), Some(last)) = (ring.first().copied(), ring.last().copied())
                    && first != last
                    && ring.len() > 1
                {
                    ring.push(first);
                }
                wkb(POLYGON, &ring)
            }
        };
        out.extend_from_slice(b"{\"wkb\":");
        write_base64(&wkb, out);
        json::write(
            out,
            format_args!(",\"srid\":null,\"extensions\":{{\"type\":\"{}\"", self.name()),
        );
        if let Some(closed) = closed {
            json::write(out, format_args!(",\"closed\":\"{closed}\""));
        }
        out.extend_from_slice(b"}}");
        Ok(())
    }
}

/// Writes a point with its coordinates and its WKB.
pub(super) fn write_point(text: &str, out: &mut Vec<u8>) -> Result<(), Unfit> {
    let [x, y] = texts(text)?;
    let at: [f64; 2] = numbers(text)?.try_into().map_err(|_| Unfit::Malformed)?;
    out.extend_from_slice(b"{\"x\":");
    write_float(x, out)?;
    out.extend_from_slice(b",\"y\":");
    write_float(y, out)?;
    out.extend_from_slice(b",\"wkb\":");
    write_base64(&wkb(POINT, &[at]), out);
    out.extend_from_slice(b",\"srid\":null}");
    Ok(())
}

/// Writes a circle: its centre as a point, and its radius.
pub(super) fn write_circle(text: &str, out: &mut Vec<u8>) -> Result<(), Unfit> {
    let [x, y, radius] = texts(text)?;
    out.extend_from_slice(b"{\"center\":");
    write_point(&format!("{x},{y}"), out)?;
    out.extend_from_slice(b",\"radius\":");
    write_float(radius, out)?;
    out.push(b'}');
    Ok(())
}

/// Writes the coefficients of a line.
pub(super) fn write_line(text: &str, out: &mut Vec<u8>) -> Result<(), Unfit> {
    let [a, b, c] = texts(text)?;
    for (name, value) in [("{\"a\":", a), (",\"b\":", b), (",\"c\":", c)] {
        out.extend_from_slice(name.as_bytes());
        write_float(value, out)?;
    }
    out.push(b'}');
    Ok(())
}

/// The numbers of a value, whatever brackets are around them.
fn split(text: &str) -> impl Iterator<Item = &str> {
    text.split(',')
        .map(|number| number.trim_matches(['(', ')', '[', ']', '{', '}', '<', '>']))
}

fn texts<const N: usize>(text: &str) -> Result<[&str; N], Unfit> {
    let texts: Vec<&str> = split(text).collect();
    texts.try_into().map_err(|_| Unfit::Malformed)
}

fn numbers(text: &str) -> Result<Vec<f64>, Unfit> {
    split(text)
        .map(|number| number.parse().map_err(|_| Unfit::Malformed))
        .collect()
}

const POINT: u32 = 1;
const LINE_STRING: u32 = 2;
const POLYGON: u32 = 3;

/// Little-endian WKB.
fn wkb(kind: u32, points: &[[f64; 2]]) -> Vec<u8> {
    let mut out = vec![1];
    out.extend(kind.to_le_bytes());
    if kind == POLYGON {
        // One ring.
        out.extend(1_u32.to_le_bytes());
    }
    if kind != POINT {
        out.extend(u32::try_from(points.len()).unwrap_or(u32::MAX).to_le_bytes());
    }
    out.extend(points.iter().flatten().flat_map(|number| number.to_le_bytes()));
    out
}

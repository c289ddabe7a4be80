//! Reads the rows that were there before a table was captured.
//!
//! *Incremental*: chunk by chunk in the order of the key, while changes stream. A chunk is read in a transaction of its own, then a
//! message is written into the WAL, the watermark; the chunk takes its place in the order of changes where the watermark comes out of
//! the stream. What the chunk does not see and the stream had before that place is found by [`overlap`].
//!
//! *Bulk*: all tables as a whole, by several connections, under one snapshot whose place in the WAL is known exactly. The stream stands
//! still at that place until all rows are published. See [`bulk`].

pub mod bulk;
pub mod chunks;
pub mod copy;
pub mod overlap;
pub mod session;
pub mod shape;
pub mod visibility;

/// Prefix of the watermarks.
pub const WATERMARK_PREFIX: &str = "meander.watermark";

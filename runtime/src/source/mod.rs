//! Where changes come from.
//!
//! A source gives every change its [`Position`] and hands it on as a [`Change`], whose values still borrow from the source's own
//! buffer: nothing is copied before it is encoded. A new kind of database is a new folder here.

pub mod postgres;

use std::sync::Arc;

use serde::{Deserialize, Serialize};

use crate::{
    log::AcceptedGap,
    position::{Lsn, Position},
    schema::SchemaChange,
    source::postgres::pgoutput::{OldTuple, Tuple},
};

/// A table, as it is at some point of the log.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "camelCase")]
pub struct Relation {
    /// The source's own identifier of the table.
    pub oid: u32,
    /// Schema.
    pub schema: String,
    /// Name.
    pub table: String,
    /// Published columns in their order.
    pub columns: Vec<Column>,
}

/// A column of a [`Relation`].
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "camelCase")]
pub struct Column {
    /// Name.
    pub name: String,
    /// OID of the type.
    pub type_oid: u32,
    /// Name of the type: bare for a built-in one, `schema.name` for others.
    pub type_name: String,
    /// `atttypmod`.
    pub type_modifier: i32,
    /// Part of the key under which changes are published.
    pub key: bool,
}

/// One change of one table.
#[derive(Clone, Debug)]
pub struct Change<'a> {
    /// The table.
    pub relation: &'a Arc<Relation>,
    /// Version of the table's schema; 0 where there is none.
    pub schema_version: u32,
    /// What happened.
    pub operation: Operation<'a>,
    /// Identity and order.
    pub position: Position,
    /// The source's commit time, in microseconds since 1970-01-01T00:00:00Z; for a snapshot the time at which it was read.
    pub commit_time_micros: i64,
    /// The source's transaction id; 0 for a snapshot.
    pub transaction_id: u32,
    /// Where the change itself is in the source's log. It is neither unique nor in the order of the changes.
    pub lsn: Lsn,
    /// Where the transaction before this one ended, or a message between the two, if this session has seen its end.
    pub previous_end: Option<Lsn>,
    /// Where the transaction comes from, if the source had got it by replication itself.
    pub origin: Option<&'a TransactionOrigin>,
}

/// What an application wrote into the log beside its tables, for whoever reads it.
#[derive(Clone, Debug, PartialEq)]
pub struct Message<'a> {
    /// Says whose it is.
    pub prefix: &'a str,
    /// Any bytes.
    pub content: &'a [u8],
    /// Identity and order.
    pub position: Position,
    /// Where the message itself is in the source's log.
    pub lsn: Lsn,
    /// Where the transaction before it ended, if this session has seen that; or the message itself, if it stands for itself.
    pub previous_end: Option<Lsn>,
    /// The transaction that it is part of. None for one that stands for itself, whatever became of the transaction that wrote it.
    pub transaction: Option<MessageTransaction>,
}

/// The transaction that a [`Message`] is part of.
#[derive(Clone, Debug, PartialEq)]
pub struct MessageTransaction {
    /// The source's commit time, in microseconds since 1970-01-01T00:00:00Z.
    pub commit_time_micros: i64,
    /// The source's transaction id.
    pub id: u32,
    /// Where it comes from, if the source had got it by replication itself.
    pub origin: Option<Arc<TransactionOrigin>>,
}

/// Where a transaction was made that the source had got by replication itself.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct TransactionOrigin {
    /// Name of the replication origin.
    pub name: String,
    /// Where it was committed there; zero where the source was not told.
    pub lsn: Lsn,
}

/// The beginning or the end of a transaction, for a format that tells of them.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct TransactionMark {
    /// Identity and order: before, or after, each change of the transaction.
    pub position: Position,
    /// The source's transaction id.
    pub transaction_id: u32,
    /// The source's commit time, in microseconds since 1970-01-01T00:00:00Z.
    pub commit_time_micros: i64,
    /// Where the mark itself is in the source's log.
    pub lsn: Lsn,
}

/// What happened.
#[derive(Clone, Copy, Debug)]
pub enum Operation<'a> {
    /// A new row.
    Insert {
        /// The row.
        new: Tuple<'a>,
    },
    /// A changed row.
    Update {
        /// The row before, as far as the source tells it.
        old: Option<OldTuple<'a>>,
        /// The row after.
        new: Tuple<'a>,
    },
    /// A deleted row.
    Delete {
        /// The row before, as far as the source tells it.
        old: OldTuple<'a>,
    },
    /// The table was emptied.
    Truncate,
    /// The table has another schema from here on.
    SchemaChange {
        /// The old one and the new one.
        change: &'a SchemaChange,
    },
    /// Changes of the table may be lost before this.
    SourceGap {
        /// What is known of it.
        gap: &'a AcceptedGap,
    },
    /// A row as a snapshot found it.
    Read {
        /// The row.
        new: Tuple<'a>,
        /// The snapshot.
        snapshot: &'a Snapshot,
    },
    /// A snapshot of the table begins.
    SnapshotBegin {
        /// The snapshot.
        snapshot: &'a Snapshot,
    },
    /// Every row of the table has been read.
    SnapshotEnd {
        /// The snapshot.
        snapshot: &'a Snapshot,
        /// Rows that were published between the markers.
        rows: u64,
    },
}

/// A snapshot of a table.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Snapshot {
    /// Tells snapshots of one table apart.
    pub id: String,
    /// It is read in chunks between the changes; otherwise it is read as a whole before them.
    pub incremental: bool,
}

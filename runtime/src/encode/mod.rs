//! What a change looks like on the wire: one format per pipeline, the same bytes for every sink. A new format is a new file here.

mod debezium;
mod json;
pub(crate) mod key;
pub(crate) mod oversized;
mod protobuf;

use std::sync::Arc;

pub(crate) use debezium::key_payload as debezium_key_payload;
pub use debezium::{DebeziumEncoder, Keyless};
pub use protobuf::ProtobufEncoder;

use crate::{
    batch::{Batch, Destination, Heartbeat},
    source::{Change, Message, Relation, TransactionMark, postgres::details::TableDetails},
};

/// Turns changes into records.
pub trait Encoder: Send {
    /// True if the format says more of a table than the log does. Otherwise the details are empty.
    fn wants_details(&self) -> bool;

    /// Prepares for the changes of a table in its present shape; replaces what was prepared for the same OID.
    fn prepare(&mut self, relation: &Relation, details: &TableDetails, destination: Arc<Destination>);

    /// Appends the record or records of a change.
    ///
    /// # Errors
    /// When the change holds what the format, or PostgreSQL, cannot mean.
    fn encode(&mut self, change: &Change<'_>, batch: &mut Batch) -> Result<(), EncodeError>;

    /// Appends the record of a logical message. `commit_time_micros` is its transaction's, or the log's for one that has none.
    fn encode_message(
        &mut self,
        message: &Message<'_>,
        commit_time_micros: i64,
        destination: &Arc<Destination>,
        batch: &mut Batch,
    );

    /// The topic and stream of what is told of transactions, if the format tells of them. Then [`begin`](Self::begin) and
    /// [`end`](Self::end) enclose the changes of each, and [`pass`](Self::pass) and [`pass_message`](Self::pass_message) get what is not
    /// encoded.
    fn transactions(&self) -> Option<&Destination>;

    /// A transaction begins. `known` says that its beginning is in the log already, since it is sent again.
    fn begin(&mut self, mark: &TransactionMark, known: bool);

    /// A change that is in the log already. What is said of its transaction counts it.
    fn pass(&mut self, change: &Change<'_>);

    /// A logical message that is in the log already, likewise.
    fn pass_message(&mut self, message: &Message<'_>);

    /// The transaction is complete. `known` says that its end is in the log already.
    fn end(&mut self, mark: &TransactionMark, known: bool, batch: &mut Batch);

    /// The record that tells of a heartbeat, if the format has one.
    fn heartbeat(&self, time_micros: i64) -> Option<Heartbeat>;
}

/// A change that cannot be encoded. It is never passed over.
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
pub enum EncodeError {
    /// The text is not what PostgreSQL prints for the type. It is not shown: conditions and logs hold no data.
    #[error("{table}.{column} holds what is not a value of type {type_name}; please report it")]
    Value {
        /// The table.
        table: String,
        /// The column.
        column: String,
        /// Its type.
        type_name: String,
    },
    /// A key column whose value the source did not send.
    #[error("{table}.{column}: the source did not send this value of the key; please report it")]
    AbsentKey {
        /// The table.
        table: String,
        /// The column.
        column: String,
    },
    /// The table was never prepared.
    #[error("a change of relation {0}, which was not prepared; please report it")]
    Unprepared(u32),
}

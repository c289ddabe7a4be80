//! What a change looks like on the wire: one format per pipeline, the same bytes for every sink. A new format is a new file here.

mod key;
mod protobuf;

use std::sync::Arc;

pub use protobuf::ProtobufEncoder;

use crate::{
    batch::{Batch, Destination},
    source::{Change, Relation},
};

/// Turns changes into records.
pub trait Encoder: Send {
    /// Prepares for the changes of a table in its present shape; replaces what was prepared for the same OID.
    fn prepare(&mut self, relation: &Relation, destination: Arc<Destination>);

    /// Appends the record or records of a change.
    ///
    /// # Errors
    /// When the change holds what the format, or PostgreSQL, cannot mean.
    fn encode(&mut self, change: &Change<'_>, batch: &mut Batch) -> Result<(), EncodeError>;
}

/// A change that cannot be encoded. It is never passed over.
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
pub enum EncodeError {
    /// The text is not what PostgreSQL prints for the type. It is not shown: conditions and logs hold no data.
    #[error("{table}.{column} holds what is not a value of type {type_name}")]
    Value {
        /// The table.
        table: String,
        /// The column.
        column: String,
        /// Its type.
        type_name: String,
    },
    /// A key column whose value the source did not send.
    #[error("{table}.{column}: the source did not send this value of the key")]
    AbsentKey {
        /// The table.
        table: String,
        /// The column.
        column: String,
    },
    /// The table was never prepared.
    #[error("a change of relation {0}, which was not prepared")]
    Unprepared(u32),
}

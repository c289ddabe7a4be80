//! The events of logical messages: each has a block of its own in place of a row, and its prefix as key.

use std::{convert::Infallible, sync::Arc};

use super::{
    super::json::{self, write_string},
    now,
    source::{self, Place, Source},
    transaction::{self, Order},
    value::write_base64,
    wrapped,
};
use crate::{
    batch::{Batch, Destination},
    source::Message,
};

/// What is the same for every message.
pub(super) struct Messages {
    source: Source,
    /// Schema of the values, where they carry it.
    schema: Option<String>,
}

impl Messages {
    pub(super) fn new(topic_prefix: &str, database: &str, schemas: bool) -> Self {
        Self {
            source: Source::new(topic_prefix, database, "", ""),
            schema: schemas.then(|| format!("{VALUE_HEAD},{},{},{VALUE_TAIL}", source::SCHEMA, transaction::BLOCK)),
        }
    }

    /// Appends the record of a message. `order` is its place in its transaction, where that is told.
    pub(super) fn record(
        &self,
        message: &Message<'_>,
        commit_time_micros: i64,
        order: Option<Order>,
        destination: &Arc<Destination>,
        batch: &mut Batch,
    ) {
        let transaction = message.transaction.as_ref();
        let transaction_id = transaction.map_or(0, |transaction| transaction.id);
        let written = batch.push::<Infallible>(
            message.position,
            0,
            commit_time_micros,
            destination,
            |out| {
                wrapped(self.schema.as_ref().map(|_| KEY), out, |out| {
                    out.extend_from_slice(b"{\"prefix\":");
                    write_string(message.prefix, out);
                    out.push(b'}');
                });
                Ok(true)
            },
            |out| {
                wrapped(self.schema.as_deref(), out, |out| {
                    json::write(out, format_args!("{{\"op\":\"m\",\"ts_ms\":{},", now().as_millis()));
                    self.source.write(
                        &Place {
                            commit_time_micros,
                            snapshot: "false",
                            previous_end: message.previous_end,
                            lsn: message.lsn,
                            transaction_id,
                            origin: transaction.and_then(|transaction| transaction.origin.as_deref()),
                        },
                        out,
                    );
                    out.extend_from_slice(b",\"transaction\":");
                    transaction::write_block(order, transaction_id, message.lsn, out);
                    out.extend_from_slice(b",\"message\":{\"prefix\":");
                    write_string(message.prefix, out);
                    out.extend_from_slice(b",\"content\":");
                    write_base64(message.content, out);
                    out.extend_from_slice(b"}}");
                });
                Ok(true)
            },
        );
        let Ok(()) = written;
    }
}

/// Schemas of the records; that of the values has two blocks in between that other events have, too.
const KEY: &str = r#"{"type":"struct","fields":[{"type":"string","optional":true,"field":"prefix"}],"optional":false,"name":"io.debezium.connector.postgresql.MessageKey","version":1}"#;
const VALUE_HEAD: &str = r#"{"type":"struct","fields":[{"type":"string","optional":false,"field":"op"},{"type":"int64","optional":true,"field":"ts_ms"}"#;
const VALUE_TAIL: &str = r#"{"type":"struct","fields":[{"type":"string","optional":true,"field":"prefix"},{"type":"bytes","optional":true,"field":"content"}],"optional":false,"name":"io.debezium.connector.postgresql.Message","version":1,"field":"message"}],"optional":false,"name":"io.debezium.connector.postgresql.MessageValue","version":1}"#;

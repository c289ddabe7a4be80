//! What Debezium tells of transactions: a record where one begins and where it ends, and the place of each event in between.
//!
//! A transaction of which the log holds nothing is not told of. The counts hold although a session dies in the middle of a transaction:
//! the source sends it again from its beginning, and what is in the log already is counted while it is passed over. They take a number
//! for each table that the transaction changes.

use std::{collections::BTreeMap, sync::Arc};

use super::super::json;
use crate::{
    batch::{Batch, Destination},
    position::Lsn,
    source::TransactionMark,
};

/// What Debezium calls the collection that logical messages are of. No table is called so: their names have a dot.
const MESSAGES: &str = "LOGICAL_DECODING_MESSAGE";

/// The transactions of a pipeline.
pub(super) struct Transactions {
    pub(super) destination: Arc<Destination>,
    schemas: bool,
    open: Option<Open>,
    /// The name under which logical messages are counted.
    messages: Arc<str>,
}

/// A transaction that has not ended.
struct Open {
    begin: TransactionMark,
    /// Its beginning is in the log.
    known: bool,
    events: u64,
    /// Events of each table, and messages.
    tables: BTreeMap<Arc<str>, u64>,
}

/// The place of an event in its transaction, from 1.
#[derive(Clone, Copy)]
pub(super) struct Order {
    total: u64,
    table: u64,
}

impl Order {
    /// The place of the next event of the same table.
    pub(super) fn next(self) -> Self {
        Self {
            total: self.total + 1,
            table: self.table + 1,
        }
    }
}

/// Writes the block that an event has. Debezium's id of the transaction holds the place of the event, too.
pub(super) fn write_block(order: Option<Order>, transaction_id: u32, lsn: Lsn, out: &mut Vec<u8>) {
    match order {
        Some(Order { total, table }) => json::write(
            out,
            format_args!(
                "{{\"id\":\"{transaction_id}:{}\",\"total_order\":{total},\"data_collection_order\":{table}}}",
                lsn.0
            ),
        ),
        None => out.extend_from_slice(b"null"),
    }
}

impl Transactions {
    pub(super) fn new(destination: Destination, schemas: bool) -> Self {
        Self {
            destination: Arc::new(destination),
            schemas,
            open: None,
            messages: MESSAGES.into(),
        }
    }

    pub(super) fn begin(&mut self, begin: TransactionMark, known: bool) {
        self.open = Some(Open {
            begin,
            known,
            events: 0,
            tables: BTreeMap::new(),
        });
    }

    /// Counts events of a table, and says the place of the first. None outside of a transaction.
    pub(super) fn count(&mut self, table: &Arc<str>, events: u64) -> Option<Order> {
        let open = self.open.as_mut()?;
        let of_table = open.tables.entry(Arc::clone(table)).or_default();
        let first = Order {
            total: open.events + 1,
            table: *of_table + 1,
        };
        open.events += events;
        *of_table += events;
        Some(first)
    }

    /// Counts a logical message, and says its place. None outside of a transaction.
    pub(super) fn count_message(&mut self) -> Option<Order> {
        let messages = Arc::clone(&self.messages);
        self.count(&messages, 1)
    }

    /// Writes the record of the beginning, before the first event that the log does not have.
    pub(super) fn announce(&mut self, batch: &mut Batch) {
        let (destination, schemas) = (&self.destination, self.schemas);
        if let Some(open) = self.open.as_mut().filter(|open| !open.known) {
            open.known = true;
            let rest = |out: &mut Vec<u8>| out.extend_from_slice(b"null,\"data_collections\":null");
            record(destination, schemas, &open.begin, "BEGIN", rest, batch);
        }
    }

    /// Writes the record of the end, unless the log has it.
    pub(super) fn end(&mut self, end: &TransactionMark, known: bool, batch: &mut Batch) {
        let Some(open) = self.open.take().filter(|open| open.events > 0 && !known) else {
            return;
        };
        let counts = |out: &mut Vec<u8>| {
            json::write(out, format_args!("{},\"data_collections\":", open.events));
            for (place, (table, events)) in open.tables.iter().enumerate() {
                out.extend_from_slice(if place == 0 { b"[" } else { b"," });
                out.extend_from_slice(b"{\"data_collection\":");
                json::write_string(table, out);
                json::write(out, format_args!(",\"event_count\":{events}}}"));
            }
            out.push(b']');
        };
        record(&self.destination, self.schemas, end, "END", counts, batch);
    }
}

fn record(
    destination: &Arc<Destination>,
    schemas: bool,
    mark: &TransactionMark,
    status: &str,
    counts: impl FnOnce(&mut Vec<u8>),
    batch: &mut Batch,
) {
    let (id, lsn) = (mark.transaction_id, mark.lsn.0);
    let written = batch.push(
        mark.position,
        0,
        mark.commit_time_micros,
        destination,
        |out| {
            super::wrapped(schemas.then_some(KEY), out, |out| {
                json::write(out, format_args!("{{\"id\":\"{id}:{lsn}\"}}"));
            });
            Ok::<_, std::convert::Infallible>(true)
        },
        |out| {
            super::wrapped(schemas.then_some(VALUE), out, |out| {
                json::write(
                    out,
                    format_args!("{{\"status\":\"{status}\",\"id\":\"{id}:{lsn}\",\"event_count\":"),
                );
                counts(out);
                let millis = mark.commit_time_micros.div_euclid(1000);
                json::write(out, format_args!(",\"ts_ms\":{millis}}}"));
            });
            Ok(true)
        },
    );
    let Ok(()) = written;
    batch.markers += 1;
}

/// Schema of the block that an event has, as a field.
pub(super) const BLOCK: &str = r#"{"type":"struct","fields":[{"type":"string","optional":false,"field":"id"},{"type":"int64","optional":false,"field":"total_order"},{"type":"int64","optional":false,"field":"data_collection_order"}],"optional":true,"name":"event.block","version":1,"field":"transaction"}"#;
/// Schemas of the records.
const KEY: &str = r#"{"type":"struct","fields":[{"type":"string","optional":false,"field":"id"}],"optional":false,"name":"io.debezium.connector.common.TransactionMetadataKey","version":1}"#;
const VALUE: &str = r#"{"type":"struct","fields":[{"type":"string","optional":false,"field":"status"},{"type":"string","optional":false,"field":"id"},{"type":"int64","optional":true,"field":"event_count"},{"type":"array","items":{"type":"struct","fields":[{"type":"string","optional":false,"field":"data_collection"},{"type":"int64","optional":false,"field":"event_count"}],"optional":true,"name":"event.collection","version":1},"optional":true,"field":"data_collections"},{"type":"int64","optional":false,"field":"ts_ms"}],"optional":false,"name":"io.debezium.connector.common.TransactionMetadataValue","version":1}"#;

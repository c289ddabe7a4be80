//! The format `DebeziumJson`: the events of Debezium's PostgreSQL connector with its default settings, as Kafka Connect's JSON
//! converter writes them, so that consumers of Debezium read them unchanged.
//!
//! Everything that is the same for every change of a table, above all the schemas, is made once and copied. What differs from
//! Debezium is listed in `docs/debezium.md`.

mod decimal;
mod default;
mod geometry;
mod literal;
mod message;
mod source;
mod time;
mod transaction;
mod value;

use std::{
    collections::{BTreeMap, HashMap, btree_map::Entry},
    sync::Arc,
    time::{Duration, SystemTime, UNIX_EPOCH},
};

use tokio::sync::watch;

use self::{
    super::{
        EncodeError, Encoder,
        json::{self, write_string},
        oversized,
    },
    message::Messages,
    source::{Place, Source},
    transaction::{Order, Transactions},
    value::{Kind, Unfit},
};
use crate::{
    batch::{Batch, Destination, Heartbeat},
    log::heartbeat_topic,
    source::{
        Change, Column, Message, Operation, Relation, TransactionMark,
        postgres::{
            details::TableDetails,
            pgoutput::{Datum, OldTuple, Tuple},
        },
    },
};

/// Header of the records that end an old key: the new one.
const NEW_KEY_HEADER: &str = "__debezium.newkey";
/// Header of the record that begins a new key: the old one.
const OLD_KEY_HEADER: &str = "__debezium.oldkey";
/// Header of a record in which a field does not hold the column's value: a JSON object of `before` and `after`, each an array of names, and
/// of `key`, where the record has none because of that.
/// It is ours: Debezium leaves the reader to guess.
const UNAVAILABLE_HEADER: &str = "meander-unavailable";

/// Encodes changes as Debezium does.
pub struct DebeziumEncoder {
    topic_prefix: String,
    database: String,
    schemas: bool,
    prepared: HashMap<u32, Prepared>,
    messages: Messages,
    transactions: Option<Transactions>,
    keyless: Keyless,
}

/// Keys with a value that has no form: of each table, by its OID, the first column that was met. Clones share it.
#[derive(Clone, Default)]
pub struct Keyless(watch::Sender<BTreeMap<u32, String>>);

impl Keyless {
    /// Tables that a message names at most.
    const NAMED: usize = 5;

    /// Forgets all of them: they are met again, if they are so still.
    pub fn clear(&self) {
        self.0.send_replace(BTreeMap::new());
    }

    /// What a person has to know, if there are any.
    #[must_use]
    pub fn message(&self) -> Option<String> {
        let known = self.0.borrow();
        if known.is_empty() {
            return None;
        }
        let mut columns: Vec<String> = known.values().take(Self::NAMED).cloned().collect();
        if known.len() > Self::NAMED {
            columns.push(format!("{} more", known.len() - Self::NAMED));
        }
        Some(format!(
            "keys hold what DebeziumJson has no form for, in {}: such rows are published without a key, and consumers do not tell them apart; change the values, name the table in tables.exclude, or use the format Protobuf",
            columns.join(", ")
        ))
    }

    fn note(&self, relation: &Relation, column: usize) {
        self.0.send_if_modified(|known| {
            let Entry::Vacant(table) = known.entry(relation.oid) else {
                return false;
            };
            let Relation {
                schema, table: name, ..
            } = relation;
            let Column {
                name: column,
                type_name,
                ..
            } = &relation.columns[column];
            let column = table.insert(format!("{schema}.{name}.{column} ({type_name})"));
            tracing::warn!(
                column = column.as_str(),
                "a value of a key has no form, and its row is published without a key"
            );
            true
        });
    }
}

impl DebeziumEncoder {
    /// An encoder for a pipeline. With `schemas` each key and value is an object of a schema and a payload.
    #[must_use]
    pub fn new(topic_prefix: &str, database: &str, schemas: bool) -> Self {
        Self {
            topic_prefix: topic_prefix.to_owned(),
            database: database.to_owned(),
            schemas,
            prepared: HashMap::new(),
            messages: Messages::new(topic_prefix, database, schemas),
            transactions: None,
            keyless: Keyless::default(),
        }
    }

    /// Says there which rows have no key.
    #[must_use]
    pub fn telling(self, keyless: Keyless) -> Self {
        Self { keyless, ..self }
    }

    /// Tells of transactions, too.
    #[must_use]
    pub fn with_transactions(mut self, destination: Destination) -> Self {
        self.transactions = Some(Transactions::new(destination, self.schemas));
        self
    }
}

/// What of a key with its schema tells rows apart: the payload. The whole key, if it has no schema.
pub(crate) fn key_payload(key: &[u8]) -> &[u8] {
    // No object in a schema has a field of this name, and within a text the quotes would be escaped.
    const PAYLOAD: &[u8] = b",\"payload\":";
    let payload = key.windows(PAYLOAD.len()).position(|window| window == PAYLOAD);
    payload.map_or(key, |at| &key[at + PAYLOAD.len()..key.len() - 1])
}

/// A column that is carried.
struct Field {
    /// Its place in the row.
    index: usize,
    /// The name as JSON, with a colon.
    label: Vec<u8>,
    kind: Kind,
    optional: bool,
    default: Option<Vec<u8>>,
    /// What stands for NULL: for a column without NULLs, that the source did not tell the value.
    null: Vec<u8>,
    /// What stands for a large value that was left as it was.
    unavailable: Vec<u8>,
}

/// What is the same for every change of a table.
struct Prepared {
    destination: Arc<Destination>,
    /// Schema and name.
    table: Arc<str>,
    schemas: bool,
    fields: Vec<Field>,
    /// The fields of the key in its order; none if the table has no key, or one with a column that has no field.
    key: Vec<usize>,
    keyless: Keyless,
    key_head: Vec<u8>,
    value_head: Vec<u8>,
    source: Source,
}

/// One record of a change.
struct Part<'a> {
    number: u8,
    /// None for a tombstone.
    operation: Option<&'static str>,
    key: Row<'a>,
    before: Option<Row<'a>>,
    after: Option<Row<'a>>,
    header: Option<(&'static str, Row<'a>)>,
    /// Its place in its transaction, where that is told.
    order: Option<Order>,
}

/// A row, and where to find the values that it leaves out as unchanged.
#[derive(Clone, Copy)]
struct Row<'a> {
    row: Tuple<'a>,
    unchanged: Option<Tuple<'a>>,
}

impl<'a> Row<'a> {
    fn alone(row: Tuple<'a>) -> Self {
        Self { row, unchanged: None }
    }

    fn datums(self) -> Vec<Datum<'a>> {
        let mut datums: Vec<Datum<'a>> = self.row.values().collect();
        if let Some(unchanged) = self.unchanged
            && datums.contains(&Datum::UnchangedToast)
        {
            for (datum, old) in datums.iter_mut().zip(unchanged.values()) {
                if *datum == Datum::UnchangedToast && matches!(old, Datum::Text(_)) {
                    *datum = old;
                }
            }
        }
        datums
    }
}

impl Encoder for DebeziumEncoder {
    fn wants_details(&self) -> bool {
        true
    }

    fn prepare(&mut self, relation: &Relation, details: &TableDetails, destination: Arc<Destination>) {
        let fields: Vec<Field> = relation
            .columns
            .iter()
            .enumerate()
            .filter_map(|(index, column)| {
                let known = details.columns.get(&column.name);
                let type_details = details.types.get(&column.type_oid);
                let kind = match type_details {
                    Some(details) if details.domain => Kind::of(details, details.modifier)?,
                    Some(details) => Kind::of(details, column.type_modifier)?,
                    // It was dropped since, and nobody can say any more what it was.
                    None => Kind::Text(None),
                };
                let mut label = Vec::new();
                write_string(&column.name, &mut label);
                label.push(b':');
                let optional = known.is_none_or(|column| column.optional);
                let default = known
                    .and_then(|column| column.default.as_deref())
                    .zip(type_details)
                    .and_then(|(expression, details)| default::default(&kind, details, expression));
                let null = match &default {
                    _ if optional => b"null".to_vec(),
                    Some(default) => default.clone(),
                    None => kind.filler(),
                };
                let unavailable = kind.unavailable().unwrap_or_else(|| null.clone());
                Some(Field {
                    index,
                    label,
                    kind,
                    optional,
                    default,
                    null,
                    unavailable,
                })
            })
            .collect();
        // The log says which columns, as they were, and the catalog in which order. The log says nothing where the whole row is the
        // identity, or nothing is.
        let flagged: Vec<usize> = (0..relation.columns.len())
            .filter(|at| relation.columns[*at].key)
            .collect();
        let by_name = |name: &String| relation.columns.iter().position(|column| column.name == *name);
        let told: Vec<usize> = details.key.iter().filter_map(by_name).collect();
        let same = told.len() == flagged.len() && flagged.iter().all(|index| told.contains(index));
        let columns = if flagged.is_empty() || same { told } else { flagged };
        let field_of = |index: &usize| fields.iter().position(|field| field.index == *index);
        // Without one of its columns it would not tell rows apart.
        let key: Vec<usize> = columns.iter().map(field_of).collect::<Option<_>>().unwrap_or_default();
        if let Some(index) = columns.iter().find(|index| field_of(index).is_none()) {
            self.keyless.note(relation, *index);
        }
        let mut prepared = Prepared {
            destination,
            table: format!("{}.{}", relation.schema, relation.table).into(),
            schemas: self.schemas,
            fields,
            key,
            keyless: self.keyless.clone(),
            key_head: Vec::new(),
            value_head: Vec::new(),
            source: Source::new(&self.topic_prefix, &self.database, &relation.schema, &relation.table),
        };
        prepared.write_heads();
        self.prepared.insert(relation.oid, prepared);
    }

    fn encode(&mut self, change: &Change<'_>, batch: &mut Batch) -> Result<(), EncodeError> {
        let prepared = self
            .prepared
            .get_mut(&change.relation.oid)
            .ok_or(EncodeError::Unprepared(change.relation.oid))?;
        let order = self.transactions.as_mut().and_then(|transactions| {
            let order = prepared.count(change, transactions)?;
            transactions.announce(batch);
            Some(order)
        });
        let part = |operation, key| Part {
            order,
            number: 0,
            operation: Some(operation),
            key,
            before: None,
            after: None,
            header: None,
        };
        match change.operation {
            Operation::Insert { new } => {
                let new = Row::alone(new);
                prepared.record(
                    change,
                    batch,
                    &Part {
                        after: Some(new),
                        ..part("c", new)
                    },
                )?;
            }
            Operation::Read { new, .. } => {
                let new = Row::alone(new);
                prepared.record(
                    change,
                    batch,
                    &Part {
                        after: Some(new),
                        ..part("r", new)
                    },
                )?;
            }
            Operation::Update { old, new } => {
                let old = old.as_ref().map(OldTuple::tuple);
                let new = Row {
                    row: new,
                    unchanged: old,
                };
                let old = old.map(Row::alone);
                let Some(old) = old.filter(|old| prepared.key_differs(*old, new)) else {
                    prepared.record(
                        change,
                        batch,
                        &Part {
                            before: old,
                            after: Some(new),
                            ..part("u", new)
                        },
                    )?;
                    return Ok(());
                };
                prepared.end_of(change, batch, old, Some((NEW_KEY_HEADER, new)), order)?;
                prepared.record(
                    change,
                    batch,
                    &Part {
                        number: 2,
                        after: Some(new),
                        header: Some((OLD_KEY_HEADER, old)),
                        order: order.map(Order::next),
                        ..part("c", new)
                    },
                )?;
            }
            Operation::Delete { old } => prepared.end_of(change, batch, Row::alone(old.tuple()), None, order)?,
            // Debezium leaves them out by default, and it has no markers around a snapshot.
            Operation::Truncate
            | Operation::SnapshotBegin { .. }
            | Operation::SnapshotEnd { .. }
            | Operation::SchemaChange { .. }
            | Operation::SourceGap { .. } => {}
        }
        Ok(())
    }

    fn encode_message(
        &mut self,
        message: &Message<'_>,
        commit_time_micros: i64,
        destination: &Arc<Destination>,
        batch: &mut Batch,
    ) {
        let order = self
            .transactions
            .as_mut()
            .filter(|_| message.transaction.is_some())
            .and_then(|transactions| {
                let order = transactions.count_message()?;
                transactions.announce(batch);
                Some(order)
            });
        self.messages
            .record(message, commit_time_micros, order, destination, batch);
    }

    fn transactions(&self) -> Option<&Destination> {
        self.transactions
            .as_ref()
            .map(|transactions| &*transactions.destination)
    }

    fn begin(&mut self, mark: &TransactionMark, known: bool) {
        if let Some(transactions) = &mut self.transactions {
            transactions.begin(*mark, known);
        }
    }

    fn pass(&mut self, change: &Change<'_>) {
        if let (Some(transactions), Some(prepared)) = (&mut self.transactions, self.prepared.get(&change.relation.oid))
        {
            prepared.count(change, transactions);
        }
    }

    fn pass_message(&mut self, message: &Message<'_>) {
        if let Some(transactions) = self.transactions.as_mut().filter(|_| message.transaction.is_some()) {
            transactions.count_message();
        }
    }

    fn end(&mut self, mark: &TransactionMark, known: bool, batch: &mut Batch) {
        if let Some(transactions) = &mut self.transactions {
            transactions.end(mark, known, batch);
        }
    }

    fn heartbeat(&self, time_micros: i64) -> Option<Heartbeat> {
        let timestamp_millis = time_micros.div_euclid(1000);
        let (mut key, mut value) = (Vec::new(), Vec::new());
        wrapped(self.schemas.then_some(HEARTBEAT_KEY), &mut key, |out| {
            out.extend_from_slice(b"{\"serverName\":");
            write_string(&self.topic_prefix, out);
            out.push(b'}');
        });
        wrapped(self.schemas.then_some(HEARTBEAT_VALUE), &mut value, |out| {
            json::write(out, format_args!("{{\"ts_ms\":{timestamp_millis}}}"));
        });
        Some(Heartbeat {
            topic: heartbeat_topic(&self.topic_prefix),
            key,
            value,
            timestamp_millis,
        })
    }
}

/// Our clock, since the Unix epoch: the time at which an event is made.
fn now() -> Duration {
    SystemTime::now().duration_since(UNIX_EPOCH).unwrap_or_default()
}

/// Writes a payload, with its schema if there is one.
fn wrapped(schema: Option<&str>, out: &mut Vec<u8>, payload: impl FnOnce(&mut Vec<u8>)) {
    if let Some(schema) = schema {
        json::write(out, format_args!("{{\"schema\":{schema},\"payload\":"));
    }
    payload(out);
    if schema.is_some() {
        out.push(b'}');
    }
}

impl Prepared {
    /// Counts the events of a change. None where its place is not told.
    fn count(&self, change: &Change<'_>, transactions: &mut Transactions) -> Option<Order> {
        let events = match change.operation {
            Operation::Insert { .. } | Operation::Delete { .. } => 1,
            Operation::Update { old, new } => {
                let old = old.as_ref().map(OldTuple::tuple);
                let new = Row {
                    row: new,
                    unchanged: old,
                };
                1 + u64::from(old.is_some_and(|old| self.key_differs(Row::alone(old), new)))
            }
            _ => return None,
        };
        transactions.count(&self.table, events)
    }

    /// The end of a key: the DELETE, and the tombstone by which a compacted topic forgets the key.
    fn end_of(
        &mut self,
        change: &Change<'_>,
        batch: &mut Batch,
        old: Row<'_>,
        header: Option<(&'static str, Row<'_>)>,
        order: Option<Order>,
    ) -> Result<(), EncodeError> {
        let delete = Part {
            order,
            number: 0,
            operation: Some("d"),
            key: old,
            before: Some(old),
            after: None,
            header,
        };
        if self.record(change, batch, &delete)? == Key::WithoutForm {
            // There is nothing that it would forget.
            return Ok(());
        }
        self.record(
            change,
            batch,
            &Part {
                number: 1,
                operation: None,
                before: None,
                ..delete
            },
        )?;
        Ok(())
    }

    fn key_differs(&self, old: Row<'_>, new: Row<'_>) -> bool {
        let (old, new) = (old.datums(), new.datums());
        self.key.iter().any(|at| {
            let index = self.fields[*at].index;
            new[index] != Datum::UnchangedToast && old[index] != new[index]
        })
    }

    fn record(&mut self, change: &Change<'_>, batch: &mut Batch, part: &Part<'_>) -> Result<Key, EncodeError> {
        loop {
            match self.try_record(change, batch, part) {
                Err(Stopped::NewLabel { field, label }) => self.learn_label(field, &label),
                Err(Stopped::Failed(error)) => return Err(error),
                Ok(key) => return Ok(key),
            }
        }
    }

    fn try_record(&self, change: &Change<'_>, batch: &mut Batch, part: &Part<'_>) -> Result<Key, Stopped> {
        // First, because nothing may fail once the record is in the batch.
        let header = match part.header {
            Some((name, key)) => {
                let mut value = Vec::new();
                match self.write_key_fields(change.relation, key, Decimals::Plain, &mut value)? {
                    Ok(()) => Some((name, value)),
                    Err(_) => None,
                }
            }
            None => None,
        };
        let mut without_form = None;
        oversized::fit(batch, change, &self.destination, |batch, most| {
            let mut unavailable = Unavailable::default();
            batch.push::<Stopped>(
                change.position,
                part.number,
                change.commit_time_micros,
                &self.destination,
                |out| {
                    let start = out.len();
                    Ok(match self.write_key(change.relation, part.key, out)? {
                        Ok(written) => written,
                        Err(field) => {
                            out.truncate(start);
                            without_form = Some(field);
                            false
                        }
                    })
                },
                |out| match part.operation {
                    Some(operation) => {
                        self.write_value(change, operation, part, most, &mut unavailable, out)?;
                        Ok(true)
                    }
                    None => Ok(false),
                },
            )?;
            if let Some((name, value)) = &header {
                batch.header(name, |out| out.extend_from_slice(value));
            }
            unavailable.key.extend(without_form);
            if !unavailable.is_empty() {
                batch.header(UNAVAILABLE_HEADER, |out| self.write_unavailable(&unavailable, out));
            }
            Ok::<_, Stopped>(())
        })?;
        Ok(match without_form {
            Some(field) => {
                self.keyless.note(change.relation, self.fields[field].index);
                Key::WithoutForm
            }
            None => Key::AsItShouldBe,
        })
    }

    fn write_value(
        &self,
        change: &Change<'_>,
        operation: &str,
        part: &Part<'_>,
        most: usize,
        unavailable: &mut Unavailable,
        out: &mut Vec<u8>,
    ) -> Result<(), Stopped> {
        out.extend_from_slice(&self.value_head);
        out.extend_from_slice(b"{\"before\":");
        self.write_row(change.relation, part.before, most, &mut unavailable.before, out)?;
        out.extend_from_slice(b",\"after\":");
        self.write_row(change.relation, part.after, most, &mut unavailable.after, out)?;
        out.push(b',');
        self.source.write(
            &Place {
                commit_time_micros: change.commit_time_micros,
                snapshot: match change.operation {
                    Operation::Read { snapshot, .. } if snapshot.incremental => "incremental",
                    Operation::Read { .. } => "true",
                    _ => "false",
                },
                previous_end: change.previous_end,
                lsn: change.lsn,
                transaction_id: change.transaction_id,
                origin: change.origin,
            },
            out,
        );
        let now = now();
        let (millis, micros, nanos) = (now.as_millis(), now.as_micros(), now.as_nanos());
        out.extend_from_slice(b",\"transaction\":");
        transaction::write_block(part.order, change.transaction_id, change.lsn, out);
        json::write(
            out,
            format_args!(",\"op\":\"{operation}\",\"ts_ms\":{millis},\"ts_us\":{micros},\"ts_ns\":{nanos}}}"),
        );
        self.end(out);
        Ok(())
    }

    fn write_row(
        &self,
        relation: &Relation,
        row: Option<Row<'_>>,
        most: usize,
        unavailable: &mut Vec<usize>,
        out: &mut Vec<u8>,
    ) -> Result<(), Stopped> {
        let Some(row) = row else {
            out.extend_from_slice(b"null");
            return Ok(());
        };
        let datums = row.datums();
        let mut separator = b'{';
        for (at, field) in self.fields.iter().enumerate() {
            out.push(separator);
            separator = b',';
            out.extend_from_slice(&field.label);
            match datums[field.index] {
                Datum::Null => out.extend_from_slice(&field.null),
                Datum::UnchangedToast => {
                    out.extend_from_slice(&field.unavailable);
                    unavailable.push(at);
                }
                Datum::Text(text) if text.len() > most && !self.key.contains(&at) => {
                    out.extend_from_slice(&field.unavailable);
                    unavailable.push(at);
                }
                Datum::Text(text) => {
                    let start = out.len();
                    match field.kind.write(text, out) {
                        Ok(()) => {}
                        Err(Unfit::NoForm) => {
                            out.truncate(start);
                            out.extend_from_slice(&field.null);
                            unavailable.push(at);
                        }
                        Err(unfit) => return Err(self.stopped(relation, at, unfit, text)),
                    }
                }
            }
        }
        if separator == b'{' {
            out.push(b'{');
        }
        out.push(b'}');
        Ok(())
    }

    /// Writes the key and says whether there is one, or else which field of it has no form.
    fn write_key(&self, relation: &Relation, row: Row<'_>, out: &mut Vec<u8>) -> Result<Result<bool, usize>, Stopped> {
        if self.key.is_empty() {
            return Ok(Ok(false));
        }
        out.extend_from_slice(&self.key_head);
        let written = self.write_key_fields(relation, row, Decimals::Bytes, out)?;
        self.end(out);
        Ok(written.map(|()| true))
    }

    /// Writes the fields of the key, or says which of them has no form.
    fn write_key_fields(
        &self,
        relation: &Relation,
        row: Row<'_>,
        decimals: Decimals,
        out: &mut Vec<u8>,
    ) -> Result<Result<(), usize>, Stopped> {
        let datums = row.datums();
        let mut separator = b'{';
        for at in &self.key {
            let field = &self.fields[*at];
            out.push(separator);
            separator = b',';
            out.extend_from_slice(&field.label);
            match datums[field.index] {
                Datum::Null => out.extend_from_slice(&field.null),
                Datum::Text(text) if decimals == Decimals::Plain && matches!(field.kind, Kind::Decimal { .. }) => {
                    out.extend_from_slice(text.as_bytes());
                }
                Datum::Text(text) => match field.kind.write(text, out) {
                    Ok(()) => {}
                    Err(Unfit::NoForm) => return Ok(Err(*at)),
                    Err(unfit) => return Err(self.stopped(relation, *at, unfit, text)),
                },
                Datum::UnchangedToast => {
                    let column = &relation.columns[field.index];
                    return Err(Stopped::Failed(EncodeError::AbsentKey {
                        table: format!("{}.{}", relation.schema, relation.table),
                        column: column.name.clone(),
                    }));
                }
            }
        }
        if separator == b'{' {
            out.push(b'{');
        }
        out.push(b'}');
        Ok(Ok(()))
    }

    fn write_unavailable(&self, unavailable: &Unavailable, out: &mut Vec<u8>) {
        let mut separator = b'{';
        for (name, fields) in [
            ("key", &unavailable.key),
            ("before", &unavailable.before),
            ("after", &unavailable.after),
        ] {
            if fields.is_empty() {
                continue;
            }
            out.push(separator);
            separator = b',';
            write_string(name, out);
            for (place, at) in fields.iter().enumerate() {
                out.extend_from_slice(if place == 0 { b":[" } else { b"," });
                let label = &self.fields[*at].label;
                out.extend_from_slice(&label[..label.len() - 1]);
            }
            out.push(b']');
        }
        out.push(b'}');
    }

    /// Closes the object around schema and payload.
    fn end(&self, out: &mut Vec<u8>) {
        if self.schemas {
            out.push(b'}');
        }
    }

    fn stopped(&self, relation: &Relation, at: usize, unfit: Unfit, text: &str) -> Stopped {
        let column = &relation.columns[self.fields[at].index];
        let table = format!("{}.{}", relation.schema, relation.table);
        match unfit {
            Unfit::NewLabel => Stopped::NewLabel {
                field: at,
                label: text.to_owned(),
            },
            // What has no form is never an end: whoever writes a value deals with that.
            Unfit::NoForm | Unfit::Malformed => Stopped::Failed(EncodeError::Value {
                table,
                column: column.name.clone(),
                type_name: column.type_name.clone(),
            }),
        }
    }

    /// A label that was added to an enum comes before any message that would say so.
    fn learn_label(&mut self, field: usize, label: &str) {
        match &mut self.fields[field].kind {
            Kind::Enum(labels) => labels.push(label.to_owned()),
            // The text is the whole array's.
            Kind::Array(element, delimiter) => {
                if let Kind::Enum(labels) = &mut **element {
                    let _ = literal::elements(label, *delimiter, |text| {
                        if let Some(text) = text.filter(|text| !labels.iter().any(|label| label == text)) {
                            labels.push(text.into_owned());
                        }
                        Ok(())
                    });
                }
            }
            _ => {}
        }
        self.write_heads();
    }

    /// Makes the schemas, or nothing without them.
    fn write_heads(&mut self) {
        if !self.schemas {
            return;
        }
        let topic = self.destination.topic.clone();
        let fields = |which: &mut dyn Iterator<Item = usize>, out: &mut Vec<u8>| {
            for (place, at) in which.enumerate() {
                let field = &self.fields[at];
                out.extend_from_slice(if place == 0 { b"{" } else { b",{" });
                field.kind.write_schema(field.optional, field.default.as_deref(), out);
                out.extend_from_slice(b",\"field\":");
                out.extend_from_slice(&field.label[..field.label.len() - 1]);
                out.push(b'}');
            }
        };
        let mut key_head = b"{\"schema\":{\"type\":\"struct\",\"fields\":[".to_vec();
        fields(&mut self.key.iter().copied(), &mut key_head);
        json::write(
            &mut key_head,
            format_args!("],\"optional\":false,\"name\":\"{topic}.Key\"}},\"payload\":"),
        );
        let mut row = Vec::new();
        fields(&mut (0..self.fields.len()), &mut row);
        let mut value_head = b"{\"schema\":{\"type\":\"struct\",\"fields\":[".to_vec();
        for name in ["before", "after"] {
            value_head.extend_from_slice(b"{\"type\":\"struct\",\"fields\":[");
            value_head.extend_from_slice(&row);
            json::write(
                &mut value_head,
                format_args!("],\"optional\":true,\"name\":\"{topic}.Value\",\"field\":\"{name}\"}},"),
            );
        }
        json::write(
            &mut value_head,
            format_args!(
                "{},{},{OPERATION_AND_TIMES}],\"optional\":false,\"name\":\"{topic}.Envelope\",\"version\":2}},\"payload\":",
                source::SCHEMA,
                transaction::BLOCK,
            ),
        );
        (self.key_head, self.value_head) = (key_head, value_head);
    }
}

/// Whether a record has its key.
#[derive(Clone, Copy, PartialEq, Eq)]
enum Key {
    /// It has, or its table has none.
    AsItShouldBe,
    /// A value of it has no form, and so the record has no key.
    WithoutForm,
}

/// How decimals are written.
#[derive(Clone, Copy, PartialEq, Eq)]
enum Decimals {
    /// As everywhere in keys and values.
    Bytes,
    /// As numbers: Connect's converter of headers does it so.
    Plain,
}

impl From<EncodeError> for Stopped {
    fn from(error: EncodeError) -> Self {
        Self::Failed(error)
    }
}

/// Why a record was not written.
enum Stopped {
    /// An enum has a label that is not in the schema yet, or an array holds one.
    NewLabel {
        field: usize,
        label: String,
    },
    Failed(EncodeError),
}

/// Fields that do not hold the column's value.
#[derive(Default)]
struct Unavailable {
    /// Because of these the record has no key.
    key: Vec<usize>,
    before: Vec<usize>,
    after: Vec<usize>,
}

/// Schemas of a heartbeat.
const HEARTBEAT_KEY: &str = r#"{"type":"struct","fields":[{"type":"string","optional":false,"field":"serverName"}],"optional":false,"name":"io.debezium.connector.common.ServerNameKey","version":1}"#;
const HEARTBEAT_VALUE: &str = r#"{"type":"struct","fields":[{"type":"int64","optional":false,"field":"ts_ms"}],"optional":false,"name":"io.debezium.connector.common.Heartbeat","version":1}"#;

impl Unavailable {
    fn is_empty(&self) -> bool {
        self.key.is_empty() && self.before.is_empty() && self.after.is_empty()
    }
}

/// What the schema of every table has last.
const OPERATION_AND_TIMES: &str = r#"{"type":"string","optional":false,"field":"op"},{"type":"int64","optional":true,"field":"ts_ms"},{"type":"int64","optional":true,"field":"ts_us"},{"type":"int64","optional":true,"field":"ts_ns"}"#;

#[cfg(test)]
mod tests {
    use serde_json::{Value, json};

    use super::*;
    use crate::{
        position::{Epoch, Lsn, Position},
        size_limit::SizeLimit,
        source::{
            Column,
            postgres::{
                details::{ColumnDetails, TypeDetails},
                pgoutput::{LogicalMessage, decode},
            },
        },
    };

    const INT: u32 = 23;
    const TEXT: u32 = 25;
    const NUMERIC: u32 = 1700;
    const MOOD: u32 = 20_000;
    const PAIR: u32 = 20_001;
    /// Of no type that the catalog has.
    const DROPPED: u32 = 20_002;

    /// A table of these columns, the first of which is the key, and what the catalog says of it.
    fn table(columns: &[(&str, u32)]) -> (Arc<Relation>, TableDetails) {
        let names = [
            (INT, "int4"),
            (TEXT, "text"),
            (NUMERIC, "numeric"),
            (MOOD, "mood"),
            (PAIR, "pair"),
        ];
        let types = names.map(|(oid, name)| {
            let labels = if oid == MOOD { vec!["ok".to_owned()] } else { vec![] };
            let details = TypeDetails {
                oid,
                name: name.to_owned(),
                builtin: oid < MOOD,
                modifier: -1,
                labels,
                ..TypeDetails::default()
            };
            (oid, details)
        });
        let relation = Relation {
            oid: 1,
            schema: "public".to_owned(),
            table: "t".to_owned(),
            columns: columns
                .iter()
                .enumerate()
                .map(|(index, (name, oid))| Column {
                    name: (*name).to_owned(),
                    type_oid: *oid,
                    type_name: (*name).to_owned(),
                    type_modifier: -1,
                    key: index == 0,
                })
                .collect(),
        };
        let optional = |name: &str| ColumnDetails {
            optional: name != columns[0].0,
            default: None,
        };
        let details = TableDetails {
            columns: columns
                .iter()
                .map(|&(name, _)| (name.to_owned(), optional(name)))
                .collect(),
            key: vec![columns[0].0.to_owned()],
            types: types.into(),
        };
        (Arc::new(relation), details)
    }

    /// A tuple as pgoutput sends it: `None` is NULL, `Some("\0")` an unchanged TOAST value.
    fn tuple(values: &[Option<&str>]) -> Vec<u8> {
        let mut out = u16::try_from(values.len()).unwrap().to_be_bytes().to_vec();
        for value in values {
            match value {
                None => out.push(b'n'),
                Some("\0") => out.push(b'u'),
                Some(text) => {
                    out.push(b't');
                    out.extend(u32::try_from(text.len()).unwrap().to_be_bytes());
                    out.extend(text.as_bytes());
                }
            }
        }
        out
    }

    /// The records of a message: key, value, headers.
    fn encode(columns: &[(&str, u32)], message: &[u8]) -> Result<Vec<(Value, Value, String)>, EncodeError> {
        encode_within(columns, message, &SizeLimit::default())
    }

    /// The same where the topic takes no more than this of one record.
    fn encode_within(
        columns: &[(&str, u32)],
        message: &[u8],
        limit: &SizeLimit,
    ) -> Result<Vec<(Value, Value, String)>, EncodeError> {
        let (relation, details) = table(columns);
        let mut encoder = DebeziumEncoder::new("shop", "db", true);
        let destination = Destination {
            topic: "shop.public.t".to_owned(),
            stream: String::new(),
            limit: limit.clone(),
        };
        encoder.prepare(&relation, &details, Arc::new(destination));
        let operation = match decode(message).unwrap() {
            LogicalMessage::Insert { new, .. } => Operation::Insert { new },
            LogicalMessage::Update { old, new, .. } => Operation::Update { old, new },
            other => panic!("{other:?}"),
        };
        let change = Change {
            relation: &relation,
            schema_version: 0,
            operation,
            position: Position {
                epoch: Epoch::FIRST,
                commit_lsn: Lsn(0x16B_3748),
                ordinal: 3,
            },
            commit_time_micros: 1_763_700_000_000_001,
            transaction_id: 777,
            lsn: Lsn(0x16B_3000),
            previous_end: None,
            origin: None,
        };
        let mut batch = Batch::new();
        let result = encoder.encode(&change, &mut batch);
        let json = |bytes: Option<&[u8]>| bytes.map_or(Value::Null, |bytes| serde_json::from_slice(bytes).unwrap());
        let records: Vec<_> = batch
            .records()
            .iter()
            .map(|record| {
                let headers: Vec<String> = batch
                    .headers(record)
                    .map(|(name, value)| format!("{name}={}", std::str::from_utf8(value).unwrap()))
                    .collect();
                (json(batch.key(record)), json(batch.value(record)), headers.join(" "))
            })
            .collect();
        assert!(result.is_ok() || records.is_empty());
        result.map(|()| records)
    }

    fn insert(columns: &[(&str, u32)], values: &[Option<&str>]) -> Result<Vec<(Value, Value, String)>, EncodeError> {
        encode(columns, &[&b"I\0\0\0\x01N"[..], &tuple(values)].concat())
    }

    #[test]
    fn a_label_that_the_catalog_did_not_have_yet_joins_the_schema() {
        let records = insert(&[("id", INT), ("e", MOOD)], &[Some("1"), Some("new")]).unwrap();
        let [(_, value, _)] = &records[..] else {
            panic!("one record: {records:?}")
        };
        assert_eq!(value["payload"]["after"], json!({"id": 1, "e": "new"}));
        assert_eq!(
            value["schema"]["fields"][1]["fields"][1]["parameters"]["allowed"],
            "ok,new"
        );
    }

    #[test]
    fn a_type_that_was_dropped_since_is_carried_as_text() {
        let records = insert(&[("d", DROPPED), ("e", DROPPED)], &[Some("(1,2)"), Some("x")]).unwrap();
        let (key, value, _) = &records[0];
        assert_eq!(key["payload"], json!({"d": "(1,2)"}));
        assert_eq!(value["payload"]["after"], json!({"d": "(1,2)", "e": "x"}));
        assert_eq!(value["schema"]["fields"][1]["fields"][1]["type"], "string");
    }

    #[test]
    fn tables_with_keys_without_a_form_are_named_once_each_and_counted_past_the_first() {
        let keyless = Keyless::default();
        let note = |oid| {
            let (relation, _) = table(&[("n", NUMERIC)]);
            let relation = Relation {
                oid,
                table: format!("t{oid}"),
                ..relation.as_ref().clone()
            };
            keyless.note(&relation, 0);
        };
        assert_eq!(keyless.message(), None);
        (1..=7).chain(1..=7).for_each(note);
        let message = keyless.message().unwrap();
        assert!(message.contains(".t5.n (n), 2 more: "), "{message}");
        keyless.clear();
        assert_eq!(keyless.message(), None);
    }

    #[test]
    fn a_value_without_a_form_is_null_and_named_and_in_a_key_it_takes_the_key_away() {
        let records = insert(&[("id", INT), ("n", NUMERIC)], &[Some("1"), Some("NaN")]).unwrap();
        assert_eq!(records[0].1["payload"]["after"], json!({"id": 1, "n": null}));
        assert_eq!(records[0].2, r#"meander-unavailable={"after":["n"]}"#);
        let keyless = insert(&[("n", NUMERIC), ("id", INT)], &[Some("NaN"), Some("1")]).unwrap();
        let filled = json!({"n": {"scale": 0, "value": "AA=="}, "id": 1});
        assert_eq!(
            (&keyless[0].0, &keyless[0].1["payload"]["after"]),
            (&Value::Null, &filled)
        );
        assert_eq!(keyless[0].2, r#"meander-unavailable={"key":["n"],"after":["n"]}"#);
        let no_field = insert(&[("p", PAIR), ("id", INT)], &[Some("(1,2)"), Some("1")]).unwrap();
        assert_eq!(
            (&no_field[0].0, &no_field[0].1["payload"]["after"]),
            (&Value::Null, &json!({"id": 1}))
        );
        // A key that ends without a form has nothing to be forgotten.
        let message = [
            &b"U\0\0\0\x01K"[..],
            &tuple(&[Some("NaN"), None]),
            b"N",
            &tuple(&[Some("2"), Some("1")]),
        ]
        .concat();
        let changed = encode(&[("n", NUMERIC), ("id", INT)], &message).unwrap();
        let operations: Vec<_> = changed
            .iter()
            .map(|(_, value, _)| value["payload"]["op"].clone())
            .collect();
        assert_eq!(operations, ["d", "c"]);
        assert_eq!(
            (&changed[0].0, changed[1].0.is_null(), changed[1].2.as_str()),
            (&Value::Null, false, "")
        );
        let refused = insert(&[("id", INT)], &[Some("x")]);
        assert!(matches!(refused, Err(EncodeError::Value { .. })), "{refused:?}");
    }

    #[test]
    fn what_is_too_much_for_the_topic_has_the_placeholder_in_every_record_of_the_change() {
        let limit = SizeLimit::default();
        limit.set(8000);
        let columns = [("id", INT), ("t", TEXT), ("u", TEXT)];
        let long = "x".repeat(9000);
        let (old, new) = (
            tuple(&[Some("1"), Some(&long), Some("a")]),
            tuple(&[Some("2"), Some("\0"), Some("b")]),
        );
        let records = encode_within(&columns, &[&b"U\0\0\0\x01O"[..], &old, b"N", &new].concat(), &limit).unwrap();
        // The end of the old key, its tombstone, and the new one, whose value the old row tells.
        for (row, record, kept) in [("before", &records[0], "a"), ("after", &records[2], "b")] {
            assert_eq!(record.1["payload"][row]["t"], value::UNAVAILABLE);
            assert_eq!(record.1["payload"][row]["u"], kept);
            assert!(
                record.2.contains(&format!(r#"meander-unavailable={{"{row}":["t"]}}"#)),
                "{}",
                record.2
            );
            assert!(record.2.contains("meander-oversized=1"), "{}", record.2);
        }
        assert_eq!(
            (&records[1].1, records[1].2.contains("oversized")),
            (&Value::Null, false)
        );
    }

    #[test]
    fn an_unchanged_large_value_is_taken_from_the_old_row_where_that_has_it() {
        let update = |kind: &[u8], old: &[Option<&str>]| {
            let new = tuple(&[Some("1"), Some("\0")]);
            encode(
                &[("id", INT), ("t", TEXT)],
                &[&b"U\0\0\0\x01"[..], kind, &tuple(old), b"N", &new].concat(),
            )
            .unwrap()
        };
        let full = update(b"O", &[Some("1"), Some("long")]);
        assert_eq!(full[0].1["payload"]["after"]["t"], "long");
        assert_eq!(full[0].2, "");
        let key = update(b"K", &[Some("1"), None]);
        assert_eq!(key[0].1["payload"]["after"]["t"], value::UNAVAILABLE);
        assert_eq!(key[0].2, r#"meander-unavailable={"after":["t"]}"#);
    }

    #[test]
    fn a_change_of_the_key_is_delete_tombstone_and_create() {
        let message = [
            &b"U\0\0\0\x01K"[..],
            &tuple(&[Some("1"), None]),
            b"N",
            &tuple(&[Some("2"), Some("a")]),
        ]
        .concat();
        let records = encode(&[("id", INT), ("t", TEXT)], &message).unwrap();
        let seen: Vec<_> = records
            .iter()
            .map(|(key, value, headers)| {
                (
                    key["payload"]["id"].clone(),
                    value["payload"]["op"].clone(),
                    headers.as_str(),
                )
            })
            .collect();
        assert_eq!(
            seen,
            [
                (json!(1), json!("d"), r#"__debezium.newkey={"id":2}"#),
                (json!(1), Value::Null, r#"__debezium.newkey={"id":2}"#),
                (json!(2), json!("c"), r#"__debezium.oldkey={"id":1}"#),
            ]
        );
    }
}

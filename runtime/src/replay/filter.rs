//! Which records of a range are delivered.
//!
//! Every part of a filter has to keep a record, the cheap ones first: tables and operations are read without the rows, keys without the
//! value, and only what is left is decoded for the expression.
//!
//! Keys and expression speak of rows. What concerns a whole table (TRUNCATE, another schema, a gap) touches each of its rows, and so they
//! are not asked about it. The markers of a snapshot say that every row of the table is between them, so they are only kept where no
//! row is left out; those of a transaction count its changes, and are never kept. A logical message has neither table nor row.

mod expression;

use std::collections::BTreeMap;

use meander_config::{ReplayFilter, ReplayOperation};
use meander_proto::v1::Operation;
use prost::Message as _;
use serde::Deserialize;
use serde_json::Value;

use self::expression::Expression;
pub(super) use self::expression::STACK;
use super::{record::Record, target::log::payload};
use crate::{
    position::Position,
    source::postgres::preflight::{Selection, SourceError},
};

/// A filter, ready to be asked.
pub struct Filter {
    tables: Option<Selection>,
    operations: Vec<ReplayOperation>,
    keys: Vec<BTreeMap<String, String>>,
    expression: Option<Expression>,
}

/// A filter cannot be used, or a record cannot be judged by it. Each message says the cause and what to do.
#[derive(Debug, thiserror::Error)]
pub enum FilterError {
    /// A table is written in a way that means nothing.
    #[error("filter.tables: {0}")]
    InvalidTables(#[source] SourceError),
    /// The expression means nothing.
    #[error("filter.expression: {0}; correct it in another ReplayJob")]
    InvalidExpression(String),
    /// The expression has no answer for a change.
    #[error(
        "filter.expression cannot judge the change {position}, at offset {offset} of partition {partition} of {topic}: {cause}; correct it \
         in another ReplayJob (columns of a type without a counterpart in CEL, such as numeric, are text: double(after.price); before or \
         after can be null, and a column that the source did not send is not there: has(after.note))"
    )]
    NoAnswer {
        /// The change.
        position: Position,
        /// The topic.
        topic: String,
        /// The partition.
        partition: i32,
        /// The offset.
        offset: i64,
        /// Why.
        cause: String,
    },
    /// The format of the log does not hold every value.
    #[error(
        "{topic} holds no meander.v1.ChangeRecord: only the format Protobuf carries every value exactly, as filter.expression needs it; leave \
         the expression out, or replay a pipeline of that format"
    )]
    NotExact {
        /// The topic.
        topic: String,
    },
    /// A record cannot be read.
    #[error(
        "the record at offset {offset} of partition {partition} of {topic} is neither a meander.v1.ChangeRecord nor an event of Debezium's: \
         {cause}; somebody else writes to this topic"
    )]
    Undecodable {
        /// The topic.
        topic: String,
        /// The partition.
        partition: i32,
        /// The offset.
        offset: i64,
        /// What is wrong with it.
        cause: String,
    },
}

impl FilterError {
    /// The reason, in PascalCase, as it stands in conditions and events.
    #[must_use]
    pub fn reason(&self) -> &'static str {
        match self {
            Self::InvalidTables(_) | Self::InvalidExpression(_) => "InvalidFilter",
            Self::NoAnswer { .. } => "FilterFailed",
            Self::NotExact { .. } => "FormatNotExact",
            Self::Undecodable { .. } => "UndecodableRecord",
        }
    }
}

/// What of a record decides whether its table and its kind are wanted.
struct Subject {
    kind: Kind,
    schema: String,
    table: String,
}

/// What a record is about.
#[derive(Clone, Copy)]
enum Kind {
    /// One row.
    Row(ReplayOperation),
    /// Every row of a table.
    Table(ReplayOperation),
    /// Neither: a logical message.
    Message,
    /// The beginning or end of a snapshot.
    Snapshot,
    /// The beginning or end of a transaction.
    Transaction,
}

impl Filter {
    /// Reads a filter.
    ///
    /// # Errors
    /// When a part of it means nothing.
    pub fn new(filter: &ReplayFilter) -> Result<Self, FilterError> {
        let tables = filter.tables.as_ref().map(Selection::new).transpose();
        Ok(Self {
            tables: tables.map_err(FilterError::InvalidTables)?,
            operations: filter.operations.clone(),
            keys: filter.keys.clone(),
            expression: filter.expression.as_deref().map(Expression::new).transpose()?,
        })
    }

    /// Whether a record is delivered. One without a value is not asked about: see [`Judge`].
    fn keeps(&self, record: &Record) -> Result<bool, FilterError> {
        let subject = Subject::of(record)?;
        let has_table = !matches!(subject.kind, Kind::Message | Kind::Transaction);
        if let Some(tables) = &self.tables
            && !(has_table && tables.holds(&subject.schema, &subject.table))
        {
            return Ok(false);
        }
        Ok(match subject.kind {
            Kind::Row(operation) => self.wants(operation) && self.keeps_row(record, &subject, operation)?,
            Kind::Table(operation) => self.wants(operation),
            Kind::Message => self.wants(ReplayOperation::Message) && self.keeps_every_row(),
            Kind::Snapshot => {
                let rows = [ReplayOperation::Insert, ReplayOperation::Update, ReplayOperation::Read];
                self.keeps_every_row() && rows.into_iter().all(|operation| self.wants(operation))
            }
            Kind::Transaction => false,
        })
    }

    fn wants(&self, operation: ReplayOperation) -> bool {
        self.operations.is_empty() || self.operations.contains(&operation)
    }

    /// Whether rows are not told apart.
    fn keeps_every_row(&self) -> bool {
        self.keys.is_empty() && self.expression.is_none()
    }

    fn keeps_row(&self, record: &Record, subject: &Subject, operation: ReplayOperation) -> Result<bool, FilterError> {
        if !self.keys.is_empty() && !self.holds_key(&record.key) {
            return Ok(false);
        }
        match &self.expression {
            Some(expression) => expression.holds(record, subject, operation),
            None => Ok(true),
        }
    }

    /// Whether a key has every column of one that is asked for. A record without one has none.
    fn holds_key(&self, key: &[u8]) -> bool {
        let Ok(Value::Object(columns)) = payload(key) else {
            return false;
        };
        let has = |(column, wanted): (&String, &String)| match columns.get(column) {
            Some(Value::String(text)) => text == wanted,
            Some(Value::Number(number)) => number.to_string().as_str() == wanted,
            Some(Value::Bool(flag)) => wanted == if *flag { "true" } else { "false" },
            _ => false,
        };
        self.keys.iter().any(|key| key.iter().all(has))
    }
}

impl Subject {
    fn of(record: &Record) -> Result<Self, FilterError> {
        let subject = if is_json(record) {
            Self::of_debezium(&record.value)
        } else {
            Self::of_change(&record.value)
        };
        subject.map_err(|cause| undecodable(record, cause))
    }

    fn of_change(value: &[u8]) -> Result<Self, String> {
        let head = Head::decode(value).map_err(|error| error.to_string())?;
        let kind = match head.operation() {
            Operation::Insert => Kind::Row(ReplayOperation::Insert),
            Operation::Update => Kind::Row(ReplayOperation::Update),
            Operation::Delete => Kind::Row(ReplayOperation::Delete),
            Operation::Read => Kind::Row(ReplayOperation::Read),
            Operation::Truncate => Kind::Table(ReplayOperation::Truncate),
            Operation::SchemaChange => Kind::Table(ReplayOperation::SchemaChange),
            Operation::SourceGap => Kind::Table(ReplayOperation::SourceGap),
            Operation::Message => Kind::Message,
            Operation::SnapshotBegin | Operation::SnapshotEnd => Kind::Snapshot,
            Operation::Unspecified => return Err("this version does not know its operation".to_owned()),
        };
        let relation = head.relation.unwrap_or_default();
        Ok(Self {
            kind,
            schema: relation.schema,
            table: relation.table,
        })
    }

    fn of_debezium(value: &[u8]) -> Result<Self, String> {
        let event: Event = serde_json::from_slice(value).map_err(|error| error.to_string())?;
        let event = match event.payload {
            Some(payload) => *payload,
            None => event,
        };
        let kind = match event.op.as_deref() {
            Some("c") => Kind::Row(ReplayOperation::Insert),
            Some("u") => Kind::Row(ReplayOperation::Update),
            Some("d") => Kind::Row(ReplayOperation::Delete),
            Some("r") => Kind::Row(ReplayOperation::Read),
            Some("t") => Kind::Table(ReplayOperation::Truncate),
            Some("m") => Kind::Message,
            Some(other) => return Err(format!("its op is {other:?}")),
            None => Kind::Transaction,
        };
        let source = event.source.unwrap_or_default();
        Ok(Self {
            kind,
            schema: source.schema,
            table: source.table,
        })
    }
}

/// No ChangeRecord begins so: it would be a group, which Protobuf has no more.
fn is_json(record: &Record) -> bool {
    record.value.first() == Some(&b'{')
}

fn undecodable(record: &Record, cause: String) -> FilterError {
    FilterError::Undecodable {
        topic: record.topic.to_string(),
        partition: record.partition,
        offset: record.offset,
        cause,
    }
}

/// The part of a `ChangeRecord` that tables and operations are decided by; the rows are passed over.
#[derive(Clone, PartialEq, prost::Message)]
struct Head {
    #[prost(enumeration = "Operation", tag = "2")]
    operation: i32,
    #[prost(message, optional, tag = "3")]
    relation: Option<HeadRelation>,
}

#[derive(Clone, PartialEq, prost::Message)]
struct HeadRelation {
    #[prost(string, tag = "1")]
    schema: String,
    #[prost(string, tag = "2")]
    table: String,
}

/// The same part of an event of Debezium's, which is the payload where it comes with its schema.
#[derive(Default, Deserialize)]
#[serde(default)]
struct Event {
    payload: Option<Box<Event>>,
    op: Option<String>,
    source: Option<EventSource>,
}

#[derive(Default, Deserialize)]
#[serde(default)]
struct EventSource {
    schema: String,
    table: String,
}

/// Asks a filter about the records of one partition, in their order.
#[derive(Clone, Copy, Debug, Default)]
pub struct Judge {
    /// The last change, and what was said of it.
    last: Option<(Position, bool)>,
}

impl Judge {
    /// Whether a record is delivered. A tombstone, which says nothing of itself, shares the fate of the delete before it.
    ///
    /// # Errors
    /// When the filter cannot judge it.
    pub fn keeps(&mut self, filter: &Filter, record: &Record) -> Result<bool, FilterError> {
        let position = record.coordinate.position;
        let kept = match self.last {
            Some((last, kept)) if record.value.is_empty() && last == position => kept,
            _ if record.value.is_empty() => true,
            _ => filter.keeps(record)?,
        };
        self.last = Some((position, kept));
        Ok(kept)
    }
}

#[cfg(test)]
mod tests {
    use std::sync::Arc;

    use bytes::Bytes;
    use meander_config::TableSelection;
    use meander_proto::v1::{ChangeRecord, Relation};

    use super::*;
    use crate::replay::record::{Coordinate, Passed};

    /// The records that are kept of some, by what each of them is called.
    fn kept<'a>(filter: &ReplayFilter, records: &[(&'a str, Record)]) -> Vec<&'a str> {
        let filter = Filter::new(filter).unwrap();
        let mut judge = Judge::default();
        let kept = records
            .iter()
            .filter(|(_, record)| judge.keeps(&filter, record).unwrap());
        kept.map(|(name, _)| *name).collect()
    }

    fn record(ordinal: u64, key: &str, value: impl Into<Bytes>) -> Record {
        Record {
            coordinate: Coordinate {
                position: format!("1:0/10:{ordinal}").parse().unwrap(),
                part: 0,
            },
            timestamp: 1,
            commit_time: 1000,
            topic: Arc::from("shop.public.trades"),
            partition: 0,
            offset: 0,
            key: Bytes::copy_from_slice(key.as_bytes()),
            value: value.into(),
            headers: Vec::new(),
            passed: Passed::default(),
            next: (0, 1),
            others: Vec::new(),
        }
    }

    fn change(ordinal: u64, operation: Operation, table: &str, key: &str) -> Record {
        let relation = Relation {
            schema: "public".to_owned(),
            table: table.to_owned(),
            columns: Vec::new(),
        };
        let change = ChangeRecord {
            operation: operation.into(),
            relation: (operation != Operation::Message).then_some(relation),
            ..ChangeRecord::default()
        };
        record(ordinal, key, change.encode_to_vec())
    }

    /// One record of each kind.
    fn changes() -> Vec<(&'static str, Record)> {
        let trade = |ordinal, operation, key| change(ordinal, operation, "trades", key);
        vec![
            ("begin", trade(0, Operation::SnapshotBegin, "")),
            ("read 1", trade(1, Operation::Read, r#"{"id":"1"}"#)),
            ("end", trade(2, Operation::SnapshotEnd, "")),
            ("insert 2", trade(3, Operation::Insert, r#"{"id":"2"}"#)),
            ("update 1", trade(4, Operation::Update, r#"{"id":"1"}"#)),
            (
                "order",
                change(5, Operation::Insert, "Order Lines", r#"{"id":"1","line":"7"}"#),
            ),
            ("delete 2", trade(6, Operation::Delete, r#"{"id":"2"}"#)),
            ("truncate", trade(7, Operation::Truncate, "")),
            ("message", change(8, Operation::Message, "", r#"{"prefix":"app"}"#)),
            ("schema", trade(9, Operation::SchemaChange, "")),
            ("gap", trade(10, Operation::SourceGap, "")),
        ]
    }

    fn tables(include: &str) -> Option<TableSelection> {
        Some(TableSelection {
            include: vec![include.to_owned()],
            exclude: vec![],
        })
    }

    fn keys(keys: &[&[(&str, &str)]]) -> Vec<BTreeMap<String, String>> {
        let owned = |(column, value): &(&str, &str)| ((*column).to_owned(), (*value).to_owned());
        keys.iter().map(|key| key.iter().map(owned).collect()).collect()
    }

    #[test]
    fn tables_keep_all_that_is_of_them_and_no_message() {
        let filter = ReplayFilter {
            tables: tables(r#"public."Order Lines""#),
            ..ReplayFilter::default()
        };
        assert_eq!(kept(&filter, &changes()), ["order"]);
    }

    #[test]
    fn operations_keep_the_markers_of_a_snapshot_only_with_all_that_writes_rows() {
        let operations = |operations: &[ReplayOperation]| {
            let filter = ReplayFilter {
                operations: operations.to_vec(),
                ..ReplayFilter::default()
            };
            kept(&filter, &changes()).join(", ")
        };
        use ReplayOperation::{Delete, Insert, Message, Read, Truncate, Update};
        assert_eq!(operations(&[Delete, Truncate, Message]), "delete 2, truncate, message");
        assert_eq!(operations(&[Insert, Read]), "read 1, insert 2, order");
        assert_eq!(
            operations(&[Insert, Update, Read]),
            "begin, read 1, end, insert 2, update 1, order"
        );
    }

    #[test]
    fn keys_keep_rows_that_have_one_of_them_and_what_concerns_every_row() {
        let of = |key: &[(&str, &str)]| {
            let filter = ReplayFilter {
                keys: keys(&[key]),
                ..ReplayFilter::default()
            };
            kept(&filter, &changes()).join(", ")
        };
        assert_eq!(of(&[("id", "1")]), "read 1, update 1, order, truncate, schema, gap");
        assert_eq!(of(&[("id", "1"), ("line", "7")]), "order, truncate, schema, gap");
    }

    #[test]
    fn every_part_has_to_keep_a_record_and_the_expression_is_asked_last() {
        let filter = ReplayFilter {
            tables: tables("public.*"),
            operations: vec![ReplayOperation::Update, ReplayOperation::Delete],
            keys: keys(&[&[("id", "1")], &[("id", "2")]]),
            // It has no answer for any change but these.
            expression: Some("{'Update': 1, 'Delete': 2}[op] > 1".to_owned()),
        };
        assert_eq!(kept(&filter, &changes()), ["delete 2"]);
    }

    #[test]
    fn debezium_s_events_are_told_apart_as_well_and_a_tombstone_goes_with_its_delete() {
        let event = |ordinal, op: &str, key: &str| {
            let payload = format!(r#"{{"before":null,"source":{{"schema":"public","table":"trades"}},"op":"{op}"}}"#);
            record(
                ordinal,
                key,
                format!(r#"{{"schema":{{"type":"struct"}},"payload":{payload}}}"#),
            )
        };
        let wrapped = r#"{"schema":{"type":"struct"},"payload":{"id":2}}"#;
        let begin = r#"{"status":"BEGIN","id":"1:1","event_count":null,"data_collections":null}"#;
        let records = [
            ("begin", record(0, "", begin)),
            ("create 1", event(1, "c", r#"{"id":1}"#)),
            ("delete 1", event(2, "d", r#"{"id":1}"#)),
            ("tombstone 1", record(2, r#"{"id":1}"#, "")),
            ("delete 2", event(3, "d", wrapped)),
            ("tombstone 2", record(3, wrapped, "")),
            ("truncate", event(4, "t", "")),
        ];
        let deletes = ReplayFilter {
            operations: vec![ReplayOperation::Delete],
            keys: keys(&[&[("id", "2")]]),
            ..ReplayFilter::default()
        };
        assert_eq!(kept(&deletes, &records), ["delete 2", "tombstone 2"]);
        let trades = ReplayFilter {
            tables: tables("public.trades"),
            ..ReplayFilter::default()
        };
        assert_eq!(kept(&trades, &records).len(), 6);

        let expression = ReplayFilter {
            expression: Some("true".to_owned()),
            ..ReplayFilter::default()
        };
        let filter = Filter::new(&expression).unwrap();
        let refused = Judge::default().keeps(&filter, &records[1].1).unwrap_err();
        assert_eq!(refused.reason(), "FormatNotExact");
    }

    #[test]
    fn what_is_no_record_of_a_pipeline_is_named() {
        let filter = Filter::new(&ReplayFilter {
            tables: tables("public.*"),
            ..ReplayFilter::default()
        })
        .unwrap();
        for value in ["{", r#"{"op":"x"}"#, "value of somebody else"] {
            let error = Judge::default().keeps(&filter, &record(0, "", value)).unwrap_err();
            assert_eq!(error.reason(), "UndecodableRecord", "{value}");
        }
        let wrong = Filter::new(&ReplayFilter {
            tables: tables("trades"),
            ..ReplayFilter::default()
        });
        assert_eq!(wrong.err().map(|error| error.reason()), Some("InvalidFilter"));
    }
}

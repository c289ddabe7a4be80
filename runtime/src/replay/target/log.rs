//! Writes each change as one line of JSON.

use std::io::{self, Write};

use jiff::Timestamp;
use meander_proto::v1::{Absence, ChangeRecord, Column, Operation, Row, TableSchema, value::Kind};
use prost::Message as _;
use serde_json::{Map, Value, json};
use tokio::sync::mpsc;

use super::{Batch, Tally, Target, TargetError};
use crate::replay::record::Record;

/// Writes to standard output, or to something that stands in for it.
pub struct Log<W>(W);

impl Log<io::Stdout> {
    /// Writes to standard output.
    #[must_use]
    pub fn stdout() -> Self {
        Self(io::stdout())
    }
}

impl<W: Write + Send + 'static> Log<W> {
    /// Writes to `output`.
    pub fn new(output: W) -> Self {
        Self(output)
    }
}

impl<W: Write + Send + 'static> Target for Log<W> {
    async fn run(self, mut batches: mpsc::Receiver<Batch>, tally: Tally) -> Result<(), TargetError> {
        tally.open();
        // Whoever reads the output can be slow, and then the write blocks.
        let written = tokio::task::spawn_blocking(move || {
            let mut output = self.0;
            let mut lines = Vec::new();
            while let Some(batch) = batches.blocking_recv() {
                lines.clear();
                for record in &batch.records {
                    let line = line(record)?;
                    writeln!(lines, "{line}").map_err(TargetError::Output)?;
                }
                output
                    .write_all(&lines)
                    .and_then(|()| output.flush())
                    .map_err(TargetError::Output)?;
                tally.credit(&batch.mark);
            }
            Ok(())
        });
        written
            .await
            .unwrap_or_else(|error| Err(TargetError::Output(io::Error::other(error))))
    }
}

/// A change as an object of JSON.
pub(super) fn line(record: &Record) -> Result<Value, TargetError> {
    let undecodable = |cause: String| TargetError::Undecodable {
        topic: record.topic.to_string(),
        partition: record.partition,
        offset: record.offset,
        cause,
    };
    let commit_time =
        Timestamp::from_microsecond(record.commit_time).map_err(|error| undecodable(error.to_string()))?;
    let mut line = Map::new();
    line.insert("position".to_owned(), json!(record.coordinate.position.to_string()));
    line.insert("part".to_owned(), json!(record.coordinate.part));
    line.insert("commitTime".to_owned(), json!(commit_time.to_string()));
    line.insert("topic".to_owned(), json!(&*record.topic));

    // No ChangeRecord is empty, and none begins so: it would be a group, which Protobuf has no more.
    if record.value.first().is_none_or(|byte| *byte == b'{') {
        for (name, bytes) in [("key", &record.key), ("value", &record.value)] {
            line.insert(
                name.to_owned(),
                payload(bytes).map_err(|error| undecodable(error.to_string()))?,
            );
        }
        return Ok(Value::Object(line));
    }
    let change = ChangeRecord::decode(record.value.as_ref()).map_err(|error| undecodable(error.to_string()))?;
    let relation = change.relation.clone().unwrap_or_default();
    let operation = change.operation().as_str_name().trim_start_matches("OPERATION_");
    line.insert("operation".to_owned(), json!(operation));
    if let Some(message) = &change.message {
        line.insert("prefix".to_owned(), json!(message.prefix));
        line.insert("content".to_owned(), json!(hex(&message.content)));
        return Ok(Value::Object(line));
    }
    line.insert("schema".to_owned(), json!(relation.schema));
    line.insert("table".to_owned(), json!(relation.table));
    if let Some(schemas) = &change.schema_change {
        for (name, schema) in [("schemaBefore", &schemas.before), ("schemaAfter", &schemas.after)] {
            if let Some(schema) = schema {
                line.insert(name.to_owned(), described(schema));
            }
        }
    }
    // A DELETE knows its key only from before, and an UPDATE that changed it is published under the new one.
    let keyed = if change.operation() == Operation::Delete {
        &change.before
    } else {
        &change.after
    };
    if let Some(row) = keyed {
        line.insert("key".to_owned(), values(&relation.columns, row, |column| column.key));
    }
    for (name, row) in [("before", &change.before), ("after", &change.after)] {
        if let Some(row) = row {
            line.insert(name.to_owned(), values(&relation.columns, row, |_| true));
        }
    }
    for (name, row, absence) in [
        ("unchanged", &change.after, Absence::UnchangedToast),
        ("oversizedBefore", &change.before, Absence::Oversized),
        ("oversized", &change.after, Absence::Oversized),
    ] {
        let absent = row.as_ref().map(|row| absent(&relation.columns, row, absence));
        if let Some(absent) = absent.filter(|absent| !absent.is_empty()) {
            line.insert(name.to_owned(), json!(absent));
        }
    }
    Ok(Value::Object(line))
}

/// A key or value of the format DebeziumJson, without its schema; null for a tombstone's value, and for a key that is not there.
pub(in crate::replay) fn payload(bytes: &[u8]) -> serde_json::Result<Value> {
    if bytes.is_empty() {
        return Ok(Value::Null);
    }
    let mut value: Value = serde_json::from_slice(bytes)?;
    Ok(match value.get_mut("payload").map(Value::take) {
        Some(payload) if value["schema"]["type"] == "struct" => payload,
        Some(field) => {
            value["payload"] = field;
            value
        }
        None => value,
    })
}

/// Name to value, without those that the source did not say.
fn values(columns: &[Column], row: &Row, which: impl Fn(&Column) -> bool) -> Value {
    columns
        .iter()
        .zip(&row.values)
        .filter(|(column, _)| which(column))
        .filter_map(|(column, value)| {
            let value = match &value.kind {
                None => Value::Null,
                Some(Kind::Integer(number)) => json!(number),
                Some(Kind::Boolean(flag)) => json!(flag),
                Some(Kind::Float4(number)) => float(f64::from(*number), number),
                Some(Kind::Float8(number)) => float(*number, number),
                Some(Kind::Binary(bytes)) => json!(hex(bytes)),
                Some(Kind::Text(text)) => json!(text),
                Some(Kind::Absent(_)) => return None,
            };
            Some((column.name.clone(), value))
        })
        .collect::<Map<_, _>>()
        .into()
}

/// A version of a table's schema.
fn described(schema: &TableSchema) -> Value {
    let relation = schema.relation.clone().unwrap_or_default();
    let columns: Vec<Value> = relation
        .columns
        .iter()
        .map(|column| {
            json!({
                "name": column.name,
                "type": column.type_name,
                "typeModifier": column.type_modifier,
                "key": column.key,
            })
        })
        .collect();
    let identity = schema.replica_identity().as_str_name();
    json!({
        "version": schema.version,
        "oid": schema.oid,
        "schema": relation.schema,
        "table": relation.table,
        "replicaIdentity": identity.trim_start_matches("REPLICA_IDENTITY_"),
        "columns": columns,
    })
}

/// The columns that the row does not tell for this reason.
fn absent<'a>(columns: &'a [Column], row: &Row, absence: Absence) -> Vec<&'a str> {
    columns
        .iter()
        .zip(&row.values)
        .filter(|(_, value)| value.kind == Some(Kind::Absent(absence.into())))
        .map(|(column, _)| column.name.as_str())
        .collect()
}

/// JSON has no infinities and no NaN; they are written as PostgreSQL writes them.
fn float(number: f64, shown: &impl ToString) -> Value {
    if number.is_nan() {
        json!("NaN")
    } else if number.is_infinite() {
        json!(if number > 0.0 { "Infinity" } else { "-Infinity" })
    } else {
        // Through the shortest text, so that a float4 shows its own digits.
        shown
            .to_string()
            .parse::<f64>()
            .map_or(Value::Null, |number| json!(number))
    }
}

/// As PostgreSQL writes bytea.
fn hex(bytes: &[u8]) -> String {
    bytes.iter().fold(String::from("\\x"), |mut text, byte| {
        for digit in [byte >> 4, byte & 15] {
            text.extend(char::from_digit(digit.into(), 16));
        }
        text
    })
}

#[cfg(test)]
mod tests {
    use std::sync::Arc;

    use meander_proto::v1::{Relation, ReplicaIdentity, SchemaChange, Value as Stored};

    use super::*;
    use crate::replay::record::{Coordinate, Passed};

    fn column(name: &str, key: bool) -> Column {
        Column {
            name: name.to_owned(),
            key,
            ..Column::default()
        }
    }

    fn row(kinds: Vec<Option<Kind>>) -> Option<Row> {
        Some(Row {
            values: kinds.into_iter().map(|kind| Stored { kind }).collect(),
        })
    }

    fn record(value: bytes::Bytes) -> Record {
        Record {
            coordinate: Coordinate {
                position: "1:0/16B3748:3".parse().unwrap(),
                part: 0,
            },
            timestamp: 1_763_632_800_000,
            commit_time: 1_763_632_800_000_123,
            topic: Arc::from("shop.public.trades"),
            partition: 0,
            offset: 5,
            key: bytes::Bytes::new(),
            value,
            passed: Passed::default(),
            next: (0, 1),
            others: Vec::new(),
            headers: Vec::new(),
        }
    }

    #[test]
    fn a_record_of_debezium_is_shown_without_its_schemas_and_a_tombstone_as_null() {
        let shown = |key: &'static str, value: &'static str| {
            let record = Record {
                key: key.into(),
                ..record(value.into())
            };
            let line = line(&record).unwrap();
            (line["key"].clone(), line["value"].clone())
        };
        assert_eq!(
            shown(
                r#"{"schema":{"type":"struct"},"payload":{"id":7}}"#,
                r#"{"schema":{"type":"struct"},"payload":{"op":"c"}}"#
            ),
            (json!({"id": 7}), json!({"op": "c"}))
        );
        assert_eq!(
            shown(r#"{"payload":1,"schema":2}"#, ""),
            (json!({"payload": 1, "schema": 2}), Value::Null)
        );
    }

    #[test]
    fn a_change_of_a_schema_shows_the_old_and_the_new_one() {
        let schema = |version, names: &[&str]| TableSchema {
            version,
            oid: 16_400,
            relation: Some(Relation {
                schema: "public".to_owned(),
                table: "trades".to_owned(),
                columns: names.iter().map(|name| column(name, *name == "id")).collect(),
            }),
            replica_identity: ReplicaIdentity::Full.into(),
        };
        let change = ChangeRecord {
            operation: Operation::SchemaChange.into(),
            relation: schema(2, &["id", "price"]).relation,
            schema_change: Some(SchemaChange {
                before: Some(schema(1, &["id"])),
                after: Some(schema(2, &["id", "price"])),
            }),
            ..ChangeRecord::default()
        };
        let shown = line(&record(change.encode_to_vec().into())).unwrap();
        assert_eq!(
            (&shown["operation"], &shown["table"]),
            (&json!("SCHEMA_CHANGE"), &json!("trades"))
        );
        assert_eq!(shown["schemaBefore"]["columns"].as_array().map(Vec::len), Some(1));
        assert_eq!(
            shown["schemaAfter"],
            json!({
                "version": 2, "oid": 16_400, "schema": "public", "table": "trades", "replicaIdentity": "FULL",
                "columns": [
                    {"name": "id", "type": "", "typeModifier": 0, "key": true},
                    {"name": "price", "type": "", "typeModifier": 0, "key": false},
                ],
            })
        );
    }

    #[test]
    fn a_change_is_one_object_with_named_values() {
        let change = ChangeRecord {
            operation: Operation::Update.into(),
            relation: Some(Relation {
                schema: "public".to_owned(),
                table: "trades".to_owned(),
                columns: vec![
                    column("id", true),
                    column("price", false),
                    column("note", false),
                    column("ratio", false),
                    column("seal", false),
                    column("blob", false),
                ],
            }),
            after: row(vec![
                Some(Kind::Integer(7)),
                Some(Kind::Text("1.50".to_owned())),
                None,
                Some(Kind::Float4(0.1)),
                Some(Kind::Binary(vec![0, 255])),
                Some(Kind::Absent(Absence::UnchangedToast.into())),
            ]),
            ..ChangeRecord::default()
        };
        assert_eq!(
            line(&record(change.encode_to_vec().into())).unwrap(),
            json!({
                "position": "1:0/16B3748:3",
                "part": 0,
                "commitTime": "2025-11-20T10:00:00.000123Z",
                "topic": "shop.public.trades",
                "operation": "UPDATE",
                "schema": "public",
                "table": "trades",
                "key": {"id": 7},
                "after": {"id": 7, "price": "1.50", "note": null, "ratio": 0.1, "seal": "\\x00ff"},
                "unchanged": ["blob"],
            })
        );
    }
}

//! The expression of a filter: CEL over one change of a row.
//!
//! Its cost is bounded before it is ever asked: so many characters, so deep, and no loop within a loop, so that no loop is longer than a
//! row is wide. How deep it is bounds the stack as well: see [`STACK`].

use std::{collections::HashMap, sync::Arc};

use cel::{
    Context, Env, ExecutionError, IdedExpr, Value,
    common::ast::{EntryExpr, Expr},
    objects::Key,
    parser::PrattParser,
};
use meander_config::ReplayOperation;
use meander_proto::v1::{ChangeRecord, Column, Row, value::Kind};
use prost::Message as _;

use super::{FilterError, Subject, is_json, undecodable};
use crate::replay::record::Record;

/// What a thread needs that asks expressions: some 50 KiB for each level, without optimisations.
pub(in crate::replay) const STACK: usize = 16 << 20;
const LONGEST: usize = 2048;
const DEEPEST: u16 = 64;
/// Errors of the parser quote the whole expression.
const LONGEST_CAUSE: usize = 300;

const BEFORE: &str = "before";
const AFTER: &str = "after";
const OP: &str = "op";
const TABLE: &str = "table";
const SCHEMA: &str = "schema";
const COMMIT_TIME: &str = "commitTime";
const VARIABLES: [&str; 6] = [BEFORE, AFTER, OP, TABLE, SCHEMA, COMMIT_TIME];
/// Names of types, which can be compared with `type(…)`.
const TYPES: [&str; 10] = [
    "bool",
    "bytes",
    "double",
    "int",
    "list",
    "map",
    "null_type",
    "string",
    "type",
    "uint",
];

/// An expression that can be asked.
pub(super) struct Expression {
    expression: IdedExpr,
    env: Arc<Env>,
    asks_before: bool,
    asks_after: bool,
}

impl Expression {
    pub(super) fn new(text: &str) -> Result<Self, FilterError> {
        if text.len() > LONGEST {
            let message = format!("it is longer than {LONGEST} bytes");
            return Err(FilterError::InvalidExpression(message));
        }
        let expression = PrattParser::new()
            .max_recursion_depth(DEEPEST)
            .parse(text)
            .map_err(|error| FilterError::InvalidExpression(shortened(&error.to_string())))?;
        let mut survey = Survey::default();
        survey.look(&expression, 0).map_err(FilterError::InvalidExpression)?;
        let [asks_before, asks_after] = [BEFORE, AFTER].map(|row| survey.asked.contains(&row));
        Ok(Self {
            expression,
            env: Arc::new(Env::stdlib()),
            asks_before,
            asks_after,
        })
    }

    /// Whether it is true for a change of a row.
    pub(super) fn holds(
        &self,
        record: &Record,
        subject: &Subject,
        operation: ReplayOperation,
    ) -> Result<bool, FilterError> {
        if is_json(record) {
            return Err(FilterError::NotExact {
                topic: record.topic.to_string(),
            });
        }
        let no_answer = |cause: String| FilterError::NoAnswer {
            position: record.coordinate.position,
            topic: record.topic.to_string(),
            partition: record.partition,
            offset: record.offset,
            cause,
        };
        let mut context = Context::with_env(Arc::clone(&self.env));
        if self.asks_before || self.asks_after {
            let change =
                ChangeRecord::decode(record.value.as_ref()).map_err(|error| undecodable(record, error.to_string()))?;
            let columns = change.relation.map(|relation| relation.columns).unwrap_or_default();
            for (name, asked, row) in [
                (BEFORE, self.asks_before, change.before),
                (AFTER, self.asks_after, change.after),
            ] {
                if asked {
                    context.add_variable_from_value(name, row.map_or(Value::Null, |row| named(&columns, row)));
                }
            }
        }
        context.add_variable_from_value(OP, name_of(operation));
        context.add_variable_from_value(TABLE, subject.table.as_str());
        context.add_variable_from_value(SCHEMA, subject.schema.as_str());
        if let Some(time) = chrono::DateTime::from_timestamp_micros(record.commit_time) {
            context.add_variable_from_value(COMMIT_TIME, Value::Timestamp(time.fixed_offset()));
        }
        match Value::resolve(&self.expression, &context) {
            Ok(Value::Bool(holds)) => Ok(holds),
            Ok(_) => Err(no_answer("it is neither true nor false".to_owned())),
            Err(error) => Err(no_answer(cause(&error))),
        }
    }
}

/// As it is written in a ReplayJob.
fn name_of(operation: ReplayOperation) -> &'static str {
    match operation {
        ReplayOperation::Insert => "Insert",
        ReplayOperation::Update => "Update",
        ReplayOperation::Delete => "Delete",
        ReplayOperation::Truncate => "Truncate",
        ReplayOperation::Read => "Read",
        ReplayOperation::Message => "Message",
        ReplayOperation::SchemaChange => "SchemaChange",
        ReplayOperation::SourceGap => "SourceGap",
    }
}

/// Name of a column to its value, without those that the source did not say.
fn named(columns: &[Column], row: Row) -> Value {
    let mut values = HashMap::with_capacity(columns.len());
    for (column, value) in columns.iter().zip(row.values) {
        let value = match value.kind {
            None => Value::Null,
            Some(Kind::Integer(number)) => Value::Int(number),
            Some(Kind::Boolean(flag)) => Value::Bool(flag),
            Some(Kind::Float4(number)) => Value::Float(number.into()),
            Some(Kind::Float8(number)) => Value::Float(number),
            Some(Kind::Binary(bytes)) => Value::Bytes(Arc::new(bytes)),
            Some(Kind::Text(text)) => Value::String(Arc::new(text)),
            Some(Kind::Absent(_)) => continue,
        };
        values.insert(Key::String(Arc::new(column.name.clone())), value);
    }
    Value::from(values)
}

/// What went wrong, in words without a value of a row: they are nobody's business who reads the status.
fn cause(error: &ExecutionError) -> String {
    match error {
        ExecutionError::NoSuchOverload(overload) => overload.to_string(),
        ExecutionError::NoSuchKey(name) => format!("there is no {name}"),
        ExecutionError::UndeclaredReference(name) => format!("there is no function {name}"),
        ExecutionError::InvalidArgumentCount { .. } => "a function has too few or too many arguments".to_owned(),
        ExecutionError::DivisionByZero(_) | ExecutionError::RemainderByZero(_) => "it divides by zero".to_owned(),
        ExecutionError::Overflow(..) => "a number is too large".to_owned(),
        ExecutionError::FunctionError { function, .. } => format!("{function}() does not take the value"),
        _ => "a value is not of the type that is needed there".to_owned(),
    }
}

fn shortened(message: &str) -> String {
    let end = message.floor_char_boundary(LONGEST_CAUSE);
    message[..end].replace('\n', " ")
}

/// Looks through an expression before it is asked.
#[derive(Default)]
struct Survey<'a> {
    /// The variables that it asks.
    asked: Vec<&'a str>,
    /// Names that loops give to what they go through.
    bound: Vec<&'a str>,
    in_loop: bool,
}

impl<'a> Survey<'a> {
    fn look(&mut self, expression: &'a IdedExpr, depth: u16) -> Result<(), String> {
        if depth > DEEPEST {
            return Err(format!("it is nested deeper than {DEEPEST}"));
        }
        let depth = depth + 1;
        match &expression.expr {
            Expr::Unspecified | Expr::Literal(_) => {}
            Expr::Ident(name) => self.name(name)?,
            Expr::Select(select) => self.look(&select.operand, depth)?,
            Expr::Call(call) => {
                for part in call.target.as_deref().into_iter().chain(&call.args) {
                    self.look(part, depth)?;
                }
            }
            Expr::List(list) => {
                for element in &list.elements {
                    self.look(element, depth)?;
                }
            }
            Expr::Map(map) => self.entries(map.entries.iter().map(|entry| &entry.expr), depth)?,
            Expr::Struct(fields) => self.entries(fields.entries.iter().map(|entry| &entry.expr), depth)?,
            Expr::Comprehension(looped) => {
                self.look(&looped.iter_range, depth)?;
                if std::mem::replace(&mut self.in_loop, true) {
                    return Err("it has a loop (all, exists, exists_one, filter or map) within another".to_owned());
                }
                let before = self.bound.len();
                self.bound.extend([looped.iter_var.as_str(), looped.accu_var.as_str()]);
                self.bound.extend(looped.iter_var2.as_deref());
                for part in [&looped.accu_init, &looped.loop_cond, &looped.loop_step, &looped.result] {
                    self.look(part, depth)?;
                }
                self.bound.truncate(before);
                self.in_loop = false;
            }
        }
        Ok(())
    }

    fn entries(&mut self, entries: impl Iterator<Item = &'a EntryExpr>, depth: u16) -> Result<(), String> {
        for entry in entries {
            match entry {
                EntryExpr::StructField(field) => self.look(&field.value, depth)?,
                EntryExpr::MapEntry(entry) => {
                    self.look(&entry.key, depth)?;
                    self.look(&entry.value, depth)?;
                }
            }
        }
        Ok(())
    }

    fn name(&mut self, name: &'a str) -> Result<(), String> {
        if self.bound.contains(&name) || TYPES.contains(&name) {
            return Ok(());
        }
        if !VARIABLES.contains(&name) {
            let known = VARIABLES.join(", ");
            return Err(format!(
                "{name} is not known: there are {known}, and columns are written after.{name}"
            ));
        }
        self.asked.push(name);
        Ok(())
    }
}

#[cfg(test)]
mod tests {
    use bytes::Bytes;
    use meander_proto::v1::{Absence, Operation, Relation, Value as Stored};

    use super::*;
    use crate::replay::record::{Coordinate, Passed};

    fn record(change: &ChangeRecord) -> Record {
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
            key: Bytes::new(),
            value: change.encode_to_vec().into(),
            headers: Vec::new(),
            passed: Passed::default(),
            next: (0, 1),
            others: Vec::new(),
        }
    }

    /// An insert of a row with a value of each kind.
    fn insert() -> Record {
        let row = [
            ("id", Some(Kind::Integer(7))),
            ("price", Some(Kind::Text("101.50".to_owned()))),
            ("note", None),
            ("ratio", Some(Kind::Float8(0.5))),
            ("open", Some(Kind::Boolean(true))),
            ("blob", Some(Kind::Absent(Absence::UnchangedToast.into()))),
        ];
        let columns = row.iter().map(|(name, _)| Column {
            name: (*name).to_owned(),
            ..Column::default()
        });
        record(&ChangeRecord {
            operation: Operation::Insert.into(),
            relation: Some(Relation {
                schema: "public".to_owned(),
                table: "trades".to_owned(),
                columns: columns.collect(),
            }),
            after: Some(Row {
                values: row.into_iter().map(|(_, kind)| Stored { kind }).collect(),
            }),
            ..ChangeRecord::default()
        })
    }

    /// Asked on a stack of the size that the reader has.
    fn asked(text: &str) -> Result<bool, FilterError> {
        let text = text.to_owned();
        let thread = std::thread::Builder::new().stack_size(STACK).spawn(move || {
            let record = insert();
            Expression::new(&text)?.holds(&record, &Subject::of(&record)?, ReplayOperation::Insert)
        });
        thread.unwrap().join().unwrap()
    }

    #[test]
    fn every_variable_can_be_asked() {
        for (text, expected) in [
            ("after.id == 7 && before == null", true),
            ("double(after.price) > 100.0", true),
            ("after.note == null && after.open && after.ratio < 1.0", true),
            ("has(after.blob)", false),
            ("has(after.note)", true),
            (
                "op in ['Insert', 'Update'] && table == 'trades' && schema == 'public'",
                true,
            ),
            ("commitTime < timestamp('2025-11-20T10:00:00Z')", false),
            ("[1, 7].exists(id, id == after.id)", true),
            ("type(after.id) == int && after.price.matches('^10[0-9][.]')", true),
            // A part that decides alone hides what the other has no answer for.
            ("after.id == 7 || after.nothing", true),
        ] {
            assert_eq!(asked(text).unwrap(), expected, "{text}");
        }
    }

    #[test]
    fn what_has_no_answer_names_the_change_and_no_value_of_it() {
        for (text, cause) in [
            ("after.price > 100", "'_>_' applied to '(string, int)'"),
            ("after.blob == 'x'", "there is no blob"),
            ("after.id", "neither true nor false"),
            ("int(after.price) > 1", "int() does not take the value"),
            ("after.id / 0 == 1", "divides by zero"),
            ("before.id == 7", "1:0/16B3748:3"),
            ("lower(after.price) == ''", "there is no function lower"),
        ] {
            let error = asked(text).unwrap_err();
            assert!(matches!(error, FilterError::NoAnswer { .. }), "{text}: {error}");
            let message = error.to_string();
            assert!(message.contains(cause), "{text}: {message}");
            assert!(!message.contains("101.50"), "{text}: {message}");
        }
    }

    #[test]
    fn what_means_nothing_or_costs_too_much_is_refused() {
        let many = |part: &str, times| part.repeat(times);
        for (text, cause) in [
            ("after.id ==".to_owned(), "Syntax error"),
            ("price > 100".to_owned(), "columns are written after.price"),
            ("[1].all(a, [2].all(b, a < b))".to_owned(), "within another"),
            (many("1+", 100) + "1 > 0", "nested deeper"),
            (many("(", 1000), "ERROR"),
            (many("[", 500) + &many("]", 500), "ERROR"),
            (many("size(", 300) + "1" + &many(")", 300), "ERROR"),
            (many("x", 3000), "longer than"),
        ] {
            let error = asked(&text).unwrap_err();
            assert!(matches!(error, FilterError::InvalidExpression(_)), "{text}: {error}");
            assert!(error.to_string().contains(cause), "{text}: {error}");
            assert!(error.to_string().len() < 500, "{text}: {error}");
        }
    }

    #[test]
    fn the_deepest_expression_that_is_taken_is_answered() {
        let deepest = usize::from(DEEPEST) - 1;
        assert!(asked(&("1+".repeat(deepest) + "1 > 0")).unwrap());
    }
}

//! A table of the target, and the statements that change it.
//!
//! Values come as text and are cast to the type that the column has here, so that nothing is lost on the way and the types need not be
//! those of the source. A row is found by the key of its record, for which there has to be a unique index; a table without a key
//! (replica identity FULL) is a bag of rows, of which one that is equal in every column is taken.

use std::{collections::HashMap, fmt::Write as _};

use meander_proto::v1::{self, Relation};
use tokio_postgres::{Client, Statement, types::Type};

use super::TargetError;
use crate::source::postgres::wire::quote_identifier;

const TABLE: &str = "
    SELECT c.oid,
           c.relkind IN ('r', 'p'),
           has_schema_privilege(n.oid, 'USAGE') AND has_table_privilege(c.oid, 'SELECT') AND has_table_privilege(c.oid, 'INSERT')
               AND has_table_privilege(c.oid, 'UPDATE') AND has_table_privilege(c.oid, 'DELETE'),
           row_security_active(c.oid),
           EXISTS (SELECT FROM pg_publication_tables p
                   JOIN pg_namespace s ON s.nspname = p.schemaname
                   JOIN pg_class t ON t.relnamespace = s.oid AND t.relname = p.tablename
                   WHERE t.oid = c.oid OR t.oid IN (
                       SELECT relid FROM pg_partition_tree(c.oid) UNION ALL SELECT relid FROM pg_partition_ancestors(c.oid)))
    FROM pg_class c JOIN pg_namespace n ON n.oid = c.relnamespace
    WHERE n.nspname = $1 AND c.relname = $2";

/// With -1 as its modifier a type is named without one: a cast to varchar(3) would cut what an assignment refuses.
const COLUMNS: &str = "
    SELECT attname::text, format_type(atttypid, -1), attgenerated <> '', attidentity = 'a'
    FROM pg_attribute WHERE attrelid = $1 AND attnum > 0 AND NOT attisdropped";

/// The columns of each unique index that rows can be found by, with the operator that is equality to the index (strategy 3 of a B-tree).
const INDEXES: &str = "
    SELECT i.indexrelid, a.attname::text, format('OPERATOR(%I.%s)', s.nspname, o.oprname)
    FROM pg_index i
    CROSS JOIN LATERAL unnest(i.indkey::int2[], i.indclass::oid[]) WITH ORDINALITY k (number, class, place)
    JOIN pg_attribute a ON a.attrelid = i.indrelid AND a.attnum = k.number
    JOIN pg_opclass c ON c.oid = k.class
    JOIN pg_amop m ON m.amopfamily = c.opcfamily AND m.amoplefttype = c.opcintype AND m.amoprighttype = c.opcintype
                  AND m.amopstrategy = 3
    JOIN pg_operator o ON o.oid = m.amopopr
    JOIN pg_namespace s ON s.oid = o.oprnamespace
    WHERE i.indrelid = $1 AND i.indisunique AND i.indimmediate AND i.indisvalid AND i.indpred IS NULL AND i.indexprs IS NULL
      AND k.place <= i.indnkeyatts
    ORDER BY i.indisprimary DESC, i.indexrelid, k.place";

/// Statements that are kept of a table: there is one for each set of columns that an UPDATE leaves out.
const MOST_STATEMENTS: usize = 64;

/// A table of the target, for records that have these columns.
pub struct Table {
    /// As SQL writes it.
    pub name: String,
    /// The source's columns.
    source: Vec<v1::Column>,
    columns: Vec<Column>,
    /// Indexes of the key's columns; none of a table without a key.
    pub key: Vec<usize>,
    statements: HashMap<Shape, Statement>,
}

#[derive(Clone, Debug)]
struct Column {
    name: String,
    /// What text is cast to.
    type_: String,
    /// Computed here, and so not written.
    generated: bool,
    /// GENERATED ALWAYS AS IDENTITY: PostgreSQL lets nobody change it in a row that is there.
    fixed: bool,
    /// For a column of the key, what is equality to its index.
    equals: String,
}

/// What a statement does.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub enum Verb {
    /// Adds rows.
    Insert,
    /// Adds rows, or replaces those with the same key.
    Upsert,
    /// Changes some columns of the rows with these keys.
    Update,
    /// Takes the rows with these keys away.
    Delete,
    /// Takes a row away whose key another is about to get, if that one is there.
    MakeRoom,
    /// Changes a row and its key.
    Rekey,
    /// Takes away one of the rows that are equal to this one.
    DeleteOne,
    /// Changes one of the rows that are equal to this one.
    UpdateOne,
}

impl Verb {
    /// Whether one statement does it for any number of rows.
    #[must_use]
    pub fn takes_many(self) -> bool {
        matches!(self, Self::Insert | Self::Upsert | Self::Update | Self::Delete)
    }

    /// Which rows it looks for, apart from the new ones: by their key, or by every column.
    fn finds(self) -> Finds {
        match self {
            Self::Insert | Self::Upsert | Self::Update => Finds::Nothing,
            Self::Delete | Self::MakeRoom | Self::Rekey => Finds::Key,
            Self::DeleteOne | Self::UpdateOne => Finds::Row,
        }
    }
}

enum Finds {
    Nothing,
    Key,
    Row,
}

/// A statement but for its rows.
#[derive(Clone, Debug, PartialEq, Eq, Hash)]
pub struct Shape {
    /// What it does.
    pub verb: Verb,
    /// Indexes of the columns that are written.
    pub written: Vec<usize>,
}

impl Table {
    /// Looks the table up. `marked` says whether what is written carries an origin.
    ///
    /// # Errors
    /// When it is not there, or is not as it has to be.
    pub async fn look_up(client: &Client, relation: &Relation, marked: bool, user: &str) -> Result<Self, LookUp> {
        let name = quoted(relation);
        let Some(found) = client
            .query_opt(TABLE, &[&relation.schema, &relation.table])
            .await?
            .filter(|row| row.get(1))
        else {
            return Err(TargetError::NoTable { table: name }.into());
        };
        let (oid, allowed, hidden, published): (u32, bool, bool, bool) =
            (found.get(0), found.get(2), found.get(3), found.get(4));
        if !allowed {
            let (schema, user) = (quote_identifier(&relation.schema), quote_identifier(user));
            return Err(TargetError::TableNotWritable {
                table: name,
                schema,
                user,
            }
            .into());
        }
        if hidden {
            let user = quote_identifier(user);
            return Err(TargetError::RowsHidden { table: name, user }.into());
        }
        if published && !marked {
            let user = quote_identifier(user);
            return Err(TargetError::WouldBeCaptured { table: name, user }.into());
        }
        let there: HashMap<String, (String, bool, bool)> = client
            .query(COLUMNS, &[&oid])
            .await?
            .iter()
            .map(|row| (row.get(0), (row.get(1), row.get(2), row.get(3))))
            .collect();
        let mut columns = Vec::with_capacity(relation.columns.len());
        for column in &relation.columns {
            let Some((type_, generated, fixed)) = there.get(&column.name) else {
                return Err(TargetError::NoColumn {
                    table: name,
                    column: quote_identifier(&column.name),
                    type_: column.type_name.clone(),
                }
                .into());
            };
            columns.push(Column {
                name: quote_identifier(&column.name),
                type_: type_.clone(),
                generated: *generated,
                fixed: *fixed,
                equals: String::new(),
            });
        }
        let key: Vec<usize> = (0..columns.len())
            .filter(|&index| relation.columns[index].key)
            .collect();
        if !key.is_empty() {
            let mut indexes: Vec<(u32, Vec<(String, String)>)> = Vec::new();
            for row in client.query(INDEXES, &[&oid]).await? {
                let (index, column) = (row.get(0), (row.get(1), row.get(2)));
                match indexes.last_mut().filter(|(last, _)| *last == index) {
                    Some((_, columns)) => columns.push(column),
                    None => indexes.push((index, vec![column])),
                }
            }
            let fits = |columns: &Vec<(String, String)>| {
                columns.len() == key.len()
                    && (key.iter()).all(|&k| columns.iter().any(|(name, _)| *name == relation.columns[k].name))
            };
            let Some((_, operators)) = indexes.into_iter().find(|(_, columns)| fits(columns)) else {
                let columns: Vec<&str> = key.iter().map(|&index| columns[index].name.as_str()).collect();
                return Err(TargetError::NoUniqueIndex {
                    table: name,
                    columns: columns.join(", "),
                }
                .into());
            };
            for (name, operator) in operators {
                for (column, described) in columns.iter_mut().zip(&relation.columns) {
                    if described.name == name {
                        column.equals.clone_from(&operator);
                    }
                }
            }
        }
        Ok(Self {
            name,
            source: relation.columns.clone(),
            columns,
            key,
            statements: HashMap::new(),
        })
    }

    /// Whether records with these columns are written by the same statements.
    #[must_use]
    pub fn is_for(&self, relation: &Relation) -> bool {
        self.source == relation.columns
    }

    /// Columns that are written where a row is told as a whole.
    pub fn written(&self) -> impl Iterator<Item = usize> + '_ {
        (0..self.columns.len()).filter(|&index| !self.columns[index].generated)
    }

    /// Whether a column has the value that its row was inserted with.
    #[must_use]
    pub fn is_fixed(&self, index: usize) -> bool {
        self.columns[index].fixed
    }

    /// What is set in a row that is there and keeps its key. A row of nothing but its key is written again too, so that it is known to be
    /// still there; none can be where the key is fixed.
    #[must_use]
    pub fn set_in_place(&self, written: &[usize]) -> Vec<usize> {
        let (key, others): (Vec<usize>, Vec<usize>) = (written.iter().copied())
            .filter(|&index| !self.is_fixed(index))
            .partition(|index| self.key.contains(index));
        if others.is_empty() { key } else { others }
    }

    /// Columns by whose values a statement finds its rows.
    #[must_use]
    pub fn found_by(&self, verb: Verb) -> Vec<usize> {
        match verb.finds() {
            Finds::Nothing => Vec::new(),
            Finds::Key => self.key.clone(),
            Finds::Row => self.written().collect(),
        }
    }

    /// Whether the server need not be asked for the statement of this shape.
    #[must_use]
    pub fn is_prepared(&self, shape: &Shape) -> bool {
        self.statements.contains_key(shape)
    }

    /// The statement of this shape.
    ///
    /// # Errors
    /// Those of the connection.
    pub async fn statement(&mut self, client: &Client, shape: &Shape) -> Result<Statement, tokio_postgres::Error> {
        if let Some(statement) = self.statements.get(shape) {
            return Ok(statement.clone());
        }
        let parameters = self.found_by(shape.verb).len() + shape.written.len();
        let types = vec![Type::TEXT_ARRAY; parameters];
        let statement = client.prepare_typed(&self.sql(shape), &types).await?;
        if self.statements.len() >= MOST_STATEMENTS {
            self.statements.clear();
        }
        self.statements.insert(shape.clone(), statement.clone());
        Ok(statement)
    }

    /// The rows that were there before this transaction id and were not written since are taken away; none where rows that are there
    /// cannot be written again.
    #[must_use]
    pub fn sweep(&self) -> Option<String> {
        let written: Vec<usize> = self.written().collect();
        let sweep = format!("DELETE FROM {} t WHERE age(t.xmin) > age($1::text::xid)", self.name);
        (!self.set_in_place(&written).is_empty()).then_some(sweep)
    }

    /// Parameters are arrays: first the columns that rows are found by (`f`), then those that are written (`w`).
    fn sql(&self, shape: &Shape) -> String {
        let found = self.found_by(shape.verb);
        let table = &self.name;
        let value = |place: char, index: usize| format!("u.{place}{index}::{}", self.columns[index].type_);
        let list = |indexes: &[usize], item: &dyn Fn(usize) -> String, between: &str| {
            let items: Vec<String> = indexes.iter().map(|&index| item(index)).collect();
            items.join(between)
        };
        let names = |indexes: &[usize]| list(indexes, &|index| self.columns[index].name.clone(), ", ");
        let set = |indexes: &[usize]| {
            list(
                indexes,
                &|index| format!("{} = {}", self.columns[index].name, value('w', index)),
                ", ",
            )
        };
        let by_key = |row: &str, place: char| {
            list(
                &self.key,
                &|index| {
                    let Column { name, equals, .. } = &self.columns[index];
                    format!("{row}.{name} {equals} ({})", value(place, index))
                },
                " AND ",
            )
        };
        // Not every type has an equality; every one has a text.
        let like = list(
            &found,
            &|index| {
                let name = &self.columns[index].name;
                format!("o.{name}::text IS NOT DISTINCT FROM ({})::text", value('f', index))
            },
            " AND ",
        );
        // Found once and gone to by its place: as a condition on each row of the table, it would be looked for as often.
        let first = format!(
            "CROSS JOIN LATERAL (SELECT o.tableoid AS part, o.ctid AS place FROM {table} o WHERE {like} LIMIT 1) first
             WHERE t.tableoid = first.part AND t.ctid = first.place"
        );
        let mut rows = String::from("unnest(");
        let places: Vec<String> = (found.iter().map(|index| format!("f{index}")))
            .chain(shape.written.iter().map(|index| format!("w{index}")))
            .collect();
        for number in 1..=places.len() {
            let _ = write!(rows, "{}${number}", if number == 1 { "" } else { ", " });
        }
        let _ = write!(rows, ") u ({})", places.join(", "));
        match shape.verb {
            Verb::Insert | Verb::Upsert => {
                let (columns, values) = (
                    names(&shape.written),
                    list(&shape.written, &|index| value('w', index), ", "),
                );
                let mut sql =
                    format!("INSERT INTO {table} ({columns}) OVERRIDING SYSTEM VALUE SELECT {values} FROM {rows}");
                if shape.verb == Verb::Upsert {
                    let set = list(
                        &self.set_in_place(&shape.written),
                        &|index| format!("{0} = EXCLUDED.{0}", self.columns[index].name),
                        ", ",
                    );
                    let key = names(&self.key);
                    let _ = match set.as_str() {
                        "" => write!(sql, " ON CONFLICT ({key}) DO NOTHING"),
                        _ => write!(sql, " ON CONFLICT ({key}) DO UPDATE SET {set}"),
                    };
                }
                sql
            }
            Verb::Update => format!(
                "UPDATE {table} t SET {} FROM {rows} WHERE {}",
                set(&self.set_in_place(&shape.written)),
                by_key("t", 'w')
            ),
            Verb::Delete => format!("DELETE FROM {table} t USING {rows} WHERE {}", by_key("t", 'f')),
            Verb::MakeRoom => format!(
                "DELETE FROM {table} t USING {rows} WHERE {} AND EXISTS (SELECT FROM {table} o WHERE {})",
                by_key("t", 'w'),
                by_key("o", 'f')
            ),
            Verb::Rekey => format!(
                "UPDATE {table} t SET {} FROM {rows} WHERE {}",
                set(&shape.written),
                by_key("t", 'f')
            ),
            Verb::DeleteOne => format!("DELETE FROM {table} t USING {rows} {first}"),
            Verb::UpdateOne => format!("UPDATE {table} t SET {} FROM {rows} {first}", set(&shape.written)),
        }
    }
}

/// A table as SQL writes it.
#[must_use]
pub fn quoted(relation: &Relation) -> String {
    format!(
        "{}.{}",
        quote_identifier(&relation.schema),
        quote_identifier(&relation.table)
    )
}

/// Why a table cannot be looked up.
pub enum LookUp {
    /// It is not as it has to be.
    Unfit(Box<TargetError>),
    /// The connection.
    Failed(tokio_postgres::Error),
}

impl From<TargetError> for LookUp {
    fn from(error: TargetError) -> Self {
        Self::Unfit(Box::new(error))
    }
}

impl From<tokio_postgres::Error> for LookUp {
    fn from(error: tokio_postgres::Error) -> Self {
        Self::Failed(error)
    }
}

//! What a table looks like to a reader of its rows: the same columns that `pgoutput` sends, the key that orders them, and the SQL.

use std::fmt::Write as _;

use tokio_postgres::{Client, Error};

use crate::source::postgres::{
    hypertable::OWN_SCHEMAS,
    pgoutput::{ColumnMessage, Datum, RelationMessage, Tuple},
    wire::{quote_identifier, quote_literal},
};

/// A table as it is in the transaction that asked.
#[derive(Clone, Debug, PartialEq)]
pub struct Shape {
    /// OID of the table.
    pub oid: u32,
    /// Schema.
    pub schema: String,
    /// Name.
    pub table: String,
    /// OID of the table's membership of the publication: another one when it left and came back. 0 where it is a member by its schema,
    /// or as every table is.
    pub member: u32,
    replica_identity: u8,
    partitioned: bool,
    hypertable: bool,
    row_filter: Option<String>,
    columns: Vec<Column>,
    /// Indexes of the key's columns, in the order of the index.
    key: Vec<usize>,
}

#[derive(Clone, Debug, PartialEq)]
struct Column {
    name: String,
    type_oid: u32,
    type_modifier: i32,
    /// The type as a cast writes it.
    sql_type: String,
    type_schema: String,
    type_name: String,
    identity: bool,
    /// How the key's index orders it, where it is a part of the key.
    ordering: Ordering,
}

/// How an index orders a column, as SQL writes it: no name is looked up in a search path, and what compares is what the index has.
#[derive(Clone, Debug, Default, PartialEq)]
struct Ordering {
    /// ` COLLATE …`, or nothing.
    collate: String,
    less: String,
    equal: String,
    at_least: String,
    greater: String,
}

impl Shape {
    /// Asks the catalog. None if the table is gone, or not in the publication any more.
    ///
    /// # Errors
    /// Those of the connection.
    pub async fn read(client: &Client, publication: &str, oid: u32) -> Result<Option<Self>, Error> {
        let version: i32 = client
            .query_one("SELECT current_setting('server_version_num')::int", &[])
            .await?
            .get(0);
        // From 15 on a publication can hold columns and rows of a table; before 18 no generated column is sent.
        let (column_list, row_filter) = if version >= 150_000 {
            ("p.attnames::text[]", "p.rowfilter")
        } else {
            ("NULL::text[]", "NULL::text")
        };
        let is_sent = if version >= 180_000 {
            "true"
        } else {
            "a.attgenerated = ''"
        };
        let table = client
            .query_opt(
                &format!(
                    "SELECT n.nspname::text, c.relname::text, c.relreplident::text, c.relkind = 'p',
                            {column_list}, {row_filter}, coalesce(r.oid, 0),
                            EXISTS (SELECT FROM pg_catalog.pg_inherits i
                                    JOIN pg_catalog.pg_class k ON k.oid = i.inhrelid
                                    JOIN pg_catalog.pg_namespace s ON s.oid = k.relnamespace
                                    WHERE i.inhparent = c.oid AND pg_catalog.starts_with(s.nspname::text, $3))
                     FROM pg_catalog.pg_class c
                     JOIN pg_catalog.pg_namespace n ON n.oid = c.relnamespace
                     JOIN pg_catalog.pg_publication b ON b.pubname = $2
                     JOIN pg_catalog.pg_publication_tables p
                       ON p.schemaname = n.nspname AND p.tablename = c.relname AND p.pubname = b.pubname
                     LEFT JOIN pg_catalog.pg_publication_rel r ON r.prpubid = b.oid AND r.prrelid = c.oid
                     WHERE c.oid = $1"
                ),
                &[&oid, &publication, &OWN_SCHEMAS],
            )
            .await?;
        let Some(table) = table else { return Ok(None) };
        let column_list: Option<Vec<String>> = table.get(4);
        let replica_identity: String = table.get(2);
        let rows = client
            .query(
                &format!(
                    "SELECT a.attname::text, a.atttypid, a.atttypmod,
                            pg_catalog.format_type(a.atttypid, a.atttypmod), tn.nspname::text, t.typname::text,
                            k.n, ' COLLATE ' || quote_ident(cn.nspname) || '.' || quote_ident(l.collname),
                            i.indisreplident OR (i.indisprimary AND c.relreplident = 'd'), {is_sent},
                            ARRAY(SELECT 'OPERATOR(' || quote_ident(pn.nspname) || '.' || p.oprname || ')'
                                  FROM pg_catalog.pg_opclass o
                                  JOIN pg_catalog.pg_amop m ON m.amopfamily = o.opcfamily
                                    AND m.amoplefttype = o.opcintype AND m.amoprighttype = o.opcintype
                                  JOIN pg_catalog.pg_operator p ON p.oid = m.amopopr
                                  JOIN pg_catalog.pg_namespace pn ON pn.oid = p.oprnamespace
                                  WHERE o.oid = k.opclass AND m.amoppurpose = 's' ORDER BY m.amopstrategy)
                     FROM pg_catalog.pg_attribute a
                     JOIN pg_catalog.pg_class c ON c.oid = a.attrelid
                     JOIN pg_catalog.pg_type t ON t.oid = a.atttypid
                     JOIN pg_catalog.pg_namespace tn ON tn.oid = t.typnamespace
                     LEFT JOIN pg_catalog.pg_index i ON i.indrelid = c.oid
                       AND CASE c.relreplident WHEN 'i' THEN i.indisreplident ELSE i.indisprimary END
                     LEFT JOIN LATERAL unnest(i.indkey::int2[], i.indcollation::oid[], i.indclass::oid[])
                       WITH ORDINALITY AS k(attnum, collation_oid, opclass, n)
                       ON k.attnum = a.attnum AND k.n <= i.indnkeyatts
                     LEFT JOIN pg_catalog.pg_collation l ON l.oid = k.collation_oid
                     LEFT JOIN pg_catalog.pg_namespace cn ON cn.oid = l.collnamespace
                     WHERE a.attrelid = $1 AND a.attnum > 0 AND NOT a.attisdropped
                     ORDER BY a.attnum"
                ),
                &[&oid],
            )
            .await?;
        let mut columns = Vec::with_capacity(rows.len());
        let mut key = Vec::new();
        let mut whole_key = true;
        for row in &rows {
            let name: String = row.get(0);
            let place: Option<i64> = row.get(6);
            if !row.get::<_, bool>(9) || column_list.as_ref().is_some_and(|list| !list.contains(&name)) {
                // Rows cannot be told apart by a key that is not sent in full.
                whole_key &= place.is_none();
                continue;
            }
            if let Some(place) = place {
                key.push((place, columns.len()));
            }
            // The strategies of a B-tree, which every unique index is, in their order.
            let operators: Vec<String> = row.get(10);
            let ordering = match <[String; 5]>::try_from(operators) {
                Ok([less, _, equal, at_least, greater]) => Ordering {
                    collate: row.get::<_, Option<String>>(7).unwrap_or_default(),
                    less,
                    equal,
                    at_least,
                    greater,
                },
                Err(_) => {
                    whole_key &= place.is_none();
                    Ordering::default()
                }
            };
            columns.push(Column {
                name,
                type_oid: row.get(1),
                type_modifier: row.get(2),
                sql_type: row.get(3),
                type_schema: row.get(4),
                type_name: row.get(5),
                identity: place.is_some() && row.get::<_, Option<bool>>(8) == Some(true),
                ordering,
            });
        }
        key.sort_unstable();
        Ok(Some(Self {
            oid,
            schema: table.get(0),
            table: table.get(1),
            replica_identity: replica_identity.bytes().next().unwrap_or(b'd'),
            partitioned: table.get(3),
            hypertable: table.get(7),
            row_filter: table.get(5),
            member: table.get(6),
            columns,
            key: if whole_key {
                key.into_iter().map(|(_, index)| index).collect()
            } else {
                Vec::new()
            },
        }))
    }

    /// The message by which `pgoutput` would describe the table.
    #[must_use]
    pub fn message(&self) -> RelationMessage<'_> {
        RelationMessage {
            oid: self.oid,
            schema: &self.schema,
            table: &self.table,
            replica_identity: self.replica_identity,
            columns: self
                .columns
                .iter()
                .map(|column| ColumnMessage {
                    key: column.identity || self.replica_identity == b'f',
                    name: &column.name,
                    type_oid: column.type_oid,
                    type_modifier: column.type_modifier,
                })
                .collect(),
        }
    }

    /// OID, schema and name of the types of the columns.
    pub fn types(&self) -> impl Iterator<Item = (u32, &str, &str)> {
        self.columns
            .iter()
            .map(|column| (column.type_oid, column.type_schema.as_str(), column.type_name.as_str()))
    }

    /// True if the rows have a key, by whose order they can be read in chunks.
    #[must_use]
    pub fn has_key(&self) -> bool {
        !self.key.is_empty()
    }

    /// Indexes of the key's columns.
    #[must_use]
    pub fn key(&self) -> &[usize] {
        &self.key
    }

    /// The key of a row, its values in the order of the columns.
    #[must_use]
    pub fn key_of(&self, row: Tuple<'_>) -> Option<Vec<String>> {
        row.values()
            .enumerate()
            .filter(|(index, _)| self.key.contains(index))
            .map(|(_, value)| match value {
                Datum::Text(text) => Some(text.to_owned()),
                _ => None,
            })
            .collect()
    }

    /// True if the rows are in chunks of TimescaleDB, in which they are not all as rows.
    #[must_use]
    pub fn is_hypertable(&self) -> bool {
        self.hypertable
    }

    /// Number of columns.
    #[must_use]
    pub fn width(&self) -> usize {
        self.columns.len()
    }

    /// Says which rows are read, and by what they are ordered. A place in one order means nothing in another.
    #[must_use]
    pub fn order(&self) -> String {
        let mut order = format!("{} {}", self.member, self.from_clause());
        for column in self.key_columns() {
            let _ = write!(order, ", {} :: {}", sort_key(column), column.sql_type);
        }
        order
    }

    fn key_columns(&self) -> impl Iterator<Item = &Column> {
        self.key.iter().map(|index| &self.columns[*index])
    }

    /// The table's name, with `ONLY` where its children are tables of their own.
    #[must_use]
    pub fn from_clause(&self) -> String {
        format!(
            "{}{}.{}",
            if self.partitioned || self.hypertable {
                ""
            } else {
                "ONLY "
            },
            quote_identifier(&self.schema),
            quote_identifier(&self.table)
        )
    }

    /// Prints the rows that come after a key, in its order; from the first one without it.
    #[must_use]
    pub fn copy_chunk(&self, after: Option<&[String]>, limit: u32) -> String {
        let condition = after.map(|after| {
            let values = after.iter().map(|value| quote_literal(value));
            self.comes_after(&self.typed(values))
        });
        self.copy_in_order(condition, limit)
    }

    /// Prints no rows, and takes everything that it takes to print a chunk.
    #[must_use]
    pub fn copy_nothing(&self) -> String {
        let values = self.key.iter().map(|_| "NULL".to_owned());
        let condition = self.has_key().then(|| self.comes_after(&self.typed(values)));
        self.copy_in_order(condition, 0)
    }

    fn copy_in_order(&self, condition: Option<String>, limit: u32) -> String {
        let mut sql = self.select(condition);
        if self.has_key() {
            let keys: Vec<String> = self.key_columns().map(sort_key).collect();
            let _ = write!(sql, " ORDER BY {}", keys.join(", "));
        }
        format!("COPY ({sql} LIMIT {limit}) TO STDOUT")
    }

    /// Values of the key's columns, in the order of the index.
    fn typed(&self, values: impl Iterator<Item = String>) -> Vec<String> {
        self.key_columns()
            .zip(values)
            .map(|(column, value)| format!("{value}::{}{}", column.sql_type, column.ordering.collate))
            .collect()
    }

    /// The key is greater than one with these values.
    fn comes_after(&self, values: &[String]) -> String {
        let columns: Vec<(&Column, String)> = self.key_columns().map(|column| (column, collated(column))).collect();
        // As one comparison, the index leads to the place. It has one operator's name for all of its columns.
        if let [(first, _), others @ ..] = &columns[..]
            && let greater = &first.ordering.greater
            && others.iter().all(|(column, _)| column.ordering.greater == *greater)
        {
            let names: Vec<&str> = columns.iter().map(|(_, name)| name.as_str()).collect();
            return format!("({}) {greater} ({})", names.join(", "), values.join(", "));
        }
        columns
            .iter()
            .zip(values)
            .rev()
            .fold(String::new(), |rest, ((column, name), value)| {
                let Ordering { at_least, greater, .. } = &column.ordering;
                if rest.is_empty() {
                    format!("{name} {greater} {value}")
                } else {
                    format!("{name} {at_least} {value} AND ({name} {greater} {value} OR ({rest}))")
                }
            })
    }

    /// Prints the rows in a stretch of the table's own blocks, or of those of one of its partitions: from a block on, and before another.
    #[must_use]
    pub fn copy_blocks(&self, relation: &str, from: u32, before: Option<u32>) -> String {
        let mut condition = format!("ctid OPERATOR(pg_catalog.>=) '({from},0)'::pg_catalog.tid");
        if let Some(before) = before {
            let _ = write!(
                condition,
                " AND ctid OPERATOR(pg_catalog.<) '({before},0)'::pg_catalog.tid"
            );
        }
        let from = format!("ONLY {relation}");
        format!("COPY ({}) TO STDOUT", self.select_from(&from, Some(condition)))
    }

    /// Prints the rows with these keys, whose values are in the order of the columns.
    #[must_use]
    pub fn copy_rows(&self, keys: &[Vec<String>]) -> String {
        let mut indexes = self.key.clone();
        indexes.sort_unstable();
        let rows: Vec<String> = keys
            .iter()
            .map(|values| {
                let terms: Vec<String> = indexes
                    .iter()
                    .map(|index| &self.columns[*index])
                    .zip(values)
                    .map(|(column, value)| {
                        let Ordering { collate, equal, .. } = &column.ordering;
                        let value = quote_literal(value);
                        format!("{} {equal} {value}::{}{collate}", collated(column), column.sql_type)
                    })
                    .collect();
                terms.join(" AND ")
            })
            .collect();
        format!("COPY ({}) TO STDOUT", self.select(Some(rows.join(" OR "))))
    }

    /// Selects the rows that are published and for which the condition holds.
    fn select(&self, condition: Option<String>) -> String {
        self.select_from(&self.from_clause(), condition)
    }

    fn select_from(&self, from: &str, condition: Option<String>) -> String {
        let columns: Vec<String> = self
            .columns
            .iter()
            .map(|column| quote_identifier(&column.name))
            .collect();
        let mut sql = format!("SELECT {} FROM {from}", columns.join(", "));
        let conditions: Vec<String> = self
            .row_filter
            .iter()
            .chain(&condition)
            .map(|sql| format!("({sql})"))
            .collect();
        if !conditions.is_empty() {
            let _ = write!(sql, " WHERE {}", conditions.join(" AND "));
        }
        sql
    }
}

/// A column of the key as its index compares it.
fn collated(column: &Column) -> String {
    quote_identifier(&column.name) + &column.ordering.collate
}

/// It in an `ORDER BY`.
fn sort_key(column: &Column) -> String {
    format!("{} USING {}", collated(column), column.ordering.less)
}

#[cfg(test)]
mod tests {
    use super::*;

    fn ordering(schema: &str, collate: &str) -> Ordering {
        let operator = |sign| format!("OPERATOR({schema}.{sign})");
        Ordering {
            collate: collate.to_owned(),
            less: operator("<"),
            equal: operator("="),
            at_least: operator(">="),
            greater: operator(">"),
        }
    }

    #[test]
    fn a_chunk_goes_on_after_the_key_in_the_order_of_its_index() {
        let column = |name: &str, sql_type: &str, collate: &str| Column {
            name: name.to_owned(),
            type_oid: 25,
            type_modifier: -1,
            sql_type: sql_type.to_owned(),
            type_schema: "pg_catalog".to_owned(),
            type_name: sql_type.to_owned(),
            identity: true,
            ordering: ordering("s", collate),
        };
        let shape = Shape {
            oid: 1,
            schema: "public".to_owned(),
            table: "Order \"Lines\"".to_owned(),
            member: 2,
            replica_identity: b'd',
            partitioned: false,
            hypertable: false,
            row_filter: Some("price > 0".to_owned()),
            columns: vec![
                column("name", "text", " COLLATE x.c"),
                column("price", "numeric", ""),
                column("no", "character(3)", ""),
            ],
            key: vec![2, 0],
        };
        let after = ["7  ".to_owned(), "o'x\\".to_owned()];
        assert_eq!(
            shape.copy_chunk(Some(&after), 10),
            r#"COPY (SELECT "name", "price", "no" FROM ONLY "public"."Order ""Lines""" WHERE (price > 0) AND (("no", "name" COLLATE x.c) OPERATOR(s.>) ('7  '::character(3), 'o''x\'::text COLLATE x.c)) ORDER BY "no" USING OPERATOR(s.<), "name" COLLATE x.c USING OPERATOR(s.<) LIMIT 10) TO STDOUT"#
        );
        assert_eq!(
            shape.copy_rows(&[
                vec!["a".to_owned(), "7".to_owned()],
                vec!["b".to_owned(), "8".to_owned()]
            ]),
            r#"COPY (SELECT "name", "price", "no" FROM ONLY "public"."Order ""Lines""" WHERE (price > 0) AND ("name" COLLATE x.c OPERATOR(s.=) 'a'::text COLLATE x.c AND "no" OPERATOR(s.=) '7'::character(3) OR "name" COLLATE x.c OPERATOR(s.=) 'b'::text COLLATE x.c AND "no" OPERATOR(s.=) '8'::character(3))) TO STDOUT"#
        );
        let mut mixed = shape.clone();
        mixed.columns[2].ordering = ordering("t", "");
        let sql = mixed.copy_chunk(Some(&after), 10);
        let condition = r#"("no" OPERATOR(t.>=) '7  '::character(3) AND ("no" OPERATOR(t.>) '7  '::character(3) OR ("name" COLLATE x.c OPERATOR(s.>) 'o''x\'::text COLLATE x.c)))"#;
        assert!(sql.contains(condition), "{sql}");
        assert_eq!(
            shape.copy_blocks("\"public\".\"p1\"", 8, Some(16)),
            r#"COPY (SELECT "name", "price", "no" FROM ONLY "public"."p1" WHERE (price > 0) AND (ctid OPERATOR(pg_catalog.>=) '(8,0)'::pg_catalog.tid AND ctid OPERATOR(pg_catalog.<) '(16,0)'::pg_catalog.tid)) TO STDOUT"#
        );
        let keyless = Shape {
            key: vec![],
            row_filter: None,
            ..shape
        };
        assert_eq!(
            keyless.copy_chunk(None, 10),
            r#"COPY (SELECT "name", "price", "no" FROM ONLY "public"."Order ""Lines""" LIMIT 10) TO STDOUT"#
        );
    }
}

//! What a table looks like to a reader of its rows: the same columns that `pgoutput` sends, the key that orders them, and the SQL.

use std::fmt::Write as _;

use tokio_postgres::{Client, Error};

use crate::source::postgres::{
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
    replica_identity: u8,
    partitioned: bool,
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
    /// The collation of the key's index, quoted.
    collation: Option<String>,
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
        let generated = if version >= 180_000 {
            "true"
        } else {
            "a.attgenerated = ''"
        };
        let table = client
            .query_opt(
                &format!(
                    "SELECT n.nspname::text, c.relname::text, c.relreplident::text, c.relkind = 'p',
                            {column_list}, {row_filter}
                     FROM pg_catalog.pg_class c
                     JOIN pg_catalog.pg_namespace n ON n.oid = c.relnamespace
                     JOIN pg_catalog.pg_publication_tables p
                       ON p.schemaname = n.nspname AND p.tablename = c.relname AND p.pubname = $2
                     WHERE c.oid = $1"
                ),
                &[&oid, &publication],
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
                            k.n, quote_ident(cn.nspname) || '.' || quote_ident(l.collname),
                            i.indisreplident OR (i.indisprimary AND c.relreplident = 'd')
                     FROM pg_catalog.pg_attribute a
                     JOIN pg_catalog.pg_class c ON c.oid = a.attrelid
                     JOIN pg_catalog.pg_type t ON t.oid = a.atttypid
                     JOIN pg_catalog.pg_namespace tn ON tn.oid = t.typnamespace
                     LEFT JOIN pg_catalog.pg_index i ON i.indrelid = c.oid
                       AND CASE c.relreplident WHEN 'i' THEN i.indisreplident ELSE i.indisprimary END
                     LEFT JOIN LATERAL unnest(i.indkey::int2[], i.indcollation::oid[])
                       WITH ORDINALITY AS k(attnum, collation_oid, n)
                       ON k.attnum = a.attnum AND k.n <= i.indnkeyatts
                     LEFT JOIN pg_catalog.pg_collation l ON l.oid = k.collation_oid
                     LEFT JOIN pg_catalog.pg_namespace cn ON cn.oid = l.collnamespace
                     WHERE a.attrelid = $1 AND a.attnum > 0 AND NOT a.attisdropped AND {generated}
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
            if column_list.as_ref().is_some_and(|list| !list.contains(&name)) {
                // Rows cannot be told apart by a key that is not sent in full.
                whole_key &= place.is_none();
                continue;
            }
            if let Some(place) = place {
                key.push((place, columns.len()));
            }
            columns.push(Column {
                name,
                type_oid: row.get(1),
                type_modifier: row.get(2),
                sql_type: row.get(3),
                type_schema: row.get(4),
                type_name: row.get(5),
                identity: place.is_some() && row.get::<_, Option<bool>>(8) == Some(true),
                collation: row.get(7),
            });
        }
        key.sort_unstable();
        Ok(Some(Self {
            oid,
            schema: table.get(0),
            table: table.get(1),
            replica_identity: replica_identity.bytes().next().unwrap_or(b'd'),
            partitioned: table.get(3),
            row_filter: table.get(5),
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

    /// Number of columns.
    #[must_use]
    pub fn width(&self) -> usize {
        self.columns.len()
    }

    /// Says by what the rows are ordered. A place in one order means nothing in another.
    #[must_use]
    pub fn order(&self) -> String {
        self.key_list(|column, sql| {
            let _ = write!(sql, " :: {}", column.sql_type);
        })
    }

    fn key_list(&self, more: impl Fn(&Column, &mut String)) -> String {
        let mut sql = String::new();
        for (index, column) in self.key.iter().map(|index| &self.columns[*index]).enumerate() {
            if index > 0 {
                sql.push_str(", ");
            }
            sql.push_str(&quote_identifier(&column.name));
            more(column, &mut sql);
            if let Some(collation) = &column.collation {
                let _ = write!(sql, " COLLATE {collation}");
            }
        }
        sql
    }

    /// The table's name, with `ONLY` where its children are tables of their own.
    #[must_use]
    pub fn from_clause(&self) -> String {
        format!(
            "{}{}.{}",
            if self.partitioned { "" } else { "ONLY " },
            quote_identifier(&self.schema),
            quote_identifier(&self.table)
        )
    }

    /// Prints the rows that come after a key, in its order; from the first one without it.
    #[must_use]
    pub fn copy_chunk(&self, after: Option<&[String]>, limit: u32) -> String {
        let mut conditions = Vec::new();
        if let Some(filter) = &self.row_filter {
            conditions.push(format!("({filter})"));
        }
        if let Some(after) = after {
            let values: Vec<String> = self
                .key
                .iter()
                .zip(after)
                .map(|(index, value)| {
                    let column = &self.columns[*index];
                    let collation = column.collation.as_ref().map(|name| format!(" COLLATE {name}"));
                    format!(
                        "{}::{}{}",
                        quote_literal(value),
                        column.sql_type,
                        collation.unwrap_or_default()
                    )
                })
                .collect();
            conditions.push(format!("({}) > ({})", self.key_list(|_, _| ()), values.join(", ")));
        }
        let mut sql = self.select(&conditions);
        if self.has_key() {
            let _ = write!(sql, " ORDER BY {}", self.key_list(|_, _| ()));
        }
        format!("COPY ({sql} LIMIT {limit}) TO STDOUT")
    }

    /// Prints the rows with these keys, whose values are in the order of the columns.
    #[must_use]
    pub fn copy_rows(&self, keys: &[Vec<String>]) -> String {
        let mut key: Vec<&Column> = Vec::new();
        for (index, column) in self.columns.iter().enumerate() {
            if self.key.contains(&index) {
                key.push(column);
            }
        }
        let names: Vec<String> = key.iter().map(|column| quote_identifier(&column.name)).collect();
        let rows: Vec<String> = keys
            .iter()
            .map(|values| {
                let values: Vec<String> = key
                    .iter()
                    .zip(values)
                    .map(|(column, value)| format!("{}::{}", quote_literal(value), column.sql_type))
                    .collect();
                format!("({})", values.join(", "))
            })
            .collect();
        let mut conditions: Vec<String> = self.row_filter.iter().map(|filter| format!("({filter})")).collect();
        conditions.push(format!("({}) IN ({})", names.join(", "), rows.join(", ")));
        format!("COPY ({}) TO STDOUT", self.select(&conditions))
    }

    fn select(&self, conditions: &[String]) -> String {
        let columns: Vec<String> = self
            .columns
            .iter()
            .map(|column| quote_identifier(&column.name))
            .collect();
        let mut sql = format!("SELECT {} FROM {}", columns.join(", "), self.from_clause());
        if !conditions.is_empty() {
            let _ = write!(sql, " WHERE {}", conditions.join(" AND "));
        }
        sql
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_chunk_goes_on_after_the_key_in_the_order_of_its_index() {
        let column = |name: &str, sql_type: &str, collation: Option<&str>| Column {
            name: name.to_owned(),
            type_oid: 25,
            type_modifier: -1,
            sql_type: sql_type.to_owned(),
            type_schema: "pg_catalog".to_owned(),
            type_name: sql_type.to_owned(),
            identity: true,
            collation: collation.map(str::to_owned),
        };
        let shape = Shape {
            oid: 1,
            schema: "public".to_owned(),
            table: "Order \"Lines\"".to_owned(),
            replica_identity: b'd',
            partitioned: false,
            row_filter: Some("price > 0".to_owned()),
            columns: vec![
                column("name", "text", Some("pg_catalog.\"C\"")),
                column("price", "numeric", None),
                column("no", "character(3)", None),
            ],
            key: vec![2, 0],
        };
        assert_eq!(
            shape.copy_chunk(Some(&["7  ".to_owned(), "o'x\\".to_owned()]), 10),
            r#"COPY (SELECT "name", "price", "no" FROM ONLY "public"."Order ""Lines""" WHERE (price > 0) AND ("no", "name" COLLATE pg_catalog."C") > ('7  '::character(3), 'o''x\'::text COLLATE pg_catalog."C") ORDER BY "no", "name" COLLATE pg_catalog."C" LIMIT 10) TO STDOUT"#
        );
        assert_eq!(
            shape.copy_rows(&[
                vec!["a".to_owned(), "7".to_owned()],
                vec!["b".to_owned(), "8".to_owned()]
            ]),
            r#"COPY (SELECT "name", "price", "no" FROM ONLY "public"."Order ""Lines""" WHERE (price > 0) AND ("name", "no") IN (('a'::text, '7'::character(3)), ('b'::text, '8'::character(3)))) TO STDOUT"#
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

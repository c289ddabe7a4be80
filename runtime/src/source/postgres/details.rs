//! What the catalog knows of a table and the log does not say. The catalog is that of now, and the log may be behind it: what it does
//! not know any more is simply not told.

use std::collections::{BTreeMap, HashMap};

use super::preflight::{Catalog, SourceError};
use crate::source::Relation;

/// What the catalog says of a table.
#[derive(Clone, Debug, Default, PartialEq)]
pub struct TableDetails {
    /// Columns by their names.
    pub columns: HashMap<String, ColumnDetails>,
    /// The columns that tell rows apart, in the order of their index: the index of the replica identity where one was chosen, else
    /// the primary key, else the first unique index by name.
    pub key: Vec<String>,
    /// Types of the columns by their OIDs.
    pub types: HashMap<u32, TypeDetails>,
}

/// What the catalog says of a column.
#[derive(Clone, Debug, Default, PartialEq)]
pub struct ColumnDetails {
    /// It may be NULL.
    pub optional: bool,
    /// The expression of its default, as SQL.
    pub default: Option<String>,
}

/// What the catalog says of a type. A domain is described as the type below it.
#[derive(Clone, Debug, Default, PartialEq)]
pub struct TypeDetails {
    /// OID.
    pub oid: u32,
    /// Name, without the schema.
    pub name: String,
    /// It came with the server, rather than with an extension or by CREATE TYPE.
    pub builtin: bool,
    /// It is a domain over what is described.
    pub domain: bool,
    /// The modifier that a domain gives it; -1 without.
    pub modifier: i32,
    /// Labels of an enum in their order.
    pub labels: Vec<String>,
    /// The type of the elements of an array.
    pub element: Option<Box<TypeDetails>>,
}

const COLUMNS: &str = "
    SELECT a.attname, NOT (a.attnotnull OR (t.typtype = 'd' AND t.typnotnull)),
           CASE WHEN a.attgenerated = '' THEN pg_catalog.pg_get_expr(d.adbin, d.adrelid) END
    FROM pg_catalog.pg_attribute a
    JOIN pg_catalog.pg_type t ON t.oid = a.atttypid
    LEFT JOIN pg_catalog.pg_attrdef d ON d.adrelid = a.attrelid AND d.adnum = a.attnum
    WHERE a.attrelid = $1 AND a.attnum > 0 AND NOT a.attisdropped";

const KEY: &str = "
    SELECT a.attname
    FROM pg_catalog.pg_class c
    CROSS JOIN LATERAL (
        SELECT i.indkey, i.indnkeyatts
        FROM pg_catalog.pg_index i JOIN pg_catalog.pg_class x ON x.oid = i.indexrelid
        WHERE i.indrelid = c.oid AND i.indisunique AND i.indisvalid AND i.indpred IS NULL AND i.indexprs IS NULL
        ORDER BY c.relreplident = 'i' AND i.indisreplident DESC, i.indisprimary DESC, x.relname
        LIMIT 1) i
    CROSS JOIN LATERAL unnest(i.indkey) WITH ORDINALITY k (number, place)
    JOIN pg_catalog.pg_attribute a ON a.attrelid = c.oid AND a.attnum = k.number
    WHERE c.oid = $1 AND k.place <= i.indnkeyatts
    ORDER BY k.place";

const PUBLISHED: &str = "
    SELECT c.oid, coalesce(r.oid, 0)
    FROM pg_catalog.pg_publication b
    JOIN pg_catalog.pg_publication_tables p ON p.pubname = b.pubname
    JOIN pg_catalog.pg_namespace n ON n.nspname = p.schemaname
    JOIN pg_catalog.pg_class c ON c.relnamespace = n.oid AND c.relname = p.tablename
    LEFT JOIN pg_catalog.pg_publication_rel r ON r.prpubid = b.oid AND r.prrelid = c.oid
    WHERE b.pubname = $1";

const TYPES: &str = "
    WITH RECURSIVE base AS (
        SELECT oid AS asked, oid, typtype, typbasetype, typtypmod, -1 AS modifier FROM pg_catalog.pg_type WHERE oid = ANY ($1)
        UNION ALL
        SELECT b.asked, t.oid, t.typtype, t.typbasetype, t.typtypmod, CASE WHEN b.modifier < 0 THEN b.typtypmod ELSE b.modifier END
        FROM base b JOIN pg_catalog.pg_type t ON t.oid = b.typbasetype
        WHERE b.typtype = 'd')
    SELECT b.asked, t.oid, t.typname, b.asked <> b.oid, b.modifier,
           ARRAY(SELECT enumlabel::text FROM pg_catalog.pg_enum WHERE enumtypid = t.oid ORDER BY enumsortorder),
           e.oid, e.typname, e.typtype = 'd',
           ARRAY(SELECT enumlabel::text FROM pg_catalog.pg_enum WHERE enumtypid = e.oid ORDER BY enumsortorder)
    FROM base b
    JOIN pg_catalog.pg_type t ON t.oid = b.oid
    LEFT JOIN pg_catalog.pg_type e ON e.typarray = t.oid
    WHERE b.typtype <> 'd'";

/// Objects with lower OIDs came with the server: src/include/access/transam.h.
const FIRST_OWN_OID: u32 = 16_384;

impl Catalog {
    /// OIDs of the tables whose changes a publication tells, partitions or their roots, as it says, each with that of its membership; 0
    /// where it is a member by its schema, or all are.
    ///
    /// # Errors
    /// When the server does not answer.
    pub async fn published_tables(&self, publication: &str) -> Result<BTreeMap<u32, u32>, SourceError> {
        let rows = self.query(PUBLISHED, &[&publication]).await?;
        Ok(rows.iter().map(|row| (row.get(0), row.get(1))).collect())
    }

    /// What there is to know of a table beyond its relation.
    ///
    /// # Errors
    /// When the server does not answer.
    pub async fn details(&self, relation: &Relation) -> Result<TableDetails, SourceError> {
        let mut details = TableDetails::default();
        for row in &self.query(COLUMNS, &[&relation.oid]).await? {
            details.columns.insert(
                row.get(0),
                ColumnDetails {
                    optional: row.get(1),
                    default: row.get(2),
                },
            );
        }
        details.key = self
            .query(KEY, &[&relation.oid])
            .await?
            .iter()
            .map(|row| row.get(0))
            .collect();
        let types: Vec<u32> = relation.columns.iter().map(|column| column.type_oid).collect();
        for row in &self.query(TYPES, &[&types]).await? {
            let element: Option<u32> = row.get(6);
            let oid: u32 = row.get(1);
            details.types.insert(
                row.get(0),
                TypeDetails {
                    oid,
                    name: row.get(2),
                    builtin: oid < FIRST_OWN_OID,
                    domain: row.get(3),
                    modifier: row.get(4),
                    labels: row.get(5),
                    element: element.map(|oid| {
                        Box::new(TypeDetails {
                            oid,
                            name: row.get(7),
                            builtin: oid < FIRST_OWN_OID,
                            domain: row.get(8),
                            modifier: -1,
                            labels: row.get(9),
                            element: None,
                        })
                    }),
                },
            );
        }
        Ok(details)
    }
}

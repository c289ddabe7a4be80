//! Hypertables of TimescaleDB. Their rows are in chunks, tables that inherit from them and that come and go by themselves, and it is chunks
//! that the WAL tells of; here they become the hypertable again.
//!
//! Compressing a chunk takes its rows out of it, and decompressing brings them back, also in the middle of an UPDATE. Neither is a change of
//! the hypertable: TimescaleDB marks both in the WAL, by messages (`tsl/src/compression/wal_utils.h` of its sources).

use std::collections::HashMap;

use crate::source::postgres::{
    pgoutput::RelationMessage,
    preflight::{Catalog, SourceError, Table},
    wire::quote_literal,
};

/// What the names of TimescaleDB's own schemas begin with, in which its chunks are.
pub(super) const OWN_SCHEMAS: &str = "_timescaledb_";

/// What an external publication does that holds a hypertable alone.
pub(super) const CHUNKS_UNPUBLISHED: &str = "not all of its chunks are in the publication, so that their changes are lost: let a superuser make one FOR ALL TABLES, or run ALTER PUBLICATION … ADD TABLE for the hypertable without ONLY, with timescaledb.enable_chunk_auto_publication on";

/// Whether rows begin to be moved, or are moved, at a message of this prefix.
#[must_use]
pub fn moves_rows(prefix: &str) -> Option<bool> {
    match prefix.strip_prefix("::timescaledb-")? {
        "compression-start" | "decompression-start" => Some(true),
        "compression-end" | "decompression-end" => Some(false),
        _ => None,
    }
}

/// The hypertables of a database; none where TimescaleDB is not installed.
#[derive(Debug, Default)]
pub struct Hypertables {
    /// Whether chunks may be compressed, by the hypertable.
    tables: HashMap<Table, bool>,
    settings: Settings,
}

#[derive(Debug, Default)]
struct Settings {
    database: String,
    chunks_join: bool,
    moves_are_marked: bool,
    /// Those by which rows are written or deleted in their compressed form alone.
    direct: Vec<String>,
}

impl Hypertables {
    /// Whether there are none.
    #[must_use]
    pub fn is_empty(&self) -> bool {
        self.tables.is_empty()
    }

    /// What is missing for the changes of a table to be told in full, if it is a hypertable: cause and remedy.
    #[must_use]
    pub fn lacks(&self, table: &Table, managed: bool) -> Option<String> {
        let compresses = *self.tables.get(table)?;
        let Settings {
            database,
            chunks_join,
            moves_are_marked,
            direct,
        } = &self.settings;
        if managed && !chunks_join {
            return Some(format!(
                "its new chunks would not be in the publication: run ALTER DATABASE {database} SET timescaledb.enable_chunk_auto_publication = on; and let the applications connect again (before TimescaleDB 2.25, make a publication FOR ALL TABLES yourself and set publication.management to External)"
            ));
        }
        if compresses && !moves_are_marked {
            return Some(
                "rows that are compressed and decompressed would be taken for changes: run ALTER SYSTEM SET timescaledb.enable_compression_wal_markers = on; SELECT pg_reload_conf();"
                    .to_owned(),
            );
        }
        let setting = direct.first().filter(|_| compresses)?;
        Some(format!(
            "rows would be written or deleted in their compressed form, which says nothing of them: run ALTER DATABASE {database} SET {setting} = off; and let the applications connect again"
        ))
    }
}

/// SQL that lets the chunks of a hypertable join a publication, those that are not in it, each while nobody writes to it.
pub(super) fn add_chunks(publication: &str, hypertable: &Table) -> String {
    for_chunks(
        publication,
        hypertable,
        "LOCK TABLE ONLY %2$I.%3$I IN SHARE ROW EXCLUSIVE MODE; ALTER PUBLICATION %1$I ADD TABLE ONLY %2$I.%3$I",
        false,
    )
}

/// SQL that has the chunks of a hypertable leave a publication.
pub(super) fn drop_chunks(publication: &str, hypertable: &Table) -> String {
    for_chunks(
        publication,
        hypertable,
        "ALTER PUBLICATION %1$I DROP TABLE ONLY %2$I.%3$I",
        true,
    )
}

fn for_chunks(publication: &str, hypertable: &Table, sql: &str, published: bool) -> String {
    let (name, hypertable) = (quote_literal(publication), quote_literal(&hypertable.quoted()));
    format!(
        "DO $meander$ DECLARE chunk record; BEGIN FOR chunk IN {CHUNKS} AND i.inhparent = {hypertable}::pg_catalog.regclass AND {published} = {}
         LOOP EXECUTE format('{sql}', {name}, chunk.nspname, chunk.relname); END LOOP; END $meander$;",
        IS_PUBLISHED.replace("$1", &name)
    )
}

/// The chunks of every hypertable.
const CHUNKS: &str = "SELECT n.nspname, c.relname FROM pg_catalog.pg_inherits i
    JOIN pg_catalog.pg_class c ON c.oid = i.inhrelid JOIN pg_catalog.pg_namespace n ON n.oid = c.relnamespace
    WHERE c.relkind = 'r' AND n.nspname ~ '^_timescaledb_'";
/// Whether a chunk is in the publication `$1`.
const IS_PUBLISHED: &str =
    "EXISTS (SELECT FROM pg_catalog.pg_publication_rel r JOIN pg_catalog.pg_publication p ON p.oid = r.prpubid
    WHERE p.pubname = $1 AND r.prrelid = c.oid)";

/// What a chunk belongs to.
#[derive(Clone, Debug)]
pub struct Hypertable {
    /// Its OID.
    pub oid: u32,
    /// Its name.
    pub table: Table,
    /// What the names of its chunks begin with.
    pub chunks: String,
    /// The chunk has its columns in another order, as one can that was made by hand and attached.
    pub differs: bool,
}

/// Where a publication and the chunks of hypertables do not go together.
#[derive(Debug, Default)]
pub(super) struct Astray {
    /// Hypertables that are to be in it, and of whose chunks some are not.
    pub unfinished: Vec<Table>,
    /// Hypertables that are not to be in it, and of whose chunks some are.
    pub orphaned: Vec<Table>,
}

impl Catalog {
    /// The hypertables of the database.
    ///
    /// # Errors
    /// When the server does not answer.
    pub async fn hypertables(&self) -> Result<Hypertables, SourceError> {
        let installed = "SELECT pg_catalog.to_regclass('_timescaledb_catalog.hypertable') IS NOT NULL";
        if !self.query(installed, &[]).await?.iter().any(|row| row.get(0)) {
            return Ok(Hypertables::default());
        }
        let rows = self
            .query(
                "SELECT schema_name::text, table_name::text, compression_state = 1 FROM _timescaledb_catalog.hypertable",
                &[],
            )
            .await?;
        let mut hypertables = Hypertables::default();
        for row in &rows {
            let table = Table {
                schema: row.get(0),
                name: row.get(1),
            };
            hypertables.tables.insert(table, row.get(2));
        }
        let rows = self
            .query(
                "SELECT quote_ident(pg_catalog.current_database()),
                        current_setting('timescaledb.enable_chunk_auto_publication', true) = 'on',
                        current_setting('timescaledb.enable_compression_wal_markers', true) = 'on',
                        ARRAY(SELECT s FROM unnest(ARRAY['timescaledb.enable_compressed_direct_batch_delete',
                                  'timescaledb.enable_direct_compress_insert', 'timescaledb.enable_direct_compress_copy']) s
                              WHERE current_setting(s, true) = 'on')",
                &[],
            )
            .await?;
        let Some(row) = rows.first() else {
            return Err(self.confused("it does not know its own settings"));
        };
        // A version that does not know a setting has none.
        let is_on = |index: usize| row.get::<_, Option<bool>>(index) == Some(true);
        hypertables.settings = Settings {
            database: row.get(0),
            chunks_join: is_on(1),
            moves_are_marked: is_on(2),
            direct: row.get(3),
        };
        Ok(hypertables)
    }

    /// Where a publication that is to hold these tables and the chunks of hypertables do not go together.
    pub(super) async fn astray(&self, publication: &str, tables: &[Table]) -> Result<Astray, SourceError> {
        let rows = self
            .query(
                &format!(
                    "SELECT DISTINCT hn.nspname, h.relname, {IS_PUBLISHED} FROM pg_catalog.pg_inherits i
                     JOIN pg_catalog.pg_class h ON h.oid = i.inhparent JOIN pg_catalog.pg_namespace hn ON hn.oid = h.relnamespace
                     JOIN pg_catalog.pg_class c ON c.oid = i.inhrelid JOIN pg_catalog.pg_namespace n ON n.oid = c.relnamespace
                     WHERE c.relkind = 'r' AND n.nspname ~ '^_timescaledb_' AND hn.nspname !~ '^_timescaledb_'"
                ),
                &[&publication],
            )
            .await?;
        let mut astray = Astray::default();
        for row in &rows {
            let table = Table {
                schema: row.get(0),
                name: row.get(1),
            };
            match (tables.contains(&table), row.get(2)) {
                (true, false) => astray.unfinished.push(table),
                (false, true) => astray.orphaned.push(table),
                _ => {}
            }
        }
        Ok(astray)
    }

    /// The hypertable, if a relation of the WAL is a chunk. A chunk that was dropped since is known by its name, which begins with what is
    /// the hypertable's alone.
    ///
    /// # Errors
    /// When the server does not answer.
    pub async fn hypertable_of(&self, chunk: &RelationMessage<'_>) -> Result<Option<Hypertable>, SourceError> {
        if !chunk.schema.starts_with(OWN_SCHEMAS) {
            return Ok(None);
        }
        let installed = "SELECT WHERE pg_catalog.to_regclass('_timescaledb_catalog.hypertable') IS NOT NULL";
        if self.query(installed, &[]).await?.is_empty() {
            return Ok(None);
        }
        let rows = self
            .query(
                "SELECT c.oid, n.nspname, c.relname, h.associated_table_prefix::text,
                        (SELECT array_agg(attname ORDER BY attnum) FROM pg_catalog.pg_attribute
                         WHERE attrelid = c.oid AND attnum > 0 AND NOT attisdropped)
                        <> (SELECT array_agg(attname ORDER BY attnum) FROM pg_catalog.pg_attribute
                            WHERE attrelid = $1 AND attnum > 0 AND NOT attisdropped)
                 FROM _timescaledb_catalog.hypertable h
                 JOIN pg_catalog.pg_namespace n ON n.nspname = h.schema_name
                 JOIN pg_catalog.pg_class c ON c.relnamespace = n.oid AND c.relname = h.table_name
                 WHERE EXISTS (SELECT FROM pg_catalog.pg_inherits WHERE inhrelid = $1 AND inhparent = c.oid)
                    OR NOT EXISTS (SELECT FROM pg_catalog.pg_class WHERE oid = $1)
                       AND h.associated_schema_name = $2
                       AND pg_catalog.starts_with($3, h.associated_table_prefix::text)
                       AND substr($3, length(h.associated_table_prefix::text) + 1) ~ '^_[0-9]+_chunk$'",
                &[&chunk.oid, &chunk.schema, &chunk.table],
            )
            .await?;
        Ok(rows.first().map(|row| Hypertable {
            oid: row.get(0),
            table: Table {
                schema: row.get(1),
                name: row.get(2),
            },
            chunks: row.get(3),
            differs: row.get::<_, Option<bool>>(4) == Some(true),
        }))
    }
}

/// True for a chunk with rows as they are, rather than compressed, by its name.
#[must_use]
pub fn is_chunk(relation: &RelationMessage<'_>) -> bool {
    relation.schema.starts_with(OWN_SCHEMAS)
        && relation.table.ends_with("_chunk")
        && !relation.table.starts_with("compress_")
}

//! The versions of the tables' schemas, as a session goes by them and shows them.

use std::collections::HashSet;

use meander_proto::v1::SchemaVersion;
use tokio::sync::watch;

use crate::{
    position::Position,
    schema::{Note, SchemaChange, Schemas, TableSchema},
    source::{Relation, postgres::preflight::Table},
};

/// The schemas that the log knows, with what is shown of them.
pub(super) struct Versions {
    schemas: Schemas,
    shown: watch::Sender<Vec<SchemaVersion>>,
    tables: watch::Sender<HashSet<u32>>,
}

impl Versions {
    /// Also returns the tables that the log knows, by their OIDs.
    pub(super) fn new(
        schemas: Schemas,
        shown: watch::Sender<Vec<SchemaVersion>>,
    ) -> (Self, watch::Receiver<HashSet<u32>>) {
        let (tables, known) = watch::channel(schemas.tables().collect());
        let versions = Self { schemas, shown, tables };
        versions.show();
        (versions, known)
    }

    /// See [`Schemas::described`].
    pub(super) fn described(&mut self, oid: u32, replica_identity: u8) {
        self.schemas.described(oid, replica_identity);
    }

    /// See [`Schemas::has_chunks`].
    pub(super) fn has_chunks(&mut self, oid: u32, prefix: String) {
        self.schemas.has_chunks(oid, prefix);
    }

    /// See [`Schemas::hypertable_of`].
    pub(super) fn hypertable_of(&self, chunk: &str) -> Option<&TableSchema> {
        self.schemas.hypertable_of(chunk)
    }

    /// See [`Schemas::next`].
    pub(super) fn next(
        &mut self,
        relation: &Relation,
        position: Position,
        notes: &mut Vec<Note>,
    ) -> Option<SchemaChange> {
        let known = notes.len();
        let change = self.schemas.next(relation, position, notes);
        if notes.len() > known {
            self.tables.send_modify(|tables| {
                tables.insert(relation.oid);
            });
            self.show();
        }
        change
    }

    /// See [`Schemas::dropped`].
    pub(super) fn dropped(&mut self, oid: u32, notes: &mut Vec<Note>) -> Option<TableSchema> {
        let dropped = self.schemas.dropped(oid, notes);
        self.tables.send_modify(|tables| {
            tables.remove(&oid);
        });
        self.show();
        dropped
    }

    /// See [`Schemas::version`].
    pub(super) fn version(&self, oid: u32) -> u32 {
        self.schemas.version(oid)
    }

    fn show(&self) {
        let shown = self.schemas.newest().map(|schema| SchemaVersion {
            table: Table {
                schema: schema.relation.schema.clone(),
                name: schema.relation.table.clone(),
            }
            .quoted(),
            version: schema.version,
            since: schema.since.to_string(),
        });
        self.shown.send_replace(shown.collect());
    }
}

//! Versions of the tables' schemas, and the events between them.
//!
//! `pgoutput` tells of no DDL. It describes a table before the table's first change in a session, and again once that is not true any
//! more. So a schema has changed when a change that is to be published has another one than the log knows of its table; the event takes
//! its place right before that change, in the same transaction, as part 0 of that change's coordinate. The ordinals of changes never
//! depend on it.
//!
//! What the log knows is kept in a compacted topic of the pipeline, a record for each table, written in one Kafka transaction with the
//! event and the checkpoint. So it is always that of the checkpoint's place: a session that starts anew in the middle of a transaction is
//! sent older descriptions again, with changes that the log has already, and compares none of them.
//!
//! Only what the log itself tells is compared. The catalog tells of now, and the log of then.

use std::collections::HashMap;

use serde::{Deserialize, Serialize};

use crate::{
    position::Position,
    source::{Column, Relation},
};

/// The most schemas that are shown: the status of a resource is no place for thousands.
const SHOWN: usize = 100;

/// A version of a table's schema.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "camelCase")]
pub struct TableSchema {
    /// Counts the schemas of this table, from 1.
    pub version: u32,
    /// The first change that has it.
    pub since: Position,
    /// As `pg_class.relreplident` has it: `d`, `n`, `f` or `i`.
    pub replica_identity: char,
    /// The table.
    pub relation: Relation,
}

/// Another schema of a table.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct SchemaChange {
    /// The old one; none where the table is seen for the first time.
    pub before: Option<TableSchema>,
    /// The new one; none where the table was dropped.
    pub after: Option<TableSchema>,
}

/// What is kept of a table.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "camelCase")]
pub struct Kept {
    /// The server whose OIDs these are.
    pub system_identifier: String,
    /// OID of the table.
    pub oid: u32,
    /// None for a table that was there when the pipeline began, and has had no change since.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub schema: Option<TableSchema>,
    /// What the names of its chunks begin with, if it is a hypertable of TimescaleDB. Once it is dropped, nothing else tells whose they were.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub chunks: Option<String>,
}

/// What is to be kept of a table from now on.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Note {
    /// OID of the table.
    pub oid: u32,
    /// None where the table was dropped.
    pub kept: Option<Kept>,
}

/// What the log knows of the tables.
#[derive(Debug, Default)]
pub struct Schemas {
    system_identifier: String,
    known: HashMap<u32, Option<TableSchema>>,
    /// What the names of the chunks of hypertables begin with, and whether that is kept.
    chunks: HashMap<u32, (String, bool)>,
    /// Replica identities of the tables that were described, and not compared with what is known since.
    described: HashMap<u32, char>,
    /// OIDs of the tables with the newest schemas, the newest first.
    newest: Vec<u32>,
}

impl Schemas {
    /// What was kept of the tables of this server.
    #[must_use]
    pub fn new(kept: Vec<Kept>, system_identifier: &str) -> Self {
        let mut schemas = Self {
            system_identifier: system_identifier.to_owned(),
            ..Self::default()
        };
        // Another server's OIDs are those of other tables.
        let ours = kept
            .into_iter()
            .filter(|kept| kept.system_identifier == system_identifier);
        for Kept {
            oid, schema, chunks, ..
        } in ours
        {
            schemas.known.insert(oid, schema);
            schemas.chunks.extend(chunks.map(|prefix| (oid, (prefix, true))));
        }
        let mut newest: Vec<&TableSchema> = schemas.known.values().flatten().collect();
        newest.sort_by_key(|schema| std::cmp::Reverse(schema.since));
        schemas.newest = newest.iter().take(SHOWN).map(|schema| schema.relation.oid).collect();
        schemas
    }

    /// True if no table is known.
    #[must_use]
    pub fn is_empty(&self) -> bool {
        self.known.is_empty()
    }

    /// These tables are there from the beginning: the schema that each is seen with at first is no change. Every other table is a new one.
    pub fn begin(&mut self, tables: impl IntoIterator<Item = u32>) -> Vec<Note> {
        self.known = tables.into_iter().map(|oid| (oid, None)).collect();
        let tables: Vec<u32> = self.known.keys().copied().collect();
        tables.into_iter().map(|oid| self.note(oid, None)).collect()
    }

    /// The server was upgraded: it has another identifier, and its tables the OIDs that they had.
    pub fn moved_to(&mut self, system_identifier: &str) -> Vec<Note> {
        system_identifier.clone_into(&mut self.system_identifier);
        let known: Vec<_> = self.known.clone().into_iter().collect();
        known.into_iter().map(|(oid, schema)| self.note(oid, schema)).collect()
    }

    /// The source describes a table: its next change may have another schema.
    pub fn described(&mut self, oid: u32, replica_identity: u8) {
        self.described.insert(oid, char::from(replica_identity));
    }

    /// The names of a hypertable's chunks begin with this.
    pub fn has_chunks(&mut self, oid: u32, prefix: String) {
        if self.chunks.get(&oid).is_none_or(|(known, _)| *known != prefix) {
            self.chunks.insert(oid, (prefix, false));
        }
    }

    /// The hypertable that has a chunk of this name, if the log knows it.
    #[must_use]
    pub fn hypertable_of(&self, chunk: &str) -> Option<&TableSchema> {
        let mut whose = self.chunks.iter().filter(|(_, (prefix, _))| is_chunk(chunk, prefix));
        self.known.get(whose.next()?.0)?.as_ref()
    }

    /// To be called before a change is published. Where the table's schema is not the known one, it is from here on, and what is to be
    /// kept of that is added to `notes`. Returns the event that comes before the change.
    pub fn next(&mut self, relation: &Relation, position: Position, notes: &mut Vec<Note>) -> Option<SchemaChange> {
        let replica_identity = *self.described.get(&relation.oid)?;
        let known = self.known.get(&relation.oid);
        let before = known.and_then(Option::as_ref);
        if before.is_some_and(|known| position < known.since) {
            // A change that left no record, and is sent again.
            return None;
        }
        self.described.remove(&relation.oid);
        if before.is_some_and(|known| {
            known.replica_identity == replica_identity && same(&known.relation, relation, replica_identity)
        }) {
            if self.chunks.get(&relation.oid).is_some_and(|(_, kept)| !kept) {
                let known = before.cloned();
                notes.push(self.note(relation.oid, known));
            }
            return None;
        }
        let after = TableSchema {
            version: before.map_or(0, |known| known.version).saturating_add(1),
            since: position,
            replica_identity,
            relation: relation.clone(),
        };
        let was_there = known.is_some() && before.is_none();
        notes.push(self.note(relation.oid, Some(after.clone())));
        let before = self.known.insert(relation.oid, Some(after.clone())).flatten();
        self.newest.retain(|oid| *oid != relation.oid);
        self.newest.insert(0, relation.oid);
        self.newest.truncate(SHOWN);
        (!was_there).then_some(SchemaChange {
            before,
            after: Some(after),
        })
    }

    /// A table was dropped: no change of it will come any more, and nothing is kept of it. Returns its last schema, if it had one.
    pub fn dropped(&mut self, oid: u32, notes: &mut Vec<Note>) -> Option<TableSchema> {
        let last = self.known.remove(&oid)?;
        self.described.remove(&oid);
        self.chunks.remove(&oid);
        self.newest.retain(|newest| *newest != oid);
        notes.push(Note { oid, kept: None });
        last
    }

    /// OIDs of the tables that are known.
    pub fn tables(&self) -> impl Iterator<Item = u32> {
        self.known.keys().copied()
    }

    /// The version of the schema that changes of a table have; 0 while it is not known.
    #[must_use]
    pub fn version(&self, oid: u32) -> u32 {
        let known = self.known.get(&oid).and_then(Option::as_ref);
        known.map_or(0, |known| known.version)
    }

    /// The newest schemas, the newest first.
    pub fn newest(&self) -> impl Iterator<Item = &TableSchema> {
        self.newest.iter().filter_map(|oid| self.known.get(oid)?.as_ref())
    }

    fn note(&mut self, oid: u32, schema: Option<TableSchema>) -> Note {
        let chunks = self.chunks.get_mut(&oid).map(|(prefix, kept)| {
            *kept = true;
            prefix.clone()
        });
        let kept = Some(Kept {
            system_identifier: self.system_identifier.clone(),
            oid,
            schema,
            chunks,
        });
        Note { oid, kept }
    }
}

/// True for a name that TimescaleDB gives to a chunk of the hypertable with this prefix.
fn is_chunk(name: &str, prefix: &str) -> bool {
    let number = name
        .strip_prefix(prefix)
        .and_then(|rest| rest.strip_prefix('_')?.strip_suffix("_chunk"));
    number.is_some_and(|number| !number.is_empty() && number.bytes().all(|digit| digit.is_ascii_digit()))
}

/// True if the log tells the same of both, which have one replica identity. Names of types are not compared: a table whose type is
/// renamed is not described anew.
fn same(one: &Relation, other: &Relation, replica_identity: char) -> bool {
    // Under REPLICA IDENTITY FULL the key is asked from the catalog.
    let key_is_told = replica_identity != 'f';
    let told = |(one, other): (&Column, &Column)| {
        one.name == other.name
            && one.type_oid == other.type_oid
            && one.type_modifier == other.type_modifier
            && (one.key == other.key || !key_is_told)
    };
    one.schema == other.schema
        && one.table == other.table
        && one.columns.len() == other.columns.len()
        && one.columns.iter().zip(&other.columns).all(told)
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;
    use crate::position::{Epoch, Lsn};

    fn relation(oid: u32, columns: &[(&str, u32, i32, bool)]) -> Relation {
        Relation {
            oid,
            schema: "public".to_owned(),
            table: format!("t{oid}"),
            columns: columns
                .iter()
                .map(|(name, type_oid, type_modifier, key)| Column {
                    name: (*name).to_owned(),
                    type_oid: *type_oid,
                    type_name: format!("type {type_oid}"),
                    type_modifier: *type_modifier,
                    key: *key,
                })
                .collect(),
        }
    }

    fn at(number: usize) -> Position {
        Position {
            epoch: Epoch::FIRST,
            // Three changes are a transaction.
            commit_lsn: Lsn(number as u64 / 3),
            ordinal: number as u64 % 3,
        }
    }

    /// The event between two schemas of a table.
    fn between(one: (&Relation, u8), other: (&Relation, u8)) -> Option<SchemaChange> {
        let mut schemas = Schemas::default();
        schemas.described(one.0.oid, one.1);
        schemas.next(one.0, at(0), &mut Vec::new());
        schemas.described(other.0.oid, other.1);
        schemas.next(other.0, at(1), &mut Vec::new())
    }

    #[test]
    fn whose_a_chunk_was_is_known_from_its_name_for_as_long_as_the_log_knows_the_hypertable() {
        let table = relation(1, &[("id", 23, -1, true)]);
        let mut schemas = Schemas::new(vec![], "7");
        let kept = |notes: &[Note]| notes.iter().filter_map(|note| note.kept.clone()).collect::<Vec<_>>();
        let mut notes = vec![];
        // Rows of a snapshot come before any chunk.
        schemas.described(1, b'd');
        schemas.next(&table, at(1), &mut notes);
        assert!(schemas.hypertable_of("_hyper_1_2_chunk").is_none());
        schemas.has_chunks(1, "_hyper_1".to_owned());
        schemas.described(1, b'd');
        assert_eq!(schemas.next(&table, at(2), &mut notes), None);
        schemas.described(1, b'd');
        schemas.next(&table, at(3), &mut notes);
        assert_eq!(notes.len(), 2, "it is noted once");

        let mut later = Schemas::new(kept(&notes[1..]), "7");
        assert_eq!(later.hypertable_of("_hyper_1_2_chunk").unwrap().relation, table);
        for other in [
            "_hyper_11_2_chunk",
            "_hyper_1__chunk",
            "_hyper_1_2x_chunk",
            "_hyper_1_2",
        ] {
            assert!(later.hypertable_of(other).is_none(), "{other}");
        }
        later.dropped(1, &mut notes);
        assert!(later.hypertable_of("_hyper_1_2_chunk").is_none());
    }

    #[test]
    fn what_the_log_tells_of_a_table_makes_another_version_and_nothing_else_does() {
        let one = relation(1, &[("id", 23, -1, true), ("note", 25, -1, false)]);
        let other = |change: &dyn Fn(&mut Relation)| {
            let mut other = one.clone();
            change(&mut other);
            between((&one, b'd'), (&other, b'd')).and_then(|change| Some(change.after?.version))
        };
        assert_eq!(other(&|_| ()), None);
        assert_eq!(other(&|table| table.columns[1].type_name = "renamed".to_owned()), None);
        let changes: [&dyn Fn(&mut Relation); 9] = [
            &|table| table.schema = "other".to_owned(),
            &|table| table.table = "other".to_owned(),
            &|table| table.columns[1].name = "other".to_owned(),
            &|table| table.columns[1].type_oid = 1043,
            &|table| table.columns[1].type_modifier = 14,
            &|table| table.columns[1].key = true,
            &|table| drop(table.columns.pop()),
            &|table| table.columns.push(one.columns[1].clone()),
            &|table| table.columns.swap(0, 1),
        ];
        for (number, change) in changes.into_iter().enumerate() {
            assert_eq!(other(change), Some(2), "change {number}");
        }
        assert!(between((&one, b'd'), (&one, b'f')).is_some());
        // Under REPLICA IDENTITY FULL the key is what the catalog says now.
        let mut keyless = one.clone();
        keyless.columns[0].key = false;
        assert_eq!(between((&one, b'f'), (&keyless, b'f')), None);
    }

    #[test]
    fn a_table_that_is_there_from_the_beginning_is_no_change_and_another_one_is() {
        let mut schemas = Schemas::new(Vec::new(), "server");
        let mut notes = schemas.begin([1]);
        for oid in [1, 2] {
            schemas.described(oid, b'd');
        }
        let (old, new) = (relation(1, &[]), relation(2, &[]));
        assert_eq!(schemas.next(&old, at(0), &mut notes), None);
        let change = schemas.next(&new, at(1), &mut notes).unwrap();
        assert_eq!((change.before, change.after.unwrap().version), (None, 1));
        assert_eq!((schemas.version(1), schemas.version(2), schemas.version(3)), (1, 1, 0));
        let newest: Vec<u32> = schemas.newest().map(|schema| schema.relation.oid).collect();
        assert_eq!(newest, [2, 1]);

        let mut kept: HashMap<u32, Kept> = HashMap::new();
        keep(&mut kept, notes);
        let read = |server: &str| Schemas::new(kept.values().cloned().collect(), server);
        // The OIDs of another server are those of other tables.
        assert!(read("another").is_empty());
        assert_eq!(read("server").newest().count(), 2);

        // Once it is dropped, nothing is left of it.
        let mut notes = Vec::new();
        assert_eq!(schemas.dropped(2, &mut notes).unwrap().relation, new);
        assert_eq!(schemas.dropped(2, &mut notes), None);
        keep(&mut kept, notes);
        let schemas = Schemas::new(kept.into_values().collect(), "server");
        assert_eq!(schemas.tables().collect::<Vec<_>>(), [1]);
    }

    /// What the topic does.
    fn keep(kept: &mut HashMap<u32, Kept>, notes: Vec<Note>) {
        for note in notes {
            match note.kept {
                Some(value) => kept.insert(note.oid, value),
                None => kept.remove(&note.oid),
            };
        }
    }

    /// A session: it is sent the changes from `from` on, is described each table before its first change and when it has another shape
    /// than in the change before, and publishes what comes after `published`, up to `until`.
    fn session(
        changes: &[(u32, u8)],
        kept: &mut HashMap<u32, Kept>,
        from: usize,
        published: &mut Option<usize>,
        until: usize,
    ) -> Vec<(usize, u32, Option<u32>)> {
        let mut schemas = Schemas::new(kept.values().cloned().collect(), "server");
        let mut sent = HashMap::new();
        let mut events = Vec::new();
        for (number, (oid, shape)) in changes.iter().enumerate().take(until).skip(from) {
            let width = usize::from(*shape);
            let relation = relation(*oid, &[("a", 23, -1, true), ("b", 25, -1, false)][..width]);
            if sent.insert(*oid, *shape) != Some(*shape) {
                schemas.described(*oid, b'd');
            }
            if Some(number) <= *published {
                continue;
            }
            let mut notes = Vec::new();
            if let Some(change) = schemas.next(&relation, at(number), &mut notes) {
                events.push((
                    number,
                    change.after.unwrap().version,
                    change.before.map(|before| before.version),
                ));
            }
            assert_eq!(change_version(&schemas, *oid), Some(relation));
            keep(kept, notes);
            *published = Some(number);
        }
        events
    }

    fn change_version(schemas: &Schemas, oid: u32) -> Option<Relation> {
        Some(schemas.known.get(&oid)?.as_ref()?.relation.clone())
    }

    proptest! {
        #[test]
        fn crashes_anywhere_make_no_event_and_take_none(
            changes in proptest::collection::vec((0_u32..3, 0_u8..3), 1..40),
            crashes in proptest::collection::vec((0_usize..40, 0_usize..40), 0..6),
        ) {
            let whole = session(&changes, &mut HashMap::new(), 0, &mut None, changes.len());
            let (mut kept, mut published, mut events) = (HashMap::new(), None, Vec::new());
            for (back, until) in crashes {
                // The server sends again whole transactions, from any that is not after what was published.
                let from = published.map_or(0, |published: usize| (published + 1).saturating_sub(back) / 3 * 3);
                events.extend(session(&changes, &mut kept, from, &mut published, until));
            }
            events.extend(session(&changes, &mut kept, 0, &mut published, changes.len()));
            prop_assert_eq!(events, whole);
        }
    }
}

//! Everything that a capture needs from the server, looked at before anything is made, and all that is missing said at once.
//!
//! Whether the role may replicate, and whether there is room for a walsender, is not guessed from the catalog: managed services grant
//! that in ways of their own. It is seen when the replication connection is made, which is a part of the same look.

use std::{
    collections::{HashMap, hash_map::Entry},
    fmt,
};

use meander_config::{Origin, Partitions, PostgresSource, PublicationManagement, SnapshotMode};

use crate::{
    log::topic_name,
    source::postgres::{
        hypertable,
        preflight::{Catalog, Selection, SourceError, Table},
        publication::publication_change,
        start::SlotState,
        wire::quote_identifier,
    },
};

/// `server_version_num` of the oldest version that is supported, the oldest whose standbys can decode, and the oldest with failover
/// slots.
const OLDEST: i32 = 140_000;
const OLDEST_STANDBY: i32 = 160_000;
/// That of the oldest version that filters by origin.
const OLDEST_ORIGIN_FILTER: i32 = 160_000;
const OLDEST_FAILOVER: i32 = 170_000;
/// The most tables, or schemas, that one statement of a remedy names. What is left is said once that was done.
const NAMED: usize = 100;

/// A selected table that is not captured, so that the others can be.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct RefusedTable {
    /// The table.
    pub table: Table,
    /// Why: everything that is to be mended, at least one.
    pub causes: Vec<Refusal>,
}

impl RefusedTable {
    /// One word for conditions and status: that of the first cause.
    #[must_use]
    pub fn reason(&self) -> &'static str {
        self.causes.first().map_or("", Refusal::reason)
    }
}

/// Why a selected table is not captured.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Refusal {
    /// To publish it would make the application's own UPDATE and DELETE fail.
    NoReplicaIdentity,
    /// Its replica identity has a generated column, which is not published: its rows could not be told apart.
    GeneratedIdentity,
    /// Its changes would not be told in full, for this cause, because it is a hypertable.
    Hypertable(String),
    /// Only its owner may publish it; this is the role that would have to be.
    NotOwner(String),
    /// It could not join the publication, for this cause, and that is tried again.
    NotAdded(String),
    /// This table is captured, and Kafka takes the names of their topics for one.
    TopicCollision(String),
}

impl Refusal {
    /// One word for conditions and status.
    #[must_use]
    pub fn reason(&self) -> &'static str {
        match self {
            Self::NoReplicaIdentity => "TableWithoutReplicaIdentity",
            Self::GeneratedIdentity => "ReplicaIdentityNotPublished",
            Self::Hypertable(_) => "HypertableNotTold",
            Self::NotOwner(_) => "TableNotOwned",
            Self::NotAdded(_) => "TableNotAdded",
            Self::TopicCollision(_) => "TopicCollision",
        }
    }
}

/// The causes and their remedies.
impl fmt::Display for RefusedTable {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let table = self.table.quoted();
        for (index, cause) in self.causes.iter().enumerate() {
            if index > 0 {
                f.write_str("; and ")?;
            }
            cause.tell(&table, f)?;
        }
        Ok(())
    }
}

impl Refusal {
    /// The cause, and the remedy.
    fn tell(&self, table: &str, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::NoReplicaIdentity => write!(
                f,
                "{table} has no replica identity, and to publish it would make UPDATE and DELETE on it fail: add a primary key, run ALTER TABLE {table} REPLICA IDENTITY FULL, or name it in tables.exclude"
            ),
            Self::GeneratedIdentity => write!(
                f,
                "the replica identity of {table} has a generated column, which PostgreSQL does not publish: run ALTER TABLE {table} REPLICA IDENTITY USING INDEX … with a unique index of other columns, or ALTER TABLE {table} REPLICA IDENTITY FULL, or name it in tables.exclude"
            ),
            Self::TopicCollision(first) => write!(
                f,
                "{table} would have a topic that Kafka does not tell from that of {first}: rename it, or name one of them in tables.exclude"
            ),
            Self::Hypertable(cause) => write!(f, "{table} is a hypertable, and {cause}"),
            Self::NotAdded(cause) => write!(
                f,
                "{table} could not join the publication, which is tried again every 10 s: {cause}"
            ),
            Self::NotOwner(user) => write!(
                f,
                "{table} is not role {user}'s to publish: run ALTER TABLE {table} OWNER TO {user}, name it in tables.exclude, or make the publication yourself and set publication.management to External"
            ),
        }
    }
}

/// The selected tables.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct Tables {
    /// Those that are captured, in order.
    pub captured: Vec<Table>,
    /// Those that cannot be.
    pub refused: Vec<RefusedTable>,
    /// Those that are captured, and whose changes may not all be told.
    pub untold: Vec<RefusedTable>,
    /// Some of the database's tables are hypertables, whose settings only a new connection sees.
    pub hypertables: bool,
}

/// What one look at the server says of it.
struct Server {
    version: i32,
    version_name: String,
    standby: bool,
    wal_level: String,
    slots_free: i64,
    encoding: String,
    may_create: bool,
}

impl Catalog {
    /// Checks the server, selects the tables, and hands back the replication connection that was tried.
    ///
    /// # Errors
    /// Everything that is missing.
    pub async fn check<C>(
        &self,
        source: &PostgresSource,
        selection: &Selection,
        slot: Option<&SlotState>,
        connected: Result<C, SourceError>,
    ) -> Result<(Tables, C), SourceError> {
        let server = self.server().await?;
        let mut problems = Vec::new();
        // Nothing more can be asked of it: its catalog is another one.
        if server.version < OLDEST {
            return Err(SourceError::Version(server.version_name));
        }
        if server.standby && server.version < OLDEST_STANDBY {
            problems.push(SourceError::Standby(server.version_name.clone()));
        }
        if source.slot_failover == Some(true) && server.version < OLDEST_FAILOVER {
            problems.push(SourceError::FailoverUnsupported(server.version_name.clone()));
        }
        if source.origin == Origin::None && server.version < OLDEST_ORIGIN_FILTER {
            problems.push(SourceError::OriginFilter(server.version_name));
        }
        if server.wal_level != "logical" {
            problems.push(SourceError::WalLevel(server.wal_level));
        }
        if server.encoding == "SQL_ASCII" {
            problems.push(SourceError::Encoding(quote_identifier(&source.database)));
        }
        // A bulk snapshot takes one for a moment. Later on it waits for it, and the capture goes on.
        let bulk = source.snapshot.mode == SnapshotMode::Bulk;
        if slot.is_none() && server.slots_free < 1 + i64::from(bulk) {
            problems.push(SourceError::NoFreeSlot);
        }
        let published = self.published(&source.publication.name).await?;
        let user = || quote_identifier(&self.user);
        match (source.publication.management, &published) {
            (PublicationManagement::External, None) => {
                problems.push(SourceError::NoPublication(quote_identifier(&source.publication.name)));
            }
            (PublicationManagement::Managed, None) if !server.may_create && !server.standby => {
                problems.push(SourceError::NoCreatePrivilege {
                    user: user(),
                    database: quote_identifier(&source.database),
                });
            }
            (PublicationManagement::Managed, Some(_)) if !self.owns_publication(&source.publication.name).await? => {
                problems.push(SourceError::PublicationNotOwned {
                    user: user(),
                    publication: quote_identifier(&source.publication.name),
                });
            }
            _ => {}
        }
        let tables = self.select_tables(source, selection).await?;
        // An external publication that is not there holds none, which was said already.
        let expected = published.is_some() || source.publication.management == PublicationManagement::Managed;
        if tables.captured.is_empty() && expected {
            problems.push(if tables.refused.is_empty() {
                SourceError::NoTables {
                    database: source.database.clone(),
                    include: source.tables.include.join(", "),
                }
            } else {
                SourceError::NoTableFit(tables.refused.clone())
            });
        }
        // Later, one such table is left out of the snapshot and named there: it is no cause to stop what is captured.
        if slot.is_none() && !server.standby && source.snapshot.mode != SnapshotMode::Never {
            problems.extend(self.unreadable(&tables.captured).await?);
        }
        let astray = self.astray(&source.publication.name, &tables.captured).await?;
        if server.standby
            && !tables.captured.is_empty()
            && let Some(sql) = publication_change(source, published.as_deref(), &tables.captured, &astray)
        {
            problems.push(SourceError::StandbyPublication { sql });
        }
        match connected {
            Ok(connection) if problems.is_empty() => Ok((tables, connection)),
            Ok(_) => Err(SourceError::all(problems)),
            Err(error) => {
                problems.push(error);
                Err(SourceError::all(problems))
            }
        }
    }

    async fn server(&self) -> Result<Server, SourceError> {
        let rows = self
            .query(
                "SELECT current_setting('server_version_num')::int, current_setting('server_version'),
                        pg_catalog.pg_is_in_recovery(), current_setting('wal_level'),
                        current_setting('max_replication_slots')::int8
                            - (SELECT count(*) FROM pg_catalog.pg_replication_slots),
                        pg_catalog.pg_encoding_to_char(d.encoding)::text,
                        pg_catalog.has_database_privilege(d.oid, 'CREATE')
                 FROM pg_catalog.pg_database d WHERE d.datname = pg_catalog.current_database()",
                &[],
            )
            .await?;
        let row = rows
            .first()
            .ok_or_else(|| self.confused("it does not know its own database"))?;
        Ok(Server {
            version: row.get(0),
            version_name: row.get(1),
            standby: row.get(2),
            wal_level: row.get(3),
            slots_free: row.get(4),
            encoding: row.get(5),
            may_create: row.get(6),
        })
    }

    /// What the role lacks to read these tables, if anything: a snapshot locks them against a change of their shape, which takes SELECT
    /// on the whole table, and rows that a policy hides would be taken for gone.
    async fn unreadable(&self, tables: &[Table]) -> Result<Option<SourceError>, SourceError> {
        let (schemas, names): (Vec<_>, Vec<_>) = tables
            .iter()
            .map(|table| (table.schema.as_str(), table.name.as_str()))
            .unzip();
        let rows = self
            .query(
                "SELECT n.nspname, c.relname, pg_catalog.has_schema_privilege(n.oid, 'USAGE'),
                        pg_catalog.has_table_privilege(c.oid, 'SELECT'), pg_catalog.row_security_active(c.oid)
                 FROM unnest($1::text[], $2::text[]) t(nspname, relname)
                 JOIN pg_catalog.pg_namespace n ON n.nspname = t.nspname
                 JOIN pg_catalog.pg_class c ON c.relnamespace = n.oid AND c.relname = t.relname
                 ORDER BY 1, 2",
                &[&schemas, &names],
            )
            .await?;
        let (mut unreadable, mut closed, mut refused, mut hidden) = (vec![], vec![], vec![], false);
        for row in &rows {
            let table = Table {
                schema: row.get(0),
                name: row.get(1),
            };
            let (enters, reads, is_hidden): (bool, bool, bool) = (row.get(2), row.get(3), row.get(4));
            if enters && reads && !is_hidden {
                continue;
            }
            let schema = quote_identifier(&table.schema);
            if !enters && closed.last() != Some(&schema) {
                closed.push(schema);
            }
            if !reads {
                refused.push(table.quoted());
            }
            hidden |= is_hidden;
            unreadable.push(table.quoted());
        }
        let Some(first) = unreadable.first() else {
            return Ok(None);
        };
        let user = quote_identifier(&self.user);
        let grant = |what: &str, names: &[String]| match names {
            [] => String::new(),
            names => format!(
                "GRANT {what} {} TO {user}; ",
                names[..names.len().min(NAMED)].join(", ")
            ),
        };
        let mut sql = grant("USAGE ON SCHEMA", &closed) + &grant("SELECT ON", &refused);
        if hidden {
            sql += &format!("ALTER ROLE {user} BYPASSRLS; ");
        }
        let tables = match unreadable.len() {
            1 => first.clone(),
            all => format!("{all} tables, {first} the first of them"),
        };
        let sql = sql.trim_end().to_owned();
        Ok(Some(SourceError::NotReadable { user, tables, sql }))
    }

    async fn owns_publication(&self, name: &str) -> Result<bool, SourceError> {
        let rows = self
            .query(
                "SELECT pg_catalog.pg_has_role(pubowner, 'USAGE') FROM pg_catalog.pg_publication WHERE pubname = $1",
                &[&name],
            )
            .await?;
        // One that was dropped a moment ago is made anew.
        Ok(rows.first().is_none_or(|row| row.get(0)))
    }

    async fn publishes_all(&self, publication: &str) -> Result<bool, SourceError> {
        let sql = "SELECT FROM pg_catalog.pg_publication WHERE pubname = $1 AND puballtables";
        Ok(!self.query(sql, &[&publication]).await?.is_empty())
    }

    /// The tables of the globs; of an external publication only those that it holds.
    ///
    /// A table that cannot be published without harm is left out, at the start as later: one table that somebody made without a key
    /// must neither break the application nor stop the capture of the others. What others have published is captured as it is.
    ///
    /// # Errors
    /// When the server does not answer.
    pub async fn select_tables(&self, source: &PostgresSource, selection: &Selection) -> Result<Tables, SourceError> {
        let published = self.published(&source.publication.name).await?.unwrap_or_default();
        let external = source.publication.management == PublicationManagement::External;
        let hypertables = self.hypertables().await?;
        let rows = self
            .query(
                // A change of a partitioned table is checked against the identity of the partition that it happens in.
                "WITH identified AS (
                    SELECT c.*, c.relreplident = 'f' OR i.indexrelid IS NOT NULL AS identity,
                           EXISTS (SELECT FROM pg_catalog.pg_attribute a WHERE a.attrelid = c.oid AND a.attgenerated <> ''
                                   AND a.attnum = ANY ((i.indkey::int2[])[0:i.indnkeyatts - 1])) AS generated
                    FROM pg_catalog.pg_class c
                    LEFT JOIN pg_catalog.pg_index i ON i.indrelid = c.oid AND i.indisvalid AND i.indimmediate
                      AND CASE c.relreplident WHEN 'd' THEN i.indisprimary WHEN 'i' THEN i.indisreplident END
                    WHERE c.relkind IN ('r', 'p') AND c.relpersistence = 'p')
                 SELECT n.nspname, c.relname,
                        c.identity AND NOT EXISTS
                            (SELECT FROM pg_catalog.pg_partition_tree(c.oid) t JOIN identified l ON l.oid = t.relid
                             WHERE t.isleaf AND NOT l.identity),
                        c.generated OR EXISTS
                            (SELECT FROM pg_catalog.pg_partition_tree(c.oid) t JOIN identified l ON l.oid = t.relid
                             WHERE t.isleaf AND l.generated),
                        pg_catalog.pg_has_role(c.relowner, 'USAGE'), c.relkind = 'p', c.relispartition
                 FROM identified c JOIN pg_catalog.pg_namespace n ON n.oid = c.relnamespace
                 WHERE n.nspname <> 'information_schema' AND n.nspname !~ '^pg_'
                 ORDER BY 1, 2",
                &[],
            )
            .await?;
        let unpublished = match external && !self.publishes_all(&source.publication.name).await? {
            true => self.astray(&source.publication.name, &published).await?.unfinished,
            false => Vec::new(),
        };
        let mut tables = Tables {
            hypertables: !hypertables.is_empty(),
            ..Tables::default()
        };
        for row in &rows {
            let table = Table {
                schema: row.get(0),
                name: row.get(1),
            };
            if !selection.holds(&table.schema, &table.name) {
                continue;
            }
            // An external publication lists a partitioned table as it publishes it.
            let (is_partitioned, is_partition): (bool, bool) = (row.get(5), row.get(6));
            let has_its_own_name = match source.publication.partitions {
                Partitions::Root => !is_partition,
                Partitions::Leaf => !is_partitioned,
            };
            if !external && !has_its_own_name {
                continue;
            }
            let (has_identity, is_generated, is_own): (bool, bool, bool) = (row.get(2), row.get(3), row.get(4));
            let is_published = published.contains(&table);
            if external && !is_published {
                continue;
            }
            let mut causes = Vec::new();
            if !external {
                match (has_identity, is_generated) {
                    (false, _) => causes.push(Refusal::NoReplicaIdentity),
                    (true, true) => causes.push(Refusal::GeneratedIdentity),
                    (true, false) => {}
                }
            }
            if !is_published {
                if !is_own {
                    causes.push(Refusal::NotOwner(quote_identifier(&self.user)));
                }
                causes.extend(hypertables.lacks(&table, true).map(Refusal::Hypertable));
            } else if causes.is_empty() {
                // What is published is not taken out again for what it lacks.
                let mut lacks = hypertables.lacks(&table, !external);
                if external && unpublished.contains(&table) {
                    lacks.get_or_insert_with(|| hypertable::CHUNKS_UNPUBLISHED.to_owned());
                }
                tables.untold.extend(lacks.map(|cause| RefusedTable {
                    table: table.clone(),
                    causes: vec![Refusal::Hypertable(cause)],
                }));
            }
            if causes.is_empty() {
                tables.captured.push(table);
            } else {
                tables.refused.push(RefusedTable { table, causes });
            }
        }
        // What an external publication holds is in the stream, whatever is thought of it here.
        if !external {
            tables.refuse_collisions(&published);
        }
        Ok(tables)
    }
}

impl Tables {
    /// Refuses a table whose topic another one has already: one that somebody made must not stop the capture of those before it.
    fn refuse_collisions(&mut self, published: &[Table]) {
        let (before, new): (Vec<_>, Vec<_>) = std::mem::take(&mut self.captured)
            .into_iter()
            .partition(|table| published.contains(table));
        let mut first = HashMap::new();
        for table in before.into_iter().chain(new) {
            // Kafka refuses a topic whose name differs from another's in these two characters alone.
            match first.entry(topic_name("", &table.schema, &table.name).replace('.', "_")) {
                Entry::Vacant(entry) => {
                    entry.insert(table.quoted());
                    self.captured.push(table);
                }
                Entry::Occupied(entry) => {
                    let causes = vec![Refusal::TopicCollision(entry.get().clone())];
                    self.refused.push(RefusedTable { table, causes });
                }
            }
        }
        self.captured.sort();
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn of_two_tables_with_one_topic_the_one_that_is_published_goes_on() {
        let table = |schema: &str, name: &str| Table {
            schema: schema.to_owned(),
            name: name.to_owned(),
        };
        let old = [table("app_user", "events"), table("public", "a_b")];
        let new = [
            table("app", "user_events"),
            table("public", "a b"),
            table("public", "c"),
        ];
        let mut tables = Tables {
            captured: [&old[..], &new[..]].concat(),
            ..Tables::default()
        };
        tables.refuse_collisions(&old);
        assert_eq!(tables.captured, [old[0].clone(), old[1].clone(), new[2].clone()]);
        let refused: Vec<_> = tables.refused.iter().map(|refused| refused.table.clone()).collect();
        assert_eq!(refused, new[..2]);
    }
}

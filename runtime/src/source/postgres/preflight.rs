//! Checks what a capture needs from PostgreSQL before it touches anything, and says in one sentence what is missing and the SQL
//! that mends it.

use std::{fs, path::Path, time::Duration};

use globset::{Glob, GlobMatcher};
use meander_config::{PostgresSource, PublicationManagement, TableSelection};
use tokio::{task::JoinHandle, time::timeout};
use tokio_postgres::{Client, Config, NoTls, error::SqlState};

use crate::{
    position::Lsn,
    source::postgres::{
        start::SlotState,
        wire::{SESSION_SETTINGS, WireError, quote_identifier, quote_literal},
    },
};

const DEADLINE: Duration = Duration::from_secs(15);

/// Why a capture cannot start, or cannot go on. Each message says what to do.
#[derive(Debug, thiserror::Error)]
pub enum SourceError {
    /// A file that the configuration names cannot be read.
    #[error("cannot read the credentials in {path}: {error}; check the Secret that credentialsSecretRef names")]
    Credentials {
        /// The file.
        path: String,
        /// Why.
        error: std::io::Error,
    },
    /// No connection.
    #[error(
        "cannot reach PostgreSQL at {address}: {cause}; check source.postgres.host and port, and that the server runs and admits this pod"
    )]
    Unreachable {
        /// `host:port`.
        address: String,
        /// Why.
        cause: String,
    },
    /// Wrong user or password.
    #[error(
        "PostgreSQL refused user {user:?}: {cause}; check username and password in the Secret that credentialsSecretRef names"
    )]
    Authentication {
        /// The role.
        user: String,
        /// The server's words.
        cause: String,
    },
    /// The database does not exist.
    #[error("database {0:?} does not exist on the server; create it or correct source.postgres.database")]
    NoDatabase(String),
    /// The server does not write what logical decoding needs.
    #[error(
        "wal_level is {0}, and capture needs logical; run ALTER SYSTEM SET wal_level = logical; and restart PostgreSQL"
    )]
    WalLevel(String),
    /// The role may not replicate.
    #[error("role {0} lacks the REPLICATION attribute; run ALTER ROLE {0} REPLICATION;")]
    NoReplicationAttribute(String),
    /// Nothing to capture.
    #[error(
        "no table of database {database:?} matches tables.include [{include}]; create the table or correct the globs over schema.table"
    )]
    NoTables {
        /// The database.
        database: String,
        /// The globs.
        include: String,
    },
    /// A glob that is none.
    #[error("{glob:?} is not a glob over schema.table: {cause}")]
    InvalidGlob {
        /// The glob.
        glob: String,
        /// Why.
        cause: String,
    },
    /// Publishing the table would make the application's own UPDATE and DELETE fail.
    #[error(
        "{tables} without replica identity: publishing would make UPDATE and DELETE on it fail; add a primary key, run ALTER TABLE {first} REPLICA IDENTITY FULL;, or name it in tables.exclude"
    )]
    NoReplicaIdentity {
        /// All of them.
        tables: String,
        /// The first, quoted.
        first: String,
    },
    /// The publication is somebody else's to make, and is not there.
    #[error(
        "publication {0} does not exist; run CREATE PUBLICATION {0} FOR TABLE …; or set publication.management to Managed"
    )]
    NoPublication(String),
    /// The role may not make or change the publication.
    #[error(
        "role {user} may not manage publication {publication}: {cause}; make it owner of the tables and GRANT CREATE ON DATABASE {database}, or make the publication yourself and set publication.management to External"
    )]
    PublicationForbidden {
        /// The role.
        user: String,
        /// The publication.
        publication: String,
        /// The database.
        database: String,
        /// The server's words.
        cause: String,
    },
    /// The slot is for something else.
    #[error(
        "replication slot {slot:?} is used by {actual}; set slot.name to a name of its own, or drop it: SELECT pg_drop_replication_slot('{slot}');"
    )]
    ForeignSlot {
        /// The slot.
        slot: String,
        /// What it is.
        actual: String,
    },
    /// Every slot is taken.
    #[error(
        "all replication slots are in use; drop an unused one or raise max_replication_slots and restart PostgreSQL"
    )]
    NoFreeSlot,
    /// Making the slot waits for a transaction that was open before.
    #[error(
        "making the replication slot waits for a transaction that is older; find it with SELECT pid, xact_start, query FROM pg_stat_activity WHERE xact_start IS NOT NULL ORDER BY xact_start; and let it end"
    )]
    SlotWaitsForTransaction,
    /// Another process reads the slot.
    #[error("replication slot {slot:?} is read by another process; this one waits until it is free")]
    SlotActive {
        /// The slot.
        slot: String,
    },
    /// Anything else that the server said.
    #[error("PostgreSQL at {address}: {cause}")]
    Server {
        /// `host:port`.
        address: String,
        /// Its words.
        cause: String,
    },
}

impl SourceError {
    /// One word for conditions and metrics.
    #[must_use]
    pub fn reason(&self) -> &'static str {
        match self {
            Self::Credentials { .. } => "CredentialsUnreadable",
            Self::Unreachable { .. } => "DatabaseUnreachable",
            Self::Authentication { .. } => "AuthenticationFailed",
            Self::NoDatabase(_) => "DatabaseNotFound",
            Self::WalLevel(_) => "WalLevelNotLogical",
            Self::NoReplicationAttribute(_) => "ReplicationNotPermitted",
            Self::NoTables { .. } => "NoTablesMatch",
            Self::InvalidGlob { .. } => "InvalidTableGlob",
            Self::NoReplicaIdentity { .. } => "TableWithoutReplicaIdentity",
            Self::NoPublication(_) => "PublicationNotFound",
            Self::PublicationForbidden { .. } => "PublicationNotPermitted",
            Self::ForeignSlot { .. } => "SlotUsedElsewhere",
            Self::NoFreeSlot => "ReplicationSlotsExhausted",
            Self::SlotWaitsForTransaction => "SlotWaitsForTransaction",
            Self::SlotActive { .. } => "SlotActive",
            Self::Server { .. } => "DatabaseError",
        }
    }
}

/// User and password, read from their files.
pub struct Credentials {
    /// The role.
    pub user: String,
    /// Its password.
    pub password: String,
}

impl Credentials {
    /// Reads the files that the configuration names.
    ///
    /// # Errors
    /// When one cannot be read.
    pub fn read(source: &PostgresSource) -> Result<Self, SourceError> {
        let read = |path: &Path| {
            fs::read_to_string(path)
                .map(|text| text.trim_end_matches(['\r', '\n']).to_owned())
                .map_err(|error| SourceError::Credentials {
                    path: path.display().to_string(),
                    error,
                })
        };
        Ok(Self {
            user: read(&source.username_file)?,
            password: read(&source.password_file)?,
        })
    }
}

/// A table to capture.
#[derive(Clone, Debug, PartialEq, Eq, PartialOrd, Ord)]
pub struct Table {
    /// Schema.
    pub schema: String,
    /// Name.
    pub name: String,
}

impl Table {
    fn quoted(&self) -> String {
        format!("{}.{}", quote_identifier(&self.schema), quote_identifier(&self.name))
    }
}

/// A connection for questions about the catalog.
pub struct Catalog {
    client: Client,
    driver: JoinHandle<()>,
    address: String,
    user: String,
}

impl Drop for Catalog {
    fn drop(&mut self) {
        self.driver.abort();
    }
}

impl Catalog {
    /// Connects.
    ///
    /// # Errors
    /// When the server cannot be reached, or refuses.
    pub async fn connect(source: &PostgresSource, credentials: &Credentials) -> Result<Self, SourceError> {
        let address = format!("{}:{}", source.host, source.port);
        let settings: Vec<String> = SESSION_SETTINGS
            .iter()
            .filter(|(name, _)| *name != "application_name" && *name != "client_encoding")
            .map(|(name, value)| format!("-c {name}={}", value.replace(' ', "\\ ")))
            .collect();
        let mut config = Config::new();
        config
            .host(&source.host)
            .port(source.port)
            .dbname(&source.database)
            .user(&credentials.user)
            .password(&credentials.password)
            .application_name("meander")
            .options(settings.join(" "))
            .connect_timeout(DEADLINE);
        let connected = timeout(DEADLINE, config.connect(NoTls)).await;
        let (client, connection) = match connected {
            Err(_) => {
                return Err(SourceError::Unreachable {
                    address,
                    cause: "no answer".to_owned(),
                });
            }
            Ok(Err(error)) => {
                return Err(match error.as_db_error() {
                    None => SourceError::Unreachable {
                        address,
                        cause: with_cause(&error),
                    },
                    Some(db) => refused(source, &credentials.user, db.code().code(), db.message()),
                });
            }
            Ok(Ok(connected)) => connected,
        };
        // The connection's own error comes back from the query that meets it.
        let driver = tokio::spawn(async move { drop(connection.await) });
        Ok(Self {
            client,
            driver,
            address,
            user: credentials.user.clone(),
        })
    }

    async fn query(
        &self,
        sql: &str,
        parameters: &[&(dyn tokio_postgres::types::ToSql + Sync)],
    ) -> Result<Vec<tokio_postgres::Row>, SourceError> {
        match timeout(DEADLINE, self.client.query(sql, parameters)).await {
            Ok(result) => result.map_err(|error| self.failed(&error)),
            Err(_) => Err(SourceError::Unreachable {
                address: self.address.clone(),
                cause: "no answer".to_owned(),
            }),
        }
    }

    async fn execute(&self, sql: &str) -> Result<(), tokio_postgres::Error> {
        // lock_timeout bounds the wait for the tables' locks, and the socket's keepalives the rest.
        self.client.batch_execute(sql).await
    }

    fn failed(&self, error: &tokio_postgres::Error) -> SourceError {
        match error.as_db_error() {
            Some(db) => SourceError::Server {
                address: self.address.clone(),
                cause: db.message().to_owned(),
            },
            None => SourceError::Unreachable {
                address: self.address.clone(),
                cause: with_cause(error),
            },
        }
    }

    /// Checks the server. Whether the role may replicate is seen when it does: managed services grant that in ways of their own.
    ///
    /// # Errors
    /// The first thing that is missing.
    pub async fn check_server(&self) -> Result<(), SourceError> {
        let rows = self.query("SELECT current_setting('wal_level')", &[]).await?;
        match rows.first().map(|row| row.get::<_, String>(0)) {
            Some(level) if level != "logical" => Err(SourceError::WalLevel(level)),
            _ => Ok(()),
        }
    }

    /// The tables that are captured, after checking that each can be published without harm: those of the globs, and of an external
    /// publication only those that it holds.
    ///
    /// # Errors
    /// When there is none, one has no replica identity, or an external publication is not there.
    pub async fn select_tables(
        &self,
        source: &PostgresSource,
        selection: &Selection,
    ) -> Result<Vec<Table>, SourceError> {
        let published = match source.publication.management {
            PublicationManagement::Managed => None,
            PublicationManagement::External => Some(
                self.published(&source.publication.name)
                    .await?
                    .ok_or_else(|| SourceError::NoPublication(quote_identifier(&source.publication.name)))?,
            ),
        };
        let rows = self
            .query(
                "SELECT n.nspname, c.relname,
                        c.relreplident = 'n' OR (c.relreplident = 'd' AND NOT EXISTS
                            (SELECT FROM pg_catalog.pg_index i WHERE i.indrelid = c.oid AND i.indisprimary))
                 FROM pg_catalog.pg_class c JOIN pg_catalog.pg_namespace n ON n.oid = c.relnamespace
                 WHERE c.relkind = 'r' AND c.relpersistence = 'p'
                   AND n.nspname <> 'information_schema' AND n.nspname !~ '^pg_'
                 ORDER BY 1, 2",
                &[],
            )
            .await?;
        let mut tables = Vec::new();
        let mut without_identity = Vec::new();
        for row in &rows {
            let table = Table {
                schema: row.get(0),
                name: row.get(1),
            };
            if selection.holds(&table.schema, &table.name)
                && published.as_ref().is_none_or(|published| published.contains(&table))
            {
                if row.get(2) {
                    without_identity.push(table.quoted());
                }
                tables.push(table);
            }
        }
        if let Some(first) = without_identity.first() {
            return Err(SourceError::NoReplicaIdentity {
                first: first.clone(),
                tables: without_identity.join(", "),
            });
        }
        if tables.is_empty() {
            return Err(SourceError::NoTables {
                database: source.database.clone(),
                include: source.tables.include.join(", "),
            });
        }
        Ok(tables)
    }

    /// The tables of a publication, if it exists.
    async fn published(&self, name: &str) -> Result<Option<Vec<Table>>, SourceError> {
        if self
            .query("SELECT FROM pg_catalog.pg_publication WHERE pubname = $1", &[&name])
            .await?
            .is_empty()
        {
            return Ok(None);
        }
        let rows = self
            .query(
                "SELECT schemaname, tablename FROM pg_catalog.pg_publication_tables WHERE pubname = $1 ORDER BY 1, 2",
                &[&name],
            )
            .await?;
        Ok(Some(
            rows.iter()
                .map(|row| Table {
                    schema: row.get(0),
                    name: row.get(1),
                })
                .collect(),
        ))
    }

    /// Makes a managed publication hold exactly these tables.
    ///
    /// # Errors
    /// When the role may not.
    pub async fn ensure_publication(&self, source: &PostgresSource, tables: &[Table]) -> Result<(), SourceError> {
        if source.publication.management == PublicationManagement::External {
            return Ok(());
        }
        let name = quote_identifier(&source.publication.name);
        let list = || tables.iter().map(Table::quoted).collect::<Vec<_>>().join(", ");
        let change = match self.published(&source.publication.name).await? {
            Some(published) if published == tables => return Ok(()),
            Some(_) => format!("ALTER PUBLICATION {name} SET TABLE {}", list()),
            None => format!("CREATE PUBLICATION {name} FOR TABLE {}", list()),
        };
        match self.execute(&change).await {
            Ok(()) => Ok(()),
            Err(error) if error.code() == Some(&SqlState::INSUFFICIENT_PRIVILEGE) => {
                Err(SourceError::PublicationForbidden {
                    user: quote_identifier(&self.user),
                    publication: name,
                    database: quote_identifier(&source.database),
                    cause: error
                        .as_db_error()
                        .map(|db| db.message().to_owned())
                        .unwrap_or_default(),
                })
            }
            Err(error) => Err(self.failed(&error)),
        }
    }

    /// The slot, if there is one.
    ///
    /// # Errors
    /// When it belongs to another plugin or database.
    pub async fn slot(&self, source: &PostgresSource) -> Result<Option<SlotState>, SourceError> {
        let rows = self
            .query(
                "SELECT plugin, database, confirmed_flush_lsn::text, coalesce(wal_status = 'lost', false), active
                 FROM pg_catalog.pg_replication_slots WHERE slot_name = $1",
                &[&source.slot_name],
            )
            .await?;
        let Some(row) = rows.first() else {
            return Ok(None);
        };
        let plugin: Option<String> = row.get(0);
        let database: Option<String> = row.get(1);
        if plugin.as_deref() != Some("pgoutput") || database.as_deref() != Some(source.database.as_str()) {
            return Err(SourceError::ForeignSlot {
                slot: source.slot_name.clone(),
                actual: match (plugin, database) {
                    (Some(plugin), Some(database)) => format!("plugin {plugin} in database {database}"),
                    _ => "physical replication".to_owned(),
                },
            });
        }
        let confirmed_flush: Option<String> = row.get(2);
        Ok(Some(SlotState {
            confirmed_flush: confirmed_flush.and_then(|text| text.parse::<Lsn>().ok()),
            lost: row.get(3),
            active: row.get(4),
        }))
    }

    /// How far the server's WAL has grown.
    ///
    /// # Errors
    /// When the server does not answer, or is a standby.
    pub async fn wal_position(&self) -> Result<Lsn, SourceError> {
        let rows = self
            .query("SELECT pg_catalog.pg_current_wal_insert_lsn()::text", &[])
            .await?;
        let text: String = rows.first().map(|row| row.get(0)).unwrap_or_default();
        text.parse().map_err(|_| SourceError::Server {
            address: self.address.clone(),
            cause: format!("its WAL position is {text:?}"),
        })
    }

    /// Names of the primary key's columns, for tables with REPLICA IDENTITY FULL, whose messages do not tell them.
    ///
    /// # Errors
    /// When the server does not answer.
    pub async fn primary_key(&self, relation: u32) -> Result<Vec<String>, SourceError> {
        let rows = self
            .query(
                "SELECT a.attname FROM pg_catalog.pg_index i
                 JOIN pg_catalog.pg_attribute a ON a.attrelid = i.indrelid AND a.attnum = ANY (i.indkey)
                 WHERE i.indrelid = $1 AND i.indisprimary",
                &[&relation],
            )
            .await?;
        Ok(rows.iter().map(|row| row.get(0)).collect())
    }

    /// Drops the slot, and the publication if it is managed. What is not there any more is fine.
    ///
    /// # Errors
    /// When the server refuses, above all while the slot is read.
    pub async fn drop_slot_and_publication(&self, source: &PostgresSource) -> Result<(), SourceError> {
        let found = self
            .query(
                "SELECT slot_name FROM pg_catalog.pg_replication_slots WHERE slot_name = $1",
                &[&source.slot_name],
            )
            .await?;
        if !found.is_empty() {
            let sql = format!(
                "SELECT pg_catalog.pg_drop_replication_slot({})",
                quote_literal(&source.slot_name)
            );
            if let Err(error) = self.execute(&sql).await {
                return Err(match error.code() {
                    Some(&SqlState::OBJECT_IN_USE) => SourceError::SlotActive {
                        slot: source.slot_name.clone(),
                    },
                    _ => self.failed(&error),
                });
            }
        }
        if source.publication.management == PublicationManagement::Managed {
            let sql = format!(
                "DROP PUBLICATION IF EXISTS {}",
                quote_identifier(&source.publication.name)
            );
            self.execute(&sql).await.map_err(|error| self.failed(&error))?;
        }
        Ok(())
    }
}

/// Tells what a failure of the replication connection means for the user.
#[must_use]
pub fn wire_failure(source: &PostgresSource, user: &str, error: WireError) -> SourceError {
    match error {
        WireError::Server { code, message } => refused(source, user, &code, &message),
        other => SourceError::Unreachable {
            address: format!("{}:{}", source.host, source.port),
            cause: other.to_string(),
        },
    }
}

/// Tells what a refusal means, by its SQLSTATE.
fn refused(source: &PostgresSource, user: &str, code: &str, message: &str) -> SourceError {
    match code {
        "28000" | "28P01" => SourceError::Authentication {
            user: user.to_owned(),
            cause: message.to_owned(),
        },
        "3D000" => SourceError::NoDatabase(source.database.clone()),
        "42501" => SourceError::NoReplicationAttribute(quote_identifier(user)),
        "53400" => SourceError::NoFreeSlot,
        "55P03" => SourceError::SlotWaitsForTransaction,
        "55006" => SourceError::SlotActive {
            slot: source.slot_name.clone(),
        },
        _ => SourceError::Server {
            address: format!("{}:{}", source.host, source.port),
            cause: message.to_owned(),
        },
    }
}

fn with_cause(error: &tokio_postgres::Error) -> String {
    std::error::Error::source(error).map_or_else(|| error.to_string(), ToString::to_string)
}

/// The globs of a [`TableSelection`], ready to be asked.
pub struct Selection {
    include: Vec<TableGlob>,
    exclude: Vec<TableGlob>,
}

impl Selection {
    /// Reads the globs.
    ///
    /// # Errors
    /// When one is not a glob.
    pub fn new(tables: &TableSelection) -> Result<Self, SourceError> {
        let parse = |globs: &[String]| {
            globs
                .iter()
                .map(|glob| TableGlob::parse(glob))
                .collect::<Result<Vec<_>, _>>()
        };
        Ok(Self {
            include: parse(&tables.include)?,
            exclude: parse(&tables.exclude)?,
        })
    }

    /// True for a table that is captured.
    #[must_use]
    pub fn holds(&self, schema: &str, table: &str) -> bool {
        let any = |globs: &[TableGlob]| globs.iter().any(|glob| glob.holds(schema, table));
        any(&self.include) && !any(&self.exclude)
    }
}

/// `schema.table`, each part as in SQL: without quotes it is folded to lower case, and `*` and `?` stand for any characters and any
/// one; in double quotes everything stands for itself.
struct TableGlob {
    schema: GlobMatcher,
    table: GlobMatcher,
}

impl TableGlob {
    fn parse(text: &str) -> Result<Self, SourceError> {
        let invalid = |cause: String| SourceError::InvalidGlob {
            glob: text.to_owned(),
            cause,
        };
        let mut parts = vec![String::new()];
        let mut quoted = false;
        let mut characters = text.chars().peekable();
        while let Some(character) = characters.next() {
            let part = parts.last_mut().ok_or_else(|| invalid("it is empty".to_owned()))?;
            match character {
                // A quote that is doubled inside of quotes is one.
                '"' if quoted && characters.next_if_eq(&'"').is_some() => part.push('"'),
                '"' => quoted = !quoted,
                '.' if !quoted => parts.push(String::new()),
                '*' | '?' if !quoted => part.push(character),
                _ if quoted => part.push_str(&globset::escape(&character.to_string())),
                _ => part.push_str(&globset::escape(&character.to_lowercase().to_string())),
            }
        }
        let [schema, table] = &parts[..] else {
            return Err(invalid("it needs a schema, a dot and a table".to_owned()));
        };
        if quoted || schema.is_empty() || table.is_empty() {
            return Err(invalid("a part is empty or a quote is not closed".to_owned()));
        }
        let matcher = |part: &str| {
            Glob::new(part)
                .map(|glob| glob.compile_matcher())
                .map_err(|error| invalid(error.kind().to_string()))
        };
        Ok(Self {
            schema: matcher(schema)?,
            table: matcher(table)?,
        })
    }

    fn holds(&self, schema: &str, table: &str) -> bool {
        self.schema.is_match(schema) && self.table.is_match(table)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn selection(include: &[&str], exclude: &[&str]) -> Selection {
        let globs = |globs: &[&str]| globs.iter().map(|glob| (*glob).to_owned()).collect();
        Selection::new(&TableSelection {
            include: globs(include),
            exclude: globs(exclude),
        })
        .unwrap()
    }

    #[test]
    fn what_is_excluded_stays_excluded() {
        let selection = selection(&["public.*", "audit.log"], &["public.tmp_?"]);
        assert!(selection.holds("public", "trades"));
        assert!(selection.holds("audit", "log"));
        assert!(!selection.holds("audit", "logs"));
        assert!(!selection.holds("public", "tmp_1"));
        assert!(selection.holds("public", "tmp_10"));
    }

    #[test]
    fn names_are_read_as_sql_reads_them() {
        let selection = selection(&[r#"Public."Order Lines""#, r#""a.b"."*""#, r#"x."[""y""]""#], &[]);
        assert!(selection.holds("public", "Order Lines"));
        assert!(!selection.holds("public", "order lines"));
        assert!(selection.holds("a.b", "*"));
        assert!(!selection.holds("a.b", "c"));
        assert!(selection.holds("x", r#"["y"]"#));
        assert!(!selection.holds("x", "y"));
    }

    #[test]
    fn what_is_no_table_is_refused() {
        for glob in ["trades", "a.b.c", ".b", "a.", r#"a."b"#] {
            assert!(
                matches!(TableGlob::parse(glob), Err(SourceError::InvalidGlob { .. })),
                "{glob}"
            );
        }
    }
}

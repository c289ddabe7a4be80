//! The connection for questions about the catalog, and everything that can be wrong with a source: in one sentence each, with the
//! SQL that mends it.

use std::{fs, path::Path, time::Duration};

use globset::{GlobBuilder, GlobMatcher};
use meander_config::{PostgresServer, PostgresSource, PublicationManagement, TableSelection};
use tokio::{task::JoinHandle, time::timeout};
use tokio_postgres::{
    Client, Config,
    config::{ChannelBinding, SslMode, SslNegotiation},
    error::SqlState,
};

use crate::{
    position::Lsn,
    source::postgres::{
        hypertable::OWN_SCHEMAS,
        prerequisites::RefusedTable,
        socket::{self, Settled, SocketError},
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
        "cannot reach PostgreSQL at {address}: {cause}; check postgres.host and port in the spec, and that the server runs and admits this pod"
    )]
    Unreachable {
        /// `host:port`.
        address: String,
        /// Why.
        cause: String,
    },
    /// The server has no TLS, and the spec asks for it.
    #[error(
        "PostgreSQL at {address} does not offer TLS, and nothing was sent to it; turn it on there (ssl = on), or set sslMode to Disable if the network between can be trusted"
    )]
    TlsNotOffered {
        /// `host:port`.
        address: String,
    },
    /// The server's certificate is not good enough.
    #[error("the certificate of PostgreSQL at {address} is refused: {cause}")]
    Certificate {
        /// `host:port`.
        address: String,
        /// What is wrong with it, and what to do.
        cause: String,
    },
    /// Neither a certificate nor SCRAM tells who the server is.
    #[error(
        "PostgreSQL at {address} does not sign this user in by SCRAM-SHA-256 bound to the TLS session, by which alone sslMode Require knows the server; use scram-sha-256 in its pg_hba.conf and set the password anew, or set sslMode to VerifyFull and caSecretRef"
    )]
    Unbound {
        /// `host:port`.
        address: String,
    },
    /// No agreement on TLS.
    #[error(
        "no TLS with PostgreSQL at {address}: {cause}; check that ssl is on there and that nothing between ends TLS"
    )]
    TlsHandshake {
        /// `host:port`.
        address: String,
        /// Why.
        cause: String,
    },
    /// A certificate or key of ours cannot be used.
    #[error("{0}; check the Secrets that caSecretRef and clientCertSecretRef name")]
    TlsFile(String),
    /// No entry of pg_hba.conf lets this client in.
    #[error(
        "PostgreSQL does not admit user {user:?}: {cause};{hint} add an entry to its pg_hba.conf and run SELECT pg_reload_conf();"
    )]
    NotAdmitted {
        /// The role.
        user: String,
        /// The server's words.
        cause: String,
        /// What else may help.
        hint: &'static str,
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
    #[error(
        "database {0:?} does not exist on the server; create it there, or delete this resource and create it with another database, which is immutable"
    )]
    NoDatabase(String),
    /// Several prerequisites are missing. The first gives the reason.
    #[error("{}", several(.0))]
    Several(Vec<SourceError>),
    /// The server is too old.
    #[error("PostgreSQL {0} is too old: capture needs version 14 or later; upgrade the server")]
    Version(String),
    /// The server is a standby of a version that cannot decode there.
    #[error(
        "the server is a standby of version {0}, and only version 16 or later can be captured from a standby; set source.postgres.host to the primary"
    )]
    Standby(String),
    /// The publication has to be changed, and a standby cannot.
    #[error("the server is a standby, where no publication can be made; run on the primary: {sql}")]
    StandbyPublication {
        /// What makes the publication as it has to be.
        sql: String,
    },
    /// Text of no defined encoding has no meaning outside of the database.
    #[error(
        "the database's encoding is SQL_ASCII, in which the bytes of a text mean nothing certain; copy it into one that was made by CREATE DATABASE {0} ENCODING 'UTF8' TEMPLATE template0;"
    )]
    Encoding(String),
    /// Only newer versions tell a transaction's origin in time.
    #[error(
        "source.postgres.origin: None needs PostgreSQL 16, and the server is {0}; upgrade it, or set origin to Any and leave records with an origin out where they are read"
    )]
    OriginFilter(String),
    /// The server does not write what logical decoding needs.
    #[error(
        "wal_level is {0}, and capture needs logical; run ALTER SYSTEM SET wal_level = logical; (or change it where the server is started with -c wal_level) and restart PostgreSQL"
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
    /// Tables match, and each of them is left out.
    #[error("none of the selected tables can be captured: {}", refusals(.0))]
    NoTableFit(Vec<RefusedTable>),
    /// A snapshot is asked for, and could not read these tables.
    #[error(
        "role {user} may not read the rows of {tables}, which a snapshot is to publish; run {sql} or name what is not to be read in tables.exclude, or set snapshot.mode to Never"
    )]
    NotReadable {
        /// The role.
        user: String,
        /// The first of the tables, and how many there are.
        tables: String,
        /// What permits it.
        sql: String,
    },
    /// The publication is somebody else's to make, and is not there.
    #[error(
        "publication {0} does not exist; run CREATE PUBLICATION {0} FOR TABLE …; or set publication.management to Managed"
    )]
    NoPublication(String),
    /// What is to be read next was written while the publication was not there.
    #[error(
        "publication {publication} was dropped while replication slot {slot:?} had still to be read through it, and changes since then are lost to this pipeline; if it was made again, run SELECT pg_drop_replication_slot('{slot}'); and the condition SourceGap says how to go on"
    )]
    PublicationDropped {
        /// The publication.
        publication: String,
        /// The slot.
        slot: String,
    },
    /// The role may not make a publication.
    #[error(
        "role {user} may not make a publication in database {database}; run GRANT CREATE ON DATABASE {database} TO {user}, or make the publication yourself and set publication.management to External"
    )]
    NoCreatePrivilege {
        /// The role.
        user: String,
        /// The database.
        database: String,
    },
    /// The publication is there, and another role's.
    #[error(
        "publication {publication} is not role {user}'s to change; run ALTER PUBLICATION {publication} OWNER TO {user}, or set publication.management to External"
    )]
    PublicationNotOwned {
        /// The role.
        user: String,
        /// The publication.
        publication: String,
    },
    /// The role may not make or change the publication, for a reason that was not foreseen.
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
    /// Too many slots are taken.
    #[error(
        "too few replication slots are free (a bulk snapshot takes one for a moment, beside that of the pipeline); drop an unused one (SELECT slot_name FROM pg_replication_slots WHERE NOT active;), or run ALTER SYSTEM SET max_replication_slots = …; and restart PostgreSQL"
    )]
    NoFreeSlot,
    /// Every connection is taken.
    #[error(
        "PostgreSQL takes no further connection: {0}; run ALTER SYSTEM SET max_wal_senders = …; or max_connections, whichever is used up, and restart PostgreSQL"
    )]
    NoFreeConnection(String),
    /// Making the slot waits for a transaction that was open before.
    #[error("making the replication slot waits for a transaction that is older, that of {0}")]
    SlotWaitsForTransaction(String),
    /// Making a slot on a standby waits for the primary.
    #[error(
        "making the replication slot on a standby waits for the primary to log its running transactions; run there SELECT pg_log_standby_snapshot();"
    )]
    SlotWaitsForPrimary,
    /// A standby was started again, and is not yet where it was.
    #[error(
        "the standby has replayed its WAL up to {now}, and {captured} was captured from it: after a restart it replays what it had, and is waited for; if it stays there, see in its log why it does not follow the primary"
    )]
    StandbyBehind {
        /// How far it is.
        now: Lsn,
        /// What was captured from it.
        captured: Lsn,
    },
    /// The server is too old for failover slots.
    #[error(
        "PostgreSQL {0} has no failover slots, which came with version 17; leave source.postgres.slot.failover out"
    )]
    FailoverUnsupported(String),
    /// What its values would be called is not what they are.
    #[error(
        "chunk {chunk} has its columns in another order than hypertable {hypertable}, and its changes would be told under wrong names; run SELECT detach_chunk('{chunk}'); and make it anew with the columns in the hypertable's order, or name the hypertable in tables.exclude"
    )]
    ChunkDiffers {
        /// The chunk.
        chunk: String,
        /// The hypertable.
        hypertable: String,
    },
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
    /// All of them as one; there has to be at least one.
    pub(super) fn all(mut problems: Vec<Self>) -> Self {
        match (problems.len(), problems.pop()) {
            (1, Some(only)) => only,
            (_, last) => {
                problems.extend(last);
                Self::Several(problems)
            }
        }
    }

    /// One word for conditions and metrics.
    #[must_use]
    pub fn reason(&self) -> &'static str {
        match self {
            Self::Credentials { .. } => "CredentialsUnreadable",
            Self::Unreachable { .. } => "DatabaseUnreachable",
            Self::TlsNotOffered { .. } => "TlsNotOffered",
            Self::Certificate { .. } => "CertificateRefused",
            Self::Unbound { .. } => "ServerNotProven",
            Self::TlsHandshake { .. } => "TlsFailed",
            Self::TlsFile(_) => "CertificateUnreadable",
            Self::NotAdmitted { .. } => "ConnectionNotAdmitted",
            Self::Authentication { .. } => "AuthenticationFailed",
            Self::NoDatabase(_) => "DatabaseNotFound",
            Self::Several(problems) => problems.first().map_or("DatabaseError", Self::reason),
            Self::Version(_) => "VersionUnsupported",
            Self::Standby(_) => "StandbyUnsupported",
            Self::StandbyPublication { .. } => "PublicationOnStandby",
            Self::Encoding(_) => "EncodingUnsupported",
            Self::OriginFilter(_) => "OriginFilterUnsupported",
            Self::WalLevel(_) => "WalLevelNotLogical",
            Self::NoReplicationAttribute(_) => "ReplicationNotPermitted",
            Self::NoTables { .. } => "NoTablesMatch",
            Self::InvalidGlob { .. } => "InvalidTableGlob",
            Self::NoTableFit(refused) => refused.first().map_or("NoTablesMatch", RefusedTable::reason),
            Self::NotReadable { .. } => "TableNotReadable",
            Self::NoPublication(_) => "PublicationNotFound",
            Self::PublicationDropped { .. } => "PublicationMissing",
            Self::NoCreatePrivilege { .. } | Self::PublicationNotOwned { .. } | Self::PublicationForbidden { .. } => {
                "PublicationNotPermitted"
            }
            Self::ForeignSlot { .. } => "SlotUsedElsewhere",
            Self::NoFreeSlot => "ReplicationSlotsExhausted",
            Self::NoFreeConnection(_) => "ConnectionsExhausted",
            Self::SlotWaitsForTransaction(_) => "SlotWaitsForTransaction",
            Self::SlotWaitsForPrimary => "SlotWaitsForPrimary",
            Self::StandbyBehind { .. } => "StandbyBehind",
            Self::FailoverUnsupported(_) => "FailoverUnsupported",
            Self::ChunkDiffers { .. } => "ChunkDiffers",
            Self::SlotActive { .. } => "SlotActive",
            Self::Server { .. } => "DatabaseError",
        }
    }
}

/// The most problems, and tables, that one message names.
const NAMED: usize = 8;

fn several(problems: &[SourceError]) -> String {
    joined(problems, ". Also: ")
}

fn refusals(tables: &[RefusedTable]) -> String {
    joined(tables, "; ")
}

/// The first few, and how many more there are.
fn joined<T: ToString>(all: &[T], between: &str) -> String {
    let mut text = all
        .iter()
        .take(NAMED)
        .map(ToString::to_string)
        .collect::<Vec<_>>()
        .join(between);
    if all.len() > NAMED {
        text.push_str(&format!("; and {} more", all.len() - NAMED));
    }
    text
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
    pub fn read(server: &PostgresServer) -> Result<Self, SourceError> {
        let read = |path: &Path| {
            fs::read_to_string(path)
                .map(|text| text.trim_end_matches(['\r', '\n']).to_owned())
                .map_err(|error| SourceError::Credentials {
                    path: path.display().to_string(),
                    error,
                })
        };
        Ok(Self {
            user: read(&server.username_file)?,
            password: read(&server.password_file)?,
        })
    }
}

/// A table to capture.
#[derive(Clone, Debug, PartialEq, Eq, Hash, PartialOrd, Ord)]
pub struct Table {
    /// Schema.
    pub schema: String,
    /// Name.
    pub name: String,
}

impl Table {
    /// As SQL writes it.
    #[must_use]
    pub fn quoted(&self) -> String {
        format!("{}.{}", quote_identifier(&self.schema), quote_identifier(&self.name))
    }
}

/// Opens a connection for SQL, as secure as the spec asks. The task drives it: it ends with the client, and with the connection.
///
/// # Errors
/// When the server cannot be reached, is not as secure as asked, or refuses.
pub async fn connect(
    server: &PostgresServer,
    credentials: &Credentials,
) -> Result<(Client, JoinHandle<()>), SourceError> {
    let settings: Vec<String> = SESSION_SETTINGS
        .iter()
        .filter(|(name, _)| *name != "application_name" && *name != "client_encoding")
        .map(|(name, value)| format!("-c {name}={}", value.replace(' ', "\\ ")))
        .collect();
    let mut config = Config::new();
    config
        .dbname(&server.database)
        .user(&credentials.user)
        .password(&credentials.password)
        .application_name("meander")
        .options(settings.join(" "))
        // What `Settled` needs, which takes the socket as it is: encrypted already, or meant to be plain.
        .ssl_mode(SslMode::Require)
        .ssl_negotiation(SslNegotiation::Direct)
        .channel_binding(if must_bind(server) {
            ChannelBinding::Require
        } else {
            ChannelBinding::Prefer
        });
    let connected = timeout(DEADLINE, async {
        let socket = socket::open(server).await.map_err(|error| no_socket(server, error))?;
        config
            .connect_raw(socket, Settled)
            .await
            .map_err(|error| match error.as_db_error() {
                None if must_bind(server) && error.to_string().starts_with("authentication error") => {
                    SourceError::Unbound {
                        address: address(server),
                    }
                }
                None => SourceError::Unreachable {
                    address: address(server),
                    cause: with_cause(&error),
                },
                Some(db) => refused(server, &credentials.user, db.code().code(), db.message()),
            })
    });
    let (client, connection) = connected.await.unwrap_or_else(|_| {
        Err(SourceError::Unreachable {
            address: address(server),
            cause: "no answer".to_owned(),
        })
    })?;
    // The connection's own error comes back from the query that meets it.
    Ok((client, tokio::spawn(async move { drop(connection.await) })))
}

/// Without a check of the certificate, only SCRAM that is bound to it tells the server from somebody in between: nothing that proves
/// the password, or passes for an answer, is exchanged in another way.
pub(super) fn must_bind(server: &PostgresServer) -> bool {
    server.ssl_mode == meander_config::SslMode::Require
}

fn address(server: &PostgresServer) -> String {
    format!("{}:{}", server.host, server.port)
}

/// Tells what it means for the user that there is no connection.
fn no_socket(server: &PostgresServer, error: SocketError) -> SourceError {
    let address = address(server);
    let cause = error.to_string();
    match error {
        SocketError::Io(_) => SourceError::Unreachable { address, cause },
        SocketError::TlsNotOffered => SourceError::TlsNotOffered { address },
        SocketError::Certificate(cause) => SourceError::Certificate { address, cause },
        SocketError::Handshake(_) | SocketError::HostName(..) => SourceError::TlsHandshake { address, cause },
        SocketError::File(_) | SocketError::ClientCertificate(_) => SourceError::TlsFile(cause),
    }
}

/// Statements that were not carried out.
pub(super) struct Refused {
    /// What the server says, if it answered.
    pub(super) code: Option<SqlState>,
    /// What it means.
    pub(super) error: SourceError,
}

/// A connection for questions about the catalog.
pub struct Catalog {
    client: Client,
    driver: JoinHandle<()>,
    address: String,
    pub(super) user: String,
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
        let server = source.server();
        let (client, driver) = connect(&server, credentials).await?;
        Ok(Self {
            client,
            driver,
            address: address(&server),
            user: credentials.user.clone(),
        })
    }

    /// The connection, for whoever asks for more than the catalog.
    #[must_use]
    pub(super) fn client(&self) -> &Client {
        &self.client
    }

    pub(super) async fn query(
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

    /// Runs statements, all of them in one transaction.
    pub(super) async fn execute(&self, sql: &str) -> Result<(), Refused> {
        // Beside locks, a commit can wait for a standby.
        match timeout(DEADLINE, self.client.batch_execute(sql)).await {
            Ok(result) => result.map_err(|error| Refused {
                code: error.code().cloned(),
                error: self.failed(&error),
            }),
            Err(_) => Err(Refused {
                code: None,
                error: SourceError::Unreachable {
                    address: self.address.clone(),
                    cause: "no answer".to_owned(),
                },
            }),
        }
    }

    /// What a failure of a statement means.
    pub(super) fn failed(&self, error: &tokio_postgres::Error) -> SourceError {
        match error.as_db_error() {
            Some(db) => self.said(db.message().to_owned()),
            None => SourceError::Unreachable {
                address: self.address.clone(),
                cause: with_cause(error),
            },
        }
    }

    /// What the server said, and nobody expects.
    pub(super) fn said(&self, cause: String) -> SourceError {
        SourceError::Server {
            address: self.address.clone(),
            cause,
        }
    }

    /// The tables of a publication, if it exists, but for the chunks of hypertables, which come and go by themselves.
    pub(super) async fn published(&self, name: &str) -> Result<Option<Vec<Table>>, SourceError> {
        if self
            .query("SELECT FROM pg_catalog.pg_publication WHERE pubname = $1", &[&name])
            .await?
            .is_empty()
        {
            return Ok(None);
        }
        let rows = self
            .query(
                "SELECT schemaname, tablename FROM pg_catalog.pg_publication_tables
                 WHERE pubname = $1 AND NOT pg_catalog.starts_with(schemaname::text, $2) ORDER BY 1, 2",
                &[&name, &OWN_SCHEMAS],
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

    /// The slot, if there is one.
    ///
    /// # Errors
    /// When it belongs to another plugin or database.
    pub async fn slot(&self, source: &PostgresSource) -> Result<Option<SlotState>, SourceError> {
        let rows = self
            .query(
                // As JSON, what a version does not know is null.
                "SELECT plugin, database, confirmed_flush_lsn::text, restart_lsn::text, active_pid, wal_status, safe_wal_size,
                        pg_catalog.pg_wal_lsn_diff(
                            CASE WHEN pg_catalog.pg_is_in_recovery() THEN pg_catalog.pg_last_wal_replay_lsn()
                                 ELSE pg_catalog.pg_current_wal_insert_lsn() END, restart_lsn)::int8,
                        (j.slot->>'failover')::bool, (j.slot->>'synced')::bool,
                        coalesce(j.slot->>'invalidation_reason',
                                 CASE WHEN (j.slot->>'conflicting')::bool THEN 'conflict' END),
                        (extract(epoch FROM (j.slot->>'inactive_since')::timestamptz) * 1000000)::int8,
                        NOT EXISTS (SELECT FROM pg_catalog.pg_publication WHERE pubname = $2)
                 FROM pg_catalog.pg_replication_slots s, LATERAL (SELECT pg_catalog.to_jsonb(s) AS slot) j
                 WHERE slot_name = $1",
                &[&source.slot_name, &source.publication.name],
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
        let lsn = |index: usize| {
            row.get::<_, Option<String>>(index)
                .and_then(|text| text.parse::<Lsn>().ok())
        };
        let bytes = |index: usize| {
            row.get::<_, Option<i64>>(index)
                .map(|bytes| bytes.max(0).cast_unsigned())
        };
        let wal_status: Option<String> = row.get(5);
        let invalidation_reason: Option<String> = row.get(10);
        Ok(Some(SlotState {
            confirmed_flush: lsn(2),
            restart: lsn(3),
            lost: invalidation_reason.is_some() || wal_status.as_deref() == Some("lost"),
            active_pid: row.get(4),
            wal_status,
            retained: bytes(7),
            safe: bytes(6),
            failover: row.get(8),
            synced: row.get(9),
            invalidation_reason,
            inactive_since_micros: row.get(11),
            unpublished: source.publication.management == PublicationManagement::Managed && row.get(12),
        }))
    }

    /// Ends an attempt to make a slot whose answer nobody waits for any more, and says what it was waiting for.
    ///
    /// # Errors
    /// When the server does not answer.
    pub async fn give_up_slot(&self, slot: &str) -> Result<SourceError, SourceError> {
        // Left alone, the walsender would go on waiting, and make a slot long after this. While it waits, the slot has no position.
        self.query(
            "SELECT pg_catalog.pg_cancel_backend(active_pid) FROM pg_catalog.pg_replication_slots
             WHERE slot_name = $1 AND active_pid IS NOT NULL AND confirmed_flush_lsn IS NULL",
            &[&slot],
        )
        .await?;
        let standby = self.query("SELECT pg_catalog.pg_is_in_recovery()", &[]).await?;
        if standby.first().is_some_and(|row| row.get(0)) {
            return Ok(SourceError::SlotWaitsForPrimary);
        }
        let blocker = self.oldest_writer(0).await?;
        Ok(SourceError::SlotWaitsForTransaction(
            blocker.unwrap_or_else(|| "one that has just ended".to_owned()),
        ))
    }

    /// The oldest transaction that has written and is open for this many seconds, and how to end it; none if there is none that this role
    /// may know the age of.
    ///
    /// # Errors
    /// When the server does not answer.
    pub async fn oldest_writer(&self, seconds: i32) -> Result<Option<String>, SourceError> {
        // Every transaction that writes holds a lock on its own id, which everybody may see.
        let rows = self
            .query(
                "SELECT l.pid, p.gid, a.usename::text,
                        extract(epoch FROM now() - coalesce(a.xact_start, p.prepared))::int8
                 FROM pg_catalog.pg_locks l
                 LEFT JOIN pg_catalog.pg_stat_activity a ON a.pid = l.pid
                 LEFT JOIN pg_catalog.pg_prepared_xacts p ON p.transaction = l.transactionid
                 WHERE l.locktype = 'transactionid' AND l.mode = 'ExclusiveLock' AND l.granted
                   AND l.pid IS DISTINCT FROM pg_catalog.pg_backend_pid()
                   AND ($1::int4 = 0 OR now() - coalesce(a.xact_start, p.prepared) >= pg_catalog.make_interval(secs => $1))
                 ORDER BY pg_catalog.age(l.transactionid) DESC LIMIT 1",
                &[&seconds],
            )
            .await?;
        Ok(rows.first().map(|row| {
            let since = row
                .get::<_, Option<i64>>(3)
                .map_or(String::new(), |seconds| format!(", open for {seconds} s"));
            let user = row
                .get::<_, Option<String>>(2)
                .map_or(String::new(), |user| format!(" of user {user:?}"));
            match (row.get::<_, Option<i32>>(0), row.get::<_, Option<String>>(1)) {
                (_, Some(gid)) => {
                    let gid = quote_literal(&gid);
                    format!("prepared transaction {gid}{since}: run COMMIT PREPARED {gid}; or ROLLBACK PREPARED {gid};")
                }
                (pid, None) => {
                    let pid = pid.unwrap_or_default();
                    format!("process {pid}{user}{since}: let it end, or run SELECT pg_terminate_backend({pid});")
                }
            }
        }))
    }

    /// How far the server's WAL has grown, or of a standby what it has replayed, and whether it is one.
    ///
    /// # Errors
    /// When the server does not answer.
    pub async fn wal_position(&self) -> Result<(Lsn, bool), SourceError> {
        let rows = self
            .query(
                "SELECT (CASE WHEN r THEN pg_catalog.pg_last_wal_replay_lsn() ELSE pg_catalog.pg_current_wal_insert_lsn() END)::text, r
                 FROM pg_catalog.pg_is_in_recovery() r",
                &[],
            )
            .await?;
        let (text, standby): (String, bool) = rows.first().map(|row| (row.get(0), row.get(1))).unwrap_or_default();
        let position = text
            .parse()
            .map_err(|_| self.confused(&format!("its WAL position is {text:?}")))?;
        Ok((position, standby))
    }

    /// The server's major version, and the OID of the database.
    ///
    /// # Errors
    /// When the server does not answer.
    pub async fn version_and_database(&self) -> Result<(u32, u32), SourceError> {
        let rows = self
            .query(
                "SELECT current_setting('server_version_num')::int4 / 10000, oid
                 FROM pg_catalog.pg_database WHERE datname = pg_catalog.current_database()",
                &[],
            )
            .await?;
        let row = rows
            .first()
            .ok_or_else(|| self.confused("it does not know its database"))?;
        Ok((row.get::<_, i32>(0).cast_unsigned(), row.get(1)))
    }

    /// How many bytes of WAL are in one file.
    ///
    /// # Errors
    /// When the server does not answer.
    pub async fn wal_segment_size(&self) -> Result<u64, SourceError> {
        let sql = "SELECT pg_catalog.pg_size_bytes(pg_catalog.current_setting('wal_segment_size'))";
        let rows = self.query(sql, &[]).await?;
        let size = rows.first().map_or(0, |row| row.get::<_, i64>(0));
        match size.cast_unsigned() {
            0 => Err(self.confused("its WAL has no segments")),
            size => Ok(size),
        }
    }

    /// The server answered what makes no sense.
    #[must_use]
    pub fn confused(&self, cause: &str) -> SourceError {
        SourceError::Server {
            address: self.address.clone(),
            cause: cause.to_owned(),
        }
    }

    /// Writes a logical message that belongs to no transaction.
    ///
    /// # Errors
    /// When the server does not take it, as a standby does not.
    pub async fn emit_message(&self, prefix: &str, content: &str) -> Result<(), SourceError> {
        let sql = "SELECT pg_catalog.pg_logical_emit_message(false, $1::text, $2::text)";
        self.query(sql, &[&prefix, &content]).await.map(drop)
    }

    /// Names of the primary key's columns, for tables with REPLICA IDENTITY FULL, whose messages do not tell them.
    ///
    /// # Errors
    /// When the server does not answer.
    pub async fn primary_key(&self, relation: u32) -> Result<Vec<String>, SourceError> {
        let rows = self
            .query(
                "SELECT a.attname FROM pg_catalog.pg_index i
                 JOIN pg_catalog.pg_attribute a ON a.attrelid = i.indrelid AND a.attnum = ANY ((i.indkey::int2[])[0:i.indnkeyatts - 1])
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
        self.drop_slot(source).await?;
        if source.publication.management == PublicationManagement::Managed {
            let sql = format!(
                "DROP PUBLICATION IF EXISTS {}",
                quote_identifier(&source.publication.name)
            );
            self.execute(&sql).await.map_err(|refused| refused.error)?;
        }
        Ok(())
    }

    /// Drops the slot, if it is there.
    ///
    /// # Errors
    /// When the server refuses, above all while the slot is read.
    pub async fn drop_slot(&self, source: &PostgresSource) -> Result<(), SourceError> {
        let sql = format!(
            "SELECT pg_catalog.pg_drop_replication_slot(slot_name) FROM pg_catalog.pg_replication_slots WHERE slot_name = {}",
            quote_literal(&source.slot_name)
        );
        self.execute(&sql).await.map_err(|refused| match refused.code {
            Some(SqlState::OBJECT_IN_USE) => SourceError::SlotActive {
                slot: source.slot_name.clone(),
            },
            _ => refused.error,
        })
    }
}

/// Tells what a failure of the replication connection means for the user.
#[must_use]
pub fn wire_failure(source: &PostgresSource, user: &str, error: WireError) -> SourceError {
    let server = source.server();
    match error {
        WireError::Server { code, message } => match code.as_str() {
            "42501" => SourceError::NoReplicationAttribute(quote_identifier(user)),
            "53400" => SourceError::NoFreeSlot,
            "55006" => SourceError::SlotActive {
                slot: source.slot_name.clone(),
            },
            code => refused(&server, user, code, &message),
        },
        WireError::Socket(error) => no_socket(&server, error),
        WireError::Unbound => SourceError::Unbound {
            address: address(&server),
        },
        other => SourceError::Unreachable {
            address: address(&server),
            cause: other.to_string(),
        },
    }
}

/// Tells what a failure of the stream means: the one thing that decoding looks up by a name is the publication.
#[must_use]
pub fn stream_failure(source: &PostgresSource, error: WireError) -> SourceError {
    match error {
        WireError::Server { code, .. } if code == "42704" => SourceError::PublicationDropped {
            publication: quote_identifier(&source.publication.name),
            slot: source.slot_name.clone(),
        },
        other => wire_failure(source, "", other),
    }
}

/// Tells what a refusal means, by its SQLSTATE.
fn refused(server: &PostgresServer, user: &str, code: &str, message: &str) -> SourceError {
    match code {
        // The words are in the server's own language, but not the name of the file.
        "28000" if message.contains("pg_hba.conf") => SourceError::NotAdmitted {
            user: user.to_owned(),
            cause: message.to_owned(),
            hint: if server.ssl_mode == meander_config::SslMode::Disable {
                " set sslMode to Require if the server wants TLS, or"
            } else {
                ""
            },
        },
        "28000" | "28P01" => SourceError::Authentication {
            user: user.to_owned(),
            cause: message.to_owned(),
        },
        "3D000" => SourceError::NoDatabase(server.database.clone()),
        "53300" => SourceError::NoFreeConnection(message.to_owned()),
        // It starts, or ends.
        "57P01" | "57P02" | "57P03" => SourceError::Unreachable {
            address: address(server),
            cause: message.to_owned(),
        },
        _ => SourceError::Server {
            address: address(server),
            cause: message.to_owned(),
        },
    }
}

pub(crate) fn with_cause(error: &tokio_postgres::Error) -> String {
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
        any(&self.include) && !any(&self.exclude) && !schema.starts_with(OWN_SCHEMAS)
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
            // A backslash is a letter of a name like any other.
            GlobBuilder::new(part)
                .backslash_escape(false)
                .build()
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
        let selection = selection(
            &[
                r#"Public."Order Lines""#,
                r#""a.b"."*""#,
                r#"x."[""y""]""#,
                r#""back\slash"."/""#,
            ],
            &[],
        );
        assert!(selection.holds("public", "Order Lines"));
        assert!(!selection.holds("public", "order lines"));
        assert!(selection.holds("a.b", "*"));
        assert!(!selection.holds("a.b", "c"));
        assert!(selection.holds("x", r#"["y"]"#));
        assert!(!selection.holds("x", "y"));
        assert!(selection.holds(r"back\slash", "/"));
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

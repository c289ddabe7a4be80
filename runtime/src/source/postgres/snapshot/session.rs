//! What every connection shares that reads a snapshot's rows: its settings, which tables there are, and what an error means.

use tokio_postgres::{Client, Error, error::SqlState};

use crate::source::postgres::{
    preflight::{Catalog, Selection, SourceError},
    snapshot::visibility::InvalidSnapshot,
};

/// What a snapshot's session is set to, beside what every session is: a policy that hides rows is an error, and the watermark is in
/// the WAL when its statement ends, whatever a standby does.
const SETTINGS: &str = "SET row_security = off; SET search_path = ''; SET synchronous_commit = local;
    SET standard_conforming_strings = on";

/// Sets up a session that reads rows.
pub(super) async fn prepare(client: &Client) -> Result<(), Error> {
    client.batch_execute(SETTINGS).await?;
    client.batch_execute(NO_TIMEOUT).await
}

/// Lets a transaction take as long as it does. PostgreSQL has this setting from version 17 on.
pub(super) const NO_TIMEOUT: &str = "SELECT pg_catalog.set_config(name, '0', false) FROM pg_catalog.pg_settings
    WHERE name = 'transaction_timeout'";

/// A table that could be read.
#[derive(Clone, Debug, PartialEq)]
pub struct Candidate {
    /// OID.
    pub oid: u32,
    /// Schema.
    pub schema: String,
    /// Name.
    pub table: String,
    /// OID of its [membership](crate::source::postgres::snapshot::shape::Shape::member) of the publication.
    pub member: u32,
    /// The planner's estimate of its rows.
    pub estimate: f64,
}

impl Candidate {
    /// `schema.table`, for people.
    #[must_use]
    pub fn name(&self) -> String {
        format!("{}.{}", self.schema, self.table)
    }
}

/// Selected tables that the publication holds, in the order of their names.
pub(super) async fn tables(client: &Client, publication: &str, selection: &Selection) -> Result<Vec<Candidate>, Error> {
    let rows = client
        .query(
            "SELECT c.oid, n.nspname::text, c.relname::text, c.reltuples::float8, coalesce(r.oid, 0)
             FROM pg_catalog.pg_publication b
             JOIN pg_catalog.pg_publication_tables p ON p.pubname = b.pubname
             JOIN pg_catalog.pg_namespace n ON n.nspname = p.schemaname
             JOIN pg_catalog.pg_class c ON c.relnamespace = n.oid AND c.relname = p.tablename
             LEFT JOIN pg_catalog.pg_publication_rel r ON r.prpubid = b.oid AND r.prrelid = c.oid
             WHERE b.pubname = $1 ORDER BY 2, 3",
            &[&publication],
        )
        .await?;
    Ok(rows
        .iter()
        .map(|row| Candidate {
            oid: row.get(0),
            schema: row.get(1),
            table: row.get(2),
            // Without a VACUUM or ANALYZE there is none, or none that is worth anything.
            estimate: row.get::<_, f64>(3).max(1.0),
            member: row.get(4),
        })
        .filter(|table| selection.holds(&table.schema, &table.table))
        .collect())
}

/// Why rows could not be read.
#[derive(Debug, thiserror::Error)]
pub(super) enum ReadError {
    #[error(transparent)]
    Sql(#[from] Error),
    #[error(transparent)]
    Snapshot(#[from] InvalidSnapshot),
    #[error("a line of COPY cannot be read")]
    Copy,
}

impl ReadError {
    /// What it means for the connection.
    pub(super) fn into_source(self, catalog: &Catalog) -> SourceError {
        match self {
            Self::Sql(error) => catalog.failed(&error),
            other => catalog.said(other.to_string()),
        }
    }

    /// What it means for one table only, where it does not concern the connection.
    pub(super) fn unreadable(&self) -> Option<Unreadable> {
        let Self::Sql(error) = self else { return None };
        let cause = error.as_db_error()?.message().to_owned();
        let code = error.code()?;
        if *code == SqlState::LOCK_NOT_AVAILABLE
            || *code == SqlState::QUERY_CANCELED
            || *code == SqlState::T_R_DEADLOCK_DETECTED
            // The server lacks memory, disk space or the like.
            || code.code().starts_with("53")
        {
            Some(Unreadable::Busy(cause))
        } else if *code == SqlState::UNDEFINED_TABLE || *code == SqlState::INVALID_SCHEMA_NAME {
            Some(Unreadable::Gone)
        } else if *code == SqlState::ADMIN_SHUTDOWN || code.code().starts_with("08") || code.code().starts_with("57P") {
            None
        } else if *code == SqlState::INSUFFICIENT_PRIVILEGE {
            // No permission, or a policy that would hide rows.
            Some(Unreadable::Refused(format!(
                "{cause}; run GRANT SELECT on it, and where it has row-level security ALTER ROLE … BYPASSRLS"
            )))
        } else {
            // Other messages can hold data.
            Some(Unreadable::Refused(format!(
                "PostgreSQL refuses to read it (SQLSTATE {})",
                code.code()
            )))
        }
    }
}

/// Why a table cannot be read.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(super) enum Unreadable {
    /// Not now: somebody holds a lock on it, or cancelled the statement.
    Busy(String),
    /// It is gone.
    Gone,
    /// It cannot be.
    Refused(String),
}

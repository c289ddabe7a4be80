//! The publication that the slot is read through, where it is the pipeline's own to make and to change.
//!
//! A change of it holds for later WAL only, and decoding looks at it as it was when that WAL was written. So it is made before the slot,
//! and what a table missed while it was out of it is lost to the log.

use std::collections::HashSet;

use meander_config::{Partitions, PostgresSource, PublicationManagement};
use tokio_postgres::error::SqlState;

use crate::source::postgres::{
    hypertable::{Astray, add_chunks, drop_chunks},
    preflight::{Catalog, Refused, SourceError, Table},
    prerequisites::{Refusal, RefusedTable, Tables},
    wire::{quote_identifier, quote_literal},
};

/// Begins the lines of the publication's comment that name tables which left and came back. There they last as long as the publication.
const REJOINED: &str = "meander: left and came back: ";

impl Catalog {
    /// Makes a managed publication hold exactly these tables, before there is a slot.
    ///
    /// # Errors
    /// When the role may not.
    pub async fn prepare_publication(&self, source: &PostgresSource, tables: &[Table]) -> Result<(), SourceError> {
        let published = self.published(&source.publication.name).await?;
        let astray = self.astray(&source.publication.name, tables).await?;
        let Some(change) = publication_change(source, published.as_deref(), tables, &astray) else {
            return Ok(());
        };
        self.execute(&change)
            .await
            .map_err(|refused| self.forbidden(source, refused))
    }

    /// Lets a managed publication follow the tables, each by itself. One that cannot join is refused for now. One of `known`, which the
    /// log has had before, is noted as having missed changes.
    ///
    /// # Errors
    /// When the publication is gone, a table cannot leave it, or the server does not answer.
    pub async fn follow_tables(
        &self,
        source: &PostgresSource,
        tables: &mut Tables,
        known: &mut HashSet<Table>,
    ) -> Result<(), SourceError> {
        let name = quote_identifier(&source.publication.name);
        let Some(published) = self.published(&source.publication.name).await? else {
            return Err(SourceError::PublicationDropped {
                publication: name,
                slot: source.slot_name.clone(),
            });
        };
        known.extend(published.iter().cloned());
        let mut failure = None;
        let publication = &source.publication.name;
        let astray = self.astray(publication, &tables.captured).await?;
        let leaving = published.iter().filter(|table| !tables.captured.contains(table));
        let orphaned = astray.orphaned.iter().filter(|table| !published.contains(table));
        for table in leaving.chain(orphaned) {
            let mut sql = String::new();
            if published.contains(table) {
                sql.push_str(&format!("ALTER PUBLICATION {name} DROP TABLE ONLY {};", table.quoted()));
            }
            if astray.orphaned.contains(table) {
                sql.push_str(&drop_chunks(publication, table));
            }
            match self.execute(&sql).await {
                Ok(()) => tracing::info!(table = table.quoted(), "a table left the publication"),
                Err(refused) => failure = Some(self.forbidden(source, refused)),
            }
        }
        for table in std::mem::take(&mut tables.captured) {
            let (is_published, is_unfinished) = (published.contains(&table), astray.unfinished.contains(&table));
            if is_published && !is_unfinished {
                tables.captured.push(table);
                continue;
            }
            let quoted = table.quoted();
            // Some minor releases go on taking a table for unpublished in a transaction that wrote to it before it joined, so it joins
            // while nobody writes. Writers queue behind the lock, so it is not waited for long: a little more than deadlock_timeout, after
            // which an autovacuum makes way.
            let mut sql = "SET LOCAL lock_timeout = '2s';".to_owned();
            // Whoever writes to a chunk has locked its hypertable.
            let only = if is_unfinished { "ONLY " } else { "" };
            sql.push_str(&if is_published {
                // A session made a chunk that did not join by itself. To come back as another member has the rows read anew.
                format!("ALTER PUBLICATION {name} DROP TABLE ONLY {quoted}; ALTER PUBLICATION {name} ADD TABLE ONLY {quoted};")
            } else {
                format!("LOCK TABLE {only}{quoted} IN SHARE ROW EXCLUSIVE MODE; ALTER PUBLICATION {name} ADD TABLE ONLY {quoted};")
            });
            if is_unfinished {
                sql.push_str(&add_chunks(publication, &table));
            }
            if known.contains(&table) {
                let comment = self.publication_comment(source).await?;
                let line = format!("{REJOINED}{quoted}");
                if !comment.lines().any(|noted| noted == line) {
                    let comment = format!("{comment}\n{line}");
                    sql.push_str(&format!(
                        "COMMENT ON PUBLICATION {name} IS {};",
                        quote_literal(comment.trim())
                    ));
                }
            }
            match self.execute(&sql).await {
                Ok(()) => {
                    tracing::info!(table = quoted, "a table joined the publication");
                    tables.captured.push(table);
                }
                Err(Refused {
                    code: Some(code),
                    error,
                }) => {
                    let cause = if code == SqlState::LOCK_NOT_AVAILABLE {
                        "a transaction that writes to it has not ended yet".to_owned()
                    } else {
                        error.to_string()
                    };
                    if is_published {
                        tables.captured.push(table.clone());
                        let cause =
                            Refusal::Hypertable(format!("one of its chunks could not join the publication: {cause}"));
                        let causes = vec![cause];
                        tables.untold.push(RefusedTable { table, causes });
                    } else {
                        let causes = vec![Refusal::NotAdded(cause)];
                        tables.refused.push(RefusedTable { table, causes });
                    }
                }
                Err(refused) => return Err(refused.error),
            }
        }
        known.extend(tables.captured.iter().cloned());
        failure.map_or(Ok(()), Err)
    }

    /// The tables that left a managed publication and came back, as SQL writes them, until a person removes the note.
    ///
    /// # Errors
    /// When the server does not answer.
    pub async fn rejoined(&self, source: &PostgresSource) -> Result<Vec<String>, SourceError> {
        let comment = self.publication_comment(source).await?;
        Ok(comment
            .lines()
            .filter_map(|line| line.strip_prefix(REJOINED).map(str::to_owned))
            .collect())
    }

    async fn publication_comment(&self, source: &PostgresSource) -> Result<String, SourceError> {
        let rows = self
            .query(
                "SELECT pg_catalog.obj_description(oid, 'pg_publication') FROM pg_catalog.pg_publication WHERE pubname = $1",
                &[&source.publication.name],
            )
            .await?;
        Ok(rows.first().and_then(|row| row.get(0)).unwrap_or_default())
    }

    fn forbidden(&self, source: &PostgresSource, refused: Refused) -> SourceError {
        match refused {
            Refused {
                code: Some(SqlState::INSUFFICIENT_PRIVILEGE),
                error,
            } => SourceError::PublicationForbidden {
                user: quote_identifier(&self.user),
                publication: quote_identifier(&source.publication.name),
                database: quote_identifier(&source.database),
                cause: error.to_string(),
            },
            Refused { error, .. } => error,
        }
    }
}

/// The SQL that makes a managed publication hold exactly these tables, if it does not, and the chunks of the hypertables among them
/// that are `astray`.
///
/// It adds and drops rather than sets, since only what is added has to be the role's own.
pub(super) fn publication_change(
    source: &PostgresSource,
    published: Option<&[Table]>,
    tables: &[Table],
    astray: &Astray,
) -> Option<String> {
    if source.publication.management == PublicationManagement::External {
        return None;
    }
    let name = quote_identifier(&source.publication.name);
    // Without ONLY, the tables that inherit from one would come and go with it.
    let list = |tables: &[&Table]| {
        let tables: Vec<_> = tables.iter().map(|table| format!("ONLY {}", table.quoted())).collect();
        tables.join(", ")
    };
    let joining = astray
        .unfinished
        .iter()
        .map(|table| add_chunks(&source.publication.name, table));
    let leaving = astray
        .orphaned
        .iter()
        .map(|table| drop_chunks(&source.publication.name, table));
    let chunks: String = joining.chain(leaving).collect();
    let Some(published) = published else {
        let all: Vec<_> = tables.iter().collect();
        let via_root = source.publication.partitions == Partitions::Root;
        return Some(format!(
            "CREATE PUBLICATION {name} FOR TABLE {} WITH (publish_via_partition_root = {via_root});{chunks}",
            list(&all)
        ));
    };
    let joining: Vec<_> = tables.iter().filter(|table| !published.contains(table)).collect();
    let leaving: Vec<_> = published.iter().filter(|table| !tables.contains(table)).collect();
    let change = |verb, tables: &[&Table]| match tables {
        [] => String::new(),
        tables => format!("ALTER PUBLICATION {name} {verb} TABLE {};", list(tables)),
    };
    let sql = change("ADD", &joining) + &chunks + &change("DROP", &leaving);
    (!sql.is_empty()).then_some(sql)
}

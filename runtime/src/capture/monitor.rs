//! Looks at the source beside the stream: how the slot is doing, and which tables there are.
//!
//! It has a connection of its own, so that a statement which waits for a lock holds up nothing that the stream asks. A look that fails
//! is taken again, and said; only a publication that is gone ends the session.

use std::{collections::HashSet, time::Duration};

use meander_config::{PublicationManagement, SnapshotMode};
use meander_proto::v1::{RefusedTable, SlotHealth};
use tokio::time::{MissedTickBehavior, interval};

use crate::{
    capture::{Context, dropped::Dropped},
    progress::ConditionType,
    source::postgres::{
        preflight::{Catalog, Credentials, Selection, SourceError, Table},
        prerequisites::{self, Tables},
        standbys::Standbys,
        start::SlotState,
        wire::quote_identifier,
    },
};

const INTERVAL: Duration = Duration::from_secs(10);
/// The most tables that are named as refused; the status of a resource is no place for thousands.
const NAMED_TABLES: usize = 20;
/// The most tables whose causes and remedies one message tells: what else needs a look is to have its place in it.
const TOLD_TABLES: usize = 3;
/// The budget of WAL is low when less than this part of it, a quarter, is left.
const LOW_BUDGET: u64 = 4;

/// What this session may change at the source, and what it knows of it.
pub(super) struct Owner {
    /// The server's process that streams for it.
    pub(super) process: i32,
    /// Tables that the log has changes of, or that were captured in this session.
    pub(super) known: HashSet<Table>,
}

/// Looks every few seconds, until the publication is gone.
pub(super) async fn run(context: &Context, mut owner: Owner, mut dropped: Dropped) -> SourceError {
    let mut ticks = interval(INTERVAL);
    ticks.set_missed_tick_behavior(MissedTickBehavior::Delay);
    let mut catalog = None;
    loop {
        ticks.tick().await;
        catalog = match look(context, &mut owner, &mut dropped, catalog).await {
            Ok(catalog) => catalog,
            Err(error @ SourceError::PublicationDropped { .. }) => return error,
            Err(error) => {
                tracing::warn!(%error, "the slot and the tables could not be looked at");
                let message = format!("the slot and the tables could not be looked at: {error}");
                context.set(ConditionType::Degraded, true, error.reason(), message);
                None
            }
        };
    }
}

async fn look(
    context: &Context,
    owner: &mut Owner,
    dropped: &mut Dropped,
    catalog: Option<Catalog>,
) -> Result<Option<Catalog>, SourceError> {
    let source = &context.config.source;
    let catalog = match catalog {
        Some(catalog) => catalog,
        None => Catalog::connect(source, &Credentials::read(&source.server())?).await?,
    };
    let slot = catalog.slot(source).await?;
    report(context, slot.as_ref(), None);
    let mut tables = catalog.select_tables(source, &Selection::new(&source.tables)?).await?;
    let managed = source.publication.management == PublicationManagement::Managed;
    // Another one may have taken the slot over while this one stood still, and goes by other rules.
    let owns = slot.as_ref().is_some_and(|slot| slot.active_pid == Some(owner.process));
    // What joins is captured from its first change after this; what was dropped has left the publication by itself.
    if managed && owns {
        catalog.follow_tables(source, &mut tables, &mut owner.known).await?;
    }
    let rejoined = if managed {
        catalog.rejoined(source).await?
    } else {
        vec![]
    };
    let standbys = match slot.as_ref().and_then(|slot| slot.failover) {
        Some(true) => catalog.standbys().await?,
        _ => Standbys::default(),
    };
    report(context, slot.as_ref(), Some((&tables, &rejoined[..], &standbys)));
    if owns {
        dropped.look(&catalog).await?;
    }
    // The settings that decide over hypertables are those of a new connection.
    Ok((!tables.hypertables).then_some(catalog))
}

/// Says what a look has shown.
pub(super) fn report(context: &Context, slot: Option<&SlotState>, seen: Option<(&Tables, &[String], &Standbys)>) {
    context.metrics.slot(slot);
    context.reporter.update(|state| {
        // Empty where there is none, which says something else than not to have looked.
        state.progress.slot = Some(slot.map(health).unwrap_or_default());
        let Some((tables, rejoined, standbys)) = seen else {
            return;
        };
        context.metrics.tables(tables);
        context.metrics.standbys(standbys);
        state.progress.captured_tables = tables.captured.len() as u64;
        state.progress.refused_tables_total = tables.refused.len() as u64;
        state.progress.refused_tables = tables
            .refused
            .iter()
            .take(NAMED_TABLES)
            .map(|refused| RefusedTable {
                table: refused.table.quoted(),
                reason: refused.reason().to_owned(),
            })
            .collect();
        let problems: Vec<_> = slot
            .and_then(budget)
            .into_iter()
            .chain(standbys.problem().map(|problem| ("StandbyMissing", problem)))
            .chain(came_back(context, rejoined))
            .chain(named("left out of the capture", &tables.refused))
            .chain(named("captured, but not in full", &tables.untold))
            .chain(
                context
                    .phantoms
                    .borrow()
                    .clone()
                    .map(|message| ("PhantomEntries", message)),
            )
            .chain(
                context
                    .oversized
                    .borrow()
                    .clone()
                    .map(|message| ("ValuesOmitted", message)),
            )
            .chain(
                context
                    .ownerless
                    .borrow()
                    .as_deref()
                    .map(|chunk| ("ChunkLeftOut", without_hypertable(chunk))),
            )
            .chain(context.snapshot_problems.borrow().clone())
            .chain(context.remarks.first())
            .chain(context.keyless.message().map(|message| ("KeyWithoutForm", message)))
            .chain(context.heartbeats.failure().map(|failure| ("HeartbeatFailed", failure)))
            .collect();
        let (degraded, reason) = match problems.first() {
            Some((reason, _)) => (true, *reason),
            None => (false, "Sound"),
        };
        let messages: Vec<_> = problems.into_iter().map(|(_, message)| message).collect();
        state
            .conditions
            .set(ConditionType::Degraded, degraded, reason, messages.join(". Also: "));
    });
}

fn health(slot: &SlotState) -> SlotHealth {
    SlotHealth {
        wal_status: slot.wal_status.clone().unwrap_or_default(),
        retained_wal_bytes: slot.retained,
        safe_wal_bytes: slot.safe,
        restart_lsn: slot.restart.unwrap_or_default().0,
        confirmed_flush_lsn: slot.confirmed_flush.unwrap_or_default().0,
        active_pid: slot.active_pid,
        failover: slot.failover,
        synced: slot.synced,
        invalidation_reason: slot.invalidation_reason.clone().unwrap_or_default(),
        inactive_since_micros: slot.inactive_since_micros.unwrap_or_default(),
    }
}

/// What `max_slot_wal_keep_size` leaves, once that is little.
fn budget(slot: &SlotState) -> Option<(&'static str, String)> {
    let (safe, retained) = (slot.safe?, slot.retained.unwrap_or(0));
    let low = safe < safe.saturating_add(retained) / LOW_BUDGET;
    let unreserved = slot.wal_status.as_deref() == Some("unreserved");
    (low || unreserved).then(|| {
        let mebibytes = |bytes: u64| bytes >> 20;
        let message = format!(
            "the replication slot holds back {} MiB of WAL, and PostgreSQL drops it after {} MiB more: see why the capture does not keep up, or run ALTER SYSTEM SET max_slot_wal_keep_size = '…'; SELECT pg_reload_conf();",
            mebibytes(retained),
            mebibytes(safe)
        );
        ("WalBudgetLow", message)
    })
}

fn without_hypertable(chunk: &str) -> String {
    format!(
        "changes of the chunk {chunk}, and perhaps of others, are not in the log: when they were read it was no hypertable's any more of which the log has changes; read its hypertable anew by an entry in snapshot.requests, if it is there; it is said until the pod is started again"
    )
}

fn came_back(context: &Context, rejoined: &[String]) -> Option<(&'static str, String)> {
    let first = rejoined.first()?;
    let more = match rejoined.len() - 1 {
        0 => String::new(),
        more => format!(" and {more} more"),
    };
    let source = &context.config.source;
    let remedy = match source.snapshot.mode {
        SnapshotMode::Never => "read the table anew by an entry in snapshot.requests",
        _ => "wait until the snapshot has read the table anew",
    };
    let publication = quote_identifier(&source.publication.name);
    Some((
        "TableRejoined",
        format!(
            "{first}{more} left the publication and came back, and the log lacks the changes in between: {remedy}, then run COMMENT ON PUBLICATION {publication} IS NULL;"
        ),
    ))
}

fn named(what: &str, tables: &[prerequisites::RefusedTable]) -> Option<(&'static str, String)> {
    let first = tables.first()?;
    let told: Vec<_> = tables.iter().take(TOLD_TABLES).map(ToString::to_string).collect();
    let more = match tables.len() - told.len() {
        0 => String::new(),
        more => format!("; and {more} more, see status.tables"),
    };
    Some((first.reason(), format!("{what}: {}{more}", told.join("; "))))
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::source::postgres::prerequisites::Refusal;

    #[test]
    fn every_fault_of_the_first_tables_is_told_at_once_and_how_many_more_there_are() {
        let tables: Vec<_> = ["a", "b", "c", "d", "e"]
            .map(|name| prerequisites::RefusedTable {
                table: Table {
                    schema: "public".to_owned(),
                    name: name.to_owned(),
                },
                causes: vec![Refusal::NoReplicaIdentity, Refusal::NotOwner("\"meander\"".to_owned())],
            })
            .into();
        let (reason, message) = named("left out of the capture", &tables).unwrap_or_default();
        assert_eq!(reason, "TableWithoutReplicaIdentity");
        for table in ["a", "b", "c"] {
            for remedy in ["REPLICA IDENTITY FULL", "OWNER TO \"meander\""] {
                let sql = format!("ALTER TABLE \"public\".\"{table}\" {remedy}");
                assert!(message.contains(&sql), "{sql}: {message}");
            }
        }
        assert!(message.ends_with("; and 2 more, see status.tables"), "{message}");
    }

    #[test]
    fn the_budget_is_low_before_it_is_used_up_and_never_without_a_limit() {
        let slot = |retained, safe| SlotState {
            retained: Some(retained),
            safe,
            ..SlotState::default()
        };
        assert!(budget(&slot(900, None)).is_none());
        assert!(budget(&slot(700, Some(300))).is_none());
        assert!(budget(&slot(800, Some(200))).is_some());
        assert!(budget(&slot(1100, Some(0))).is_some());
    }
}

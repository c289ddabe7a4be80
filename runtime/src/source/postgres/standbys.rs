//! The standbys that a failover slot waits for: nothing is sent that those have not confirmed whose physical slots
//! `synchronized_standby_slots` names (PostgreSQL 17). Where one of them is gone the capture stands still, and PostgreSQL says so in its
//! own log only.

use crate::source::postgres::{
    preflight::{Catalog, SourceError},
    wire::{quote_identifier, quote_literal},
};

const NAMED: &str = "
    SELECT w.name,
           CASE WHEN s.slot_name IS NULL THEN 'does not exist'
                WHEN s.slot_type <> 'physical' THEN 'is none of a standby'
                WHEN s.wal_status = 'lost' THEN 'has lost its WAL'
                WHEN NOT s.active THEN 'is read by nobody' END
    FROM (SELECT pg_catalog.btrim(name, E' \t\n\"') AS name, place
          FROM pg_catalog.regexp_split_to_table(pg_catalog.current_setting('synchronized_standby_slots', true), ',')
               WITH ORDINALITY AS n (name, place)) w
    LEFT JOIN pg_catalog.pg_replication_slots s ON s.slot_name = w.name
    WHERE w.name <> '' AND NOT pg_catalog.pg_is_in_recovery()
    ORDER BY w.place";

/// The slots that `synchronized_standby_slots` names.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct Standbys {
    /// By which somebody confirms.
    present: Vec<String>,
    /// By which nobody does, and what is wrong with each.
    absent: Vec<(String, String)>,
}

impl Standbys {
    /// How many slots hold the capture up.
    #[must_use]
    pub fn absent(&self) -> usize {
        self.absent.len()
    }

    /// What holds the capture up, and what to do, if anything does.
    #[must_use]
    pub fn problem(&self) -> Option<String> {
        if self.absent.is_empty() {
            return None;
        }
        let causes = self.absent.iter().map(|(slot, cause)| format!("{slot:?} {cause}"));
        let kept: Vec<_> = self.present.iter().map(|slot| quote_identifier(slot)).collect();
        Some(format!(
            "nothing is captured that the standbys of synchronized_standby_slots have not confirmed, and of their replication slots {}: start the standby, or run ALTER SYSTEM SET synchronized_standby_slots = {}; SELECT pg_reload_conf();",
            causes.collect::<Vec<_>>().join(", "),
            quote_literal(&kept.join(", "))
        ))
    }
}

impl Catalog {
    /// The slots that `synchronized_standby_slots` names; none where there is no such setting, or where nothing waits for it.
    ///
    /// # Errors
    /// When the server does not answer.
    pub async fn standbys(&self) -> Result<Standbys, SourceError> {
        let mut standbys = Standbys::default();
        for row in self.query(NAMED, &[]).await? {
            match row.get(1) {
                Some(cause) => standbys.absent.push((row.get(0), cause)),
                None => standbys.present.push(row.get(0)),
            }
        }
        Ok(standbys)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn what_is_said_of_a_standby_that_is_gone_leaves_the_others_in_the_setting() {
        let mut standbys = Standbys {
            present: vec!["one".to_owned(), "three".to_owned()],
            absent: vec![],
        };
        assert_eq!(standbys.problem(), None);
        standbys.absent.push(("two".to_owned(), "is read by nobody".to_owned()));
        let said = standbys.problem().unwrap();
        assert!(said.contains(r#"slots "two" is read by nobody: start"#), "{said}");
        assert!(
            said.ends_with(r#"SET synchronized_standby_slots = '"one", "three"'; SELECT pg_reload_conf();"#),
            "{said}"
        );
    }
}

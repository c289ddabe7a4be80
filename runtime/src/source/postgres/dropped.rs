//! Tables that are gone. The log tells of no DROP TABLE, so whoever sees in the catalog that a table is gone writes a message into the
//! log: that is after every change of the table, and it has a place, the same each time that it is sent.

use super::preflight::{Catalog, SourceError};

/// Prefix of the message. Its content is OIDs of tables, separated by commas.
pub const DROPPED_PREFIX: &str = "meander.dropped";
/// The most tables that one message names.
const NAMED: usize = 1000;

const MISSING: &str = "
    SELECT pg_catalog.pg_snapshot_xmin(s.now)::text::bigint, pg_catalog.pg_snapshot_xmax(s.now)::text::bigint,
           ARRAY(SELECT t.oid FROM unnest($1::oid[]) t (oid)
                 WHERE NOT pg_catalog.pg_is_in_recovery()
                   AND NOT EXISTS (SELECT FROM pg_catalog.pg_class c WHERE c.oid = t.oid))
    FROM (SELECT pg_catalog.pg_current_snapshot() AS now) s";

/// What a look at the catalog did not find.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct Missing {
    /// OIDs of tables that it did not see. It can be that it did not see yet what is in the log already.
    pub tables: Vec<u32>,
    /// Every transaction before this one has ended.
    pub ended: i64,
    /// No transaction from this one on has begun.
    pub begun: i64,
}

impl Missing {
    /// Tables that are missing for good: they were before, and whoever may have been about to make one then has ended since. None where
    /// that is not known yet.
    #[must_use]
    pub fn for_good(&self, before: &Self) -> Option<Vec<u32>> {
        (self.ended >= before.begun).then(|| {
            let gone = self.tables.iter().filter(|oid| before.tables.contains(oid));
            gone.copied().collect()
        })
    }
}

/// The OIDs that a message names; none in one that is not ours.
#[must_use]
pub fn told(content: &[u8]) -> Vec<u32> {
    let text = str::from_utf8(content).unwrap_or_default();
    text.split(',').take(NAMED).filter_map(|oid| oid.parse().ok()).collect()
}

impl Catalog {
    /// Which of these tables the catalog does not have. On a standby, where nothing could be written of it, none.
    ///
    /// # Errors
    /// When the server does not answer.
    pub async fn missing(&self, tables: &[u32]) -> Result<Missing, SourceError> {
        let rows = self.query(MISSING, &[&tables]).await?;
        Ok(rows.first().map_or_else(Missing::default, |row| Missing {
            ended: row.get(0),
            begun: row.get(1),
            tables: row.get(2),
        }))
    }

    /// Writes into the log that tables are gone.
    ///
    /// # Errors
    /// When the server does not answer.
    pub async fn tell_dropped(&self, tables: &[u32]) -> Result<(), SourceError> {
        for some in tables.chunks(NAMED) {
            let oids: Vec<String> = some.iter().map(u32::to_string).collect();
            // A transaction that has an id makes the server write the log to disk when it ends, and so send it.
            let sql = "SELECT pg_catalog.pg_current_xact_id()::text,
                              pg_catalog.pg_logical_emit_message(false, $1, $2)::text";
            self.query(sql, &[&DROPPED_PREFIX, &oids.join(",")]).await?;
        }
        Ok(())
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_table_is_gone_when_nobody_is_left_who_could_still_be_making_it() {
        let look = |ended, begun, tables: &[u32]| Missing {
            tables: tables.to_vec(),
            ended,
            begun,
        };
        let before = look(7, 9, &[1, 2]);
        assert_eq!(look(8, 20, &[1, 2]).for_good(&before), None);
        assert_eq!(look(9, 20, &[2, 3]).for_good(&before), Some(vec![2]));
    }

    #[test]
    fn what_is_no_list_of_oids_names_nothing() {
        assert_eq!(told(b"16400,16401"), [16400, 16401]);
        for content in [&b""[..], b"\xFF", b"-1", b"4294967296", b"t"] {
            assert!(told(content).is_empty());
        }
    }
}

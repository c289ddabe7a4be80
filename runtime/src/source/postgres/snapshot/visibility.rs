//! Which transactions a snapshot of the database sees.

use std::str::FromStr;

/// What `pg_current_snapshot()` says.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Visibility {
    /// Every transaction before this one is decided.
    xmin: u64,
    /// No transaction from this one on is decided.
    xmax: u64,
    /// Transactions between the two that are not decided, in order. A transaction whose commit is in the WAL already is among them
    /// until the server has taken it off its list, which is later: with synchronous replication, any time later.
    running: Vec<u64>,
}

impl Visibility {
    /// True if the changes of this committed transaction can be seen.
    #[must_use]
    pub fn sees(&self, xid: u32) -> bool {
        let xid = self.full(xid);
        xid < self.xmin || (xid < self.xmax && self.running.binary_search(&xid).is_err())
    }

    /// True if a transaction that began before `barrier` is not decided.
    #[must_use]
    pub fn runs_before(&self, barrier: u64) -> bool {
        self.running.first().is_some_and(|xid| *xid < barrier)
    }

    /// The stream tells the lower half of a transaction's id. No two ids that matter at a time are 2³¹ apart.
    fn full(&self, xid: u32) -> u64 {
        #[allow(clippy::cast_possible_truncation)]
        let distance = xid.wrapping_sub(self.xmax as u32).cast_signed();
        self.xmax.saturating_add_signed(distance.into())
    }
}

/// The text is not a snapshot.
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
#[error("{0:?} is not what pg_current_snapshot() prints")]
pub struct InvalidSnapshot(String);

impl FromStr for Visibility {
    type Err = InvalidSnapshot;

    fn from_str(text: &str) -> Result<Self, Self::Err> {
        let invalid = || InvalidSnapshot(text.to_owned());
        let number = |text: &str| text.parse::<u64>().map_err(|_| invalid());
        let mut parts = text.splitn(3, ':');
        let (Some(xmin), Some(xmax), Some(running)) = (parts.next(), parts.next(), parts.next()) else {
            return Err(invalid());
        };
        let mut running: Vec<u64> = running
            .split(',')
            .filter(|xid| !xid.is_empty())
            .map(number)
            .collect::<Result<_, _>>()?;
        running.sort_unstable();
        Ok(Self {
            xmin: number(xmin)?,
            xmax: number(xmax)?,
            running,
        })
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_snapshot_sees_what_was_decided_before_it() {
        let snapshot: Visibility = "10:20:12,15".parse().unwrap();
        let seen: Vec<u32> = (8..22).filter(|xid| snapshot.sees(*xid)).collect();
        assert_eq!(seen, [8, 9, 10, 11, 13, 14, 16, 17, 18, 19]);
        assert!(snapshot.runs_before(13) && !snapshot.runs_before(12));
        assert!(!"10:20:".parse::<Visibility>().unwrap().runs_before(30));
        assert!("10:20".parse::<Visibility>().is_err() && "a:b:c".parse::<Visibility>().is_err());
    }

    #[test]
    fn ids_are_compared_across_the_wrap_around() {
        let turn = 1_u64 << 32;
        let snapshot: Visibility = format!("{}:{}:{}", turn - 2, turn + 5, turn - 2).parse().unwrap();
        assert!(!snapshot.sees(u32::MAX - 1));
        assert!(snapshot.sees(u32::MAX) && snapshot.sees(4));
        assert!(!snapshot.sees(5));
        assert!(snapshot.sees(3_000_000_000), "an old one of the turn before");
    }
}

//! What a replay goes on from after a crash.
//!
//! A target that is exactly once keeps it beside what it delivered, in one transaction with it; for others, [`super::keeper`] keeps it. The
//! range is kept as it was resolved, partition by partition, so that whoever goes on replays the same one.

use std::{fmt, str::FromStr};

use serde::{Deserialize, Serialize};

use super::{
    range::Range,
    record::{InvalidResumeToken, Next, ResumeToken},
    target::Mark,
};

/// No replay comes to so many records; what somebody says beyond that is not true.
const MOST: u64 = 1 << 53;

/// How far a replay has come, and of what.
#[derive(Clone, Debug)]
pub struct Checkpoint {
    /// The range, as it was resolved when the replay began.
    pub range: Range,
    /// How far it is.
    pub reached: Reached,
}

impl Checkpoint {
    /// That of a replay that begins.
    #[must_use]
    pub fn at_the_start_of(range: Range) -> Self {
        let next = range.partitions.iter().map(|stretch| stretch.start).collect();
        Self {
            range,
            reached: Reached { next, done: None },
        }
    }

    /// One that was kept, if both of its parts are of the same range.
    ///
    /// # Errors
    /// When they are not, in words.
    pub fn kept(range: Range, reached: Reached) -> Result<Self, String> {
        let (partitions, places) = (range.partitions.len(), reached.next.len());
        if partitions == places {
            Ok(Self { range, reached })
        } else {
            Err(format!(
                "its range has {partitions} partitions, and {places} places in them"
            ))
        }
    }

    /// What is still to be delivered. If something of it is deleted, the reader finds that out.
    #[must_use]
    pub fn rest(&self) -> Range {
        let mut rest = self.range.clone();
        for (stretch, next) in rest.partitions.iter_mut().zip(&self.reached.next) {
            stretch.start = *next;
            stretch.truncated = false;
        }
        rest
    }
}

/// How far a replay has come.
///
/// Each partition has its place, and not the last record alone: a partition of which everything is delivered says nothing of the replay any more,
/// whatever becomes of it, and of another it is certain that something is missing if its place is.
#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "camelCase")]
pub struct Reached {
    /// The offset of the first record of each partition that is not delivered, in the order of the range.
    pub next: Vec<i64>,
    /// What is delivered; none before the first record.
    pub done: Option<Done>,
}

impl Reached {
    /// Moves to where what `mark` tells of is delivered as well, and partitions go on at these places.
    pub fn go_on(&mut self, places: impl IntoIterator<Item = Next>, mark: &Mark) -> Done {
        for (partition, offset) in places {
            if let Some(next) = self.next.get_mut(partition) {
                *next = offset;
            }
        }
        *self.done.insert(Done::and(self.done, mark))
    }
}

/// What is delivered.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "camelCase")]
pub struct Done {
    /// Names the place after the last record.
    pub resume: ResumeToken,
    /// How many records.
    pub delivered: u64,
    /// How many the filter left out up to there.
    pub filtered: u64,
    /// Event time of the first.
    pub first_time: i64,
}

/// What a subscriber keeps of it, in one word: `token+delivered+filtered+firstTime`.
impl fmt::Display for Done {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let Self {
            resume,
            delivered,
            filtered,
            first_time,
        } = self;
        write!(f, "{resume}+{delivered}+{filtered}+{first_time}")
    }
}

impl FromStr for Done {
    type Err = InvalidResumeToken;

    fn from_str(text: &str) -> Result<Self, Self::Err> {
        let parse = || {
            let mut parts = text.split('+');
            let resume = parts.next()?.parse().ok()?;
            let mut count = || parts.next()?.parse().ok().filter(|count| *count <= MOST);
            let (delivered, filtered) = (count()?, count()?);
            let first_time = parts.next()?.parse().ok()?;
            let done = Self {
                resume,
                delivered,
                filtered,
                first_time,
            };
            parts.next().is_none().then_some(done)
        };
        parse().ok_or_else(|| InvalidResumeToken(text.to_owned()))
    }
}

impl Done {
    /// What is delivered once these records are as well.
    #[must_use]
    pub fn and(done: Option<Self>, mark: &Mark) -> Self {
        Self {
            resume: mark.resume,
            delivered: done.map_or(0, |done| done.delivered) + mark.records,
            filtered: done.map_or(0, |done| done.filtered) + mark.passed.filtered,
            first_time: done.map_or(mark.first_time, |done| done.first_time),
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn what_a_subscriber_keeps_reads_back_as_it_was_written() {
        let token = "1:0/16B3748:3#1@1763632800000+1204+17+1763632799000123";
        assert_eq!(token.parse::<Done>().unwrap().to_string(), token);
        for wrong in [
            "",
            "1:0/16B3748:3#1@1763632800000",
            "1:0/1:0#0@1+1+1",
            "1:0/1:0#0@1+-1+0+1",
            "1:0/1:0#0@1+18446744073709551615+0+1",
            "1:0/1:0#0@1+1+0+1+1",
        ] {
            assert!(wrong.parse::<Done>().is_err(), "{wrong}");
        }
    }
}

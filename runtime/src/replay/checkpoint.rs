//! What a replay goes on from after a crash.
//!
//! A target that is exactly once keeps it beside what it delivered, in one transaction with it; for others, [`super::keeper`] keeps it. The
//! range is kept as it was resolved, partition by partition, so that whoever goes on replays the same one.

use serde::{Deserialize, Serialize};

use super::{range::Range, record::ResumeToken, target::Mark};

/// How far a replay has come, and of what.
#[derive(Clone, Debug)]
pub struct Checkpoint {
    /// The range, as it was resolved when the replay began.
    pub range: Range,
    /// What is delivered; none before the first record.
    pub done: Option<Done>,
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

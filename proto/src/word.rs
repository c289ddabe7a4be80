//! What a replay leaves behind.

use serde::{Deserialize, Serialize};

use crate::v1::ReplayProgress;

/// The last word of a replay's pod, which Kubernetes keeps as the container's termination message: it survives an operator that was away.
#[derive(Clone, Debug, Default, PartialEq, Serialize, Deserialize)]
#[serde(rename_all = "camelCase", default)]
pub struct FinalWord {
    /// `Succeeded`, `Failed` or `Cancelled`; where it was interrupted, what it was doing.
    pub phase: String,
    /// Why it ended, in one word.
    pub reason: String,
    /// Why it ended, in one sentence.
    pub message: String,
    /// What is missing of the range, in one sentence; empty if nothing is.
    #[serde(skip_serializing_if = "String::is_empty")]
    pub truncated: String,
    /// How far it came. There is room for some topics only.
    #[serde(flatten)]
    pub progress: ReplayProgress,
}

//! Conditions: which there are, and how a new judgement becomes one.

use jiff::Timestamp;
use k8s_openapi::apimachinery::pkg::apis::meta::v1::{Condition, Time};

/// Everything is as the spec wants it.
pub const READY: &str = "Ready";
/// The spec makes sense.
pub const SPEC_VALID: &str = "SpecValid";
/// The database can be captured.
pub const SOURCE_READY: &str = "SourceReady";
/// Every sink takes changes.
pub const SINKS_READY: &str = "SinksReady";
/// The runtime's pod is there.
pub const RUNTIME_AVAILABLE: &str = "RuntimeAvailable";
/// Changes are moving, or there are none.
pub const PROGRESSING: &str = "Progressing";
/// Changes were lost between PostgreSQL and Kafka.
pub const SOURCE_GAP: &str = "SourceGap";
/// Changes were lost between Kafka and Redis.
pub const REDIS_GAP: &str = "RedisGap";
/// Changes flow, and something needs a look.
pub const DEGRADED: &str = "Degraded";
/// The operator changes nothing, because somebody asked for that.
pub const RECONCILIATION_PAUSED: &str = "ReconciliationPaused";
/// The replay can be run.
pub const ACCEPTED: &str = "Accepted";
/// The replay has ended well.
pub const COMPLETE: &str = "Complete";
/// The replay has given up.
pub const FAILED: &str = "Failed";
/// The replay is held.
pub const SUSPENDED: &str = "Suspended";
/// Part of the range is no longer in Kafka.
pub const TRUNCATED_RANGE: &str = "TruncatedRange";
/// For kstatus: not there yet.
pub const RECONCILING: &str = "Reconciling";
/// For kstatus: it will not get there by itself.
pub const STALLED: &str = "Stalled";

/// True, False or Unknown.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Status {
    /// It is so.
    True,
    /// It is not so.
    False,
    /// Nobody knows.
    Unknown,
}

impl Status {
    /// As a condition has it.
    pub fn as_str(self) -> &'static str {
        match self {
            Self::True => "True",
            Self::False => "False",
            Self::Unknown => "Unknown",
        }
    }
}

impl From<bool> for Status {
    fn from(value: bool) -> Self {
        if value { Self::True } else { Self::False }
    }
}

/// A condition that does not yet know since when it is so.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Judgement {
    /// The condition's type.
    pub type_: &'static str,
    /// Whether it is so.
    pub status: Status,
    /// Why, in one word.
    pub reason: String,
    /// Why, and what to do, in one sentence.
    pub message: String,
}

impl Judgement {
    /// A judgement.
    pub fn new(type_: &'static str, status: Status, reason: impl ToString, message: impl Into<String>) -> Self {
        Self {
            type_,
            status,
            reason: word(&reason.to_string()),
            message: sentence(message.into()),
        }
    }

    /// What `old` said of this type, as a judgement.
    pub fn remembered(type_: &'static str, old: &[Condition]) -> Option<Self> {
        let condition = old.iter().find(|condition| condition.type_ == type_)?;
        let status = match condition.status.as_str() {
            "True" => Status::True,
            "False" => Status::False,
            _ => Status::Unknown,
        };
        Some(Self {
            type_,
            status,
            reason: condition.reason.clone(),
            message: condition.message.clone(),
        })
    }
}

/// A reason comes from another process and the API server is strict about it.
fn word(reason: &str) -> String {
    let kept: String = reason
        .chars()
        .filter(|c| c.is_ascii_alphanumeric() || *c == '_')
        .take(256)
        .collect();
    let kept = kept.trim_start_matches(|c: char| !c.is_ascii_alphabetic());
    if kept.is_empty() {
        "Unspecified".to_owned()
    } else {
        kept.to_owned()
    }
}

fn sentence(mut message: String) -> String {
    const LONGEST: usize = 2048;
    if message.len() > LONGEST {
        let end = (0..=LONGEST)
            .rev()
            .find(|end| message.is_char_boundary(*end))
            .unwrap_or(0);
        message.truncate(end);
    }
    message
}

/// The conditions that `judgements` come to: a transition time moves only when the status does.
pub fn conditions(old: &[Condition], judgements: Vec<Judgement>, generation: i64, now: Timestamp) -> Vec<Condition> {
    judgements
        .into_iter()
        .map(|judgement| {
            let status = judgement.status.as_str();
            let since = old
                .iter()
                .find(|condition| condition.type_ == judgement.type_ && condition.status == status)
                .map_or_else(
                    || Time(whole_seconds(now)),
                    |condition| condition.last_transition_time.clone(),
                );
            Condition {
                type_: judgement.type_.to_owned(),
                status: status.to_owned(),
                reason: judgement.reason,
                message: judgement.message,
                observed_generation: Some(generation),
                last_transition_time: since,
            }
        })
        .collect()
}

/// Leaves out the conditions that others keep in the same list.
pub fn keep_ours(conditions: &mut Vec<Condition>) {
    const OURS: [&str; 17] = [
        READY,
        SPEC_VALID,
        SOURCE_READY,
        SINKS_READY,
        RUNTIME_AVAILABLE,
        PROGRESSING,
        SOURCE_GAP,
        REDIS_GAP,
        DEGRADED,
        RECONCILIATION_PAUSED,
        ACCEPTED,
        COMPLETE,
        FAILED,
        SUSPENDED,
        TRUNCATED_RANGE,
        RECONCILING,
        STALLED,
    ];
    conditions.retain(|condition| OURS.contains(&condition.type_.as_str()));
}

/// The (status, reason) of a condition.
pub fn state<'a>(conditions: &'a [Condition], type_: &str) -> Option<(&'a str, &'a str)> {
    conditions
        .iter()
        .find(|condition| condition.type_ == type_)
        .map(|condition| (condition.status.as_str(), condition.reason.as_str()))
}

/// Kubernetes keeps times of conditions in whole seconds.
pub fn whole_seconds(time: Timestamp) -> Timestamp {
    Timestamp::from_second(time.as_second()).unwrap_or(time)
}

#[cfg(test)]
mod tests {
    #![allow(clippy::unwrap_used)]
    use super::*;

    fn at(second: i64) -> Timestamp {
        Timestamp::from_second(second).unwrap()
    }

    #[test]
    fn transition_time_moves_only_with_the_status() {
        let first = conditions(&[], vec![Judgement::new(READY, Status::False, "A", "a")], 1, at(10));
        assert_eq!(first[0].last_transition_time.0, at(10));
        let second = conditions(&first, vec![Judgement::new(READY, Status::False, "B", "b")], 2, at(20));
        assert_eq!(second[0].last_transition_time.0, at(10));
        assert_eq!(
            (second[0].reason.as_str(), second[0].observed_generation),
            ("B", Some(2))
        );
        let third = conditions(&second, vec![Judgement::new(READY, Status::True, "C", "c")], 2, at(30));
        assert_eq!(third[0].last_transition_time.0, at(30));
    }

    #[test]
    fn a_foreign_reason_becomes_one_that_the_api_server_takes() {
        for (given, kept) in [
            ("KafkaUnreachable", "KafkaUnreachable"),
            ("9 lives!", "lives"),
            ("", "Unspecified"),
        ] {
            assert_eq!(Judgement::new(READY, Status::True, given, "").reason, kept);
        }
        assert!(Judgement::new(READY, Status::True, "A", "ü".repeat(5000)).message.len() <= 2048);
    }
}

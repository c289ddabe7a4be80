//! What is said of a run: a table for people, and the same as JSON.

use std::{collections::BTreeMap, fmt::Write as _, time::Duration};

use serde::Serialize;

use crate::fault::{Kind, Round};

/// What a round came to.
#[derive(Clone, Debug, Serialize)]
#[serde(rename_all = "camelCase")]
pub struct Outcome {
    #[serde(flatten)]
    pub round: Round,
    /// Until the last cause was taken away, and what was ended had started again.
    pub lasted: Duration,
    /// The longest time without a change for a consumer.
    pub kafka_silent: Duration,
    pub redis_silent: Duration,
}

/// A run.
#[derive(Debug, Serialize)]
#[serde(rename_all = "camelCase")]
pub struct Report {
    pub seed: u64,
    pub faults: usize,
    pub seconds: u64,
    /// Looks at the slot and the checkpoint.
    pub slot_samples: u64,
    /// What befell the replay of everything, and how many processes it took.
    pub replay_faults: usize,
    pub replay_attempts: usize,
    pub kinds: Vec<Line>,
    pub rounds: Vec<Outcome>,
    /// What the verifier counted.
    pub verified: serde_json::Value,
}

/// All rounds of one kind, in seconds.
#[derive(Debug, Serialize)]
#[serde(rename_all = "camelCase")]
pub struct Line {
    pub what: String,
    pub n: usize,
    pub lasted: Spread,
    pub kafka_silent: Spread,
    pub redis_silent: Spread,
}

#[derive(Debug, Serialize)]
pub struct Spread {
    pub p50: f64,
    pub max: f64,
}

impl Spread {
    fn of(outcomes: &[&Outcome], field: impl Fn(&Outcome) -> Duration) -> Self {
        let mut sorted: Vec<_> = outcomes.iter().map(|outcome| field(outcome).as_secs_f64()).collect();
        sorted.sort_by(f64::total_cmp);
        Self {
            p50: sorted
                .get(sorted.len().saturating_sub(1) / 2)
                .copied()
                .unwrap_or_default(),
            max: sorted.last().copied().unwrap_or_default(),
        }
    }
}

/// One line for each kind, and one for the rounds of two.
pub fn lines(outcomes: &[Outcome]) -> Vec<Line> {
    let mut kinds: BTreeMap<Option<Kind>, Vec<&Outcome>> = BTreeMap::new();
    for outcome in outcomes {
        let kind = match outcome.round.faults[..] {
            [fault] => Some(fault.kind),
            _ => None,
        };
        kinds.entry(kind).or_default().push(outcome);
    }
    kinds
        .into_iter()
        .map(|(kind, outcomes)| Line {
            what: kind.map_or("two at a time", Kind::name).to_owned(),
            n: outcomes.len(),
            lasted: Spread::of(&outcomes, |outcome| outcome.lasted),
            kafka_silent: Spread::of(&outcomes, |outcome| outcome.kafka_silent),
            redis_silent: Spread::of(&outcomes, |outcome| outcome.redis_silent),
        })
        .collect()
}

impl Report {
    pub fn table(&self) -> String {
        let mut table = format!(
            "{:34} {:>3}   {:>13}   {:>13}   {:>13}\n{:34} {:>3}   {:>6} {:>6}   {:>6} {:>6}   {:>6} {:>6}\n",
            "",
            "",
            "fault lasted",
            "Kafka silent",
            "Redis silent",
            "seconds",
            "n",
            "p50",
            "max",
            "p50",
            "max",
            "p50",
            "max"
        );
        for line in &self.kinds {
            let Line {
                what,
                n,
                lasted,
                kafka_silent,
                redis_silent,
            } = line;
            // Writing to a string does not fail.
            let _ = write!(table, "{what:34} {n:>3}");
            for spread in [lasted, kafka_silent, redis_silent] {
                let _ = write!(table, "   {:>6.1} {:>6.1}", spread.p50, spread.max);
            }
            table.push('\n');
        }
        table
    }
}

//! What is said of a run, and of several: a table for people, and the same as JSON.

use std::{collections::BTreeMap, fmt::Write as _, fs, iter::Sum, path::Path, time::Duration};

use serde::{Deserialize, Serialize};

use crate::fault::{Kind, Round};

/// What a round came to.
#[derive(Clone, Debug, Deserialize, Serialize)]
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

/// A run whose comparisons all agreed.
#[derive(Debug, Deserialize, Serialize)]
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
    pub rounds: Vec<Outcome>,
    /// What the verifier counted.
    pub verified: serde_json::Value,
}

/// Of some time in all rounds of a kind, in seconds.
struct Spread {
    p50: f64,
    max: f64,
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
pub fn table<'a>(outcomes: impl IntoIterator<Item = &'a Outcome>) -> String {
    let mut kinds: BTreeMap<Option<Kind>, Vec<&Outcome>> = BTreeMap::new();
    for outcome in outcomes {
        let kind = match outcome.round.faults[..] {
            [fault] => Some(fault.kind),
            _ => None,
        };
        kinds.entry(kind).or_default().push(outcome);
    }
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
    for (kind, outcomes) in kinds {
        let what = kind.map_or("two at a time", Kind::name);
        // Writing to a string does not fail.
        let _ = write!(table, "{what:34} {:>3}", outcomes.len());
        for spread in [
            Spread::of(&outcomes, |outcome| outcome.lasted),
            Spread::of(&outcomes, |outcome| outcome.kafka_silent),
            Spread::of(&outcomes, |outcome| outcome.redis_silent),
        ] {
            let _ = write!(table, "   {:>6.1} {:>6.1}", spread.p50, spread.max);
        }
        table.push('\n');
    }
    table
}

/// What the runs of a file come to, of which each line is a report.
pub fn total(file: &Path) -> String {
    let text = fs::read_to_string(file).unwrap();
    let runs: Vec<Report> = text.lines().map(|line| serde_json::from_str(line).unwrap()).collect();
    let seeds: Vec<_> = runs.iter().map(|run| run.seed.to_string()).collect();
    format!(
        "{}\n{} faults in {} s, in {} runs (seeds {}); {} changes were committed; the slot was looked at {} times and never ahead of the checkpoint\n\
         replays of everything went through {} faults more, by {} processes\n",
        table(runs.iter().flat_map(|run| &run.rounds)),
        sum(&runs, |run| run.faults),
        sum(&runs, |run| run.seconds),
        runs.len(),
        seeds.join(", "),
        sum(&runs, |run| run.verified["postgres"]["changes"].as_u64().unwrap()),
        sum(&runs, |run| run.slot_samples),
        sum(&runs, |run| run.replay_faults),
        sum(&runs, |run| run.replay_attempts),
    )
}

fn sum<T: Sum>(runs: &[Report], field: impl Fn(&Report) -> T) -> T {
    runs.iter().map(field).sum()
}

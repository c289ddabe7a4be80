//! How far a replay is, as it is reported.

use std::{collections::VecDeque, time::Duration};

use meander_proto::v1::{ReplayProgress, ResolvedRange, replay_progress::Phase};
use tokio::time::Instant;

use super::{
    range::Range,
    target::{Counts, Tally},
};

/// The rate is the mean of this long.
const RATE_WINDOW: Duration = Duration::from_secs(5);
/// Shown until the replay is complete, however close it is.
const NEARLY: f64 = 99.9;

/// Turns what is counted into what is reported.
pub struct Meter {
    /// What is delivered.
    pub tally: Tally,
    resolved: ResolvedRange,
    /// When it was looked at, and what was delivered then.
    samples: VecDeque<(Instant, u64)>,
}

impl Meter {
    /// A meter for one delivery of a range.
    #[must_use]
    pub fn new(range: &Range) -> Self {
        Self {
            tally: Tally::default(),
            resolved: ResolvedRange {
                from_time_micros: range.from.map_or(0, |from| from.saturating_mul(1000)),
                to_time_micros: range.end_time(),
                to_position: range.end.map(|end| end.to_string()).unwrap_or_default(),
                offsets: range.offsets(),
            },
            samples: VecDeque::new(),
        }
    }

    /// The report for now. `factor` is that of the speed, none when unpaced.
    pub fn report(&mut self, phase: Phase, behind: Duration, factor: Option<f64>, now: Instant) -> ReplayProgress {
        let counts = self.tally.counts();
        let complete = phase == Phase::Succeeded;
        let first = counts.first.map_or(0, |(time, _)| time);
        let current = counts.last.map_or(0, |(time, _)| time);
        let mut resolved_range = self.resolved.clone();
        if resolved_range.from_time_micros == 0 {
            resolved_range.from_time_micros = first;
        }
        let percent = if complete { 100.0 } else { self.percent(&counts) };
        ReplayProgress {
            phase: phase.into(),
            delivered: counts.delivered,
            percent,
            current_time_micros: current,
            current_position: counts
                .coordinate
                .map(|last| last.position.to_string())
                .unwrap_or_default(),
            events_per_second: self.rate(counts.delivered, now),
            behind_millis: millis(behind),
            eta_seconds: if complete {
                0
            } else {
                self.eta(&counts, percent, behind, factor)
            },
            resolved_range: Some(resolved_range),
            first_event_time_micros: first,
            delivery_micros: counts.first.zip(counts.last).map_or(0, |((_, first), (_, last))| {
                i64::try_from(last.saturating_duration_since(first).as_micros()).unwrap_or(i64::MAX)
            }),
        }
    }

    /// By event time: it is known beforehand, while the number of records is not.
    fn percent(&self, counts: &Counts) -> f64 {
        let (Some((first, _)), Some((current, _))) = (counts.first, counts.last) else {
            return 0.0;
        };
        let whole = self.resolved.to_time_micros.saturating_sub(first);
        if whole <= 0 {
            return 0.0;
        }
        (current.saturating_sub(first) as f64 / whole as f64 * 100.0).clamp(0.0, NEARLY)
    }

    fn rate(&mut self, delivered: u64, now: Instant) -> f64 {
        self.samples.push_back((now, delivered));
        while self.samples.len() > 2
            && self
                .samples
                .get(1)
                .is_some_and(|(at, _)| now.duration_since(*at) >= RATE_WINDOW)
        {
            self.samples.pop_front();
        }
        match self.samples.front() {
            Some((at, before)) if now > *at => {
                delivered.saturating_sub(*before) as f64 / now.duration_since(*at).as_secs_f64()
            }
            _ => 0.0,
        }
    }

    /// Paced, what is left of the event time at the speed; unpaced, as it went until now.
    fn eta(&self, counts: &Counts, percent: f64, behind: Duration, factor: Option<f64>) -> u64 {
        let (Some((_, started)), Some((current, last))) = (counts.first, counts.last) else {
            return 0;
        };
        let seconds = match factor {
            Some(factor) => {
                let left = self.resolved.to_time_micros.saturating_sub(current).max(0);
                left as f64 / 1e6 / factor + behind.as_secs_f64()
            }
            None if percent > 0.0 => {
                last.saturating_duration_since(started).as_secs_f64() * (100.0 - percent) / percent
            }
            None => return 0,
        };
        // From a float, `as` saturates.
        seconds.ceil() as u64
    }
}

fn millis(duration: Duration) -> u64 {
    u64::try_from(duration.as_millis()).unwrap_or(u64::MAX)
}

//! How far a replay is, as it is reported.

use std::{cmp::Reverse, collections::VecDeque, time::Duration};

use meander_proto::v1::{OtherTopics, ReplayProgress, ResolvedRange, TopicProgress, replay_progress::Phase};
use tokio::time::Instant;

use super::{
    Plan,
    pace::Clock,
    range::Range,
    record::Passed,
    tally::{Counts, Tally},
};

/// Rate and speed are the mean of this long.
const WINDOW: Duration = Duration::from_secs(5);
/// Shown until the replay is complete, however close it is.
const NEARLY: f64 = 99.9;
/// Topics that are reported each by itself.
const TOPICS: usize = 50;

/// Turns what is counted into what is reported.
pub struct Meter {
    /// What is delivered.
    pub tally: Tally,
    resolved: ResolvedRange,
    /// What is behind, with what is read and left out; it never falls.
    passed: Passed,
    /// Silences are cut, so that the event time does not tell how long the rest takes.
    cut: bool,
    /// When it was first looked at with something delivered, and what was behind then.
    begun: Option<(Instant, u64)>,
    samples: VecDeque<Sample>,
}

/// What was delivered at some time.
#[derive(Clone, Copy)]
struct Sample {
    at: Instant,
    delivered: u64,
    /// The event time that was reached, if any.
    time: Option<i64>,
}

impl Meter {
    /// A meter for one delivery of a range.
    #[must_use]
    pub fn new(range: &Range, tally: Tally, plan: &Plan) -> Self {
        Self {
            tally,
            resolved: ResolvedRange {
                from_time_micros: range.from.map_or(0, |from| from.saturating_mul(1000)),
                to_time_micros: range.end_time(),
                // The last change before a time is not looked for.
                to_position: (range.end.filter(|_| !range.ends_before_the_log()))
                    .map(|end| end.to_string())
                    .unwrap_or_default(),
                offsets: range.offsets(),
            },
            passed: Passed::default(),
            cut: plan.max_gap.is_some(),
            begun: None,
            samples: VecDeque::new(),
        }
    }

    /// Before anything is delivered.
    pub fn at_the_start(&self, phase: Phase) -> ReplayProgress {
        let counts = self.tally.counts();
        ReplayProgress {
            phase: phase.into(),
            ..self.reached(&counts, counts.passed)
        }
    }

    /// The report for now. `left_out` comes after everything that was handed over, and is not delivered.
    pub fn report(
        &mut self,
        phase: Phase,
        behind: Duration,
        clock: &Clock,
        left_out: Passed,
        now: Instant,
    ) -> ReplayProgress {
        let counts = self.tally.counts();
        let mut passed = counts.passed;
        passed += left_out;
        self.passed.offsets = self.passed.offsets.max(passed.offsets);
        self.passed.filtered = self.passed.filtered.max(passed.filtered);
        let sample = Sample {
            at: now,
            delivered: counts.delivered,
            time: counts.last.map(|(time, _)| time),
        };
        let (events_per_second, actual_speed) = self.rates(sample);
        let reached = self.reached(&counts, self.passed);
        if phase == Phase::Succeeded {
            return ReplayProgress {
                phase: phase.into(),
                percent: 100.0,
                percent_by_events: 100.0,
                speed: clock.speed().to_string(),
                ..reached
            };
        }
        ReplayProgress {
            phase: phase.into(),
            events_per_second,
            actual_speed,
            speed: clock.speed().to_string(),
            behind_millis: u64::try_from(behind.as_millis()).unwrap_or(u64::MAX),
            eta_seconds: self.eta(&counts, behind, clock, now),
            ..reached
        }
    }

    /// What is behind, in numbers that need no clock.
    fn reached(&self, counts: &Counts, passed: Passed) -> ReplayProgress {
        let first = counts.first.map_or(0, |(time, _)| time);
        let mut resolved_range = self.resolved.clone();
        if resolved_range.from_time_micros == 0 {
            resolved_range.from_time_micros = first;
        }
        let ahead = self.resolved.offsets.saturating_sub(passed.offsets);
        let mut topics = self.tally.topics();
        topics.sort_by_key(|topic| Reverse(topic.delivered));
        let others = topics.split_off(topics.len().min(TOPICS));
        ReplayProgress {
            delivered: counts.delivered,
            filtered: passed.filtered,
            total: counts.delivered + passed.filtered + ahead,
            bytes: counts.bytes,
            percent: self.percent(counts),
            percent_by_events: share(passed.offsets, self.resolved.offsets),
            current_time_micros: counts.last.map_or(0, |(time, _)| time),
            current_position: counts
                .coordinate
                .map(|last| last.position.to_string())
                .unwrap_or_default(),
            resolved_range: Some(resolved_range),
            first_event_time_micros: first,
            delivery_micros: counts.first.zip(counts.last).map_or(0, |((_, first), (_, last))| {
                i64::try_from(last.saturating_duration_since(first).as_micros()).unwrap_or(i64::MAX)
            }),
            other_topics: (!others.is_empty()).then(|| OtherTopics {
                topics: others.len() as u64,
                delivered: others.iter().map(|topic| topic.delivered).sum(),
                bytes: others.iter().map(|topic| topic.bytes).sum(),
            }),
            topics: topics
                .into_iter()
                .map(|topic| TopicProgress {
                    topic: topic.topic.to_string(),
                    delivered: topic.delivered,
                    bytes: topic.bytes,
                    first_time_micros: topic.first_time,
                    last_time_micros: topic.last_time,
                })
                .collect(),
            ..ReplayProgress::default()
        }
    }

    fn percent(&self, counts: &Counts) -> f64 {
        let (Some((first, _)), Some((current, _))) = (counts.first, counts.last) else {
            return 0.0;
        };
        let whole = u64::try_from(self.resolved.to_time_micros.saturating_sub(first)).unwrap_or(0);
        share(u64::try_from(current.saturating_sub(first)).unwrap_or(0), whole)
    }

    /// Records per second, and event time per time, of the last seconds.
    fn rates(&mut self, now: Sample) -> (f64, f64) {
        self.samples.push_back(now);
        while self.samples.len() > 2
            && self
                .samples
                .get(1)
                .is_some_and(|sample| now.at.duration_since(sample.at) >= WINDOW)
        {
            self.samples.pop_front();
        }
        let Some(before) = self.samples.front().filter(|before| now.at > before.at) else {
            return (0.0, 0.0);
        };
        let seconds = now.at.duration_since(before.at).as_secs_f64();
        let time = before.time.zip(now.time).map_or(0, |(before, now)| now - before);
        (
            now.delivered.saturating_sub(before.delivered) as f64 / seconds,
            time as f64 / 1e6 / seconds,
        )
    }

    /// What is left of the event time at the speed. Unpaced, or where silences are cut, what is left of the range as it went until now.
    fn eta(&mut self, counts: &Counts, behind: Duration, clock: &Clock, now: Instant) -> u64 {
        let Some((current, _)) = counts.last else {
            return 0;
        };
        let (started, before) = *self.begun.get_or_insert((now, self.passed.offsets));
        let seconds = match clock.factor() {
            Some(factor) if !self.cut => {
                let left = self.resolved.to_time_micros.saturating_sub(current).max(0);
                left as f64 / 1e6 / factor + behind.as_secs_f64()
            }
            _ => {
                let done = self.passed.offsets.saturating_sub(before);
                let left = self.resolved.offsets.saturating_sub(self.passed.offsets);
                if done == 0 {
                    return 0;
                }
                now.saturating_duration_since(started).as_secs_f64() * left as f64 / done as f64
            }
        };
        // From a float, `as` saturates.
        seconds.ceil() as u64
    }
}

/// In percent; 100 is for what is complete.
fn share(part: u64, whole: u64) -> f64 {
    if whole == 0 {
        return 0.0;
    }
    (part as f64 / whole as f64 * 100.0).clamp(0.0, NEARLY)
}

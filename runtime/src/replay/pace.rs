//! When each change is due: a virtual clock over the event time, without any I/O.

use std::time::Duration;

use meander_config::Speed;
use tokio::time::Instant;

/// The longest time that is slept at once; after it the clock is asked again.
const LONGEST_SLEEP: Duration = Duration::from_secs(3600);
/// Timers tick in milliseconds, so what is due within one is due now.
const TICK: Duration = Duration::from_millis(1);

/// When a change is due.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Due {
    /// Now, or it was before.
    Now,
    /// Not before this instant.
    At(Instant),
    /// Not while the clock is held.
    Held,
}

/// The virtual clock of a replay, over the event time, or what a [`Timeline`] makes of it.
///
/// It starts with the first change that is asked for: `due(t) = anchor.at + (t - anchor.time) / speed`. Holding it moves the
/// anchor on by as long as it was held; a change of speed sets a new anchor at the event time that the replay has reached, so
/// that what was delivered is never due again and a backlog made at one speed is not rushed through at another.
#[derive(Debug)]
pub struct Clock {
    speed: Speed,
    anchor: Option<Anchor>,
    held_since: Option<Instant>,
    /// The greatest event time that was said to be due.
    reached: i64,
}

/// An event time, in microseconds, and the instant that it is due at.
#[derive(Clone, Copy, Debug)]
struct Anchor {
    time: i64,
    at: Instant,
}

impl Clock {
    /// A clock that has not started.
    #[must_use]
    pub fn new(speed: Speed) -> Self {
        Self {
            speed,
            anchor: None,
            held_since: None,
            reached: i64::MIN,
        }
    }

    /// When a change with the event time `time` is due. Event times never fall from call to call.
    pub fn due(&mut self, time: i64, now: Instant) -> Due {
        if self.held_since.is_some() {
            return Due::Held;
        }
        match self.due_at(time, now) {
            Some(at) if at > now + TICK => Due::At(at.min(now + LONGEST_SLEEP)),
            _ => {
                self.reached = self.reached.max(time);
                Due::Now
            }
        }
    }

    /// How long ago a change was due that is not delivered yet; zero while it is not due, and when nothing ever is.
    #[must_use]
    pub fn behind(&self, time: i64, now: Instant) -> Duration {
        let now = self.held_since.unwrap_or(now);
        match (self.anchor, self.factor()) {
            (Some(anchor), Some(factor)) => {
                let due_after = scaled(time, anchor.time, factor);
                now.saturating_duration_since(anchor.at).saturating_sub(due_after)
            }
            _ => Duration::ZERO,
        }
    }

    /// Holds the clock, or lets it go on where it was held.
    pub fn hold(&mut self, held: bool, now: Instant) {
        match (held, self.held_since) {
            (true, None) => self.held_since = Some(now),
            (false, Some(since)) => {
                self.held_since = None;
                if let Some(anchor) = &mut self.anchor {
                    anchor.at += now.saturating_duration_since(since);
                }
            }
            _ => {}
        }
    }

    /// Goes on at another speed. `next` is the event time of the next change, if it is known.
    pub fn set_speed(&mut self, speed: Speed, next: Option<i64>, now: Instant) {
        if speed == self.speed {
            return;
        }
        let now = self.held_since.unwrap_or(now);
        self.anchor = match (self.anchor, self.factor()) {
            // It goes on between what was delivered and what is next, even if it is past the latter by now.
            (Some(anchor), Some(factor)) => {
                let passed = now.saturating_duration_since(anchor.at).as_secs_f64() * factor * 1e6;
                let passed = anchor.time.saturating_add(passed as i64);
                let time = next.map_or(passed, |next| passed.min(next)).max(self.reached);
                Some(Anchor { time, at: now })
            }
            // Unpaced until now: it starts anew with the next change.
            _ => next.map(|time| Anchor { time, at: now }),
        };
        self.speed = speed;
    }

    /// The speed.
    #[must_use]
    pub fn speed(&self) -> Speed {
        self.speed
    }

    /// The factor of the speed; none when unpaced.
    #[must_use]
    pub fn factor(&self) -> Option<f64> {
        match self.speed {
            Speed::Original => Some(1.0),
            Speed::Factor(factor) => Some(factor),
            Speed::Max => None,
        }
    }

    /// The instant that a change is due at, if it is paced and the instant can be expressed; starts the clock.
    fn due_at(&mut self, time: i64, now: Instant) -> Option<Instant> {
        let factor = self.factor()?;
        let anchor = *self.anchor.get_or_insert(Anchor { time, at: now });
        let after = scaled(time, anchor.time, factor);
        Some(anchor.at.checked_add(after).unwrap_or(now + LONGEST_SLEEP))
    }
}

/// Where on the clock's time each change is: at its event time, but for silences that are cut.
///
/// Places never fall, as the clock wants it: event times are taken as their running maximum.
#[derive(Debug, Default)]
pub struct Timeline {
    max_gap: Option<i64>,
    /// The running maximum of the event times, and its place.
    last: Option<(i64, i64)>,
}

impl Timeline {
    /// A timeline on which no two changes that follow each other are further apart than `max_gap`.
    #[must_use]
    pub fn new(max_gap: Option<Duration>) -> Self {
        Self {
            max_gap: max_gap.map(|gap| i64::try_from(gap.as_micros()).unwrap_or(i64::MAX)),
            last: None,
        }
    }

    /// The running maximum of the event times with this change, and its place.
    pub fn place(&mut self, time: i64) -> (i64, i64) {
        let next = match self.last {
            None => (time, time),
            Some((last, place)) => {
                let time = time.max(last);
                let gap = time.saturating_sub(last);
                (time, place.saturating_add(self.max_gap.map_or(gap, |max| gap.min(max))))
            }
        };
        self.last = Some(next);
        next
    }
}

/// `(time - from) / factor`, in microseconds; zero if `time` is before `from`.
fn scaled(time: i64, from: i64, factor: f64) -> Duration {
    let micros = u64::try_from(time.saturating_sub(from)).unwrap_or(0);
    Duration::try_from_secs_f64(micros as f64 / factor / 1e6).unwrap_or(Duration::MAX)
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;

    const SECOND: i64 = 1_000_000;

    fn at(clock: &mut Clock, time: i64, now: Instant) -> Duration {
        match clock.due(time, now) {
            Due::Now => Duration::ZERO,
            Due::At(at) => at - now,
            Due::Held => panic!("the clock is held"),
        }
    }

    #[test]
    fn it_starts_with_the_first_change_and_runs_at_its_speed() {
        let start = Instant::now();
        let mut clock = Clock::new(Speed::Factor(10.0));
        assert_eq!(clock.due(500 * SECOND, start), Due::Now);
        assert_eq!(at(&mut clock, 510 * SECOND, start), Duration::from_secs(1));
        assert_eq!(clock.due(510 * SECOND, start + Duration::from_secs(1)), Due::Now);
        assert_eq!(
            clock.behind(510 * SECOND, start + Duration::from_secs(3)),
            Duration::from_secs(2)
        );
        assert_eq!(
            clock.behind(600 * SECOND, start + Duration::from_secs(3)),
            Duration::ZERO
        );
    }

    #[test]
    fn a_held_clock_stands_still() {
        let start = Instant::now();
        let mut clock = Clock::new(Speed::Original);
        assert_eq!(clock.due(0, start), Due::Now);
        clock.hold(true, start + Duration::from_secs(1));
        assert_eq!(clock.due(5 * SECOND, start + Duration::from_secs(60)), Due::Held);
        assert_eq!(
            clock.behind(5 * SECOND, start + Duration::from_secs(60)),
            Duration::ZERO
        );
        clock.hold(false, start + Duration::from_secs(100));
        assert_eq!(
            at(&mut clock, 5 * SECOND, start + Duration::from_secs(100)),
            Duration::from_secs(4)
        );
    }

    #[test]
    fn a_change_of_speed_goes_on_from_where_the_replay_is() {
        let start = Instant::now();
        let mut clock = Clock::new(Speed::Original);
        assert_eq!(clock.due(0, start), Due::Now);
        // Two of ten seconds are over; the other eight take four at twice the speed.
        let now = start + Duration::from_secs(2);
        clock.set_speed(Speed::Factor(2.0), Some(10 * SECOND), now);
        assert_eq!(at(&mut clock, 10 * SECOND, now), Duration::from_secs(4));
        // Behind by a long way, then slowly: the backlog is spread out, not rushed through.
        let late = now + Duration::from_secs(1000);
        clock.set_speed(Speed::Factor(0.5), Some(10 * SECOND), late);
        assert_eq!(clock.due(10 * SECOND, late), Due::Now);
        assert_eq!(at(&mut clock, 11 * SECOND, late), Duration::from_secs(2));
    }

    #[test]
    fn from_unpaced_to_paced_starts_at_the_next_change() {
        let start = Instant::now();
        let mut clock = Clock::new(Speed::Max);
        assert_eq!(clock.due(0, start), Due::Now);
        assert_eq!(clock.due(1000 * SECOND, start), Due::Now);
        clock.set_speed(Speed::Original, Some(2000 * SECOND), start);
        assert_eq!(clock.due(2000 * SECOND, start), Due::Now);
        assert_eq!(at(&mut clock, 2001 * SECOND, start), Duration::from_secs(1));
    }

    #[test]
    fn a_silence_is_cut_and_what_follows_keeps_its_distance() {
        let mut timeline = Timeline::new(Some(Duration::from_secs(10)));
        let places = [100, 105, 3705, 3704, 3715, 3726]
            .map(|time| timeline.place(time * SECOND))
            .map(|(time, place)| (time / SECOND, place / SECOND));
        assert_eq!(
            places,
            [
                (100, 100),
                (105, 105),
                (3705, 115),
                (3705, 115),
                (3715, 125),
                (3726, 135)
            ]
        );
        let mut whole = Timeline::new(None);
        assert_eq!([7, 3600].map(|time| whole.place(time)), [(7, 7), (3600, 3600)]);
        assert_eq!(timeline.place(i64::MAX).1, 145 * SECOND);
    }

    #[test]
    fn absurd_times_and_speeds_do_not_overflow() {
        let start = Instant::now();
        let mut clock = Clock::new(Speed::Factor(1e-300));
        assert_eq!(clock.due(i64::MIN, start), Due::Now);
        assert_eq!(at(&mut clock, i64::MAX, start), LONGEST_SLEEP);
        clock.set_speed(Speed::Factor(1e300), Some(i64::MAX), start + Duration::from_secs(1));
        assert_eq!(clock.due(i64::MAX, start + Duration::from_secs(2)), Due::Now);
    }

    #[derive(Clone, Debug)]
    enum Act {
        Wait(u64),
        Hold(bool),
        Speed(f64),
        Max,
    }

    fn acts() -> impl Strategy<Value = Vec<Act>> {
        prop::collection::vec(
            prop_oneof![
                (0u64..5_000_000).prop_map(Act::Wait),
                any::<bool>().prop_map(Act::Hold),
                (0.01f64..100.0).prop_map(Act::Speed),
                Just(Act::Max),
            ],
            0..50,
        )
    }

    proptest! {
        /// Whatever is done to the clock, a later change is never due before an earlier one, and one that was delivered stays due.
        #[test]
        fn it_never_runs_backwards(acts in acts(), gap in 0i64..10 * SECOND) {
            let mut now = Instant::now();
            let mut clock = Clock::new(Speed::Original);
            let mut next = 0;
            let mut delivered = None;
            for act in acts {
                match act {
                    Act::Wait(micros) => now += Duration::from_micros(micros),
                    Act::Hold(held) => clock.hold(held, now),
                    Act::Speed(factor) => clock.set_speed(Speed::Factor(factor), Some(next), now),
                    Act::Max => clock.set_speed(Speed::Max, Some(next), now),
                }
                if let Some(delivered) = delivered {
                    prop_assert!(matches!(clock.due(delivered, now), Due::Now | Due::Held));
                }
                match (clock.due(next, now), clock.due(next + gap, now)) {
                    (Due::At(first), Due::At(second)) => prop_assert!(first <= second),
                    (Due::At(_), second) => prop_assert!(false, "the later change is due first: {second:?}"),
                    (Due::Now, _) => {
                        delivered = Some(next);
                        next += gap;
                    }
                    (Due::Held, second) => prop_assert_eq!(second, Due::Held),
                }
            }
        }
    }
}

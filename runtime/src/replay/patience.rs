//! How long what fails is tried again, and how long what is silent is waited for; and that both are said.

use std::time::Duration;

use backon::{BackoffBuilder as _, ExponentialBackoff, ExponentialBuilder};
use tokio::time::{Instant, sleep_until};

use super::tally::Trouble;

/// How long it is tried while nothing succeeds.
pub const PATIENCE: Duration = Duration::from_secs(120);
/// How long an answer may take before that is said.
pub const NOTICE: Duration = Duration::from_secs(10);
const SHORTEST_BACKOFF: Duration = Duration::from_millis(200);
const LONGEST_BACKOFF: Duration = Duration::from_secs(5);

/// Tries again, less and less often, and gives up when nothing has succeeded for [`PATIENCE`].
#[derive(Default)]
pub struct Patience(Option<Failing>);

struct Failing {
    since: Instant,
    delays: ExponentialBackoff,
}

impl Patience {
    /// Something has succeeded.
    pub fn renew(&mut self) {
        self.0 = None;
    }

    /// It has failed, which is said. Returns how long to wait before the next try; none when it is given up.
    pub fn failed(&mut self, trouble: Trouble, say: impl FnOnce(Trouble)) -> Option<Duration> {
        let failing = self.0.get_or_insert_with(|| Failing {
            since: Instant::now(),
            delays: ExponentialBuilder::default()
                .with_min_delay(SHORTEST_BACKOFF)
                .with_max_delay(LONGEST_BACKOFF)
                .without_max_times()
                .with_jitter()
                .build(),
        });
        if failing.since.elapsed() >= PATIENCE {
            return None;
        }
        tracing::warn!(reason = trouble.reason, "{}", trouble.message);
        say(trouble);
        Some(failing.delays.next().unwrap_or(LONGEST_BACKOFF))
    }
}

/// Since when something is without an answer.
pub struct Silence {
    since: Instant,
    said: bool,
}

/// What is to be done about a silence.
pub enum Silent {
    /// It is to be said.
    Noticed,
    /// It is not waited any longer.
    TooLong,
}

impl Default for Silence {
    fn default() -> Self {
        Self {
            since: Instant::now(),
            said: false,
        }
    }
}

impl Silence {
    /// There was an answer, or nothing to answer before now. Returns whether the silence was said.
    pub fn end(&mut self) -> bool {
        std::mem::take(self).said
    }

    /// Waits until it has lasted for [`NOTICE`] and, when that was said, for `limit`. Cancel safe.
    pub async fn lasts(&mut self, limit: Duration) -> Silent {
        if self.said {
            sleep_until(self.since + limit).await;
            return Silent::TooLong;
        }
        sleep_until(self.since + NOTICE).await;
        self.said = true;
        Silent::Noticed
    }
}

#[cfg(test)]
mod tests {
    use tokio::time::{advance, sleep};

    use super::*;

    fn trouble() -> Trouble {
        Trouble {
            reason: "Away",
            message: "It is away.".to_owned(),
        }
    }

    #[tokio::test(start_paused = true)]
    async fn what_fails_is_said_and_tried_again_until_nothing_has_succeeded_for_two_minutes() {
        let mut patience = Patience::default();
        let mut said = 0;
        for _ in 0..2 {
            let started = Instant::now();
            while let Some(pause) = patience.failed(trouble(), |_| said += 1) {
                assert!(pause <= 2 * LONGEST_BACKOFF, "{pause:?}");
                sleep(pause).await;
            }
            assert!((PATIENCE..PATIENCE + 2 * LONGEST_BACKOFF).contains(&started.elapsed()));
            assert!(said > 10, "{said}");
            said = 0;
            // After a success it begins anew, with a short pause.
            patience.renew();
        }
    }

    #[tokio::test(start_paused = true)]
    async fn a_silence_is_said_once_and_then_too_long_unless_an_answer_comes() {
        let mut silence = Silence::default();
        assert!(!silence.end(), "it was not said");
        assert!(matches!(silence.lasts(PATIENCE).await, Silent::Noticed));
        assert!(silence.end());
        let started = Instant::now();
        // Whoever waits for something else too begins to wait anew, and the silence goes on.
        advance(NOTICE / 2).await;
        assert!(matches!(silence.lasts(PATIENCE).await, Silent::Noticed));
        assert!(matches!(silence.lasts(PATIENCE).await, Silent::TooLong));
        assert!((PATIENCE..PATIENCE + NOTICE).contains(&started.elapsed()));
    }
}

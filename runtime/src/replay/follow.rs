//! Goes on after a range with what was captured since, without a gap and without a double.
//!
//! Kafka is the log of record, and a checkpoint says up to where it is complete. So what follows a range is another range, from its end
//! to that of a newer checkpoint, read in the same way; and so on, for as long as somebody listens.

use std::{sync::Arc, time::Duration};

use meander_config::{KafkaLog, ReplayConfig};
use tokio::{
    sync::{mpsc, watch},
    task::spawn_blocking,
    time::Instant,
};
use tokio_util::sync::CancellationToken;

use super::{
    error::ReplayError,
    filter::Filter,
    range::{self, Range},
    reader::{self, Read, Reading},
    record::{Coordinate, ResumeToken},
};
use crate::{
    checkpoint::{Tail, TailError, last_checkpoint},
    log::{checkpoint_key, checkpoint_topic},
    position::Position,
};

/// How often it is looked for a newer checkpoint.
const INTERVAL: Duration = Duration::from_millis(100);
/// How long Kafka may take to show one.
const TIMEOUT: Duration = Duration::from_secs(10);
/// How long it may fail to.
const PATIENCE: Duration = Duration::from_secs(120);

/// The end of the log, as the newest checkpoint has it.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
struct End {
    position: Position,
    /// The greatest commit time up to it, in milliseconds.
    time: i64,
}

/// Follows the log for everybody who reads on after a range.
#[derive(Clone)]
pub struct Live {
    kafka: KafkaLog,
    checkpoints: String,
    end: watch::Receiver<Result<Option<End>, Arc<TailError>>>,
    /// The follower ends with the last of these.
    _end: Arc<tokio_util::sync::DropGuard>,
}

/// What one reader takes.
pub struct Following {
    /// The range before.
    pub range: Range,
    /// Where the reader is: from the start of the range where it has nothing yet.
    pub token: Option<ResumeToken>,
    /// What of it is given.
    pub filter: Option<Arc<Filter>>,
    /// Under which name, and with how much memory for what is fetched ahead, it is read.
    pub group: String,
    /// See `group`.
    pub prefetch: usize,
}

impl Live {
    /// Begins to follow the log of a replay's pipeline.
    #[must_use]
    pub fn start(config: &ReplayConfig) -> Self {
        let pipeline = &config.pipeline;
        let checkpoints = checkpoint_topic(&pipeline.namespace, &pipeline.name);
        let key = checkpoint_key(&pipeline.namespace, &pipeline.name, &config.slot_name);
        let stop = CancellationToken::new();
        let (newest, end) = watch::channel(Ok(None));
        let look = {
            let (kafka, topic, stop) = (config.kafka.clone(), checkpoints.clone(), stop.clone());
            move || look(&kafka, &topic, &key, &newest, &stop)
        };
        spawn_blocking(look);
        Self {
            kafka: config.kafka.clone(),
            checkpoints,
            end,
            _end: Arc::new(stop.drop_guard()),
        }
    }

    /// Reads a range and everything after it.
    #[must_use]
    pub fn read(&self, following: Following) -> mpsc::Receiver<Result<Read, ReplayError>> {
        let (out, reads) = mpsc::channel(1);
        let live = self.clone();
        tokio::spawn(async move {
            if let Err(error) = live.follow(following, &out).await {
                let _ = out.send(Err(error)).await;
            }
        });
        reads
    }

    /// Ends well when nobody listens any more.
    async fn follow(
        mut self,
        following: Following,
        out: &mpsc::Sender<Result<Read, ReplayError>>,
    ) -> Result<(), ReplayError> {
        let Following {
            range,
            token,
            filter,
            group,
            prefetch,
        } = following;
        let mut known = range.ends();
        let mut reached = range.end.map(|position| End {
            position,
            time: range.high_time / 1000,
        });
        let mut after = token.map(|token| token.coordinate);
        // One who is past the range goes on from where he is, and has everything before `known`, as one who has just taken the range.
        if let Some(token) = token.filter(|token| reached.is_none_or(|end| token.coordinate.position > end.position)) {
            reached = Some(End {
                position: token.coordinate.position,
                time: token.timestamp,
            });
        } else {
            let reading = Reading {
                range,
                after,
                filter: filter.clone(),
                side_by_side: false,
            };
            let reads = reader::start_with(&self.kafka, group.clone(), prefetch, reading);
            if !pass_on(reads, out).await? {
                return Ok(());
            }
            after = reached.map(|end| end.last()).max(after);
        }
        if out.send(Ok(Read::Live)).await.is_err() {
            return Ok(());
        }
        let stop = CancellationToken::new();
        let _stop_on_return = stop.clone().drop_guard();
        loop {
            let Some(end) = self.newer(reached, out).await? else {
                return Ok(());
            };
            let (kafka, checkpoints, stop) = (self.kafka.clone(), self.checkpoints.clone(), stop.clone());
            let from = reached.map_or(0, |end| end.time);
            let resolving = spawn_blocking(move || {
                let range = range::following(&kafka, &checkpoints, from, end.position, &mut known, &stop)?;
                Ok::<_, ReplayError>((range, known))
            });
            let range;
            (range, known) = resolving
                .await
                .map_err(|_| ReplayError::TaskStopped("following the log"))??;
            let reading = Reading {
                range,
                after,
                filter: filter.clone(),
                side_by_side: false,
            };
            let reads = reader::start_with(&self.kafka, group.clone(), prefetch, reading);
            if !pass_on(reads, out).await? {
                return Ok(());
            }
            reached = Some(end);
            after = Some(end.last());
        }
    }

    /// An end of the log that is after this one; none when nobody listens any more.
    async fn newer(
        &mut self,
        reached: Option<End>,
        out: &mpsc::Sender<Result<Read, ReplayError>>,
    ) -> Result<Option<End>, ReplayError> {
        let is_newer = |end: &Result<Option<End>, _>| match end {
            Ok(Some(end)) => reached.is_none_or(|reached| end.position > reached.position),
            Ok(None) => false,
            Err(_) => true,
        };
        tokio::select! {
            end = self.end.wait_for(is_newer) => match end.as_deref() {
                Ok(Ok(end)) => Ok(*end),
                Ok(Err(error)) => Err(ReplayError::LogLost(Arc::clone(error))),
                Err(_) => Err(ReplayError::TaskStopped("following the log")),
            },
            () = out.closed() => Ok(None),
        }
    }
}

impl End {
    /// After everything up to it.
    fn last(self) -> Coordinate {
        Coordinate {
            position: self.position,
            part: u32::MAX,
        }
    }
}

/// Passes on what a reader gives, up to the end of its range; `false` if nobody listens any more.
async fn pass_on(
    mut reads: mpsc::Receiver<Result<Read, ReplayError>>,
    out: &mpsc::Sender<Result<Read, ReplayError>>,
) -> Result<bool, ReplayError> {
    loop {
        match reads.recv().await {
            Some(Ok(Read::End)) => return Ok(true),
            Some(Ok(read)) => {
                if out.send(Ok(read)).await.is_err() {
                    return Ok(false);
                }
            }
            Some(Err(error)) => return Err(error),
            None => return Err(ReplayError::TaskStopped("the reader")),
        }
    }
}

/// Looks for newer checkpoints until it is stopped. Blocks.
fn look(
    kafka: &KafkaLog,
    topic: &str,
    key: &str,
    newest: &watch::Sender<Result<Option<End>, Arc<TailError>>>,
    stop: &CancellationToken,
) {
    let mut tail = None;
    let mut failing: Option<Instant> = None;
    while !stop.is_cancelled() {
        let read = match &tail {
            Some(tail) => last_checkpoint(tail, topic, key),
            None => {
                Tail::new(&kafka.cluster(), TIMEOUT).and_then(|made| last_checkpoint(tail.insert(made), topic, key))
            }
        };
        match read {
            Ok(checkpoint) => {
                failing = None;
                let end = checkpoint.and_then(|checkpoint| {
                    Some(End {
                        position: checkpoint.complete?,
                        time: checkpoint.high_time_micros / 1000,
                    })
                });
                newest.send_if_modified(|known| {
                    let is_newer = !matches!(known, Ok(known) if *known == end);
                    if is_newer {
                        *known = Ok(end);
                    }
                    is_newer
                });
            }
            Err(error) => {
                tail = None;
                let since = *failing.get_or_insert_with(|| {
                    tracing::warn!(%error, "cannot look for what was captured since; trying again");
                    Instant::now()
                });
                if since.elapsed() >= PATIENCE {
                    newest.send_modify(|known| *known = Err(Arc::new(error)));
                    return;
                }
            }
        }
        std::thread::sleep(INTERVAL);
    }
}

//! Goes on after a range with what was captured since, without a gap and without a double.
//!
//! Kafka is the log of record, and a checkpoint says up to where it is complete. So what follows a range is another range, from its end
//! to that of a newer checkpoint, read in the same way; and so on, for as long as somebody listens.

use std::{sync::Arc, time::Duration};

use meander_config::{KafkaLog, ReplayConfig};
use tokio::{
    sync::{mpsc, watch},
    task::spawn_blocking,
};
use tokio_util::sync::CancellationToken;

use super::{
    error::ReplayError,
    filter::Filter,
    patience::Patience,
    range::{self, Brokers, Ends, Range},
    reader::{self, Read, Reading},
    record::{Coordinate, ResumeToken},
    tally::Trouble,
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
    /// How far the first of the readers is.
    taken: watch::Sender<Option<Taken>>,
    /// The follower ends with the last of these.
    _end: Arc<tokio_util::sync::DropGuard>,
}

/// How far a reader is in what follows the range. Whoever has this record has everything before these offsets.
#[derive(Clone, Debug)]
pub struct Taken {
    /// The last record that it was given.
    pub last: ResumeToken,
    /// The offset at which each partition goes on.
    pub ends: Ends,
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
    /// Begins to follow the log of a replay's pipeline. `taken` is what an earlier process has left of [`Live::taken`].
    #[must_use]
    pub fn start(config: &ReplayConfig, taken: Option<Taken>) -> Self {
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
            taken: watch::channel(taken).0,
            _end: Arc::new(stop.drop_guard()),
        }
    }

    /// How far the first of the readers is.
    #[must_use]
    pub fn taken(&self) -> watch::Receiver<Option<Taken>> {
        self.taken.subscribe()
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
        let before = range.clone();
        let mut reached = range.end.map(|position| End {
            position,
            time: range.high_time / 1000,
        });
        let mut after = token.map(|token| token.coordinate);
        let (mut ends, mut since, mut last) = (range.ends(), None, token);
        // One who is past the range goes on from where he is.
        if let Some(token) = token.filter(|token| reached.is_none_or(|end| token.coordinate.position > end.position)) {
            if let Some(taken) = &*self.taken.borrow()
                && taken.last.coordinate <= token.coordinate
            {
                ends.extend(taken.ends.iter().map(|(partition, end)| (partition.clone(), *end)));
            }
            since = Some(token.timestamp);
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
                places: false,
            };
            let reads = reader::start_with(&self.kafka, group.clone(), prefetch, reading);
            match pass_on(reads, out, &mut last).await? {
                Some(reached) => ends = reached,
                None => return Ok(()),
            }
            after = reached.map(|end| end.last()).max(after);
            self.note(last, &ends);
        }
        if out.send(Ok(Read::Live)).await.is_err() {
            return Ok(());
        }
        let stop = CancellationToken::new();
        let _stop_on_return = stop.clone().drop_guard();
        let mut brokers = Brokers::connect(&self.kafka, &self.checkpoints)?;
        loop {
            let Some(end) = self.newer(reached, out).await? else {
                return Ok(());
            };
            let (before, stop) = (before.clone(), stop.clone());
            let resolving = spawn_blocking(move || {
                let range = range::following(&brokers, &before, &ends, since, end.position, &stop)?;
                Ok::<_, ReplayError>((range, brokers))
            });
            let range;
            (range, brokers) = resolving
                .await
                .map_err(|_| ReplayError::TaskStopped("following the log"))??;
            let reading = Reading {
                range,
                after,
                filter: filter.clone(),
                side_by_side: false,
                places: false,
            };
            let reads = reader::start_with(&self.kafka, group.clone(), prefetch, reading);
            match pass_on(reads, out, &mut last).await? {
                Some(reached) => ends = reached,
                None => return Ok(()),
            }
            (reached, since) = (Some(end), None);
            after = Some(end.last());
            self.note(last, &ends);
        }
    }

    /// Notes how far this reader is, if it is the first to be there.
    fn note(&self, last: Option<ResumeToken>, ends: &Ends) {
        let Some(last) = last else { return };
        self.taken.send_if_modified(|taken| {
            let is_first = (taken.as_ref()).is_none_or(|taken| taken.last.coordinate < last.coordinate);
            if is_first {
                let ends = ends.clone();
                *taken = Some(Taken { last, ends });
            }
            is_first
        });
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

/// Passes on what a reader gives, up to the end of its range, and returns where its partitions go on; none if nobody listens any more.
async fn pass_on(
    mut reads: mpsc::Receiver<Result<Read, ReplayError>>,
    out: &mpsc::Sender<Result<Read, ReplayError>>,
    last: &mut Option<ResumeToken>,
) -> Result<Option<Ends>, ReplayError> {
    loop {
        match reads.recv().await {
            Some(Ok(Read::End(ends))) => return Ok(Some(ends)),
            Some(Ok(read)) => {
                if let Read::Records(records) = &read {
                    *last = records.last().map(Into::into).or(*last);
                }
                if out.send(Ok(read)).await.is_err() {
                    return Ok(None);
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
    let mut patience = Patience::default();
    while !stop.is_cancelled() {
        let read = match &tail {
            Some(tail) => last_checkpoint(tail, topic, key),
            None => {
                Tail::new(&kafka.cluster(), TIMEOUT).and_then(|made| last_checkpoint(tail.insert(made), topic, key))
            }
        };
        let pause = match read {
            Ok(checkpoint) => {
                patience.renew();
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
                INTERVAL
            }
            Err(error) => {
                tail = None;
                let trouble = Trouble {
                    reason: "KafkaUnreachable",
                    message: format!("it cannot be looked for what was captured since: {error}"),
                };
                let Some(pause) = patience.failed(trouble, drop) else {
                    newest.send_modify(|known| *known = Err(Arc::new(error)));
                    return;
                };
                pause
            }
        };
        std::thread::sleep(pause);
    }
}

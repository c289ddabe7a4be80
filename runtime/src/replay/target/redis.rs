//! Appends the records to streams of the replay's own, each exactly once.
//!
//! How far the replay is stands in a hash, the mark, and moves in the script that appends the entries. A script runs as a whole or finds
//! the mark elsewhere: so what was sent twice is written once, and a process that was taken over writes nothing. Entry ids come from the
//! coordinates, as in the streams of a pipeline. If Redis loses entries it loses the mark's move with them, and the replay goes on from
//! there.
//!
//! A stream that was there before the replay is never written.

use meander_config::{Durability, RedisStreams, ResourceIdentity};
use redis::{Script, aio::MultiplexedConnection};
use serde::Serialize;
use tokio::sync::mpsc;

use super::{Batch, Resumable, Tally, Target, TargetError, job_id};
use crate::{
    log::stream_of_topic,
    replay::{
        checkpoint::{Checkpoint, Reached},
        record::Record,
    },
    sink::{
        SinkError,
        redis::{EntryId, call::Call, check_server, claim_key, connect, failed, streams_script, texts},
    },
};

/// Where the records go.
#[derive(Clone, Debug)]
pub struct Settings {
    /// The server and the prefix of the streams.
    pub streams: RedisStreams,
    /// The prefix of the topics that are replayed.
    pub log_prefix: String,
}

/// A connection that has the mark, and how far the replay is.
pub struct Redis {
    connection: MultiplexedConnection,
    address: String,
    append: Script,
    settings: Settings,
    job: String,
    mark: String,
    attempt: u64,
    reached: Reached,
}

/// Name of the hash that holds how far a replay is. `job` is `namespace/name/UID`.
#[must_use]
pub fn replay_mark_key(stream_prefix: &str, job: &str) -> String {
    format!("{stream_prefix}.meander-replay:{job}")
}

impl Resumable for Redis {
    type Settings = Settings;

    async fn open(settings: &Settings, job: &ResourceIdentity) -> Result<(Self, Option<Checkpoint>), TargetError> {
        let RedisStreams {
            url_file,
            ca_file,
            stream_prefix,
        } = &settings.streams;
        let (mut connection, address) = connect(url_file, ca_file.as_deref()).await?;
        check_server(&mut connection, Durability::None, &address).await?;
        let job = job_id(job);
        let mark = replay_mark_key(stream_prefix, &job);
        let claim = Script::new(include_str!("redis/claim.lua"));
        let mut call = claim.key(&mark);
        // The prefix of a pipeline that has a stream ends before a dot of the stream's name.
        let whole = format!("{stream_prefix}.");
        let prefixes: Vec<&str> = whole.match_indices('.').map(|(dot, _)| &whole[..dot]).collect();
        for prefix in &prefixes {
            call.key(claim_key(prefix));
        }
        let answer: Vec<String> = call
            .invoke_async(&mut connection)
            .await
            .map_err(|error| refused(failed(&address, &error)))?;
        let (attempt, checkpoint) = match texts(&answer)[..] {
            ["ok", attempt, range, reached] => {
                let checkpoint =
                    read_checkpoint(range, reached).map_err(|cause| TargetError::CheckpointUnreadable {
                        place: format!("the hash {mark:?} of Redis"),
                        cause,
                    })?;
                (attempt.parse().unwrap_or_default(), checkpoint)
            }
            ["claimed", index, owner] => {
                let taken = index.parse().ok().and_then(|index: usize| prefixes.get(index));
                return Err(TargetError::StreamsAreLive {
                    prefix: stream_prefix.clone(),
                    taken: taken.copied().unwrap_or_default().to_owned(),
                    owner: owner.to_owned(),
                });
            }
            _ => return Err(confused(&address, &answer)),
        };
        let redis = Self {
            connection,
            address,
            append: streams_script(include_str!("redis/append.lua")),
            settings: settings.clone(),
            job,
            mark,
            attempt,
            reached: (checkpoint.as_ref()).map_or_else(Reached::default, |checkpoint| checkpoint.reached.clone()),
        };
        Ok((redis, checkpoint))
    }

    async fn begin(&mut self, checkpoint: &Checkpoint) -> Result<(), TargetError> {
        let range = json(&checkpoint.range)?;
        self.append(&[], checkpoint.reached.clone(), &range).await
    }
}

fn read_checkpoint(range: &str, reached: &str) -> Result<Option<Checkpoint>, String> {
    if range.is_empty() {
        return Ok(None);
    }
    let range = serde_json::from_str(range).map_err(|error| error.to_string())?;
    let reached = serde_json::from_str(reached).map_err(|error| error.to_string())?;
    Checkpoint::kept(range, reached).map(Some)
}

fn json(value: &impl Serialize) -> Result<String, TargetError> {
    serde_json::to_string(value).map_err(|error| TargetError::CheckpointUnreadable {
        place: "this replay".to_owned(),
        cause: error.to_string(),
    })
}

impl Target for Redis {
    const FINISHES: bool = true;

    async fn run(mut self, mut batches: mpsc::Receiver<Batch>, tally: Tally) -> Result<(), TargetError> {
        tally.open();
        while let Some(batch) = batches.recv().await {
            let mut reached = self.reached.clone();
            reached.go_on(batch.records.iter().flat_map(Record::places), &batch.mark);
            self.append(&batch.records, reached, "").await?;
            tally.credit(&batch.mark);
        }
        Ok(())
    }
}

impl Redis {
    /// Appends the records of a batch, which is small enough for one script, and moves the mark to where `reached` says. The range is given
    /// once, where the replay begins.
    async fn append(&mut self, records: &[Record], reached: Reached, range: &str) -> Result<(), TargetError> {
        // The mark is the first key, and Lua counts from 1.
        let mut topics: Vec<&str> = Vec::new();
        let runs: Vec<(usize, &[Record])> = records
            .chunk_by(|one, next| one.topic == next.topic && one.headers.len() == next.headers.len())
            .map(|run| {
                let index = match topics.iter().position(|topic| *topic == &*run[0].topic) {
                    Some(index) => index + 2,
                    None => {
                        topics.push(&run[0].topic);
                        topics.len() + 1
                    }
                };
                (index, run)
            })
            .collect();
        let (log, prefix) = (&self.settings.log_prefix, &self.settings.streams.stream_prefix);
        let streams: Vec<String> = topics
            .iter()
            .map(|topic| stream_of_topic(topic, log, prefix).unwrap_or_default())
            .collect();
        let keys: Vec<&str> = [&self.mark].into_iter().chain(&streams).map(String::as_str).collect();
        let mut call = Call::new(&self.append, &keys, 0);
        call.arg(self.attempt)
            .arg(token(&self.reached))
            .arg(token(&reached))
            .arg(json(&reached)?)
            .arg(range)
            .arg(&self.job);
        for (index, run) in runs {
            call.arg(index)
                .arg(&*run[0].topic)
                .arg(run.len())
                .arg(run[0].headers.len() * 2);
            for record in run {
                let coordinate = record.coordinate;
                let part = u8::try_from(coordinate.part).map_err(|error| TargetError::Undecodable {
                    topic: record.topic.to_string(),
                    partition: record.partition,
                    offset: record.offset,
                    cause: error.to_string(),
                })?;
                // No format has an empty key or value.
                let [key, value] = [&record.key, &record.value].map(|bytes| (!bytes.is_empty()).then_some(&**bytes));
                call.shown(EntryId::of(coordinate.position, part))
                    .shown(coordinate.position)
                    .content(key, value)
                    .arg(record.partition)
                    .arg(record.offset)
                    .headers(record.headers.iter().map(|(name, value)| (&**name, &**value)));
            }
        }
        let answer: Vec<String> = call
            .run(&mut self.connection)
            .await
            .map_err(|error| refused(failed(&self.address, &error)))?;
        match texts(&answer)[..] {
            ["ok"] => {
                self.reached = reached;
                Ok(())
            }
            ["mark", attempt, _] if attempt.parse::<u64>().is_ok_and(|attempt| attempt > self.attempt) => {
                Err(TargetError::TakenOver)
            }
            ["mark", ..] => Err(TargetError::Disturbed(format!(
                "Redis at {} was set back to an earlier state",
                self.address
            ))),
            ["foreign", stream, _, ""] => Err(TargetError::StreamExists {
                stream: stream.to_owned(),
            }),
            ["foreign", stream, id, ours] => Err(TargetError::Sink(SinkError::ForeignWriter {
                stream: stream.to_owned(),
                id: id.to_owned(),
                remedy: format!("delete what others wrote (XDEL) and set it back: XSETID {stream} {ours}"),
            })),
            ["lost", stream] => Err(TargetError::Sink(SinkError::RedisStreamLost {
                stream: stream.to_owned(),
                mark: self.mark.clone(),
            })),
            _ => Err(confused(&self.address, &answer)),
        }
    }
}

fn token(reached: &Reached) -> String {
    reached.done.map(|done| done.resume.to_string()).unwrap_or_default()
}

fn confused(address: &str, answer: &[String]) -> TargetError {
    TargetError::Sink(SinkError::Redis {
        address: address.to_owned(),
        cause: format!("unexpected answer {answer:?}"),
    })
}

/// A target keeps every entry, so it has another remedy than a sink.
fn refused(error: SinkError) -> TargetError {
    match error {
        SinkError::RedisFull(address) => TargetError::Disturbed(format!("Redis at {address} is out of memory")),
        error => error.into(),
    }
}

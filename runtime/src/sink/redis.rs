//! The fast path: each batch is appended to its streams, and the mark moved, by one script.
//!
//! The mark is a hash of this pipeline alone: the generation of the owner that may write, the position up to which the streams are
//! complete, and the last entry of each. A script runs as a whole or finds the mark elsewhere; so a batch that was sent twice is written once, and a writer that
//! lost the slot to another writes nothing.

use std::{fs, sync::Arc, time::Duration};

use meander_config::RedisSink as Config;
use redis::{AsyncConnectionConfig, Client, ConnectionAddr, ErrorKind, RedisError, Script, aio::MultiplexedConnection};
use tokio::sync::{mpsc, watch};

use crate::{
    batch::{Batch, Record},
    log::Checkpoint,
    position::Position,
    sink::{Durable, SinkError},
};

const CONNECT_DEADLINE: Duration = Duration::from_secs(10);
/// How long one script may take. Redis answers nobody else meanwhile, so scripts are kept small.
const RESPONSE_DEADLINE: Duration = Duration::from_secs(20);
/// Records per script.
const SCRIPT_RECORDS: usize = 512;
/// Bytes per script, beyond one record.
const SCRIPT_BYTES: usize = 1024 * 1024;

/// The value of an entry for a record that has none. No format has a value like it, and consumers of Debezium Server know it.
const NO_VALUE: &[u8] = b"default";

/// The writer that owns the mark.
pub struct RedisSink {
    connection: MultiplexedConnection,
    append: Script,
    address: String,
    mark: String,
    generation: String,
    position: Option<Position>,
    max_length: String,
}

/// Name of the hash that holds the mark. It names the pipeline by the key of its checkpoint, so that two pipelines with one prefix
/// never take each other's mark for their own.
#[must_use]
pub fn mark_key(stream_prefix: &str, pipeline: &str) -> String {
    format!("{stream_prefix}.meander-mark:{pipeline}")
}

/// Id of a record's entry: ordered as positions are, and the same each time.
#[must_use]
pub fn entry_id(position: Position, part: u8) -> String {
    let milliseconds = u64::from(position.epoch.0) << 56 | position.commit_lsn.0;
    let sequence = position.ordinal << 8 | u64::from(part);
    format!("{milliseconds}-{sequence}")
}

impl RedisSink {
    /// Connects, checks the server, and takes the mark for the owner generation of the checkpoint. `pipeline` is the key of that.
    ///
    /// # Errors
    /// When Redis cannot be used, a later owner has the mark, or entries were lost.
    pub async fn open(config: &Config, pipeline: &str, checkpoint: &Checkpoint) -> Result<Self, SinkError> {
        let (mut connection, address) = connect(config).await?;
        check_server(&mut connection, &address).await?;
        let mark = mark_key(&config.stream_prefix, pipeline);
        let failed = |error: RedisError| failed(&address, &error);
        let (generation, position): (Option<String>, Option<String>) = redis::cmd("HMGET")
            .arg(&mark)
            .arg(&["generation", "position"])
            .query_async(&mut connection)
            .await
            .map_err(failed)?;
        let owner: u64 = generation.as_deref().and_then(|text| text.parse().ok()).unwrap_or(0);
        if owner >= checkpoint.owner_generation {
            return Err(SinkError::Fenced(format!(
                "Redis was taken by owner generation {owner}; if no other runtime runs, Kafka lost the checkpoint: choose another streamPrefix"
            )));
        }
        let unreadable = |text: &String| SinkError::Redis {
            address: address.clone(),
            cause: format!("the mark {mark:?} holds {text:?}, which is not a position"),
        };
        let place: Option<Position> = position
            .as_ref()
            .map(|text| text.parse().map_err(|_| unreadable(text)))
            .transpose()?;
        // The checkpoint was written after Redis had acknowledged this, so Redis had it. Streams under another prefix are new ones.
        let acknowledged = checkpoint
            .redis
            .as_ref()
            .filter(|redis| redis.stream_prefix == config.stream_prefix)
            .map(|redis| redis.position);
        if place < acknowledged {
            let text =
                |position: Option<Position>| position.map_or("nothing".to_owned(), |position| position.to_string());
            return Err(SinkError::RedisGap {
                found: text(place),
                expected: text(acknowledged),
            });
        }
        let claimed: i32 = Script::new(include_str!("redis_claim.lua"))
            .key(&mark)
            .arg(generation.unwrap_or_default())
            .arg(position.unwrap_or_default())
            .arg(checkpoint.owner_generation)
            .invoke_async(&mut connection)
            .await
            .map_err(failed)?;
        if claimed != 1 {
            return Err(SinkError::Fenced(
                "another owner took Redis at the same time".to_owned(),
            ));
        }
        Ok(Self {
            connection,
            append: Script::new(include_str!("redis.lua")),
            address,
            mark,
            generation: checkpoint.owner_generation.to_string(),
            position: place,
            max_length: config.max_length.map(|length| length.to_string()).unwrap_or_default(),
        })
    }

    /// The last change that Redis has.
    #[must_use]
    pub fn position(&self) -> Option<Position> {
        self.position
    }

    /// Appends batches until there are no more, which is the end of the capture. `kafka` is how far Kafka has come.
    ///
    /// # Errors
    /// When Redis cannot be written to, or somebody else wrote.
    pub async fn publish(
        mut self,
        mut batches: mpsc::Receiver<Arc<Batch>>,
        mut kafka: watch::Receiver<Durable>,
        durable: watch::Sender<Durable>,
    ) -> Result<(), SinkError> {
        while let Some(batch) = batches.recv().await {
            if batch.kafka_first && kafka.wait_for(|kafka| kafka.position >= batch.last()).await.is_err() {
                // Kafka took all it will, and the session is at its end.
                return Ok(());
            }
            let new: Vec<&Record> = batch
                .records()
                .iter()
                .filter(|record| Some(record.position) > self.position)
                .collect();
            let mut rest = &new[..];
            while !rest.is_empty() {
                let (chunk, after) = rest.split_at(chunk_length(&batch, rest));
                self.append(&batch, chunk).await?;
                rest = after;
            }
            durable.send_modify(|durable| {
                durable.position = self.position;
                durable.safe = durable.safe.max(batch.safe);
                durable.batches += 1;
            });
        }
        Ok(())
    }

    async fn append(&mut self, batch: &Batch, records: &[&Record]) -> Result<(), SinkError> {
        let Some(last) = records.last().map(|record| record.position) else {
            return Ok(());
        };
        let mut call = self.append.key(&self.mark);
        call.arg(&self.generation)
            .arg(self.position.map(|position| position.to_string()).unwrap_or_default())
            .arg(last.to_string())
            .arg(&self.max_length);
        let mut streams: Vec<&str> = Vec::new();
        for record in records {
            let stream = record.destination.stream.as_str();
            let index = streams.iter().position(|known| *known == stream).unwrap_or_else(|| {
                streams.push(stream);
                call.key(stream);
                streams.len() - 1
            });
            // Lua counts from 1, and the mark is the first key.
            call.arg(index + 2)
                .arg(entry_id(record.position, record.part))
                .arg(record.position.to_string())
                .arg(batch.key(record).unwrap_or_default())
                .arg(batch.value(record).unwrap_or(NO_VALUE));
        }
        let answer: Vec<String> = call
            .invoke_async(&mut self.connection)
            .await
            .map_err(|error| failed(&self.address, &error))?;
        match answer.iter().map(String::as_str).collect::<Vec<_>>()[..] {
            ["ok"] => {
                self.position = Some(last);
                Ok(())
            }
            ["foreign", stream, id, ours] => Err(SinkError::ForeignWriter {
                stream: stream.to_owned(),
                id: id.to_owned(),
                remedy: if ours.is_empty() {
                    format!("delete it: DEL {stream}")
                } else {
                    format!("delete what others wrote (XDEL) and set it back: XSETID {stream} {ours}")
                },
            }),
            ["lost", stream] => Err(SinkError::RedisGap {
                found: format!("nothing in stream {stream:?}"),
                expected: self.position.map(|position| position.to_string()).unwrap_or_default(),
            }),
            ["mark", generation, position] => Err(self.mark_moved(generation, position)),
            _ => Err(SinkError::Redis {
                address: self.address.clone(),
                cause: format!("unexpected answer {answer:?}"),
            }),
        }
    }

    /// The mark is not where this writer left it.
    fn mark_moved(&self, generation: &str, position: &str) -> SinkError {
        let newer = generation.parse::<u64>().ok() > self.generation.parse::<u64>().ok();
        if newer {
            return SinkError::Fenced(format!("Redis was taken by owner generation {generation}"));
        }
        SinkError::RedisGap {
            found: if position.is_empty() {
                "nothing".to_owned()
            } else {
                position.to_owned()
            },
            expected: self.position.map(|position| position.to_string()).unwrap_or_default(),
        }
    }
}

/// Records that go into the next script: whole changes only, because the mark speaks of changes.
fn chunk_length(batch: &Batch, records: &[&Record]) -> usize {
    let mut bytes = 0;
    for (index, pair) in records.windows(2).enumerate() {
        bytes += batch.value(pair[0]).unwrap_or(NO_VALUE).len();
        let whole = pair[0].position != pair[1].position;
        if whole && (index + 1 >= SCRIPT_RECORDS || bytes >= SCRIPT_BYTES) {
            return index + 1;
        }
    }
    records.len()
}

async fn connect(config: &Config) -> Result<(MultiplexedConnection, String), SinkError> {
    let invalid = |error: &dyn std::fmt::Display| SinkError::RedisUrl(error.to_string());
    let url = fs::read_to_string(&config.url_file).map_err(|error| invalid(&error))?;
    // Errors of the URL are said by their kind only: the URL holds the password.
    let client = Client::open(url.trim()).map_err(|error| invalid(&error.category()))?;
    let address = match client.get_connection_info().addr() {
        ConnectionAddr::Tcp(host, port) | ConnectionAddr::TcpTls { host, port, .. } => format!("{host}:{port}"),
        _ => "a local socket".to_owned(),
    };
    let settings = AsyncConnectionConfig::new()
        .set_connection_timeout(Some(CONNECT_DEADLINE))
        .set_response_timeout(Some(RESPONSE_DEADLINE));
    let connection = client
        .get_multiplexed_async_connection_with_config(&settings)
        .await
        .map_err(|error| failed(&address, &error))?;
    Ok((connection, address))
}

async fn check_server(connection: &mut MultiplexedConnection, address: &str) -> Result<(), SinkError> {
    let info: String = redis::cmd("INFO")
        .query_async(connection)
        .await
        .map_err(|error| failed(address, &error))?;
    let value = |name: &str| {
        info.lines()
            .find_map(|line| line.strip_prefix(name)?.strip_prefix(':'))
            .map(str::trim)
            .unwrap_or_default()
    };
    if value("cluster_enabled") == "1" {
        return Err(SinkError::RedisCluster(address.to_owned()));
    }
    let policy = value("maxmemory_policy");
    // The volatile policies only take keys with a time to live, and streams have none.
    if policy.starts_with("allkeys") {
        return Err(SinkError::RedisEvicts {
            address: address.to_owned(),
            policy: policy.to_owned(),
        });
    }
    Ok(())
}

fn failed(address: &str, error: &RedisError) -> SinkError {
    let text = error.to_string();
    if error.code() == Some("OOM") || text.contains("OOM command not allowed") {
        return SinkError::RedisFull(address.to_owned());
    }
    let cause = match error.kind() {
        ErrorKind::AuthenticationFailed => "the server refused user or password".to_owned(),
        _ => text,
    };
    SinkError::Redis {
        address: address.to_owned(),
        cause,
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::position::{Epoch, Lsn};

    #[test]
    fn entry_ids_are_ordered_as_positions_are() {
        let position = |epoch, lsn, ordinal| Position {
            epoch: Epoch(epoch),
            commit_lsn: Lsn(lsn),
            ordinal,
        };
        let parse = |id: String| {
            id.split('-')
                .map(|half| half.parse::<u64>().unwrap_or_default())
                .collect::<Vec<_>>()
        };
        let ids = [
            (position(1, 16, 0), 0),
            (position(1, 16, 0), 1),
            (position(1, 16, 1), 0),
            (position(1, 17, 0), 0),
            (position(2, 0, 0), 0),
            (position(255, u64::MAX >> 8, 0), 0),
        ]
        .map(|(position, part)| parse(entry_id(position, part)));
        assert!(ids.is_sorted_by(|left, right| left < right));
    }
}

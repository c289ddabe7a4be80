//! The fast path: changes are appended to their streams, and the mark moved, by one script.
//!
//! The mark is a hash of this pipeline alone: the generation of the owner that may write, the position up to which the streams are
//! complete, how many records that is since the pipeline's beginning, and the last entry of each stream. A script runs as a whole or
//! finds the mark elsewhere; so what was sent twice is written once, and a writer that lost the slot to another writes nothing.
//!
//! The claim says whose the streams under a prefix are, as the claims in Kafka do of a topic prefix. Every script looks at it, so that
//! two pipelines with one prefix never write into each other's streams.
//!
//! Kafka waits for a Redis that is slow, but for no longer than [`live`] says, and for none that gets nothing. [`live`] holds what is on its way, [`feed`] takes it from there, and [`refill`] copies from
//! Kafka what Redis missed.

pub(crate) mod call;
mod durability;
pub mod feed;
pub mod live;
mod refill;

use std::{cmp::Ordering, fmt, fs, path::Path, time::Duration};

use meander_config::{Durability, RedisSink as Config};
use redis::{
    AsyncConnectionConfig, Client, ConnectionAddr, ErrorKind, RedisError, Script, TlsCertificates,
    aio::MultiplexedConnection,
};
use tokio::{sync::watch, time::timeout};

use self::{
    call::{ABSENT, Call},
    durability::Durable,
};
use crate::{position::Position, sink::SinkError, tls::authorities};

/// Memory for what is on its way to Redis. When it is full, Redis is refilled from Kafka instead.
pub const BUFFER_BYTES: usize = 16 << 20;

const CONNECT_DEADLINE: Duration = Duration::from_secs(10);
/// How long one script may take. Redis answers nobody else meanwhile, so scripts are kept small.
const RESPONSE_DEADLINE: Duration = Duration::from_secs(20);
/// How long Redis may take to say that it is there, while there is nothing to write: nothing is waiting for it then but the truth.
const CHECK_DEADLINE: Duration = Duration::from_secs(5);
/// Records per script.
const SCRIPT_RECORDS: usize = 512;
/// Bytes that the id, the position and the numbers of an entry take in a script's call.
const ENTRY_TEXT: usize = 96;
/// Bytes per script, beyond one record.
const SCRIPT_BYTES: usize = 1024 * 1024;
/// What is taken out of the buffer at once, so that it has room again soon.
const TAKEN_BYTES: usize = 2 << 20;
/// What is written before the server is asked whether it is durable, while more is waiting: its answer may take as long as its disk is synced in, a
/// second.
const CONFIRM_BYTES: usize = 8 << 20;

/// The field of the claim that names the pipeline.
const CLAIM_FIELD: &str = "pipeline";

/// One record as it goes into its stream.
#[derive(Clone, Debug)]
struct Entry<'a> {
    stream: &'a str,
    position: Position,
    part: u8,
    /// The record's timestamp in Kafka, by which the place in the log is found again.
    timestamp_millis: i64,
    key: Option<&'a [u8]>,
    /// None for a tombstone.
    value: Option<&'a [u8]>,
    /// What the format has beside key and value.
    headers: Vec<(&'a str, &'a [u8])>,
}

/// The owner of the mark.
struct Writer {
    connection: MultiplexedConnection,
    claim: Script,
    append: Script,
    address: String,
    stream_prefix: String,
    /// Key of the pipeline's checkpoint, which is what it is called here.
    pipeline: String,
    claim_key: String,
    mark: String,
    generation: String,
    max_length: String,
    durability: Durability,
    /// How this server makes sure of it.
    durable: Durable,
    /// What was written last.
    place: Place,
    /// The last change that is durable as asked: what counts as being in Redis.
    confirmed: Option<Position>,
    /// Bytes written since.
    unconfirmed: usize,
    /// Ids of entries that stand for nothing: `FROM to TO`, and more of them after a comma. Empty for none.
    phantoms: String,
}

/// What the mark says.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
struct Place {
    /// The last change that Redis has.
    position: Option<Position>,
    /// Its timestamp in Kafka.
    timestamp_millis: Option<i64>,
    /// How many of the pipeline's records those up to there are.
    records: u64,
    /// So many records may be missing: somebody said so.
    accept: Option<u64>,
}

impl Entry<'_> {
    fn size(&self) -> usize {
        let headers = self.headers.iter().map(|(name, value)| name.len() + value.len());
        self.key.unwrap_or(ABSENT).len() + self.value.unwrap_or(ABSENT).len() + headers.sum::<usize>()
    }
}

/// A script that looks at streams, or appends to them.
pub(crate) fn streams_script(script: &str) -> Script {
    Script::new(&[include_str!("redis/streams.lua"), script].concat())
}

/// Name of the hash that holds the mark. It names the pipeline by the key of its checkpoint, so that two pipelines with one prefix
/// never take each other's mark for their own.
#[must_use]
pub fn mark_key(stream_prefix: &str, pipeline: &str) -> String {
    format!("{stream_prefix}.meander-mark:{pipeline}")
}

/// Name of the hash that says, in the field `pipeline`, whose the streams under a prefix are.
#[must_use]
pub fn claim_key(stream_prefix: &str) -> String {
    format!("{stream_prefix}.meander-owner")
}

/// Gives up the claim on the streams' prefix, if this pipeline has it. Nothing of it may run any more.
///
/// # Errors
/// When Redis does not answer.
pub async fn release(config: &Config, pipeline: &str) -> Result<(), SinkError> {
    let (mut connection, address) = connect(&config.url_file, config.ca_file.as_deref()).await?;
    let claim = claim_key(&config.stream_prefix);
    // Whose it is cannot change between the two commands: what is claimed is nobody else's to take.
    if holder(&mut connection, &claim)
        .await
        .map_err(|error| failed(&address, &error))?
        .as_deref()
        == Some(pipeline)
    {
        // It stays, and is nobody's: one that is gone may be one that Redis lost.
        redis::cmd("HSET")
            .arg(claim)
            .arg(CLAIM_FIELD)
            .arg("")
            .exec_async(&mut connection)
            .await
            .map_err(|error| failed(&address, &error))?;
    }
    Ok(())
}

/// The pipeline that was last seen to have the claim on our prefix, if one was. Where Redis comes back empty, the prefix is that one's to
/// claim anew, whoever asks first. Clones share it.
#[derive(Clone, Debug, Default)]
pub struct Rival(watch::Sender<String>);

impl Rival {
    /// Its name, or nothing.
    fn name(&self) -> String {
        self.0.borrow().clone()
    }

    fn note<T>(&self, claimed: &Result<T, SinkError>) {
        match claimed {
            Err(SinkError::StreamPrefixTaken { owner, .. }) => drop(self.0.send_replace(owner.clone())),
            Ok(_) => drop(self.0.send_replace(String::new())),
            Err(_) => {}
        }
    }
}

/// Looks whose the streams' prefix is, and claims nothing.
///
/// # Errors
/// When it is another pipeline's, or Redis does not answer.
pub async fn look_at_claim(config: &Config, pipeline: &str, rival: &Rival) -> Result<(), SinkError> {
    let (mut connection, address) = connect(&config.url_file, config.ca_file.as_deref()).await?;
    let claim = claim_key(&config.stream_prefix);
    let holder = holder(&mut connection, &claim)
        .await
        .map_err(|error| failed(&address, &error))?
        .unwrap_or_else(|| rival.name());
    let looked = if holder.is_empty() || holder == pipeline {
        Ok(())
    } else {
        Err(SinkError::StreamPrefixTaken {
            prefix: config.stream_prefix.clone(),
            owner: holder,
            claim,
        })
    };
    rival.note(&looked);
    looked
}

/// The pipeline that has a claim; empty where it was given up.
async fn holder(connection: &mut MultiplexedConnection, claim: &str) -> redis::RedisResult<Option<String>> {
    redis::cmd("HGET")
        .arg(claim)
        .arg(CLAIM_FIELD)
        .query_async(connection)
        .await
}

/// Id of a record's entry: ordered as positions are, and the same each time.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct EntryId {
    milliseconds: u64,
    sequence: u64,
}

impl EntryId {
    /// That of a part of a change.
    #[must_use]
    pub fn of(position: Position, part: u8) -> Self {
        Self {
            milliseconds: u64::from(position.epoch.0) << 56 | position.commit_lsn.0,
            sequence: position.ordinal << 8 | u64::from(part),
        }
    }
}

/// As Redis writes it.
impl fmt::Display for EntryId {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{}-{}", self.milliseconds, self.sequence)
    }
}

impl Writer {
    /// Connects, checks the server, and takes claim and mark for an owner generation. `pipeline` is the key of its checkpoint.
    async fn open(config: &Config, pipeline: &str, generation: u64, rival: &Rival) -> Result<Self, SinkError> {
        let (mut connection, address) = connect(&config.url_file, config.ca_file.as_deref()).await?;
        let durable = check_server(&mut connection, config.durability, &address).await?;
        let mut writer = Self {
            connection,
            claim: streams_script(include_str!("redis/claim.lua")),
            append: streams_script(include_str!("redis/append.lua")),
            address,
            stream_prefix: config.stream_prefix.clone(),
            pipeline: pipeline.to_owned(),
            claim_key: claim_key(&config.stream_prefix),
            mark: mark_key(&config.stream_prefix, pipeline),
            generation: generation.to_string(),
            max_length: config.max_length.map(|length| length.to_string()).unwrap_or_default(),
            durability: config.durability,
            durable,
            place: Place::default(),
            confirmed: None,
            unconfirmed: 0,
            phantoms: String::new(),
        };
        // A wait is for what the connection wrote, so it has to write in order to learn of what was there before.
        let claimed = writer.claim(durable != Durable::OnAnswer, &rival.name()).await;
        rival.note(&claimed);
        writer.place = claimed?;
        durable.confirm(&mut writer.connection, &writer.address).await?;
        writer.confirmed = writer.place.position;
        Ok(writer)
    }

    /// Takes claim and mark, and looks whether every stream ends as it says.
    async fn claim(&mut self, write_in_any_case: bool, rival: &str) -> Result<Place, SinkError> {
        let answer: Vec<String> = self
            .claim
            .key(&self.mark)
            .key(&self.claim_key)
            .arg(&self.generation)
            .arg(&self.pipeline)
            .arg(u8::from(write_in_any_case))
            .arg(rival)
            .invoke_async(&mut self.connection)
            .await
            .map_err(|error| failed(&self.address, &error))?;
        match texts(&answer)[..] {
            ["ok", position, timestamp, records, accept, phantoms] => {
                phantoms.clone_into(&mut self.phantoms);
                Ok(Place {
                    position: written(position),
                    timestamp_millis: written(timestamp),
                    records: written(records).unwrap_or(0),
                    accept: written(accept),
                })
            }
            ["taken", owner] => Err(SinkError::RedisTaken(owner.to_owned())),
            _ => Err(self.unexpected(&answer).await),
        }
    }

    /// Looks whether Redis is there, and everything in it as this writer left it, while there is nothing to write.
    async fn check(&mut self) -> Result<(), SinkError> {
        let found = timeout(CHECK_DEADLINE, self.claim(false, "")).await;
        let found = found.map_err(|_| SinkError::Redis {
            address: self.address.clone(),
            cause: format!("it has not answered for {} s", CHECK_DEADLINE.as_secs()),
        })??;
        self.expect(found.position)
    }

    /// Looks whether entries still stay there: the server's settings can change at any time.
    async fn check_server(&mut self) -> Result<(), SinkError> {
        self.durable = check_server(&mut self.connection, self.durability, &self.address).await?;
        Ok(())
    }

    fn expect(&self, found: Option<Position>) -> Result<(), SinkError> {
        match found.cmp(&self.place.position) {
            Ordering::Equal => Ok(()),
            Ordering::Greater => Err(SinkError::Redis {
                address: self.address.clone(),
                cause: "something was written whose answer was lost".to_owned(),
            }),
            Ordering::Less => Err(SinkError::RedisLost {
                found: said(found),
                expected: said(self.place.position),
            }),
        }
    }

    /// Appends records, which are after the mark and in order, and moves the mark to the last of them.
    async fn append(&mut self, entries: &[Entry<'_>]) -> Result<(), SinkError> {
        let mut rest = entries;
        while !rest.is_empty() {
            let (chunk, after) = rest.split_at(chunk_length(rest));
            self.run(chunk).await?;
            rest = after;
        }
        Ok(())
    }

    async fn run(&mut self, entries: &[Entry<'_>]) -> Result<(), SinkError> {
        let Some(last) = entries.last() else { return Ok(()) };
        let place = Place {
            position: Some(last.position),
            timestamp_millis: Some(last.timestamp_millis),
            records: self.place.records.saturating_add(entries.len() as u64),
            accept: None,
        };
        // The first two keys are the mark and the claim, and Lua counts from 1.
        let mut keys: Vec<&str> = vec![&self.mark, &self.claim_key];
        let runs: Vec<(usize, &[Entry<'_>])> = entries
            .chunk_by(|one, next| one.stream == next.stream && one.headers.len() == next.headers.len())
            .map(|run| {
                let index = match keys[2..].iter().position(|known| *known == run[0].stream) {
                    Some(index) => index + 3,
                    None => {
                        keys.push(run[0].stream);
                        keys.len()
                    }
                };
                (index, run)
            })
            .collect();
        let room = entries.iter().map(|entry| entry.size() + ENTRY_TEXT).sum();
        let mut call = Call::new(&self.append, &keys, room);
        call.arg(&self.generation)
            .arg(&self.pipeline)
            .arg(text(self.place.position))
            .shown(last.position)
            .arg(last.timestamp_millis)
            .arg(place.records)
            .arg(&self.max_length);
        for (index, run) in runs {
            call.arg(index).arg(run.len()).arg(run[0].headers.len() * 2);
            for entry in run {
                call.shown(EntryId::of(entry.position, entry.part))
                    .shown(entry.position)
                    .content(entry.key, entry.value)
                    .headers(entry.headers.iter().copied());
            }
        }
        let answer: Vec<String> = call
            .run(&mut self.connection)
            .await
            .map_err(|error| failed(&self.address, &error))?;
        match texts(&answer)[..] {
            ["ok", phantoms] => {
                phantoms.clone_into(&mut self.phantoms);
                self.place = place;
                self.unconfirmed += entries.iter().map(Entry::size).sum::<usize>();
                Ok(())
            }
            ["mark", generation, _] if generation.parse::<u64>().ok() > self.generation.parse::<u64>().ok() => {
                Err(SinkError::RedisTaken(generation.to_owned()))
            }
            // Where the position is the same the generation is not: Redis was set back to an earlier owner's time.
            ["mark", _, position] => self.expect(written(position)).and(Err(SinkError::Redis {
                address: self.address.clone(),
                cause: "the mark is an earlier owner's".to_owned(),
            })),
            _ => Err(self.unexpected(&answer).await),
        }
    }

    /// What a script says of a prefix that is another pipeline's, or of a stream that is not as this writer left it.
    async fn unexpected(&mut self, answer: &[String]) -> SinkError {
        match texts(answer)[..] {
            ["claimed", owner] => SinkError::StreamPrefixTaken {
                prefix: self.stream_prefix.clone(),
                owner: owner.to_owned(),
                claim: self.claim_key.clone(),
            },
            ["foreign", stream, id, ours] => SinkError::ForeignWriter {
                remedy: match self.other_owner(stream).await {
                    Some(owner) => format!(
                        "pipeline {owner} writes it: leave it as it is, and exclude the table here or there, or create one of the two pipelines with another streamPrefix"
                    ),
                    None if ours.is_empty() => format!("delete it, if nobody needs it: DEL {stream}"),
                    None => format!("delete what others wrote (XDEL) and set it back: XSETID {stream} {ours}"),
                },
                stream: stream.to_owned(),
                id: id.to_owned(),
            },
            ["lost", stream] => SinkError::RedisStreamLost {
                stream: stream.to_owned(),
                mark: self.mark.clone(),
            },
            _ => SinkError::Redis {
                address: self.address.clone(),
                cause: format!("unexpected answer {answer:?}"),
            },
        }
    }

    /// The pipeline under another prefix that writes this stream: `shop` and `shop.eu` can come to one name, of a schema with a dot. None
    /// also where this user may not look.
    async fn other_owner(&mut self, stream: &str) -> Option<String> {
        for (end, _) in stream.match_indices('.') {
            let prefix = &stream[..end];
            if prefix == self.stream_prefix {
                continue;
            }
            let Ok(Some(owner)) = holder(&mut self.connection, &claim_key(prefix)).await else {
                continue;
            };
            let written: redis::RedisResult<Option<String>> = redis::cmd("HGET")
                .arg(mark_key(prefix, &owner))
                .arg(format!("last:{stream}"))
                .query_async(&mut self.connection)
                .await;
            if matches!(written, Ok(Some(_))) {
                return Some(owner);
            }
        }
        None
    }

    /// Waits until what was written is durable as asked, where that takes no longer than an answer, or enough was written for it. False where it
    /// did not wait.
    async fn confirm_some(&mut self) -> Result<bool, SinkError> {
        let is_time = self.durable == Durable::OnAnswer || self.unconfirmed >= CONFIRM_BYTES;
        if is_time {
            self.confirm().await?;
        }
        Ok(is_time)
    }

    /// Waits until what was written is durable as asked.
    async fn confirm(&mut self) -> Result<(), SinkError> {
        if self.unconfirmed > 0 {
            self.durable.confirm(&mut self.connection, &self.address).await?;
            self.unconfirmed = 0;
        }
        self.confirmed = self.place.position;
        Ok(())
    }

    /// What a person has to know of the entries that stand for nothing.
    fn phantoms(&self) -> Option<String> {
        (!self.phantoms.is_empty()).then(|| {
            format!(
                "Redis holds entries of changes that were lost when a standby took over, and that Kafka never had: in every stream those with the ids {}; undo what was done with them, delete them (XRANGE shows them, XDEL deletes), and then run HDEL {} phantoms",
                self.phantoms, self.mark
            )
        })
    }

    /// So many records after the mark are gone.
    fn gap(&self, missing: u64) -> SinkError {
        let position = self.place.position;
        SinkError::RedisGap {
            missing,
            after: position.map_or("the beginning".to_owned(), |position| position.to_string()),
            mark: self.mark.clone(),
        }
    }

    /// Sets the count of the mark, forgets what somebody accepted, and notes that every entry from `phantoms` on stands for nothing.
    async fn set_count(&mut self, records: u64, phantoms: Option<Position>) -> Result<(), SinkError> {
        let phantoms = self
            .place
            .position
            .zip(phantoms)
            .map(|(last, first)| format!("{} to {}", EntryId::of(first, 0), EntryId::of(last, u8::MAX)))
            .unwrap_or_default();
        let accept = self.place.accept.map(|accept| accept.to_string()).unwrap_or_default();
        let set: i32 = Script::new(include_str!("redis/count.lua"))
            .key(&self.mark)
            .arg(&self.generation)
            .arg(text(self.place.position))
            .arg(accept)
            .arg(records)
            .arg(phantoms)
            .invoke_async(&mut self.connection)
            .await
            .map_err(|error| failed(&self.address, &error))?;
        if set == 0 {
            return Err(SinkError::Redis {
                address: self.address.clone(),
                cause: format!("the mark {:?} changed meanwhile", self.mark),
            });
        }
        self.place.records = records;
        self.place.accept = None;
        Ok(())
    }
}

/// Records that go into the next script: whole changes only, because the mark speaks of changes.
fn chunk_length(entries: &[Entry<'_>]) -> usize {
    let mut bytes = 0;
    for (index, pair) in entries.windows(2).enumerate() {
        bytes += pair[0].size();
        let whole = pair[0].position != pair[1].position;
        if whole && (index + 1 >= SCRIPT_RECORDS || bytes >= SCRIPT_BYTES) {
            return index + 1;
        }
    }
    entries.len()
}

pub(crate) fn texts(answer: &[String]) -> Vec<&str> {
    answer.iter().map(String::as_str).collect()
}

/// A field of the mark; what cannot be read counts as not there, and is found out by the count of records.
fn written<T: std::str::FromStr>(field: &str) -> Option<T> {
    field.parse().ok()
}

fn text(position: Option<Position>) -> String {
    position.map(|position| position.to_string()).unwrap_or_default()
}

/// A position for people.
fn said(position: Option<Position>) -> String {
    position.map_or("nothing".to_owned(), |position| position.to_string())
}

/// Connects to the server of the URL in a file.
pub(crate) async fn connect(
    url_file: &Path,
    ca_file: Option<&Path>,
) -> Result<(MultiplexedConnection, String), SinkError> {
    let invalid = |error: &dyn fmt::Display| SinkError::RedisUrl(error.to_string());
    let url = fs::read_to_string(url_file).map_err(|error| invalid(&error))?;
    // Errors of the URL are said by their kind only: the URL holds the password.
    let unusable = |error: RedisError| invalid(&error.category());
    let url = url.trim();
    let client = if url.starts_with("rediss:") {
        // Never what the machine happens to trust.
        let certificates = TlsCertificates {
            client_tls: None,
            root_cert: Some(authorities(ca_file).map_err(|error| invalid(&error))?),
        };
        Client::build_with_tls(url, certificates).map_err(unusable)?
    } else if ca_file.is_some() {
        return Err(invalid(
            &"it starts with redis:// and caSecretRef asks for TLS; write rediss://",
        ));
    } else {
        Client::open(url).map_err(unusable)?
    };
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

/// Finds out whether entries stay there.
pub(crate) async fn check_server(
    connection: &mut MultiplexedConnection,
    durability: Durability,
    address: &str,
) -> Result<Durable, SinkError> {
    let info: String = redis::cmd("INFO")
        .query_async(connection)
        .await
        .map_err(|error| failed(address, &error))?;
    let value = |name: &str| {
        info.lines()
            .find_map(|line| line.strip_prefix(name)?.strip_prefix(':'))
            .map(|value| value.trim().to_owned())
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
            policy,
        });
    }
    Durable::on(connection, durability, value, address).await
}

pub(crate) fn failed(address: &str, error: &RedisError) -> SinkError {
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
        .map(|(position, part)| parse(EntryId::of(position, part).to_string()));
        assert!(ids.is_sorted_by(|left, right| left < right));
    }
}

//! When what was written counts as being in Redis.

use std::time::Duration;

use meander_config::Durability;
use redis::{FromRedisValue, RedisResult, aio::MultiplexedConnection};

use crate::sink::{SinkError, redis::failed};

/// The first version that has WAITAOF.
const WAITAOF_SINCE: (u32, u32) = (7, 2);
/// How long disk or replica may take; less than an answer may.
const DEADLINE: Duration = Duration::from_secs(5);

/// How it is made sure.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Durable {
    /// The answer to a write says it.
    OnAnswer,
    /// The server is asked to wait for its disk.
    WaitAof,
    /// The server is asked to wait for a replica.
    WaitReplica,
}

impl Durable {
    /// How this server makes sure what is asked for.
    ///
    /// # Errors
    /// When it cannot: then the message says what to set.
    pub(super) async fn on(
        connection: &mut MultiplexedConnection,
        asked: Durability,
        info: impl Fn(&str) -> String,
        address: &str,
    ) -> Result<Self, SinkError> {
        match asked {
            Durability::None => return Ok(Self::OnAnswer),
            Durability::Replica => return Ok(Self::WaitReplica),
            Durability::Aof => {}
        }
        let lacking = |cause: &str, remedy: &str| lacking(address, cause, remedy);
        if info("aof_enabled") != "1" {
            return Err(lacking("appendonly is off", "run CONFIG SET appendonly yes"));
        }
        let version = info("redis_version");
        if version_of(&version) >= Some(WAITAOF_SINCE) {
            return Ok(Self::WaitAof);
        }
        // Before that, an answer comes after the disk only with these settings.
        for (name, wanted) in [("appendfsync", "always"), ("no-appendfsync-on-rewrite", "no")] {
            let answer: (String, String) = ask(connection, &["CONFIG", "GET", name]).await.map_err(|error| {
                lacking(
                    &format!("version {version} has no WAITAOF, and does not say its {name}: {error}"),
                    "use Redis 7.2 or later, or allow CONFIG GET",
                )
            })?;
            if answer.1 != wanted {
                return Err(lacking(
                    &format!("version {version} has no WAITAOF, and {name} is {}", answer.1),
                    &format!("run CONFIG SET {name} {wanted}, or use Redis 7.2 or later"),
                ));
            }
        }
        Ok(Self::OnAnswer)
    }

    /// Waits until everything that this connection wrote, and what was written before, is durable.
    ///
    /// # Errors
    /// When it is not in time. What was written is there all the same.
    pub(super) async fn confirm(self, connection: &mut MultiplexedConnection, address: &str) -> Result<(), SinkError> {
        let deadline = DEADLINE.as_millis().to_string();
        let seconds = DEADLINE.as_secs();
        match self {
            Self::OnAnswer => Ok(()),
            Self::WaitAof => {
                let (local, _): (u64, u64) = ask(connection, &["WAITAOF", "1", "0", &deadline])
                    .await
                    .map_err(|error| failed(address, &error))?;
                if local >= 1 {
                    return Ok(());
                }
                Err(lacking(
                    address,
                    &format!("the append-only file was not on disk within {seconds} s"),
                    "look at its disk, and at aof_last_write_status in INFO persistence",
                ))
            }
            Self::WaitReplica => {
                let replicas: u64 = ask(connection, &["WAIT", "1", &deadline])
                    .await
                    .map_err(|error| failed(address, &error))?;
                if replicas >= 1 {
                    return Ok(());
                }
                Err(lacking(
                    address,
                    &format!("no replica had the entries within {seconds} s"),
                    "look at its replicas in INFO replication",
                ))
            }
        }
    }
}

async fn ask<T: FromRedisValue>(connection: &mut MultiplexedConnection, command: &[&str]) -> RedisResult<T> {
    redis::cmd(command[0]).arg(&command[1..]).query_async(connection).await
}

fn lacking(address: &str, cause: &str, remedy: &str) -> SinkError {
    SinkError::RedisNotDurable {
        address: address.to_owned(),
        cause: cause.to_owned(),
        remedy: remedy.to_owned(),
    }
}

/// Major and minor version; none of what is no version, which then counts as old.
fn version_of(text: &str) -> Option<(u32, u32)> {
    let mut numbers = text.split(['.', '-']).map(str::parse);
    match (numbers.next(), numbers.next()) {
        (Some(Ok(major)), Some(Ok(minor))) => Some((major, minor)),
        _ => None,
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn what_is_no_version_counts_as_one_without_waitaof() {
        let has = |text| version_of(text) >= Some(WAITAOF_SINCE);
        for version in ["7.2.0", "7.2-rc1", "7.4.1", "8.0.0", "8.10", "255.255.255"] {
            assert!(has(version), "{version}");
        }
        for version in [
            "7.0.15",
            "6.2.14",
            "7.0-rc3",
            "7",
            "",
            "unstable",
            "x.9",
            "-1.9.0",
            "99999999999.1",
        ] {
            assert!(!has(version), "{version}");
        }
    }
}

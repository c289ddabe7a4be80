//! Whose a topic prefix is: two pipelines that shared one would put each change into the same topics twice.
//!
//! A compacted topic of one partition holds a record for each pipeline that claims a prefix. Its offsets are the order of the claims,
//! which no clock says: of those that were not withdrawn the first holds. A prefix and one that begins with it and a dot, as `shop` and
//! `shop.eu`, are no better than two that are the same: whoever reads takes every topic that begins with the prefix and a dot. Claiming
//! fences nobody and needs no slot, so it comes before a slot is made.

use std::{sync::Arc, time::Duration};

use meander_config::KafkaCluster;
use rdkafka::{
    producer::{FutureProducer, FutureRecord},
    util::Timeout,
};
use tokio::task::{JoinError, spawn_blocking};

use crate::{
    checkpoint::{Tail, TailError},
    kafka_client::{EndedAside, settings},
    log::{CLAIMS_TOPIC, claim_key},
    sink::{SinkError, topics::unreachable},
};

const DEADLINE: Duration = Duration::from_secs(15);

/// The claims that overlap one topic prefix, as the pipeline with this checkpoint key sees them.
pub struct Claims {
    cluster: KafkaCluster,
    ours: Claim,
}

/// That the topics under a prefix are those of one pipeline.
#[derive(Clone, Debug, PartialEq, Eq)]
struct Claim {
    prefix: String,
    /// Key of the pipeline's checkpoint.
    owner: String,
}

impl Claims {
    /// Does not connect yet.
    #[must_use]
    pub fn new(cluster: KafkaCluster, prefix: &str, key: String) -> Self {
        Self {
            cluster,
            ours: Claim {
                prefix: prefix.to_owned(),
                owner: key,
            },
        }
    }

    /// Claims the prefix. The topic of claims has to exist.
    ///
    /// # Errors
    /// When another pipeline claimed it earlier, or one that overlaps, or Kafka does not answer.
    pub async fn claim(&self) -> Result<(), SinkError> {
        let tail = Arc::new(Tail::new(&self.cluster, DEADLINE)?.waiting());
        let mut live = self.live(&tail).await?;
        if !live.contains(&self.ours) {
            if let Some(other) = live.into_iter().next() {
                return Err(self.taken(other));
            }
            self.write(Some("{}")).await?;
            live = self.live(&tail).await?;
        }
        // Of two that claim at the same time, both see which claim came first: whoever does not see the other's here is before it.
        match live.into_iter().next() {
            Some(first) if first != self.ours => {
                self.write(None).await?;
                Err(self.taken(first))
            }
            _ => Ok(()),
        }
    }

    /// Withdraws the claim, if there is one.
    ///
    /// # Errors
    /// When Kafka does not answer.
    pub async fn withdraw(&self) -> Result<(), SinkError> {
        let tail = Arc::new(Tail::new(&self.cluster, DEADLINE)?);
        match self.live(&tail).await {
            Ok(live) if live.contains(&self.ours) => self.write(None).await,
            // Nobody ever claimed anything.
            Ok(_) | Err(SinkError::Checkpoint(TailError::NoSuchPartition { .. })) => Ok(()),
            Err(error) => Err(error),
        }
    }

    fn taken(&self, by: Claim) -> SinkError {
        SinkError::TopicPrefixTaken {
            prefix: self.ours.prefix.clone(),
            taken: by.prefix,
            owner: by.owner,
        }
    }

    /// Our claim, and those of others that it cannot hold beside, in the order in which they came.
    async fn live(&self, tail: &Arc<Tail>) -> Result<Vec<Claim>, SinkError> {
        let tail = Arc::clone(tail);
        let read = spawn_blocking(move || tail.keys(CLAIMS_TOPIC, 0)).await;
        let keys = read.map_err(|error: JoinError| SinkError::KafkaTransaction(error.to_string()))??;
        let mut claims: Vec<Claim> = keys.iter().filter_map(|key| Claim::read(key)).collect();
        // A pipeline does not stand in its own way.
        claims.retain(|claim| {
            *claim == self.ours || (claim.owner != self.ours.owner && overlap(&claim.prefix, &self.ours.prefix))
        });
        Ok(claims)
    }

    async fn write(&self, value: Option<&str>) -> Result<(), SinkError> {
        let servers = self.cluster.bootstrap_servers.join(",");
        let failed = |error: &rdkafka::error::KafkaError| unreachable(&servers, error);
        let producer = settings(&self.cluster)?
            .set("acks", "all")
            .set("message.timeout.ms", DEADLINE.as_millis().to_string())
            .create()
            .map_err(|error| failed(&error))?;
        let producer: EndedAside<FutureProducer> = EndedAside::new(producer);
        let key = claim_key(&self.ours.prefix, &self.ours.owner);
        let mut record = FutureRecord::to(CLAIMS_TOPIC).partition(0).key(&key);
        if let Some(value) = value {
            record = record.payload(value);
        }
        match producer.send(record, Timeout::After(DEADLINE)).await {
            Ok(_) => Ok(()),
            Err((error, _)) => Err(failed(&error)),
        }
    }
}

/// The pipeline that publishes under this prefix or one that overlaps it, as prefix and checkpoint key; none if nobody does. Blocks.
///
/// # Errors
/// When Kafka does not answer, or does not let this client read the claims.
pub fn holder(cluster: &KafkaCluster, prefix: &str) -> Result<Option<(String, String)>, SinkError> {
    let keys = match Tail::new(cluster, DEADLINE)?.keys(CLAIMS_TOPIC, 0) {
        Ok(keys) => keys,
        // No pipeline publishes to this cluster.
        Err(TailError::NoSuchPartition { .. }) => return Ok(None),
        Err(error) => return Err(error.into()),
    };
    let mut claims = keys.iter().filter_map(|key| Claim::read(key));
    let held = claims.find(|claim| overlap(&claim.prefix, prefix));
    Ok(held.map(|claim| (claim.prefix, claim.owner)))
}

impl Claim {
    /// Reads the key of a record; none of one that is no claim.
    fn read(key: &[u8]) -> Option<Self> {
        // No prefix holds a slash.
        let (prefix, owner) = std::str::from_utf8(key).ok()?.split_once('/')?;
        Some(Self {
            prefix: prefix.to_owned(),
            owner: owner.to_owned(),
        })
    }
}

/// Whether a topic of one prefix can be taken for one of the other.
fn overlap(one: &str, other: &str) -> bool {
    let within = |inner: &str, outer: &str| inner.strip_prefix(outer).is_some_and(|rest| rest.starts_with('.'));
    one == other || within(one, other) || within(other, one)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn prefixes_overlap_where_one_is_the_other_up_to_a_dot() {
        for (one, other, together) in [
            ("shop", "shop", true),
            ("shop", "shop.eu", true),
            ("shop.eu.west", "shop", true),
            ("shop", "shopping", false),
            ("shop.eu", "shop.us", false),
        ] {
            assert_eq!(overlap(one, other), together, "{one} {other}");
            assert_eq!(overlap(other, one), together, "{other} {one}");
        }
    }
}

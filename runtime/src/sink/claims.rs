//! Whose a topic prefix is: two pipelines that shared one would put each change into the same topics twice.
//!
//! A compacted topic holds a record for each pipeline that claims the prefix, under the key of its checkpoint. The earliest claim that
//! was not withdrawn holds. A prefix and one that begins with it and a dot, as `shop` and `shop.eu`, are no better than two that are
//! the same: whoever reads takes every topic that begins with the prefix and a dot. Claiming fences nobody and needs no slot, so it comes before a slot is made.

use std::time::Duration;

use meander_config::KafkaCluster;
use rdkafka::{
    producer::{FutureProducer, FutureRecord},
    util::Timeout,
};
use tokio::task::JoinError;

use crate::{
    checkpoint::{Tail, TailError},
    kafka_client::settings,
    log::{claims_topic, prefix_of_claims},
    sink::{SinkError, topics::unreachable},
};

const DEADLINE: Duration = Duration::from_secs(15);

/// The claims on one topic prefix, as the pipeline with this checkpoint key sees them.
pub struct Claims {
    cluster: KafkaCluster,
    prefix: String,
    key: String,
}

/// A claim that was not withdrawn. The least of those that overlap holds.
#[derive(Debug, PartialEq, Eq, PartialOrd, Ord)]
struct Claim {
    timestamp_millis: Option<i64>,
    owner: String,
    prefix: String,
}

impl Claims {
    /// Does not connect yet.
    #[must_use]
    pub fn new(cluster: KafkaCluster, prefix: &str, key: String) -> Self {
        Self {
            cluster,
            prefix: prefix.to_owned(),
            key,
        }
    }

    /// Claims the prefix, whose topic of claims has to exist.
    ///
    /// # Errors
    /// When another pipeline claimed it earlier, or one that overlaps, or Kafka does not answer.
    pub async fn claim(&self) -> Result<(), SinkError> {
        let live = self.live().await?;
        if !live.iter().any(|claim| self.is_ours(claim)) {
            // Whoever is there already came first, whatever the clocks say.
            if let Some(other) = live.into_iter().next() {
                return Err(self.taken(other));
            }
            self.write(Some("{}")).await?;
        }
        // Of two that claim at the same time, both see which claim holds.
        match self.live().await?.into_iter().min() {
            Some(first) if !self.is_ours(&first) => {
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
        match self.live().await {
            Ok(live) if live.iter().any(|claim| self.is_ours(claim)) => self.write(None).await,
            Ok(_) => Ok(()),
            // Nobody ever claimed anything.
            Err(SinkError::Checkpoint(TailError::NoSuchPartition { topic, .. }))
                if topic == claims_topic(&self.prefix) =>
            {
                Ok(())
            }
            Err(error) => Err(error),
        }
    }

    fn is_ours(&self, claim: &Claim) -> bool {
        claim.owner == self.key && claim.prefix == self.prefix
    }

    fn taken(&self, by: Claim) -> SinkError {
        SinkError::TopicPrefixTaken {
            prefix: self.prefix.clone(),
            taken: by.prefix,
            owner: by.owner,
        }
    }

    /// Our claim, and those of others that it cannot hold beside.
    async fn live(&self) -> Result<Vec<Claim>, SinkError> {
        let (cluster, prefix) = (self.cluster.clone(), self.prefix.clone());
        let read = tokio::task::spawn_blocking(move || {
            let tail = Tail::new(&cluster, DEADLINE)?;
            // Our own topic is there, whether or not every broker knows it yet.
            let mut prefixes = vec![prefix.clone()];
            prefixes.extend(tail.topics()?.iter().filter_map(|topic| {
                let other = prefix_of_claims(topic)?;
                (other != prefix && overlap(other, &prefix)).then(|| other.to_owned())
            }));
            let mut claims = Vec::new();
            for prefix in prefixes {
                for (key, timestamp_millis) in tail.keys(&claims_topic(&prefix), 0)? {
                    claims.push(Claim {
                        timestamp_millis,
                        owner: String::from_utf8_lossy(&key).into_owned(),
                        prefix: prefix.clone(),
                    });
                }
            }
            Ok::<_, TailError>(claims)
        })
        .await;
        let mut claims = read.map_err(|error: JoinError| SinkError::KafkaTransaction(error.to_string()))??;
        // A pipeline does not stand in its own way.
        claims.retain(|claim| claim.owner != self.key || claim.prefix == self.prefix);
        Ok(claims)
    }

    async fn write(&self, value: Option<&str>) -> Result<(), SinkError> {
        let servers = self.cluster.bootstrap_servers.join(",");
        let failed = |error: &rdkafka::error::KafkaError| unreachable(&servers, error);
        let producer: FutureProducer = settings(&self.cluster)?
            .set("acks", "all")
            .set("message.timeout.ms", DEADLINE.as_millis().to_string())
            .create()
            .map_err(|error| failed(&error))?;
        let topic = claims_topic(&self.prefix);
        let mut record = FutureRecord::to(&topic).partition(0).key(&self.key);
        if let Some(value) = value {
            record = record.payload(value);
        }
        match producer.send(record, Timeout::After(DEADLINE)).await {
            Ok(_) => Ok(()),
            Err((error, _)) => Err(failed(&error)),
        }
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

//! Whose a topic prefix is: two pipelines that shared one would put each change into the same topics twice.
//!
//! A compacted topic holds a record for each pipeline that claims the prefix, under the key of its checkpoint. The earliest claim that
//! was not withdrawn holds. Claiming fences nobody and needs no slot, so it comes before a slot is made.

use std::time::Duration;

use rdkafka::{
    ClientConfig,
    producer::{FutureProducer, FutureRecord},
    util::Timeout,
};
use tokio::task::JoinError;

use crate::{
    checkpoint::Tail,
    log::claims_topic,
    sink::{SinkError, topics::unreachable},
};

const DEADLINE: Duration = Duration::from_secs(15);

/// The claims on one topic prefix, as the pipeline with this checkpoint key sees them.
pub struct Claims {
    servers: Vec<String>,
    prefix: String,
    key: String,
}

impl Claims {
    /// Does not connect yet.
    #[must_use]
    pub fn new(bootstrap_servers: &[String], prefix: &str, key: String) -> Self {
        Self {
            servers: bootstrap_servers.to_vec(),
            prefix: prefix.to_owned(),
            key,
        }
    }

    /// Claims the prefix, whose topic of claims has to exist.
    ///
    /// # Errors
    /// When another pipeline claimed it earlier, or Kafka does not answer.
    pub async fn claim(&self) -> Result<(), SinkError> {
        if !self.keys().await?.contains(&self.key) {
            self.write(Some("{}")).await?;
        }
        // Of two that claim at the same time, both see whose claim came first.
        match self.keys().await?.into_iter().next() {
            Some(owner) if owner != self.key => {
                self.write(None).await?;
                Err(SinkError::TopicPrefixTaken {
                    prefix: self.prefix.clone(),
                    owner,
                })
            }
            _ => Ok(()),
        }
    }

    /// Withdraws the claim.
    ///
    /// # Errors
    /// When Kafka does not answer.
    pub async fn withdraw(&self) -> Result<(), SinkError> {
        self.write(None).await
    }

    async fn keys(&self) -> Result<Vec<String>, SinkError> {
        let (servers, topic) = (self.servers.clone(), claims_topic(&self.prefix));
        let read = tokio::task::spawn_blocking(move || Tail::new(&servers, DEADLINE)?.keys(&topic, 0)).await;
        let keys = read.map_err(|error: JoinError| SinkError::KafkaTransaction(error.to_string()))??;
        Ok(keys
            .iter()
            .map(|key| String::from_utf8_lossy(key).into_owned())
            .collect())
    }

    async fn write(&self, value: Option<&str>) -> Result<(), SinkError> {
        let servers = self.servers.join(",");
        let failed = |error: &rdkafka::error::KafkaError| unreachable(&servers, error);
        let producer: FutureProducer = ClientConfig::new()
            .set("bootstrap.servers", &servers)
            .set("client.id", "meander-runtime")
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

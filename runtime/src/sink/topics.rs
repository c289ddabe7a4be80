//! Makes and checks Kafka topics.

use std::{
    collections::{HashMap, HashSet},
    time::Duration,
};

use rdkafka::{
    ClientConfig,
    admin::{AdminClient, AdminOptions, NewTopic, ResourceSpecifier, TopicReplication},
    client::DefaultClientContext,
    types::RDKafkaErrorCode,
};

use crate::sink::SinkError;

const DEADLINE: Duration = Duration::from_secs(15);

/// What new topics get.
#[derive(Clone, Copy, Debug)]
pub struct TopicSettings {
    /// Partitions of a data topic.
    pub partitions: i32,
    /// Replicas; the broker's default where it is not said.
    pub replication_factor: Option<i32>,
}

/// Makes topics that are missing, each once.
pub struct Topics {
    admin: AdminClient<DefaultClientContext>,
    servers: String,
    settings: TopicSettings,
    ensured: HashSet<String>,
    owners: HashMap<String, String>,
}

impl Topics {
    /// Does not connect yet.
    ///
    /// # Errors
    /// When the client cannot be made from its settings.
    pub fn new(bootstrap_servers: &[String], settings: TopicSettings) -> Result<Self, SinkError> {
        let servers = bootstrap_servers.join(",");
        let admin = ClientConfig::new()
            .set("bootstrap.servers", &servers)
            .set("client.id", "meander-runtime")
            .create()
            .map_err(|error| unreachable(&servers, &error))?;
        Ok(Self {
            admin,
            servers,
            settings,
            ensured: HashSet::new(),
            owners: HashMap::new(),
        })
    }

    /// Makes a compacted topic of one partition, for the checkpoint or the claims, if it is missing.
    ///
    /// # Errors
    /// When it cannot be made.
    pub async fn ensure_compacted(&mut self, topic: &str) -> Result<(), SinkError> {
        let new = NewTopic::new(topic, 1, self.replication()).set("cleanup.policy", "compact");
        self.create(&new).await?;
        let settings = self.settings_of(topic).await?;
        match settings.get("cleanup.policy").map(String::as_str) {
            None | Some("compact") => Ok(()),
            Some(_) => Err(self.unusable(
                topic,
                "is not compacted, so Kafka will delete what is in it some day; set cleanup.policy=compact",
            )),
        }
    }

    /// Makes the topic of a table, if it is missing, and checks that it keeps every record until its retention ends.
    ///
    /// # Errors
    /// When it cannot be made, is compacted, or belongs to another table.
    pub async fn ensure_data(&mut self, topic: &str, table: &str) -> Result<(), SinkError> {
        let owner = self.owners.entry(topic.to_owned()).or_insert_with(|| table.to_owned());
        if owner != table {
            return Err(SinkError::TopicCollision {
                topic: topic.to_owned(),
                first: owner.clone(),
                second: table.to_owned(),
            });
        }
        if self.ensured.contains(topic) {
            return Ok(());
        }
        if topic.len() > 249 {
            return Err(self.unusable(
                topic,
                "the name is longer than the 249 characters that Kafka takes; choose a shorter topicPrefix",
            ));
        }
        let new = NewTopic::new(topic, self.settings.partitions, self.replication())
            .set("cleanup.policy", "delete")
            .set("message.timestamp.type", "CreateTime");
        self.create(&new).await?;
        self.check_settings(topic).await?;
        self.ensured.insert(topic.to_owned());
        Ok(())
    }

    fn replication(&self) -> TopicReplication<'static> {
        // -1 is the broker's default.
        TopicReplication::Fixed(self.settings.replication_factor.unwrap_or(-1))
    }

    async fn create(&self, new: &NewTopic<'_>) -> Result<(), SinkError> {
        let options = AdminOptions::new()
            .operation_timeout(Some(DEADLINE))
            .request_timeout(Some(DEADLINE));
        let results = self
            .admin
            .create_topics([new], &options)
            .await
            .map_err(|error| unreachable(&self.servers, &error))?;
        for result in results {
            match result {
                Ok(_) | Err((_, RDKafkaErrorCode::TopicAlreadyExists)) => {}
                Err((topic, code)) => return Err(self.unusable(&topic, &format!("cannot be made: {code}"))),
            }
        }
        Ok(())
    }

    async fn check_settings(&self, topic: &str) -> Result<(), SinkError> {
        let settings = self.settings_of(topic).await?;
        let is = |name: &str, wanted: &str| settings.get(name).is_none_or(|value| value == wanted);
        if !is("cleanup.policy", "delete") {
            return Err(self.unusable(
                topic,
                "is compacted, which removes changes from the log; set cleanup.policy=delete",
            ));
        }
        if !is("message.timestamp.type", "CreateTime") {
            return Err(self.unusable(
                topic,
                "does not keep commit times; set message.timestamp.type=CreateTime",
            ));
        }
        Ok(())
    }

    async fn settings_of(&self, topic: &str) -> Result<HashMap<String, String>, SinkError> {
        let options = AdminOptions::new().request_timeout(Some(DEADLINE));
        let described = self
            .admin
            .describe_configs([&ResourceSpecifier::Topic(topic)], &options)
            .await
            .map_err(|error| unreachable(&self.servers, &error))?;
        let mut settings = HashMap::new();
        for resource in described {
            let resource = resource.map_err(|code| self.unusable(topic, &format!("cannot be described: {code}")))?;
            settings.extend(
                resource
                    .entries
                    .into_iter()
                    .filter_map(|entry| Some((entry.name, entry.value?))),
            );
        }
        Ok(settings)
    }

    fn unusable(&self, topic: &str, cause: &str) -> SinkError {
        SinkError::Topic {
            topic: topic.to_owned(),
            cause: cause.to_owned(),
        }
    }
}

pub(super) fn unreachable(servers: &str, error: &dyn std::error::Error) -> SinkError {
    SinkError::KafkaUnreachable {
        servers: servers.to_owned(),
        cause: error.to_string(),
    }
}

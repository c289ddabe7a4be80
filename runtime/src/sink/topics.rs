//! Makes and checks Kafka topics.

use std::{
    collections::{BTreeMap, HashMap, HashSet},
    sync::{Arc, Mutex, PoisonError},
    time::{Duration, Instant},
};

use meander_config::{KafkaSink, TopicManagement};
use rdkafka::{
    admin::{AdminClient, AdminOptions, NewTopic, ResourceSpecifier, TopicReplication},
    types::RDKafkaErrorCode,
};
use tokio::{task::spawn_blocking, time::sleep};

use crate::{
    kafka_client::{ClientError, EndedAside, Hearing, settings},
    sink::SinkError,
    size_limit::SizeLimit,
};

const DEADLINE: Duration = Duration::from_secs(15);
/// The most topics that a message names.
const NAMED: usize = 10;
/// How old the knowledge of a topic's limit may be when a large record is made for it.
const LIMIT_AGE: Duration = Duration::from_secs(10);

/// The reason for topics that have other settings than is asked of them.
const DIFFERS: &str = "TopicConfigDiffers";
/// They are looked at again this often.
const AGAIN: Duration = Duration::from_secs(60);

/// What a person has to know of topics that are used all the same, by reason and topic.
#[derive(Clone, Debug, Default)]
pub struct Remarks(Arc<Mutex<BTreeMap<&'static str, BTreeMap<String, String>>>>);

impl Remarks {
    /// That a topic has more partitions than its keys go by.
    pub fn partitions_added(&self, topic: &str, has: i32, used: i32) {
        let mut remarks = self.0.lock().unwrap_or_else(PoisonError::into_inner);
        let remarks = remarks.entry("PartitionsAdded").or_default();
        // It is called for each record.
        if !remarks.contains_key(topic) {
            let message = format!(
                "topic {topic:?} has {has} partitions and not {used}: somebody added to them; every key stays in its partition, so that its order holds, and what was added stays empty; to have more partitions, create another CdcPipeline with topics.partitions: {has} and another topicPrefix"
            );
            tracing::warn!("{message}");
            remarks.insert(topic.to_owned(), message);
        }
    }

    fn differs(&self, topic: &str, message: String) {
        tracing::warn!("{message}");
        let mut remarks = self.0.lock().unwrap_or_else(PoisonError::into_inner);
        let remarks = remarks.entry(DIFFERS).or_default();
        remarks.insert(topic.to_owned(), message);
    }

    /// The topics that have other settings than is asked of them.
    fn differing(&self) -> Vec<String> {
        let remarks = self.0.lock().unwrap_or_else(PoisonError::into_inner);
        let topics = remarks.get(DIFFERS).into_iter().flat_map(BTreeMap::keys);
        topics.cloned().collect()
    }

    fn is_mended(&self, topic: &str) {
        tracing::info!("topic {topic:?} has the settings now that topics.config asks for");
        let mut remarks = self.0.lock().unwrap_or_else(PoisonError::into_inner);
        if let Some(remarks) = remarks.get_mut(DIFFERS) {
            remarks.remove(topic);
        }
    }

    /// The first, with its reason, and how many more there are.
    #[must_use]
    pub fn first(&self) -> Option<(&'static str, String)> {
        let remarks = self.0.lock().unwrap_or_else(PoisonError::into_inner);
        let each = || {
            remarks
                .iter()
                .flat_map(|(reason, topics)| topics.values().map(|message| (*reason, message)))
        };
        let (reason, message) = each().next()?;
        let message = message.clone();
        Some(match each().count() - 1 {
            0 => (reason, message),
            more => (reason, format!("{message}; the same or the like of {more} more topics")),
        })
    }

    /// Begins anew.
    pub fn clear(&self) {
        self.0.lock().unwrap_or_else(PoisonError::into_inner).clear();
    }
}

/// Makes topics that are missing, or checks those that somebody else made, each once.
pub struct Topics {
    admin: EndedAside<Arc<AdminClient<Hearing>>>,
    servers: String,
    config: KafkaSink,
    ensured: HashSet<String>,
    owners: HashMap<String, String>,
    remarks: Remarks,
    /// Whether a topic with more partitions than asked for is used: keys have their places in it already.
    begun: bool,
    /// What each topic takes of one record, and when that was last asked for.
    limits: HashMap<String, (SizeLimit, Option<Instant>)>,
}

impl Topics {
    /// Does not connect yet.
    ///
    /// # Errors
    /// When the client cannot be made from its settings.
    pub fn new(config: &KafkaSink) -> Result<Self, SinkError> {
        let admin = settings(&config.cluster())?
            .create_with_context(Hearing::default())
            .map_err(ClientError::from)?;
        Ok(Self {
            admin: EndedAside::new(Arc::new(admin)),
            servers: config.bootstrap_servers.join(","),
            config: config.clone(),
            ensured: HashSet::new(),
            owners: HashMap::new(),
            remarks: Remarks::default(),
            begun: false,
            limits: HashMap::new(),
        })
    }

    /// Tells there what a person has to know of topics.
    #[must_use]
    pub fn with_remarks(mut self, remarks: Remarks) -> Self {
        self.remarks = remarks;
        self
    }

    /// From here on partitions that were added to a topic are no reason to stop: keys go by the number that was asked for, and there is
    /// no way to take any away.
    pub fn begun(&mut self) {
        self.begun = true;
    }

    /// The same for several topics and their tables. What does not fit is said of all of them at once.
    ///
    /// # Errors
    /// As of one.
    pub async fn ensure_all(&mut self, topics: impl IntoIterator<Item = (String, String)>) -> Result<(), SinkError> {
        let mut unfit = Vec::new();
        for (topic, table) in topics {
            match self.ensure_data(&topic, &table).await {
                Err(SinkError::Topic { topic, cause }) => unfit.push((topic, cause)),
                ensured => ensured?,
            }
        }
        let more = unfit.len().saturating_sub(NAMED);
        let mut unfit = unfit.into_iter().take(NAMED);
        let Some((topic, mut cause)) = unfit.next() else {
            return Ok(());
        };
        for (topic, also) in unfit {
            cause.push_str(&format!(". Also: topic {topic:?}: {also}"));
        }
        if more > 0 {
            cause.push_str(&format!(". Also: {more} more topics"));
        }
        Err(SinkError::Topic { topic, cause })
    }

    /// Makes a compacted topic of one partition, for the checkpoint, the schemas or the claims, if it is missing, or checks it.
    ///
    /// # Errors
    /// When it cannot be made, is missing, or does not fit.
    pub async fn ensure_compacted(&mut self, topic: &str) -> Result<(), SinkError> {
        let wanted = NewTopic::new(topic, 1, self.replication()).set("cleanup.policy", "compact");
        self.ensure(&wanted).await.map(drop)
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
        let config = self.config.clone();
        let mut wanted = NewTopic::new(topic, config.partitions, self.replication())
            .set("cleanup.policy", "delete")
            .set("message.timestamp.type", "CreateTime");
        for (name, value) in &config.topic_config {
            wanted = wanted.set(name, value);
        }
        let found = self.ensure(&wanted).await?;
        let unknown = |name: &&String| !found.is_empty() && !found.contains_key(*name);
        if let Some(name) = config.topic_config.keys().find(unknown) {
            let cause = format!("Kafka has no setting {name} of topics; correct topics.config");
            return Err(self.unusable(topic, &cause));
        }
        let differing = self.differing(topic, &found);
        match (config.topic_management, differing.first()) {
            (_, None) => {}
            (TopicManagement::External, Some(first)) => return Err(self.unusable(topic, first)),
            (TopicManagement::Managed, Some(_)) => {
                let message = format!(
                    "topic {topic:?} was there before topics.config asked, and keeps its own settings: it {}",
                    differing.join("; it ")
                );
                self.remarks.differs(topic, message);
            }
        }
        self.ensured.insert(topic.to_owned());
        Ok(())
    }

    /// In what the settings of a topic are not what is asked, each with its remedy.
    fn differing(&self, topic: &str, found: &HashMap<String, String>) -> Vec<String> {
        let asked = self.config.topic_config.iter();
        let differs = asked.filter_map(|(name, asked)| {
            let has = found.get(name).filter(|has| !is_same(has, asked))?;
            let remedy = self.alter(topic, name, asked);
            Some(format!(
                "has {name}={has}, and topics.config asks for {asked}; {remedy}"
            ))
        });
        differs.collect()
    }

    /// Looks at those of which it was said that their settings differ, and says it no more of one that somebody has mended.
    ///
    /// # Errors
    /// When Kafka does not say how one of them is set. The others were looked at.
    pub async fn look_again(&self) -> Result<(), SinkError> {
        let mut result = Ok(());
        for topic in self.remarks.differing() {
            match self.settings_of(&topic).await {
                Ok(found) if self.differing(&topic, &found).is_empty() => self.remarks.is_mended(&topic),
                Ok(_) => {}
                Err(error) => result = Err(error),
            }
        }
        result
    }

    /// What the topic takes of one record, once [`learn_limit`](Self::learn_limit) has asked.
    pub fn limit(&mut self, topic: &str) -> SizeLimit {
        self.limits.entry(topic.to_owned()).or_default().0.clone()
    }

    /// Asks what the topic takes of one record, unless it was asked a moment ago: somebody may have changed it. Where there is no answer, what was known
    /// stays, and the broker judges.
    pub async fn learn_limit(&mut self, topic: &str) {
        let (limit, asked) = self.limits.entry(topic.to_owned()).or_default();
        if asked.is_some_and(|asked| asked.elapsed() < LIMIT_AGE) {
            return;
        }
        *asked = Some(Instant::now());
        let limit = limit.clone();
        match self.settings_of(topic).await {
            Ok(settings) => {
                if let Some(bytes) = settings.get("max.message.bytes").and_then(|bytes| bytes.parse().ok()) {
                    limit.set(bytes);
                }
            }
            Err(error) => tracing::warn!(topic, %error, "nobody says how large a record the topic takes"),
        }
    }

    fn replication(&self) -> TopicReplication<'static> {
        // -1 is the broker's default.
        TopicReplication::Fixed(self.config.replication_factor.unwrap_or(-1))
    }

    /// Makes the topic if that is this pipeline's business and it is missing. One that was there is checked, and never changed: nobody
    /// but its owner knows what else relies on it. Returns its settings.
    async fn ensure(&self, wanted: &NewTopic<'_>) -> Result<HashMap<String, String>, SinkError> {
        let topic = wanted.name;
        let creation = match self.config.topic_management {
            TopicManagement::Managed => self.create(wanted).await?,
            TopicManagement::External => Creation::Left,
        };
        if creation == Creation::Made {
            // As asked, and perhaps not yet known to the broker that would answer.
            return Ok(HashMap::new());
        }
        let partitions = match (self.metadata_of(topic).await?, creation) {
            (Existence::Partitions(count), _) => i32::try_from(count).unwrap_or(i32::MAX),
            (Existence::Missing, Creation::Forbidden) => {
                let command = self.create_command(wanted);
                return Err(SinkError::KafkaForbidden {
                    what: format!("create topic {topic:?}"),
                    acl: format!("--operation Create --topic {topic}, or create it yourself: {command}"),
                });
            }
            (Existence::Missing, _) => {
                return Err(self.unusable(topic, &format!("does not exist; run {}", self.create_command(wanted))));
            }
        };
        let settings = self.settings_of(topic).await?;
        // What follows from these two is not lost changes at once, but some day.
        for (name, harm) in [
            (
                "cleanup.policy",
                "changes in it would be removed, or the pipeline's place forgotten",
            ),
            ("message.timestamp.type", "it does not keep commit times"),
        ] {
            let asked = wanted.config.iter().find(|(known, _)| *known == name);
            if let (Some((_, asked)), Some(has)) = (asked, settings.get(name))
                && asked != has
            {
                let remedy = self.alter(topic, name, asked);
                return Err(self.unusable(topic, &format!("has {name}={has}: {harm}; {remedy}")));
            }
        }
        let asked = wanted.num_partitions;
        // Where there are none the broker does not know them yet.
        if partitions > asked && self.begun {
            self.remarks.partitions_added(topic, partitions, asked);
        } else if partitions != 0 && partitions != asked {
            return Err(self.unusable(
                topic,
                &format!(
                    "has {partitions} partitions and not {asked}: which one a key is in depends on their number, and with it its order; topics.partitions is immutable, so delete this resource and create it with topics.partitions: {partitions}, or delete the topic if nobody needs it"
                ),
            ));
        }
        Ok(settings)
    }

    async fn create(&self, new: &NewTopic<'_>) -> Result<Creation, SinkError> {
        let options = AdminOptions::new()
            .operation_timeout(Some(DEADLINE))
            .request_timeout(Some(DEADLINE));
        let results = self
            .admin
            .create_topics([new], &options)
            .await
            .map_err(|error| unreachable(&self.servers, &error))?;
        match results.into_iter().next() {
            Some(Err((_, RDKafkaErrorCode::TopicAlreadyExists))) => Ok(Creation::Left),
            Some(Err((
                _,
                RDKafkaErrorCode::TopicAuthorizationFailed | RDKafkaErrorCode::ClusterAuthorizationFailed,
            ))) => Ok(Creation::Forbidden),
            Some(Err((topic, RDKafkaErrorCode::InvalidConfig))) => {
                let cause = self.refused_setting(new).await?;
                Err(self.unusable(&topic, &format!("cannot be made: {cause}")))
            }
            Some(Err((topic, RDKafkaErrorCode::InvalidReplicationFactor))) => {
                let replicas = self
                    .config
                    .replication_factor
                    .map_or_else(|| "the default number of".to_owned(), |factor| factor.to_string());
                Err(self.unusable(
                    &topic,
                    &format!("cannot be made with {replicas} replicas: Kafka has fewer brokers; set topics.replicationFactor to no more than it has"),
                ))
            }
            Some(Err((topic, code))) => Err(self.unusable(&topic, &format!("cannot be made: {code}"))),
            Some(Ok(_)) | None => Ok(Creation::Made),
        }
    }

    /// The settings that Kafka does not take, asked for one by one: its answer to all of them together does not say which.
    async fn refused_setting(&self, wanted: &NewTopic<'_>) -> Result<String, SinkError> {
        let options = AdminOptions::new().request_timeout(Some(DEADLINE)).validate_only(true);
        let mut refused = Vec::new();
        for (name, value) in &wanted.config {
            let alone = NewTopic::new(wanted.name, wanted.num_partitions, self.replication()).set(name, value);
            let answers = self
                .admin
                .create_topics([&alone], &options)
                .await
                .map_err(|error| unreachable(&self.servers, &error))?;
            if let Some(Err((_, RDKafkaErrorCode::InvalidConfig))) = answers.first() {
                refused.push(format!("{name}={value}"));
            }
        }
        Ok(match &refused[..] {
            [] => "Kafka does not take topics.config as a whole; see the broker's log".to_owned(),
            refused => format!(
                "Kafka has no such setting or value: {}; correct topics.config",
                refused.join(", ")
            ),
        })
    }

    /// What the cluster tells about a topic.
    async fn metadata_of(&self, topic: &str) -> Result<Existence, SinkError> {
        let (admin, name) = (Arc::clone(&self.admin), topic.to_owned());
        let asked = spawn_blocking(move || admin.inner().fetch_metadata(Some(&name), DEADLINE)).await;
        let metadata = asked
            .map_err(|error| unreachable(&self.servers, &error))?
            .map_err(|error| unreachable(&self.servers, &error))?;
        let Some(found) = metadata.topics().first() else {
            return Ok(Existence::Missing);
        };
        match found.error().map(RDKafkaErrorCode::from) {
            Some(RDKafkaErrorCode::UnknownTopicOrPartition | RDKafkaErrorCode::UnknownTopic) => Ok(Existence::Missing),
            Some(RDKafkaErrorCode::TopicAuthorizationFailed) => Err(SinkError::KafkaForbidden {
                what: format!("see topic {topic:?}"),
                acl: format!("--operation Describe --topic {topic}"),
            }),
            // Its leader is being elected, or the like: it is there.
            _ => Ok(Existence::Partitions(found.partitions().len())),
        }
    }

    /// The settings of a topic that exists.
    async fn settings_of(&self, topic: &str) -> Result<HashMap<String, String>, SinkError> {
        let options = AdminOptions::new().request_timeout(Some(DEADLINE));
        let described = self
            .admin
            .describe_configs([&ResourceSpecifier::Topic(topic)], &options)
            .await
            .map_err(|error| unreachable(&self.servers, &error))?;
        let settings: HashMap<String, String> = described
            .into_iter()
            .filter_map(Result::ok)
            .flat_map(|resource| resource.entries)
            .map(|entry| (entry.name, entry.value.unwrap_or_default()))
            .collect();
        // Every topic has settings. The client keeps the reason to itself, but the topic is there.
        if settings.is_empty() {
            return Err(SinkError::KafkaForbidden {
                what: format!("read the settings of topic {topic:?}"),
                acl: format!("--operation DescribeConfigs --topic {topic}"),
            });
        }
        Ok(settings)
    }

    fn create_command(&self, wanted: &NewTopic<'_>) -> String {
        let replication = self
            .config
            .replication_factor
            .map(|factor| format!(" --replication-factor {factor}"))
            .unwrap_or_default();
        let settings: String = wanted
            .config
            .iter()
            .map(|(name, value)| format!(" --config {name}={value}"))
            .collect();
        format!(
            "kafka-topics.sh --bootstrap-server {} --create --topic {} --partitions {}{replication}{settings}",
            self.servers, wanted.name, wanted.num_partitions
        )
    }

    fn alter(&self, topic: &str, name: &str, value: &str) -> String {
        format!(
            "run kafka-configs.sh --bootstrap-server {} --alter --entity-type topics --entity-name {topic} --add-config {name}={value}",
            self.servers
        )
    }

    fn unusable(&self, topic: &str, cause: &str) -> SinkError {
        SinkError::Topic {
            topic: topic.to_owned(),
            cause: cause.to_owned(),
        }
    }
}

/// Looks again, every minute, at topics that are not as they should be, without an end. A look that fails is taken again.
pub async fn watch(config: &KafkaSink, remarks: &Remarks) {
    loop {
        sleep(AGAIN).await;
        if remarks.differing().is_empty() {
            continue;
        }
        // A client of its own, which is not kept: next to nobody needs it.
        let look = async { Topics::new(config)?.with_remarks(remarks.clone()).look_again().await };
        if let Err(error) = look.await {
            tracing::warn!(%error, "the topics could not be looked at again");
        }
    }
}

/// Whether Kafka has a setting as it was asked for: it prints some in its own way.
fn is_same(has: &str, asked: &str) -> bool {
    let number = |text: &str| text.trim().parse::<i64>();
    has.eq_ignore_ascii_case(asked.trim())
        || matches!((number(has), number(asked)), (Ok(has), Ok(asked)) if has == asked)
}

/// What became of the wish to make a topic.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Creation {
    /// It is new.
    Made,
    /// It was there before, or it is not this pipeline's business.
    Left,
    /// This client may not make it. It may be there all the same.
    Forbidden,
}

/// Whether there is a topic.
enum Existence {
    /// With so many partitions.
    Partitions(usize),
    /// There is none.
    Missing,
}

pub(crate) fn unreachable(servers: &str, error: &dyn std::error::Error) -> SinkError {
    SinkError::KafkaUnreachable {
        servers: servers.to_owned(),
        cause: error.to_string(),
    }
}

//! Kafka.

use std::{
    collections::BTreeMap,
    env, fs,
    net::TcpStream,
    path::{Path, PathBuf},
    process::Command,
    thread,
    time::{Duration, Instant},
};

use rdkafka::{
    ClientConfig, Offset, TopicPartitionList,
    consumer::{BaseConsumer, Consumer as _},
    error::{KafkaError, KafkaResult},
    message::BorrowedMessage,
    metadata::{Metadata, MetadataPartition, MetadataTopic},
};
use rustix::process::Signal;
use tempfile::TempDir;
use tokio::sync::OnceCell;

use crate::{
    ports::free_port,
    process::{Process, folder},
    tls::Identity,
};

const LIMIT: Duration = Duration::from_secs(120);
/// Between two looks at what is waited for.
const POLL: Duration = Duration::from_millis(20);

/// For a quick start and a small footprint rather than for throughput.
const JVM: &[&str] = &[
    "-Xmx384m",
    "-Xshare:auto",
    "-XX:TieredStopAtLevel=1",
    "-XX:+UseSerialGC",
];

/// What Kafka's own script gives a broker.
const JVM_AS_SHIPPED: &[&str] = &[
    "-Xms1G",
    "-Xmx1G",
    "-XX:+UseG1GC",
    "-XX:MaxGCPauseMillis=20",
    "-XX:InitiatingHeapOccupancyPercent=35",
    "-XX:+ExplicitGCInvokesConcurrent",
];

/// A broker that is its own controller (KRaft). Topics are not created by using them.
pub struct Kafka {
    process: Process,
    port: u16,
    /// Of the second listener, where there is one.
    second_port: u16,
    /// Removed with the handle.
    _folder: TempDir,
}

impl Kafka {
    /// Starts a broker of the caller's own, which takes seconds; most tests are fine with [`Kafka::shared`].
    pub async fn start() -> Self {
        Self::start_with(JVM, |_, _| String::new()).await
    }

    /// Starts a broker with the memory and the compilers that it has by its own script, for measurements.
    pub async fn start_as_shipped() -> Self {
        Self::start_with(JVM_AS_SHIPPED, |_, _| String::new()).await
    }

    /// Starts a broker that has a second listener, at [`second_port`](Self::second_port), whose clients are told to come to this address on
    /// loopback: what listens there leads to it.
    pub async fn start_behind(advertised: u16) -> Self {
        Self::start_with(JVM, |_, ports| listener_behind(advertised, ports)).await
    }

    /// Starts a broker that has a second listener, [`secure_bootstrap`](Self::secure_bootstrap): TLS with this certificate, for
    /// `localhost`, and SASL by SCRAM-SHA-512 or PLAIN for the user `meander`, who has the password `one` and may do nothing. On the
    /// listener without authentication everything is allowed.
    pub async fn start_secure(certificate: &Identity) -> Self {
        Self::start_with(JVM, |folder, ports| {
            let mut keystore = fs::read_to_string(&certificate.key_file).unwrap();
            keystore.push_str(&fs::read_to_string(&certificate.certificate_file).unwrap());
            let file = folder.join("keystore.pem");
            fs::write(&file, keystore).unwrap();
            secure_listener(&file, ports)
        })
        .await
    }

    /// With these options of Java, and more settings, made of its folder and its ports.
    async fn start_with(jvm: &[&str], more: impl FnOnce(&Path, &Ports) -> String) -> Self {
        let mut kafka = Self::launch(Ports::free(), jvm, more);
        kafka.ready().await;
        kafka
    }

    /// Starts a broker at these ports, and does not wait for it.
    fn launch(ports: Ports, jvm: &[&str], more: impl FnOnce(&Path, &Ports) -> String) -> Self {
        let folder = folder("kafka");
        let properties = folder.path().join("server.properties");
        let mut settings = server_properties(folder.path(), &ports);
        settings.push_str(&more(folder.path(), &ports));
        fs::write(&properties, settings).unwrap();
        let home = home();
        format_storage(&home, &properties);

        let mut command = java(&home, jvm);
        command.arg("kafka.Kafka").arg(&properties);
        let process = Process::start("kafka", folder.path(), &command, Signal::KILL);
        Self {
            process,
            port: ports.first,
            second_port: ports.second,
            _folder: folder,
        }
    }

    /// The broker that the tests of this process share; they keep apart by [`unique_name`](crate::unique_name).
    pub async fn shared() -> &'static Self {
        static SHARED: OnceCell<Kafka> = OnceCell::const_new();
        SHARED.get_or_init(Self::start).await
    }

    /// `127.0.0.1:port`.
    #[must_use]
    pub fn bootstrap(&self) -> String {
        format!("127.0.0.1:{}", self.port)
    }

    /// `localhost:port` of the listener with TLS and SASL.
    #[must_use]
    pub fn secure_bootstrap(&self) -> String {
        format!("localhost:{}", self.second_port)
    }

    /// The port of the second listener on 127.0.0.1.
    #[must_use]
    pub fn second_port(&self) -> u16 {
        self.second_port
    }

    /// Runs one of Kafka's own tools by its class, on the listener where everything is allowed.
    ///
    /// # Panics
    /// When it fails.
    pub async fn tool(&self, class: &str, arguments: &str) {
        let mut command = java(&home(), JVM);
        command
            .arg(class)
            .args(["--bootstrap-server", &self.bootstrap()])
            .args(arguments.split_whitespace());
        let output = tokio::task::spawn_blocking(move || command.output())
            .await
            .unwrap()
            .unwrap();
        assert!(
            output.status.success(),
            "{class} {arguments}: {}{}",
            String::from_utf8_lossy(&output.stdout),
            String::from_utf8_lossy(&output.stderr),
        );
    }

    /// The beginning of every client's configuration.
    #[must_use]
    pub fn client_config(&self) -> ClientConfig {
        let mut config = ClientConfig::new();
        config.set("bootstrap.servers", self.bootstrap());
        config
    }

    /// Shows `take` everything that there is now in the topics that `wanted` holds of, as [`read_topics`] does.
    pub fn read(&self, wanted: impl Fn(&str) -> bool, take: impl FnMut(&BorrowedMessage<'_>)) {
        read_topics(&self.client_config(), wanted, take);
    }

    /// Waits until a `read_committed` consumer sees of this topic whatever is written by now: the markers of a transaction come into its
    /// partitions one by one, and after its commit was answered.
    ///
    /// # Panics
    /// When a transaction is neither committed nor aborted within `limit`.
    pub async fn settle(&self, topic: &str, limit: Duration) {
        let client = self.client_config();
        tokio::task::block_in_place(|| settled(&client, |name| name == topic, limit)).unwrap();
    }

    /// Kills the broker.
    ///
    /// A single broker can lose the end of a transaction this way: if it dies after it promised a commit and before the markers
    /// are in the partitions, it may, while it comes back and no partition has a leader, take the partitions for deleted and the
    /// transaction for complete (seen with Kafka 4.3). `read_committed` consumers then see nothing from there on, for ever. Have
    /// the last transaction read by one before.
    pub fn kill9(&mut self) {
        self.process.kill9();
    }

    /// Ends the broker in good order: what is under way is brought to its end.
    pub fn stop(&mut self) {
        self.process.signal(Signal::TERM);
        self.process.wait(LIMIT);
    }

    /// Starts a broker that was ended, with the same data at the same port.
    pub async fn start_again(&mut self) {
        self.process.start_again();
        self.ready().await;
    }

    /// The process, for whoever wants to hurt it in other ways.
    pub fn process(&mut self) -> &mut Process {
        &mut self.process
    }

    async fn ready(&mut self) {
        self.ready_when(|_| true).await;
    }

    /// Waits until it answers, its partitions have leaders, and `is` holds of what it knows.
    async fn ready_when(&mut self, is: impl Fn(&Metadata) -> bool) {
        let config = self.client_config();
        let address = self.bootstrap();
        self.process
            .ready(LIMIT, async || {
                TcpStream::connect(&address).map_err(|error| error.to_string())?;
                let consumer: BaseConsumer = config.create().map_err(|error| error.to_string())?;
                let metadata =
                    tokio::task::spawn_blocking(move || consumer.fetch_metadata(None, Duration::from_secs(5)))
                        .await
                        .unwrap()
                        .map_err(|error| error.to_string())?;
                // A broker that comes back after a crash has no leaders for a while, and clients that meet that wait long.
                let mut partitions = metadata.topics().iter().flat_map(MetadataTopic::partitions);
                if metadata.brokers().is_empty() {
                    Err("no broker is registered".to_owned())
                } else if partitions.any(|partition| partition.leader() < 0) {
                    Err("a partition has no leader".to_owned())
                } else if !is(&metadata) {
                    Err("not all brokers and replicas are there".to_owned())
                } else {
                    Ok(())
                }
            })
            .await;
    }
}

/// A cluster of three brokers, each of which is a controller too. Topics have three replicas unless they say otherwise, and a write is
/// acknowledged once two of them have it, so that any one broker may die.
pub struct Brokers(Vec<Kafka>);

impl Brokers {
    /// Starts them, which takes seconds.
    pub async fn start() -> Self {
        let ports: Vec<Ports> = (0..3).map(|_| Ports::free()).collect();
        let voters: Vec<String> = (1..)
            .zip(&ports)
            .map(|(id, ports)| format!("{id}@127.0.0.1:{}", ports.controller))
            .collect();
        let voters = voters.join(",");
        let launch = |(id, ports)| Kafka::launch(ports, JVM, |_, _| replicated(id, &voters));
        let mut brokers = Self((1..).zip(ports).map(launch).collect());
        brokers.all_in_sync().await;
        brokers
    }

    /// One of them, counted from 0.
    #[must_use]
    pub fn broker(&self, broker: usize) -> &Kafka {
        &self.0[broker]
    }

    /// How many there are.
    #[must_use]
    pub fn count(&self) -> usize {
        self.0.len()
    }

    /// The address of each.
    #[must_use]
    pub fn bootstrap_servers(&self) -> Vec<String> {
        self.0.iter().map(Kafka::bootstrap).collect()
    }

    /// The beginning of every client's configuration.
    #[must_use]
    pub fn client_config(&self) -> ClientConfig {
        let mut config = ClientConfig::new();
        config.set("bootstrap.servers", self.bootstrap_servers().join(","));
        config
    }

    /// Of how many partitions of the topics that `wanted` holds of a broker, counted from 0, is the leader.
    #[must_use]
    pub fn led_by(&self, broker: usize, wanted: impl Fn(&str) -> bool) -> usize {
        let consumer: BaseConsumer = self.client_config().create().unwrap();
        let metadata = consumer.fetch_metadata(None, LIMIT).unwrap();
        let topics = metadata.topics().iter().filter(|topic| wanted(topic.name()));
        let leaders = topics
            .flat_map(MetadataTopic::partitions)
            .map(MetadataPartition::leader);
        leaders
            .filter(|leader| usize::try_from(*leader) == Ok(broker + 1))
            .count()
    }

    /// Kills a broker.
    pub fn kill9(&mut self, broker: usize) {
        self.0[broker].kill9();
    }

    /// Starts a broker that was ended, with the same data at the same port, and waits until it has all that the others have.
    pub async fn start_again(&mut self, broker: usize) {
        self.0[broker].process.start_again();
        self.all_in_sync().await;
    }

    /// Waits until each broker is there and is in step with all its partitions, as each of them sees it.
    async fn all_in_sync(&mut self) {
        let count = self.count();
        for kafka in &mut self.0 {
            kafka
                .ready_when(|metadata| {
                    let in_sync = |partition: &MetadataPartition| partition.isr().len() == partition.replicas().len();
                    metadata.brokers().len() == count
                        && metadata
                            .topics()
                            .iter()
                            .flat_map(MetadataTopic::partitions)
                            .all(in_sync)
                })
                .await;
        }
    }
}

/// Waits until every transaction that has written into the topics is committed or aborted; the ends, where one is not within `limit`.
fn settled(client: &ClientConfig, wanted: impl Fn(&str) -> bool, limit: Duration) -> Result<(), String> {
    let told = |isolation: &str| {
        let consumer: BaseConsumer = client.clone().set("isolation.level", isolation).create()?;
        let metadata = consumer.fetch_metadata(None, LIMIT)?;
        let topics = metadata.topics().iter().filter(|topic| wanted(topic.name()));
        let end = |topic: &str, partition: &MetadataPartition| {
            let (_, end) = consumer.fetch_watermarks(topic, partition.id(), LIMIT)?;
            Ok(((topic.to_owned(), partition.id()), end))
        };
        topics
            .flat_map(|topic| topic.partitions().iter().map(|partition| end(topic.name(), partition)))
            .collect::<KafkaResult<BTreeMap<_, _>>>()
    };
    // A topic that has just been made has no leader for a moment, and one whose broker died.
    let ends = |isolation: &str| {
        let deadline = Instant::now() + LIMIT;
        loop {
            match told(isolation) {
                Ok(ends) => return ends,
                Err(error) => assert!(Instant::now() < deadline, "{error}"),
            }
            thread::sleep(POLL);
        }
    };
    let written = ends("read_uncommitted");
    let deadline = Instant::now() + limit;
    loop {
        let seen = ends("read_committed");
        let is_settled = |(partition, written): (_, &i64)| seen.get(partition).is_none_or(|seen| seen >= written);
        if written.iter().all(is_settled) {
            return Ok(());
        }
        if Instant::now() > deadline {
            return Err(format!("{seen:?} of {written:?}"));
        }
        thread::sleep(POLL);
    }
}

/// Shows `take` everything that a `read_committed` consumer sees of the topics that `wanted` holds of, up to their ends; the records of
/// a partition in their order. What is committed is there: the markers that say so come into the partitions a moment later, and are waited for.
///
/// # Panics
/// When Kafka does not answer.
pub fn read_topics(client: &ClientConfig, wanted: impl Fn(&str) -> bool, mut take: impl FnMut(&BorrowedMessage<'_>)) {
    /// A transaction that is open for longer is one of somebody who has died, and nothing of it is there.
    const MARKERS: Duration = Duration::from_secs(5);
    drop(settled(client, &wanted, MARKERS));
    let consumer: BaseConsumer = client
        .clone()
        .set("group.id", "test")
        .set("isolation.level", "read_committed")
        .set("enable.partition.eof", "true")
        .set("enable.auto.commit", "false")
        // The end is only told by an answer without records, for which the broker waits so long.
        .set("fetch.wait.max.ms", "10")
        .create()
        .unwrap();
    let metadata = consumer.fetch_metadata(None, LIMIT).unwrap();
    let mut assignment = TopicPartitionList::new();
    for topic in metadata.topics().iter().filter(|topic| wanted(topic.name())) {
        for partition in topic.partitions() {
            assignment
                .add_partition_offset(topic.name(), partition.id(), Offset::Beginning)
                .unwrap();
        }
    }
    consumer.assign(&assignment).unwrap();
    let mut open = assignment.count();
    while open > 0 {
        match consumer.poll(LIMIT).expect("Kafka answers in time") {
            Ok(message) => take(&message),
            Err(KafkaError::PartitionEOF(_)) => open -= 1,
            Err(error) => panic!("{error}"),
        }
    }
}

struct Ports {
    first: u16,
    controller: u16,
    second: u16,
}

impl Ports {
    fn free() -> Self {
        Self {
            first: free_port(),
            controller: free_port(),
            second: free_port(),
        }
    }
}

fn server_properties(folder: &Path, ports: &Ports) -> String {
    let Ports { first, controller, .. } = ports;
    let logs = folder.join("data");
    let logs = logs.display();
    format!(
        "process.roles=broker,controller
node.id=1
controller.quorum.voters=1@127.0.0.1:{controller}
controller.listener.names=CONTROLLER
listeners=PLAINTEXT://127.0.0.1:{first},CONTROLLER://127.0.0.1:{controller}
listener.security.protocol.map=PLAINTEXT:PLAINTEXT,CONTROLLER:PLAINTEXT
log.dirs={logs}
auto.create.topics.enable=false
offsets.topic.num.partitions=1
offsets.topic.replication.factor=1
transaction.state.log.num.partitions=1
transaction.state.log.replication.factor=1
transaction.state.log.min.isr=1
share.coordinator.state.topic.num.partitions=1
share.coordinator.state.topic.replication.factor=1
share.coordinator.state.topic.min.isr=1
group.initial.rebalance.delay.ms=0
broker.heartbeat.interval.ms=500
broker.session.timeout.ms=4000
log.cleaner.dedupe.buffer.size=4194304
num.network.threads=2
num.io.threads=2
background.threads=2
"
    )
}

/// Later settings replace earlier ones.
fn secure_listener(keystore: &Path, ports: &Ports) -> String {
    let Ports {
        first,
        controller,
        second,
    } = ports;
    let keystore = keystore.display();
    format!(
        "listeners=PLAINTEXT://127.0.0.1:{first},SECURE://127.0.0.1:{second},CONTROLLER://127.0.0.1:{controller}
advertised.listeners=PLAINTEXT://127.0.0.1:{first},SECURE://localhost:{second}
listener.security.protocol.map=PLAINTEXT:PLAINTEXT,SECURE:SASL_SSL,CONTROLLER:PLAINTEXT
inter.broker.listener.name=PLAINTEXT
listener.name.secure.ssl.keystore.type=PEM
listener.name.secure.ssl.keystore.location={keystore}
listener.name.secure.sasl.enabled.mechanisms=SCRAM-SHA-512,PLAIN
listener.name.secure.scram-sha-512.sasl.jaas.config=org.apache.kafka.common.security.scram.ScramLoginModule required;
listener.name.secure.plain.sasl.jaas.config=org.apache.kafka.common.security.plain.PlainLoginModule required user_meander=\"one\";
authorizer.class.name=org.apache.kafka.metadata.authorizer.StandardAuthorizer
super.users=User:ANONYMOUS
"
    )
}

fn replicated(id: usize, voters: &str) -> String {
    format!(
        "node.id={id}
controller.quorum.voters={voters}
default.replication.factor=3
min.insync.replicas=2
offsets.topic.replication.factor=3
transaction.state.log.replication.factor=3
transaction.state.log.min.isr=2
"
    )
}

fn listener_behind(advertised: u16, ports: &Ports) -> String {
    let Ports {
        first,
        controller,
        second,
    } = ports;
    format!(
        "listeners=PLAINTEXT://127.0.0.1:{first},BEHIND://127.0.0.1:{second},CONTROLLER://127.0.0.1:{controller}
advertised.listeners=PLAINTEXT://127.0.0.1:{first},BEHIND://127.0.0.1:{advertised}
listener.security.protocol.map=PLAINTEXT:PLAINTEXT,BEHIND:PLAINTEXT,CONTROLLER:PLAINTEXT
inter.broker.listener.name=PLAINTEXT
"
    )
}

/// Writes the identity of a new cluster; the broker does not start without.
fn format_storage(home: &Path, properties: &Path) {
    let output = java(home, JVM)
        .args([
            "kafka.tools.StorageTool",
            "format",
            "--cluster-id",
            "bWVhbmRlci10ZXN0LWtmaw",
            "--add-scram",
            "SCRAM-SHA-512=[name=meander,password=one]",
            "--config",
        ])
        .arg(properties)
        .output()
        .unwrap_or_else(|error| panic!("java: {error}: run tests/setup.sh"));
    assert!(
        output.status.success(),
        "kafka.tools.StorageTool: {}\n{}{}",
        output.status,
        String::from_utf8_lossy(&output.stdout),
        String::from_utf8_lossy(&output.stderr),
    );
}

fn java(home: &Path, jvm: &[&str]) -> Command {
    let mut command = Command::new("java");
    command.args(jvm).arg("-cp").arg(home.join("libs/*"));
    command.arg(format!(
        "-Dlog4j2.configurationFile={}",
        home.join("config/log4j2.properties").display()
    ));
    command
}

/// Kafka's jars: `$KAFKA_HOME`, or what `tests/setup.sh` put into the cache last.
fn home() -> PathBuf {
    if let Some(home) = env::var_os("KAFKA_HOME") {
        return home.into();
    }
    let cache = crate::cache();
    fs::read_dir(&cache)
        .into_iter()
        .flatten()
        .filter_map(Result::ok)
        .filter(|entry| entry.file_name().to_string_lossy().starts_with("kafka-"))
        .max_by_key(|entry| entry.metadata().and_then(|metadata| metadata.modified()).ok())
        .map(|entry| entry.path())
        .unwrap_or_else(|| panic!("no Kafka in {}: run tests/setup.sh kafka", cache.display()))
}

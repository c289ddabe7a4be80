//! Debezium, as a user would run it: its connector on Kafka Connect, and its server into Redis.

use std::{collections::BTreeMap, env, fmt::Write as _, fs, path::Path, process::Command};

use anyhow::Context as _;
use meander_config::SnapshotMode;
use meander_test_support::{
    Signal, TempDir, free_address,
    process::{Process, folder},
};

use crate::{
    contestant::{Variant, text_of},
    stage::Stage,
};

/// Of the connector and of the server; as tests/cluster/versions.sh has them.
pub(crate) const CONNECT_VERSION: &str = "3.7.0.Final";
pub(crate) const SERVER_VERSION: &str = "3.6.0.Final";

/// What Kafka's scripts give a worker of Kafka Connect.
const MEMORY: [&str; 2] = ["-Xms256M", "-Xmx2G"];
const COLLECTOR: [&str; 4] = [
    "-XX:+UseG1GC",
    "-XX:MaxGCPauseMillis=20",
    "-XX:InitiatingHeapOccupancyPercent=35",
    "-XX:+ExplicitGCInvokesConcurrent",
];

type Properties = BTreeMap<String, String>;

/// A process of Debezium that can be started.
pub(crate) struct Debezium {
    name: &'static str,
    command: Command,
    process: Option<Process>,
    /// Removed with the handle, once the process has ended.
    folder: TempDir,
}

/// The settings of the source: those that any use needs, and what the variant is.
pub(crate) fn source(
    stage: &Stage,
    name: &str,
    variant: Variant,
    snapshot: SnapshotMode,
) -> anyhow::Result<Properties> {
    let postgres = &stage.postgres;
    let mut source = properties(&[
        ("connector.class", "io.debezium.connector.postgresql.PostgresConnector"),
        ("database.hostname", "127.0.0.1"),
        ("database.port", &postgres.port().to_string()),
        ("database.user", &text_of(postgres.username_file())?),
        ("database.password", &text_of(postgres.password_file())?),
        ("database.dbname", postgres.database()),
        ("topic.prefix", name),
        ("slot.name", name),
        ("publication.name", name),
        ("publication.autocreate.mode", "disabled"),
        ("plugin.name", "pgoutput"),
        ("table.include.list", r"public\\..*"),
        ("decimal.handling.mode", "string"),
        // What our captures write into the WAL is no work for it.
        ("message.prefix.exclude.list", "meander[.].*"),
        (
            "snapshot.mode",
            if snapshot == SnapshotMode::Never {
                "no_data"
            } else {
                "initial"
            },
        ),
    ]);
    source.extend(properties(match variant {
        Variant::Default => &[],
        Variant::Tuned => &[
            ("max.batch.size", "8192"),
            ("max.queue.size", "32768"),
            ("poll.interval.ms", "10"),
        ],
        Variant::LowLatency => &[("poll.interval.ms", "1")],
    }));
    Ok(source)
}

impl Debezium {
    /// The connector in a worker of its own, into Kafka.
    pub(crate) fn connect(stage: &Stage, mut source: Properties, variant: Variant) -> anyhow::Result<Self> {
        let folder = folder("connect");
        let (worker_file, connector_file) = (folder.path().join("worker"), folder.path().join("connector"));
        let mut worker = properties(&[
            ("bootstrap.servers", &stage.kafka.bootstrap()),
            ("listeners", &format!("http://{}", free_address())),
            ("key.converter", "org.apache.kafka.connect.json.JsonConverter"),
            ("value.converter", "org.apache.kafka.connect.json.JsonConverter"),
            ("key.converter.schemas.enable", "false"),
            ("value.converter.schemas.enable", "false"),
            ("offset.storage.file.filename", &path(&folder.path().join("offsets"))),
            ("offset.flush.interval.ms", "10000"),
            ("plugin.discovery", "service_load"),
        ]);
        worker.extend(properties(match variant {
            Variant::Default => &[],
            Variant::Tuned => &[
                ("producer.batch.size", "262144"),
                ("producer.linger.ms", "5"),
                ("producer.compression.type", "lz4"),
                ("producer.buffer.memory", "67108864"),
            ],
            Variant::LowLatency => &[("producer.linger.ms", "0")],
        }));
        source.extend(properties(&[
            ("name", "bench"),
            ("tasks.max", "1"),
            ("topic.creation.default.partitions", "1"),
            ("topic.creation.default.replication.factor", "1"),
        ]));
        write(&worker_file, &worker)?;
        write(&connector_file, &source)?;
        let mut command = java()?;
        command
            .args(MEMORY)
            .args(COLLECTOR)
            .arg("-cp")
            .arg(format!("{}/*", home("DEBEZIUM_HOME")?))
            .arg("org.apache.kafka.connect.cli.ConnectStandalone")
            .args([worker_file, connector_file]);
        Ok(Self {
            name: "debezium-connect",
            command,
            process: None,
            folder,
        })
    }

    /// The server, into Redis.
    pub(crate) fn server(stage: &Stage, source: Properties, variant: Variant) -> anyhow::Result<Self> {
        let folder = folder("server");
        let admin = free_address();
        let mut server = properties(&[
            ("debezium.sink.type", "redis"),
            (
                "debezium.sink.redis.address",
                &format!("127.0.0.1:{}", stage.redis.port()),
            ),
            ("debezium.format.key.schemas.enable", "false"),
            ("debezium.format.value.schemas.enable", "false"),
            (
                "debezium.source.offset.storage.file.filename",
                &path(&folder.path().join("offsets")),
            ),
            ("quarkus.log.console.json", "false"),
            ("quarkus.http.host", "127.0.0.1"),
            ("quarkus.http.port", &admin.port().to_string()),
        ]);
        server.extend(
            source
                .into_iter()
                .map(|(name, value)| (format!("debezium.source.{name}"), value)),
        );
        if variant == Variant::Tuned {
            server.insert("debezium.sink.redis.batch.size".to_owned(), "2000".to_owned());
        }
        let config = folder.path().join("config");
        fs::create_dir(&config)?;
        write(&config.join("application.properties"), &server)?;
        let home = home("DEBEZIUM_SERVER_HOME")?;
        let runner = format!("{home}/debezium-server-dist-{SERVER_VERSION}-runner.jar");
        // It looks for its configuration where it is started.
        let mut command = Command::new("env");
        command.arg("-C").arg(folder.path()).arg(java()?.get_program());
        command
            .args(MEMORY)
            // It says at its end that it lacks this.
            .arg("--add-opens=java.base/java.lang=ALL-UNNAMED")
            .args(["-cp", &format!("{runner}:{home}/lib/*"), "io.debezium.server.Main"]);
        Ok(Self {
            name: "debezium-server",
            command,
            process: None,
            folder,
        })
    }

    /// Starts the process.
    pub(crate) fn start(&mut self) {
        self.process = Some(Process::start(
            self.name,
            self.folder.path(),
            &self.command,
            Signal::TERM,
        ));
    }

    /// The process; none before it was started.
    pub(crate) fn process(&mut self) -> Option<&mut Process> {
        self.process.as_mut()
    }
}

/// The Java that tests/setup.sh found to be new enough.
fn java() -> anyhow::Result<Command> {
    Ok(Command::new(home("PEERS_JAVA")?))
}

fn home(variable: &str) -> anyhow::Result<String> {
    env::var(variable)
        .with_context(|| format!("{variable} is not set: use bench/run.sh, which runs tests/setup.sh peers"))
}

fn path(path: &Path) -> String {
    path.display().to_string()
}

fn properties(entries: &[(&str, &str)]) -> Properties {
    entries
        .iter()
        .map(|(name, value)| ((*name).to_owned(), (*value).to_owned()))
        .collect()
}

fn write(file: &Path, properties: &Properties) -> anyhow::Result<()> {
    let mut text = String::new();
    for (name, value) in properties {
        writeln!(text, "{name}={value}")?;
    }
    Ok(fs::write(file, text)?)
}

//! Debezium on Kafka Connect.

use std::{env, fs, path::PathBuf, process::Command, time::Duration};

use rustix::process::Signal;
use tempfile::TempDir;

use crate::{
    Kafka, Postgres, cache, free_address,
    process::{Process, folder},
};

const LIMIT: Duration = Duration::from_secs(120);

/// Debezium's PostgreSQL connector as it comes, on a worker of Kafka Connect as it comes, but for these: it starts without a snapshot,
/// answers soon, tells of transactions, shows that it lives, and leaves the heartbeats of our captures alone.
pub struct Debezium {
    process: Process,
    /// Removed with the handle.
    _folder: TempDir,
}

impl Debezium {
    /// Captures the tables of a publication into topics of one partition each. Returns once it reads the log.
    pub async fn start(postgres: &Postgres, kafka: &Kafka, topic_prefix: &str, slot: &str, publication: &str) -> Self {
        let folder = folder("debezium");
        let worker = folder.path().join("worker.properties");
        let connector = folder.path().join("connector.properties");
        let offsets = folder.path().join("offsets");
        fs::write(
            &worker,
            format!(
                "bootstrap.servers={}
listeners=http://{}
key.converter=org.apache.kafka.connect.json.JsonConverter
value.converter=org.apache.kafka.connect.json.JsonConverter
offset.storage.file.filename={}
plugin.discovery=service_load
",
                kafka.bootstrap(),
                free_address(),
                offsets.display(),
            ),
        )
        .unwrap();
        let read = |file: PathBuf| fs::read_to_string(file).unwrap();
        fs::write(
            &connector,
            format!(
                "name=peer
connector.class=io.debezium.connector.postgresql.PostgresConnector
database.hostname=127.0.0.1
database.port={}
database.user={}
database.password={}
database.dbname={}
topic.prefix={topic_prefix}
plugin.name=pgoutput
slot.name={slot}
publication.name={publication}
publication.autocreate.mode=disabled
snapshot.mode=no_data
poll.interval.ms=50
heartbeat.interval.ms=500
provide.transaction.metadata=true
message.prefix.exclude.list=meander[.].*
topic.creation.default.partitions=1
topic.creation.default.replication.factor=1
",
                postgres.port(),
                read(postgres.username_file()),
                read(postgres.password_file()),
                postgres.database(),
            ),
        )
        .unwrap();
        let mut command = Command::new("java");
        command
            .args(["-Xmx384m", "-XX:TieredStopAtLevel=1", "-XX:+UseSerialGC", "-cp"])
            .arg(home().join("*"))
            .arg("org.apache.kafka.connect.cli.ConnectStandalone")
            .args([&worker, &connector]);
        let mut process = Process::start("debezium", folder.path(), &command, Signal::TERM);
        let client = postgres.client().await;
        process
            .ready(LIMIT, async || {
                let sql = "SELECT FROM pg_replication_slots WHERE slot_name = $1 AND active";
                match client.query(sql, &[&slot]).await {
                    Ok(rows) if !rows.is_empty() => Ok(()),
                    Ok(_) => Err("its slot is not read".to_owned()),
                    Err(error) => Err(error.to_string()),
                }
            })
            .await;
        Self {
            process,
            _folder: folder,
        }
    }

    /// Ends it in good order: what it has read is in Kafka then.
    pub fn stop(&mut self) {
        self.process.stop(LIMIT);
    }
}

/// The jars: `$DEBEZIUM_HOME`, or what `tests/setup.sh` put into the cache last.
fn home() -> PathBuf {
    if let Some(home) = env::var_os("DEBEZIUM_HOME") {
        return home.into();
    }
    fs::read_dir(cache())
        .into_iter()
        .flatten()
        .filter_map(Result::ok)
        .filter(|entry| entry.file_name().to_string_lossy().starts_with("debezium-"))
        .max_by_key(|entry| entry.metadata().and_then(|metadata| metadata.modified()).ok())
        .map(|entry| entry.path())
        .unwrap_or_else(|| panic!("no Debezium in {}: run tests/setup.sh debezium", cache().display()))
}

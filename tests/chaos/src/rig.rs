//! The services, two captures of which one stands by, the network between them, and what can be done to all of these.

use std::{
    fs,
    io::Write as _,
    net::{Ipv4Addr, SocketAddr},
    path::Path,
    process::{Command, Stdio},
    time::Duration,
};

use meander_config::CaptureConfig;
use meander_runtime::log::{checkpoint_key, checkpoint_topic};
use meander_test_support::{
    Kafka, Postgres, Redis, Runtime, Signal, capture_config, disk, eventually, free_address,
    relay::{Relay, Way},
};
use tempfile::TempDir;
use tokio_postgres::NoTls;

use crate::{
    LIMIT,
    fault::{Fault, Kind},
    load,
};

/// The newest version, which has slots that survive a failover.
const POSTGRES: u32 = 18;
/// Of each piece that is sent, in a slow network.
const DELAY: Duration = Duration::from_millis(100);
/// The broker is done with the ends of transactions by then, when nobody writes: see [`Kafka::kill9`].
const SETTLED: Duration = Duration::from_secs(2);

/// More than this many WAL files are not kept to be used again: they take 1 GiB (`max_wal_size`).
const MOST_WAL_FILES: usize = 64;

/// How one capture reaches PostgreSQL and Redis.
struct Ways {
    postgres: Relay,
    redis: Relay,
}

pub struct Rig {
    pub postgres: Postgres,
    pub redis: Redis,
    pub kafka: Kafka,
    /// How the load finds PostgreSQL. Nothing befalls it.
    database: Relay,
    /// How both captures reach Kafka: it tells its clients where to come.
    to_kafka: Relay,
    ways: Vec<Ways>,
    pub captures: Vec<Runtime>,
    /// Once one has begun.
    pub replay: Option<Runtime>,
    pub config: CaptureConfig,
    /// Removed with the handle.
    _folder: TempDir,
}

/// What one fault was done to, so that it can be taken away.
pub struct Done {
    fault: Fault,
    captures: Vec<usize>,
}

fn loopback(port: u16) -> SocketAddr {
    (Ipv4Addr::LOCALHOST, port).into()
}

impl Rig {
    /// Starts everything, and waits until one capture owns the slot and the other one stands by.
    pub async fn start() -> Self {
        disk::limit();
        let postgres = Postgres::start_version(POSTGRES, &[("hot_standby_feedback", "on")]).await;
        load::prepare(&postgres).await;
        // What it has acknowledged it keeps, unless that is taken away.
        let redis = Redis::start_with(&["--appendonly", "yes", "--appendfsync", "everysec"]).await;
        let address = free_address();
        let kafka = Kafka::start_behind(address.port()).await;
        let to_kafka = Relay::to(address, loopback(kafka.second_port())).await;
        let database = Relay::to(free_address(), loopback(postgres.port())).await;

        let folder = tempfile::tempdir().unwrap();
        let mut config = capture_config(&postgres, &kafka, Some(&redis));
        config.standby = true;
        config.source.slot_failover = Some(true);
        config.source.snapshot.mode = meander_config::SnapshotMode::Incremental;
        // They outlive the server of the beginning.
        for (file, name) in [
            (&mut config.source.username_file, "username"),
            (&mut config.source.password_file, "password"),
        ] {
            let copy = folder.path().join(name);
            fs::copy(&*file, &copy).unwrap();
            *file = copy;
        }
        let mut ways = Vec::new();
        let mut captures = Vec::new();
        for number in 0..2 {
            let way = Ways {
                postgres: Relay::to(free_address(), loopback(postgres.port())).await,
                redis: Relay::to(free_address(), loopback(redis.port())).await,
            };
            let mut own = config.clone();
            own.source.port = way.postgres.port();
            own.kafka.bootstrap_servers = vec![address.to_string()];
            own.admin_address = free_address();
            if let Some(sink) = &mut own.redis {
                sink.url_file = folder.path().join(format!("redis-{number}"));
                fs::write(&sink.url_file, format!("redis://127.0.0.1:{}/0", way.redis.port())).unwrap();
            }
            let mut capture = Runtime::capture(&own);
            capture.ready(LIMIT).await;
            captures.push(capture);
            ways.push(way);
        }
        Self {
            postgres,
            redis,
            kafka,
            database,
            to_kafka,
            ways,
            captures,
            replay: None,
            config,
            _folder: folder,
        }
    }

    /// Where the load finds the database.
    pub fn database(&self) -> (u16, String) {
        let port = self.database.port();
        let own = format!(":{}/", self.postgres.port());
        (port, self.postgres.url().replace(&own, &format!(":{port}/")))
    }

    /// Topic and key of the checkpoint.
    pub fn checkpoint(&self) -> (String, String) {
        let (namespace, name) = (&self.config.pipeline.namespace, &self.config.pipeline.name);
        (
            checkpoint_topic(namespace, name),
            checkpoint_key(namespace, name, &self.config.source.slot_name),
        )
    }

    /// Which capture says that it owns the slot; the first where none does now.
    async fn owner(&self) -> usize {
        for (number, capture) in self.captures.iter().enumerate() {
            if let Ok((_, metrics)) = capture.get("/metrics").await
                && metrics.lines().any(|line| line == "meander_capture_owns_slot 1")
            {
                return number;
            }
        }
        0
    }

    /// What a fault needs that is not there in ordinary times.
    pub async fn prepare(&mut self, kind: Kind) -> Option<Postgres> {
        if kind != Kind::PostgresFailedOver {
            return None;
        }
        let standby = self
            .postgres
            .standby(&[("sync_replication_slots", "on"), ("hot_standby_feedback", "on")])
            .await;
        slot_is_synced(&self.postgres, &standby).await;
        // What the standby does not have is not sent to the capture either.
        let client = self.postgres.client().await;
        for sql in [
            "ALTER SYSTEM SET synchronized_standby_slots = 'standby'",
            "SELECT pg_reload_conf()",
        ] {
            client.batch_execute(sql).await.unwrap();
        }
        Some(standby)
    }

    /// Does it.
    pub async fn begin(&mut self, fault: Fault, standby: Option<Postgres>) -> Done {
        let owner = self.owner().await;
        let captures = match fault.kind {
            Kind::BothKilled | Kind::KafkaKilled => vec![0, 1],
            Kind::StandbyKilled | Kind::StandbyStopped => vec![1 - owner],
            _ => vec![owner],
        };
        match fault.kind {
            Kind::OwnerKilled | Kind::StandbyKilled | Kind::BothKilled => {
                for capture in &captures {
                    self.captures[*capture].kill9();
                }
            }
            Kind::OwnerTerminated => {
                self.captures[owner].terminate(LIMIT);
            }
            Kind::OwnerStopped | Kind::StandbyStopped => self.signal(&captures, Signal::STOP),
            Kind::KafkaKilled => {
                self.signal(&captures, Signal::STOP);
                tokio::time::sleep(SETTLED).await;
                self.kafka.kill9();
                self.signal(&captures, Signal::CONT);
            }
            Kind::KafkaRestarted => self.kafka.stop(),
            Kind::KafkaStopped => self.kafka.process().signal(Signal::STOP),
            Kind::RedisKilled => self.redis.stop(),
            Kind::RedisSetBack => {
                self.redis.stop();
                cut_in_half(&self.redis_folder());
            }
            Kind::RedisEmptied => {
                self.redis.stop();
                fs::remove_dir_all(self.redis_folder()).unwrap();
            }
            Kind::RedisStopped => self.redis.process().signal(Signal::STOP),
            Kind::RedisFull => self.let_redis_have("1").await,
            Kind::RedisDiskFull => disk::fill(self.redis.folder()),
            Kind::PostgresCrashed => self.postgres.kill9(),
            Kind::PostgresRestarted => self.postgres.stop(),
            Kind::PostgresStopped => self.postgres.process().signal_all(Signal::STOP),
            Kind::PostgresFailedOver => {
                self.postgres.kill9();
                self.postgres = standby.unwrap();
                let client = self.postgres.client().await;
                for sql in [
                    "SELECT pg_promote()",
                    "ALTER SYSTEM RESET synchronized_standby_slots",
                    "SELECT pg_reload_conf()",
                ] {
                    client.batch_execute(sql).await.unwrap();
                }
                // A service leads to it, as in life.
                let now = loopback(self.postgres.port());
                self.database.lead_to(now);
                for way in &self.ways {
                    way.postgres.lead_to(now);
                }
            }
            Kind::PostgresDiskFull => {
                disk::fill(self.postgres.folder());
                self.use_up_wal().await;
            }
            Kind::SenderTerminated => {
                let client = self.postgres.client().await;
                let sql = "SELECT pg_terminate_backend(active_pid) FROM pg_replication_slots WHERE active";
                client.batch_execute(sql).await.unwrap();
            }
            Kind::ReplayKilled => self.replay().kill9(),
            Kind::ReplayStopped => self.replay().process().signal(Signal::STOP),
            Kind::OwnerCutOff => self.ways[owner].postgres.set(Way::Silent),
            Kind::KafkaCutOff => self.to_kafka.set(Way::Silent),
            Kind::RedisCutOff => self.ways.iter().for_each(|way| way.redis.set(Way::Silent)),
            Kind::NetworkSlow => self.relays().for_each(|relay| relay.set(Way::Slow(DELAY))),
            Kind::PacketsLost => loss("-A"),
            Kind::ConnectionsReset => self.relays().for_each(Relay::reset),
        }
        Done { fault, captures }
    }

    /// Takes its cause away.
    pub async fn end(&mut self, done: Done) {
        match done.fault.kind {
            Kind::OwnerKilled | Kind::OwnerTerminated | Kind::StandbyKilled | Kind::BothKilled => {
                for capture in done.captures {
                    self.captures[capture].start_again();
                }
            }
            Kind::OwnerStopped | Kind::StandbyStopped => self.signal(&done.captures, Signal::CONT),
            Kind::KafkaKilled | Kind::KafkaRestarted => self.kafka.start_again().await,
            Kind::KafkaStopped => self.kafka.process().signal(Signal::CONT),
            Kind::RedisKilled | Kind::RedisSetBack | Kind::RedisEmptied => self.start_redis().await,
            Kind::RedisStopped => self.redis.process().signal(Signal::CONT),
            Kind::RedisFull => self.let_redis_have("0").await,
            Kind::RedisDiskFull => {
                disk::free(self.redis.folder());
                if self.redis.process().exit_status().is_some() {
                    self.start_redis().await;
                }
            }
            Kind::PostgresDiskFull => {
                let wrote = self.write_wal().await;
                assert!(wrote.is_err(), "PostgreSQL writes although its disk is full");
                disk::free(self.postgres.folder());
                if self.postgres.process().exit_status().is_none() {
                    self.postgres.stop();
                }
                self.postgres.start_again().await;
            }
            Kind::PostgresCrashed | Kind::PostgresRestarted => self.postgres.start_again().await,
            Kind::PostgresStopped => self.postgres.process().signal_all(Signal::CONT),
            Kind::OwnerCutOff | Kind::KafkaCutOff | Kind::RedisCutOff | Kind::NetworkSlow => {
                self.relays().for_each(|relay| relay.set(Way::Open));
            }
            Kind::PacketsLost => loss("-D"),
            Kind::ReplayKilled => self.replay().start_again(),
            Kind::ReplayStopped => self.replay().process().signal(Signal::CONT),
            Kind::PostgresFailedOver | Kind::SenderTerminated | Kind::ConnectionsReset => {}
        }
    }

    /// Makes PostgreSQL feel that its disk is full: WAL files that lie there to be used again would serve it for a while.
    async fn use_up_wal(&self) {
        for _ in 0..MOST_WAL_FILES {
            if self.write_wal().await.is_err() {
                return;
            }
        }
        panic!("PostgreSQL has filled {MOST_WAL_FILES} WAL files although its disk is full");
    }

    /// Begins another WAL file, and commits into it what captures pass over.
    async fn write_wal(&self) -> Result<(), tokio_postgres::Error> {
        let (client, connection) = tokio_postgres::connect(&self.postgres.url(), NoTls).await?;
        tokio::spawn(connection);
        client
            .batch_execute("SELECT pg_switch_wal(), pg_logical_emit_message(true, 'chaos', '')")
            .await
    }

    fn replay(&mut self) -> &mut Runtime {
        self.replay.as_mut().expect("a replay has begun")
    }

    /// Where captures and replays find Kafka.
    pub fn relayed_kafka(&self) -> String {
        format!("127.0.0.1:{}", self.to_kafka.port())
    }

    fn relays(&self) -> impl Iterator<Item = &Relay> {
        let ways = self.ways.iter().flat_map(|way| [&way.postgres, &way.redis]);
        ways.chain([&self.to_kafka])
    }

    fn signal(&mut self, captures: &[usize], signal: Signal) {
        for capture in captures {
            self.captures[*capture].process().signal(signal);
        }
    }

    fn redis_folder(&self) -> std::path::PathBuf {
        self.redis.folder().join("appendonlydir")
    }

    /// Starts Redis, and before that does what its log asks for where it would not start.
    ///
    /// Where its disk was full, Redis 7.0 takes back the part of a command that it could write. If it had rewritten its file before, it then
    /// goes on behind the new end: it leaves a hole, at which the next start fails.
    async fn start_redis(&mut self) {
        let manifest = self.redis_folder().join("appendonly.aof.manifest");
        if manifest.exists() && check_aof(&manifest, &[]).contains("format error") {
            check_aof(&manifest, &["--fix"]);
            print!(" (its file was mended)");
        }
        self.redis.restart().await;
    }

    async fn let_redis_have(&self, memory: &str) {
        let () = redis::cmd("CONFIG")
            .arg(&["SET", "maxmemory", memory])
            .query_async(&mut self.redis.connection().await)
            .await
            .unwrap();
    }

    /// Waits until both captures are ready.
    pub async fn ready(&mut self) {
        for capture in &mut self.captures {
            capture.ready(LIMIT).await;
        }
    }

    /// What the captures have written, all of it.
    pub fn logs(&mut self) -> Vec<String> {
        let logs = self
            .captures
            .iter_mut()
            .map(|capture| capture.process().log().to_owned());
        logs.map(|log| String::from_utf8_lossy(&fs::read(log).unwrap()).into_owned())
            .collect()
    }
}

/// Adds or deletes the rule that loses packets of every connection, in the network namespace that this process has for itself.
fn loss(how: &str) {
    let rule = "INPUT -p tcp -m statistic --mode random --probability 0.05 -j DROP";
    let output = Command::new("iptables")
        .arg("-w")
        .arg(how)
        .args(rule.split(' '))
        .output()
        .unwrap();
    assert!(
        output.status.success(),
        "iptables: {}",
        String::from_utf8_lossy(&output.stderr)
    );
}

/// Takes the younger half of what Redis wrote, as a server that is restored to an earlier state.
fn cut_in_half(folder: &Path) {
    for file in fs::read_dir(folder).unwrap().map(Result::unwrap) {
        if file.path().to_string_lossy().ends_with(".incr.aof") {
            let file = fs::File::options().write(true).open(file.path()).unwrap();
            file.set_len(file.metadata().unwrap().len() / 2).unwrap();
        }
    }
}

/// What `redis-check-aof` says; asked to mend the file, it cuts it off where it is wrong.
fn check_aof(manifest: &Path, how: &[&str]) -> String {
    let mut check = Command::new("redis-check-aof")
        .args(how)
        .arg(manifest)
        .stdin(Stdio::piped())
        .stdout(Stdio::piped())
        .spawn()
        .unwrap();
    // It asks only where something is to be mended.
    let _ = check.stdin.take().unwrap().write_all(b"y\n");
    String::from_utf8_lossy(&check.wait_with_output().unwrap().stdout).into_owned()
}

async fn slot_is_synced(primary: &Postgres, standby: &Postgres) {
    let (primary, standby) = (primary.client().await, standby.client().await);
    eventually("the standby has the slot", LIMIT, async || {
        // It is once the standby has seen the primary's running transactions.
        let logged = primary.batch_execute("SELECT pg_log_standby_snapshot()").await;
        logged.map_err(|error| error.to_string())?;
        let synced = "SELECT FROM pg_replication_slots WHERE synced AND NOT temporary AND NOT conflicting";
        match standby
            .query(synced, &[])
            .await
            .map_err(|error| error.to_string())?
            .len()
        {
            1 => Ok(()),
            slots => Err(format!("{slots} slots")),
        }
    })
    .await;
}

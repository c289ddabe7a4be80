//! Whether what is promised held: the slot through the whole run, and at its end everything, by `tests/verifier`.

use std::{
    path::PathBuf,
    process::{Command, Output},
    sync::{
        Arc,
        atomic::{AtomicU64, Ordering},
    },
    thread,
    time::{Duration, Instant},
};

use meander_config::KafkaCluster;
use meander_runtime::{checkpoint::Tail, log::Checkpoint, position::Lsn};
use meander_test_support::{Kafka, eventually};
use rdkafka::{
    ClientConfig, Message as _,
    consumer::{BaseConsumer, Consumer as _},
    message::OwnedMessage,
    producer::{FutureProducer, FutureRecord},
};
use tokio::{sync::watch, task::JoinHandle};
use tokio_postgres::{Client, NoTls};

use crate::{LIMIT, rig::Rig};

/// How long the verifier may wait for what is missing.
const WAIT: &str = "240s";
const PACE: Duration = Duration::from_millis(500);
/// A store that does not answer by then is asked anew.
const PATIENCE: Duration = Duration::from_secs(10);

/// Looks again and again whether the slot is ahead of the checkpoint.
pub struct Sampler {
    samples: Arc<AtomicU64>,
    stop: watch::Sender<bool>,
    task: JoinHandle<()>,
}

impl Sampler {
    pub fn start(rig: &Rig) -> Self {
        let samples = Arc::new(AtomicU64::new(0));
        let (stop, mut stopped) = watch::channel(false);
        let look = Look {
            database: rig.database().1,
            kafka: KafkaCluster {
                bootstrap_servers: vec![rig.kafka.bootstrap()],
                tls: None,
                sasl: None,
            },
            checkpoint: rig.checkpoint(),
            slot: rig.config.source.slot_name.clone(),
        };
        let taken = samples.clone();
        let task = tokio::spawn(async move {
            while !*stopped.borrow_and_update() {
                tokio::time::sleep(PACE).await;
                // A store that is away tells nothing.
                if let Some((slot, checkpoint)) = look.once().await {
                    assert!(
                        slot <= checkpoint,
                        "the slot is at {slot}, ahead of the checkpoint, which is at {checkpoint}"
                    );
                    taken.fetch_add(1, Ordering::Relaxed);
                }
            }
        });
        Self { samples, stop, task }
    }

    /// Whether nothing wrong was found so far.
    pub fn goes_on(&self) -> bool {
        !self.task.is_finished()
    }

    /// Ends it; gives how often it was looked.
    pub async fn stop(self) -> u64 {
        self.stop.send_replace(true);
        self.task.await.unwrap();
        self.samples.load(Ordering::Relaxed)
    }
}

struct Look {
    database: String,
    kafka: KafkaCluster,
    checkpoint: (String, String),
    slot: String,
}

impl Look {
    /// Place of the slot, and of the checkpoint after it. The server is asked once more at the end: so it was that of the slot all the time.
    async fn once(&self) -> Option<(Lsn, Lsn)> {
        let (client, connection) = tokio::time::timeout(PATIENCE, tokio_postgres::connect(&self.database, NoTls))
            .await
            .ok()?
            .ok()?;
        tokio::spawn(connection);
        let slot = tokio::time::timeout(PATIENCE, self.confirmed(&client)).await.ok()??;
        let (kafka, (topic, key)) = (self.kafka.clone(), self.checkpoint.clone());
        let read = tokio::task::spawn_blocking(move || checkpoint_so_far(&kafka, &topic, &key));
        let checkpoint = read.await.unwrap()?;
        tokio::time::timeout(PATIENCE, self.confirmed(&client)).await.ok()??;
        Some((slot, checkpoint.acknowledged))
    }

    async fn confirmed(&self, client: &Client) -> Option<Lsn> {
        let sql = "SELECT confirmed_flush_lsn::text FROM pg_replication_slots WHERE slot_name = $1";
        let row = client.query_one(sql, &[&self.slot]).await.ok()?;
        row.get::<_, Option<String>>(0)?.parse().ok()
    }
}

/// The last checkpoint of those that are written by now, once it is decided which of them are committed.
///
/// Kafka promises a commit before it writes so into the partitions, and while it is started again readers see that much later. Whatever
/// is promised now lies before the end of the partition.
fn checkpoint_so_far(kafka: &KafkaCluster, topic: &str, key: &str) -> Option<Checkpoint> {
    let reader: BaseConsumer = ClientConfig::new()
        .set("bootstrap.servers", kafka.bootstrap_servers.join(","))
        .set("isolation.level", "read_uncommitted")
        .create()
        .unwrap();
    let (start, end) = reader.fetch_watermarks(topic, 0, PATIENCE).ok()?;
    let tail = Tail::new(kafka, PATIENCE).ok()?;
    let deadline = Instant::now() + LIMIT;
    while tail.stretch(topic, 0).ok()?.end < end {
        assert!(
            Instant::now() < deadline,
            "a transaction of the checkpoint's is neither committed nor aborted"
        );
        thread::sleep(PACE);
    }
    let last = tail.find_last_in(topic, 0, start..end, |record| record.key() == Some(key.as_bytes()));
    serde_json::from_slice(last.ok()??.payload()?).ok()
}

/// Runs `tests/verifier`, which was built before.
fn verifier(rig: &Rig, wait: &str) -> Output {
    let prefix = &rig.config.kafka.topic_prefix;
    compare(
        rig,
        prefix,
        &["-redis", &rig.redis.url(), "-stream-prefix", prefix, "-wait", wait],
    )
}

/// Compares the ledger with what topics of this prefix hold, and what else is asked for.
fn compare(rig: &Rig, topics: &str, more: &[&str]) -> Output {
    let dist = PathBuf::from(std::env::var_os("MEANDER_DIST").expect("MEANDER_DIST: run tests/chaos.sh"));
    Command::new(dist.join("meander-verify"))
        .args(["-postgres", &rig.postgres.url(), "-kafka", &rig.kafka.bootstrap()])
        .args(["-topic-prefix", topics])
        .args(more)
        .arg("-proto")
        .arg(dist.join("proto"))
        .output()
        .unwrap()
}

/// Compares everything; gives what the verifier says.
pub fn everything(rig: &Rig) -> String {
    let output = verifier(rig, WAIT);
    let said = String::from_utf8_lossy(&output.stdout).into_owned();
    assert!(
        output.status.success(),
        "{said}\n{}",
        String::from_utf8_lossy(&output.stderr)
    );
    said
}

/// Compares the topics that a replay has written.
pub fn copy(rig: &Rig, topics: &str) {
    let output = compare(rig, topics, &["-wait", "1s"]);
    assert!(
        output.status.success(),
        "the replay's copy: {}\n{}",
        String::from_utf8_lossy(&output.stdout),
        String::from_utf8_lossy(&output.stderr)
    );
}

/// A verifier that always agrees is no good: a record that comes twice and an entry that is gone have to be found.
pub async fn the_verifier(rig: &Rig) {
    let name = format!("{}.public.orders", rig.config.kafka.topic_prefix);
    double_last_record(&rig.kafka, &name).await;
    let mut connection = rig.redis.connection().await;
    // The first can be the beginning of a snapshot, which is no change.
    let mut command = redis::cmd("XREVRANGE");
    command.arg(&name).arg(&["+", "-", "COUNT", "1"]);
    let last: redis::streams::StreamRangeReply = command.query_async(&mut connection).await.unwrap();
    let mut command = redis::cmd("XDEL");
    command.arg(&name).arg(&last.ids[0].id);
    let () = command.query_async(&mut connection).await.unwrap();
    let output = verifier(rig, "1s");
    let said = String::from_utf8_lossy(&output.stdout);
    assert_eq!(output.status.code(), Some(1), "{said}");
    for (store, difference) in [("kafka: ", "duplicate: "), ("redis: ", "missing: ")] {
        let of_store = said.split(store).nth(1).unwrap_or_default();
        assert!(of_store.contains(difference), "{difference} is not found: {said}");
    }
}

/// Publishes a record of a topic once more, as it is.
async fn double_last_record(kafka: &Kafka, topic: &str) {
    let config = kafka.client_config();
    let mut last: Option<OwnedMessage> = None;
    tokio::task::block_in_place(|| kafka.read(|name| name == topic, |message| last = Some(message.detach())));
    let last = last.unwrap();
    let producer: FutureProducer = config.create().unwrap();
    let record = FutureRecord::to(topic)
        .partition(last.partition())
        .key(last.key().unwrap_or_default())
        .payload(last.payload().unwrap())
        .timestamp(last.timestamp().to_millis().unwrap())
        .headers(last.headers().unwrap().clone());
    producer.send(record, LIMIT).await.unwrap();
}

/// Waits until both captures are ready, one of them owns the slot, and Redis goes along.
pub async fn all_is_well(rig: &mut Rig) {
    rig.ready().await;
    eventually("one owner, and Redis attached", LIMIT, async || {
        let mut told = Vec::new();
        for capture in &rig.captures {
            let (_, metrics) = capture.get("/metrics").await.map_err(|error| error.to_string())?;
            let has = |line: &str| metrics.lines().any(|other| other == line);
            told.push((
                has("meander_capture_owns_slot 1"),
                has("meander_capture_redis_attached 1"),
            ));
        }
        match told[..] {
            [(true, true), (false, _)] | [(false, _), (true, true)] => Ok(()),
            _ => Err(format!("{told:?}")),
        }
    })
    .await;
}

/// No log and no metric of a capture has a password in it, and no log says that something panicked.
pub async fn nothing_is_told(rig: &mut Rig) {
    let password = std::fs::read_to_string(rig.config.source.password_file.clone()).unwrap();
    let mut told = rig.logs();
    for capture in &rig.captures {
        told.push(capture.get("/metrics").await.unwrap().1);
    }
    for text in told {
        assert!(!text.is_empty());
        for never in [password.as_str(), "panicked"] {
            let line = text.lines().find(|line| line.contains(never));
            assert!(line.is_none(), "{line:?}");
        }
    }
}

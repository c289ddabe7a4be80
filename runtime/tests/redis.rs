//! Whatever befalls Redis, capture into Kafka goes on, and Redis is mended from there.
//!
//! Judged by `tests/verifier`, as a crash is: Kafka and Redis hold what the ledger says, entry for entry and in order.
#![allow(clippy::unwrap_used, clippy::expect_used, clippy::panic)]

mod common;
#[path = "common/verifier.rs"]
mod verifier;

use std::{
    collections::BTreeMap,
    sync::{
        Arc, LazyLock,
        atomic::{AtomicUsize, Ordering::Relaxed},
    },
};

use common::LIMIT;
use meander_config::{Acknowledgement, CaptureConfig, Durability, RedisSink};
use meander_runtime::{
    checkpoint::Tail,
    log::{Checkpoint, PART_HEADER, POSITION_HEADER, checkpoint_key},
    position::Position,
    sink::{
        kafka::KafkaSink,
        redis::{EntryId, claim_key, mark_key},
        topics::Remarks,
    },
};
use meander_test_support::{Kafka, Postgres, Redis, Runtime, eventually};
use meander_workload::load::{self, Load};
use rdkafka::{
    Message as _, Offset, TopicPartitionList,
    admin::{AdminClient, AdminOptions},
    client::DefaultClientContext,
    message::Headers as _,
};
use redis::aio::MultiplexedConnection;
use tokio::{
    io::{AsyncReadExt as _, AsyncWriteExt as _},
    net::{TcpListener, TcpStream},
    task::JoinHandle,
};

const TABLE: &str = "public.trades";
const ATTACHED: &str = "meander_capture_redis_attached";
const REFILLED: &str = "meander_capture_redis_refilled_entries_total";

/// A pipeline with a watched table.
struct Rig {
    postgres: Postgres,
    redis: Redis,
    kafka: &'static Kafka,
    config: CaptureConfig,
    runtime: Runtime,
}

impl Rig {
    async fn start() -> Self {
        Self::start_with(Redis::start().await, |_| {}).await
    }

    async fn start_with(redis: Redis, set: impl FnOnce(&mut RedisSink)) -> Self {
        let (postgres, kafka) = (Postgres::start(&[]).await, Kafka::shared().await);
        let database: tokio_postgres::Config = postgres.url().parse().unwrap();
        load::prepare(&load::connect(&database).await.unwrap(), TABLE)
            .await
            .unwrap();
        let mut config = common::config(&postgres, kafka, Some(&redis));
        set(config.redis.as_mut().unwrap());
        let mut runtime = Runtime::capture(&config);
        runtime.ready(LIMIT).await;
        Self {
            postgres,
            redis,
            kafka,
            config,
            runtime,
        }
    }

    /// Makes so many changes, 2000 a second.
    fn load(&self, changes: u64) -> JoinHandle<()> {
        self.load_at(2000.0, changes)
    }

    /// Makes so many changes, at this rate a second.
    fn load_at(&self, rate: f64, changes: u64) -> JoinHandle<()> {
        let database: tokio_postgres::Config = self.postgres.url().parse().unwrap();
        let load = Load {
            table: TABLE.to_owned(),
            changes,
            rate,
            seed: 11,
            clients: 2,
            key_changes: true,
        };
        tokio::spawn(async move {
            load::run(&database, &load).await.unwrap();
        })
    }

    /// Waits until so many changes are in Kafka.
    async fn in_kafka(&self, count: u64) {
        eventually("the changes are in Kafka", LIMIT, async || {
            let published = common::checkpoint(&self.config).map_or(0, |checkpoint| checkpoint.events_total);
            if published >= count {
                Ok(())
            } else {
                Err(format!("{published} of {count}"))
            }
        })
        .await;
    }

    /// Waits until a metric has a value of this kind.
    async fn metric(&self, name: &str, wanted: impl Fn(f64) -> bool) {
        eventually(name, LIMIT, async || {
            let (_, metrics) = self.runtime.get("/metrics").await.map_err(|error| error.to_string())?;
            let value = metrics
                .lines()
                .find_map(|line| line.strip_prefix(name)?.trim().parse().ok());
            if value.is_some_and(&wanted) {
                Ok(())
            } else {
                Err(metrics)
            }
        })
        .await;
    }

    async fn attached(&self) {
        self.metric(ATTACHED, |value| value == 1.0).await;
    }

    /// Waits until Redis was detached for this reason.
    async fn detached(&self, reason: &str) {
        let name = format!("meander_capture_redis_detachments_total{{reason=\"{reason}\"}}");
        self.metric(&name, |value| value >= 1.0).await;
    }

    async fn redis<T: redis::FromRedisValue>(&self, command: &[&str]) -> T {
        ask(&mut self.redis.connection().await, command).await
    }

    fn mark(&self) -> String {
        let CaptureConfig { pipeline, source, .. } = &self.config;
        mark_key(
            &self.config.kafka.topic_prefix,
            &checkpoint_key(&pipeline.namespace, &pipeline.name, &source.slot_name),
        )
    }

    /// Waits until the mark counts so many records.
    async fn counts(&self, wanted: impl Fn(u64) -> bool) {
        eventually("the mark counts right", LIMIT, async || {
            let records = self.redis::<u64>(&["HGET", &self.mark(), "records"]).await;
            if wanted(records) { Ok(()) } else { Err(records) }
        })
        .await;
    }

    fn stream(&self) -> String {
        format!("{}.{TABLE}", self.config.kafka.topic_prefix)
    }

    /// Whether PostgreSQL may forget everything that is written now.
    async fn acknowledged(&self) -> bool {
        let client = self.postgres.client().await;
        let behind = "SELECT confirmed_flush_lsn < pg_current_wal_insert_lsn() - 4096 FROM pg_replication_slots";
        !client.query_one(behind, &[]).await.unwrap().get::<_, bool>(0)
    }

    /// Waits for Redis, and compares everything.
    async fn agrees(&self) {
        self.attached().await;
        self.agrees_with(&self.redis).await;
    }

    async fn agrees_with(&self, redis: &Redis) {
        let verified = verifier::verify(&self.postgres, self.kafka, redis, &self.config, "60s");
        assert!(
            verified.status.success(),
            "{}{}",
            String::from_utf8_lossy(&verified.stdout),
            String::from_utf8_lossy(&verified.stderr)
        );
    }
}

fn log_of(runtime: &mut Runtime) -> String {
    std::fs::read_to_string(runtime.process().log()).unwrap()
}

async fn ask<T: redis::FromRedisValue>(connection: &mut MultiplexedConnection, command: &[&str]) -> T {
    redis::cmd(command[0])
        .arg(&command[1..])
        .query_async(connection)
        .await
        .unwrap()
}

#[tokio::test(flavor = "multi_thread")]
async fn a_redis_that_was_away_is_refilled_and_capture_into_kafka_went_on() {
    let mut rig = Rig::start().await;
    let load = rig.load(8000);
    rig.in_kafka(2000).await;
    // It comes back with everything it had.
    let () = rig.redis(&["SAVE"]).await;
    rig.redis.stop();
    rig.detached("RedisUnreachable").await;
    load.await.unwrap();
    rig.in_kafka(8000).await;
    eventually("PostgreSQL forgets its WAL", LIMIT, async || {
        rig.acknowledged().await.then_some(()).ok_or("it keeps it")
    })
    .await;
    rig.redis.restart().await;
    rig.agrees().await;
    rig.metric(REFILLED, |value| value >= 4000.0).await;

    // A stop of the pod does not wait for a Redis that is away, nor does a start.
    rig.redis.stop();
    rig.detached("RedisUnreachable").await;
    assert!(
        rig.runtime.terminate(LIMIT).success(),
        "{}",
        rig.runtime.process().log_tail()
    );
    rig.runtime.start_again();
    rig.runtime.ready(LIMIT).await;
    rig.load(500).await.unwrap();
    rig.in_kafka(8500).await;
    rig.redis.restart().await;
    rig.agrees().await;
}

#[tokio::test(flavor = "multi_thread")]
async fn a_redis_that_was_flushed_gets_everything_again() {
    let mut rig = Rig::start().await;
    let log = rig.runtime.process().log().to_owned();
    let load = rig.load(6000);
    rig.in_kafka(2000).await;
    let () = rig.redis(&["FLUSHALL"]).await;
    rig.detached("EntriesLost").await;
    load.await.unwrap();
    rig.agrees().await;

    // Also when nothing is written that would meet it.
    let stream = rig.stream();
    let entries = async || rig.redis::<i64>(&["XLEN", &stream]).await;
    let before = entries().await;
    let () = rig.redis(&["FLUSHALL"]).await;
    eventually("Redis has everything again", LIMIT, async || {
        let now = entries().await;
        if now == before {
            Ok(())
        } else {
            Err(format!("{now} of {before}"))
        }
    })
    .await;
    rig.agrees().await;

    // Nor does it stay with an owner that is gone: one that was stopped before it fenced anybody, and ended soon after it went on.
    let generation = async || rig.redis::<u64>(&["HGET", &rig.mark(), "generation"]).await;
    let taken = generation().await + 1;
    let () = rig
        .redis(&["HSET", &rig.mark(), "generation", &taken.to_string()])
        .await;
    eventually("it sees that", LIMIT, async || {
        let log = std::fs::read_to_string(&log).unwrap();
        log.contains("a later owner writes to Redis").then_some(()).ok_or(log)
    })
    .await;
    let config = rig.config.clone();
    let fence = move || loop {
        let kafka = KafkaSink::open(&config, Remarks::default()).unwrap();
        // What the one before it committed last; it can commit no more.
        let known = common::checkpoint(&config).unwrap();
        let stopped = Checkpoint {
            owner_generation: known.owner_generation.max(taken),
            ..known
        };
        // Where its successor was quicker, that one is fenced in its turn.
        if kafka.commit_checkpoint(&stopped).is_ok() {
            break;
        }
    };
    tokio::task::spawn_blocking(fence).await.unwrap();
    eventually("the next session has Redis", LIMIT, async || match generation().await {
        now if now > taken => Ok(()),
        now => Err(now),
    })
    .await;
    rig.agrees().await;
    // It was replaced, which is no fault of Redis.
    let said = std::fs::read_to_string(&log).unwrap();
    assert!(!said.contains("RedisTaken"), "{said}");

    // One that Kafka knows nothing of has replaced nobody.
    let () = rig.redis(&["HSET", &rig.mark(), "generation", "1000"]).await;
    rig.detached("RedisTaken").await;
}

#[tokio::test(flavor = "multi_thread")]
async fn a_redis_that_came_back_with_less_gets_the_rest() {
    let mut rig = Rig::start().await;
    let load = rig.load(8000);
    rig.in_kafka(2000).await;
    rig.attached().await;
    let () = rig.redis(&["SAVE"]).await;
    rig.in_kafka(4000).await;
    rig.redis.restart().await;
    rig.detached("EntriesLost").await;
    load.await.unwrap();
    rig.agrees().await;
}

#[tokio::test(flavor = "multi_thread")]
async fn a_redis_that_is_full_is_refilled_once_it_has_memory_and_a_kill_in_mid_refill_does_no_harm() {
    let mut rig = Rig::start().await;
    rig.load(6000).await.unwrap();
    rig.agrees().await;
    let full: i64 = rig.redis(&["XLEN", &rig.stream()]).await;
    let memory: String = rig.redis(&["INFO", "memory"]).await;
    let used = |name: &str| -> u64 {
        let value = memory
            .lines()
            .find_map(|line| line.strip_prefix(name)?.strip_prefix(':'));
        value.unwrap().trim().parse().unwrap()
    };
    // Half of what it takes: the refill that follows gets stuck in the middle.
    let (start, now) = (used("used_memory_startup"), used("used_memory"));
    let half = (start + (now - start) / 2).to_string();
    let () = rig
        .redis(&["CONFIG", "SET", "maxmemory", &half, "maxmemory-policy", "noeviction"])
        .await;
    let () = rig.redis(&["FLUSHALL"]).await;
    rig.load(1000).await.unwrap();
    rig.in_kafka(7000).await;
    rig.detached("RedisOutOfMemory").await;
    rig.runtime.kill9();
    let length: i64 = rig.redis(&["XLEN", &rig.stream()]).await;
    assert!(0 < length && length < full, "{length} of {full}: not in mid-refill");
    rig.runtime.start_again();
    rig.runtime.ready(LIMIT).await;
    rig.detached("RedisOutOfMemory").await;
    let () = rig.redis(&["CONFIG", "SET", "maxmemory", "0"]).await;
    rig.agrees().await;
}

#[tokio::test(flavor = "multi_thread")]
async fn a_redis_that_begins_to_evict_under_load_is_detached_until_it_is_set_right() {
    let rig = Rig::start().await;
    rig.attached().await;
    let load = rig.load(1_000_000);
    let () = rig.redis(&["CONFIG", "SET", "maxmemory-policy", "allkeys-lru"]).await;
    rig.detached("RedisEvicts").await;
    assert!(!load.is_finished(), "this says nothing of a Redis under load");
    let () = rig.redis(&["CONFIG", "SET", "maxmemory-policy", "noeviction"]).await;
    load.abort();
    rig.agrees().await;
}

#[tokio::test(flavor = "multi_thread")]
async fn a_redis_that_hangs_is_detached_once_the_buffer_is_full() {
    let rig = Rig::start().await;
    rig.load(2000).await.unwrap();
    rig.agrees().await;
    let mut connection = rig.redis.connection().await;
    let () = ask(&mut connection, &["CLIENT", "PAUSE", "600000", "WRITE"]).await;
    // Twice what the buffer takes.
    let client = rig.postgres.client().await;
    for _ in 0..2 {
        client
            .batch_execute("UPDATE trades SET note = repeat(md5(random()::text), 1000)")
            .await
            .unwrap();
    }
    rig.detached("RedisSlow").await;
    let rows: i64 = client
        .query_one("SELECT count(*) FROM trades", &[])
        .await
        .unwrap()
        .get(0);
    rig.in_kafka(2000 + 2 * rows.unsigned_abs()).await;
    let () = ask(&mut connection, &["CLIENT", "UNPAUSE"]).await;
    rig.agrees().await;
    // And one that hangs while there is nothing to write is noticed too.
    rig.attached().await;
    let () = ask(&mut connection, &["CLIENT", "PAUSE", "600000", "WRITE"]).await;
    rig.detached("RedisUnreachable").await;
    let () = ask(&mut connection, &["CLIENT", "UNPAUSE"]).await;
    rig.attached().await;
}

/// What a Redis says that is not itself.
struct Lie {
    says: String,
    /// It does nothing of what it is asked, beside.
    does_nothing: bool,
}

static LIES: LazyLock<[Lie; 8]> = LazyLock::new(|| {
    let lie = |says: &str| Lie {
        says: says.to_owned(),
        does_nothing: false,
    };
    [
        // No answer to any script.
        lie("+OK\r\n"),
        lie(":-9223372036854775808\r\n"),
        // It was written, and nothing was.
        Lie {
            does_nothing: true,
            ..lie("*2\r\n$2\r\nok\r\n$0\r\n\r\n")
        },
        lie("*3\r\n$4\r\nmark\r\n$1\r\n0\r\n$7\r\nnowhere\r\n"),
        lie("-MOVED 1 127.0.0.1:1\r\n"),
        // No answer at all; one that is deeper than any; one that never ends.
        lie("HTTP/1.1 400 Bad Request\r\n\r\n"),
        lie(&"*1\r\n".repeat(10_000)),
        lie("*1000000000\r\n$1000000000\r\nno"),
    ]
});
/// How often it tells the truth in a connection before it lies.
const TRUTHS: usize = 12;

/// Listens before a Redis, and in each connection tells another lie, as long as there are some. Returns its port.
async fn liar(redis: u16, told: Arc<AtomicUsize>) -> u16 {
    let listener = TcpListener::bind(("127.0.0.1", 0)).await.unwrap();
    let port = listener.local_addr().unwrap().port();
    tokio::spawn(async move {
        while let Ok((client, _)) = listener.accept().await {
            let server = TcpStream::connect(("127.0.0.1", redis)).await.unwrap();
            tokio::spawn(carry(client, server, Arc::clone(&told)));
        }
    });
    port
}

async fn carry(mut client: TcpStream, mut server: TcpStream, told: Arc<AtomicUsize>) -> std::io::Result<()> {
    let (mut asked, mut answered) = (vec![0; 64 << 10], vec![0; 64 << 10]);
    let mut truths = 0;
    let mut lie: Option<&Lie> = None;
    loop {
        tokio::select! {
            length = client.read(&mut asked) => match (length?, lie) {
                (0, _) => return Ok(()),
                (_, Some(Lie { says, does_nothing: true })) => client.write_all(says.as_bytes()).await?,
                (length, _) => server.write_all(&asked[..length]).await?,
            },
            length = server.read(&mut answered) => {
                let length = length?;
                truths += 1;
                if truths == TRUTHS {
                    lie = LIES.get(told.fetch_add(1, Relaxed));
                }
                match (length, lie) {
                    (0, _) => return Ok(()),
                    (_, Some(lie)) => client.write_all(lie.says.as_bytes()).await?,
                    (length, None) => client.write_all(&answered[..length]).await?,
                }
            }
        }
    }
}

#[tokio::test(flavor = "multi_thread")]
async fn a_redis_that_lies_keeps_nothing_from_kafka_and_is_made_right_once_it_tells_the_truth() {
    let redis = Redis::start().await;
    let told = Arc::new(AtomicUsize::new(0));
    let (folder, port) = (
        tempfile::tempdir().unwrap(),
        liar(redis.port(), Arc::clone(&told)).await,
    );
    let url_file = folder.path().join("url");
    std::fs::write(&url_file, format!("redis://127.0.0.1:{port}/0")).unwrap();
    let mut rig = Rig::start_with(redis, |sink| sink.url_file = url_file).await;
    let mut made = 0;
    eventually("each lie is told", LIMIT, async || {
        rig.load_at(200.0, 100).await.unwrap();
        made += 100;
        match told.load(Relaxed) {
            number if number >= LIES.len() => Ok(()),
            number => Err(number),
        }
    })
    .await;
    rig.detached("RedisUnreachable").await;
    rig.in_kafka(made).await;
    rig.agrees().await;
    let log = log_of(&mut rig.runtime);
    assert!(!log.contains("panicked"), "{log}");
}

#[tokio::test(flavor = "multi_thread")]
async fn a_foreign_entry_holds_redis_until_it_is_removed_and_kafka_not_at_all() {
    let rig = Rig::start().await;
    let load = rig.load(6000);
    rig.in_kafka(1000).await;
    rig.attached().await;
    let mut connection = rig.redis.connection().await;
    let foreign: String = ask(&mut connection, &["XADD", &rig.stream(), "*", "a", "b"]).await;
    rig.detached("ForeignWriter").await;
    rig.in_kafka(4000).await;
    // What the message says mends it.
    let ours: String = ask(
        &mut connection,
        &["HGET", &rig.mark(), &format!("last:{}", rig.stream())],
    )
    .await;
    let _: i64 = ask(&mut connection, &["XDEL", &rig.stream(), &foreign]).await;
    let () = ask(&mut connection, &["XSETID", &rig.stream(), &ours]).await;
    load.await.unwrap();
    rig.agrees().await;
}

#[tokio::test(flavor = "multi_thread")]
async fn a_stream_prefix_is_one_pipelines_until_that_is_deleted() {
    let mut rig = Rig::start().await;
    rig.load(300).await.unwrap();
    rig.agrees().await;
    // The same table of the same database, through a slot of its own, into streams of the same names.
    let mut second = common::config(&rig.postgres, rig.kafka, Some(&rig.redis));
    let prefix = rig.config.redis.as_ref().unwrap().stream_prefix.clone();
    second.redis.as_mut().unwrap().stream_prefix.clone_from(&prefix);
    let mut other = Runtime::capture(&second);
    common::wait_for_metric(
        &other,
        "meander_capture_failures_total{reason=\"StreamPrefixTaken\"}",
        |times| times >= 1,
    )
    .await;
    // It says whose they are, and gives no command that would hurt them.
    let log = log_of(&mut other);
    let CaptureConfig { pipeline, source, .. } = &rig.config;
    let owner = checkpoint_key(&pipeline.namespace, &pipeline.name, &source.slot_name);
    assert!(log.contains(&format!("are those of pipeline {owner};")), "{log}");
    assert!(!log.contains(&rig.stream()), "{log}");
    // A slot of a pipeline that is refused would keep WAL for nobody.
    let client = rig.postgres.client().await;
    let slots = client.query("SELECT slot_name FROM pg_replication_slots", &[]).await;
    let slots: Vec<String> = slots.unwrap().iter().map(|row| row.get(0)).collect();
    assert_eq!(slots, [rig.config.source.slot_name.clone()]);
    // A Redis that comes back empty is not whose claim comes first.
    assert!(rig.runtime.terminate(LIMIT).success());
    let () = rig.redis(&["FLUSHALL"]).await;
    let refused = std::cell::OnceCell::new();
    common::wait_for_metric(
        &other,
        "meander_capture_failures_total{reason=\"StreamPrefixTaken\"}",
        |times| times > refused.get_or_init(|| times) + 1,
    )
    .await;
    rig.runtime.start_again();
    rig.load(300).await.unwrap();
    rig.agrees().await;
    assert!(rig.runtime.terminate(LIMIT).success());
    meander_runtime::capture::cleanup(rig.config.clone()).await.unwrap();
    // The prefix is free; what the first left there is nobody's now, and is not taken for the second's own.
    other.ready(LIMIT).await;
    rig.load(300).await.unwrap();
    common::wait_for_metric(
        &other,
        "meander_capture_redis_detachments_total{reason=\"ForeignWriter\"}",
        |times| times >= 1,
    )
    .await;
    let _: i64 = rig.redis(&["DEL", &rig.stream()]).await;
    common::wait_for_metric(&other, ATTACHED, |attached| attached == 1).await;

    // A capture that has a slot when its prefix turns out to be another's goes on in Kafka alone.
    let _: i64 = rig.redis(&["HSET", &claim_key(&prefix), "pipeline", "b/c/d"]).await;
    common::wait_for_metric(
        &other,
        "meander_capture_redis_detachments_total{reason=\"StreamPrefixTaken\"}",
        |times| times >= 1,
    )
    .await;
    let published = || common::checkpoint(&second).map_or(0, |checkpoint| checkpoint.events_total);
    let before = published();
    rig.load(300).await.unwrap();
    eventually("the second pipeline's changes are in Kafka", LIMIT, async || {
        if published() > before { Ok(()) } else { Err("none is") }
    })
    .await;
    assert!(other.terminate(LIMIT).success());
}

#[tokio::test(flavor = "multi_thread")]
async fn a_stream_that_another_pipeline_writes_is_not_said_to_be_anybodys_to_delete() {
    let mut rig = Rig::start().await;
    rig.load(10).await.unwrap();
    rig.attached().await;
    let client = rig.postgres.client().await;
    // As if a pipeline with a longer prefix had a stream of the name that the table `"eu.public".x` comes to under this one.
    let longer = format!("{}.eu", rig.config.kafka.topic_prefix);
    let stream = format!("{longer}.public.x");
    let id: String = rig.redis(&["XADD", &stream, "*", "a", "b"]).await;
    let _: i64 = rig.redis(&["HSET", &claim_key(&longer), "pipeline", "b/c/d"]).await;
    let _: i64 = rig
        .redis(&["HSET", &mark_key(&longer, "b/c/d"), &format!("last:{stream}"), &id])
        .await;
    assert!(rig.runtime.terminate(LIMIT).success());
    rig.config.source.tables.include.push(r#""eu.public".x"#.to_owned());
    client
        .batch_execute(r#"CREATE SCHEMA "eu.public"; CREATE TABLE "eu.public".x (id int PRIMARY KEY)"#)
        .await
        .unwrap();
    let mut runtime = Runtime::capture(&rig.config);
    runtime.ready(LIMIT).await;
    common::wait_for_metric(&runtime, "meander_capture_tables", |tables| tables == 2).await;
    client
        .batch_execute(r#"INSERT INTO "eu.public".x VALUES (1)"#)
        .await
        .unwrap();
    common::wait_for_metric(
        &runtime,
        "meander_capture_redis_detachments_total{reason=\"ForeignWriter\"}",
        |times| times >= 1,
    )
    .await;
    let log = log_of(&mut runtime);
    assert!(log.contains("pipeline b/c/d writes it"), "{log}");
    assert!(!log.contains("DEL "), "{log}");
}

#[tokio::test(flavor = "multi_thread")]
async fn what_kafka_no_longer_holds_is_a_gap_until_somebody_accepts_it() {
    let mut rig = Rig::start().await;
    rig.load(3000).await.unwrap();
    rig.agrees().await;
    // Retention, as an administrator would force it: the first half of each partition.
    let admin: AdminClient<DefaultClientContext> = rig.kafka.client_config().create().unwrap();
    let mut before = TopicPartitionList::new();
    for partition in 0..rig.config.kafka.partitions {
        before
            .add_partition_offset(&rig.stream(), partition, Offset::Offset(500))
            .unwrap();
    }
    admin.delete_records(&before, &AdminOptions::new()).await.unwrap();
    let () = rig.redis(&["FLUSHALL"]).await;
    rig.load(1000).await.unwrap();
    rig.detached("HistoryMissing").await;
    rig.in_kafka(4000).await;
    assert_eq!(
        rig.redis::<i64>(&["XLEN", &rig.stream()]).await,
        0,
        "nothing is written past a gap"
    );

    // The condition says how many, and how to go on without them.
    let log = std::fs::read_to_string(rig.runtime.process().log()).unwrap();
    let missing = log.rsplit(" accept ").next().unwrap();
    let missing: u64 = missing[..missing.find(|c: char| !c.is_ascii_digit()).unwrap()]
        .parse()
        .unwrap();
    let _: i64 = rig
        .redis(&["HSET", &rig.mark(), "accept", &(missing - 1).to_string()])
        .await;
    rig.load(1000).await.unwrap();
    rig.in_kafka(5000).await;
    assert_eq!(
        rig.redis::<i64>(&["XLEN", &rig.stream()]).await,
        0,
        "another number accepts nothing"
    );
    let _: i64 = rig.redis(&["HSET", &rig.mark(), "accept", &missing.to_string()]).await;
    rig.attached().await;
    let held = tokio::task::block_in_place(|| positions_in_kafka(&rig));
    // Also what is left of a change of the key whose other half is gone.
    let published = common::checkpoint(&rig.config).unwrap().records_total;
    assert_eq!(held.len() as u64 + missing, published);
    eventually("Redis has what Kafka has", LIMIT, async || {
        let entries: Vec<(String, BTreeMap<String, Vec<u8>>)> = rig.redis(&["XRANGE", &rig.stream(), "-", "+"]).await;
        let positions: Vec<_> = entries
            .iter()
            .map(|(id, fields)| {
                let sequence: u64 = id.rsplit('-').next().unwrap().parse().unwrap();
                let position: Position = std::str::from_utf8(&fields["position"]).unwrap().parse().unwrap();
                (position, sequence % 256)
            })
            .collect();
        if positions == held {
            Ok(())
        } else {
            Err(format!("{} entries, {} records", positions.len(), held.len()))
        }
    })
    .await;

    // It was accepted once, for this gap.
    let accepted: Option<String> = rig.redis(&["HGET", &rig.mark(), "accept"]).await;
    assert_eq!(accepted, None);
    // Nor does one that was written without need wait for a gap to come.
    let _: i64 = rig.redis(&["HSET", &rig.mark(), "accept", "7"]).await;
    rig.load(10).await.unwrap();
    eventually("it is forgotten", LIMIT, async || {
        match rig.redis::<Option<String>>(&["HGET", &rig.mark(), "accept"]).await {
            None => Ok(()),
            Some(accepted) => Err(accepted),
        }
    })
    .await;
    let () = rig.redis(&["FLUSHALL"]).await;
    rig.load(10).await.unwrap();
    rig.metric(ATTACHED, |value| value == 0.0).await;
    rig.in_kafka(5020).await;
    assert!(rig.runtime.terminate(LIMIT).success());
}

#[tokio::test(flavor = "multi_thread")]
async fn a_topic_that_was_deleted_and_made_anew_is_a_gap_before_anything_is_written() {
    let mut rig = Rig::start().await;
    rig.load(2000).await.unwrap();
    rig.agrees().await;
    let before: i64 = rig.redis(&["XLEN", &rig.stream()]).await;
    let () = rig.redis(&["SAVE"]).await;
    rig.redis.stop();
    rig.load(500).await.unwrap();
    rig.in_kafka(2500).await;
    assert!(rig.runtime.terminate(LIMIT).success());
    let admin: AdminClient<DefaultClientContext> = rig.kafka.client_config().create().unwrap();
    for deleted in admin
        .delete_topics(&[rig.stream().as_str()], &AdminOptions::new())
        .await
        .unwrap()
    {
        deleted.unwrap();
    }
    rig.runtime.start_again();
    rig.runtime.ready(LIMIT).await;
    rig.load(500).await.unwrap();
    rig.in_kafka(3000).await;
    rig.redis.restart().await;
    rig.detached("HistoryMissing").await;
    assert_eq!(rig.redis::<i64>(&["XLEN", &rig.stream()]).await, before);
    assert!(rig.runtime.terminate(LIMIT).success());
}

#[tokio::test(flavor = "multi_thread")]
async fn a_stream_that_is_not_wanted_any_more_is_forgotten_as_the_message_says() {
    let mut rig = Rig::start().await;
    let client = rig.postgres.client().await;
    client
        .batch_execute("CREATE TABLE old (id int GENERATED ALWAYS AS IDENTITY PRIMARY KEY)")
        .await
        .unwrap();
    let old = format!("{}.public.old", rig.config.kafka.topic_prefix);
    eventually("the table is captured", LIMIT, async || {
        client.batch_execute("INSERT INTO old DEFAULT VALUES").await.unwrap();
        match rig.redis::<i64>(&["EXISTS", &old]).await {
            0 => Err("its stream is not there"),
            _ => Ok(()),
        }
    })
    .await;
    client.batch_execute("DROP TABLE old").await.unwrap();
    assert!(rig.runtime.terminate(LIMIT).success());
    let _: i64 = rig.redis(&["DEL", &old]).await;
    rig.runtime.start_again();
    rig.runtime.ready(LIMIT).await;
    rig.detached("StreamDeleted").await;
    rig.load(500).await.unwrap();
    let forget = format!("HDEL {} last:{old}", rig.mark());
    let log = std::fs::read_to_string(rig.runtime.process().log()).unwrap();
    assert!(log.contains(&forget), "{log}");
    let _: i64 = rig.redis(&forget.split(' ').collect::<Vec<_>>()).await;
    rig.attached().await;
    rig.load(500).await.unwrap();
    let published = common::checkpoint(&rig.config).unwrap().records_total;
    rig.counts(|records| records >= published).await;
}

#[tokio::test(flavor = "multi_thread")]
async fn what_redis_alone_has_of_an_earlier_life_is_not_counted_in_the_next() {
    let mut rig = Rig::start().await;
    rig.load(500).await.unwrap();
    rig.agrees().await;
    rig.runtime.kill9();
    // As if it had been killed with a change in Redis and not in Kafka.
    let published = common::checkpoint(&rig.config).unwrap().published.unwrap();
    let ahead = Position {
        ordinal: published.ordinal + 1,
        ..published
    };
    let id = EntryId::of(ahead, 0).to_string();
    let text = ahead.to_string();
    let _: String = rig
        .redis(&["XADD", &rig.stream(), &id, "position", &text, "key", "", "value", "x"])
        .await;
    let last = format!("last:{}", rig.stream());
    let _: i64 = rig.redis(&["HSET", &rig.mark(), "position", &text, &last, &id]).await;
    let _: i64 = rig.redis(&["HINCRBY", &rig.mark(), "records", "1"]).await;
    eventually("the pipeline is deleted", LIMIT, async || {
        meander_runtime::capture::cleanup(rig.config.clone()).await
    })
    .await;
    rig.runtime.start_again();
    rig.runtime.ready(LIMIT).await;
    rig.load(500).await.unwrap();
    rig.in_kafka(1000).await;
    rig.attached().await;
    let checkpoint = common::checkpoint(&rig.config).unwrap();
    assert_eq!(checkpoint.epoch, 2);
    rig.counts(|records| records == checkpoint.records_total).await;
}

/// Position and part of every record that Kafka holds of the table, in order.
fn positions_in_kafka(rig: &Rig) -> Vec<(Position, u64)> {
    let (stream, mut held) = (rig.stream(), Vec::new());
    rig.kafka.read(
        |name| name == stream,
        |message| {
            let header = |name: &str| {
                let headers = message.headers().unwrap();
                let found = headers.iter().find(|header| header.key == name)?;
                Some(std::str::from_utf8(found.value.unwrap()).unwrap().to_owned())
            };
            let part = header(PART_HEADER).map_or(0, |part| part.parse().unwrap());
            held.push((header(POSITION_HEADER).unwrap().parse().unwrap(), part));
        },
    );
    held.sort_unstable();
    held
}

#[tokio::test(flavor = "multi_thread")]
async fn with_acknowledgement_required_postgresql_keeps_what_redis_lacks() {
    let redis = Redis::start().await;
    let mut rig = Rig::start_with(redis, |redis| redis.acknowledgement = Acknowledgement::Required).await;
    rig.load(1000).await.unwrap();
    rig.agrees().await;
    let () = rig.redis(&["SAVE"]).await;
    rig.redis.stop();
    rig.detached("RedisUnreachable").await;
    rig.load(1000).await.unwrap();
    rig.in_kafka(2000).await;
    // What a clean end acknowledges is all that may be acknowledged.
    assert!(rig.runtime.terminate(LIMIT).success());
    assert!(!rig.acknowledged().await);
    rig.runtime.start_again();
    rig.redis.restart().await;
    rig.agrees().await;
    eventually("PostgreSQL forgets its WAL", LIMIT, async || {
        rig.acknowledged().await.then_some(()).ok_or("it keeps it")
    })
    .await;
}

#[tokio::test(flavor = "multi_thread")]
async fn what_counts_as_being_in_redis_survives_its_crash_where_that_is_asked_for() {
    let redis = Redis::start_with(&["--appendonly", "yes"]).await;
    let mut rig = Rig::start_with(redis, |redis| redis.durability = Durability::Aof).await;
    let version: String = rig.redis(&["INFO", "server"]).await;
    let has_waitaof = !version.contains("redis_version:6.") && !version.contains("redis_version:7.0.");
    if !has_waitaof {
        // The settings that Redis has by itself lose a second.
        rig.detached("RedisNotDurable").await;
        let () = rig.redis(&["CONFIG", "SET", "appendfsync", "always"]).await;
    }
    rig.attached().await;
    let load = rig.load(4000);
    rig.in_kafka(2000).await;
    rig.redis.restart().await;
    rig.detached("RedisUnreachable").await;
    if !has_waitaof {
        let () = rig.redis(&["CONFIG", "SET", "appendfsync", "always"]).await;
    }
    load.await.unwrap();
    rig.agrees().await;
    let (_, metrics) = rig.runtime.get("/metrics").await.unwrap();
    assert!(!metrics.contains("EntriesLost"), "{metrics}");

    // What is trimmed is what the setting asks for, the oldest; Kafka has it.
    assert!(rig.runtime.terminate(LIMIT).success());
    rig.config.redis.as_mut().unwrap().max_length = Some(500);
    rig.runtime = Runtime::capture(&rig.config);
    rig.runtime.ready(LIMIT).await;
    rig.load(300).await.unwrap();
    rig.in_kafka(4300).await;
    let newest = common::checkpoint(&rig.config).unwrap().published.unwrap().to_string();
    eventually(
        "the newest entries are there, and the oldest are not",
        LIMIT,
        async || {
            let length: u64 = rig.redis(&["XLEN", &rig.stream()]).await;
            let last: Vec<(String, BTreeMap<String, Vec<u8>>)> =
                rig.redis(&["XREVRANGE", &rig.stream(), "+", "-", "COUNT", "1"]).await;
            // In whole nodes of up to 100 entries.
            let is_trimmed = (500..=600).contains(&length) && last[0].1["position"] == newest.as_bytes();
            if is_trimmed { Ok(()) } else { Err(length) }
        },
    )
    .await;
    let kafka = Tail::new(&common::cluster(rig.kafka), LIMIT).unwrap();
    let topic = rig.stream();
    for partition in kafka.partitions(&topic).unwrap() {
        assert_eq!(kafka.stretch(&topic, partition).unwrap().start, 0);
    }
}

#[tokio::test(flavor = "multi_thread")]
async fn what_counts_as_being_in_redis_is_on_a_replica_where_that_is_asked_for() {
    let redis = Redis::start().await;
    let port = redis.port().to_string();
    let rig = Rig::start_with(redis, |redis| redis.durability = Durability::Replica).await;
    rig.detached("RedisNotDurable").await;
    let mut replica = Redis::start_with(&["--replicaof", "127.0.0.1", &port]).await;
    rig.attached().await;
    let load = rig.load(3000);
    rig.in_kafka(1000).await;
    replica.stop();
    rig.metric(ATTACHED, |value| value == 0.0).await;
    rig.in_kafka(3000).await;
    replica.restart().await;
    load.await.unwrap();
    rig.agrees().await;
    rig.agrees_with(&replica).await;
}

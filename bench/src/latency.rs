//! How long a change takes from its commit until a consumer has it.

use std::{
    sync::{
        Arc,
        atomic::{AtomicUsize, Ordering},
    },
    time::{Duration, SystemTime, UNIX_EPOCH},
};

use anyhow::Context as _;
use meander_proto::v1::{ChangeRecord, value::Kind};
use meander_test_support::{Kafka, Postgres, Redis, Runtime};
use prost::Message as _;
use rdkafka::{
    Message as _, Offset, TopicPartitionList,
    consumer::{BaseConsumer, Consumer as _},
};
use redis::{
    AsyncCommands as _,
    streams::{StreamReadOptions, StreamReadReply},
};
use serde::Serialize;
use tokio::{
    task::{JoinSet, spawn_blocking},
    time::{Instant, interval_at, timeout},
};

use crate::process::{cpu_seconds, peak_resident};

const LIMIT: Duration = Duration::from_secs(60);
/// How long one look for something new takes at most.
const LOOK: Duration = Duration::from_millis(500);
/// Where in a row the time is at which it was written, in microseconds since the Unix epoch.
const WRITTEN: usize = 1;

#[derive(Serialize)]
struct Round {
    consumer: &'static str,
    commits_per_second: f64,
    changes: usize,
    /// Milliseconds from the INSERT, just before its commit is flushed, until the consumer has the record.
    p50: f64,
    p99: f64,
    p999: f64,
    max: f64,
    /// Processors that the runtime kept busy.
    runtime_cores: f64,
    peak_resident_mebibytes: f64,
}

/// What was asked for.
#[derive(Clone, Copy)]
pub(crate) struct Load {
    pub(crate) rate: f64,
    pub(crate) clients: u32,
    /// Seconds that are thrown away, and seconds that are measured.
    pub(crate) warm_up: u64,
    pub(crate) seconds: u64,
}

pub(crate) async fn measure(load: Load, rounds: u32) -> anyhow::Result<()> {
    let kafka = Kafka::start().await;
    for _ in 0..rounds {
        for round in round(&kafka, load).await? {
            println!("{}", serde_json::to_string(&round)?);
        }
    }
    Ok(())
}

async fn round(kafka: &Kafka, load: Load) -> anyhow::Result<[Round; 2]> {
    let postgres = Postgres::start(&[("max_wal_size", "8GB"), ("shared_buffers", "1GB")]).await;
    let redis = Redis::start().await;
    postgres
        .client()
        .await
        .batch_execute(
            "CREATE TABLE trades (trade_id bigint PRIMARY KEY, written bigint, symbol text, price numeric(12,2), quantity int, side text)",
        )
        .await?;
    let config = crate::config(&postgres, kafka, Some(&redis));
    let mut runtime = Runtime::capture(&config);
    runtime.ready(LIMIT).await;
    let process = runtime.process().id().context("the runtime has ended")?;
    let stream = format!(
        "{}.public.trades",
        config.redis.as_ref().context("there is a Redis")?.stream_prefix
    );
    let topic = format!("{}.public.trades", config.kafka.topic_prefix);

    // Until all are made, nobody knows how many there are to be seen.
    let expected = Arc::new(AtomicUsize::new(usize::MAX));
    let from_kafka = spawn_blocking({
        let (consumer, expected) = (consumer(kafka, &topic)?, Arc::clone(&expected));
        move || consume(&consumer, &expected)
    });
    let from_redis = tokio::spawn(read(redis.connection().await, stream, Arc::clone(&expected)));

    let begin = Instant::now() + Duration::from_millis(100);
    let mut clients = JoinSet::new();
    for client in 0..load.clients {
        clients.spawn(insert(postgres.client().await, client, load, begin));
    }
    // The warm-up is a stretch of time.
    tokio::time::sleep_until(begin + Duration::from_secs(load.warm_up)).await;
    let (used, since) = (cpu_seconds(process)?, Instant::now());
    let from = micros();
    let made = clients.join_all().await.into_iter().sum::<anyhow::Result<usize>>()?;
    let took = since.elapsed().as_secs_f64();
    let runtime_cores = (cpu_seconds(process)? - used) / took;
    expected.store(made, Ordering::Relaxed);
    let both = async { anyhow::Ok((from_kafka.await??, from_redis.await??)) };
    let seen = timeout(LIMIT, both).await;
    // Whoever still waits has waited long enough.
    expected.store(0, Ordering::Relaxed);
    let (in_kafka, in_redis) = seen.context("not every change has been seen")??;
    let round = |consumer, seen: Vec<(i64, i64)>| {
        anyhow::ensure!(seen.len() == made, "{consumer} has {} of {made} changes", seen.len());
        let mut latencies: Vec<i64> = seen
            .into_iter()
            .filter(|(written, _)| *written >= from)
            .map(|(written, seen)| seen - written)
            .collect();
        latencies.sort_unstable();
        let at = |share: f64| {
            let index = ((latencies.len() as f64 * share) as usize).min(latencies.len() - 1);
            latencies[index] as f64 / 1000.0
        };
        Ok(Round {
            consumer,
            commits_per_second: latencies.len() as f64 / took,
            changes: latencies.len(),
            p50: at(0.5),
            p99: at(0.99),
            p999: at(0.999),
            max: at(1.0),
            runtime_cores,
            peak_resident_mebibytes: peak_resident(process)?,
        })
    };
    let rounds = [round("Kafka, read_committed", in_kafka)?, round("Redis", in_redis)?];
    runtime.terminate(LIMIT);
    Ok(rounds)
}

/// Commits at its share of the rate, by an absolute schedule. Returns how many.
async fn insert(client: tokio_postgres::Client, number: u32, load: Load, begin: Instant) -> anyhow::Result<usize> {
    let insert = client
        .prepare(
            "INSERT INTO trades VALUES ($1, (extract(epoch FROM clock_timestamp()) * 1000000)::bigint, 'AAPL', 123.45, 100, 'buy')",
        )
        .await?;
    let period = Duration::from_secs_f64(f64::from(load.clients) / load.rate);
    let mut due = interval_at(
        begin + period.mul_f64(f64::from(number) / f64::from(load.clients)),
        period,
    );
    let end = begin + Duration::from_secs(load.warm_up + load.seconds);
    let mut made = 0;
    while due.tick().await < end {
        client
            .execute(&insert, &[&(i64::from(number) << 40 | made as i64)])
            .await?;
        made += 1;
    }
    Ok(made)
}

fn consumer(kafka: &Kafka, topic: &str) -> anyhow::Result<BaseConsumer> {
    let consumer: BaseConsumer = kafka
        .client_config()
        .set("group.id", "latency")
        .set("enable.auto.commit", "false")
        .set("isolation.level", "read_committed")
        .set("topic.metadata.refresh.interval.ms", "1000")
        .create()?;
    let mut partitions = TopicPartitionList::new();
    partitions.add_partition_offset(topic, 0, Offset::Beginning)?;
    consumer.assign(&partitions)?;
    Ok(consumer)
}

/// When each row was written, and when it was seen.
fn consume(consumer: &BaseConsumer, expected: &AtomicUsize) -> anyhow::Result<Vec<(i64, i64)>> {
    let mut seen = Vec::new();
    while seen.len() < expected.load(Ordering::Relaxed) {
        // Before its first change the topic is not there.
        if let Some(Ok(message)) = consumer.poll(LOOK / 2) {
            seen.extend(written(message.payload().unwrap_or_default())?.map(|written| (written, micros())));
        }
    }
    Ok(seen)
}

async fn read(
    mut connection: redis::aio::MultiplexedConnection,
    stream: String,
    expected: Arc<AtomicUsize>,
) -> anyhow::Result<Vec<(i64, i64)>> {
    let options = StreamReadOptions::default()
        .block(LOOK.as_millis() as usize / 2)
        .count(1000);
    let (mut seen, mut last) = (Vec::new(), "0".to_owned());
    while seen.len() < expected.load(Ordering::Relaxed) {
        let reply: Option<StreamReadReply> = connection.xread_options(&[&stream], &[&last], &options).await?;
        let now = micros();
        for entry in reply.into_iter().flat_map(|reply| reply.keys).flat_map(|key| key.ids) {
            let value: Vec<u8> = entry.get("value").context("an entry without a value")?;
            seen.extend(written(&value)?.map(|written| (written, now)));
            last = entry.id;
        }
    }
    Ok(seen)
}

/// When the row of a record was written; none where it is no row.
fn written(value: &[u8]) -> anyhow::Result<Option<i64>> {
    let Some(row) = ChangeRecord::decode(value)?.after else {
        return Ok(None);
    };
    match row.values.get(WRITTEN).and_then(|value| value.kind.as_ref()) {
        Some(Kind::Integer(written)) => Ok(Some(*written)),
        other => anyhow::bail!("{other:?} is no time"),
    }
}

fn micros() -> i64 {
    let now = SystemTime::now().duration_since(UNIX_EPOCH).unwrap_or_default();
    i64::try_from(now.as_micros()).unwrap_or(i64::MAX)
}

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
use meander_test_support::Kafka;
use prost::Message as _;
use rdkafka::{
    Message as _, Offset, TopicPartitionList,
    consumer::{BaseConsumer, Consumer as _},
};
use redis::{
    AsyncCommands as _,
    streams::{StreamReadOptions, StreamReadReply},
};
use tokio::{
    task::{JoinHandle, JoinSet, spawn_blocking},
    time::{Instant, interval_at, timeout},
};

use crate::{
    contestant::{Capture, Contestant, Variant},
    meter::resident,
    process::peak_resident,
    report::{Figure, Figures, Report},
    stage::Stage,
};

const LIMIT: Duration = Duration::from_secs(60);
/// How long one look for something new takes at most.
const LOOK: Duration = Duration::from_millis(250);

/// What was asked for.
#[derive(Clone, Copy)]
pub(crate) struct Load {
    pub(crate) rate: f64,
    pub(crate) clients: u32,
    /// Seconds that are thrown away, and seconds that are measured.
    pub(crate) warm_up: u64,
    pub(crate) seconds: u64,
}

pub(crate) async fn measure(report: &Report, load: Load, peers: &[Variant], rounds: u32) -> anyhow::Result<()> {
    let ours = [Contestant::KafkaAndRedis];
    let mut contestants = Contestant::with(&ours, peers);
    let mut stage = Stage::start().await;
    for number in 0..=rounds {
        let (report, contestants) = match number {
            0 => (&Report::of_warm_up(), &ours[..]),
            _ => {
                Contestant::take_turns(&mut contestants);
                (report, &contestants[..])
            }
        };
        for contestant in contestants {
            for (consumer, figures) in round(*contestant, load, &mut stage).await? {
                let name = match contestant {
                    Contestant::KafkaAndRedis => format!("Meander to Kafka and Redis, {consumer}"),
                    peer => peer.name(),
                };
                let work = format!("latency at {} commits/s", crate::report::thousands(load.rate));
                report.add(&work, &name, &contestant.version(), figures)?;
            }
        }
    }
    Ok(())
}

async fn round(contestant: Contestant, load: Load, stage: &mut Stage) -> anyhow::Result<Vec<(&'static str, Figures)>> {
    let client = stage.postgres.client().await;
    client
        .batch_execute(
            "DROP TABLE IF EXISTS trades; CREATE TABLE trades (trade_id bigint PRIMARY KEY, written bigint, symbol text, price numeric(12,2), quantity int, side text)",
        )
        .await?;
    let mut capture = Capture::of_changes(contestant, stage).await?;
    capture.start();
    let process = capture.process_id()?;
    let decode = if capture.marks_ends() { written } else { written_in_json };

    // Until all are made, nobody knows how many there are to be seen.
    let expected = Arc::new(AtomicUsize::new(usize::MAX));
    let first = Arc::new(AtomicUsize::new(0));
    let mut consumers: Vec<(&'static str, JoinHandle<Seen>)> = Vec::new();
    if let Some(topic) = capture.topic("trades") {
        let consumer = consumer(&stage.kafka, &topic)?;
        let (expected, first) = (Arc::clone(&expected), Arc::clone(&first));
        let seen = spawn_blocking(move || consume(&consumer, &expected, &first, decode));
        consumers.push(("read in Kafka", seen));
    }
    if let Some(stream) = capture.stream("trades") {
        let connection = stage.redis.connection().await;
        let (expected, first) = (Arc::clone(&expected), Arc::clone(&first));
        consumers.push((
            "read in Redis",
            tokio::spawn(read(connection, stream, expected, first, decode)),
        ));
    }
    // One change shows that the contestant is at work; then the clock starts.
    client
        .execute("INSERT INTO trades VALUES (-1, 0, 'AAPL', 1, 1, 'buy')", &[])
        .await?;
    let deadline = Instant::now() + LIMIT;
    while first.load(Ordering::Relaxed) < consumers.len() {
        anyhow::ensure!(Instant::now() < deadline, "the first change has not been seen");
        capture.process_id()?;
        tokio::time::sleep(Duration::from_millis(20)).await;
    }

    let begin = Instant::now() + Duration::from_millis(100);
    let mut clients = JoinSet::new();
    for client in 0..load.clients {
        clients.spawn(insert(stage.postgres.client().await, client, load, begin));
    }
    // The warm-up is a stretch of time.
    tokio::time::sleep_until(begin + Duration::from_secs(load.warm_up)).await;
    let (meter, since) = (stage.meter(Some(process))?, Instant::now());
    let from = micros();
    let made = clients.join_all().await.into_iter().sum::<anyhow::Result<usize>>()? + 1;
    let took = since.elapsed().as_secs_f64();
    let mut used = meter.read()?;
    let cores = used.get(&Figure::Cpu).copied().unwrap_or_default() / took;
    used.insert(Figure::Cores, cores);
    used.insert(Figure::PeakResident, peak_resident(process)?);
    used.insert(Figure::Resident, resident(process)?);
    expected.store(made, Ordering::Relaxed);
    let mut rounds = Vec::new();
    for (consumer, seen) in consumers {
        let seen = timeout(LIMIT, seen).await;
        if seen.is_err() {
            // Whoever still waits has waited long enough.
            expected.store(0, Ordering::Relaxed);
        }
        let seen = seen.with_context(|| format!("{consumer}: not every change has been seen"))???;
        anyhow::ensure!(seen.len() == made, "{consumer}: {} of {made} changes", seen.len());
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
        let mut figures = used.clone();
        figures.extend([
            (Figure::CommitsPerSecond, latencies.len() as f64 / took),
            (Figure::P50, at(0.5)),
            (Figure::P99, at(0.99)),
            (Figure::P999, at(0.999)),
            (Figure::Max, at(1.0)),
        ]);
        rounds.push((consumer, figures));
    }
    capture.end(stage).await?;
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
type Seen = anyhow::Result<Vec<(i64, i64)>>;

fn consume(consumer: &BaseConsumer, expected: &AtomicUsize, first: &AtomicUsize, decode: Decode) -> Seen {
    let mut seen = Vec::new();
    while seen.len() < expected.load(Ordering::Relaxed) {
        // Before its first change the topic is not there.
        if let Some(Ok(message)) = consumer.poll(LOOK) {
            let now = micros();
            if let Some(written) = decode(message.payload().unwrap_or_default())? {
                first.fetch_add(usize::from(seen.is_empty()), Ordering::Relaxed);
                seen.push((written, now));
            }
        }
    }
    Ok(seen)
}

async fn read(
    mut connection: redis::aio::MultiplexedConnection,
    stream: String,
    expected: Arc<AtomicUsize>,
    first: Arc<AtomicUsize>,
    decode: Decode,
) -> Seen {
    let options = StreamReadOptions::default()
        .block(LOOK.as_millis() as usize)
        .count(1000);
    let (mut seen, mut last) = (Vec::new(), "0".to_owned());
    while seen.len() < expected.load(Ordering::Relaxed) {
        let reply: Option<StreamReadReply> = connection.xread_options(&[&stream], &[&last], &options).await?;
        let now = micros();
        for entry in reply.into_iter().flat_map(|reply| reply.keys).flat_map(|key| key.ids) {
            // Ours has the field `value`; Debezium's only field is named by the key.
            let value = entry.map.get("value").or_else(|| entry.map.values().next());
            let value: Vec<u8> = redis::from_redis_value(value.cloned().context("an entry without a value")?)?;
            if let Some(written) = decode(&value)? {
                first.fetch_add(usize::from(seen.is_empty()), Ordering::Relaxed);
                seen.push((written, now));
            }
            last = entry.id;
        }
    }
    Ok(seen)
}

/// When the row of a record was written; none where it is no row.
type Decode = fn(&[u8]) -> anyhow::Result<Option<i64>>;

/// Where in a row that is: in microseconds since the Unix epoch.
const WRITTEN: usize = 1;

fn written(value: &[u8]) -> anyhow::Result<Option<i64>> {
    let Some(row) = ChangeRecord::decode(value)?.after else {
        return Ok(None);
    };
    match row.values.get(WRITTEN).and_then(|value| value.kind.as_ref()) {
        Some(Kind::Integer(written)) => Ok(Some(*written)),
        other => anyhow::bail!("{other:?} is no time"),
    }
}

fn written_in_json(value: &[u8]) -> anyhow::Result<Option<i64>> {
    #[derive(serde::Deserialize)]
    struct Event {
        after: Option<Row>,
    }
    #[derive(serde::Deserialize)]
    struct Row {
        written: i64,
    }
    let event: Event = serde_json::from_slice(value)?;
    Ok(event.after.map(|row| row.written))
}

fn micros() -> i64 {
    let now = SystemTime::now().duration_since(UNIX_EPOCH).unwrap_or_default();
    i64::try_from(now.as_micros()).unwrap_or(i64::MAX)
}

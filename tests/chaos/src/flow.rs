//! Whether changes flow, as consumers see it: a row that changes twenty times a second, watched in Kafka and in Redis.

use std::{
    sync::{Arc, Mutex, PoisonError},
    thread,
    time::{Duration, Instant},
};

use meander_proto::v1::{ChangeRecord, value::Kind};
use meander_test_support::eventually;
use prost::Message as _;
use rdkafka::{
    ClientConfig, Message as _, Offset, TopicPartitionList,
    consumer::{BaseConsumer, Consumer as _},
};
use tokio::task::JoinHandle;
use tokio_postgres::NoTls;

use crate::LIMIT;

/// The table; its one row counts.
pub const TABLE: &str = "CREATE TABLE beat (id int PRIMARY KEY, n bigint NOT NULL); INSERT INTO beat VALUES (1, 0);";

/// Between two changes: no silence is shorter.
const PACE: Duration = Duration::from_millis(50);
/// How long a store may take to answer before it is asked anew.
const PATIENCE: Duration = Duration::from_secs(2);
const PARTITIONS: i32 = 3;

/// A change that a consumer has seen.
#[derive(Clone, Copy)]
struct Arrival {
    sent: Instant,
    seen: Instant,
}

/// What one consumer has seen.
#[derive(Clone, Default)]
pub struct Seen(Arc<Mutex<Vec<Arrival>>>);

impl Seen {
    fn with<T>(&self, look: impl FnOnce(&mut Vec<Arrival>) -> T) -> T {
        look(&mut self.0.lock().unwrap_or_else(PoisonError::into_inner))
    }

    /// Waits for a change that was made after this moment.
    pub async fn since(&self, moment: Instant, what: &str) {
        eventually(what, LIMIT, async || {
            let last = self.with(|arrivals| arrivals.last().copied());
            match last {
                Some(arrival) if arrival.sent > moment => Ok(()),
                Some(arrival) => Err(format!(
                    "the last change that came was made {:?} ago",
                    arrival.sent.elapsed()
                )),
                None => Err("nothing ever came".to_owned()),
            }
        })
        .await;
    }

    /// The longest time after this moment in which nothing came.
    pub fn silence(&self, since: Instant) -> Duration {
        self.with(|arrivals| {
            let first = arrivals.partition_point(|arrival| arrival.seen < since);
            let mut before = since;
            let mut longest = Duration::ZERO;
            for arrival in &arrivals[first..] {
                longest = longest.max(arrival.seen - before);
                before = arrival.seen;
            }
            longest
        })
    }
}

/// The changes, and what consumers see of them.
pub struct Flow {
    pub kafka: Seen,
    pub redis: Seen,
    beat: JoinHandle<()>,
}

impl Flow {
    /// Begins to change the row, and to watch. The topic is there already.
    pub fn start(database: &str, kafka: ClientConfig, redis: &str, prefix: &str) -> Self {
        let sent = Arc::new(Mutex::new(Vec::new()));
        let flow = Self {
            kafka: Seen::default(),
            redis: Seen::default(),
            beat: tokio::spawn(beat(database.to_owned(), sent.clone())),
        };
        let name = format!("{prefix}.public.beat");
        let watch = |seen: &Seen| Watch {
            sent: sent.clone(),
            seen: seen.clone(),
        };
        let (topic, in_kafka) = (name.clone(), watch(&flow.kafka));
        // It ends with the process.
        thread::spawn(move || watch_kafka(kafka, &topic, &in_kafka));
        tokio::spawn(watch_redis(redis.to_owned(), name, watch(&flow.redis)));
        flow
    }

    /// Ends the changes.
    pub async fn stop(self) {
        self.beat.abort();
        // It was ended, which is its error.
        let _ = self.beat.await;
    }
}

/// When each change was made: before its statement was sent. The row's number is the place here, counted from 1.
type Sent = Arc<Mutex<Vec<Instant>>>;

async fn beat(database: String, sent: Sent) {
    let mut pace = tokio::time::interval(PACE);
    pace.set_missed_tick_behavior(tokio::time::MissedTickBehavior::Delay);
    loop {
        pace.tick().await;
        let Ok((client, connection)) = tokio_postgres::connect(&database, NoTls).await else {
            continue;
        };
        tokio::spawn(connection);
        loop {
            pace.tick().await;
            let number = {
                let mut sent = sent.lock().unwrap_or_else(PoisonError::into_inner);
                sent.push(Instant::now());
                sent.len()
            };
            let statement = format!("UPDATE beat SET n = {number}");
            match tokio::time::timeout(PATIENCE, client.batch_execute(&statement)).await {
                Ok(Ok(())) => {}
                _ => break,
            }
        }
    }
}

struct Watch {
    sent: Sent,
    seen: Seen,
}

impl Watch {
    /// Notes a record's number, if it is a new one: what is refilled has come before.
    fn note(&self, value: &[u8], last: &mut usize) {
        let record = ChangeRecord::decode(value).unwrap();
        let Some(row) = record.after else { return };
        let Some(Kind::Integer(number)) = row.values[1].kind else {
            return;
        };
        let number = usize::try_from(number).unwrap();
        if number <= *last {
            return;
        }
        *last = number;
        let sent = self.sent.lock().unwrap_or_else(PoisonError::into_inner)[number - 1];
        let seen = Instant::now();
        self.seen.with(|arrivals| arrivals.push(Arrival { sent, seen }));
    }
}

fn watch_kafka(mut client: ClientConfig, topic: &str, watch: &Watch) {
    let consumer: BaseConsumer = client
        .set("group.id", "beat")
        .set("isolation.level", "read_committed")
        .set("enable.auto.commit", "false")
        .set("reconnect.backoff.max.ms", "500")
        .set("fetch.wait.max.ms", "50")
        .create()
        .unwrap();
    let mut assignment = TopicPartitionList::new();
    for partition in 0..PARTITIONS {
        assignment
            .add_partition_offset(topic, partition, Offset::Beginning)
            .unwrap();
    }
    consumer.assign(&assignment).unwrap();
    let mut last = 0;
    loop {
        // An error is a broker that is away, which the client comes back to by itself.
        if let Some(Ok(message)) = consumer.poll(PATIENCE) {
            watch.note(message.payload().unwrap(), &mut last);
        }
    }
}

async fn watch_redis(url: String, stream: String, watch: Watch) {
    let client = redis::Client::open(url).unwrap();
    let mut pace = tokio::time::interval(PACE / 2);
    pace.set_missed_tick_behavior(tokio::time::MissedTickBehavior::Delay);
    let mut last = 0;
    loop {
        pace.tick().await;
        let Ok(Ok(mut connection)) = tokio::time::timeout(PATIENCE, client.get_multiplexed_async_connection()).await
        else {
            continue;
        };
        loop {
            pace.tick().await;
            let mut command = redis::cmd("XREVRANGE");
            command.arg(&stream).arg(&["+", "-", "COUNT", "1"]);
            let query = command.query_async::<redis::streams::StreamRangeReply>(&mut connection);
            let Ok(Ok(newest)) = tokio::time::timeout(PATIENCE, query).await else {
                break;
            };
            if let Some(value) = newest.ids.first().and_then(|entry| entry.get::<Vec<u8>>("value")) {
                watch.note(&value, &mut last);
            }
        }
    }
}

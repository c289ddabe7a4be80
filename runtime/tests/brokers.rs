//! A Kafka of three brokers, of which one dies and comes back in the midst of a capture and of a replay.
#![allow(clippy::unwrap_used, clippy::expect_used, clippy::panic)]

mod common;
#[path = "common/replay.rs"]
mod replay;

use std::{
    collections::{BTreeMap, BTreeSet},
    sync::{Arc, Mutex},
    time::Duration,
};

use common::{LIMIT, checkpoint, config};
use meander_config::{CaptureConfig, GrpcReceiver, ReplayOrder, ReplayTarget};
use meander_proto::v1::{
    ChangeRecord, Coordinate, DeliverAck, ReplayEvent,
    replay_receiver_server::{ReplayReceiver, ReplayReceiverServer},
    value::Kind,
};
use meander_runtime::replay::End;
use meander_test_support::{Brokers, Postgres, Runtime, eventually, read_topics};
use prost::Message as _;
use rdkafka::Message as _;
use tokio::{
    net::TcpListener,
    sync::{mpsc, watch},
    task::JoinHandle,
    time::{interval, timeout},
};
use tokio_stream::wrappers::{ReceiverStream, TcpListenerStream};
use tonic::{Request, Response, Status, Streaming, transport::Server};

/// Rows before the first broker dies, 1 kB each: much more than a replay fetches ahead of its three partitions and has under way.
const ROWS: i64 = 80_000;
/// Rows of each transaction after that, and the pause between two.
const MORE: i64 = 20;
const PAUSE: Duration = Duration::from_millis(20);
/// Rows that have to come into Kafka while a broker is dead.
const MEANWHILE: u64 = 1_000;

/// Epoch, commit LSN, ordinal, part.
type Place = (u32, u64, u64, u32);

fn place(coordinate: Coordinate) -> Place {
    let Coordinate {
        epoch,
        commit_lsn,
        ordinal,
        part,
    } = coordinate;
    (epoch, commit_lsn, ordinal, part)
}

#[tokio::test(flavor = "multi_thread")]
async fn leaders_die_and_come_back_under_a_capture_and_a_replay_and_nothing_is_lost_or_doubled() {
    let (postgres, mut brokers) = tokio::join!(Postgres::start(&[]), Brokers::start());
    let client = postgres.client().await;
    let table = "CREATE TABLE t (id bigint PRIMARY KEY, filling text)";
    client.batch_execute(table).await.unwrap();
    let mut pipeline = config(&postgres, brokers.broker(0), None);
    pipeline.kafka.bootstrap_servers = brokers.bootstrap_servers();
    let topic = format!("{}.public.t", pipeline.kafka.topic_prefix);
    let mut capture = Runtime::capture(&pipeline);
    capture.ready(LIMIT).await;
    let first = format!("INSERT INTO t SELECT id, repeat('x', 1000) FROM generate_series(1, {ROWS}) id");
    client.batch_execute(&first).await.unwrap();
    published(&pipeline, ROWS.cast_unsigned()).await;
    let (stop, load) = load(&postgres);

    let mut replays = Vec::new();
    for order in [ReplayOrder::Commit, ReplayOrder::PerKey] {
        let before = checkpoint(&pipeline).unwrap();
        let replay = Replay::start(&pipeline, order).await;
        // One that has something to do: which one that is changes when one dies.
        let led_by = |broker: &usize| brokers.led_by(*broker, |name| name == topic);
        let broker = (0..3).max_by_key(led_by).unwrap();
        assert!(led_by(&broker) > 0);
        brokers.kill9(broker);
        published(&pipeline, before.events_total + MEANWHILE).await;
        replays.push((order, before.complete.unwrap().commit_lsn.0, replay.go_on().await));
        brokers.start_again(broker).await;
    }
    stop.send_replace(true);
    let made = load.await.unwrap();
    published(&pipeline, made).await;
    assert!(capture.terminate(LIMIT).success());

    let mut log = BTreeSet::new();
    let mut ids = BTreeSet::new();
    let mut last = BTreeMap::new();
    let client = brokers.client_config();
    tokio::task::block_in_place(|| {
        read_topics(
            &client,
            |name| name == topic,
            |message| {
                let record = ChangeRecord::decode(message.payload().unwrap()).unwrap();
                let at = place(record.coordinate.unwrap());
                assert!(
                    last.insert(message.partition(), at) < Some(at),
                    "out of order or doubled at {at:?}"
                );
                log.insert(at);
                match record.after.unwrap().values[0].kind {
                    Some(Kind::Integer(id)) => assert!(ids.insert(id), "{id} is there twice"),
                    ref other => panic!("{other:?}"),
                }
            },
        );
    });
    assert!(ids.into_iter().eq(1..=made.cast_signed()), "a row is lost");

    for (order, complete, mut taken) in replays {
        match order {
            ReplayOrder::Commit => {}
            ReplayOrder::PerKey => taken.sort_unstable(),
        }
        let end = *taken.last().unwrap();
        assert!(end.1 >= complete, "{order:?} ended before what was there when it began");
        assert!(
            taken.iter().eq(log.range(..=end)),
            "{order:?}: lost, doubled or out of order"
        );
    }
}

/// Waits until so many changes are in Kafka.
async fn published(pipeline: &CaptureConfig, changes: u64) {
    eventually("changes flow", LIMIT, async || {
        let published = checkpoint(pipeline).map_or(0, |checkpoint| checkpoint.events_total);
        match published >= changes {
            true => Ok(()),
            false => Err(format!("{published} of {changes}")),
        }
    })
    .await;
}

/// Inserts rows until told to stop; says how many there are then.
fn load(postgres: &Postgres) -> (watch::Sender<bool>, JoinHandle<u64>) {
    let (stop, stopped) = watch::channel(false);
    let url = postgres.url();
    let load = tokio::spawn(async move {
        let (client, driver) = tokio_postgres::connect(&url, tokio_postgres::NoTls).await.unwrap();
        tokio::spawn(driver);
        let mut made = ROWS;
        let mut pace = interval(PAUSE);
        while !*stopped.borrow() {
            pace.tick().await;
            let (first, last) = (made + 1, made + MORE);
            let insert = format!("INSERT INTO t SELECT id, 'y' FROM generate_series({first}, {last}) id");
            client.batch_execute(&insert).await.unwrap();
            made = last;
        }
        made.cast_unsigned()
    });
    (stop, load)
}

/// A replay of everything into a receiver that has taken the first message, and not answered it.
struct Replay {
    receiver: Receiver,
    server: JoinHandle<Result<(), tonic::transport::Error>>,
    replay: JoinHandle<End>,
}

impl Replay {
    async fn start(pipeline: &CaptureConfig, order: ReplayOrder) -> Self {
        let listener = TcpListener::bind("127.0.0.1:0").await.unwrap();
        let endpoint = format!("http://{}", listener.local_addr().unwrap());
        let receiver = Receiver {
            taken: Arc::default(),
            begun: watch::channel(false).0,
            goes_on: watch::channel(false).0,
        };
        let server = Server::builder()
            .add_service(ReplayReceiverServer::new(receiver.clone()))
            .serve_with_incoming(TcpListenerStream::new(listener));
        let server = tokio::spawn(server);
        let mut job = replay::everything(pipeline, ReplayTarget::GrpcCall(GrpcReceiver::plain(endpoint)));
        job.order = order;
        let replay = tokio::spawn(async move { replay::replay(&job).await.unwrap() });
        let mut begun = receiver.begun.subscribe();
        timeout(LIMIT, begun.wait_for(|begun| *begun)).await.unwrap().unwrap();
        Self {
            receiver,
            server,
            replay,
        }
    }

    /// Has it go on to its end; what was delivered, in that order.
    async fn go_on(self) -> Vec<Place> {
        self.receiver.goes_on.send_replace(true);
        assert_eq!(self.replay.await.unwrap(), End::Complete);
        self.server.abort();
        std::mem::take(&mut *self.receiver.taken.lock().unwrap())
    }
}

#[derive(Clone)]
struct Receiver {
    taken: Arc<Mutex<Vec<Place>>>,
    begun: watch::Sender<bool>,
    goes_on: watch::Sender<bool>,
}

#[tonic::async_trait]
impl ReplayReceiver for Receiver {
    type DeliverStream = ReceiverStream<Result<DeliverAck, Status>>;

    async fn deliver(&self, request: Request<Streaming<ReplayEvent>>) -> Result<Response<Self::DeliverStream>, Status> {
        let mut events = request.into_inner();
        let (answer, answers) = mpsc::channel(16);
        let receiver = self.clone();
        tokio::spawn(async move {
            let mut goes_on = receiver.goes_on.subscribe();
            while let Some(event) = events.message().await.unwrap() {
                let places = event.records.iter().map(|record| place(record.coordinate.unwrap()));
                receiver.taken.lock().unwrap().extend(places);
                receiver.begun.send_replace(true);
                goes_on.wait_for(|goes_on| *goes_on).await.unwrap();
                let resume_token = event.resume_token;
                answer.send(Ok(DeliverAck { resume_token })).await.unwrap();
            }
        });
        Ok(Response::new(ReceiverStream::new(answers)))
    }
}

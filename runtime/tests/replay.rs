//! Replays against a real Kafka, with a receiver, a subscriber and an operator that stand in for the user's.

#![allow(clippy::unwrap_used, clippy::expect_used, clippy::panic)]

#[path = "common/operator.rs"]
mod operator;

use std::{
    collections::BTreeMap,
    net::SocketAddr,
    num::NonZeroU32,
    path::{Path, PathBuf},
    process::{Child, Command},
    sync::{
        Arc, Mutex,
        atomic::{AtomicUsize, Ordering},
    },
    time::Duration,
};

use meander_config::{
    ClientCertificate, GrpcReceiver, KafkaCluster, KafkaLog, KafkaSink, OperatorLink, RecordOffset, RedisStreams,
    ReplayConfig, ReplayEnd, ReplayFilter, ReplayOrder, ReplayStart, ReplayTarget, ResourceIdentity, Speed,
    TableSelection, TopicManagement,
};
use meander_proto::v1::{
    ChangeRecord, Column, DeliverAck, Directive, Operation, ProgressUpdate, Relation, ReplayEvent, ReplayProgress,
    ReplayRequest, ReplayedRecord, Row, TopicProgress, Value,
    progress_tracker_server::ProgressTrackerServer,
    replay_progress::Phase,
    replay_receiver_server::{ReplayReceiver, ReplayReceiverServer},
    replayer_client::ReplayerClient,
    value::Kind,
};
use meander_runtime::{
    checkpoint::{Tail, read_checkpoint},
    log::{
        COMMIT_TIME_HEADER, Checkpoint, PART_HEADER, POSITION_HEADER, SnapshotState, checkpoint_key, checkpoint_topic,
        topic_name,
    },
    position::{Epoch, Lsn, Position},
    progress,
    replay::{self, End, error::ReplayError, record::ResumeToken},
};
use meander_test_support::{Authority, Kafka, Runtime, Signal, eventually, free_address, unique_name};
use meander_workload::{receive::position, subscribe::Line};
use operator::Operator;
use prost::Message as _;
use rdkafka::{
    Message as _, Offset, TopicPartitionList,
    admin::{AdminClient, AdminOptions, NewTopic, TopicReplication},
    client::DefaultClientContext,
    consumer::{BaseConsumer, Consumer as _},
    message::{Header, OwnedHeaders},
    producer::{BaseProducer, BaseRecord, Producer as _},
};
use tokio::{
    net::TcpListener,
    sync::{Semaphore, mpsc, watch},
    task::JoinHandle,
    time::timeout,
};
use tokio_stream::{
    StreamExt as _,
    wrappers::{ReceiverStream, TcpListenerStream},
};
use tokio_util::sync::CancellationToken;
use tonic::{
    Request, Response, Status, Streaming,
    transport::{Certificate, ClientTlsConfig, Identity, Server, ServerTlsConfig},
};

/// Whatever is waited for either comes well before this, or never.
const LIMIT: Duration = Duration::from_secs(240);
const SECOND: i64 = 1_000_000;
/// The commit time of the first transaction: 2025-11-20T10:00:00Z.
const START: i64 = 1_763_632_800 * SECOND;
const SLOT: &str = "meander_test";

/// One record, as a test writes it.
#[derive(Clone, Debug, PartialEq, Eq)]
struct Change {
    position: Position,
    part: u32,
    commit_time: i64,
    table: &'static str,
    partition: i32,
}

fn change(lsn: u64, ordinal: u64, commit_time: i64, table: &'static str, partition: i32) -> Change {
    let position = Position {
        epoch: Epoch::FIRST,
        commit_lsn: Lsn(lsn),
        ordinal,
    };
    Change {
        position,
        part: 0,
        commit_time,
        table,
        partition,
    }
}

/// A log as a pipeline writes it, by other means: one producer, transactions, a checkpoint in each.
struct Log {
    kafka: &'static Kafka,
    pipeline: ResourceIdentity,
    prefix: String,
    producer: BaseProducer,
    /// The running maximum of the commit times.
    high_time: i64,
    complete: Option<Position>,
    events: u64,
    value: fn(&Change) -> Vec<u8>,
    /// What is about every row of its topic.
    is_keyless: fn(&Change) -> bool,
}

/// Topics of every test's pipeline and their partitions. Nothing is ever written to `empty`.
const TABLES: [(&str, i32); 3] = [("trades", 3), ("orders", 1), ("empty", 2)];

impl Log {
    async fn new() -> Self {
        let kafka = Kafka::shared().await;
        let prefix = unique_name("shop");
        let pipeline = ResourceIdentity {
            namespace: "default".to_owned(),
            name: prefix.clone(),
            uid: String::new(),
        };
        let admin: AdminClient<DefaultClientContext> = kafka.client_config().create().unwrap();
        let data: Vec<_> = TABLES
            .iter()
            .map(|(table, partitions)| (topic_name(&prefix, "public", table), *partitions))
            .collect();
        let checkpoints = checkpoint_topic(&pipeline.namespace, &pipeline.name);
        let mut topics: Vec<_> = data
            .iter()
            .map(|(name, partitions)| {
                NewTopic::new(name, *partitions, TopicReplication::Fixed(1)).set("retention.ms", "-1")
            })
            .collect();
        topics.push(NewTopic::new(&checkpoints, 1, TopicReplication::Fixed(1)).set("cleanup.policy", "compact"));
        for created in admin.create_topics(&topics, &AdminOptions::new()).await.unwrap() {
            created.unwrap();
        }
        let producer = producer(kafka, &checkpoint_key(&pipeline.namespace, &pipeline.name, SLOT));
        Self {
            kafka,
            pipeline,
            prefix,
            producer,
            high_time: 0,
            complete: None,
            events: 0,
            value: |change| format!("value of {}", change.position).into_bytes(),
            is_keyless: |_| false,
        }
    }

    fn topic(&self, table: &str) -> String {
        topic_name(&self.prefix, "public", table)
    }

    /// Commits the changes of one source transaction, with the checkpoint.
    fn commit(&mut self, changes: &[Change]) {
        self.producer.begin_transaction().unwrap();
        for change in changes {
            self.high_time = self.high_time.max(change.commit_time);
            self.send(&self.producer, change);
        }
        let last = changes.last().unwrap().position;
        self.complete = Some(Position::end_of_transaction(last.epoch, last.commit_lsn));
        self.events += u64::try_from(changes.len()).unwrap();
        self.send_checkpoint(&self.key(), last);
        self.producer.commit_transaction(LIMIT).unwrap();
    }

    /// Writes changes that never were, as a pipeline does whose transaction fails.
    fn abort(&self, changes: &[Change]) {
        self.producer.begin_transaction().unwrap();
        for change in changes {
            self.send(&self.producer, change);
        }
        self.producer.flush(LIMIT).unwrap();
        self.producer.abort_transaction(LIMIT).unwrap();
    }

    fn send(&self, producer: &BaseProducer, change: &Change) {
        let (position, part, commit_time) = (
            change.position.to_string(),
            change.part.to_string(),
            change.commit_time.to_string(),
        );
        let mut headers = OwnedHeaders::new()
            .insert(Header {
                key: POSITION_HEADER,
                value: Some(&position),
            })
            .insert(Header {
                key: COMMIT_TIME_HEADER,
                value: Some(&commit_time),
            });
        if change.part > 0 {
            headers = headers.insert(Header {
                key: PART_HEADER,
                value: Some(&part),
            });
        }
        let (topic, payload) = (self.topic(change.table), (self.value)(change));
        let mut record = BaseRecord::<str, _>::to(&topic)
            .partition(change.partition)
            .payload(&payload)
            .timestamp(self.high_time.max(change.commit_time) / 1000)
            .headers(headers);
        if !(self.is_keyless)(change) {
            record = record.key("key");
        }
        producer.send(record).map_err(|(error, _)| error).unwrap();
    }

    fn send_checkpoint(&self, key: &str, published: Position) {
        let checkpoint = Checkpoint {
            epoch: 1,
            partings: vec![],
            system_identifier: "7".to_owned(),
            timeline: 1,
            major_version: 17,
            database_oid: 5,
            ended_at: None,
            owner_generation: 1,
            published: Some(published),
            complete: self.complete,
            redis: None,
            acknowledged: published.commit_lsn,
            high_time_micros: self.high_time,
            events_total: self.events,
            snapshot: SnapshotState::default(),
            records_total: self.events,
            partitions: None,
            released: false,
            accepted_gap: None,
            oversized: Default::default(),
        };
        let topic = checkpoint_topic(&self.pipeline.namespace, &self.pipeline.name);
        let value = serde_json::to_vec(&checkpoint).unwrap();
        self.producer
            .send(BaseRecord::to(&topic).partition(0).key(key).payload(&value))
            .map_err(|(error, _)| error)
            .unwrap();
    }

    fn key(&self) -> String {
        checkpoint_key(&self.pipeline.namespace, &self.pipeline.name, SLOT)
    }

    fn config(&self, target: ReplayTarget) -> ReplayConfig {
        ReplayConfig {
            job: ResourceIdentity {
                namespace: "default".to_owned(),
                name: unique_name("job"),
                uid: "42".to_owned(),
            },
            pipeline: self.pipeline.clone(),
            slot_name: SLOT.to_owned(),
            kafka: KafkaLog {
                bootstrap_servers: vec![self.kafka.bootstrap()],
                tls: None,
                sasl: None,
                topic_prefix: self.prefix.clone(),
            },
            from: ReplayStart::Beginning,
            to: ReplayEnd::Now,
            speed: Speed::Max,
            suspended: false,
            filter: None,
            max_gap_seconds: None,
            order: ReplayOrder::Commit,
            target,
            operator: None,
            admin_address: SocketAddr::from(([127, 0, 0, 1], 0)),
            termination_message_file: None,
        }
    }

    /// Deletes the records of a partition before an offset, as retention does.
    async fn truncate(&self, table: &str, partition: i32, before: i64) {
        self.delete(table, partition, Offset::Offset(before)).await;
    }

    async fn delete(&self, table: &str, partition: i32, before: Offset) {
        let admin: AdminClient<DefaultClientContext> = self.kafka.client_config().create().unwrap();
        let mut offsets = TopicPartitionList::new();
        offsets
            .add_partition_offset(&self.topic(table), partition, before)
            .unwrap();
        admin.delete_records(&offsets, &AdminOptions::new()).await.unwrap();
    }
}

fn producer(kafka: &Kafka, transactional_id: &str) -> BaseProducer {
    let producer: BaseProducer = kafka
        .client_config()
        .set("transactional.id", transactional_id)
        .create()
        .unwrap();
    producer.init_transactions(LIMIT).unwrap();
    producer
}

/// Thirty transactions, each a minute after the other but for some whose commit times run backwards; with idle partitions, a
/// key change, transactions over several topics, and some that were tried, aborted and written again.
fn history() -> Vec<Vec<Change>> {
    let mut transactions = Vec::new();
    for number in 0..30_u64 {
        let lsn = 0x100 + number * 0x10;
        let minute = START + i64::try_from(number).unwrap() * 60 * SECOND;
        let commit_time = if number % 4 == 3 { minute - 90 * SECOND } else { minute };
        let mut transaction = Vec::new();
        for ordinal in 0..=number % 5 {
            // Partition 2 of the trades is idle after the beginning.
            let (table, partition) = match (number + ordinal) % 4 {
                0 => ("orders", 0),
                1 if number < 5 => ("trades", 2),
                n => ("trades", i32::try_from(n % 2).unwrap()),
            };
            transaction.push(change(lsn, ordinal, commit_time + 123, table, partition));
        }
        if number % 7 == 0 {
            let mut second = transaction.last().unwrap().clone();
            second.part = 1;
            second.partition = 0;
            second.table = "orders";
            transaction.push(second);
        }
        transactions.push(transaction);
    }
    transactions
}

async fn log_with_history() -> (Log, Vec<Change>) {
    log_of(|change| format!("value of {}", change.position).into_bytes()).await
}

async fn log_of(value: fn(&Change) -> Vec<u8>) -> (Log, Vec<Change>) {
    let mut log = Log {
        value,
        ..Log::new().await
    };
    let history = history();
    for (number, transaction) in history.iter().enumerate() {
        if number % 6 == 1 {
            log.abort(transaction);
        }
        log.commit(transaction);
    }
    (log, history.concat())
}

/// What a test compares: a delivered record without where it was stored.
fn change_of(record: &ReplayedRecord) -> (String, u32, i64) {
    let (position, part, commit_time) = place_of(record);
    assert_eq!(record.value, format!("value of {position}"));
    assert_eq!(record.key, "key");
    (position, part, commit_time)
}

fn place_of(record: &ReplayedRecord) -> (String, u32, i64) {
    let coordinate = record.coordinate.as_ref().unwrap();
    (position(coordinate), coordinate.part, record.commit_time_micros)
}

fn expected<'a>(changes: impl IntoIterator<Item = &'a Change>) -> Vec<(String, u32, i64)> {
    changes
        .into_iter()
        .map(|change| (change.position.to_string(), change.part, change.commit_time))
        .collect()
}

fn serving(address: SocketAddr, token_file: PathBuf) -> ReplayTarget {
    ReplayTarget::GrpcServe {
        address,
        token_file,
        certificate: None,
    }
}

/// A user's server that remembers what it was given.
#[derive(Clone)]
struct Receiver {
    address: SocketAddr,
    /// With its topic.
    received: Arc<Mutex<Vec<(String, ReplayedRecord)>>>,
    /// One is used up by each answer.
    answers: Arc<Semaphore>,
    /// Streams that end with an error instead of an answer.
    breaks: Arc<AtomicUsize>,
    arrivals: watch::Sender<usize>,
    /// Records in messages that were answered.
    answered: watch::Sender<u64>,
    /// Calls that have not ended.
    calls: watch::Sender<usize>,
}

impl Receiver {
    async fn start() -> Self {
        let listener = TcpListener::bind("127.0.0.1:0").await.unwrap();
        let receiver = Self {
            address: listener.local_addr().unwrap(),
            received: Arc::default(),
            answers: Arc::new(Semaphore::new(Semaphore::MAX_PERMITS)),
            breaks: Arc::default(),
            arrivals: watch::channel(0).0,
            answered: watch::channel(0).0,
            calls: watch::channel(0).0,
        };
        let server = Server::builder()
            .add_service(ReplayReceiverServer::new(receiver.clone()))
            .serve_with_incoming(TcpListenerStream::new(listener));
        tokio::spawn(server);
        receiver
    }

    fn target(&self) -> ReplayTarget {
        ReplayTarget::GrpcCall(GrpcReceiver::plain(format!("http://{}", self.address)))
    }

    fn changes(&self) -> Vec<(String, u32, i64)> {
        let received = self.received.lock().unwrap();
        received.iter().map(|(_, record)| change_of(record)).collect()
    }

    /// What came since the last time, and forgets it.
    fn take(&self) -> Vec<(String, u32, i64)> {
        self.take_records()
            .iter()
            .map(|(_, record)| change_of(record))
            .collect()
    }

    fn take_records(&self) -> Vec<(String, ReplayedRecord)> {
        let taken = std::mem::take(&mut *self.received.lock().unwrap());
        self.arrivals.send_replace(0);
        taken
    }

    async fn until(&self, records: usize) {
        timeout(LIMIT, self.arrivals.subscribe().wait_for(|arrived| *arrived >= records))
            .await
            .unwrap()
            .unwrap();
    }

    async fn answer(&self, mut events: Streaming<ReplayEvent>, answer: mpsc::Sender<Result<DeliverAck, Status>>) {
        while let Some(Ok(event)) = events.next().await {
            let records = u64::try_from(event.records.len()).unwrap();
            let arrived = {
                let mut received = self.received.lock().unwrap();
                let topic = |record: &ReplayedRecord| event.topics[usize::try_from(record.topic).unwrap()].clone();
                received.extend(event.records.into_iter().map(|record| (topic(&record), record)));
                received.len()
            };
            self.arrivals.send_replace(arrived);
            if self.breaks.load(Ordering::Relaxed) > 0 {
                self.breaks.fetch_sub(1, Ordering::Relaxed);
                let _ = answer.send(Err(Status::unavailable("restarting"))).await;
                return;
            }
            tokio::select! {
                permit = self.answers.acquire() => permit.unwrap().forget(),
                () = answer.closed() => return,
            }
            self.answered.send_modify(|answered| *answered += records);
            let token = event.resume_token;
            if answer.send(Ok(DeliverAck { resume_token: token })).await.is_err() {
                return;
            }
        }
    }

    /// Until nobody calls, so that nothing more comes from a replay that was killed.
    async fn until_left(&self) {
        timeout(LIMIT, self.calls.subscribe().wait_for(|calls| *calls == 0))
            .await
            .unwrap()
            .unwrap();
    }
}

#[tonic::async_trait]
impl ReplayReceiver for Receiver {
    type DeliverStream = ReceiverStream<Result<DeliverAck, Status>>;

    async fn deliver(&self, request: Request<Streaming<ReplayEvent>>) -> Result<Response<Self::DeliverStream>, Status> {
        let events = request.into_inner();
        let (answer, answers) = mpsc::channel(1);
        let receiver = self.clone();
        receiver.calls.send_modify(|calls| *calls += 1);
        tokio::spawn(async move {
            receiver.answer(events, answer).await;
            receiver.calls.send_modify(|calls| *calls -= 1);
        });
        Ok(Response::new(ReceiverStream::new(answers)))
    }
}

async fn replay(config: ReplayConfig) -> Result<End, ReplayError> {
    timeout(LIMIT, replay::run(config, CancellationToken::new()))
        .await
        .expect("the replay does not end")
}

fn start(config: ReplayConfig) -> JoinHandle<Result<End, ReplayError>> {
    tokio::spawn(replay(config))
}

fn time(micros: i64) -> String {
    jiff::Timestamp::from_microsecond(micros).unwrap().to_string()
}

#[tokio::test(flavor = "multi_thread")]
async fn the_whole_log_comes_once_in_commit_order_and_its_end_is_told() {
    let (log, changes) = log_with_history().await;
    let receiver = Receiver::start().await;
    let operator = Operator::start(Directive::default()).await;
    let folder = tempfile::tempdir().unwrap();
    let word = folder.path().join("termination-log");
    let config = ReplayConfig {
        operator: operator.link(&folder),
        termination_message_file: Some(word.clone()),
        // Without the cut of silences, half an hour would take longer than anybody waits here.
        speed: Speed::Factor(20.0),
        max_gap_seconds: NonZeroU32::new(1),
        ..log.config(receiver.target())
    };
    assert_eq!(replay(config).await.unwrap(), End::Complete);
    assert_eq!(receiver.changes(), expected(&changes));

    let last = changes.last().unwrap();
    let delivered = u64::try_from(changes.len()).unwrap();
    let progress = operator.reported(|progress| progress.phase() == Phase::Succeeded).await;
    assert_eq!((progress.delivered, progress.percent), (delivered, 100.0));
    assert_eq!(progress.current_position, last.position.to_string());
    assert_eq!(progress.first_event_time_micros, START + 123);
    let range = progress.resolved_range.unwrap();
    assert!(range.offsets >= delivered);
    assert_eq!(range.to_time_micros, log.high_time);
    assert_eq!(
        operator.conditions(),
        BTreeMap::from([("Complete".to_owned(), "Delivered".to_owned())])
    );

    let word: serde_json::Value = serde_json::from_slice(&std::fs::read(word).unwrap()).unwrap();
    assert_eq!(word["phase"], "Succeeded");
    assert_eq!(word["delivered"], delivered);
    assert_eq!(word["currentPosition"], last.position.to_string());
}

#[tokio::test(flavor = "multi_thread")]
async fn ranges_that_touch_share_nothing_leave_nothing_out_and_split_no_transaction() {
    let (log, changes) = log_with_history().await;
    // The last one is later than everything that is published.
    let cuts = [0, 1, 60, 61, 9 * 60 + 30, 20 * 60, 400 * 60].map(|seconds| START + seconds * SECOND);
    let mut high_time = 0;
    let timed: Vec<(i64, &Change)> = changes
        .iter()
        .map(|change| {
            high_time = high_time.max(change.commit_time);
            (high_time / 1000 * 1000, change)
        })
        .collect();
    let mut all = Vec::new();
    for pair in cuts.windows(2) {
        let receiver = Receiver::start().await;
        let config = ReplayConfig {
            from: ReplayStart::Time(time(pair[0])),
            to: ReplayEnd::Time(time(pair[1])),
            ..log.config(receiver.target())
        };
        assert_eq!(replay(config).await.unwrap(), End::Complete);
        let inside = timed
            .iter()
            .filter(|(time, _)| (pair[0]..pair[1]).contains(time))
            .map(|(_, change)| *change);
        assert_eq!(
            receiver.changes(),
            expected(inside),
            "from {} to {}",
            time(pair[0]),
            time(pair[1])
        );
        all.extend(receiver.changes());
    }
    assert_eq!(all, expected(&changes));
}

#[tokio::test(flavor = "multi_thread")]
async fn a_range_by_positions_or_records_holds_their_transactions_as_a_whole() {
    let (log, changes) = log_with_history().await;
    let of = |transactions: std::ops::RangeInclusive<u64>| {
        let lsns = transactions.start() * 0x10 + 0x100..=transactions.end() * 0x10 + 0x100;
        expected(
            changes
                .iter()
                .filter(|change| lsns.contains(&change.position.commit_lsn.0)),
        )
    };
    let transaction = |number: u64| Lsn(0x100 + number * 0x10);
    // The middle of a transaction, one that nobody made, and one after everything.
    let middle = |number| ReplayStart::Position(format!("1:{}:2", transaction(number)));
    let until = |number| ReplayEnd::Position(format!("1:{}:0", transaction(number)));
    let between = ReplayStart::Position(format!("1:{}:0", Lsn(transaction(8).0 + 8)));
    let operator = Operator::start(Directive::default()).await;
    let folder = tempfile::tempdir().unwrap();
    let replayed = async |from: ReplayStart, to: ReplayEnd| {
        let receiver = Receiver::start().await;
        operator.update.send_replace(ProgressUpdate::default());
        let config = ReplayConfig {
            from,
            to,
            operator: operator.link(&folder),
            ..log.config(receiver.target())
        };
        assert_eq!(replay(config).await.unwrap(), End::Complete);
        let progress = operator.reported(|progress| progress.phase() == Phase::Succeeded).await;
        (receiver.changes(), progress.resolved_range.unwrap())
    };
    let (taken, resolved) = replayed(middle(4), until(13)).await;
    assert_eq!(taken, of(4..=13));
    let end = START + 13 * 60 * SECOND;
    assert_eq!(
        resolved.to_time_micros / 1000,
        (end + 123) / 1000,
        "as the last change of it was committed"
    );
    let (_, whole) = replayed(ReplayStart::Beginning, ReplayEnd::Now).await;
    assert!(
        resolved.offsets * 2 < whole.offsets,
        "the stretches are cut: {resolved:?} of {whole:?}"
    );
    assert_eq!(replayed(between, until(29)).await.0, of(9..=29));
    assert_eq!(replayed(ReplayStart::Beginning, until(0)).await.0, of(0..=0));
    assert_eq!(replayed(middle(29), until(500)).await.0, of(29..=29));
    assert_eq!(replayed(middle(30), until(500)).await.0, []);

    // By records: each transaction that has one in the orders is found by its offset.
    let mut receiver = Receiver::start().await;
    assert_eq!(replay(log.config(receiver.target())).await.unwrap(), End::Complete);
    let orders = log.topic("orders");
    let record = |number: u64| {
        let received = receiver.received.lock().unwrap();
        let lsn = format!("1:{}:", transaction(number));
        let found = received
            .iter()
            .find(|(topic, record)| *topic == orders && place_of(record).0.starts_with(&lsn))
            .map(|(_, record)| record)
            .unwrap();
        RecordOffset {
            topic: orders.clone(),
            partition: found.partition,
            offset: found.offset,
        }
    };
    let (from, to) = (record(3), record(20));
    assert_eq!(
        replayed(ReplayStart::Offset(from.clone()), ReplayEnd::Offset(to.clone()))
            .await
            .0,
        of(3..=20)
    );
    // What follows a transaction's last record is the mark of its end, which nobody can read.
    let last = |offset: &RecordOffset| RecordOffset {
        offset: offset.offset + 1,
        ..offset.clone()
    };
    let (mark, _) = replayed(ReplayStart::Offset(from.clone()), ReplayEnd::Offset(last(&from))).await;
    assert!(mark.starts_with(&of(3..=3)), "{mark:?}");

    receiver = Receiver::start().await;
    for (bad, reason) in [
        (
            ReplayStart::Offset(RecordOffset {
                offset: 1 << 40,
                ..to.clone()
            }),
            "NoSuchRecord",
        ),
        (
            ReplayStart::Offset(RecordOffset {
                partition: 77,
                ..to.clone()
            }),
            "NoSuchRecord",
        ),
        (
            ReplayStart::Offset(RecordOffset {
                topic: "elsewhere".to_owned(),
                ..to.clone()
            }),
            "NoSuchRecord",
        ),
        (ReplayStart::Position("1:0/10".to_owned()), "InvalidPosition"),
        (middle(14), "EmptyRange"),
    ] {
        let config = ReplayConfig {
            from: bad,
            to: until(13),
            ..log.config(receiver.target())
        };
        let error = replay(config).await.unwrap_err();
        assert_eq!(error.reason(), reason, "{error}");
        assert!(error.is_permanent());
    }
}

#[tokio::test(flavor = "multi_thread")]
async fn a_range_that_holds_nothing_succeeds_with_nothing() {
    let (log, _) = log_with_history().await;
    for (from, to) in [
        (START + SECOND, START + 2 * SECOND),
        (START + 1000 * 60 * SECOND, START + 2000 * 60 * SECOND),
    ] {
        let receiver = Receiver::start().await;
        let config = ReplayConfig {
            from: ReplayStart::Time(time(from)),
            to: ReplayEnd::Time(time(to)),
            ..log.config(receiver.target())
        };
        let operator = Operator::start(Directive::default()).await;
        let folder = tempfile::tempdir().unwrap();
        let config = ReplayConfig {
            operator: operator.link(&folder),
            ..config
        };
        assert_eq!(replay(config).await.unwrap(), End::Complete);
        assert_eq!(receiver.changes(), []);
        operator.reported(|progress| progress.phase() == Phase::Succeeded).await;
        assert_eq!(operator.conditions()["Complete"], "NothingInRange");
    }
}

#[tokio::test(flavor = "multi_thread")]
async fn what_is_written_after_the_start_and_what_is_not_decided_is_not_in_it() {
    let (mut log, changes) = log_with_history().await;
    // Another owner's transaction is open in a partition of the range, and holds up everybody who reads there.
    let other = producer(log.kafka, &unique_name("other"));
    other.begin_transaction().unwrap();
    log.send(&other, &change(0x5000, 0, START + 9000 * SECOND, "orders", 0));
    other.flush(LIMIT).unwrap();

    let receiver = Receiver::start().await;
    let operator = Operator::start(Directive::default()).await;
    let folder = tempfile::tempdir().unwrap();
    let config = ReplayConfig {
        operator: operator.link(&folder),
        ..log.config(receiver.target())
    };
    let replay = start(config);
    operator.reported(|progress| progress.phase() == Phase::Pending).await;
    other.abort_transaction(LIMIT).unwrap();
    // The range is frozen once it is resolved; this one is after it, wherever the replay is by now.
    operator.reported(|progress| progress.resolved_range.is_some()).await;
    log.commit(&[change(0x6000, 0, START + 9001 * SECOND, "orders", 0)]);
    assert_eq!(replay.await.unwrap().unwrap(), End::Complete);
    assert_eq!(receiver.changes(), expected(&changes));
}

#[tokio::test(flavor = "multi_thread")]
async fn it_is_paused_let_go_and_hurried_while_it_runs() {
    let mut log = Log::new().await;
    // A change every 10 ms.
    let changes: Vec<Change> = (long_history(20_000).into_iter().zip(0..))
        .map(|(change, number)| Change {
            commit_time: START + number * SECOND / 100,
            ..change
        })
        .collect();
    for part in changes.chunks(500) {
        log.commit(part);
    }
    let receiver = Receiver::start().await;
    let held = Directive {
        paused: true,
        speed: "1".to_owned(),
        ..Directive::default()
    };
    let going = Directive {
        paused: false,
        ..held.clone()
    };
    let operator = Operator::start(held.clone()).await;
    let folder = tempfile::tempdir().unwrap();
    let config = ReplayConfig {
        speed: Speed::Original,
        suspended: true,
        operator: operator.link(&folder),
        ..log.config(receiver.target())
    };
    let replay = start(config);
    let progress = operator
        .reported(|progress| progress.phase() == Phase::Paused && progress.resolved_range.is_some())
        .await;
    assert_eq!(progress.delivered, 0);

    operator.directive.send_replace(going.clone());
    let progress = operator
        .reported(|progress| progress.phase() == Phase::Running && progress.delivered > 20)
        .await;
    assert!(progress.percent < 90.0 && progress.eta_seconds > 10, "{progress:?}");
    // In the middle of the flow nothing more comes, while as much as a second brings comes to somebody else.
    operator.directive.send_replace(held);
    operator.reported(|progress| progress.phase() == Phase::Paused).await;
    let other = Receiver::start().await;
    let beside = start(ReplayConfig {
        speed: Speed::Original,
        ..log.config(other.target())
    });
    // What was handed over before is answered by then.
    other.until(1).await;
    let before = receiver.changes().len();
    other.until(100).await;
    beside.abort();
    assert_eq!(receiver.changes().len(), before);
    assert_eq!(receiver.changes(), expected(&changes[..before]));

    operator.directive.send_replace(going);
    receiver.until(before + 20).await;
    operator.directive.send_replace(Directive {
        speed: "max".to_owned(),
        ..Directive::default()
    });
    assert_eq!(replay.await.unwrap().unwrap(), End::Complete);
    assert_eq!(receiver.changes(), expected(&changes));
}

#[tokio::test(flavor = "multi_thread")]
async fn it_is_cancelled_or_interrupted_while_it_waits() {
    let (log, changes) = log_with_history().await;
    let folder = tempfile::tempdir().unwrap();
    let receiver = Receiver::start().await;
    let operator = Operator::start(Directive::default()).await;
    let config = ReplayConfig {
        speed: Speed::Original,
        operator: operator.link(&folder),
        ..log.config(receiver.target())
    };
    let replay = start(config.clone());
    operator
        .reported(|progress| progress.phase() == Phase::Running && progress.delivered > 0)
        .await;
    operator.directive.send_replace(Directive {
        cancel: true,
        ..Directive::default()
    });
    assert_eq!(replay.await.unwrap().unwrap(), End::Cancelled);
    operator.reported(|progress| progress.phase() == Phase::Cancelled).await;
    assert!(receiver.changes().len() < changes.len());

    let shutdown = CancellationToken::new();
    let word = folder.path().join("termination-log");
    let config = ReplayConfig {
        operator: None,
        termination_message_file: Some(word.clone()),
        ..config
    };
    let before = receiver.changes().len();
    let replay = tokio::spawn(replay::run(config, shutdown.clone()));
    receiver.until(before + 1).await;
    shutdown.cancel();
    let result = timeout(LIMIT, replay).await.unwrap().unwrap();
    assert!(matches!(result, Err(ReplayError::Interrupted)), "{result:?}");
    let word: serde_json::Value = serde_json::from_slice(&std::fs::read(word).unwrap()).unwrap();
    assert_eq!(word["reason"], "Interrupted");
}

#[tokio::test(flavor = "multi_thread")]
async fn only_answered_records_count_as_delivered() {
    let (log, changes) = log_with_history().await;
    let receiver = Receiver::start().await;
    receiver.answers.forget_permits(Semaphore::MAX_PERMITS);
    let operator = Operator::start(Directive::default()).await;
    let folder = tempfile::tempdir().unwrap();
    let config = ReplayConfig {
        operator: operator.link(&folder),
        ..log.config(receiver.target())
    };
    let replay = start(config);
    receiver.until(1).await;
    let progress = operator.reported(|progress| progress.phase() == Phase::Running).await;
    assert_eq!(progress.delivered, 0);
    receiver.answers.add_permits(1000);
    assert_eq!(replay.await.unwrap().unwrap(), End::Complete);
    let progress = operator.reported(|progress| progress.phase() == Phase::Succeeded).await;
    assert_eq!(progress.delivered, u64::try_from(changes.len()).unwrap());
}

#[tokio::test(flavor = "multi_thread")]
async fn a_receiver_that_breaks_off_gets_everything_at_least_once_and_in_order() {
    let (log, changes) = log_with_history().await;
    let receiver = Receiver::start().await;
    receiver.breaks.store(2, Ordering::Relaxed);
    assert_eq!(replay(log.config(receiver.target())).await.unwrap(), End::Complete);

    let mut received = receiver.changes();
    let all = expected(&changes);
    assert!(received.len() > all.len(), "nothing was sent again");
    assert_eq!(received.split_off(received.len() - all.len()), all);
    assert!(received.iter().all(|change| all.contains(change)));
}

/// What the runtime may take, whatever it has read and nobody takes: to one receiver, and with as many subscribers as it serves.
const MEMORY_MIB: u64 = 256;
const SERVING_MIB: u64 = 480;
const SUBSCRIBERS: usize = 16;

#[tokio::test(flavor = "multi_thread")]
async fn a_receiver_that_is_silent_and_then_slow_costs_no_more_memory_and_neither_do_many_subscribers() {
    let mut log = Log {
        value: |_| vec![b'x'; 100_000],
        ..Log::new().await
    };
    // More than the runtime may take.
    let changes = long_history(3_500);
    for part in changes.chunks(50) {
        log.commit(part);
    }
    let receiver = Receiver::start().await;
    receiver.answers.forget_permits(Semaphore::MAX_PERMITS);
    let operator = Operator::start(Directive::default()).await;
    let folder = tempfile::tempdir().unwrap();
    let runtime = Runtime::replay(&ReplayConfig {
        operator: operator.link(&folder),
        admin_address: free_address(),
        ..log.config(receiver.target())
    });
    let silence = operator.condition("Progressing", "ReceiverSilent").await;
    assert!(!silence.status, "{silence:?}");
    let silent = runtime.peak_memory();
    let mut answered = receiver.answered.subscribe();
    for _ in 0..30 {
        let before = *answered.borrow_and_update();
        receiver.answers.add_permits(1);
        timeout(LIMIT, answered.wait_for(|answered| *answered > before))
            .await
            .unwrap()
            .unwrap();
        // Nor does the test need it.
        receiver.received.lock().unwrap().clear();
    }
    operator.condition("Progressing", "Replaying").await;
    let slow = runtime.peak_memory();
    println!("a silent receiver: {silent} MiB at most; then a slow one: {slow} MiB");
    assert!(
        slow < MEMORY_MIB,
        "{slow} MiB of memory, {silent} of them for a silent receiver"
    );
    drop(runtime);

    let token_file = folder.path().join("subscribers");
    std::fs::write(&token_file, "let-me-in").unwrap();
    let address = free_address();
    let runtime = Runtime::replay(&ReplayConfig {
        operator: operator.link(&folder),
        admin_address: free_address(),
        ..log.config(serving(address, token_file))
    });
    until_served(address).await;
    let subscribe = async || {
        let endpoint = tonic::transport::Endpoint::from_shared(format!("http://{address}")).unwrap();
        let channel = endpoint.connect().await.unwrap();
        let (requests, sent) = mpsc::channel(1);
        let credit = |credit| ReplayRequest {
            credit,
            ..ReplayRequest::default()
        };
        requests.send(credit(2)).await.unwrap();
        let mut request = Request::new(ReceiverStream::new(sent));
        let token = "Bearer let-me-in".parse().unwrap();
        request.metadata_mut().insert("authorization", token);
        let answer = ReplayerClient::new(channel).replay_event(request).await;
        answer.map(|answer| (requests, answer.into_inner()))
    };
    let mut subscriptions = Vec::new();
    for _ in 0..SUBSCRIBERS {
        subscriptions.push(subscribe().await.unwrap());
    }
    assert_eq!(subscribe().await.unwrap_err().code(), tonic::Code::ResourceExhausted);
    for (_, events) in &mut subscriptions {
        for _ in 0..2 {
            timeout(LIMIT, events.message()).await.unwrap().unwrap().unwrap();
        }
    }
    operator.condition("Progressing", "WaitingForCredit").await;
    let serving = runtime.peak_memory();
    println!("{SUBSCRIBERS} subscribers who give no more credit: {serving} MiB");
    assert!(serving < SERVING_MIB, "{serving} MiB of memory");
}

#[tokio::test(flavor = "multi_thread")]
async fn a_receiver_that_is_none_is_refused() {
    let (log, _) = log_with_history().await;
    let operator = Operator::start(Directive::default()).await;
    let folder = tempfile::tempdir().unwrap();
    let config = ReplayConfig {
        operator: operator.link(&folder),
        // It serves something else.
        ..log.config(ReplayTarget::GrpcCall(GrpcReceiver::plain(format!(
            "http://{}",
            operator.address
        ))))
    };
    let error = replay(config).await.unwrap_err();
    assert_eq!(error.reason(), "ReceiverRefused");
    operator.reported(|progress| progress.phase() == Phase::Failed).await;
    assert_eq!(
        operator.conditions(),
        BTreeMap::from([("Failed".to_owned(), "ReceiverRefused".to_owned())])
    );
}

#[tokio::test(flavor = "multi_thread")]
async fn a_target_that_is_away_is_told_while_it_is_tried_again() {
    let mut log = Log::new().await;
    log.commit(&[change(0x100, 0, START, "orders", 0)]);
    let operator = Operator::start(Directive::default()).await;
    let folder = tempfile::tempdir().unwrap();
    let url_file = folder.path().join("url");
    std::fs::write(&url_file, format!("redis://{}/0", free_address())).unwrap();
    let config = ReplayConfig {
        operator: operator.link(&folder),
        ..log.config(ReplayTarget::Redis(RedisStreams {
            url_file,
            ca_file: None,
            stream_prefix: unique_name("copy"),
        }))
    };
    let replay = start(config);
    let trouble = operator.condition("Progressing", "RedisUnreachable").await;
    assert!(
        !trouble.status && trouble.message.contains("tried again"),
        "{trouble:?}"
    );
    operator.directive.send_replace(Directive {
        cancel: true,
        ..Directive::default()
    });
    assert_eq!(replay.await.unwrap().unwrap(), End::Cancelled);
}

#[tokio::test(flavor = "multi_thread")]
async fn a_pipeline_without_a_checkpoint_has_no_log() {
    let log = Log::new().await;
    let receiver = Receiver::start().await;
    let config = log.config(receiver.target());
    assert_eq!(replay(config.clone()).await.unwrap_err().reason(), "NoDurableLog");
    let missing = ReplayConfig {
        pipeline: ResourceIdentity {
            name: "missing".to_owned(),
            ..config.pipeline
        },
        ..log.config(receiver.target())
    };
    assert_eq!(replay(missing).await.unwrap_err().reason(), "NoDurableLog");
}

#[tokio::test(flavor = "multi_thread")]
async fn a_start_that_kafka_no_longer_holds_is_said() {
    let (log, changes) = log_with_history().await;
    let cut = 6;
    log.truncate("orders", 0, cut).await;
    let operator = Operator::start(Directive::default()).await;
    let folder = tempfile::tempdir().unwrap();
    let receiver = Receiver::start().await;
    let config = ReplayConfig {
        from: ReplayStart::Time(time(START)),
        operator: operator.link(&folder),
        ..log.config(receiver.target())
    };
    // A process that finds nothing left to do says it as well.
    for _ in 0..2 {
        operator.update.send_replace(ProgressUpdate::default());
        assert_eq!(replay(config.clone()).await.unwrap(), End::Complete);
        operator.reported(|progress| progress.phase() == Phase::Succeeded).await;
        let truncated = operator.condition("TruncatedRange", "RetentionPassed").await;
        let kept = |change: &&Change| change.table == "orders" && change.commit_time > START + 4 * 60 * SECOND;
        let earliest = time(changes.iter().find(kept).unwrap().commit_time / 1000 * 1000);
        assert!(
            truncated.message.contains(&earliest),
            "{} {earliest}",
            truncated.message
        );
        let complete = operator.condition("Complete", "Delivered").await;
        assert!(complete.message.contains("TruncatedRange"), "{}", complete.message);
    }
    // The first transactions take one offset of the orders for each change and one for each end.
    let kept = |change: &&Change| change.table != "orders" || change.commit_time > START + 4 * 60 * SECOND;
    assert_eq!(receiver.changes(), expected(changes.iter().filter(kept)));

    // A range that starts after what was deleted is whole.
    let receiver = Receiver::start().await;
    let config = ReplayConfig {
        from: ReplayStart::Time(time(START + 20 * 60 * SECOND)),
        operator: operator.link(&folder),
        ..log.config(receiver.target())
    };
    operator.update.send_replace(ProgressUpdate::default());
    assert_eq!(replay(config).await.unwrap(), End::Complete);
    operator.reported(|progress| progress.phase() == Phase::Succeeded).await;
    assert!(
        !operator.conditions().contains_key("TruncatedRange"),
        "{:?}",
        operator.conditions()
    );
}

#[tokio::test(flavor = "multi_thread")]
async fn what_is_delivered_may_expire_between_attempts_and_what_is_not_is_missed() {
    let mut log = Log {
        value: row_of,
        ..Log::new().await
    };
    let later = START + 3600 * SECOND;
    // What the filter leaves out, what comes before a silence, and what comes after it: in the same partition, and in others that then go on
    // or have nothing more.
    log.commit(&[change(0x100, 0, START, "orders", 0)]);
    log.commit(&[change(0x110, 0, START, "trades", 1)]);
    log.commit(&[
        change(0x120, 0, START, "trades", 2),
        change(0x120, 1, START, "trades", 0),
    ]);
    log.commit(&[change(0x130, 0, later, "trades", 0)]);
    log.commit(&[change(0x140, 0, later, "trades", 1)]);
    let filter = ReplayFilter {
        tables: Some(TableSelection {
            include: vec!["public.trades".to_owned()],
            exclude: vec![],
        }),
        ..ReplayFilter::default()
    };
    let receiver = Receiver::start().await;
    let copy = |prefix: &str| {
        ReplayTarget::Kafka(KafkaSink {
            bootstrap_servers: vec![log.kafka.bootstrap()],
            tls: None,
            sasl: None,
            topic_prefix: prefix.to_owned(),
            partitions: 3,
            replication_factor: None,
            topic_config: BTreeMap::new(),
            topic_management: TopicManagement::Managed,
        })
    };
    let prefixes = [unique_name("copy"), unique_name("copy")];
    let targets = [copy(&prefixes[0]), receiver.target(), copy(&prefixes[1])];
    let mut jobs = Vec::new();
    for target in targets {
        let operator = Operator::start(Directive::default()).await;
        let folder = tempfile::tempdir().unwrap();
        let config = ReplayConfig {
            speed: Speed::Original,
            filter: Some(filter.clone()),
            operator: operator.link(&folder),
            ..log.config(target)
        };
        let shutdown = CancellationToken::new();
        let replay = tokio::spawn(replay::run(config.clone(), shutdown.clone()));
        operator.reported(|progress| progress.delivered == 3).await;
        shutdown.cancel();
        let result = timeout(LIMIT, replay).await.unwrap().unwrap();
        assert!(matches!(result, Err(ReplayError::Interrupted)), "{result:?}");
        jobs.push(ReplayConfig {
            speed: Speed::Max,
            operator: None,
            ..config
        });
    }
    // Each partition up to its next record, or to its end: with the marks of Kafka's transactions, which nobody is shown.
    log.delete("orders", 0, Offset::End).await;
    log.delete("trades", 2, Offset::End).await;
    log.truncate("trades", 0, 2).await;
    log.truncate("trades", 1, 2).await;
    assert_eq!(replay(jobs[0].clone()).await.unwrap(), End::Complete);
    let mut copied = 0;
    log.kafka.read(
        |topic| topic == topic_name(&prefixes[0], "public", "trades"),
        |_| copied += 1,
    );
    assert_eq!(copied, 5);
    assert_eq!(replay(jobs[1].clone()).await.unwrap(), End::Complete);
    assert_eq!(receiver.received.lock().unwrap().len(), 5);

    log.delete("trades", 0, Offset::End).await;
    let error = replay(jobs[2].clone()).await.unwrap_err();
    assert!(
        matches!(&error, ReplayError::LogTruncated { topic, partition: 0 } if *topic == log.topic("trades")),
        "{error}"
    );
}

#[tokio::test(flavor = "multi_thread")]
async fn a_log_that_is_not_in_order_or_not_a_pipelines_fails_the_replay() {
    let mut log = Log::new().await;
    log.commit(&[change(0x200, 0, START, "orders", 0)]);
    log.commit(&[change(0x100, 0, START, "orders", 0)]);
    log.commit(&[change(0x300, 0, START, "orders", 0)]);
    let receiver = Receiver::start().await;
    let error = replay(log.config(receiver.target())).await.unwrap_err();
    assert_eq!(error.reason(), "LogOutOfOrder", "{error}");

    let mut log = Log::new().await;
    log.commit(&[change(0x100, 0, START, "orders", 0)]);
    let topic = log.topic("orders");
    log.producer.begin_transaction().unwrap();
    log.producer
        .send(BaseRecord::<(), _>::to(&topic).partition(0).payload("foreign"))
        .unwrap();
    log.producer.commit_transaction(LIMIT).unwrap();
    log.commit(&[change(0x200, 0, START, "orders", 0)]);
    let error = replay(log.config(receiver.target())).await.unwrap_err();
    assert_eq!(error.reason(), "ForeignRecord", "{error}");
    assert!(error.to_string().contains(&topic), "{error}");
}

/// A row whose id is the number of the change in its transaction.
fn row_of(change: &Change) -> Vec<u8> {
    let id = Column {
        name: "id".to_owned(),
        key: true,
        ..Column::default()
    };
    let value = Value {
        kind: Some(Kind::Integer(i64::try_from(change.position.ordinal).unwrap())),
    };
    let record = ChangeRecord {
        operation: Operation::Insert.into(),
        relation: Some(Relation {
            schema: "public".to_owned(),
            table: change.table.to_owned(),
            columns: vec![id],
        }),
        after: Some(Row { values: vec![value] }),
        ..ChangeRecord::default()
    };
    record.encode_to_vec()
}

#[tokio::test(flavor = "multi_thread")]
async fn what_a_filter_leaves_out_is_counted_and_paces_nothing() {
    let (log, changes) = log_of(row_of).await;
    let receiver = Receiver::start().await;
    let operator = Operator::start(Directive {
        speed: "1".to_owned(),
        ..Directive::default()
    })
    .await;
    let folder = tempfile::tempdir().unwrap();
    // At the original pace all of it would take half an hour; what is kept was committed at one time.
    let kept: Vec<_> = (changes.iter())
        .filter(|change| {
            change.position.commit_lsn == Lsn(0x140) && change.table == "trades" && change.position.ordinal > 1
        })
        .collect();
    assert!(kept.len() > 1);
    let expression = format!(
        "after.id > 1 && commitTime == timestamp('{}')",
        time(kept[0].commit_time)
    );
    let filter = ReplayFilter {
        tables: Some(TableSelection {
            include: vec!["public.trades".to_owned()],
            exclude: vec![],
        }),
        expression: Some(expression),
        ..ReplayFilter::default()
    };
    let config = ReplayConfig {
        speed: Speed::Original,
        filter: Some(filter),
        operator: operator.link(&folder),
        ..log.config(receiver.target())
    };
    assert_eq!(replay(config).await.unwrap(), End::Complete);
    let received: Vec<_> = (receiver.received.lock().unwrap().iter())
        .map(|(_, record)| place_of(record))
        .collect();
    assert_eq!(received, expected(kept.iter().copied()));
    let progress = operator.reported(|progress| progress.phase() == Phase::Succeeded).await;
    let count = |count: usize| u64::try_from(count).unwrap();
    assert_eq!(progress.delivered, count(kept.len()));
    assert_eq!(progress.filtered, count(changes.len() - kept.len()));
    assert_eq!(
        progress.total,
        count(changes.len()),
        "by the end it is the number itself"
    );

    let unanswerable = ReplayConfig {
        filter: Some(ReplayFilter {
            expression: Some("after.price > 1".to_owned()),
            ..ReplayFilter::default()
        }),
        ..log.config(receiver.target())
    };
    let error = replay(unanswerable).await.unwrap_err();
    assert!(error.is_permanent(), "{error}");
    assert!(error.to_string().contains(&changes[0].position.to_string()), "{error}");
}

#[tokio::test(flavor = "multi_thread")]
async fn side_by_side_each_partition_is_in_order_and_every_change_comes_once() {
    let (log, changes) = log_with_history().await;
    let receiver = Receiver::start().await;
    let config = ReplayConfig {
        order: ReplayOrder::PerKey,
        ..log.config(receiver.target())
    };
    assert_eq!(replay(config).await.unwrap(), End::Complete);
    let received = receiver.received.lock().unwrap().clone();
    for (table, partitions) in TABLES {
        for partition in 0..partitions {
            let of_partition: Vec<_> = (received.iter())
                .filter(|(topic, record)| *topic == log.topic(table) && record.partition == partition)
                .map(|(_, record)| change_of(record))
                .collect();
            let written = (changes.iter()).filter(|change| change.table == table && change.partition == partition);
            assert_eq!(of_partition, expected(written), "{table} {partition}");
        }
    }
    assert_eq!(received.len(), changes.len());

    let folder = tempfile::tempdir().unwrap();
    let refused = ReplayConfig {
        order: ReplayOrder::PerKey,
        ..log.config(ReplayTarget::GrpcServe {
            address: free_address(),
            token_file: folder.path().join("token"),
            certificate: None,
        })
    };
    let error = replay(refused).await.unwrap_err();
    assert!(matches!(error, ReplayError::CommitOrderNeeded), "{error}");
}

#[tokio::test(flavor = "multi_thread")]
async fn side_by_side_each_partition_goes_on_at_its_own_place_after_a_kill_and_what_has_no_key_keeps_its_place() {
    let mut log = Log {
        value: row_of,
        // TRUNCATE, for example, in partition 0 as all of them.
        is_keyless: |change| change.partition == 0 && change.position.commit_lsn.0 % 0x1000 == 0x100,
        ..Log::new().await
    };
    let changes = long_history(20_000);
    for part in changes.chunks(500) {
        log.commit(part);
    }
    let receiver = Receiver::start().await;
    receiver.answers.forget_permits(Semaphore::MAX_PERMITS);
    let folder = tempfile::tempdir().unwrap();
    let word = folder.path().join("termination-log");
    let config = ReplayConfig {
        admin_address: free_address(),
        order: ReplayOrder::PerKey,
        filter: Some(ReplayFilter {
            tables: Some(TableSelection {
                include: vec!["public.trades".to_owned()],
                exclude: vec![],
            }),
            ..ReplayFilter::default()
        }),
        termination_message_file: Some(word.clone()),
        ..log.config(receiver.target())
    };
    let mut runtime = Runtime::replay(&config);
    receiver.answers.add_permits(8);
    let answered = eventually("what was answered is kept", LIMIT, async || {
        let (kept, permits) = (kept(&config).await, receiver.answers.available_permits());
        if permits == 0 && kept == *receiver.answered.borrow() {
            Ok(kept)
        } else {
            Err(format!("{kept}, {permits} left"))
        }
    })
    .await;
    runtime.kill9();
    receiver.until_left().await;
    let mut received = receiver.take_records();
    received.truncate(usize::try_from(answered).unwrap());

    runtime.start_again();
    receiver.answers.add_permits(1000);
    let status = runtime.process().wait(LIMIT);
    assert!(status.success(), "{}", runtime.process().log_tail());
    received.extend(receiver.take_records());
    let received: Vec<_> = (received.iter())
        .map(|(_, record)| {
            let (position, ..) = place_of(record);
            (
                position.parse::<Position>().unwrap(),
                record.partition,
                record.key.is_empty(),
            )
        })
        .collect();
    let positions: Vec<Position> = received.iter().map(|(position, ..)| *position).collect();
    let mut sorted = positions.clone();
    sorted.sort_unstable();
    assert_ne!(positions, sorted, "it is not commit order");
    let kept: Vec<_> = changes.iter().filter(|change| change.table == "trades").collect();
    assert_eq!(
        sorted,
        kept.iter().map(|change| change.position).collect::<Vec<_>>(),
        "each comes once"
    );
    for partition in 0..3 {
        let of_partition = received.iter().filter(|(_, at, _)| *at == partition);
        assert!(
            of_partition.is_sorted_by_key(|(position, ..)| *position),
            "partition {partition}"
        );
    }
    let keyless = (0..received.len()).filter(|at| received[*at].2);
    assert_eq!(
        keyless.clone().count(),
        kept.iter().filter(|change| (log.is_keyless)(change)).count()
    );
    for at in keyless {
        let (before, after) = (&positions[..at], &positions[at + 1..]);
        assert!(before.iter().all(|before| *before < positions[at]), "{at}");
        assert!(after.iter().all(|after| *after > positions[at]), "{at}");
    }
    // What the filter left out is not counted again after the crash.
    let word: serde_json::Value = serde_json::from_slice(&std::fs::read(word).unwrap()).unwrap();
    assert_eq!((&word["delivered"], &word["filtered"]), (&15_000.into(), &5_000.into()));
}

#[tokio::test(flavor = "multi_thread")]
async fn a_dry_run_counts_at_once_what_would_be_delivered() {
    let (log, changes) = log_with_history().await;
    let operator = Operator::start(Directive {
        speed: "1".to_owned(),
        ..Directive::default()
    })
    .await;
    let folder = tempfile::tempdir().unwrap();
    let config = ReplayConfig {
        speed: Speed::Original,
        operator: operator.link(&folder),
        ..log.config(ReplayTarget::DryRun)
    };
    assert_eq!(replay(config).await.unwrap(), End::Complete);
    let progress = operator.reported(|progress| progress.phase() == Phase::Succeeded).await;
    let counted = |table: &str| {
        let changes: Vec<_> = changes.iter().filter(|change| change.table == table).collect();
        let times = changes.iter().map(|change| change.commit_time);
        let bytes = |change: &&Change| "key".len() + (log.value)(change).len();
        TopicProgress {
            topic: log.topic(table),
            delivered: u64::try_from(changes.len()).unwrap(),
            bytes: u64::try_from(changes.iter().map(bytes).sum::<usize>()).unwrap(),
            first_time_micros: times.clone().min().unwrap(),
            last_time_micros: times.max().unwrap(),
        }
    };
    assert_eq!(progress.topics, [counted("trades"), counted("orders")]);
    assert_eq!(progress.other_topics, None);
    assert_eq!(
        progress.bytes,
        progress.topics.iter().map(|topic| topic.bytes).sum::<u64>()
    );
    assert_eq!(progress.delivered, u64::try_from(changes.len()).unwrap());
    assert_eq!(
        operator.conditions(),
        BTreeMap::from([("Complete".to_owned(), "DryRun".to_owned())])
    );
}

#[tokio::test(flavor = "multi_thread")]
async fn subscribers_show_a_token_and_go_on_where_they_left() {
    let (log, changes) = log_with_history().await;
    let folder = tempfile::tempdir().unwrap();
    let token_file = folder.path().join("subscribers");
    std::fs::write(&token_file, "let-me-in\n").unwrap();
    let address = free_address();
    let operator = Operator::start(Directive {
        speed: "1".to_owned(),
        ..Directive::default()
    })
    .await;
    let config = ReplayConfig {
        operator: operator.link(&folder),
        ..log.config(serving(address, token_file))
    };
    let replay = start(config);
    let channel = eventually("the replay serves", LIMIT, async || {
        tonic::transport::Endpoint::from_shared(format!("http://{address}"))
            .unwrap()
            .connect()
            .await
    })
    .await;
    let mut client = ReplayerClient::new(channel);
    let request = |resume_token: &str, authorization: &'static str| {
        let mut request = Request::new(tokio_stream::once(ReplayRequest {
            resume_token: resume_token.to_owned(),
            credit: 0,
        }));
        request
            .metadata_mut()
            .insert("authorization", authorization.parse().unwrap());
        request
    };

    let refused = client.replay_event(tokio_stream::empty()).await.unwrap_err();
    assert_eq!(refused.code(), tonic::Code::Unauthenticated);
    let refused = client.replay_event(request("", "Bearer let-me-on")).await.unwrap_err();
    assert_eq!(refused.code(), tonic::Code::Unauthenticated);
    let refused = client
        .replay_event(request("nonsense", "Bearer let-me-in"))
        .await
        .unwrap_err();
    assert_eq!(refused.code(), tonic::Code::InvalidArgument);

    // It takes the first message, which at the original pace is the first transaction, and leaves.
    let mut events = client
        .replay_event(request("", "Bearer let-me-in"))
        .await
        .unwrap()
        .into_inner();
    let first = timeout(LIMIT, events.message()).await.unwrap().unwrap().unwrap();
    drop(events);
    operator.reported(|progress| progress.phase() == Phase::Pending).await;

    operator.directive.send_replace(Directive {
        speed: "max".to_owned(),
        ..Directive::default()
    });
    let mut taken: Vec<_> = first.records.iter().map(change_of).collect();
    assert!(taken.len() < changes.len());
    let mut events = client
        .replay_event(request(&first.resume_token, "Bearer let-me-in"))
        .await
        .unwrap()
        .into_inner();
    while let Some(event) = timeout(LIMIT, events.message()).await.unwrap().unwrap() {
        taken.extend(event.records.iter().map(change_of));
    }
    assert_eq!(taken, expected(&changes));
    assert_eq!(replay.await.unwrap().unwrap(), End::Complete);
    let progress = operator.reported(|progress| progress.phase() == Phase::Succeeded).await;
    assert_eq!(progress.current_position, changes.last().unwrap().position.to_string());
    assert_eq!(
        progress.delivered,
        u64::try_from(changes.len()).unwrap(),
        "also what it took before"
    );
}

#[tokio::test(flavor = "multi_thread")]
async fn a_cancelled_subscription_does_not_end_as_if_it_were_complete() {
    let (log, _) = log_with_history().await;
    let folder = tempfile::tempdir().unwrap();
    let token_file = folder.path().join("subscribers");
    std::fs::write(&token_file, "let-me-in").unwrap();
    let address = free_address();
    let operator = Operator::start(Directive::default()).await;
    let config = ReplayConfig {
        speed: Speed::Original,
        operator: operator.link(&folder),
        ..log.config(serving(address, token_file))
    };
    let replay = start(config);
    let channel = eventually("the replay serves", LIMIT, async || {
        tonic::transport::Endpoint::from_shared(format!("http://{address}"))
            .unwrap()
            .connect()
            .await
    })
    .await;
    let mut request = Request::new(tokio_stream::empty());
    request
        .metadata_mut()
        .insert("authorization", "Bearer let-me-in".parse().unwrap());
    let mut events = ReplayerClient::new(channel)
        .replay_event(request)
        .await
        .unwrap()
        .into_inner();
    timeout(LIMIT, events.message()).await.unwrap().unwrap().unwrap();
    operator.directive.send_replace(Directive {
        cancel: true,
        ..Directive::default()
    });
    let status = timeout(LIMIT, events.message()).await.unwrap().unwrap_err();
    assert_eq!(status.code(), tonic::Code::Cancelled, "{status}");
    assert_eq!(replay.await.unwrap().unwrap(), End::Cancelled);
}

#[tokio::test(flavor = "multi_thread")]
async fn the_last_committed_record_is_found_behind_what_nobody_sees() {
    let mut log = Log::new().await;
    let cluster = KafkaCluster {
        bootstrap_servers: vec![log.kafka.bootstrap()],
        tls: None,
        sasl: None,
    };
    let topic = log.topic("orders");
    assert!(
        Tail::new(&cluster, LIMIT)
            .unwrap()
            .last_record(&topic, 0)
            .unwrap()
            .is_none()
    );

    log.commit(&[
        change(0x100, 0, START, "orders", 0),
        change(0x100, 1, START, "orders", 0),
    ]);
    // More than the first look back takes in, each with its control record.
    for _ in 0..20 {
        log.abort(&[change(0x200, 0, START, "orders", 0)]);
    }
    let last = Tail::new(&cluster, LIMIT)
        .unwrap()
        .last_record(&topic, 0)
        .unwrap()
        .unwrap();
    assert_eq!(last.payload().unwrap(), b"value of 1:0/100:1");
    // And so it is where the partitions of several topics are read at the same time, some of which hold nothing.
    log.commit(&[
        change(0x300, 0, START, "trades", 2),
        change(0x300, 1, START, "trades", 0),
        change(0x300, 2, START, "trades", 2),
    ]);
    // Readers see what is committed a moment later; before another transaction begins they do.
    log.abort(&[change(0x400, 0, START, "orders", 0)]);
    let topics = ["trades", "orders", "empty", "none"].map(|table| log.topic(table));
    let mut found: Vec<_> = (Tail::new(&cluster, LIMIT)
        .unwrap()
        .last_records(topics.to_vec(), |record| {
            (record.partition(), record.payload().unwrap().to_vec())
        })
        .unwrap())
    .into_iter()
    .map(|(topic, (partition, value))| (topic, partition, value))
    .collect();
    found.sort();
    let expected = [
        ("orders", 0, "1:0/100:1"),
        ("trades", 0, "1:0/300:1"),
        ("trades", 2, "1:0/300:2"),
    ];
    assert_eq!(
        found,
        expected.map(|(table, partition, position)| {
            (log.topic(table), partition, format!("value of {position}").into_bytes())
        })
    );

    // The checkpoints of another slot of the pipeline are in the same topic.
    log.producer.begin_transaction().unwrap();
    for _ in 0..40 {
        log.send_checkpoint("default/other/slot", change(0x900, 0, START, "orders", 0).position);
    }
    log.producer.commit_transaction(LIMIT).unwrap();
    let checkpoints = checkpoint_topic(&log.pipeline.namespace, &log.pipeline.name);
    let checkpoint = read_checkpoint(&cluster, &checkpoints, &log.key(), LIMIT)
        .unwrap()
        .unwrap();
    assert_eq!(checkpoint.complete, log.complete);
    assert_eq!(checkpoint.events_total, 5);
    assert!(
        read_checkpoint(&cluster, &checkpoints, "no such key", LIMIT)
            .unwrap()
            .is_none()
    );
}

/// So many transactions of one change each, in turn in all partitions that are written to.
fn long_history(transactions: u64) -> Vec<Change> {
    (0..transactions)
        .map(|number| {
            let (table, partition) = match number % 4 {
                3 => ("orders", 0),
                n => ("trades", i32::try_from(n).unwrap()),
            };
            let commit_time = START + i64::try_from(number).unwrap() * 1000;
            change(0x100 + number * 0x10, 0, commit_time, table, partition)
        })
        .collect()
}

/// How many records are delivered, as the job's consumer group says it.
async fn kept(config: &ReplayConfig) -> u64 {
    let note = kept_note(config).await;
    note["done"]["delivered"].as_u64().unwrap_or_default()
}

/// What the job's consumer group says of the replay.
async fn kept_note(config: &ReplayConfig) -> serde_json::Value {
    let ResourceIdentity { namespace, name, uid } = &config.job;
    let consumer: BaseConsumer = Kafka::shared()
        .await
        .client_config()
        .set("group.id", format!("meander-replay.{namespace}.{name}.{uid}"))
        .create()
        .unwrap();
    let topic = checkpoint_topic(&config.pipeline.namespace, &config.pipeline.name);
    let committed = tokio::task::block_in_place(|| {
        let mut wanted = TopicPartitionList::new();
        wanted.add_partition(&topic, 0);
        consumer.committed_offsets(wanted, LIMIT)
    });
    // The group's coordinator may have only just been made, and not know that it is one.
    let note = committed
        .ok()
        .and_then(|committed| Some(committed.find_partition(&topic, 0)?.metadata().to_owned()))
        .unwrap_or_default();
    serde_json::from_str(&note).unwrap_or_default()
}

#[tokio::test(flavor = "multi_thread")]
async fn a_replay_that_is_killed_goes_on_after_what_was_answered_and_in_the_same_range() {
    let mut log = Log::new().await;
    let changes = long_history(60_000);
    for part in changes.chunks(500) {
        log.commit(part);
    }
    let receiver = Receiver::start().await;
    receiver.answers.forget_permits(Semaphore::MAX_PERMITS);
    let config = ReplayConfig {
        admin_address: free_address(),
        ..log.config(receiver.target())
    };
    let mut runtime = Runtime::replay(&config);

    // What was answered is kept within a second, and is not delivered again.
    receiver.answers.add_permits(8);
    let answered = eventually("what was answered is kept", LIMIT, async || {
        let (kept, permits) = (kept(&config).await, receiver.answers.available_permits());
        let settled = permits == 0 && kept == *receiver.answered.borrow();
        if settled {
            Ok(kept)
        } else {
            Err(format!("{kept}, {permits} left"))
        }
    })
    .await;
    runtime.kill9();
    receiver.until_left().await;
    let first = receiver.take();
    assert!(answered > 0 && answered < 60_000, "{answered}");
    assert_eq!(first, expected(&changes[..first.len()]));

    // A range that is frozen holds nothing that is written later.
    log.commit(&[change(0xF_0000, 0, START + 3600 * SECOND, "orders", 0)]);
    runtime.start_again();
    let begin = usize::try_from(answered).unwrap();
    receiver.until(1).await;
    // What is answered now may not be kept yet when it dies; then it comes again, and is not left out.
    receiver.answers.add_permits(4);
    eventually("four more are answered", LIMIT, async || {
        match receiver.answers.available_permits() {
            0 => Ok(()),
            left => Err(left),
        }
    })
    .await;
    runtime.kill9();
    receiver.until_left().await;
    let second = receiver.take();
    assert_eq!(second, expected(&changes[begin..begin + second.len()]));
    let known = kept(&config).await;
    assert!(
        (answered..=*receiver.answered.borrow()).contains(&known),
        "{known} of {answered}"
    );

    // One that is asked to end waits for the answers to what it has handed over, so that none of it comes again.
    runtime.start_again();
    receiver.until(1).await;
    runtime.process().signal(Signal::TERM);
    eventually("it is told to stop", LIMIT, async || {
        let log = runtime.process().log_tail();
        log.contains("told to stop").then_some(()).ok_or(log)
    })
    .await;
    receiver.answers.add_permits(16);
    assert!(!runtime.process().wait(LIMIT).success());
    let third = receiver.take();
    let begin = usize::try_from(known).unwrap();
    let end = begin + third.len();
    assert_eq!(third, expected(&changes[begin..end]));
    assert_eq!(kept(&config).await, u64::try_from(end).unwrap());

    runtime.start_again();
    receiver.answers.add_permits(1000);
    let status = runtime.process().wait(LIMIT);
    assert!(status.success(), "{}", runtime.process().log_tail());
    assert_eq!(receiver.take(), expected(&changes[end..]));
    assert_eq!(kept(&config).await, 60_000);

    // A pod that is started again after the end has nothing left to do; another job has.
    runtime.start_again();
    assert!(runtime.process().wait(LIMIT).success());
    assert_eq!(receiver.take(), []);
    let other = log.config(receiver.target());
    assert_eq!(replay(other).await.unwrap(), End::Complete);
    assert_eq!(receiver.take().len(), changes.len() + 1);
}

/// `meander-workload subscribe`, which is killed with its handle.
struct Subscriber(Child);

impl Subscriber {
    fn start(address: SocketAddr, token_file: &Path, ledger: &Path) -> Self {
        let test = std::env::current_exe().unwrap();
        let binary = test.parent().and_then(Path::parent).unwrap().join("meander-workload");
        let child = Command::new(binary)
            .args(["subscribe", "--endpoint", &format!("http://{address}")])
            .arg("--token-file")
            .arg(token_file)
            .arg("--ledger")
            .arg(ledger)
            .spawn()
            .unwrap();
        Self(child)
    }
}

impl Drop for Subscriber {
    fn drop(&mut self) {
        let _ = self.0.kill();
        let _ = self.0.wait();
    }
}

/// What a subscriber has noted, in whole lines.
fn noted(ledger: &Path) -> Vec<(String, u32)> {
    let text = std::fs::read_to_string(ledger).unwrap_or_default();
    let whole = text.rfind('\n').map_or("", |end| &text[..end]);
    let lines = whole.lines().map(|line| serde_json::from_str::<Line>(line).unwrap());
    lines.flat_map(|line| line.records).collect()
}

async fn until_noted(ledger: &Path, count: usize) {
    eventually("records are noted", LIMIT, async || match noted(ledger).len() {
        noted if noted >= count => Ok(()),
        noted => Err(format!("{noted} of {count}")),
    })
    .await;
}

/// Waits until somebody listens there.
async fn until_served(address: SocketAddr) {
    eventually("the replay serves", LIMIT, async || {
        tokio::net::TcpStream::connect(address).await
    })
    .await;
}

/// A log of so many changes, and a replay at full speed of it that is served, with its operator.
struct Served {
    log: Log,
    changes: Vec<Change>,
    address: SocketAddr,
    token_file: PathBuf,
    operator: Operator,
    config: ReplayConfig,
    folder: tempfile::TempDir,
}

impl Served {
    async fn new(transactions: u64, to: ReplayEnd) -> Self {
        let mut log = Log::new().await;
        let changes = long_history(transactions);
        for part in changes.chunks(500) {
            log.commit(part);
        }
        let folder = tempfile::tempdir().unwrap();
        let token_file = folder.path().join("subscribers");
        std::fs::write(&token_file, "let-me-in").unwrap();
        let address = free_address();
        let operator = Operator::start(Directive {
            speed: "max".to_owned(),
            ..Directive::default()
        })
        .await;
        let config = ReplayConfig {
            to,
            operator: operator.link(&folder),
            ..log.config(serving(address, token_file.clone()))
        };
        Self {
            log,
            changes,
            address,
            token_file,
            operator,
            config,
            folder,
        }
    }

    /// Publishes more, each change in a transaction of its own.
    fn capture(&mut self, count: usize) {
        for _ in 0..count {
            let lsn = 0x10_0000 + u64::try_from(self.changes.len()).unwrap() * 0x10;
            // The orders fall asleep.
            let partition = i32::try_from(lsn / 0x10 % 3).unwrap();
            let change = change(lsn, 0, START + 7200 * SECOND, "trades", partition);
            self.log.commit(std::slice::from_ref(&change));
            self.changes.push(change);
        }
    }
}

#[tokio::test(flavor = "multi_thread")]
async fn a_subscriber_that_is_killed_misses_nothing_in_history_nor_live_nor_in_between() {
    let mut served = Served::new(20_000, ReplayEnd::Live).await;
    let shutdown = CancellationToken::new();
    let replay = tokio::spawn(replay::run(served.config.clone(), shutdown.clone()));
    let (address, token_file) = (served.address, served.token_file.clone());
    let ledger = served.folder.path().join("ledger");
    until_served(address).await;

    // In history; what is captured meanwhile is after its end.
    let subscriber = Subscriber::start(address, &token_file, &ledger);
    until_noted(&ledger, 2_000).await;
    drop(subscriber);
    assert!(noted(&ledger).len() < 20_000, "it was over before it could be killed");
    served.capture(20);
    // From history to live, in one stream.
    let subscriber = Subscriber::start(address, &token_file, &ledger);
    until_noted(&ledger, served.changes.len()).await;
    for _ in 0..3 {
        served.capture(20);
        served.log.abort(&[change(0xFFF_0000, 0, START, "orders", 0)]);
        until_noted(&ledger, served.changes.len()).await;
    }
    // In live, with something captured while it is away.
    served.capture(5);
    drop(subscriber);
    served.capture(20);
    let subscriber = Subscriber::start(address, &token_file, &ledger);
    served.capture(20);
    until_noted(&ledger, served.changes.len()).await;
    // One that comes late takes all of it.
    let late = served.folder.path().join("late");
    let other = Subscriber::start(address, &token_file, &late);
    until_noted(&late, served.changes.len()).await;
    // Another pod takes over; meanwhile retention takes all of a table that sleeps, which had been taken before.
    let taken = served.changes.last().unwrap().position;
    eventually("it is kept what was taken", LIMIT, async || {
        let note = kept_note(&served.config).await;
        let kept = note["taken"].as_str().and_then(|kept| kept.parse::<ResumeToken>().ok());
        match kept {
            Some(kept) if kept.coordinate.position >= taken => Ok(()),
            _ => Err(note),
        }
    })
    .await;
    drop((subscriber, other));
    shutdown.cancel();
    let end = timeout(LIMIT, replay).await.unwrap().unwrap();
    assert!(matches!(end, Err(ReplayError::Interrupted)), "{end:?}");
    served.capture(5);
    served.log.delete("orders", 0, Offset::End).await;
    let replay = tokio::spawn(replay::run(served.config.clone(), CancellationToken::new()));
    until_served(address).await;
    let subscriber = Subscriber::start(address, &token_file, &ledger);
    served.capture(5);
    until_noted(&ledger, served.changes.len()).await;

    let changes = served.changes.iter();
    let whole: Vec<_> = changes
        .map(|change| (change.position.to_string(), change.part))
        .collect();
    assert_eq!(noted(&ledger), whole);
    assert_eq!(noted(&late), whole[..whole.len() - 10]);
    // What is acknowledged is delivered; one that went on by a token goes on counting.
    let all = u64::try_from(whole.len()).unwrap();
    served.operator.reported(|progress| progress.delivered == all).await;
    drop(subscriber);
    served.operator.directive.send_replace(Directive {
        cancel: true,
        ..Directive::default()
    });
    let end = timeout(LIMIT, replay).await.unwrap().unwrap();
    assert_eq!(end.unwrap(), End::Cancelled);
}

#[tokio::test(flavor = "multi_thread")]
async fn a_pod_that_takes_over_serves_the_same_range_and_says_what_retention_took_of_it() {
    let mut served = Served::new(3_000, ReplayEnd::Now).await;
    let run = |config: &ReplayConfig| {
        let shutdown = CancellationToken::new();
        (tokio::spawn(replay::run(config.clone(), shutdown.clone())), shutdown)
    };
    let address = served.address;
    let subscribe = async |resume_token: &str| {
        until_served(address).await;
        let (requests, sent) = mpsc::channel(16);
        let (resume_token, credit) = (resume_token.to_owned(), 1000);
        requests.send(ReplayRequest { resume_token, credit }).await.unwrap();
        let mut request = Request::new(ReceiverStream::new(sent));
        let token = "Bearer let-me-in".parse().unwrap();
        request.metadata_mut().insert("authorization", token);
        let mut client = ReplayerClient::connect(format!("http://{address}")).await.unwrap();
        let answer = client.replay_event(request).await;
        answer.map(|answer| (requests, answer.into_inner()))
    };
    let (first, shutdown) = run(&served.config);
    let (_requests, mut events) = subscribe("").await.unwrap();
    let mut messages = Vec::new();
    let count = |messages: &[ReplayEvent]| messages.iter().map(|event| event.records.len()).sum::<usize>();
    while count(&messages) < 3_000 {
        messages.push(timeout(LIMIT, events.message()).await.unwrap().unwrap().unwrap());
    }
    let is_resolved = |progress: &ReplayProgress| progress.resolved_range.is_some();
    let frozen = |progress: ReplayProgress| {
        let range = progress.resolved_range.unwrap();
        (range.to_time_micros, range.to_position, range.offsets)
    };
    let range = frozen(served.operator.reported(is_resolved).await);
    shutdown.cancel();
    let end = timeout(LIMIT, first).await.unwrap().unwrap();
    assert!(matches!(end, Err(ReplayError::Interrupted)), "{end:?}");

    // The next pod knows nothing of what is written from now on, and retention takes some of what the subscriber's first messages held.
    served.capture(20);
    served.log.truncate("orders", 0, 300).await;
    served.operator.update.send_replace(ProgressUpdate::default());
    let (second, _shutdown) = run(&served.config);
    let (_requests, mut events) = subscribe(&messages[0].resume_token).await.unwrap();
    let status = timeout(LIMIT, events.message()).await.unwrap().unwrap_err();
    assert_eq!(status.code(), tonic::Code::OutOfRange, "{status}");
    // A token of somewhere else is not taken for the end.
    let elsewhere = subscribe("1:0/FFFFFFF:0#0@1+0+0+0").await.unwrap_err();
    assert_eq!(elsewhere.code(), tonic::Code::InvalidArgument, "{elsewhere}");
    // Whoever has taken more misses nothing, nor does one who breaks off and comes back when another has ended the job.
    let token = |from_end: usize| messages[messages.len() - from_end].resume_token.clone();
    let (requests, mut events) = subscribe(&token(2)).await.unwrap();
    let (others_requests, mut others) = subscribe(&token(3)).await.unwrap();
    timeout(LIMIT, others.message()).await.unwrap().unwrap().unwrap();
    drop((others_requests, others));
    let taken = &messages[..messages.len() - 1];
    let mut taken: Vec<_> = taken
        .iter()
        .flat_map(|event| event.records.iter().map(change_of))
        .collect();
    assert!(taken.len() > 2_000);
    let take_rest = async |requests: mpsc::Sender<ReplayRequest>, events: &mut Streaming<ReplayEvent>| {
        let mut taken = Vec::new();
        while let Some(event) = timeout(LIMIT, events.message()).await.unwrap().unwrap() {
            taken.extend(event.records.iter().map(change_of));
            let (resume_token, credit) = (event.resume_token, 0);
            requests.send(ReplayRequest { resume_token, credit }).await.unwrap();
        }
        taken
    };
    taken.extend(take_rest(requests, &mut events).await);
    assert_eq!(taken, expected(&served.changes[..3_000]));
    let (requests, mut events) = subscribe(&token(3)).await.unwrap();
    let rest = take_rest(requests, &mut events).await;
    assert_eq!(rest, expected(&served.changes[3_000 - rest.len()..3_000]));
    let end = timeout(LIMIT, second).await.unwrap().unwrap();
    assert_eq!(end.unwrap(), End::Complete);
    let succeeded = |progress: &ReplayProgress| progress.phase() == Phase::Succeeded;
    assert_eq!(frozen(served.operator.reported(succeeded).await), range);
}

/// What is there without waiting.
async fn at_once<T>(future: impl Future<Output = T>) -> Option<T> {
    tokio::select! {
        biased;
        value = future => Some(value),
        () = std::future::ready(()) => None,
    }
}

#[tokio::test(flavor = "multi_thread")]
async fn a_subscriber_is_sent_what_it_gives_credit_for_and_the_end_waits_for_its_acknowledgement() {
    let served = Served::new(3_000, ReplayEnd::Now).await;
    let replay = start(served.config.clone());
    until_served(served.address).await;
    let endpoint = tonic::transport::Endpoint::from_shared(format!("http://{}", served.address)).unwrap();
    let channel = endpoint.connect().await.unwrap();
    let says = |resume_token: &str, credit: u32| ReplayRequest {
        resume_token: resume_token.to_owned(),
        credit,
    };
    let subscribe = async |credit: u32| {
        let (requests, sent) = mpsc::channel(16);
        requests.send(says("", credit)).await.unwrap();
        let mut request = Request::new(ReceiverStream::new(sent));
        let token = "Bearer let-me-in".parse().unwrap();
        request.metadata_mut().insert("authorization", token);
        let answer = ReplayerClient::new(channel.clone()).replay_event(request).await;
        (requests, answer.unwrap().into_inner())
    };

    // A token that was not sent acknowledges nothing.
    let (requests, mut events) = subscribe(1).await;
    timeout(LIMIT, events.message()).await.unwrap().unwrap().unwrap();
    requests.send(says("1:0/1:0#0@1", 1)).await.unwrap();
    let status = timeout(LIMIT, events.message()).await.unwrap().unwrap_err();
    assert_eq!(status.code(), tonic::Code::InvalidArgument, "{status}");

    let (requests, mut events) = subscribe(2).await;
    let mut taken = Vec::new();
    let mut last = String::new();
    for _ in 0..2 {
        let event = timeout(LIMIT, events.message()).await.unwrap().unwrap().unwrap();
        taken.extend(event.records.iter().map(change_of));
        last = event.resume_token;
    }
    // Nothing is delivered before it is acknowledged, and the later acknowledgement holds for both. Without credit nothing comes after it.
    let operator = &served.operator;
    let progress = operator.reported(|progress| progress.phase() == Phase::Running).await;
    assert_eq!(progress.delivered, 0);
    requests.send(says(&last, 0)).await.unwrap();
    let so_far = u64::try_from(taken.len()).unwrap();
    operator.reported(|progress| progress.delivered == so_far).await;
    assert!(
        at_once(events.message()).await.is_none(),
        "a message came without credit"
    );
    let waiting = operator.condition("Progressing", "WaitingForCredit").await;
    assert!(!waiting.status, "{waiting:?}");

    requests.send(says("", 1000)).await.unwrap();
    while taken.len() < served.changes.len() {
        let event = timeout(LIMIT, events.message()).await.unwrap().unwrap().unwrap();
        taken.extend(event.records.iter().map(change_of));
        last = event.resume_token;
    }
    assert_eq!(taken, expected(&served.changes));
    assert!(at_once(events.message()).await.is_none() && !replay.is_finished());
    requests.send(says(&last, 0)).await.unwrap();
    assert!(timeout(LIMIT, events.message()).await.unwrap().unwrap().is_none());
    assert_eq!(replay.await.unwrap().unwrap(), End::Complete);
}

#[tokio::test(flavor = "multi_thread")]
async fn the_operator_is_known_by_the_authorities_that_the_file_holds_now() {
    let (old, new) = (Authority::new(), Authority::new());
    let server = new.server(&["localhost"]);
    let read = |path: &Path| std::fs::read(path).unwrap();
    let folder = tempfile::tempdir().unwrap();
    let trusted = folder.path().join("operator-ca.crt");
    std::fs::copy(old.file(), &trusted).unwrap();
    let operator = Operator::start(Directive::default()).await;
    let listener = TcpListener::bind("127.0.0.1:0").await.unwrap();
    let endpoint = format!("https://localhost:{}", listener.local_addr().unwrap().port());
    let (calls, mut called) = watch::channel(0);
    let callers = TcpListenerStream::new(listener).map(move |caller| {
        calls.send_modify(|calls| *calls += 1);
        caller
    });
    let shown = Identity::from_pem(read(&server.certificate_file), read(&server.key_file));
    tokio::spawn(
        Server::builder()
            .tls_config(ServerTlsConfig::new().identity(shown))
            .unwrap()
            .add_service(ProgressTrackerServer::new(operator.clone()))
            .serve_with_incoming(callers),
    );
    let identity = ResourceIdentity {
        namespace: "shop".to_owned(),
        name: "trades".to_owned(),
        uid: String::new(),
    };
    let link = operator.link(&folder).map(|link| OperatorLink {
        endpoint,
        ca_file: Some(trusted.clone()),
        ..link
    });
    let (_reporter, mut directives, link) = progress::start::<ReplayProgress>(&identity, link);
    // The second call comes after the first has failed.
    timeout(LIMIT, called.wait_for(|calls| *calls >= 2))
        .await
        .unwrap()
        .unwrap();
    assert!(directives.borrow().is_none(), "a stranger was listened to");
    // Both, as while one authority takes the place of the other.
    std::fs::write(&trusted, [read(&old.file()), read(&new.file())].concat()).unwrap();
    timeout(LIMIT, directives.wait_for(Option::is_some))
        .await
        .unwrap()
        .unwrap();
    link.finish().await;
}

#[tokio::test(flavor = "multi_thread")]
async fn over_tls_each_side_proves_itself_and_what_is_wrong_is_said_at_once_and_mended_by_new_files() {
    let (log, changes) = log_with_history().await;
    let authority = Authority::new();
    let server = authority.server(&["localhost"]);
    let certificate = |identity: meander_test_support::Identity| {
        Some(ClientCertificate {
            certificate_file: identity.certificate_file,
            key_file: identity.key_file,
        })
    };
    let read = |path: &Path| std::fs::read(path).unwrap();
    let folder = tempfile::tempdir().unwrap();
    let trusted = folder.path().join("ca.crt");
    std::fs::copy(Authority::new().file(), &trusted).unwrap();
    let token_file = folder.path().join("receiver-token");
    std::fs::write(&token_file, "from-the-replay\n").unwrap();

    let inner = Receiver::start().await;
    let listener = TcpListener::bind("127.0.0.1:0").await.unwrap();
    let endpoint = format!("https://localhost:{}", listener.local_addr().unwrap().port());
    let tls = ServerTlsConfig::new()
        .identity(Identity::from_pem(
            read(&server.certificate_file),
            read(&server.key_file),
        ))
        .client_ca_root(Certificate::from_pem(read(&authority.file())));
    let admit = |request: Request<()>| match request.metadata().get("authorization") {
        Some(token) if token == "Bearer from-the-replay" => Ok(request),
        _ => Err(Status::unauthenticated("who are you?")),
    };
    tokio::spawn(
        Server::builder()
            .tls_config(tls)
            .unwrap()
            .add_service(ReplayReceiverServer::with_interceptor(inner.clone(), admit))
            .serve_with_incoming(TcpListenerStream::new(listener)),
    );
    let operator = Operator::start(Directive {
        speed: "max".to_owned(),
        ..Directive::default()
    })
    .await;
    let config = ReplayConfig {
        operator: operator.link(&folder),
        ..log.config(ReplayTarget::GrpcCall(GrpcReceiver {
            endpoint,
            ca_file: Some(trusted.clone()),
            client_certificate: certificate(authority.client("replay")),
            token_file: Some(token_file),
        }))
    };
    let calling = start(config);
    let trouble = operator.condition("Progressing", "ReceiverUnreachable").await;
    assert!(
        !trouble.status && trouble.message.contains("invalid peer certificate"),
        "{trouble:?}"
    );
    std::fs::copy(authority.file(), &trusted).unwrap();
    assert_eq!(calling.await.unwrap().unwrap(), End::Complete);
    assert_eq!(inner.changes(), expected(&changes));

    // The other way round.
    let token_file = folder.path().join("subscribers");
    std::fs::write(&token_file, "let-me-in").unwrap();
    let address = free_address();
    let shown = authority.expired_server(&["localhost"]);
    let config = log.config(ReplayTarget::GrpcServe {
        address,
        token_file,
        certificate: certificate(shown.clone()),
    });
    let serving = start(config);
    let connect = async |authority: &Authority| {
        let tls = ClientTlsConfig::new().ca_certificate(Certificate::from_pem(read(&authority.file())));
        let endpoint = format!("https://localhost:{}", address.port());
        let endpoint = tonic::transport::Endpoint::from_shared(endpoint).unwrap();
        endpoint.tls_config(tls).unwrap().connect().await
    };
    until_served(address).await;
    assert!(connect(&authority).await.is_err(), "an expired certificate was taken");
    shown.replace_by(&server);
    assert!(connect(&Authority::new()).await.is_err(), "a stranger was trusted");
    let mut request = Request::new(tokio_stream::empty());
    let token = "Bearer let-me-in".parse().unwrap();
    request.metadata_mut().insert("authorization", token);
    let channel = connect(&authority).await.unwrap();
    let events = ReplayerClient::new(channel).replay_event(request).await;
    let mut events = events.unwrap().into_inner();
    let mut taken = Vec::new();
    while let Some(event) = timeout(LIMIT, events.message()).await.unwrap().unwrap() {
        taken.extend(event.records.iter().map(change_of));
    }
    assert_eq!(taken, expected(&changes));
    assert_eq!(serving.await.unwrap().unwrap(), End::Complete);
}

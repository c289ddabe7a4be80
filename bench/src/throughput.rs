//! How many records a replay delivers in a second, beside a plain consumer of the same records.

use std::{
    sync::{Arc, Mutex},
    time::Instant,
};

use anyhow::Context as _;
use meander_config::{
    GrpcReceiver, KafkaLog, ReplayConfig, ReplayEnd, ReplayOrder, ReplayStart, ReplayTarget, ResourceIdentity, Speed,
};
use meander_proto::v1::{
    ChangeRecord, Column, DeliverAck, Operation, Relation, ReplayEvent, Row, Value,
    replay_receiver_server::{ReplayReceiver, ReplayReceiverServer},
    value::Kind,
};
use meander_runtime::{
    log::{
        COMMIT_TIME_HEADER, Checkpoint, POSITION_HEADER, SnapshotState, checkpoint_key, checkpoint_topic, topic_name,
    },
    position::{Epoch, Lsn, Position},
};
use meander_test_support::{Kafka, Runtime, free_address};
use prost::Message as _;
use rdkafka::{
    Offset, TopicPartitionList,
    admin::{AdminClient, AdminOptions, NewTopic, TopicReplication},
    client::DefaultClientContext,
    consumer::{BaseConsumer, Consumer as _},
    error::{KafkaError, RDKafkaErrorCode},
    message::{Header, OwnedHeaders},
    producer::{BaseProducer, BaseRecord, Producer as _},
};
use tokio::{
    sync::{mpsc, watch},
    time::timeout,
};
use tokio_stream::wrappers::{ReceiverStream, TcpListenerStream};
use tonic::{Request, Response, Status, Streaming, transport::Server};

use crate::{
    LIMIT, contestant,
    process::{cpu_seconds, peak_resident},
    report::{Figure, Figures, Report},
};

const NAME: &str = "throughput";
/// What the receiver lets be under way at a time, and in one frame of HTTP/2.
const WINDOW: u32 = 4 << 20;
const FRAME: u32 = 1 << 20;
/// Bytes of a value.
const SIZE: usize = 250;
/// Changes of a transaction of the source, and of one of Kafka.
const CHANGES: u64 = 10;
const TRANSACTION: u64 = 1000;
/// 2025-11-20T10:00:00Z.
const START: i64 = 1_763_632_800_000_000;

const WORK: &str = "throughput of a replay";

pub(crate) async fn measure(report: &Report, records: u64, partitions: i32, rounds: u32) -> anyhow::Result<()> {
    let mut kafka = Kafka::start().await;
    let broker = kafka.process().id().context("the broker has ended")?;
    record(&kafka, records, partitions).await?;
    for _ in 0..rounds {
        let bootstrap = kafka.bootstrap();
        let consumed = tokio::task::spawn_blocking(move || consume(&bootstrap, broker, records, partitions)).await??;
        report.add(WORK, "plain consumer", "", consumed)?;
        for (reader, order) in [
            ("replay, Commit", ReplayOrder::Commit),
            ("replay, PerKey", ReplayOrder::PerKey),
        ] {
            let replayed = replay(&kafka, broker, (records, partitions), order).await?;
            report.add(WORK, reader, &contestant::our_version(), replayed)?;
        }
    }
    Ok(())
}

fn pipeline() -> ResourceIdentity {
    ResourceIdentity {
        namespace: "bench".to_owned(),
        name: NAME.to_owned(),
        uid: String::new(),
    }
}

fn topic() -> String {
    topic_name(NAME, "public", "trades")
}

/// Writes a log as a capture does: transactions of Kafka with a checkpoint in each, of many transactions of the source.
async fn record(kafka: &Kafka, records: u64, partitions: i32) -> anyhow::Result<()> {
    let (data, checkpoints) = (topic(), checkpoint_topic("bench", NAME));
    let admin: AdminClient<DefaultClientContext> = kafka.client_config().create()?;
    let topics = [
        NewTopic::new(&data, partitions, TopicReplication::Fixed(1)).set("retention.ms", "-1"),
        NewTopic::new(&checkpoints, 1, TopicReplication::Fixed(1)).set("cleanup.policy", "compact"),
    ];
    for created in admin.create_topics(&topics, &AdminOptions::new()).await? {
        created.map_err(|(topic, code)| anyhow::anyhow!("{topic}: {code}"))?;
    }
    tokio::task::block_in_place(|| write(kafka, records, partitions, &data, &checkpoints))
}

fn write(kafka: &Kafka, records: u64, partitions: i32, data: &str, checkpoints: &str) -> anyhow::Result<()> {
    let key = checkpoint_key("bench", NAME, NAME);
    let producer: BaseProducer = kafka
        .client_config()
        .set("transactional.id", &key)
        // The topics were just made; with more, their first records can be lost (docs/reliability.md).
        .set("max.in.flight.requests.per.connection", "1")
        .set("linger.ms", "20")
        .set("queue.buffering.max.messages", "1000000")
        .create()?;
    producer.init_transactions(LIMIT)?;
    for first in (0..records).step_by(usize::try_from(TRANSACTION)?) {
        producer.begin_transaction()?;
        let until = records.min(first + TRANSACTION);
        for number in first..until {
            let position = position_of(number);
            let commit_time = START + i64::try_from(position.commit_lsn.0)? * 1000;
            let headers = OwnedHeaders::new()
                .insert(Header {
                    key: POSITION_HEADER,
                    value: Some(&position.to_string()),
                })
                .insert(Header {
                    key: COMMIT_TIME_HEADER,
                    value: Some(&commit_time.to_string()),
                });
            let (key, value) = (format!(r#"{{"id":"{number}"}}"#), value(number));
            let record = BaseRecord::to(data)
                .partition(i32::try_from(number % u64::try_from(partitions)?)?)
                .key(&key)
                .payload(&value)
                .timestamp(commit_time / 1000)
                .headers(headers);
            producer.send(record).map_err(|(error, _)| error)?;
        }
        let last = position_of(until - 1);
        let checkpoint = Checkpoint {
            epoch: 1,
            partings: vec![],
            system_identifier: "1".to_owned(),
            timeline: 1,
            major_version: 17,
            database_oid: 5,
            ended_at: None,
            owner_generation: 1,
            published: Some(last),
            complete: Some(Position::end_of_transaction(last.epoch, last.commit_lsn)),
            redis: None,
            acknowledged: last.commit_lsn,
            high_time_micros: START + i64::try_from(last.commit_lsn.0)? * 1000,
            events_total: until,
            snapshot: SnapshotState::default(),
            records_total: until,
            partitions: None,
            released: false,
            accepted_gap: None,
            oversized: Default::default(),
        };
        let value = serde_json::to_vec(&checkpoint)?;
        let record = BaseRecord::to(checkpoints).partition(0).key(&key).payload(&value);
        producer.send(record).map_err(|(error, _)| error)?;
        producer.commit_transaction(LIMIT)?;
    }
    Ok(())
}

fn position_of(number: u64) -> Position {
    Position {
        epoch: Epoch::FIRST,
        commit_lsn: Lsn(1 + number / CHANGES),
        ordinal: number % CHANGES,
    }
}

/// A row of `SIZE` bytes, as a capture writes it.
fn value(number: u64) -> Vec<u8> {
    let column = |name: &str, key| Column {
        name: name.to_owned(),
        type_name: "text".to_owned(),
        type_oid: 25,
        type_modifier: -1,
        key,
    };
    let change = |note: String| {
        let change = ChangeRecord {
            operation: Operation::Insert.into(),
            relation: Some(Relation {
                schema: "public".to_owned(),
                table: "trades".to_owned(),
                columns: vec![column("id", true), column("note", false)],
            }),
            after: Some(Row {
                values: vec![
                    Value {
                        kind: Some(Kind::Integer(i64::try_from(number).unwrap_or(i64::MAX))),
                    },
                    Value {
                        kind: Some(Kind::Text(note)),
                    },
                ],
            }),
            ..ChangeRecord::default()
        };
        change.encode_to_vec()
    };
    let rest = SIZE.saturating_sub(change(String::new()).len() + 2);
    change("n".repeat(rest))
}

/// Reads all records with the client that a replay reads with, and looks at none.
fn consume(bootstrap: &str, broker: u32, records: u64, partitions: i32) -> anyhow::Result<Figures> {
    let process = std::process::id();
    let consumer: BaseConsumer = rdkafka::ClientConfig::new()
        .set("bootstrap.servers", bootstrap)
        .set("group.id", "plain")
        .set("enable.auto.commit", "false")
        .set("isolation.level", "read_committed")
        .create()?;
    let mut assignment = TopicPartitionList::new();
    for partition in 0..partitions {
        assignment.add_partition_offset(&topic(), partition, Offset::Beginning)?;
    }
    let before = (cpu_seconds(process)?, cpu_seconds(broker)?);
    consumer.assign(&assignment)?;
    let (mut count, mut bytes, mut started) = (0, 0, None);
    while count < records {
        match consumer.poll(LIMIT).context("Kafka is silent")? {
            Ok(message) => {
                started.get_or_insert_with(Instant::now);
                bytes += message.payload_len();
                count += 1;
            }
            Err(KafkaError::MessageConsumption(RDKafkaErrorCode::PartitionEOF)) => {}
            Err(error) => return Err(error.into()),
        }
    }
    let seconds = started.context("there is no record")?.elapsed().as_secs_f64();
    anyhow::ensure!(
        bytes >= SIZE * usize::try_from(records)? * 9 / 10,
        "the records are too small"
    );
    Ok(Figures::from([
        (Figure::EventsPerSecond, records as f64 / seconds),
        (Figure::Cpu, cpu_seconds(process)? - before.0),
        (Figure::KafkaCpu, cpu_seconds(broker)? - before.1),
    ]))
}

async fn replay(
    kafka: &Kafka,
    broker: u32,
    (records, partitions): (u64, i32),
    order: ReplayOrder,
) -> anyhow::Result<Figures> {
    let listener = tokio::net::TcpListener::bind("127.0.0.1:0").await?;
    let address = listener.local_addr()?;
    let receiver = Receiver {
        records,
        seen: Arc::new(Mutex::new(Seen {
            topic: topic(),
            records: 0,
            last: vec![(0, 0, 0, 0); usize::try_from(partitions)?],
        })),
        started: watch::channel(None).0,
        done: watch::channel(None).0,
        looked_at: watch::channel(false).0,
    };
    let looked_at = receiver.looked_at.clone();
    let (mut started, mut done) = (receiver.started.subscribe(), receiver.done.subscribe());
    // As docs/targets.md advises.
    let server = Server::builder()
        .tcp_nodelay(true)
        .initial_stream_window_size(WINDOW)
        .initial_connection_window_size(WINDOW)
        .max_frame_size(FRAME)
        .add_service(ReplayReceiverServer::new(receiver))
        .serve_with_incoming(TcpListenerStream::new(listener));
    let server = tokio::spawn(server);
    let before = (cpu_seconds(std::process::id())?, cpu_seconds(broker)?);
    let mut replay = Runtime::replay(&ReplayConfig {
        job: ResourceIdentity {
            name: "bench".to_owned(),
            ..pipeline()
        },
        pipeline: pipeline(),
        slot_name: NAME.to_owned(),
        kafka: KafkaLog {
            bootstrap_servers: vec![kafka.bootstrap()],
            tls: None,
            sasl: None,
            topic_prefix: NAME.to_owned(),
        },
        from: ReplayStart::Beginning,
        to: ReplayEnd::Now,
        speed: Speed::Max,
        suspended: false,
        filter: None,
        max_gap_seconds: None,
        order,
        target: ReplayTarget::GrpcCall(GrpcReceiver::plain(format!("http://{address}"))),
        operator: None,
        admin_address: free_address(),
        termination_message_file: None,
    });
    let process = replay.process().id().context("the replay has ended")?;
    let started = (*timeout(LIMIT, started.wait_for(Option::is_some)).await??).context("no start")?;
    let ended = (*timeout(LIMIT, done.wait_for(Option::is_some)).await??).context("no end")?;
    let (cpu, peak) = (cpu_seconds(process)?, peak_resident(process)?);
    let receiver_cpu = cpu_seconds(std::process::id())? - before.0;
    let broker_cpu = cpu_seconds(broker)? - before.1;
    looked_at.send_replace(true);
    let status = tokio::task::block_in_place(|| replay.process().wait(LIMIT));
    anyhow::ensure!(status.success(), "the replay failed:\n{}", replay.process().log_tail());
    server.abort();
    let seconds = ended.duration_since(started).as_secs_f64();
    Ok(Figures::from([
        (Figure::EventsPerSecond, records as f64 / seconds),
        (Figure::Cpu, cpu),
        (Figure::ReceiverCpu, receiver_cpu),
        (Figure::KafkaCpu, broker_cpu),
        (Figure::PeakResident, peak),
    ]))
}

/// Decodes what it is sent, looks at the table and the coordinate of each record, answers, and counts.
#[derive(Clone)]
struct Receiver {
    records: u64,
    seen: Arc<Mutex<Seen>>,
    started: watch::Sender<Option<Instant>>,
    done: watch::Sender<Option<Instant>>,
    looked_at: watch::Sender<bool>,
}

struct Seen {
    topic: String,
    records: u64,
    /// The last coordinate of each partition: epoch, LSN, ordinal, part.
    last: Vec<(u32, u64, u64, u32)>,
}

impl Seen {
    /// How many there are by now; none if one is not of the table, or out of order in its partition.
    fn take(&mut self, event: &ReplayEvent) -> Option<u64> {
        for record in &event.records {
            let at = record.coordinate.as_ref()?;
            let at = (at.epoch, at.commit_lsn, at.ordinal, at.part);
            let last = self.last.get_mut(usize::try_from(record.partition).ok()?)?;
            let topic = event.topics.get(usize::try_from(record.topic).ok()?)?;
            if *topic != self.topic || at <= *last {
                return None;
            }
            *last = at;
        }
        self.records += event.records.len() as u64;
        Some(self.records)
    }
}

#[tonic::async_trait]
impl ReplayReceiver for Receiver {
    type DeliverStream = ReceiverStream<Result<DeliverAck, Status>>;

    async fn deliver(&self, request: Request<Streaming<ReplayEvent>>) -> Result<Response<Self::DeliverStream>, Status> {
        let mut events = request.into_inner();
        let (answer, answers) = mpsc::channel(16);
        let receiver = self.clone();
        tokio::spawn(async move {
            while let Ok(Some(event)) = events.message().await {
                receiver.started.send_if_modified(|started| {
                    let first = started.is_none();
                    started.get_or_insert_with(Instant::now);
                    first
                });
                let taken = receiver.seen.lock().ok().and_then(|mut seen| seen.take(&event));
                let Some(taken) = taken else {
                    let _ = answer.send(Err(Status::invalid_argument("out of order"))).await;
                    return;
                };
                let resume_token = event.resume_token;
                if taken >= receiver.records {
                    receiver.done.send_replace(Some(Instant::now()));
                    // The process is looked at before it is answered, and ends.
                    let _ = receiver.looked_at.subscribe().wait_for(|looked_at| *looked_at).await;
                }
                if answer.send(Ok(DeliverAck { resume_token })).await.is_err() {
                    return;
                }
            }
        });
        Ok(Response::new(ReceiverStream::new(answers)))
    }
}

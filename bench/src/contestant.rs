//! Who is measured: the runtime, and what a user would pick instead. All are started, watched and ended in the same way.

use std::{env, fs, time::UNIX_EPOCH};

use anyhow::Context as _;
use clap::ValueEnum;
use meander_config::{CaptureConfig, Format, Snapshot, SnapshotMode};
use meander_proto::v1::{ChangeRecord, Operation};
use meander_test_support::{Runtime, capture_config, eventually, process::Process, unique_name};
use prost::Message as _;

use crate::{
    LIMIT, peers,
    report::{Figures, Report},
    stage::Stage,
};

/// Which way a peer is set up.
#[derive(Clone, Copy, Debug, PartialEq, Eq, ValueEnum)]
pub(crate) enum Variant {
    /// As it comes
    Default,
    /// For rate: larger batches and queues, a shorter wait, compression
    Tuned,
    /// For latency: the shortest wait, whatever it costs
    LowLatency,
}

#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Contestant {
    /// Into Kafka, in transactions.
    Kafka(Format),
    /// Into Kafka, in transactions, and into Redis.
    KafkaAndRedis,
    /// Debezium on Kafka Connect, into Kafka.
    Connect(Variant),
    /// Debezium Server, into Redis.
    Server(Variant),
}

/// Values as Debezium's JSON converter writes them without schemas.
pub(crate) const DEBEZIUM_JSON: Format = Format::DebeziumJson {
    schemas: false,
    transaction_metadata: false,
};

impl Contestant {
    /// Ours, and then each peer in each of these variants.
    pub(crate) fn with(ours: &[Self], variants: &[Variant]) -> Vec<Self> {
        let peers = variants
            .iter()
            .flat_map(|variant| [Self::Connect(*variant), Self::Server(*variant)]);
        ours.iter().copied().chain(peers).collect()
    }

    /// Has another one begin, by chance: who comes first in a round meets services that nobody has warmed up.
    pub(crate) fn take_turns<T>(contestants: &mut [T]) {
        let now = UNIX_EPOCH.elapsed().unwrap_or_default().as_secs() as usize;
        contestants.rotate_left(now % contestants.len().max(1));
    }

    pub(crate) fn name(self) -> String {
        let of = |peer: &str, variant: Variant| {
            let variant = match variant {
                Variant::Default => "defaults",
                Variant::Tuned => "tuned",
                Variant::LowLatency => "low latency",
            };
            format!("{peer}, {variant}")
        };
        match self {
            Self::Kafka(Format::Protobuf) => "Meander to Kafka".to_owned(),
            Self::Kafka(Format::DebeziumJson { .. }) => "Meander to Kafka, DebeziumJson".to_owned(),
            Self::KafkaAndRedis => "Meander to Kafka and Redis".to_owned(),
            Self::Connect(variant) => of("Debezium Connect to Kafka", variant),
            Self::Server(variant) => of("Debezium Server to Redis", variant),
        }
    }

    pub(crate) fn version(self) -> String {
        match self {
            Self::Kafka(_) | Self::KafkaAndRedis => our_version(),
            Self::Connect(_) => peers::CONNECT_VERSION.to_owned(),
            Self::Server(_) => peers::SERVER_VERSION.to_owned(),
        }
    }

    fn has_kafka(self) -> bool {
        !matches!(self, Self::Server(_))
    }

    fn has_redis(self) -> bool {
        matches!(self, Self::KafkaAndRedis | Self::Server(_))
    }
}

/// A contestant that captures `public.*` under names of its own.
pub(crate) struct Capture {
    pub(crate) contestant: Contestant,
    /// Of its slot and publication, and of what it writes.
    pub(crate) prefix: String,
    program: Program,
}

enum Program {
    Ours(Box<CaptureConfig>, Option<Runtime>),
    Peer(peers::Debezium),
}

impl Capture {
    /// One that begins with what is committed from now on: its slot is there when this returns, and it does not run.
    pub(crate) async fn of_changes(contestant: Contestant, stage: &Stage) -> anyhow::Result<Self> {
        let mut capture = Self::new(contestant, stage, SnapshotMode::Never)?;
        match &mut capture.program {
            Program::Ours(config, runtime) => {
                // The first session makes the slot.
                let runtime = runtime.insert(Runtime::capture(config));
                runtime.ready(LIMIT).await;
                runtime.terminate(LIMIT);
            }
            Program::Peer(_) => {
                capture.publish(stage).await?;
                let sql = "SELECT pg_create_logical_replication_slot($1::text::name, 'pgoutput')";
                stage.postgres.client().await.execute(sql, &[&capture.prefix]).await?;
            }
        }
        Ok(capture)
    }

    /// One that begins with the rows that are there.
    pub(crate) async fn of_rows(contestant: Contestant, stage: &Stage) -> anyhow::Result<Self> {
        let capture = Self::new(contestant, stage, SnapshotMode::Bulk)?;
        if matches!(capture.program, Program::Peer(_)) {
            capture.publish(stage).await?;
        }
        Ok(capture)
    }

    fn new(contestant: Contestant, stage: &Stage, snapshot: SnapshotMode) -> anyhow::Result<Self> {
        let prefix = unique_name("bench");
        let program = match contestant {
            Contestant::Kafka(_) | Contestant::KafkaAndRedis => {
                let redis = contestant.has_redis().then_some(&stage.redis);
                let mut config = capture_config(&stage.postgres, &stage.kafka, redis);
                config.kafka.partitions = 1;
                config.source.snapshot = Snapshot {
                    mode: snapshot,
                    ..Snapshot::default()
                };
                if let Contestant::Kafka(format) = contestant {
                    config.format = format;
                }
                return Ok(Self {
                    contestant,
                    prefix: config.kafka.topic_prefix.clone(),
                    program: Program::Ours(Box::new(config), None),
                });
            }
            Contestant::Connect(variant) => {
                let source = peers::source(stage, &prefix, variant, snapshot)?;
                peers::Debezium::connect(stage, source, variant)?
            }
            Contestant::Server(variant) => {
                let source = peers::source(stage, &prefix, variant, snapshot)?;
                peers::Debezium::server(stage, source, variant)?
            }
        };
        Ok(Self {
            contestant,
            prefix,
            program: Program::Peer(program),
        })
    }

    async fn publish(&self, stage: &Stage) -> anyhow::Result<()> {
        let sql = format!("CREATE PUBLICATION {} FOR TABLES IN SCHEMA public", self.prefix);
        Ok(stage.postgres.client().await.batch_execute(&sql).await?)
    }

    /// Starts the process.
    pub(crate) fn start(&mut self) {
        match &mut self.program {
            Program::Ours(_, Some(runtime)) => runtime.start_again(),
            Program::Ours(config, runtime) => *runtime = Some(Runtime::capture(config)),
            Program::Peer(debezium) => debezium.start(),
        }
    }

    pub(crate) fn process(&mut self) -> anyhow::Result<&mut Process> {
        match &mut self.program {
            Program::Ours(_, runtime) => runtime.as_mut().map(Runtime::process),
            Program::Peer(debezium) => debezium.process(),
        }
        .context("it was not started")
    }

    pub(crate) fn process_id(&mut self) -> anyhow::Result<u32> {
        let process = self.process()?;
        process
            .id()
            .with_context(|| format!("it has ended:\n{}", process.log_tail()))
    }

    /// Reports what it did in a round, and ends it.
    pub(crate) async fn conclude(
        self,
        stage: &Stage,
        report: &Report,
        work: &str,
        figures: Figures,
    ) -> anyhow::Result<()> {
        report.add(work, &self.contestant.name(), &self.contestant.version(), figures)?;
        self.end(stage).await
    }

    /// Ends the process, gives up the slot, and takes away what was written.
    pub(crate) async fn end(mut self, stage: &Stage) -> anyhow::Result<()> {
        self.process()?.stop(LIMIT);
        let client = stage.postgres.client().await;
        // The server needs a moment to see that nobody reads it any more.
        eventually("the slot is free", LIMIT, async || {
            let sql = "SELECT pg_drop_replication_slot($1::text::name)";
            client.execute(sql, &[&self.prefix]).await
        })
        .await;
        stage.clear(&self.prefix).await
    }

    /// Where the changes of a table are in Kafka.
    pub(crate) fn topic(&self, table: &str) -> Option<String> {
        let name = format!("{}.public.{table}", self.prefix);
        self.contestant.has_kafka().then_some(name)
    }

    /// Where the changes of a table are in Redis.
    pub(crate) fn stream(&self, table: &str) -> Option<String> {
        let name = format!("{}.public.{table}", self.prefix);
        self.contestant.has_redis().then_some(name)
    }

    /// Whether it writes records that say where a snapshot ends.
    pub(crate) fn marks_ends(&self) -> bool {
        matches!(
            self.contestant,
            Contestant::Kafka(Format::Protobuf) | Contestant::KafkaAndRedis
        )
    }

    /// Whether a record is of a row that was read or has changed; others are markers, and tombstones.
    pub(crate) fn is_change(&self, value: &[u8]) -> anyhow::Result<bool> {
        if !self.marks_ends() {
            return Ok(!value.is_empty());
        }
        Ok(matches!(
            ChangeRecord::decode(value)?.operation(),
            Operation::Insert | Operation::Update | Operation::Delete | Operation::Read
        ))
    }
}

/// Whether no row of the snapshot comes after this record of ours.
pub(crate) fn is_end_of_snapshot(value: &[u8]) -> bool {
    ChangeRecord::decode(value).is_ok_and(|record| record.operation() == Operation::SnapshotEnd)
}

/// The commit that the measured binaries were built of, and how, as bench/run.sh knows it.
pub(crate) fn our_version() -> String {
    env::var("MEANDER_BUILD").unwrap_or_else(|_| "unknown".to_owned())
}

/// What a file holds, without the end of its line.
pub(crate) fn text_of(file: impl AsRef<std::path::Path>) -> anyhow::Result<String> {
    Ok(fs::read_to_string(file)?.trim_end().to_owned())
}

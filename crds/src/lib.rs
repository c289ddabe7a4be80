//! The custom resources of Meander, group `meander.dev`, version `v1alpha1`.
//!
//! The types here are the only source of the schema: the CRD manifests, the chart's copy of them and the reference in
//! `docs/` are written by `cargo run -p meander-crds --bin crdgen`. The doc comments are what `kubectl explain` shows.

mod common;
pub mod generate;
mod pipeline;
mod replay;

pub use common::{LogLevel, Resources, SecretKeyReference, SecretReference};
pub use pipeline::{
    AcceptedGap, Acknowledgement, CdcPipeline, CdcPipelineSpec, CdcPipelineStatus, Debezium, KafkaSasl, KafkaSink,
    KafkaTls, KafkaTopics, OnOversizedRow, OnSourceGap, Origin, OversizedStatus, Partitions, PipelineFormat,
    PipelinePhase, PostgresSource, Publication, PublicationManagement, RedisDurability, RedisRetention, RedisSink,
    RedisState, RedisStatus, RefusedTable, Replication, Restarts, Runtime, SaslMechanism, SchemaVersion, SinkPosition,
    SinkPositions, Sinks, Slot, SlotReclaimPolicy, SlotStatus, Snapshot, SnapshotMode, SnapshotRequest, SnapshotStatus,
    Source, SslMode, Standby, TableSelection, TableSnapshot, TableSnapshotState, TablesStatus, TopicManagement,
};
pub use replay::{
    Beginning, ChangePosition, EndAt, GrpcTarget, HttpTarget, KafkaTarget, KafkaTargetTopics, LogTarget, OtherTopics,
    PipelineReference, PostgresTarget, RecordOffset, RedisTarget, ReplayEnd, ReplayFailures, ReplayFilter, ReplayJob,
    ReplayJobSpec, ReplayJobStatus, ReplayOperation, ReplayOrder, ReplayPhase, ReplayProgress, ReplayRange,
    ReplayRuntime, ReplayStart, ReplayTarget, RowKey, Serve, Speed, TopicProgress,
};

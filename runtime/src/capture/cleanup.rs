//! `meander-runtime cleanup`: takes away what a capture left in PostgreSQL.

use std::time::Duration;

use backon::{ExponentialBuilder, Retryable as _};
use meander_config::CaptureConfig;
use tokio::task::spawn_blocking;

use crate::{
    capture::CaptureError,
    checkpoint::{TailError, read_checkpoint},
    log::{checkpoint_key, checkpoint_topic},
    sink::{SinkError, claims::Claims, kafka::KafkaSink},
    source::postgres::preflight::{Catalog, Credentials, SourceError},
};

const READ_DEADLINE: Duration = Duration::from_secs(10);
/// The server notices within `wal_sender_timeout`, 10 s, that a reader is gone; until then the slot cannot be dropped.
const SLOT_ATTEMPTS: usize = 6;

/// Drops the slot and a managed publication, and notes in the checkpoint that this was on purpose.
///
/// # Errors
/// When PostgreSQL cannot be reached or refuses. A Kafka that is gone is no error: then the note is missing, and a pipeline that is created
/// again under the same name reports a gap.
pub async fn cleanup(config: CaptureConfig) -> Result<(), CaptureError> {
    let credentials = Credentials::read(&config.source.server())?;
    let catalog = Catalog::connect(&config.source, &credentials).await?;
    // The note comes first: with it and the slot still there, a pipeline that is created again goes on without a loss.
    let source = config.source.clone();
    let key = checkpoint_key(&config.pipeline.namespace, &config.pipeline.name, &source.slot_name);
    let claims = Claims::new(config.kafka.cluster(), &config.kafka.topic_prefix, key);
    if let Err(error) = release(config).await {
        tracing::warn!(%error, "the checkpoint was not released; the slot is dropped all the same");
    }
    // A claim is made before there is a checkpoint.
    if let Err(error) = claims.withdraw().await {
        tracing::warn!(%error, "the claim on topicPrefix was not withdrawn; the slot is dropped all the same");
    }
    (|| catalog.drop_slot_and_publication(&source))
        .retry(
            ExponentialBuilder::default()
                .with_min_delay(Duration::from_secs(1))
                .with_max_times(SLOT_ATTEMPTS),
        )
        .when(|error| matches!(error, SourceError::SlotActive { .. }))
        .await?;
    tracing::info!(slot = source.slot_name, "dropped the replication slot");
    Ok(())
}

async fn release(config: CaptureConfig) -> Result<(), CaptureError> {
    let (namespace, name) = (&config.pipeline.namespace, &config.pipeline.name);
    let topic = checkpoint_topic(namespace, name);
    let key = checkpoint_key(namespace, name, &config.source.slot_name);
    spawn_blocking(move || {
        let read = || read_checkpoint(&config.kafka.cluster(), &topic, &key, READ_DEADLINE);
        match read() {
            // The pipeline never got as far as making its topic.
            Err(TailError::NoSuchPartition { .. }) => return Ok(()),
            Err(error) => return Err(error.into()),
            Ok(_) => {}
        }
        // A runtime that still lives, against all expectation, cannot commit after this; so what is read now is the last word.
        let kafka = KafkaSink::open(&config)?;
        if let Some(mut checkpoint) = read()? {
            checkpoint.released = true;
            kafka.commit_checkpoint(&checkpoint)?;
        }
        Ok::<_, SinkError>(())
    })
    .await??;
    Ok(())
}

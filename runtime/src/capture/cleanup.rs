//! `meander-runtime cleanup`: takes away what a capture left in PostgreSQL, and its claims on names.

use std::time::{Duration, Instant};

use backon::{ExponentialBuilder, Retryable as _};
use meander_config::{CaptureConfig, PostgresSource};
use tokio::{task::spawn_blocking, time::timeout};

use crate::{
    capture::CaptureError,
    checkpoint::{TailError, read_checkpoint},
    log::{checkpoint_key, checkpoint_topic},
    sink::{SinkError, claims::Claims, kafka::KafkaSink, redis, topics::Remarks},
    source::postgres::preflight::{Catalog, Credentials, SourceError},
};

const READ_DEADLINE: Duration = Duration::from_secs(10);
const REDIS_DEADLINE: Duration = Duration::from_secs(5);
/// For how long a database that does not answer is asked again: longer than it takes to start or fail over, and less than the operator gives,
/// since the claims are given up after it.
const CONNECT_PATIENCE: Duration = Duration::from_secs(90);
/// The same where nothing was ever captured, and most likely nothing is there to be dropped.
const UNCAPTURED_PATIENCE: Duration = Duration::from_secs(15);
/// The server notices within `wal_sender_timeout`, 10 s, that a reader is gone; until then the slot cannot be dropped.
const SLOT_ATTEMPTS: usize = 6;

/// Drops the slot and a managed publication, notes in the checkpoint that this was on purpose, and gives up the claims on topic prefix and
/// stream prefix.
///
/// # Errors
/// When PostgreSQL cannot be reached for a minute and a half, or refuses. A Kafka that is gone is no error: then the note is missing, and a pipeline that is created
/// again under the same name reports a gap. Nor is a Redis: then the claim is left, and whoever is refused by it is told how to remove it.
pub async fn cleanup(config: CaptureConfig) -> Result<(), CaptureError> {
    // The note comes first: with it and the slot still there, a pipeline that is created again goes on without a loss. It needs no
    // database, and so neither it nor the claims are kept by one that is gone.
    let source = config.source.clone();
    let key = checkpoint_key(&config.pipeline.namespace, &config.pipeline.name, &source.slot_name);
    let has_captured = release(config.clone()).await.unwrap_or_else(|error| {
        tracing::warn!(%error, "the checkpoint was not released; the slot is dropped all the same");
        true
    });
    let patience = if has_captured {
        CONNECT_PATIENCE
    } else {
        UNCAPTURED_PATIENCE
    };
    let dropped = drop_slot(&source, Instant::now() + patience).await;
    // Whoever still reads the slot would only claim both again, when nobody comes any more to give them up.
    if !matches!(dropped, Err(SourceError::SlotActive { .. })) {
        give_up_claims(&config, &key).await;
    }
    Ok(dropped?)
}

/// Drops slot and publication. A database that does not answer is not asked again after the deadline.
async fn drop_slot(source: &PostgresSource, deadline: Instant) -> Result<(), SourceError> {
    let credentials = Credentials::read(&source.server())?;
    let catalog = (|| Catalog::connect(source, &credentials))
        .retry(
            ExponentialBuilder::default()
                .with_max_delay(Duration::from_secs(5))
                .without_max_times(),
        )
        // An attempt can take as long as the pauses do.
        .when(|error| matches!(error, SourceError::Unreachable { .. }) && Instant::now() < deadline)
        .notify(|error, _| tracing::warn!(%error, "trying again"))
        .await?;
    (|| catalog.drop_slot_and_publication(source))
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

async fn give_up_claims(config: &CaptureConfig, key: &str) {
    // A claim is made before there is a checkpoint.
    let claims = Claims::new(config.kafka.cluster(), &config.kafka.topic_prefix, key.to_owned());
    if let Err(error) = claims.withdraw().await {
        tracing::warn!(%error, "the claim on topicPrefix was not withdrawn");
    }
    let Some(redis) = &config.redis else { return };
    match timeout(REDIS_DEADLINE, redis::release(redis, key)).await {
        Ok(Ok(())) => {}
        Ok(Err(error)) => tracing::warn!(%error, "the claim on streamPrefix was not withdrawn"),
        Err(_) => tracing::warn!("Redis does not answer, and keeps the claim on streamPrefix"),
    }
}

/// Notes in the checkpoint that the pipeline is gone. False where there is none.
async fn release(config: CaptureConfig) -> Result<bool, CaptureError> {
    let (namespace, name) = (&config.pipeline.namespace, &config.pipeline.name);
    let topic = checkpoint_topic(namespace, name);
    let key = checkpoint_key(namespace, name, &config.source.slot_name);
    spawn_blocking(move || {
        let read = || read_checkpoint(&config.kafka.cluster(), &topic, &key, READ_DEADLINE);
        match read() {
            // The pipeline never got as far as making its topic.
            Err(TailError::NoSuchPartition { .. }) => return Ok(false),
            Err(error) => return Err(error.into()),
            Ok(_) => {}
        }
        // A runtime that still lives, against all expectation, cannot commit after this; so what is read now is the last word.
        let kafka = KafkaSink::open(&config, Remarks::default())?;
        let Some(mut checkpoint) = read()? else {
            return Ok(false);
        };
        checkpoint.released = true;
        kafka.commit_checkpoint(&checkpoint)?;
        Ok::<_, SinkError>(true)
    })
    .await?
    .map_err(Into::into)
}

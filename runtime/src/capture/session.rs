//! One session: from owning the slot to losing it.

use std::{future::pending, time::Duration};

use meander_config::Format;
use meander_traces::step;
use tokio::{
    runtime::Handle,
    sync::watch,
    task::{JoinError, JoinHandle, spawn_blocking},
    time::timeout,
};
use tokio_util::sync::CancellationToken;

use crate::{
    batch::Destination,
    capture::{
        CaptureError, Context,
        dropped::Dropped,
        heartbeat, monitor,
        observe::{self, Inflight},
        open::{Session, open},
        snapshot::Incremental,
        stream::{Queues, Stream, bulk::Bulk},
        versions::Versions,
    },
    encode::{DebeziumEncoder, Encoder, ProtobufEncoder},
    log::transaction_topic,
    position::Epoch,
    progress::ConditionType,
    sink::{
        Durable,
        queue::queue,
        redis::{
            feed::Feed,
            live::{Live, Offers},
        },
        topics,
    },
    size_limit::SizeLimit,
    source::postgres::{assemble::Assembler, preflight::wire_failure},
};

/// How long the end of a session waits for Redis to take what is on its way; what it does not take is refilled by the next one.
const PARTING: Duration = Duration::from_secs(5);

pub(super) fn encoder(context: &Context) -> Box<dyn Encoder> {
    let config = &context.config;
    match config.format {
        Format::Protobuf => Box::new(ProtobufEncoder::default()),
        Format::DebeziumJson {
            schemas,
            transaction_metadata,
        } => {
            let encoder = DebeziumEncoder::new(&config.kafka.topic_prefix, &config.source.database, schemas)
                .telling(context.keyless.clone());
            if !transaction_metadata {
                return Box::new(encoder);
            }
            let stream = config
                .redis
                .as_ref()
                .map(|redis| transaction_topic(&redis.stream_prefix));
            Box::new(encoder.with_transactions(Destination {
                topic: transaction_topic(&config.kafka.topic_prefix),
                stream: stream.unwrap_or_default(),
                // What is said of a transaction is small.
                limit: SizeLimit::default(),
            }))
        }
    }
}

/// Runs one session until `shutdown`, or until something fails.
pub(super) async fn run(context: &Context, shutdown: &CancellationToken) -> Result<(), CaptureError> {
    let config = &context.config;
    context.keyless.clear();
    context.remarks.clear();
    let pipeline = &config.pipeline;
    let start = step!("start", namespace = pipeline.namespace, pipeline = pipeline.name);
    let Session {
        catalog,
        selection,
        topics,
        reader,
        received,
        mut status,
        acknowledged,
        kafka,
        mut checkpoint,
        owner,
        schemas,
    } = tokio::select! {
        session = step(start, open(context)) => session.inspect_err(|error| {
            // The source was looked at before either: what was wrong with it is over.
            if matches!(error, CaptureError::Gap(_) | CaptureError::Sink(_)) {
                context.set(ConditionType::SourceReady, true, "Ready", "The source can be reached.");
            }
        })?,
        () = shutdown.cancelled() => return Ok(()),
    };
    let (snapshot_progress, snapshot_changes) = watch::channel(None);
    let (shown_schemas, schema_versions) = watch::channel(Vec::new());
    let (versions, known_tables) = Versions::new(schemas, shown_schemas);
    let bulk = Bulk::new(&config.source, &checkpoint, snapshot_progress.clone());
    let snapshot = Incremental::new(
        config,
        &checkpoint,
        snapshot_progress,
        context.snapshot_problems.clone(),
    )?;
    if snapshot.is_none() {
        checkpoint.snapshot.put_down();
    }

    let (kafka_durable, kafka_progress) = watch::channel(Durable {
        position: checkpoint.published,
        safe: checkpoint.acknowledged,
        ..Durable::default()
    });
    let (kafka_queue, kafka_batches) = queue();
    let (checkpoints, mut checkpoint_changes) = watch::channel(checkpoint.clone());
    acknowledged.send_replace(Some(checkpoint.acknowledged));
    let forward = tokio::spawn(async move {
        while checkpoint_changes.changed().await.is_ok() {
            let at = checkpoint_changes.borrow_and_update().acknowledged;
            acknowledged.send_replace(Some(at));
        }
    });
    let mut redis_progress = None;
    let mut redis_feed = None;
    let redis_offers = config.redis.as_ref().map(|redis| {
        let live = Live::default();
        let (feed, progress) = Feed::new(
            config,
            redis,
            live.clone(),
            kafka_progress.clone(),
            checkpoints.subscribe(),
            context.metrics.redis.clone(),
            context.rival.clone(),
        );
        redis_feed = Some(tokio::spawn(feed.run()));
        redis_progress = Some(progress);
        Offers::new(live)
    });
    let inflight = Inflight::default();
    context.metrics.found(checkpoint.events_total);
    let observer = tokio::spawn(observe::run(
        context.clone(),
        kafka_progress,
        redis_progress.clone(),
        checkpoints.subscribe(),
        received.clone(),
        inflight.clone(),
        (snapshot_changes, schema_versions),
    ));
    let mut kafka_task = spawn_blocking({
        let checkpoint = checkpoint.clone();
        let runtime = Handle::current();
        move || {
            kafka.publish(
                &runtime,
                checkpoint,
                kafka_batches,
                redis_progress,
                &kafka_durable,
                &checkpoints,
            )
        }
    });

    context.set(
        ConditionType::Progressing,
        true,
        "Streaming",
        "Changes are captured as they are committed.",
    );
    context.ready.send_replace(true);
    context.metrics.owns_slot.set(1);
    let encoder = encoder(context);
    let mut stream = Stream::new(
        config,
        Assembler::new(Epoch(checkpoint.epoch), encoder.transactions().is_some())
            .with_partings(checkpoint.partings.clone()),
        encoder,
        topics,
        selection,
        &checkpoint,
        received,
        inflight,
        context.heartbeats.clone(),
        context.ownerless.clone(),
        snapshot,
        versions,
        bulk,
    );
    let mut kafka_result = None;
    let queues = Queues {
        kafka: kafka_queue,
        redis: redis_offers,
    };
    let result = tokio::select! {
        result = stream.run(reader, &catalog, queues, shutdown) => result,
        result = &mut kafka_task => {
            kafka_result = Some(result);
            Ok(())
        }
        error = crash(&mut redis_feed) => Err(error.into()),
        error = monitor::run(context, owner, Dropped::new(known_tables)) => Err(error.into()),
        () = heartbeat::run(context) => Ok(()),
        () = topics::watch(&config.kafka, &context.remarks) => Ok(()),
        error = status.failed() => Err(wire_failure(&config.source, "", error).into()),
    };
    // The queues are closed now: the sinks take what is left, and the last checkpoint acknowledges it.
    context.ready.send_replace(false);
    context.metrics.owns_slot.set(0);
    let kafka_result = match kafka_result {
        Some(result) => result,
        None => kafka_task.await,
    };
    if let Some(mut feed) = redis_feed
        && timeout(PARTING, &mut feed).await.is_err()
    {
        tracing::warn!("Redis did not take in time what was on its way; it will be refilled");
        feed.abort();
    }
    forward.await?;
    status.finish().await;
    observer.await?;
    // The first cause counts: what follows from it says less.
    result?;
    kafka_result??;
    Ok(())
}

/// Waits until the feed crashes: it ends by itself only with the session.
async fn crash(feed: &mut Option<JoinHandle<()>>) -> JoinError {
    if let Some(task) = feed
        && let Err(error) = task.await
    {
        *feed = None;
        return error;
    }
    *feed = None;
    pending().await
}

//! One session: from owning the slot to losing it.

use tokio::{
    runtime::Handle,
    sync::{mpsc, watch},
    task::spawn_blocking,
};
use tokio_util::sync::CancellationToken;

use crate::{
    capture::{
        CaptureError, Context,
        observe::{self, Inflight},
        open::{Session, open},
        stream::{Queues, Stream},
    },
    encode::ProtobufEncoder,
    position::Epoch,
    progress::ConditionType,
    sink::{Durable, QUEUED_BATCHES},
    source::postgres::{assemble::Assembler, preflight::wire_failure},
};

/// Runs one session until `shutdown`, or until something fails.
pub(super) async fn run(context: &Context, shutdown: &CancellationToken) -> Result<(), CaptureError> {
    let config = &context.config;
    let Session {
        catalog,
        selection,
        topics,
        reader,
        received,
        mut status,
        acknowledged,
        kafka,
        redis,
        checkpoint,
    } = tokio::select! {
        session = open(context) => session?,
        () = shutdown.cancelled() => return Ok(()),
    };

    let (kafka_durable, kafka_progress) = watch::channel(Durable {
        position: checkpoint.published,
        ..Durable::default()
    });
    let (kafka_queue, kafka_batches) = mpsc::channel(QUEUED_BATCHES);
    let mut sinks = vec![kafka_progress];
    let mut queues = vec![kafka_queue];
    let mut resume_after = checkpoint.published;
    let mut redis_task = None;
    if let Some(redis) = redis {
        resume_after = resume_after.min(redis.position());
        let (durable, progress) = watch::channel(Durable {
            position: redis.position(),
            ..Durable::default()
        });
        let (queue, batches) = mpsc::channel(QUEUED_BATCHES);
        redis_task = Some(tokio::spawn(redis.publish(batches, sinks[0].clone(), durable)));
        sinks.push(progress);
        queues.push(queue);
    }

    let (checkpoints, mut checkpoint_changes) = watch::channel(checkpoint.clone());
    acknowledged.send_replace(Some(checkpoint.acknowledged));
    let forward = tokio::spawn(async move {
        while checkpoint_changes.changed().await.is_ok() {
            let at = checkpoint_changes.borrow_and_update().acknowledged;
            acknowledged.send_replace(Some(at));
        }
    });
    let inflight = Inflight::default();
    let observer = tokio::spawn(observe::run(
        context.reporter.clone(),
        context.metrics.clone(),
        sinks.clone(),
        checkpoints.subscribe(),
        received.clone(),
        inflight.clone(),
    ));
    let redis_progress = sinks.get(1).cloned();
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
    let mut stream = Stream::new(
        config,
        Assembler::new(Epoch(checkpoint.epoch)),
        Box::new(ProtobufEncoder::default()),
        topics,
        selection,
        &checkpoint,
        resume_after,
        received,
        inflight,
    );
    let mut kafka_result = None;
    let mut redis_result = None;
    let result = tokio::select! {
        result = stream.run(reader, &catalog, Queues::new(queues), shutdown) => result,
        result = &mut kafka_task => {
            kafka_result = Some(result);
            Ok(())
        }
        result = async { match &mut redis_task { Some(task) => task.await, None => std::future::pending().await } } => {
            redis_result = Some(result);
            redis_task = None;
            Ok(())
        }
        error = status.failed() => Err(wire_failure(&config.source, "", error).into()),
    };
    // The queues are closed now: the sinks take what is left, and the last checkpoint acknowledges it.
    context.ready.send_replace(false);
    if let Some(task) = redis_task {
        redis_result = Some(task.await);
    }
    let kafka_result = match kafka_result {
        Some(result) => result,
        None => kafka_task.await,
    };
    forward.await?;
    status.finish().await;
    observer.await?;
    // The first cause counts: what follows from it says less.
    result?;
    redis_result.transpose()?.transpose()?;
    kafka_result??;
    Ok(())
}

//! The controller of `CdcPipeline`.
//!
//! A resource passes five stages: [`dereference`] reads what it refers to, [`validate`] judges it, [`build`] makes the objects that
//! it needs, [`apply`] makes them so, [`status`] says what came of it. On deletion [`cleanup`] takes the place of the last two.

mod apply;
pub mod build;
pub mod cleanup;
pub mod dereference;
pub mod metrics;
pub mod slot;
pub mod status;
pub mod validate;

use std::{convert::Infallible, sync::Arc, time::Duration};

use futures::StreamExt as _;
use jiff::Timestamp;
use k8s_openapi::api::{apps::v1::Deployment, batch::v1::Job};
use kube::{
    Api, ResourceExt as _,
    api::{Patch, PatchParams},
    runtime::{
        Controller, WatchStreamExt as _,
        controller::{Action, Config},
        events::EventType,
        predicates,
        reflector::{ObjectRef, store::Writer},
        utils::Predicate as _,
        watcher,
    },
};
use meander_crds::CdcPipeline;
use meander_proto::v1::Directive;
use serde_json::json;
use tokio::sync::mpsc;
use tokio_stream::wrappers::ReceiverStream;
use tokio_util::sync::CancellationToken;

use self::{
    cleanup::Ending,
    dereference::Facts,
    status::{Inputs, SILENCE},
    validate::ValidPipeline,
};
use crate::{
    conditions::{self, READY, RUNTIME_AVAILABLE, SOURCE_READY},
    context::{CONCURRENCY, Context, api_of},
    error::Error,
    naming::{FIELD_MANAGER, MANAGED_SELECTOR},
    progress::{Kind, ResourceKey},
};

/// Keeps a deleted pipeline until its slot is cleaned up.
pub const FINALIZER: &str = "meander.dev/slot-cleanup";

/// The annotation by which somebody who looks into a pipeline has the operator leave its objects as they are; `true` is its one value.
pub const PAUSED: &str = "meander.dev/paused";

/// Whether what the pipeline needs is to be left as it is. A deletion goes on: what waits for it would wait for ever.
pub fn is_paused(pipeline: &CdcPipeline) -> bool {
    pipeline.metadata.deletion_timestamp.is_none()
        && pipeline.annotations().get(PAUSED).is_some_and(|value| value == "true")
}

/// Reconciles pipelines until `shutdown`, and says when all of them are known.
pub async fn run(
    context: Arc<Context>,
    writer: Writer<CdcPipeline>,
    pokes: mpsc::Receiver<ObjectRef<CdcPipeline>>,
    shutdown: CancellationToken,
    ready: impl FnOnce() + Send,
) {
    let store = context.pipelines.clone();
    // Its name is a constant that is valid and of one kind; if it were not, an operator without it is better than none.
    if let Err(error) = metrics::Readiness::new(store.clone()).and_then(|ready| context.metrics.register(ready)) {
        tracing::error!(%error, "pipelines that are ready are not told from others");
    }
    // Statuses are written here and nowhere else: only what others change is worth a reconcile.
    let changes = predicates::generation
        .combine(predicates::finalizers)
        .combine(predicates::annotations);
    let pipelines = watcher(api_of(&context), watcher::Config::default())
        .default_backoff()
        .reflect(writer)
        .applied_objects()
        .predicate_filter(changes, Default::default());
    let owned = watcher::Config::default().labels(MANAGED_SELECTOR);
    let known = store.clone();
    let controller = Controller::for_stream(pipelines, store)
        .with_config(Config::default().concurrency(CONCURRENCY))
        .owns(api_of::<Deployment>(&context), owned.clone())
        .owns(api_of::<Job>(&context), owned)
        .reconcile_on(ReceiverStream::new(pokes))
        // Their pods are to trust others.
        .reconcile_all_on(context.settings.trust.changes())
        .graceful_shutdown_on(shutdown.cancelled_owned())
        .run(reconcile, |_, never: &Infallible, _| match *never {}, context)
        .for_each(|_| std::future::ready(()));
    let known = async {
        if known.wait_until_ready().await.is_ok() {
            ready();
        }
    };
    futures::join!(controller, known);
}

/// One reconcile of one pipeline. It never fails: an error is in the status, and decides when the next one is.
pub async fn reconcile(pipeline: Arc<CdcPipeline>, context: Arc<Context>) -> Result<Action, Infallible> {
    let key = ResourceKey {
        kind: Kind::CdcPipeline,
        namespace: pipeline.namespace().unwrap_or_default(),
        name: pipeline.name_any(),
    };
    let work = Box::pin(reconcile_key(&key, &context));
    Ok(context.reconcile(&key, work).await)
}

async fn reconcile_key(key: &ResourceKey, context: &Context) -> Result<Action, Error> {
    let api: Api<CdcPipeline> = Api::namespaced(context.client.clone(), &key.namespace);
    // Read anew: the cache may not yet have the status that was written a moment ago.
    let found = api
        .get_opt(&key.name)
        .await
        .map_err(|error| Error::from_api(READY, "reading the pipeline", &error))?;
    let Some(mut pipeline) = found else {
        context.forget(key);
        return Ok(Action::await_change());
    };
    if let Some(status) = &mut pipeline.status {
        conditions::keep_ours(&mut status.conditions);
    }
    let uid = pipeline.uid().unwrap_or_default();
    context.tracker.observe(key, &uid);
    let generation = pipeline.metadata.generation.unwrap_or(0);
    context.tracker.direct(
        key,
        &uid,
        Directive {
            generation,
            ..Directive::default()
        },
    );

    let mut facts = None;
    let mut ending = None;
    let outcome = if is_paused(&pipeline) {
        look(context, &pipeline, &mut facts).await
    } else if pipeline.metadata.deletion_timestamp.is_none() {
        stages(context, &mut pipeline, key, &mut facts).await
    } else if pipeline.finalizers().iter().any(|finalizer| finalizer == FINALIZER) {
        last_stages(context, &pipeline, &mut facts, &mut ending).await
    } else {
        // Somebody else's finalizer keeps it; there is nothing left to do here.
        return Ok(Action::await_change());
    };
    let observation = context.tracker.observe(key, &uid);
    let inputs = Inputs {
        pipeline: &pipeline,
        facts: facts.as_ref(),
        outcome: outcome.as_ref(),
        observation: &observation,
        now: Timestamp::now(),
    };
    let new = status::status(&inputs);
    let old = pipeline.status.clone().unwrap_or_default();
    let significant = status::significant(&old) != status::significant(&new);
    let written = crate::status::write(context, &pipeline, key, &observation, (&old, &new), significant).await;
    if written.is_ok() {
        context
            .events
            .transition(&pipeline, READY, &old.conditions, &new.conditions)
            .await;
        // Once the server is there again, all is as before: nothing else would tell of it later.
        if conditions::state(&new.conditions, SOURCE_READY) == Some(("True", "Upgraded")) {
            context
                .events
                .transition(&pipeline, SOURCE_READY, &old.conditions, &new.conditions)
                .await;
        }
    }
    // Whether its last status could be written or not: it goes.
    if let Some(ending) = ending {
        conclude(context, &api, &pipeline, ending).await?;
        return Ok(Action::await_change());
    }
    let deferred = written?;
    outcome?;
    let next = if pipeline.metadata.deletion_timestamp.is_some() {
        Duration::from_secs(2)
    } else if conditions::state(&new.conditions, READY).is_some_and(|(status, _)| status == "True") {
        SILENCE.saturating_sub(observation.silence).max(Duration::from_secs(1)) + Duration::from_secs(1)
    } else {
        // What a pod waits for changes without the Deployment changing.
        Duration::from_secs(5)
    };
    Ok(Action::requeue(deferred.unwrap_or(next).min(next)))
}

/// What there is, and whether the spec is fit, with nothing done about either.
async fn look(context: &Context, pipeline: &CdcPipeline, facts: &mut Option<Facts>) -> Result<ValidPipeline, Error> {
    let facts = facts.insert(dereference::dereference(context, pipeline).await?);
    validate::validate(pipeline, facts, &context.settings)
}

/// From the spec to objects.
async fn stages(
    context: &Context,
    pipeline: &mut CdcPipeline,
    key: &ResourceKey,
    facts: &mut Option<Facts>,
) -> Result<ValidPipeline, Error> {
    let valid = look(context, pipeline, facts).await?;
    let objects = build::build(pipeline, &valid, &context.settings);
    // Before there can be a slot.
    if !pipeline.finalizers().iter().any(|finalizer| finalizer == FINALIZER) {
        let mut finalizers = pipeline.finalizers().to_vec();
        finalizers.push(FINALIZER.to_owned());
        if let Some(version) = set_finalizers(context, pipeline, finalizers).await? {
            // What the status is written to.
            pipeline.metadata.resource_version = Some(version);
        }
    }
    let (deployment, changed) = Box::pin(apply::apply(context, pipeline, objects)).await?;
    if let Some(facts) = facts {
        facts.deployment = Some(deployment);
    }
    if changed {
        context.tracker.restarted(key);
    }
    Ok(valid)
}

/// From a deletion to the end of the slot.
async fn last_stages(
    context: &Context,
    pipeline: &CdcPipeline,
    facts: &mut Option<Facts>,
    ending: &mut Option<Ending>,
) -> Result<ValidPipeline, Error> {
    // First, so that it holds whatever fails below.
    *ending = cleanup::foregone(pipeline, context.claim.since(), Timestamp::now());
    let facts = facts.insert(dereference::dereference(context, pipeline).await?);
    let valid = validate::validate(pipeline, facts, &context.settings);
    if ending.is_none() {
        *ending = cleanup::cleanup(context, pipeline, facts, &valid).await?;
    }
    valid
}

/// Says how it ended, and lets the resource go.
async fn conclude(
    context: &Context,
    api: &Api<CdcPipeline>,
    pipeline: &CdcPipeline,
    ending: Ending,
) -> Result<(), Error> {
    context.may_write(RUNTIME_AVAILABLE)?;
    match &ending {
        Ending::Dropped => {
            let note = format!("Dropped the replication slot {}.", validate::slot_of(pipeline));
            context
                .events
                .publish(pipeline, EventType::Normal, "Cleanup", "SlotDropped", &note)
                .await;
        }
        Ending::Retained => {
            let note = format!(
                "The replication slot {} stays, as reclaimPolicy says.",
                validate::slot_of(pipeline)
            );
            context
                .events
                .publish(pipeline, EventType::Normal, "Cleanup", "SlotRetained", &note)
                .await;
        }
        Ending::Anothers(cause) => {
            // The remedy comes first here too.
            let note = format!(
                "Nothing was dropped.{} Cause: {cause}",
                cleanup::left_of_conflict(pipeline)
            );
            context
                .events
                .publish(pipeline, EventType::Normal, "Cleanup", "SlotRetained", &note)
                .await;
        }
        Ending::LeftBehind(cause) => {
            // The remedy comes first: a long cause must not push it out of the event.
            let note = format!("{} Cause: {cause}", cleanup::remedy(pipeline));
            context
                .events
                .publish(pipeline, EventType::Warning, "Cleanup", "SlotLeftBehind", &note)
                .await;
        }
    }
    // The status may just have been written, and then the resource version has moved on.
    let current = api.get_opt(&pipeline.name_any()).await;
    let current = current.map_err(|error| Error::from_api(READY, "reading the pipeline", &error))?;
    if let Some(current) = current.filter(|current| current.uid() == pipeline.uid()) {
        let mut finalizers = current.finalizers().to_vec();
        finalizers.retain(|finalizer| finalizer != FINALIZER);
        set_finalizers(context, &current, finalizers).await?;
    }
    Ok(())
}

/// Returns the resource version that this makes, if the resource is still there.
async fn set_finalizers(
    context: &Context,
    pipeline: &CdcPipeline,
    finalizers: Vec<String>,
) -> Result<Option<String>, Error> {
    context.may_write(RUNTIME_AVAILABLE)?;
    let api: Api<CdcPipeline> = Api::namespaced(context.client.clone(), &pipeline.namespace().unwrap_or_default());
    // The list is replaced as a whole: the resource version makes sure that nobody else's entry is lost.
    let patch = json!({
        "metadata": {"resourceVersion": pipeline.resource_version(), "finalizers": finalizers},
    });
    let params = PatchParams {
        field_manager: Some(FIELD_MANAGER.to_owned()),
        ..PatchParams::default()
    };
    match api.patch(&pipeline.name_any(), &params, &Patch::Merge(&patch)).await {
        Ok(patched) => Ok(patched.resource_version()),
        Err(kube::Error::Api(status)) if status.code == 404 => Ok(None),
        Err(error) => Err(Error::from_api(RUNTIME_AVAILABLE, "setting the finalizer", &error)),
    }
}

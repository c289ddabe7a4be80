//! The controller of `CdcPipeline`.
//!
//! A resource passes five stages: [`dereference`] reads what it refers to, [`validate`] judges it, [`build`] makes the objects that
//! it needs, [`apply`] makes them so, [`status`] says what came of it. On deletion [`cleanup`] takes the place of the last two.

mod apply;
pub mod build;
pub mod cleanup;
pub mod dereference;
pub mod metrics;
pub mod rollout;
pub mod slot;
pub mod status;
pub mod validate;

use std::{convert::Infallible, sync::Arc, time::Duration};

use futures::{Stream, StreamExt as _, TryStreamExt as _};
use jiff::Timestamp;
use kube::{
    Api, ResourceExt as _,
    api::{Patch, PatchParams},
    runtime::{
        Controller, WatchStreamExt as _,
        controller::{Action, Config},
        predicates,
        reflector::{ObjectRef, store::Writer},
        utils::Predicate as _,
        watcher::{Event, watcher},
    },
};
use meander_crds::CdcPipeline;
use meander_proto::v1::Directive;
use serde_json::json;
use tokio_util::sync::CancellationToken;

use self::{cleanup::Ending, dereference::Facts, status::Inputs, validate::ValidPipeline};
use crate::{
    client::watching,
    conditions::{self, DEGRADED, READY, RUNTIME_AVAILABLE, SOURCE_READY},
    context::{CONCURRENCY, Context, api_of, until_silent},
    error::Error,
    naming::FIELD_MANAGER,
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

/// Reconciles pipelines until `shutdown`, those that `triggers` names and those that change, and says when all of them are known.
pub async fn run(
    context: Arc<Context>,
    writer: Writer<CdcPipeline>,
    triggers: impl Stream<Item = ObjectRef<CdcPipeline>> + Send + 'static,
    shutdown: CancellationToken,
    ready: impl FnOnce() + Send,
) {
    let store = context.caches.pipelines.clone();
    // Its name is a constant that is valid and of one kind; if it were not, an operator without it is better than none.
    if let Err(error) = metrics::Readiness::new(store.clone()).and_then(|ready| context.metrics.register(ready)) {
        tracing::error!(%error, "pipelines that are ready are not told from others");
    }
    // Statuses are written here and nowhere else: only what others change is worth a reconcile.
    let changes = predicates::generation
        .combine(predicates::finalizers)
        .combine(predicates::annotations);
    let gone = context.clone();
    let pipelines = watcher(api_of(&context), watching())
        .default_backoff()
        .modify(|pipeline: &mut CdcPipeline| pipeline.metadata.managed_fields = None)
        .reflect(writer)
        // One that is gone is reconciled no more.
        .inspect_ok(move |event| match event {
            Event::Delete(pipeline) => gone.forget(&key_of(pipeline)),
            Event::InitDone => {
                let object = |key: &ResourceKey| ObjectRef::new(&key.name).within(&key.namespace);
                let is_there = |key: &ResourceKey| gone.caches.pipelines.get(&object(key)).is_some();
                gone.forget_missing(Kind::CdcPipeline, is_there);
            }
            Event::Init | Event::Apply(_) | Event::InitApply(_) => {}
        })
        .applied_objects()
        .predicate_filter(changes, Default::default());
    let known = store.clone();
    let controller = Controller::for_stream(pipelines, store)
        .with_config(Config::default().concurrency(CONCURRENCY))
        .reconcile_on(triggers)
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
    let key = key_of(&pipeline);
    let work = Box::pin(reconcile_key(&key, &context));
    Ok(context.reconcile(&key, work).await)
}

fn key_of(pipeline: &CdcPipeline) -> ResourceKey {
    ResourceKey {
        kind: Kind::CdcPipeline,
        namespace: pipeline.namespace().unwrap_or_default(),
        name: pipeline.name_any(),
    }
}

async fn reconcile_key(key: &ResourceKey, context: &Context) -> Result<Action, Error> {
    let Some(mut pipeline) = context.current(&context.caches.pipelines, key).await? else {
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
        look(context, &pipeline, key, &mut facts).await
    } else if pipeline.metadata.deletion_timestamp.is_none() {
        stages(context, &mut pipeline, key, &mut facts).await
    } else if pipeline.finalizers().iter().any(|finalizer| finalizer == FINALIZER) {
        last_stages(context, &pipeline, key, &mut facts, &mut ending).await
    } else {
        // Somebody else's finalizer keeps it; there is nothing left to do here.
        return Ok(Action::await_change());
    };
    if outcome.is_err() {
        rollout::give_up(context, key, facts.as_ref());
    }
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
        // Ready does not tell of it, and what a reader of the log must know of is said once.
        if conditions::state(&new.conditions, DEGRADED) == Some(("True", "ValuesOmitted")) {
            context
                .events
                .transition(&pipeline, DEGRADED, &old.conditions, &new.conditions)
                .await;
        }
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
        conclude(context, &pipeline, key, ending).await?;
        return Ok(Action::await_change());
    }
    let deferred = written?;
    outcome?;
    let next = if pipeline.metadata.deletion_timestamp.is_some() {
        Duration::from_secs(2)
    } else if facts.as_ref().is_some_and(|facts| facts.secrets.is_some()) {
        // Secrets are not watched.
        Duration::from_secs(5)
    } else if facts.is_some_and(|facts| facts.waits_for.is_some()) {
        // Nobody tells when its turn comes, and to look costs no request.
        Duration::from_secs(10)
    } else {
        until_silent(&observation)
    };
    Ok(Action::requeue(deferred.unwrap_or(next).min(next)))
}

/// What there is, and whether the spec is fit, with nothing done about either.
async fn look(
    context: &Context,
    pipeline: &CdcPipeline,
    key: &ResourceKey,
    facts: &mut Option<Facts>,
) -> Result<ValidPipeline, Error> {
    let facts = facts.insert(dereference::known(context, pipeline, key));
    let valid = validate::validate(pipeline, facts, &context.settings)?;
    facts.waits_for = rollout::waits_for(context, pipeline, key, facts.deployment.as_ref());
    if facts.waits_for.is_some() {
        return Ok(valid);
    }
    let wanted = build::build(pipeline, &valid, &context.settings).deployment;
    if dereference::is_started(facts, pipeline, wanted) {
        return Ok(valid);
    }
    facts.secrets = dereference::secrets(context, pipeline).await?;
    validate::validate(pipeline, facts, &context.settings)
}

/// From the spec to objects.
async fn stages(
    context: &Context,
    pipeline: &mut CdcPipeline,
    key: &ResourceKey,
    facts: &mut Option<Facts>,
) -> Result<ValidPipeline, Error> {
    let valid = match look(context, pipeline, key, facts).await {
        Ok(valid) => valid,
        Err(error) => {
            // What is wrong with the spec is what a person waits for.
            if let Err(lost) = apply::keep_trust(context, pipeline, key).await {
                tracing::warn!(error = %lost, "what runs was not told of the operator's authority");
            }
            return Err(error);
        }
    };
    let objects = build::build(pipeline, &valid, &context.settings);
    if facts.as_ref().is_some_and(|facts| facts.waits_for.is_some()) {
        Box::pin(apply::apply_around(context, pipeline, key, objects)).await?;
        return Ok(valid);
    }
    // Before there can be a slot.
    if !pipeline.finalizers().iter().any(|finalizer| finalizer == FINALIZER) {
        let mut finalizers = pipeline.finalizers().to_vec();
        finalizers.push(FINALIZER.to_owned());
        if let Some(version) = set_finalizers(context, pipeline, key, finalizers).await? {
            // What the status is written to.
            pipeline.metadata.resource_version = Some(version);
        }
    }
    let (deployment, changed) = Box::pin(apply::apply(context, pipeline, key, objects)).await?;
    if let Some(facts) = facts {
        facts.deployment = deployment.or(facts.deployment.take());
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
    key: &ResourceKey,
    facts: &mut Option<Facts>,
    ending: &mut Option<Ending>,
) -> Result<ValidPipeline, Error> {
    // First, so that it holds whatever fails below.
    *ending = cleanup::foregone(pipeline, context.claim.since(), Timestamp::now());
    let facts = facts.insert(dereference::known(context, pipeline, key));
    // A capture that was started a moment ago must be seen: it would make the slot anew.
    facts.deployment = dereference::deployment(context, pipeline).await?;
    facts.secrets = dereference::secrets(context, pipeline).await?;
    let valid = validate::validate(pipeline, facts, &context.settings);
    if ending.is_none() {
        *ending = cleanup::cleanup(context, pipeline, key, facts, &valid).await?;
    }
    valid
}

/// Says how it ended, and lets the resource go.
async fn conclude(context: &Context, pipeline: &CdcPipeline, key: &ResourceKey, ending: Ending) -> Result<(), Error> {
    context.may_write(RUNTIME_AVAILABLE)?;
    let (type_, reason, note) = cleanup::told(pipeline, &ending);
    if matches!(ending, Ending::LeftBehind(_)) {
        // A namespace that is being deleted takes no event.
        tracing::warn!(namespace = key.namespace, name = key.name, "{note}");
    }
    context.events.publish(pipeline, type_, "Cleanup", reason, &note).await;
    // The status may just have been written, and then the resource version has moved on.
    let api: Api<CdcPipeline> = Api::namespaced(context.client.clone(), &key.namespace);
    let current = api.get_opt(&pipeline.name_any()).await;
    let current = current.map_err(|error| Error::from_api(READY, "reading the pipeline", &error))?;
    if let Some(current) = current.filter(|current| current.uid() == pipeline.uid()) {
        let mut finalizers = current.finalizers().to_vec();
        finalizers.retain(|finalizer| finalizer != FINALIZER);
        set_finalizers(context, &current, key, finalizers).await?;
    }
    Ok(())
}

/// Returns the resource version that this makes, if the resource is still there.
async fn set_finalizers(
    context: &Context,
    pipeline: &CdcPipeline,
    key: &ResourceKey,
    finalizers: Vec<String>,
) -> Result<Option<String>, Error> {
    context.may_write(RUNTIME_AVAILABLE)?;
    let api: Api<CdcPipeline> = Api::namespaced(context.client.clone(), &key.namespace);
    // The list is replaced as a whole: the resource version makes sure that nobody else's entry is lost.
    let patch = json!({
        "metadata": {"resourceVersion": pipeline.resource_version(), "finalizers": finalizers},
    });
    let params = PatchParams {
        field_manager: Some(FIELD_MANAGER.to_owned()),
        ..PatchParams::default()
    };
    match api.patch(&pipeline.name_any(), &params, &Patch::Merge(&patch)).await {
        Ok(patched) => {
            context.tracker.wrote(key, patched.resource_version());
            Ok(patched.resource_version())
        }
        Err(kube::Error::Api(status)) if status.code == 404 => Ok(None),
        Err(error) => Err(Error::from_api(RUNTIME_AVAILABLE, "setting the finalizer", &error)),
    }
}

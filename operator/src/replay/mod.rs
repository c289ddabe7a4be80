//! The controller of `ReplayJob`.
//!
//! A resource passes five stages: [`dereference`] reads what it refers to, [`validate`] judges it, [`build`] makes the objects that
//! it needs, [`apply`] makes them so, [`status`] says what came of it.

mod apply;
pub mod build;
pub mod dereference;
pub mod failures;
pub mod metrics;
pub mod report;
pub mod status;
pub mod validate;

use std::{convert::Infallible, sync::Arc, time::Duration};

use futures::{Stream, StreamExt as _, TryStreamExt as _};
use jiff::Timestamp;
use k8s_openapi::api::batch::v1::Job;
use kube::{
    Api, ResourceExt as _,
    api::{DeleteParams, Preconditions},
    runtime::{
        Controller, WatchStreamExt as _,
        controller::{Action, Config},
        events::EventType,
        predicates,
        reflector::{ObjectRef, store::Writer},
        utils::Predicate as _,
        watcher::{Event, watcher},
    },
};
use meander_crds::{ReplayJob, ReplayJobStatus};
use meander_proto::v1::Directive;
use tokio_util::sync::CancellationToken;

use self::{
    dereference::Facts,
    status::{Inputs, Outcome, is_final},
};
use crate::{
    client::watching,
    conditions::{self, ACCEPTED, COMPLETE, FAILED, PROGRESSING},
    context::{CONCURRENCY, Context, api_of, until_silent},
    error::Error,
    pipeline::status::SILENCE,
    progress::{Kind, Observation, ResourceKey},
};

/// Reconciles replays until `shutdown`, those that `triggers` names and those that change, and says when all of them are known.
pub async fn run(
    context: Arc<Context>,
    writer: Writer<ReplayJob>,
    triggers: impl Stream<Item = ObjectRef<ReplayJob>> + Send + 'static,
    shutdown: CancellationToken,
    ready: impl FnOnce() + Send,
) {
    let store = context.caches.replays.clone();
    // Its name is a constant that is valid and of one kind; if it were not, an operator without it is better than none.
    if let Err(error) = metrics::Phases::new(store.clone()).and_then(|phases| context.metrics.register(phases)) {
        tracing::error!(%error, "replays are not counted");
    }
    let changes = predicates::generation.combine(predicates::finalizers);
    let orders = context.clone();
    let replays = watcher(api_of(&context), watching())
        .default_backoff()
        .modify(|replay: &mut ReplayJob| replay.metadata.managed_fields = None)
        .reflect(writer)
        // An order goes out as soon as it is seen, however many reconciles are waiting for their turn.
        .inspect_ok(move |event| {
            let replay = match event {
                Event::Apply(replay) | Event::InitApply(replay) => replay,
                Event::Delete(replay) => return orders.forget(&key_of(replay)),
                Event::InitDone => {
                    let is_there = |key: &ResourceKey| orders.caches.replays.get(&object(key)).is_some();
                    return orders.forget_missing(Kind::ReplayJob, is_there);
                }
                Event::Init => return,
            };
            let mut order = directive(replay);
            order.cancel |= replay.metadata.deletion_timestamp.is_some();
            let uid = replay.uid().unwrap_or_default();
            orders.tracker.direct(&key_of(replay), &uid, order);
        })
        .applied_objects()
        .predicate_filter(changes, Default::default());
    let known = store.clone();
    let controller = Controller::for_stream(replays, store)
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

/// One reconcile of one replay. It never fails: an error is in the status, and decides when the next one is.
pub async fn reconcile(replay: Arc<ReplayJob>, context: Arc<Context>) -> Result<Action, Infallible> {
    let key = key_of(&replay);
    let work = Box::pin(reconcile_key(&key, &context));
    Ok(context.reconcile(&key, work).await)
}

fn object(key: &ResourceKey) -> ObjectRef<ReplayJob> {
    ObjectRef::new(&key.name).within(&key.namespace)
}

fn key_of(replay: &ReplayJob) -> ResourceKey {
    ResourceKey {
        kind: Kind::ReplayJob,
        namespace: replay.namespace().unwrap_or_default(),
        name: replay.name_any(),
    }
}

async fn reconcile_key(key: &ResourceKey, context: &Context) -> Result<Action, Error> {
    let api: Api<ReplayJob> = Api::namespaced(context.client.clone(), &key.namespace);
    let found = context.current(&context.caches.replays, key).await?;
    let Some(mut replay) = found.filter(|replay| replay.metadata.deletion_timestamp.is_none()) else {
        // What it owns goes with it.
        context.forget(key);
        return Ok(Action::await_change());
    };
    if let Some(status) = &mut replay.status {
        conditions::keep_ours(&mut status.conditions);
    }
    let uid = replay.uid().unwrap_or_default();
    let observation = context.tracker.observe(key, &uid);
    context.tracker.direct(key, &uid, directive(&replay));
    let old = replay.status.clone().unwrap_or_default();

    let mut facts = None;
    let outcome = if is_final(&old) {
        Ok(Outcome::Started)
    } else {
        stages(context, &replay, key, &observation, &mut facts).await
    };
    let inputs = Inputs {
        replay: &replay,
        facts: facts.as_ref(),
        outcome: outcome.as_ref().copied(),
        observation: &observation,
        now: Timestamp::now(),
    };
    let new = status::status(&inputs);
    if !is_final(&new) {
        context.tracker.show(key, report::report(&replay, &new, inputs.now));
    }
    let significant = status::significant(&old) != status::significant(&new);
    let deferred = crate::status::write(context, &replay, key, &observation, (&old, &new), significant).await?;
    for type_ in [ACCEPTED, COMPLETE, FAILED] {
        context
            .events
            .transition(&replay, type_, &old.conditions, &new.conditions)
            .await;
    }
    if conditions::state(&new.conditions, PROGRESSING) == Some(("False", status::NO_POD)) {
        context
            .events
            .transition(&replay, PROGRESSING, &old.conditions, &new.conditions)
            .await;
    }
    tell_of_failures(context, &replay, &old, &new).await;
    if is_final(&new) {
        if let Some(phase) = new.phase.filter(|_| !is_final(&old)) {
            context
                .metrics
                .replays_ended
                .with_label_values(&[&format!("{phase:?}")])
                .inc();
        }
        context.tracker.conclude(key, report::report(&replay, &new, inputs.now));
        return expire(context, &api, &replay, &new).await;
    }
    outcome?;
    // A runtime that was to hear of its end may be gone without a word.
    let next = if replay.spec.cancel {
        Duration::from_secs(3)
    } else {
        until_silent(&observation)
    };
    Ok(Action::requeue(deferred.unwrap_or(next).min(next)))
}

/// Counts the attempts that failed since the status was last written, and says so. What the last of all failed by is told as the end.
async fn tell_of_failures(context: &Context, replay: &ReplayJob, old: &ReplayJobStatus, new: &ReplayJobStatus) {
    let before = old.failures.as_ref().map_or(0, |failures| failures.count);
    let Some(failures) = new.failures.as_ref().filter(|failures| failures.count > before) else {
        return;
    };
    let more = u64::from(failures.count - before);
    context.metrics.replay_attempts_failed.inc_by(more);
    if !is_final(new) {
        let reason = failures.last_reason.as_deref().unwrap_or("PodFailed");
        let note = failures.last_message.as_deref().unwrap_or_default();
        let events = &context.events;
        events
            .publish(replay, EventType::Warning, "Attempt", reason, note)
            .await;
    }
}

/// What the spec asks of the runtime now.
pub fn directive(replay: &ReplayJob) -> Directive {
    Directive {
        generation: replay.metadata.generation.unwrap_or(0),
        paused: replay.spec.suspend,
        speed: replay.spec.speed.to_string(),
        cancel: replay.spec.cancel,
    }
}

/// From the spec to objects.
async fn stages(
    context: &Context,
    replay: &ReplayJob,
    key: &ResourceKey,
    observation: &Observation,
    facts: &mut Option<Facts>,
) -> Result<Outcome, Error> {
    let facts = facts.insert(dereference::dereference(context, replay, key).await?);
    if replay.spec.cancel {
        return cancel(context, replay, observation, facts).await;
    }
    let objects = match &facts.started {
        Some(config) => {
            let config = validate::started(replay, config.clone(), &context.settings)?;
            build::around(replay, &config, &context.settings)
        }
        None => {
            let valid = validate::validate(replay, facts, &context.settings)?;
            if replay.spec.suspend && facts.job.is_none() {
                return Ok(Outcome::Saved);
            }
            build::build(replay, &valid, &context.settings)
        }
    };
    let job = Box::pin(apply::apply(context, replay, key, objects)).await?;
    // A Job that was read before its pods is kept: had it ended, they had spoken their last word. The newer one may have ended since.
    facts.job = facts.job.take().or(job);
    Ok(Outcome::Started)
}

/// A runtime that hears the directive ends by itself and says how far it came; where there is none, the Job is deleted.
async fn cancel(
    context: &Context,
    replay: &ReplayJob,
    observation: &Observation,
    facts: &Facts,
) -> Result<Outcome, Error> {
    let Some(job) = &facts.job else {
        return Ok(Outcome::Cancelled);
    };
    let ended = crate::job::condition(job, "Complete").or_else(|| crate::job::condition(job, "Failed"));
    let hears = observation.connected && observation.silence < SILENCE;
    // One that failed is followed by another, which there is no need for.
    let ends = facts.final_word().is_some() && failures::between_attempts(facts).is_none();
    if ended.is_some() || hears || ends {
        return Ok(Outcome::Started);
    }
    context.may_write(ACCEPTED)?;
    let jobs: Api<Job> = Api::namespaced(context.client.clone(), &replay.namespace().unwrap_or_default());
    let params = DeleteParams::background().preconditions(Preconditions {
        uid: job.uid(),
        resource_version: None,
    });
    match jobs.delete(&job.name_any(), &params).await {
        Ok(_) => Ok(Outcome::Cancelled),
        Err(kube::Error::Api(status)) if status.code == 404 => Ok(Outcome::Cancelled),
        Err(error) => Err(Error::from_api(ACCEPTED, "deleting the Job", &error)),
    }
}

/// Deletes a replay that has ended long enough ago.
async fn expire(
    context: &Context,
    api: &Api<ReplayJob>,
    replay: &ReplayJob,
    status: &ReplayJobStatus,
) -> Result<Action, Error> {
    let ended = status
        .completion_time
        .as_deref()
        .and_then(|time| time.parse::<Timestamp>().ok());
    let (Some(ttl), Some(ended)) = (replay.spec.ttl_seconds_after_finished, ended) else {
        return Ok(Action::await_change());
    };
    let left = ended.as_second() + i64::from(ttl) - Timestamp::now().as_second();
    if let Ok(left @ 1..) = u64::try_from(left) {
        return Ok(Action::requeue(Duration::from_secs(left)));
    }
    context.may_write(ACCEPTED)?;
    let params = DeleteParams::background().preconditions(Preconditions {
        uid: replay.uid(),
        resource_version: None,
    });
    match api.delete(&replay.name_any(), &params).await {
        Ok(_) => Ok(Action::await_change()),
        Err(kube::Error::Api(status)) if status.code == 404 => Ok(Action::await_change()),
        Err(error) => Err(Error::from_api(ACCEPTED, "deleting the finished replay", &error)),
    }
}

//! A new image of the runtime, which comes with a new operator, is first run by one pipeline: one that does not start must not end every capture at
//! once.

use std::{
    collections::HashMap,
    sync::{Mutex, PoisonError},
};

use k8s_openapi::api::apps::v1::Deployment;
use kube::runtime::reflector::ObjectRef;
use meander_crds::CdcPipeline;

use super::{
    dereference::{Facts, is_available},
    is_paused,
};
use crate::{context::Context, progress::ResourceKey};

/// What is known of the image that the operator was started with. Another operator begins anew: it may try the image once more.
#[derive(Debug, Default)]
pub struct Rollout(Mutex<State>);

#[derive(Debug, Default)]
struct State {
    image: Known,
    /// The generation of its spec that each pipeline ran with when it was first to wait: another one is what a person asks for.
    waiting: HashMap<ResourceKey, Option<i64>>,
}

#[derive(Debug, Default)]
enum Known {
    /// Nobody runs it, as far as is known.
    #[default]
    Nothing,
    /// This pipeline tries it.
    Tried(ResourceKey),
    /// A pod with it was ready.
    Runs,
}

/// The pipeline that has to run with the operator's image before the pod of this one, which is well, is replaced for it. A pod that is not well has
/// nothing to lose, and what a person asks of a pipeline is done at once.
pub fn waits_for(
    context: &Context,
    pipeline: &CdcPipeline,
    key: &ResourceKey,
    deployment: Option<&Deployment>,
) -> Option<ResourceKey> {
    let deployment = deployment.filter(|_| may_try(pipeline))?;
    let mut state = context.rollout.0.lock().unwrap_or_else(PoisonError::into_inner);
    let image = &context.settings.runtime_image;
    if image_of(deployment) == Some(image) {
        state.waiting.remove(key);
        if runs(deployment) {
            *state = State {
                image: Known::Runs,
                ..State::default()
            };
        }
        return None;
    }
    if matches!(state.image, Known::Runs) {
        return None;
    }
    let observed = pipeline.status.as_ref().and_then(|status| status.observed_generation);
    let ran_with = *state.waiting.entry(key.clone()).or_insert(observed);
    if !is_available(deployment) || ran_with != pipeline.metadata.generation {
        return None;
    }
    match &state.image {
        Known::Tried(first) if first != key && tries(context, first) => Some(first.clone()),
        _ => {
            state.image = Known::Tried(key.clone());
            None
        }
    }
}

/// A pipeline that was to try it, and to which it could not come, leaves that to another one.
pub fn give_up(context: &Context, key: &ResourceKey, facts: Option<&Facts>) {
    let deployment = facts.and_then(|facts| facts.deployment.as_ref());
    if deployment.and_then(image_of) == Some(&context.settings.runtime_image) {
        return;
    }
    let mut state = context.rollout.0.lock().unwrap_or_else(PoisonError::into_inner);
    if matches!(&state.image, Known::Tried(first) if first == key) {
        state.image = Known::Nothing;
    }
}

/// Whether something may still come of it. One whose pod runs with the image says so at its next reconcile.
fn tries(context: &Context, first: &ResourceKey) -> bool {
    let object = ObjectRef::new(&first.name).within(&first.namespace);
    let pipeline = context.caches.pipelines.get(&object);
    pipeline.is_some_and(|pipeline| {
        may_try(&pipeline) && !pipeline.spec.suspend && pipeline.metadata.deletion_timestamp.is_none()
    })
}

fn may_try(pipeline: &CdcPipeline) -> bool {
    pipeline.spec.runtime.image.is_none() && !is_paused(pipeline)
}

/// The image that the Deployment's next pod has.
fn image_of(deployment: &Deployment) -> Option<&String> {
    let template = &deployment.spec.as_ref()?.template;
    template.spec.as_ref()?.containers.first()?.image.as_ref()
}

/// Whether every pod that there is is of the newest template, and one is ready: a second one, which is to stand by, may never find a place.
fn runs(deployment: &Deployment) -> bool {
    let status = deployment.status.as_ref();
    let pods = status.and_then(|status| status.replicas);
    is_available(deployment) && pods >= Some(1) && status.and_then(|status| status.updated_replicas) == pods
}

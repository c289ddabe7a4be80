//! Reads what the spec refers to, and what there is of the pipeline already.

use k8s_openapi::api::{apps::v1::Deployment, core::v1::Pod};
use kube::{Api, Resource as _, ResourceExt as _, api::ListParams};
use meander_crds::CdcPipeline;

use super::{
    build::{capture_name, capture_selector, is_capture},
    slot,
};
use crate::{
    apply::{is_owned, was_asked},
    conditions::RUNTIME_AVAILABLE,
    context::Context,
    error::Error,
    progress::ResourceKey,
    secrets::{self, Keys},
};

/// What the cluster holds.
#[derive(Clone, Debug, Default)]
pub struct Facts {
    /// Keys of the Secrets that the spec names; none where nobody needs them, because what runs has them already.
    pub secrets: Option<Keys>,
    /// The other pipeline that has its slot.
    pub slot_held_by: Option<String>,
    /// The pipeline that tries the operator's image of the runtime, while this one goes on with its own.
    pub waits_for: Option<ResourceKey>,
    /// The Deployment that captures.
    pub deployment: Option<Deployment>,
    /// Its pods, where they are needed to say why one is not available.
    pub pods: Vec<Pod>,
}

/// What the watches show, without the Secrets.
pub fn known(context: &Context, pipeline: &CdcPipeline, key: &ResourceKey) -> Facts {
    let deployment = context.caches.get::<Deployment>(key, &capture_name(pipeline));
    // That of a deleted pipeline of the same name says nothing about this one.
    let deployment = deployment.filter(|deployment| is_owned(deployment, pipeline.metadata.uid.as_ref()));
    let pods = match &deployment {
        Some(deployment) if !is_available(deployment) || lacks_standby(deployment) => {
            let pods = context.caches.of::<Pod>(key).into_iter();
            pods.filter(is_capture).collect()
        }
        _ => Vec::new(),
    };
    Facts {
        slot_held_by: slot::held_by(pipeline, &context.caches.pipelines.state()),
        secrets: None,
        waits_for: None,
        deployment,
        pods,
    }
}

/// The keys of the Secrets.
pub async fn secrets(context: &Context, pipeline: &CdcPipeline) -> Result<Option<Keys>, Error> {
    let namespace = pipeline.namespace().unwrap_or_default();
    let keys = secrets::keys(context, &namespace, &secrets::of_pipeline(pipeline)).await?;
    Ok(Some(keys))
}

/// The Deployment as it is now, for what an old picture must not decide.
pub async fn deployment(context: &Context, pipeline: &CdcPipeline) -> Result<Option<Deployment>, Error> {
    let namespace = pipeline.namespace().unwrap_or_default();
    let deployments: Api<Deployment> = Api::namespaced(context.client.clone(), &namespace);
    let deployment = deployments
        .get_opt(&capture_name(pipeline))
        .await
        .map_err(|error| Error::from_api(RUNTIME_AVAILABLE, "reading the Deployment", &error))?;
    Ok(deployment.filter(|deployment| is_owned(deployment, pipeline.metadata.uid.as_ref())))
}

/// Whether what is asked for was started already, and does not wait for what it mounts: then nobody needs the Secrets. A pod keeps what it
/// has of one that is deleted; one that would take its place does not come up without it.
pub fn is_started(facts: &Facts, pipeline: &CdcPipeline, wanted: Deployment) -> bool {
    let (Some(deployment), Some(owner)) = (&facts.deployment, pipeline.controller_owner_ref(&())) else {
        return false;
    };
    was_asked(deployment, wanted, &owner) && !facts.pods.iter().any(is_being_made)
}

/// Whether the pod has a node, and its containers have yet to be made there.
fn is_being_made(pod: &Pod) -> bool {
    let Some(status) = &pod.status else { return false };
    let mut conditions = status.conditions.iter().flatten();
    status.phase.as_deref() == Some("Pending")
        && conditions.any(|condition| condition.type_ == "PodScheduled" && condition.status == "True")
}

/// The pods that capture, as they are now.
pub async fn pods(context: &Context, pipeline: &CdcPipeline) -> Result<Vec<Pod>, Error> {
    let api: Api<Pod> = Api::namespaced(context.client.clone(), &pipeline.namespace().unwrap_or_default());
    let params = ListParams::default().labels(&capture_selector(pipeline));
    let list = api
        .list(&params)
        .await
        .map_err(|error| Error::from_api(RUNTIME_AVAILABLE, "listing pods", &error))?;
    Ok(list.items)
}

/// Whether the pod of the newest template is ready.
pub fn is_available(deployment: &Deployment) -> bool {
    let Some(status) = &deployment.status else { return false };
    status.observed_generation == deployment.metadata.generation
        && status.updated_replicas.unwrap_or(0) >= 1
        && status.ready_replicas.unwrap_or(0) >= 1
}

/// Whether fewer pods are ready than there should be, while one is.
pub fn lacks_standby(deployment: &Deployment) -> bool {
    let wanted = deployment.spec.as_ref().and_then(|spec| spec.replicas);
    let ready = deployment.status.as_ref().and_then(|status| status.ready_replicas);
    is_available(deployment) && ready < wanted
}

/// Why the API server lets no pod be made, in its own words: a quota, a LimitRange, Pod Security, a webhook.
pub fn refusal(deployment: &Deployment) -> Option<String> {
    let mut conditions = deployment.status.as_ref()?.conditions.iter().flatten();
    let failure = conditions.find(|condition| condition.type_ == "ReplicaFailure" && condition.status == "True")?;
    let message = failure.message.as_deref().unwrap_or_default();
    Some(format!(
        "The API server refuses the runtime's pod: {message}; Kubernetes tries again by itself."
    ))
}

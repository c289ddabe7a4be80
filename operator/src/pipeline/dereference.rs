//! Reads what the spec refers to, and what there is of the pipeline already.

use k8s_openapi::api::{apps::v1::Deployment, core::v1::Pod};
use kube::{Api, ResourceExt as _, api::ListParams};
use meander_crds::CdcPipeline;

use super::{
    build::{capture_name, capture_selector},
    slot,
};
use crate::{
    apply::is_owned,
    conditions::RUNTIME_AVAILABLE,
    context::Context,
    error::Error,
    secrets::{self, Keys},
};

/// What the cluster holds.
#[derive(Clone, Debug, Default)]
pub struct Facts {
    /// Keys of the Secrets that the spec names.
    pub secrets: Keys,
    /// The other pipeline that has its slot.
    pub slot_held_by: Option<String>,
    /// The Deployment that captures.
    pub deployment: Option<Deployment>,
    /// Its pods, where they are needed to say why one is not available.
    pub pods: Vec<Pod>,
}

/// Reads the facts.
pub async fn dereference(context: &Context, pipeline: &CdcPipeline) -> Result<Facts, Error> {
    let namespace = pipeline.namespace().unwrap_or_default();
    let deployments: Api<Deployment> = Api::namespaced(context.client.clone(), &namespace);
    let deployment = deployments
        .get_opt(&capture_name(pipeline))
        .await
        .map_err(|error| Error::from_api(RUNTIME_AVAILABLE, "reading the Deployment", &error))?
        // That of a deleted pipeline of the same name says nothing about this one.
        .filter(|deployment| is_owned(deployment, pipeline.metadata.uid.as_ref()));
    let pods = match &deployment {
        Some(deployment) if !is_available(deployment) || lacks_standby(deployment) => pods(context, pipeline).await?,
        _ => Vec::new(),
    };
    Ok(Facts {
        slot_held_by: slot::held_by(pipeline, &context.pipelines.state()),
        secrets: secrets::keys(context, &namespace, &secrets::of_pipeline(pipeline)).await?,
        deployment,
        pods,
    })
}

/// The pods that capture.
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

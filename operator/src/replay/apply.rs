//! Applies the objects, in an order in which each finds what it needs.

use k8s_openapi::api::{
    batch::v1::Job,
    core::v1::{ConfigMap, Service, ServiceAccount},
};
use kube::{Resource as _, ResourceExt as _};
use meander_crds::ReplayJob;

use super::build::{Objects, replay_name, selector};
use crate::{
    apply::Applier,
    conditions::ACCEPTED,
    context::Context,
    error::{Error, Reason},
};

/// Applies what a replay needs, and deletes what it no longer needs. Returns the Job that was made, if one was.
pub async fn apply(context: &Context, replay: &ReplayJob, objects: Objects) -> Result<Option<Job>, Error> {
    let namespace = replay.namespace().unwrap_or_default();
    let owner = replay
        .controller_owner_ref(&())
        .ok_or_else(|| Error::transient(ACCEPTED, Reason::Rejected, "the replay has no uid"))?;
    let applier = Applier {
        context,
        namespace: &namespace,
        owner: &owner,
        condition: ACCEPTED,
    };
    let (_, account) = applier.apply(objects.service_account).await?;
    let (_, config) = applier.apply(objects.config_map).await?;
    let name = replay_name(replay);
    let mut services = Vec::new();
    if let Some(service) = objects.service {
        applier.apply(service).await?;
        services.push(name.as_str());
    }
    // What may change of a running replay reaches it as a directive, and by the ConfigMap the pod that replaces it.
    let (job, created) = match objects.job {
        Some(job) => {
            let (job, created) = applier.create(job).await?;
            (Some(job), created)
        }
        None => (None, false),
    };
    if account || config || created {
        let selector = selector(replay);
        applier.sweep::<Job>(&selector, &[&name]).await?;
        applier.sweep::<Service>(&selector, &services).await?;
        applier.sweep::<ConfigMap>(&selector, &[&name]).await?;
        applier.sweep::<ServiceAccount>(&selector, &[&name]).await?;
    }
    Ok(job)
}

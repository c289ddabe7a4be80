//! Applies the objects, in an order in which each finds what it needs.

use futures::try_join;
use k8s_openapi::{
    api::{
        apps::v1::Deployment,
        batch::v1::Job,
        core::v1::{ConfigMap, ServiceAccount},
    },
    apimachinery::pkg::apis::meta::v1::OwnerReference,
};
use kube::Resource as _;
use meander_crds::CdcPipeline;

use super::build::{self, CleanupObjects, Objects, capture_name};
use crate::{
    apply::{Applier, is_owned, was_asked},
    conditions::RUNTIME_AVAILABLE,
    context::Context,
    error::{Error, Reason},
    pod,
    progress::ResourceKey,
};

/// Applies what a running pipeline needs, and deletes what it no longer needs. Returns the Deployment if it is newer than the cache's, and
/// whether it changed.
pub async fn apply(
    context: &Context,
    pipeline: &CdcPipeline,
    key: &ResourceKey,
    objects: Objects,
) -> Result<(Option<Deployment>, bool), Error> {
    let owner = owner(pipeline)?;
    let applier = applier(context, key, &owner);
    try_join!(
        applier.apply(objects.service_account),
        applier.apply(objects.config_map),
        applier.keep(objects.disruption_budget),
        applier.keep(objects.network_policy),
    )?;
    let applied = applier.apply(objects.deployment).await?;
    let name = capture_name(pipeline);
    applier.sweep::<Deployment>(&[&name]).await?;
    applier.sweep::<Job>(&[]).await?;
    applier.sweep::<ConfigMap>(&[&name]).await?;
    applier.sweep::<ServiceAccount>(&[&name]).await?;
    Ok(applied)
}

/// The same for a pipeline whose pods go on as they are: their template stays, and in their configuration all but whom they trust.
pub async fn apply_around(
    context: &Context,
    pipeline: &CdcPipeline,
    key: &ResourceKey,
    objects: Objects,
) -> Result<(), Error> {
    let owner = owner(pipeline)?;
    let applier = applier(context, key, &owner);
    try_join!(
        applier.apply(objects.service_account),
        keep_trust(context, pipeline, key),
        applier.keep(objects.disruption_budget),
        applier.keep(objects.network_policy),
    )?;
    Ok(())
}

/// Has pods that run know the operator by what it shows now, while the spec is not fit to be applied: they go on by the last that was. What somebody
/// else wrote there is not made the operator's own by that: it is put right once the spec is fit.
pub async fn keep_trust(context: &Context, pipeline: &CdcPipeline, key: &ResourceKey) -> Result<(), Error> {
    let known = context.caches.get::<ConfigMap>(key, &capture_name(pipeline));
    let owner = owner(pipeline)?;
    let Some(known) = known.filter(|known| is_owned(known, Some(&owner.uid))) else {
        return Ok(());
    };
    let running = build::config_of_running(pipeline, known.data.clone().unwrap_or_default());
    if !was_asked(&known, running.clone(), &owner) {
        return Ok(());
    }
    let applier = applier(context, key, &owner);
    let config = pod::config_map(running.metadata, running.data.unwrap_or_default(), &context.settings);
    applier.apply(config).await?;
    Ok(())
}

/// Applies what a deleted pipeline needs. Returns the Job.
pub async fn apply_cleanup(
    context: &Context,
    pipeline: &CdcPipeline,
    key: &ResourceKey,
    objects: CleanupObjects,
) -> Result<Job, Error> {
    let owner = owner(pipeline)?;
    let applier = applier(context, key, &owner);
    try_join!(
        applier.apply(objects.service_account),
        applier.apply(objects.config_map)
    )?;
    let (job, _) = applier.create(objects.job).await?;
    Ok(job)
}

fn applier<'a>(context: &'a Context, key: &'a ResourceKey, owner: &'a OwnerReference) -> Applier<'a> {
    Applier {
        context,
        key,
        owner,
        condition: RUNTIME_AVAILABLE,
    }
}

fn owner(pipeline: &CdcPipeline) -> Result<OwnerReference, Error> {
    pipeline
        .controller_owner_ref(&())
        .ok_or_else(|| Error::transient(RUNTIME_AVAILABLE, Reason::Rejected, "the pipeline has no uid"))
}

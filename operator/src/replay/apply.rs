//! Applies the objects, in an order in which each finds what it needs.

use futures::try_join;
use k8s_openapi::api::{
    batch::v1::Job,
    core::v1::{ConfigMap, ServiceAccount},
};
use kube::Resource as _;
use meander_crds::ReplayJob;

use super::build::{Objects, replay_name};
use crate::{
    apply::Applier,
    conditions::ACCEPTED,
    context::Context,
    error::{Error, Reason},
    progress::ResourceKey,
};

/// Applies what a replay needs, and deletes what it no longer needs. Returns the Job that was made, if one was.
pub async fn apply(
    context: &Context,
    replay: &ReplayJob,
    key: &ResourceKey,
    objects: Objects,
) -> Result<Option<Job>, Error> {
    let owner = replay
        .controller_owner_ref(&())
        .ok_or_else(|| Error::transient(ACCEPTED, Reason::Rejected, "the replay has no uid"))?;
    let applier = Applier {
        context,
        key,
        owner: &owner,
        condition: ACCEPTED,
    };
    try_join!(
        applier.apply(objects.service_account),
        applier.apply(objects.config_map),
        applier.keep(objects.service),
        applier.keep(objects.network_policy),
    )?;
    // What may change of a running replay reaches it as a directive, and by the ConfigMap the pod that replaces it.
    let job = match objects.job {
        // One that was there already may have ended: it is judged when it is seen together with its pods.
        Some(job) => {
            let (job, made) = applier.create(job).await?;
            made.then_some(job)
        }
        None => None,
    };
    let name = replay_name(replay);
    applier.sweep::<Job>(&[&name]).await?;
    applier.sweep::<ConfigMap>(&[&name]).await?;
    applier.sweep::<ServiceAccount>(&[&name]).await?;
    Ok(job)
}

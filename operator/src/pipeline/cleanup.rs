//! What happens to the slot when its pipeline is deleted. It always ends: a finalizer must never keep a resource for ever.

use std::time::Duration;

use jiff::Timestamp;
use k8s_openapi::api::{apps::v1::Deployment, batch::v1::Job};
use kube::{Api, ResourceExt as _, api::DeleteParams, runtime::events::EventType};
use meander_crds::{CdcPipeline, PublicationManagement, SlotReclaimPolicy};

use super::{
    apply::apply_cleanup,
    build::{build_cleanup, capture_name},
    dereference::{Facts, pods},
    validate::{ValidPipeline, slot_of},
};
use crate::{
    conditions::RUNTIME_AVAILABLE,
    context::Context,
    error::{Error, Problem, Reason},
    job,
    naming::slot_name,
    progress::ResourceKey,
};

/// After this long the resource goes, whatever has become of the slot. While no operator is there, no time passes.
pub const PATIENCE: Duration = Duration::from_secs(180);

/// How cleaning up ended.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Ending {
    /// The slot, and a managed publication, are gone.
    Dropped,
    /// The spec asks for the slot to stay.
    Retained,
    /// The slot is another pipeline's, as this says.
    Anothers(String),
    /// The slot may still be there, because of this.
    LeftBehind(String),
}

/// The ending that needs no look at the cluster, so that nothing which cannot be read stands in its way.
pub fn foregone(pipeline: &CdcPipeline, leading_since: Timestamp, now: Timestamp) -> Option<Ending> {
    if pipeline.spec.source.postgres.slot.reclaim_policy == SlotReclaimPolicy::Retain {
        return Some(Ending::Retained);
    }
    is_overdue(pipeline, leading_since, now)
        .then(|| Ending::LeftBehind(format!("cleaning up took longer than {} s", PATIENCE.as_secs())))
}

/// Goes one step further. None while there is something to wait for.
pub async fn cleanup(
    context: &Context,
    pipeline: &CdcPipeline,
    key: &ResourceKey,
    facts: &Facts,
    valid: &Result<ValidPipeline, Error>,
) -> Result<Option<Ending>, Error> {
    // The capture goes first: it owns the slot, and would make it anew.
    stop_capture(context, pipeline, facts).await?;
    if !pods(context, pipeline).await?.is_empty() {
        return Ok(None);
    }
    let valid = match valid {
        Ok(valid) => valid,
        Err(error) if error.problem().reason == Reason::SlotConflict => {
            return Ok(Some(Ending::Anothers(error.problem().message.clone())));
        }
        Err(error) => return Ok(Some(Ending::LeftBehind(unfit(error.problem())))),
    };
    let objects = build_cleanup(pipeline, valid, &context.settings);
    let job = match Box::pin(apply_cleanup(context, pipeline, key, objects)).await {
        Ok(job) => job,
        // It will never be otherwise.
        Err(error) if error.problem().reason == Reason::NamespaceTerminating => {
            return Ok(Some(Ending::LeftBehind(error.problem().message.clone())));
        }
        Err(error) => return Err(error),
    };
    Ok(ending_of(&job))
}

fn ending_of(job: &Job) -> Option<Ending> {
    if job::condition(job, "Complete").is_some() {
        return Some(Ending::Dropped);
    }
    job::said(job, "Failed").map(|failed| Ending::LeftBehind(format!("the Job {} failed: {failed}", job.name_any())))
}

fn is_overdue(pipeline: &CdcPipeline, leading_since: Timestamp, now: Timestamp) -> bool {
    let deleted = pipeline.metadata.deletion_timestamp.as_ref();
    deleted.is_some_and(|deleted| {
        let since = deleted.0.max(leading_since);
        now.as_second() - since.as_second() > PATIENCE.as_secs() as i64
    })
}

async fn stop_capture(context: &Context, pipeline: &CdcPipeline, facts: &Facts) -> Result<(), Error> {
    let Some(deployment) = &facts.deployment else {
        return Ok(());
    };
    if deployment.metadata.deletion_timestamp.is_some() {
        return Ok(());
    }
    context.may_write(RUNTIME_AVAILABLE)?;
    let api: Api<Deployment> = Api::namespaced(context.client.clone(), &pipeline.namespace().unwrap_or_default());
    match api.delete(&capture_name(pipeline), &DeleteParams::background()).await {
        Ok(_) => Ok(()),
        Err(kube::Error::Api(status)) if status.code == 404 => Ok(()),
        Err(error) => Err(Error::from_api(RUNTIME_AVAILABLE, "deleting the Deployment", &error)),
    }
}

/// The SQL that drops a managed publication.
fn drop_publication(pipeline: &CdcPipeline) -> Option<String> {
    let publication = &pipeline.spec.source.postgres.publication;
    (publication.management == PublicationManagement::Managed).then(|| {
        let default = || slot_name(&pipeline.namespace().unwrap_or_default(), &pipeline.name_any());
        let name = publication.name.clone().unwrap_or_else(default);
        format!("DROP PUBLICATION IF EXISTS \"{name}\";")
    })
}

/// The event that tells of an ending: its type, its reason and its note. A remedy comes first: a long cause must not push it out.
pub fn told(pipeline: &CdcPipeline, ending: &Ending) -> (EventType, &'static str, String) {
    let slot = slot_of(pipeline);
    match ending {
        Ending::Dropped if was_seen(pipeline) => {
            let note = format!("Dropped the replication slot {slot}.");
            (EventType::Normal, "SlotDropped", note)
        }
        Ending::Dropped => {
            let note = format!(
                "There is no replication slot {slot}: this pipeline was never seen to have one, and one that was there is dropped."
            );
            (EventType::Normal, "SlotNeverSeen", note)
        }
        Ending::Retained => {
            let note = format!("The replication slot {slot} stays, as reclaimPolicy says.");
            (EventType::Normal, "SlotRetained", note)
        }
        Ending::Anothers(cause) => {
            let note = format!("Nothing was dropped.{} Cause: {cause}", left_of_conflict(pipeline));
            (EventType::Normal, "SlotRetained", note)
        }
        Ending::LeftBehind(cause) if was_seen(pipeline) => {
            let host = &pipeline.spec.source.postgres.host;
            let note = format!(
                "The replication slot {slot} may be left behind, and then fills the disk of {host}. {} Cause: {cause}",
                by_hand(pipeline)
            );
            (EventType::Warning, "SlotLeftBehind", note)
        }
        Ending::LeftBehind(cause) => {
            let note = format!(
                "This pipeline was never seen to have a replication slot, and nobody could look for one named {slot}. To be sure: {} Cause: {cause}",
                by_hand(pipeline)
            );
            (EventType::Normal, "SlotNeverSeen", note)
        }
    }
}

/// Whether a capture ever said that it had opened its source, or what PostgreSQL says of its slot. A slot can be there all the same: for the moment
/// between its making and the first word of it, or from an earlier pipeline of the name.
fn was_seen(pipeline: &CdcPipeline) -> bool {
    let status = pipeline.status.as_ref();
    status.is_some_and(|status| {
        let slot = status.slot.as_ref();
        status.replication.is_some() || slot.is_some_and(|slot| slot.wal_status.is_some() || slot.restart_lsn.is_some())
    })
}

/// What may be left of a pipeline whose slot is another's. That one may read through the same publication, so a person decides.
fn left_of_conflict(pipeline: &CdcPipeline) -> String {
    drop_publication(pipeline)
        .map(|sql| {
            let database = &pipeline.spec.source.postgres.database;
            format!(" If the other does not read through its publication, run in the database {database}: {sql}")
        })
        .unwrap_or_default()
}

/// The SQL that does by hand what could not be done.
fn by_hand(pipeline: &CdcPipeline) -> String {
    let (slot, database) = (slot_of(pipeline), &pipeline.spec.source.postgres.database);
    let publication = drop_publication(pipeline).map(|sql| format!(" {sql}"));
    format!(
        "Run in the database {database}: SELECT pg_drop_replication_slot(slot_name) FROM pg_replication_slots WHERE slot_name = '{slot}';{}",
        publication.unwrap_or_default()
    )
}

/// Why nothing could be dropped, where the spec was not fit for it. What it takes to mend a pipeline mends nothing of one that goes.
fn unfit(problem: &Problem) -> String {
    match problem.reason {
        Reason::SecretNotFound | Reason::SecretKeyNotFound => {
            let what = problem.message.split(';').next().unwrap_or_default();
            format!("{what}, and so nothing could sign in to clean up: a pipeline needs its Secrets until it is gone")
        }
        _ => problem.message.clone(),
    }
}

#[cfg(test)]
mod tests {
    use k8s_openapi::apimachinery::pkg::apis::meta::v1::Time;
    use meander_crds::CdcPipeline;

    use super::*;

    #[test]
    fn the_patience_with_a_deletion_begins_when_there_is_an_operator() {
        let mut pipeline: CdcPipeline =
            serde_saphyr::from_str(include_str!("../../../deploy/examples/pipeline.yaml")).unwrap();
        let at = |second| Timestamp::from_second(second).unwrap();
        pipeline.metadata.deletion_timestamp = Some(Time(at(1000)));
        assert_eq!(foregone(&pipeline, at(0), at(1180)), None);
        assert!(matches!(
            foregone(&pipeline, at(0), at(1181)),
            Some(Ending::LeftBehind(_))
        ));
        // Deleted while no operator was there: it gets its attempts all the same.
        assert_eq!(foregone(&pipeline, at(9000), at(9180)), None);
        assert!(matches!(
            foregone(&pipeline, at(9000), at(9181)),
            Some(Ending::LeftBehind(_))
        ));
    }
}

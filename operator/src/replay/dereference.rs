//! Reads what the spec refers to, and what there is of the replay already.

use k8s_openapi::api::{
    batch::v1::Job,
    core::v1::{ConfigMap, Pod},
};
use kube::{Api, ResourceExt as _, api::ListParams, runtime::reflector::ObjectRef};
use meander_config::ReplayConfig;
use meander_crds::{CdcPipeline, ReplayJob};
use meander_proto::FinalWord;

use super::build::{CONFIG_FILE, replay_name, selector};
use crate::{
    apply::is_owned,
    conditions::{ACCEPTED, state},
    context::Context,
    error::Error,
    job, pod,
    progress::ResourceKey,
    secrets::{self, Keys},
};

/// What the cluster holds.
#[derive(Clone, Debug, Default)]
pub struct Facts {
    /// What the replay was started with, once it has a Job. Then nobody looks at its pipeline and its Secrets any more: what is replayed
    /// stays the same, whatever becomes of them.
    pub started: Option<ReplayConfig>,
    /// The pipeline whose log is replayed.
    pub pipeline: Option<CdcPipeline>,
    /// Keys of the Secrets that the spec and its pipeline's name; none where nobody needs them yet.
    pub secrets: Option<Keys>,
    /// The Job that replays.
    pub job: Option<Job>,
    /// Its pods.
    pub pods: Vec<Pod>,
}

impl Facts {
    /// The last word of the newest pod, if it has spoken it.
    pub fn final_word(&self) -> Option<FinalWord> {
        word_of(pod::newest(&self.pods)?)
    }
}

/// The last word of a pod, if it has spoken it.
pub fn word_of(pod: &Pod) -> Option<FinalWord> {
    let containers = pod.status.as_ref()?.container_statuses.iter().flatten();
    let terminated = containers
        .into_iter()
        .find_map(|c| c.state.as_ref()?.terminated.as_ref());
    serde_json::from_str(terminated?.message.as_deref()?).ok()
}

/// Reads the facts.
pub async fn dereference(context: &Context, replay: &ReplayJob, key: &ResourceKey) -> Result<Facts, Error> {
    let namespace = replay.namespace().unwrap_or_default();
    let api_error = |what: &'static str| move |error| Error::from_api(ACCEPTED, what, &error);
    let name = replay_name(replay);
    let mut job = context.caches.get::<Job>(key, &name);
    if replay.spec.cancel {
        // Without a Job it is over at once, and for good: one that was made a moment ago must be seen.
        let jobs: Api<Job> = Api::namespaced(context.client.clone(), &namespace);
        job = jobs.get_opt(&name).await.map_err(api_error("reading the Job"))?;
    }
    // The end of a replay that was deleted is not the end of the one that was created in its place.
    let job = job.filter(|job| is_owned(job, replay.metadata.uid.as_ref()));
    let mut facts = Facts::default();
    if let Some(job) = &job {
        facts.pods = if replay.spec.cancel || is_ahead(job, replay) {
            let pods: Api<Pod> = Api::namespaced(context.client.clone(), &namespace);
            let params = ListParams::default().labels(&selector(replay));
            pods.list(&params).await.map_err(api_error("listing pods"))?.items
        } else {
            context.caches.of::<Pod>(key)
        };
        facts.pods.retain(|pod| is_owned(pod, job.metadata.uid.as_ref()));
        let config = match context.caches.get::<ConfigMap>(key, &name) {
            Some(config) => Some(config),
            // Its watch may be behind that of the Job, and what it was started with is not to be made anew for that.
            None => {
                let configs: Api<ConfigMap> = Api::namespaced(context.client.clone(), &namespace);
                configs
                    .get_opt(&name)
                    .await
                    .map_err(api_error("reading the ConfigMap"))?
            }
        };
        facts.started = config.as_ref().and_then(|config| started(config, replay));
    }
    facts.job = job;
    // One that is cancelled needs nothing any more.
    if facts.started.is_none() && !replay.spec.cancel {
        let pipeline = ObjectRef::new(&replay.spec.pipeline_ref.name).within(&namespace);
        let pipeline = context.caches.pipelines.get(&pipeline);
        facts.pipeline = pipeline.map(|pipeline| (*pipeline).clone());
        if facts.job.is_some() || !is_saved(replay) {
            let mounted = secrets::of_replay(replay, facts.pipeline.as_ref());
            facts.secrets = Some(secrets::keys(context, &namespace, &mounted).await?);
        }
    }
    Ok(facts)
}

/// Whether it was looked at as a whole, and then kept to be started later.
fn is_saved(replay: &ReplayJob) -> bool {
    let status = replay.status.as_ref();
    replay.spec.suspend
        && status.is_some_and(|status| {
            status.observed_generation == replay.metadata.generation
                && state(&status.conditions, ACCEPTED).is_some_and(|(status, _)| status == "True")
        })
}

/// Whether a pod of the Job has ended of which the status does not tell yet. Its last word is there then, whether the watch of the pods has
/// come to it or not.
fn is_ahead(job: &Job, replay: &ReplayJob) -> bool {
    let failed = job.status.as_ref().and_then(|status| status.failed).unwrap_or(0);
    let told = replay.status.as_ref().and_then(|status| status.failures.as_ref());
    let told = told.map_or(0, |failures| i64::from(failures.count));
    let has_ended = ["Complete", "Failed"]
        .iter()
        .any(|end| job::condition(job, end).is_some());
    has_ended || i64::from(failed) > told
}

/// The configuration of a replay with a Job; none where somebody took it away or changed it, so that it is made anew.
fn started(config: &ConfigMap, replay: &ReplayJob) -> Option<ReplayConfig> {
    let uid = replay.metadata.uid.as_ref();
    let yaml = config
        .data
        .as_ref()?
        .get(CONFIG_FILE)
        .filter(|_| is_owned(config, uid))?;
    meander_config::from_yaml(yaml)
        .ok()
        .filter(|config: &ReplayConfig| Some(&config.job.uid) == uid)
}

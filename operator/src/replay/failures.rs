//! Why attempts failed. An attempt is a pod.

use k8s_openapi::api::core::v1::{ContainerStateTerminated, Pod};
use kube::ResourceExt as _;
use meander_crds::{ReplayFailures, ReplayJob};

use super::{
    build::DISRUPTED,
    dereference::{Facts, word_of},
};
use crate::{format, job, pod};

/// Why an attempt failed, or all of them together.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Cause {
    /// In one word.
    pub reason: String,
    /// In one sentence, with what to do.
    pub message: String,
}

impl Cause {
    fn new(reason: &str, message: String) -> Self {
        Self {
            reason: reason.to_owned(),
            message,
        }
    }

    /// Of an attempt that is counted and has left nothing.
    pub fn gone() -> Self {
        let message =
            "The pod of the last attempt is gone and has left no word: somebody deleted it, or its node went with it.";
        Self::new("PodGone", message.to_owned())
    }
}

/// The attempts that failed; none as long as none did.
pub fn failures(facts: &Facts) -> Option<ReplayFailures> {
    let failed = facts.job.as_ref()?.status.as_ref()?.failed?;
    let count = u32::try_from(failed).ok().filter(|count| *count > 0)?;
    let last = last_failed(&facts.pods);
    let cause = last.map(cause);
    Some(ReplayFailures {
        count,
        last_reason: cause.as_ref().map(|cause| cause.reason.clone()),
        last_message: cause.map(|cause| cause.message),
        last_time: last
            .and_then(terminated)
            .and_then(|terminated| terminated.finished_at.as_ref())
            .map(|time| format::time(time.0)),
    })
}

/// Why nothing is delivered between an attempt that failed and the next one.
pub fn between_attempts(facts: &Facts) -> Option<Cause> {
    pod::newest(&facts.pods).filter(|pod| has_failed(pod)).map(cause)
}

/// Why a Job has failed for good.
pub fn of_job(replay: &ReplayJob, facts: &Facts) -> Option<Cause> {
    let job = facts.job.as_ref()?;
    let condition = job::condition(job, "Failed")?;
    let reason = condition.reason.as_deref().unwrap_or_default();
    if let ("DeadlineExceeded", Some(seconds)) = (reason, replay.spec.active_deadline_seconds) {
        // Its pod was ended, which is why it did not come to its end.
        let message = format!(
            "The replay had not ended {seconds} s after its pod was first started, which spec.activeDeadlineSeconds allows; \
             status.progress says how far it came. Replay the rest with another ReplayJob."
        );
        return Some(Cause::new(reason, message));
    }
    let attempts = job.status.as_ref().and_then(|status| status.failed).unwrap_or(0);
    match last_failed(&facts.pods).map(cause) {
        Some(cause) if reason == "BackoffLimitExceeded" && attempts > 1 => Some(Cause {
            message: format!("{} (It was tried {attempts} times.)", cause.message),
            ..cause
        }),
        Some(cause) => Some(cause),
        None => {
            let said = job::said(job, "Failed").unwrap_or_default();
            let namespace = job.namespace().unwrap_or_default();
            let message = format!("{said}; see kubectl -n {namespace} describe job {}", job.name_any());
            Some(Cause::new("JobFailed", message))
        }
    }
}

fn last_failed(pods: &[Pod]) -> Option<&Pod> {
    pods.iter()
        .filter(|pod| has_failed(pod))
        .max_by_key(|pod| pod.metadata.creation_timestamp.as_ref().map(|time| time.0))
}

fn has_failed(pod: &Pod) -> bool {
    let phase = pod.status.as_ref().and_then(|status| status.phase.as_deref());
    phase == Some("Failed")
}

fn terminated(pod: &Pod) -> Option<&ContainerStateTerminated> {
    let status = pod.status.as_ref()?;
    let containers = status.container_statuses.iter().flatten();
    containers
        .into_iter()
        .find_map(|c| c.state.as_ref()?.terminated.as_ref())
}

/// Why a pod failed: what Kubernetes says if that is who ended it, its own last word otherwise, and its exit code where it left none.
fn cause(pod: &Pod) -> Cause {
    let name = pod.name_any();
    let status = pod.status.clone().unwrap_or_default();
    let disrupted = status.conditions.iter().flatten();
    if let Some(disrupted) = disrupted
        .into_iter()
        .find(|c| c.type_ == DISRUPTED && c.status == "True")
    {
        let reason = disrupted.reason.as_deref().unwrap_or(DISRUPTED);
        let message = disrupted.message.as_deref().unwrap_or_default();
        return Cause::new(reason, format!("Kubernetes ended pod {name}: {message}"));
    }
    if let Some(word) = word_of(pod).filter(|word| !word.reason.is_empty()) {
        return Cause::new(&word.reason, word.message);
    }
    match terminated(pod) {
        Some(terminated) if terminated.reason.as_deref() == Some("OOMKilled") => Cause::new(
            "OOMKilled",
            format!(
                "Pod {name} needed more memory than it may have; raise spec.runtime.resources.limits.memory in another ReplayJob."
            ),
        ),
        Some(terminated) => {
            let message = format!("Pod {name} {}.", pod::end(pod, terminated, ""));
            Cause::new("PodFailed", message)
        }
        None => {
            let reason = status.reason.as_deref().unwrap_or("PodFailed");
            let message = status.message.as_deref().unwrap_or("it left no word");
            Cause::new(reason, format!("Pod {name} failed: {message}"))
        }
    }
}

//! The status that a reconcile comes to: a value computed from the old one, from what was seen, and from what was done.

use jiff::Timestamp;
use k8s_openapi::apimachinery::pkg::apis::meta::v1::Condition;
use kube::ResourceExt as _;
use meander_crds::{
    OtherTopics, ReplayFailures, ReplayJob, ReplayJobStatus, ReplayPhase, ReplayProgress, ReplayRange, TopicProgress,
};
use meander_proto::{
    FinalWord,
    v1::{self, progress_update::Progress, replay_progress::Phase},
};

use super::{
    build::replay_name,
    dereference::Facts,
    failures::{self, Cause},
};
use crate::{
    conditions::{
        ACCEPTED, COMPLETE, FAILED, Judgement, PROGRESSING, RECONCILING, STALLED, SUSPENDED, Status, TRUNCATED_RANGE,
        conditions,
    },
    error::{Error, Reason},
    format, job,
    pipeline::status::SILENCE,
    pod::{log_of, trouble},
    progress::Observation,
};

/// What came of validating and applying.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Outcome {
    /// There is a Job.
    Started,
    /// `spec.suspend` is set, and there is no Job yet.
    Saved,
    /// `spec.cancel` is set, and there is no Job, or nobody in it to hear of it.
    Cancelled,
}

/// What a status is computed from.
#[derive(Debug)]
pub struct Inputs<'a> {
    /// The resource, with its old status.
    pub replay: &'a ReplayJob,
    /// What the cluster holds, if it could be read.
    pub facts: Option<&'a Facts>,
    /// What came of validating and applying.
    pub outcome: Result<Outcome, &'a Error>,
    /// What the runtime reports.
    pub observation: &'a Observation,
    /// Now.
    pub now: Timestamp,
}

/// The reason of a Job that has made no pod, which nobody but Progressing tells of.
pub const NO_POD: &str = "NoPod";

const HELD: &str = "spec.suspend is set; set it to false to go on.";

/// Why a replay has ended.
struct End {
    phase: ReplayPhase,
    reason: String,
    message: String,
}

/// The status. One that is final stays as it is.
pub fn status(inputs: &Inputs<'_>) -> ReplayJobStatus {
    let old = inputs.replay.status.clone().unwrap_or_default();
    let generation = inputs.replay.metadata.generation.unwrap_or(0);
    if is_final(&old) {
        return ReplayJobStatus {
            observed_generation: Some(generation),
            ..old
        };
    }
    let report = match inputs
        .observation
        .report
        .as_ref()
        .and_then(|report| report.progress.as_ref())
    {
        Some(Progress::Replay(report)) => Some(report),
        _ => None,
    };
    let word = inputs.facts.and_then(Facts::final_word);
    let end = end(inputs, report, word.as_ref());
    let phase = end
        .as_ref()
        .map_or_else(|| phase(inputs, report, old.phase), |end| end.phase);
    let mut progress = report.map(progress_of_report).or(old.progress);
    // One that did not come so far as to know its range has nothing to add.
    let last = (word.as_ref().filter(|_| end.is_some()))
        .map(|word| &word.progress)
        .filter(|last| last.resolved_range.is_some());
    if let Some(last) = last {
        progress = Some(progress_at_the_end(last, progress.unwrap_or_default()));
    }
    if let (Some(end), Some(progress)) = (&end, &mut progress) {
        conclude(end.phase, progress);
    }
    let job_status = inputs
        .facts
        .and_then(|facts| facts.job.as_ref())
        .and_then(|job| job.status.as_ref());
    let started = job_status
        .and_then(|status| status.start_time.as_ref())
        .map(|time| format::time(time.0));
    let completed = job_status
        .and_then(|status| status.completion_time.as_ref())
        .map(|time| format::time(time.0));
    let judgements = judge(inputs, phase, end.as_ref(), word.as_ref());
    ReplayJobStatus {
        observed_generation: Some(generation),
        phase: Some(phase),
        start_time: old.start_time.or(started),
        completion_time: end
            .is_some()
            .then(|| completed.unwrap_or_else(|| format::time(inputs.now))),
        resolved_range: report
            .and_then(|report| report.resolved_range.as_ref())
            .or_else(|| last?.resolved_range.as_ref())
            .map(range)
            .or(old.resolved_range),
        progress,
        failures: failures(inputs, end.as_ref(), old.failures),
        conditions: conditions(&old.conditions, judgements, generation, inputs.now),
    }
}

/// The attempts that failed. Where the last one left nothing that says why, the end of the replay does, or what was known before.
fn failures(inputs: &Inputs<'_>, end: Option<&End>, old: Option<ReplayFailures>) -> Option<ReplayFailures> {
    let Some(found) = inputs.facts.and_then(failures::failures) else {
        return old;
    };
    if found.last_reason.is_some() {
        return Some(found);
    }
    if let Some(end) = end.filter(|end| end.phase == ReplayPhase::Failed) {
        return Some(ReplayFailures {
            last_reason: Some(end.reason.clone()),
            last_message: Some(end.message.clone()),
            ..found
        });
    }
    let known = old.filter(|old| old.count == found.count && old.last_reason.is_some());
    Some(known.unwrap_or_else(|| {
        let Cause { reason, message } = Cause::gone();
        ReplayFailures {
            last_reason: Some(reason),
            last_message: Some(message),
            last_time: Some(format::time(inputs.now)),
            ..found
        }
    }))
}

/// Whether a status can never change again.
pub fn is_final(status: &ReplayJobStatus) -> bool {
    status.phase.is_some_and(ReplayPhase::is_terminal)
}

/// What must be written at once; the rest may wait for its turn.
pub fn significant(status: &ReplayJobStatus) -> impl PartialEq + '_ {
    (
        status.observed_generation,
        status.phase,
        &status.conditions,
        &status.start_time,
        &status.resolved_range,
        &status.failures,
    )
}

fn end(inputs: &Inputs<'_>, report: Option<&v1::ReplayProgress>, word: Option<&FinalWord>) -> Option<End> {
    let said = word.map(|word| word.phase.as_str());
    let cancelled = || End {
        phase: ReplayPhase::Cancelled,
        reason: "Cancelled".to_owned(),
        message: "The replay was cancelled by spec.cancel.".to_owned(),
    };
    match inputs.outcome {
        Ok(Outcome::Cancelled) => return Some(cancelled()),
        // Neither the format of a pipeline nor what a replay needs of it can be changed. One that runs began with another pipeline of the name.
        Err(Error::Invalid(problem))
            if problem.reason == Reason::FormatNotExact && inputs.facts.is_some_and(|facts| facts.job.is_none()) =>
        {
            return Some(End {
                phase: ReplayPhase::Failed,
                reason: problem.reason.to_string(),
                message: problem.message.clone(),
            });
        }
        _ => {}
    }
    let job = inputs.facts?.job.as_ref()?;
    if said == Some("Cancelled") {
        return Some(cancelled());
    }
    if job::condition(job, "Complete").is_some() {
        // A pod that was cancelled ends as well as one that is done. Where its word is lost, its last report says which it was,
        // and without that the spec does.
        let cancel = match report.map(v1::ReplayProgress::phase) {
            Some(Phase::Cancelled) => true,
            Some(Phase::Succeeded) => false,
            _ => inputs.replay.spec.cancel,
        };
        if said.is_none() && cancel {
            return Some(cancelled());
        }
        let (reason, message) = match word {
            Some(word) if !word.reason.is_empty() => (word.reason.as_str(), word.message.as_str()),
            _ if truncated(inputs, word).is_some() => ("Delivered", "What Kafka held of the range was delivered."),
            _ => ("Delivered", "The whole range was delivered."),
        };
        return Some(End {
            phase: ReplayPhase::Succeeded,
            reason: reason.to_owned(),
            message: message.to_owned(),
        });
    }
    let Cause { reason, message } = failures::of_job(inputs.replay, inputs.facts?)?;
    Some(End {
        phase: ReplayPhase::Failed,
        reason,
        message,
    })
}

fn phase(inputs: &Inputs<'_>, report: Option<&v1::ReplayProgress>, old: Option<ReplayPhase>) -> ReplayPhase {
    match inputs.outcome {
        Ok(Outcome::Saved) => return ReplayPhase::Paused,
        Err(_) if inputs.facts.is_some_and(|facts| facts.job.is_none()) => return ReplayPhase::Pending,
        _ => {}
    }
    if inputs.facts.and_then(failures::between_attempts).is_some() {
        return ReplayPhase::Pending;
    }
    let judged = inputs
        .observation
        .report
        .as_ref()
        .and_then(|report| said(report, PROGRESSING));
    let stands_still = judged.is_some_and(|judgement| judgement.status == Status::False);
    match report.map(v1::ReplayProgress::phase) {
        // It began, and nothing gets into its target any more.
        Some(Phase::Running) if stands_still => ReplayPhase::Pending,
        // What the runtime calls its end is final only when its pod has ended.
        Some(Phase::Running | Phase::Succeeded | Phase::Cancelled) => ReplayPhase::Running,
        Some(Phase::Paused) => ReplayPhase::Paused,
        // The next attempt begins where this one failed.
        Some(Phase::Pending | Phase::Unspecified | Phase::Failed) => ReplayPhase::Pending,
        None => old.unwrap_or(ReplayPhase::Pending),
    }
}

fn old_conditions<'a>(inputs: &Inputs<'a>) -> &'a [Condition] {
    let status = inputs.replay.status.as_ref();
    status.map(|status| status.conditions.as_slice()).unwrap_or_default()
}

/// That something of the range is missing. The pod that found it out said it once; it is so for good.
fn truncated(inputs: &Inputs<'_>, word: Option<&FinalWord>) -> Option<Judgement> {
    let said_now = (inputs.observation.report.as_ref()).and_then(|report| said(report, TRUNCATED_RANGE));
    let said_last = word.filter(|word| !word.truncated.is_empty()).map(|word| {
        let message = word.truncated.as_str();
        Judgement::new(TRUNCATED_RANGE, Status::True, "RetentionPassed", message)
    });
    (said_now.filter(|truncated| truncated.status == Status::True))
        .or(said_last)
        .or_else(|| Judgement::remembered(TRUNCATED_RANGE, old_conditions(inputs)))
}

fn judge(inputs: &Inputs<'_>, phase: ReplayPhase, end: Option<&End>, word: Option<&FinalWord>) -> Vec<Judgement> {
    let old = old_conditions(inputs);
    let mut judgements = vec![accepted(inputs).unwrap_or_else(|| {
        Judgement::remembered(ACCEPTED, old)
            .unwrap_or_else(|| Judgement::new(ACCEPTED, Status::Unknown, "NotLooked", "The cluster could not be read."))
    })];
    if phase == ReplayPhase::Paused {
        judgements.push(Judgement::new(SUSPENDED, Status::True, "Suspended", HELD));
    }
    judgements.extend(truncated(inputs, word));
    judgements.push(progressing(inputs, end, old));
    let invalid = match inputs.outcome {
        Err(Error::Invalid(problem)) => Some(problem),
        _ => None,
    };
    match (end, invalid) {
        (Some(end), _) => match end.phase {
            ReplayPhase::Succeeded => {
                judgements.push(Judgement::new(COMPLETE, Status::True, &end.reason, &end.message));
            }
            ReplayPhase::Failed => {
                judgements.push(Judgement::new(FAILED, Status::True, &end.reason, &end.message));
                judgements.push(Judgement::new(STALLED, Status::True, &end.reason, &end.message));
            }
            _ => judgements.push(Judgement::new(COMPLETE, Status::False, &end.reason, &end.message)),
        },
        (None, Some(problem)) => {
            judgements.push(Judgement::new(STALLED, Status::True, problem.reason, &problem.message));
        }
        // A saved replay is as its spec wants it.
        (None, None) if phase == ReplayPhase::Paused => {}
        (None, None) => {
            let message = "The replay has not ended yet.";
            judgements.push(Judgement::new(RECONCILING, Status::True, "Replaying", message));
        }
    }
    judgements
}

fn accepted(inputs: &Inputs<'_>) -> Option<Judgement> {
    if let Err(error) = inputs.outcome {
        let problem = error.problem();
        return (!problem.reason.is_passing())
            .then(|| Judgement::new(ACCEPTED, Status::False, problem.reason, &problem.message));
    }
    Some(Judgement::new(
        ACCEPTED,
        Status::True,
        "Accepted",
        "The replay was accepted.",
    ))
}

/// Whether changes are delivered and, where they are not, the reason that matters: this is the one of the column.
fn progressing(inputs: &Inputs<'_>, end: Option<&End>, old: &[Condition]) -> Judgement {
    let judgement = |status, reason: &str, message: &str| Judgement::new(PROGRESSING, status, reason, message);
    if let Some(end) = end {
        return judgement(Status::False, &end.reason, &end.message);
    }
    let starting = || judgement(Status::False, "Starting", "The replay's pod is being started.");
    let remembered = Judgement::remembered(PROGRESSING, old);
    match inputs.outcome {
        Ok(Outcome::Saved) => return judgement(Status::False, "Suspended", HELD),
        Err(error) if error.problem().reason.is_passing() => return remembered.unwrap_or_else(starting),
        Err(error) if inputs.facts.is_none_or(|facts| facts.job.is_none()) => {
            let problem = error.problem();
            return judgement(Status::False, &problem.reason.to_string(), &problem.message);
        }
        _ => {}
    }
    if let Some(Cause { reason, message }) = inputs.facts.and_then(failures::between_attempts) {
        let message = format!("The last attempt failed, and another follows: {message}");
        return judgement(Status::False, &reason, &message);
    }
    let trouble = inputs.facts.and_then(|facts| trouble(&facts.pods));
    let report = inputs.observation.report.as_ref();
    let silent = inputs.observation.silence > SILENCE;
    match (trouble, report.and_then(|report| said(report, PROGRESSING))) {
        (_, Some(said)) if !silent => said,
        (Some(trouble), _) => judgement(Status::False, "PodFailing", &format!("The replay's {trouble}")),
        // An operator that has just started goes on from what the last one wrote.
        (None, None) if !silent => remembered
            // What the operator itself found is found again, or is no more.
            .filter(|judgement| judgement.reason != "Suspended" && !Reason::is_one(&judgement.reason))
            .unwrap_or_else(starting),
        _ => {
            let seconds = SILENCE.as_secs();
            let facts = inputs.facts.filter(|facts| facts.job.is_some());
            if let Some(Facts { pods, .. }) = facts
                && pods.is_empty()
            {
                let message = format!(
                    "The replay's Job has no pod, and nothing was heard of it for {seconds} s: a quota, a LimitRange, Pod Security or a webhook may refuse it; see why: kubectl -n {} describe job {}",
                    inputs.replay.namespace().unwrap_or_default(),
                    replay_name(inputs.replay)
                );
                return judgement(Status::False, NO_POD, &message);
            }
            let log = facts.and_then(|facts| log_of(&facts.pods));
            let message = format!(
                "The runtime has not reported for {seconds} s; see its pod{}.",
                log.map(|command| format!(", and {command}")).unwrap_or_default()
            );
            judgement(Status::Unknown, "RuntimeSilent", &message)
        }
    }
}

fn said(report: &v1::ProgressUpdate, type_: &'static str) -> Option<Judgement> {
    let condition = report.conditions.iter().find(|condition| condition.r#type == type_)?;
    Some(Judgement::new(
        type_,
        condition.status.into(),
        &condition.reason,
        &condition.message,
    ))
}

fn conclude(phase: ReplayPhase, progress: &mut ReplayProgress) {
    if phase == ReplayPhase::Succeeded {
        progress.percent = 100;
        progress.percent_by_events = 100;
        progress.total = progress.delivered + progress.filtered;
    }
    progress.progress = Some(format!("{}%", progress.percent));
    progress.events_per_second = 0;
    progress.actual_speed = None;
    progress.behind_millis = 0;
    progress.eta_seconds = None;
}

fn progress_of_report(report: &v1::ReplayProgress) -> ReplayProgress {
    // 100 is for what is complete; a cast of a float saturates.
    let floor = |percent: f64| percent.clamp(0.0, 100.0).floor() as u32;
    let percent = floor(report.percent);
    ReplayProgress {
        delivered: report.delivered,
        filtered: report.filtered,
        total: report.total,
        bytes: report.bytes,
        percent,
        percent_by_events: floor(report.percent_by_events),
        progress: Some(format!("{percent}%")),
        current_time: format::time_of_micros(report.current_time_micros),
        current_position: text(&report.current_position),
        events_per_second: report.events_per_second.round() as u64,
        speed: text(&report.speed),
        actual_speed: (report.actual_speed > 0.0).then(|| format!("{:.2}", report.actual_speed)),
        behind_millis: report.behind_millis,
        eta_seconds: (report.eta_seconds != 0).then_some(report.eta_seconds),
        first_event_time: format::time_of_micros(report.first_event_time_micros),
        delivery_millis: millis(report.delivery_micros),
        topics: report.topics.iter().map(topic).collect(),
        other_topics: report.other_topics.as_ref().map(|others| OtherTopics {
            topics: others.topics,
            delivered: others.delivered,
            bytes: others.bytes,
        }),
    }
}

fn topic(report: &v1::TopicProgress) -> TopicProgress {
    TopicProgress {
        topic: report.topic.clone(),
        delivered: report.delivered,
        bytes: report.bytes,
        first_time: format::time_of_micros(report.first_time_micros),
        last_time: format::time_of_micros(report.last_time_micros),
    }
}

/// What the last word says, and of the topics what was reported of the same, which had more room for them.
fn progress_at_the_end(word: &v1::ReplayProgress, reported: ReplayProgress) -> ReplayProgress {
    let last = progress_of_report(word);
    if (reported.delivered, reported.bytes) != (last.delivered, last.bytes) {
        return last;
    }
    ReplayProgress {
        topics: reported.topics,
        other_topics: reported.other_topics,
        ..last
    }
}

fn range(range: &v1::ResolvedRange) -> ReplayRange {
    ReplayRange {
        from_time: format::time_of_micros(range.from_time_micros),
        to_time: format::time_of_micros(range.to_time_micros),
        to_position: text(&range.to_position),
        offsets: range.offsets,
    }
}

fn text(text: &str) -> Option<String> {
    (!text.is_empty()).then(|| text.to_owned())
}

fn millis(micros: i64) -> u64 {
    u64::try_from(micros / 1000).unwrap_or(0)
}

//! A replay's status as those who follow it see it, before its runtime has spoken and after it has ended.

use jiff::Timestamp;
use kube::{Resource as _, ResourceExt as _};
use meander_crds::{ReplayJob, ReplayJobStatus, ReplayPhase};
use meander_proto::v1::{
    Condition, OtherTopics, ProgressUpdate, ReplayProgress, ResolvedRange, ResourceReference, TopicProgress,
    progress_update::Progress, replay_progress::Phase,
};

/// The status as a report.
pub fn report(replay: &ReplayJob, status: &ReplayJobStatus, now: Timestamp) -> ProgressUpdate {
    let conditions = status.conditions.iter().map(|condition| Condition {
        r#type: condition.type_.clone(),
        status: condition.status == "True",
        reason: condition.reason.clone(),
        message: condition.message.clone(),
    });
    let progress = status.progress.clone().unwrap_or_default();
    let resolved_range = status.resolved_range.as_ref().map(|range| ResolvedRange {
        from_time_micros: micros(range.from_time.as_deref()),
        to_time_micros: micros(range.to_time.as_deref()),
        to_position: range.to_position.clone().unwrap_or_default(),
        offsets: range.offsets,
    });
    let topics = progress.topics.into_iter().map(|topic| TopicProgress {
        topic: topic.topic,
        delivered: topic.delivered,
        bytes: topic.bytes,
        first_time_micros: micros(topic.first_time.as_deref()),
        last_time_micros: micros(topic.last_time.as_deref()),
    });
    let progress = ReplayProgress {
        phase: phase(status.phase).into(),
        delivered: progress.delivered,
        percent: f64::from(progress.percent),
        current_time_micros: micros(progress.current_time.as_deref()),
        current_position: progress.current_position.unwrap_or_default(),
        events_per_second: progress.events_per_second as f64,
        behind_millis: progress.behind_millis,
        eta_seconds: progress.eta_seconds.unwrap_or_default(),
        resolved_range,
        first_event_time_micros: micros(progress.first_event_time.as_deref()),
        delivery_micros: i64::try_from(progress.delivery_millis.saturating_mul(1000)).unwrap_or(i64::MAX),
        filtered: progress.filtered,
        total: progress.total,
        percent_by_events: f64::from(progress.percent_by_events),
        speed: progress.speed.unwrap_or_default(),
        actual_speed: progress
            .actual_speed
            .and_then(|speed| speed.parse().ok())
            .unwrap_or_default(),
        bytes: progress.bytes,
        topics: topics.collect(),
        other_topics: progress.other_topics.map(|others| OtherTopics {
            topics: others.topics,
            delivered: others.delivered,
            bytes: others.bytes,
        }),
    };
    ProgressUpdate {
        resource: Some(ResourceReference {
            kind: ReplayJob::kind(&()).into_owned(),
            namespace: replay.namespace().unwrap_or_default(),
            name: replay.name_any(),
            uid: replay.uid().unwrap_or_default(),
        }),
        time_micros: now.as_microsecond(),
        conditions: conditions.collect(),
        progress: Some(Progress::Replay(progress)),
    }
}

fn phase(phase: Option<ReplayPhase>) -> Phase {
    match phase {
        None | Some(ReplayPhase::Pending) => Phase::Pending,
        Some(ReplayPhase::Running) => Phase::Running,
        Some(ReplayPhase::Paused) => Phase::Paused,
        Some(ReplayPhase::Succeeded) => Phase::Succeeded,
        Some(ReplayPhase::Failed) => Phase::Failed,
        Some(ReplayPhase::Cancelled) => Phase::Cancelled,
    }
}

fn micros(time: Option<&str>) -> i64 {
    time.and_then(|time| time.parse::<Timestamp>().ok())
        .map_or(0, Timestamp::as_microsecond)
}

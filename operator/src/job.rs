//! How a Job has ended.

use k8s_openapi::api::batch::v1::Job;

/// The reason and message of a Job's condition, if it is true.
pub fn condition(job: &Job, type_: &str) -> Option<String> {
    let conditions = job.status.as_ref()?.conditions.as_ref()?;
    let condition = conditions
        .iter()
        .find(|condition| condition.type_ == type_ && condition.status == "True")?;
    let reason = condition.reason.as_deref().unwrap_or(type_);
    let message = condition.message.as_deref().unwrap_or_default();
    Some(format!("{reason}: {message}"))
}

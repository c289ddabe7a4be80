//! How a Job has ended.

use k8s_openapi::api::batch::v1::{Job, JobCondition};

/// A Job's condition, if it is true.
pub fn condition<'a>(job: &'a Job, type_: &str) -> Option<&'a JobCondition> {
    let conditions = job.status.as_ref()?.conditions.as_ref()?;
    conditions
        .iter()
        .find(|condition| condition.type_ == type_ && condition.status == "True")
}

/// The reason and message of a Job's condition, if it is true.
pub fn said(job: &Job, type_: &str) -> Option<String> {
    let condition = condition(job, type_)?;
    let reason = condition.reason.as_deref().unwrap_or(type_);
    let message = condition.message.as_deref().unwrap_or_default();
    Some(format!("{reason}: {message}"))
}

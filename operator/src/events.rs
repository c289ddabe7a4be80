//! Events, one recorder for all. What is published is a transition; a state that lasts is a condition.

use k8s_openapi::apimachinery::pkg::apis::meta::v1::Condition;
use kube::{
    Client, Resource,
    runtime::events::{Event, EventType, Recorder, Reporter},
};
use tracing::debug;

use crate::conditions::{DEGRADED, FAILED, state};

/// Publishes events.
#[derive(Clone)]
pub struct Events(Recorder);

impl Events {
    /// Events that name `instance` as the process that saw them.
    pub fn new(client: Client, instance: &str) -> Self {
        let reporter = Reporter {
            controller: crate::naming::FIELD_MANAGER.to_owned(),
            instance: Some(instance.to_owned()),
        };
        Self(Recorder::new(client, reporter))
    }

    /// Publishes one event. One that cannot be published is not worth failing for.
    pub async fn publish<K: Resource<DynamicType = ()>>(
        &self,
        object: &K,
        type_: EventType,
        action: &str,
        reason: &str,
        note: &str,
    ) {
        // The API server takes 1 kB.
        let note = note.chars().take(900).collect();
        let event = Event {
            type_,
            reason: reason.to_owned(),
            note: Some(note),
            action: action.to_owned(),
            secondary: None,
        };
        if let Err(error) = self.0.publish(&event, &object.object_ref(&())).await {
            debug!(%error, reason, "cannot publish an event");
        }
    }

    /// Publishes what became of the condition `type_`, if anything did.
    pub async fn transition<K: Resource<DynamicType = ()>>(
        &self,
        object: &K,
        type_: &str,
        old: &[Condition],
        new: &[Condition],
    ) {
        if state(old, type_) == state(new, type_) {
            return;
        }
        if let Some(condition) = new.iter().find(|condition| condition.type_ == type_) {
            let (reason, message) = (&condition.reason, &condition.message);
            self.publish(object, severity(condition), "Reconcile", reason, message)
                .await;
        }
    }
}

fn severity(condition: &Condition) -> EventType {
    // These are as they are because of what somebody asked for.
    let wanted = matches!(
        condition.reason.as_str(),
        "Suspended" | "Terminating" | "PodNotReady" | "Cancelled"
    );
    let bad = match condition.type_.as_str() {
        DEGRADED | FAILED => "True",
        _ => "False",
    };
    if condition.status == bad && !wanted {
        EventType::Warning
    } else {
        EventType::Normal
    }
}

#[cfg(test)]
mod tests {
    use jiff::Timestamp;
    use k8s_openapi::apimachinery::pkg::apis::meta::v1::Time;

    use super::*;
    use crate::conditions::{COMPLETE, READY};

    #[test]
    fn what_is_wrong_is_a_warning_and_what_was_asked_for_is_none() {
        let is_warning = |type_: &str, status: &str, reason: &str| {
            let condition = Condition {
                last_transition_time: Time(Timestamp::UNIX_EPOCH),
                message: String::new(),
                observed_generation: None,
                reason: reason.to_owned(),
                status: status.to_owned(),
                type_: type_.to_owned(),
            };
            severity(&condition) == EventType::Warning
        };
        assert!(is_warning(READY, "False", "DatabaseUnreachable"));
        assert!(is_warning(DEGRADED, "True", "TableNotOwned"));
        assert!(is_warning(FAILED, "True", "ReceiverUnreachable"));
        assert!(!is_warning(COMPLETE, "False", "Cancelled"));
        assert!(!is_warning(COMPLETE, "True", "Delivered"));
        assert!(!is_warning(READY, "False", "Suspended"));
    }
}

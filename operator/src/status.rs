//! Writes a computed status, if it is worth a write.

use std::time::Duration;

use kube::{
    Api, ResourceExt as _,
    api::{Patch, PatchParams},
};
use serde::Serialize;
use serde_json::json;

use crate::{
    apply::Object,
    context::Context,
    error::Error,
    naming::FIELD_MANAGER,
    progress::{Observation, ResourceKey},
};

/// Progress alone is written at most this often.
pub const INTERVAL: Duration = Duration::from_secs(10);

/// What is done with a computed status.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Decision {
    /// It is written.
    Write,
    /// It says what the old one says.
    Unchanged,
    /// It only says how far things are, and has been written just now; it is its turn after this time.
    Defer(Duration),
}

/// Decides whether a status is worth a write.
pub fn decide<S: PartialEq>(old: &S, new: &S, significant: bool, since_written: Option<Duration>) -> Decision {
    if old == new {
        return Decision::Unchanged;
    }
    match since_written {
        Some(elapsed) if !significant && elapsed < INTERVAL => Decision::Defer(INTERVAL - elapsed),
        _ => Decision::Write,
    }
}

/// Writes `new` as the status of `resource` as decided. Returns when it should be looked at again, if it was deferred.
pub async fn write<K, S>(
    context: &Context,
    resource: &K,
    key: &ResourceKey,
    observation: &Observation,
    (old, new): (&S, &S),
    significant: bool,
) -> Result<Option<Duration>, Error>
where
    K: Object,
    S: PartialEq + Serialize,
{
    let count = |outcome| {
        context
            .metrics
            .statuses
            .with_label_values(&[key.kind.as_str(), outcome])
            .inc()
    };
    match decide(old, new, significant, observation.since_written) {
        Decision::Unchanged => {
            count("unchanged");
            Ok(None)
        }
        Decision::Defer(after) => {
            count("deferred");
            Ok(Some(after))
        }
        Decision::Write => {
            context.may_write(crate::conditions::READY)?;
            let api: Api<K> = Api::namespaced(context.client.clone(), &key.namespace);
            let patch = json!({
                "apiVersion": K::api_version(&()),
                "kind": K::kind(&()),
                // A patch must never hit another resource of the same name, and the API server does not look at the uid in a
                // patch of a status.
                "metadata": {"name": key.name, "resourceVersion": resource.resource_version()},
                "status": new,
            });
            let params = PatchParams::apply(FIELD_MANAGER).force();
            match api.patch_status(&key.name, &params, &Patch::Apply(&patch)).await {
                Ok(patched) => {
                    count("written");
                    context.tracker.written(key);
                    context.tracker.wrote(key, patched.resource_version());
                    Ok(None)
                }
                // It has gone meanwhile; there is nobody left to tell.
                Err(kube::Error::Api(status)) if status.code == 404 => Ok(None),
                Err(error) => {
                    count("failed");
                    Err(Error::from_api(crate::conditions::READY, "writing the status", &error))
                }
            }
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_status_is_written_when_it_says_something_new_and_progress_takes_turns() {
        let second = Duration::from_secs(1);
        assert_eq!(decide(&1, &1, false, None), Decision::Unchanged);
        assert_eq!(decide(&1, &2, false, None), Decision::Write);
        assert_eq!(decide(&1, &2, false, Some(second)), Decision::Defer(INTERVAL - second));
        assert_eq!(decide(&1, &2, true, Some(second)), Decision::Write);
        assert_eq!(decide(&1, &2, false, Some(INTERVAL)), Decision::Write);
    }
}

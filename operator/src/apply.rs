//! Server-side apply of what a resource needs.

use std::fmt::Debug;

use k8s_openapi::{NamespaceResourceScope, apimachinery::pkg::apis::meta::v1::OwnerReference};
use kube::{
    Api, Resource, ResourceExt as _,
    api::{DeleteParams, ListParams, Patch, PatchParams, PostParams},
};
use serde::{Serialize, de::DeserializeOwned};
use serde_json::Value;
use tracing::info;

use crate::{
    context::Context,
    error::{Error, Reason},
    naming::{APPLIED_HASH_ANNOTATION, FIELD_MANAGER, digest},
};

/// A namespaced kind that can be applied.
pub trait Object:
    Resource<DynamicType = (), Scope = NamespaceResourceScope> + Clone + Debug + Serialize + DeserializeOwned
{
}

impl<K> Object for K where
    K: Resource<DynamicType = (), Scope = NamespaceResourceScope> + Clone + Debug + Serialize + DeserializeOwned
{
}

/// Applies the objects of one resource.
pub struct Applier<'a> {
    /// What every reconcile shares.
    pub context: &'a Context,
    /// Namespace of the resource.
    pub namespace: &'a str,
    /// The resource, as its objects name it.
    pub owner: &'a OwnerReference,
    /// Type of the condition that a failure belongs to.
    pub condition: &'static str,
}

impl Applier<'_> {
    /// Makes the object what `desired` says, leaving to others the fields that it does not say. Returns the object, and whether
    /// anything was written.
    ///
    /// An object that is as it should be is not written: reading is cheap, and every apply is a write to etcd's log for nothing.
    pub async fn apply<K: Object>(&self, desired: K) -> Result<(K, bool), Error> {
        let api: Api<K> = Api::namespaced(self.context.client.clone(), self.namespace);
        let name = desired.name_any();
        let what = format!("applying {} {name}", K::kind(&()));
        let desired = self.owned(desired, &what)?;
        let observed = self.observed(&api, &name).await?;
        if let Some(observed) = &observed
            && serde_json::to_value(observed).is_ok_and(|observed| covers(&observed, &desired))
        {
            self.count("unchanged");
            return Ok((observed.clone(), false));
        }
        self.context.may_write(self.condition)?;
        let object = api
            .patch(
                &name,
                &PatchParams::apply(FIELD_MANAGER).force(),
                &Patch::Apply(&desired),
            )
            .await
            .map_err(|error| Error::from_api(self.condition, &what, &error))?;
        info!(kind = %K::kind(&()), namespace = self.namespace, name, "applied");
        self.count("written");
        Ok((object, true))
    }

    /// Creates an object that is never changed afterwards, such as a Job.
    pub async fn create<K: Object>(&self, desired: K) -> Result<(K, bool), Error> {
        let api: Api<K> = Api::namespaced(self.context.client.clone(), self.namespace);
        let name = desired.name_any();
        if let Some(observed) = self.observed(&api, &name).await? {
            self.count("unchanged");
            return Ok((observed, false));
        }
        let what = format!("creating {} {name}", K::kind(&()));
        let mut desired = desired;
        desired.meta_mut().owner_references = Some(vec![self.owner.clone()]);
        self.context.may_write(self.condition)?;
        let params = PostParams {
            field_manager: Some(FIELD_MANAGER.to_owned()),
            ..PostParams::default()
        };
        let object = api
            .create(&params, &desired)
            .await
            .map_err(|error| Error::from_api(self.condition, &what, &error))?;
        info!(kind = %K::kind(&()), namespace = self.namespace, name, "created");
        self.count("written");
        Ok((object, true))
    }

    /// Deletes the resource's objects that carry `selector` and are not among `keep`.
    pub async fn sweep<K: Object>(&self, selector: &str, keep: &[&str]) -> Result<(), Error> {
        let api: Api<K> = Api::namespaced(self.context.client.clone(), self.namespace);
        let what = format!("looking for orphaned {}s", K::kind(&()));
        let found = api
            .list(&ListParams::default().labels(selector))
            .await
            .map_err(|error| Error::from_api(self.condition, &what, &error))?;
        for orphan in found {
            let name = orphan.name_any();
            if keep.contains(&name.as_str()) || !self.owns(&orphan) {
                continue;
            }
            self.context.may_write(self.condition)?;
            match api.delete(&name, &DeleteParams::background()).await {
                Ok(_) => info!(kind = %K::kind(&()), namespace = self.namespace, name, "deleted an orphan"),
                Err(kube::Error::Api(status)) if status.code == 404 => {}
                Err(error) => return Err(Error::from_api(self.condition, &format!("deleting {name}"), &error)),
            }
        }
        Ok(())
    }

    /// The object as it is now, refused if it is not the resource's own.
    async fn observed<K: Object>(&self, api: &Api<K>, name: &str) -> Result<Option<K>, Error> {
        let kind = K::kind(&());
        let observed = api
            .get_opt(name)
            .await
            .map_err(|error| Error::from_api(self.condition, &format!("reading {kind} {name}"), &error))?;
        match observed {
            Some(object) if !self.owns(&object) => Err(Error::waiting(
                self.condition,
                Reason::NameTaken,
                format!(
                    "a {kind} named {name} exists and is not this resource's own: delete it or give this resource another name"
                ),
            )),
            observed => Ok(observed),
        }
    }

    fn owns<K: Object>(&self, object: &K) -> bool {
        is_owned(object, Some(&self.owner.uid))
    }

    /// The object as it is sent: with its owner, and with a digest of what was said last time, so that what is no longer said is
    /// noticed too.
    fn owned<K: Object>(&self, mut desired: K, what: &str) -> Result<Value, Error> {
        let json = |desired: &K| {
            serde_json::to_value(desired)
                .map_err(|error| Error::transient(self.condition, Reason::Rejected, format!("{what} failed: {error}")))
        };
        desired.meta_mut().owner_references = Some(vec![self.owner.clone()]);
        let hash = digest(&json(&desired)?.to_string(), 16);
        desired
            .annotations_mut()
            .insert(APPLIED_HASH_ANNOTATION.to_owned(), hash);
        json(&desired)
    }

    fn count(&self, outcome: &str) {
        self.context.metrics.applies.with_label_values(&[outcome]).inc();
    }
}

/// Whether the object belongs to the one with this uid. A name alone says nothing: what a deleted resource of the same name had is
/// there until it is collected.
pub fn is_owned<K: Resource>(object: &K, uid: Option<&String>) -> bool {
    object.owner_references().iter().any(|owner| Some(&owner.uid) == uid)
}

/// Whether `observed` has everything that `desired` says; the API server adds defaults, and others add fields of their own.
fn covers(observed: &Value, desired: &Value) -> bool {
    match (observed, desired) {
        (Value::Object(observed), Value::Object(desired)) => desired
            .iter()
            .all(|(key, desired)| observed.get(key).is_some_and(|observed| covers(observed, desired))),
        (Value::Array(observed), Value::Array(desired)) => {
            observed.len() == desired.len() && observed.iter().zip(desired).all(|(o, d)| covers(o, d))
        }
        (observed, desired) => observed == desired,
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use serde_json::json;

    #[test]
    fn covered_is_what_needs_no_write() {
        let desired = json!({"spec": {"replicas": 1, "args": ["a", {"b": 1}]}});
        for (observed, covered) in [
            (
                json!({"spec": {"replicas": 1, "args": ["a", {"b": 1, "c": 2}], "more": 1}, "status": {}}),
                true,
            ),
            (json!({"spec": {"replicas": 2, "args": ["a", {"b": 1}]}}), false),
            (json!({"spec": {"replicas": 1, "args": ["a", {"b": 1}, "x"]}}), false),
            (json!({"spec": {"replicas": 1}}), false),
        ] {
            assert_eq!(covers(&observed, &desired), covered, "{observed}");
        }
    }
}

//! Server-side apply of what a resource needs.

use std::fmt::Debug;

use k8s_openapi::{NamespaceResourceScope, apimachinery::pkg::apis::meta::v1::OwnerReference};
use kube::{
    Api, Resource, ResourceExt as _,
    api::{DeleteParams, Patch, PatchParams, PostParams, Preconditions},
};
use serde::{Serialize, de::DeserializeOwned};
use serde_json::Value;
use tracing::info;

use crate::{
    cache::Owned,
    context::{Context, Place, Settled},
    error::{Error, Reason},
    naming::{APPLIED_HASH_ANNOTATION, FIELD_MANAGER, digest},
    progress::ResourceKey,
};

/// The resource version at which there is no object yet: a store's first write makes a higher one. Who applies at this version changes nothing that
/// is there (it conflicts), and makes what is not.
const NOTHING_YET: &str = "1";

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
    /// The resource.
    pub key: &'a ResourceKey,
    /// The same, as its objects name it.
    pub owner: &'a OwnerReference,
    /// Type of the condition that a failure belongs to.
    pub condition: &'static str,
}

impl Applier<'_> {
    /// Makes the object what `desired` says, leaving to others the fields that it does not say. Returns the object if it is newer than the
    /// cache's, and whether anything was written.
    ///
    /// An object that is as it should be costs no request, and one that is missing costs one. What the cache does not show so is read, and then
    /// written only if it is not: every apply is a write to etcd's log.
    pub async fn apply<K: Owned>(&self, desired: K) -> Result<(Option<K>, bool), Error> {
        let api: Api<K> = self.api();
        let name = desired.name_any();
        let what = format!("applying {} {name}", K::kind(&()));
        let desired = self.owned(desired, &what)?;
        let place = Place {
            key: self.key.clone(),
            kind: K::kind(&()).into_owned(),
            name: name.clone(),
        };
        let hash = digest(&desired.to_string(), 16);
        let at = |object: &K| Settled {
            hash: hash.clone(),
            version: object.resource_version(),
        };
        let is_done = |object: &K| {
            self.context.settled().get(&place) == Some(&at(object))
                || serde_json::to_value(object).is_ok_and(|object| covers(&object, &desired))
        };
        let known = self.context.caches.get::<K>(self.key, &name);
        if known.as_ref().is_some_and(|known| self.owns(known) && is_done(known)) {
            self.count("unchanged");
            return Ok((None, false));
        }
        if known.is_none()
            && let Some(made) = self.made(&api, &name, &desired, &what).await?
        {
            return Ok((Some(made), true));
        }
        let observed = self.observed(&api, &name).await?;
        if observed.as_ref().is_some_and(is_done) {
            self.count("unchanged");
            return Ok((observed, false));
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
        if observed.is_some_and(|observed| observed.resource_version() == object.resource_version()) {
            // It was so already, in the API server's words: it keeps `0.5` of a processor as `500m`. Or others keep it so.
            self.context.settled().insert(place, at(&object));
            self.count("unchanged");
            return Ok((Some(object), false));
        }
        info!(kind = %K::kind(&()), namespace = self.key.namespace, name, "applied");
        self.count("written");
        Ok((Some(object), true))
    }

    /// Applies an object under whose name there is nothing. None where there is something, which is left as it is.
    async fn made<K: Object>(&self, api: &Api<K>, name: &str, desired: &Value, what: &str) -> Result<Option<K>, Error> {
        self.context.may_write(self.condition)?;
        let mut new = desired.clone();
        if let Some(metadata) = new.get_mut("metadata").and_then(Value::as_object_mut) {
            metadata.insert("resourceVersion".to_owned(), NOTHING_YET.into());
        }
        let params = PatchParams::apply(FIELD_MANAGER).force();
        match api.patch(name, &params, &Patch::Apply(&new)).await {
            Ok(object) => {
                info!(kind = %K::kind(&()), namespace = self.key.namespace, name, "applied");
                self.count("written");
                Ok(Some(object))
            }
            Err(kube::Error::Api(status)) if status.code == 409 => Ok(None),
            Err(error) => Err(Error::from_api(self.condition, what, &error)),
        }
    }

    /// Creates an object that is never changed afterwards, such as a Job.
    pub async fn create<K: Owned>(&self, desired: K) -> Result<(K, bool), Error> {
        let api: Api<K> = self.api();
        let name = desired.name_any();
        let known = self.context.caches.get::<K>(self.key, &name);
        if let Some(known) = known.filter(|known| self.owns(known)) {
            self.count("unchanged");
            return Ok((known, false));
        }
        let what = format!("creating {} {name}", K::kind(&()));
        let mut desired = desired;
        desired.meta_mut().owner_references = Some(vec![self.owner.clone()]);
        self.context.may_write(self.condition)?;
        let params = PostParams {
            field_manager: Some(FIELD_MANAGER.to_owned()),
            ..PostParams::default()
        };
        let created = api.create(&params, &desired).await;
        if matches!(&created, Err(kube::Error::Api(status)) if status.code == 409)
            && let Some(observed) = self.observed(&api, &name).await?
        {
            self.count("unchanged");
            return Ok((observed, false));
        }
        let object = created.map_err(|error| Error::from_api(self.condition, &what, &error))?;
        info!(kind = %K::kind(&()), namespace = self.key.namespace, name, "created");
        self.count("written");
        Ok((object, true))
    }

    /// Makes the one object of its kind what `desired` says, and deletes every other; where it is none, all of them.
    pub async fn keep<K: Owned>(&self, desired: Option<K>) -> Result<(), Error> {
        let name = desired.as_ref().map(|desired| desired.name_any());
        if let Some(desired) = desired {
            self.apply(desired).await?;
        }
        self.sweep::<K>(name.as_deref().as_slice()).await
    }

    /// Deletes the resource's objects that are not among `keep`. One that the cache does not show yet is deleted when it does.
    pub async fn sweep<K: Owned>(&self, keep: &[&str]) -> Result<(), Error> {
        for orphan in self.context.caches.of::<K>(self.key) {
            let name = orphan.name_any();
            let goes = orphan.meta().deletion_timestamp.is_some();
            if goes || keep.contains(&name.as_str()) || !self.owns(&orphan) {
                continue;
            }
            self.context.may_write(self.condition)?;
            // Another one may have come under this name since.
            let params = DeleteParams::background().preconditions(Preconditions {
                uid: orphan.uid(),
                resource_version: None,
            });
            match self.api::<K>().delete(&name, &params).await {
                Ok(_) => info!(kind = %K::kind(&()), namespace = self.key.namespace, name, "deleted an orphan"),
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

    fn api<K: Object>(&self) -> Api<K> {
        Api::namespaced(self.context.client.clone(), &self.key.namespace)
    }

    fn owns<K: Object>(&self, object: &K) -> bool {
        is_owned(object, Some(&self.owner.uid))
    }

    fn owned<K: Object>(&self, desired: K, what: &str) -> Result<Value, Error> {
        owned(desired, self.owner)
            .and_then(serde_json::to_value)
            .map_err(|error| Error::transient(self.condition, Reason::Rejected, format!("{what} failed: {error}")))
    }

    fn count(&self, outcome: &str) {
        self.context.metrics.applies.with_label_values(&[outcome]).inc();
    }
}

/// The object as it is sent: with its owner, and with a digest of what was said last time, so that what is no longer said is noticed too.
fn owned<K: Object>(mut desired: K, owner: &OwnerReference) -> serde_json::Result<K> {
    desired.meta_mut().owner_references = Some(vec![owner.clone()]);
    let hash = digest(&serde_json::to_value(&desired)?.to_string(), 16);
    desired
        .annotations_mut()
        .insert(APPLIED_HASH_ANNOTATION.to_owned(), hash);
    Ok(desired)
}

/// Whether just this was asked of the object last.
pub fn was_asked<K: Object>(object: &K, desired: K, owner: &OwnerReference) -> bool {
    let asked = |object: &K| object.annotations().get(APPLIED_HASH_ANNOTATION).cloned();
    owned(desired, owner).is_ok_and(|desired| asked(object) == asked(&desired))
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

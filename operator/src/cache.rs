//! What the watches show of the resources and of the objects that are made for them, so that a reconcile asks the API server for nothing
//! that has not changed.
//!
//! Objects are kept as JSON: the types of Kubernetes, with a place for everything that there could be, are several times as large.
//!
//! A cache lags behind. So it decides that there is nothing to do, or that something has to be looked at; what is then done begins
//! with the object itself. What must not be done by an old picture, such as the end of a resource, reads anew.

use std::{
    collections::{BTreeMap, HashMap, HashSet},
    marker::PhantomData,
    pin::pin,
    sync::{PoisonError, RwLock},
};

use futures::StreamExt as _;
use k8s_openapi::api::{
    apps::v1::Deployment,
    batch::v1::Job,
    core::v1::{ConfigMap, Pod, Service, ServiceAccount},
    networking::v1::NetworkPolicy,
    policy::v1::PodDisruptionBudget,
};
use kube::{
    Api, Client, Resource, ResourceExt as _,
    runtime::{
        WatchStreamExt as _,
        reflector::{self, ObjectRef, Store, store::Writer},
        watcher::{Event, watcher},
    },
};
use meander_crds::{CdcPipeline, ReplayJob};
use tokio::sync::mpsc;
use tokio_util::sync::CancellationToken;
use tracing::warn;

use crate::{
    apply::Object,
    client::watching,
    naming::{MANAGED_SELECTOR, PIPELINE_LABEL, REPLAY_LABEL},
    progress::{Kind, ResourceKey},
};

/// A kind of which the operator makes objects.
pub trait Owned: Object + Send + Sync + 'static {
    /// Where its objects are kept.
    fn cache(caches: &Caches) -> &Cache<Self>;

    /// Takes away what nobody looks at.
    fn prune(&mut self) {}
}

macro_rules! owned {
    ($($kind:ty, $field:ident, $prune:expr;)*) => {$(
        impl Owned for $kind {
            fn cache(caches: &Caches) -> &Cache<Self> {
                &caches.$field
            }

            fn prune(&mut self) {
                let prune: fn(&mut Self) = $prune;
                prune(self);
            }
        }
    )*};
}

owned! {
    Deployment, deployments, |_| {};
    // It is never changed once it is there, and how it stands is what is asked.
    Job, jobs, |job| job.spec = None;
    Pod, pods, |pod| pod.spec = None;
    ConfigMap, config_maps, |_| {};
    ServiceAccount, service_accounts, |_| {};
    Service, services, |_| {};
    PodDisruptionBudget, disruption_budgets, |_| {};
    NetworkPolicy, network_policies, |_| {};
}

/// The objects of one kind.
#[derive(Debug)]
pub struct Cache<K> {
    shown: RwLock<Shown>,
    kind: PhantomData<fn() -> K>,
}

/// Objects as JSON, by the resource that their labels name, and by their own names.
#[derive(Debug, Default)]
struct Shown {
    objects: HashMap<ResourceKey, BTreeMap<String, Box<str>>>,
    /// A label may be changed, so it alone does not say where an object is kept.
    places: HashMap<(String, String), ResourceKey>,
}

impl<K> Default for Cache<K> {
    fn default() -> Self {
        Self {
            shown: RwLock::default(),
            kind: PhantomData,
        }
    }
}

impl Shown {
    /// Takes an object in. Returns the resources for which something has changed.
    fn insert<K: Owned>(&mut self, mut object: K) -> Vec<ResourceKey> {
        object.meta_mut().managed_fields = None;
        object.prune();
        let mut changed = self.remove(&object);
        // What was read from JSON can be written as such; if it could not, it would be looked up whenever it is needed.
        if let Some(key) = key_of(&object)
            && let Ok(json) = serde_json::to_string(&object)
        {
            let name = object.name_any();
            self.places.insert((key.namespace.clone(), name.clone()), key.clone());
            self.objects.entry(key.clone()).or_default().insert(name, json.into());
            changed.retain(|before| *before != key);
            changed.push(key);
        }
        changed
    }

    fn remove<K: Owned>(&mut self, object: &K) -> Vec<ResourceKey> {
        let name = object.name_any();
        let place = (object.namespace().unwrap_or_default(), name);
        let Some(key) = self.places.remove(&place) else {
            return Vec::new();
        };
        if let Some(objects) = self.objects.get_mut(&key) {
            objects.remove(&place.1);
            if objects.is_empty() {
                self.objects.remove(&key);
            }
        }
        vec![key]
    }

    /// The resources whose objects are not those that `other` shows.
    fn differing(&self, other: &Self) -> HashSet<ResourceKey> {
        (self.objects.keys().chain(other.objects.keys()))
            .filter(|key| self.objects.get(key) != other.objects.get(key))
            .cloned()
            .collect()
    }
}

/// The resource that an object's labels name.
fn key_of<K: Resource>(object: &K) -> Option<ResourceKey> {
    let labelled = |kind, label: &str| Some((kind, object.labels().get(label)?.clone()));
    let (kind, name) =
        labelled(Kind::CdcPipeline, PIPELINE_LABEL).or_else(|| labelled(Kind::ReplayJob, REPLAY_LABEL))?;
    Some(ResourceKey {
        kind,
        namespace: object.namespace()?,
        name,
    })
}

impl<K: Owned> Cache<K> {
    /// The objects that are marked as the resource's.
    pub fn of(&self, key: &ResourceKey) -> Vec<K> {
        let shown = self.shown.read().unwrap_or_else(PoisonError::into_inner);
        let objects = shown.objects.get(key).into_iter().flat_map(BTreeMap::values);
        objects.filter_map(|json| serde_json::from_str(json).ok()).collect()
    }

    /// The one of this name among them.
    pub fn get(&self, key: &ResourceKey, name: &str) -> Option<K> {
        let shown = self.shown.read().unwrap_or_else(PoisonError::into_inner);
        serde_json::from_str(shown.objects.get(key)?.get(name)?).ok()
    }

    /// Follows the objects that carry the operator's label, without an end. What is there at the start changes nothing.
    async fn follow(&self, api: Api<K>, changes: &Changes, known: CancellationToken) {
        // A page of a list is in memory several times over while it is read.
        let config = watching().labels(MANAGED_SELECTOR).page_size(100);
        let mut events = pin!(watcher(api, config).default_backoff());
        let mut listed = Shown::default();
        while let Some(event) = events.next().await {
            let shown = || self.shown.write().unwrap_or_else(PoisonError::into_inner);
            let changed = match event {
                Ok(Event::Apply(object)) => shown().insert(object),
                Ok(Event::Delete(object)) => shown().remove(&object),
                Ok(Event::Init) => {
                    listed = Shown::default();
                    continue;
                }
                Ok(Event::InitApply(object)) => {
                    listed.insert(object);
                    continue;
                }
                Ok(Event::InitDone) => {
                    let before = std::mem::replace(&mut *shown(), std::mem::take(&mut listed));
                    if known.is_cancelled() {
                        before.differing(&shown()).into_iter().collect()
                    } else {
                        known.cancel();
                        continue;
                    }
                }
                Err(error) => {
                    warn!(kind = %K::kind(&()), %error, "the watch is started anew");
                    continue;
                }
            };
            for key in changed {
                changes.tell(&key).await;
            }
        }
    }
}

/// Tells the controllers whose objects have changed.
#[derive(Clone, Debug)]
pub struct Changes {
    pipelines: mpsc::Sender<ObjectRef<CdcPipeline>>,
    replays: mpsc::Sender<ObjectRef<ReplayJob>>,
}

impl Changes {
    /// A controller that has not come to it yet is waited for: a change is told once. One that has ended wants to know nothing.
    async fn tell(&self, key: &ResourceKey) {
        match key.kind {
            Kind::CdcPipeline => {
                let object = ObjectRef::new(&key.name).within(&key.namespace);
                self.pipelines.send(object).await.ok();
            }
            Kind::ReplayJob => {
                let object = ObjectRef::new(&key.name).within(&key.namespace);
                self.replays.send(object).await.ok();
            }
        }
    }
}

/// The resources whose objects have changed.
#[derive(Debug)]
pub struct Changed {
    /// Pipelines.
    pub pipelines: mpsc::Receiver<ObjectRef<CdcPipeline>>,
    /// Replays.
    pub replays: mpsc::Receiver<ObjectRef<ReplayJob>>,
}

/// What fills the stores of the resources: the watches of the two controllers.
pub struct Writers {
    /// Pipelines.
    pub pipelines: Writer<CdcPipeline>,
    /// Replays.
    pub replays: Writer<ReplayJob>,
}

/// Everything that is watched.
pub struct Caches {
    /// Every pipeline.
    pub pipelines: Store<CdcPipeline>,
    /// Every replay.
    pub replays: Store<ReplayJob>,
    /// The pods that capture, replay and clean up.
    pub pods: Cache<Pod>,
    deployments: Cache<Deployment>,
    jobs: Cache<Job>,
    config_maps: Cache<ConfigMap>,
    service_accounts: Cache<ServiceAccount>,
    services: Cache<Service>,
    disruption_budgets: Cache<PodDisruptionBudget>,
    network_policies: Cache<NetworkPolicy>,
}

impl Caches {
    /// Caches in which there is nothing yet, and what fills the stores of the resources.
    pub fn new() -> (Self, Writers) {
        let (pipelines, pipeline_writer) = reflector::store();
        let (replays, replay_writer) = reflector::store();
        let caches = Self {
            pipelines,
            replays,
            pods: Cache::default(),
            deployments: Cache::default(),
            jobs: Cache::default(),
            config_maps: Cache::default(),
            service_accounts: Cache::default(),
            services: Cache::default(),
            disruption_budgets: Cache::default(),
            network_policies: Cache::default(),
        };
        let writers = Writers {
            pipelines: pipeline_writer,
            replays: replay_writer,
        };
        (caches, writers)
    }

    /// The object of this name of the resource, as it was last seen.
    pub fn get<K: Owned>(&self, key: &ResourceKey, name: &str) -> Option<K> {
        K::cache(self).get(key, name)
    }

    /// The objects of the resource, as they were last seen.
    pub fn of<K: Owned>(&self, key: &ResourceKey) -> Vec<K> {
        K::cache(self).of(key)
    }

    /// Follows the objects of the resources, in one namespace or in all, until `shutdown`. Says when all of them are known, and from then on
    /// whose have changed.
    pub async fn follow(
        &self,
        client: Client,
        namespace: Option<&str>,
        changes: Changes,
        known: impl FnOnce(),
        shutdown: CancellationToken,
    ) {
        let watches = [(); 8].map(|()| CancellationToken::new());
        let [
            deployments,
            jobs,
            pods,
            config_maps,
            service_accounts,
            services,
            disruption_budgets,
            network_policies,
        ] = watches.clone();
        let all_known = async {
            for watch in watches {
                watch.cancelled().await;
            }
            known();
        };
        let all = async {
            futures::join!(
                self.deployments.follow(api(&client, namespace), &changes, deployments),
                self.jobs.follow(api(&client, namespace), &changes, jobs),
                self.pods.follow(api(&client, namespace), &changes, pods),
                self.config_maps.follow(api(&client, namespace), &changes, config_maps),
                self.service_accounts
                    .follow(api(&client, namespace), &changes, service_accounts),
                self.services.follow(api(&client, namespace), &changes, services),
                self.disruption_budgets
                    .follow(api(&client, namespace), &changes, disruption_budgets),
                self.network_policies
                    .follow(api(&client, namespace), &changes, network_policies),
                all_known,
            )
        };
        shutdown.run_until_cancelled(Box::pin(all)).await;
    }
}

/// The ends of the channel by which changes are told.
pub fn changes() -> (Changes, Changed) {
    const WAITING: usize = 64;
    let (pipelines, changed_pipelines) = mpsc::channel(WAITING);
    let (replays, changed_replays) = mpsc::channel(WAITING);
    let changed = Changed {
        pipelines: changed_pipelines,
        replays: changed_replays,
    };
    (Changes { pipelines, replays }, changed)
}

fn api<K: Owned>(client: &Client, namespace: Option<&str>) -> Api<K> {
    match namespace {
        Some(namespace) => Api::namespaced(client.clone(), namespace),
        None => Api::all(client.clone()),
    }
}

#[cfg(test)]
mod tests {
    #![allow(clippy::unwrap_used)]
    use super::*;

    fn pod(name: &str, pipeline: Option<&str>, version: &str) -> Pod {
        let mut pod = Pod::default();
        pod.metadata.name = Some(name.to_owned());
        pod.metadata.namespace = Some("ns".to_owned());
        pod.metadata.resource_version = Some(version.to_owned());
        pod.metadata.labels = pipeline.map(|name| [(PIPELINE_LABEL.to_owned(), name.to_owned())].into());
        pod
    }

    fn key(name: &str) -> ResourceKey {
        ResourceKey {
            kind: Kind::CdcPipeline,
            namespace: "ns".into(),
            name: name.into(),
        }
    }

    #[test]
    fn an_object_is_kept_where_its_label_says_and_nowhere_else() {
        let mut shown = Shown::default();
        assert_eq!(shown.insert(pod("x", Some("a"), "1")), [key("a")]);
        assert_eq!(shown.insert(pod("x", Some("b"), "2")), [key("a"), key("b")]);
        assert!(!shown.objects.contains_key(&key("a")));
        assert_eq!(shown.insert(pod("x", None, "3")), [key("b")]);
        assert!(shown.objects.is_empty() && shown.places.is_empty());
        assert!(shown.insert(pod("x", None, "4")).is_empty());
        shown.insert(pod("x", Some("a"), "5"));
        assert_eq!(shown.remove(&pod("x", None, "6")), [key("a")]);
        assert!(shown.objects.is_empty() && shown.places.is_empty());
    }

    #[test]
    fn a_watch_that_starts_anew_tells_what_changed_and_what_went_meanwhile() {
        let shown = |pods: &[(&str, &str, &str)]| {
            let mut shown = Shown::default();
            for (name, pipeline, version) in pods {
                shown.insert(pod(name, Some(pipeline), version));
            }
            shown
        };
        let before = shown(&[("a", "same", "1"), ("b", "changed", "1"), ("c", "gone", "1")]);
        let after = shown(&[("a", "same", "1"), ("b", "changed", "2"), ("d", "new", "1")]);
        let expected = ["changed", "gone", "new"].map(key);
        assert_eq!(before.differing(&after), expected.into());
    }
}

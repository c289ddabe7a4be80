//! Against a real API server: what it refuses, what it adds, and what a whole operator makes of it.
//!
//! No controller runs behind it, so the tests play their part: they set a Deployment's or a Job's status, and nothing is
//! garbage-collected.
#![allow(missing_docs, clippy::unwrap_used, clippy::expect_used, clippy::panic)]

mod support;

#[path = "apiserver/adoption.rs"]
mod adoption;
#[path = "apiserver/certificates.rs"]
mod certificates;
#[path = "apiserver/namespaces.rs"]
mod namespaces;
#[path = "apiserver/network.rs"]
mod network;
#[path = "apiserver/outages.rs"]
mod outages;
#[path = "apiserver/permissions.rs"]
mod permissions;
#[path = "apiserver/rollout.rs"]
mod rollout;
#[path = "apiserver/traces.rs"]
mod traces;

use std::{
    collections::BTreeSet,
    fmt::Debug,
    net::{SocketAddr, TcpListener},
    sync::{
        Arc, Mutex,
        atomic::{AtomicU32, Ordering},
    },
    time::Duration,
};

use clap::Parser as _;
use k8s_openapi::{
    NamespaceResourceScope,
    api::{
        apps::v1::Deployment,
        authentication::v1::TokenRequest,
        batch::v1::Job,
        coordination::v1::Lease,
        core::v1::{ConfigMap, Namespace, Pod, Secret, Service, ServiceAccount},
        events::v1::Event,
        policy::v1::PodDisruptionBudget,
    },
    apiextensions_apiserver::pkg::apis::apiextensions::v1::CustomResourceDefinition,
};
use kube::{
    Api, Client, Config, Resource, ResourceExt as _,
    api::{DeleteParams, ListParams, Patch, PatchParams, PostParams},
    config::{KubeConfigOptions, Kubeconfig},
    runtime::watcher::Event as Watched,
};
use meander_crds::{CdcPipeline, PipelinePhase, ReplayJob, ReplayPhase, generate::definitions};
use meander_operator::{
    cache::Caches,
    conditions::state,
    context::Context,
    events::Events,
    lease::{Claim, Elector},
    metrics::Metrics,
    operator::{Options, run},
    pipeline,
    progress::Tracker,
};
use meander_proto::v1::{
    CaptureProgress, Condition, ControlReplayRequest, Directive, ProgressUpdate, ReplayProgress, ResourceReference,
    StreamProgressRequest, progress_tracker_client::ProgressTrackerClient, progress_update::Progress,
    replay_progress::Phase,
};
use serde::{Serialize, de::DeserializeOwned};
use serde_json::{Value, json};
use support::{apiserver::ApiServer, eventually};
use tokio::{
    io::{AsyncReadExt as _, AsyncWriteExt as _},
    net::TcpStream,
    sync::mpsc,
    task::{JoinHandle, JoinSet},
};
use tokio_stream::wrappers::ReceiverStream;
use tokio_util::sync::CancellationToken;
use tonic::{Code, Request, Streaming, transport::Channel};

/// As the holder of a token.
fn authorized<T>(message: T, token: &str) -> Request<T> {
    let mut request = Request::new(message);
    request
        .metadata_mut()
        .insert("authorization", format!("Bearer {token}").parse().unwrap());
    request
}

/// A namespace of its own on the API server.
struct Cluster {
    client: Client,
    /// The same as the chart's operator for this namespace.
    operator: Client,
    namespace: String,
    server: Arc<ApiServer>,
}

impl Cluster {
    async fn new() -> Self {
        Self::on(tokio::task::spawn_blocking(ApiServer::shared).await.unwrap()).await
    }

    async fn on(server: Arc<ApiServer>) -> Self {
        static COUNT: AtomicU32 = AtomicU32::new(0);
        let kubeconfig = server.kubeconfig();
        let config = Config::from_custom_kubeconfig(kubeconfig.clone(), &KubeConfigOptions::default())
            .await
            .unwrap();
        let client = Client::try_from(config).unwrap();
        let crds: Api<CustomResourceDefinition> = Api::all(client.clone());
        for definition in definitions().unwrap() {
            let name = definition.name_any();
            crds.patch(&name, &PatchParams::apply("test").force(), &Patch::Apply(&definition))
                .await
                .unwrap();
            eventually("the definition is established", async || {
                let found = crds.get(&name).await.unwrap();
                found
                    .status
                    .into_iter()
                    .flat_map(|s| s.conditions.unwrap_or_default())
                    .any(|condition| condition.type_ == "Established" && condition.status == "True")
            })
            .await;
        }
        let namespace = format!("t{}", COUNT.fetch_add(1, Ordering::Relaxed));
        let body = serde_json::from_value(json!({"metadata": {"name": namespace}})).unwrap();
        Api::<Namespace>::all(client.clone())
            .create(&PostParams::default(), &body)
            .await
            .unwrap();
        Self {
            operator: permissions::operator_of(&client, kubeconfig, &namespace, true).await,
            client,
            namespace,
            server,
        }
    }

    fn kubeconfig(&self) -> Kubeconfig {
        self.server.kubeconfig()
    }

    fn api<K: Resource<DynamicType = (), Scope = NamespaceResourceScope>>(&self) -> Api<K> {
        Api::namespaced(self.client.clone(), &self.namespace)
    }

    async fn create<K>(&self, value: Value) -> K
    where
        K: Resource<DynamicType = (), Scope = NamespaceResourceScope> + Clone + Debug + DeserializeOwned + Serialize,
    {
        self.api::<K>()
            .create(&PostParams::default(), &serde_json::from_value(value).unwrap())
            .await
            .unwrap()
    }

    async fn secret(&self, name: &str, keys: &[&str]) {
        let data: serde_json::Map<String, Value> = keys.iter().map(|key| ((*key).to_owned(), json!("value"))).collect();
        self.create::<Secret>(json!({"metadata": {"name": name}, "stringData": data}))
            .await;
    }

    async fn secrets(&self) {
        self.secret("shop-cdc", &["username", "password"]).await;
        self.secret("shop-redis", &["url"]).await;
    }

    /// Plays the Deployment controller.
    async fn make_available(&self, name: &str) {
        let api = self.api::<Deployment>();
        let generation = api.get(name).await.unwrap().metadata.generation;
        let status = json!({"status": {
            "observedGeneration": generation, "replicas": 1, "updatedReplicas": 1, "readyReplicas": 1,
            "availableReplicas": 1,
        }});
        api.patch_status(name, &PatchParams::default(), &Patch::Merge(&status))
            .await
            .unwrap();
    }

    /// Plays the Job controller: the pod is that of the Job.
    async fn give_to(&self, job: &str, pod: &str) {
        let job = self.api::<Job>().get(job).await.unwrap();
        let owned = json!({"metadata": {"ownerReferences": [job.owner_ref(&()).unwrap()]}});
        self.api::<Pod>()
            .patch(pod, &PatchParams::default(), &Patch::Merge(&owned))
            .await
            .unwrap();
    }

    /// Plays the kubelet: the pod has ended, with this last word.
    async fn end_pod(&self, pod: &str, phase: &str, word: &str) {
        let terminated = json!({"status": {"phase": phase, "containerStatuses": [{
            "name": "c", "image": "i", "imageID": "i", "ready": false, "restartCount": 0,
            "state": {"terminated": {"exitCode": 0, "message": word}},
        }]}});
        self.api::<Pod>()
            .patch_status(pod, &PatchParams::default(), &Patch::Merge(&terminated))
            .await
            .unwrap();
    }

    /// Lets a ServiceAccount do that with resources of `meander.dev`.
    async fn allow(&self, account: &str, resource: &str, verb: &str) {
        let name = format!("{account}-{resource}-{verb}");
        let role = json!({
            "metadata": {"name": name},
            "rules": [{"apiGroups": ["meander.dev"], "resources": [resource], "verbs": [verb]}],
        });
        self.create::<k8s_openapi::api::rbac::v1::Role>(role).await;
        let binding = json!({
            "metadata": {"name": name},
            "roleRef": {"apiGroup": "rbac.authorization.k8s.io", "kind": "Role", "name": name},
            "subjects": [{"kind": "ServiceAccount", "name": account, "namespace": self.namespace}],
        });
        self.create::<k8s_openapi::api::rbac::v1::RoleBinding>(binding).await;
    }

    /// What the operator asked, but for watches and events, by the audit log: verb, kind and name.
    fn asked(&self) -> Vec<(String, String, String)> {
        let log = std::fs::read_to_string(self.server.folder.join("audit.log")).unwrap_or_default();
        let user = format!("system:serviceaccount:{}:meander-operator", self.namespace);
        let text = |value: &Value| value.as_str().unwrap_or_default().to_owned();
        // The last line may not be whole yet.
        let entries = log.lines().filter_map(|line| serde_json::from_str::<Value>(line).ok());
        entries
            .filter(|entry| entry["user"]["username"] == user.as_str() && entry["stage"] == "ResponseComplete")
            .map(|entry| {
                let object = &entry["objectRef"];
                let kind = [text(&object["resource"]), text(&object["subresource"])].join("/");
                (text(&entry["verb"]), kind, text(&object["name"]))
            })
            .filter(|(verb, kind, _)| verb != "watch" && kind != "events/")
            .collect()
    }

    /// A pod with the labels of a template, and a token of the project's audience that is bound to it.
    async fn pod_and_token(&self, name: &str, account: &str, mut labels: Value) -> String {
        labels["app.kubernetes.io/managed-by"] = json!("meander-operator");
        let pod: Pod = self
            .create(json!({
                "metadata": {"name": name, "labels": labels},
                "spec": {
                    "serviceAccountName": account,
                    "automountServiceAccountToken": false,
                    "containers": [{"name": "c", "image": "i"}],
                },
            }))
            .await;
        let request: TokenRequest = serde_json::from_value(json!({
            "spec": {
                "audiences": ["meander.dev"],
                "boundObjectRef": {"apiVersion": "v1", "kind": "Pod", "name": name, "uid": pod.uid()},
            },
        }))
        .unwrap();
        let api = self.api::<ServiceAccount>();
        let answer = api
            .create_token_request(account, &PostParams::default(), &request)
            .await
            .unwrap();
        answer.status.unwrap().token
    }
}

fn pipeline_json(name: &str) -> Value {
    let mut value: Value = support::example("pipeline.yaml");
    value["metadata"]["name"] = json!(name);
    value
}

fn replay_json(file: &str) -> Value {
    support::example(file)
}

/// The message with which the API server refuses something.
fn refused<K>(result: kube::Result<K>) -> String {
    match result {
        Err(kube::Error::Api(status)) if status.code == 422 => status.message.clone(),
        Err(error) => panic!("refused for another reason: {error}"),
        Ok(_) => "accepted".to_owned(),
    }
}

fn merged(mut base: Value, change: &Value) -> Value {
    fn merge(base: &mut Value, change: &Value) {
        match (base, change) {
            (Value::Object(base), Value::Object(change)) => {
                for (key, change) in change {
                    if change.is_null() {
                        base.remove(key);
                    } else {
                        merge(base.entry(key).or_insert(Value::Null), change);
                    }
                }
            }
            (base, change) => *base = change.clone(),
        }
    }
    merge(&mut base, change);
    base
}

/// All messages of a definition's rules.
fn rules(schema: &Value, found: &mut BTreeSet<String>) {
    if let Some(rules) = schema.get("x-kubernetes-validations").and_then(Value::as_array) {
        found.extend(rules.iter().map(|rule| rule["message"].as_str().unwrap().to_owned()));
    }
    let properties = schema.get("properties").and_then(Value::as_object);
    for (_, field) in properties.into_iter().flatten() {
        rules(field, found);
    }
    for items in ["items", "additionalProperties"] {
        schema.get(items).into_iter().for_each(|items| rules(items, found));
    }
}

/// Tries what must be refused, and that every rule has refused something. A change is made to the good example before it is
/// created, or, if it is to be refused as an update, after.
async fn every_rule_refuses<K>(
    cluster: &Cluster,
    definition: &CustomResourceDefinition,
    good: Value,
    creations: &[(Value, &str)],
    updates: &[(Value, Value, &str)],
) where
    K: Resource<DynamicType = (), Scope = NamespaceResourceScope> + Clone + Debug + DeserializeOwned + Serialize,
{
    // Values that the types do not take must reach the API server too.
    let resource = kube::api::ApiResource::erase::<K>(&());
    let api: Api<kube::api::DynamicObject> =
        Api::namespaced_with(cluster.client.clone(), &cluster.namespace, &resource);
    let dry = PostParams {
        dry_run: true,
        ..PostParams::default()
    };
    let mut unseen = BTreeSet::new();
    let schema = serde_json::to_value(&definition.spec.versions[0].schema).unwrap();
    rules(&schema["openAPIV3Schema"], &mut unseen);
    assert!(!unseen.is_empty());

    api.create(&dry, &serde_json::from_value(good.clone()).unwrap())
        .await
        .unwrap();
    for (change, expected) in creations {
        let object = serde_json::from_value(merged(good.clone(), change)).unwrap();
        let message = refused(api.create(&dry, &object).await);
        assert!(message.contains(expected), "{change}: {message}");
        unseen.remove(*expected);
    }
    for (number, (before, change, expected)) in updates.iter().enumerate() {
        let mut object = merged(good.clone(), before);
        let name = format!("update-{number}");
        object["metadata"]["name"] = json!(name);
        api.create(&PostParams::default(), &serde_json::from_value(object).unwrap())
            .await
            .unwrap();
        if let Some(status) = before.get("status") {
            let status = Patch::Merge(json!({"status": status}));
            api.patch_status(&name, &PatchParams::default(), &status).await.unwrap();
        }
        let params = PatchParams {
            dry_run: true,
            ..PatchParams::default()
        };
        let message = refused(api.patch(&name, &params, &Patch::Merge(change)).await);
        assert!(message.contains(expected), "{change}: {message}");
        unseen.remove(*expected);
    }
    assert!(unseen.is_empty(), "no example is refused by {unseen:#?}");
}

#[tokio::test(flavor = "multi_thread")]
async fn a_pipeline_that_can_never_work_is_refused() {
    let cluster = Cluster::new().await;
    let [definition, _] = definitions().unwrap();
    let postgres = |change: Value| json!({"spec": {"source": {"postgres": change}}});
    let kafka = |change: Value| json!({"spec": {"sinks": {"kafka": change}}});
    let redis = |change: Value| json!({"spec": {"sinks": {"redis": change}}});
    let url = |url: &str| redis(json!({"urlSecretRef": null, "url": url}));
    let long = "n".repeat(51);
    let creations = [
        (
            json!({"spec": {"format": "DebeziumJson", "source": {"postgres": {"messagePrefixes": ["app.*", "meander.x"]}}}}),
            "messagePrefixes must not begin with meander.: those messages are the pipeline's own",
        ),
        (
            postgres(json!({"snapshot": {"mode": "Incremental", "parallelism": 4}})),
            "parallelism is for the mode Bulk: the others read with one connection, or not at all",
        ),
        (
            json!({"spec": {"debezium": {"schemas": true}}}),
            "debezium is for the format DebeziumJson only: remove it, or set format",
        ),
        (
            json!({"metadata": {"name": long}}),
            "metadata.name must have at most 50 characters: the names of the pods are made from it",
        ),
        (
            json!({"metadata": {"name": "a.b"}}),
            "metadata.name must not contain a dot: names of labels and volumes are made from it; use a dash",
        ),
        (
            postgres(json!({"host": "postgres://x"})),
            "host is a bare host name or address, such as postgres.shop.svc; the port, user and database have fields of their own",
        ),
        (
            postgres(json!({"host": "postgres:5432"})),
            "host is a bare host name or address, such as postgres.shop.svc; the port, user and database have fields of their own",
        ),
        (postgres(json!({"port": 0})), "spec.source.postgres.port"),
        (postgres(json!({"port": 65_536})), "spec.source.postgres.port"),
        (postgres(json!({"database": ""})), "spec.source.postgres.database"),
        (
            postgres(json!({"tables": {"include": []}})),
            "spec.source.postgres.tables.include",
        ),
        (
            postgres(json!({"tables": {"include": ["orders"]}})),
            "each entry of include is schema.table, such as public.* or public.orders",
        ),
        (
            postgres(json!({"tables": {"exclude": ["a.b.c"]}})),
            "each entry of exclude is schema.table, such as audit.* or public.sessions",
        ),
        (
            postgres(json!({"snapshot": {"requests": [{"id": "a b", "tables": ["public.a"]}]}})),
            "id has letters, digits, dots, underscores and dashes only",
        ),
        (
            postgres(json!({"snapshot": {"requests": [{"id": "a", "tables": ["orders"]}]}})),
            "each entry of tables is schema.table, such as public.* or public.orders",
        ),
        (postgres(json!({"sslMode": "prefer"})), "spec.source.postgres.sslMode"),
        (
            postgres(json!({"sslMode": "Require", "caSecretRef": {"name": "ca", "key": "ca.crt"}})),
            "caSecretRef is for checking the server's certificate: set sslMode to VerifyFull, or leave caSecretRef out",
        ),
        (
            postgres(json!({"sslMode": "VerifyCA"})),
            "sslMode VerifyCA needs caSecretRef: without the host name a certificate of any public authority would do",
        ),
        (
            postgres(json!({"sslMode": "Disable", "clientCertSecretRef": {"name": "client"}})),
            "clientCertSecretRef needs TLS: set sslMode to VerifyFull, or leave clientCertSecretRef out",
        ),
        (
            postgres(json!({"publication": {"management": "External"}})),
            "publication.name is required when management is External: write the name of the publication that you created",
        ),
        (
            postgres(json!({"publication": {"name": "My Pub"}})),
            "publication.name has lower-case letters, digits and underscores only, and does not start with a digit",
        ),
        (
            postgres(json!({"slot": {"name": "a-slot"}})),
            "slot.name has lower-case letters, digits and underscores only",
        ),
        (
            postgres(json!({"slot": {"reclaimPolicy": "Keep"}})),
            "spec.source.postgres.slot.reclaimPolicy",
        ),
        (
            json!({"spec": {"sinks": {"kafka": null}}}),
            "spec.sinks.kafka: Required value",
        ),
        (
            kafka(json!({"bootstrapServers": []})),
            "spec.sinks.kafka.bootstrapServers",
        ),
        (
            kafka(json!({"bootstrapServers": ["kafka"]})),
            "each entry of bootstrapServers is host:port, such as kafka:9092",
        ),
        (
            kafka(json!({"bootstrapServers": ["kafka:65536"]})),
            "each entry of bootstrapServers is host:port, such as kafka:9092",
        ),
        (
            kafka(json!({"topicPrefix": "a b"})),
            "topicPrefix has letters, digits, dots, underscores and dashes only, and neither starts nor ends with a dot",
        ),
        (
            kafka(json!({"topicPrefix": "shop."})),
            "topicPrefix has letters, digits, dots, underscores and dashes only, and neither starts nor ends with a dot",
        ),
        (
            kafka(json!({"topicPrefix": "__meander"})),
            "topicPrefix must not start with two underscores: topics of such names are Kafka's own, and Meander's",
        ),
        (
            kafka(json!({"topics": {"config": {"Retention MS": "1"}}})),
            "each name in topics.config is a setting of Kafka's topics, such as retention.ms",
        ),
        (
            kafka(json!({"sasl": {"mechanism": "Plain", "credentialsSecretRef": {"name": "kafka"}}})),
            "sasl.mechanism Plain sends the password itself: add tls (tls: {} trusts Mozilla's list of authorities), or use ScramSha512",
        ),
        (
            kafka(json!({"topics": {"config": {"cleanup.policy": "compact"}}})),
            "topics.config cannot set cleanup.policy and message.timestamp.type: the log needs delete and CreateTime",
        ),
        (
            kafka(json!({"topics": {"partitions": 0}})),
            "spec.sinks.kafka.topics.partitions",
        ),
        (
            redis(json!({"url": "redis://redis"})),
            "write exactly one of redis.urlSecretRef and redis.url",
        ),
        (
            redis(json!({"urlSecretRef": null})),
            "write exactly one of redis.urlSecretRef and redis.url",
        ),
        (
            url("redis:6379"),
            "redis.url starts with redis://, or with rediss:// for TLS, such as redis://redis:6379/0",
        ),
        (
            url("redis://redis:65536/0"),
            "redis.url has a port up to 65535, such as redis://redis:6379/0",
        ),
        (
            url("redis://u:p@redis"),
            "redis.url must not hold a user or password: put the whole URL into a Secret and name it in urlSecretRef",
        ),
        (
            redis(json!({"streamPrefix": "{a}"})),
            "streamPrefix has letters, digits, dots, colons, underscores and dashes only",
        ),
        (
            redis(json!({"retention": {"maxLength": 0}})),
            "spec.sinks.redis.retention.maxLength",
        ),
        (
            json!({"spec": {"runtime": {"logLevel": "Loud"}}}),
            "spec.runtime.logLevel",
        ),
        (
            json!({"spec": {"runtime": {"resources": {"limits": {"cpu": "much"}}}}}),
            "spec.runtime.resources.limits.cpu",
        ),
    ];
    let none = json!({});
    let updates = [
        (
            none.clone(),
            postgres(json!({"database": "other"})),
            "database is immutable: create another CdcPipeline for another database",
        ),
        (
            none.clone(),
            postgres(json!({"publication": {"name": "p"}})),
            "publication is immutable: create another CdcPipeline",
        ),
        (
            json!({}),
            json!({"spec": {"source": {"postgres": {"origin": "None"}}}}),
            "origin is immutable: create another CdcPipeline",
        ),
        (
            none.clone(),
            postgres(json!({"slot": {"name": "s"}})),
            "slot.name is immutable: create another CdcPipeline",
        ),
        (
            postgres(json!({"slot": {"name": "s"}})),
            postgres(json!({"slot": null})),
            "slot.name is immutable: create another CdcPipeline",
        ),
        (
            none.clone(),
            json!({"spec": {"format": "DebeziumJson"}}),
            "format is immutable: create another CdcPipeline, with another topicPrefix",
        ),
        (
            json!({"spec": {"format": "DebeziumJson"}}),
            json!({"spec": {"debezium": {"schemas": false}}}),
            "debezium is immutable: create another CdcPipeline, with another topicPrefix",
        ),
        (
            none.clone(),
            json!({"spec": {"sinks": {"redis": null}}}),
            "the set of sinks is immutable: create another CdcPipeline to add or remove Redis",
        ),
        (
            none.clone(),
            kafka(json!({"topicPrefix": "x"})),
            "topicPrefix is immutable: create another CdcPipeline to publish elsewhere",
        ),
        (
            none.clone(),
            kafka(json!({"topics": {"partitions": 2}})),
            "topics.partitions is immutable: the order of each key depends on it",
        ),
        (
            none,
            redis(json!({"streamPrefix": "x"})),
            "streamPrefix is immutable: create another CdcPipeline to publish elsewhere",
        ),
    ];
    every_rule_refuses::<CdcPipeline>(&cluster, &definition, pipeline_json("trades"), &creations, &updates).await;
}

#[tokio::test(flavor = "multi_thread")]
async fn a_replay_that_can_never_work_is_refused() {
    const POSITION: &str = "position is epoch:LSN:ordinal with an epoch from 1 to 255, such as 1:0/19BF3A0:0, as the header meander-position of a record says it";
    let cluster = Cluster::new().await;
    let [_, definition] = definitions().unwrap();
    let spec = |change: Value| json!({"spec": change});
    let target = |change: Value| json!({"spec": {"target": merged(json!({"log": null}), &change)}});
    let serve = |change: Value| {
        let serve = merged(
            json!({"tokenSecretRef": {"name": "n", "key": "k"}, "insecure": true}),
            &change,
        );
        target(json!({"grpc": {"serve": serve}}))
    };
    let postgres = |change: Value| {
        let postgres = json!({"host": "h", "database": "d", "credentialsSecretRef": {"name": "n"}});
        target(json!({"postgres": merged(postgres, &change)}))
    };
    let times =
        |from: &str, to: &str| spec(json!({"from": {"at": null, "time": from}, "to": {"at": null, "time": to}}));
    let long = "n".repeat(51);
    let creations = [
        (
            json!({"metadata": {"name": long}}),
            "metadata.name must have at most 50 characters: the names of the pods are made from it",
        ),
        (
            json!({"metadata": {"name": "1st"}}),
            "metadata.name must start with a letter and have no dot: it becomes the name of a Service",
        ),
        (
            spec(json!({"from": {"time": "2026-11-20T10:00:00Z"}})),
            "write exactly one of from.time, from.position, from.offset and from.at",
        ),
        (
            spec(json!({"to": {"at": null}})),
            "write exactly one of to.time, to.position, to.offset and to.at",
        ),
        (
            spec(json!({"to": {"at": "Now", "position": "1:0/10:0"}})),
            "write exactly one of to.time, to.position, to.offset and to.at",
        ),
        (spec(json!({"to": {"at": null, "position": "0/10"}})), POSITION),
        (spec(json!({"to": {"at": null, "position": "999:0/0:0"}})), POSITION),
        (
            spec(json!({"to": {"at": null, "offset": {"topic": "t", "offset": -1}}})),
            "spec.to.offset.offset",
        ),
        (spec(json!({"from": {"at": "Now"}})), "spec.from.at"),
        (times("2026-11-20T10:00:00Z", "yesterday"), "spec.to.time"),
        (
            times("2026-11-20T11:00:00Z", "2026-11-20T10:00:00Z"),
            "from.time must be before to.time",
        ),
        (
            times("2026-11-20T10:00:00Z", "2026-11-20T11:00:00+02:00"),
            "from.time must be before to.time",
        ),
        (
            spec(json!({"speed": 0})),
            "speed is a positive number such as 10 or \"0.5\", or \"max\"",
        ),
        // Kubernetes knows integers and strings, and nothing else that may be either of two.
        (spec(json!({"speed": 0.5})), "spec.speed"),
        (
            spec(json!({"speed": "0.0"})),
            "speed is a positive number such as 10 or \"0.5\", or \"max\"",
        ),
        (
            spec(json!({"speed": "fast"})),
            "speed is a positive number such as 10 or \"0.5\", or \"max\"",
        ),
        (spec(json!({"backoffLimit": -1})), "spec.backoffLimit"),
        (spec(json!({"activeDeadlineSeconds": 0})), "spec.activeDeadlineSeconds"),
        (
            spec(json!({"target": null})),
            "write in target where the changes go, or set dryRun",
        ),
        (
            spec(json!({"filter": {}})),
            "filter needs tables, operations, keys or expression: leave it out to deliver everything",
        ),
        (
            spec(json!({"filter": {"tables": {"include": ["trades"]}}})),
            "each entry of include is schema.table, such as public.* or public.orders",
        ),
        (
            spec(json!({"filter": {"tables": {"include": ["public.*"], "exclude": ["trades"]}}})),
            "each entry of exclude is schema.table, such as audit.* or public.sessions",
        ),
        (
            spec(json!({"filter": {"operations": ["Upsert"]}})),
            "spec.filter.operations",
        ),
        (spec(json!({"filter": {"keys": [{"id": 7}]}})), "spec.filter.keys"),
        (
            merged(postgres(json!({})), &spec(json!({"order": "PerKey"}))),
            "order PerKey is for target.log and target.grpc.endpoint: the others need commit order",
        ),
        (spec(json!({"maxGapSeconds": 0})), "spec.maxGapSeconds"),
        (
            target(json!({})),
            "write exactly one of target.log, target.grpc, target.postgres, target.kafka, target.redis and target.http",
        ),
        (
            spec(json!({"target": {"grpc": {"endpoint": "http://receiver:50051"}}})),
            "write exactly one of target.log, target.grpc, target.postgres, target.kafka, target.redis and target.http",
        ),
        (
            target(json!({"kafka": {"tls": {}}})),
            "target.kafka.tls and target.kafka.sasl are for another cluster: add bootstrapServers, or leave them out to use the pipeline's cluster as the pipeline does",
        ),
        (
            target(json!({"kafka": {
                "bootstrapServers": ["kafka:9092"],
                "sasl": {"mechanism": "Plain", "credentialsSecretRef": {"name": "n"}},
            }})),
            "target.kafka.sasl.mechanism Plain sends the password itself: add tls (tls: {} trusts Mozilla's list of authorities), or use ScramSha512",
        ),
        (
            target(json!({"kafka": {"bootstrapServers": ["http://kafka:9092"]}})),
            "each entry of target.kafka.bootstrapServers is host:port, such as kafka:9092",
        ),
        (
            target(json!({"kafka": {"topicPrefix": "a b"}})),
            "target.kafka.topicPrefix has letters, digits, dots, underscores and dashes only, and neither starts nor ends with a dot",
        ),
        (
            target(json!({"kafka": {"topicPrefix": "__meander.shop"}})),
            "target.kafka.topicPrefix must not start with two underscores: topics of such names are Kafka's own, and Meander's",
        ),
        (
            target(json!({"redis": {"urlSecretRef": {"name": "n", "key": "k"}, "streamPrefix": "a b"}})),
            "target.redis.streamPrefix has letters, digits, dots, colons, underscores and dashes only",
        ),
        (
            target(json!({"http": {"url": "http://user:password@analytics/changes"}})),
            "target.http.url is http://host/path or https://host/path, without user and password",
        ),
        (
            target(json!({"http": {"url": "http://analytics/", "tokenSecretRef": {"name": "n", "key": "k"}}})),
            "target.http.tokenSecretRef is sent with every request: use a URL that starts with https://",
        ),
        (
            target(json!({"http": {"url": "http://analytics/", "caSecretRef": {"name": "n", "key": "k"}}})),
            "target.http.caSecretRef is for TLS: use a URL that starts with https://, or leave it out",
        ),
        (
            target(json!({"kafka": {"topics": {"config": {"cleanup.policy": "compact"}}}})),
            "target.kafka.topics.config cannot set cleanup.policy and message.timestamp.type: every record is to be kept, with its timestamp",
        ),
        (
            postgres(json!({"host": "postgres:5432/shop"})),
            "target.postgres.host is a bare host name or address, such as postgres.shop.svc; the port, user and database have fields of their own",
        ),
        (
            postgres(json!({"caSecretRef": {"name": "n", "key": "k"}})),
            "target.postgres.caSecretRef is for checking the server's certificate: set sslMode to VerifyFull, or leave caSecretRef out",
        ),
        (
            postgres(json!({"sslMode": "VerifyCA"})),
            "target.postgres.sslMode VerifyCA needs caSecretRef: without the host name a certificate of any public authority would do",
        ),
        (
            postgres(json!({"sslMode": "Disable", "clientCertSecretRef": {"name": "n"}})),
            "target.postgres.clientCertSecretRef needs TLS: set sslMode to VerifyFull, or leave clientCertSecretRef out",
        ),
        (
            target(json!({"grpc": {}})),
            "write exactly one of grpc.endpoint, to be called, and grpc.serve, to call",
        ),
        (
            target(json!({"grpc": {"endpoint": "receiver"}})),
            "endpoint is http://host:port or https://host:port, such as http://receiver:50051",
        ),
        (
            target(json!({"grpc": {"endpoint": "http://receiver:65536"}})),
            "endpoint is http://host:port or https://host:port, such as http://receiver:50051",
        ),
        (
            target(json!({"grpc": {"endpoint": "http://receiver:1", "tokenSecretRef": {"name": "n", "key": "k"}}})),
            "grpc.caSecretRef, clientCertSecretRef and tokenSecretRef need TLS: write an endpoint https://host:port, or leave them out",
        ),
        (
            target(
                json!({"grpc": {"serve": {"tokenSecretRef": {"name": "n", "key": "k"}, "insecure": true}, "clientCertSecretRef": {"name": "n"}}}),
            ),
            "grpc.caSecretRef, clientCertSecretRef and tokenSecretRef need TLS: write an endpoint https://host:port, or leave them out",
        ),
        (
            spec(json!({"to": {"at": "Live"}})),
            "to.at Live is for subscribers, who come and go: write target.grpc.serve, or to.at Now",
        ),
        (serve(json!({"port": 80})), "spec.target.grpc.serve.port"),
        (
            serve(json!({"port": 9464})),
            "port 9464 is the pod's own, for its probes and metrics: choose another",
        ),
        (serve(json!({"insecure": false})), "subscribers send a token"),
        (
            serve(json!({"tlsSecretRef": {"name": "n"}})),
            "subscribers send a token: write grpc.serve.tlsSecretRef, or grpc.serve.insecure: true to have token and changes cross the network in plain text",
        ),
        (
            serve(json!({"tokenSecretRef": null})),
            "spec.target.grpc.serve.tokenSecretRef: Required value",
        ),
    ];
    let none = json!({});
    let ended = json!({"status": {"phase": "Succeeded"}});
    let updates = [
        (
            none.clone(),
            spec(json!({"pipelineRef": {"name": "x"}})),
            "pipelineRef is immutable: create another ReplayJob",
        ),
        (
            none.clone(),
            spec(json!({"from": {"at": null, "time": "2026-11-20T10:00:00Z"}})),
            "from is immutable: create another ReplayJob",
        ),
        (
            none.clone(),
            spec(json!({"to": {"at": null, "time": "2026-11-20T10:00:00Z"}})),
            "to is immutable: create another ReplayJob",
        ),
        (
            none.clone(),
            serve(json!({})),
            "target is immutable: create another ReplayJob",
        ),
        (
            none.clone(),
            spec(json!({"filter": {"operations": ["Insert"]}})),
            "filter is immutable: create another ReplayJob",
        ),
        (
            spec(json!({"maxGapSeconds": 60})),
            spec(json!({"maxGapSeconds": 61})),
            "maxGapSeconds is immutable: create another ReplayJob",
        ),
        (
            none.clone(),
            spec(json!({"order": "PerKey"})),
            "order is immutable: create another ReplayJob",
        ),
        (
            none.clone(),
            spec(json!({"dryRun": true})),
            "dryRun is immutable: create another ReplayJob",
        ),
        (
            none.clone(),
            spec(json!({"runtime": {"logLevel": "Debug"}})),
            "runtime is immutable: create another ReplayJob",
        ),
        (
            none.clone(),
            spec(json!({"backoffLimit": 9})),
            "backoffLimit is immutable: create another ReplayJob",
        ),
        (
            none.clone(),
            spec(json!({"activeDeadlineSeconds": 60})),
            "activeDeadlineSeconds is immutable: create another ReplayJob",
        ),
        (
            spec(json!({"cancel": true})),
            spec(json!({"cancel": false})),
            "cancel cannot be taken back: create another ReplayJob",
        ),
        (
            ended.clone(),
            spec(json!({"speed": "2"})),
            "this replay has ended, and does nothing with another speed, suspend or cancel: create another ReplayJob",
        ),
        (ended.clone(), spec(json!({"suspend": true})), "this replay has ended"),
        (ended.clone(), spec(json!({"cancel": true})), "this replay has ended"),
    ];
    every_rule_refuses::<ReplayJob>(
        &cluster,
        &definition,
        replay_json("replayjob-log.yaml"),
        &creations,
        &updates,
    )
    .await;

    // What may change.
    cluster.create::<ReplayJob>(replay_json("replayjob-log.yaml")).await;
    for change in [
        json!({"speed": "0.5"}),
        json!({"speed": "max", "suspend": true}),
        json!({"cancel": true}),
    ] {
        let patch = Patch::Merge(spec(change));
        cluster
            .api::<ReplayJob>()
            .patch("to-log", &PatchParams::default(), &patch)
            .await
            .unwrap();
    }
}

#[tokio::test(flavor = "multi_thread")]
async fn every_example_is_accepted_and_gets_its_defaults() {
    let cluster = Cluster::new().await;
    let pipeline: CdcPipeline = cluster.create(pipeline_json("trades")).await;
    // The types' own defaults are the schema's: a resource read from a file is the one that the API server stores.
    assert_eq!(pipeline.spec, support::pipeline().spec);
    for file in [
        "replayjob.yaml",
        "replayjob-log.yaml",
        "replayjob-serve.yaml",
        "replayjob-live.yaml",
        "replayjob-postgres.yaml",
        "replayjob-dry-run.yaml",
        "replayjob-kafka.yaml",
        "replayjob-redis.yaml",
        "replayjob-http.yaml",
    ] {
        let replay: ReplayJob = cluster.create(replay_json(file)).await;
        assert_eq!(replay.spec, support::replay(file).spec, "{file}");
    }
    let stored: Value = cluster
        .client
        .request(
            http::Request::get(format!(
                "/apis/meander.dev/v1alpha1/namespaces/{}/cdcpipelines/trades",
                cluster.namespace
            ))
            .body(Vec::new())
            .unwrap(),
        )
        .await
        .unwrap();
    let spec = &stored["spec"];
    assert_eq!(spec["source"]["postgres"]["port"], 5432);
    assert_eq!(spec["source"]["postgres"]["slot"]["reclaimPolicy"], "Delete");
    assert_eq!(spec["source"]["postgres"]["publication"]["management"], "Managed");
    assert_eq!(spec["sinks"]["kafka"]["topics"]["partitions"], 1);
    assert_eq!(spec["runtime"]["logLevel"], "Info");
    assert_eq!(spec["suspend"], false);
}

#[tokio::test(flavor = "multi_thread")]
async fn columns_are_those_of_the_design() {
    let cluster = Cluster::new().await;
    cluster.create::<CdcPipeline>(pipeline_json("trades")).await;
    cluster.create::<ReplayJob>(replay_json("replayjob.yaml")).await;
    let status = json!({"status": {
        "phase": "Degraded",
        "reason": "WalBudgetLow",
        "replication": {"lag": "0s", "eventsTotal": 1_204_551},
        "conditions": [{
            "type": "Ready", "status": "True", "reason": "Streaming", "message": "",
            "lastTransitionTime": "2026-11-20T10:00:00Z",
        }],
    }});
    let params = PatchParams::default();
    cluster
        .api::<CdcPipeline>()
        .patch_status("trades", &params, &Patch::Merge(&status))
        .await
        .unwrap();
    let status = json!({"status": {"phase": "Running", "progress": {"progress": "64%", "delivered": 41_022}}});
    cluster
        .api::<ReplayJob>()
        .patch_status("last-seconds", &params, &Patch::Merge(&status))
        .await
        .unwrap();
    let table = async |plural: &str| -> (Vec<String>, Vec<Value>) {
        let request = http::Request::get(format!(
            "/apis/meander.dev/v1alpha1/namespaces/{}/{plural}",
            cluster.namespace
        ))
        .header("accept", "application/json;as=Table;v=v1;g=meta.k8s.io")
        .body(Vec::new())
        .unwrap();
        let table: Value = cluster.client.request(request).await.unwrap();
        let columns = table["columnDefinitions"].as_array().unwrap();
        let shown = columns.iter().filter(|column| column["priority"] == 0);
        let names = shown
            .map(|column| column["name"].as_str().unwrap().to_owned())
            .collect();
        (names, table["rows"][0]["cells"].as_array().unwrap().clone())
    };
    let (names, cells) = table("cdcpipelines").await;
    assert_eq!(names, ["Name", "Ready", "Phase", "Lag", "Events", "Age"]);
    assert_eq!(
        cells[..5],
        [
            json!("trades"),
            json!("True"),
            json!("Degraded"),
            json!("0s"),
            json!(1_204_551)
        ]
    );
    // Those of `-o wide` come after them: Slot, Confirmed LSN, Reason, Age.
    assert_eq!(cells[7], "WalBudgetLow");
    let (names, cells) = table("replayjobs").await;
    assert_eq!(
        names,
        ["Name", "Pipeline", "Phase", "Speed", "Progress", "Delivered", "Age"]
    );
    let expected = [
        json!("last-seconds"),
        json!("trades"),
        json!("Running"),
        json!("10"),
        json!("64%"),
        json!(41_022),
    ];
    assert_eq!(cells[..6], expected);
}

#[tokio::test(flavor = "multi_thread")]
async fn a_second_reconcile_writes_nothing_and_others_keep_their_fields() {
    let cluster = Cluster::new().await;
    cluster.secrets().await;
    cluster.create::<CdcPipeline>(pipeline_json("trades")).await;
    let events = Events::new(cluster.client.clone(), "test");
    let (caches, writers) = Caches::new();
    let context = Arc::new(Context::new(
        cluster.client.clone(),
        support::settings(),
        Arc::new(Tracker::new().0),
        Claim::forever(),
        events,
        Arc::new(Metrics::new().unwrap()),
        Arc::new(caches),
    ));
    let writer = Mutex::new(writers.pipelines);
    // Of the objects the caches show nothing, so each is read.
    let reconcile = async || {
        let pipeline = cluster.api::<CdcPipeline>().get("trades").await.unwrap();
        let seen = Watched::Apply(pipeline.clone());
        writer.lock().unwrap().apply_watcher_event(&seen);
        pipeline::reconcile(Arc::new(pipeline), context.clone()).await.unwrap()
    };
    reconcile().await;
    let name = "trades-capture";
    let versions = async || {
        let pipeline = cluster.api::<CdcPipeline>().get("trades").await.unwrap();
        let deployment = cluster.api::<Deployment>().get(name).await.unwrap();
        let config = cluster.api::<ConfigMap>().get(name).await.unwrap();
        let account = cluster.api::<ServiceAccount>().get(name).await.unwrap();
        [
            pipeline.resource_version(),
            deployment.resource_version(),
            config.resource_version(),
            account.resource_version(),
        ]
    };
    // Now the Deployment is there, which the first status could not know.
    reconcile().await;
    let before = versions().await;
    reconcile().await;
    assert_eq!(versions().await, before);

    // Somebody else's annotation stays; somebody else's change of what the operator says is put right.
    let patch = json!({"metadata": {"annotations": {"theirs": "kept"}}, "spec": {"replicas": 3}});
    cluster
        .api::<Deployment>()
        .patch(name, &PatchParams::default(), &Patch::Merge(&patch))
        .await
        .unwrap();
    let condition = json!({"status": {"conditions": [{
        "type": "Theirs", "status": "True", "reason": "Kept", "message": "", "lastTransitionTime": "2026-11-20T10:00:00Z",
    }]}});
    let patch = merged(
        json!({"apiVersion": "meander.dev/v1alpha1", "kind": "CdcPipeline"}),
        &condition,
    );
    let theirs = PatchParams::apply("somebody");
    cluster
        .api::<CdcPipeline>()
        .patch_status("trades", &theirs, &Patch::Apply(&patch))
        .await
        .unwrap();
    cluster.make_available(name).await;
    reconcile().await;
    let deployment = cluster.api::<Deployment>().get(name).await.unwrap();
    assert_eq!(deployment.annotations().get("theirs").map(String::as_str), Some("kept"));
    assert_eq!(deployment.spec.unwrap().replicas, Some(1));
    let status = cluster
        .api::<CdcPipeline>()
        .get("trades")
        .await
        .unwrap()
        .status
        .unwrap();
    assert_eq!(state(&status.conditions, "Theirs"), Some(("True", "Kept")));
    assert_eq!(state(&status.conditions, "SpecValid"), Some(("True", "Valid")));
}

#[tokio::test(flavor = "multi_thread")]
async fn a_standby_comes_and_goes_with_the_spec_unless_reconciliation_is_paused() {
    let cluster = Cluster::new().await;
    cluster.secrets().await;
    let operator = Operator::start(&cluster);
    cluster.create::<CdcPipeline>(pipeline_json("trades")).await;
    let name = "trades-capture";
    let pipelines = cluster.api::<CdcPipeline>();
    // What the Deployment is like, whether a drain is held up, and what the status says of it.
    let now = async || {
        let spec = cluster.api::<Deployment>().get_opt(name).await.unwrap()?.spec?;
        let budget = cluster.api::<PodDisruptionBudget>().get_opt(name).await.unwrap();
        let pipeline = pipelines.get("trades").await.unwrap();
        let status = pipeline.status?;
        let paused = state(&status.conditions, "ReconciliationPaused").is_some();
        let seen = status.observed_generation == pipeline.metadata.generation;
        Some((spec.replicas?, spec.strategy?.type_?, budget.is_some(), paused, seen))
    };
    let alone = |paused, seen| (1, "Recreate".to_owned(), false, paused, seen);
    let standby = |value: &str| json!({"spec": {"runtime": {"standby": value}}});
    let paused = |value: Value| json!({"metadata": {"annotations": {"meander.dev/paused": value}}});
    let two = (2, "RollingUpdate".to_owned(), true, false, true);
    for (patch, expected) in [
        (json!({}), alone(false, true)),
        (paused(json!("true")), alone(true, true)),
        (standby("Hot"), alone(true, false)),
        (paused(Value::Null), two),
        (standby("None"), alone(false, true)),
    ] {
        pipelines
            .patch("trades", &PatchParams::default(), &Patch::Merge(&patch))
            .await
            .unwrap();
        eventually(&patch.to_string(), async || now().await == Some(expected.clone())).await;
    }
    operator.stop().await;
}

#[tokio::test(flavor = "multi_thread")]
async fn one_leads_and_the_next_takes_over() {
    let cluster = Cluster::new().await;
    let elect = |identity: &str| {
        let (elector, claim) = Elector::new(cluster.client.clone(), &cluster.namespace, "lease", identity);
        let end = CancellationToken::new();
        (tokio::spawn(elector.run(end.clone())), claim, end)
    };
    let (one, mut one_claim, one_end) = elect("one");
    one_claim.held().await;
    assert!(one_claim.is_held());
    let (two, two_claim, two_end) = elect("two");
    let leases = cluster.api::<Lease>();
    one_end.cancel();
    one.await.unwrap().unwrap();
    assert!(!two_claim.is_held(), "the lease was not given back yet");
    Elector::release(leases.clone(), "lease", "one").await.unwrap();
    eventually("the second leads", async || two_claim.is_held()).await;
    // A lease that somebody else took is a lease that is lost.
    eventually("the lease is taken away", async || {
        let mut lease = leases.get("lease").await.unwrap();
        lease.spec.as_mut().unwrap().holder_identity = Some("three".into());
        leases.replace("lease", &PostParams::default(), &lease).await.is_ok()
    })
    .await;
    assert!(two.await.unwrap().is_err());
    two_end.cancel();
}

/// What an operator's administrative port answers.
async fn get(admin: SocketAddr, path: &str) -> Option<String> {
    let mut connection = TcpStream::connect(admin).await.ok()?;
    let request = format!("GET {path} HTTP/1.1\r\nHost: operator\r\nConnection: close\r\n\r\n");
    connection.write_all(request.as_bytes()).await.ok()?;
    let mut answer = String::new();
    connection.read_to_string(&mut answer).await.ok()?;
    Some(answer)
}

/// How many reconciles an operator has done.
async fn reconciles(admin: SocketAddr) -> u64 {
    let metrics = get(admin, "/metrics").await.unwrap();
    let counts = metrics
        .lines()
        .filter(|line| line.starts_with("meander_operator_reconciles_total{"));
    counts
        .map(|line| line.rsplit_once(' ').unwrap().1.parse::<u64>().unwrap())
        .sum()
}

/// A whole operator that looks after one namespace.
struct Operator {
    task: JoinHandle<anyhow::Result<()>>,
    shutdown: CancellationToken,
    grpc: SocketAddr,
    admin: SocketAddr,
}

impl Operator {
    fn start(cluster: &Cluster) -> Self {
        Self::start_at(cluster, "http", &[])
    }

    /// With a scheme for its gRPC port, and more options.
    fn start_at(cluster: &Cluster, scheme: &str, more: &[&str]) -> Self {
        let free = || TcpListener::bind("127.0.0.1:0").unwrap().local_addr().unwrap();
        let (grpc, admin) = (free(), free());
        let endpoint = format!("{scheme}://{grpc}");
        let (grpc_text, admin_text) = (grpc.to_string(), admin.to_string());
        let options = [
            "meander-operator",
            "--namespace",
            &cluster.namespace,
            "--progress-endpoint",
            &endpoint,
            "--lease-namespace",
            &cluster.namespace,
            "--identity",
            "test",
            "--grpc-address",
            &grpc_text,
            "--admin-address",
            &admin_text,
        ];
        let image = ["--runtime-image", "meander-runtime:test"];
        let image = image.iter().filter(|_| !more.contains(&image[0]));
        let options = Options::parse_from(options.iter().chain(image).chain(more));
        let shutdown = CancellationToken::new();
        let task = tokio::spawn(Box::pin(run(options, cluster.operator.clone(), shutdown.clone())));
        Self {
            task,
            shutdown,
            grpc,
            admin,
        }
    }

    async fn get(&self, path: &str) -> Option<String> {
        get(self.admin, path).await
    }

    async fn reconciles(&self) -> u64 {
        reconciles(self.admin).await
    }

    async fn stop(self) {
        self.shutdown.cancel();
        self.task.await.unwrap().unwrap();
    }

    async fn client(&self) -> ProgressTrackerClient<Channel> {
        ProgressTrackerClient::connect(format!("http://{}", self.grpc))
            .await
            .unwrap()
    }

    /// Reports as a runtime would.
    async fn report(
        &self,
        token: &str,
        first: ProgressUpdate,
    ) -> Result<(mpsc::Sender<ProgressUpdate>, Streaming<Directive>), tonic::Status> {
        let (sender, receiver) = mpsc::channel(8);
        sender.send(first).await.unwrap();
        let request = authorized(ReceiverStream::new(receiver), token);
        let answer = self.client().await.report_progress(request).await?;
        Ok((sender, answer.into_inner()))
    }
}

fn reference<K: Resource<DynamicType = ()>>(resource: &K) -> ResourceReference {
    ResourceReference {
        kind: K::kind(&()).into_owned(),
        namespace: resource.namespace().unwrap(),
        name: resource.name_any(),
        uid: resource.uid().unwrap(),
    }
}

fn good(type_: &str) -> Condition {
    Condition {
        r#type: type_.into(),
        status: true,
        reason: "Connected".into(),
        message: "It is.".into(),
    }
}

async fn reasons(cluster: &Cluster) -> BTreeSet<String> {
    let events = cluster.api::<Event>().list(&ListParams::default()).await.unwrap();
    events.items.into_iter().filter_map(|event| event.reason).collect()
}

#[tokio::test(flavor = "multi_thread")]
async fn a_pipeline_from_its_first_secret_to_its_last_slot() {
    let cluster = Cluster::new().await;
    let operator = Operator::start(&cluster);
    let pipelines = cluster.api::<CdcPipeline>();
    cluster.create::<CdcPipeline>(pipeline_json("trades")).await;
    let ready = async |status: &str, reason: &str| {
        let found = pipelines.get("trades").await.unwrap().status.unwrap_or_default();
        state(&found.conditions, "Ready") == Some((status, reason))
    };

    // It waits for its Secrets, and heals by itself.
    eventually("the missing Secret is said", async || {
        ready("False", "SecretNotFound").await
    })
    .await;
    assert!(
        pipelines.get("trades").await.unwrap().finalizers().is_empty(),
        "there is nothing to clean up yet"
    );
    cluster.secrets().await;
    eventually("the Deployment is there", async || {
        cluster
            .api::<Deployment>()
            .get_opt("trades-capture")
            .await
            .unwrap()
            .is_some()
    })
    .await;

    eventually("the Secret is no longer missed", async || {
        ready("False", "PodNotReady").await
    })
    .await;

    // Its pod reports.
    cluster.make_available("trades-capture").await;
    let labels = json!({"meander.dev/pipeline": "trades", "app.kubernetes.io/component": "capture"});
    let token = cluster
        .pod_and_token("trades-capture-x", "trades-capture", labels)
        .await;
    let pipeline = pipelines.get("trades").await.unwrap();
    let update = ProgressUpdate {
        resource: Some(reference(&pipeline)),
        conditions: vec![good("SourceReady"), good("SinksReady"), good("Progressing")],
        progress: Some(Progress::Capture(CaptureProgress {
            events_total: 42,
            epoch: 1,
            ..CaptureProgress::default()
        })),
        ..ProgressUpdate::default()
    };
    let code = operator.report("nonsense", update.clone()).await.unwrap_err().code();
    assert_eq!(code, Code::Unauthenticated);
    let stranger = cluster.pod_and_token("stranger", "trades-capture", json!({})).await;
    let code = operator.report(&stranger, update.clone()).await.unwrap_err().code();
    assert_eq!(code, Code::PermissionDenied);
    let (reports, mut directives) = operator.report(&token, update).await.unwrap();
    assert_eq!(directives.message().await.unwrap().unwrap().generation, 1);
    eventually("it streams", async || ready("True", "Streaming").await).await;
    let status = pipelines.get("trades").await.unwrap().status.unwrap();
    assert_eq!(status.phase, Some(PipelinePhase::Streaming));
    assert_eq!(status.replication.unwrap().events_total, 42);
    assert!(
        reasons(&cluster)
            .await
            .is_superset(&["SecretNotFound".into(), "Streaming".into()].into())
    );

    // Only who may read it may watch it.
    let watch = || {
        let resource = Some(reference(&pipeline));
        authorized(StreamProgressRequest { resource }, &token)
    };
    let code = operator
        .client()
        .await
        .stream_progress(watch())
        .await
        .unwrap_err()
        .code();
    assert_eq!(code, Code::PermissionDenied);
    cluster.allow("trades-capture", "cdcpipelines", "get").await;
    eventually("the full state comes first", async || {
        match operator.client().await.stream_progress(watch()).await {
            Ok(stream) => stream.into_inner().message().await.unwrap().unwrap().progress.is_some(),
            Err(_) => false,
        }
    })
    .await;

    // A spec that cannot be applied leaves alone what runs.
    let deployments = cluster.api::<Deployment>();
    let running = deployments.get("trades-capture").await.unwrap().resource_version();
    let credentials = json!({"spec": {"source": {"postgres": {"credentialsSecretRef": {"name": "rotated"}}}}});
    pipelines
        .patch("trades", &PatchParams::default(), &Patch::Merge(credentials))
        .await
        .unwrap();
    eventually("the other Secret is missed", async || {
        ready("False", "SecretNotFound").await
    })
    .await;
    let status = pipelines.get("trades").await.unwrap().status.unwrap();
    assert_eq!(
        (status.observed_generation, status.phase),
        (Some(2), Some(PipelinePhase::Degraded))
    );
    assert_eq!(
        deployments.get("trades-capture").await.unwrap().resource_version(),
        running
    );
    assert_eq!(directives.message().await.unwrap().unwrap().generation, 2);
    cluster.secret("rotated", &["username", "password"]).await;
    eventually("the pod is to have the other Secret", async || {
        let deployment = deployments.get("trades-capture").await.unwrap();
        let pod = deployment.spec.unwrap().template.spec.unwrap();
        let mut volumes = pod.volumes.into_iter().flatten();
        volumes.any(|volume| {
            volume
                .secret
                .is_some_and(|secret| secret.secret_name.as_deref() == Some("rotated"))
        })
    })
    .await;
    eventually("the Secret is no longer missed", async || {
        ready("False", "PodNotReady").await
    })
    .await;

    // Suspended, it has no pod; the Deployment stays.
    let patch = Patch::Merge(json!({"spec": {"suspend": true}}));
    pipelines
        .patch("trades", &PatchParams::default(), &patch)
        .await
        .unwrap();
    eventually("it is suspended", async || ready("False", "Suspended").await).await;
    assert_eq!(directives.message().await.unwrap().unwrap().generation, 3);
    let deployment = deployments.get("trades-capture").await.unwrap();
    assert_eq!(deployment.spec.unwrap().replicas, Some(0));
    drop(reports);
    assert!(
        directives.message().await.unwrap().is_none(),
        "the stream ends when the runtime's half does"
    );

    // Deleted, its pod goes first, then its slot, then it.
    pipelines.delete("trades", &DeleteParams::default()).await.unwrap();
    eventually("the Deployment goes", async || {
        cluster
            .api::<Deployment>()
            .get_opt("trades-capture")
            .await
            .unwrap()
            .is_none()
    })
    .await;
    assert!(
        cluster.api::<Job>().get_opt("trades-cleanup").await.unwrap().is_none(),
        "a pod is still there"
    );
    for pod in ["trades-capture-x", "stranger"] {
        cluster
            .api::<Pod>()
            .delete(pod, &DeleteParams::default().grace_period(0))
            .await
            .unwrap();
    }
    eventually("the slot is cleaned up", async || {
        cluster.api::<Job>().get_opt("trades-cleanup").await.unwrap().is_some()
    })
    .await;
    assert!(ready("False", "Terminating").await);
    finish(&cluster, "trades-cleanup", "Complete").await;
    eventually("the pipeline is gone", async || {
        pipelines.get_opt("trades").await.unwrap().is_none()
    })
    .await;
    assert!(reasons(&cluster).await.contains("SlotDropped"));
    operator.stop().await;
    let lease = cluster
        .api::<Lease>()
        .get("meander-operator")
        .await
        .unwrap()
        .spec
        .unwrap();
    assert_eq!(lease.holder_identity.as_deref(), Some(""), "the lease is given back");
}

fn progress(of: &ResourceReference, count: u64) -> ProgressUpdate {
    let progress = if of.kind == "CdcPipeline" {
        Progress::Capture(CaptureProgress {
            events_total: count,
            epoch: 1,
            ..CaptureProgress::default()
        })
    } else {
        Progress::Replay(ReplayProgress {
            phase: Phase::Running.into(),
            delivered: count,
            ..ReplayProgress::default()
        })
    };
    ProgressUpdate {
        resource: Some(of.clone()),
        conditions: vec![good("SourceReady"), good("SinksReady"), good("Progressing")],
        progress: Some(progress),
        ..ProgressUpdate::default()
    }
}

/// Plays a runtime: it reports each step on the way to what is asked of it, and every 5 s that it is there.
async fn keep_reporting(
    of: ResourceReference,
    (reports, _directives): (mpsc::Sender<ProgressUpdate>, Streaming<Directive>),
    mut wanted: tokio::sync::watch::Receiver<u64>,
) {
    let mut count = 0;
    loop {
        let goal = *wanted.borrow_and_update();
        count = goal.min(count + 1);
        if reports.send(progress(&of, count)).await.is_err() {
            return;
        }
        if count == goal
            && matches!(
                tokio::time::timeout(Duration::from_secs(5), wanted.changed()).await,
                Ok(Err(_))
            )
        {
            return;
        }
    }
}

/// How often it wrote its lease, which it does every 2 s, and what else it asked.
fn but_for_the_lease(asked: Vec<(String, String, String)>) -> (usize, Vec<(String, String, String)>) {
    let (leases, others): (Vec<_>, Vec<_>) = asked.into_iter().partition(|(_, kind, _)| kind == "leases/");
    (leases.len(), others)
}

#[tokio::test(flavor = "multi_thread")]
async fn what_is_as_it_should_be_costs_no_request_and_progress_one_patch() {
    const COUNT: usize = 10;
    const REPORTS: u64 = 50;
    let cluster = Cluster::new().await;
    cluster.secrets().await;
    // The API server keeps it in other words.
    let half = json!({"spec": {"runtime": {"resources": {"limits": {"cpu": "0.5"}}}}});
    for number in 0..COUNT {
        cluster
            .create::<CdcPipeline>(merged(pipeline_json(&format!("p{number}")), &half))
            .await;
        let change = json!({"metadata": {"name": format!("r{number}")}, "spec": {"pipelineRef": {"name": format!("p{number}")}}});
        cluster
            .create::<ReplayJob>(merged(replay_json("replayjob-log.yaml"), &change))
            .await;
    }
    let operator = Operator::start(&cluster);
    let all = ListParams::default();
    let jobs = cluster.api::<Job>();
    let deployments = cluster.api::<Deployment>();
    eventually("everything is made", async || {
        jobs.list_metadata(&all).await.unwrap().items.len() == COUNT
            && deployments.list_metadata(&all).await.unwrap().items.len() == COUNT
    })
    .await;

    let pipelines = cluster.api::<CdcPipeline>();
    let replays = cluster.api::<ReplayJob>();
    let (reported, _) = tokio::sync::watch::channel(0);
    let mut runtimes = JoinSet::new();
    for number in 0..COUNT {
        let (name, account) = (format!("p{number}"), format!("p{number}-capture"));
        cluster.make_available(&account).await;
        let labels = json!({"meander.dev/pipeline": name, "app.kubernetes.io/component": "capture"});
        let token = cluster.pod_and_token(&format!("{account}-x"), &account, labels).await;
        let of = reference(&pipelines.get(&name).await.unwrap());
        let stream = operator.report(&token, progress(&of, 0)).await.unwrap();
        runtimes.spawn(keep_reporting(of, stream, reported.subscribe()));

        let (name, account) = (format!("r{number}"), format!("r{number}-replay"));
        let pod = format!("{account}-x");
        let token = cluster
            .pod_and_token(&pod, &account, json!({"meander.dev/replay": name}))
            .await;
        cluster.give_to(&account, &pod).await;
        let of = reference(&replays.get(&name).await.unwrap());
        let stream = operator.report(&token, progress(&of, 0)).await.unwrap();
        runtimes.spawn(keep_reporting(of, stream, reported.subscribe()));
    }
    // How many of the statuses tell that so much was reported.
    let telling = async |count: u64| {
        let pipelines = pipelines.list(&all).await.unwrap().items.into_iter();
        let captured = pipelines.filter_map(|pipeline| Some(pipeline.status?.replication?.events_total));
        let replays = replays.list(&all).await.unwrap().items.into_iter();
        let delivered = replays.filter_map(|replay| Some(replay.status?.progress?.delivered));
        captured.chain(delivered).filter(|told| *told == count).count()
    };
    eventually("all are at work", async || telling(0).await == 2 * COUNT).await;
    // Whatever was asked before the lease is renewed again is in the log by then.
    let asked = async || {
        let (renewals, _) = but_for_the_lease(cluster.asked());
        eventually("the lease is renewed", async || {
            but_for_the_lease(cluster.asked()).0 > renewals
        })
        .await;
        but_for_the_lease(cluster.asked()).1
    };
    let mut before = asked().await;
    eventually("it is quiet", async || {
        let now = asked().await;
        now.len() == std::mem::replace(&mut before, now).len()
    })
    .await;

    // A reconcile each: somebody writes something of their own on what the operator made.
    let reconciles = operator.reconciles().await;
    let theirs = Patch::Merge(json!({"metadata": {"annotations": {"theirs": "kept"}}}));
    let configs = cluster.api::<ConfigMap>();
    let mut versions = BTreeSet::new();
    for name in (0..COUNT).flat_map(|number| [format!("p{number}-capture"), format!("r{number}-replay")]) {
        let config = configs.patch(&name, &PatchParams::default(), &theirs).await.unwrap();
        versions.insert((name, config.resource_version()));
    }
    eventually("each was reconciled", async || {
        operator.reconciles().await >= reconciles + 2 * COUNT as u64
    })
    .await;
    assert_eq!(asked().await[before.len()..], []);
    for (name, version) in versions {
        let config = configs.get(&name).await.unwrap();
        assert_eq!(config.annotations().get("theirs").map(String::as_str), Some("kept"));
        assert_eq!(config.resource_version(), version, "{name}");
    }

    // Many reports, and what the last one says is in the status within 10 s: at once, or when it is its turn.
    reported.send_replace(REPORTS);
    eventually("every status tells the last report", async || {
        telling(REPORTS).await == 2 * COUNT
    })
    .await;
    let mut patches = std::collections::BTreeMap::<_, u32>::new();
    for (verb, kind, name) in asked().await.split_off(before.len()) {
        assert_eq!(
            (verb.as_str(), kind.split('/').nth(1)),
            ("patch", Some("status")),
            "{kind}"
        );
        *patches.entry(name).or_default() += 1;
    }
    assert!(patches.values().all(|count| *count <= 2), "{patches:?}");
    runtimes.abort_all();
    operator.stop().await;
}

#[tokio::test(flavor = "multi_thread")]
async fn an_object_that_is_missing_is_made_by_the_first_request_that_names_it() {
    let cluster = Cluster::new().await;
    cluster.secrets().await;
    cluster.create::<CdcPipeline>(pipeline_json("trades")).await;
    cluster.create::<ReplayJob>(replay_json("replayjob-log.yaml")).await;
    let operator = Operator::start(&cluster);
    for (verb, kind, name) in [
        ("patch", "serviceaccounts/", "trades-capture"),
        ("patch", "configmaps/", "trades-capture"),
        ("patch", "deployments/", "trades-capture"),
        ("patch", "serviceaccounts/", "to-log-replay"),
        ("patch", "configmaps/", "to-log-replay"),
        ("create", "jobs/", "to-log-replay"),
    ] {
        let mut first = None;
        eventually("it is asked for", async || {
            let mut asked = cluster.asked().into_iter();
            first = asked.find(|(verb, of, named)| of == kind && verb != "list" && (named == name || named.is_empty()));
            first.is_some()
        })
        .await;
        assert_eq!(first.unwrap().0, verb, "{kind}{name}");
    }
    operator.stop().await;
}

/// Plays the Job controller.
async fn finish(cluster: &Cluster, job: &str, type_: &str) {
    let before = match type_ {
        "Complete" => "SuccessCriteriaMet",
        _ => "FailureTarget",
    };
    let condition = |type_: &str| {
        json!({
            "type": type_, "status": "True", "reason": "Played", "message": "",
            "lastTransitionTime": "2026-11-20T10:00:00Z", "lastProbeTime": "2026-11-20T10:00:00Z",
        })
    };
    let mut status = json!({
        "startTime": "2026-11-20T10:00:00Z", "conditions": [condition(before), condition(type_)],
    });
    if type_ == "Complete" {
        status["completionTime"] = json!("2026-11-20T10:00:10Z");
        status["succeeded"] = json!(1);
    }
    let patch = Patch::Merge(json!({"status": status}));
    cluster
        .api::<Job>()
        .patch_status(job, &PatchParams::default(), &patch)
        .await
        .unwrap();
}

#[tokio::test(flavor = "multi_thread")]
async fn a_finalizer_is_always_released() {
    let cluster = Cluster::new().await;
    cluster.secrets().await;
    let operator = Operator::start(&cluster);
    let pipelines = cluster.api::<CdcPipeline>();
    let gone = async |name: &'static str| {
        eventually(name, async || pipelines.get_opt(name).await.unwrap().is_none()).await;
    };
    let retained = merged(
        pipeline_json("retained"),
        &json!({"spec": {"source": {"postgres": {"slot": {"reclaimPolicy": "Retain"}}}}}),
    );
    for body in [
        retained,
        pipeline_json("failing"),
        pipeline_json("secretless"),
        pipeline_json("unseen"),
    ] {
        let created: CdcPipeline = cluster.create(body).await;
        let name = created.name_any();
        eventually("the finalizer is set and the Deployment made", async || {
            let pipeline = pipelines.get(&name).await.unwrap();
            pipeline.finalizers() == [pipeline::FINALIZER]
                && cluster
                    .api::<Deployment>()
                    .get_opt(&format!("{name}-capture"))
                    .await
                    .unwrap()
                    .is_some()
        })
        .await;
    }
    // What a capture would have said of its slot.
    for name in ["failing", "secretless"] {
        let seen = Patch::Merge(json!({"status": {"slot": {"name": name, "walStatus": "reserved"}}}));
        pipelines
            .patch_status(name, &PatchParams::default(), &seen)
            .await
            .unwrap();
    }
    pipelines.delete("retained", &DeleteParams::default()).await.unwrap();
    gone("retained").await;
    assert!(
        cluster
            .api::<Job>()
            .get_opt("retained-cleanup")
            .await
            .unwrap()
            .is_none()
    );

    for name in ["failing", "unseen"] {
        pipelines.delete(name, &DeleteParams::default()).await.unwrap();
        let job = format!("{name}-cleanup");
        eventually("cleaning up is tried", async || {
            cluster.api::<Job>().get_opt(&job).await.unwrap().is_some()
        })
        .await;
        finish(&cluster, &job, "Failed").await;
        gone(name).await;
    }

    cluster
        .api::<Secret>()
        .delete("shop-cdc", &DeleteParams::default())
        .await
        .unwrap();
    pipelines.delete("secretless", &DeleteParams::default()).await.unwrap();
    gone("secretless").await;

    let events = cluster.api::<Event>().list(&ListParams::default()).await.unwrap().items;
    let told = |reason: &str| -> Vec<(String, String)> {
        let told = events.iter().filter(|event| event.reason.as_deref() == Some(reason));
        told.map(|event| (event.type_.clone().unwrap(), event.note.clone().unwrap()))
            .collect()
    };
    let left = told("SlotLeftBehind");
    assert_eq!(left.len(), 2, "{left:?}");
    assert!(left.iter().all(|(type_, _)| type_ == "Warning"), "{left:?}");
    // To make the Secret again is of no use to a pipeline that is gone.
    assert!(left.iter().all(|(_, note)| !note.contains("create secret")), "{left:?}");
    let unseen = told("SlotNeverSeen");
    assert!(matches!(&unseen[..], [(type_, _)] if type_ == "Normal"), "{unseen:?}");
    for (_, note) in left.iter().chain(&unseen) {
        assert!(note.contains("SELECT pg_drop_replication_slot(slot_name)"), "{note}");
    }
    operator.stop().await;
}

#[tokio::test(flavor = "multi_thread")]
async fn a_replay_from_waiting_to_its_last_word() {
    let cluster = Cluster::new().await;
    cluster.secrets().await;
    let operator = Operator::start(&cluster);
    let replays = cluster.api::<ReplayJob>();
    let status = async |name: &str| replays.get(name).await.unwrap().status.unwrap_or_default();

    // It waits for its pipeline, and heals by itself.
    let replay: ReplayJob = cluster.create(replay_json("replayjob.yaml")).await;
    eventually("the missing pipeline is said", async || {
        state(&status("last-seconds").await.conditions, "Accepted") == Some(("False", "PipelineNotFound"))
    })
    .await;
    // One that leaves nothing to be cleaned up.
    let retained = merged(
        pipeline_json("trades"),
        &json!({"spec": {"source": {"postgres": {"slot": {"reclaimPolicy": "Retain"}}}}}),
    );
    cluster.create::<CdcPipeline>(retained.clone()).await;
    eventually("the Job is there", async || {
        cluster
            .api::<Job>()
            .get_opt("last-seconds-replay")
            .await
            .unwrap()
            .is_some()
    })
    .await;

    // Its pod reports, and is told.
    let labels = json!({"meander.dev/replay": "last-seconds"});
    let token = cluster
        .pod_and_token("last-seconds-replay-x", "last-seconds-replay", labels)
        .await;
    cluster.give_to("last-seconds-replay", "last-seconds-replay-x").await;
    let progress = ReplayProgress {
        phase: Phase::Running.into(),
        delivered: 64,
        percent: 64.2,
        ..ReplayProgress::default()
    };
    let update = ProgressUpdate {
        resource: Some(reference(&replay)),
        progress: Some(Progress::Replay(progress)),
        ..ProgressUpdate::default()
    };
    let (_reports, mut directives) = operator.report(&token, update).await.unwrap();
    let directive = directives.message().await.unwrap().unwrap();
    assert_eq!(
        (directive.generation, directive.speed.as_str(), directive.paused),
        (1, "10", false)
    );
    eventually("it runs", async || {
        status("last-seconds").await.phase == Some(ReplayPhase::Running)
    })
    .await;
    assert_eq!(
        status("last-seconds").await.progress.unwrap().progress.as_deref(),
        Some("64%")
    );
    // It goes on without its pipeline, and takes what is asked of it.
    cluster
        .api::<CdcPipeline>()
        .delete("trades", &DeleteParams::default())
        .await
        .unwrap();
    eventually("the pipeline is gone", async || {
        cluster.api::<CdcPipeline>().get_opt("trades").await.unwrap().is_none()
    })
    .await;
    let patch = Patch::Merge(json!({"spec": {"suspend": true, "speed": "max"}}));
    replays
        .patch("last-seconds", &PatchParams::default(), &patch)
        .await
        .unwrap();
    let directive = directives.message().await.unwrap().unwrap();
    assert_eq!(
        (directive.generation, directive.speed.as_str(), directive.paused),
        (2, "max", true)
    );
    eventually("the next pod would begin so", async || {
        let config = cluster.api::<ConfigMap>().get("last-seconds-replay").await.unwrap();
        let yaml = &config.data.unwrap()["config.yaml"];
        yaml.contains("suspended: true") && yaml.contains("speed: max")
    })
    .await;
    let after = status("last-seconds").await;
    assert_eq!(state(&after.conditions, "Accepted"), Some(("True", "Accepted")));

    // The same over gRPC, for those who may patch it.
    let ask = async |request: ControlReplayRequest| {
        let request = ControlReplayRequest {
            namespace: cluster.namespace.clone(),
            name: "last-seconds".into(),
            ..request
        };
        let answer = operator
            .client()
            .await
            .control_replay(authorized(request, &token))
            .await;
        answer
            .map(|answer| answer.into_inner().generation)
            .map_err(|status| status.code())
    };
    let resume = || ControlReplayRequest {
        suspend: Some(false),
        speed: Some("0.5".into()),
        ..ControlReplayRequest::default()
    };
    let follow = async || {
        let resource = Some(reference(&replay));
        let request = authorized(StreamProgressRequest { resource }, &token);
        operator.client().await.stream_progress(request).await
    };
    cluster.allow("last-seconds-replay", "replayjobs", "get").await;
    eventually("who may read it may follow it", async || follow().await.is_ok()).await;
    assert_eq!(ask(resume()).await, Err(Code::PermissionDenied));
    cluster.allow("last-seconds-replay", "replayjobs", "patch").await;
    eventually("who may patch it may control it", async || ask(resume()).await == Ok(3)).await;
    let directive = directives.message().await.unwrap().unwrap();
    assert_eq!(
        (directive.generation, directive.speed.as_str(), directive.paused),
        (3, "0.5", false)
    );
    let spec = replays.get("last-seconds").await.unwrap().spec;
    assert_eq!((spec.suspend, spec.speed.to_string().as_str()), (false, "0.5"));
    let refused = [
        ControlReplayRequest::default(),
        ControlReplayRequest {
            speed: Some("fast".into()),
            ..ControlReplayRequest::default()
        },
    ];
    for request in refused {
        assert_eq!(ask(request).await, Err(Code::InvalidArgument));
    }
    let another = ControlReplayRequest {
        uid: "another".into(),
        ..resume()
    };
    assert_eq!(ask(another).await, Err(Code::FailedPrecondition));
    let mut followed = follow().await.unwrap().into_inner();
    let seen = |update: ProgressUpdate| match update.progress {
        Some(Progress::Replay(progress)) => (progress.phase(), progress.delivered),
        _ => panic!("the progress of a pipeline"),
    };
    assert_eq!(seen(followed.message().await.unwrap().unwrap()), (Phase::Running, 64));

    // Its last word is its pod's.
    let word = json!({
        "phase": "Succeeded", "delivered": 100, "deliveryMicros": 5_000_000, "resolvedRange": {"offsets": 100},
    });
    let word = word.to_string();
    cluster.end_pod("last-seconds-replay-x", "Succeeded", &word).await;
    finish(&cluster, "last-seconds-replay", "Complete").await;
    eventually("it has succeeded", async || {
        status("last-seconds").await.phase == Some(ReplayPhase::Succeeded)
    })
    .await;
    let last = status("last-seconds").await;
    let progress = last.progress.unwrap();
    assert_eq!(
        (progress.delivered, progress.percent, progress.delivery_millis),
        (100, 100, 5000)
    );
    assert_eq!(state(&last.conditions, "Complete"), Some(("True", "Delivered")));
    assert_eq!(last.completion_time.as_deref(), Some("2026-11-20T10:00:10Z"));
    assert_eq!(
        seen(followed.message().await.unwrap().unwrap()),
        (Phase::Succeeded, 100)
    );
    assert!(
        followed.message().await.unwrap().is_none(),
        "its end is the last that there is to see"
    );
    let expire = Patch::Merge(json!({"spec": {"ttlSecondsAfterFinished": 1}}));
    replays
        .patch("last-seconds", &PatchParams::default(), &expire)
        .await
        .unwrap();
    eventually("it expires", async || {
        replays.get_opt("last-seconds").await.unwrap().is_none()
    })
    .await;

    // Saved for later, then cancelled before anybody ran it.
    cluster.create::<CdcPipeline>(retained).await;
    let body = merged(
        replay_json("replayjob-log.yaml"),
        &json!({"metadata": {"name": "saved"}, "spec": {"suspend": true}}),
    );
    cluster.create::<ReplayJob>(body).await;
    eventually("it is saved", async || {
        status("saved").await.phase == Some(ReplayPhase::Paused)
    })
    .await;
    assert!(cluster.api::<Job>().get_opt("saved-replay").await.unwrap().is_none());
    let cancel = Patch::Merge(json!({"spec": {"cancel": true}}));
    replays.patch("saved", &PatchParams::default(), &cancel).await.unwrap();
    eventually("it is cancelled", async || {
        status("saved").await.phase == Some(ReplayPhase::Cancelled)
    })
    .await;

    // Deleted while it runs: its runtime hears of it before Kubernetes has come to its pod.
    let body = merged(
        replay_json("replayjob-log.yaml"),
        &json!({"metadata": {"name": "unwanted"}}),
    );
    let unwanted: ReplayJob = cluster.create(body).await;
    eventually("the Job is there", async || {
        cluster.api::<Job>().get_opt("unwanted-replay").await.unwrap().is_some()
    })
    .await;
    let labels = json!({"meander.dev/replay": "unwanted"});
    let token = cluster
        .pod_and_token("unwanted-replay-x", "unwanted-replay", labels)
        .await;
    let update = ProgressUpdate {
        resource: Some(reference(&unwanted)),
        ..ProgressUpdate::default()
    };
    let (_reports, mut directives) = operator.report(&token, update).await.unwrap();
    assert!(!directives.message().await.unwrap().unwrap().cancel);
    replays.delete("unwanted", &DeleteParams::default()).await.unwrap();
    assert!(directives.message().await.unwrap().unwrap().cancel);

    // Cancelled after an attempt that failed, while nobody hears: the Job goes, before it makes another one.
    cluster.secret("replay-token", &["token"]).await;
    cluster.create::<ReplayJob>(replay_json("replayjob-serve.yaml")).await;
    eventually("the Job is there", async || {
        cluster.api::<Job>().get_opt("served-replay").await.unwrap().is_some()
    })
    .await;
    assert!(
        cluster
            .api::<Service>()
            .get_opt("served-replay")
            .await
            .unwrap()
            .is_some()
    );
    let labels = json!({"meander.dev/replay": "served"});
    cluster.pod_and_token("served-replay-x", "served-replay", labels).await;
    cluster.give_to("served-replay", "served-replay-x").await;
    let word = json!({"phase": "Failed", "reason": "KafkaUnreachable", "message": "It is down."}).to_string();
    cluster.end_pod("served-replay-x", "Failed", &word).await;
    eventually("the failure is said", async || {
        let conditions = status("served").await.conditions;
        state(&conditions, "Progressing") == Some(("False", "KafkaUnreachable"))
    })
    .await;
    replays.patch("served", &PatchParams::default(), &cancel).await.unwrap();
    eventually("it is cancelled", async || {
        status("served").await.phase == Some(ReplayPhase::Cancelled)
    })
    .await;
    let job = cluster.api::<Job>().get_opt("served-replay").await.unwrap();
    assert!(job.is_none_or(|job| job.metadata.deletion_timestamp.is_some()));
    operator.stop().await;
}

#[tokio::test(flavor = "multi_thread")]
async fn what_a_deleted_resource_left_is_not_that_of_the_next_of_its_name() {
    let cluster = Cluster::new().await;
    cluster.secrets().await;
    let operator = Operator::start(&cluster);
    let jobs = cluster.api::<Job>();
    let deployments = cluster.api::<Deployment>();
    let replays = cluster.api::<ReplayJob>();
    let pipelines = cluster.api::<CdcPipeline>();
    let retained = merged(
        pipeline_json("trades"),
        &json!({"spec": {"source": {"postgres": {"slot": {"reclaimPolicy": "Retain"}}}}}),
    );
    cluster.create::<CdcPipeline>(retained.clone()).await;
    cluster.create::<ReplayJob>(replay_json("replayjob.yaml")).await;
    eventually("the Job and the Deployment are there", async || {
        jobs.get_opt("last-seconds-replay").await.unwrap().is_some()
            && deployments.get_opt("trades-capture").await.unwrap().is_some()
    })
    .await;
    finish(&cluster, "last-seconds-replay", "Complete").await;
    cluster.make_available("trades-capture").await;

    // Nothing collects garbage here: the Job and the Deployment stay, and so do their ends.
    replays.delete("last-seconds", &DeleteParams::default()).await.unwrap();
    let replay: ReplayJob = cluster.create(replay_json("replayjob.yaml")).await;
    eventually("the old Job is in the way", async || {
        let status = replays.get("last-seconds").await.unwrap().status.unwrap_or_default();
        assert!(!status.phase.is_some_and(ReplayPhase::is_terminal), "{status:?}");
        state(&status.conditions, "Accepted") == Some(("False", "NameTaken"))
    })
    .await;
    pipelines.delete("trades", &DeleteParams::default()).await.unwrap();
    eventually("the pipeline is gone", async || {
        pipelines.get_opt("trades").await.unwrap().is_none()
    })
    .await;
    cluster.create::<CdcPipeline>(retained).await;
    eventually("the old Deployment is in the way", async || {
        let status = pipelines.get("trades").await.unwrap().status.unwrap_or_default();
        status.phase == Some(PipelinePhase::Pending)
            && state(&status.conditions, "RuntimeAvailable") == Some(("False", "NameTaken"))
    })
    .await;

    // Collected, they make room.
    let background = DeleteParams::background();
    let accounts = cluster.api::<ServiceAccount>();
    let configs = cluster.api::<ConfigMap>();
    for name in ["last-seconds-replay", "trades-capture"] {
        accounts.delete(name, &background).await.unwrap();
        configs.delete(name, &background).await.unwrap();
    }
    jobs.delete("last-seconds-replay", &background).await.unwrap();
    deployments.delete("trades-capture", &background).await.unwrap();
    eventually("the replay has its own Job", async || {
        let job = jobs.get_opt("last-seconds-replay").await.unwrap();
        job.is_some_and(|job| {
            job.owner_references()
                .iter()
                .any(|owner| Some(&owner.uid) == replay.uid().as_ref())
        })
    })
    .await;
    operator.stop().await;
}

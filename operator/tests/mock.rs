//! What the operator does when the API server says no. Each scenario lists every call, in order: one that is missing and one too
//! many both fail.
#![allow(missing_docs, clippy::unwrap_used, clippy::expect_used, clippy::panic)]

mod support;

use std::{
    future::{Future, ready},
    io::{self, Write},
    sync::{Arc, Mutex},
    time::Duration,
};

use http::{Request, Response};
use k8s_openapi::apimachinery::pkg::apis::meta::v1::Time;
use kube::{
    Client,
    client::Body,
    runtime::{controller::Action, watcher::Event},
};
use meander_crds::{CdcPipeline, SlotReclaimPolicy};
use meander_operator::{
    cache::Caches,
    conditions::ACCEPTED,
    context::Context,
    error::{Error, Reason},
    events::Events,
    lease::{Claim, Elector},
    metrics::Metrics,
    pipeline,
    progress::{Authenticator, Kind, ResourceKey, Tracker},
    replay,
};
use serde_json::{Value, json};
use tokio::time::timeout;
use tokio_util::sync::CancellationToken;
use tonic::{Code, metadata::MetadataMap};

/// A call that is expected, and its answer.
struct Call {
    call: &'static str,
    status: u16,
    answer: Value,
    /// A piece that the body must have.
    says: &'static str,
}

fn call(call: &'static str, status: u16, answer: Value) -> Call {
    Call {
        call,
        status,
        answer,
        says: "",
    }
}

fn saying(call: &'static str, says: &'static str, status: u16, answer: Value) -> Call {
    Call {
        call,
        status,
        answer,
        says,
    }
}

fn refusal(code: u16) -> Value {
    let reason = match code {
        403 => "Forbidden",
        404 => "NotFound",
        409 => "Conflict",
        410 => "Expired",
        _ => "InternalError",
    };
    json!({"kind": "Status", "apiVersion": "v1", "status": "Failure", "message": "because", "reason": reason, "code": code})
}

/// Plays the API server for `work`.
async fn play<T, F: Future<Output = T>>(calls: Vec<Call>, work: impl FnOnce(Client) -> F) -> T {
    let (service, mut handle) = tower_test::mock::pair::<Request<Body>, Response<Body>>();
    let client = Client::new(service, "default");
    let server = async move {
        for expected in calls {
            let Some((request, reply)) = handle.next_request().await else {
                panic!("{} is missing", expected.call)
            };
            assert_eq!(format!("{} {}", request.method(), request.uri().path()), expected.call);
            let body = request.into_body().collect_bytes().await.unwrap();
            let body = String::from_utf8_lossy(&body);
            assert!(body.contains(expected.says), "{} says {body}", expected.call);
            let answer = serde_json::to_vec(&expected.answer).unwrap();
            reply.send_response(
                Response::builder()
                    .status(expected.status)
                    .body(Body::from(answer))
                    .unwrap(),
            );
        }
        if let Some((request, _)) = handle.next_request().await {
            panic!("{} {} is one too many", request.method(), request.uri());
        }
    };
    let both = async { tokio::join!(server, work(client)).1 };
    timeout(Duration::from_secs(60), both).await.expect("a call is missing")
}

/// Caches that show these pipelines, and nothing of what was made for them.
fn showing(pipelines: &[&CdcPipeline]) -> Arc<Caches> {
    let (caches, mut writers) = Caches::new();
    for pipeline in pipelines {
        writers
            .pipelines
            .apply_watcher_event(&Event::Apply((*pipeline).clone()));
    }
    Arc::new(caches)
}

fn context(client: Client, claim: Claim, caches: Arc<Caches>) -> Arc<Context> {
    let events = Events::new(client.clone(), "test");
    let metrics = Arc::new(Metrics::new().unwrap());
    Arc::new(Context::new(
        client,
        support::settings(),
        Arc::new(Tracker::new().0),
        claim,
        events,
        metrics,
        caches,
    ))
}

/// Reconciles a pipeline while these are known.
async fn reconcile_among(client: Client, claim: Claim, pipeline: &CdcPipeline, known: &[&CdcPipeline]) -> Action {
    let context = context(client, claim, showing(known));
    pipeline::reconcile(Arc::new(pipeline.clone()), context).await.unwrap()
}

async fn reconcile_pipeline(client: Client, claim: Claim) -> Action {
    let pipeline = support::pipeline();
    reconcile_among(client, claim, &pipeline, &[&pipeline]).await
}

fn pipeline_json() -> Value {
    serde_json::to_value(support::pipeline()).unwrap()
}

fn secret(keys: &[&str]) -> Value {
    let data: serde_json::Map<String, Value> = keys.iter().map(|key| ((*key).to_owned(), json!("eA=="))).collect();
    json!({"apiVersion": "v1", "kind": "Secret", "metadata": {"name": "s"}, "data": data})
}

const PIPELINE: &str = "GET /apis/meander.dev/v1alpha1/namespaces/default/cdcpipelines/trades";
const PATCH_PIPELINE: &str = "PATCH /apis/meander.dev/v1alpha1/namespaces/default/cdcpipelines/trades";
const STATUS: &str = "PATCH /apis/meander.dev/v1alpha1/namespaces/default/cdcpipelines/trades/status";
const DEPLOYMENT: &str = "GET /apis/apps/v1/namespaces/default/deployments/trades-capture";
const CREDENTIALS: &str = "GET /api/v1/namespaces/default/secrets/shop-cdc";
const REDIS_URL: &str = "GET /api/v1/namespaces/default/secrets/shop-redis";
const ACCOUNT: &str = "GET /api/v1/namespaces/default/serviceaccounts/trades-capture";
const PATCH_ACCOUNT: &str = "PATCH /api/v1/namespaces/default/serviceaccounts/trades-capture";
const PATCH_CONFIG: &str = "PATCH /api/v1/namespaces/default/configmaps/trades-capture";
const PATCH_POLICY: &str = "PATCH /apis/networking.k8s.io/v1/namespaces/default/networkpolicies/trades-capture";
const PODS: &str = "GET /api/v1/namespaces/default/pods";
const EVENT: &str = "POST /apis/events.k8s.io/v1/namespaces/default/events";

/// What is read before anything is started.
fn dereferenced() -> Vec<Call> {
    vec![
        call(CREDENTIALS, 200, secret(&["username", "password"])),
        call(REDIS_URL, 200, secret(&["url"])),
    ]
}

/// What the API server made of any object of the pipeline.
fn applied() -> Value {
    json!({"metadata": {"name": "trades-capture"}})
}

/// Whether the next reconcile comes by itself. How soon is what the backoff's own bounds say.
fn comes_back(action: &Action) -> bool {
    *action != Action::await_change()
}

/// Keeps what is logged.
#[derive(Clone, Default)]
struct Log(Arc<Mutex<Vec<u8>>>);

impl Write for Log {
    fn write(&mut self, bytes: &[u8]) -> io::Result<usize> {
        self.0.lock().unwrap().write(bytes)
    }

    fn flush(&mut self) -> io::Result<()> {
        Ok(())
    }
}

#[tokio::test]
async fn a_failure_is_logged_when_it_is_new_and_not_with_every_try() {
    let log = Log::default();
    let writer = log.clone();
    let subscriber = tracing_subscriber::fmt().with_writer(move || writer.clone()).finish();
    let _guard = tracing::subscriber::set_default(subscriber);
    let told = |what: &str| String::from_utf8_lossy(&log.0.lock().unwrap()).matches(what).count();
    let key = ResourceKey {
        kind: Kind::ReplayJob,
        namespace: "default".into(),
        name: "last-seconds".into(),
    };
    play(vec![], async |client| {
        let context = context(client, Claim::forever(), showing(&[]));
        let missing = |name: &str| Error::waiting(ACCEPTED, Reason::PipelineNotFound, format!("no pipeline {name}"));
        let invalid = || Error::invalid(ACCEPTED, Reason::InvalidValue, "never");
        let come_to = async |error| context.reconcile(&key, ready(Err(error))).await;
        for _ in 0..3 {
            assert!(comes_back(&come_to(missing("trades")).await));
        }
        assert_eq!(told("cannot finish"), 1);
        come_to(missing("orders")).await;
        assert_eq!(told("cannot finish"), 2, "another one");
        for _ in 0..3 {
            assert!(comes_back(&come_to(invalid()).await));
        }
        assert_eq!(told("never"), 1);
        for _ in 0..2 {
            context.reconcile(&key, ready(Ok(Action::await_change()))).await;
        }
        assert_eq!(told("goes on"), 1);
        come_to(missing("orders")).await;
        assert_eq!(told("cannot finish"), 3, "it is missing again");
    })
    .await;
}

#[tokio::test(start_paused = true)]
async fn a_renewal_that_is_never_answered_does_not_cost_the_lease() {
    let (service, mut handle) = tower_test::mock::pair::<Request<Body>, Response<Body>>();
    let (elector, claim) = Elector::new(Client::new(service, "default"), "default", "lease", "one");
    let end = CancellationToken::new();
    let election = tokio::spawn(elector.run(end.clone()));
    let lease = json!({
        "apiVersion": "coordination.k8s.io/v1", "kind": "Lease",
        "metadata": {"name": "lease", "resourceVersion": "1"}, "spec": {"holderIdentity": "one"},
    });
    let mut unanswered = Vec::new();
    // Whether it was written is not known: it is read before it is written again, and it can be written in between.
    for (method, answer) in [
        ("GET", Some(200)),
        ("PUT", Some(200)),
        ("PUT", None),
        ("GET", Some(200)),
        ("PUT", Some(409)),
        ("GET", Some(200)),
        ("PUT", Some(200)),
    ] {
        let (request, reply) = handle.next_request().await.expect("the election goes on");
        assert_eq!(request.method(), method);
        let body = match answer {
            None => {
                unanswered.push(reply);
                continue;
            }
            Some(200) => lease.clone(),
            Some(code) => refusal(code),
        };
        let body = Body::from(serde_json::to_vec(&body).unwrap());
        let status = answer.unwrap_or_default();
        reply.send_response(Response::builder().status(status).body(body).unwrap());
    }
    handle.next_request().await.expect("the lease is renewed again");
    assert!(claim.is_held());
    end.cancel();
    election.await.unwrap().unwrap();
}

#[tokio::test]
async fn a_pipeline_that_is_gone_is_left_alone() {
    let reconcile = async |client| reconcile_among(client, Claim::forever(), &support::pipeline(), &[]).await;
    assert_eq!(play(vec![], reconcile).await, Action::await_change());
}

#[tokio::test]
async fn a_missing_secret_is_said_and_looked_for_again() {
    let calls = vec![
        call(CREDENTIALS, 404, refusal(404)),
        call(REDIS_URL, 200, secret(&["url"])),
        saying(
            STATUS,
            "kubectl -n default create secret generic shop-cdc",
            200,
            pipeline_json(),
        ),
        // An event that is refused fails nothing.
        saying(EVENT, "SecretNotFound", 403, refusal(403)),
    ];
    let action = play(calls, |client| reconcile_pipeline(client, Claim::forever())).await;
    assert!(comes_back(&action), "{action:?}");
}

#[tokio::test]
async fn of_two_pipelines_that_name_one_slot_the_later_waits_until_the_first_is_gone() {
    let mut first = support::pipeline();
    first.metadata.name = Some("older".to_owned());
    let mut later = support::pipeline();
    for (pipeline, created) in [(&mut first, 1), (&mut later, 2)] {
        pipeline.spec.source.postgres.slot.name = Some("one".to_owned());
        pipeline.metadata.creation_timestamp = Some(Time(jiff::Timestamp::from_second(created).unwrap()));
    }
    let look = async |known: &[&CdcPipeline], calls| {
        let reconcile = async |client| reconcile_among(client, Claim::forever(), &later, known).await;
        play(calls, reconcile).await
    };
    let calls = vec![
        saying(
            STATUS,
            "replication slot one of postgres:5432 is that of pipeline default/older",
            200,
            pipeline_json(),
        ),
        saying(EVENT, "SlotConflict", 201, json!({})),
    ];
    let action = look(&[&first, &later], calls).await;
    assert!(comes_back(&action), "{action:?}");

    let mut calls = dereferenced();
    calls.extend([
        saying(PATCH_PIPELINE, "meander.dev/slot-cleanup", 409, refusal(409)),
        call(STATUS, 200, pipeline_json()),
        call(EVENT, 201, json!({})),
    ]);
    look(&[&later], calls).await;
}

#[tokio::test]
async fn the_slot_of_another_pipeline_is_not_dropped_with_this_one() {
    let mut first = support::pipeline();
    first.metadata.name = Some("older".to_owned());
    let mut going = support::pipeline();
    for (pipeline, created) in [(&mut first, 1), (&mut going, 2)] {
        pipeline.spec.source.postgres.slot.name = Some("one".to_owned());
        pipeline.spec.source.postgres.slot.reclaim_policy = SlotReclaimPolicy::Delete;
        pipeline.metadata.creation_timestamp = Some(Time(jiff::Timestamp::from_second(created).unwrap()));
        pipeline.metadata.finalizers = Some(vec![pipeline::FINALIZER.to_owned()]);
    }
    going.metadata.deletion_timestamp = Some(Time(jiff::Timestamp::now()));
    let going_json = serde_json::to_value(&going).unwrap();
    let mut calls = vec![call(DEPLOYMENT, 404, refusal(404))];
    calls.extend(dereferenced());
    calls.extend([
        call(
            PODS,
            200,
            json!({"kind": "PodList", "apiVersion": "v1", "metadata": {}, "items": []}),
        ),
        call(STATUS, 200, going_json.clone()),
        call(EVENT, 201, json!({})),
        saying(
            EVENT,
            "run in the database shop: DROP PUBLICATION IF EXISTS",
            201,
            json!({}),
        ),
        call(PIPELINE, 200, going_json.clone()),
        saying(PATCH_PIPELINE, r#""finalizers":[]"#, 200, going_json),
    ]);
    let reconcile = async |client| reconcile_among(client, Claim::forever(), &going, &[&first, &going]).await;
    assert_eq!(play(calls, reconcile).await, Action::await_change());
}

#[tokio::test]
async fn a_server_in_trouble_changes_no_judgement() {
    let calls = vec![
        call(CREDENTIALS, 500, refusal(500)),
        call(REDIS_URL, 200, secret(&["url"])),
        saying(STATUS, r#""phase":"Pending""#, 200, pipeline_json()),
        saying(EVENT, "NotStarted", 201, json!({})),
    ];
    let action = play(calls, |client| reconcile_pipeline(client, Claim::forever())).await;
    assert!(comes_back(&action), "{action:?}");
}

#[tokio::test]
async fn a_status_that_cannot_be_written_is_tried_again() {
    for code in [409, 410, 500] {
        let calls = vec![
            call(CREDENTIALS, 410, refusal(410)),
            call(REDIS_URL, 410, refusal(410)),
            call(STATUS, code, refusal(code)),
        ];
        let action = play(calls, |client| reconcile_pipeline(client, Claim::forever())).await;
        assert!(comes_back(&action), "{action:?}");
    }
}

#[tokio::test]
async fn a_missing_permission_is_said() {
    let mut calls = dereferenced();
    calls.extend([
        saying(PATCH_PIPELINE, "meander.dev/slot-cleanup", 200, pipeline_json()),
        call(PATCH_ACCOUNT, 403, refusal(403)),
        call(PATCH_CONFIG, 200, applied()),
        call(PATCH_POLICY, 200, applied()),
        saying(
            STATUS,
            "applying ServiceAccount trades-capture failed: because; check the operator's ClusterRole",
            200,
            pipeline_json(),
        ),
        saying(EVENT, "Forbidden", 201, json!({})),
    ]);
    play(calls, |client| reconcile_pipeline(client, Claim::forever())).await;
}

#[tokio::test]
async fn an_object_of_somebody_else_is_not_touched() {
    let mut calls = dereferenced();
    let foreign = json!({"apiVersion": "v1", "kind": "ServiceAccount", "metadata": {"name": "trades-capture"}});
    calls.extend([
        call(PATCH_PIPELINE, 200, pipeline_json()),
        saying(PATCH_ACCOUNT, r#""resourceVersion":"1""#, 409, refusal(409)),
        call(PATCH_CONFIG, 200, applied()),
        call(PATCH_POLICY, 200, applied()),
        call(ACCOUNT, 200, foreign),
        saying(STATUS, "NameTaken", 200, pipeline_json()),
        saying(EVENT, "NameTaken", 201, json!({})),
    ]);
    play(calls, |client| reconcile_pipeline(client, Claim::forever())).await;
}

#[tokio::test]
async fn a_conflict_on_the_finalizer_builds_nothing() {
    let mut calls = dereferenced();
    calls.extend([
        call(PATCH_PIPELINE, 409, refusal(409)),
        call(STATUS, 200, pipeline_json()),
        call(EVENT, 201, json!({})),
    ]);
    play(calls, |client| reconcile_pipeline(client, Claim::forever())).await;
}

#[tokio::test]
async fn what_cannot_be_read_or_written_holds_no_finalizer() {
    let deleted_at = |second: i64, policy: &str| {
        let mut pipeline = pipeline_json();
        pipeline["metadata"]["deletionTimestamp"] = json!(jiff::Timestamp::from_second(second).unwrap().to_string());
        pipeline["metadata"]["finalizers"] = json!([pipeline::FINALIZER]);
        pipeline["spec"]["source"]["postgres"]["slot"]["reclaimPolicy"] = json!(policy);
        pipeline["status"] = json!({"slot": {"name": "meander_default_trades", "walStatus": "reserved"}});
        pipeline
    };
    let now = jiff::Timestamp::now().as_second();
    for (pipeline, reason) in [
        (deleted_at(now, "Retain"), "SlotRetained"),
        (deleted_at(now - 200, "Delete"), "SlotLeftBehind"),
    ] {
        let calls = vec![
            call(DEPLOYMENT, 403, refusal(403)),
            saying(STATUS, "Terminating", 500, refusal(500)),
            saying(EVENT, reason, 201, json!({})),
            call(PIPELINE, 200, pipeline.clone()),
            saying(PATCH_PIPELINE, r#""finalizers":[]"#, 200, pipeline.clone()),
        ];
        let pipeline: CdcPipeline = serde_json::from_value(pipeline).unwrap();
        let reconcile = async |client| reconcile_among(client, Claim::forever(), &pipeline, &[&pipeline]).await;
        assert_eq!(play(calls, reconcile).await, Action::await_change());
    }
}

#[tokio::test]
async fn who_does_not_lead_writes_nothing() {
    let action = play(dereferenced(), |client| reconcile_pipeline(client, Claim::never())).await;
    assert!(comes_back(&action), "{action:?}");
}

#[tokio::test]
async fn a_replay_without_its_pipeline_waits() {
    let replay = support::replay("replayjob.yaml");
    let calls = vec![
        saying(
            "PATCH /apis/meander.dev/v1alpha1/namespaces/default/replayjobs/last-seconds/status",
            "PipelineNotFound",
            200,
            serde_json::to_value(&replay).unwrap(),
        ),
        saying(EVENT, "PipelineNotFound", 201, json!({})),
    ];
    play(calls, |client| async move {
        let (caches, mut writers) = Caches::new();
        writers.replays.apply_watcher_event(&Event::Apply(replay.clone()));
        let context = context(client, Claim::forever(), Arc::new(caches));
        replay::reconcile(Arc::new(replay), context).await.unwrap()
    })
    .await;
}

const REVIEW: &str = "POST /apis/authentication.k8s.io/v1/tokenreviews";
const POD: &str = "GET /api/v1/namespaces/default/pods/trades-capture-x";

fn bearer() -> MetadataMap {
    let mut metadata = MetadataMap::new();
    metadata.insert("authorization", "Bearer t".parse().unwrap());
    metadata
}

fn reviewed(audience: &str, account: &str) -> Value {
    json!({
        "apiVersion": "authentication.k8s.io/v1",
        "kind": "TokenReview",
        "spec": {},
        "status": {
            "authenticated": true,
            "audiences": [audience],
            "user": {
                "username": account,
                "extra": {
                    "authentication.kubernetes.io/pod-name": ["trades-capture-x"],
                    "authentication.kubernetes.io/pod-uid": ["pod-uid"],
                },
            },
        },
    })
}

fn pod(uid: &str, pipeline: &str) -> Value {
    json!({"metadata": {"name": "trades-capture-x", "uid": uid, "labels": {"meander.dev/pipeline": pipeline}}})
}

async fn authenticate(metadata: MetadataMap, uid: &str, calls: Vec<Call>) -> Result<(), Code> {
    let key = ResourceKey {
        kind: Kind::CdcPipeline,
        namespace: "default".into(),
        name: "trades".into(),
    };
    play(calls, |client| async move {
        Authenticator::new(client)
            .reporter(&metadata, &key, uid)
            .await
            .map_err(|status| status.code())
    })
    .await
}

#[tokio::test]
async fn only_a_pod_of_the_resource_reports_on_it() {
    let uid = support::pipeline().metadata.uid.unwrap();
    let account = "system:serviceaccount:default:trades-capture";
    let review = |audience, account| {
        saying(
            REVIEW,
            r#""audiences":["meander.dev"]"#,
            201,
            reviewed(audience, account),
        )
    };
    let pod_of = |uid, name| call(POD, 200, pod(uid, name));
    let good = || {
        vec![
            review("meander.dev", account),
            pod_of("pod-uid", "trades"),
            call(PIPELINE, 200, pipeline_json()),
        ]
    };

    assert_eq!(authenticate(bearer(), &uid, good()).await, Ok(()));
    assert_eq!(
        authenticate(MetadataMap::new(), &uid, vec![]).await,
        Err(Code::Unauthenticated)
    );
    let other_audience = vec![review("elsewhere", account)];
    assert_eq!(
        authenticate(bearer(), &uid, other_audience).await,
        Err(Code::Unauthenticated)
    );
    let other_namespace = vec![review("meander.dev", "system:serviceaccount:default2:trades-capture")];
    assert_eq!(
        authenticate(bearer(), &uid, other_namespace).await,
        Err(Code::PermissionDenied)
    );
    let other_account = vec![review("meander.dev", "system:serviceaccount:default:default")];
    assert_eq!(
        authenticate(bearer(), &uid, other_account).await,
        Err(Code::PermissionDenied)
    );
    let other_pipeline = vec![review("meander.dev", account), pod_of("pod-uid", "orders")];
    assert_eq!(
        authenticate(bearer(), &uid, other_pipeline).await,
        Err(Code::PermissionDenied)
    );
    let replaced_pod = vec![review("meander.dev", account), pod_of("another", "trades")];
    assert_eq!(
        authenticate(bearer(), &uid, replaced_pod).await,
        Err(Code::PermissionDenied)
    );
    assert_eq!(
        authenticate(bearer(), "another", good()).await,
        Err(Code::PermissionDenied)
    );
    let silent = vec![call(REVIEW, 500, refusal(500))];
    assert_eq!(authenticate(bearer(), &uid, silent).await, Err(Code::Unavailable));
}

//! What the service accounts may do, as the chart's RBAC says it, tried by requests with their tokens.
//!
//! That the operator may do what it needs is shown by all tests that run a whole one: it runs as the chart's account.

use std::{process::Command, sync::OnceLock};

use http::Request;
use k8s_openapi::{
    NamespaceResourceScope,
    api::{
        apps::v1::Deployment,
        authorization::v1::SelfSubjectRulesReview,
        core::v1::{Namespace, Secret, ServiceAccount},
        rbac::v1::{ClusterRole, ClusterRoleBinding, Role, RoleBinding},
    },
};
use kube::{
    Api, Client, Config, Resource, ResourceExt as _,
    api::{ListParams, Patch, PatchParams, PostParams},
    config::{KubeConfigOptions, Kubeconfig},
};
use meander_crds::{CdcPipeline, ReplayJob};
use serde::{Serialize, de::DeserializeOwned};
use serde_json::{Value, json};

use super::Cluster;

/// Stands for the release's namespace in what is rendered once for all tests.
const PLACEHOLDER: &str = "release-namespace";

/// What the chart installs of service accounts and their roles.
fn rendered(watch_namespace: bool) -> &'static str {
    static WIDE: OnceLock<String> = OnceLock::new();
    static NARROW: OnceLock<String> = OnceLock::new();
    let render = || {
        let watched = if watch_namespace { PLACEHOLDER } else { "" };
        let chart = concat!(env!("CARGO_MANIFEST_DIR"), "/../charts/meander");
        let output = Command::new("helm")
            .args([
                "template",
                "meander",
                chart,
                "--kube-version",
                "1.34.0",
                "--namespace",
                PLACEHOLDER,
            ])
            .args(["--set", &format!("watchNamespace={watched}")])
            .args([
                "--show-only",
                "templates/rbac.yaml",
                "--show-only",
                "templates/serviceaccount.yaml",
            ])
            .output()
            .expect("helm is on the PATH: eval \"$(tests/setup.sh env)\"");
        assert!(output.status.success(), "{}", String::from_utf8_lossy(&output.stderr));
        String::from_utf8(output.stdout).unwrap()
    };
    if watch_namespace { &NARROW } else { &WIDE }.get_or_init(render)
}

async fn apply<K>(api: Api<K>, object: Value)
where
    K: Resource<DynamicType = ()> + Clone + std::fmt::Debug + DeserializeOwned + Serialize,
{
    let name = object["metadata"]["name"].as_str().unwrap().to_owned();
    api.patch(&name, &PatchParams::apply("test").force(), &Patch::Apply(object))
        .await
        .unwrap();
}

async fn apply_in<K>(client: &Client, object: Value)
where
    K: Resource<DynamicType = (), Scope = NamespaceResourceScope>
        + Clone
        + std::fmt::Debug
        + DeserializeOwned
        + Serialize,
{
    let namespace = object["metadata"]["namespace"].as_str().unwrap().to_owned();
    apply(Api::<K>::namespaced(client.clone(), &namespace), object).await;
}

/// Installs the chart's roles in a namespace that is there, which is the one that is watched if only one is, and returns the cluster as
/// its operator sees it.
pub async fn operator_of(admin: &Client, kubeconfig: Kubeconfig, namespace: &str, watch_namespace: bool) -> Client {
    let manifests = rendered(watch_namespace).replace(PLACEHOLDER, namespace);
    for manifest in manifests.split("\n---\n") {
        let mut object: Value = serde_saphyr::from_str(manifest).unwrap();
        // Releases of one name share what has no namespace; tests do not.
        let kind = object["kind"].as_str().unwrap().to_owned();
        let own = |name: &mut Value| *name = json!(format!("{}-{namespace}", name.as_str().unwrap()));
        if kind.starts_with("Cluster") {
            own(&mut object["metadata"]["name"]);
        }
        if object["roleRef"]["kind"] == "ClusterRole" {
            own(&mut object["roleRef"]["name"]);
        }
        match kind.as_str() {
            "ServiceAccount" => apply_in::<ServiceAccount>(admin, object).await,
            "Role" => apply_in::<Role>(admin, object).await,
            "RoleBinding" => apply_in::<RoleBinding>(admin, object).await,
            "ClusterRole" => apply::<ClusterRole>(Api::all(admin.clone()), object).await,
            "ClusterRoleBinding" => apply::<ClusterRoleBinding>(Api::all(admin.clone()), object).await,
            other => panic!("nobody applies a {other} here"),
        }
    }
    let accounts = Api::<ServiceAccount>::namespaced(admin.clone(), namespace);
    let request = serde_json::from_value(json!({"spec": {"audiences": []}})).unwrap();
    let token = accounts
        .create_token_request("meander-operator", &PostParams::default(), &request)
        .await
        .unwrap();
    holder_of(&token.status.unwrap().token, kubeconfig).await
}

/// The cluster as the holder of a token sees it.
async fn holder_of(token: &str, kubeconfig: Kubeconfig) -> Client {
    let mut config = Config::from_custom_kubeconfig(kubeconfig, &KubeConfigOptions::default())
        .await
        .unwrap();
    config.auth_info = serde_json::from_value(json!({"token": token})).unwrap();
    Client::try_from(config).unwrap()
}

/// The API server's answer to a request, written as its method and path.
async fn answer(client: &Client, request: &str) -> u16 {
    let (method, path) = request.split_once(' ').unwrap();
    let content = match method {
        "PATCH" => "application/apply-patch+yaml",
        _ => "application/json",
    };
    let request = Request::builder()
        .method(method)
        .uri(path)
        .header("content-type", content)
        .body(b"{}".to_vec())
        .unwrap();
    match client.request_text(request).await {
        Ok(_) => 200,
        Err(kube::Error::Api(status)) => status.code,
        Err(error) => panic!("{path}: {error}"),
    }
}

async fn all_are_refused(client: &Client, requests: &str, namespace: &str) {
    for request in requests.lines().map(str::trim).filter(|line| !line.is_empty()) {
        let request = request.replace("{ns}", &format!("/namespaces/{namespace}"));
        assert_eq!(answer(client, &request).await, 403, "{request}");
    }
}

/// What no operator has any business with, wherever it looks after resources.
const NEVER: &str = "
    GET /api/v1/secrets
    GET /api/v1{ns}/secrets
    GET /api/v1{ns}/secrets?watch=true
    POST /api/v1{ns}/secrets
    PATCH /api/v1{ns}/secrets/another?fieldManager=test
    PUT /api/v1{ns}/secrets/meander-operator-tls
    DELETE /api/v1{ns}/secrets/meander-operator-tls
    POST /api/v1{ns}/pods
    PATCH /api/v1{ns}/pods/any
    DELETE /api/v1{ns}/pods/any
    DELETE /api/v1{ns}/pods
    GET /api/v1{ns}/pods/any/log
    POST /api/v1{ns}/pods/any/exec
    POST /api/v1{ns}/pods/any/eviction
    POST /api/v1{ns}/serviceaccounts/any/token
    GET /apis/coordination.k8s.io/v1{ns}/leases
    GET /apis/coordination.k8s.io/v1{ns}/leases/another
    PUT /apis/coordination.k8s.io/v1{ns}/leases/another
    DELETE /apis/coordination.k8s.io/v1{ns}/leases/meander-operator
    POST /apis/meander.dev/v1alpha1{ns}/cdcpipelines
    POST /apis/meander.dev/v1alpha1{ns}/replayjobs
    DELETE /apis/meander.dev/v1alpha1{ns}/cdcpipelines/any
    POST /apis/apps/v1{ns}/daemonsets
    POST /apis/apps/v1{ns}/statefulsets
    POST /apis/rbac.authorization.k8s.io/v1{ns}/roles
    POST /apis/rbac.authorization.k8s.io/v1{ns}/rolebindings
    POST /apis/rbac.authorization.k8s.io/v1/clusterrolebindings
    PATCH /apis/rbac.authorization.k8s.io/v1/clusterroles/meander-operator?fieldManager=test
    PATCH /apis/apiextensions.k8s.io/v1/customresourcedefinitions/cdcpipelines.meander.dev?fieldManager=test
    GET /api/v1/nodes
    GET /api/v1/namespaces
    GET /api/v1{ns}/persistentvolumeclaims
";

/// What one that looks after a single namespace has no business with in others.
const ELSEWHERE: &str = "
    GET /api/v1{ns}/secrets/any
    GET /api/v1{ns}/pods
    GET /api/v1{ns}/configmaps/any
    POST /apis/apps/v1{ns}/deployments
    POST /apis/batch/v1{ns}/jobs
    POST /api/v1{ns}/configmaps
    GET /apis/meander.dev/v1alpha1{ns}/cdcpipelines
    GET /apis/meander.dev/v1alpha1/cdcpipelines
    GET /apis/meander.dev/v1alpha1/replayjobs
    GET /apis/apps/v1/deployments
    GET /apis/batch/v1/jobs
    PATCH /apis/meander.dev/v1alpha1{ns}/cdcpipelines/any/status?fieldManager=test
    POST /apis/events.k8s.io/v1{ns}/events
";

#[tokio::test(flavor = "multi_thread")]
async fn the_operator_may_do_nothing_but_its_part() {
    let cluster = Cluster::new().await;
    // One that looks after this namespace, and one in another that looks after all.
    let narrow = &cluster.operator;
    all_are_refused(narrow, NEVER, &cluster.namespace).await;
    all_are_refused(narrow, ELSEWHERE, "default").await;

    let system = format!("{}-system", cluster.namespace);
    let body = serde_json::from_value(json!({"metadata": {"name": system}})).unwrap();
    let namespaces = Api::<Namespace>::all(cluster.client.clone());
    namespaces.create(&PostParams::default(), &body).await.unwrap();
    let wide = operator_of(&cluster.client, cluster.kubeconfig(), &system, false).await;
    for namespace in [&system, &cluster.namespace] {
        all_are_refused(&wide, NEVER, namespace).await;
    }
    // Its own Secret and Lease are in its own namespace alone.
    let elsewhere = "
        PATCH /api/v1{ns}/secrets/meander-operator-tls?fieldManager=test
        POST /apis/coordination.k8s.io/v1{ns}/leases
    ";
    all_are_refused(&wide, elsewhere, &cluster.namespace).await;
    // It looks after all of them indeed.
    let all = ListParams::default();
    Api::<CdcPipeline>::all(wide.clone()).list(&all).await.unwrap();
    Api::<ReplayJob>::all(wide.clone()).list(&all).await.unwrap();
    Api::<Deployment>::all(wide.clone()).list(&all).await.unwrap();
    let secrets = Api::<Secret>::namespaced(wide.clone(), &cluster.namespace);
    assert!(secrets.get_opt("any").await.unwrap().is_none());
}

#[tokio::test(flavor = "multi_thread")]
async fn a_runtime_pod_may_do_nothing_at_all() {
    let cluster = Cluster::new().await;
    let account = json!({"metadata": {"name": "trades-capture"}});
    let account: ServiceAccount = cluster.create(account).await;
    // The token that it holds is the operator's to check: the API server does not even take it for one of its own.
    let held = cluster.pod_and_token("pod", "trades-capture", json!({})).await;
    let pod = holder_of(&held, cluster.kubeconfig()).await;
    assert_eq!(answer(&pod, "GET /api").await, 401);

    // Should somebody mount another into it, the account has no role.
    let request = serde_json::from_value(json!({"spec": {"audiences": []}})).unwrap();
    let token = cluster
        .api::<ServiceAccount>()
        .create_token_request(&account.name_any(), &PostParams::default(), &request)
        .await
        .unwrap();
    let pod = holder_of(&token.status.unwrap().token, cluster.kubeconfig()).await;
    all_are_refused(&pod, NEVER, &cluster.namespace).await;
    all_are_refused(&pod, ELSEWHERE, &cluster.namespace).await;
    let review = serde_json::from_value(json!({"spec": {"namespace": cluster.namespace}})).unwrap();
    let review = Api::<SelfSubjectRulesReview>::all(pod)
        .create(&PostParams::default(), &review)
        .await
        .unwrap();
    // What everybody may: ask who they are and what they may.
    for rule in review.status.unwrap().resource_rules {
        let groups = rule.api_groups.unwrap_or_default();
        let harmless = ["authorization.k8s.io", "authentication.k8s.io"];
        assert!(
            groups.iter().all(|group| harmless.contains(&group.as_str())),
            "{groups:?}"
        );
    }
}

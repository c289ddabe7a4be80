//! The certificate of the gRPC port, from its Secret to the pods that trust it.

use k8s_openapi::api::{
    apps::v1::Deployment,
    core::v1::{ConfigMap, Secret},
};
use kube::api::{DeleteParams, Patch, PatchParams, PostParams};
use meander_crds::CdcPipeline;
use meander_operator::{
    conditions::state,
    tls::{issued::renewed, served::Data},
};
use serde_json::json;
use tonic::transport::{Certificate, ClientTlsConfig, Endpoint};

use super::{Cluster, Operator, eventually, pipeline_json};

const DAY: i64 = 86_400;

/// What the operator would have made on some other day, for where the tests call it.
fn issued(before: Option<&Data>, days: i64) -> Data {
    let now = jiff::Timestamp::now().as_second() + days * DAY;
    renewed(before, &["127.0.0.1".to_owned()], now).unwrap().unwrap()
}

fn authorities(data: &Data) -> String {
    String::from_utf8(data["ca.crt"].0.clone()).unwrap()
}

async fn create(cluster: &Cluster, name: &str, data: &Data) {
    let secret = json!({"metadata": {"name": name}, "type": "kubernetes.io/tls", "data": data});
    cluster.create::<Secret>(secret).await;
}

/// Whether who trusts these authorities can call the operator.
async fn is_known(operator: &Operator, authorities: &str) -> bool {
    let tls = ClientTlsConfig::new().ca_certificate(Certificate::from_pem(authorities));
    let endpoint = Endpoint::from_shared(format!("https://{}", operator.grpc)).unwrap();
    endpoint.tls_config(tls).unwrap().connect().await.is_ok()
}

/// The first and the last line of what `/readyz` answers.
async fn readiness(operator: &Operator) -> Option<String> {
    let answer = operator.get("/readyz").await?;
    Some(format!("{} {}", answer.lines().next()?, answer.lines().last()?))
}

#[tokio::test(flavor = "multi_thread")]
async fn a_new_authority_reaches_pods_that_stay_and_the_next_certificate_is_shown_without_a_restart() {
    let cluster = Cluster::new().await;
    cluster.secrets().await;
    cluster.create::<CdcPipeline>(pipeline_json("trades")).await;
    // The authority is near its end; what it signed last is not.
    let old = issued(Some(&issued(None, -555)), -10);
    create(&cluster, "meander-operator-tls", &old).await;
    let operator = Operator::start_at(&cluster, "https", &[]);
    let trusted = async || {
        let found = cluster.api::<ConfigMap>().get_opt("trades-capture").await.unwrap();
        found
            .and_then(|found| found.data?.remove("operator-ca.crt"))
            .unwrap_or_default()
    };
    eventually("pods trust the old and the new authority", async || {
        let trusted = trusted().await;
        trusted.matches("BEGIN").count() == 2 && trusted.ends_with(&authorities(&old))
    })
    .await;
    let deployments = cluster.api::<Deployment>();
    eventually("there are pods", async || {
        deployments.get_opt("trades-capture").await.unwrap().is_some()
    })
    .await;
    let both = trusted().await;
    assert!(is_known(&operator, &both).await);
    assert!(is_known(&operator, &authorities(&old)).await, "a pod that lags behind");
    assert!(!is_known(&operator, &authorities(&issued(None, 0))).await, "a stranger");

    // Somebody wants no more of all that, while the pipeline's newest spec cannot be applied.
    let pipelines = cluster.api::<CdcPipeline>();
    let missing = json!({"spec": {"source": {"postgres": {"credentialsSecretRef": {"name": "missing"}}}}});
    pipelines
        .patch("trades", &PatchParams::default(), &Patch::Merge(missing))
        .await
        .unwrap();
    eventually("the other Secret is missed", async || {
        let status = pipelines.get("trades").await.unwrap().status.unwrap_or_default();
        state(&status.conditions, "Ready") == Some(("False", "SecretNotFound"))
    })
    .await;
    let secrets = cluster.api::<Secret>();
    secrets
        .delete("meander-operator-tls", &DeleteParams::default())
        .await
        .unwrap();
    eventually("pods trust another authority", async || trusted().await != both).await;
    assert!(is_known(&operator, &trusted().await).await);
    assert!(!is_known(&operator, &both).await, "the old certificate is still shown");
    let generation = deployments.get("trades-capture").await.unwrap().metadata.generation;
    assert_eq!(generation, Some(1), "the pods were replaced");

    // What somebody writes there meanwhile is not taken for the operator's own.
    let configs = cluster.api::<ConfigMap>();
    let asked = async || {
        let annotations = configs
            .get("trades-capture")
            .await
            .unwrap()
            .metadata
            .annotations
            .unwrap();
        annotations["meander.dev/applied-hash"].clone()
    };
    let before = asked().await;
    let edited = Patch::Merge(json!({"data": {"config.yaml": "edited"}}));
    configs
        .patch("trades-capture", &PatchParams::default(), &edited)
        .await
        .unwrap();
    let so_far = operator.reconciles().await;
    eventually("it was looked at twice", async || {
        operator.reconciles().await >= so_far + 2
    })
    .await;
    assert_eq!(asked().await, before);
    operator.stop().await;
}

#[tokio::test(flavor = "multi_thread")]
async fn without_the_certificate_that_somebody_else_makes_the_operator_is_not_ready() {
    let cluster = Cluster::new().await;
    let more = ["--tls-management", "external", "--tls-secret", "theirs"];
    let operator = Operator::start_at(&cluster, "https", &more);
    let says = async |words: &str| {
        let found = readiness(&operator).await.unwrap_or_default();
        found.starts_with("HTTP/1.1 503") && found.contains(words)
    };
    eventually("it is not ready", async || says("no certificate").await).await;
    let mut theirs = issued(None, 0);
    let bundle = theirs
        .insert("ca.crt".to_owned(), issued(None, 0)["ca.crt"].clone())
        .unwrap();
    create(&cluster, "theirs", &theirs).await;
    theirs.insert("ca.crt".to_owned(), bundle);
    let secrets = cluster.api::<Secret>();
    let mut secret = secrets.get("theirs").await.unwrap();
    secret.data = Some(theirs.clone());
    secrets
        .replace("theirs", &PostParams::default(), &secret)
        .await
        .unwrap();
    eventually("it is ready", async || {
        readiness(&operator)
            .await
            .is_some_and(|found| found.starts_with("HTTP/1.1 200"))
    })
    .await;
    assert!(is_known(&operator, &authorities(&theirs)).await);
    let left = secrets.get("theirs").await.unwrap().data.unwrap();
    assert!(left == theirs, "it is not the operator's to write");
    operator.stop().await;
}

//! A new image of the runtime, which comes with a new operator.

use k8s_openapi::api::{apps::v1::Deployment, networking::v1::NetworkPolicy};
use kube::{ResourceExt as _, api::ListParams};
use meander_crds::CdcPipeline;

use super::{Cluster, Operator, eventually, pipeline_json};

const NEW: [&str; 4] = ["--runtime-image", "meander-runtime:new", "--metrics-from", "[]"];

/// The Deployments whose next pod has this image.
async fn with(cluster: &Cluster, image: &str) -> Vec<String> {
    let all = cluster.api::<Deployment>().list(&ListParams::default()).await.unwrap();
    let with = all.into_iter().filter(|deployment| {
        let template = &deployment.spec.as_ref().unwrap().template;
        template.spec.as_ref().unwrap().containers[0].image.as_deref() == Some(image)
    });
    with.map(|deployment| deployment.name_any()).collect()
}

#[tokio::test(flavor = "multi_thread")]
async fn an_image_that_does_not_start_ends_one_capture_and_not_all() {
    let cluster = Cluster::new().await;
    cluster.secrets().await;
    let names = ["one", "two", "three"];
    for name in names {
        cluster.create::<CdcPipeline>(pipeline_json(name)).await;
    }
    let pipelines = cluster.api::<CdcPipeline>();
    let says = async |name: &str, type_: &str, words: &str| {
        let status = pipelines.get(name).await.unwrap().status.unwrap_or_default();
        let found = status.conditions.iter().find(|condition| condition.type_ == type_);
        found.is_some_and(|condition| condition.message.contains(words))
    };
    let operator = Operator::start(&cluster);
    eventually("there are pods", async || {
        with(&cluster, "meander-runtime:test").await.len() == names.len()
    })
    .await;
    for name in names {
        cluster.make_available(&format!("{name}-capture")).await;
        eventually("they are ready", async || {
            says(name, "RuntimeAvailable", "The runtime's pod is ready.").await
        })
        .await;
    }
    operator.stop().await;

    let operator = Operator::start_at(&cluster, "http", &NEW);
    eventually("one tries it", async || with(&cluster, NEW[1]).await.len() == 1).await;
    let first = with(&cluster, NEW[1]).await.remove(0);
    let first = first.strip_suffix("-capture").unwrap();
    for name in names.into_iter().filter(|name| *name != first) {
        let waits = format!("pipeline {}/{first} tries it first", cluster.namespace);
        eventually("the others wait for it", async || {
            says(name, "RuntimeAvailable", &waits).await
        })
        .await;
    }
    eventually("what is around their pods is kept all the same", async || {
        let policies = cluster
            .api::<NetworkPolicy>()
            .list(&ListParams::default())
            .await
            .unwrap();
        policies.items.len() == names.len()
    })
    .await;
    assert_eq!(with(&cluster, NEW[1]).await.len(), 1);
    cluster.make_available(&format!("{first}-capture")).await;
    eventually("the others follow", async || {
        with(&cluster, NEW[1]).await.len() == names.len()
    })
    .await;
    operator.stop().await;
}

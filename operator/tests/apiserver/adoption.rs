//! An operator that comes to what another one has left, and what people did to it meanwhile.

use k8s_openapi::api::{
    apps::v1::Deployment,
    batch::v1::Job,
    core::v1::{ConfigMap, ServiceAccount},
    policy::v1::PodDisruptionBudget,
};
use kube::{
    Resource as _, ResourceExt as _,
    api::{DeleteParams, Patch, PatchParams},
};
use meander_crds::{CdcPipeline, ReplayJob};
use serde_json::{Value, json};

use super::{Cluster, Operator, eventually, merged, pipeline_json, replay_json};

fn retained(name: &str) -> Value {
    let change = json!({"spec": {"source": {"postgres": {"slot": {"reclaimPolicy": "Retain"}}}}});
    merged(pipeline_json(name), &change)
}

fn replay(name: &str) -> Value {
    let change = json!({"metadata": {"name": name}, "spec": {"pipelineRef": {"name": "changed"}}});
    merged(replay_json("replayjob-log.yaml"), &change)
}

#[tokio::test(flavor = "multi_thread")]
async fn what_was_done_while_no_operator_was_there_is_put_right_or_carried_out() {
    let cluster = Cluster::new().await;
    cluster.secrets().await;
    let pipelines = cluster.api::<CdcPipeline>();
    let replays = cluster.api::<ReplayJob>();
    let deployments = cluster.api::<Deployment>();
    let jobs = cluster.api::<Job>();
    let configs = cluster.api::<ConfigMap>();
    let accounts = cluster.api::<ServiceAccount>();
    let budgets = cluster.api::<PodDisruptionBudget>();
    let all_there = async |captures: &[&str], runs: &[&str]| {
        for name in captures {
            if deployments.get_opt(&format!("{name}-capture")).await.unwrap().is_none() {
                return false;
            }
        }
        for name in runs {
            if jobs.get_opt(&format!("{name}-replay")).await.unwrap().is_none() {
                return false;
            }
        }
        true
    };
    for name in ["changed", "bereft", "unwanted"] {
        cluster.create::<CdcPipeline>(retained(name)).await;
    }
    for name in ["bereft", "runs", "unwanted"] {
        cluster.create::<ReplayJob>(replay(name)).await;
    }
    let operator = Operator::start(&cluster);
    eventually("everything is made", async || {
        all_there(&["changed", "bereft", "unwanted"], &["bereft", "runs", "unwanted"]).await
    })
    .await;
    operator.stop().await;

    let params = PatchParams::default();
    let background = DeleteParams::background();
    let theirs = json!({"spec": {"replicas": 5, "template": {"spec": {"containers": [{"name": "capture", "image": "theirs"}]}}}});
    deployments
        .patch("changed-capture", &params, &Patch::Strategic(theirs))
        .await
        .unwrap();
    let louder = Patch::Merge(json!({"spec": {"runtime": {"logLevel": "Debug"}}}));
    let changed = pipelines.patch("changed", &params, &louder).await.unwrap();
    let orphan = json!({
        "metadata": {
            "name": "changed-capture",
            "labels": {"app.kubernetes.io/managed-by": "meander-operator", "meander.dev/pipeline": "changed"},
            "ownerReferences": [changed.controller_owner_ref(&()).unwrap()],
        },
        "spec": {"minAvailable": 1, "selector": {"matchLabels": {"meander.dev/pipeline": "changed"}}},
    });
    cluster.create::<PodDisruptionBudget>(orphan).await;
    deployments.delete("bereft-capture", &background).await.unwrap();
    configs.delete("bereft-capture", &background).await.unwrap();
    accounts.delete("bereft-capture", &background).await.unwrap();
    jobs.delete("bereft-replay", &background).await.unwrap();
    let before = configs.get("runs-replay").await.unwrap();
    let job = jobs.get("runs-replay").await.unwrap();
    configs.delete("runs-replay", &background).await.unwrap();
    pipelines.delete("unwanted", &background).await.unwrap();
    replays.delete("unwanted", &background).await.unwrap();
    cluster.create::<CdcPipeline>(retained("new")).await;
    cluster.create::<ReplayJob>(replay("new")).await;

    let operator = Operator::start(&cluster);
    eventually("what was missing is there, and what was new", async || {
        all_there(&["changed", "bereft", "new"], &["bereft", "runs", "new"]).await
            && accounts.get_opt("bereft-capture").await.unwrap().is_some()
            && configs.get_opt("bereft-capture").await.unwrap().is_some()
    })
    .await;
    eventually("the replay that runs has its configuration again", async || {
        let found = configs.get_opt("runs-replay").await.unwrap();
        found.is_some_and(|found| found.uid() != before.uid())
    })
    .await;
    let goes_on = jobs.get("runs-replay").await.unwrap();
    assert_eq!(goes_on.uid(), job.uid(), "it was begun once more");
    eventually(
        "the Deployment is as the newest spec says, and nothing more",
        async || {
            let spec = deployments.get("changed-capture").await.unwrap().spec.unwrap();
            let container = spec.template.spec.unwrap().containers.remove(0);
            let level = container.env.into_iter().flatten().find_map(|variable| variable.value);
            let seen = (spec.replicas, container.image.as_deref(), level.as_deref());
            seen == (Some(1), Some("meander-runtime:test"), Some("debug"))
                && budgets.get_opt("changed-capture").await.unwrap().is_none()
        },
    )
    .await;
    eventually("what was deleted goes", async || {
        pipelines.get_opt("unwanted").await.unwrap().is_none()
    })
    .await;
    operator.stop().await;
}

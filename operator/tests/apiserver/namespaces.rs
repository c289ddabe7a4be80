//! A namespace that is deleted with all that is in it. No controller empties it here, so the test does.

use k8s_openapi::api::{
    apps::v1::Deployment,
    batch::v1::Job,
    core::v1::{ConfigMap, Namespace},
};
use kube::{
    Api,
    api::{DeleteParams, PostParams},
};
use meander_crds::{CdcPipeline, ReplayJob};
use meander_operator::conditions::state;
use serde_json::json;

use super::{Cluster, Operator, eventually, pipeline_json, replay_json};

#[tokio::test(flavor = "multi_thread")]
async fn a_namespace_that_is_deleted_is_held_up_by_nothing() {
    let cluster = Cluster::new().await;
    cluster.secrets().await;
    let operator = Operator::start(&cluster);
    cluster.create::<CdcPipeline>(pipeline_json("trades")).await;
    cluster.create::<ReplayJob>(replay_json("replayjob-log.yaml")).await;
    let deployments = cluster.api::<Deployment>();
    let jobs = cluster.api::<Job>();
    eventually("everything is made", async || {
        deployments.get_opt("trades-capture").await.unwrap().is_some()
            && jobs.get_opt("to-log-replay").await.unwrap().is_some()
    })
    .await;

    let background = DeleteParams::background();
    Api::<Namespace>::all(cluster.client.clone())
        .delete(&cluster.namespace, &background)
        .await
        .unwrap();
    let dry = PostParams {
        dry_run: true,
        ..PostParams::default()
    };
    let any: ConfigMap = serde_json::from_value(json!({"metadata": {"name": "any"}})).unwrap();
    eventually("nothing new is taken", async || {
        cluster.api::<ConfigMap>().create(&dry, &any).await.is_err()
    })
    .await;
    // It does not go at once: what is missed meanwhile is not made again, and said.
    deployments.delete("trades-capture", &background).await.unwrap();
    jobs.delete("to-log-replay", &background).await.unwrap();
    let pipelines = cluster.api::<CdcPipeline>();
    let replays = cluster.api::<ReplayJob>();
    eventually("why nothing is made is said", async || {
        let pipeline = pipelines.get("trades").await.unwrap().status.unwrap_or_default();
        let replay = replays.get("to-log").await.unwrap().status.unwrap_or_default();
        state(&pipeline.conditions, "Ready") == Some(("False", "NamespaceTerminating"))
            && state(&replay.conditions, "Accepted") == Some(("False", "NamespaceTerminating"))
    })
    .await;

    pipelines.delete("trades", &background).await.unwrap();
    replays.delete("to-log", &background).await.unwrap();
    eventually("both are gone", async || {
        pipelines.get_opt("trades").await.unwrap().is_none() && replays.get_opt("to-log").await.unwrap().is_none()
    })
    .await;
    operator.stop().await;
}

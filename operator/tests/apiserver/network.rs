//! Who may connect to the pods.

use k8s_openapi::api::networking::v1::NetworkPolicy;
use meander_crds::{CdcPipeline, ReplayJob};

use super::{Cluster, Operator, eventually, pipeline_json, replay_json};

#[tokio::test(flavor = "multi_thread")]
async fn policies_come_with_the_chart_s_value_and_go_with_it() {
    let cluster = Cluster::new().await;
    cluster.secrets().await;
    cluster.secret("replay-token", &["token"]).await;
    cluster.create::<CdcPipeline>(pipeline_json("trades")).await;
    cluster.create::<ReplayJob>(replay_json("replayjob-serve.yaml")).await;
    let ports = async |name: &str| {
        let policy = cluster.api::<NetworkPolicy>().get_opt(name).await.unwrap()?;
        let rules = policy.spec?.ingress.unwrap_or_default();
        let ports = rules.iter().flat_map(|rule| rule.ports.iter().flatten());
        Some(
            ports
                .map(|port| serde_json::to_string(&port.port).unwrap())
                .collect::<Vec<_>>(),
        )
    };
    let open = |ports: &[&str]| Some(ports.iter().map(|port| (*port).to_owned()).collect::<Vec<_>>());
    for (more, pipeline, replay) in [
        (
            &["--metrics-from", r#"[{"namespaceSelector": {}}]"#][..],
            open(&["9464"]),
            open(&["9464", "50052"]),
        ),
        (&["--metrics-from", "[]"], open(&[]), open(&["50052"])),
        (&[], None, None),
    ] {
        let operator = Operator::start_at(&cluster, "http", more);
        eventually("the policies are as asked", async || {
            ports("trades-capture").await == pipeline && ports("served-replay").await == replay
        })
        .await;
        operator.stop().await;
    }
}

//! What the chart renders: that it is accepted, and that its parts fit each other, the operator and the documentation.
//!
//! `helm` and `kubectl` are those of `tests/setup.sh`.
#![allow(missing_docs, clippy::unwrap_used, clippy::expect_used, clippy::panic)]

mod support;

use std::{
    collections::{BTreeMap, BTreeSet},
    fs,
    io::Write as _,
    path::{Path, PathBuf},
    process::{Command, Stdio},
};

use kube::{Client, Config, config::KubeConfigOptions};
use meander_operator::{
    check, naming,
    pipeline::{self, dereference::Facts},
};
use serde_json::{Map, Value, json};
use support::{apiserver::ApiServer, eventually};

fn root() -> PathBuf {
    Path::new(env!("CARGO_MANIFEST_DIR")).join("..")
}

fn file(path: &str) -> String {
    fs::read_to_string(root().join(path)).unwrap()
}

/// What `helm template` makes of the chart.
fn rendered(release: &str, sets: &[&str]) -> Result<String, String> {
    let mut helm = Command::new("helm");
    // A Helm that was built from its module knows no version of Kubernetes of its own.
    helm.args([
        "template",
        release,
        "charts/meander",
        "--namespace",
        "meander-system",
        "--kube-version",
        "1.30",
    ])
    .current_dir(root());
    for set in sets {
        helm.args(["--set", set]);
    }
    let output = helm.output().unwrap();
    let text = |bytes: Vec<u8>| String::from_utf8(bytes).unwrap();
    if output.status.success() {
        Ok(text(output.stdout))
    } else {
        Err(text(output.stderr))
    }
}

fn manifests(sets: &[&str]) -> Vec<Value> {
    serde_saphyr::from_multiple(&rendered("meander", sets).unwrap()).unwrap()
}

fn of_kind<'a>(manifests: &'a [Value], kind: &str) -> Vec<&'a Value> {
    manifests.iter().filter(|manifest| manifest["kind"] == kind).collect()
}

/// Whether a selector's labels are among those of an object.
fn selects(selector: &Value, labels: &Value) -> bool {
    let selector = selector.as_object().unwrap();
    !selector.is_empty() && selector.iter().all(|(key, value)| &labels[key] == value)
}

/// Runs a command of the shell against the API server.
fn shell(server: &ApiServer, command: &str, input: &str) {
    let mut child = Command::new("bash")
        .args(["-euo", "pipefail", "-c", command])
        .current_dir(root())
        .env("KUBECONFIG", server.folder.join("kubeconfig"))
        .stdin(Stdio::piped())
        .stdout(Stdio::null())
        .spawn()
        .unwrap();
    child.stdin.take().unwrap().write_all(input.as_bytes()).unwrap();
    assert!(child.wait().unwrap().success(), "{command}\n{input}");
}

/// Really applied, since a dry run knows nothing of what comes before: a pod's ServiceAccount has to be there.
#[test]
fn every_form_of_the_chart_is_accepted_by_the_api_server_and_one_that_would_fight_another_is_not() {
    let server = ApiServer::shared();
    let crds = std::env::var("PROMETHEUS_CRDS").expect("run `eval \"$(tests/setup.sh env)\"` first");
    shell(&server, &format!("kubectl apply --server-side -f '{crds}'"), "");
    shell(&server, "kubectl wait --for=condition=Established crd --all", "");
    shell(
        &server,
        "kubectl create namespace meander-system; kubectl create namespace shop",
        "",
    );
    let forms: [&[&str]; 5] = [
        &[],
        &[
            "replicas=2",
            "watchNamespace=shop",
            "prometheus.monitors.enabled=true",
            "prometheus.rules.enabled=true",
        ],
        &[
            "imagePullSecrets[0].name=registry",
            "registry=registry.local:5000/mirror",
            "image.tag=v1",
            "tls.secretName=cert-manager-made",
            "networkPolicy.enabled=false",
        ],
        &[
            "prometheus.monitors.enabled=true",
            "prometheus.monitors.labels.release=prometheus",
            "prometheus.rules.labels.a=b",
        ],
        &[
            "priorityClassName=system-cluster-critical",
            "tolerations[0].operator=Exists",
            "nodeSelector.disk=ssd",
            "podLabels.team=data",
            "podAnnotations.note=text",
            "networkPolicy.metricsFrom[0].ipBlock.cidr=10.0.0.0/8",
            "networkPolicy.grpcFrom=null",
            "tracing.endpoint=http://collector:4317",
        ],
    ];
    for (number, form) in forms.iter().enumerate() {
        let manifests = rendered(&format!("form-{number}"), form).unwrap();
        shell(
            &server,
            "kubectl apply --server-side --validate=strict -f -",
            &manifests,
        );
    }

    // One of them looks after the namespace `shop`, the others after all.
    let beside = |release: &str, watch: &str| {
        let output = Command::new("helm")
            .args(["install", release, "charts/meander", "--namespace", "meander-system"])
            .args([
                "--dry-run=server",
                "--skip-crds",
                "--set",
                &format!("watchNamespace={watch}"),
            ])
            .current_dir(root())
            .env("KUBECONFIG", server.folder.join("kubeconfig"))
            .output()
            .unwrap();
        String::from_utf8(output.stderr).unwrap()
    };
    let only_shop = "kubectl -n meander-system delete deployment \
        form-0-meander-operator form-2-meander-operator form-3-meander-operator form-4-meander-operator";
    let refused = beside("second", "other");
    assert!(refused.contains("looks after all namespaces already"), "{refused}");
    shell(&server, only_shop, "");
    for watch in ["", "shop"] {
        let refused = beside("second", watch);
        assert!(
            refused.contains("looks after the namespace shop already"),
            "{watch}: {refused}"
        );
    }
    let accepted = beside("second", "other");
    assert!(!accepted.contains("already"), "{accepted}");
}

#[tokio::test]
async fn definitions_that_are_too_old_are_found_and_upgraded_as_the_documentation_says() {
    let server = tokio::task::spawn_blocking(ApiServer::shared).await.unwrap();
    let config = Config::from_custom_kubeconfig(server.kubeconfig(), &KubeConfigOptions::default())
        .await
        .unwrap();
    let client = Client::try_from(config).unwrap();
    let problem = check::definitions(&client).await.unwrap_err().to_string();
    assert!(
        problem.starts_with("the API server does not serve meander.dev/v1alpha1"),
        "{problem}"
    );

    // As Helm left them, at a version that lacked a field.
    shell(
        &server,
        "kubectl create --field-manager=helm -f charts/meander/crds/replayjobs.yaml",
        "",
    );
    let mut older: Value = serde_saphyr::from_str(&file("crds/cdcpipelines.yaml")).unwrap();
    let spec = "/spec/versions/0/schema/openAPIV3Schema/properties/spec/properties";
    let fields = older.pointer_mut(spec).unwrap().as_object_mut().unwrap();
    fields.remove("onSourceGap").unwrap();
    shell(&server, "kubectl create --field-manager=helm -f -", &older.to_string());
    eventually("what is lacking is said", async || {
        let problem = check::definitions(&client).await.unwrap_err().to_string();
        problem.contains("drops 1 fields") && problem.contains("such as CdcPipeline.spec.onSourceGap:")
    })
    .await;

    let documentation = file("docs/installation.md");
    let line = documentation
        .lines()
        .map(str::trim)
        .find(|line| line.starts_with("kubectl apply") && line.contains("<chart>"));
    shell(&server, &line.unwrap().replace("<chart>", "charts/meander"), "");
    eventually("nothing is lacking", async || check::definitions(&client).await.is_ok()).await;
}

#[test]
fn every_image_comes_from_the_one_registry_and_every_pod_has_its_credentials() {
    let manifests = manifests(&[
        "registry=registry.local:5000/mirror",
        "imagePullSecrets[0].name=one",
        "imagePullSecrets[1].name=two",
    ]);
    let [deployment] = of_kind(&manifests, "Deployment")[..] else {
        panic!("one operator")
    };
    let [check] = of_kind(&manifests, "Pod")[..] else {
        panic!("one check")
    };
    for pod in [&deployment["spec"]["template"]["spec"], &check["spec"]] {
        let image = pod["containers"][0]["image"].as_str().unwrap();
        assert!(
            image.starts_with("registry.local:5000/mirror/meander-operator:"),
            "{image}"
        );
        assert_eq!(pod["imagePullSecrets"], json!([{"name": "one"}, {"name": "two"}]));
    }
    let environment = deployment["spec"]["template"]["spec"]["containers"][0]["env"]
        .as_array()
        .unwrap();
    let of = |name: &str| {
        environment.iter().find(|entry| entry["name"] == name).unwrap()["value"]
            .as_str()
            .unwrap()
    };
    assert!(of("RUNTIME_IMAGE").starts_with("registry.local:5000/mirror/meander-runtime:"));
    let mut settings = support::settings();
    settings.runtime_image_pull_secrets = of("RUNTIME_IMAGE_PULL_SECRETS").split(',').map(str::to_owned).collect();
    let pod = &capture(&settings)["spec"]["template"]["spec"];
    assert_eq!(pod["imagePullSecrets"], json!([{"name": "one"}, {"name": "two"}]));
}

#[test]
fn the_check_of_helm_test_is_let_in_whoever_else_is() {
    for metrics_from in [
        "networkPolicy.metricsFrom=null",
        "networkPolicy.metricsFrom[0].ipBlock.cidr=10.0.0.0/8",
    ] {
        let manifests = manifests(&[metrics_from]);
        let [policy] = of_kind(&manifests, "NetworkPolicy")[..] else {
            panic!("one policy")
        };
        let [check] = of_kind(&manifests, "Pod")[..] else {
            panic!("one check")
        };
        let rules = policy["spec"]["ingress"].as_array().unwrap();
        let admin = rules.iter().find(|rule| rule["ports"][0]["port"] == "admin").unwrap();
        let labels = &check["metadata"]["labels"];
        let lets_in = |peer: &Value| {
            peer.get("namespaceSelector").is_none()
                && peer
                    .get("podSelector")
                    .is_some_and(|pods| selects(&pods["matchLabels"], labels))
        };
        assert!(admin["from"].as_array().unwrap().iter().any(lets_in), "{metrics_from}");
    }
}

/// The Deployment of a pipeline's capture.
fn capture(settings: &meander_operator::context::Settings) -> Value {
    let facts = Facts {
        secrets: Some(support::keys()),
        ..Facts::default()
    };
    let pipeline = support::pipeline();
    let valid = pipeline::validate::validate(&pipeline, &facts, settings).unwrap();
    serde_json::to_value(pipeline::build::build(&pipeline, &valid, settings).deployment).unwrap()
}

#[test]
fn monitors_find_the_operator_and_the_pods_that_capture() {
    assert!(!rendered("meander", &[]).unwrap().contains("monitoring.coreos.com"));
    let manifests = manifests(&[
        "prometheus.monitors.enabled=true",
        "prometheus.monitors.labels.release=main",
    ]);
    let [monitor] = of_kind(&manifests, "ServiceMonitor")[..] else {
        panic!("one monitor")
    };
    let [service] = of_kind(&manifests, "Service")[..] else {
        panic!("one service")
    };
    let [deployment] = of_kind(&manifests, "Deployment")[..] else {
        panic!("one operator")
    };
    assert!(selects(
        &monitor["spec"]["selector"]["matchLabels"],
        &service["metadata"]["labels"]
    ));
    let template = &deployment["spec"]["template"];
    assert!(selects(&service["spec"]["selector"], &template["metadata"]["labels"]));
    let ports = service["spec"]["ports"].as_array().unwrap();
    let port = ports
        .iter()
        .find(|port| port["name"] == monitor["spec"]["endpoints"][0]["port"])
        .unwrap();
    let of_pod = template["spec"]["containers"][0]["ports"].as_array().unwrap();
    assert!(of_pod.iter().any(|of_pod| of_pod["name"] == port["targetPort"]));

    let [monitor] = of_kind(&manifests, "PodMonitor")[..] else {
        panic!("one monitor")
    };
    let template = &capture(&support::settings())["spec"]["template"];
    assert!(selects(
        &monitor["spec"]["selector"]["matchLabels"],
        &template["metadata"]["labels"]
    ));
    let endpoint = &monitor["spec"]["podMetricsEndpoints"][0];
    assert_eq!(endpoint["port"], template["spec"]["containers"][0]["ports"][0]["name"]);
    for (number, label) in [naming::PIPELINE_LABEL, naming::REPLAY_LABEL].into_iter().enumerate() {
        let label = format!("__meta_kubernetes_pod_label_{}", label.replace(['.', '/'], "_"));
        assert_eq!(endpoint["relabelings"][number]["sourceLabels"], json!([label]));
    }
    for kind in ["ServiceMonitor", "PodMonitor"] {
        assert_eq!(of_kind(&manifests, kind)[0]["metadata"]["labels"]["release"], "main");
    }
}

#[test]
fn every_alert_can_be_read_and_has_a_runbook() {
    let manifests = manifests(&["prometheus.rules.enabled=true"]);
    let [rule] = of_kind(&manifests, "PrometheusRule")[..] else {
        panic!("one rule")
    };
    let documentation = file("docs/operations.md");
    let sections: BTreeSet<&str> = documentation
        .lines()
        .filter_map(|line| line.strip_prefix("### Meander"))
        .collect();
    let mut alerts = BTreeSet::new();
    for alert in rule["spec"]["groups"][0]["rules"].as_array().unwrap() {
        let name = alert["alert"].as_str().unwrap().strip_prefix("Meander").unwrap();
        let expression = alert["expr"].as_str().unwrap();
        promql_parser::parser::parse(expression).unwrap_or_else(|error| panic!("{name}: {error}"));
        let page = "https://github.com/meander-dev/meander/blob/main/docs/operations.md";
        let section = format!("{page}#meander{}", name.to_lowercase());
        assert_eq!(alert["annotations"]["runbook_url"], section, "{name}");
        assert!(alerts.insert(name), "two alerts {name}");
    }
    assert_eq!(alerts, sections, "alerts, and sections of docs/operations.md");
}

/// What is registered is compared with docs/observability.md where it is registered.
#[test]
fn every_metric_that_alerts_and_documentation_name_is_in_the_specification() {
    let metrics = |text: &str| -> BTreeSet<String> {
        text.split(|letter: char| !(letter.is_ascii_alphanumeric() || letter == '_'))
            .filter(|word| {
                ["operator", "capture", "replay"]
                    .iter()
                    .any(|part| word.starts_with(&format!("meander_{part}_")))
            })
            // Beginnings of names, and what is numbered: slots, origins.
            .filter(|word| !word.ends_with('_') && !word.contains(|letter: char| letter.is_ascii_digit()))
            .map(str::to_owned)
            .collect()
    };
    let specification = file("docs/observability.md");
    let known: BTreeSet<&str> = specification
        .lines()
        .filter_map(|line| line.strip_prefix("| `")?.split('`').next())
        .collect();
    let pages = fs::read_dir(root().join("docs"))
        .unwrap()
        .map(|entry| entry.unwrap().path())
        .filter(|path| path.is_file());
    for path in pages.chain([
        root().join("charts/meander/files/alerts.yaml"),
        root().join("README.md"),
    ]) {
        for metric in metrics(&fs::read_to_string(&path).unwrap()) {
            assert!(known.contains(metric.as_str()), "{} names {metric}", path.display());
        }
    }
}

/// Where a person writes something: the fields of the values and of their schema, by path.
fn paths(
    prefix: &str,
    fields: &Map<String, Value>,
    inner: &dyn Fn(&Value) -> Option<Map<String, Value>>,
) -> BTreeMap<String, Value> {
    let mut out = BTreeMap::new();
    for (name, field) in fields {
        let path = format!("{prefix}{name}");
        if let Some(fields) = inner(field) {
            out.extend(paths(&format!("{path}."), &fields, inner));
        } else {
            out.insert(path, field.clone());
        }
    }
    out
}

#[test]
fn every_value_is_in_the_schema_and_documented_and_a_mistyped_one_is_refused() {
    let schema: Value = serde_json::from_str(&file("charts/meander/values.schema.json")).unwrap();
    let values: Value = serde_saphyr::from_str(&file("charts/meander/values.yaml")).unwrap();
    let of_schema = |field: &Value| {
        let name = field["$ref"]
            .as_str()
            .and_then(|reference| reference.rsplit('/').next());
        let field = name.map_or(field, |name| &schema["definitions"][name]);
        field["properties"].as_object().cloned()
    };
    let of_values = |value: &Value| value.as_object().filter(|fields| !fields.is_empty()).cloned();
    let mut known = paths("", schema["properties"].as_object().unwrap(), &of_schema);
    // What Helm and charts above this one put there.
    known.remove("global").unwrap();
    let known: BTreeSet<String> = known
        .into_keys()
        .map(|path| {
            path.replace("resources.requests", "resources")
                .replace("resources.limits", "resources")
        })
        .collect();
    let written: BTreeSet<String> = paths("", values.as_object().unwrap(), &of_values)
        .into_keys()
        .map(|path| {
            if path.starts_with("resources.") {
                "resources".to_owned()
            } else {
                path
            }
        })
        .collect();
    assert_eq!(known, written);

    let text = file("charts/meander/values.yaml");
    let lines: Vec<&str> = text.lines().map(str::trim).collect();
    for (before, line) in lines.iter().zip(&lines[1..]) {
        if line.starts_with(char::is_alphabetic) && before.is_empty() {
            panic!("{line} has no comment");
        }
    }
    for mistake in [
        "replica=2",
        "replicas=two",
        "prometheus.rules.enable=true",
        "registry=",
        "image.pullPolicy=Sometimes",
        "logLevel=verbose",
        "logLevel=info;debug",
        "tracing.endpoint=collector:4317",
    ] {
        let refusal = rendered("meander", &[mistake]).unwrap_err();
        assert!(refusal.contains("values don't meet the specifications"), "{refusal}");
    }
    for level in ["debug", r"info\,meander_operator=debug", r"warn\,kube::client=trace"] {
        rendered("meander", &[&format!("logLevel={level}")]).unwrap();
    }
}

//! What is built from a spec, and what is refused.
#![allow(missing_docs, clippy::unwrap_used, clippy::expect_used, clippy::panic)]

mod support;

use meander_crds::{CdcPipeline, PipelineFormat, ReplayJob, SecretKeyReference, SecretReference};
use meander_operator::{error::Error, pipeline, replay, secrets::Keys};
use support::settings;

fn pipeline_facts() -> pipeline::dereference::Facts {
    pipeline::dereference::Facts {
        secrets: Some(support::keys()),
        ..Default::default()
    }
}

fn replay_facts() -> replay::dereference::Facts {
    replay::dereference::Facts {
        pipeline: Some(support::pipeline()),
        secrets: Some(support::keys()),
        ..Default::default()
    }
}

fn secret(name: &str) -> SecretReference {
    SecretReference { name: name.into() }
}

fn secret_key(name: &str, key: &str) -> SecretKeyReference {
    SecretKeyReference {
        name: name.into(),
        key: key.into(),
    }
}

#[test]
fn a_pipeline_becomes_a_deployment_and_what_it_needs() {
    let pipeline = support::pipeline();
    let valid = pipeline::validate::validate(&pipeline, &pipeline_facts(), &settings()).unwrap();
    let objects = pipeline::build::build(&pipeline, &valid, &settings());
    insta::assert_snapshot!("pipeline_config", valid.config_yaml);
    insta::assert_yaml_snapshot!("pipeline_service_account", objects.service_account);
    insta::assert_yaml_snapshot!("pipeline_config_map", objects.config_map);
    insta::assert_yaml_snapshot!("pipeline_deployment", objects.deployment);
    insta::assert_yaml_snapshot!("pipeline_network_policy", objects.network_policy);
}

#[test]
fn pods_that_run_tell_the_collector_of_traces_that_the_operator_tells() {
    let mut settings = settings();
    let endpoint = "http://collector.observability.svc:4317";
    settings.tracing = vec![("OTEL_EXPORTER_OTLP_ENDPOINT", endpoint.to_owned())];
    let pipeline = support::pipeline();
    let valid = pipeline::validate::validate(&pipeline, &pipeline_facts(), &settings).unwrap();
    let deployment = pipeline::build::build(&pipeline, &valid, &settings).deployment;
    let replay = support::replay("replayjob.yaml");
    let valid = replay::validate::validate(&replay, &replay_facts(), &settings).unwrap();
    let job = replay::build::build(&replay, &valid, &settings).job.unwrap();
    for pod in [deployment.spec.unwrap().template, job.spec.unwrap().template] {
        let variables = pod.spec.unwrap().containers.remove(0).env.unwrap();
        let has = |(name, value): (&str, &str)| {
            let mut found = variables.iter();
            found.any(|variable| variable.name == name && variable.value.as_deref() == Some(value))
        };
        assert!(has(("OTEL_EXPORTER_OTLP_ENDPOINT", endpoint)), "{variables:?}");
    }
}

#[test]
fn a_deleted_pipeline_becomes_a_job() {
    let pipeline = support::pipeline();
    let valid = pipeline::validate::validate(&pipeline, &pipeline_facts(), &settings()).unwrap();
    insta::assert_yaml_snapshot!(
        "cleanup_job",
        pipeline::build::build_cleanup(&pipeline, &valid, &settings()).job
    );
}

#[test]
fn every_setting_reaches_the_pod() {
    let pipeline = support::with_every_setting();
    let valid = pipeline::validate::validate(&pipeline, &pipeline_facts(), &settings()).unwrap();
    let objects = pipeline::build::build(&pipeline, &valid, &settings());
    insta::assert_yaml_snapshot!("every_setting_config_map", objects.config_map);
    insta::assert_yaml_snapshot!("every_setting_deployment", objects.deployment);
}

#[test]
fn only_what_the_pod_reads_changes_the_hash() {
    let hash = |change: fn(&mut CdcPipeline)| {
        let mut pipeline = support::pipeline();
        change(&mut pipeline);
        pipeline::validate::validate(&pipeline, &pipeline_facts(), &settings())
            .unwrap()
            .config_hash
    };
    let plain = hash(|_| {});
    assert_eq!(plain, hash(|p| p.spec.suspend = true));
    assert_eq!(plain, hash(|p| p.metadata.generation = Some(9)));
    assert_ne!(plain, hash(|p| p.spec.source.postgres.host = "other".into()));
}

#[test]
fn replays_become_jobs() {
    for (name, file) in [
        ("replay_log", "replayjob-log.yaml"),
        ("replay_grpc", "replayjob.yaml"),
        ("replay_serve", "replayjob-serve.yaml"),
        ("replay_postgres", "replayjob-postgres.yaml"),
        ("replay_dry_run", "replayjob-dry-run.yaml"),
        ("replay_kafka", "replayjob-kafka.yaml"),
        ("replay_redis", "replayjob-redis.yaml"),
        ("replay_http", "replayjob-http.yaml"),
    ] {
        let replay = support::replay(file);
        let valid = replay::validate::validate(&replay, &replay_facts(), &settings()).unwrap();
        insta::assert_snapshot!(format!("{name}_config"), valid.config_yaml);
        let objects = replay::build::build(&replay, &valid, &settings());
        assert_eq!(objects.service.is_some(), file.contains("serve"));
        if let Some(service) = objects.service {
            insta::assert_yaml_snapshot!(format!("{name}_service"), service);
            insta::assert_yaml_snapshot!(format!("{name}_job"), objects.job);
        }
    }
}

#[test]
fn every_setting_of_grpc_reaches_the_pod() {
    let mut calling = support::replay("replayjob.yaml");
    calling.spec.target = serde_json::from_str(
        r#"{"grpc": {"endpoint": "https://analytics:443", "caSecretRef": {"name": "shop-ca", "key": "ca.crt"},
            "clientCertSecretRef": {"name": "shop-client"}, "tokenSecretRef": {"name": "replay-token", "key": "token"}}}"#,
    )
    .unwrap();
    let mut serving = support::replay("replayjob-serve.yaml");
    serving.spec.to = serde_json::from_str(r#"{"at": "Live"}"#).unwrap();
    let target = serving.spec.target.as_mut().unwrap();
    target.grpc.as_mut().unwrap().serve.as_mut().unwrap().tls_secret_ref = Some(secret("shop-client"));
    for (name, replay) in [("secure_call", calling), ("secure_serve", serving)] {
        let valid = replay::validate::validate(&replay, &replay_facts(), &settings()).unwrap();
        insta::assert_snapshot!(format!("{name}_config"), valid.config_yaml);
        insta::assert_debug_snapshot!(format!("{name}_secrets"), valid.secrets);
        if let Some(service) = replay::build::build(&replay, &valid, &settings()).service {
            insta::assert_yaml_snapshot!(format!("{name}_service"), service);
        }
    }
}

#[test]
fn a_replay_signs_in_to_the_cluster_that_it_names_and_otherwise_as_its_pipeline_does() {
    let security = |name: &str| {
        serde_json::json!({
            "tls": {"caSecretRef": {"name": "shop-ca", "key": "ca.crt"}, "clientCertSecretRef": {"name": "shop-client"}},
            "sasl": {"mechanism": "ScramSha512", "credentialsSecretRef": {"name": name}},
        })
    };
    let mut facts = replay_facts();
    let log = &mut facts.pipeline.as_mut().unwrap().spec.sinks.kafka;
    log.topics.partitions = 6;
    log.sasl = serde_json::from_value(security("shop-cdc")["sasl"].clone()).unwrap();
    let mut replay = support::replay("replayjob-kafka.yaml");
    let target = |replay: &ReplayJob| {
        let valid = replay::validate::validate(replay, &facts, &settings()).unwrap();
        let objects = replay::build::build(replay, &valid, &settings());
        let volumes = objects
            .job
            .unwrap()
            .spec
            .unwrap()
            .template
            .spec
            .unwrap()
            .volumes
            .unwrap();
        let volumes: Vec<String> = volumes.into_iter().map(|volume| volume.name).collect();
        (valid.config.target, volumes)
    };
    insta::assert_yaml_snapshot!("replay_kafka_same_cluster", target(&replay));
    let mut other = security("analytics");
    other["bootstrapServers"] = serde_json::json!(["other:9093"]);
    other["topicPrefix"] = "copy".into();
    other["topics"] = serde_json::json!({
        "partitions": 2, "replicationFactor": 3, "config": {"retention.ms": "1000"}, "management": "External",
    });
    replay.spec.target.as_mut().unwrap().kafka = Some(serde_json::from_value(other).unwrap());
    insta::assert_yaml_snapshot!("replay_kafka_other_cluster", target(&replay));
}

#[test]
fn what_is_written_is_what_the_runtime_reads() {
    let valid = pipeline::validate::validate(&support::pipeline(), &pipeline_facts(), &settings()).unwrap();
    let read: meander_config::CaptureConfig = serde_saphyr::from_str(&valid.config_yaml).unwrap();
    assert_eq!(read, valid.config);
    let valid =
        replay::validate::validate(&support::replay("replayjob-serve.yaml"), &replay_facts(), &settings()).unwrap();
    let read: meander_config::ReplayConfig = serde_saphyr::from_str(&valid.config_yaml).unwrap();
    assert_eq!(read, valid.config);
}

/// The kind of error, its condition and its message.
fn refusal(error: &Error) -> String {
    let kind = match error {
        Error::Invalid(_) => "Invalid",
        Error::Waiting(_) => "Waiting",
        Error::Transient(_) => "Transient",
    };
    let problem = error.problem();
    format!("{kind} {} {}: {}", problem.condition, problem.reason, problem.message)
}

#[test]
fn a_pipeline_waits_for_its_secrets() {
    type Change = fn(&mut Keys);
    let cases: [(&str, Change); 8] = [
        ("nothing", Keys::clear),
        ("no keys", |keys| keys.get_mut("shop-cdc").unwrap().clear()),
        ("no credentials", |keys| drop(keys.remove("shop-cdc"))),
        ("no password", |keys| {
            keys.get_mut("shop-cdc").unwrap().remove("password");
        }),
        ("no authority", |keys| drop(keys.remove("shop-ca"))),
        ("no certificate", |keys| drop(keys.remove("shop-client"))),
        ("no redis url", |keys| drop(keys.remove("shop-redis"))),
        ("redis key", |keys| {
            keys.get_mut("shop-redis").unwrap().remove("url");
        }),
    ];
    let refusals: Vec<String> = cases
        .into_iter()
        .map(|(name, change)| {
            let (mut pipeline, mut facts) = (support::pipeline(), pipeline_facts());
            pipeline.spec.source.postgres.ca_secret_ref = Some(secret_key("shop-ca", "ca.crt"));
            pipeline.spec.source.postgres.client_cert_secret_ref = Some(secret("shop-client"));
            change(facts.secrets.as_mut().unwrap());
            let error = pipeline::validate::validate(&pipeline, &facts, &settings()).unwrap_err();
            format!("{name}: {}", refusal(&error))
        })
        .collect();
    insta::assert_yaml_snapshot!("pipeline_refusals", refusals);
}

#[test]
fn a_replay_waits_for_its_pipeline_and_its_secret() {
    type Change = fn(&mut ReplayJob, &mut replay::dereference::Facts);
    let cases: [(&str, Change); 5] = [
        ("no pipeline", |_, facts| facts.pipeline = None),
        ("deleted", |_, facts| {
            let now = k8s_openapi::apimachinery::pkg::apis::meta::v1::Time(jiff::Timestamp::UNIX_EPOCH);
            facts.pipeline.as_mut().unwrap().metadata.deletion_timestamp = Some(now);
        }),
        ("no token", |_, facts| facts.secrets = Some(Keys::new())),
        ("a time that is none", |replay, _| {
            replay.spec.from = serde_json::from_str(r#"{"time": "yesterday"}"#).unwrap();
        }),
        ("a speed that is none", |replay, _| {
            replay.spec.speed = serde_json::from_str(r#""fast""#).unwrap()
        }),
    ];
    let refusals: Vec<String> = cases
        .into_iter()
        .map(|(name, change)| {
            let mut replay = support::replay("replayjob-serve.yaml");
            let mut facts = replay_facts();
            change(&mut replay, &mut facts);
            let error = replay::validate::validate(&replay, &facts, &settings()).unwrap_err();
            format!("{name}: {}", refusal(&error))
        })
        .collect();
    insta::assert_yaml_snapshot!("replay_refusals", refusals);

    let mut facts = replay_facts();
    facts.pipeline.as_mut().unwrap().spec.format = PipelineFormat::DebeziumJson;
    let replay = support::replay("replayjob-postgres.yaml");
    let error = replay::validate::validate(&replay, &facts, &settings()).unwrap_err();
    assert_eq!(error.problem().reason.to_string(), "FormatNotExact");
    let replay_of_rows = support::replay("replayjob-dry-run.yaml");
    let error = replay::validate::validate(&replay_of_rows, &facts, &settings()).unwrap_err();
    assert_eq!(error.problem().reason.to_string(), "FormatNotExact");
    facts.pipeline = replay_facts().pipeline;
    facts.secrets.as_mut().unwrap().remove("analytics");
    let mut dry = replay.clone();
    dry.spec.dry_run = true;
    let valid = replay::validate::validate(&dry, &facts, &settings()).unwrap();
    assert_eq!(valid.config.target, meander_config::ReplayTarget::DryRun);
    let error = replay::validate::validate(&replay, &facts, &settings()).unwrap_err();
    assert!(
        error.problem().message.contains("Secret analytics does not exist"),
        "{error}"
    );
}

#[test]
fn the_replay_of_a_suspended_pipeline_is_run() {
    let mut facts = replay_facts();
    facts.pipeline.as_mut().unwrap().spec.suspend = true;
    replay::validate::validate(&support::replay("replayjob.yaml"), &facts, &settings()).unwrap();
}

#[test]
fn a_replay_that_was_started_goes_on_as_it_was_but_for_what_is_asked_of_it() {
    let mut replay = support::replay("replayjob-serve.yaml");
    let valid = replay::validate::validate(&replay, &replay_facts(), &settings()).unwrap();
    let objects = replay::build::build(&replay, &valid, &settings());
    replay.spec.speed = serde_json::from_str("5").unwrap();
    replay.spec.suspend = true;
    let yaml = replay::validate::started(&replay, valid.config.clone(), &settings()).unwrap();
    let expected = meander_config::ReplayConfig {
        speed: "5".parse().unwrap(),
        suspended: true,
        ..valid.config
    };
    assert_eq!(
        meander_config::from_yaml::<meander_config::ReplayConfig>(&yaml).unwrap(),
        expected
    );
    let around = replay::build::around(&replay, &yaml, &settings());
    assert_eq!(around.service, objects.service);
    assert_eq!(around.service_account, objects.service_account);
    assert_eq!(around.job, None);
}

#[test]
fn a_job_has_the_patience_that_is_asked_for() {
    let mut replay = support::replay("replayjob.yaml");
    replay.spec.backoff_limit = 0;
    replay.spec.active_deadline_seconds = Some(3600);
    let valid = replay::validate::validate(&replay, &replay_facts(), &settings()).unwrap();
    let job = replay::build::build(&replay, &valid, &settings()).job.unwrap();
    let spec = job.spec.unwrap();
    assert_eq!(
        (spec.backoff_limit, spec.active_deadline_seconds),
        (Some(0), Some(3600))
    );
}

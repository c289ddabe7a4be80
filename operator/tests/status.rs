//! Statuses are values: the same inputs give the same status, and each state has one.
#![allow(missing_docs, clippy::unwrap_used, clippy::expect_used, clippy::panic)]

mod support;

use std::time::Duration;

use jiff::Timestamp;
use k8s_openapi::{
    api::{
        apps::v1::{Deployment, DeploymentSpec},
        batch::v1::Job,
        core::v1::Pod,
    },
    apimachinery::pkg::apis::meta::v1::Time,
};
use meander_crds::{
    CdcPipeline, CdcPipelineStatus, PipelinePhase, ReplayJob, ReplayJobStatus, ReplayPhase, TableSnapshotState,
};
use meander_operator::{
    conditions::{self, state},
    error::{Error, Reason},
    pipeline::{self, dereference::Facts, validate::ValidPipeline},
    progress::Observation,
    replay::{self, status::Outcome},
};
use meander_proto::v1::{
    AcceptedGap, CaptureProgress, Condition, OtherTopics, OversizedRecords, ProgressUpdate, RedisState, RefusedTable,
    ReplayProgress, ResolvedRange, SchemaVersion, SlotHealth, SnapshotProgress, TableSnapshot, TopicProgress,
    progress_update::Progress, replay_progress::Phase, table_snapshot,
};
use serde_json::{Value, from_value, json};

fn at(second: i64) -> Timestamp {
    Timestamp::from_second(1_763_632_800 + second).unwrap()
}

fn deployment(available: bool) -> Deployment {
    let replicas = i32::from(available);
    from_value(json!({
        "apiVersion": "apps/v1",
        "kind": "Deployment",
        "metadata": {"generation": 1},
        "status": {"observedGeneration": 1, "updatedReplicas": replicas, "readyReplicas": replicas},
    }))
    .unwrap()
}

fn facts(available: bool) -> Facts {
    Facts {
        slot_held_by: None,
        waits_for: None,
        secrets: Some(support::keys()),
        deployment: Some(deployment(available)),
        pods: Vec::new(),
    }
}

fn said(type_: &str, status: bool, reason: &str) -> Condition {
    Condition {
        r#type: type_.into(),
        status,
        reason: reason.into(),
        message: format!("{reason}."),
    }
}

fn capture_report(conditions: Vec<Condition>) -> Observation {
    let progress = CaptureProgress {
        received_lsn: 0x16B_3748,
        published_lsn: 0x16B_3700,
        confirmed_flush_lsn: 0x16B_3700,
        lag_bytes: 72,
        lag_millis: 12_345,
        last_event_time_micros: 1_763_632_800_500_000,
        events_total: 42,
        epoch: 1,
        owner_generation: 3,
        slot_name: "meander_default_trades".into(),
        kafka_position: "1:0/16B3700:2".into(),
        redis_position: "1:0/16B3700:2".into(),
        redis_state: RedisState::Attached.into(),
        redis_last_error: String::new(),
        slot: Some(SlotHealth {
            wal_status: "extended".into(),
            retained_wal_bytes: Some(800 << 20),
            safe_wal_bytes: Some(200 << 20),
            restart_lsn: 0x16B_3000,
            confirmed_flush_lsn: 0x16B_3700,
            active_pid: Some(4242),
            failover: Some(true),
            synced: Some(false),
            ..SlotHealth::default()
        }),
        captured_tables: 7,
        refused_tables: vec![RefusedTable {
            table: r#""public"."keyless""#.into(),
            reason: "TableWithoutReplicaIdentity".into(),
        }],
        refused_tables_total: 1,
        accepted_gap: Some(AcceptedGap {
            id: "1:0/16B3700".into(),
            reason: "SlotMissing".into(),
            lost_after_lsn: 0x16B_3700,
            resumed_lsn: 0x16B_3748,
            time_micros: 1_763_632_800_500_000,
        }),
        oversized: Some(OversizedRecords {
            records_total: 2,
            last_table: "public.trades".into(),
            last_position: "1:0/16B3700:1".into(),
            last_bytes: 3_000_123,
        }),
        snapshot: None,
        schemas: vec![SchemaVersion {
            table: r#""public"."trades""#.into(),
            version: 3,
            since: "1:0/16B3748:2".into(),
        }],
    };
    let report = ProgressUpdate {
        conditions,
        progress: Some(Progress::Capture(progress)),
        ..ProgressUpdate::default()
    };
    Observation {
        report: Some(report),
        silence: Duration::from_secs(1),
        connected: true,
        since_written: Some(Duration::from_secs(60)),
    }
}

fn healthy() -> Observation {
    capture_report(vec![
        said("SourceReady", true, "Connected"),
        said("SinksReady", true, "Connected"),
        said("Progressing", true, "Streaming"),
        said("SourceGap", false, "NoGap"),
    ])
}

fn valid(pipeline: &CdcPipeline) -> ValidPipeline {
    pipeline::validate::validate(pipeline, &facts(true), &support::settings()).unwrap()
}

fn compute(
    pipeline: &CdcPipeline,
    facts: Option<&Facts>,
    outcome: Result<&ValidPipeline, &Error>,
    observation: &Observation,
    now: Timestamp,
) -> CdcPipelineStatus {
    pipeline::status::status(&pipeline::status::Inputs {
        pipeline,
        facts,
        outcome,
        observation,
        now,
    })
}

fn ready(status: &CdcPipelineStatus) -> (Option<PipelinePhase>, &str, &str) {
    let (ready, reason) = state(&status.conditions, "Ready").unwrap();
    (status.phase, ready, reason)
}

#[test]
fn a_streaming_pipeline() {
    let pipeline = support::pipeline();
    let status = compute(&pipeline, Some(&facts(true)), Ok(&valid(&pipeline)), &healthy(), at(0));
    insta::assert_yaml_snapshot!("streaming", status);
}

#[test]
fn a_pipeline_that_reads_rows_says_how_far_it_is_and_is_ready_meanwhile() {
    let pipeline = support::pipeline();
    let table = |table: &str, state: table_snapshot::State, message: &str| TableSnapshot {
        table: table.into(),
        state: state.into(),
        rows: 50,
        percent: 99.9,
        message: message.into(),
    };
    let phase = |first, tables_done| {
        let mut observation = healthy();
        let Some(Progress::Capture(progress)) = &mut observation.report.as_mut().unwrap().progress else {
            panic!("no capture")
        };
        progress.snapshot = Some(SnapshotProgress {
            tables_total: 3,
            tables_done,
            percent: 41.7,
            tables: vec![
                table("public.a", first, ""),
                table("public.b", table_snapshot::State::Refused, "permission denied"),
            ],
        });
        let status = compute(
            &pipeline,
            Some(&facts(true)),
            Ok(&valid(&pipeline)),
            &observation,
            at(0),
        );
        assert_eq!(ready(&status).1, "True");
        (status.phase.unwrap(), status.snapshot.unwrap())
    };
    let (reading, status) = phase(table_snapshot::State::Reading, 1);
    assert_eq!(reading, PipelinePhase::Snapshotting);
    assert_eq!((status.percent, status.tables_done, status.tables_total), (41, 1, 3));
    assert_eq!((status.tables[0].percent, &status.tables[0].message), (99, &None));
    assert_eq!(status.tables[1].state, TableSnapshotState::Refused);
    assert_eq!(status.tables[1].message.as_deref(), Some("permission denied"));
    assert_eq!(phase(table_snapshot::State::Reading, 3).0, PipelinePhase::Streaming);
    // What cannot be read is said, and waited for by nobody.
    assert_eq!(phase(table_snapshot::State::Refused, 1).0, PipelinePhase::Streaming);
}

#[test]
fn nothing_changes_when_nothing_changed() {
    let mut pipeline = support::pipeline();
    let valid = valid(&pipeline);
    let first = compute(&pipeline, Some(&facts(true)), Ok(&valid), &healthy(), at(0));
    pipeline.status = Some(first.clone());
    let second = compute(&pipeline, Some(&facts(true)), Ok(&valid), &healthy(), at(3600));
    assert_eq!(first, second);
    // As it comes back from the API server, whose times have whole seconds.
    let read: CdcPipelineStatus = from_value(serde_json::to_value(&first).unwrap()).unwrap();
    assert_eq!(first, read);
}

#[test]
fn a_capture_that_starts_again_does_not_take_back_how_far_it_was() {
    let mut pipeline = support::pipeline();
    let valid = valid(&pipeline);
    let before = compute(&pipeline, Some(&facts(true)), Ok(&valid), &healthy(), at(0));
    pipeline.status = Some(before.clone());
    // All that a runtime knows before it has opened its source.
    let mut starting = capture_report(vec![said("SourceReady", false, "DatabaseUnreachable")]);
    starting.report.as_mut().unwrap().progress = Some(Progress::Capture(CaptureProgress {
        slot_name: "meander_default_trades".into(),
        ..CaptureProgress::default()
    }));
    let status = compute(&pipeline, Some(&facts(false)), Ok(&valid), &starting, at(1));
    let events = |status: &CdcPipelineStatus| status.replication.as_ref().unwrap().events_total;
    assert_eq!(events(&status), events(&before));
    assert_eq!(status.sinks, before.sinks);
    assert_eq!(ready(&status).2, "DatabaseUnreachable");
}

#[test]
fn a_capture_that_begins_anew_is_counted_until_it_has_gone_on_for_long() {
    let mut pipeline = support::pipeline();
    let valid = valid(&pipeline);
    let mut look = |generation: u64, flows: bool, second: i64| {
        let mut observation = healthy();
        let report = observation.report.as_mut().unwrap();
        if !flows {
            report.conditions = vec![said("Progressing", false, "DatabaseUnreachable")];
        }
        if let Some(Progress::Capture(progress)) = &mut report.progress {
            progress.owner_generation = generation;
        }
        let status = compute(&pipeline, Some(&facts(true)), Ok(&valid), &observation, at(second));
        let restarts = status.restarts.clone();
        pipeline.status = Some(status);
        restarts.map(|restarts| (restarts.count, restarts.last_time))
    };
    let time = |second| at(second).to_string();
    assert_eq!(look(3, true, 0), None, "its first begin that is seen");
    assert_eq!(look(4, true, 10), Some((1, time(10))));
    assert_eq!(look(6, true, 20), Some((3, time(20))), "two between two looks");
    assert_eq!(look(6, true, 600), Some((3, time(20))));
    assert_eq!(
        look(6, false, 900),
        Some((3, time(20))),
        "it stands still, and is not well"
    );
    assert_eq!(look(6, true, 901), None);
    assert_eq!(look(7, true, 902), Some((1, time(902))));
}

#[test]
fn what_needs_a_look_while_changes_flow_is_degraded_and_ready() {
    let pipeline = support::pipeline();
    let mut observation = healthy();
    let report = observation.report.as_mut().unwrap();
    report.conditions.push(said("Degraded", true, "WalBudgetLow"));
    let valid = valid(&pipeline);
    let status = compute(&pipeline, Some(&facts(true)), Ok(&valid), &observation, at(0));
    assert_eq!(ready(&status), (Some(PipelinePhase::Degraded), "True", "Streaming"));
    assert_eq!(state(&status.conditions, "Degraded"), Some(("True", "WalBudgetLow")));
    assert_eq!(status.reason.as_deref(), Some("WalBudgetLow"));

    // One of two pods is enough for changes to flow, and not for taking over.
    let mut one_of_two = facts(true);
    one_of_two.deployment.as_mut().unwrap().spec = Some(DeploymentSpec {
        replicas: Some(2),
        ..DeploymentSpec::default()
    });
    let lonely = compute(&pipeline, Some(&one_of_two), Ok(&valid), &healthy(), at(0));
    assert_eq!(ready(&lonely), (Some(PipelinePhase::Degraded), "True", "Streaming"));
    assert_eq!(state(&lonely.conditions, "Degraded"), Some(("True", "StandbyNotReady")));

    // While capture stands still nobody looks, also by what a new operator remembers.
    let mut stopped = observation.clone();
    let conditions = &mut stopped.report.as_mut().unwrap().conditions;
    conditions.retain(|condition| condition.r#type != "Progressing");
    conditions.push(said("Progressing", false, "DatabaseUnreachable"));
    let mut remembered = support::pipeline();
    remembered.status = Some(compute(&pipeline, Some(&facts(false)), Ok(&valid), &stopped, at(1)));
    let unheard = Observation {
        report: None,
        ..stopped.clone()
    };
    for observation in [&stopped, &unheard] {
        let status = compute(&remembered, Some(&facts(false)), Ok(&valid), observation, at(2));
        let degraded = status.conditions.iter().find(|condition| condition.type_ == "Degraded");
        let message = &degraded.unwrap().message;
        assert_eq!(message.matches("When last looked at, ").count(), 1, "{message}");
    }

    // The numbers of a slot move all the time, and are no reason to write at once.
    let mut moved = status.clone();
    moved.slot.as_mut().unwrap().retained_wal_bytes = Some(1);
    let significant = pipeline::status::significant;
    assert!(significant(&status) == significant(&moved));
    moved.slot.as_mut().unwrap().wal_status = Some("lost".into());
    assert!(significant(&status) != significant(&moved));
}

#[test]
fn a_transition_moves_the_time_of_its_condition_only() {
    let mut pipeline = support::pipeline();
    let valid = valid(&pipeline);
    pipeline.status = Some(compute(&pipeline, Some(&facts(true)), Ok(&valid), &healthy(), at(0)));
    let broken = capture_report(vec![
        said("SourceReady", true, "Connected"),
        said("SinksReady", false, "KafkaUnreachable"),
    ]);
    let status = compute(&pipeline, Some(&facts(true)), Ok(&valid), &broken, at(100));
    let since = |type_: &str| {
        status
            .conditions
            .iter()
            .find(|condition| condition.type_ == type_)
            .unwrap()
            .last_transition_time
            .0
    };
    assert_eq!((since("SinksReady"), since("Ready")), (at(100), at(100)));
    assert_eq!((since("SourceReady"), since("SpecValid")), (at(0), at(0)));
    assert_eq!(
        ready(&status),
        (Some(PipelinePhase::Interrupted), "False", "KafkaUnreachable")
    );
}

#[test]
fn each_state_has_its_phase_and_its_reason() {
    use PipelinePhase::{Degraded, Failed, Interrupted, Pending, Starting, Streaming, Suspended, Terminating};
    let secret = Error::waiting("SourceReady", Reason::SecretNotFound, "create it");
    let invalid = Error::invalid("SpecValid", Reason::InvalidValue, "no");
    let blip = Error::transient("SourceReady", Reason::ApiServerUnavailable, "gone");
    let gap = capture_report(vec![
        said("SourceReady", true, "Connected"),
        said("SinksReady", true, "Connected"),
        said("SourceGap", true, "SlotLost"),
    ]);
    let redis_gap = capture_report(vec![
        said("SourceReady", true, "Connected"),
        said("SinksReady", false, "HistoryMissing"),
        said("RedisGap", true, "HistoryMissing"),
        said("Progressing", true, "Streaming"),
    ]);
    let silent = Observation {
        silence: Duration::from_secs(31),
        ..healthy()
    };
    let unheard = Observation {
        report: None,
        silence: Duration::from_secs(31),
        ..healthy()
    };
    let new = support::nothing_reported();
    let none = Facts {
        deployment: None,
        ..facts(false)
    };

    let mut plain = support::pipeline();
    let valid = valid(&plain);
    let streaming = compute(&plain, Some(&facts(true)), Ok(&valid), &healthy(), at(0));
    let mut suspended = plain.clone();
    suspended.spec.suspend = true;
    let mut deleted = plain.clone();
    deleted.metadata.deletion_timestamp = Some(Time(at(0)));

    let check = |pipeline: &CdcPipeline, facts: Option<&Facts>, outcome, observation: &Observation, expected| {
        let status = compute(pipeline, facts, outcome, observation, at(0));
        assert_eq!(ready(&status), expected, "{:?}", status.conditions);
        // The column shows the reason that matters.
        assert_eq!(status.reason.as_deref(), Some(expected.2));
        assert_eq!(status.observed_generation, Some(1));
    };
    let (up, down) = (facts(true), facts(false));
    check(
        &plain,
        Some(&none),
        Err(&secret),
        &new,
        (Some(Pending), "False", "SecretNotFound"),
    );
    check(
        &plain,
        Some(&none),
        Err(&invalid),
        &new,
        (Some(Failed), "False", "InvalidValue"),
    );
    check(
        &plain,
        Some(&down),
        Ok(&valid),
        &new,
        (Some(Starting), "False", "PodNotReady"),
    );
    check(
        &plain,
        Some(&down),
        Ok(&valid),
        &unheard,
        (Some(Starting), "False", "PodNotReady"),
    );
    check(
        &plain,
        Some(&down),
        Ok(&valid),
        &healthy(),
        (Some(Starting), "False", "PodNotReady"),
    );
    check(&plain, Some(&up), Ok(&valid), &gap, (Some(Failed), "False", "SlotLost"));
    check(
        &plain,
        Some(&up),
        Ok(&valid),
        &redis_gap,
        (Some(Degraded), "False", "HistoryMissing"),
    );
    check(
        &suspended,
        Some(&down),
        Ok(&valid),
        &new,
        (Some(Suspended), "False", "Suspended"),
    );
    check(
        &deleted,
        Some(&up),
        Ok(&valid),
        &new,
        (Some(Terminating), "False", "Terminating"),
    );

    // What the operator found is no more; nobody else has said anything yet.
    let mut healed = plain.clone();
    healed.status = Some(compute(&plain, Some(&none), Err(&secret), &new, at(0)));
    check(
        &healed,
        Some(&up),
        Ok(&valid),
        &new,
        (Some(Starting), "Unknown", "RuntimeStarting"),
    );

    // What follows depends on what was before.
    plain.status = Some(streaming);
    check(
        &plain,
        Some(&up),
        Ok(&valid),
        &new,
        (Some(Streaming), "True", "Streaming"),
    );
    check(
        &plain,
        Some(&up),
        Ok(&valid),
        &silent,
        (Some(Interrupted), "Unknown", "RuntimeSilent"),
    );
    check(
        &plain,
        Some(&up),
        Ok(&valid),
        &unheard,
        (Some(Interrupted), "Unknown", "RuntimeSilent"),
    );
    check(
        &plain,
        Some(&up),
        Err(&secret),
        &healthy(),
        (Some(Degraded), "False", "SecretNotFound"),
    );
    check(
        &plain,
        Some(&up),
        Err(&secret),
        &silent,
        (Some(Interrupted), "False", "SecretNotFound"),
    );
    check(
        &plain,
        None,
        Err(&blip),
        &healthy(),
        (Some(Streaming), "True", "Streaming"),
    );
}

#[test]
fn what_may_be_wrong_in_a_secret_names_it() {
    for (type_, reason, named) in [
        (
            "SourceReady",
            "AuthenticationFailed",
            Some("Secret shop-cdc (keys username and password)"),
        ),
        ("SinksReady", "RedisUnreachable", Some("Secret shop-redis (key url)")),
        ("SinksReady", "KafkaAuthenticationFailed", None),
        ("SourceReady", "WalLevelNotLogical", None),
    ] {
        let mut pipeline = support::pipeline();
        let valid = valid(&pipeline);
        let expected = format!(
            "{reason}{}",
            named.map_or_else(
                || ".".to_owned(),
                |named| format!("; this pipeline uses {named}; a change of it reaches the pod within two minutes")
            )
        );
        let observation = capture_report(vec![said(type_, false, reason)]);
        // The second time by what is remembered, when the operator has started anew.
        for observation in [observation, support::nothing_reported()] {
            let status = compute(&pipeline, Some(&facts(true)), Ok(&valid), &observation, at(0));
            for type_ in [type_, "Ready"] {
                let condition = status.conditions.iter().find(|condition| condition.type_ == type_);
                assert_eq!(condition.unwrap().message, expected, "{type_}");
            }
            pipeline.status = Some(status);
        }
    }
}

#[test]
fn a_lag_is_said_only_while_it_is_measured() {
    let mut pipeline = support::pipeline();
    let valid = valid(&pipeline);
    let streaming = compute(&pipeline, Some(&facts(true)), Ok(&valid), &healthy(), at(0));
    pipeline.status = Some(streaming.clone());
    let mut suspended = pipeline.clone();
    suspended.spec.suspend = true;
    let stopped = capture_report(vec![said("Progressing", false, "SourceUnreachable")]);
    let silent = Observation {
        silence: Duration::from_secs(31),
        ..healthy()
    };
    let unheard = Observation {
        report: None,
        ..silent.clone()
    };
    let hung_up = Observation {
        connected: false,
        ..healthy()
    };
    for (pipeline, observation) in [
        (&pipeline, &stopped),
        (&pipeline, &hung_up),
        (&pipeline, &silent),
        (&pipeline, &unheard),
        (&suspended, &healthy()),
    ] {
        let status = compute(pipeline, Some(&facts(true)), Ok(&valid), observation, at(0));
        let replication = status.replication.unwrap();
        assert_eq!(replication.lag.as_deref(), Some("unknown"), "{observation:?}");
        assert_eq!((replication.lag_millis, replication.lag_bytes), (None, None));
        // How far it came is still true.
        assert_eq!(replication.published_lsn.as_deref(), Some("0/16B3700"));
    }
    // An operator that has just started goes on from what the last one wrote.
    let new = compute(
        &pipeline,
        Some(&facts(true)),
        Ok(&valid),
        &support::nothing_reported(),
        at(0),
    );
    assert_eq!(new.replication, streaming.replication);
}

#[test]
fn a_capture_that_is_held_says_nothing_of_what_nobody_looks_at() {
    let mut pipeline = support::pipeline();
    let valid = valid(&pipeline);
    let refilling = capture_report(vec![
        said("SourceReady", true, "Ready"),
        said("SinksReady", false, "RedisRefilling"),
        said("Progressing", true, "Streaming"),
    ]);
    pipeline.status = Some(compute(&pipeline, Some(&facts(true)), Ok(&valid), &refilling, at(0)));
    let held = capture_report(vec![
        said("SourceReady", true, "Ready"),
        said("SourceGap", true, "SlotMissing"),
        said("Progressing", false, "SlotMissing"),
    ]);
    let conditions =
        |observation: &Observation| compute(&pipeline, Some(&facts(false)), Ok(&valid), observation, at(1)).conditions;
    let of_held = conditions(&held);
    assert_eq!(state(&of_held, "Ready"), Some(("False", "SlotMissing")));
    assert_eq!(state(&of_held, "SinksReady"), Some(("Unknown", "NotCapturing")));
    // The source is mended, and the session that finds it so has not come to the sinks.
    let mended = conditions(&capture_report(vec![
        said("SourceReady", true, "Ready"),
        said("Progressing", false, "WalLevelNotLogical"),
    ]));
    assert_eq!(state(&mended, "Ready"), Some(("False", "WalLevelNotLogical")));
    // Its pod is there, and unready on purpose; once it has hung up nobody knows that.
    assert_eq!(state(&of_held, "RuntimeAvailable"), Some(("True", "PodRunning")));
    let gone = conditions(&Observation {
        connected: false,
        ..held
    });
    assert_eq!(state(&gone, "RuntimeAvailable"), Some(("False", "PodNotReady")));
}

#[test]
fn a_pod_that_does_not_run_is_explained_and_no_log_is_named_that_is_not_there() {
    let pipeline = support::pipeline();
    let silent = Observation {
        silence: Duration::from_secs(31),
        ..support::nothing_reported()
    };
    let with = |state: Value, last: Value| -> Facts {
        let pod = from_value(json!({
            "metadata": {"name": "x", "namespace": "shop"},
            "status": {"containerStatuses": [{
                "name": "capture", "image": "x", "imageID": "x", "ready": false, "restartCount": 0,
                "state": state, "lastState": last,
            }]},
        }));
        Facts {
            pods: vec![pod.unwrap()],
            ..facts(false)
        }
    };
    let refused = {
        let mut facts = facts(false);
        let status = facts.deployment.as_mut().unwrap().status.as_mut().unwrap();
        let conditions = json!([{"type": "ReplicaFailure", "status": "True", "reason": "FailedCreate",
            "message": "pods \"x\" is forbidden: exceeded quota: tight"}]);
        status.conditions = from_value(conditions).unwrap();
        facts
    };
    let crashed = json!({"waiting": {"reason": "CrashLoopBackOff", "message": "back-off 5m0s"}});
    for (facts, reason, message) in [
        (refused, "PodRefused", "exceeded quota: tight"),
        (
            with(
                json!({"waiting": {"reason": "ImagePullBackOff", "message": "no such image"}}),
                json!({}),
            ),
            "PodFailing",
            "pod x: ImagePullBackOff: no such image; see kubectl -n shop describe pod x",
        ),
        (
            with(
                crashed.clone(),
                json!({"terminated": {"exitCode": 128, "reason": "StartError", "message": "memory limit too low?"}}),
            ),
            "PodFailing",
            "the last attempt could not be started: StartError: memory limit too low?",
        ),
        (
            with(crashed, json!({"terminated": {"exitCode": 137, "reason": "OOMKilled"}})),
            "PodFailing",
            "exit code 137 (OOMKilled); see kubectl -n shop logs x --previous",
        ),
    ] {
        let status = compute(&pipeline, Some(&facts), Ok(&valid(&pipeline)), &silent, at(0));
        let condition = |type_: &str| {
            status
                .conditions
                .iter()
                .find(|condition| condition.type_ == type_)
                .unwrap()
        };
        let available = condition("RuntimeAvailable");
        assert_eq!(
            (available.status.as_str(), available.reason.as_str()),
            ("False", reason)
        );
        assert!(available.message.contains(message), "{}", available.message);
        // It is what the event and `kubectl describe` begin with.
        assert_eq!(condition("Ready").message, available.message);
        let source = &condition("SourceReady").message;
        assert!(source.ends_with("see the condition RuntimeAvailable."), "{source}");
    }
}

#[test]
fn conditions_of_others_are_left_to_them() {
    let mut list = compute(
        &support::pipeline(),
        Some(&facts(true)),
        Ok(&valid(&support::pipeline())),
        &healthy(),
        at(0),
    )
    .conditions;
    let ours = list.clone();
    list.push(k8s_openapi::apimachinery::pkg::apis::meta::v1::Condition {
        type_: "Somebody".into(),
        ..ours[0].clone()
    });
    conditions::keep_ours(&mut list);
    assert_eq!(list, ours);
}

fn replay_report(phase: Phase, delivered: u64, percent: f64) -> Observation {
    let progress = ReplayProgress {
        phase: phase.into(),
        delivered,
        percent,
        current_time_micros: 1_763_632_860_000_000,
        current_position: "1:0/16B3748:3".into(),
        events_per_second: 99.6,
        behind_millis: 7,
        eta_seconds: 12,
        resolved_range: Some(ResolvedRange {
            from_time_micros: 1_763_632_800_000_000,
            to_time_micros: 1_763_636_400_000_000,
            to_position: "1:0/16B9999:0".into(),
            offsets: 1000,
        }),
        first_event_time_micros: 1_763_632_800_000_000,
        delivery_micros: 6_000_000,
        filtered: 20,
        total: 900,
        percent_by_events: 71.9,
        speed: "10".into(),
        actual_speed: 9.9823,
        bytes: 4096,
        topics: vec![TopicProgress {
            topic: "shop.public.trades".into(),
            delivered: 400,
            bytes: 4000,
            first_time_micros: 1_763_632_800_000_000,
            last_time_micros: 1_763_632_860_000_000,
        }],
        other_topics: Some(OtherTopics {
            topics: 3,
            delivered: 240,
            bytes: 96,
        }),
    };
    let reason = match phase {
        Phase::Running => "Replaying",
        Phase::Paused => "Paused",
        _ => "Resolving",
    };
    let report = ProgressUpdate {
        conditions: vec![said("Progressing", phase == Phase::Running, reason)],
        progress: Some(Progress::Replay(progress)),
        ..ProgressUpdate::default()
    };
    Observation {
        report: Some(report),
        silence: Duration::from_secs(1),
        connected: true,
        since_written: None,
    }
}

fn job(condition: Option<&str>) -> Job {
    let conditions: Vec<Value> = condition
        .map(|type_| json!({"type": type_, "status": "True", "reason": "BackoffLimitExceeded", "message": "tried"}))
        .into_iter()
        .collect();
    from_value(json!({
        "apiVersion": "batch/v1",
        "kind": "Job",
        "metadata": {"name": "last-seconds-replay"},
        "status": {"startTime": "2025-11-20T10:00:00Z", "conditions": conditions},
    }))
    .unwrap()
}

fn last_word(phase: &str, reason: &str) -> Pod {
    let word = json!({
        "phase": phase, "delivered": 640, "filtered": 30, "total": 670, "bytes": 4096, "currentPosition": "1:0/16B9999:0",
        "firstEventTimeMicros": 1_763_632_800_000_000_i64, "currentTimeMicros": 1_763_632_900_000_000_i64,
        "deliveryMicros": 10_000_500, "speed": "10", "reason": reason, "message": "the sentence",
        "resolvedRange": {"fromTimeMicros": 1_763_632_800_000_000_i64, "toTimeMicros": 1_763_636_400_000_000_i64, "toPosition": "1:0/16B9999:0", "offsets": 1000},
        "topics": [{"topic": "shop.public.trades", "delivered": 640, "bytes": 4096}],
    });
    let failed = !matches!(phase, "Succeeded" | "Cancelled");
    ended_pod(
        failed,
        json!({"exitCode": i32::from(failed), "message": word.to_string()}),
    )
}

fn ended_pod(failed: bool, terminated: Value) -> Pod {
    from_value(json!({
        "apiVersion": "v1",
        "kind": "Pod",
        "metadata": {"name": "p", "creationTimestamp": "2025-11-20T10:00:00Z"},
        "status": {"phase": if failed { "Failed" } else { "Succeeded" }, "containerStatuses": [{
            "name": "replay", "image": "x", "imageID": "x", "ready": false, "restartCount": 0,
            "state": {"terminated": terminated},
        }]},
    }))
    .unwrap()
}

fn compute_replay(
    replay: &ReplayJob,
    facts: &replay::dereference::Facts,
    outcome: Result<Outcome, &Error>,
    observation: &Observation,
) -> ReplayJobStatus {
    replay::status::status(&replay::status::Inputs {
        replay,
        facts: Some(facts),
        outcome,
        observation,
        now: at(0),
    })
}

#[test]
fn a_replay_runs_and_ends() {
    let mut replay = support::replay("replayjob.yaml");
    let mut facts = replay::dereference::Facts {
        job: Some(job(None)),
        ..Default::default()
    };
    let running = compute_replay(
        &replay,
        &facts,
        Ok(Outcome::Started),
        &replay_report(Phase::Running, 100, 64.9),
    );
    insta::assert_yaml_snapshot!("replay_running", running);

    // The operator was away at the end: what is left is the last word.
    replay.status = Some(running);
    facts.job = Some(job(Some("Complete")));
    facts.pods = vec![last_word("Succeeded", "Delivered")];
    let ended = compute_replay(&replay, &facts, Ok(Outcome::Started), &support::nothing_reported());
    insta::assert_yaml_snapshot!("replay_succeeded", ended);
}

#[test]
fn who_follows_a_replay_sees_at_its_end_what_its_status_says() {
    let mut replay = support::replay("replayjob.yaml");
    let mut observation = replay_report(Phase::Running, 640, 64.0);
    let Some(Progress::Replay(reported)) = &mut observation.report.as_mut().unwrap().progress else {
        unreachable!()
    };
    // As the status has them.
    (
        reported.events_per_second,
        reported.percent_by_events,
        reported.actual_speed,
    ) = (100.0, 71.0, 9.98);
    let reported = reported.clone();
    let facts = replay::dereference::Facts {
        job: Some(job(None)),
        ..Default::default()
    };
    let running = compute_replay(&replay, &facts, Ok(Outcome::Started), &observation);
    let shown = replay::report::report(&replay, &running, at(0)).progress;
    assert_eq!(shown, Some(Progress::Replay(reported)));

    // With an operator that was away all the time, the last word has it all.
    replay.status = None;
    let facts = replay::dereference::Facts {
        job: Some(job(Some("Complete"))),
        pods: vec![last_word("Succeeded", "DryRun")],
        ..Default::default()
    };
    let ended = compute_replay(&replay, &facts, Ok(Outcome::Started), &support::nothing_reported());
    let Some(Progress::Replay(shown)) = replay::report::report(&replay, &ended, at(0)).progress else {
        unreachable!()
    };
    assert_eq!((shown.phase(), shown.total, shown.bytes), (Phase::Succeeded, 670, 4096));
    assert_eq!(shown.topics[0].delivered, 640);
    assert_eq!(shown.resolved_range.unwrap().offsets, 1000);
}

#[test]
fn a_range_that_is_truncated_is_so_for_good() {
    let mut replay = support::replay("replayjob.yaml");
    let mut facts = replay::dereference::Facts {
        job: Some(job(None)),
        ..Default::default()
    };
    let mut found = replay_report(Phase::Running, 5, 1.0);
    (found.report.as_mut().unwrap().conditions).push(said("TruncatedRange", true, "RetentionPassed"));
    let is_truncated = |status: &ReplayJobStatus| {
        assert_eq!(
            state(&status.conditions, "TruncatedRange"),
            Some(("True", "RetentionPassed"))
        );
    };
    let running = compute_replay(&replay, &facts, Ok(Outcome::Started), &found);
    is_truncated(&running);
    // The next pod goes on, and has nothing to say of it.
    replay.status = Some(running);
    let next = compute_replay(
        &replay,
        &facts,
        Ok(Outcome::Started),
        &replay_report(Phase::Running, 6, 1.0),
    );
    is_truncated(&next);
    replay.status = Some(next);
    facts.job = Some(job(Some("Complete")));
    let ended = compute_replay(&replay, &facts, Ok(Outcome::Started), &support::nothing_reported());
    is_truncated(&ended);
    let complete = ended
        .conditions
        .iter()
        .find(|condition| condition.type_ == "Complete")
        .unwrap();
    assert!(!complete.message.contains("whole"), "{}", complete.message);

    // Nobody but the last word said it.
    replay.status = None;
    let mut word = last_word("Succeeded", "Delivered");
    let statuses = word.status.as_mut().unwrap().container_statuses.as_mut().unwrap();
    let message = &mut statuses[0].state.as_mut().unwrap().terminated.as_mut().unwrap().message;
    let mut said: Value = serde_json::from_str(message.as_deref().unwrap()).unwrap();
    said["truncated"] = json!("Kafka has deleted the start.");
    *message = Some(said.to_string());
    facts.pods = vec![word];
    is_truncated(&compute_replay(
        &replay,
        &facts,
        Ok(Outcome::Started),
        &support::nothing_reported(),
    ));
}

#[test]
fn what_has_ended_never_changes() {
    use ReplayPhase::{Cancelled, Failed, Succeeded};
    let mut replay = support::replay("replayjob.yaml");
    let with = |condition, pods| replay::dereference::Facts {
        job: Some(job(condition)),
        pods,
        ..Default::default()
    };
    let started = Ok(Outcome::Started);
    let new = support::nothing_reported();
    let ends = [
        (
            with(Some("Complete"), vec![last_word("Succeeded", "Delivered")]),
            started,
            Succeeded,
        ),
        (
            with(Some("Failed"), vec![last_word("Failed", "NoTable")]),
            started,
            Failed,
        ),
        (with(None, vec![]), Ok(Outcome::Cancelled), Cancelled),
    ];
    for (facts, outcome, phase) in &ends {
        replay.status = None;
        replay.metadata.generation = Some(1);
        let ended = compute_replay(&replay, facts, *outcome, &new);
        assert_eq!(ended.phase, Some(*phase));
        // But the generation has been seen.
        replay.status = Some(ended.clone());
        replay.metadata.generation = Some(2);
        let seen = ReplayJobStatus {
            observed_generation: Some(2),
            ..ended
        };
        let error = Error::waiting("Accepted", Reason::PipelineNotFound, "create it");
        for (facts, outcome, _) in &ends {
            for outcome in [*outcome, Err(&error)] {
                let after = compute_replay(&replay, facts, outcome, &replay_report(Phase::Running, 1, 1.0));
                assert_eq!(after, seen);
            }
        }
    }
}

#[test]
fn an_attempt_that_failed_is_told_until_the_next_one_delivers() {
    let mut replay = support::replay("replayjob.yaml");
    let mut tried = job(None);
    tried.status.as_mut().unwrap().failed = Some(1);
    let mut facts = replay::dereference::Facts {
        job: Some(tried),
        pods: vec![last_word("Failed", "ReceiverUnreachable")],
        ..Default::default()
    };
    // The last that was heard of it is that it delivers: it was killed without a word to the operator.
    let mut delivering = replay_report(Phase::Running, 5, 1.0);
    let truncated = said("TruncatedRange", true, "RetentionPassed");
    delivering.report.as_mut().unwrap().conditions.push(truncated);
    let waiting = compute_replay(&replay, &facts, Ok(Outcome::Started), &delivering);
    assert_eq!(waiting.phase, Some(ReplayPhase::Pending));
    assert_eq!(
        state(&waiting.conditions, "Progressing"),
        Some(("False", "ReceiverUnreachable"))
    );
    let failures = waiting.failures.clone().unwrap();
    assert_eq!(
        (
            failures.count,
            failures.last_reason.as_deref(),
            failures.last_message.as_deref()
        ),
        (1, Some("ReceiverUnreachable"), Some("the sentence"))
    );

    replay.status = Some(waiting);
    let mut next = Pod::default();
    next.metadata.creation_timestamp = Some(Time(at(60)));
    facts.pods.push(next);
    let again = compute_replay(&replay, &facts, Ok(Outcome::Started), &delivering);
    assert_eq!(again.phase, Some(ReplayPhase::Running));
    assert_eq!(state(&again.conditions, "Progressing"), Some(("True", "Replaying")));
    assert_eq!(again.failures, Some(failures));

    // It has begun, and the receiver goes again.
    let mut stuck = delivering;
    stuck.report.as_mut().unwrap().conditions = vec![said("Progressing", false, "ReceiverUnreachable")];
    replay.status = Some(again);
    let stuck = compute_replay(&replay, &facts, Ok(Outcome::Started), &stuck);
    assert_eq!(stuck.phase, Some(ReplayPhase::Pending));
    assert_eq!(
        state(&stuck.conditions, "Progressing"),
        Some(("False", "ReceiverUnreachable"))
    );
    assert_eq!(
        state(&stuck.conditions, "TruncatedRange"),
        Some(("True", "RetentionPassed")),
        "what was deleted does not come back"
    );
}

#[test]
fn an_attempt_that_left_nothing_is_told_as_that() {
    let mut replay = support::replay("replayjob.yaml");
    let mut tried = job(None);
    tried.status.as_mut().unwrap().failed = Some(1);
    let mut facts = replay::dereference::Facts {
        job: Some(tried),
        ..Default::default()
    };
    let told = |replay: &ReplayJob, facts: &replay::dereference::Facts| {
        let status = compute_replay(replay, facts, Ok(Outcome::Started), &support::nothing_reported());
        let reason = status.failures.clone().unwrap().last_reason.unwrap();
        (status, reason)
    };
    let (status, reason) = told(&replay, &facts);
    assert_eq!(reason, "PodGone");
    assert!(status.failures.unwrap().last_time.is_some());
    // One that did leave a word has not lost it when its pod goes.
    facts.pods = vec![last_word("Failed", "ReceiverUnreachable")];
    let (status, reason) = told(&replay, &facts);
    assert_eq!(reason, "ReceiverUnreachable");
    replay.status = Some(status);
    facts.pods.clear();
    assert_eq!(told(&replay, &facts).1, "ReceiverUnreachable");
}

#[test]
fn what_can_never_be_replayed_has_failed() {
    let error = Error::invalid("Accepted", Reason::FormatNotExact, "the sentence");
    let replay = support::replay("replayjob-postgres.yaml");
    let facts = replay::dereference::Facts::default();
    let status = compute_replay(&replay, &facts, Err(&error), &support::nothing_reported());
    assert_eq!(status.phase, Some(ReplayPhase::Failed));
    for (type_, is) in [
        ("Failed", "True"),
        ("Stalled", "True"),
        ("Accepted", "False"),
        ("Progressing", "False"),
    ] {
        assert_eq!(state(&status.conditions, type_), Some((is, "FormatNotExact")));
    }
    // One that runs was started when its pipeline was another.
    let facts = replay::dereference::Facts {
        job: Some(from_value(json!({"metadata": {"name": "replay"}})).unwrap()),
        ..facts
    };
    let status = compute_replay(&replay, &facts, Err(&error), &support::nothing_reported());
    assert_ne!(status.phase, Some(ReplayPhase::Failed));
}

#[test]
fn each_failure_is_told_by_what_caused_it() {
    let mut replay = support::replay("replayjob.yaml");
    replay.spec.active_deadline_seconds = Some(60);
    let mut drained = ended_pod(true, json!({"exitCode": 1}));
    drained.status.as_mut().unwrap().conditions = from_value(json!([
        {"type": "DisruptionTarget", "status": "True", "reason": "EvictionByEvictionAPI", "message": "drained"},
    ]))
    .unwrap();
    let mut evicted = ended_pod(true, json!(null));
    evicted.status.as_mut().unwrap().reason = Some("Evicted".into());
    let tried = "BackoffLimitExceeded";
    for (why, pods, reason, message) in [
        (
            "DeadlineExceeded",
            vec![last_word("Running", "Interrupted")],
            "DeadlineExceeded",
            "60 s",
        ),
        (
            tried,
            vec![last_word("Failed", "NoTable")],
            "NoTable",
            "the sentence (It was tried 4 times.)",
        ),
        (
            "PodFailurePolicy",
            vec![last_word("Failed", "NoTable")],
            "NoTable",
            "the sentence",
        ),
        (
            tried,
            vec![ended_pod(true, json!({"exitCode": 137, "reason": "OOMKilled"}))],
            "OOMKilled",
            "resources.limits.memory",
        ),
        (
            tried,
            vec![ended_pod(true, json!({"exitCode": 139}))],
            "PodFailed",
            "exit code 139",
        ),
        (
            tried,
            vec![ended_pod(
                true,
                json!({"exitCode": 128, "reason": "StartError", "message": "container init was OOM-killed"}),
            )],
            "PodFailed",
            "StartError: container init was OOM-killed",
        ),
        (tried, vec![drained], "EvictionByEvictionAPI", "drained"),
        (tried, vec![evicted], "Evicted", "Pod p failed"),
        (tried, vec![], "JobFailed", "describe job last-seconds-replay"),
    ] {
        let mut failed = job(Some("Failed"));
        let status = failed.status.as_mut().unwrap();
        status.failed = Some(4);
        status.conditions.as_mut().unwrap()[0].reason = Some(why.into());
        let facts = replay::dereference::Facts {
            job: Some(failed),
            pods,
            ..Default::default()
        };
        let status = compute_replay(&replay, &facts, Ok(Outcome::Started), &support::nothing_reported());
        assert!(status.failures.unwrap().last_reason.is_some());
        for type_ in ["Failed", "Progressing", "Stalled"] {
            let condition = status
                .conditions
                .iter()
                .find(|condition| condition.type_ == type_)
                .unwrap();
            assert_eq!(condition.reason, reason);
            assert!(condition.message.contains(message), "{}", condition.message);
        }
    }
}

#[test]
fn a_replay_that_says_nothing_is_not_said_to_deliver() {
    let mut replay = support::replay("replayjob.yaml");
    let facts = replay::dereference::Facts {
        job: Some(job(None)),
        pods: vec![from_value(json!({"metadata": {"name": "p"}})).unwrap()],
        ..Default::default()
    };
    let delivering = replay_report(Phase::Running, 5, 1.0);
    let progressing = |replay: &ReplayJob, observation: &Observation| {
        let status = compute_replay(replay, &facts, Ok(Outcome::Started), observation);
        let (status, reason) = state(&status.conditions, "Progressing").unwrap();
        (status.to_owned(), reason.to_owned())
    };
    let silent = |observation: Observation| Observation {
        silence: Duration::from_secs(31),
        ..observation
    };
    let new = support::nothing_reported();
    let is = |status: &str, reason: &str| (status.to_owned(), reason.to_owned());
    assert_eq!(progressing(&replay, &new), is("False", "Starting"));
    assert_eq!(progressing(&replay, &delivering), is("True", "Replaying"));
    assert_eq!(
        progressing(&replay, &silent(delivering.clone())),
        is("Unknown", "RuntimeSilent")
    );
    assert_eq!(
        progressing(&replay, &silent(new.clone())),
        is("Unknown", "RuntimeSilent")
    );
    // Where there is no pod, no log of one is named.
    let none = replay::dereference::Facts {
        pods: vec![],
        ..facts.clone()
    };
    let refused = compute_replay(&replay, &none, Ok(Outcome::Started), &silent(new.clone()));
    let condition = refused
        .conditions
        .iter()
        .find(|condition| condition.type_ == "Progressing");
    let condition = condition.unwrap();
    assert_eq!(condition.reason, "NoPod");
    assert!(
        condition
            .message
            .ends_with("kubectl -n default describe job last-seconds-replay"),
        "{}",
        condition.message
    );
    // An operator that has just started goes on from what the last one wrote.
    replay.status = Some(compute_replay(&replay, &facts, Ok(Outcome::Started), &delivering));
    assert_eq!(progressing(&replay, &new), is("True", "Replaying"));
}

#[test]
fn each_end_has_its_phase_and_its_condition() {
    use ReplayPhase::{Cancelled, Failed, Paused, Pending, Running};
    let replay = support::replay("replayjob.yaml");
    let waiting = Error::waiting("Accepted", Reason::PipelineNotFound, "create it");
    let none = replay::dereference::Facts::default();
    let with = |condition, pods: Vec<Pod>| replay::dereference::Facts {
        job: Some(job(condition)),
        pods,
        ..Default::default()
    };
    let new = support::nothing_reported();
    let check = |facts: &_, outcome, observation: &_, phase, type_: &str, expected: (&str, &str)| {
        let status = compute_replay(&replay, facts, outcome, observation);
        if matches!(type_, "Complete" | "Failed") || expected.0 == "False" {
            // The column shows the reason that matters.
            assert_eq!(
                state(&status.conditions, "Progressing"),
                Some(("False", expected.1)),
                "{status:?}"
            );
        }
        assert_eq!(status.phase, Some(phase), "{status:?}");
        assert_eq!(state(&status.conditions, type_), Some(expected), "{status:?}");
    };
    check(
        &none,
        Err(&waiting),
        &new,
        Pending,
        "Accepted",
        ("False", "PipelineNotFound"),
    );
    check(
        &none,
        Ok(Outcome::Saved),
        &new,
        Paused,
        "Suspended",
        ("True", "Suspended"),
    );
    check(
        &none,
        Ok(Outcome::Cancelled),
        &new,
        Cancelled,
        "Complete",
        ("False", "Cancelled"),
    );
    let started = Ok(Outcome::Started);
    check(
        &with(None, vec![]),
        started,
        &new,
        Pending,
        "Accepted",
        ("True", "Accepted"),
    );
    let paused = replay_report(Phase::Paused, 5, 1.0);
    check(
        &with(None, vec![]),
        started,
        &paused,
        Paused,
        "Suspended",
        ("True", "Suspended"),
    );
    // The runtime's own word for its end waits for its pod's.
    let done = replay_report(Phase::Succeeded, 5, 100.0);
    check(
        &with(None, vec![]),
        started,
        &done,
        Running,
        "Reconciling",
        ("True", "Replaying"),
    );
    let cancelled = vec![last_word("Cancelled", "Cancelled")];
    check(
        &with(None, cancelled),
        started,
        &new,
        Cancelled,
        "Complete",
        ("False", "Cancelled"),
    );
    let failed = vec![last_word("Failed", "TargetUnreachable")];
    check(
        &with(Some("Failed"), failed),
        started,
        &new,
        Failed,
        "Failed",
        ("True", "TargetUnreachable"),
    );
    check(
        &with(Some("Failed"), vec![]),
        started,
        &new,
        Failed,
        "Stalled",
        ("True", "JobFailed"),
    );
}

#[test]
fn a_cancelled_replay_whose_last_word_is_lost_did_not_deliver_everything() {
    use ReplayPhase::{Cancelled, Succeeded};
    let plain = support::replay("replayjob.yaml");
    let mut cancelled = plain.clone();
    cancelled.spec.cancel = true;
    let lost = |pods| replay::dereference::Facts {
        job: Some(job(Some("Complete"))),
        pods,
        ..Default::default()
    };
    let new = support::nothing_reported();
    let running = replay_report(Phase::Running, 5, 10.0);
    let said = |phase| replay_report(phase, 5, 10.0);
    for (replay, pods, observation, expected) in [
        (&plain, vec![], &new, Succeeded),
        (&plain, vec![], &said(Phase::Cancelled), Cancelled),
        (&cancelled, vec![], &new, Cancelled),
        (&cancelled, vec![], &running, Cancelled),
        // It was done before it heard.
        (&cancelled, vec![], &said(Phase::Succeeded), Succeeded),
        (
            &cancelled,
            vec![last_word("Succeeded", "Delivered")],
            &running,
            Succeeded,
        ),
    ] {
        let status = compute_replay(replay, &lost(pods), Ok(Outcome::Started), observation);
        assert_eq!(status.phase, Some(expected), "{observation:?}");
    }
}

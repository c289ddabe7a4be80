//! The status that a reconcile comes to: a value computed from the old one, from what was seen, and from what was done.

use std::time::Duration;

use jiff::Timestamp;
use k8s_openapi::apimachinery::pkg::apis::meta::v1::Condition;
use kube::ResourceExt as _;
use meander_crds::{
    AcceptedGap, CdcPipeline, CdcPipelineStatus, OversizedStatus, PipelinePhase, RedisState, RedisStatus, RefusedTable,
    Replication, Restarts, SchemaVersion, SinkPosition, SinkPositions, SlotReclaimPolicy, SlotStatus, SnapshotStatus,
    TableSnapshot, TableSnapshotState, TablesStatus,
};
use meander_proto::v1::{
    CaptureProgress, ProgressUpdate, RedisState as Reported, SnapshotProgress, progress_update::Progress,
    table_snapshot,
};

use super::{
    PAUSED,
    build::cleanup_name,
    cleanup::PATIENCE,
    dereference::{Facts, is_available, lacks_standby, refusal},
    is_paused,
    validate::{ValidPipeline, slot_of},
};
use crate::{
    conditions::{
        DEGRADED, Judgement, PROGRESSING, READY, RECONCILIATION_PAUSED, REDIS_GAP, RUNTIME_AVAILABLE, SINKS_READY,
        SOURCE_GAP, SOURCE_READY, SPEC_VALID, Status, conditions,
    },
    error::{Error, Reason},
    format,
    pod::{log_of, trouble},
    progress::{Observation, ResourceKey},
    secrets::{self, SecretFiles},
};

/// After this long without a report nothing is known of the source and the sinks.
pub const SILENCE: Duration = Duration::from_secs(30);
/// A capture that goes on for this long without beginning anew is well, in seconds.
const WELL: i64 = 600;

/// What a status is computed from.
#[derive(Debug)]
pub struct Inputs<'a> {
    /// The resource, with its old status.
    pub pipeline: &'a CdcPipeline,
    /// What the cluster holds, if it could be read.
    pub facts: Option<&'a Facts>,
    /// What came of validating and applying.
    pub outcome: Result<&'a ValidPipeline, &'a Error>,
    /// What the runtime reports.
    pub observation: &'a Observation,
    /// Now.
    pub now: Timestamp,
}

/// The status.
pub fn status(inputs: &Inputs<'_>) -> CdcPipelineStatus {
    let old = inputs.pipeline.status.clone().unwrap_or_default();
    let paused = is_paused(inputs.pipeline);
    // What somebody holds back was looked at, and not acted on.
    let generation = if paused {
        old.observed_generation
    } else {
        inputs.pipeline.metadata.generation
    };
    let mut judgements = judge(inputs, &old.conditions);
    let secrets = secrets::of_pipeline(inputs.pipeline);
    judgements = judgements
        .into_iter()
        .map(|judgement| naming_secrets(judgement, &secrets))
        .collect();
    judgements.insert(0, ready(inputs, &judgements));
    let phase = phase(inputs, &judgements, old.phase);
    let report = match inputs
        .observation
        .report
        .as_ref()
        .and_then(|report| report.progress.as_ref())
    {
        Some(Progress::Capture(progress)) => Some(progress),
        _ => None,
    };
    // A capture that has not opened its source yet has nothing to say of how far it is, and what was said before still holds.
    let progress = report.filter(|progress| progress.epoch > 0);
    let flows = is_measured(inputs, &judgements);
    let restarts = restarts(&old, progress, flows, inputs.now);
    let mut replication = progress.map(replication).or(old.replication);
    if let Some(replication) = replication.as_mut().filter(|_| !flows) {
        replication.lag_bytes = None;
        replication.lag_millis = None;
        replication.lag = Some("unknown".to_owned());
    }
    CdcPipelineStatus {
        observed_generation: generation,
        phase: Some(phase),
        reason: reason(phase, &judgements),
        conditions: conditions(&old.conditions, judgements, generation.unwrap_or(0), inputs.now),
        replication,
        restarts,
        slot: Some(slot(inputs.pipeline, report, old.slot)),
        tables: report.and_then(tables).or(old.tables),
        accepted_gap: progress.and_then(accepted_gap).or(old.accepted_gap),
        oversized: progress.and_then(oversized).or(old.oversized),
        snapshot: match progress {
            Some(progress) => progress.snapshot.as_ref().map(snapshot),
            None => old.snapshot,
        },
        sinks: progress.and_then(sinks).or(old.sinks),
        config_hash: inputs
            .outcome
            .ok()
            .filter(|_| !paused && waits_for(inputs).is_none())
            .map(|valid| valid.config_hash.clone())
            .or(old.config_hash),
    }
}

/// What must be written at once; the rest may wait for its turn.
pub fn significant(status: &CdcPipelineStatus) -> impl PartialEq + '_ {
    (
        status.observed_generation,
        status.phase,
        &status.conditions,
        status.slot.as_ref().map(|slot| {
            let facts = (slot.failover, slot.synced, &slot.wal_status, &slot.invalidation_reason);
            (&slot.name, facts)
        }),
        status
            .tables
            .as_ref()
            .map(|tables| (tables.captured, tables.refused_total, &tables.refused)),
        &status.config_hash,
        // Whether there is a lag, and not how long it is.
        status
            .replication
            .as_ref()
            .map(|replication| replication.lag_millis.is_some()),
    )
}

fn judge(inputs: &Inputs<'_>, old: &[Condition]) -> Vec<Judgement> {
    let problem = inputs.outcome.err().map(Error::problem);
    let goes_on = goes_on_as_before(inputs);
    let failed = |type_: &'static str| {
        problem
            .filter(|problem| problem.condition == type_ && !problem.reason.is_passing())
            .map(|problem| {
                let before = "Capture goes on as before; what is asked of it now cannot be done: ";
                let message = format!("{}{}", if goes_on { before } else { "" }, problem.message);
                Judgement::new(type_, Status::False, problem.reason, message)
            })
    };
    let mut judgements = vec![
        failed(SPEC_VALID).unwrap_or_else(|| Judgement::new(SPEC_VALID, Status::True, "Valid", "The spec is valid.")),
        failed(SOURCE_READY).unwrap_or_else(|| reported(inputs, SOURCE_READY, old)),
        failed(SINKS_READY).unwrap_or_else(|| reported(inputs, SINKS_READY, old)),
        failed(RUNTIME_AVAILABLE).unwrap_or_else(|| available(inputs, old)),
    ];
    if inputs.pipeline.spec.suspend {
        let message = "spec.suspend is set; set it to false to go on.";
        judgements.push(Judgement::new(PROGRESSING, Status::False, "Suspended", message));
    } else if let Some(report) = &inputs.observation.report {
        judgements.extend(said(report, PROGRESSING));
    } else {
        judgements.extend(Judgement::remembered(PROGRESSING, old));
    }
    if is_paused(inputs.pipeline) {
        let message = format!(
            "The annotation {PAUSED} is set, so what the pipeline needs is left as it is; to go on: kubectl -n {} annotate cdcp {} {PAUSED}-",
            inputs.pipeline.namespace().unwrap_or_default(),
            inputs.pipeline.name_any()
        );
        judgements.push(Judgement::new(
            RECONCILIATION_PAUSED,
            Status::True,
            "Annotated",
            message,
        ));
    }
    let stopped = is_stopped(&judgements);
    for type_ in [SOURCE_GAP, REDIS_GAP, DEGRADED] {
        let gap = match &inputs.observation.report {
            Some(report) => said(report, type_),
            // A gap does not close because the one who found it is silent.
            None => Judgement::remembered(type_, old),
        };
        let gap = gap.filter(|gap| gap.status == Status::True);
        let gap = gap.or_else(|| standby_is_missing(inputs).filter(|_| type_ == DEGRADED && !stopped));
        // What stopped the capture is looked at each time that it tries to go on; the others are not.
        judgements.extend(if stopped && type_ != SOURCE_GAP {
            gap.map(as_last_seen)
        } else {
            gap
        });
    }
    judgements
}

/// Changes flow as an older spec has it, and the newest is not fit to be applied.
fn goes_on_as_before(inputs: &Inputs<'_>) -> bool {
    let is_good = |report: &ProgressUpdate| {
        let judged = [SOURCE_READY, SINKS_READY, PROGRESSING].map(|type_| said(report, type_));
        judged
            .iter()
            .all(|judged| judged.as_ref().is_some_and(|judged| judged.status == Status::True))
    };
    let deployment = inputs.facts.and_then(|facts| facts.deployment.as_ref());
    inputs.outcome.is_err_and(|error| !error.problem().reason.is_passing())
        && deployment.is_some_and(is_available)
        && inputs.observation.silence <= SILENCE
        && inputs.observation.report.as_ref().is_some_and(is_good)
}

/// Changes flow, and nothing would take over.
fn standby_is_missing(inputs: &Inputs<'_>) -> Option<Judgement> {
    let facts = inputs.facts?;
    facts
        .deployment
        .as_ref()
        .filter(|deployment| lacks_standby(deployment))?;
    let why = trouble(&facts.pods).or_else(|| facts.deployment.as_ref().and_then(refusal));
    let message = why.unwrap_or_else(|| "The pod that stands by is not ready yet.".to_owned());
    Some(Judgement::new(DEGRADED, Status::True, "StandbyNotReady", message))
}

/// What nobody looks at while capture stands still: it need not be over, and need not be so any more.
fn as_last_seen(judgement: Judgement) -> Judgement {
    const THEN: &str = "When last looked at, ";
    // What is remembered may have been said like this before.
    let message = judgement.message.strip_prefix(THEN).unwrap_or(&judgement.message);
    Judgement::new(
        judgement.type_,
        judgement.status,
        &judgement.reason,
        format!("{THEN}{message}"),
    )
}

/// The reason of what nobody looks at while capture stands still.
const NOT_CAPTURING: &str = "NotCapturing";
/// What comes before the Secrets that are used.
const NAMING: &str = "; this pipeline uses ";

/// With the Secrets that are used, where what is wrong may be in one of them.
fn naming_secrets(judgement: Judgement, secrets: &[SecretFiles]) -> Judgement {
    let meant = (judgement.status != Status::True || judgement.type_ == DEGRADED)
        .then(|| secrets::meant_by(&judgement.reason, secrets))
        .flatten();
    let Some(meant) = meant else {
        return judgement;
    };
    // What is remembered may have been said like this before, of other Secrets.
    let message = judgement.message.split(NAMING).next().unwrap_or_default();
    let message = format!(
        "{}{NAMING}{meant}; a change of it reaches the pod within two minutes",
        message.trim_end_matches('.')
    );
    Judgement::new(judgement.type_, judgement.status, &judgement.reason, message)
}

fn is_stopped(judgements: &[Judgement]) -> bool {
    judgements
        .iter()
        .any(|judgement| judgement.type_ == PROGRESSING && judgement.status == Status::False)
}

/// What the runtime said of a condition.
fn said(report: &ProgressUpdate, type_: &'static str) -> Option<Judgement> {
    let condition = report.conditions.iter().find(|condition| condition.r#type == type_)?;
    Some(Judgement::new(
        type_,
        condition.status.into(),
        &condition.reason,
        &condition.message,
    ))
}

/// Whether a lag is known: it is measured while changes move. The last one is not true of a capture that stopped, as the positions still are, nor of one that
/// spoke and hung up.
fn is_measured(inputs: &Inputs<'_>, judgements: &[Judgement]) -> bool {
    let Observation {
        report,
        connected,
        silence,
        ..
    } = inputs.observation;
    !is_stopped(judgements) && *silence <= SILENCE && (report.is_none() || *connected)
}

/// Why capture stands still, by the word of the runtime.
fn standstill(inputs: &Inputs<'_>) -> Option<Judgement> {
    let progressing = said(inputs.observation.report.as_ref()?, PROGRESSING)?;
    (progressing.status == Status::False).then_some(progressing)
}

fn reported(inputs: &Inputs<'_>, type_: &'static str, old: &[Condition]) -> Judgement {
    if inputs.pipeline.spec.suspend {
        let message = "The pipeline is suspended, so nothing looks at this.";
        return Judgement::new(type_, Status::Unknown, "Suspended", message);
    }
    let silent = inputs.observation.silence > SILENCE;
    let now = inputs
        .observation
        .report
        .as_ref()
        .and_then(|report| said(report, type_));
    match now {
        Some(judgement) if !silent => judgement,
        None if !silent && let Some(standstill) = standstill(inputs) => {
            let message = format!(
                "Capture stands still ({}), so nothing looks at this; see the condition {READY}.",
                standstill.reason
            );
            Judgement::new(type_, Status::Unknown, NOT_CAPTURING, message)
        }
        // An operator that has just started goes on from what the last one wrote.
        None if !silent => Judgement::remembered(type_, old)
            // What the operator itself found is found again, or is no more.
            .filter(|judgement| judgement.reason != "Suspended" && !Reason::is_one(&judgement.reason))
            .unwrap_or_else(|| {
                let message = "The runtime has not reported yet.";
                Judgement::new(type_, Status::Unknown, "RuntimeStarting", message)
            }),
        _ => {
            let log = inputs.facts.and_then(|facts| log_of(&facts.pods));
            let message = format!(
                "The runtime has not reported for {} s; see the condition {RUNTIME_AVAILABLE}{}.",
                SILENCE.as_secs(),
                log.map(|command| format!(", and {command}")).unwrap_or_default()
            );
            Judgement::new(type_, Status::Unknown, "RuntimeSilent", message)
        }
    }
}

fn available(inputs: &Inputs<'_>, old: &[Condition]) -> Judgement {
    if inputs.pipeline.spec.suspend {
        let message = "spec.suspend is set; set it to false to go on.";
        return Judgement::new(RUNTIME_AVAILABLE, Status::False, "Suspended", message);
    }
    let Some(facts) = inputs.facts else {
        return Judgement::remembered(RUNTIME_AVAILABLE, old).unwrap_or_else(|| {
            Judgement::new(
                RUNTIME_AVAILABLE,
                Status::Unknown,
                "NotLooked",
                "The cluster could not be read.",
            )
        });
    };
    match &facts.deployment {
        None if inputs.outcome.is_err() || is_paused(inputs.pipeline) => Judgement::new(
            RUNTIME_AVAILABLE,
            Status::False,
            "NotStarted",
            "Nothing was started yet.",
        ),
        Some(deployment) if is_available(deployment) => {
            let waits = waits_for(inputs).map(|first| {
                let (namespace, name) = (&first.namespace, &first.name);
                format!(
                    " It keeps its image until that of this operator is seen to run: pipeline {namespace}/{name} tries it first."
                )
            });
            let message = format!("The runtime's pod is ready.{}", waits.unwrap_or_default());
            Judgement::new(RUNTIME_AVAILABLE, Status::True, "PodReady", message)
        }
        Some(deployment)
            if facts.pods.is_empty()
                && let Some(refusal) = refusal(deployment) =>
        {
            Judgement::new(RUNTIME_AVAILABLE, Status::False, "PodRefused", refusal)
        }
        _ => match trouble(&facts.pods) {
            Some(trouble) => Judgement::new(RUNTIME_AVAILABLE, Status::False, "PodFailing", trouble),
            None => match standstill(inputs).filter(|_| inputs.observation.connected) {
                Some(standstill) => {
                    let message = format!(
                        "The runtime's pod runs and reports; it is not ready while capture stands still ({}).",
                        standstill.reason
                    );
                    Judgement::new(RUNTIME_AVAILABLE, Status::True, "PodRunning", message)
                }
                None => Judgement::new(
                    RUNTIME_AVAILABLE,
                    Status::False,
                    "PodNotReady",
                    "The runtime's pod is not ready yet.",
                ),
            },
        },
    }
}

/// The pipeline that tries the image of this operator first.
fn waits_for<'a>(inputs: &Inputs<'a>) -> Option<&'a ResourceKey> {
    inputs.facts?.waits_for.as_ref()
}

/// True if everything is; otherwise what the first thing says that is not.
fn ready(inputs: &Inputs<'_>, judgements: &[Judgement]) -> Judgement {
    if inputs.pipeline.metadata.deletion_timestamp.is_some() {
        let message = match inputs.pipeline.spec.source.postgres.slot.reclaim_policy {
            SlotReclaimPolicy::Delete => format!(
                "The pipeline is being deleted. Its replication slot is dropped first, which is tried for up to {} s: kubectl -n {} logs job/{}",
                PATIENCE.as_secs(),
                inputs.pipeline.namespace().unwrap_or_default(),
                cleanup_name(inputs.pipeline)
            ),
            SlotReclaimPolicy::Retain => "The pipeline is being deleted, and its replication slot stays.".to_owned(),
        };
        return Judgement::new(READY, Status::False, "Terminating", message);
    }
    if inputs.pipeline.spec.suspend {
        let message = "spec.suspend is set; set it to false to go on.";
        return Judgement::new(READY, Status::False, "Suspended", message);
    }
    let gap = judgements
        .iter()
        .find(|judgement| matches!(judgement.type_, SOURCE_GAP | REDIS_GAP));
    // What is wrong says more than what is not known.
    let wanting = || {
        let first = |status| {
            judgements.iter().find(|judgement| {
                matches!(
                    judgement.type_,
                    SPEC_VALID | SOURCE_READY | SINKS_READY | RUNTIME_AVAILABLE
                ) && judgement.status == status
            })
        };
        first(Status::False).or_else(|| first(Status::Unknown))
    };
    // That nobody looks at the sinks says nothing: what does is why capture stands still.
    let held = || {
        judgements
            .iter()
            .find(|judgement| judgement.type_ == PROGRESSING && judgement.status == Status::False)
    };
    let wanting = || wanting().map(|wanting| held().filter(|_| wanting.reason == NOT_CAPTURING).unwrap_or(wanting));
    // A problem that belongs to no condition of its own, such as a reconcile that took too long, leaves what is known as it is.
    match (gap, wanting()) {
        (Some(gap), _) => Judgement::new(READY, Status::False, &gap.reason, &gap.message),
        (None, Some(wanting)) => Judgement::new(READY, wanting.status, &wanting.reason, &wanting.message),
        (None, None) => Judgement::new(
            READY,
            Status::True,
            "Streaming",
            "Changes flow from the source to every sink.",
        ),
    }
}

fn phase(inputs: &Inputs<'_>, judgements: &[Judgement], old: Option<PipelinePhase>) -> PipelinePhase {
    let is = |type_: &str, status: Status| {
        judgements
            .iter()
            .any(|judgement| judgement.type_ == type_ && judgement.status == status)
    };
    if inputs.pipeline.metadata.deletion_timestamp.is_some() {
        PipelinePhase::Terminating
    } else if is(SPEC_VALID, Status::False) || is(SOURCE_GAP, Status::True) {
        PipelinePhase::Failed
    } else if inputs.pipeline.spec.suspend {
        PipelinePhase::Suspended
    } else if is(READY, Status::True) && is(DEGRADED, Status::True) {
        PipelinePhase::Degraded
    } else if is(READY, Status::True) {
        match inputs
            .observation
            .report
            .as_ref()
            .and_then(|report| report.progress.as_ref())
        {
            Some(Progress::Capture(CaptureProgress {
                snapshot: Some(snapshot),
                ..
            })) if is_going_on(snapshot) => PipelinePhase::Snapshotting,
            _ => PipelinePhase::Streaming,
        }
    } else if inputs.outcome.is_err() && inputs.facts.is_some_and(|facts| facts.deployment.is_none()) {
        PipelinePhase::Pending
    } else if goes_on_as_before(inputs)
        || (flows(inputs)
            && (is(SINKS_READY, Status::False) || is(REDIS_GAP, Status::True))
            && !is(SOURCE_READY, Status::False)
            && !is(RUNTIME_AVAILABLE, Status::False))
    {
        // As an older spec has it; or Redis waits, and the log goes on.
        PipelinePhase::Degraded
    } else if is(SOURCE_READY, Status::False)
        || is(SINKS_READY, Status::False)
        || is(REDIS_GAP, Status::True)
        || matches!(
            old,
            Some(
                PipelinePhase::Streaming
                    | PipelinePhase::Snapshotting
                    | PipelinePhase::Degraded
                    | PipelinePhase::Interrupted
            )
        )
    {
        PipelinePhase::Interrupted
    } else {
        PipelinePhase::Starting
    }
}

/// Why that is the phase. Ready has nothing to say of what needs a look while it is True.
fn reason(phase: PipelinePhase, judgements: &[Judgement]) -> Option<String> {
    let of = |type_: &str| judgements.iter().find(|judgement| judgement.type_ == type_);
    let ready = of(READY)?;
    let told = of(DEGRADED).filter(|_| phase == PipelinePhase::Degraded && ready.status == Status::True);
    Some(told.unwrap_or(ready).reason.clone())
}

/// Whether changes are captured, by the word of a runtime that is heard.
fn flows(inputs: &Inputs<'_>) -> bool {
    let report = inputs.observation.report.as_ref();
    inputs.observation.silence <= SILENCE
        && report
            .and_then(|report| said(report, PROGRESSING))
            .is_some_and(|progressing| progressing.status == Status::True)
}

/// True if tables are left to read, and not only such as cannot be.
fn is_going_on(snapshot: &SnapshotProgress) -> bool {
    let mut shown = snapshot.tables.iter();
    snapshot.tables_done < snapshot.tables_total && shown.any(|table| table.state() != table_snapshot::State::Refused)
}

/// What was last seen of the slot. It is remembered while nobody looks, since what it holds back stays.
fn slot(pipeline: &CdcPipeline, progress: Option<&CaptureProgress>, old: Option<SlotStatus>) -> SlotStatus {
    let name = slot_of(pipeline);
    let said = |text: &str| (!text.is_empty()).then(|| text.to_owned());
    match progress.and_then(|progress| progress.slot.as_ref()) {
        Some(slot) => SlotStatus {
            name,
            wal_status: said(&slot.wal_status),
            retained_wal_bytes: slot.retained_wal_bytes,
            safe_wal_bytes: slot.safe_wal_bytes,
            restart_lsn: format::lsn(slot.restart_lsn),
            confirmed_flush_lsn: format::lsn(slot.confirmed_flush_lsn),
            active_pid: slot.active_pid,
            failover: slot.failover,
            synced: slot.synced,
            invalidation_reason: said(&slot.invalidation_reason),
            inactive_since: format::time_of_micros(slot.inactive_since_micros),
        },
        None => SlotStatus {
            name,
            ..old.unwrap_or_default()
        },
    }
}

fn accepted_gap(progress: &CaptureProgress) -> Option<AcceptedGap> {
    let gap = progress.accepted_gap.as_ref()?;
    Some(AcceptedGap {
        id: gap.id.clone(),
        reason: gap.reason.clone(),
        lost_after_lsn: format::lsn(gap.lost_after_lsn),
        resumed_lsn: format::lsn(gap.resumed_lsn),
        time: format::time_of_micros(gap.time_micros),
    })
}

fn oversized(progress: &CaptureProgress) -> Option<OversizedStatus> {
    let oversized = progress.oversized.as_ref()?;
    Some(OversizedStatus {
        records: oversized.records_total,
        last_table: oversized.last_table.clone(),
        last_position: oversized.last_position.clone(),
        last_bytes: oversized.last_bytes,
    })
}

/// None until the tables were looked at.
fn tables(progress: &CaptureProgress) -> Option<TablesStatus> {
    let looked = progress.captured_tables > 0 || progress.refused_tables_total > 0;
    looked.then(|| TablesStatus {
        captured: progress.captured_tables,
        refused_total: progress.refused_tables_total,
        refused: progress
            .refused_tables
            .iter()
            .map(|refused| RefusedTable {
                table: refused.table.clone(),
                reason: refused.reason.clone(),
            })
            .collect(),
        schemas: progress
            .schemas
            .iter()
            .take(100)
            .map(|schema| SchemaVersion {
                table: schema.table.clone(),
                version: schema.version,
                since: schema.since.clone(),
            })
            .collect(),
    })
}

/// Each begin takes the slot over from the one before, also where both are in one process.
fn restarts(
    old: &CdcPipelineStatus,
    progress: Option<&CaptureProgress>,
    flows: bool,
    now: Timestamp,
) -> Option<Restarts> {
    let before = old.replication.as_ref().map_or(0, |before| before.owner_generation);
    let began = progress.map_or(0, |progress| progress.owner_generation.saturating_sub(before));
    let counted = old.restarts.clone();
    if before > 0 && began > 0 {
        return Some(Restarts {
            count: began + counted.map_or(0, |counted| counted.count),
            last_time: format::time(now),
        });
    }
    counted.filter(|counted| {
        let last: Option<Timestamp> = counted.last_time.parse().ok();
        !flows || last.is_some_and(|last| now.as_second() - last.as_second() < WELL)
    })
}

fn replication(progress: &CaptureProgress) -> Replication {
    Replication {
        received_lsn: format::lsn(progress.received_lsn),
        published_lsn: format::lsn(progress.published_lsn),
        confirmed_flush_lsn: format::lsn(progress.confirmed_flush_lsn),
        lag_bytes: Some(progress.lag_bytes),
        lag_millis: Some(progress.lag_millis),
        lag: Some(format::short_duration(Duration::from_millis(progress.lag_millis))),
        last_event_time: format::time_of_micros(progress.last_event_time_micros),
        events_total: progress.events_total,
        epoch: progress.epoch,
        owner_generation: progress.owner_generation,
    }
}

fn snapshot(progress: &SnapshotProgress) -> SnapshotStatus {
    #[allow(clippy::cast_possible_truncation, clippy::cast_sign_loss)]
    let whole = |percent: f64| percent.clamp(0.0, 100.0).floor() as u32;
    let state = |table: &table_snapshot::State| match table {
        table_snapshot::State::Reading => TableSnapshotState::Reading,
        table_snapshot::State::Waiting => TableSnapshotState::Waiting,
        table_snapshot::State::Refused => TableSnapshotState::Refused,
        table_snapshot::State::Pending | table_snapshot::State::Unspecified => TableSnapshotState::Pending,
    };
    SnapshotStatus {
        percent: whole(progress.percent),
        tables_done: progress.tables_done,
        tables_total: progress.tables_total,
        tables: progress
            .tables
            .iter()
            .take(100)
            .map(|table| TableSnapshot {
                name: table.table.clone(),
                state: state(&table.state()),
                rows: table.rows,
                percent: whole(table.percent),
                message: (!table.message.is_empty()).then(|| table.message.clone()),
            })
            .collect(),
    }
}

/// None before the first change: server-side apply takes an empty object in place of a full one for null, and refuses it.
fn sinks(progress: &CaptureProgress) -> Option<SinkPositions> {
    let positions = SinkPositions {
        kafka: (!progress.kafka_position.is_empty()).then(|| SinkPosition {
            position: progress.kafka_position.clone(),
        }),
        redis: redis(progress),
    };
    (positions != SinkPositions::default()).then_some(positions)
}

fn redis(progress: &CaptureProgress) -> Option<RedisStatus> {
    let some = |text: &str| (!text.is_empty()).then(|| text.to_owned());
    Some(RedisStatus {
        position: some(&progress.redis_position),
        state: match progress.redis_state() {
            Reported::Unspecified => return None,
            Reported::Attached => RedisState::Attached,
            Reported::Refilling => RedisState::Refilling,
            Reported::Detached => RedisState::Detached,
        },
        last_error: some(&progress.redis_last_error),
    })
}

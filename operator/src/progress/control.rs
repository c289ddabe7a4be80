//! Pause, speed and cancel that come over gRPC: they are written to the replay's spec, which alone says what is asked.

use kube::{
    Api, ResourceExt as _,
    api::{Patch, PatchParams},
    runtime::events::EventType,
};
use meander_crds::ReplayJob;
use meander_proto::v1::ControlReplayRequest;
use serde_json::{Map, Value, json};
use tonic::Status;

use super::ResourceKey;
use crate::{context::Context, naming::FIELD_MANAGER, replay::directive};

/// Writes what `user` asks of a replay to its spec, and has its runtime told. Returns the generation that it has now.
///
/// # Errors
/// NOT_FOUND, INVALID_ARGUMENT where the spec cannot say that, FAILED_PRECONDITION where the replay has ended or is another one.
pub async fn control(
    context: &Context,
    key: &ResourceKey,
    user: &str,
    request: ControlReplayRequest,
) -> Result<i64, Status> {
    let uid = request.uid.clone();
    let asked = asked(request);
    if asked.is_empty() {
        return Err(Status::invalid_argument(
            "set at least one of suspend, speed and cancel",
        ));
    }
    let api: Api<ReplayJob> = Api::namespaced(context.client.clone(), &key.namespace);
    let replay = api.get(&key.name).await.map_err(|error| refusal(&error))?;
    let is_other = !uid.is_empty() && replay.uid().as_ref() != Some(&uid);
    if is_other || replay.metadata.deletion_timestamp.is_some() {
        return Err(Status::failed_precondition("that replay is gone"));
    }
    let phase = replay.status.as_ref().and_then(|status| status.phase);
    if let Some(phase) = phase.filter(|phase| phase.is_terminal()) {
        return Err(Status::failed_precondition(format!(
            "the replay has ended as {phase:?}; create another one"
        )));
    }
    let words: Vec<String> = asked.iter().map(|(field, value)| format!("{field}: {value}")).collect();
    let patch = Patch::Merge(json!({"metadata": {"uid": replay.uid()}, "spec": asked}));
    let params = PatchParams {
        field_manager: Some(FIELD_MANAGER.to_owned()),
        ..PatchParams::default()
    };
    let replay = api
        .patch(&key.name, &params, &patch)
        .await
        .map_err(|error| refusal(&error))?;
    // The watch would tell it a moment later.
    let uid = replay.uid().unwrap_or_default();
    context.tracker.direct(key, &uid, directive(&replay));
    let note = format!("{user} asked over gRPC for {}", words.join(", "));
    tracing::info!(namespace = key.namespace, name = key.name, note, "controlled");
    // Events of the same action are counted as one, with the words of the first: each that was asked is one of its own.
    let action: String = note.chars().take(128).collect();
    context
        .events
        .publish(&replay, EventType::Normal, &action, "Controlled", &note)
        .await;
    Ok(replay.metadata.generation.unwrap_or(0))
}

/// The fields of the spec that are to change.
fn asked(request: ControlReplayRequest) -> Map<String, Value> {
    [
        ("suspend", request.suspend.map(Value::from)),
        ("speed", request.speed.map(Value::from)),
        ("cancel", request.cancel.map(Value::from)),
    ]
    .into_iter()
    .filter_map(|(field, value)| Some((field.to_owned(), value?)))
    .collect()
}

fn refusal(error: &kube::Error) -> Status {
    match error {
        kube::Error::Api(status) => match status.code {
            404 => Status::not_found("there is no such ReplayJob"),
            // The message is that of the rule, such as: cancel cannot be taken back.
            400 | 422 => Status::invalid_argument(status.message.clone()),
            409 => Status::failed_precondition("that replay is gone"),
            401 | 403 => Status::failed_precondition(format!(
                "the operator itself may not do that; check its ClusterRole: {}",
                status.message
            )),
            _ => Status::unavailable("the API server did not answer; try again"),
        },
        _ => Status::unavailable("the API server did not answer; try again"),
    }
}

//! A replay of everything into other topics, under faults of its own, which has to be the log once more.

use std::time::{Duration, Instant};

use meander_config::{
    KafkaSink, ReplayConfig, ReplayEnd, ReplayOrder, ReplayStart, ReplayTarget, ResourceIdentity, Speed,
};
use meander_test_support::{Runtime, free_address, unique_name};
use tokio::time::sleep;

use crate::{
    LIMIT,
    fault::{Kind, Round},
    perform,
    rig::Rig,
};

/// How long it takes if nothing befalls it.
const PLANNED: Duration = Duration::from_secs(30);
/// More attempts than this many for each fault are a replay that does not come to its end.
const ATTEMPTS: usize = 5;
const LOOK: Duration = Duration::from_millis(200);

/// What became of the replay.
pub struct Copy {
    /// Prefix of its topics.
    pub topics: String,
    pub faults: usize,
    /// Processes that it took.
    pub attempts: usize,
}

/// Replays what happened in so long a time, while these faults come.
pub async fn make(rig: &mut Rig, history: Duration, rounds: Vec<Round>) -> Copy {
    let topics = unique_name("copy");
    rig.replay = Some(Runtime::replay(&config(rig, &topics, history)));
    let most = 1 + ATTEMPTS * rounds.len();
    let (mut attempts, mut faults) = (1, 0);
    for round in rounds {
        sleep(round.pause).await;
        if goes_on(rig, &mut attempts) {
            let names: Vec<_> = round.faults.iter().map(|fault| fault.kind.name()).collect();
            println!("         {}", names.join(", and "));
            perform(rig, &round, None).await;
            let killed = round.faults.iter().filter(|fault| fault.kind == Kind::ReplayKilled);
            attempts += killed.count();
            faults += round.faults.len();
        }
    }
    let deadline = Instant::now() + LIMIT;
    while goes_on(rig, &mut attempts) {
        assert!(attempts <= most, "the replay has failed {attempts} times");
        assert!(Instant::now() < deadline, "the replay does not come to its end");
        sleep(LOOK).await;
    }
    Copy {
        topics,
        faults,
        attempts,
    }
}

/// Whether it is not complete. One that has failed is started again, as Kubernetes does it.
fn goes_on(rig: &mut Rig, attempts: &mut usize) -> bool {
    let Some(replay) = &mut rig.replay else { return false };
    match replay.process().exit_status() {
        None => true,
        Some(status) if status.success() => {
            rig.replay = None;
            false
        }
        Some(_) => {
            *attempts += 1;
            replay.start_again();
            true
        }
    }
}

fn config(rig: &Rig, topics: &str, history: Duration) -> ReplayConfig {
    let pipeline = &rig.config;
    let mut kafka = pipeline.kafka.clone();
    kafka.bootstrap_servers = vec![rig.relayed_kafka()];
    ReplayConfig {
        job: ResourceIdentity {
            namespace: pipeline.pipeline.namespace.clone(),
            name: topics.to_owned(),
            uid: "1".to_owned(),
        },
        pipeline: pipeline.pipeline.clone(),
        slot_name: pipeline.source.slot_name.clone(),
        kafka: kafka.log(),
        from: ReplayStart::Beginning,
        to: ReplayEnd::Now,
        speed: Speed::Factor((history.as_secs_f64() / PLANNED.as_secs_f64()).max(1.0)),
        suspended: false,
        filter: None,
        max_gap_seconds: None,
        order: ReplayOrder::Commit,
        target: ReplayTarget::Kafka(KafkaSink {
            topic_prefix: topics.to_owned(),
            ..kafka
        }),
        operator: None,
        admin_address: free_address(),
        termination_message_file: None,
    }
}

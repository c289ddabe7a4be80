//! What Kafka has left open of transactions that it says are over.
//!
//! A partition learns by a marker whether a transaction is committed or aborted. A broker that has to write the marker while the partition has
//! no leader takes the partition for deleted, writes none, and says that the transaction is over (seen with Kafka 4.3.1). What is in the
//! partition then stays open, nobody sees it, and the next marker of the same producer settles it together with what it is for. So the records of an aborted
//! transaction, which are written again, would come to be there twice.
//!
//! Whoever has signed on therefore looks for it before it writes, and aborts what its checkpoint does not tell of.

use std::{
    thread,
    time::{Duration, Instant},
};

use meander_config::KafkaCluster;
use rdkafka::message::OwnedMessage;

use super::{SinkError, producer::TransactionalProducer};
use crate::checkpoint::Tail;

/// How long Kafka may take to tell what is in a partition.
const READ_DEADLINE: Duration = Duration::from_secs(15);
/// How long it may take until what was aborted is settled in all partitions.
const SETTLE_DEADLINE: Duration = Duration::from_secs(15);
/// Between two looks.
const LOOK: Duration = Duration::from_millis(20);

/// Aborts what is left open in the topics that are `wanted`, in each partition whose first such record `is_void`: it is of a transaction that
/// the checkpoint does not tell of. What the checkpoint does tell of stays, and the next commit in its partition settles it; so does what only
/// the newest record counts of, such as the checkpoint itself. `committed` reads committed records only. Blocks.
///
/// The producer must be the one that wrote it, and have signed on since: then nothing else of it is open.
///
/// # Errors
/// When Kafka does not answer in time, or what was aborted stays open, which is then another producer's.
pub fn abort(
    cluster: &KafkaCluster,
    producer: &TransactionalProducer,
    committed: &Tail,
    wanted: impl Fn(&str) -> bool,
    is_void: impl Fn(&OwnedMessage) -> bool,
) -> Result<(), SinkError> {
    let everything = Tail::of_everything(cluster, READ_DEADLINE)?;
    // In this order: what is settled meanwhile is not taken for open.
    let ends = everything.ends(&wanted)?;
    let stable = committed.ends(&wanted)?;
    let mut open = Vec::new();
    for ((topic, partition), end) in ends {
        let place = (topic, partition);
        let Some(from) = stable.get(&place).filter(|stable| **stable < end) else {
            continue;
        };
        let (topic, partition) = place;
        let first = everything.first_in(&topic, partition, *from..end)?;
        if first.as_ref().is_some_and(&is_void) {
            open.push((topic, partition, end));
        }
    }
    if open.is_empty() {
        return Ok(());
    }
    let partitions = open.len();
    tracing::warn!(
        partitions,
        "Kafka has left records of an aborted transaction open, and they are aborted again"
    );
    producer.abort_in(open.iter().map(|(topic, partition, _)| (&**topic, *partition)))?;
    let deadline = Instant::now() + SETTLE_DEADLINE;
    loop {
        let stable = committed.ends(&wanted)?;
        open.retain(|(topic, partition, end)| {
            stable
                .get(&(topic.clone(), *partition))
                .is_none_or(|stable| stable < end)
        });
        let Some((topic, partition, _)) = open.first() else {
            return Ok(());
        };
        if Instant::now() > deadline {
            return Err(SinkError::KafkaTransaction(format!(
                "a transaction is left open in partition {partition} of the topic {topic:?}, and it is none of this writer's; find it with kafka-transactions.sh find-hanging, and abort it"
            )));
        }
        thread::sleep(LOOK);
    }
}

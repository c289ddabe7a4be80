//! Whose a replication slot is: of two pipelines that name one slot of one server, the one that came first has it.
//!
//! The runtimes would find out as well, but only while both run: the one that comes while the other is down reads on from where the slot
//! stands, and what the other had still to read is gone.

use std::{cmp::Ordering, sync::Arc};

use kube::ResourceExt as _;
use meander_crds::CdcPipeline;

use super::{FINALIZER, validate::slot_of};

/// `namespace/name` of the pipeline that has this one's slot, if it is another one. `known` is a cache, so nobody is asked for this.
pub fn held_by(pipeline: &CdcPipeline, known: &[Arc<CdcPipeline>]) -> Option<String> {
    let slot = slot_of(pipeline);
    let server = server_of(pipeline);
    known
        .iter()
        // Every pipeline is compared with every other, and next to none have a slot of the same name.
        .filter(|other| names(other, pipeline, &slot) && !is_same(other, pipeline))
        .filter(|other| holds(other) && server_of(other) == server)
        .find(|other| came_first(other, pipeline) == Ordering::Less)
        .map(|other| format!("{}/{}", other.namespace().unwrap_or_default(), other.name_any()))
}

/// Whether `other` has a slot of the name that `pipeline` has. Names that are made from those of two pipelines are never the same.
fn names(other: &CdcPipeline, pipeline: &CdcPipeline, slot: &str) -> bool {
    let written = |pipeline: &CdcPipeline| pipeline.spec.source.postgres.slot.name.is_some();
    (written(other) || written(pipeline)) && slot_of(other) == slot
}

/// The server, as it is called from everywhere in the cluster. Names of slots are the server's, not a database's.
fn server_of(pipeline: &CdcPipeline) -> (String, u16) {
    let postgres = &pipeline.spec.source.postgres;
    let host = postgres.host.to_ascii_lowercase();
    let host = host.trim_end_matches('.');
    let host = host.strip_suffix(".svc.cluster.local").unwrap_or(host);
    let mut host = host.strip_suffix(".svc").unwrap_or(host).to_owned();
    // A Service of the pipeline's own namespace.
    if !host.contains(['.', ':']) {
        host = format!("{host}.{}", pipeline.namespace().unwrap_or_default());
    }
    (host, postgres.port)
}

fn is_same(one: &CdcPipeline, other: &CdcPipeline) -> bool {
    (one.namespace(), one.name_any()) == (other.namespace(), other.name_any())
}

/// One that is being deleted holds its slot until that is cleaned up.
fn holds(pipeline: &CdcPipeline) -> bool {
    pipeline.metadata.deletion_timestamp.is_none() || is_taken_on(pipeline)
}

/// What was taken on before stays first: a later pipeline of the same second must not push it aside.
fn came_first(one: &CdcPipeline, other: &CdcPipeline) -> Ordering {
    let rank = |pipeline: &CdcPipeline| {
        (
            !is_taken_on(pipeline),
            pipeline.metadata.creation_timestamp.as_ref().map(|time| time.0),
            pipeline.namespace(),
            pipeline.name_any(),
        )
    };
    rank(one).cmp(&rank(other))
}

fn is_taken_on(pipeline: &CdcPipeline) -> bool {
    pipeline.finalizers().iter().any(|finalizer| finalizer == FINALIZER)
}

#[cfg(test)]
mod tests {
    use jiff::Timestamp;
    use k8s_openapi::apimachinery::pkg::apis::meta::v1::Time;

    use super::*;

    fn pipeline(namespace: &str, name: &str, host: &str, created: i64) -> CdcPipeline {
        let mut pipeline: CdcPipeline =
            serde_saphyr::from_str(include_str!("../../../deploy/examples/pipeline.yaml")).unwrap();
        pipeline.metadata.namespace = Some(namespace.to_owned());
        pipeline.metadata.name = Some(name.to_owned());
        pipeline.metadata.creation_timestamp = Some(Time(Timestamp::from_second(created).unwrap()));
        pipeline.spec.source.postgres.host = host.to_owned();
        pipeline.spec.source.postgres.slot.name = Some("one".to_owned());
        pipeline
    }

    #[test]
    fn the_first_of_two_pipelines_has_the_slot_whatever_they_call_the_server() {
        let first = pipeline("shop", "b", "Postgres", 1);
        for host in ["postgres.shop", "postgres.shop.svc", "postgres.shop.svc.cluster.local."] {
            let second = pipeline("other", "a", host, 2);
            let known = [Arc::new(first.clone()), Arc::new(second.clone())];
            assert_eq!(held_by(&second, &known).as_deref(), Some("shop/b"), "{host}");
            assert_eq!(held_by(&first, &known), None, "{host}");
        }
        let mut another_slot = pipeline("shop", "a", "postgres", 2);
        another_slot.spec.source.postgres.slot.name = Some("two".to_owned());
        // The same name means another server in another namespace.
        for free in [another_slot, pipeline("other", "a", "postgres", 2)] {
            let known = [Arc::new(first.clone()), Arc::new(free.clone())];
            assert_eq!(held_by(&free, &known), None);
        }
    }

    #[test]
    fn what_was_taken_on_stays_first_and_what_is_gone_holds_nothing() {
        let finalizers = Some(vec![FINALIZER.to_owned()]);
        let mut taken_on = pipeline("shop", "b", "postgres", 1);
        taken_on.metadata.finalizers = finalizers.clone();
        let same_second = pipeline("shop", "a", "postgres", 1);
        let known = [Arc::new(taken_on.clone()), Arc::new(same_second.clone())];
        assert_eq!(held_by(&same_second, &known).as_deref(), Some("shop/b"));
        assert_eq!(held_by(&taken_on, &known), None);

        let mut going = taken_on;
        going.metadata.deletion_timestamp = Some(Time(Timestamp::from_second(9).unwrap()));
        let known = [Arc::new(going.clone())];
        assert_eq!(held_by(&same_second, &known).as_deref(), Some("shop/b"));
        going.metadata.finalizers = Some(vec!["somebody.else/finalizer".to_owned()]);
        assert_eq!(held_by(&same_second, &[Arc::new(going)]), None);
    }
}

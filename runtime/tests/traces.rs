//! What a capture and a replay tell a collector of traces, and that they do without one.
#![allow(clippy::unwrap_used, clippy::expect_used, clippy::panic)]

mod common;
#[path = "common/replay.rs"]
mod replay;

use std::collections::BTreeSet;

use common::{LIMIT, config};
use meander_config::{ReplayTarget, SnapshotRequest};
use meander_test_support::{
    Kafka, Postgres, Redis, Runtime,
    collector::{Collector, Span, attribute},
    eventually, free_address,
};

/// Of a start that finds a slot.
const STEPS: [&str; 8] = [
    "connect",
    "check source",
    "make topics",
    "own slot",
    "fence others",
    "read checkpoint",
    "check for a gap",
    "first commit",
];

fn succeeded(span: &Span) -> bool {
    span.status.as_ref().is_none_or(|status| status.code == 0)
}

#[tokio::test(flavor = "multi_thread")]
async fn the_start_the_transactions_the_snapshots_and_the_replay_are_traced_once_the_collector_is_there() {
    let (postgres, redis, kafka) = (Postgres::start(&[]).await, Redis::start().await, Kafka::shared().await);
    let client = postgres.client().await;
    let table = "CREATE TABLE t (id int PRIMARY KEY, secret text); INSERT INTO t SELECT i, 'seen-by-nobody' FROM generate_series(1, 100) i";
    client.batch_execute(table).await.unwrap();
    let mut pipeline = config(&postgres, kafka, Some(&redis));
    let address = free_address();
    let endpoint = format!("http://{address}");
    let variables = [
        ("OTEL_EXPORTER_OTLP_ENDPOINT", endpoint.as_str()),
        ("OTEL_BSP_SCHEDULE_DELAY", "200"),
    ];

    // Nobody is there: the capture works, says so once, and ends in time.
    let mut capture = Runtime::capture_with(&pipeline, &variables);
    let log = capture.process().log().to_owned();
    let says = |words: &str| std::fs::read_to_string(&log).unwrap().matches(words).count();
    capture.ready(LIMIT).await;
    eventually("it is said that nobody takes them", LIMIT, async || {
        (says("traces are lost") == 1).then_some(()).ok_or("it is not")
    })
    .await;
    assert!(capture.terminate(LIMIT).success());
    assert_eq!(says("traces are lost"), 1);

    let collector = Collector::start(address).await;
    pipeline.source.snapshot.requests = vec![SnapshotRequest {
        id: "all".to_owned(),
        tables: vec!["public.t".to_owned()],
    }];
    let mut capture = Runtime::capture_with(&pipeline, &variables);
    capture.ready(LIMIT).await;
    client
        .batch_execute("INSERT INTO t VALUES (0, 'seen-by-nobody')")
        .await
        .unwrap();
    let mut last = None;
    eventually(
        "the start and its steps, and a transaction are told",
        LIMIT,
        async || {
            let spans = collector.spans();
            let names: BTreeSet<_> = spans.iter().map(|span| span.name.clone()).collect();
            let start = spans.iter().find(|span| span.name == "start" && succeeded(span));
            let start = start.ok_or_else(|| format!("{names:?}"))?;
            for step in STEPS {
                let is_step = |span: &&Span| span.name == step && span.parent_span_id == start.span_id;
                spans
                    .iter()
                    .find(is_step)
                    .ok_or_else(|| format!("no {step} of {names:?}"))?;
            }
            let is_full = |name: &str, number: &str, span: &&Span| {
                span.name == name && attribute(span, number).is_some_and(|number| number != "0")
            };
            last = spans
                .iter()
                .find(|span| is_full("transaction", "changes", span))
                .cloned();
            let chunk = spans.iter().find(|span| is_full("snapshot chunk", "rows", span));
            chunk.ok_or_else(|| format!("{names:?}"))?;
            last.as_ref().map(drop).ok_or_else(|| format!("{names:?}"))
        },
    )
    .await;
    let last = last.unwrap();
    for name in ["pipeline", "first", "last", "bytes"] {
        assert!(attribute(&last, name).is_some(), "{name} of {last:?}");
    }

    let job = replay::everything(&pipeline, ReplayTarget::DryRun);
    let mut replayed = Runtime::replay_with(&job, &variables);
    eventually("the replay is told", LIMIT, async || {
        let spans = collector.spans();
        let whole = spans.iter().find(|span| span.name == "replay").ok_or("it is not")?;
        assert_eq!(attribute(whole, "replay").as_ref(), Some(&job.job.name));
        let is_part = |name| {
            spans
                .iter()
                .any(|span| span.name == name && span.parent_span_id == whole.span_id)
        };
        (is_part("resolve range") && is_part("deliver"))
            .then_some(())
            .ok_or("its parts are not")
    })
    .await;
    replayed.terminate(LIMIT);
    assert!(capture.terminate(LIMIT).success());
    let all = format!("{:?}", collector.spans());
    assert!(!all.contains("seen-by-nobody"), "no row is in a trace");
}

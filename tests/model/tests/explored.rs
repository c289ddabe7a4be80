//! The model keeps every promise in every state, and the checker notices each rule that is not kept.
//!
//! A short exploration is part of `make test`; `make test-long` goes further.
#![allow(clippy::unwrap_used, clippy::expect_used, clippy::panic)]

use std::{collections::BTreeSet, time::Instant};

use meander_model::{Protocol, Rule, State, Step, promise};
use stateright::{Checker as _, Expectation, HasDiscoveries, Model as _, Path};

/// Two processes.
fn protocol(transactions: &[u8], remade: Option<u8>, faults: u8) -> Protocol {
    Protocol {
        transactions: transactions.to_vec(),
        remade,
        processes: 2,
        faults,
        required: false,
        broken: None,
    }
}

fn required(protocol: Protocol) -> Protocol {
    Protocol {
        required: true,
        ..protocol
    }
}

/// Explores all of it. Returns which of the things that may happen did.
fn explore(protocol: Protocol) -> BTreeSet<&'static str> {
    let started = Instant::now();
    let said = format!("{protocol:?}");
    let checked = protocol.checker().threads(2).spawn_bfs().join();
    let discoveries = checked.discoveries();
    println!(
        "{said}: {} states, {} steps at most, {:.1} s",
        checked.unique_state_count(),
        checked.max_depth() - 1,
        started.elapsed().as_secs_f64()
    );
    for property in checked.model().properties() {
        if property.expectation != Expectation::Sometimes
            && let Some(path) = discoveries.get(property.name)
        {
            panic!("not kept: {}, after {}", property.name, told(path.clone()));
        }
    }
    discoveries.into_keys().collect()
}

/// A state on a line, and the step that was taken in it on the next.
fn told(path: Path<State, Step>) -> String {
    let tell = |(state, step): (State, Option<Step>)| format!("\n{state:?}\n  {step:?}");
    path.into_vec().into_iter().map(tell).collect()
}

const EVERYTHING: [&str; 3] = [promise::AHEAD, promise::ZOMBIE, promise::UNKNOWN];

#[test]
fn every_promise_is_kept_whatever_fails() {
    let happened = explore(protocol(&[1, 3], Some(2), 1));
    assert_eq!(happened, BTreeSet::from(EVERYTHING));
    explore(required(protocol(&[1, 2], None, 1)));
    explore(protocol(&[1], None, 2));
}

#[test]
#[ignore = "make test-long: takes minutes"]
fn every_promise_is_kept_whatever_fails_more_often() {
    for faults in [
        protocol(&[2], Some(1), 2),
        protocol(&[1, 2], Some(2), 2),
        required(protocol(&[1, 2], None, 2)),
    ] {
        explore(faults);
    }
}

#[test]
fn a_rule_that_is_not_kept_breaks_a_promise() {
    let one = protocol(&[1, 3], Some(2), 1);
    let no_fault = protocol(&[1, 3], Some(2), 0);
    for (rule, protocol, broken) in [
        (Rule::ConfirmAfterCommit, &no_fault, promise::SLOT),
        (Rule::ConfirmAfterCommit, &one, promise::KAFKA),
        (Rule::Fencing, &one, promise::KAFKA),
        (Rule::ReadAfterFencing, &one, promise::KAFKA),
        (Rule::OneTransaction, &one, promise::KAFKA),
        (Rule::ResumeAtCheckpoint, &one, promise::KAFKA),
        (Rule::OwnBeforeFencing, &no_fault, promise::PEACE),
        (Rule::MarkEquals, &one, promise::REDIS),
        (Rule::KafkaFirst, &one, promise::ALIKE),
        (Rule::CollectAfterOffered, &one, promise::REDIS),
        (Rule::Refill, &one, promise::REDIS),
        (Rule::OverflowDetaches, &one, promise::REDIS),
        (
            Rule::AcknowledgeTheLesser,
            &required(no_fault.clone()),
            promise::REQUIRED,
        ),
        (Rule::TakenAsksKafka, &one, promise::COMPLETE),
    ] {
        let protocol = Protocol {
            broken: Some(rule),
            ..protocol.clone()
        };
        let until = HasDiscoveries::AnyOf(BTreeSet::from([broken]));
        let checked = protocol.checker().threads(2).finish_when(until).spawn_bfs().join();
        let path = checked.discovery(broken);
        let steps = path.map(|path| path.into_actions().len());
        println!("{rule:?}: after {steps:?} steps not kept: {broken}");
        assert!(steps.is_some(), "{rule:?} is not kept, and nobody notices: {broken}");
    }
}

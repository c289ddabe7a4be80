//! Breaks one thing after the other while changes flow, and says whether anything was lost, doubled, reordered or torn, and how long
//! consumers had to wait.
//!
//! `tests/chaos.sh` builds and runs it; `docs/reliability.md` says what came of it. PostgreSQL, Kafka, Redis and two captures, of which one
//! stands by, are real processes on loopback. The seed decides the faults, their times, and what the load does; the machine decides
//! where exactly they meet.

// A failure here is the run's failure.
#![allow(clippy::unwrap_used, clippy::expect_used, clippy::panic)]

mod check;
mod copy;
mod fault;
mod flow;
mod load;
mod report;
mod rig;

use std::{
    fs,
    panic::{AssertUnwindSafe, catch_unwind},
    path::PathBuf,
    process::ExitCode,
    time::{Duration, Instant},
};

use clap::Parser;
use fault::Round;
use flow::Flow;
use meander_test_support::Postgres;
use report::{Outcome, Report};
use rig::Rig;
use tokio::time::sleep_until;

/// For every wait: what takes longer does not come back.
pub const LIMIT: Duration = Duration::from_secs(240);

/// Breaks one thing after the other while changes flow
#[derive(Parser)]
enum Command {
    /// Does it, and compares everything in the end
    Run(Arguments),
    /// Says what runs come to
    Total {
        /// Their reports, one in each line
        file: PathBuf,
    },
}

#[derive(clap::Args)]
struct Arguments {
    /// How many faults
    #[arg(long, env = "MEANDER_CHAOS_FAULTS", default_value_t = 40)]
    faults: usize,
    /// After so many seconds no more faults come, whatever is left of them
    #[arg(long, env = "MEANDER_CHAOS_SECONDS", default_value_t = 900)]
    seconds: u64,
    /// What is stopped, cut off, slow or full stays so for 5 seconds up to this many
    #[arg(long, env = "MEANDER_CHAOS_LONGEST", default_value_t = 15)]
    longest: u64,
    /// Decides the faults, their times, and the load; another one each time if it is left out
    #[arg(long, env = "MEANDER_CHAOS_SEED")]
    seed: Option<u64>,
    /// Where the report is written, as a line of JSON
    #[arg(long)]
    report: PathBuf,
}

fn main() -> ExitCode {
    let arguments = match Command::parse() {
        Command::Run(arguments) => arguments,
        Command::Total { file } => {
            print!("{}", report::total(&file));
            return ExitCode::SUCCESS;
        }
    };
    for of in ["net", "mnt"] {
        let parent = format!("/proc/{}/ns/{of}", std::os::unix::process::parent_id());
        // What it mounts and which packets it loses would otherwise be the machine's.
        assert_ne!(
            fs::read_link(format!("/proc/self/ns/{of}")).unwrap(),
            fs::read_link(parent).unwrap(),
            "tests/chaos.sh gives it namespaces of its own"
        );
    }
    let seed = arguments.seed.unwrap_or_else(|| fastrand::u64(..1_000_000));
    println!("seed {seed}: MEANDER_CHAOS_SEED={seed} makes the same faults and the same load");
    // What blocks is a process that ends or a file that is read, for a moment.
    let runtime = tokio::runtime::Builder::new_multi_thread()
        .worker_threads(8)
        .enable_all()
        .build()
        .unwrap();
    match catch_unwind(AssertUnwindSafe(|| runtime.block_on(run(arguments, seed)))) {
        Ok(()) => ExitCode::SUCCESS,
        // What went wrong was said where it did.
        Err(_) => {
            eprintln!("not ok - chaos with seed {seed}");
            ExitCode::FAILURE
        }
    }
}

async fn run(arguments: Arguments, seed: u64) {
    let rounds = fault::of_captures(seed, arguments.faults, arguments.longest);
    let mut rig = Rig::start().await;
    let (port, database) = rig.database();
    let flow = Flow::start(
        &database,
        rig.kafka.client_config(),
        &rig.redis.url(),
        &rig.config.kafka.topic_prefix,
    );
    let load = load::Load::start(port, &database, seed);
    let sampler = check::Sampler::start(&rig);
    flows(&flow, Instant::now(), "changes flow").await;

    let start = Instant::now();
    let mut outcomes = Vec::new();
    for round in rounds {
        if start.elapsed().as_secs() >= arguments.seconds {
            break;
        }
        tokio::time::sleep(round.pause).await;
        assert!(sampler.goes_on(), "what the slot was found to be is said above");
        let names: Vec<_> = round.faults.iter().map(|fault| fault.kind.name()).collect();
        let names = names.join(", and ");
        print!("{:>5.0} s  {names}", start.elapsed().as_secs_f64());
        let outcome = suffer(&mut rig, &flow, round, &names).await;
        println!(
            ": over after {:.1} s, Kafka silent for {:.1} s, Redis for {:.1} s",
            outcome.lasted.as_secs_f64(),
            outcome.kafka_silent.as_secs_f64(),
            outcome.redis_silent.as_secs_f64()
        );
        outcomes.push(outcome);
    }
    let seconds = start.elapsed().as_secs();
    let committed = load.stop().await;
    assert!(committed > 0, "no transaction was committed");
    flows(&flow, Instant::now(), "changes flow in the end").await;
    check::all_is_well(&mut rig).await;
    let slot_samples = sampler.stop().await;
    assert!(
        slot_samples * 10 >= seconds,
        "the slot was looked at {slot_samples} times only"
    );
    flow.stop().await;
    let said = tokio::task::block_in_place(|| check::everything(&rig));
    check::nothing_is_told(&mut rig).await;

    println!("a replay of everything into other topics");
    let rounds = fault::of_replay(seed, (arguments.faults / 8).max(1), arguments.longest);
    let copy = copy::make(&mut rig, start.elapsed(), rounds).await;
    tokio::task::block_in_place(|| check::copy(&rig, &copy.topics));

    let faults = outcomes.iter().map(|outcome| outcome.round.faults.len()).sum();
    let report = Report {
        seed,
        faults,
        seconds,
        slot_samples,
        replay_faults: copy.faults,
        replay_attempts: copy.attempts,
        rounds: outcomes,
        verified: serde_json::from_str(said.lines().last().unwrap()).unwrap(),
    };
    fs::write(
        &arguments.report,
        format!("{}\n", serde_json::to_string(&report).unwrap()),
    )
    .unwrap();
    println!("\n{said}\n{}", report::table(&report.rounds));
    println!(
        "{faults} faults in {seconds} s; the slot was looked at {slot_samples} times and never ahead of the checkpoint"
    );
    println!(
        "a replay of everything was the log once more, through {} faults, by {} processes",
        copy.faults, copy.attempts
    );
    check::the_verifier(&rig).await;
    println!("ok - chaos with seed {seed}; a record put there twice and an entry taken away were found");
}

/// One round: what goes wrong, what takes it away, and the wait until changes flow again.
async fn suffer(rig: &mut Rig, flow: &Flow, round: Round, names: &str) -> Outcome {
    let mut standby = None;
    for fault in &round.faults {
        standby = rig.prepare(fault.kind).await;
    }
    if standby.is_some() {
        flows(flow, Instant::now(), "changes flow with a standby server").await;
    }
    let start = Instant::now();
    perform(rig, &round, standby).await;
    let lasted = start.elapsed();
    flows(flow, Instant::now(), names).await;
    Outcome {
        round,
        lasted,
        kafka_silent: flow.kafka.silence(start),
        redis_silent: flow.redis.silence(start),
    }
}

/// What begins and what ends, in the order of time.
async fn perform(rig: &mut Rig, round: &Round, mut standby: Option<Postgres>) {
    let start = Instant::now();
    let mut steps: Vec<(Duration, Step)> = Vec::new();
    for (number, fault) in round.faults.iter().enumerate() {
        steps.push((fault.after, Step::Begin(number)));
        steps.push((fault.after + fault.hold, Step::End(number)));
    }
    steps.sort_by_key(|(time, step)| (*time, matches!(step, Step::End(_))));
    let mut done: Vec<_> = round.faults.iter().map(|_| None).collect();
    for (time, step) in steps {
        sleep_until((start + time).into()).await;
        match step {
            Step::Begin(number) => done[number] = Some(rig.begin(round.faults[number], standby.take()).await),
            Step::End(number) => {
                if let Some(done) = done[number].take() {
                    rig.end(done).await;
                }
            }
        }
    }
}

enum Step {
    Begin(usize),
    End(usize),
}

/// Waits until a change that was made after this moment is in Kafka and in Redis.
async fn flows(flow: &Flow, moment: Instant, what: &str) {
    flow.kafka.since(moment, &format!("{what}: Kafka")).await;
    flow.redis.since(moment, &format!("{what}: Redis")).await;
}

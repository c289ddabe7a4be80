//! The loop that joins reader, clock and target.

use std::{collections::VecDeque, time::Duration};

use meander_config::Speed;
use meander_proto::v1::{ReplayProgress, replay_progress::Phase};
use tokio::{
    sync::mpsc,
    task::JoinHandle,
    time::{Instant, MissedTickBehavior, interval, sleep_until, timeout},
};
use tokio_util::sync::CancellationToken;

use super::{
    End, Plan,
    error::ReplayError,
    meter::Meter,
    orders::Orders,
    pace::{Clock, Due, Timeline},
    patience::NOTICE,
    reader::Read,
    record::{Passed, Record, Transaction},
    target::{Batch, Mark, Target, TargetError, Trouble},
};

/// About how many bytes a message to the target has at the most.
const BATCH_BYTES: usize = 1 << 20;
const REPORT_INTERVAL: Duration = Duration::from_millis(250);
/// How long a target may take to finish what it has when the process is asked to end: well below the 30 s that Kubernetes gives a pod.
const PARTING: Duration = Duration::from_secs(10);

/// Who hears how a delivery goes.
pub trait Report {
    /// How far it is.
    fn progress(&self, progress: ReplayProgress, course: Course<'_>);
}

/// How a delivery goes, where its phase does not say it.
#[derive(Clone, Copy, Debug)]
pub enum Course<'a> {
    /// As it is meant to.
    Normal,
    /// A transaction is delivered to its end before delivery is held.
    Pausing,
    /// Nothing gets into the target.
    Troubled(&'a Trouble),
}

/// What the loop waits for.
enum Waiting {
    /// The target to be opened.
    Open,
    /// Something to deliver.
    Read,
    /// The next change to be due.
    Until(Instant),
    /// The target to have room.
    Room,
    /// The order to go on.
    Order,
    /// The target to have delivered the rest.
    Finish,
}

/// Delivers what is read to a target, each change when it is due.
///
/// # Errors
/// When the log or the target cannot go on, or the process is asked to end.
pub async fn drive<T: Target>(
    mut reads: mpsc::Receiver<Result<Read, ReplayError>>,
    target: T,
    mut orders: Orders,
    mut meter: Meter,
    plan: &Plan,
    report: &(impl Report + Sync),
    shutdown: &CancellationToken,
) -> Result<End, ReplayError> {
    let order = orders.current();
    if order.cancel {
        return Ok(End::Cancelled);
    }
    let asked = |speed| if T::PACED { speed } else { Speed::Max };
    let mut clock = Clock::new(asked(order.speed));
    clock.hold(order.paused, Instant::now());
    let mut paused = order.paused;
    let mut live = false;

    let mut opened = meter.tally.opened();
    // One batch may wait, so that a target never does and a pause comes soon enough.
    let (batches, taken) = mpsc::channel(1);
    let mut batches = Some(batches);
    let mut running = Running(tokio::spawn(target.run(taken, meter.tally.clone())));
    let mut queue = Queue {
        whole_transactions: T::WHOLE_TRANSACTIONS,
        most_records: T::MOST_RECORDS,
        timeline: Timeline::new(plan.max_gap),
        ..Queue::default()
    };
    let mut reporting = interval(REPORT_INTERVAL);
    reporting.set_missed_tick_behavior(MissedTickBehavior::Delay);

    loop {
        let is_open = *opened.borrow();
        let waiting = match queue.next() {
            _ if !is_open => Waiting::Open,
            // It was due together with what went before it.
            Some(_) if queue.is_inside() => Waiting::Room,
            Some(time) => match clock.due(time, Instant::now()) {
                Due::Now => Waiting::Room,
                Due::At(at) => Waiting::Until(at),
                Due::Held => Waiting::Order,
            },
            None if !queue.ended => Waiting::Read,
            None => {
                // The end of the batches, which tells the target to finish.
                batches = None;
                Waiting::Finish
            }
        };
        tokio::select! {
            biased;
            () = shutdown.cancelled() => break,
            order = orders.changed() => {
                if order.cancel {
                    return Ok(End::Cancelled);
                }
                let now = Instant::now();
                if !live {
                    clock.set_speed(asked(order.speed), queue.next(), now);
                }
                clock.hold(order.paused, now);
                paused = order.paused;
                reporting.reset_immediately();
            }
            result = &mut running.0 => {
                result.map_err(|_| ReplayError::TaskStopped("the target"))??;
                if !matches!(waiting, Waiting::Finish) {
                    return Err(ReplayError::TaskStopped("the target"));
                }
                let progress = meter.report(Phase::Succeeded, Duration::ZERO, &clock, queue.passed, Instant::now());
                report.progress(progress, Course::Normal);
                return Ok(End::Complete);
            }
            _ = reporting.tick() => {
                let pausing = paused && is_open && queue.open;
                let phase = match (paused && !pausing, is_open) {
                    (true, _) => Phase::Paused,
                    (false, false) => Phase::Pending,
                    (false, true) => Phase::Running,
                };
                let now = Instant::now();
                let behind = queue.next().map_or(Duration::ZERO, |next| clock.behind(next, now));
                let progress = meter.report(phase, behind, &clock, queue.passed, now);
                let silent = !T::TELLS_SILENCE && meter.tally.silence() > NOTICE;
                let trouble = meter.tally.trouble().or_else(|| silent.then(Trouble::silence));
                let course = match &trouble {
                    Some(trouble) if phase != Phase::Paused => Course::Troubled(trouble),
                    _ if pausing => Course::Pausing,
                    _ => Course::Normal,
                };
                report.progress(progress, course);
            }
            _ = opened.changed(), if matches!(waiting, Waiting::Open) => reporting.reset_immediately(),
            read = reads.recv(), if matches!(waiting, Waiting::Read) => match read {
                Some(Ok(Read::Records(records))) => queue.extend(records),
                Some(Ok(Read::LeftOut(passed))) => queue.passed += passed,
                // What comes from now on was captured after the range was resolved, and is due as it comes.
                Some(Ok(Read::Live)) => {
                    live = true;
                    clock.set_speed(Speed::Max, queue.next(), Instant::now());
                }
                Some(Ok(Read::End(_))) => queue.ended = true,
                Some(Err(error)) => return Err(error),
                None => return Err(ReplayError::TaskStopped("the reader")),
            },
            () = until(&waiting) => {}
            permit = room(batches.as_ref()), if matches!(waiting, Waiting::Room) => {
                // If there is no room because the target has ended, its result comes next.
                if let (Some(permit), Some(batch)) = (permit, queue.batch(&mut clock)) {
                    meter.tally.hand(&batch);
                    permit.send(batch);
                }
            }
        }
    }

    if T::FINISHES {
        drop(batches);
        // What came of it is found out by whoever goes on.
        let _ = timeout(PARTING, &mut running.0).await;
        let phase = if paused { Phase::Paused } else { Phase::Pending };
        let progress = meter.report(phase, Duration::ZERO, &clock, queue.passed, Instant::now());
        report.progress(progress, Course::Normal);
    }
    Err(ReplayError::Interrupted)
}

async fn until(waiting: &Waiting) {
    match waiting {
        Waiting::Until(at) => sleep_until(*at).await,
        _ => std::future::pending().await,
    }
}

async fn room(batches: Option<&mpsc::Sender<Batch>>) -> Option<mpsc::Permit<'_, Batch>> {
    match batches {
        Some(batches) => match batches.reserve().await {
            Ok(permit) => Some(permit),
            Err(_) => std::future::pending().await,
        },
        None => None,
    }
}

/// The target's task, which ends with the delivery, however that ends.
struct Running(JoinHandle<Result<(), TargetError>>);

impl Drop for Running {
    fn drop(&mut self) {
        self.0.abort();
    }
}

/// What is read and not yet due.
#[derive(Default)]
struct Queue {
    records: VecDeque<Waiter>,
    timeline: Timeline,
    /// What comes after them and is not delivered.
    passed: Passed,
    /// Nothing more comes.
    ended: bool,
    /// The target is told where transactions end. The last record waits for the one after it, which tells whether its own goes on.
    whole_transactions: bool,
    /// Records of one message at the most.
    most_records: usize,
    /// The transaction of the last record that was handed over.
    handed: Option<Transaction>,
    /// More of it is to come.
    open: bool,
}

struct Waiter {
    record: Record,
    /// The running maximum of the event times.
    time: i64,
    /// Its place on the timeline.
    due: i64,
}

impl Queue {
    fn extend(&mut self, records: Vec<Record>) {
        for mut record in records {
            record.passed += std::mem::take(&mut self.passed);
            let (time, due) = self.timeline.place(record.event_time());
            self.records.push_back(Waiter { record, time, due });
        }
    }

    /// The place of the next record on the timeline.
    fn next(&self) -> Option<i64> {
        if self.whole_transactions && !self.ended && self.records.len() < 2 {
            return None;
        }
        self.records.front().map(|next| next.due)
    }

    /// Whether the next record is of a transaction that was handed over in part.
    fn is_inside(&self) -> bool {
        let next = self.records.front().map(|next| next.record.transaction());
        self.whole_transactions && next.is_some() && self.handed == next
    }

    /// Everything that is due, within bounds; none if nothing is.
    fn batch(&mut self, clock: &mut Clock) -> Option<Batch> {
        let now = Instant::now();
        self.next()?;
        let first_time = self.records.front()?.time;
        let mut last_time = first_time;
        let mut records = Vec::new();
        let mut passed = Passed::default();
        let mut bytes = 0;
        while records.len() < self.most_records && bytes < BATCH_BYTES {
            let Some(due) = self.next() else { break };
            if !self.is_inside() && clock.due(due, now) != Due::Now {
                break;
            }
            let Some(Waiter { record, time, .. }) = self.records.pop_front() else {
                break;
            };
            self.handed = Some(record.transaction());
            last_time = time;
            passed += record.passed;
            bytes += record.size();
            records.push(record);
        }
        let mark = Mark {
            records: u64::try_from(records.len()).unwrap_or(u64::MAX),
            passed,
            first_time,
            last_time,
            resume: records.last()?.into(),
            handed: now,
        };
        let whole = !self.is_inside();
        self.open = self.whole_transactions && !whole;
        Some(Batch { records, whole, mark })
    }
}

#[cfg(test)]
mod tests {
    use std::sync::Arc;

    use bytes::Bytes;

    use super::*;
    use crate::{
        position::{Epoch, Lsn, Position},
        replay::record::Coordinate,
    };

    fn record(lsn: u64, ordinal: u64) -> Record {
        let position = Position {
            epoch: Epoch::FIRST,
            commit_lsn: Lsn(lsn),
            ordinal,
        };
        Record {
            coordinate: Coordinate { position, part: 0 },
            timestamp: 1,
            commit_time: 1000,
            topic: Arc::from("shop.public.trades"),
            partition: 0,
            offset: 0,
            key: Bytes::new(),
            value: Bytes::new(),
            passed: Passed::default(),
            next: (0, 1),
            others: Vec::new(),
            headers: Vec::new(),
        }
    }

    #[test]
    fn a_target_is_told_where_transactions_end_and_a_pause_parts_none() {
        let mut clock = Clock::new(Speed::Max);
        let mut queue = Queue {
            whole_transactions: true,
            most_records: 512,
            ..Queue::default()
        };
        let handed = |queue: &mut Queue, clock: &mut Clock| {
            let batch = queue.batch(clock)?;
            Some((batch.records.len(), batch.whole))
        };
        queue.extend(vec![record(1, 0), record(2, 0), record(2, 1)]);
        assert_eq!(
            handed(&mut queue, &mut clock),
            Some((2, false)),
            "more of the second may come"
        );
        assert_eq!((queue.next(), queue.is_inside(), queue.open), (None, true, true));

        clock.hold(true, Instant::now());
        queue.extend(vec![record(2, 2), record(3, 0)]);
        assert_eq!(
            handed(&mut queue, &mut clock),
            Some((2, true)),
            "it is taken to its end"
        );
        assert!(!queue.open);
        queue.ended = true;
        assert_eq!(handed(&mut queue, &mut clock), None, "the next one is held");
        clock.hold(false, Instant::now());
        assert_eq!(handed(&mut queue, &mut clock), Some((1, true)));
    }
}

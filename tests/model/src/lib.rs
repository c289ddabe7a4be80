//! The protocol by which changes are published and acknowledged, as a model: every order of its steps is explored, with a fault at any
//! place, and the promises of `docs/architecture.md`, section 4, are looked at in every state that is reached.
//!
//! Processes of one pipeline do what `meander-runtime capture` does; each step says which function it stands for. A process that lost the
//! slot is not told: it goes on with what it knows and what its socket still holds, for as long as the checker likes, as one does that was
//! stopped and goes on. A request whose sender ended, or gave up waiting, stays under way, and is carried out at any later time: so its
//! outcome is unknown until somebody looks.
//!
//! What is left out: the contents of changes, more than one stream, promotions and gaps of the source, retention, and what a person does.

use stateright::{Model, Property};

/// What is explored: a database, the processes of one pipeline, and what may happen to them.
#[derive(Clone, Debug)]
pub struct Protocol {
    /// The last change of each transaction. Changes are numbered from 1 in commit order.
    pub transactions: Vec<u8>,
    /// A change that is another one each time it is made, as a row of a snapshot is.
    pub remade: Option<u8>,
    /// Processes that would capture.
    pub processes: usize,
    /// How many faults happen at most.
    pub faults: u8,
    /// PostgreSQL is acknowledged what Redis has as well: `acknowledgement: Required`. Redis then loses nothing.
    pub required: bool,
    /// A rule that is not kept.
    pub broken: Option<Rule>,
}

/// The rules that the promises rest on. The checker has to notice when one is not kept.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Rule {
    /// PostgreSQL is told what a committed checkpoint says, and no more.
    ConfirmAfterCommit,
    /// Kafka takes nothing from a producer after a newer one has signed on.
    Fencing,
    /// The checkpoint is read when nobody else can write it any more.
    ReadAfterFencing,
    /// Records and checkpoint are in one transaction.
    OneTransaction,
    /// What the checkpoint says is published is not published again.
    ResumeAtCheckpoint,
    /// Who does not own the slot fences nobody.
    OwnBeforeFencing,
    /// The script appends only where the mark is where the writer last saw it.
    MarkEquals,
    /// Redis gets what cannot be made again once Kafka has it.
    KafkaFirst,
    /// What was offered before the buffer collects is waited for, until Kafka has it.
    CollectAfterOffered,
    /// Redis gets from Kafka what it lacks before it goes on from the buffer.
    Refill,
    /// A buffer that was full is empty, and Redis is detached.
    OverflowDetaches,
    /// Where Redis is required, PostgreSQL is acknowledged the lesser of both.
    AcknowledgeTheLesser,
    /// Whoever finds that a later owner has the mark asks Kafka whether it was fenced, though there is nothing to publish.
    TakenAsksKafka,
}

/// All of it.
#[derive(Clone, Debug, PartialEq, Eq, Hash)]
pub struct State {
    /// PostgreSQL sends what comes after this.
    slot: u8,
    kafka: Kafka,
    redis: Redis,
    /// In no order: they are alike.
    processes: Vec<Process>,
    /// Requests that nobody waits for any more.
    late: Vec<Request>,
    faults: u8,
}

/// As readers of committed records see it.
#[derive(Clone, Debug, Default, PartialEq, Eq, Hash)]
struct Kafka {
    /// Of the producer that signed on last.
    epoch: u8,
    log: Vec<Record>,
    checkpoint: Checkpoint,
}

/// One stream; the mark is at its last entry, since one script writes both.
#[derive(Clone, Debug, Default, PartialEq, Eq, Hash)]
struct Redis {
    generation: u8,
    entries: Vec<Entry>,
}

#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, Hash)]
struct Entry {
    record: Record,
    /// That of the mark when it was written.
    generation: u8,
}

/// A change, and which owner made it, where another one would have made it otherwise.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, Hash)]
struct Record {
    change: u8,
    made_by: u8,
}

#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, PartialOrd, Ord, Hash)]
struct Checkpoint {
    generation: u8,
    published: u8,
    acknowledged: u8,
}

#[derive(Clone, Debug, PartialEq, Eq, PartialOrd, Ord, Hash)]
struct Transaction {
    epoch: u8,
    records: Vec<Record>,
    checkpoint: Checkpoint,
}

/// A call of `append.lua` for one record.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, Hash)]
struct Append {
    generation: u8,
    after: u8,
    record: Record,
}

#[derive(Clone, Debug, PartialEq, Eq, PartialOrd, Ord, Hash)]
enum Request {
    Commit(Transaction),
    Append(Append),
}

#[derive(Clone, Debug, Default, PartialEq, Eq, PartialOrd, Ord, Hash)]
struct Process {
    /// As PostgreSQL sees it; the process may not know yet that it is over.
    owns_slot: bool,
    session: Option<Session>,
}

#[derive(Clone, Debug, PartialEq, Eq, PartialOrd, Ord, Hash)]
struct Session {
    stage: Stage,
    /// Of its producer.
    epoch: u8,
    /// The last one that is known to be committed.
    checkpoint: Checkpoint,
    /// The last change that was read and offered to both sinks.
    read: u8,
    /// The last change that was put into a transaction.
    sent: u8,
    /// It is asked for, and not answered.
    commit: Option<Transaction>,
    /// The log as the session found it, until Redis was brought up to that.
    beginning: Option<Checkpoint>,
    /// Everything offered after this is in the buffer of Redis. None while that is dropped.
    buffer: Option<u8>,
    feed: Feed,
    /// It is asked for, and not answered.
    append: Option<Append>,
    /// What Redis is known to have, as far as transactions are whole.
    redis_safe: u8,
}

#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, Hash)]
enum Stage {
    /// The slot is its own.
    Owner,
    /// Its producer has fenced those before it.
    Signed,
    /// Its first checkpoint is under way.
    Beginning,
    Streaming,
}

#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, Hash)]
enum Feed {
    Detached,
    /// Until Kafka has what was offered before the buffer began to collect.
    Collecting {
        place: u8,
        offered: u8,
    },
    /// Until Redis has what the log has up to here.
    Filling {
        place: u8,
        upto: u8,
    },
    Attached {
        place: u8,
    },
}

/// A step of a process, by its index, or of something else.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Step {
    /// `capture::open`: START_REPLICATION, where nobody reads the slot.
    OwnSlot(usize),
    /// `KafkaSink::open`: `init_transactions` ends what others have begun.
    SignOn(usize),
    /// `open_kafka`: reads the checkpoint, and asks for one with the next generation to be committed.
    Begin(usize),
    /// `Stream::run`: the next change is read, and handed to both sinks.
    Read(usize),
    /// `KafkaSink::publish`: all that waits becomes a transaction, with the checkpoint that speaks of it.
    Commit(usize),
    /// Kafka decides about it, and the process hears so.
    Answer(usize),
    /// `status::Task`: PostgreSQL is told what the last committed checkpoint acknowledges.
    Confirm(usize),
    /// The connection to PostgreSQL is found to be gone.
    Notice(usize),
    /// `Writer::open`: the mark is claimed; then `Feed::feed` goes on from the session's beginning, or collects.
    Claim(usize),
    /// `Source::refill`: the next record that Redis lacks is copied.
    Refill(usize),
    /// `Feed::go_on`: the next change is taken from the buffer.
    Feed(usize),
    /// `append.lua` runs, and the process hears so.
    Append(usize),
    /// `Writer::check`: Redis is looked at while there is nothing to write.
    Check(usize),
    /// A request that nobody waits for is carried out.
    Late(usize),
    /// A fault: the process dies, or its session ends because an answer did not come.
    Crash(usize),
    /// A fault: PostgreSQL takes the process for dead, which may be stopped or cut off.
    Disconnect(usize),
    /// A fault: PostgreSQL restarts, and has an older place of the slot on its disk.
    PostgresRestarts(u8),
    /// A fault: Redis keeps only so many entries, and the generation that it had then, or none.
    RedisLoses(u8, u8),
    /// A fault: an answer of Redis does not come.
    RedisTimeout(usize),
    /// A fault: Redis is too slow, and its buffer overflows.
    Overflow(usize),
}

impl Protocol {
    fn keeps(&self, rule: Rule) -> bool {
        self.broken != Some(rule)
    }

    /// The last change of all.
    fn last(&self) -> u8 {
        self.transactions.last().copied().unwrap_or(0)
    }

    /// The end of the last transaction that is whole up to a change.
    fn whole(&self, change: u8) -> u8 {
        let ends = self.transactions.iter().copied();
        ends.filter(|end| *end <= change).max().unwrap_or(0)
    }

    fn record(&self, change: u8, generation: u8) -> Record {
        let made_by = if self.remade == Some(change) { generation } else { 0 };
        Record { change, made_by }
    }

    /// Everything is published, in both sinks alike, and acknowledged.
    fn is_complete(&self, state: &State) -> bool {
        let redis = state.redis.entries.iter().map(|entry| entry.record);
        state.kafka.log.len() == usize::from(self.last())
            && redis.eq(state.kafka.log.iter().copied())
            && state.slot == self.last()
    }

    /// Nothing happens any more.
    fn is_still(&self, state: &State) -> bool {
        self.next_states(state).is_empty()
    }

    /// Carries out a step. None where it is not possible.
    fn carry_out(&self, state: &mut State, step: Step) -> Option<()> {
        match step {
            Step::OwnSlot(p) => {
                let free = !state.processes.iter().any(|process| process.owns_slot);
                let known = state.kafka.checkpoint;
                let slot = state.slot;
                let process = &mut state.processes[p];
                if process.session.is_some() || (!free && self.keeps(Rule::OwnBeforeFencing)) {
                    return None;
                }
                process.owns_slot = free;
                process.session = Some(Session {
                    stage: Stage::Owner,
                    epoch: 0,
                    checkpoint: if self.keeps(Rule::ReadAfterFencing) {
                        Checkpoint::default()
                    } else {
                        known
                    },
                    read: slot,
                    sent: slot,
                    commit: None,
                    beginning: None,
                    buffer: None,
                    feed: Feed::Detached,
                    append: None,
                    redis_safe: 0,
                });
            }
            Step::SignOn(p) => {
                let epoch = state.kafka.epoch + 1;
                let session = state.session(p, Stage::Owner)?;
                session.stage = Stage::Signed;
                session.epoch = epoch;
                state.kafka.epoch = epoch;
            }
            Step::Begin(p) => {
                let committed = state.kafka.checkpoint;
                let session = state.session(p, Stage::Signed)?;
                if self.keeps(Rule::ReadAfterFencing) {
                    session.checkpoint = committed;
                }
                session.stage = Stage::Beginning;
                session.commit = Some(Transaction {
                    epoch: session.epoch,
                    records: vec![],
                    checkpoint: Checkpoint {
                        generation: session.checkpoint.generation + 1,
                        ..session.checkpoint
                    },
                });
            }
            Step::Read(p) => {
                let session = state.session(p, Stage::Streaming)?;
                if session.read == self.last() {
                    return None;
                }
                session.read += 1;
            }
            Step::Commit(p) => {
                let session = streaming(&mut state.processes, p)?;
                if session.commit.is_some() {
                    return None;
                }
                let generation = session.checkpoint.generation;
                let records: Vec<_> = (session.sent + 1..=session.read)
                    .map(|change| self.record(change, generation))
                    .collect();
                let mut safe = self.whole(session.read);
                if self.required && self.keeps(Rule::AcknowledgeTheLesser) {
                    safe = safe.min(session.redis_safe);
                }
                let acknowledged = session.checkpoint.acknowledged;
                // `Writer::open` was told so.
                let taken = state.redis.generation > generation && session.feed == Feed::Detached;
                let asks = taken && self.keeps(Rule::TakenAsksKafka);
                if records.is_empty() && safe <= acknowledged && !asks {
                    return None;
                }
                session.sent = session.read;
                session.commit = Some(Transaction {
                    epoch: session.epoch,
                    records,
                    checkpoint: Checkpoint {
                        generation,
                        published: session.checkpoint.published.max(session.read),
                        acknowledged: acknowledged.max(safe),
                    },
                });
            }
            Step::Answer(p) => {
                let session = state.processes[p].session.as_mut()?;
                let transaction = session.commit.take()?;
                let apart = !self.keeps(Rule::OneTransaction) && !transaction.records.is_empty();
                if !self.decide(&mut state.kafka, &transaction) {
                    state.end(p);
                } else if apart {
                    session.commit = Some(Transaction {
                        records: vec![],
                        ..transaction
                    });
                } else {
                    session.checkpoint = transaction.checkpoint;
                    if session.stage == Stage::Beginning {
                        let Checkpoint { published, .. } = session.checkpoint;
                        if self.keeps(Rule::ResumeAtCheckpoint) {
                            session.read = session.read.max(published);
                        }
                        session.stage = Stage::Streaming;
                        session.sent = session.read;
                        session.beginning = Some(session.checkpoint);
                        session.buffer = Some(session.read);
                    }
                }
            }
            Step::Confirm(p) => {
                let process = &mut state.processes[p];
                let session = process.session.as_ref()?;
                if !process.owns_slot || session.stage != Stage::Streaming {
                    return None;
                }
                let acknowledged = if self.keeps(Rule::ConfirmAfterCommit) {
                    session.checkpoint.acknowledged
                } else {
                    self.whole(session.read)
                };
                state.slot = state.slot.max(acknowledged);
            }
            Step::Notice(p) => {
                let process = &state.processes[p];
                let session = process.session.as_ref()?;
                // The sinks are waited for.
                if process.owns_slot || session.commit.is_some() || session.append.is_some() {
                    return None;
                }
                state.end(p);
            }
            Step::Claim(p) => {
                let session = streaming(&mut state.processes, p)?;
                let generation = session.checkpoint.generation;
                if session.feed != Feed::Detached || state.redis.generation > generation {
                    return None;
                }
                state.redis.generation = generation;
                let place = state.redis.position();
                session.feed = match session.beginning.take().filter(|_| session.buffer.is_some()) {
                    Some(log) => Feed::Filling {
                        place,
                        upto: log.published,
                    },
                    None => session.collect(place),
                };
            }
            Step::Refill(p) => {
                let session = streaming(&mut state.processes, p)?;
                let Feed::Filling { place, .. } = session.feed else {
                    return None;
                };
                if session.append.is_some() {
                    return None;
                }
                session.append = Some(Append {
                    generation: session.checkpoint.generation,
                    after: place,
                    record: *state.kafka.log.get(usize::from(place))?,
                });
            }
            Step::Feed(p) => {
                let session = state.session(p, Stage::Streaming)?;
                let (Feed::Attached { place }, Some(from), None) = (session.feed, session.buffer, session.append)
                else {
                    return None;
                };
                let next = from.max(place) + 1;
                let waits = self.remade == Some(next) && self.keeps(Rule::KafkaFirst);
                if next > session.read || (waits && session.checkpoint.published < next) {
                    return None;
                }
                let generation = session.checkpoint.generation;
                session.append = Some(Append {
                    generation,
                    after: place,
                    record: self.record(next, generation),
                });
            }
            Step::Append(p) => {
                let session = streaming(&mut state.processes, p)?;
                let append = session.append.take()?;
                if !self.append(&mut state.redis, append) {
                    session.detach();
                    return Some(());
                }
                let written = append.record.change;
                match &mut session.feed {
                    Feed::Filling { place, .. } | Feed::Attached { place } => *place = written,
                    Feed::Detached | Feed::Collecting { .. } => return None,
                }
            }
            Step::Check(p) => {
                let session = streaming(&mut state.processes, p)?;
                let (Feed::Attached { place }, None) = (session.feed, session.append) else {
                    return None;
                };
                let generation = session.checkpoint.generation;
                if state.redis.generation > generation {
                    session.detach();
                    return Some(());
                }
                state.redis.generation = generation;
                if state.redis.position() != place {
                    session.detach();
                }
            }
            Step::Late(index) => {
                if index >= state.late.len() {
                    return None;
                }
                match state.late.remove(index) {
                    Request::Commit(transaction) => {
                        self.decide(&mut state.kafka, &transaction);
                    }
                    Request::Append(append) => {
                        self.append(&mut state.redis, append);
                    }
                }
            }
            Step::Crash(p) => {
                state.processes[p].session.as_ref()?;
                state.fault()?;
                state.end(p);
            }
            Step::Disconnect(p) => {
                if !std::mem::take(&mut state.processes[p].owns_slot) {
                    return None;
                }
                state.fault()?;
            }
            Step::PostgresRestarts(to) => {
                if to >= state.slot {
                    return None;
                }
                state.fault()?;
                state.slot = to;
                for process in &mut state.processes {
                    process.owns_slot = false;
                }
            }
            Step::RedisLoses(kept, generation) => {
                let kept = usize::from(kept);
                if self.required || kept > state.redis.entries.len() || generation > state.redis.generation {
                    return None;
                }
                state.fault()?;
                state.redis.entries.truncate(kept);
                let least = state.redis.entries.last().map_or(0, |entry| entry.generation);
                if generation < least {
                    return None;
                }
                state.redis.generation = generation;
            }
            Step::RedisTimeout(p) => {
                let append = state.session(p, Stage::Streaming)?.append.take()?;
                state.fault()?;
                state.session(p, Stage::Streaming)?.detach();
                state.late.push(Request::Append(append));
            }
            Step::Overflow(p) => {
                let session = state.session(p, Stage::Streaming)?;
                if session.buffer? == session.read {
                    return None;
                }
                session.buffer = (!self.keeps(Rule::OverflowDetaches)).then_some(session.read);
                state.fault()?;
            }
        }
        Some(())
    }

    /// What a feed does by itself, in `Feed::feed`. Nobody else sees it, so no order with others' steps matters.
    fn settle(&self, session: &mut Session) {
        while session.append.is_none() {
            session.feed = match session.feed {
                // `Feed::collect`: Kafka has what was offered before the buffer collects.
                Feed::Collecting { place, offered }
                    if session.checkpoint.published >= offered || !self.keeps(Rule::CollectAfterOffered) =>
                {
                    let upto = session.checkpoint.published;
                    Feed::Filling { place, upto }
                }
                // `Live::attach`: the buffer still holds everything.
                Feed::Filling { place, upto }
                    if session.buffer.is_some() && (place >= upto || !self.keeps(Rule::Refill)) =>
                {
                    Feed::Attached { place }
                }
                // It was full, and collects anew.
                Feed::Filling { place, upto } if session.buffer.is_none() && place >= upto => session.collect(place),
                Feed::Attached { place } if session.buffer.is_none() => session.collect(place),
                // What is offered and was written before is passed over.
                Feed::Attached { place } => {
                    session.redis_safe = session.redis_safe.max(self.whole(place.min(session.read)));
                    return;
                }
                _ => return,
            }
        }
    }

    /// What the coordinator says to a commit: records and checkpoint become visible together, or not at all.
    fn decide(&self, kafka: &mut Kafka, transaction: &Transaction) -> bool {
        if transaction.epoch != kafka.epoch && self.keeps(Rule::Fencing) {
            return false;
        }
        kafka.log.extend(&transaction.records);
        if transaction.records.is_empty() || self.keeps(Rule::OneTransaction) {
            kafka.checkpoint = transaction.checkpoint;
        }
        true
    }

    /// `append.lua`, and XADD, which takes no id that is not greater than the last.
    fn append(&self, redis: &mut Redis, append: Append) -> bool {
        let Append {
            generation,
            after,
            record,
        } = append;
        let equals = redis.generation == generation && redis.position() == after;
        if (!equals && self.keeps(Rule::MarkEquals)) || record.change <= redis.position() {
            return false;
        }
        redis.entries.push(Entry {
            record,
            generation: redis.generation,
        });
        true
    }
}

impl State {
    fn session(&mut self, p: usize, stage: Stage) -> Option<&mut Session> {
        let session = self.processes[p].session.as_mut()?;
        (session.stage == stage).then_some(session)
    }

    /// Spends a fault.
    fn fault(&mut self) -> Option<()> {
        self.faults = self.faults.checked_sub(1)?;
        Some(())
    }

    /// A session ends, whatever it has under way.
    fn end(&mut self, p: usize) {
        let process = &mut self.processes[p];
        process.owns_slot = false;
        if let Some(session) = process.session.take() {
            self.late.extend(session.commit.map(Request::Commit));
            self.late.extend(session.append.map(Request::Append));
        }
    }
}

fn streaming(processes: &mut [Process], p: usize) -> Option<&mut Session> {
    let session = processes[p].session.as_mut()?;
    (session.stage == Stage::Streaming).then_some(session)
}

impl Session {
    /// `Live::collect`: what is offered from now on is kept.
    fn collect(&mut self, place: u8) -> Feed {
        self.buffer = Some(self.read);
        let offered = self.read;
        Feed::Collecting { place, offered }
    }

    /// `Live::detach`: what is in the buffer is dropped, and what is offered from now on.
    fn detach(&mut self) {
        self.feed = Feed::Detached;
        self.buffer = None;
    }
}

impl Redis {
    /// That of the mark.
    fn position(&self) -> u8 {
        self.entries.last().map_or(0, |entry| entry.record.change)
    }
}

/// True if these are the first changes, each once and in order.
fn are_the_first(changes: impl Iterator<Item = u8>) -> bool {
    changes.zip(1..).all(|(change, expected)| change == expected)
}

/// Names of what must hold, as the checker reports them.
pub mod promise {
    /// Kafka.
    pub const KAFKA: &str = "each change is once in Kafka, in order";
    /// The slot.
    pub const SLOT: &str = "PostgreSQL is told nothing that no committed checkpoint says";
    /// Redis.
    pub const REDIS: &str = "each change is at most once in Redis, in order, and none is left out";
    /// Both sinks.
    pub const ALIKE: &str = "what cannot be made again is in Redis as it is in Kafka";
    /// Acknowledgement by Redis.
    pub const REQUIRED: &str = "PostgreSQL is told nothing that Redis lacks, where Redis is required";
    /// No process disturbs another for ever.
    pub const PEACE: &str = "a fault costs two take-overs at most";
    /// Liveness.
    pub const COMPLETE: &str = "when nothing fails any more, all is published in both sinks alike, and acknowledged";
    /// What makes it hard can happen.
    pub const AHEAD: &str = "Redis is ahead of Kafka";
    /// What makes it hard can happen.
    pub const ZOMBIE: &str = "a process publishes that lost the slot to another";
    /// What makes it hard can happen.
    pub const UNKNOWN: &str = "a commit is under way whose process has begun anew";
}

impl Model for Protocol {
    type State = State;
    type Action = Step;

    fn init_states(&self) -> Vec<State> {
        vec![State {
            slot: 0,
            kafka: Kafka::default(),
            redis: Redis::default(),
            processes: vec![Process::default(); self.processes],
            late: vec![],
            faults: self.faults,
        }]
    }

    fn actions(&self, state: &State, steps: &mut Vec<Step>) {
        for p in 0..self.processes {
            steps.extend([
                Step::OwnSlot(p),
                Step::SignOn(p),
                Step::Begin(p),
                Step::Read(p),
                Step::Commit(p),
                Step::Answer(p),
                Step::Confirm(p),
                Step::Notice(p),
                Step::Claim(p),
                Step::Refill(p),
                Step::Feed(p),
                Step::Append(p),
                Step::Check(p),
            ]);
        }
        steps.extend((0..state.late.len()).map(Step::Late));
        if state.faults == 0 {
            return;
        }
        for p in 0..self.processes {
            steps.extend([
                Step::Crash(p),
                Step::Disconnect(p),
                Step::RedisTimeout(p),
                Step::Overflow(p),
            ]);
        }
        let places = self.transactions.iter().copied();
        steps.extend([0].into_iter().chain(places).map(Step::PostgresRestarts));
        for kept in 0..=state.redis.position() {
            let last = usize::from(kept)
                .checked_sub(1)
                .and_then(|last| state.redis.entries.get(last));
            let kept_by = last.map_or(0, |entry| entry.generation);
            steps.extend([kept_by, state.redis.generation].map(|generation| Step::RedisLoses(kept, generation)));
        }
    }

    fn next_state(&self, state: &State, step: Step) -> Option<State> {
        let mut next = state.clone();
        self.carry_out(&mut next, step)?;
        for session in next.processes.iter_mut().filter_map(|process| process.session.as_mut()) {
            self.settle(session);
        }
        next.processes.sort();
        next.late.sort();
        (next != *state).then_some(next)
    }

    fn properties(&self) -> Vec<Property<Self>> {
        vec![
            Property::always(promise::KAFKA, |_, state: &State| {
                are_the_first(state.kafka.log.iter().map(|record| record.change))
            }),
            Property::always(promise::SLOT, |_, state: &State| {
                let Checkpoint {
                    published,
                    acknowledged,
                    ..
                } = state.kafka.checkpoint;
                state.slot <= acknowledged && acknowledged <= published
            }),
            Property::always(promise::REDIS, |_, state: &State| {
                are_the_first(state.redis.entries.iter().map(|entry| entry.record.change))
            }),
            Property::always(promise::ALIKE, |_, state: &State| {
                let entries = state.redis.entries.iter().map(|entry| entry.record);
                entries
                    .filter(|record| record.made_by > 0)
                    .all(|record| state.kafka.log.contains(&record))
            }),
            Property::always(promise::REQUIRED, |model, state: &State| {
                !model.required || state.slot <= state.redis.position()
            }),
            Property::always(promise::PEACE, |model, state: &State| {
                state.kafka.epoch <= 1 + 2 * (model.faults - state.faults)
            }),
            Property::eventually(promise::COMPLETE, |model, state: &State| {
                model.is_complete(state) && model.is_still(state)
            }),
            Property::sometimes(promise::AHEAD, |_, state: &State| {
                state.redis.entries.len() > state.kafka.log.len()
            }),
            Property::sometimes(promise::ZOMBIE, |_, state: &State| {
                let publishes = |process: &&Process| {
                    let session = process.session.as_ref();
                    session.is_some_and(|session| session.stage == Stage::Streaming)
                };
                state.processes.iter().filter(publishes).count() > 1
            }),
            Property::sometimes(promise::UNKNOWN, |_, state: &State| {
                let late = state.late.iter().any(|request| match request {
                    Request::Commit(transaction) => transaction.epoch == state.kafka.epoch,
                    Request::Append(_) => false,
                });
                late && state.processes.iter().any(|process| process.session.is_some())
            }),
        ]
    }

    /// Who disturbs for ever would be followed for ever.
    fn within_boundary(&self, state: &State) -> bool {
        state.kafka.epoch <= 2 + 2 * self.faults
    }
}

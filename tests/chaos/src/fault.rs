//! What goes wrong, and when: decided by the seed alone.

use std::time::Duration;

use fastrand::Rng;
use serde::{Deserialize, Deserializer, Serialize, Serializer, de::Error as _};

/// What goes wrong.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord)]
pub enum Kind {
    OwnerKilled,
    OwnerTerminated,
    OwnerStopped,
    StandbyKilled,
    StandbyStopped,
    BothKilled,
    KafkaKilled,
    KafkaRestarted,
    KafkaStopped,
    RedisKilled,
    RedisSetBack,
    RedisEmptied,
    RedisStopped,
    RedisFull,
    RedisDiskFull,
    PostgresCrashed,
    PostgresRestarted,
    PostgresStopped,
    PostgresFailedOver,
    PostgresDiskFull,
    SenderTerminated,
    OwnerCutOff,
    KafkaCutOff,
    RedisCutOff,
    NetworkSlow,
    PacketsLost,
    ConnectionsReset,
    ReplayKilled,
    ReplayStopped,
}

/// What it befalls: nothing befalls one part twice at a time.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Part {
    Capture,
    Kafka,
    Redis,
    Postgres,
    Network,
    Replay,
}

impl Kind {
    /// What befalls a capture and what it stands on.
    const CAPTURE: [Self; 27] = [
        Self::OwnerKilled,
        Self::OwnerTerminated,
        Self::OwnerStopped,
        Self::StandbyKilled,
        Self::StandbyStopped,
        Self::BothKilled,
        Self::KafkaKilled,
        Self::KafkaRestarted,
        Self::KafkaStopped,
        Self::RedisKilled,
        Self::RedisSetBack,
        Self::RedisEmptied,
        Self::RedisStopped,
        Self::RedisFull,
        Self::RedisDiskFull,
        Self::PostgresCrashed,
        Self::PostgresRestarted,
        Self::PostgresStopped,
        Self::PostgresFailedOver,
        Self::PostgresDiskFull,
        Self::SenderTerminated,
        Self::OwnerCutOff,
        Self::KafkaCutOff,
        Self::RedisCutOff,
        Self::NetworkSlow,
        Self::PacketsLost,
        Self::ConnectionsReset,
    ];
    /// What befalls a replay and what it stands on.
    const REPLAY: [Self; 6] = [
        Self::ReplayKilled,
        Self::ReplayStopped,
        Self::ReplayKilled,
        Self::KafkaRestarted,
        Self::KafkaStopped,
        Self::KafkaCutOff,
    ];

    /// As in the report.
    pub fn name(self) -> &'static str {
        match self {
            Self::OwnerKilled => "owner killed",
            Self::OwnerTerminated => "owner terminated",
            Self::OwnerStopped => "owner stopped",
            Self::StandbyKilled => "standby killed",
            Self::StandbyStopped => "standby stopped",
            Self::BothKilled => "owner and standby killed",
            Self::KafkaKilled => "Kafka killed",
            Self::KafkaRestarted => "Kafka restarted",
            Self::KafkaStopped => "Kafka stopped",
            Self::RedisKilled => "Redis killed",
            Self::RedisSetBack => "Redis killed, its last data lost",
            Self::RedisEmptied => "Redis killed, all its data lost",
            Self::RedisStopped => "Redis stopped",
            Self::RedisFull => "memory of Redis full",
            Self::RedisDiskFull => "disk of Redis full",
            Self::PostgresCrashed => "PostgreSQL crashed",
            Self::PostgresRestarted => "PostgreSQL restarted",
            Self::PostgresStopped => "PostgreSQL stopped",
            Self::PostgresFailedOver => "PostgreSQL failed over",
            Self::PostgresDiskFull => "disk of PostgreSQL full",
            Self::SenderTerminated => "WAL sender terminated",
            Self::OwnerCutOff => "owner cut off from PostgreSQL",
            Self::KafkaCutOff => "capture cut off from Kafka",
            Self::RedisCutOff => "capture cut off from Redis",
            Self::NetworkSlow => "network slow",
            Self::PacketsLost => "one packet in twenty lost",
            Self::ConnectionsReset => "all connections reset",
            Self::ReplayKilled => "replay killed",
            Self::ReplayStopped => "replay stopped",
        }
    }

    pub fn part(self) -> Part {
        match self {
            Self::OwnerKilled
            | Self::OwnerTerminated
            | Self::OwnerStopped
            | Self::StandbyKilled
            | Self::StandbyStopped
            | Self::BothKilled => Part::Capture,
            Self::KafkaKilled | Self::KafkaRestarted | Self::KafkaStopped => Part::Kafka,
            Self::RedisKilled
            | Self::RedisSetBack
            | Self::RedisEmptied
            | Self::RedisStopped
            | Self::RedisFull
            | Self::RedisDiskFull => Part::Redis,
            Self::PostgresCrashed
            | Self::PostgresRestarted
            | Self::PostgresStopped
            | Self::PostgresFailedOver
            | Self::PostgresDiskFull
            | Self::SenderTerminated => Part::Postgres,
            Self::OwnerCutOff
            | Self::KafkaCutOff
            | Self::RedisCutOff
            | Self::NetworkSlow
            | Self::PacketsLost
            | Self::ConnectionsReset => Part::Network,
            Self::ReplayKilled | Self::ReplayStopped => Part::Replay,
        }
    }

    /// Whether the two can overlap.
    fn goes_with(self, other: Self) -> bool {
        // A failover is long enough in itself, and where Kafka is killed the captures are held.
        let alone = [self, other].contains(&Self::PostgresFailedOver);
        let held = [self, other].contains(&Self::KafkaKilled) && [self.part(), other.part()].contains(&Part::Capture);
        self.part() != other.part() && !alone && !held
    }

    /// For how long: what is stopped, cut off, slow or full stays so; what was ended is started again soon.
    fn hold(self, longest: u64, random: &mut Rng) -> Duration {
        match self {
            Self::OwnerStopped
            | Self::StandbyStopped
            | Self::KafkaStopped
            | Self::RedisStopped
            | Self::RedisFull
            | Self::RedisDiskFull
            | Self::PostgresStopped
            | Self::PostgresDiskFull
            | Self::OwnerCutOff
            | Self::KafkaCutOff
            | Self::RedisCutOff
            | Self::ReplayStopped
            | Self::NetworkSlow
            | Self::PacketsLost => Duration::from_millis(random.u64(5000..=longest.max(5) * 1000)),
            Self::SenderTerminated | Self::ConnectionsReset | Self::PostgresFailedOver => Duration::ZERO,
            _ => Duration::from_millis(random.u64(..3000)),
        }
    }
}

impl Serialize for Kind {
    fn serialize<S: Serializer>(&self, serializer: S) -> Result<S::Ok, S::Error> {
        serializer.serialize_str(self.name())
    }
}

impl<'de> Deserialize<'de> for Kind {
    fn deserialize<D: Deserializer<'de>>(deserializer: D) -> Result<Self, D::Error> {
        let name = String::deserialize(deserializer)?;
        let mut kinds = Self::CAPTURE.into_iter().chain(Self::REPLAY);
        let unknown = || D::Error::custom(format!("no fault is called {name:?}"));
        kinds.find(|kind| kind.name() == name).ok_or_else(unknown)
    }
}

/// One thing that goes wrong.
#[derive(Clone, Copy, Debug, Deserialize, Serialize)]
pub struct Fault {
    pub kind: Kind,
    /// After the round has begun.
    pub after: Duration,
    /// Until its cause is taken away.
    pub hold: Duration,
}

/// One fault, or two that overlap; what follows waits until changes flow again.
#[derive(Clone, Debug, Deserialize, Serialize)]
pub struct Round {
    pub faults: Vec<Fault>,
    /// In which all is well before it.
    pub pause: Duration,
}

/// What befalls the captures.
pub fn of_captures(seed: u64, faults: usize, longest: u64) -> Vec<Round> {
    schedule(&Kind::CAPTURE, seed, faults, longest)
}

/// What befalls a replay.
pub fn of_replay(seed: u64, faults: usize, longest: u64) -> Vec<Round> {
    schedule(&Kind::REPLAY, seed, faults, longest)
}

/// As many faults as asked, each of these as often as any other.
fn schedule(kinds: &[Kind], seed: u64, faults: usize, longest: u64) -> Vec<Round> {
    let mut random = Rng::with_seed(seed);
    let mut deck: Vec<Kind> = Vec::new();
    let mut rounds = Vec::new();
    let mut left = faults;
    while left > 0 {
        if deck.is_empty() {
            deck = kinds.to_vec();
            random.shuffle(&mut deck);
        }
        let Some(first) = deck.pop() else { break };
        let mut kinds = vec![first];
        if left > 1
            && random.u32(..4) == 0
            && let Some(at) = deck.iter().rposition(|second| first.goes_with(*second))
        {
            kinds.push(deck.remove(at));
        }
        let mut after = Duration::ZERO;
        let faults: Vec<_> = kinds
            .into_iter()
            .map(|kind| {
                let fault = Fault {
                    kind,
                    after,
                    hold: kind.hold(longest, &mut random),
                };
                after += Duration::from_millis(random.u64(..4000));
                fault
            })
            .collect();
        left -= faults.len();
        rounds.push(Round {
            faults,
            pause: Duration::from_millis(random.u64(500..3000)),
        });
    }
    rounds
}

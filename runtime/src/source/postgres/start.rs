//! Decides how a capture starts: the one place that tells a resumption from a loss.
//!
//! Invariant kept everywhere else: a position is in the checkpoint before PostgreSQL hears of it. So the slot is never ahead of the
//! checkpoint, unless somebody else moved it, and then changes are lost.

use std::collections::BTreeMap;

use crate::{
    log::{Checkpoint, Parting, SnapshotState},
    position::{Epoch, Lsn},
};

/// What IDENTIFY_SYSTEM and TIMELINE_HISTORY say.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct ServerIdentity {
    /// Made by initdb; a restored backup keeps it, a new cluster has another.
    pub system_identifier: String,
    /// Grows with each promotion.
    pub timeline: u32,
    /// How far its WAL has grown.
    pub position: Lsn,
    /// It follows another one.
    pub standby: bool,
    /// The timelines that this one descends from, each with the place where it was left.
    pub history: Vec<(u32, Lsn)>,
    /// Its major version.
    pub major_version: u32,
    /// OID of the database.
    pub database_oid: u32,
    /// Up to here nobody has written anything since its WAL was made anew. None where that was not looked at, or is not certain.
    pub untouched_to: Option<Lsn>,
}

/// Reads the file that TIMELINE_HISTORY sends: a line for each ancestor, with its number and the place where it was left. What is no
/// such line is a comment.
#[must_use]
pub fn timeline_history(file: &str) -> Vec<(u32, Lsn)> {
    file.lines()
        .filter_map(|line| {
            let mut fields = line.split_whitespace();
            Some((fields.next()?.parse().ok()?, fields.next()?.parse().ok()?))
        })
        .collect()
}

/// A row of `pg_replication_slots`.
///
/// What a version does not know, or what is not so at the moment, is none.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct SlotState {
    /// Where it goes on; none while it is being made.
    pub confirmed_flush: Option<Lsn>,
    /// The oldest WAL that it needs.
    pub restart: Option<Lsn>,
    /// It cannot be used any more: the server no longer has the WAL that it needs, or has invalidated it.
    pub lost: bool,
    /// The process that reads it.
    pub active_pid: Option<i32>,
    /// `reserved`, `extended`, `unreserved` or `lost`.
    pub wal_status: Option<String>,
    /// Bytes of WAL from `restart` to the server's end.
    pub retained: Option<u64>,
    /// Bytes of WAL that can be written before the slot is in danger; none without `max_slot_wal_keep_size`.
    pub safe: Option<u64>,
    /// It is kept on the standbys (PostgreSQL 17).
    pub failover: Option<bool>,
    /// It came from the primary (PostgreSQL 17).
    pub synced: Option<bool>,
    /// Why it cannot be used any more (PostgreSQL 16).
    pub invalidation_reason: Option<String>,
    /// Since when nobody reads it (PostgreSQL 17), in microseconds since the Unix epoch.
    pub inactive_since_micros: Option<i64>,
    /// The publication that it is read through is the pipeline's own, and is gone.
    pub unpublished: bool,
}

/// How to start.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Start {
    /// There is no slot and none is missed: make one, and count from this epoch.
    CreateSlot(Epoch),
    /// There is a slot and no checkpoint: begin where it stands, in this epoch.
    Adopt(Epoch, Lsn),
    /// Go on after the checkpoint.
    Resume,
    /// Go on after the checkpoint, on the timeline of a promoted server: what was published came before the place where the timelines
    /// parted. What was acknowledged past that place means nothing on the new one.
    Follow(Lsn),
    /// Go on from here on the server that `pg_upgrade` made of the one that was captured, which had nothing more to tell.
    GoOver(Lsn),
    /// The loss is accepted: go on where the slot stands, or where a new one will, in the next epoch.
    Accept {
        /// The name of the gap.
        id: String,
        /// The next epoch.
        epoch: Epoch,
        /// What is lost.
        loss: Loss,
    },
}

/// Changes are missing between the checkpoint and what the source can still send.
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
pub enum SourceGap {
    /// Somebody has to decide.
    #[error(
        "{loss}; to go on without them in the next epoch, in which every captured table is read anew (unless snapshot.mode is Never), run kubectl annotate --overwrite cdcpipeline {pipeline} meander.dev/accept-source-gap={id} (without Kubernetes: acceptSourceGap: {id}){}",
        .other.as_ref().map(|other| format!("; what is accepted now, {other}, is not this gap")).unwrap_or_default()
    )]
    Lost {
        /// What is lost.
        loss: Loss,
        /// Names this gap and no other: the epoch, and the place up to which it was captured.
        id: String,
        /// The pipeline as `kubectl` takes it: `-n shop trades`.
        pipeline: String,
        /// The gap that was accepted, which is another one.
        other: Option<String>,
    },
    /// There is no epoch after the last.
    #[error("the pipeline has seen 255 epochs; create it under another name")]
    EpochsExhausted,
}

/// What is lost, and why.
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
pub enum Loss {
    /// The slot is gone.
    #[error("replication slot {slot:?} is gone: changes committed after {after} are lost to this pipeline")]
    SlotMissing {
        /// Its name.
        slot: String,
        /// What was acknowledged.
        after: Lsn,
    },
    /// The server removed WAL that the slot needs.
    #[error(
        "replication slot {slot:?} lost WAL that it needs: changes committed after {after} are lost to this pipeline"
    )]
    SlotLost {
        /// Its name.
        slot: String,
        /// What was acknowledged.
        after: Lsn,
    },
    /// Somebody advanced the slot, or dropped it and made it again; or Kafka lost the end of a transaction, and shows nobody what came after
    /// its beginning.
    #[error(
        "replication slot {slot:?} stands at {slot_at}, past the checkpoint at {after}: changes between them are lost to this pipeline, \
         unless Kafka hides the newest checkpoint behind a transaction that never ends: look for one with \
         `kafka-transactions.sh --bootstrap-server … find-hanging`, and abort it as docs/conditions.md says"
    )]
    SlotAhead {
        /// Its name.
        slot: String,
        /// Where it stands.
        slot_at: Lsn,
        /// What was acknowledged.
        after: Lsn,
    },
    /// Nothing that was written while there was no publication can be read through it, nor on most versions what came before.
    #[error(
        "the publication that replication slot {slot:?} is read through was dropped: changes committed after {after} are lost to this pipeline"
    )]
    PublicationMissing {
        /// The slot.
        slot: String,
        /// What was acknowledged.
        after: Lsn,
    },
    /// The server was upgraded, and it is not certain that nothing was lost.
    #[error(
        "the server was upgraded from PostgreSQL {from} to {to}, and {doubt}: changes committed after {after} may be lost to this pipeline; docs/slot.md says how the next upgrade loses nothing"
    )]
    Upgraded {
        /// Major version of the checkpoint.
        from: u32,
        /// Of the server.
        to: u32,
        /// What was acknowledged.
        after: Lsn,
        /// Why it is not certain.
        doubt: Doubt,
    },
    /// The host name leads to another cluster than before.
    #[error(
        "the server is not the one this pipeline captured (system identifier {now}, was {before}): it was made anew or replaced, and changes of the old one may be lost"
    )]
    OtherServer {
        /// Of the server.
        now: String,
        /// Of the checkpoint.
        before: String,
    },
    /// The server was promoted, and does not have all that was captured.
    #[error(
        "the server is on timeline {now}, the pipeline captured timeline {before} up to {captured}, and {parted}: what was captured is not what the server has"
    )]
    OtherTimeline {
        /// Of the server.
        now: u32,
        /// Of the checkpoint.
        before: u32,
        /// The last commit that was published.
        captured: Lsn,
        /// Where the two parted, in words.
        parted: String,
    },
    /// The server is behind what was captured from it: it was restored from a backup or a snapshot.
    #[error(
        "the server's WAL ends at {now}, before {captured}, which was captured from it: it was set back to an earlier state"
    )]
    ServerBehind {
        /// Where its WAL ends.
        now: Lsn,
        /// What was captured.
        captured: Lsn,
    },
}

/// Why an upgrade may have lost changes.
#[derive(Clone, Copy, Debug, PartialEq, Eq, thiserror::Error)]
pub enum Doubt {
    /// `pg_upgrade` takes slots along from version 17 on.
    #[error("pg_upgrade leaves the replication slots of a version before 17 behind")]
    OldVersion,
    /// There is no slot, or none that can be used.
    #[error(
        "the replication slot was not brought along, as pg_upgrade does if the slot is there: do not drop it before"
    )]
    NoSlot,
    /// Something may have been written that was never captured, if the slot was dropped before the upgrade.
    #[error(
        "the old server was shut down while nobody read the replication slot: let the capture run until it is down"
    )]
    EndNotSeen,
    /// It was made by hand, or moved.
    #[error(
        "that pg_upgrade made the replication slot before anything was written is not certain: make none by hand, and move none"
    )]
    SlotNotOriginal,
}

/// The first version whose slots `pg_upgrade` takes along.
const SLOTS_ARE_UPGRADED: u32 = 17;

impl Loss {
    /// True if the tables of this server, read anew, are what the log should lead to.
    ///
    /// Where the host leads to another server, or to one that was set back, nobody but a person knows whether it is the right one. A
    /// standby is no server to begin anew on: its tables cannot be read, and a failover may be under way.
    fn is_made_good_by_reading(&self, server: &ServerIdentity) -> bool {
        let same_server = match self {
            Self::SlotMissing { .. }
            | Self::SlotLost { .. }
            | Self::SlotAhead { .. }
            | Self::PublicationMissing { .. }
            | Self::OtherTimeline { .. } => true,
            Self::Upgraded { .. } | Self::OtherServer { .. } | Self::ServerBehind { .. } => false,
        };
        same_server && !server.standby
    }

    /// One word for conditions, status and the stream.
    #[must_use]
    pub fn reason(&self) -> &'static str {
        match self {
            Self::SlotMissing { .. } => "SlotMissing",
            Self::SlotLost { .. } => "SlotLost",
            Self::SlotAhead { .. } => "SlotAhead",
            Self::PublicationMissing { .. } => "PublicationMissing",
            Self::Upgraded { .. } => "ServerUpgraded",
            Self::OtherServer { .. } => "OtherServer",
            Self::OtherTimeline { .. } => "OtherTimeline",
            Self::ServerBehind { .. } => "ServerBehind",
        }
    }
}

impl Checkpoint {
    /// LSNs from here on are not comparable with those before, or do not follow them without a gap.
    pub fn begin_epoch(&mut self, epoch: Epoch, at: Lsn, server: &ServerIdentity) {
        self.epoch = epoch.0;
        self.partings.clear();
        if self.system_identifier != server.system_identifier {
            // Its tables have other OIDs.
            self.oversized.tables.clear();
        }
        self.stand_on(server, at);
        // What was read before says nothing of what changed in between. A request that was done is not made again by that.
        let mut requests = std::mem::take(&mut self.snapshot.requests);
        requests.retain(|_, tables| tables.is_empty());
        self.snapshot = SnapshotState {
            requests,
            ..SnapshotState::default()
        };
        if let Some(gap) = &mut self.accepted_gap {
            gap.read_anew = false;
        }
    }

    /// Goes on in this epoch on an upgraded server, from a place at which it has told all that the old one had. `members` are the tables of
    /// its publication, with their membership of it, which has another OID now.
    pub fn go_over(&mut self, at: Lsn, server: &ServerIdentity, members: &BTreeMap<u32, u32>) {
        self.stand_on(server, at);
        self.snapshot.done.retain(|table, member| {
            let now = members.get(table);
            now.map(|now| *member = *now).is_some()
        });
    }

    fn stand_on(&mut self, server: &ServerIdentity, at: Lsn) {
        self.acknowledged = at;
        self.system_identifier.clone_from(&server.system_identifier);
        self.timeline = server.timeline;
        self.major_version = server.major_version;
        self.database_oid = server.database_oid;
    }

    /// Ends the epoch at a place in the WAL, and not before: what commits up to there is the same on the new timeline, may be in a sink
    /// already, and keeps its coordinate.
    ///
    /// # Errors
    /// When there is no epoch after this one.
    pub fn part(&mut self, at: Lsn) -> Result<(), SourceGap> {
        let next = next(self.epoch)?.0;
        self.partings.push(Parting {
            epoch: std::mem::replace(&mut self.epoch, next),
            at,
            high_time_micros: self.high_time_micros,
        });
        Ok(())
    }
}

impl SourceGap {
    /// One word for conditions and metrics.
    #[must_use]
    pub fn reason(&self) -> &'static str {
        match self {
            Self::Lost { loss, .. } => loss.reason(),
            Self::EpochsExhausted => "EpochsExhausted",
        }
    }
}

/// What a pipeline says about itself when it starts.
#[derive(Clone, Copy, Debug)]
pub struct Pipeline<'a> {
    /// Its namespace.
    pub namespace: &'a str,
    /// Its name.
    pub name: &'a str,
    /// Its slot's name.
    pub slot: &'a str,
    /// The gap that somebody accepted.
    pub accepted: Option<&'a str>,
    /// A gap is accepted without being asked about, since what was lost is made good by reading all tables anew.
    pub resnapshots: bool,
}

/// Compares what was published with what the source has.
///
/// # Errors
/// When changes are missing between the two, and nobody accepted that.
pub fn decide(
    checkpoint: Option<&Checkpoint>,
    pipeline: Pipeline<'_>,
    slot: Option<&SlotState>,
    server: &ServerIdentity,
) -> Result<Start, SourceGap> {
    // A released checkpoint is the end of one life of the pipeline: its slot was dropped on purpose, and what comes next cannot be
    // compared with it. Unless the drop failed, and the slot still is where it was: then the old life goes on.
    let (checkpoint, epoch) = match checkpoint {
        None => (None, Epoch::FIRST),
        Some(released) if released.released && !continues(released, slot, server) => (None, next(released.epoch)?),
        Some(checkpoint) => (Some(checkpoint), Epoch(checkpoint.epoch)),
    };
    let (compared, after) = match checkpoint {
        None => (first(epoch, pipeline.slot, slot), Lsn::ZERO),
        Some(checkpoint) => (resume(checkpoint, pipeline.slot, slot, server), checkpoint.acknowledged),
    };
    compared.or_else(|loss| {
        // The epoch grows with the acceptance, so that it accepts nothing a second time. All of a gap has one name, so that what is
        // accepted while the slot is gone still is when it has been made anew.
        let id = format!("{}:{after}", epoch.0);
        if pipeline.accepted == Some(id.as_str()) || (pipeline.resnapshots && loss.is_made_good_by_reading(server)) {
            let epoch = next(epoch.0)?;
            Ok(Start::Accept { id, epoch, loss })
        } else {
            Err(SourceGap::Lost {
                loss,
                id,
                pipeline: format!("-n {} {}", pipeline.namespace, pipeline.name),
                other: pipeline.accepted.map(str::to_owned),
            })
        }
    })
}

fn next(epoch: u8) -> Result<Epoch, SourceGap> {
    epoch.checked_add(1).map(Epoch).ok_or(SourceGap::EpochsExhausted)
}

/// The start of a pipeline that has nothing to go on from.
fn first(epoch: Epoch, name: &str, slot: Option<&SlotState>) -> Result<Start, Loss> {
    match slot {
        None => Ok(Start::CreateSlot(epoch)),
        Some(SlotState { unpublished: true, .. }) => Err(Loss::PublicationMissing {
            slot: name.to_owned(),
            after: Lsn::ZERO,
        }),
        Some(SlotState {
            confirmed_flush: Some(at),
            lost: false,
            ..
        }) => Ok(Start::Adopt(epoch, *at)),
        Some(_) => Err(Loss::SlotLost {
            slot: name.to_owned(),
            after: Lsn::ZERO,
        }),
    }
}

fn resume(
    checkpoint: &Checkpoint,
    name: &str,
    slot: Option<&SlotState>,
    server: &ServerIdentity,
) -> Result<Start, Loss> {
    if server.system_identifier != checkpoint.system_identifier {
        return other_server(checkpoint, slot, server);
    }
    // What was published in an epoch before says nothing of where this server is.
    let published = checkpoint
        .published
        .filter(|published| published.epoch >= checkpoint.first_comparable_epoch())
        .map_or(Lsn::ZERO, |published| published.commit_lsn);
    let (start, after) = if server.timeline == checkpoint.timeline {
        (Start::Resume, checkpoint.acknowledged)
    } else {
        let left = server
            .history
            .iter()
            .find_map(|(timeline, left)| (*timeline == checkpoint.timeline).then_some(*left));
        match left {
            // A commit record that begins before the place ends before it too: a timeline is left between two records.
            Some(left) if published < left => (Start::Follow(left), checkpoint.acknowledged.min(left)),
            _ => {
                return Err(Loss::OtherTimeline {
                    now: server.timeline,
                    before: checkpoint.timeline,
                    captured: published,
                    parted: left.map_or("the one does not descend from the other".to_owned(), |left| {
                        format!("the two parted at {left}")
                    }),
                });
            }
        }
    };
    let captured = published.max(after);
    if server.position < captured {
        return Err(Loss::ServerBehind {
            now: server.position,
            captured,
        });
    }
    let slot_name = name.to_owned();
    match slot {
        None => Err(Loss::SlotMissing { slot: slot_name, after }),
        Some(
            SlotState { lost: true, .. }
            | SlotState {
                confirmed_flush: None, ..
            },
        ) => Err(Loss::SlotLost { slot: slot_name, after }),
        Some(SlotState { unpublished: true, .. }) => Err(Loss::PublicationMissing { slot: slot_name, after }),
        Some(SlotState {
            confirmed_flush: Some(slot_at),
            ..
        }) if *slot_at > after => Err(Loss::SlotAhead {
            slot: slot_name,
            slot_at: *slot_at,
            after,
        }),
        Some(_) => Ok(start),
    }
}

/// Another cluster is a loss, unless `pg_upgrade` made it, and it is certain that nothing lies between the end of the old one and the
/// slot.
///
/// `pg_upgrade` keeps the OID of the database, has WAL go on past that of the old server, and takes a slot along only after it has made
/// sure that it had nothing more to tell. But that it was `pg_upgrade` that made the slot cannot be seen in the slot. So two things are
/// asked for besides: that the capture had read up to the end of the old server through the slot, which was there then; and that nobody
/// had written anything on the new one when the slot was made.
fn other_server(checkpoint: &Checkpoint, slot: Option<&SlotState>, server: &ServerIdentity) -> Result<Start, Loss> {
    let (from, to, after) = (checkpoint.major_version, server.major_version, checkpoint.acknowledged);
    if to <= from || server.database_oid != checkpoint.database_oid || server.position < after {
        return Err(Loss::OtherServer {
            now: server.system_identifier.clone(),
            before: checkpoint.system_identifier.clone(),
        });
    }
    let place = slot
        .filter(|slot| !slot.lost && !slot.unpublished)
        .and_then(|slot| slot.confirmed_flush);
    let doubt = match place {
        _ if from < SLOTS_ARE_UPGRADED => Doubt::OldVersion,
        None => Doubt::NoSlot,
        Some(_) if checkpoint.ended_at.is_none_or(|end| after < end) => Doubt::EndNotSeen,
        Some(at) if at < after || server.standby || server.untouched_to != Some(at) => Doubt::SlotNotOriginal,
        Some(at) => return Ok(Start::GoOver(at)),
    };
    Err(Loss::Upgraded { from, to, after, doubt })
}

/// True when the slot of a released checkpoint was not dropped after all.
fn continues(released: &Checkpoint, slot: Option<&SlotState>, server: &ServerIdentity) -> bool {
    released.system_identifier == server.system_identifier
        && released.timeline == server.timeline
        && slot
            .and_then(|slot| slot.confirmed_flush)
            .is_some_and(|at| at <= released.acknowledged)
}

#[cfg(test)]
mod tests {
    #![allow(clippy::panic)]
    use super::*;
    use crate::position::Position;

    fn checkpoint() -> Checkpoint {
        Checkpoint {
            epoch: 1,
            partings: vec![],
            system_identifier: "7".to_owned(),
            timeline: 1,
            major_version: 17,
            database_oid: 5,
            ended_at: None,
            owner_generation: 4,
            published: None,
            complete: None,
            redis: None,
            acknowledged: Lsn(100),
            high_time_micros: 0,
            events_total: 0,
            snapshot: SnapshotState::default(),
            records_total: 0,
            partitions: None,
            released: false,
            accepted_gap: None,
            oversized: Default::default(),
        }
    }

    #[test]
    fn a_new_epoch_reads_every_table_anew_and_makes_no_request_again_that_was_done() {
        let mut checkpoint = checkpoint();
        checkpoint.snapshot.done.insert(16_384, 1);
        let requests = [("done".to_owned(), vec![]), ("begun".to_owned(), vec![16_384])];
        checkpoint.snapshot.requests.extend(requests);
        checkpoint.begin_epoch(Epoch(2), Lsn(7), &server());
        assert_eq!(checkpoint.snapshot.requests.keys().collect::<Vec<_>>(), ["done"]);
        checkpoint.snapshot.requests.clear();
        assert!(checkpoint.snapshot.is_empty());
    }

    fn slot(at: u64) -> SlotState {
        SlotState {
            confirmed_flush: Some(Lsn(at)),
            ..SlotState::default()
        }
    }

    fn start(checkpoint: Option<&Checkpoint>, slot: Option<SlotState>) -> Result<Start, &'static str> {
        start_on(&server(), None, checkpoint, slot).map_err(|gap| gap.reason())
    }

    fn server() -> ServerIdentity {
        ServerIdentity {
            system_identifier: "7".to_owned(),
            timeline: 1,
            position: Lsn(1000),
            standby: false,
            history: vec![],
            major_version: 17,
            database_oid: 5,
            untouched_to: None,
        }
    }

    fn start_on(
        server: &ServerIdentity,
        accepted: Option<&str>,
        checkpoint: Option<&Checkpoint>,
        slot: Option<SlotState>,
    ) -> Result<Start, SourceGap> {
        let pipeline = Pipeline {
            namespace: "n",
            name: "p",
            slot: "s",
            accepted,
            resnapshots: false,
        };
        decide(checkpoint, pipeline, slot.as_ref(), server)
    }

    #[test]
    fn a_first_start_makes_the_slot_or_takes_the_one_that_is_there() {
        assert_eq!(start(None, None), Ok(Start::CreateSlot(Epoch(1))));
        assert_eq!(start(None, Some(slot(50))), Ok(Start::Adopt(Epoch(1), Lsn(50))));
        assert_eq!(
            start(
                None,
                Some(SlotState {
                    confirmed_flush: None,
                    ..slot(0)
                })
            ),
            Err("SlotLost")
        );
    }

    #[test]
    fn a_restart_resumes_only_from_a_slot_that_is_not_ahead() {
        assert_eq!(start(Some(&checkpoint()), Some(slot(99))), Ok(Start::Resume));
        assert_eq!(start(Some(&checkpoint()), Some(slot(100))), Ok(Start::Resume));
        assert_eq!(start(Some(&checkpoint()), Some(slot(101))), Err("SlotAhead"));
        assert_eq!(start(Some(&checkpoint()), None), Err("SlotMissing"));
        assert_eq!(
            start(
                Some(&checkpoint()),
                Some(SlotState {
                    lost: true,
                    ..slot(100)
                })
            ),
            Err("SlotLost")
        );
    }

    #[test]
    fn another_server_is_never_taken_for_the_old_one() {
        let other = Checkpoint {
            system_identifier: "8".to_owned(),
            ..checkpoint()
        };
        assert_eq!(start(Some(&other), Some(slot(50))), Err("OtherServer"));
        let promoted = Checkpoint {
            timeline: 2,
            ..checkpoint()
        };
        assert_eq!(start(Some(&promoted), Some(slot(50))), Err("OtherTimeline"));
        let ahead = Checkpoint {
            acknowledged: Lsn(1001),
            ..checkpoint()
        };
        assert_eq!(start(Some(&ahead), Some(slot(50))), Err("ServerBehind"));
        // LSNs of an epoch before are those of another server, perhaps.
        let published_in = |epoch: u8| Checkpoint {
            epoch: 2,
            published: Some(Position::end_of_transaction(Epoch(epoch), Lsn(5000))),
            ..checkpoint()
        };
        assert_eq!(start(Some(&published_in(1)), Some(slot(50))), Ok(Start::Resume));
        assert_eq!(start(Some(&published_in(2)), Some(slot(50))), Err("ServerBehind"));
    }

    #[test]
    fn an_upgraded_server_is_gone_over_to_only_if_it_is_certain_that_nothing_lies_in_between() {
        let before = Checkpoint {
            ended_at: Some(Lsn(100)),
            ..checkpoint()
        };
        let upgraded = ServerIdentity {
            system_identifier: "8".to_owned(),
            major_version: 18,
            untouched_to: Some(Lsn(500)),
            ..server()
        };
        type Given = (Checkpoint, ServerIdentity, Option<SlotState>);
        let on = |change: fn(&mut Given)| {
            let mut given = (before.clone(), upgraded.clone(), Some(slot(500)));
            change(&mut given);
            match start_on(&given.1, None, Some(&given.0), given.2) {
                Ok(start) => Ok(start),
                Err(SourceGap::Lost {
                    loss: Loss::Upgraded { doubt, .. },
                    ..
                }) => Err(Some(doubt)),
                Err(gap) => {
                    assert_eq!(gap.reason(), "OtherServer");
                    Err(None)
                }
            }
        };
        assert_eq!(on(|_| ()), Ok(Start::GoOver(Lsn(500))));
        let not_certain: [(fn(&mut Given), _); 15] = [
            (|(_, server, _)| server.major_version = 17, None),
            (|(_, server, _)| server.database_oid = 6, None),
            (|(_, server, _)| server.position = Lsn(99), None),
            (
                |(checkpoint, ..)| checkpoint.major_version = 16,
                Some(Doubt::OldVersion),
            ),
            (|(.., slot)| *slot = None, Some(Doubt::NoSlot)),
            (|(.., slot)| slot.as_mut().unwrap().lost = true, Some(Doubt::NoSlot)),
            (
                |(.., slot)| slot.as_mut().unwrap().unpublished = true,
                Some(Doubt::NoSlot),
            ),
            (
                |(.., slot)| slot.as_mut().unwrap().confirmed_flush = None,
                Some(Doubt::NoSlot),
            ),
            (|(checkpoint, ..)| checkpoint.ended_at = None, Some(Doubt::EndNotSeen)),
            (
                |(checkpoint, ..)| checkpoint.ended_at = Some(Lsn(101)),
                Some(Doubt::EndNotSeen),
            ),
            (
                |(_, server, _)| server.untouched_to = None,
                Some(Doubt::SlotNotOriginal),
            ),
            (
                |(_, server, _)| server.untouched_to = Some(Lsn(400)),
                Some(Doubt::SlotNotOriginal),
            ),
            (
                |(.., slot)| slot.as_mut().unwrap().confirmed_flush = Some(Lsn(600)),
                Some(Doubt::SlotNotOriginal),
            ),
            (
                |(_, server, slot)| {
                    server.untouched_to = Some(Lsn(50));
                    slot.as_mut().unwrap().confirmed_flush = Some(Lsn(50));
                },
                Some(Doubt::SlotNotOriginal),
            ),
            (|(_, server, _)| server.standby = true, Some(Doubt::SlotNotOriginal)),
        ];
        for (index, (change, doubt)) in not_certain.into_iter().enumerate() {
            assert_eq!(on(change), Err(doubt), "{index}");
        }

        let mut checkpoint = before;
        checkpoint.snapshot.done.extend([(16_384, 1), (16_385, 2)]);
        checkpoint.go_over(Lsn(500), &upgraded, &BTreeMap::from([(16_384, 7), (16_386, 8)]));
        assert_eq!(checkpoint.snapshot.done, BTreeMap::from([(16_384, 7)]));
        // From here on it is resumed as any other.
        assert_eq!(
            start_on(&upgraded, None, Some(&checkpoint), Some(slot(500))).unwrap(),
            Start::Resume
        );
    }

    #[test]
    fn a_promoted_server_is_followed_if_nothing_published_lies_past_the_place_where_it_parted() {
        let promoted = |left: u64| ServerIdentity {
            timeline: 3,
            history: timeline_history(&format!(
                "1\t0/{left:X}\tno recovery target specified\n\n2\t0/{:X}\tno recovery target specified\n",
                left + 50
            )),
            ..server()
        };
        let published = |at: u64| Checkpoint {
            published: Some(Position::end_of_transaction(Epoch::FIRST, Lsn(at))),
            acknowledged: Lsn(120),
            ..checkpoint()
        };
        let on = |left, at, slot_at| start_on(&promoted(left), None, Some(&published(at)), Some(slot(slot_at)));
        assert_eq!(on(100, 99, 100), Ok(Start::Follow(Lsn(100))));
        assert_eq!(on(100, 100, 100).unwrap_err().reason(), "OtherTimeline");
        // What was acknowledged on the old timeline says nothing of the new one.
        assert_eq!(on(100, 99, 101).unwrap_err().reason(), "SlotAhead");
        let stranger = ServerIdentity {
            history: vec![(2, Lsn(500))],
            ..promoted(100)
        };
        let gap = start_on(&stranger, None, Some(&published(50)), Some(slot(50))).unwrap_err();
        assert_eq!(gap.reason(), "OtherTimeline");
    }

    #[test]
    fn a_server_that_was_followed_is_followed_again_whatever_was_published_meanwhile() {
        let mut followed = Checkpoint {
            published: Some(Position::end_of_transaction(Epoch::FIRST, Lsn(90))),
            timeline: 2,
            ..checkpoint()
        };
        followed.part(Lsn(100)).unwrap();
        assert_eq!(followed.epoch, 2);
        let third = ServerIdentity {
            timeline: 3,
            history: vec![(1, Lsn(100)), (2, Lsn(150))],
            ..server()
        };
        let on = |checkpoint: &Checkpoint| start_on(&third, None, Some(checkpoint), Some(slot(80)));
        assert_eq!(on(&followed), Ok(Start::Follow(Lsn(150))));
        for (epoch, at, expected) in [(2, 149, Ok(Start::Follow(Lsn(150)))), (2, 150, Err("OtherTimeline"))] {
            let later = Checkpoint {
                published: Some(Position::end_of_transaction(Epoch(epoch), Lsn(at))),
                ..followed.clone()
            };
            assert_eq!(on(&later).map_err(|gap| gap.reason()), expected);
        }
        // What the server had before it was set back is known from an epoch before, too.
        let behind = ServerIdentity {
            timeline: 2,
            position: Lsn(89),
            history: vec![(1, Lsn(80))],
            ..server()
        };
        let idle = Checkpoint {
            acknowledged: Lsn(50),
            ..followed.clone()
        };
        let gap = start_on(&behind, None, Some(&idle), Some(slot(50))).unwrap_err();
        assert_eq!(gap.reason(), "ServerBehind");

        followed.part(Lsn(150)).unwrap();
        let position = |epoch, at| Position::end_of_transaction(Epoch(epoch), Lsn(at));
        let lost = |epoch, at| followed.lost_with(position(epoch, at)).map(|parting| parting.at);
        assert_eq!([lost(1, 99), lost(2, 149), lost(3, 500)], [None; 3]);
        assert_eq!([lost(1, 100), lost(2, 200)], [Some(Lsn(100)), Some(Lsn(150))]);
        let last = Checkpoint { epoch: 255, ..followed };
        assert_eq!(last.clone().part(Lsn(200)), Err(SourceGap::EpochsExhausted));
    }

    #[test]
    fn a_gap_is_accepted_by_its_name_and_once() {
        let lost = |accepted, checkpoint: &Checkpoint, slot| start_on(&server(), accepted, Some(checkpoint), slot);
        let SourceGap::Lost { id, .. } = lost(None, &checkpoint(), None).unwrap_err() else {
            panic!("not a gap that can be accepted");
        };
        assert_eq!(id, "1:0/64");
        let accepted = |slot| match lost(Some("1:0/64"), &checkpoint(), slot) {
            Ok(Start::Accept { epoch, loss, .. }) => (epoch, loss.reason()),
            other => panic!("{other:?}"),
        };
        assert_eq!(accepted(None), (Epoch(2), "SlotMissing"));
        // The new slot was made, and the process died before it could say so.
        assert_eq!(accepted(Some(slot(500))), (Epoch(2), "SlotAhead"));
        let later = Checkpoint {
            epoch: 2,
            ..checkpoint()
        };
        let again = lost(Some("1:0/64"), &later, None).unwrap_err();
        assert_eq!(again.reason(), "SlotMissing");
        assert!(
            again
                .to_string()
                .ends_with("; what is accepted now, 1:0/64, is not this gap")
        );
        assert_eq!(lost(Some("1:0/64"), &checkpoint(), Some(slot(100))), Ok(Start::Resume));
    }

    #[test]
    fn a_gap_that_reading_makes_good_needs_nobody_if_that_is_asked_for() {
        let pipeline = Pipeline {
            namespace: "n",
            name: "p",
            slot: "s",
            accepted: None,
            resnapshots: true,
        };
        let on = |server: &ServerIdentity, slot: Option<SlotState>| match decide(
            Some(&checkpoint()),
            pipeline,
            slot.as_ref(),
            server,
        ) {
            Ok(Start::Accept { epoch, loss, .. }) => Ok((epoch, loss.reason())),
            Err(gap) => Err(gap.reason()),
            Ok(other) => panic!("{other:?}"),
        };
        assert_eq!(on(&server(), None), Ok((Epoch(2), "SlotMissing")));
        assert_eq!(on(&server(), Some(slot(101))), Ok((Epoch(2), "SlotAhead")));
        let parted = ServerIdentity {
            timeline: 2,
            history: vec![(1, Lsn(0))],
            ..server()
        };
        assert_eq!(on(&parted, None), Ok((Epoch(2), "OtherTimeline")));
        // Whether that is the right server is for a person to say.
        let other = ServerIdentity {
            system_identifier: "8".to_owned(),
            ..server()
        };
        assert_eq!(on(&other, None), Err("OtherServer"));
        let behind = ServerIdentity {
            position: Lsn(1),
            ..server()
        };
        assert_eq!(on(&behind, None), Err("ServerBehind"));
        let standby = ServerIdentity {
            standby: true,
            ..server()
        };
        assert_eq!(on(&standby, None), Err("SlotMissing"));
    }

    #[test]
    fn a_slot_dropped_on_purpose_is_no_gap_and_starts_a_new_epoch() {
        let released = Checkpoint {
            released: true,
            ..checkpoint()
        };
        assert_eq!(start(Some(&released), None), Ok(Start::CreateSlot(Epoch(2))));
        assert_eq!(
            start(Some(&released), Some(slot(500))),
            Ok(Start::Adopt(Epoch(2), Lsn(500)))
        );
        let last = Checkpoint { epoch: 255, ..released };
        assert_eq!(start(Some(&last), None), Err("EpochsExhausted"));
    }

    #[test]
    fn a_slot_that_should_have_been_dropped_and_was_not_goes_on_where_it_is() {
        let released = Checkpoint {
            released: true,
            ..checkpoint()
        };
        // A new epoch would publish again what lies between the slot and the checkpoint.
        assert_eq!(start(Some(&released), Some(slot(90))), Ok(Start::Resume));
    }
}

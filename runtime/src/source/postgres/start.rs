//! Decides how a capture starts: the one place that tells a resumption from a loss.
//!
//! Invariant kept everywhere else: a position is in the checkpoint before PostgreSQL hears of it. So the slot is never ahead of the
//! checkpoint, unless somebody else moved it, and then changes are lost.

use crate::{
    log::Checkpoint,
    position::{Epoch, Lsn},
};

/// What a person does about a gap: there is no way to go on as if nothing had been lost.
const REMEDY: &str = "to start anew, delete the pipeline with reclaimPolicy Delete and create it again: its log goes on in the next epoch";

/// What IDENTIFY_SYSTEM says.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct ServerIdentity {
    /// Made by initdb; a restored backup keeps it, a new cluster has another.
    pub system_identifier: String,
    /// Grows with each promotion.
    pub timeline: u32,
    /// How far its WAL has grown.
    pub position: Lsn,
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
}

/// Changes are missing between the checkpoint and what the source can still send.
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
pub enum SourceGap {
    /// The slot is gone.
    #[error("replication slot {slot:?} is gone: changes committed after {after} are lost to this pipeline; {REMEDY}")]
    SlotMissing {
        /// Its name.
        slot: String,
        /// What was acknowledged.
        after: Lsn,
    },
    /// The server removed WAL that the slot needs.
    #[error(
        "replication slot {slot:?} lost WAL that it needs: changes committed after {after} are lost to this pipeline; {REMEDY}"
    )]
    SlotLost {
        /// Its name.
        slot: String,
        /// What was acknowledged.
        after: Lsn,
    },
    /// Somebody advanced the slot, or dropped it and made it again.
    #[error(
        "replication slot {slot:?} stands at {slot_at}, past the checkpoint at {after}: changes between them are lost to this pipeline; {REMEDY}"
    )]
    SlotAhead {
        /// Its name.
        slot: String,
        /// Where it stands.
        slot_at: Lsn,
        /// What was acknowledged.
        after: Lsn,
    },
    /// The host name leads to another cluster than before.
    #[error("the server is not the one this pipeline captured: system identifier {now}, was {before}; {REMEDY}")]
    OtherServer {
        /// Of the server.
        now: String,
        /// Of the checkpoint.
        before: String,
    },
    /// The server was promoted, and whether it had received everything that was captured is not known.
    #[error(
        "the server is on timeline {now}, the pipeline captured timeline {before}: changes may differ between them; {REMEDY}"
    )]
    OtherTimeline {
        /// Of the server.
        now: u32,
        /// Of the checkpoint.
        before: u32,
    },
    /// The server is behind what was captured from it: it was restored from a backup or a snapshot.
    #[error(
        "the server's WAL ends at {now}, before {captured}, which was captured from it: it was set back to an earlier state; {REMEDY}"
    )]
    ServerBehind {
        /// Where its WAL ends.
        now: Lsn,
        /// What was captured.
        captured: Lsn,
    },
    /// There is no epoch after the last.
    #[error("the pipeline has seen 255 epochs; create it under another name")]
    EpochsExhausted,
}

impl SourceGap {
    /// One word for conditions and metrics.
    #[must_use]
    pub fn reason(&self) -> &'static str {
        match self {
            Self::SlotMissing { .. } => "SlotMissing",
            Self::SlotLost { .. } => "SlotLost",
            Self::SlotAhead { .. } => "SlotAhead",
            Self::OtherServer { .. } => "OtherServer",
            Self::OtherTimeline { .. } => "OtherTimeline",
            Self::ServerBehind { .. } => "ServerBehind",
            Self::EpochsExhausted => "EpochsExhausted",
        }
    }
}

/// Compares what was published with what the source has.
///
/// # Errors
/// When changes are missing between the two.
pub fn decide(
    checkpoint: Option<&Checkpoint>,
    slot_name: &str,
    slot: Option<&SlotState>,
    server: &ServerIdentity,
) -> Result<Start, SourceGap> {
    // A released checkpoint is the end of one life of the pipeline: its slot was dropped on purpose, and what comes next cannot be
    // compared with it. Unless the drop failed, and the slot still is where it was: then the old life goes on.
    let (checkpoint, epoch) = match checkpoint {
        None => (None, Epoch::FIRST),
        Some(released) if released.released && !continues(released, slot, server) => {
            let next = released.epoch.checked_add(1).ok_or(SourceGap::EpochsExhausted)?;
            (None, Epoch(next))
        }
        Some(checkpoint) => (Some(checkpoint), Epoch(checkpoint.epoch)),
    };
    let Some(checkpoint) = checkpoint else {
        return match slot {
            None => Ok(Start::CreateSlot(epoch)),
            Some(SlotState {
                confirmed_flush: Some(at),
                lost: false,
                ..
            }) => Ok(Start::Adopt(epoch, *at)),
            Some(_) => Err(SourceGap::SlotLost {
                slot: slot_name.to_owned(),
                after: Lsn::ZERO,
            }),
        };
    };
    let after = checkpoint.acknowledged;
    if server.system_identifier != checkpoint.system_identifier {
        return Err(SourceGap::OtherServer {
            now: server.system_identifier.clone(),
            before: checkpoint.system_identifier.clone(),
        });
    }
    if server.timeline != checkpoint.timeline {
        return Err(SourceGap::OtherTimeline {
            now: server.timeline,
            before: checkpoint.timeline,
        });
    }
    let captured = checkpoint
        .published
        .map_or(after, |published| published.commit_lsn.max(after));
    if server.position < captured {
        return Err(SourceGap::ServerBehind {
            now: server.position,
            captured,
        });
    }
    let slot_name = slot_name.to_owned();
    match slot {
        None => Err(SourceGap::SlotMissing { slot: slot_name, after }),
        Some(
            SlotState { lost: true, .. }
            | SlotState {
                confirmed_flush: None, ..
            },
        ) => Err(SourceGap::SlotLost { slot: slot_name, after }),
        Some(SlotState {
            confirmed_flush: Some(slot_at),
            ..
        }) if *slot_at > after => Err(SourceGap::SlotAhead {
            slot: slot_name,
            slot_at: *slot_at,
            after,
        }),
        Some(_) => Ok(Start::Resume),
    }
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
    use super::*;

    fn checkpoint() -> Checkpoint {
        Checkpoint {
            epoch: 1,
            system_identifier: "7".to_owned(),
            timeline: 1,
            owner_generation: 4,
            published: None,
            complete: None,
            redis: None,
            acknowledged: Lsn(100),
            high_time_micros: 0,
            events_total: 0,
            released: false,
        }
    }

    fn slot(at: u64) -> SlotState {
        SlotState {
            confirmed_flush: Some(Lsn(at)),
            ..SlotState::default()
        }
    }

    fn start(checkpoint: Option<&Checkpoint>, slot: Option<SlotState>) -> Result<Start, &'static str> {
        let server = ServerIdentity {
            system_identifier: "7".to_owned(),
            timeline: 1,
            position: Lsn(1000),
        };
        decide(checkpoint, "s", slot.as_ref(), &server).map_err(|gap| gap.reason())
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

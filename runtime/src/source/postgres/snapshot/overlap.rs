//! Finds what a chunk does not see of what the stream had before it.
//!
//! A chunk is published where its watermark comes out of the stream. Then every transaction that committed before that place must be
//! in the chunk, or the rows that it touched must not be taken from the chunk: they would be older than what is in the log already.
//! Whether the chunk sees a transaction is asked of the chunk's own snapshot, for a transaction whose commit is in the WAL, and was
//! streamed, can still be invisible. So three things are kept:
//! - what was touched since the window opened, and by which transaction;
//! - the transactions that were streamed before that and that no snapshot has seen yet: what they touched is not known any more;
//! - a barrier: a transaction before it may have been streamed before anybody took notes, or may have changed a table in part before
//!   the table was published. No chunk is taken while one of them is undecided.

use std::collections::HashMap;

use crate::source::postgres::snapshot::visibility::Visibility;

/// Bounds of what is kept.
const MOST_BYTES: usize = 16 << 20;
const MOST_TRANSACTIONS: usize = 1 << 20;
/// What a note costs beside its key.
const NOTE_BYTES: usize = 64;

/// Why a chunk cannot be taken as it is. It is read again.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Again {
    /// A transaction that may concern it is not decided yet.
    Undecided,
    /// Something happened to the table that is not the change of a row with a key.
    Disturbed,
    /// Too much happened meanwhile.
    Overflow,
}

/// Keys whose rows in the chunk are stale. False for one whose last state the stream did not tell in full.
pub type Stale = HashMap<Box<[u8]>, bool>;

/// The notes of a session.
#[derive(Debug, Default)]
pub struct Overlap {
    barrier: Option<u64>,
    earlier: Vec<u32>,
    window: Option<Window>,
    overflow: bool,
}

#[derive(Debug, Default)]
struct Window {
    transactions: Vec<u32>,
    touched: Vec<(u32, Box<[u8]>, bool)>,
    disturbed: Vec<u32>,
    bytes: usize,
}

impl Overlap {
    /// Starts to take notes anew. Before a chunk is judged, the barrier must be [set](Self::set_barrier).
    pub fn watch(&mut self) {
        *self = Self::default();
        self.window = Some(Window::default());
    }

    /// Every transaction from this id on began after [`watch`](Self::watch).
    pub fn set_barrier(&mut self, xid: u64) {
        self.barrier = Some(xid);
    }

    /// A window opens, for the next chunk.
    pub fn open(&mut self) {
        let before = self.window.replace(Window::default()).unwrap_or_default();
        self.earlier.extend(before.transactions);
    }

    /// A transaction comes out of the stream.
    pub fn began(&mut self, xid: u32) {
        let Some(window) = &mut self.window else { return };
        if self.earlier.len() + window.transactions.len() >= MOST_TRANSACTIONS {
            // Without its transactions nothing can be judged: watch again.
            self.overflow = true;
            self.barrier = None;
            self.earlier.clear();
            self.window = None;
            return;
        }
        window.transactions.push(xid);
    }

    /// It changed the row with this key. `told` says that the stream has the row's new state in full.
    pub fn touched(&mut self, xid: u32, key: &[u8], told: bool) {
        let Some(window) = &mut self.window else { return };
        window.bytes += key.len() + NOTE_BYTES;
        if window.bytes > MOST_BYTES {
            self.overflow = true;
            window.touched.clear();
        } else if !self.overflow {
            window.touched.push((xid, key.into(), told));
        }
    }

    /// It did something else to the table.
    pub fn disturbed(&mut self, xid: u32) {
        if let Some(window) = &mut self.window
            && window.disturbed.last() != Some(&xid)
        {
            window.disturbed.push(xid);
        }
    }

    /// Closes the window, and tells which keys of a chunk are stale that sees `seen`.
    ///
    /// # Errors
    /// When the chunk cannot be taken.
    pub fn close(&mut self, seen: &Visibility) -> Result<Stale, Again> {
        let overflow = std::mem::take(&mut self.overflow);
        let Some(window) = self.window.replace(Window::default()) else {
            return Err(Again::Overflow);
        };
        self.earlier.retain(|xid| !seen.sees(*xid));
        let clear = self.earlier.is_empty();
        self.earlier
            .extend(window.transactions.into_iter().filter(|xid| !seen.sees(*xid)));
        if overflow {
            return Err(Again::Overflow);
        }
        if !clear || self.barrier.is_none_or(|barrier| seen.runs_before(barrier)) {
            return Err(Again::Undecided);
        }
        if window.disturbed.iter().any(|xid| !seen.sees(*xid)) {
            return Err(Again::Disturbed);
        }
        let mut stale = Stale::new();
        for (xid, key, told) in window.touched {
            if !seen.sees(xid) {
                *stale.entry(key).or_insert(true) &= told;
            }
        }
        Ok(stale)
    }

    /// True when the notes are worth nothing without a new barrier.
    #[must_use]
    pub fn needs_barrier(&self) -> bool {
        self.barrier.is_none()
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn seen(text: &str) -> Visibility {
        text.parse().unwrap()
    }

    fn watching(barrier: u64) -> Overlap {
        let mut overlap = Overlap::default();
        overlap.watch();
        overlap.set_barrier(barrier);
        overlap.open();
        overlap
    }

    fn keys(stale: Stale) -> Vec<(String, bool)> {
        let mut keys: Vec<_> = stale
            .into_iter()
            .map(|(key, told)| (String::from_utf8(key.into()).unwrap(), told))
            .collect();
        keys.sort();
        keys
    }

    #[test]
    fn only_what_the_chunk_does_not_see_is_stale() {
        let mut overlap = watching(10);
        for (xid, key, told) in [(11, "a", true), (12, "b", true), (12, "c", false), (13, "c", true)] {
            overlap.began(xid);
            overlap.touched(xid, key.as_bytes(), told);
        }
        let stale = overlap.close(&seen("12:13:12")).unwrap();
        assert_eq!(keys(stale), [("b".to_owned(), true), ("c".to_owned(), false)]);
    }

    #[test]
    fn a_commit_that_was_streamed_before_the_window_and_is_not_visible_yet_stops_the_chunk() {
        let mut overlap = watching(10);
        overlap.began(11);
        overlap.open();
        assert_eq!(overlap.close(&seen("11:12:11")), Err(Again::Undecided));
        overlap.open();
        // Not on the list of the running: the list ends before it.
        assert_eq!(overlap.close(&seen("11:11:")), Err(Again::Undecided));
        overlap.open();
        assert_eq!(overlap.close(&seen("12:12:")), Ok(Stale::new()));
    }

    #[test]
    fn what_was_streamed_in_a_window_is_remembered_in_the_next_until_it_is_visible() {
        let mut overlap = watching(10);
        overlap.began(11);
        overlap.touched(11, b"a", true);
        assert_eq!(overlap.close(&seen("11:12:11")).unwrap().len(), 1);
        overlap.open();
        assert_eq!(overlap.close(&seen("11:12:11")), Err(Again::Undecided));
        overlap.open();
        assert_eq!(overlap.close(&seen("12:12:")), Ok(Stale::new()));
    }

    #[test]
    fn no_chunk_is_taken_while_a_transaction_from_before_the_barrier_is_undecided() {
        let mut overlap = watching(10);
        assert_eq!(overlap.close(&seen("9:12:9")), Err(Again::Undecided));
        overlap.open();
        assert_eq!(overlap.close(&seen("11:12:11")), Ok(Stale::new()));
        overlap.watch();
        overlap.open();
        assert_eq!(overlap.close(&seen("12:12:")), Err(Again::Undecided), "no barrier yet");
    }

    #[test]
    fn a_truncation_that_the_chunk_does_not_see_stops_it() {
        let mut overlap = watching(10);
        overlap.began(11);
        overlap.disturbed(11);
        assert_eq!(overlap.close(&seen("12:12:")), Ok(Stale::new()));
        overlap.open();
        overlap.began(12);
        overlap.disturbed(12);
        assert_eq!(overlap.close(&seen("12:12:")), Err(Again::Disturbed));
    }

    #[test]
    fn what_is_kept_is_bounded_and_the_chunk_is_read_again() {
        let mut overlap = watching(10);
        let key = vec![0; 1 << 20];
        for _ in 0..20 {
            overlap.touched(11, &key, true);
        }
        assert_eq!(overlap.close(&seen("12:12:")), Err(Again::Overflow));
        assert!(!overlap.needs_barrier());
        overlap.open();
        assert_eq!(overlap.close(&seen("12:12:")), Ok(Stale::new()));

        for xid in 0..=MOST_TRANSACTIONS {
            overlap.began(u32::try_from(xid).unwrap());
        }
        assert!(overlap.needs_barrier());
        assert_eq!(overlap.close(&seen("12:12:")), Err(Again::Overflow));
    }
}

//! Merges partitions, each of them ordered, into one order.

use std::{cmp::Reverse, collections::BinaryHeap};

/// A k-way merge that is driven by its caller, who fetches what it wants and keeps the heads: here are only their keys.
///
/// Invariant: a source is in exactly one of three places: its head is in `heads`, it is in `wanting`, or it is finished. A head
/// is only given out while `wanting` is empty, so nothing smaller can still come from a source that keeps its order; a
/// source that does not is found out, because what is given out never falls.
pub struct Merge<K> {
    heads: BinaryHeap<Reverse<(K, usize)>>,
    wanting: Vec<usize>,
    last: Option<K>,
}

/// What the merge asks of its caller, or gives.
#[derive(Debug, PartialEq, Eq)]
pub enum Step<K> {
    /// Fetch the next item of this source, then [`Merge::offer`] its key or [`Merge::finish`] the source.
    Want(usize),
    /// The head of this source is next in order.
    Head(usize),
    /// The head of this source is not after what was given out before it.
    Disorder {
        /// What was given out.
        previous: K,
        /// The head.
        found: K,
        /// The source.
        source: usize,
    },
    /// All sources are finished.
    End,
}

impl<K: Ord + Copy> Merge<K> {
    /// A merge of the sources `0..sources`, of which nothing is known yet.
    #[must_use]
    pub fn new(sources: usize) -> Self {
        Self {
            heads: BinaryHeap::with_capacity(sources),
            wanting: (0..sources).rev().collect(),
            last: None,
        }
    }

    /// What is to be done next.
    pub fn step(&mut self) -> Step<K> {
        if let Some(&source) = self.wanting.last() {
            return Step::Want(source);
        }
        let Some(Reverse((key, source))) = self.heads.pop() else {
            return Step::End;
        };
        self.wanting.push(source);
        match self.last.replace(key) {
            Some(previous) if previous >= key => Step::Disorder {
                previous,
                found: key,
                source,
            },
            _ => Step::Head(source),
        }
    }

    /// Gives the key of the next item of a wanted source.
    pub fn offer(&mut self, source: usize, key: K) {
        self.wanting.retain(|&wanting| wanting != source);
        self.heads.push(Reverse((key, source)));
    }

    /// Says that a wanted source has nothing more.
    pub fn finish(&mut self, source: usize) {
        self.wanting.retain(|&wanting| wanting != source);
    }
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;

    /// Merges lists; `Err` holds what came before and what then came out of order.
    fn merge(sources: Vec<Vec<u32>>) -> Result<Vec<u32>, (u32, u32)> {
        let mut merge = Merge::new(sources.len());
        let mut sources: Vec<_> = sources.into_iter().map(Vec::into_iter).collect();
        let mut merged = Vec::new();
        let mut heads = vec![0; sources.len()];
        loop {
            match merge.step() {
                Step::Want(source) => match sources[source].next() {
                    Some(item) => {
                        heads[source] = item;
                        merge.offer(source, item);
                    }
                    None => merge.finish(source),
                },
                Step::Head(source) => merged.push(heads[source]),
                Step::Disorder { previous, found, .. } => return Err((previous, found)),
                Step::End => return Ok(merged),
            }
        }
    }

    proptest! {
        #[test]
        fn any_split_of_a_sequence_merges_back(places in prop::collection::vec((1u32..5, 0usize..6), 0..300)) {
            let mut sources = vec![Vec::new(); 6];
            let mut sequence = Vec::new();
            let mut key = 0;
            for (gap, source) in places {
                key += gap;
                sequence.push(key);
                sources[source].push(key);
            }
            prop_assert_eq!(merge(sources), Ok(sequence));
        }

        #[test]
        fn a_source_that_goes_backwards_or_repeats_is_found_out(
            ordered in prop::collection::btree_set(0u32..1000, 2..50),
            at in any::<prop::sample::Index>(),
            back in any::<prop::sample::Index>(),
        ) {
            let mut broken: Vec<u32> = ordered.iter().copied().collect();
            let at = at.index(broken.len());
            let earlier = broken[back.index(at + 1)];
            broken.insert(at + 1, earlier);
            prop_assert!(merge(vec![broken, vec![2000, 3000]]).is_err());
        }
    }

    #[test]
    fn the_same_key_in_two_sources_is_disorder() {
        assert_eq!(merge(vec![vec![1, 2], vec![2, 3]]), Err((2, 2)));
    }

    #[test]
    fn no_sources_are_an_empty_sequence() {
        assert_eq!(merge(Vec::new()), Ok(Vec::new()));
    }
}

//! Merges partitions, each of them ordered, into one order.

use std::{cmp::Reverse, collections::BinaryHeap};

/// A k-way merge that is driven by its caller, who fetches what it wants.
///
/// Invariant: a source is in exactly one of three places: it has its head in `heads`, it is in `wanting`, or it is finished. An
/// item is only given out while `wanting` is empty, so nothing smaller can still come from a source that keeps its order; a
/// source that does not is found out, because what is given out never falls.
pub struct Merge<K, T> {
    heads: BinaryHeap<Reverse<Head<K, T>>>,
    wanting: Vec<usize>,
    last: Option<K>,
}

struct Head<K, T> {
    key: K,
    source: usize,
    item: T,
}

impl<K: Ord, T> PartialEq for Head<K, T> {
    fn eq(&self, other: &Self) -> bool {
        self.cmp(other).is_eq()
    }
}

impl<K: Ord, T> Eq for Head<K, T> {}

impl<K: Ord, T> PartialOrd for Head<K, T> {
    fn partial_cmp(&self, other: &Self) -> Option<std::cmp::Ordering> {
        Some(self.cmp(other))
    }
}

impl<K: Ord, T> Ord for Head<K, T> {
    fn cmp(&self, other: &Self) -> std::cmp::Ordering {
        self.key.cmp(&other.key).then(self.source.cmp(&other.source))
    }
}

/// What the merge asks of its caller, or gives.
#[derive(Debug, PartialEq, Eq)]
pub enum Step<K, T> {
    /// Fetch the next item of this source, then [`Merge::offer`] it or [`Merge::finish`] the source.
    Want(usize),
    /// The next item in order.
    Item(T),
    /// This item is not after the one given out before it.
    Disorder {
        /// The key of the item that was given out before.
        previous: K,
        /// What came after it and should not have.
        item: T,
    },
    /// Every source is finished and empty.
    End,
}

impl<K: Ord + Copy, T> Merge<K, T> {
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
    pub fn step(&mut self) -> Step<K, T> {
        if let Some(&source) = self.wanting.last() {
            return Step::Want(source);
        }
        let Some(Reverse(head)) = self.heads.pop() else {
            return Step::End;
        };
        self.wanting.push(head.source);
        match self.last.replace(head.key) {
            Some(previous) if previous >= head.key => Step::Disorder {
                previous,
                item: head.item,
            },
            _ => Step::Item(head.item),
        }
    }

    /// Gives the next item of a wanted source.
    pub fn offer(&mut self, source: usize, key: K, item: T) {
        self.wanting.retain(|&wanting| wanting != source);
        self.heads.push(Reverse(Head { key, source, item }));
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
        loop {
            match merge.step() {
                Step::Want(source) => match sources[source].next() {
                    Some(item) => merge.offer(source, item, item),
                    None => merge.finish(source),
                },
                Step::Item(item) => merged.push(item),
                Step::Disorder { previous, item } => return Err((previous, item)),
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

//! The bucket table: which member takes which part of the flows. The same in all lanes.
//!
//! A change moves the fewest buckets possible: who joins takes an equal share from the others and nothing else
//! moves; who leaves has its own buckets dealt out to those with the fewest.

/// Buckets of the table. With 64 members each has 64 of them: no share is more than 1/64 off.
pub const BUCKETS: usize = 4096;

/// The entry of a bucket that nobody takes.
pub const NOBODY: u8 = u8::MAX;

/// Who takes which bucket.
#[derive(Clone, PartialEq, Eq)]
pub struct BucketTable {
    owners: [u8; BUCKETS],
}

impl BucketTable {
    /// A table in which nobody takes anything.
    pub fn empty() -> Self {
        BucketTable { owners: [NOBODY; BUCKETS] }
    }

    /// The member that takes packets of this flow hash, or [`NOBODY`].
    #[inline(always)]
    pub fn member(&self, hash: u32) -> u8 {
        const SHIFT: u32 = u32::BITS - BUCKETS.ilog2();
        self.owners[(hash >> SHIFT) as usize]
    }

    /// The table with exactly these members, as near to this one as possible.
    ///
    /// # Panics
    /// If a member is [`NOBODY`] or there are more members than buckets.
    #[must_use]
    pub fn with_members(&self, members: &[u8]) -> Self {
        assert!(!members.contains(&NOBODY) && members.len() <= BUCKETS, "{} members", members.len());
        let mut table = self.clone();
        if members.is_empty() {
            return BucketTable::empty();
        }
        // What each may keep: an equal share; the remainder goes to those that have most, so that they keep it.
        let mut by_load: Vec<(u8, usize)> =
            members.iter().map(|&member| (member, self.share(member))).collect();
        by_load.sort_by_key(|&(member, share)| (std::cmp::Reverse(share), member));
        let (each, remainder) = (BUCKETS / members.len(), BUCKETS % members.len());
        let mut wanted = [0usize; 256];
        for (place, &(member, _)) in by_load.iter().enumerate() {
            wanted[usize::from(member)] = each + usize::from(place < remainder);
        }
        // Keep what is within a member's share, free the rest …
        for owner in &mut table.owners {
            match &mut wanted[usize::from(*owner)] {
                0 => *owner = NOBODY,
                left => *left -= 1,
            }
        }
        // … and deal it out in turn.
        let mut takers = members.iter().copied().cycle();
        for owner in table.owners.iter_mut().filter(|owner| **owner == NOBODY) {
            let Some(taker) = takers.by_ref().find(|&member| wanted[usize::from(member)] > 0) else { break };
            wanted[usize::from(taker)] -= 1;
            *owner = taker;
        }
        table
    }

    /// Buckets that `member` takes.
    pub fn share(&self, member: u8) -> usize {
        self.owners.iter().filter(|owner| **owner == member).count()
    }
}

impl std::fmt::Debug for BucketTable {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        let shares = (0..NOBODY).map(|member| (member, self.share(member))).filter(|(_, share)| *share > 0);
        f.debug_map().entries(shares).finish()
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;

    fn moved(before: &BucketTable, after: &BucketTable) -> usize {
        before.owners.iter().zip(&after.owners).filter(|(a, b)| a != b).count()
    }

    fn assert_fair(table: &BucketTable, members: &[u8]) {
        let each = BUCKETS / members.len();
        for member in members {
            assert!((each..=each + 1).contains(&table.share(*member)), "{table:?}");
        }
        assert_eq!(table.share(NOBODY), 0);
    }

    #[test]
    fn joining_takes_a_share_and_moves_nothing_else() {
        let mut table = BucketTable::empty();
        for count in 1..=64u8 {
            let members: Vec<u8> = (0..count).collect();
            let next = table.with_members(&members);
            assert_fair(&next, &members);
            assert_eq!(moved(&table, &next), next.share(count - 1), "{count} members");
            table = next;
        }
    }

    #[test]
    fn leaving_moves_only_the_leavers_buckets() {
        let members: Vec<u8> = (0..7).collect();
        let before = BucketTable::empty().with_members(&members);
        let survivors = [0, 1, 2, 4, 5, 6];
        let after = before.with_members(&survivors);
        assert_fair(&after, &survivors);
        assert_eq!(moved(&before, &after), before.share(3));
    }

    #[test]
    fn nobody_takes_an_empty_groups_packets() {
        let table = BucketTable::empty().with_members(&[4]);
        assert_eq!((table.member(0), table.member(u32::MAX)), (4, 4));
        assert_eq!(table.with_members(&[]).member(77), NOBODY);
    }

    proptest! {
        #[test]
        fn every_change_is_fair_and_minimal(changes in prop::collection::vec(prop::collection::btree_set(0u8..64, 1..20), 1..8)) {
            let mut table = BucketTable::empty();
            for members in changes {
                let members: Vec<u8> = members.into_iter().collect();
                let next = table.with_members(&members);
                assert_fair(&next, &members);
                // The fewest possible: what newcomers and shrunken shares need, that is what each gained.
                let gained: usize = members.iter().map(|&m| next.share(m).saturating_sub(table.share(m))).sum();
                prop_assert_eq!(moved(&table, &next), gained);
                table = next;
            }
        }
    }
}

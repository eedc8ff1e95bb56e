//! The bucket table of a group: which member takes which part of the flows. The same in all lanes.
//!
//! A change moves the fewest buckets possible. A member that joins takes an equal share from the
//! others, and no other bucket moves. When a member leaves, its buckets go to the members with the
//! fewest. The buckets of a member whose packets are held do not move: the held packets would
//! arrive after newer ones of their flows.

use xfan_shm::ids::MemberId;

/// Buckets of the table. With 64 members each has 64 of them: no share is more than 1/64 off.
pub const BUCKETS: usize = 4096;

/// The entry of a bucket that nobody takes.
pub const NOBODY: MemberId = MemberId(u8::MAX);

/// Who takes which bucket.
#[derive(Clone, PartialEq, Eq)]
pub struct BucketTable {
    owners: [MemberId; BUCKETS],
}

impl BucketTable {
    /// A table in which nobody takes anything.
    pub fn empty() -> Self {
        BucketTable { owners: [NOBODY; BUCKETS] }
    }

    /// The member that takes packets of this flow hash, or [`NOBODY`].
    #[inline(always)]
    pub fn member(&self, hash: u32) -> MemberId {
        const SHIFT: u32 = u32::BITS - BUCKETS.ilog2();
        self.owners[(hash >> SHIFT) as usize]
    }

    /// The table with exactly these members, as near to this one as possible.
    ///
    /// # Panics
    /// If a member is [`NOBODY`] or there are more members than buckets.
    #[must_use]
    pub fn with_members(&self, members: &[MemberId]) -> Self {
        self.with_members_and_fixed(members, &[])
    }

    /// The table with exactly these members, as near to this one as possible. Members that are also
    /// in `fixed` keep their buckets, and get more only if there is no other member.
    ///
    /// # Panics
    /// If a member is [`NOBODY`] or there are more members than buckets.
    #[must_use]
    pub fn with_members_and_fixed(&self, members: &[MemberId], fixed: &[MemberId]) -> Self {
        assert!(!members.contains(&NOBODY) && members.len() <= BUCKETS, "{} members", members.len());
        let mut table = self.clone();
        if members.is_empty() {
            return BucketTable::empty();
        }
        let (fixed, others): (Vec<MemberId>, Vec<MemberId>) =
            members.iter().partition(|member| fixed.contains(member));
        let mut wanted = [0usize; 256];
        for member in &fixed {
            wanted[member.index()] = self.share(*member);
        }
        let buckets = BUCKETS - wanted.iter().sum::<usize>();
        let takers = if others.is_empty() { &fixed } else { &others };
        // What each of the others may keep: an equal share; the remainder goes to those that have
        // most, so that they keep it.
        let mut by_load: Vec<(MemberId, usize)> =
            takers.iter().map(|&member| (member, self.share(member))).collect();
        by_load.sort_by_key(|&(member, share)| (std::cmp::Reverse(share), member));
        let (each, remainder) = (buckets / takers.len(), buckets % takers.len());
        for (place, &(member, _)) in by_load.iter().enumerate() {
            wanted[member.index()] += each + usize::from(place < remainder);
        }
        // Keep what is within a member's share, free the rest …
        for owner in &mut table.owners {
            match &mut wanted[owner.index()] {
                0 => *owner = NOBODY,
                left => *left -= 1,
            }
        }
        // … and deal it out in turn.
        let mut takers = members.iter().copied().cycle();
        for owner in table.owners.iter_mut().filter(|owner| **owner == NOBODY) {
            let Some(taker) = takers.by_ref().find(|&member| wanted[member.index()] > 0) else { break };
            wanted[taker.index()] -= 1;
            *owner = taker;
        }
        table
    }

    /// Buckets that `member` takes.
    pub fn share(&self, member: MemberId) -> usize {
        self.owners.iter().filter(|owner| **owner == member).count()
    }
}

impl std::fmt::Debug for BucketTable {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        let members = (0..NOBODY.0).map(MemberId);
        let shares = members.map(|member| (member, self.share(member))).filter(|(_, share)| *share > 0);
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

    fn assert_fair(table: &BucketTable, members: &[MemberId]) {
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
            let members: Vec<MemberId> = (0..count).map(MemberId).collect();
            let next = table.with_members(&members);
            assert_fair(&next, &members);
            assert_eq!(moved(&table, &next), next.share(MemberId(count - 1)), "{count} members");
            table = next;
        }
    }

    #[test]
    fn leaving_moves_only_the_leavers_buckets() {
        let members: Vec<MemberId> = (0..7).map(MemberId).collect();
        let before = BucketTable::empty().with_members(&members);
        let survivors = [0, 1, 2, 4, 5, 6].map(MemberId);
        let after = before.with_members(&survivors);
        assert_fair(&after, &survivors);
        assert_eq!(moved(&before, &after), before.share(MemberId(3)));
    }

    #[test]
    fn what_is_fixed_stays_and_the_others_share_the_rest() {
        let [a, b, c, d] = [0, 1, 2, 3].map(MemberId);
        let before = BucketTable::empty().with_members(&[a, b, c]);
        let joined = before.with_members_and_fixed(&[a, b, c, d], &[b]);
        let (fixed, rest) = (before.share(b), BUCKETS - before.share(b));
        assert_eq!(joined.share(b), fixed);
        assert!((0..BUCKETS).all(|at| (before.owners[at] == b) == (joined.owners[at] == b)));
        for member in [a, c, d] {
            assert!((rest / 3..=rest / 3 + 1).contains(&joined.share(member)), "{joined:?}");
        }
        assert_eq!(moved(&before, &joined), joined.share(d));
        // A member that leaves gives to those that are not fixed; if all are, to those that are
        // left.
        let left = joined.with_members_and_fixed(&[b, c], &[b]);
        assert_eq!((left.share(b), left.share(c)), (fixed, rest));
        assert_fair(&left.with_members_and_fixed(&[b], &[b]), &[b]);
        let both = joined.with_members_and_fixed(&[b, c], &[b, c]);
        assert!(
            (0..BUCKETS)
                .all(|at| ![b, c].contains(&joined.owners[at]) || both.owners[at] == joined.owners[at])
        );
        assert_eq!(both.share(NOBODY), 0);
        // When it is no longer fixed, it gives its part.
        assert_fair(&joined.with_members(&[a, b, c, d]), &[a, b, c, d]);
    }

    #[test]
    fn nobody_takes_an_empty_groups_packets() {
        let table = BucketTable::empty().with_members(&[MemberId(4)]);
        assert_eq!((table.member(0), table.member(u32::MAX)), (MemberId(4), MemberId(4)));
        assert_eq!(table.with_members(&[]).member(77), NOBODY);
    }

    proptest! {
        #[test]
        fn every_change_is_fair_and_minimal(changes in prop::collection::vec(prop::collection::btree_set(0u8..64, 1..20), 1..8)) {
            let mut table = BucketTable::empty();
            for members in changes {
                let members: Vec<MemberId> = members.into_iter().map(MemberId).collect();
                let next = table.with_members(&members);
                assert_fair(&next, &members);
                // The fewest possible: what newcomers and shrunken shares need, that is what each
                // gained.
                let gained: usize = members.iter().map(|&m| next.share(m).saturating_sub(table.share(m))).sum();
                prop_assert_eq!(moved(&table, &next), gained);
                table = next;
            }
        }
    }
}

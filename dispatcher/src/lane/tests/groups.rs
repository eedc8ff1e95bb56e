//! Several groups, each of which gets every packet.

use std::collections::BTreeSet;

use proptest::prelude::*;

use super::*;

const A: GroupId = GroupId(0);
const B: GroupId = GroupId(1);

/// The numbers at the end of packets.
fn numbers(bench: &Bench, taken: &[Descriptor]) -> Vec<u8> {
    taken.iter().map(|descriptor| bench.last_byte(*descriptor)).collect()
}

/// Delivered, dropped since a ring was full, dropped since there was no worker.
fn counted(bench: &Bench, group: GroupId) -> [u64; 3] {
    let counters = &bench.shared.groups[group.index()];
    [counters.delivered.get(), counters.ring_full.get(), counters.no_worker.get()]
}

fn lent(bench: &Bench) -> u32 {
    bench.lane.frames.tally().lent
}

#[test]
fn each_group_gets_each_packet_in_order() {
    let mut bench = bench_of(2, frames_for(3));
    let mut all = bench.join_in(A, 0, Arc::default());
    let mut parts = [bench.join_in(B, 0, Arc::default()), bench.join_in(B, 1, Arc::default())];
    bench.steer_in(A, &[0]);
    bench.steer_in(B, &[0, 1]);
    bench.feed((0..12).map(numbered));
    assert_eq!(lent(&bench), 12, "a frame counts once, however many groups have it");
    let of_all = all.take();
    assert_eq!(numbers(&bench, &of_all), (0..12).collect::<Vec<_>>());
    bench.lane.settle();
    bench.balanced();
    assert_eq!(lent(&bench), 12, "the other group still reads them");
    let mut of_parts = Vec::new();
    for (member, peer) in (0..).zip(&mut parts) {
        let taken = numbers(&bench, &peer.take());
        let expected: Vec<u8> =
            (0..12).filter(|n| member_of(&flow(u16::from(n % 4)), &[0, 1]) == member).collect();
        assert_eq!(taken, expected);
        of_parts.extend(taken);
    }
    assert_eq!(of_parts.len(), 12);
    bench.lane.settle();
    bench.balanced();
    assert_eq!(lent(&bench), 0);
    assert_eq!((counted(&bench, A), counted(&bench, B)), ([12, 0, 0], [12, 0, 0]));
}

#[test]
fn a_full_ring_or_no_worker_costs_its_group_only() {
    let mut bench = bench_of(3, frames_for(2));
    let slow = bench.join_in(A, 0, Arc::default());
    let mut quick = bench.join_in(B, 5, Arc::default());
    bench.steer_in(A, &[0]);
    bench.steer_in(B, &[5]);
    for n in 0..40 {
        bench.feed([numbered(n)]);
        assert_eq!(quick.take().len(), 1);
        assert_eq!(bench.lane.frames.tally().kernel, POSTED);
    }
    let slots = u64::from(SLOTS);
    assert_eq!(counted(&bench, A), [slots, 40 - slots, 0]);
    assert_eq!(counted(&bench, B), [40, 0, 0]);
    assert_eq!(counted(&bench, GroupId(2)), [0, 0, 40]);
    assert_eq!(slow.counters.dropped.get(), 40 - slots);
    bench.lane.settle();
    assert_eq!(lent(&bench), SLOTS);
}

#[test]
fn a_frame_that_was_not_posted_reaches_no_group() {
    let mut bench = bench_of(2, frames_for(2));
    let mut peers = [bench.join_in(A, 0, Arc::default()), bench.join_in(B, 0, Arc::default())];
    bench.steer_in(A, &[0]);
    bench.steer_in(B, &[0]);
    bench.feed([packet(flow(1))]);
    bench.lane.source.again = Some(UmemOffset(peers[0].ring.peek(0).unwrap().offset.0 - 256));
    bench.feed([packet(flow(2)), packet(flow(3))]);
    assert_eq!(bench.shared.counters.frame_owner.get(), 1);
    assert_eq!((counted(&bench, A), counted(&bench, B)), ([2, 0, 0], [2, 0, 0]));
    assert!(peers.iter_mut().all(|peer| peer.take().len() == 2));
    bench.lane.settle();
    assert_eq!(lent(&bench), 0);
}

#[test]
fn packets_are_requeued_within_their_group() {
    let mut bench = bench_of(2, frames_for(3));
    let (gone, mut heir) = (bench.join_in(A, 0, Arc::default()), bench.join_in(A, 1, Arc::default()));
    let mut other = bench.join_in(B, 0, Arc::default());
    bench.steer_in(A, &[0, 1]);
    bench.steer_in(B, &[0]);
    bench.feed((0..8).map(numbered));
    heir.take();
    let had = gone.counters.delivered.get();
    assert!(had > 0);
    bench.retire_in(A, 0, &[1]);
    bench.balanced();
    let taken = heir.take();
    assert_eq!((taken.len() as u64, gone.counters.requeued.get()), (had, had));
    assert!(taken.iter().all(|descriptor| descriptor.flags == Descriptor::REDELIVERED));
    let taken = other.take();
    assert_eq!(numbers(&bench, &taken), (0..8).collect::<Vec<_>>());
    assert!(taken.iter().all(|descriptor| descriptor.flags == 0), "nothing happened in this group");
    bench.lane.settle();
    bench.balanced();
    assert_eq!(lent(&bench), 0);
}

#[test]
fn one_group_holds_or_loses_what_another_has_read() {
    let mut bench = bench_of(2, frames_for(2));
    let gone = bench.join_in(A, 0, Arc::default());
    let mut other = bench.join_in(B, 0, Arc::default());
    bench.steer_in(A, &[0]);
    bench.steer_in(B, &[0]);
    bench.feed((0..4).map(numbered));
    bench.hold_in(A, 0);
    bench.feed((4..6).map(numbered));
    assert_eq!(other.take().len(), 6);
    bench.lane.settle();
    bench.balanced();
    assert_eq!(lent(&bench), 6, "held for the next worker");
    let mut next = bench.join_in(A, 0, gone.counters.clone());
    assert_eq!(numbers(&bench, &next.take()), (0..6).collect::<Vec<_>>());
    bench.lane.settle();
    assert_eq!(lent(&bench), 0);
    bench.feed((6..9).map(numbered));
    bench.retire_in(A, 0, &[]);
    assert_eq!((gone.counters.lost.get(), lent(&bench)), (3, 3));
    bench.retire_in(B, 0, &[]);
    assert_eq!((other.counters.lost.get(), lent(&bench)), (3, 0));
    bench.balanced();
}

#[test]
fn stop_retires_the_members_of_all_groups() {
    let mut bench = bench_of(3, frames_for(3));
    let peers: Vec<Peer> = (0..3)
        .map(|group| {
            let peer = bench.join_in(GroupId(group), group, Arc::default());
            bench.steer_in(GroupId(group), &[group]);
            peer
        })
        .collect();
    bench.feed((0..5).map(numbered));
    bench.shared.commands.push(Command::Stop).unwrap();
    let frames = bench.lane.run();
    assert!(peers.iter().all(|peer| peer.counters.lost.get() == 5));
    assert_eq!((frames.audit().lent, frames.audit()), (0, frames.tally()));
}

/// What may happen to a lane with several groups of two members.
#[derive(Clone, Copy, Debug)]
enum Step {
    Feed(u8),
    /// A worker reads all that it has, and commits this many of it.
    Commit(usize, u32),
    Join(usize),
    Hold(usize),
    Retire(usize),
    Settle,
}

/// Members are numbered over all groups, two in each.
fn step(groups: usize) -> impl Strategy<Value = Step> {
    let member = 0..2 * groups;
    prop_oneof![
        4 => (1u8..40).prop_map(Step::Feed),
        4 => (member.clone(), 0u32..20).prop_map(|(member, count)| Step::Commit(member, count)),
        2 => member.clone().prop_map(Step::Join),
        1 => member.clone().prop_map(Step::Hold),
        1 => member.prop_map(Step::Retire),
        1 => Just(Step::Settle),
    ]
}

/// A member: its worker, if it has one, and what all lanes' counters say of it.
#[derive(Default)]
struct Slot {
    peer: Option<Peer>,
    counters: Arc<MemberCounters>,
    held: bool,
}

/// The members of `group` that the table has: those with a worker, and those whose packets are
/// held.
fn in_table(slots: &[Slot], group: usize) -> Vec<u8> {
    (0u8..2).filter(|member| takes(&slots[group * 2 + usize::from(*member)])).collect()
}

fn takes(slot: &Slot) -> bool {
    slot.peer.is_some() || slot.held
}

proptest! {
    #![proptest_config(ProptestConfig::with_cases(64))]

    /// Whatever workers do in whichever group, every frame has one owner, no lent frame is posted,
    /// and both equations hold.
    #[test]
    fn frames_are_freed_once_whatever_happens(
        (groups, steps) in (1usize..4)
            .prop_flat_map(|groups| (Just(groups), prop::collection::vec(step(groups), 0..60))),
    ) {
        let mut bench = bench_of(groups, frames_for(2 * u32::try_from(groups).unwrap()));
        let mut slots: Vec<Slot> = (0..2 * groups).map(|_| Slot::default()).collect();
        for step in steps {
            match step {
                Step::Feed(count) => bench.feed((0..count).map(numbered)),
                Step::Commit(slot, most) => if let Some(peer) = &mut slots[slot].peer {
                    let there = (0..).map_while(|ahead| peer.ring.peek(ahead)).count();
                    peer.ring.commit(most.min(u32::try_from(there).unwrap()));
                },
                Step::Join(slot) if slots[slot].peer.is_none() => {
                    let (group, member) = (slot / 2, u8::try_from(slot % 2).unwrap());
                    let id = GroupId(u8::try_from(group).unwrap());
                    let counters = slots[slot].counters.clone();
                    slots[slot].peer = Some(bench.join_in(id, member, counters));
                    slots[slot].held = false;
                    bench.steer_in(id, &in_table(&slots, group));
                }
                Step::Hold(slot) if slots[slot].peer.is_some() => {
                    let id = GroupId(u8::try_from(slot / 2).unwrap());
                    bench.hold_in(id, u8::try_from(slot % 2).unwrap());
                    slots[slot].peer = None;
                    slots[slot].held = true;
                }
                Step::Retire(slot) if takes(&slots[slot]) => {
                    (slots[slot].peer, slots[slot].held) = (None, false);
                    let id = GroupId(u8::try_from(slot / 2).unwrap());
                    let left = in_table(&slots, slot / 2);
                    bench.retire_in(id, u8::try_from(slot % 2).unwrap(), &left);
                }
                Step::Settle => bench.lane.settle(),
                Step::Join(_) | Step::Hold(_) | Step::Retire(_) => {}
            }
            bench.balanced();
            prop_assert_eq!(bench.lane.frames.tally().kernel, POSTED, "no worker starves the kernel");
            let posted: BTreeSet<u32> = bench.lane.source.posted.iter().map(|frame| frame.0).collect();
            prop_assert_eq!(posted.len(), POSTED as usize, "no frame is posted twice");
            for peer in slots.iter().filter_map(|slot| slot.peer.as_ref()) {
                let lent = (0..).map_while(|ahead| peer.ring.peek(ahead));
                for descriptor in lent {
                    prop_assert!(!posted.contains(&(descriptor.offset.0 / FRAME * FRAME)));
                }
            }
        }
        bench.shared.commands.push(Command::Stop).unwrap();
        let counters = bench.shared.clone();
        let frames = bench.lane.run();
        prop_assert_eq!(frames.audit(), frames.tally());
        prop_assert_eq!(frames.audit().lent, 0);
        for (group, slots) in counters.groups.iter().zip(slots.chunks(2)) {
            let sum = |field: fn(&MemberCounters) -> &counters::Counter| {
                slots.iter().map(|slot| field(&slot.counters).get()).sum::<u64>()
            };
            prop_assert_eq!(sum(|m| &m.delivered), group.delivered.get() + sum(|m| &m.requeued));
            let gone = sum(|m| &m.committed) + sum(|m| &m.requeued) + sum(|m| &m.lost);
            prop_assert_eq!(sum(|m| &m.delivered), gone);
            prop_assert_eq!(sum(|m| &m.dropped), group.ring_full.get());
        }
    }
}

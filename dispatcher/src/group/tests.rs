//! Drives a group with random events. A model of the executor checks each action.

use std::collections::{BTreeMap, BTreeSet};
use std::time::{Duration, Instant};

use proptest::prelude::*;
use xfan_shm::ids::MemberId;

use super::*;
use crate::config::{OnEmpty, Policy as RestartPolicy, Restart};
use crate::group::policy::Policy;
use crate::lane::{BucketTable, NOBODY};

const MEMBERS: u8 = 4;
const SECOND: Duration = Duration::from_secs(1);

fn policy(hold: bool, always: bool) -> Policy {
    Policy {
        restart: Restart {
            policy: if always { RestartPolicy::Always } else { RestartPolicy::OnFailure },
            delay: SECOND / 10,
            limit_burst: 3,
            limit_interval: 10 * SECOND,
        },
        hang_timeout: 2 * SECOND,
        hold: hold.then_some(3 * SECOND),
        on_empty: OnEmpty::Drop,
        start_timeout: 4 * SECOND,
        stop_timeout: SECOND,
    }
}

/// A lane's state of a member.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Link {
    None,
    Live,
    Held,
}

/// A model of the executor, the lanes and the processes.
struct World {
    group: Group,
    now: Instant,
    alive: BTreeSet<ProcessId>,
    killed: BTreeSet<ProcessId>,
    processes: u32,
    connections: ConnectionId,
    /// The open connections, their members, and whether their workers have joined.
    open: BTreeMap<ConnectionId, (MemberId, bool)>,
    links: [Link; MEMBERS as usize],
    spawning: Vec<MemberId>,
    /// The change since which a member has had no flows.
    drained: [Option<Ticket>; MEMBERS as usize],
    last: Ticket,
    acknowledged: Ticket,
    failed: bool,
}

impl World {
    fn new(policy: Policy) -> Self {
        let now = Instant::now();
        World {
            group: Group::new(policy, usize::from(MEMBERS), now),
            now,
            alive: BTreeSet::new(),
            killed: BTreeSet::new(),
            processes: 0,
            connections: 0,
            open: BTreeMap::new(),
            links: [Link::None; MEMBERS as usize],
            spawning: Vec::new(),
            drained: [None; MEMBERS as usize],
            last: Ticket(0),
            acknowledged: Ticket(0),
            failed: false,
        }
    }

    fn process(&mut self) -> ProcessId {
        self.processes += 1;
        self.alive.insert(ProcessId(self.processes));
        ProcessId(self.processes)
    }

    /// Passes an event to the group, and carries out its actions.
    fn step(&mut self, event: Event) -> Result<(), Refused> {
        let state = |group: &Group| (format!("{:?}", group.members()), group.table().clone());
        let before = state(&self.group);
        let actions = match self.group.step(event, self.now) {
            Ok(actions) => actions,
            Err(refused) => {
                assert!(state(&self.group) == before, "{event:?} was refused, but: {refused}");
                return Err(refused);
            }
        };
        for action in actions {
            self.execute(action, event);
        }
        self.check(event);
        Ok(())
    }

    fn execute(&mut self, action: Action, event: Event) {
        let worker = |open: &BTreeMap<ConnectionId, (MemberId, bool)>, member| {
            let mut its = open.iter().filter(|(_, found)| **found == (member, true));
            let found = its.next().map(|(connection, _)| *connection);
            assert!(its.next().is_none(), "member {member} has two workers");
            found
        };
        let context = format!("{action:?} after {event:?}");
        match action {
            Action::Spawn(member) => self.spawning.push(member),
            Action::Terminate(process) => assert!(self.alive.contains(&process), "{context}"),
            Action::Kill(process) => {
                assert!(self.alive.contains(&process), "{context}");
                self.killed.insert(process);
            }
            Action::Forget(process) => assert!(!self.alive.contains(&process), "{context}"),
            Action::Disconnect(member, connection) => {
                assert_eq!(self.open.remove(&connection), Some((member, false)), "{context}");
            }
            Action::Join(member) => {
                assert!(worker(&self.open, member).is_some(), "{context}");
                assert_ne!(self.links[member.index()], Link::Live, "{context}");
                self.links[member.index()] = Link::Live;
                self.drained[member.index()] = None;
            }
            Action::EndSession { member, .. } => {
                if let Some(connection) = worker(&self.open, member) {
                    self.open.remove(&connection);
                }
                assert_eq!(self.links[member.index()], Link::Live, "{context}");
            }
            Action::Close(member) => {
                assert!(worker(&self.open, member).is_some(), "{context}");
                assert!(
                    self.drained[member.index()].is_some_and(|ticket| ticket <= self.acknowledged),
                    "{context}"
                );
            }
            Action::Steer(ticket, table) => self.use_table(ticket, &table),
            Action::Hold(ticket, member) => {
                self.last = ticket;
                assert!(worker(&self.open, member).is_none(), "{context}");
                assert_eq!(self.links[member.index()], Link::Live, "{context}");
                self.links[member.index()] = Link::Held;
            }
            Action::Retire(ticket, member, table) => {
                self.use_table(ticket, &table);
                assert!(worker(&self.open, member).is_none(), "{context}");
                assert_ne!(self.links[member.index()], Link::None, "{context}");
                self.links[member.index()] = Link::None;
            }
            Action::Record(..) => {}
            Action::Fail(_) => self.failed = true,
        }
    }

    fn use_table(&mut self, ticket: Ticket, table: &BucketTable) {
        assert!(ticket > self.last);
        self.last = ticket;
        for member in (0..MEMBERS).map(MemberId) {
            match table.share(member) {
                0 => self.drained[member.index()] = self.drained[member.index()].or(Some(ticket)),
                _ => self.drained[member.index()] = None,
            }
        }
    }

    /// The invariants.
    fn check(&self, event: Event) {
        let table = self.group.table();
        let context = || format!("after {event:?}: {:#?}", self.group.members());
        // Held flows do not move. While all flows are held, a running member gets none, and none
        // are held for it if it is lost.
        let held = self.group.numbered().filter(|(_, member)| member.is_held());
        let all_held = held.map(|(number, _)| table.share(number)).sum::<usize>() == crate::lane::BUCKETS;
        for (number, member) in self.group.numbered() {
            let share = table.share(number);
            assert!(share == 0 || member.has_flows(), "flows of {number} {}", context());
            assert!(
                share > 0 || !member.has_flows() || all_held || member.is_held(),
                "flows of {number} {}",
                context()
            );
            let link = match (member.has_session(), member.is_held()) {
                (true, false) => Link::Live,
                (false, true) => Link::Held,
                (false, false) => Link::None,
                (true, true) => panic!("held and served {}", context()),
            };
            assert_eq!(self.links[number.index()], link, "link of {number} {}", context());
            if let Some(process) = member.process() {
                assert!(self.alive.contains(&process), "process of {number} {}", context());
            }
            if let Some(connection) = member.connection() {
                let joined = member.has_session();
                assert_eq!(self.open.get(&connection), Some(&(number, joined)), "{}", context());
            }
        }
        let unassigned = if self.group.has_flows() { 0 } else { crate::lane::BUCKETS };
        assert_eq!(table.share(NOBODY), unassigned);
        let processes: Vec<_> = self.group.members().iter().filter_map(Member::process).collect();
        let distinct: BTreeSet<_> = processes.iter().collect();
        assert_eq!(processes.len(), distinct.len(), "two members have the same process");
    }

    fn spawned(&mut self, success: bool) {
        if let Some(member) = self.spawning.pop() {
            let event =
                if success { Event::Spawned(member, self.process()) } else { Event::SpawnFailed(member) };
            self.step(event).unwrap();
        }
    }

    fn attach(&mut self, member: MemberId) {
        self.connections += 1;
        let connection = self.connections;
        self.open.insert(connection, (member, false));
        if self.step(Event::Attaching(member, connection)).is_err() {
            self.open.remove(&connection);
        }
    }

    fn joined(&mut self, connection: ConnectionId) {
        let Some((_, joined)) = self.open.get_mut(&connection) else {
            assert!(self.step(Event::Joined(connection)).is_err());
            return;
        };
        if *joined {
            assert!(self.step(Event::Joined(connection)).is_err());
        } else {
            *joined = true;
            self.step(Event::Joined(connection)).unwrap();
        }
    }

    fn disconnect(&mut self, connection: ConnectionId) {
        self.open.remove(&connection);
        self.step(Event::Disconnected(connection)).unwrap();
    }

    fn exit(&mut self, process: ProcessId, success: Option<bool>) {
        self.alive.remove(&process);
        self.step(Event::Exited(process, success)).unwrap();
    }

    fn pass(&mut self, time: Duration) {
        self.now += time;
        self.step(Event::Tick).unwrap();
        if let Some(at) = self.group.next_deadline().filter(|at| *at <= self.now) {
            panic!("the deadline {:?} ago was not handled", self.now - at);
        }
    }

    /// Stops the primary. Processes exit only if they are killed and `die_when_killed` is true.
    fn stop(&mut self, acknowledge: bool, die_when_killed: bool) {
        self.step(Event::Stop).unwrap();
        self.step(Event::Finish).unwrap();
        while !self.spawning.is_empty() {
            self.spawned(true);
        }
        for _ in 0..100 {
            if acknowledge {
                self.acknowledged = self.last;
                self.step(Event::Acknowledged(self.last)).unwrap();
            }
            if die_when_killed {
                for process in self.killed.intersection(&self.alive).copied().collect::<Vec<_>>() {
                    self.exit(process, Some(false));
                }
            }
            if self.group.is_over() {
                break;
            }
            let now = self.now;
            let deadline = self.group.next_deadline().expect("a stop that is not over has a deadline");
            self.pass(deadline - now);
        }
        assert!(self.group.is_over(), "{:#?}", self.group);
        let spared: Vec<_> = self.alive.difference(&self.killed).collect();
        assert!(spared.is_empty(), "{spared:?} were not killed");
        assert!(self.links.iter().all(|link| *link == Link::None));
        assert!(!die_when_killed || self.alive.is_empty());
    }
}

use super::member::Member;

/// A step of the test.
#[derive(Clone, Copy, Debug)]
enum Op {
    Start(MemberId),
    Adopt(MemberId),
    Unwanted,
    Spawned(bool),
    Attach(MemberId),
    Join(u64),
    Detach(u64),
    Disconnect(u64),
    Exit(u32, Option<bool>),
    ImpossibleIndex(MemberId),
    Observe(MemberId, u64, u64),
    Acknowledge(u64),
    Open,
    Order(MemberId, Order),
    Add(MemberId),
    Pass(u64),
    /// Events that the executor cannot send in this state.
    Stray(MemberId),
}

fn op() -> impl Strategy<Value = Op> {
    let member = || (0..MEMBERS).prop_map(MemberId);
    let order = prop_oneof![Just(Order::Drain), Just(Order::Restart), Just(Order::Remove)];
    let success = prop_oneof![Just(None), Just(Some(true)), Just(Some(false))];
    prop_oneof![
        2 => member().prop_map(Op::Start),
        1 => member().prop_map(Op::Adopt),
        1 => Just(Op::Unwanted),
        6 => prop::bool::weighted(0.9).prop_map(Op::Spawned),
        6 => member().prop_map(Op::Attach),
        8 => (0..8u64).prop_map(Op::Join),
        2 => (0..8u64).prop_map(Op::Detach),
        4 => (0..8u64).prop_map(Op::Disconnect),
        4 => (0..8u32, success).prop_map(|(process, success)| Op::Exit(process, success)),
        1 => member().prop_map(Op::ImpossibleIndex),
        6 => (member(), 0..2u64, 0..2u64)
            .prop_map(|(member, sum, backlog)| Op::Observe(member, sum, backlog)),
        4 => (0..4u64).prop_map(Op::Acknowledge),
        3 => Just(Op::Open),
        3 => (member(), order).prop_map(|(member, order)| Op::Order(member, order)),
        2 => member().prop_map(Op::Add),
        6 => (0..3000u64).prop_map(Op::Pass),
        1 => member().prop_map(Op::Stray),
    ]
}

impl World {
    fn run(&mut self, op: Op) {
        // Numbers count back from the newest: most refer to something that exists, some to
        // something that no longer does.
        let connection = |back: u64| (self.connections + 1).saturating_sub(back);
        match op {
            Op::Start(member) => {
                let _ = self.step(Event::Start(member));
            }
            Op::Adopt(member) => {
                let process = self.process();
                if self.step(Event::Adopted(member, process)).is_err() {
                    self.alive.remove(&process);
                }
            }
            Op::Unwanted => {
                let process = self.process();
                self.step(Event::Unwanted(process)).unwrap();
            }
            Op::Spawned(success) => self.spawned(success),
            Op::Attach(member) => self.attach(member),
            Op::Join(back) => self.joined(connection(back)),
            Op::Detach(back) => self.step(Event::Detach(connection(back))).unwrap(),
            Op::Disconnect(back) => self.disconnect(connection(back)),
            Op::Exit(back, success) => {
                self.exit(ProcessId((self.processes + 1).saturating_sub(back)), success);
            }
            Op::ImpossibleIndex(member) => self.step(Event::ImpossibleIndex(member)).unwrap(),
            Op::Observe(member, sum, backlog) => {
                let progress = Progress { committed: sum, heartbeat: 0, backlog };
                self.step(Event::Observed(member, progress)).unwrap();
            }
            Op::Acknowledge(back) => {
                let ticket = Ticket(self.last.0.saturating_sub(back));
                self.acknowledged = self.acknowledged.max(ticket);
                self.step(Event::Acknowledged(ticket)).unwrap();
            }
            Op::Open => {
                let _ = self.step(Event::Opened);
            }
            Op::Order(member, order) => {
                let _ = self.step(Event::Order(member, order));
            }
            Op::Add(member) => {
                let _ = self.step(Event::Add(member));
            }
            Op::Pass(milliseconds) => self.pass(Duration::from_millis(milliseconds)),
            Op::Stray(member) => {
                let pending = self.spawning.contains(&member);
                if !pending {
                    assert!(self.step(Event::Spawned(member, ProcessId(u32::MAX))).is_err());
                    assert!(self.step(Event::SpawnFailed(member)).is_err());
                }
                assert_eq!(self.step(Event::ImpossibleIndex(MemberId(MEMBERS))), Err(Refused::Unknown));
                self.step(Event::Exited(ProcessId(u32::MAX), None)).unwrap();
                self.step(Event::Disconnected(u64::MAX)).unwrap();
                assert_eq!(self.step(Event::Joined(u64::MAX)), Err(Refused::NoWorker));
            }
        }
    }
}

proptest! {
    #![proptest_config(ProptestConfig::with_cases(512))]

    #[test]
    fn any_events_keep_the_invariants_and_every_stop_completes(
        (hold, always) in any::<(bool, bool)>(),
        starts in prop::collection::vec(op(), 0..20),
        later in prop::collection::vec(op(), 0..100),
        (acknowledge, die_when_killed) in any::<(bool, bool)>(),
    ) {
        let mut world = World::new(policy(hold, always));
        for op in starts {
            world.run(op);
        }
        // Complete the start, so that most runs go beyond it.
        while !world.spawning.is_empty() {
            world.spawned(true);
        }
        for member in (0..MEMBERS).map(MemberId) {
            world.attach(member);
            world.joined(world.connections);
        }
        world.run(Op::Open);
        world.run(Op::Acknowledge(0));
        for op in later {
            world.run(op);
        }
        world.stop(acknowledge, die_when_killed);
    }

    #[test]
    fn events_during_a_stop_do_not_prevent_its_completion(
        hold in any::<bool>(),
        before in prop::collection::vec(op(), 0..40),
        during in prop::collection::vec(op(), 0..40),
    ) {
        let mut world = World::new(policy(hold, true));
        for op in before {
            world.run(op);
        }
        world.step(Event::Stop).unwrap();
        for (number, op) in during.into_iter().enumerate() {
            match number {
                10 => world.step(Event::Finish).unwrap(),
                30 => world.step(Event::ForceStop).unwrap(),
                _ => {}
            }
            world.run(op);
        }
        world.stop(true, true);
    }
}

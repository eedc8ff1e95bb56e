//! Operators' orders: to add, drain, restart and remove workers.

use std::time::Instant;

use nix::sys::socket::UnixCredentials;
use xfan_shm::ids::MemberId;
use xfan_shm::protocol::{Refusal, RefusalCode, Reply, WorkersOrder};

use crate::control::groups::MemberKey;
use crate::control::primary::Primary;
use crate::group::{Event, Order, Refused};

fn impossible(message: impl Into<String>) -> Refusal {
    Refusal { code: RefusalCode::Impossible, message: message.into() }
}

fn still_starting() -> Refusal {
    impossible("this primary is still starting its workers: try again")
}

impl Primary {
    /// Handles an order. It returns while members are still starting or draining.
    pub(super) fn order(&mut self, peer: &UnixCredentials, order: &WorkersOrder) -> Reply {
        if peer.uid() != 0 {
            let message = "only root may add, drain, restart or remove workers: use sudo".to_owned();
            let refusal = Refusal { code: RefusalCode::Forbidden, message };
            self.report_refusal(peer, None, None, &refusal.message);
            return Reply::Refused(refusal);
        }
        // Every order that has an effect is reported. Others are reported unless there are too
        // many.
        let reported = self.limit.admit(peer.uid(), Instant::now()).is_some();
        if reported {
            self.report_order(peer, order);
        }
        match self.carry_out(order) {
            Ok(members) => {
                if !reported {
                    self.report_order(peer, order);
                }
                Reply::Ordered(members)
            }
            Err(refusal) => {
                if reported {
                    tracing::warn!(pid = peer.pid(), uid = peer.uid(), "refused: {}", refusal.message);
                }
                Reply::Refused(refusal)
            }
        }
    }

    fn report_order(&mut self, peer: &UnixCredentials, order: &WorkersOrder) {
        tracing::info!(pid = peer.pid(), %order, "operator's order");
        let pid = u32::try_from(peer.pid()).unwrap_or(0);
        self.history.write(None, pid, "ordered", order.to_string());
    }

    fn carry_out(&mut self, order: &WorkersOrder) -> Result<Vec<String>, Refusal> {
        let (id, order) = match order {
            WorkersOrder::Add(count) => return self.add(*count),
            WorkersOrder::Drain(id) => (id, Order::Drain),
            WorkersOrder::Restart(id) => (id, Order::Restart),
            WorkersOrder::Remove(id) => (id, Order::Remove),
        };
        let key = self.find(id)?;
        if !self.group(key.group).machine.is_open() {
            return Err(still_starting());
        }
        let id = self.resources(key).id.clone();
        self.spawn_error = None;
        self.try_apply(key.group, Event::Order(key.member, order)).map_err(|refused| match refused {
            Refused::Starting => still_starting(),
            Refused::Stopping => Refusal { code: RefusalCode::Closing, message: refused.to_string() },
            Refused::Unsupervised => impossible(format!(
                "member {id} was not started by xfan: restart it where it was started; `xfan workers drain` makes it leave"
            )),
            Refused::NoWorker => impossible(format!("member {id} has no worker")),
            Refused::Leaving => impossible(format!("member {id} is leaving already")),
            other => impossible(format!("member {id}: {other}")),
        })?;
        // A restart of a worker that was down starts its process at once. That may have failed.
        match self.spawn_error.take() {
            Some(error) => Err(impossible(error.to_string())),
            None => Ok(vec![id]),
        }
    }

    fn add(&mut self, count: usize) -> Result<Vec<String>, Refusal> {
        let group = self.group_named(None)?;
        let state = self.group(group);
        if !state.machine.is_open() {
            return Err(still_starting());
        }
        if state.workers.is_none() {
            return Err(impossible(
                "this primary has no command to start workers with: give `xfan run` one, or start workers that attach by \
                 themselves, as `xfan-count --attach SOCKET` does",
            ));
        }
        let vacant: Vec<MemberId> = state.machine.vacancies().take(count).collect();
        if vacant.len() < count {
            let message = format!(
                "{} of {} members are vacant, which is too few for {count} more workers: remove some, or start the \
                 primary with a higher max_workers",
                vacant.len(),
                state.members.len()
            );
            return Err(Refusal { code: RefusalCode::Occupied, message });
        }
        let mut started = Vec::new();
        for member in vacant {
            self.spawn_error = None;
            let refused = self.try_apply(group, Event::Add(member)).err().map(|refused| refused.to_string());
            let error = self.spawn_error.take().map(|error| error.to_string());
            if let Some(error) = error.or(refused) {
                return Err(impossible(format!("{error} ({} of {count} were started)", started.len())));
            }
            started.push(self.resources(MemberKey { group, member }).id.clone());
        }
        Ok(started)
    }
}

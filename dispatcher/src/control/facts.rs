//! Writes facts about members to the log and the event history.

use crate::control::groups::MemberKey;
use crate::control::primary::Primary;
use crate::group::{Cause, Fact, KillReason};

impl Primary {
    /// Writes a fact about a member to the log and the event history.
    pub(super) fn record(&mut self, key: MemberKey, fact: Fact) {
        let pid = self.pid_of(key);
        let policy = *self.group(key.group).machine.policy();
        let member = self.resources(key);
        let id = member.id.as_str();
        let how = member.last_exit.clone().unwrap_or_default();
        let (event, detail) = match fact {
            Fact::Started { adopted: false } => ("started", member.program.clone()),
            Fact::Started { adopted: true } => ("started", "by the previous primary".to_owned()),
            Fact::Attached => {
                tracing::info!(member = id, pid, program = member.program, "worker attached");
                ("attached", member.program.clone())
            }
            Fact::Resumed => ("resumed", format!("{} packets that were held", member.backlog())),
            Fact::Stalled(time) => ("stalled", format!("has packets and has committed none for {time:?}")),
            Fact::Recovered => ("recovered", "commits packets again".to_owned()),
            Fact::Draining(cause) => ("draining", describe(cause).to_owned()),
            Fact::Left(Cause::Exited) => ("left", how),
            Fact::Left(cause) => {
                tracing::info!(member = id, pid, "worker left: {}", describe(cause));
                ("left", describe(cause).to_owned())
            }
            Fact::Died(cause) => ("died", self.log_death(key, pid, cause)),
            Fact::GivenUp { too_often } => {
                let why = if too_often {
                    format!(
                        "started {} times within {:?} (start_limit_burst, start_limit_interval)",
                        policy.restart.limit_burst, policy.restart.limit_interval
                    )
                } else {
                    member.last_error.clone()
                };
                tracing::error!(member = id, "worker stays down: {why}");
                ("given_up", why)
            }
            Fact::Vacated(cause) => {
                tracing::info!(member = id, pid, "member vacated: {}", describe(cause));
                ("vacated", describe(cause).to_owned())
            }
            Fact::Hung(time) => {
                let backlog = member.backlog();
                tracing::error!(
                    member = id,
                    pid,
                    backlog,
                    "worker hangs: it has packets and has committed none for {time:?} (hang_timeout)"
                );
                ("hung", format!("has committed no packet for {time:?} (hang_timeout)"))
            }
            Fact::Killed(reason) => {
                let why = match reason {
                    KillReason::AttachedTooOften => "attached too often (start_limit_burst)".to_owned(),
                    KillReason::NotAttached => {
                        format!("has not attached within {:?} (start_timeout)", policy.start_timeout)
                    }
                    KillReason::IgnoredSigterm => {
                        format!("did not end within {:?} of SIGTERM", policy.stop_timeout)
                    }
                    KillReason::ForcedStop => "the primary got a second stop signal".to_owned(),
                };
                tracing::warn!(member = id, pid, "worker killed: {why}");
                ("killed", why)
            }
            Fact::NotReady => {
                let why = format!("was not ready within {:?} (start_timeout)", policy.start_timeout);
                let pid = member.joining.as_ref().map_or(pid, |joining| joining.pid);
                tracing::warn!(member = id, pid, "worker {why}: its connection is closed");
                ("refused", why)
            }
            Fact::DisconnectedEarly => {
                return tracing::warn!(member = id, pid, "worker disconnected before it was ready");
            }
            Fact::HoldExpired => {
                return tracing::warn!(member = id, "no worker attached within hold_timeout");
            }
            Fact::Restarting => return tracing::info!(member = id, "restarting worker"),
        };
        self.write_member_event(key, pid, event, detail);
    }

    /// Writes an event of a member to the event history. `pid`: its worker's process; 0: none.
    pub(super) fn write_member_event(&mut self, key: MemberKey, pid: u32, event: &str, detail: String) {
        let id = &self.groups[key.group.index()].members[key.member.index()].id;
        self.history.write(Some(id), pid, event, detail);
    }

    /// Logs why a worker was lost. Returns the detail for the event history.
    fn log_death(&self, key: MemberKey, pid: u32, cause: Cause) -> String {
        let member = self.resources(key);
        let id = member.id.as_str();
        match cause {
            Cause::Exited => {
                let how = member.last_exit.clone().unwrap_or_default();
                tracing::warn!(member = id, how, "worker process ended");
                how
            }
            Cause::Disconnected => {
                tracing::warn!(member = id, pid, "worker disconnected unexpectedly");
                "its connection ended".to_owned()
            }
            Cause::ImpossibleIndex => {
                tracing::error!(
                    member = id,
                    pid,
                    "worker evicted: impossible consumer index: {}",
                    member.last_error
                );
                format!("evicted: impossible consumer index: {}", member.last_error)
            }
            Cause::SlowBell => {
                tracing::error!(member = id, "worker evicted: waking it took too long");
                "evicted: waking it took too long".to_owned()
            }
            Cause::Hung => "evicted: it hung".to_owned(),
            Cause::StopTimeout => {
                tracing::warn!(member = id, pid, "worker evicted: it did not leave within stop_timeout");
                "evicted: it did not leave within stop_timeout".to_owned()
            }
            Cause::NotReattached => {
                tracing::warn!(member = id, "worker of the previous primary has not attached to this one");
                "has not attached to this primary".to_owned()
            }
            Cause::Requested | Cause::Ordered | Cause::Restart | Cause::Stopping => {
                describe(cause).to_owned()
            }
        }
    }
}

/// Describes a cause, in words that also fit after "worker left: ".
fn describe(cause: Cause) -> &'static str {
    match cause {
        Cause::Requested => "at its own request",
        Cause::Ordered => "as ordered",
        Cause::Restart => "to be started again",
        Cause::Stopping => "the primary stops",
        Cause::Exited => "its process ended",
        Cause::Disconnected => "its connection ended",
        Cause::ImpossibleIndex => "impossible consumer index",
        Cause::SlowBell => "waking it took too long",
        Cause::Hung => "it hung",
        Cause::StopTimeout => "it did not leave",
        Cause::NotReattached => "it has not attached to this primary",
    }
}

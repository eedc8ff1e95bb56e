//! Requests and their replies.

use std::time::Instant;

use xfan_shm::protocol::{Reply, Request};

use crate::control::inbox::{ClientRequest, Response};
use crate::control::primary::{Primary, TICK};
use crate::group::Event;

impl Primary {
    /// Handles one request.
    pub(super) fn handle_request(&mut self, request: ClientRequest) {
        let ClientRequest { connection, peer, request, reply_to } = request;
        let response = match request {
            Request::Stats | Request::Events(_) if peer.uid() != 0 => {
                self.waiting.push((request, reply_to));
                if self.last_answered.is_none_or(|last| last.elapsed() >= TICK) {
                    self.answer_waiting();
                }
                return;
            }
            Request::Stats => self.stats(),
            Request::Attach(attach) => self.attach(connection, peer, attach),
            Request::Ready => self.ready(&connection, &peer),
            Request::Detach => {
                if let Some(key) = self.member_of(connection.id) {
                    self.apply(key.group, Event::Detach(connection.id));
                }
                Response::default()
            }
            Request::Events(after) => self.events_after(after),
            Request::Workers(order) => self.order(&peer, &order).into(),
            // The thread of the control socket handles it.
            Request::Connect => Response::default(),
        };
        // The client may have disconnected.
        let _ = reply_to.send(response);
    }

    /// Answers the waiting requests for reports and events. All clients get the same report, and
    /// this runs at most once per tick, so clients that ask without a pause cost one report per
    /// tick.
    pub(super) fn answer_waiting(&mut self) {
        /// The most pages of the event history in one call. Each is made for one client.
        const MAX_PAGES: usize = 16;
        if self.waiting.is_empty() {
            return;
        }
        let (mut report, mut pages) = (None, 0);
        for (request, reply_to) in std::mem::take(&mut self.waiting) {
            let reply = match request {
                Request::Events(after) if pages < MAX_PAGES => {
                    pages += 1;
                    self.events_after(after).reply
                }
                Request::Events(_) => {
                    self.waiting.push((request, reply_to));
                    continue;
                }
                _ => report.get_or_insert_with(|| self.stats().reply).clone(),
            };
            // The client may have disconnected.
            let _ = reply_to.send(Response { reply, fds: Vec::new() });
        }
        self.last_answered = Some(Instant::now());
    }

    /// Reports the number of refusals that were too many to be reported one by one.
    pub(super) fn report_suppressed(&mut self, now: Instant) {
        for (uid, refusals) in self.limit.suppressed(now) {
            let who = uid.map_or("several users".into(), |uid| format!("user id {uid}"));
            tracing::warn!("refused: {refusals} more requests of {who}");
            self.history.write(None, 0, "refused", format!("{refusals} more requests of {who}"));
        }
    }

    fn stats(&mut self) -> Response {
        match serde_json::to_value(self.report()) {
            Ok(report) => Reply::Stats(report).into(),
            Err(_) => Response::default(),
        }
    }

    fn events_after(&self, number: u64) -> Response {
        match serde_json::to_value(self.history.page(number)) {
            Ok(page) => Reply::Events(page).into(),
            Err(_) => Response::default(),
        }
    }
}

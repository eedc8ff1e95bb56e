//! Questions and their answers.

use std::time::Instant;

use xfan_shm::protocol::{Reply, Request};

use crate::control::inbox::{Answer, Question};
use crate::control::primary::{Primary, TICK};
use crate::group::Event;

impl Primary {
    /// Answers one question.
    pub(super) fn answer(&mut self, question: Question) {
        let Question { connection, peer, request, answer } = question;
        let reply = match request {
            Request::Stats | Request::Events(_) if peer.uid() != 0 => {
                self.waiting.push((request, answer));
                if self.told.is_none_or(|told| told.elapsed() >= TICK) {
                    self.tell_those_who_wait();
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
                Answer::default()
            }
            Request::Events(after) => self.events_after(after),
            Request::Workers(order) => self.order(&peer, &order).into(),
            // Made where connections are served.
            Request::Connect => Answer::default(),
        };
        // Whoever asked may be gone.
        let _ = answer.send(reply);
    }

    /// Answers users other than root: at once if none was answered for a while, else with the next
    /// tick. One report is made for all that want one, so whoever asks without a pause costs one
    /// report per tick.
    pub(super) fn tell_those_who_wait(&mut self) {
        /// Most pages of the event history at a time.
        const PAGES: usize = 16;
        if self.waiting.is_empty() {
            return;
        }
        let (mut report, mut pages) = (None, 0);
        for (request, answer) in std::mem::take(&mut self.waiting) {
            let reply = match request {
                Request::Events(after) if pages < PAGES => {
                    pages += 1;
                    self.events_after(after).reply
                }
                Request::Events(_) => {
                    self.waiting.push((request, answer));
                    continue;
                }
                _ => report.get_or_insert_with(|| self.stats().reply).clone(),
            };
            // Whoever asked may be gone.
            let _ = answer.send(Answer { reply, fds: Vec::new() });
        }
        self.told = Some(Instant::now());
    }

    /// Tells of refusals that were too many to be told one by one.
    pub(super) fn tell_suppressed(&mut self, now: Instant) {
        for (uid, refusals) in self.limit.suppressed(now) {
            let who = uid.map_or("several users".into(), |uid| format!("user id {uid}"));
            tracing::warn!("refused: {refusals} more requests of {who}");
            self.history.write(None, 0, "refused", format!("{refusals} more requests of {who}"));
        }
    }

    fn stats(&mut self) -> Answer {
        match serde_json::to_value(self.report()) {
            Ok(report) => Reply::Stats(report).into(),
            Err(_) => Answer::default(),
        }
    }

    fn events_after(&self, number: u64) -> Answer {
        match serde_json::to_value(self.history.page(number)) {
            Ok(page) => Reply::Events(page).into(),
            Err(_) => Answer::default(),
        }
    }
}

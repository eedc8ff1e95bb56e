//! The event history: the last [`LIMIT`] events of the primary and its members.

use std::collections::VecDeque;
use std::fmt;
use std::time::{Duration, SystemTime, UNIX_EPOCH};

use serde::{Deserialize, Serialize};

use crate::text::printable;

/// The number of entries kept. It bounds the memory, and with the length of details the size of a
/// reply.
pub const LIMIT: usize = 1024;
/// The most characters of a detail. Only a text that an operator or a worker chose is as long: the
/// path of a program, say.
const DETAIL: usize = 512;

/// An event.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct Entry {
    /// The number of the entry, counted from 1 without gaps.
    pub number: u64,
    /// The time, in nanoseconds since 1970-01-01 UTC.
    pub time_ns: u64,
    /// The member, such as `default/0`; `None`: the primary.
    pub member: Option<String>,
    /// The process id of its worker; 0: none.
    pub pid: u32,
    /// The kind of event: `started`, `attached`, `stalled`, `recovered`, `draining`, `left`,
    /// `died`, `given_up`, `vacated`, `hung`, `killed`, `refused`, `ordered`, `running`, `empty`,
    /// `uncommitted`, `held`, `resumed`, `interface`, `cut`, `unaccounted`, `autogroup`.
    pub event: String,
    /// Details, as text for people.
    pub detail: String,
}

impl fmt::Display for Entry {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let time = humantime::format_rfc3339_millis(UNIX_EPOCH + Duration::from_nanos(self.time_ns));
        // Any process may listen on the socket that a tool asks, and send such an entry.
        let member = printable(self.member.as_deref().unwrap_or("primary"));
        write!(f, "{time} {member:<12} {:<9}", printable(&self.event))?;
        if self.pid != 0 {
            write!(f, " pid {}", self.pid)?;
        }
        if !self.detail.is_empty() {
            write!(f, ": {}", printable(&self.detail))?;
        }
        Ok(())
    }
}

/// A part of the event history, as the primary sends it.
#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
pub struct Page {
    /// The process id of the primary. Each primary has an event history of its own.
    pub primary: u32,
    /// The entries, oldest first.
    pub entries: Vec<Entry>,
    /// The number of requested entries that are no longer kept.
    pub missed: u64,
}

/// The event history.
#[derive(Debug, Default)]
pub struct History {
    entries: VecDeque<Entry>,
    written: u64,
}

impl History {
    /// Adds an event with the current time. `member`: `None` for an event of the primary. `pid`: 0
    /// for none.
    pub fn write(&mut self, member: Option<&str>, pid: u32, event: &str, detail: impl Into<String>) {
        if self.entries.len() == LIMIT {
            self.entries.pop_front();
        }
        self.written += 1;
        let time = SystemTime::now().duration_since(UNIX_EPOCH).unwrap_or_default();
        self.entries.push_back(Entry {
            number: self.written,
            time_ns: u64::try_from(time.as_nanos()).unwrap_or(u64::MAX),
            member: member.map(printable),
            pid,
            event: event.to_owned(),
            detail: printable(&detail.into()).chars().take(DETAIL).collect(),
        });
    }

    /// Adds an event of the primary, with the current time.
    pub fn write_own(&mut self, event: &str, detail: impl Into<String>) {
        self.write(None, std::process::id(), event, detail);
    }

    /// The entries with numbers above `after`.
    pub fn page(&self, after: u64) -> Page {
        let kept_from = self.written - self.entries.len() as u64;
        let entries = self.entries.iter().filter(|entry| entry.number > after).cloned().collect();
        Page { primary: std::process::id(), entries, missed: kept_from.saturating_sub(after) }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn it_keeps_the_last_entries_and_counts_missed_ones() {
        let mut history = History::default();
        let empty = Page { primary: std::process::id(), ..Page::default() };
        assert_eq!(history.page(0), empty);
        for number in 1..=LIMIT + 10 {
            history.write(Some("default/0"), 7, "started", number.to_string());
        }
        let page = history.page(0);
        assert_eq!((page.entries.len(), page.missed), (LIMIT, 10));
        assert_eq!((page.entries[0].number, &*page.entries[0].detail), (11, "11"));
        let last = history.page(LIMIT as u64 + 9);
        assert_eq!((last.entries.len(), last.missed, last.entries[0].number), (1, 0, LIMIT as u64 + 10));
        assert_eq!(history.page(u64::MAX), empty);
    }

    #[test]
    fn the_longest_history_fits_into_a_reply() {
        let mut history = History::default();
        for character in ["\"", "\u{10ffff}"].into_iter().cycle().take(LIMIT) {
            let text = character.repeat(2 * DETAIL);
            history.write(Some(&character.repeat(64)), u32::MAX, "uncommitted", text);
        }
        let page = serde_json::to_value(history.page(0)).unwrap();
        let reply = serde_json::to_vec(&xfan_shm::protocol::Reply::Events(page)).unwrap();
        assert!(reply.len() < xfan_shm::protocol::MAX_REPLY, "{} bytes", reply.len());
    }

    #[test]
    fn an_entry_is_a_line() {
        let mut entry = Entry {
            number: 1,
            time_ns: 1_700_000_000_123_456_789,
            member: Some("default/0".into()),
            pid: 42,
            event: "died".into(),
            detail: "signal: 9 (SIGKILL); requeued 7, lost 0".into(),
        };
        let line =
            "2023-11-14T22:13:20.123Z default/0    died      pid 42: signal: 9 (SIGKILL); requeued 7, lost 0";
        assert_eq!(entry.to_string(), line);
        entry = Entry { member: None, pid: 0, detail: String::new(), ..entry };
        assert_eq!(entry.to_string(), "2023-11-14T22:13:20.123Z primary      died     ");
    }
}

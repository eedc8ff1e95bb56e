//! The format of a log line: time, level, message, fields.

use std::fmt;
use std::time::SystemTime;

use tracing::{Event, Level, Subscriber};
use tracing_subscriber::fmt::format::Writer;
use tracing_subscriber::fmt::{FmtContext, FormatEvent, FormatFields};
use tracing_subscriber::registry::LookupSpan;

use crate::text::printable;

/// Formats an event as one line. Control characters in its fields are removed, so that a name can
/// neither add a line nor control the terminal. Only the colours added here are escape sequences.
pub(super) struct Line {
    /// Adds colours.
    pub(super) ansi: bool,
}

impl<S, N> FormatEvent<S, N> for Line
where
    S: Subscriber + for<'a> LookupSpan<'a>,
    N: for<'a> FormatFields<'a> + 'static,
{
    fn format_event(
        &self,
        context: &FmtContext<'_, S, N>,
        mut out: Writer<'_>,
        event: &Event<'_>,
    ) -> fmt::Result {
        let mut fields = String::new();
        context.format_fields(Writer::new(&mut fields), event)?;
        let (level, fields) = (event.metadata().level(), printable(&fields));
        if self.ansi {
            writeln!(out, "\x1b[2m{}\x1b[0m \x1b[{}m{level:>5}\x1b[0m {fields}", now(), colour(level))
        } else {
            writeln!(out, "{} {level:>5} {fields}", now())
        }
    }
}

/// The ANSI colour of a level, as in tracing-subscriber.
fn colour(level: &Level) -> u8 {
    match *level {
        Level::ERROR => 31,
        Level::WARN => 33,
        Level::INFO => 32,
        Level::DEBUG => 34,
        Level::TRACE => 35,
    }
}

/// The current time, in the format with which every line begins.
pub(super) fn now() -> humantime::Rfc3339Timestamp {
    humantime::format_rfc3339_micros(SystemTime::now())
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::io;
    use std::sync::{Arc, Mutex};

    #[derive(Clone, Default)]
    struct Kept(Arc<Mutex<Vec<u8>>>);

    impl io::Write for Kept {
        fn write(&mut self, bytes: &[u8]) -> io::Result<usize> {
            self.0.lock().unwrap().extend(bytes);
            Ok(bytes.len())
        }

        fn flush(&mut self) -> io::Result<()> {
            Ok(())
        }
    }

    fn logged(ansi: bool) -> String {
        let (kept, name) = (Kept::default(), "e\u{1b}[2J\u{202e}\u{9b}th\n0");
        let writer = kept.clone();
        let subscriber = tracing_subscriber::fmt()
            .event_format(Line { ansi })
            .with_writer(move || writer.clone())
            .finish();
        tracing::subscriber::with_default(subscriber, || tracing::warn!(interface = name, "{name} is down"));
        String::from_utf8(kept.0.lock().unwrap().clone()).unwrap()
    }

    #[test]
    fn an_event_is_one_line_whatever_it_contains() {
        let line = logged(false);
        let (time, rest) = line.split_at(27);
        assert!(time.ends_with('Z'), "{line}");
        assert!(
            rest.starts_with("  WARN e") && rest.contains("is down") && rest.contains("interface="),
            "{line}"
        );
        assert_eq!(rest.matches(|c: char| c.is_control() || c == '\u{202e}').collect::<Vec<_>>(), ["\n"]);
    }

    #[test]
    fn only_added_colours_reach_a_terminal() {
        let line = logged(true);
        assert_eq!(line.matches('\u{1b}').count(), 4, "{line:?}");
        assert!(line.starts_with("\x1b[2m") && line.contains("\x1b[33m WARN\x1b[0m e"), "{line:?}");
    }
}

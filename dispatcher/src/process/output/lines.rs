//! Splits a stream of bytes into lines, and limits their rate.

use std::time::{Duration, Instant};

/// A line of a stream.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Line<'a> {
    /// A whole line.
    Whole(&'a [u8]),
    /// The beginning of a line that is too long.
    Cut(&'a [u8]),
}

/// Splits a stream into lines. Its buffer holds at most one line of the greatest length.
#[derive(Debug)]
pub struct Lines {
    /// The line that has begun and not ended.
    begun: Vec<u8>,
    /// The greatest length of a line in bytes.
    longest: usize,
    /// The rest of the current line is skipped, since the line was cut.
    skipping: bool,
}

impl Lines {
    /// Cuts lines that are longer than `longest` bytes.
    pub fn new(longest: usize) -> Self {
        Lines { begun: Vec::new(), longest, skipping: false }
    }

    /// Takes the next bytes of the stream, and passes each line that ends in them to `line`.
    pub fn feed(&mut self, bytes: &[u8], mut line: impl FnMut(Line<'_>)) {
        let mut rest = bytes;
        while let Some(end) = rest.iter().position(|byte| *byte == b'\n') {
            self.add(&rest[..end], &mut line);
            self.end(&mut line);
            rest = &rest[end + 1..];
        }
        self.add(rest, &mut line);
    }

    /// The stream has ended. Passes on the last line if no line break ended it.
    pub fn finish(&mut self, mut line: impl FnMut(Line<'_>)) {
        if !self.begun.is_empty() {
            self.end(&mut line);
        }
    }

    fn add(&mut self, bytes: &[u8], line: &mut impl FnMut(Line<'_>)) {
        if self.skipping {
            return;
        }
        let left = self.longest - self.begun.len();
        self.begun.extend(&bytes[..bytes.len().min(left)]);
        if bytes.len() > left {
            line(Line::Cut(&self.begun));
            self.begun.clear();
            self.skipping = true;
        }
    }

    fn end(&mut self, line: &mut impl FnMut(Line<'_>)) {
        if !std::mem::take(&mut self.skipping) {
            line(Line::Whole(&self.begun));
        }
        self.begun.clear();
    }
}

/// A token bucket that limits lines to [`RATE`](Self::RATE) a second after a burst.
#[derive(Debug)]
pub struct Bucket {
    tokens: u32,
    filled: Instant,
}

impl Bucket {
    /// The most lines in a burst: enough for the start of a program or a stack trace.
    pub const BURST: u32 = 1000;
    /// The most lines per second in the long run: more than a person can read, little for the log.
    pub const RATE: u32 = 100;

    /// A full bucket.
    pub fn new(now: Instant) -> Self {
        Bucket { tokens: Self::BURST, filled: now }
    }

    /// Takes a token for one line. Returns `false` if none is left.
    pub fn take(&mut self, now: Instant) -> bool {
        let each = Duration::from_secs(1) / Self::RATE;
        let new = (now - self.filled).as_nanos() / each.as_nanos();
        let new = u32::try_from(new).unwrap_or(u32::MAX);
        self.tokens = self.tokens.saturating_add(new).min(Self::BURST);
        self.filled = if self.tokens == Self::BURST { now } else { self.filled + each * new };
        let taken = self.tokens.checked_sub(1);
        self.tokens = taken.unwrap_or(0);
        taken.is_some()
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;

    fn lines_of(longest: usize, pieces: &[&[u8]]) -> Vec<String> {
        let (mut lines, mut found) = (Lines::new(longest), Vec::new());
        let mut keep = |line: Line<'_>| {
            found.push(match line {
                Line::Whole(text) => String::from_utf8_lossy(text).into_owned(),
                Line::Cut(text) => String::from_utf8_lossy(text).into_owned() + "…",
            });
        };
        pieces.iter().for_each(|piece| lines.feed(piece, &mut keep));
        lines.finish(&mut keep);
        found
    }

    #[test]
    fn lines_are_assembled_and_long_ones_cut() {
        assert_eq!(lines_of(8, &[b"a\n\nb", b"c\nlast"]), ["a", "", "bc", "last"]);
        assert_eq!(lines_of(4, &[b"1234\n12345\n1234", b"5678", b"9\nx\n"]), ["1234", "1234…", "1234…", "x"]);
        assert_eq!(lines_of(4, &[b"12345678"]), ["1234…"]);
    }

    #[test]
    fn a_bucket_allows_a_burst_then_its_rate() {
        let start = Instant::now();
        let mut bucket = Bucket::new(start);
        let mut taken = |after: u64| {
            let now = start + Duration::from_millis(after);
            (0..10_000).filter(|_| bucket.take(now)).count()
        };
        assert_eq!([0, 9, 10, 1010, 1_000_000].map(&mut taken), [1000, 0, 1, 100, 1000]);
    }

    proptest! {
        #[test]
        fn the_pieces_of_a_stream_do_not_matter(
            text in "[ab\n]{0,40}", at in 0usize..40, longest in 1usize..8
        ) {
            let bytes = text.as_bytes();
            let (first, second) = bytes.split_at(at.min(bytes.len()));
            prop_assert_eq!(lines_of(longest, &[first, second]), lines_of(longest, &[bytes]));
        }
    }
}

//! Where the records go: a file, or standard output, one line each.

use std::fs::OpenOptions;
use std::io::{self, BufWriter, Write};

use serde::Serialize;

/// Bytes that are gathered before they are written.
const BUFFER: usize = 64 << 10;

/// A file of JSON lines.
pub struct Output {
    name: String,
    writer: BufWriter<Box<dyn Write>>,
    line: Vec<u8>,
}

/// It cannot be written to.
#[derive(Debug, thiserror::Error)]
#[error("cannot {what} {name}: {error}")]
pub struct OutputError {
    what: &'static str,
    name: String,
    #[source]
    error: io::Error,
}

impl Output {
    /// Opens the file that `template` names: `{member}` stands for the member, with `-` for `/`; `-` alone is
    /// standard output. Lines are appended, so that a worker that is restarted overwrites nothing.
    ///
    /// # Errors
    /// [`OutputError`]
    pub fn open(template: &str, member: &str) -> Result<Self, OutputError> {
        let name = template.replace("{member}", &member.replace('/', "-"));
        let (name, sink): (String, Box<dyn Write>) = if template == "-" {
            ("standard output".into(), Box::new(io::stdout()))
        } else {
            match OpenOptions::new().append(true).create(true).open(&name) {
                Ok(file) => (name, Box::new(file)),
                Err(error) => return Err(OutputError { what: "open", name, error }),
            }
        };
        Ok(Output { name, writer: BufWriter::with_capacity(BUFFER, sink), line: Vec::new() })
    }

    /// Writes one line, some time before the next [`flush`](Self::flush).
    ///
    /// # Errors
    /// [`OutputError`]
    pub fn write(&mut self, record: &impl Serialize) -> Result<(), OutputError> {
        self.line.clear();
        let written = serde_json::to_writer(&mut self.line, record).map_err(io::Error::from).and_then(|()| {
            self.line.push(b'\n');
            // In one piece: the buffer is then written out at the end of a line.
            self.writer.write_all(&self.line)
        });
        written.map_err(|error| self.failed(error))
    }

    /// Writes everything out.
    ///
    /// # Errors
    /// [`OutputError`]
    pub fn flush(&mut self) -> Result<(), OutputError> {
        self.writer.flush().map_err(|error| self.failed(error))
    }

    fn failed(&self, error: io::Error) -> OutputError {
        OutputError { what: "write flow records to", name: self.name.clone(), error }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_member_is_in_the_name_and_lines_are_appended() {
        let folder = tempfile::tempdir().unwrap();
        let template = folder.path().join("flows-{member}.json");
        for n in 0..2 {
            let mut output = Output::open(template.to_str().unwrap(), "default/3").unwrap();
            output.write(&n).unwrap();
            output.flush().unwrap();
        }
        assert_eq!(std::fs::read_to_string(folder.path().join("flows-default-3.json")).unwrap(), "0\n1\n");
    }

    #[test]
    fn errors_name_the_file() {
        let error = Output::open("/nonexistent/{member}", "a/0").err().unwrap().to_string();
        assert_eq!(error, "cannot open /nonexistent/a-0: No such file or directory (os error 2)");
        let mut full = Output::open("/dev/full", "a/0").unwrap();
        full.write(&1).unwrap();
        assert!(
            full.flush()
                .unwrap_err()
                .to_string()
                .starts_with("cannot write flow records to /dev/full: No space")
        );
    }
}

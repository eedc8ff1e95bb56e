//! Words to lines.

use std::fmt::Write as _;

use xfan::config::table::{Flag, Takes};

/// The longest line of a generated file.
const WIDTH: usize = 100;

/// Breaks a paragraph into lines that begin with `prefix`, but not within `code`.
pub fn wrap(prefix: &str, paragraph: &str) -> String {
    let parts = paragraph.split('`').enumerate();
    let parts = parts.map(|(n, part)| if n % 2 == 1 { part.replace(' ', "\u{a0}") } else { part.to_owned() });
    let paragraph = parts.collect::<Vec<_>>().join("`");
    let (mut text, mut line) = (String::new(), String::new());
    for word in paragraph.split(' ') {
        let length = prefix.chars().count() + line.chars().count() + 1 + word.chars().count();
        if !line.is_empty() && length > WIDTH {
            let _ = writeln!(text, "{prefix}{line}");
            line.clear();
        }
        if !line.is_empty() {
            line.push(' ');
        }
        line.push_str(word);
    }
    (text + prefix + &line + "\n").replace('\u{a0}', " ")
}

/// How to give a flag: `-n`, `--workers WORKERS`.
pub fn usage(full_key: &str, flag: Flag) -> Vec<String> {
    let long = full_key.replace(['_', '.'], "-");
    match flag.takes {
        Takes::Rest => vec![format!("-- {}...", flag.value)],
        Takes::One | Takes::Items => {
            let short = flag.short.map(|short| format!("-{short} {}", flag.value));
            let long = [Some(long.as_str()), flag.alias].into_iter().flatten();
            let long = long.map(|name| format!("--{name} {}", flag.value));
            short.into_iter().chain(long).collect()
        }
    }
}

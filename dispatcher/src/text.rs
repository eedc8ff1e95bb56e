//! Text from outside, made fit to be shown: names of interfaces and programs, counters, what peers
//! and workers write.
//!
//! Whoever chooses such a text shall neither steer the terminal it is shown on, nor begin a line of
//! its own in a log or table, nor turn the text around it.

use std::fmt::Write as _;

/// Whether a character steers a terminal or the direction of text, or ends a line: control
/// characters (C0, DEL, C1), bidirectional formatting, line and paragraph separators.
fn steers(character: char) -> bool {
    character.is_control()
        || matches!(
            character,
            '\u{61c}' | '\u{200e}' | '\u{200f}' | '\u{2028}'..='\u{202e}' | '\u{2066}'..='\u{2069}'
        )
}

/// A text as part of a line: without what steers.
pub fn printable(text: &str) -> String {
    text.chars().filter(|&character| !steers(character)).collect()
}

/// The beginning of a stranger's text, as part of a line.
pub fn excerpt(text: &str) -> String {
    text.chars().filter(|&character| !steers(character)).take(64).collect()
}

/// A text of several lines, without what steers.
pub fn printable_lines(text: &str) -> String {
    text.chars().filter(|&character| character == '\n' || !steers(character)).collect()
}

/// JSON in which what steers is escaped. It can only stand within strings, where JSON allows it,
/// except below U+0020.
pub fn escaped_json(json: &str) -> String {
    let mut escaped = String::with_capacity(json.len());
    for character in json.chars() {
        if steers(character) && character != '\n' {
            // None of them is beyond U+FFFF. Writing to a String cannot fail.
            let _ = write!(escaped, "\\u{:04x}", u32::from(character));
        } else {
            escaped.push(character);
        }
    }
    escaped
}

/// Bytes as part of a line: what steers, and what is not UTF-8, as escapes such as `\n`, `\x1b`,
/// `\u{202e}`, `\xff`.
pub fn escaped(bytes: &[u8]) -> String {
    let mut text = String::with_capacity(bytes.len());
    for chunk in bytes.utf8_chunks() {
        for character in chunk.valid().chars() {
            match character {
                '\t' | '\r' | '\n' => text.extend(character.escape_default()),
                // Writing to a String cannot fail.
                '\0'..='\x7f' if steers(character) => {
                    let _ = write!(text, "\\x{:02x}", u32::from(character));
                }
                _ if steers(character) => text.extend(character.escape_unicode()),
                _ => text.push(character),
            }
        }
        for byte in chunk.invalid() {
            let _ = write!(text, "\\x{byte:02x}");
        }
    }
    text
}

#[cfg(test)]
mod tests {
    use super::*;

    const STEERING: &str =
        "\u{1b}\u{7f}\u{9b}\u{61c}\u{200e}\u{200f}\u{2028}\u{2029}\u{202a}\u{202e}\u{2066}\u{2069}\r\t\0";

    #[test]
    fn what_steers_is_left_out() {
        assert_eq!(printable("a\n\u{1b}[31mb\u{9b}c"), "a[31mbc");
        assert_eq!(printable(&format!("a{STEERING}\nö€")), "aö€");
        assert_eq!(printable_lines(&format!("a{STEERING}\nb")), "a\nb");
        assert_eq!(excerpt(&"x".repeat(10_000)).len(), 64);
    }

    #[test]
    fn json_means_the_same_and_is_plain() {
        let text = format!("\"\\{STEERING}ö");
        let json = escaped_json(&serde_json::to_string(&text).unwrap());
        assert_eq!(printable(&json), json);
        assert!(json.contains("\\u202e") && json.contains("\\u009b"), "{json}");
        assert_eq!(serde_json::from_str::<String>(&json).unwrap(), text);
    }

    #[test]
    fn bytes_are_shown_by_escapes() {
        let bytes = b"\x1b[2Jh\xc3\xb6 \xff\xc2\x9b\xe2\x80\xae\t\r\0\"\\";
        assert_eq!(escaped(bytes), r#"\x1b[2Jhö \xff\u{9b}\u{202e}\t\r\x00"\"#);
    }
}

//! Makes text from outside safe to show: names of interfaces and programs, counter names, messages
//! from peers, output of workers.
//!
//! Such text must not control the terminal, add a line to a log or table, or reverse the direction
//! of the text around it. Characters that could do so are called control characters here.

use std::fmt::Write as _;

/// Whether a character can control a terminal or the direction of text, or ends a line: C0, DEL,
/// C1, bidirectional formatting, line and paragraph separators.
fn is_control(character: char) -> bool {
    character.is_control()
        || matches!(
            character,
            '\u{61c}' | '\u{200e}' | '\u{200f}' | '\u{2028}'..='\u{202e}' | '\u{2066}'..='\u{2069}'
        )
}

/// Removes control characters, line breaks included.
pub fn printable(text: &str) -> String {
    text.chars().filter(|&character| !is_control(character)).collect()
}

/// The first 64 characters of a peer's text, without control characters.
pub fn excerpt(text: &str) -> String {
    text.chars().filter(|&character| !is_control(character)).take(64).collect()
}

/// Removes control characters other than `\n`.
pub fn printable_lines(text: &str) -> String {
    text.chars().filter(|&character| character == '\n' || !is_control(character)).collect()
}

/// Escapes the control characters of a JSON text, except `\n`. The text stays equivalent: JSON
/// allows these characters only within strings, and there an escape means the same.
pub fn escaped_json(json: &str) -> String {
    let mut escaped = String::with_capacity(json.len());
    for character in json.chars() {
        if is_control(character) && character != '\n' {
            // All of them fit into four digits. Writing to a String cannot fail.
            let _ = write!(escaped, "\\u{:04x}", u32::from(character));
        } else {
            escaped.push(character);
        }
    }
    escaped
}

/// Shows bytes as part of a line. Control characters and bytes that are not UTF-8 become escapes
/// such as `\n`, `\x1b`, `\u{202e}` and `\xff`.
pub fn escaped(bytes: &[u8]) -> String {
    let mut text = String::with_capacity(bytes.len());
    for chunk in bytes.utf8_chunks() {
        for character in chunk.valid().chars() {
            match character {
                '\t' | '\r' | '\n' => text.extend(character.escape_default()),
                // Writing to a String cannot fail.
                '\0'..='\x7f' if is_control(character) => {
                    let _ = write!(text, "\\x{:02x}", u32::from(character));
                }
                _ if is_control(character) => text.extend(character.escape_unicode()),
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

    const CONTROL: &str =
        "\u{1b}\u{7f}\u{9b}\u{61c}\u{200e}\u{200f}\u{2028}\u{2029}\u{202a}\u{202e}\u{2066}\u{2069}\r\t\0";

    #[test]
    fn control_characters_are_removed() {
        assert_eq!(printable("a\n\u{1b}[31mb\u{9b}c"), "a[31mbc");
        assert_eq!(printable(&format!("a{CONTROL}\nö€")), "aö€");
        assert_eq!(printable_lines(&format!("a{CONTROL}\nb")), "a\nb");
        assert_eq!(excerpt(&"x".repeat(10_000)).len(), 64);
    }

    #[test]
    fn escaped_json_is_equivalent() {
        let text = format!("\"\\{CONTROL}ö");
        let json = escaped_json(&serde_json::to_string(&text).unwrap());
        assert_eq!(printable(&json), json);
        assert!(json.contains("\\u202e") && json.contains("\\u009b"), "{json}");
        assert_eq!(serde_json::from_str::<String>(&json).unwrap(), text);
    }

    #[test]
    fn bytes_are_shown_as_escapes() {
        let bytes = b"\x1b[2Jh\xc3\xb6 \xff\xc2\x9b\xe2\x80\xae\t\r\0\"\\";
        assert_eq!(escaped(bytes), r#"\x1b[2Jhö \xff\u{9b}\u{202e}\t\r\x00"\"#);
    }
}

//! The TOML file: keys to values, and nothing that is not a known key.

use toml::de::{DeTable, DeValue};

use super::value::Value;
use super::{Config, ConfigError};

/// Sets what the file sets.
///
/// # Errors
///
/// The text is not TOML, a key is unknown at any depth, or a value is of a wrong type or beyond its
/// limits.
pub(super) fn apply(config: &mut Config, text: &str, file: &str) -> Result<(), ConfigError> {
    let table = DeTable::parse(text).map_err(|error| ConfigError::Syntax {
        file: file.to_owned(),
        line: line_of(text, error.span().map_or(0, |span| span.start)),
        message: error.message().to_owned(),
    })?;
    let keys: Vec<_> = config.keys().collect();
    let mut entries = Vec::new();
    flatten(text, "", table.get_ref(), &keys, &mut entries);
    entries.sort_by_key(|entry| entry.line);
    let wrong = |entry: &Entry, wanted: &str| ConfigError::Value {
        key: entry.key.clone(),
        file: file.to_owned(),
        line: entry.line,
        found: entry.value.to_string(),
        wanted: wanted.to_owned(),
    };
    match entries.iter().find(|entry| !keys.contains(&entry.key)) {
        None => {}
        Some(entry) if is_table(&entry.key, &keys) => return Err(wrong(entry, "a table")),
        Some(entry) => {
            return Err(ConfigError::UnknownKey {
                key: entry.key.clone(),
                file: file.to_owned(),
                line: entry.line,
                hint: hint(&entry.key, &keys),
            });
        }
    }
    for entry in &entries {
        config.set(&entry.key, &entry.value).map_err(|wanted| wrong(entry, &wanted.0))?;
    }
    Ok(())
}

/// A key that the file sets.
struct Entry {
    /// Its name with its tables.
    key: String,
    /// The line it stands in, from 1.
    line: usize,
    value: Value,
}

/// Whether known keys lie in a table of this name.
fn is_table(key: &str, keys: &[String]) -> bool {
    keys.iter().any(|known| known.strip_prefix(key).is_some_and(|rest| rest.starts_with('.')))
}

/// Lists the keys of `table` and of the known tables in it, under their full names.
fn flatten(text: &str, prefix: &str, table: &DeTable<'_>, keys: &[String], entries: &mut Vec<Entry>) {
    for (name, value) in table {
        let line = line_of(text, name.span().start);
        let name = name.get_ref();
        // A quoted name that contains a dot is not a path.
        let name = if name.contains('.') { format!("{name:?}") } else { name.to_string() };
        let key = if prefix.is_empty() { name } else { format!("{prefix}.{name}") };
        match value.get_ref() {
            DeValue::Table(inner) if is_table(&key, keys) => flatten(text, &key, inner, keys, entries),
            value => entries.push(Entry { key, line, value: value.into() }),
        }
    }
}

/// The line, from 1, that byte `offset` of `text` lies in.
fn line_of(text: &str, offset: usize) -> usize {
    1 + text.bytes().take(offset).filter(|&byte| byte == b'\n').count()
}

/// The known key that was probably meant, or all of them.
fn hint(unknown: &str, keys: &[String]) -> String {
    let last = |key: &str| key.rsplit('.').next().unwrap_or_default().to_owned();
    let likeness = |known: &str| {
        strsim::jaro_winkler(unknown, known).max(strsim::jaro_winkler(&last(unknown), &last(known)))
    };
    let nearest = keys.iter().max_by(|a, b| likeness(a).total_cmp(&likeness(b)));
    match nearest.filter(|known| likeness(known) > 0.75) {
        Some(known) => format!("did you mean `{known}`?"),
        None => format!("the known keys are {}", keys.join(", ")),
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;

    fn error(text: &str) -> String {
        apply(&mut Config::default(), text, "xfan.toml").unwrap_err().to_string()
    }

    #[test]
    fn unknown_keys_are_refused_with_the_nearest_known_one() {
        assert_eq!(
            error("workers = 2\nring_slot = 512\n"),
            "unknown key `ring_slot` in xfan.toml (line 2): did you mean `ring_slots`?"
        );
        assert_eq!(
            error("[idle]\nspinn = \"1us\""),
            "unknown key `idle.spinn` in xfan.toml (line 2): did you mean `idle.spin`?"
        );
        assert!(error("spin = \"1us\"").ends_with("did you mean `idle.spin`?"));
        assert!(error("[idel]\nspin = \"1us\"").contains("`idel` in xfan.toml (line 1): did you mean"));
        assert!(error("\"idle.spin\" = \"1us\"").contains("unknown key"));
        assert!(error("[idle.spin.deep]\nx = 1").contains("`idle.spin` in xfan.toml (line 1) is a table"));
        assert!(error("zzz = 1").contains("the known keys are interface, queues"));
    }

    #[test]
    fn the_first_unknown_key_of_the_file_is_the_one_told() {
        assert!(error("zworkers = 2\nainterface = 'x'\n").contains("(line 1)"));
    }

    #[test]
    fn wrong_values_name_key_value_and_limits() {
        assert_eq!(
            error("rx_ring = 1000"),
            "`rx_ring` in xfan.toml (line 1) is 1000, but it must be a power of two from 64 to 32768 (frames)"
        );
        assert!(error("workers = 65").contains("is 65, but it must be a whole number from 1 to 64"));
        assert!(error("workers = \"two\"").contains("is \"two\", but it must be a whole number"));
        assert!(error("workers = 1e3").contains("is 1e3, but"));
        assert!(error("workers = 99999999999999999999").contains("is 99999999999999999999, but"));
        assert!(error("frame_size = 1024").contains("\"auto\" or 2048 or 4096 (bytes)"));
        assert!(error("ring_slots = 3").contains("\"auto\" or a power of two from 64 to 1048576"));
        assert!(error("idle = 3").contains("`idle` in xfan.toml (line 1) is 3, but it must be a table"));
        assert!(error("interface = true").contains("is true, but it must be the name of an interface"));
        assert!(error("queues = [0, 0]").contains("is [0, 0], but"));
        assert!(error("[idle]\n\nyield = 5").contains("`idle.yield` in xfan.toml (line 3) is 5, but"));
    }

    #[test]
    fn what_is_no_toml_is_told_with_its_line() {
        let message = error("workers = 2\nworkers = 3\n");
        assert!(message.starts_with("xfan.toml (line 2) is not valid TOML: "), "{message}");
        assert!(error("workers = \n").contains("(line 1)"));
        assert!(error("workers").contains("(line 1)"));
    }

    #[test]
    fn numbers_may_be_written_as_toml_allows() {
        let mut config = Config::default();
        apply(&mut config, "rx_ring = 4_096\nframes = 0x8000\n", "f").unwrap();
        assert_eq!((config.port.rx_ring, config.primary.frames), (4096, Some(32768)));
    }

    #[test]
    fn every_known_key_is_read() {
        for key in Config::default().keys() {
            let message = error(&format!("{key} = 1979-05-27"));
            assert!(
                message.starts_with(&format!("`{key}` in xfan.toml (line 1) is 1979-05-27")),
                "{message}"
            );
        }
    }

    proptest! {
        #[test]
        fn any_text_is_read_or_refused(text in "(?s)[ -~\n]{0,80}") {
            let _ = apply(&mut Config::default(), &text, "f");
        }
    }
}

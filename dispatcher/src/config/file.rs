//! The TOML file: keys to values, and nothing that is not a known key.

use std::time::Duration;

use toml::de::{DeTable, DeValue};

use super::value::{self, Read, Value};
use super::{Config, ConfigError};

/// Every key, with the table it lies in. A test holds this list against [`apply`].
pub(super) const KEYS: [&str; 41] = [
    "interface",
    "queues",
    "workers",
    "max_workers",
    "command",
    "cores",
    "user",
    "pass",
    "socket",
    "xdp_mode",
    "bind_mode",
    "frame_size",
    "rx_ring",
    "ring_slots",
    "frames",
    "batch",
    "hash_key",
    "start_timeout",
    "stop_timeout",
    "restart",
    "restart_delay",
    "start_limit_burst",
    "start_limit_interval",
    "hang_timeout",
    "survive",
    "on_loss",
    "hold_timeout",
    "on_empty",
    "worker_memory",
    "worker_processes",
    "worker_cpu_weight",
    "worker_sandbox",
    "worker_output",
    "control.allow_users",
    "control.allow_groups",
    "control.socket_owner",
    "control.socket_mode",
    "idle.spin",
    "idle.yield",
    "log.level",
    "log.file",
];

/// Puts what the file says over what `config` holds.
///
/// # Errors
///
/// No TOML, an unknown key at any depth, a value of a wrong type or beyond its limits.
pub(super) fn apply(config: &mut Config, text: &str, file: &str) -> Result<(), ConfigError> {
    let mut keys = Keys::read(text, file)?;
    let ms = Duration::from_millis;
    let at_once = Duration::ZERO..=Duration::from_secs(1);

    keys.set("interface", &mut config.interface, value::interface)?;
    keys.set("queues", &mut config.queues, value::queues)?;
    keys.set("workers", &mut config.workers, value::workers)?;
    keys.set("max_workers", &mut config.max_workers, |v| value::auto(v, value::workers))?;
    keys.set("command", &mut config.command, value::command)?;
    keys.set("cores", &mut config.cores, |v| value::cores(v).map(Some))?;
    keys.set("user", &mut config.user, |v| value::user(v).map(Some))?;
    keys.set("pass", &mut config.pass, value::pass)?;
    keys.set("socket", &mut config.socket, value::socket)?;
    keys.set("xdp_mode", &mut config.xdp_mode, value::xdp_mode)?;
    keys.set("bind_mode", &mut config.bind_mode, value::bind_mode)?;
    keys.set("frame_size", &mut config.frame_size, |v| value::auto(v, value::frame_size))?;
    keys.set("rx_ring", &mut config.rx_ring, |v| value::power_of_two(v, 64..=32768, "frames"))?;
    keys.set("ring_slots", &mut config.ring_slots, |v| {
        value::auto(v, |v| value::power_of_two(v, 64..=1_048_576, "slots per lane and worker"))
    })?;
    keys.set("frames", &mut config.frames, |v| {
        value::auto(v, |v| value::number(v, 128..=2_097_152, "frames per lane"))
    })?;
    keys.set("batch", &mut config.batch, |v| value::number(v, 1..=64, "packets"))?;
    keys.set("hash_key", &mut config.hash_key, |v| value::hash_key(v).map(Some))?;
    keys.set("start_timeout", &mut config.start_timeout, |v| value::duration(v, ms(100)..=ms(600_000)))?;
    keys.set("stop_timeout", &mut config.stop_timeout, |v| value::duration(v, ms(0)..=ms(600_000)))?;
    let restart = &mut config.restart;
    keys.set("restart", &mut restart.policy, value::restart)?;
    keys.set("restart_delay", &mut restart.delay, |v| value::duration(v, ms(1)..=ms(60_000)))?;
    keys.set("start_limit_burst", &mut restart.limit_burst, |v| value::number(v, 1..=1_000_000, "starts"))?;
    keys.set("start_limit_interval", &mut restart.limit_interval, |v| {
        value::duration(v, ms(1)..=ms(86_400_000))
    })?;
    keys.set("hang_timeout", &mut config.hang_timeout, |v| value::duration(v, ms(0)..=ms(3_600_000)))?;
    keys.set("survive", &mut config.survive, value::truth)?;
    keys.set("on_loss", &mut config.on_loss, value::on_loss)?;
    keys.set("hold_timeout", &mut config.hold_timeout, |v| value::duration(v, ms(1)..=ms(3_600_000)))?;
    keys.set("on_empty", &mut config.on_empty, value::on_empty)?;
    keys.set("worker_memory", &mut config.worker_memory, value::memory)?;
    keys.set("worker_processes", &mut config.worker_processes, |v| {
        value::number(v, 1..=4_194_304, "processes and threads")
    })?;
    keys.set("worker_cpu_weight", &mut config.worker_cpu_weight, |v| {
        value::number(v, 1..=10_000, "a weight; others have 100")
    })?;
    keys.set("worker_sandbox", &mut config.worker_sandbox, value::truth)?;
    keys.set("worker_output", &mut config.worker_output, value::worker_output)?;
    let control = &mut config.control;
    keys.set("control.allow_users", &mut control.allow_users, value::users)?;
    keys.set("control.allow_groups", &mut control.allow_groups, value::groups)?;
    keys.set("control.socket_owner", &mut control.socket_owner, |v| value::owner(v).map(Some))?;
    keys.set("control.socket_mode", &mut control.socket_mode, |v| value::mode(v).map(Some))?;
    keys.set("idle.spin", &mut config.idle.spin, |v| value::duration(v, at_once.clone()))?;
    keys.set("idle.yield", &mut config.idle.yielding, |v| value::duration(v, at_once.clone()))?;
    keys.set("log.level", &mut config.log, value::log_level)?;
    keys.set("log.file", &mut config.log_file, |v| value::log_file(v).map(Some))?;
    Ok(())
}

/// The keys a file sets, with the lines they stand in.
struct Keys<'a> {
    file: &'a str,
    entries: Vec<Entry>,
}

struct Entry {
    key: String,
    line: usize,
    value: Value,
}

impl<'a> Keys<'a> {
    fn read(text: &str, file: &'a str) -> Result<Self, ConfigError> {
        let table = DeTable::parse(text).map_err(|error| ConfigError::Syntax {
            file: file.to_owned(),
            line: line_of(text, error.span().map_or(0, |span| span.start)),
            message: error.message().to_owned(),
        })?;
        let mut entries = Vec::new();
        flatten(text, "", table.get_ref(), &mut entries);
        entries.sort_by_key(|entry| entry.line);
        let keys = Self { file, entries };
        match keys.entries.iter().find(|entry| !KEYS.contains(&entry.key.as_str())) {
            None => Ok(keys),
            Some(entry) if is_table(&entry.key) => Err(keys.wrong(entry, "a table")),
            Some(entry) => Err(ConfigError::UnknownKey {
                key: entry.key.clone(),
                file: file.to_owned(),
                line: entry.line,
                hint: hint(&entry.key),
            }),
        }
    }

    /// Reads `key` into `place`, if the file sets it.
    fn set<T>(
        &mut self,
        key: &str,
        place: &mut T,
        read: impl FnOnce(&Value) -> Read<T>,
    ) -> Result<(), ConfigError> {
        debug_assert!(KEYS.contains(&key), "{key} is missing in KEYS");
        if let Some(entry) = self.entries.iter().find(|entry| entry.key == key) {
            *place = read(&entry.value).map_err(|wanted| self.wrong(entry, &wanted.0))?;
        }
        Ok(())
    }

    fn wrong(&self, entry: &Entry, wanted: &str) -> ConfigError {
        ConfigError::Value {
            key: entry.key.clone(),
            file: self.file.to_owned(),
            line: entry.line,
            found: entry.value.to_string(),
            wanted: wanted.to_owned(),
        }
    }
}

/// Whether known keys lie in a table of this name.
fn is_table(key: &str) -> bool {
    KEYS.iter().any(|known| known.strip_prefix(key).is_some_and(|rest| rest.starts_with('.')))
}

/// Lists the keys of `table` and of the known tables in it, under their full names.
fn flatten(text: &str, prefix: &str, table: &DeTable<'_>, entries: &mut Vec<Entry>) {
    for (name, value) in table {
        let line = line_of(text, name.span().start);
        let name = name.get_ref();
        // A quoted name with a dot in it is no path.
        let name = if name.contains('.') { format!("{name:?}") } else { name.to_string() };
        let key = if prefix.is_empty() { name } else { format!("{prefix}.{name}") };
        match value.get_ref() {
            DeValue::Table(inner) if is_table(&key) => flatten(text, &key, inner, entries),
            value => entries.push(Entry { key, line, value: convert(value) }),
        }
    }
}

fn convert(value: &DeValue<'_>) -> Value {
    match value {
        DeValue::String(text) => Value::Text(text.to_string()),
        DeValue::Integer(integer) => i64::from_str_radix(integer.as_str(), integer.radix())
            .map_or_else(|_| Value::Other(integer.to_string()), Value::Integer),
        DeValue::Array(items) => Value::List(items.iter().map(|item| convert(item.get_ref())).collect()),
        DeValue::Float(float) => Value::Other(float.as_str().to_owned()),
        DeValue::Boolean(truth) => Value::Truth(*truth),
        DeValue::Datetime(datetime) => Value::Other(datetime.to_string()),
        DeValue::Table(_) => Value::Other("a table".to_owned()),
    }
}

/// The line, from 1, that byte `offset` of `text` lies in.
fn line_of(text: &str, offset: usize) -> usize {
    1 + text.bytes().take(offset).filter(|&byte| byte == b'\n').count()
}

/// The known key that was probably meant, or all of them.
fn hint(unknown: &str) -> String {
    let last = |key: &str| key.rsplit('.').next().unwrap_or_default().to_owned();
    let likeness = |known: &str| {
        strsim::jaro_winkler(unknown, known).max(strsim::jaro_winkler(&last(unknown), &last(known)))
    };
    let nearest = KEYS.into_iter().max_by(|a, b| likeness(a).total_cmp(&likeness(b)));
    match nearest.filter(|known| likeness(known) > 0.75) {
        Some(known) => format!("did you mean `{known}`?"),
        None => format!("the known keys are {}", KEYS.join(", ")),
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;

    fn error(text: &str) -> String {
        apply(&mut Config::defaults(), text, "xfan.toml").unwrap_err().to_string()
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
        let mut config = Config::defaults();
        apply(&mut config, "rx_ring = 4_096\nframes = 0x8000\n", "f").unwrap();
        assert_eq!((config.rx_ring, config.frames), (4096, Some(32768)));
    }

    #[test]
    fn every_known_key_is_read() {
        for key in KEYS {
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
            let _ = apply(&mut Config::defaults(), &text, "f");
        }
    }
}

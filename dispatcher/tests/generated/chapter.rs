//! `docs/configuration.md`: the configuration chapter.

use std::fmt::Write as _;

use xfan::config::table::{Initial, Setting};
use xfan::config::{Config, Section};

use crate::text::{usage, wrap};

const HEAD: &str = "\
<!-- Generated from dispatcher/src/config/settings.rs. Do not edit. -->

# Configuration

`xfan run -c FILE` reads a TOML file. The most common settings also have a flag. Flags win over the
file, and the file wins over the defaults. Only the interface must be given.

`xfan check` takes the same flags as `xfan run`. It validates every setting without starting, and
prints the settings that `xfan run` would use as a complete file. An unknown key is an error that
names the nearest known key. A value of the wrong type or beyond its limits is an error that names
the key, the file, the line and the limits.

[`xfan.toml`](xfan.toml) is a file with every setting and its default. The manual pages are
[`xfan.8`](man/xfan.8) and [`xfan.toml.5`](man/xfan.toml.5). [`completions`](completions) holds
completions for bash, zsh and fish.
";

/// The frame budget's own documentation: its formula stands there and nowhere else.
const BUDGET: &str = include_str!("../../src/config/budget.rs");

pub fn render() -> String {
    let config = Config::default();
    let mut chapter = String::from(HEAD);
    let _ = writeln!(chapter, "\n{}", liveness(&config));
    overview(&config, &mut chapter);
    for section in config.sections() {
        let _ = writeln!(chapter, "\n## {}", section.title());
        for paragraph in section.help() {
            let _ = write!(chapter, "\n{}", wrap("", &paragraph));
        }
        let _ = match section.table() {
            "" => writeln!(chapter, "\nThese keys stand at the top of the file, before all tables."),
            table => writeln!(chapter, "\nThese keys stand in the table `[{table}]`."),
        };
        for setting in section.settings() {
            describe(section, setting, &mut chapter);
        }
    }
    chapter += "\n## Packet memory\n\n";
    for line in BUDGET.lines().map_while(|line| line.strip_prefix("//!")) {
        let _ = writeln!(chapter, "{}", line.strip_prefix(' ').unwrap_or(line));
    }
    chapter
}

/// Which settings can change while xfan runs.
pub fn liveness(config: &Config) -> String {
    let mut live = Vec::new();
    for section in config.sections() {
        let settings = section.settings().iter().filter(|setting| setting.live());
        live.extend(settings.map(|setting| format!("`{}`", section.full_key(setting))));
    }
    if live.is_empty() {
        "No setting can change while xfan runs: restart xfan to apply a new value.".to_owned()
    } else {
        wrap("", &format!("These settings can change while xfan runs: {}.", live.join(", ")))
    }
}

fn overview(config: &Config, chapter: &mut String) {
    *chapter += "\n## All settings\n\nkey | default | flag\n---|---|---\n";
    for section in config.sections() {
        for setting in section.settings() {
            let key = section.full_key(setting);
            let anchor: String = key.chars().filter(|c| *c != '.').collect();
            let flag = setting.flag().and_then(|flag| usage(&key, flag).into_iter().next());
            let flag = flag.map_or(String::new(), |flag| format!("`{flag}`"));
            let row = format!("[`{key}`](#{anchor}) | {} | {flag}", default(setting));
            let _ = writeln!(chapter, "{}", row.trim_end());
        }
    }
}

fn default(setting: &Setting) -> String {
    match setting.initial() {
        Initial::Value(value) => format!("`{value}`"),
        Initial::Chosen { how, .. } => how.to_owned(),
        Initial::Required { .. } => "required".to_owned(),
    }
}

fn describe(section: &dyn Section, setting: &Setting, chapter: &mut String) {
    let key = section.full_key(setting);
    let _ = writeln!(chapter, "\n### `{key}`");
    for paragraph in setting.help() {
        let _ = write!(chapter, "\n{}", wrap("", &paragraph));
    }
    let mut facts = vec![format!("Value: {}", setting.wanted()), format!("Default: {}", default(setting))];
    if let Initial::Chosen { example, .. } | Initial::Required { example } = setting.initial() {
        facts.push(format!("Example: `{} = {example}`", setting.key()));
    }
    if let Some(flag) = setting.flag() {
        let usage: Vec<_> = usage(&key, flag).iter().map(|usage| format!("`{usage}`")).collect();
        facts.push(format!("Flag: {}", usage.join(", ")));
    }
    if setting.live() {
        facts.push("Can change while xfan runs".to_owned());
    }
    *chapter += "\n";
    for fact in facts {
        let wrapped = wrap("  ", &fact);
        let _ = write!(chapter, "- {}", wrapped.trim_start());
    }
}

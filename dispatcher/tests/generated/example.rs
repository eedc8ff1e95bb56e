//! `docs/xfan.toml`: a configuration file with every setting.

use std::fmt::Write as _;

use xfan::config::table::Initial;
use xfan::config::{Config, Section};

use crate::text::wrap;

const HEAD: &str = "\
# Every setting of xfan. A setting behind # has its default, unless its comment says \"for example\".
#
# Flags win over this file. `xfan check -c FILE` validates a file, and prints the settings that
# xfan would use. docs/configuration.md explains more.
#
# Generated from dispatcher/src/config/settings.rs.
";

pub fn render() -> String {
    let mut file = String::from(HEAD);
    for section in Config::default().sections() {
        let _ = write!(file, "\n\n{}", wrap("# ", &format!("=== {} ===", section.title())));
        for paragraph in section.help() {
            file += &wrap("# ", &paragraph);
        }
        if !section.table().is_empty() {
            let _ = writeln!(file, "[{}]", section.table());
        }
        settings(section, &mut file);
    }
    file
}

fn settings(section: &dyn Section, file: &mut String) {
    for setting in section.settings() {
        let key = setting.key();
        let _ = write!(file, "\n{}", wrap("# ", &setting.help().join(" ")));
        *file += &wrap("# ", &format!("Value: {}.", setting.wanted()));
        let _ = match setting.initial() {
            Initial::Required { example } => {
                writeln!(file, "# Required here or on the command line.\n{key} = {example}")
            }
            Initial::Value(value) => writeln!(file, "#{key} = {value}"),
            Initial::Chosen { how, example } => {
                *file += &wrap("# ", &format!("Default: {how}; for example:"));
                writeln!(file, "#{key} = {example}")
            }
        };
    }
}

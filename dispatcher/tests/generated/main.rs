//! The generated documentation: each file must be what the table of settings and the command line
//! say today. To write the files anew: `XFAN_BLESS=1 cargo test -p xfan --test generated`.

mod chapter;
mod example;
mod man;
mod text;

use std::path::{Path, PathBuf};

use clap::CommandFactory as _;
use clap_complete::Shell;
use xfan::cli::Cli;
use xfan::config::Config;
use xfan::config::table::Initial;

const BLESS: &str = "XFAN_BLESS=1 cargo test -p xfan --test generated";

fn root() -> PathBuf {
    Path::new(env!("CARGO_MANIFEST_DIR")).join("..")
}

fn completions(shell: Shell) -> String {
    let mut script = Vec::new();
    clap_complete::generate(shell, &mut Cli::command(), "xfan", &mut script);
    String::from_utf8(script).unwrap()
}

/// The files that people read.
fn pages() -> Vec<(&'static str, String)> {
    vec![
        ("docs/xfan.toml", example::render()),
        ("docs/configuration.md", chapter::render()),
        ("docs/man/xfan.8", man::command()),
        ("docs/man/xfan.toml.5", man::file()),
    ]
}

fn files() -> Vec<(&'static str, String)> {
    let mut files = pages();
    files.push(("docs/completions/xfan.bash", completions(Shell::Bash)));
    files.push(("docs/completions/_xfan", completions(Shell::Zsh)));
    files.push(("docs/completions/xfan.fish", completions(Shell::Fish)));
    files
}

#[test]
fn every_generated_file_is_up_to_date() {
    for (name, content) in files() {
        let path = root().join(name);
        if std::env::var_os("XFAN_BLESS").is_some() {
            std::fs::create_dir_all(path.parent().unwrap()).unwrap();
            std::fs::write(path, content).unwrap();
            continue;
        }
        let found = std::fs::read_to_string(&path).unwrap_or_default();
        let line = 1 + found.lines().zip(content.lines()).take_while(|(a, b)| a == b).count();
        assert!(found == content, "{name} is stale from line {line} on. To generate it anew: {BLESS}");
    }
}

#[test]
fn no_line_is_longer_than_100_columns() {
    for (name, content) in pages() {
        for line in content.lines() {
            assert!(line.chars().count() <= 100, "{name}: {line}");
        }
    }
}

#[test]
fn every_key_and_every_flag_is_documented() {
    let pages = pages();
    let of = |name| &pages.iter().find(|(page, _)| *page == name).unwrap().1;
    for section in Config::default().sections() {
        for setting in section.settings() {
            let key = section.full_key(setting);
            assert!(of("docs/configuration.md").contains(&format!("\n### `{key}`\n")), "{key}");
            assert!(of("docs/xfan.toml").contains(&format!("{} = ", setting.key())), "{key}");
            assert!(of("docs/man/xfan.toml.5").contains(&format!("\n\\fB{key}\\fR = ")), "{key}");
        }
    }
    let mut command = Cli::command();
    command.build();
    for command in command.get_subcommands() {
        for flag in command.get_arguments().filter_map(|flag| flag.get_long()) {
            let flag = format!("\\-\\-{}", flag.replace('-', "\\-"));
            assert!(of("docs/man/xfan.8").contains(&flag), "{flag}");
        }
    }
}

/// `docs/xfan.toml` as an operator would read it, and with every setting in it switched on.
#[test]
fn the_example_file_has_every_key_and_its_default() {
    let text = std::fs::read_to_string(root().join("docs/xfan.toml")).unwrap();
    let defaults = Config::from_toml_str("interface = 'eth1'", "f").unwrap();
    assert_eq!(Config::from_toml_str(&text, "docs/xfan.toml").unwrap(), defaults);

    let uncomment =
        |line: &str| line.strip_prefix('#').filter(|rest| !rest.starts_with(' ')).map(str::to_owned);
    let all: Vec<_> = text.lines().map(|line| uncomment(line).unwrap_or_else(|| line.to_owned())).collect();
    let all = all.join("\n");
    let mut full = Config::from_toml_str(&all, "docs/xfan.toml").unwrap();
    (full.primary.cores, full.primary.hash_key, full.group.user) = (None, None, None);
    (full.control.socket_owner, full.control.socket_mode, full.log.file) = (None, None, None);
    assert_eq!(full, defaults);
    let table: toml::Table = all.parse().unwrap();
    for section in defaults.sections() {
        for setting in section.settings() {
            let table = match section.table() {
                "" => &table,
                name => table[name].as_table().unwrap(),
            };
            assert!(table.contains_key(setting.key()), "docs/xfan.toml lacks {}", setting.key());
            if let Initial::Value(text) = setting.initial() {
                let value: toml::Value = text.parse().unwrap();
                assert_eq!(table[setting.key()], value, "{}", setting.key());
            }
        }
    }
}

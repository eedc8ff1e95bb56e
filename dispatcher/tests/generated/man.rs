//! `docs/man/`: the manual pages.

use std::fmt::Write as _;

use clap::{Command, CommandFactory as _};
use clap_mangen::Man;
use clap_mangen::roff::{Inline, Roff, bold, roman};
use xfan::cli::{Cli, EXAMPLES};
use xfan::config::table::{Initial, Setting};
use xfan::config::{Config, Section};
use xfan::exit::Exit;

use crate::chapter::liveness;
use crate::text::{usage, wrap};

const GENERATED: &str = ".\\\" Generated from dispatcher/src/config/settings.rs and cli.rs. Do not edit.\n";

const APOSTROPHE: &str = ".ie \\n(.g .ds Aq \\(aq\n.el .ds Aq '\n";

/// `xfan.8`
pub fn command() -> String {
    let mut page = section(&Man::new(Cli::command()).section("8"), Man::render_title);
    for part in [Man::render_name_section, Man::render_synopsis_section, Man::render_description_section] {
        page += &section(&Man::new(Cli::command()), part);
    }
    page += &section(&Man::new(Cli::command()), Man::render_options_section);
    page += ".SH COMMANDS\n";
    let mut command =
        Cli::command().disable_help_flag(true).disable_version_flag(true).disable_help_subcommand(true);
    command.build();
    let run = command.find_subcommand("run").cloned().unwrap();
    let options_of_run = section(&Man::new(run), Man::render_options_section);
    for command in leaves(&command) {
        let name = command.get_bin_name().unwrap_or_default().to_owned();
        let man = Man::new(command);
        let _ = writeln!(page, ".SS {name}");
        page += &body(&section(&man, Man::render_description_section));
        page += ".PP\n";
        page += &body(&section(&man, Man::render_synopsis_section));
        let options = section(&man, Man::render_options_section);
        if options == options_of_run && name != "xfan run" {
            page += ".PP\nThe options are those of \\fBxfan run\\fR.\n";
        } else {
            page += &body(&options);
        }
    }
    let mut roff = Roff::new();
    roff.control("SH", ["SIGNALS"]);
    item(
        &mut roff,
        vec![bold("SIGINT"), roman(", "), bold("SIGTERM")],
        &["End xfan run: traffic goes back to the kernel, workers finish their packets, and the totals are \
         printed. A second signal kills the workers that have not finished."],
    );
    item(&mut roff, vec![bold("SIGHUP")], &["Makes xfan run open its log files anew."]);
    roff.control("SH", ["EXIT STATUS"]);
    for exit in Exit::ALL {
        item(&mut roff, vec![bold(exit.code().to_string())], &[exit.meaning()]);
    }
    roff.control("SH", ["EXAMPLES"]);
    roff.control("nf", []);
    for line in EXAMPLES.lines().skip(1) {
        roff.text([roman(line)]);
    }
    roff.control("fi", []);
    roff.control("SH", ["SEE ALSO"]);
    roff.text([bold("xfan.toml"), roman("(5)")]);
    finish(&(page + &roff.to_roff()))
}

/// `xfan.toml.5`
pub fn file() -> String {
    let config = Config::default();
    let version = format!("xfan {}", env!("CARGO_PKG_VERSION"));
    let mut roff = Roff::new();
    roff.control("TH", ["xfan.toml", "5", "", version.as_str(), ""]);
    roff.control("SH", ["NAME"]);
    roff.text([roman("xfan.toml - configuration file of xfan")]);
    roff.control("SH", ["SYNOPSIS"]);
    roff.text([bold("xfan run -c"), roman(" FILE")]);
    roff.control("SH", ["DESCRIPTION"]);
    for paragraph in [
        "The file is TOML. Every setting has a default except the interface. Flags win over the file.",
        "`xfan check -c FILE` validates a file without starting, and prints the settings that xfan would use.",
        &liveness(&config),
    ] {
        roff.control("PP", []);
        roff.text([roman(paragraph)]);
    }
    for section in config.sections() {
        let title = section.title().to_uppercase();
        match section.table() {
            "" => roff.control("SH", [title.as_str()]),
            table => roff.control("SH", [format!("{title}: TABLE [{table}]").as_str()]),
        };
        for paragraph in section.help() {
            roff.control("PP", []);
            roff.text([roman(paragraph)]);
        }
        for setting in section.settings() {
            describe(section, setting, &mut roff);
        }
    }
    roff.control("SH", ["SEE ALSO"]);
    roff.text([bold("xfan"), roman("(8)")]);
    finish(&roff.to_roff())
}

fn describe(section: &dyn Section, setting: &Setting, roff: &mut Roff) {
    let key = section.full_key(setting);
    let (shown, default) = match setting.initial() {
        Initial::Value(value) => (value, format!("Default: {value}.")),
        Initial::Chosen { how, example } => (example, format!("Default: {how}.")),
        Initial::Required { example } => (example, "Required.".to_owned()),
    };
    let mut paragraphs = setting.help();
    paragraphs.push(format!("Value: {}. {default}", setting.wanted()));
    if let Some(flag) = setting.flag() {
        paragraphs.push(format!("Flag: `{}`.", usage(&key, flag).join("`, `")));
    }
    let paragraphs: Vec<_> = paragraphs.iter().map(String::as_str).collect();
    item(roff, vec![bold(key), roman(" = "), roman(shown)], &paragraphs);
}

/// A tagged paragraph, and more paragraphs below the same tag.
fn item(roff: &mut Roff, tag: Vec<Inline>, paragraphs: &[&str]) {
    roff.control("TP", []);
    roff.text(tag);
    for (number, paragraph) in paragraphs.iter().enumerate() {
        if number > 0 {
            roff.control("IP", []);
        }
        roff.text([roman(*paragraph)]);
    }
}

/// Commands without subcommands.
fn leaves(command: &Command) -> Vec<Command> {
    match command.get_subcommands().count() {
        0 => vec![command.clone()],
        _ => command.get_subcommands().flat_map(leaves).collect(),
    }
}

/// One section as clap_mangen renders it.
fn section(man: &Man, render: fn(&Man, &mut dyn std::io::Write) -> std::io::Result<()>) -> String {
    let mut roff = Vec::new();
    render(man, &mut roff).unwrap();
    String::from_utf8(roff).unwrap()
}

/// A section without its heading.
fn body(section: &str) -> String {
    let lines = section.lines().filter(|line| !line.starts_with(".SH "));
    lines.map(|line| format!("{line}\n")).collect()
}

/// Shows code in bold, and breaks long lines, which roff fills anew.
fn finish(page: &str) -> String {
    let mut finished = String::from(GENERATED);
    // The definition of an apostrophe, which each section brings along, is needed once.
    let mut page = page.replace(APOSTROPHE, "");
    page.insert_str(0, APOSTROPHE);
    for line in page.lines() {
        let mut parts = line.split('`');
        let mut text = parts.next().unwrap_or_default().to_owned();
        while let (Some(code), Some(rest)) = (parts.next(), parts.next()) {
            let _ = write!(text, "\\fB{code}\\fR{rest}");
        }
        if line.starts_with('.') {
            let _ = writeln!(finished, "{}", text.trim_end());
        } else {
            finished += &wrap("", text.trim_end());
        }
    }
    finished
}

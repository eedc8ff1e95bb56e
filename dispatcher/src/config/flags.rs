//! The settings that the command line can give: one flag for each setting that has one.

use std::ffi::OsStr;
use std::path::PathBuf;

use clap::builder::{PossibleValue, TypedValueParser};
use clap::{Arg, ArgAction, ArgMatches, Args, Command, FromArgMatches, ValueHint};

use super::table::{Flag, Initial, Setting, Takes};
use super::value::{self, Read, Value};
use super::{Config, ConfigError};

/// The flags of `xfan run`.
#[derive(Clone, Debug, Default)]
pub struct Flags {
    /// The configuration file.
    pub config: Option<PathBuf>,
    /// Keys with the values given.
    given: Vec<(String, Value)>,
}

/// The flags that say which threads run where.
#[derive(Clone, Debug)]
pub struct PlacementFlags(pub Flags);

/// The settings that say which threads run where.
const PLACEMENT: [&str; 4] = ["interface", "queues", "cores", "workers"];

impl Flags {
    /// Sets what was given.
    ///
    /// # Errors
    /// [`ConfigError::Argument`]. The parser has checked single values already.
    pub(super) fn apply(&self, config: &mut Config) -> Result<(), ConfigError> {
        for (key, value) in &self.given {
            config.set(key, value).map_err(|wanted| ConfigError::Argument {
                key: key.clone(),
                found: value.to_string(),
                wanted: wanted.0,
            })?;
        }
        Ok(())
    }
}

/// Calls `with` for every setting that has a flag: with its key, the setting and the flag.
fn for_each_flag(mut with: impl FnMut(String, &'static Setting, Flag)) {
    for section in Config::default().sections() {
        for setting in section.settings() {
            if let Some(flag) = setting.flag() {
                with(section.full_key(setting), setting, flag);
            }
        }
    }
}

/// Adds the flags of the settings that `wanted` accepts, and `--config`.
fn augment(mut command: Command, wanted: impl Fn(&str) -> bool) -> Command {
    for_each_flag(|key, setting, flag| {
        if wanted(&key) {
            command = std::mem::take(&mut command).arg(argument(&key, setting, flag));
        }
    });
    command.arg(
        Arg::new("config")
            .short('c')
            .long("config")
            .value_name("FILE")
            .help("The TOML file with these and more settings; flags win over it")
            .value_parser(clap::value_parser!(PathBuf))
            .value_hint(ValueHint::FilePath),
    )
}

fn argument(key: &str, setting: &'static Setting, flag: Flag) -> Arg {
    let default = match setting.initial() {
        Initial::Value("[]") => "default: none".to_owned(),
        Initial::Value(text) => format!("default: {}", text.trim_matches('"')),
        Initial::Chosen { how, .. } => format!("default: {how}"),
        Initial::Required { .. } => "required here or in the file".to_owned(),
    };
    let mut paragraphs = setting.help();
    let brief = format!("{} [{default}]", paragraphs[0].trim_end_matches('.'));
    paragraphs.push(match flag.takes {
        Takes::One => format!("It must be {}. [{default}]", setting.wanted()),
        Takes::Items | Takes::Rest => format!("[{default}]"),
    });
    let arg = Arg::new(key.to_owned()).value_name(flag.value);
    let arg = arg.help(brief).long_help(paragraphs.join("\n\n"));
    let arg = arg.value_parser(Parser(setting, flag)).hide_possible_values(true);
    let named =
        |arg: Arg| arg.long(key.replace(['_', '.'], "-")).short(flag.short).visible_aliases(flag.alias);
    match flag.takes {
        Takes::One => named(arg),
        Takes::Items => named(arg).action(ArgAction::Append),
        Takes::Rest => arg.last(true).num_args(1..),
    }
}

/// Reads the argument of a flag.
#[derive(Clone)]
struct Parser(&'static Setting, Flag);

impl TypedValueParser for Parser {
    type Value = Value;

    fn parse_ref(&self, command: &Command, arg: Option<&Arg>, raw: &OsStr) -> Result<Value, clap::Error> {
        let &Self(setting, flag) = self;
        let read = move |text: &str| read(setting, flag.takes, text);
        read.parse_ref(command, arg, raw)
    }

    fn possible_values(&self) -> Option<Box<dyn Iterator<Item = PossibleValue> + '_>> {
        let choices = (self.0.kind)().choices;
        (!choices.is_empty()).then(|| Box::new(choices.into_iter().map(PossibleValue::new)) as _)
    }
}

/// Checks an argument as the value of a setting or an item of it. Where a text is not valid, a
/// number may be.
fn read(setting: &Setting, takes: Takes, text: &str) -> Read<Value> {
    let kind = (setting.kind)();
    let value = Value::Text(text.to_owned());
    match takes {
        // It is checked as a whole.
        Takes::Rest => Ok(value),
        Takes::Items => kind.read(&Value::List(vec![value.clone()])).map(|()| value),
        Takes::One => kind.read(&value).map(|()| value).or_else(|wanted| {
            let number = Value::Integer(text.parse().map_err(|_| wanted)?);
            kind.read(&number).map(|()| number)
        }),
    }
}

/// What was given of the flags that there are.
fn given(matches: &ArgMatches) -> Flags {
    let mut given = Vec::new();
    for_each_flag(|key, _, flag| {
        // A flag that this command does not have was not given.
        let Some(mut values) = matches.try_get_many(&key).ok().flatten() else { return };
        given.extend(match flag.takes {
            Takes::One => values.next_back().cloned().map(|value| (key, value)),
            Takes::Items | Takes::Rest => Some((key, Value::List(values.cloned().collect()))),
        });
    });
    Flags { config: matches.get_one("config").cloned(), given }
}

impl Args for Flags {
    fn augment_args(command: Command) -> Command {
        augment(command, |_| true)
    }

    fn augment_args_for_update(command: Command) -> Command {
        Self::augment_args(command)
    }
}

impl FromArgMatches for Flags {
    fn from_arg_matches(matches: &ArgMatches) -> Result<Self, clap::Error> {
        Ok(given(matches))
    }

    fn update_from_arg_matches(&mut self, matches: &ArgMatches) -> Result<(), clap::Error> {
        *self = given(matches);
        Ok(())
    }
}

impl Args for PlacementFlags {
    fn augment_args(command: Command) -> Command {
        augment(command, |key| PLACEMENT.contains(&key))
    }

    fn augment_args_for_update(command: Command) -> Command {
        Self::augment_args(command)
    }
}

impl FromArgMatches for PlacementFlags {
    fn from_arg_matches(matches: &ArgMatches) -> Result<Self, clap::Error> {
        Ok(Self(given(matches)))
    }

    fn update_from_arg_matches(&mut self, matches: &ArgMatches) -> Result<(), clap::Error> {
        self.0 = given(matches);
        Ok(())
    }
}

/// Reads the path of a control socket.
pub(crate) fn socket_flag() -> impl Fn(&str) -> Read<PathBuf> + Clone + Send + Sync + 'static {
    |text| value::socket().read(&Value::Text(text.to_owned()))
}

//! How a setting is described: the types behind the tables in [`settings`](super::settings).
//!
//! A [`Section`] is a struct whose fields are settings. The macro `section!` makes, out of one
//! description, the struct with its fields, their defaults and the list of [`Setting`]s. So the
//! name of a field is the key, and its documentation is the help that an operator reads.

use super::value::{Kind, Read, Value};

/// Settings that belong together: those of one interface, of one group of workers and so on.
///
/// A configuration may hold a section several times: each has its own values.
pub trait Section {
    /// Its name, for documentation.
    fn title(&self) -> &'static str;
    /// The TOML table that holds the keys; empty: the keys stand at the top of the file.
    fn table(&self) -> &'static str;
    /// What the section is about, as paragraphs.
    fn help(&self) -> Vec<String>;
    /// What there is to set.
    fn settings(&self) -> &'static [Setting];
    /// Sets the value of a key.
    ///
    /// # Errors
    /// What the value must be instead.
    fn set(&mut self, key: &str, value: &Value) -> Read<()>;
    /// The value of a key as TOML; `None` if it is not set.
    fn show(&self, key: &str) -> Option<String>;

    /// The name of a setting of this section with its table, such as `idle.spin`.
    fn full_key(&self, setting: &Setting) -> String {
        match self.table() {
            "" => setting.key().to_owned(),
            table => format!("{table}.{}", setting.key()),
        }
    }
}

/// One setting, apart from its value.
pub struct Setting {
    pub(super) name: &'static str,
    pub(super) help: &'static [&'static str],
    pub(super) about: About,
    pub(super) kind: fn() -> Kind<()>,
}

impl Setting {
    /// Its key, without the table.
    #[must_use]
    pub fn key(&self) -> &'static str {
        key(self.name)
    }

    /// What it does: the first paragraph is one sentence.
    #[must_use]
    pub fn help(&self) -> Vec<String> {
        paragraphs(self.help)
    }

    /// Type, limits and unit of its value: completes "it must be …".
    #[must_use]
    pub fn wanted(&self) -> String {
        (self.kind)().wanted
    }

    /// What it is if nobody sets it.
    #[must_use]
    pub const fn initial(&self) -> Initial {
        self.about.initial
    }

    /// The flag that sets it.
    #[must_use]
    pub const fn flag(&self) -> Option<Flag> {
        self.about.flag
    }

    /// Whether it can change while xfan runs.
    #[must_use]
    pub const fn live(&self) -> bool {
        self.about.live
    }
}

/// What a setting is if nobody sets it.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Initial {
    /// This value, as TOML.
    Value(&'static str),
    /// What xfan finds at start.
    Chosen {
        /// How it is found.
        how: &'static str,
        /// A value, as TOML.
        example: &'static str,
    },
    /// Nothing: it must be set.
    Required {
        /// A value, as TOML.
        example: &'static str,
    },
}

/// The flag of a setting. Its long name is the key, with `-` for `_` and `.`.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Flag {
    /// The short name.
    pub short: Option<char>,
    /// Another long name.
    pub alias: Option<&'static str>,
    /// What help calls the value.
    pub value: &'static str,
    /// How many values it takes.
    pub takes: Takes,
}

/// How many values a flag takes.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Takes {
    /// The whole value.
    One,
    /// One item of a list; the flag may be repeated.
    Items,
    /// All arguments after `--`, without a flag.
    Rest,
}

/// Default, flag and liveness of a setting.
#[derive(Clone, Copy, Debug)]
pub(super) struct About {
    initial: Initial,
    flag: Option<Flag>,
    live: bool,
}

/// A setting with a default, as TOML.
pub(super) const fn default(value: &'static str) -> About {
    About { initial: Initial::Value(value), flag: None, live: false }
}

/// A setting whose value is found at start unless it is set.
pub(super) const fn chosen(how: &'static str, example: &'static str) -> About {
    About { initial: Initial::Chosen { how, example }, flag: None, live: false }
}

/// A setting that must be set.
pub(super) const fn required(example: &'static str) -> About {
    About { initial: Initial::Required { example }, flag: None, live: false }
}

impl About {
    /// Gives it a flag.
    pub const fn flag(self, value: &'static str) -> Self {
        Self { flag: Some(Flag { short: None, alias: None, value, takes: Takes::One }), ..self }
    }

    /// Gives it a flag with a short name.
    pub const fn short(self, short: char, value: &'static str) -> Self {
        Self { flag: Some(Flag { short: Some(short), alias: None, value, takes: Takes::One }), ..self }
    }

    /// Gives it a flag with another name.
    pub const fn alias(self, alias: &'static str, value: &'static str) -> Self {
        Self { flag: Some(Flag { short: None, alias: Some(alias), value, takes: Takes::One }), ..self }
    }

    /// Gives it a flag for each item of its list.
    pub const fn items(self, value: &'static str) -> Self {
        Self { flag: Some(Flag { short: None, alias: None, value, takes: Takes::Items }), ..self }
    }

    /// Lets it be the arguments after `--`.
    pub const fn rest(self, value: &'static str) -> Self {
        Self { flag: Some(Flag { short: None, alias: None, value, takes: Takes::Rest }), ..self }
    }
}

/// A field's name as a key: `yield` is a word of the language, and is written `r#yield`.
pub(super) fn key(name: &'static str) -> &'static str {
    name.strip_prefix("r#").unwrap_or(name)
}

/// The value of a setting that nobody sets.
///
/// # Panics
/// The default is not valid. A test reads every default.
pub(super) fn initial<T: 'static>(kind: Kind<T>, about: About) -> T {
    match about.initial {
        Initial::Value(text) => {
            let value = toml::de::DeValue::parse(text).expect("a default is TOML");
            kind.read(&value.get_ref().into()).expect("a default is valid")
        }
        Initial::Chosen { .. } | Initial::Required { .. } => {
            kind.unset.expect("a setting without a default can be unset")
        }
    }
}

/// Joins the lines of a doc comment to paragraphs.
pub(super) fn paragraphs(lines: &[&str]) -> Vec<String> {
    let lines = lines.iter().map(|line| line.trim());
    let mut paragraphs = vec![String::new()];
    for line in lines {
        match paragraphs.last_mut() {
            Some(last) if !line.is_empty() => {
                if !last.is_empty() {
                    last.push(' ');
                }
                last.push_str(line);
            }
            _ => paragraphs.push(String::new()),
        }
    }
    paragraphs
}

/// Describes a section:
///
/// ```text
/// /// What it is about.
/// Name, "Title", "table":
///     /// What the setting does, in one sentence.
///     ///
///     /// More about it.
///     key: Type = kind, default;
/// ```
macro_rules! section {
    (
        $(#[doc = $about:literal])+
        $name:ident, $title:literal, $table:literal:
        $( $(#[doc = $help:literal])+ $key:ident: $type:ty = $kind:expr, $default:expr; )+
    ) => {
        $(#[doc = $about])+
        #[derive(Clone, Debug, PartialEq, Eq)]
        pub struct $name {
            $( $(#[doc = $help])+ pub $key: $type, )+
        }

        impl Default for $name {
            fn default() -> Self {
                Self { $( $key: $crate::config::table::initial($kind, $default), )+ }
            }
        }

        impl $crate::config::table::Section for $name {
            fn title(&self) -> &'static str {
                $title
            }

            fn table(&self) -> &'static str {
                $table
            }

            fn help(&self) -> Vec<String> {
                $crate::config::table::paragraphs(&[$($about),+])
            }

            fn settings(&self) -> &'static [$crate::config::table::Setting] {
                const SETTINGS: &[$crate::config::table::Setting] = &[$(
                    $crate::config::table::Setting {
                        name: stringify!($key),
                        help: &[$($help),+],
                        about: $default,
                        kind: || $crate::config::value::Kind::<$type>::untyped($kind),
                    }
                ),+];
                SETTINGS
            }

            fn set(&mut self, key: &str, value: &$crate::config::value::Value) -> $crate::config::value::Read<()> {
                $( if key == $crate::config::table::key(stringify!($key)) {
                    self.$key = $kind.read(value)?;
                } )+
                Ok(())
            }

            fn show(&self, key: &str) -> Option<String> {
                $( if key == $crate::config::table::key(stringify!($key)) {
                    return $kind.show(&self.$key);
                } )+
                None
            }
        }
    };
}
pub(super) use section;

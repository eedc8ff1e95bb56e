//! Kinds of values: what a value must be, how it is read, and how it is written.
//!
//! The file and the command line share these readers, so each limit stands in one place.

use std::fmt::{self, Display};
use std::ops::RangeInclusive;
use std::path::PathBuf;
use std::time::Duration;

use toml::de::DeValue;

use super::list::{format_list, parse_list};
use super::{Owner, PassRule, Queues, WorkerOutput};
use crate::text::escaped_json;

/// The largest queue number that a setting can name.
pub const MAX_QUEUE: usize = 4095;
/// The largest CPU number: Linux can be built for 8192 CPUs.
pub const MAX_CPU: usize = 8191;
/// The size of `sun_path`, which must hold the path of a socket and a final zero.
const SOCKET_PATH_BYTES: usize = 108;

const MIB: u64 = 1 << 20;
const GIB: u64 = 1 << 30;

/// A value as written, whatever its type.
#[derive(Clone, Debug, PartialEq)]
pub enum Value {
    /// A whole number.
    Integer(i64),
    /// A text.
    Text(String),
    /// An array.
    List(Vec<Self>),
    /// True or false.
    Truth(bool),
    /// A type that no setting takes, as it should be shown.
    Other(String),
}

impl Display for Value {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::Integer(number) => number.fmt(f),
            Self::Text(text) => write!(f, "{text:?}"),
            Self::Truth(truth) => truth.fmt(f),
            Self::List(items) => {
                f.write_str("[")?;
                for (position, item) in items.iter().enumerate() {
                    write!(f, "{}{item}", if position == 0 { "" } else { ", " })?;
                }
                f.write_str("]")
            }
            Self::Other(shown) => f.write_str(shown),
        }
    }
}

impl From<&DeValue<'_>> for Value {
    fn from(value: &DeValue<'_>) -> Self {
        match value {
            DeValue::String(text) => Self::Text(text.to_string()),
            DeValue::Integer(integer) => i64::from_str_radix(integer.as_str(), integer.radix())
                .map_or_else(|_| Self::Other(integer.to_string()), Self::Integer),
            DeValue::Array(items) => Self::List(items.iter().map(|item| item.get_ref().into()).collect()),
            DeValue::Float(float) => Self::Other(float.as_str().to_owned()),
            DeValue::Boolean(truth) => Self::Truth(*truth),
            DeValue::Datetime(datetime) => Self::Other(datetime.to_string()),
            DeValue::Table(_) => Self::Other("a table".to_owned()),
        }
    }
}

/// What a value must be: a phrase that completes the sentence "it must be …".
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Wanted(pub String);

impl Display for Wanted {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "it must be {}", self.0)
    }
}

impl std::error::Error for Wanted {}

/// The result of reading one value.
pub type Read<T> = Result<T, Wanted>;

type Reader<T> = Box<dyn Fn(&Value) -> Read<T>>;
/// Writes a value as TOML; `None`: the setting is not set.
type Shower<T> = Box<dyn Fn(&T) -> Option<String>>;

/// A kind of value: its type, its limits and its unit.
pub struct Kind<T> {
    /// What a value must be: completes "it must be …".
    pub wanted: String,
    /// The texts that are valid, where the kind lists them.
    pub choices: Vec<&'static str>,
    /// The value of a setting that is not set, where the kind has one.
    pub unset: Option<T>,
    read: Reader<T>,
    show: Shower<T>,
}

impl<T: 'static> Kind<T> {
    /// A kind that `read` accepts (else `None`) and that `show` writes as TOML.
    fn new(
        wanted: impl Into<String>,
        read: impl Fn(&Value) -> Option<T> + 'static,
        show: impl Fn(&T) -> String + 'static,
    ) -> Self {
        let wanted = wanted.into();
        let otherwise = Wanted(wanted.clone());
        Self {
            wanted,
            choices: Vec::new(),
            unset: None,
            read: Box::new(move |value| read(value).ok_or_else(|| otherwise.clone())),
            show: Box::new(move |value| Some(show(value))),
        }
    }

    /// The same kind, with a value for settings that are not set. That value is not shown.
    fn or_unset(self, unset: T) -> Self
    where
        T: Clone + PartialEq,
    {
        let (show, hidden) = (self.show, unset.clone());
        let show = Box::new(move |value: &T| if *value == hidden { None } else { show(value) });
        Self { unset: Some(unset), show, ..self }
    }

    /// Reads a value.
    ///
    /// # Errors
    /// What the value must be instead.
    pub fn read(&self, value: &Value) -> Read<T> {
        (self.read)(value)
    }

    /// The same kind without the type of its values: it only checks them.
    pub fn untyped(self) -> Kind<()> {
        let Self { wanted, choices, read, .. } = self;
        let read = Box::new(move |value: &Value| read(value).map(drop));
        Kind { wanted, choices, unset: None, read, show: Box::new(|()| None) }
    }

    /// Writes a value as TOML; `None` if it is not set.
    pub fn show(&self, value: &T) -> Option<String> {
        (self.show)(value)
    }
}

fn text(value: &Value) -> Option<&str> {
    if let Value::Text(text) = value { Some(text) } else { None }
}

/// A text as TOML, which has the escapes of JSON.
fn quoted(text: &str) -> String {
    escaped_json(&toml::Value::from(text).to_string())
}

fn quoted_list(items: &[String]) -> String {
    escaped_json(&toml::Value::from(items.to_vec()).to_string())
}

/// A kind of text that stands for itself.
fn text_kind(wanted: impl Into<String>, valid: impl Fn(&str) -> bool + 'static) -> Kind<String> {
    let read = move |value: &Value| text(value).filter(|text| valid(text)).map(str::to_owned);
    Kind::new(wanted, read, |text: &String| quoted(text))
}

/// A path.
fn path_kind(wanted: impl Into<String>, valid: impl Fn(&str) -> bool + 'static) -> Kind<PathBuf> {
    let read = move |value: &Value| text(value).filter(|text| valid(text)).map(PathBuf::from);
    Kind::new(wanted, read, |path: &PathBuf| quoted(&path.to_string_lossy()))
}

fn integer<T: TryFrom<i64>>(value: &Value, range: &RangeInclusive<i64>) -> Option<T> {
    match *value {
        Value::Integer(number) if range.contains(&number) => T::try_from(number).ok(),
        _ => None,
    }
}

/// A whole number within `range`, counting `unit`.
pub fn number<T: TryFrom<i64> + Display + 'static>(range: RangeInclusive<i64>, unit: &str) -> Kind<T> {
    let wanted = format!("a whole number from {} to {} ({unit})", range.start(), range.end());
    Kind::new(wanted, move |value| integer(value, &range), T::to_string)
}

/// A power of two within `range`, counting `unit`.
pub fn power_of_two(range: RangeInclusive<i64>, unit: &str) -> Kind<u32> {
    let wanted = format!("a power of two from {} to {} ({unit})", range.start(), range.end());
    let read = move |value: &Value| integer(value, &range).filter(|number: &u32| number.is_power_of_two());
    Kind::new(wanted, read, u32::to_string)
}

/// `word` (`None`), or a value of another kind.
pub fn or_word<T: 'static>(word: &'static str, kind: Kind<T>) -> Kind<Option<T>> {
    let Kind { wanted, read, show, .. } = kind;
    let or = move |phrase: &str| format!("\"{word}\" or {phrase}");
    Kind {
        wanted: or(&wanted),
        choices: vec![word],
        unset: None,
        read: Box::new(move |value| match text(value) {
            Some(text) if text == word => Ok(None),
            _ => read(value).map(Some).map_err(|Wanted(phrase)| Wanted(or(&phrase))),
        }),
        show: Box::new(move |value| value.as_ref().map_or_else(|| Some(quoted(word)), &show)),
    }
}

/// `"auto"` (`None`), or a value of another kind.
pub fn auto<T: 'static>(kind: Kind<T>) -> Kind<Option<T>> {
    or_word("auto", kind)
}

/// A value of another kind, or none.
pub fn optional<T: 'static>(kind: Kind<T>) -> Kind<Option<T>> {
    let Kind { wanted, choices, read, show, .. } = kind;
    Kind {
        wanted,
        choices,
        unset: Some(None),
        read: Box::new(move |value| read(value).map(Some)),
        show: Box::new(move |value| value.as_ref().and_then(&show)),
    }
}

/// One of several words.
pub fn choice<T: Copy + PartialEq + 'static>(choices: &'static [(&'static str, T)]) -> Kind<T> {
    let words: Vec<_> = choices.iter().map(|(word, _)| *word).collect();
    let named = |word: &&str| choices.iter().find(|(name, _)| name == word).map(|(_, value)| *value);
    let read = move |value: &Value| text(value).and_then(|word| named(&word));
    let show = |value: &T| {
        let word = choices.iter().find(|(_, of)| of == value).map_or("", |(word, _)| word);
        quoted(word)
    };
    Kind { choices: words.clone(), ..Kind::new(one_of(&words), read, show) }
}

/// `"a", "b" or "c"`.
fn one_of(words: &[&str]) -> String {
    let quoted: Vec<_> = words.iter().map(|word| format!("\"{word}\"")).collect();
    match quoted.split_last() {
        Some((last, rest)) if !rest.is_empty() => format!("{} or {last}", rest.join(", ")),
        _ => quoted.join(""),
    }
}

/// Yes or no.
pub fn truth() -> Kind<bool> {
    let read = |value: &Value| if let Value::Truth(truth) = *value { Some(truth) } else { None };
    Kind::new("true or false", read, bool::to_string)
}

/// A duration within `range`: a whole number and a unit, such as `50us`, `100ms` or `5s`.
pub fn duration(range: RangeInclusive<Duration>) -> Kind<Duration> {
    let wanted = format!(
        "a duration from {} to {}, as a text with its unit: us, ms or s, such as \"50us\"",
        format_duration(*range.start()),
        format_duration(*range.end())
    );
    let read =
        move |value: &Value| text(value).and_then(parse_duration).filter(|duration| range.contains(duration));
    Kind::new(wanted, read, |duration: &Duration| quoted(&format_duration(*duration)))
}

/// Milliseconds, for the limits of a [`duration`].
pub const fn ms(range: RangeInclusive<u64>) -> RangeInclusive<Duration> {
    Duration::from_millis(*range.start())..=Duration::from_millis(*range.end())
}

fn parse_duration(text: &str) -> Option<Duration> {
    let digits = text.find(|c: char| !c.is_ascii_digit())?;
    let number: u64 = text[..digits].parse().ok()?;
    match text[digits..].trim_start() {
        "us" | "µs" => Some(Duration::from_micros(number)),
        "ms" => Some(Duration::from_millis(number)),
        "s" => Some(Duration::from_secs(number)),
        _ => None,
    }
}

/// Writes a duration in the largest unit that shows it whole. Parts below a microsecond are cut.
fn format_duration(duration: Duration) -> String {
    let micros = duration.as_micros();
    if micros.is_multiple_of(1_000_000) {
        format!("{}s", micros / 1_000_000)
    } else if micros.is_multiple_of(1_000) {
        format!("{}ms", micros / 1_000)
    } else {
        format!("{micros}us")
    }
}

/// A size of memory: a whole number and a unit, such as `512MiB`.
pub fn memory() -> Kind<u64> {
    let wanted = "a size from 1MiB to 1024GiB, as a text with its unit: MiB or GiB, such as \"512MiB\"";
    let limits = MIB..=1024 * GIB;
    let read = move |value: &Value| text(value).and_then(parse_memory).filter(|bytes| limits.contains(bytes));
    Kind::new(wanted, read, |bytes: &u64| quoted(&format_memory(*bytes)))
}

fn parse_memory(text: &str) -> Option<u64> {
    let digits = text.find(|c: char| !c.is_ascii_digit())?;
    let number: u64 = text[..digits].parse().ok()?;
    match text[digits..].trim_start() {
        "MiB" => number.checked_mul(MIB),
        "GiB" => number.checked_mul(GIB),
        _ => None,
    }
}

/// Writes a size in the larger unit that shows it whole.
fn format_memory(bytes: u64) -> String {
    if bytes.is_multiple_of(GIB) { format!("{}GiB", bytes / GIB) } else { format!("{}MiB", bytes / MIB) }
}

/// The name of an interface, as the kernel would accept it. Not set: empty.
pub fn interface() -> Kind<String> {
    let valid = |name: &str| {
        (1..16).contains(&name.len())
            && !matches!(name, "." | "..")
            && !name.contains(|c: char| c == '/' || c == ':' || c == '\0' || c.is_whitespace())
    };
    text_kind("the name of an interface: 1 to 15 bytes without `/`, `:` and blanks", valid)
        .or_unset(String::new())
}

fn numbers(value: &Value, max: usize) -> Option<Vec<usize>> {
    let list = match value {
        Value::Text(text) => parse_list(text, max).ok()?,
        Value::List(items) => {
            let range = 0..=i64::try_from(max).ok()?;
            items.iter().map(|item| integer(item, &range)).collect::<Option<_>>()?
        }
        _ => return None,
    };
    (!list.is_empty()).then_some(list)
}

/// RX queues: `"all"`, or a list that names each queue once.
pub fn queues() -> Kind<Queues> {
    let once = |list: &Vec<usize>| {
        let mut sorted = list.clone();
        sorted.sort_unstable();
        sorted.windows(2).all(|pair| pair[0] != pair[1])
    };
    let read = move |value: &Value| {
        if text(value) == Some("all") {
            return Some(Queues::All);
        }
        let list = numbers(value, MAX_QUEUE).filter(once)?;
        list.into_iter().map(|queue| u32::try_from(queue).ok()).collect::<Option<_>>().map(Queues::List)
    };
    let show = |queues: &Queues| match queues {
        Queues::All => quoted("all"),
        Queues::List(list) => format!("{list:?}"),
    };
    let wanted = format!(
        "\"all\" or a list of RX queues from 0 to {MAX_QUEUE}, each once, such as \"0-3,6\" or [0, 1]"
    );
    Kind { choices: vec!["all"], ..Kind::new(wanted, read, show) }
}

/// CPUs, in the order in which they are to be used.
pub fn cores() -> Kind<Vec<usize>> {
    let wanted = format!("a list of CPU numbers from 0 to {MAX_CPU}, such as \"2-5,7\" or [2, 3]");
    Kind::new(wanted, |value| numbers(value, MAX_CPU), |list: &Vec<usize>| quoted(&format_list(list)))
}

/// A command and its arguments; an empty list means none.
pub fn command() -> Kind<Vec<String>> {
    let argument = |item: &Value| text(item).filter(|text| !text.contains('\0')).map(str::to_owned);
    let read = move |value: &Value| {
        let Value::List(items) = value else { return None };
        let command: Vec<_> = items.iter().map(argument).collect::<Option<_>>()?;
        command.first().is_none_or(|program| !program.is_empty()).then_some(command)
    };
    let wanted = "a list of texts: the program and its arguments, such as [\"xfan-flow\"]";
    Kind::new(wanted, read, |command: &Vec<String>| quoted_list(command))
}

fn is_name(name: &str) -> bool {
    !name.is_empty() && !name.contains(['\0', ':', '/'])
}

/// A user name.
pub fn user() -> Kind<String> {
    text_kind("the name of a user", is_name)
}

/// A list of names; `of` says of whom.
pub fn names(of: &str) -> Kind<Vec<String>> {
    let name = |item: &Value| text(item).filter(|name| is_name(name)).map(str::to_owned);
    let read = move |value: &Value| {
        let Value::List(items) = value else { return None };
        items.iter().map(name).collect()
    };
    Kind::new(format!("a list of {of}"), read, |names: &Vec<String>| quoted_list(names))
}

/// An owner of a file.
pub fn owner() -> Kind<Owner> {
    let read = |value: &Value| {
        let text = text(value)?;
        let (user, group) = text.split_once(':').map_or((text, None), |(user, group)| (user, Some(group)));
        let owner = Owner {
            user: Some(user).filter(|user| !user.is_empty()).map(str::to_owned),
            group: group.map(str::to_owned),
        };
        let given = || [&owner.user, &owner.group].into_iter().flatten();
        (given().next().is_some() && given().all(|name| is_name(name))).then_some(owner)
    };
    let show = |Owner { user, group }: &Owner| {
        let group = group.as_ref().map_or_else(String::new, |group| format!(":{group}"));
        quoted(&(user.clone().unwrap_or_default() + &group))
    };
    Kind::new("an owner: \"user\", \"user:group\" or \":group\"", read, show)
}

/// Permissions of a file.
pub fn mode() -> Kind<u32> {
    let read = |value: &Value| {
        let digits = text(value).filter(|text| (3..=4).contains(&text.len()) && !text.starts_with('+'))?;
        u32::from_str_radix(digits, 8).ok().filter(|&mode| mode <= 0o777)
    };
    let wanted = "permissions in octal, as a text from \"000\" to \"0777\", such as \"0660\"";
    Kind::new(wanted, read, |mode: &u32| format!("\"{mode:04o}\""))
}

/// The path of a Unix socket. Not set: empty.
pub fn socket() -> Kind<PathBuf> {
    let valid = |path: &str| is_absolute_path(path) && path.len() < SOCKET_PATH_BYTES;
    path_kind(format!("an absolute path of at most {} bytes", SOCKET_PATH_BYTES - 1), valid)
        .or_unset(PathBuf::new())
}

/// An absolute path.
pub fn absolute_path() -> Kind<PathBuf> {
    path_kind("an absolute path", is_absolute_path)
}

fn is_absolute_path(text: &str) -> bool {
    text.starts_with('/') && !text.contains('\0')
}

/// What is left to the kernel stack: a list of rules.
pub fn rules() -> Kind<Vec<PassRule>> {
    const WANTED: &str = "a list of rules, such as [\"icmp\", \"tcp/22\"]";
    let rule = |item: &Value| match text(item).map(str::parse::<PassRule>) {
        Some(Ok(rule)) => Ok(rule),
        Some(Err(error)) => Err(Wanted(format!("a list of rules; {error}"))),
        None => Err(Wanted(WANTED.into())),
    };
    let show =
        |rules: &Vec<PassRule>| quoted_list(&rules.iter().map(ToString::to_string).collect::<Vec<_>>());
    let read = move |value: &Value| match value {
        Value::List(items) => items.iter().map(rule).collect(),
        _ => Err(Wanted(WANTED.into())),
    };
    Kind { read: Box::new(read), ..Kind::new(WANTED, |_| None, show) }
}

/// Where workers' output goes.
pub fn worker_output() -> Kind<WorkerOutput> {
    let read = |value: &Value| match text(value)? {
        "log" => Some(WorkerOutput::Log),
        "null" => Some(WorkerOutput::Null),
        "journal" => Some(WorkerOutput::Journal),
        path => is_absolute_path(path).then(|| WorkerOutput::File(path.into())),
    };
    let show = |output: &WorkerOutput| match output {
        WorkerOutput::Log => quoted("log"),
        WorkerOutput::Null => quoted("null"),
        WorkerOutput::Journal => quoted("journal"),
        WorkerOutput::File(path) => quoted(&path.to_string_lossy()),
    };
    let wanted =
        "\"log\", \"null\", \"journal\" or an absolute path, in which {member} stands for the member";
    Kind { choices: vec!["log", "null", "journal"], ..Kind::new(wanted, read, show) }
}

/// The size of a frame.
pub fn frame_size() -> Kind<u32> {
    let read = |value: &Value| integer(value, &(2048..=4096)).filter(|size| matches!(size, 2048 | 4096));
    Kind::new("2048 or 4096 (bytes)", read, u32::to_string)
}

/// A 128-bit key.
pub fn hash_key() -> Kind<[u8; 16]> {
    let read = |value: &Value| {
        text(value)
            .filter(|text| text.len() == 32 && text.bytes().all(|byte| byte.is_ascii_hexdigit()))
            .and_then(|text| u128::from_str_radix(text, 16).ok())
            .map(u128::to_be_bytes)
    };
    let show = |key: &[u8; 16]| format!("\"{:032x}\"", u128::from_be_bytes(*key));
    Kind::new("32 hexadecimal digits (128 bits)", read, show)
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;

    fn t(text: &str) -> Value {
        Value::Text(text.to_owned())
    }

    #[test]
    fn durations_carry_their_unit() {
        let range = Duration::ZERO..=Duration::from_secs(10);
        let read = |text| duration(range.clone()).read(&t(text)).ok();
        assert_eq!(read("50us"), Some(Duration::from_micros(50)));
        assert_eq!(read("100ms"), Some(Duration::from_millis(100)));
        assert_eq!(read("5 s"), Some(Duration::from_secs(5)));
        assert_eq!(read("0s"), Some(Duration::ZERO));
        for wrong in ["5", "s", "", "-1s", "1.5s", "11s", "5h", "99999999999999999999s"] {
            assert_eq!(read(wrong), None, "{wrong}");
        }
        let error = duration(range).read(&Value::Integer(5)).unwrap_err();
        assert!(error.0.contains("from 0s to 10s") && error.0.contains("us, ms or s"), "{error}");
    }

    #[test]
    fn interface_names_are_those_the_kernel_takes() {
        assert!(interface().read(&t("enp1s0f0np0.100")).is_ok());
        for wrong in ["", "..", "a/b", "eth0:1", "et h0", "sixteen-bytes-xx", "a\0b"] {
            assert!(interface().read(&t(wrong)).is_err(), "{wrong:?}");
        }
    }

    #[test]
    fn queues_are_named_once_and_cores_as_often_as_wanted() {
        assert_eq!(queues().read(&t("all")), Ok(Queues::All));
        assert_eq!(queues().read(&t("0-2")), Ok(Queues::List(vec![0, 1, 2])));
        assert!(queues().read(&t("0,0")).is_err());
        assert!(queues().read(&Value::List(vec![])).is_err());
        assert!(queues().read(&Value::List(vec![Value::Integer(-1)])).is_err());
        assert_eq!(cores().read(&Value::List(vec![Value::Integer(3), Value::Integer(3)])), Ok(vec![3, 3]));
        assert!(cores().read(&Value::Integer(3)).is_err());
    }

    #[test]
    fn a_key_is_128_bits() {
        assert_eq!(hash_key().read(&t(&"0f".repeat(16))), Ok([0x0f; 16]));
        for wrong in ["", "0f", &"0g".repeat(16), &format!("+{}", "0".repeat(31))] {
            assert!(hash_key().read(&t(wrong)).is_err(), "{wrong:?}");
        }
    }

    #[test]
    fn sockets_have_absolute_paths_that_fit_an_address() {
        assert!(socket().read(&t("/run/x.sock")).is_ok());
        assert!(socket().read(&t("x.sock")).is_err());
        assert!(socket().read(&t(&format!("/{}", "x".repeat(106)))).is_ok());
        assert!(socket().read(&t(&format!("/{}", "x".repeat(107)))).is_err());
    }

    #[test]
    fn owners_and_permissions_are_written_as_for_chown_and_chmod() {
        let of = |user: Option<&str>, group: Option<&str>| {
            Ok(Owner { user: user.map(str::to_owned), group: group.map(str::to_owned) })
        };
        assert_eq!(owner().read(&t("root")), of(Some("root"), None));
        assert_eq!(owner().read(&t("root:adm")), of(Some("root"), Some("adm")));
        assert_eq!(owner().read(&t(":adm")), of(None, Some("adm")));
        for wrong in ["", ":", "root:", "a:b:c", "a/b"] {
            assert!(owner().read(&t(wrong)).is_err(), "{wrong}");
        }
        assert_eq!(mode().read(&t("0660")), Ok(0o660));
        assert_eq!(mode().read(&t("666")), Ok(0o666));
        for wrong in ["", "6", "0888", "1777", "+660", "-660", "rw-rw----"] {
            assert!(mode().read(&t(wrong)).is_err(), "{wrong}");
        }
        assert_eq!(names("x").read(&Value::List(vec![t("alice")])), Ok(vec!["alice".to_owned()]));
        assert!(names("x").read(&t("alice")).is_err() && names("x").read(&Value::List(vec![t("")])).is_err());
    }

    #[test]
    fn workers_write_to_what_has_a_name() {
        assert_eq!(worker_output().read(&t("journal")), Ok(WorkerOutput::Journal));
        assert_eq!(worker_output().read(&t("/x/{member}")), Ok(WorkerOutput::File("/x/{member}".into())));
        for wrong in ["", "x.log", "syslog", "/a\0b"] {
            assert!(
                worker_output().read(&t(wrong)).is_err() && absolute_path().read(&t(wrong)).is_err(),
                "{wrong:?}"
            );
        }
    }

    #[test]
    fn a_wrong_rule_is_told_in_its_own_words() {
        assert_eq!(rules().read(&Value::List(vec![t("tcp/22")])), Ok(vec!["tcp/22".parse().unwrap()]));
        let Wanted(phrase) = rules().read(&Value::List(vec![t("icmp"), t("tpc/22")])).unwrap_err();
        assert!(phrase.contains("\"tpc\" is not an IP protocol"), "{phrase}");
        assert!(rules().read(&t("icmp")).is_err());
    }

    proptest! {
        #[test]
        fn durations_are_read_as_they_are_written(micros in 0u64..10_000_000_000) {
            let duration = Duration::from_micros(micros);
            prop_assert_eq!(parse_duration(&format_duration(duration)), Some(duration));
        }

        #[test]
        fn powers_of_two_stay_within_their_limits(n in any::<i64>()) {
            let read = power_of_two(64..=32768, "frames").read(&Value::Integer(n));
            prop_assert_eq!(read.is_ok(), (64..=32768).contains(&n) && n.count_ones() == 1);
        }
    }
}

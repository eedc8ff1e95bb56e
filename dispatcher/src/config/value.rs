//! What a single value must be: one function per kind, shared by the file and the command line.
//!
//! Each function takes a value as written and returns it typed and within its limits, or says
//! what it must be instead: a phrase that completes "it must be …".

use std::fmt;
use std::ops::RangeInclusive;
use std::path::PathBuf;
use std::time::Duration;

use super::list::parse_list;
use super::{BindMode, LogLevel, ModeChoice, OnEmpty, OnLoss, Owner, PassRule, Policy, Queues, WorkerOutput};

/// The largest queue number that can be asked for.
pub const MAX_QUEUE: usize = 4095;
/// The largest CPU number Linux can be built for, less one.
pub const MAX_CPU: usize = 8191;
/// A socket's path must fit `sun_path`, its final zero included.
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
    /// Anything else: no key takes it. Holds it as it should be shown.
    Other(String),
}

impl fmt::Display for Value {
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

/// What a value must be: completes the sentence "it must be …".
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Wanted(pub String);

impl fmt::Display for Wanted {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "it must be {}", self.0)
    }
}

impl std::error::Error for Wanted {}

/// The result of reading one value.
pub type Read<T> = Result<T, Wanted>;

fn wanted<T>(phrase: impl Into<String>) -> Read<T> {
    Err(Wanted(phrase.into()))
}

fn text(value: &Value) -> Option<&str> {
    if let Value::Text(text) = value { Some(text) } else { None }
}

/// A whole number within `range`, counting `unit`.
pub fn number<T: TryFrom<i64>>(value: &Value, range: RangeInclusive<i64>, unit: &str) -> Read<T> {
    if let Value::Integer(number) = *value
        && range.contains(&number)
        && let Ok(number) = T::try_from(number)
    {
        return Ok(number);
    }
    wanted(format!("a whole number from {} to {} ({unit})", range.start(), range.end()))
}

/// A power of two within `range`, counting `unit`.
pub fn power_of_two(value: &Value, range: RangeInclusive<i64>, unit: &str) -> Read<u32> {
    match number::<u32>(value, range.clone(), unit) {
        Ok(number) if number.is_power_of_two() => Ok(number),
        _ => wanted(format!("a power of two from {} to {} ({unit})", range.start(), range.end())),
    }
}

/// `"auto"` (`None`), or what `read` takes.
pub fn auto<T>(value: &Value, read: impl FnOnce(&Value) -> Read<T>) -> Read<Option<T>> {
    if text(value) == Some("auto") {
        return Ok(None);
    }
    read(value).map(Some).map_err(|Wanted(phrase)| Wanted(format!("\"auto\" or {phrase}")))
}

/// A duration within `range`: a whole number and a unit, such as `50us`, `100ms` or `5s`.
pub fn duration(value: &Value, range: RangeInclusive<Duration>) -> Read<Duration> {
    match text(value).and_then(parse_duration) {
        Some(duration) if range.contains(&duration) => Ok(duration),
        _ => wanted(format!(
            "a duration from {} to {}, as a text with its unit: us, ms or s, such as \"50us\"",
            format_duration(*range.start()),
            format_duration(*range.end())
        )),
    }
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
#[must_use]
pub fn format_duration(duration: Duration) -> String {
    let micros = duration.as_micros();
    if micros.is_multiple_of(1_000_000) {
        format!("{}s", micros / 1_000_000)
    } else if micros.is_multiple_of(1_000) {
        format!("{}ms", micros / 1_000)
    } else {
        format!("{micros}us")
    }
}

/// `"unlimited"` (`None`), or a size: a whole number and a unit, such as `512MiB`.
pub fn memory(value: &Value) -> Read<Option<u64>> {
    let text = text(value);
    if text == Some("unlimited") {
        return Ok(None);
    }
    match text.and_then(parse_memory) {
        Some(bytes) if (MIB..=1024 * GIB).contains(&bytes) => Ok(Some(bytes)),
        _ => wanted(
            "\"unlimited\" or a size from 1MiB to 1024GiB, as a text with its unit: MiB or GiB, such as \"512MiB\"",
        ),
    }
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
#[must_use]
pub fn format_memory(bytes: u64) -> String {
    if bytes.is_multiple_of(GIB) { format!("{}GiB", bytes / GIB) } else { format!("{}MiB", bytes / MIB) }
}

/// The name of an interface, as the kernel would accept it.
pub fn interface(value: &Value) -> Read<String> {
    let valid = |name: &&str| {
        (1..16).contains(&name.len())
            && !matches!(*name, "." | "..")
            && !name.contains(|c: char| c == '/' || c == ':' || c == '\0' || c.is_whitespace())
    };
    match text(value).filter(valid) {
        Some(name) => Ok(name.to_owned()),
        None => wanted("the name of an interface: 1 to 15 bytes without `/`, `:` and blanks"),
    }
}

fn numbers(value: &Value, max: usize) -> Option<Vec<usize>> {
    let list = match value {
        Value::Text(text) => parse_list(text, max).ok()?,
        Value::List(items) => items
            .iter()
            .map(|item| number(item, 0..=i64::try_from(max).ok()?, "").ok())
            .collect::<Option<_>>()?,
        _ => return None,
    };
    (!list.is_empty()).then_some(list)
}

/// RX queues: `"all"`, or a list that names each queue once.
pub fn queues(value: &Value) -> Read<Queues> {
    if text(value) == Some("all") {
        return Ok(Queues::All);
    }
    let once = |list: &Vec<usize>| {
        let mut sorted = list.clone();
        sorted.sort_unstable();
        sorted.windows(2).all(|pair| pair[0] != pair[1])
    };
    let list = numbers(value, MAX_QUEUE).filter(once);
    match list.and_then(|list| list.into_iter().map(|q| u32::try_from(q).ok()).collect()) {
        Some(list) => Ok(Queues::List(list)),
        None => wanted(format!(
            "\"all\" or a list of RX queues from 0 to {MAX_QUEUE}, each once, such as \"0-3,6\" or [0, 1]"
        )),
    }
}

/// Worker processes.
pub fn workers(value: &Value) -> Read<usize> {
    number(value, 1..=64, "worker processes")
}

/// CPUs, in the order in which they are to be used.
pub fn cores(value: &Value) -> Read<Vec<usize>> {
    numbers(value, MAX_CPU).map_or_else(
        || wanted(format!("a list of CPU numbers from 0 to {MAX_CPU}, such as \"2-5,7\" or [2, 3]")),
        Ok,
    )
}

/// A command and its arguments; an empty list means none.
pub fn command(value: &Value) -> Read<Vec<String>> {
    let argument = |item: &Value| text(item).filter(|text| !text.contains('\0')).map(str::to_owned);
    match value {
        Value::List(items) => items.iter().map(argument).collect::<Option<Vec<_>>>(),
        _ => None,
    }
    .filter(|command| command.first().is_none_or(|program| !program.is_empty()))
    .map_or_else(|| wanted("a list of texts: the program and its arguments, such as [\"xfan-flow\"]"), Ok)
}

/// A user name.
pub fn user(value: &Value) -> Read<String> {
    match text(value) {
        Some(name) if is_name(name) => Ok(name.to_owned()),
        _ => wanted("the name of a user"),
    }
}

fn is_name(name: &str) -> bool {
    !name.is_empty() && !name.contains(['\0', ':', '/'])
}

fn names(value: &Value) -> Option<Vec<String>> {
    let Value::List(items) = value else { return None };
    items.iter().map(|item| text(item).filter(|name| is_name(name)).map(str::to_owned)).collect()
}

/// Names of users.
pub fn users(value: &Value) -> Read<Vec<String>> {
    names(value).map_or_else(|| wanted("a list of users' names, such as [\"alice\"]"), Ok)
}

/// Names of groups.
pub fn groups(value: &Value) -> Read<Vec<String>> {
    names(value).map_or_else(|| wanted("a list of groups' names, such as [\"adm\"]"), Ok)
}

/// An owner of a file.
pub fn owner(value: &Value) -> Read<Owner> {
    let (user, group) = match text(value).unwrap_or_default().split_once(':') {
        Some((user, group)) => (user, Some(group)),
        None => (text(value).unwrap_or_default(), None),
    };
    let owner = Owner {
        user: Some(user).filter(|user| !user.is_empty()).map(str::to_owned),
        group: group.map(str::to_owned),
    };
    let given = || [&owner.user, &owner.group].into_iter().flatten();
    if given().next().is_none() || !given().all(|name| is_name(name)) {
        return wanted("an owner: \"user\", \"user:group\" or \":group\"");
    }
    Ok(owner)
}

/// Permissions of a file.
pub fn mode(value: &Value) -> Read<u32> {
    let digits = text(value).filter(|text| (3..=4).contains(&text.len()) && !text.starts_with('+'));
    match digits.and_then(|text| u32::from_str_radix(text, 8).ok()) {
        Some(mode) if mode <= 0o777 => Ok(mode),
        _ => wanted("permissions in octal, as a text from \"000\" to \"0777\", such as \"0660\""),
    }
}

/// The path of a Unix socket.
pub fn socket(value: &Value) -> Read<PathBuf> {
    match text(value) {
        Some(path) if path.starts_with('/') && path.len() < SOCKET_PATH_BYTES && !path.contains('\0') => {
            Ok(PathBuf::from(path))
        }
        _ => wanted(format!("an absolute path of at most {} bytes", SOCKET_PATH_BYTES - 1)),
    }
}

/// What is left to the kernel stack: a list of rules.
pub fn pass(value: &Value) -> Read<Vec<PassRule>> {
    let Value::List(items) = value else { return wanted("a list of rules, such as [\"icmp\", \"tcp/22\"]") };
    let rule = |item: &Value| match text(item).map(str::parse::<PassRule>) {
        Some(Ok(rule)) => Ok(rule),
        Some(Err(error)) => wanted(format!("a list of rules; {error}")),
        None => wanted("a list of rules, such as [\"icmp\", \"tcp/22\"]"),
    };
    items.iter().map(rule).collect()
}

/// How the XDP program is attached.
pub fn xdp_mode(value: &Value) -> Read<ModeChoice> {
    match text(value) {
        Some("auto") => Ok(ModeChoice::Auto),
        Some("native") => Ok(ModeChoice::Native),
        Some("generic") => Ok(ModeChoice::Generic),
        _ => wanted("\"auto\", \"native\" or \"generic\""),
    }
}

/// How the sockets are bound.
pub fn bind_mode(value: &Value) -> Read<BindMode> {
    match text(value) {
        Some("auto") => Ok(BindMode::Auto),
        Some("zero-copy") => Ok(BindMode::ZeroCopy),
        Some("copy") => Ok(BindMode::Copy),
        _ => wanted("\"auto\", \"zero-copy\" or \"copy\""),
    }
}

/// Which ends of a worker make it start again.
pub fn restart(value: &Value) -> Read<Policy> {
    match Policy::ALL.into_iter().find(|policy| text(value) == Some(policy.name())) {
        Some(policy) => Ok(policy),
        None => wanted("\"no\", \"on-failure\" or \"always\""),
    }
}

/// Where packets go while no worker takes any.
pub fn on_empty(value: &Value) -> Read<OnEmpty> {
    match text(value) {
        Some("drop") => Ok(OnEmpty::Drop),
        Some("pass") => Ok(OnEmpty::Pass),
        _ => wanted("\"drop\" or \"pass\""),
    }
}

/// Yes or no.
pub fn truth(value: &Value) -> Read<bool> {
    if let Value::Truth(truth) = *value { Ok(truth) } else { wanted("true or false") }
}

/// What becomes of what a lost worker had.
pub fn on_loss(value: &Value) -> Read<OnLoss> {
    match text(value) {
        Some("requeue") => Ok(OnLoss::Requeue),
        Some("hold") => Ok(OnLoss::Hold),
        _ => wanted("\"requeue\" or \"hold\""),
    }
}

/// Where workers' output goes.
pub fn worker_output(value: &Value) -> Read<WorkerOutput> {
    match text(value) {
        Some("log") => Ok(WorkerOutput::Log),
        Some("null") => Ok(WorkerOutput::Null),
        Some("journal") => Ok(WorkerOutput::Journal),
        Some(path) if is_absolute_path(path) => Ok(WorkerOutput::File(path.into())),
        _ => wanted(
            "\"log\", \"null\", \"journal\" or an absolute path, in which {member} stands for the member",
        ),
    }
}

/// A file to log to.
pub fn log_file(value: &Value) -> Read<PathBuf> {
    match text(value) {
        Some(path) if is_absolute_path(path) => Ok(path.into()),
        _ => wanted("an absolute path"),
    }
}

fn is_absolute_path(text: &str) -> bool {
    text.starts_with('/') && !text.contains('\0')
}

/// The size of a frame.
pub fn frame_size(value: &Value) -> Read<u32> {
    match *value {
        Value::Integer(2048) => Ok(2048),
        Value::Integer(4096) => Ok(4096),
        _ => wanted("2048 or 4096 (bytes)"),
    }
}

/// A 128-bit key.
pub fn hash_key(value: &Value) -> Read<[u8; 16]> {
    text(value)
        .filter(|text| text.len() == 32 && text.bytes().all(|byte| byte.is_ascii_hexdigit()))
        .and_then(|text| u128::from_str_radix(text, 16).ok())
        .map_or_else(|| wanted("32 hexadecimal digits (128 bits)"), |key| Ok(key.to_be_bytes()))
}

/// How much is logged.
pub fn log_level(value: &Value) -> Read<LogLevel> {
    text(value)
        .and_then(|text| LogLevel::ALL.into_iter().find(|level| level.name() == text))
        .map_or_else(|| wanted("\"error\", \"warn\", \"info\", \"debug\" or \"trace\""), Ok)
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
        let read = |text| duration(&t(text), range.clone()).ok();
        assert_eq!(read("50us"), Some(Duration::from_micros(50)));
        assert_eq!(read("100ms"), Some(Duration::from_millis(100)));
        assert_eq!(read("5 s"), Some(Duration::from_secs(5)));
        assert_eq!(read("0s"), Some(Duration::ZERO));
        for wrong in ["5", "s", "", "-1s", "1.5s", "11s", "5h", "99999999999999999999s"] {
            assert_eq!(read(wrong), None, "{wrong}");
        }
        let error = duration(&Value::Integer(5), range).unwrap_err();
        assert!(error.0.contains("from 0s to 10s") && error.0.contains("us, ms or s"), "{error}");
    }

    #[test]
    fn interface_names_are_those_the_kernel_takes() {
        assert!(interface(&t("enp1s0f0np0.100")).is_ok());
        for wrong in ["", "..", "a/b", "eth0:1", "et h0", "sixteen-bytes-xx", "a\0b"] {
            assert!(interface(&t(wrong)).is_err(), "{wrong:?}");
        }
    }

    #[test]
    fn queues_are_named_once_and_cores_as_often_as_wanted() {
        assert_eq!(queues(&t("all")), Ok(Queues::All));
        assert_eq!(queues(&t("0-2")), Ok(Queues::List(vec![0, 1, 2])));
        assert!(queues(&t("0,0")).is_err());
        assert!(queues(&Value::List(vec![])).is_err());
        assert!(queues(&Value::List(vec![Value::Integer(-1)])).is_err());
        assert_eq!(cores(&Value::List(vec![Value::Integer(3), Value::Integer(3)])), Ok(vec![3, 3]));
        assert!(cores(&Value::Integer(3)).is_err());
    }

    #[test]
    fn a_key_is_128_bits() {
        assert_eq!(hash_key(&t(&"0f".repeat(16))), Ok([0x0f; 16]));
        for wrong in ["", "0f", &"0g".repeat(16), &format!("+{}", "0".repeat(31))] {
            assert!(hash_key(&t(wrong)).is_err(), "{wrong:?}");
        }
    }

    #[test]
    fn sockets_have_absolute_paths_that_fit_an_address() {
        assert!(socket(&t("/run/x.sock")).is_ok());
        assert!(socket(&t("x.sock")).is_err());
        assert!(socket(&t(&format!("/{}", "x".repeat(106)))).is_ok());
        assert!(socket(&t(&format!("/{}", "x".repeat(107)))).is_err());
    }

    #[test]
    fn owners_and_permissions_are_written_as_for_chown_and_chmod() {
        let names = |user: Option<&str>, group: Option<&str>| {
            Ok(Owner { user: user.map(str::to_owned), group: group.map(str::to_owned) })
        };
        assert_eq!(owner(&t("root")), names(Some("root"), None));
        assert_eq!(owner(&t("root:adm")), names(Some("root"), Some("adm")));
        assert_eq!(owner(&t(":adm")), names(None, Some("adm")));
        for wrong in ["", ":", "root:", "a:b:c", "a/b"] {
            assert!(owner(&t(wrong)).is_err(), "{wrong}");
        }
        assert_eq!(mode(&t("0660")), Ok(0o660));
        assert_eq!(mode(&t("666")), Ok(0o666));
        for wrong in ["", "6", "0888", "1777", "+660", "-660", "rw-rw----"] {
            assert!(mode(&t(wrong)).is_err(), "{wrong}");
        }
        assert_eq!(users(&Value::List(vec![t("alice")])), Ok(vec!["alice".to_owned()]));
        assert!(users(&t("alice")).is_err() && groups(&Value::List(vec![t("")])).is_err());
    }

    #[test]
    fn workers_write_to_what_has_a_name() {
        assert_eq!(worker_output(&t("journal")), Ok(WorkerOutput::Journal));
        assert_eq!(worker_output(&t("/x/{member}")), Ok(WorkerOutput::File("/x/{member}".into())));
        for wrong in ["", "x.log", "syslog", "/a\0b"] {
            assert!(worker_output(&t(wrong)).is_err() && log_file(&t(wrong)).is_err(), "{wrong:?}");
        }
    }

    #[test]
    fn a_wrong_rule_is_told_in_its_own_words() {
        assert_eq!(pass(&Value::List(vec![t("tcp/22")])), Ok(vec!["tcp/22".parse().unwrap()]));
        let Wanted(phrase) = pass(&Value::List(vec![t("icmp"), t("tpc/22")])).unwrap_err();
        assert!(phrase.contains("\"tpc\" is not an IP protocol"), "{phrase}");
        assert!(pass(&t("icmp")).is_err());
    }

    proptest! {
        #[test]
        fn durations_are_read_as_they_are_written(micros in 0u64..10_000_000_000) {
            let duration = Duration::from_micros(micros);
            prop_assert_eq!(parse_duration(&format_duration(duration)), Some(duration));
        }

        #[test]
        fn powers_of_two_stay_within_their_limits(n in any::<i64>()) {
            let read = power_of_two(&Value::Integer(n), 64..=32768, "frames");
            prop_assert_eq!(read.is_ok(), (64..=32768).contains(&n) && n.count_ones() == 1);
        }
    }
}

//! Limits of open files: which limit the kernel means when it returns no more descriptors.

use std::fmt::Display;

use nix::sys::resource::{Resource, getrlimit};

/// The text of an error. If the kernel returned no descriptor (EMFILE, ENFILE), the text also names
/// the limit, its value and how to raise it. This inspects the text, because some crates keep
/// nothing else of an error.
///
/// # Examples
///
/// ```
/// use std::io::{Error, ErrorKind};
/// use xfan_shm::limits::explained;
///
/// // Other errors keep their text.
/// let error = Error::from(ErrorKind::NotFound);
/// assert_eq!(explained(&error), error.to_string());
/// ```
pub fn explained(error: impl Display) -> String {
    let text = error.to_string();
    if text.contains("RLIMIT_NOFILE") || text.contains("fs.file-max") {
        text // already explained
    } else if text.contains("Too many open files in system") {
        // Reading the limit takes a descriptor, which the kernel may still grant to root.
        let most = std::fs::read_to_string("/proc/sys/fs/file-max");
        let is = most.map_or_else(|_| "reached".into(), |most| most.trim().to_owned());
        format!("{text}: fs.file-max of this machine is {is} (sysctl fs.file-max)")
    } else if text.contains("Too many open files") {
        let soft = getrlimit(Resource::RLIMIT_NOFILE).map_or(0, |(soft, _)| soft);
        format!("{text}: RLIMIT_NOFILE of this process is {soft} (ulimit -n, LimitNOFILE=)")
    } else {
        text
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::io::Error;

    #[test]
    #[cfg_attr(miri, ignore = "getrlimit")]
    fn an_error_about_descriptors_names_the_limit() {
        let (soft, _) = getrlimit(Resource::RLIMIT_NOFILE).unwrap();
        let emfile = format!(
            "cannot: Too many open files (os error 24): RLIMIT_NOFILE of this process is {soft} (ulimit -n, LimitNOFILE=)"
        );
        assert_eq!(explained(format!("cannot: {}", Error::from_raw_os_error(libc::EMFILE))), emfile);
        assert_eq!(explained(&emfile), emfile);
        assert!(
            explained(nix::errno::Errno::EMFILE)
                .contains(&format!("RLIMIT_NOFILE of this process is {soft}"))
        );
        let most = std::fs::read_to_string("/proc/sys/fs/file-max").unwrap();
        let enfile = explained(Error::from_raw_os_error(libc::ENFILE));
        assert!(enfile.contains(&format!("fs.file-max of this machine is {} (", most.trim())), "{enfile}");
        assert_eq!(
            explained(Error::from_raw_os_error(libc::ENOSPC)),
            "No space left on device (os error 28)"
        );
    }
}

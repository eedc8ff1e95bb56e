//! Limits of open files: which one the kernel means when it gives no more descriptors.

use std::fmt::Display;

use nix::sys::resource::{Resource, getrlimit};

/// An error's text. Where the kernel gave no descriptor, the text also names the limit, its value
/// and what raises it. This goes by the text: other crates keep no more of some errors.
pub fn explained(error: impl Display) -> String {
    let text = error.to_string();
    if text.contains("RLIMIT_NOFILE") || text.contains("fs.file-max") {
        text // a sentence that has been here before
    } else if text.contains("Too many open files in system") {
        // Reading it takes a descriptor, which root may get nonetheless.
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
    fn an_error_for_want_of_descriptors_names_the_limit() {
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

//! What the documentation says about the tests is true, and its links and its form are right.

use std::path::{Path, PathBuf};

/// The text of all files below a folder.
fn sources(folder: &Path) -> String {
    let paths = std::fs::read_dir(folder).unwrap().map(|entry| entry.unwrap().path());
    let text =
        |path: PathBuf| if path.is_dir() { sources(&path) } else { std::fs::read_to_string(path).unwrap() };
    paths.map(text).collect()
}

/// The repository.
const ROOT: &str = concat!(env!("CARGO_MANIFEST_DIR"), "/..");
const README_BYTES: usize = 8192;
const COLUMNS: usize = 100;

/// The pages: those at the top of the repository, and those in docs/.
fn pages() -> Vec<(PathBuf, String)> {
    let files = ["", "docs"].map(|folder| std::fs::read_dir(Path::new(ROOT).join(folder)).unwrap());
    let paths = files.into_iter().flatten().map(|entry| entry.unwrap().path());
    let pages = paths.filter(|path| path.extension().is_some_and(|extension| extension == "md"));
    pages.map(|path| (path.clone(), std::fs::read_to_string(path).unwrap())).collect()
}

/// The lines of a page outside blocks of code, with their numbers.
fn prose(text: &str) -> impl Iterator<Item = (usize, &str)> {
    let mut code = false;
    let lines = text.lines().enumerate().filter(move |(_, line)| {
        let fence = line.starts_with("```");
        code ^= fence;
        !code && !fence
    });
    lines.map(|(number, line)| (number + 1, line))
}

/// A line without the targets of its links.
fn shown(line: &str) -> String {
    let mut parts = line.split("](");
    let first = parts.next().unwrap_or_default().to_owned();
    parts.fold(first, |shown, part| shown + part.split_once(')').map_or(part, |(_, rest)| rest))
}

/// What a heading is called in links, as GitHub makes it.
fn anchor(heading: &str) -> String {
    let kept = heading.to_lowercase();
    kept.chars().filter(|c| c.is_alphanumeric() || " -_".contains(*c)).collect::<String>().replace(' ', "-")
}

#[test]
fn every_test_named_in_the_security_page_exists() {
    let root = Path::new(env!("CARGO_MANIFEST_DIR"));
    let page = std::fs::read_to_string(root.join("../docs/security.md")).unwrap();
    let tests = sources(&root.join("tests"));
    // The names of tests have more than three words.
    let is_test = |name: &&str| {
        name.matches('_').count() > 2
            && name.chars().all(|c| c.is_ascii_lowercase() || "_0123456789".contains(c))
    };
    let named: Vec<_> = page.split('`').skip(1).step_by(2).filter(is_test).collect();
    assert!(named.len() > 40, "{named:?}");
    for name in named {
        assert!(tests.contains(&format!("fn {name}(")), "there is no test {name}");
    }
}

#[test]
fn the_readme_is_short() {
    let bytes = std::fs::metadata(Path::new(ROOT).join("README.md")).unwrap().len();
    assert!(bytes < README_BYTES as u64, "{bytes} bytes");
}

#[test]
fn every_relative_link_leads_somewhere() {
    let mut links = 0;
    for (page, text) in pages() {
        for (number, line) in prose(&text) {
            let targets = line.split("](").skip(1).filter_map(|rest| Some(rest.split_once(')')?.0));
            for target in targets.filter(|target| !target.contains("://")) {
                let here = format!("{}:{number}: {target}", page.display());
                let (file, heading) = target.split_once('#').unwrap_or((target, ""));
                let file = if file.is_empty() { page.clone() } else { page.parent().unwrap().join(file) };
                assert!(file.exists(), "{here}");
                if !heading.is_empty() {
                    let text = std::fs::read_to_string(&file).unwrap();
                    let headings = prose(&text).filter(|(_, line)| line.starts_with('#'));
                    let mut anchors = headings.map(|(_, line)| anchor(line.trim_start_matches('#').trim()));
                    assert!(anchors.any(|anchor| anchor == heading), "{here}");
                }
                links += 1;
            }
        }
    }
    assert!(links > 50, "{links}");
}

#[test]
fn every_source_file_that_a_page_names_is_there() {
    let mut named = 0;
    for (page, text) in pages() {
        for (number, line) in prose(&text) {
            for name in line.split('`').skip(1).step_by(2) {
                let path = name.split_whitespace().next().unwrap_or_default();
                let folders =
                    ["packet/", "xdp-prog/", "shm/", "dispatcher/", "workers/", "tests/", "scripts/"];
                if folders.iter().any(|folder| path.starts_with(folder)) {
                    assert!(Path::new(ROOT).join(path).exists(), "{}:{number}: {path}", page.display());
                    named += 1;
                }
            }
        }
    }
    assert!(named > 30, "{named}");
}

#[test]
fn the_minimum_kernel_is_that_of_the_code() {
    let read = |path: &str| std::fs::read_to_string(Path::new(ROOT).join(path)).unwrap();
    let code = read("xdp-prog/src/program.rs");
    let (_, rest) = code.split_once("MINIMUM_KERNEL: &str = \"").unwrap();
    let (kernel, _) = rest.split_once('"').unwrap();
    assert!(read("docs/operate.md").contains(&format!("Linux {kernel} or newer")), "{kernel}");
}

#[test]
fn lines_end_at_column_100() {
    for (page, text) in pages() {
        for (number, line) in prose(&text) {
            let exempt = line.starts_with('|') || line.contains("://");
            let columns = shown(line).chars().count();
            assert!(exempt || columns <= COLUMNS, "{}:{number}: {columns} columns", page.display());
        }
    }
}

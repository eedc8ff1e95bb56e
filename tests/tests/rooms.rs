//! The order of the rooms: of the files and folders in one folder, none uses another that, by way
//! of others or not, uses it. A file may use the file that declares its folder, which declares what
//! all files in it have in common.

use std::collections::{BTreeMap, BTreeSet};
use std::fs;
use std::path::{Path, PathBuf};

/// A module's path: the names from the root of its crate.
type Module = Vec<String>;

/// The modules of a crate and their sources, without their tests.
fn modules(source: &Path) -> BTreeMap<Module, String> {
    let mut found = BTreeMap::new();
    let mut folders = vec![(source.to_owned(), Module::new())];
    while let Some((folder, parent)) = folders.pop() {
        for entry in fs::read_dir(&folder).unwrap() {
            let path: PathBuf = entry.unwrap().path();
            let name = path.file_stem().unwrap().to_str().unwrap().to_owned();
            let of = |name: String| parent.iter().cloned().chain([name]).collect::<Module>();
            if path.is_dir() && name != "bin" {
                folders.push((path, of(name)));
            } else if path.extension().is_some_and(|extension| extension == "rs") {
                let text = fs::read_to_string(&path).unwrap();
                let text = text.split("#[cfg(test)]\nmod tests {").next().unwrap().to_owned();
                match name.as_str() {
                    "tests" | "main" => {}
                    "mod" | "lib" => drop(found.insert(parent.clone(), text)),
                    _ => drop(found.insert(of(name), text)),
                }
            }
        }
    }
    found
}

/// The paths that a use declaration names: `a::{b, c::d}` are `a::b` and `a::c::d`.
fn expand(tree: &str) -> Vec<String> {
    let tree = tree.trim();
    let Some((prefix, rest)) = tree.split_once('{') else {
        return vec![tree.split(" as ").next().unwrap().to_owned()];
    };
    let (mut depth, mut start, mut paths) = (0, 0, Vec::new());
    for (at, letter) in rest.char_indices() {
        let ends = depth == 0 && matches!(letter, ',' | '}');
        if ends && !rest[start..at].trim().is_empty() {
            paths.extend(expand(&rest[start..at]).into_iter().map(|path| format!("{prefix}{path}")));
        }
        match letter {
            '{' => depth += 1,
            '}' => depth -= 1,
            _ => {}
        }
        if ends {
            start = at + 1;
        }
    }
    paths
}

/// The modules that a module uses.
fn uses(module: &Module, text: &str, modules: &BTreeMap<Module, String>) -> BTreeSet<Module> {
    let code: Vec<_> = text.lines().map(|line| line.split("//").next().unwrap()).collect();
    let (mut paths, mut rest) = (Vec::new(), String::new());
    for part in code.join("\n").split_inclusive(';') {
        let declaration = part.trim_start().trim_start_matches("pub(super) ").trim_start_matches("pub ");
        match declaration.strip_prefix("use ") {
            Some(tree) => paths.extend(expand(tree.trim_end_matches(';'))),
            None => rest += part,
        }
    }
    for start in ["crate::", "super::"] {
        for (at, _) in rest.match_indices(start) {
            let path = rest[at..].split(|letter: char| !(letter.is_alphanumeric() || "_:".contains(letter)));
            paths.push(path.into_iter().next().unwrap().to_owned());
        }
    }
    let resolve = |path: String| {
        let names: Vec<_> = path.split("::").map(|name| name.trim().to_owned()).collect();
        let up = names.iter().take_while(|name| *name == "super").count();
        let mut full = match names[0].as_str() {
            "crate" => names[1..].to_vec(),
            "super" => [&module[..module.len().checked_sub(up)?], &names[up..]].concat(),
            _ => [module.as_slice(), &names].concat(),
        };
        while !modules.contains_key(&full) {
            full.pop()?;
        }
        Some(full)
    };
    paths.into_iter().filter_map(resolve).collect()
}

/// For each pair of siblings of which one uses the other: the two, and the modules in them that do.
type Edges = BTreeMap<Module, BTreeMap<Module, (Module, Module)>>;

fn edges(modules: &BTreeMap<Module, String>) -> Edges {
    let mut edges = Edges::new();
    for (module, text) in modules {
        for used in uses(module, text, modules) {
            let common = module.iter().zip(&used).take_while(|(a, b)| a == b).count();
            // Neither lies in the other.
            if common < module.len() && common < used.len() {
                let (user, of) = (module[..=common].to_vec(), used[..=common].to_vec());
                edges.entry(user).or_default().insert(of, (module.clone(), used));
            }
        }
    }
    edges
}

/// A circle, if there is one: each uses the next.
fn circle(edges: &Edges) -> Option<Vec<&Module>> {
    fn visit<'a>(
        at: &'a Module,
        edges: &'a Edges,
        path: &mut Vec<&'a Module>,
        done: &mut BTreeSet<&'a Module>,
    ) -> bool {
        if path.contains(&at) {
            path.push(at);
            return true;
        }
        if !done.insert(at) {
            return false;
        }
        path.push(at);
        if edges.get(at).is_some_and(|next| next.keys().any(|next| visit(next, edges, path, done))) {
            return true;
        }
        path.pop();
        false
    }
    let mut done = BTreeSet::new();
    edges.keys().find_map(|start| {
        let mut path = Vec::new();
        visit(start, edges, &mut path, &mut done).then_some(path)
    })
}

#[test]
fn no_file_or_room_uses_one_that_uses_it() {
    let root = Path::new(env!("CARGO_MANIFEST_DIR")).parent().unwrap();
    for name in ["packet", "shm", "xdp-prog", "workers", "dispatcher"] {
        let modules = modules(&root.join(name).join("src"));
        assert!(modules.len() > 3, "{name} has modules");
        let edges = edges(&modules);
        let circle = circle(&edges).map(|path| {
            let step = |pair: &[&Module]| {
                let (user, used) = &edges[pair[0]][pair[1]];
                format!("{} uses {}", user.join("::"), used.join("::"))
            };
            path.windows(2).map(step).collect::<Vec<_>>()
        });
        assert_eq!(circle, None, "{name}");
    }
}

#[test]
fn a_circle_is_found() {
    let module = |name: &str, text: &str| (vec![name.to_owned()], text.to_owned());
    let crate_of = |last: &str| {
        let c = module("c", last);
        [module("a", "use crate::b::{B, X};"), module("b", "fn b() { crate::c::f() }"), c].into()
    };
    assert!(circle(&edges(&crate_of("use super::a;"))).is_some());
    assert!(circle(&edges(&crate_of("// use super::a;"))).is_none());
}

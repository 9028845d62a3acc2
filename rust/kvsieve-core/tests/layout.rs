//! The sources themselves: which module may import which, and how long files and functions are.

use std::collections::{BTreeMap, BTreeSet};
use std::fs;
use std::path::{Path, PathBuf};

const LINES_OF_A_FILE: usize = 500;
const LINES_OF_A_FUNCTION: usize = 80;

/// Files and folders of `src`, from the ground up. Each imports from those before it only.
const ORDER: [&str; 18] = [
    "error",
    "fault",
    "ids",
    "budget",
    "pins",
    "fork",
    "tensor",
    "rope",
    "rank",
    "plan",
    "block",
    "storage",
    "evict",
    "position",
    "select",
    "planner",
    "kernels",
    "reference",
];

type Path2 = Vec<String>;

fn sources(folder: &Path, to: &mut Vec<PathBuf>) {
    let mut entries: Vec<_> = fs::read_dir(folder).unwrap().map(|entry| entry.unwrap().path()).collect();
    entries.sort();
    for path in entries {
        if path.is_dir() {
            sources(&path, to);
        } else if path.extension().is_some_and(|extension| extension == "rs") {
            to.push(path);
        }
    }
}

/// The crate's folder, asked for when the tests run: clones with the same sources share what is compiled.
pub fn root() -> PathBuf {
    std::env::var_os("CARGO_MANIFEST_DIR").expect("cargo says where the crate is").into()
}

/// The text with spaces for comments, and for what stands in quotes.
fn code(text: &str) -> String {
    let bytes: Vec<char> = text.chars().collect();
    let (mut out, mut i) = (String::with_capacity(text.len()), 0);
    let blank = |c: char| if c == '\n' { '\n' } else { ' ' };
    while i < bytes.len() {
        let rest = &bytes[i..];
        let end = match rest {
            ['/', '/', ..] => rest.iter().position(|&c| c == '\n').unwrap_or(rest.len()),
            ['"', ..] => {
                let mut at = 1;
                while rest[at] != '"' {
                    at += if rest[at] == '\\' { 2 } else { 1 };
                }
                at + 1
            }
            ['\'', '\\', _, '\'', ..] => 4,
            ['\'', _, '\'', ..] => 3,
            _ => 0,
        };
        out.extend(rest[..end].iter().map(|&c| blank(c)));
        i += end;
        if end == 0 {
            out.push(bytes[i]);
            i += 1;
        }
    }
    out
}

fn words(text: &str) -> impl Iterator<Item = (usize, &str)> {
    let inside = |c: char| c.is_alphanumeric() || c == '_';
    let mut from = 0;
    std::iter::from_fn(move || {
        let start = from + text[from..].find(inside)?;
        let len = text[start..].find(|c| !inside(c)).unwrap_or(text.len() - start);
        from = start + len;
        Some((start, &text[start..from]))
    })
}

/// Name, first line and number of lines of every function with a body.
fn functions(code: &str) -> Vec<(String, usize, usize)> {
    let mut found = Vec::new();
    let mut words = words(code).peekable();
    while let Some((at, word)) = words.next() {
        let Some((_, name)) = words.peek().filter(|_| word == "fn") else { continue };
        let (mut depth, mut body) = (0, 0);
        for (i, c) in code[at..].char_indices() {
            match c {
                '(' | '[' => depth += 1,
                ')' | ']' => depth -= 1,
                ';' if depth == 0 && body == 0 => break,
                '{' => body += 1,
                '}' => body -= 1,
                _ => {}
            }
            if c == '}' && body == 0 {
                let lines = code[at..at + i].matches('\n').count() + 1;
                found.push(((*name).to_string(), code[..at].matches('\n').count() + 1, lines));
                break;
            }
        }
    }
    found
}

/// The paths of a use tree: `a::{b, c::d}` is `a::b` and `a::c::d`.
fn expand(tree: &str, before: &[String], to: &mut Vec<Path2>) {
    let tree = tree.trim();
    let (head, group) = match tree.find('{') {
        Some(at) => (&tree[..at], Some(&tree[at + 1..tree.rfind('}').unwrap()])),
        None => (tree.split(" as ").next().unwrap(), None),
    };
    let mut path = before.to_vec();
    path.extend(head.split("::").map(str::trim).filter(|part| !part.is_empty()).map(String::from));
    let Some(group) = group else { return to.push(path) };
    let (mut depth, mut from) = (0, 0);
    for (i, c) in group.char_indices().chain([(group.len(), ',')]) {
        match c {
            '{' => depth += 1,
            '}' => depth -= 1,
            ',' if depth == 0 => {
                if !group[from..i].trim().is_empty() {
                    expand(&group[from..i], &path, to);
                }
                from = i + 1;
            }
            _ => {}
        }
    }
}

/// Every path that a file names: after `use`, and in full from `crate` or `super` on. A glob inside a module of the file is its own;
/// `use<'a>` says what an opaque type captures.
fn paths(code: &str) -> Vec<Path2> {
    let mut found = Vec::new();
    for (at, word) in words(code) {
        let end = |stop: &[char]| at + code[at..].find(stop).unwrap_or(code.len() - at);
        let before = code[..at].trim_end();
        if word == "use" && !code[at + 3..].starts_with('<') {
            let indented = !code[..at].ends_with('\n');
            let tree = &code[at + 3..end(&[';'])];
            if !(indented && tree.trim() == "super::*") {
                expand(tree, &[], &mut found);
            }
        } else if matches!(word, "crate" | "super") && !before.ends_with("(in") && !before.ends_with("use") {
            let path: String =
                code[at..].chars().take_while(|c| c.is_alphanumeric() || matches!(c, '_' | ':')).collect();
            if path.contains("::") && path != "super::" {
                expand(path.trim_end_matches(':'), &[], &mut found);
            }
        }
    }
    found
}

/// The module that a path in `module` is about, if it is one of ours.
fn resolve(module: &[String], path: &[String], modules: &BTreeSet<Path2>) -> Option<Path2> {
    let (mut full, mut rest) = match path.first()?.as_str() {
        "crate" => (Vec::new(), &path[1..]),
        "super" | "self" => (module.to_vec(), path),
        _ => (module.to_vec(), path),
    };
    while let Some((first, others)) = rest.split_first().filter(|(first, _)| matches!(first.as_str(), "super" | "self"))
    {
        if first == "super" {
            full.pop();
        }
        rest = others;
    }
    // What the crate's root hands on.
    if full.is_empty() && rest.first().is_some_and(|name| name == "Error" || name == "Result") {
        return Some(vec!["error".to_string()]);
    }
    full.extend(rest.iter().cloned());
    while !full.is_empty() && !modules.contains(&full) {
        full.pop();
    }
    // A path that starts with neither names a child, or another crate.
    let named = matches!(path[0].as_str(), "crate" | "super" | "self") || full.len() > module.len();
    (named && !full.is_empty()).then_some(full)
}

/// For each module those that it imports from; tests inside a file do not count.
fn imports() -> BTreeMap<Path2, BTreeSet<Path2>> {
    let src = root().join("src");
    let mut files = Vec::new();
    sources(&src, &mut files);
    let name = |file: &PathBuf| {
        let stem = file.strip_prefix(&src).unwrap().with_extension("");
        let mut parts: Path2 = stem.iter().map(|part| part.to_str().unwrap().to_string()).collect();
        parts.pop_if(|last| last == "mod");
        parts
    };
    let modules: BTreeSet<Path2> = files.iter().map(name).filter(|parts| parts != &["lib"]).collect();
    let mut found = BTreeMap::new();
    for file in files.iter().filter(|file| name(file) != ["lib"]) {
        let text = code(&fs::read_to_string(file).unwrap());
        let text = text.split("#[cfg(test)]\nmod tests").next().unwrap();
        let mine = name(file);
        let all = paths(text).into_iter().filter_map(|path| resolve(&mine, &path, &modules));
        let all: BTreeSet<Path2> = all.filter(|other| other != &mine).collect();
        found.insert(mine, all);
    }
    found
}

/// Some modules that import each other in a circle, if there are any.
fn circle<T: Ord + Clone>(of: &BTreeMap<T, BTreeSet<T>>) -> Option<Vec<T>> {
    let mut left = of.clone();
    while !left.is_empty() {
        let free: Vec<T> = left
            .iter()
            .filter(|(_, to)| to.iter().all(|to| !left.contains_key(to)))
            .map(|(from, _)| from.clone())
            .collect();
        if free.is_empty() {
            // Those that are only led to from a circle go too.
            let led: BTreeSet<T> = left.values().flatten().cloned().collect();
            let before = left.len();
            left.retain(|from, _| led.contains(from));
            if left.len() == before {
                return Some(left.into_keys().collect());
            }
        }
        left.retain(|from, _| !free.contains(from));
    }
    None
}

#[test]
fn no_module_imports_in_a_circle() {
    let found = imports();
    assert!(found.values().map(BTreeSet::len).sum::<usize>() > 150, "the imports are not found any more");
    assert_eq!(circle(&found), None);
    // Folders inside folders too: what a folder's files import is what the folder imports.
    for depth in 1..4 {
        let mut folders: BTreeMap<Path2, BTreeSet<Path2>> = BTreeMap::new();
        for (from, to) in &found {
            let cut = |path: &Path2| path[..path.len().min(depth)].to_vec();
            // Between siblings only: that a folder's own file and the files in it import each other is what the files' circle is for.
            let all = to
                .iter()
                .map(cut)
                .filter(|to| *to != cut(from) && !to.starts_with(&cut(from)) && !cut(from).starts_with(to));
            folders.entry(cut(from)).or_default().extend(all);
        }
        assert_eq!(circle(&folders), None, "at depth {depth}");
    }
}

#[test]
fn imports_point_to_the_ground() {
    let level = |path: &Path2| ORDER.iter().position(|name| *name == path[0]);
    for (from, to) in imports() {
        let mine = level(&from).unwrap_or_else(|| panic!("{from:?} is not in the list"));
        for to in to {
            assert!(level(&to).unwrap() <= mine, "{from:?} imports from {to:?}, which stands above it");
        }
    }
}

#[test]
fn a_circle_is_found() {
    let of = |pairs: &[(u8, &[u8])]| -> BTreeMap<u8, BTreeSet<u8>> {
        pairs.iter().map(|(from, to)| (*from, to.iter().copied().collect())).collect()
    };
    assert_eq!(circle(&of(&[(1, &[2]), (2, &[3]), (3, &[])])), None);
    assert_eq!(circle(&of(&[(0, &[1]), (1, &[2]), (2, &[1, 3]), (3, &[])])), Some(vec![1, 2]));
    let text = "use crate::{a::{B, c::D}, e};\nfn f() { super::g::h(); }\nuse crate::Error as E;";
    let found: Vec<String> = paths(text).iter().map(|path| path.join("::")).collect();
    assert_eq!(found, ["crate::a::B", "crate::a::c::D", "crate::e", "super::g::h", "crate::Error"]);
}

#[test]
fn files_and_functions_are_short() {
    let mut files = Vec::new();
    for folder in ["src", "tests", "benches", "../kvsieve-py/src"] {
        sources(&root().join(folder), &mut files);
    }
    let mut longest = 0;
    for file in &files {
        let text = fs::read_to_string(file).unwrap();
        let lines = text.lines().count();
        assert!(lines <= LINES_OF_A_FILE, "{} has {lines} lines; split it along meaning", file.display());
        for (name, line, lines) in functions(&code(&text)) {
            longest = longest.max(lines);
            assert!(lines <= LINES_OF_A_FUNCTION, "{}:{line}: {name} has {lines} lines", file.display());
        }
    }
    assert!(longest > LINES_OF_A_FUNCTION / 2, "functions are not found any more");
}

//! Everything that uses the core from outside. A part of the crate under test (see `src/lib.rs`), so that its kernels, which take
//! minutes to compile, are compiled once for these tests and for those that stand beside the code.

mod apart;
mod arena;
mod chunk;
mod common;
mod dense;
mod evict;
mod heaviest;
mod join;
mod kernels;
mod layout;
mod linear;
mod machine;
mod packed;
mod pieces;
mod position;
mod search;
mod sets;
mod sieve;
mod step;
mod tier;
mod tier_changes;
mod tier_later;

#[test]
fn every_file_beside_this_one_is_compiled() {
    for entry in std::fs::read_dir(layout::root().join("tests")).unwrap() {
        let name = entry.unwrap().file_name().into_string().unwrap();
        let module = name.trim_end_matches(".rs");
        let is_listed = include_str!("all.rs").contains(&format!("\nmod {module};"));
        assert!(is_listed || module == "all" || module.contains('.'), "tests/{name} is in no list of tests/all.rs");
    }
}

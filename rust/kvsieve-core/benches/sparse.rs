//! Decode attention to what a search chooses, beside dense attention: one token, one thread, caches cold. Prints milliseconds.
//!
//! `cargo bench --bench sparse -- 32 128 512` takes lengths in units of 1,024 tokens; other words, as in `512 plain first`, must all be in
//! a row's name. Before anything is timed, a token is compared with
//! the reference over the very keys that were chosen. Keys are random: the worst case for a search, and the same work as any other.
//! Each storage has a dense rival of its own: plain keys, thin ones (half of the channels, as pairs), and raw ones that are rotated on
//! read; rounds of both take turns, and the ratio is that of medians.

use std::hint::black_box;
use std::ops::Range;
use std::sync::Arc;
use std::time::Duration;

use half::bf16;
use kvsieve_core::ids::{BlockId, PACKED, Run};
use kvsieve_core::kernels::isa::isa;
use kvsieve_core::kernels::select::{QueryBlock, Selection, Turn, select};
use kvsieve_core::kernels::sparse::{Scoring, Sparse, SparseRow, attend_sparse};
use kvsieve_core::kernels::{Attend, SpanTrig, attend};
use kvsieve_core::plan::{Move, Span, Spans};
use kvsieve_core::reference;
use kvsieve_core::rope::{Layout, Rope};
use kvsieve_core::select::Representative::{self, First, Middle};
use kvsieve_core::select::hip::Hip;
use kvsieve_core::select::infinite::{Infinite, Stage};
use kvsieve_core::select::{Choice, Rule, Shown};
use kvsieve_core::storage::arena::Arena;
use kvsieve_core::storage::packed::{Channels, Chosen, Packing};
use kvsieve_core::tensor::{Dtype, Elems, ElemsMut, View};

const KV_HEADS: usize = 8;
const GROUP: usize = 4;
const DIM: usize = 128;
const HEADS: usize = KV_HEADS * GROUP;
/// Tokens of a round: a multiple of every refresh.
const STEPS: usize = 16;
const ROUNDS: usize = 5;

/// How tokens are stored, scored and read.
#[derive(Clone, Copy, PartialEq, Eq)]
enum Kind {
    Plain,
    Thin,
    /// Raw keys scored at one distance, and read where they stand.
    Raw,
    /// The same, read as if nothing lay between.
    Consecutive,
    /// Raw keys scored and read where they stand.
    Placed,
}

struct Noise(u64);

impl Noise {
    fn next(&mut self) -> f32 {
        self.0 ^= self.0 << 13;
        self.0 ^= self.0 >> 7;
        self.0 ^= self.0 << 17;
        (self.0 >> 40) as f32 / (1 << 23) as f32 - 1.0
    }

    fn bits(&mut self, n: usize) -> Vec<u16> {
        (0..n).map(|_| bf16::from_f32(self.next()).to_bits()).collect()
    }
}

/// Time of this thread alone: a shared machine's other work does not count.
fn cpu_time() -> Duration {
    let mut time = libc::timespec { tv_sec: 0, tv_nsec: 0 };
    // SAFETY: the call fills the struct that it is given.
    unsafe { libc::clock_gettime(libc::CLOCK_THREAD_CPUTIME_ID, &mut time) };
    Duration::new(time.tv_sec as u64, time.tv_nsec as u32)
}

fn timed<R>(f: impl FnOnce() -> R) -> (R, f64) {
    let start = cpu_time();
    let found = black_box(f());
    (found, (cpu_time() - start).as_secs_f64() * 1e3)
}

/// Reads what no cache holds, so that the next token finds nothing there.
fn cool(junk: &[u64]) {
    black_box(junk.iter().fold(0u64, |sum, x| sum.wrapping_add(*x)));
}

fn median(mut x: Vec<f64>) -> f64 {
    x.sort_by(f64::total_cmp);
    x[x.len() / 2]
}

fn mean(x: &[f64]) -> f64 {
    x.iter().sum::<f64>() / x.len() as f64
}

fn hip(representative: Representative, refresh: usize) -> Rule {
    let hip = Hip::new(1024, 2, representative).expect("a budget");
    Rule::new(Arc::new(hip), 16, 256, vec![refresh]).expect("a rule")
}

fn infinite(refresh: [usize; 3]) -> Rule {
    let stages = [(256, 32768), (32, 8192), (8, 2048)].map(|(chunk, keep)| Stage { chunk, keep }).to_vec();
    let infinite = Infinite::new(stages, First, false).expect("stages");
    Rule::new(Arc::new(infinite), 256, 1024, refresh.to_vec()).expect("a rule")
}

/// Bounds of blocks first, then the best pairs of four times as many tokens.
fn quest(refresh: [usize; 2]) -> Rule {
    let stages = [(64, 4096), (2, 1024)].map(|(chunk, keep)| Stage { chunk, keep }).to_vec();
    let staged = Infinite::new(stages, First, true).expect("stages");
    Rule::new(Arc::new(staged), 64, 256, refresh.to_vec()).expect("a rule")
}

struct Bench {
    arena: Arena,
    runs: Vec<Run>,
    kind: Kind,
    rope: Arc<Rope>,
    noise: Noise,
    junk: Vec<u64>,
}

impl Bench {
    fn new(tokens: usize, kind: Kind) -> Self {
        let mut arena = Arena::new(KV_HEADS, DIM, DIM, Dtype::BF16).expect("an arena");
        let mut noise = Noise(88_172_645_463_325_252);
        let some: Vec<(Vec<u16>, Vec<u16>)> =
            (0..37).map(|_| (noise.bits(KV_HEADS * 64 * DIM), noise.bits(KV_HEADS * 64 * DIM))).collect();
        let half: Vec<i64> = (0..KV_HEADS as i64)
            .flat_map(|head| (0..DIM as i64 / 4).chain(DIM as i64 / 2..DIM as i64 * 3 / 4).map(move |c| c + head % 8))
            .collect();
        let channels = Arc::new(Channels::new(&half, &[DIM / 4; KV_HEADS], DIM).expect("channels"));
        if kind == Kind::Thin {
            let packing = Packing { key_kept: DIM / 2, key_bits: 0, value_bits: 0, group: 32 };
            arena.set_packing(packing).expect("a packing");
        }
        let mut runs = Vec::new();
        for i in 0..tokens / 64 {
            let (k, v) = &some[(i * i + i / 7) % some.len()];
            let at = if kind == Kind::Thin { 0 } else { i as u32 };
            let plain = Run { block: BlockId(at), lo: 0, hi: 64 };
            arena.write(&[plain], Elems::Bits(k), Elems::Bits(v)).expect("written");
            if kind == Kind::Thin {
                let to = BlockId(PACKED + i as u32);
                let packing = Move { from: plain.block, from_slot: 0, to, to_slot: 0, len: 64 };
                arena.pack(&[packing], &Chosen::New(Arc::clone(&channels))).expect("packed");
                runs.push(Run { block: to, ..plain });
            } else {
                runs.push(plain);
            }
        }
        let inv_freq = (0..DIM / 2).map(|i| 5e5f64.powf(-(i as f64) / (DIM / 2) as f64)).collect();
        let rope = Arc::new(Rope::new(inv_freq, Layout::Half, 1.0).expect("a rope"));
        Bench { arena, runs, kind, rope, noise, junk: vec![1; 12 << 20] }
    }

    fn turns(&self) -> bool {
        !matches!(self.kind, Kind::Plain | Kind::Thin)
    }

    /// The runs of the first `tokens` residents.
    fn runs(&self, tokens: usize) -> Vec<Run> {
        let mut runs = self.runs[..tokens.div_ceil(64)].to_vec();
        if let Some(last) = runs.last_mut() {
            last.hi = (tokens - (runs_before(tokens))) as u32;
        }
        runs
    }

    /// Where the last of the residents sees each run.
    fn shown(&self, runs: &[Run]) -> Vec<Shown> {
        if !self.turns() {
            return Vec::new();
        }
        let last = runs.iter().map(|run| i64::from(run.len())).sum::<i64>() - 1;
        (0..runs.len() as i64).map(|i| Shown { shift: last - i * 64, rotate_keys: true }).collect()
    }

    fn dense(&mut self) -> f64 {
        let level = isa().expect("a valid KVSIEVE_ISA");
        let shown = self.shown(&self.runs);
        let span = |(i, r): (usize, &Run)| {
            let Shown { shift, rotate_keys } = shown.get(i).copied().unwrap_or(Shown { shift: 0, rotate_keys: false });
            Span { block: r.block, lo: r.lo, hi: r.hi, shift, rotate_keys }
        };
        let spans: Vec<Span> = self.runs.iter().enumerate().map(span).collect();
        let spans = Spans { num_rows: 1, num_queries: 1, starts: vec![0, spans.len() as u32], spans };
        let mut out = vec![0u16; HEADS * DIM];
        let q = self.noise.bits(HEADS * DIM);
        let q = View::contiguous("q", Elems::Bits(&q), [1, HEADS, 1, DIM]).expect("a view");
        let scale = (DIM as f32).powf(-0.5);
        // All layers of a model share them.
        let trig = self.turns().then(|| SpanTrig::new(&spans, &self.rope));
        let args = Attend {
            q,
            spans: &spans,
            trig: trig.as_ref(),
            scale,
            softcap: None,
            sinks: None,
            apply_factor: false,
            threads: 1,
            level,
        };
        cool(&self.junk);
        timed(|| attend(&self.arena, &args, ElemsMut::Bits(&mut out), None, None).expect("attended")).1
    }

    /// Milliseconds of a token, on average, and representative keys scored and keys read by a head.
    fn sparse(&mut self, rule: &Rule) -> (f64, f64, f64) {
        let mut choices = vec![Choice::default()];
        let (mut times, mut searched, mut read) = (Vec::new(), 0, 0);
        for step in 0..STEPS {
            let tokens = self.runs.len() * 64 - STEPS + step;
            let runs = self.runs(tokens);
            let shown = self.shown(&runs);
            let bits = self.noise.bits(HEADS * DIM);
            let q = View::contiguous("q", Elems::Bits(&bits), [1, HEADS, 1, DIM]).expect("a view");
            let rows = [SparseRow { runs: &runs, shown: &shown, new_len: 1 }];
            let (scale, level) = ((DIM as f32).powf(-0.5), isa().expect("a valid KVSIEVE_ISA"));
            let scoring = match self.kind {
                Kind::Plain | Kind::Thin => Scoring::Stored,
                Kind::Raw | Kind::Consecutive => Scoring::Relative,
                Kind::Placed => Scoring::Placed,
            };
            let args = Sparse {
                q,
                rope: self.turns().then_some(&self.rope),
                apply_factor: false,
                scoring,
                consecutive: self.kind == Kind::Consecutive,
                rows: &rows,
                query_block: 64,
                query_stride: 1,
                scale,
                softcap: None,
                sinks: None,
                threads: 1,
                level,
            };
            let mut out = vec![0u16; HEADS * DIM];
            cool(&self.junk);
            let (work, ms) = timed(|| {
                let to = ElemsMut::Bits(&mut out);
                attend_sparse(&self.arena, rule, &mut choices, &args, to, None, &|| false).expect("attended")
            });
            times.push(ms);
            (searched, read) = (searched + work.searched, read + work.read);
            if step == 0 {
                self.check(rule, &choices[0], &runs, &q, &out);
            }
        }
        let per = |x: u64| x as f64 / (STEPS * KV_HEADS) as f64;
        (mean(&times), per(searched), per(read))
    }

    /// The selection alone.
    fn search(&mut self, rule: &Rule) -> f64 {
        let tokens = self.runs.len() * 64;
        let shown = self.shown(&self.runs);
        let times = (0..STEPS).map(|_| {
            let bits = self.noise.bits(HEADS * DIM);
            let q = View::contiguous("q", Elems::Bits(&bits), [1, HEADS, 1, DIM]).expect("a view");
            let region = rule.region(tokens - 1, 1).expect("a region");
            let (runs, shown) = (&self.runs, &shown);
            let blocks = [QueryBlock { row: 0, columns: 0..1, runs, shown, first: tokens - 1, region }];
            let level = isa().expect("a valid KVSIEVE_ISA");
            let relative = self.kind != Kind::Placed;
            let turn = self.turns().then(|| Turn { rope: &self.rope, apply_factor: false, relative });
            let (blocks, window, rule) = (&blocks, rule.window, &*rule.select);
            let args = Selection { q, turn, blocks, query_stride: 1, window, rule, start: 0, threads: 1, level };
            cool(&self.junk);
            timed(|| select(&self.arena, &args, &mut []).expect("searched")).1
        });
        median(times.collect())
    }

    /// Compares a token with the reference over the keys that it chose.
    fn check(&self, rule: &Rule, choice: &Choice, runs: &[Run], q: &View<'_>, out: &[u16]) {
        let position = runs.iter().map(|r| r.len() as usize).sum::<usize>() - 1;
        let scale = f64::from((DIM as f32).powf(-0.5));
        for (head, chosen) in choice.chosen.iter().enumerate() {
            let mut tokens = Vec::new();
            rule.read(&choice.region, chosen, position, &mut |stretch: Range<u32>| tokens.extend(stretch));
            let span = |(i, &t): (usize, &u32)| {
                let lo = t % 64;
                let away = if self.kind == Kind::Consecutive { tokens.len() - 1 - i } else { position - t as usize };
                let (shift, rotate_keys) = if self.turns() { (away as i64 + i64::from(lo), true) } else { (0, false) };
                Span { block: runs[t as usize / 64].block, lo, hi: lo + 1, shift, rotate_keys }
            };
            let spans: Vec<Span> = tokens.iter().enumerate().map(span).collect();
            let spans = Spans { num_rows: 1, num_queries: 1, starts: vec![0, spans.len() as u32], spans };
            let rope = self.turns().then_some(&*self.rope);
            let (softcap, sinks, apply_factor) = (None, None, false);
            let params = reference::Params { q, spans: &spans, rope, scale, softcap, sinks, apply_factor };
            let exact = reference::attend(&self.arena, &params).expect("the reference").out;
            let mine = head * GROUP * DIM..(head + 1) * GROUP * DIM;
            let norm = exact[mine.clone()].iter().map(|x| x * x).sum::<f64>().sqrt();
            let off = mine.map(|i| (exact[i] - bf16::from_bits(out[i]).to_f64()).powi(2)).sum::<f64>().sqrt() / norm;
            assert!(off <= 1e-2, "head {head}: relative error {off:.1e}");
        }
    }
}

fn runs_before(tokens: usize) -> usize {
    (tokens - 1) / 64 * 64
}

fn main() {
    let words = || std::env::args().skip(1).filter(|word| !word.starts_with('-'));
    let asked: Vec<usize> = words().filter_map(|word| word.parse().ok()).collect();
    let wanted: Vec<String> = words().filter(|word| word.parse::<usize>().is_err()).collect();
    let lengths = if asked.is_empty() { vec![32, 128] } else { asked };
    println!("level {}; {HEADS}/{KV_HEADS}/{DIM} bfloat16, one thread", isa().expect("a valid KVSIEVE_ISA").name());
    for length in lengths {
        for (storage, kind) in [
            ("plain", Kind::Plain),
            ("thin, half of the channels", Kind::Thin),
            ("raw, scored at one distance", Kind::Raw),
            ("raw, read consecutively", Kind::Consecutive),
            ("raw, scored where they stand", Kind::Placed),
        ] {
            let mut rules =
                vec![("HiP 1024 middle, every token", hip(Middle, 1)), ("HiP 1024 middle, every 8", hip(Middle, 8))];
            if kind == Kind::Plain {
                rules.push(("HiP 1024 first, every token", hip(First, 1)));
                rules.push(("InfiniteHiP 3K, every token", infinite([1, 1, 1])));
                rules.push(("InfiniteHiP 3K, every 16/8/4", infinite([16, 8, 4])));
                rules.push(("Quest 1024, every token", quest([1, 1])));
                rules.push(("Quest 1024, every 8/1", quest([8, 1])));
                rules.push(("Quest 1024, every 8", quest([8, 8])));
            }
            rules.retain(|(name, _)| wanted.iter().all(|word| name.contains(word) || storage.contains(word)));
            if rules.is_empty() {
                continue;
            }
            let mut bench = Bench::new(length << 10, kind);
            if kind == Kind::Plain {
                bench.arena.make_bounds(&bench.runs).expect("bounds");
            }
            for (name, rule) in rules {
                let (mut dense, mut sparse, mut work) = (Vec::new(), Vec::new(), (0.0, 0.0));
                for _ in 0..ROUNDS {
                    dense.push(bench.dense());
                    let (ms, searched, read) = bench.sparse(&rule);
                    sparse.push(ms);
                    work = (searched, read);
                }
                let search = bench.search(&rule);
                let (dense, sparse, (searched, read)) = (median(dense), median(sparse), work);
                println!(
                    "{length}k {storage:28} {name:30} {sparse:6.3} ms, dense {dense:7.2} ms ({:5.1} x); whole search {search:.3}; a head \
                     scores {searched:.0} and reads {read:.0}",
                    dense / sparse
                );
            }
        }
    }
}

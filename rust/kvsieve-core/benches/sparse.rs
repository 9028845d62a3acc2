//! Decode attention to what a search chooses, beside dense attention: one token, one thread, caches cold. Prints milliseconds.
//!
//! `cargo bench --bench sparse -- 32 128 512` takes lengths in units of 1,024 tokens. Before anything is timed, a token is compared with
//! the reference over the very keys that were chosen. Keys are random: the worst case for a search, and the same work as any other.

use std::hint::black_box;
use std::ops::Range;
use std::time::Duration;

use half::bf16;
use kvsieve_core::ids::{BlockId, Run};
use kvsieve_core::kernels::isa::isa;
use kvsieve_core::kernels::search::{Method, QueryBlock, Search, search};
use kvsieve_core::kernels::sparse::{Scoring, Sparse, SparseRow, attend_sparse};
use kvsieve_core::kernels::{Attend, Dtype, Elems, ElemsMut, View, attend};
use kvsieve_core::plan::{Span, Spans};
use kvsieve_core::reference;
use kvsieve_core::select::Representative::{self, Centre, First};
use kvsieve_core::select::hip::Hip;
use kvsieve_core::select::infinite::{Infinite, Stage};
use kvsieve_core::select::kept::{Choice, Rule, Search as Chooses};
use kvsieve_core::store::arena::Arena;

const KV_HEADS: usize = 8;
const GROUP: usize = 4;
const DIM: usize = 128;
const HEADS: usize = KV_HEADS * GROUP;
/// Tokens of a round: a multiple of every refresh.
const STEPS: usize = 16;

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
    let hip = Hip { budget: 1024, block: 2, representative };
    Rule::new(Chooses::Hip(hip), 16, 256, vec![refresh]).expect("a rule")
}

fn infinite(refresh: [usize; 3]) -> Rule {
    let stages = [(256, 32768), (32, 8192), (8, 2048)].map(|(chunk, keep)| Stage { chunk, keep }).to_vec();
    let infinite = Infinite::new(stages, First).expect("stages");
    Rule::new(Chooses::Infinite(infinite), 256, 1024, refresh.to_vec()).expect("a rule")
}

struct Bench {
    arena: Arena,
    runs: Vec<Run>,
    noise: Noise,
    junk: Vec<u64>,
}

impl Bench {
    fn new(tokens: usize) -> Self {
        let mut arena = Arena::new(KV_HEADS, DIM, DIM, Dtype::BF16).expect("an arena");
        let mut noise = Noise(88_172_645_463_325_252);
        let some: Vec<(Vec<u16>, Vec<u16>)> =
            (0..37).map(|_| (noise.bits(KV_HEADS * 64 * DIM), noise.bits(KV_HEADS * 64 * DIM))).collect();
        let runs: Vec<Run> = (0..tokens / 64).map(|b| Run { block: BlockId(b as u32), lo: 0, hi: 64 }).collect();
        for (i, run) in runs.iter().enumerate() {
            let (k, v) = &some[(i * i + i / 7) % some.len()];
            arena.write(&[*run], Elems::Bits(k), Elems::Bits(v)).expect("written");
        }
        Bench { arena, runs, noise, junk: vec![1; 12 << 20] }
    }

    /// The runs of the first `tokens` residents.
    fn runs(&self, tokens: usize) -> Vec<Run> {
        let mut runs = self.runs[..tokens.div_ceil(64)].to_vec();
        if let Some(last) = runs.last_mut() {
            last.hi = (tokens - (runs_before(tokens))) as u32;
        }
        runs
    }

    fn dense(&mut self) -> f64 {
        let level = isa().expect("a valid KVSIEVE_ISA");
        let span = |r: &Run| Span { block: r.block, lo: r.lo, hi: r.hi, shift: 0, rotate_keys: false };
        let spans: Vec<Span> = self.runs.iter().map(span).collect();
        let spans = Spans { num_rows: 1, num_queries: 1, starts: vec![0, spans.len() as u32], spans };
        let mut out = vec![0u16; HEADS * DIM];
        let q = self.noise.bits(HEADS * DIM);
        let q = View::contiguous("q", Elems::Bits(&q), [1, HEADS, 1, DIM]).expect("a view");
        let scale = (DIM as f32).powf(-0.5);
        let args = Attend {
            q,
            spans: &spans,
            trig: None,
            scale,
            softcap: None,
            sinks: None,
            apply_factor: false,
            threads: 1,
            level,
        };
        let call = |out: &mut Vec<u16>| attend(&self.arena, &args, ElemsMut::Bits(out), None, None).expect("attended");
        median((0..5).map(|_| timed(|| call(&mut out)).1).collect())
    }

    /// Mean and extremes of a token, and representative keys scored and keys read by a head.
    fn sparse(&mut self, rule: &Rule) -> (Vec<f64>, f64, f64) {
        let mut choices = vec![Choice::default()];
        let (mut times, mut searched, mut read) = (Vec::new(), 0, 0);
        for step in 0..STEPS {
            let tokens = self.runs.len() * 64 - STEPS + step;
            let runs = self.runs(tokens);
            let bits = self.noise.bits(HEADS * DIM);
            let q = View::contiguous("q", Elems::Bits(&bits), [1, HEADS, 1, DIM]).expect("a view");
            let rows = [SparseRow { runs: &runs, shown: &[], new_len: 1 }];
            let (scale, level) = ((DIM as f32).powf(-0.5), isa().expect("a valid KVSIEVE_ISA"));
            let args = Sparse {
                q,
                rope: None,
                apply_factor: false,
                scoring: Scoring::Stored,
                consecutive: false,
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
        (times, per(searched), per(read))
    }

    /// The search alone.
    fn search(&mut self, rule: &Rule) -> f64 {
        let tokens = self.runs.len() * 64;
        let times = (0..STEPS).map(|_| {
            let bits = self.noise.bits(HEADS * DIM);
            let q = View::contiguous("q", Elems::Bits(&bits), [1, HEADS, 1, DIM]).expect("a view");
            let region = rule.region(tokens - 1, 1).expect("a region");
            let blocks =
                [QueryBlock { row: 0, columns: 0..1, runs: &self.runs, shown: &[], first: tokens - 1, region }];
            let method = match &rule.search {
                Chooses::Hip(hip) => Method::Hip(hip),
                Chooses::Infinite(infinite) => Method::Infinite(infinite, 0),
            };
            let level = isa().expect("a valid KVSIEVE_ISA");
            let args = Search {
                q,
                turn: None,
                blocks: &blocks,
                query_stride: 1,
                window: rule.window,
                method,
                threads: 1,
                level,
            };
            cool(&self.junk);
            timed(|| search(&self.arena, &args, &mut []).expect("searched")).1
        });
        mean(&times.collect::<Vec<_>>())
    }

    /// Compares a token with the reference over the keys that it chose.
    fn check(&self, rule: &Rule, choice: &Choice, runs: &[Run], q: &View<'_>, out: &[u16]) {
        let position = runs.iter().map(|r| r.len() as usize).sum::<usize>() - 1;
        let scale = f64::from((DIM as f32).powf(-0.5));
        for (head, chosen) in choice.chosen.iter().enumerate() {
            let mut spans = Vec::new();
            rule.read(&choice.region, chosen, position, &mut |stretch: Range<u32>| {
                let span =
                    |t: u32| Span { block: BlockId(t / 64), lo: t % 64, hi: t % 64 + 1, shift: 0, rotate_keys: false };
                spans.extend(stretch.map(span));
            });
            let spans = Spans { num_rows: 1, num_queries: 1, starts: vec![0, spans.len() as u32], spans };
            let params = reference::Params {
                q,
                spans: &spans,
                rope: None,
                scale,
                softcap: None,
                sinks: None,
                apply_factor: false,
            };
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
    let asked: Vec<usize> = std::env::args().filter_map(|a| a.parse().ok()).collect();
    let lengths = if asked.is_empty() { vec![32, 128] } else { asked };
    println!("level {}; {HEADS}/{KV_HEADS}/{DIM} bfloat16, one thread", isa().expect("a valid KVSIEVE_ISA").name());
    for length in lengths {
        let mut bench = Bench::new(length << 10);
        let dense = bench.dense();
        println!("{length}k tokens: dense {dense:.2} ms");
        let rules = [
            ("HiP 1024 centre, every token", hip(Centre, 1)),
            ("HiP 1024 first, every token", hip(First, 1)),
            ("HiP 1024 centre, every 8", hip(Centre, 8)),
            ("InfiniteHiP 3K, every token", infinite([1, 1, 1])),
            ("InfiniteHiP 3K, every 16/8/4", infinite([16, 8, 4])),
        ];
        for (name, rule) in rules {
            let (times, searched, read) = bench.sparse(&rule);
            let (all, best) = (mean(&times), times.iter().copied().fold(f64::INFINITY, f64::min));
            let search = bench.search(&rule);
            println!(
                "  {name:30} {all:6.3} ms ({:5.1} x), least {best:.3}; whole search {search:.3}; a head scores {searched:.0} and reads {read:.0}",
                dense / all
            );
        }
    }
}

//! Decode attention: one query, all heads. Prints GB/s of keys and values read, and the machine's own read bandwidth beside it.
//!
//! Plain tokens, and packed ones: thin keys (`k78`), codes of keys and values (`b4`), and thin keys rotated on read (`k78r`). To compare
//! packed with plain, divide the times.

use std::hint::black_box;
use std::sync::Arc;
use std::time::Duration;

use criterion::{BenchmarkId, Criterion, Throughput, criterion_group, criterion_main};
use half::{bf16, f16};
use kvsieve_core::ids::{BlockId, PACKED, Run};
use kvsieve_core::kernels::{Attend, SpanTrig, attend, isa::isa};
use kvsieve_core::plan::{Move, Span, Spans};
use kvsieve_core::reference;
use kvsieve_core::rope::{Layout, Rope};
use kvsieve_core::storage::arena::Arena;
use kvsieve_core::storage::packed::{Channels, Chosen, Packing};
use kvsieve_core::tensor::{Dtype, Elems, ElemsMut, View};

struct Noise(u64);

impl Noise {
    fn next(&mut self) -> f32 {
        self.0 ^= self.0 << 13;
        self.0 ^= self.0 >> 7;
        self.0 ^= self.0 << 17;
        (self.0 >> 40) as f32 / (1 << 23) as f32 - 1.0
    }

    fn elems(&mut self, n: usize, dtype: Dtype) -> (Vec<f32>, Vec<u16>) {
        match dtype {
            Dtype::F32 => ((0..n).map(|_| self.next()).collect(), Vec::new()),
            Dtype::BF16 => (Vec::new(), (0..n).map(|_| bf16::from_f32(self.next()).to_bits()).collect()),
            Dtype::F16 => (Vec::new(), (0..n).map(|_| f16::from_f32(self.next()).to_bits()).collect()),
        }
    }
}

fn elems((wide, narrow): &(Vec<f32>, Vec<u16>), dtype: Dtype) -> Elems<'_> {
    if dtype == Dtype::F32 { Elems::F32(wide) } else { Elems::Bits(narrow) }
}

/// Time of this thread alone: a shared machine's other work does not count.
fn cpu_time() -> Duration {
    let mut time = libc::timespec { tv_sec: 0, tv_nsec: 0 };
    // SAFETY: the call fills the struct that it is given.
    unsafe { libc::clock_gettime(libc::CLOCK_THREAD_CPUTIME_ID, &mut time) };
    Duration::new(time.tv_sec as u64, time.tv_nsec as u32)
}

/// Sums 256 MB with many chains: what this machine can read at this moment.
fn bandwidth() -> f64 {
    let data = vec![1u64; 32 << 20];
    let best = (0..5).map(|_| {
        let start = cpu_time();
        let sums = data.chunks_exact(64).fold([0u64; 64], |mut sums, chunk| {
            sums.iter_mut().zip(chunk).for_each(|(s, x)| *s = s.wrapping_add(*x));
            sums
        });
        black_box(sums);
        (data.len() * 8) as f64 / (cpu_time() - start).as_secs_f64() / 1e9
    });
    best.fold(0.0, f64::max)
}

/// How tokens are stored, and whether they are rotated on read.
#[derive(Clone, Copy)]
enum How {
    Plain,
    Thin { kept: usize, raw: bool },
    Codes { bits: u32 },
}

impl How {
    fn all(dim: usize) -> [How; 8] {
        // Kept are a half and about three fifths of the channels, as whole pairs.
        let fifths = if dim == 64 { 38 } else { 78 };
        let thin = |kept, raw| How::Thin { kept, raw };
        let codes = |bits| How::Codes { bits };
        let half = dim / 2;
        [
            How::Plain,
            thin(half, false),
            thin(fifths, false),
            thin(half, true),
            thin(fifths, true),
            codes(8),
            codes(4),
            codes(2),
        ]
    }

    fn name(self) -> String {
        match self {
            How::Plain => "plain".into(),
            How::Thin { kept, raw } => format!("k{kept}{}", if raw { "r" } else { "" }),
            How::Codes { bits } => format!("b{bits}"),
        }
    }

    fn is_raw(self) -> bool {
        matches!(self, How::Thin { raw: true, .. })
    }

    /// The number of the first block.
    fn first(self) -> u32 {
        if matches!(self, How::Plain) { 0 } else { PACKED }
    }

    /// What a query reads of the `copy`-th context, of so many blocks.
    fn context(self, copy: usize, num_blocks: usize) -> Spans {
        let (blocks, raw) = (copy * num_blocks..(copy + 1) * num_blocks, self.is_raw());
        let end = blocks.end;
        let span = |b: usize| {
            let shift = if raw { 64 * (end - b) as i64 } else { 0 };
            Span { block: BlockId(self.first() + b as u32), lo: 0, hi: 64, shift, rotate_keys: raw }
        };
        let spans: Vec<Span> = blocks.map(span).collect();
        Spans { num_rows: 1, num_queries: 1, starts: vec![0, spans.len() as u32], spans }
    }

    /// Fills so many blocks with these tokens.
    fn fill(self, arena: &mut Arena, blocks: usize, keys: Elems<'_>, values: Elems<'_>) {
        let run = |block: usize| [Run { block: BlockId(block as u32), lo: 0, hi: 64 }];
        let (heads, dim) = (arena.num_kv_heads(), arena.key_dim());
        let (kept, bits) = match self {
            How::Plain => return (0..blocks).for_each(|b| arena.write(&run(b), keys, values).expect("written")),
            How::Thin { kept, .. } => (kept, 0),
            How::Codes { bits } => (dim, bits),
        };
        let mine = (0..kept / 2).chain((0..kept / 2).map(|i| dim / 2 + i)).map(|c| c as i64);
        let index: Vec<i64> = (0..heads).flat_map(|_| mine.clone()).collect();
        let channels = Arc::new(Channels::new(&index, &vec![kept / 2; heads], dim).expect("channels"));
        let packing = Packing { key_kept: kept, key_bits: bits, value_bits: bits, group: 32 };
        arena.set_packing(packing).expect("a packing");
        arena.write(&run(0), keys, values).expect("written");
        for block in 0..blocks {
            let to = BlockId(PACKED + block as u32);
            let moves = [Move { from: BlockId(0), from_slot: 0, to, to_slot: 0, len: 64 }];
            arena.pack(&moves, &Chosen::New(Arc::clone(&channels))).expect("packed");
        }
    }
}

fn decode(c: &mut Criterion) {
    let level = isa().expect("a valid KVSIEVE_ISA");
    println!("read bandwidth of one thread: {:.1} GB/s; level {}", bandwidth(), level.name());
    let mut noise = Noise(88_172_645_463_325_252);
    for (heads, kv_heads, dim) in [(9, 3, 64), (32, 8, 128)] {
        for dtype in [Dtype::F32, Dtype::BF16, Dtype::F16] {
            let mut group = c.benchmark_group(format!("attend_{heads}_{kv_heads}_{dim}_{}", dtype.name()));
            group.sample_size(20).measurement_time(Duration::from_secs(1)).warm_up_time(Duration::from_millis(300));
            let lengths = [1 << 10, 8 << 10, 64 << 10].map(|tokens| (tokens, How::Plain));
            let packed = How::all(dim).into_iter().skip(1).flat_map(|how| [(8 << 10, how), (64 << 10, how)]);
            for (tokens, how) in lengths.into_iter().chain(packed) {
                let mut arena = Arena::new(kv_heads, dim, dim, dtype).expect("an arena");
                // Several contexts by turns, so that short ones do not come from the cache.
                let copies = ((256 << 20) / (tokens * arena.token_bytes())).clamp(1, 64);
                let k = noise.elems(kv_heads * 64 * dim, dtype);
                let v = noise.elems(kv_heads * 64 * dim, dtype);
                how.fill(&mut arena, copies * tokens / 64, elems(&k, dtype), elems(&v, dtype));
                let token_bytes = arena.packed().map_or(arena.token_bytes(), |packed| packed.token_bytes());
                let inv_freq = (0..dim / 2).map(|i| 1e4f64.powf(-2.0 * i as f64 / dim as f64)).collect();
                let rope = Arc::new(Rope::new(inv_freq, Layout::Half, 1.0).expect("a rope"));
                let spans: Vec<Spans> = (0..copies).map(|copy| how.context(copy, tokens / 64)).collect();
                let trigs: Vec<SpanTrig> = spans.iter().map(|spans| SpanTrig::new(spans, &rope)).collect();
                let q = noise.elems(heads * dim, dtype);
                let q = View::contiguous("q", elems(&q, dtype), [1, heads, 1, dim]).expect("a view");
                let mut wide = vec![0f32; heads * dim];
                let mut narrow = vec![0u16; heads * dim];
                let scale = 1.0 / (dim as f32).sqrt();
                let call = |turn: usize, wide: &mut [f32], narrow: &mut [u16]| {
                    let out = if dtype == Dtype::F32 { ElemsMut::F32(wide) } else { ElemsMut::Bits(narrow) };
                    let args = Attend {
                        q,
                        spans: &spans[turn],
                        trig: how.is_raw().then_some(&trigs[turn]),
                        scale,
                        softcap: None,
                        sinks: None,
                        apply_factor: false,
                        threads: 1,
                        level,
                    };
                    attend(&arena, &args, out, None, None).expect("attended");
                };
                call(0, &mut wide, &mut narrow);
                if tokens <= 8 << 10 {
                    let params = reference::Params {
                        q: &q,
                        spans: &spans[0],
                        rope: how.is_raw().then_some(&*rope),
                        scale: f64::from(scale),
                        softcap: None,
                        sinks: None,
                        apply_factor: false,
                    };
                    let exact = reference::attend(&arena, &params).expect("the reference");
                    check(&exact.out, &wide, &narrow, dtype);
                }
                let mut turn = 0;
                group.throughput(Throughput::Bytes((tokens * token_bytes) as u64));
                group.bench_function(BenchmarkId::new(how.name(), tokens), |b| {
                    b.iter_custom(|rounds| {
                        let start = cpu_time();
                        for _ in 0..rounds {
                            turn = (turn + 1) % copies;
                            call(black_box(turn), &mut wide, &mut narrow);
                        }
                        cpu_time() - start
                    });
                });
            }
            group.finish();
        }
    }
}

fn check(exact: &[f64], wide: &[f32], narrow: &[u16], dtype: Dtype) {
    let got = |i: usize| match dtype {
        Dtype::F32 => f64::from(wide[i]),
        Dtype::BF16 => bf16::from_bits(narrow[i]).to_f64(),
        Dtype::F16 => f16::from_bits(narrow[i]).to_f64(),
    };
    let norm = exact.iter().map(|x| x * x).sum::<f64>().sqrt();
    let off = exact.iter().enumerate().map(|(i, x)| (x - got(i)).powi(2)).sum::<f64>().sqrt() / norm;
    let bound = if dtype == Dtype::F32 { 1e-5 } else { 1e-2 };
    assert!(off <= bound, "{dtype:?}: relative error {off:.1e}");
}

criterion_group!(benches, decode);
criterion_main!(benches);

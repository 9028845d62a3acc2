//! Random tensors of any dtype, and arenas full of them.
#![allow(dead_code)]

use half::{bf16, f16};
use kvsieve_core::ids::{BlockId, Run};
use kvsieve_core::kernels::attend::mass_len;
use kvsieve_core::kernels::{Attend, attend};
use kvsieve_core::plan::Span;
use kvsieve_core::reference;
use kvsieve_core::storage::arena::Arena;
use kvsieve_core::tensor::{Dtype, Elems, ElemsMut, View};

pub const DTYPES: [Dtype; 3] = [Dtype::F32, Dtype::BF16, Dtype::F16];

pub struct Noise(pub u64);

impl Noise {
    pub fn bits(&mut self) -> u64 {
        self.0 ^= self.0 << 13;
        self.0 ^= self.0 >> 7;
        self.0 ^= self.0 << 17;
        self.0.wrapping_mul(0x2545_f491_4f6c_dd1d) >> 16
    }

    pub fn below(&mut self, n: usize) -> usize {
        (self.bits() % n as u64) as usize
    }

    pub fn unit(&mut self) -> f32 {
        (self.bits() >> 24 & 0xff_ffff) as f32 / (1 << 23) as f32 - 1.0
    }

    pub fn data(&mut self, n: usize, dtype: Dtype) -> Data {
        Data::of(&(0..n).map(|_| self.unit()).collect::<Vec<_>>(), dtype)
    }
}

/// Owned elements of any dtype.
#[derive(Clone, Debug, PartialEq)]
pub struct Data {
    pub wide: Vec<f32>,
    pub narrow: Vec<u16>,
    pub dtype: Dtype,
}

impl Data {
    pub fn of(x: &[f32], dtype: Dtype) -> Self {
        let (wide, narrow) = match dtype {
            Dtype::F32 => (x.to_vec(), Vec::new()),
            Dtype::BF16 => (Vec::new(), x.iter().map(|&x| bf16::from_f32(x).to_bits()).collect()),
            Dtype::F16 => (Vec::new(), x.iter().map(|&x| f16::from_f32(x).to_bits()).collect()),
        };
        Data { wide, narrow, dtype }
    }

    pub fn elems(&self) -> Elems<'_> {
        if self.dtype == Dtype::F32 { Elems::F32(&self.wide) } else { Elems::Bits(&self.narrow) }
    }

    pub fn elems_mut(&mut self) -> ElemsMut<'_> {
        if self.dtype == Dtype::F32 { ElemsMut::F32(&mut self.wide) } else { ElemsMut::Bits(&mut self.narrow) }
    }

    pub fn view(&self, shape: [usize; 4]) -> View<'_> {
        View::contiguous("data", self.elems(), shape).unwrap()
    }

    pub fn f64s(&self) -> Vec<f64> {
        let n = self.elems().len();
        reference::widened(&self.view([1, 1, 1, n]), self.dtype)
    }
}

pub fn tolerance(dtype: Dtype) -> f64 {
    if dtype == Dtype::F32 { 1e-5 } else { 1e-2 }
}

pub fn off(got: &[f64], exact: &[f64]) -> f64 {
    assert_eq!(got.len(), exact.len());
    let finite: Vec<(f64, f64)> = got
        .iter()
        .zip(exact)
        .filter(|(g, e)| {
            assert_eq!(g.is_finite(), e.is_finite(), "{g} {e}");
            e.is_finite()
        })
        .map(|(g, e)| (*g, *e))
        .collect();
    let norm = finite.iter().map(|(_, e)| e * e).sum::<f64>().sqrt();
    finite.iter().map(|(g, e)| (g - e).powi(2)).sum::<f64>().sqrt() / norm.max(1e-12)
}

pub fn span(block: u32, lo: u32, hi: u32, shift: i64, rotate_keys: bool) -> Span {
    Span { block: BlockId(block), lo, hi, shift, rotate_keys }
}

pub struct Result3 {
    pub out: Data,
    pub lse: Vec<f32>,
    pub mass: Vec<f32>,
}

pub fn call(arena: &Arena, args: &Attend<'_>) -> Result3 {
    let [b, h, q, _] = args.q.shape();
    let mut out = Data::of(&vec![7.0; b * h * q * arena.value_dim()], arena.dtype());
    let mut lse = vec![7.0; b * h * q];
    let mut mass = vec![7.0; mass_len(args.spans, arena.num_kv_heads())];
    attend(arena, args, out.elems_mut(), Some(&mut lse), Some(&mut mass)).unwrap();
    let mut alone = Data::of(&vec![7.0; b * h * q * arena.value_dim()], arena.dtype());
    attend(arena, args, alone.elems_mut(), None, None).unwrap();
    assert_eq!(out, alone, "asking for more must not change the output");
    Result3 { out, lse, mass }
}

pub fn widen(x: &[f32]) -> Vec<f64> {
    x.iter().map(|&x| f64::from(x)).collect()
}

/// An arena of random blocks.
pub fn filled(noise: &mut Noise, heads: usize, dims: (usize, usize), dtype: Dtype, blocks: u32) -> Arena {
    let mut arena = Arena::new(heads, dims.0, dims.1, dtype).unwrap();
    for block in 0..blocks {
        let run = [Run { block: BlockId(block), lo: 0, hi: 64 }];
        let k = noise.data(heads * 64 * dims.0, dtype);
        let v = noise.data(heads * 64 * dims.1, dtype);
        arena.write(&run, k.elems(), v.elems()).unwrap();
    }
    arena
}

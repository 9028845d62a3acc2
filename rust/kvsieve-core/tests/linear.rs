//! Products of a few rows with weights against their definition, on every instruction set.

use super::common::data::{Noise, off};
use kvsieve_core::Error;
use kvsieve_core::kernels::isa::levels;
use kvsieve_core::kernels::linear::linear;
use kvsieve_core::tensor::{Elems, View};

fn view(x: &[f32], rows: usize, dim: usize, stride: usize) -> View<'_> {
    View::new("x", Elems::F32(x), [1, 1, rows, dim], [0, 0, stride]).unwrap()
}

#[test]
fn products_equal_their_definition_and_rows_do_not_depend_on_each_other() {
    let mut noise = Noise(41);
    for round in 0..80 {
        let (rows, dim) = (1 + noise.below(19), [0, 1, 7, 16, 33, 64, 100, 576][noise.below(8)]);
        let outputs = if round == 0 { 3000 } else { 1 + noise.below(90) };
        // Rows may lie apart.
        let (gap, far) = (noise.below(3), noise.below(3));
        let numbers = |noise: &mut Noise, n: usize| (0..n).map(|_| noise.unit()).collect::<Vec<f32>>();
        let (x, w) = (numbers(&mut noise, rows * (dim + gap)), numbers(&mut noise, outputs * (dim + far)));
        let bias = (noise.below(2) == 0).then(|| numbers(&mut noise, outputs));
        let mut exact = Vec::new();
        for row in 0..rows {
            for n in 0..outputs {
                let product = |k: usize| f64::from(x[row * (dim + gap) + k]) * f64::from(w[n * (dim + far) + k]);
                exact.push(bias.as_ref().map_or(0.0, |b| f64::from(b[n])) + (0..dim).map(product).sum::<f64>());
            }
        }
        let weights = view(&w, outputs, dim, dim + far);
        for level in levels() {
            let given = view(&x, rows, dim, dim + gap);
            let mut all = vec![f32::NAN; rows * outputs];
            linear(&given, &weights, bias.as_deref(), &mut all, (level, 1), &|| false).unwrap();
            let wide: Vec<f64> = all.iter().map(|&x| f64::from(x)).collect();
            assert!(off(&wide, &exact) <= 1e-5, "{level:?} {rows} {dim} {outputs}: {}", off(&wide, &exact));
            let mut again = vec![f32::NAN; rows * outputs];
            linear(&given, &weights, bias.as_deref(), &mut again, (level, 3), &|| false).unwrap();
            assert_eq!(all, again, "threads must not matter");
            for row in 0..rows {
                let mut alone = vec![f32::NAN; outputs];
                let one = view(&x[row * (dim + gap)..], 1, dim, 0);
                linear(&one, &weights, bias.as_deref(), &mut alone, (level, 1), &|| false).unwrap();
                assert_eq!(alone, all[row * outputs..][..outputs], "{level:?}: a row's result depends on others");
            }
        }
    }
}

#[test]
fn wrong_shapes_are_refused_and_nothing_is_written() {
    let (x, bits) = ([1f32; 12], [0u16; 12]);
    let given = view(&x, 3, 4, 4);
    let mut out = [7f32; 6];
    for level in levels() {
        let mut run = |x: &View<'_>, w: &View<'_>, bias: Option<&[f32]>, threads: usize| {
            linear(x, w, bias, &mut out, (level, threads), &|| false)
        };
        let two = view(&x, 2, 4, 4);
        assert!(matches!(run(&given, &view(&x, 2, 3, 3), None, 1), Err(Error::Shape { what: "weights", .. })));
        assert!(matches!(run(&two, &two, None, 1), Err(Error::Shape { what: "out", .. })));
        assert!(matches!(run(&given, &two, Some(&x[..3]), 1), Err(Error::Shape { what: "bias", .. })));
        assert!(run(&given, &two, None, 0).is_err());
        let narrow = View::new("x", Elems::Bits(&bits), [1, 1, 3, 4], [0, 0, 4]).unwrap();
        assert!(matches!(run(&narrow, &two, None, 1), Err(Error::Shape { what: "x", .. })));
        let heads = View::contiguous("x", Elems::F32(&x), [1, 3, 1, 4]).unwrap();
        assert!(matches!(run(&heads, &two, None, 1), Err(Error::Shape { what: "x", .. })));
        assert!(run(&view(&x, 3, 0, 0), &view(&x, 2, 0, 0), None, 1).is_ok());
    }
    assert_eq!(out, [0.0; 6], "only the products of no inputs were written");
}

#[test]
fn a_long_product_can_be_stopped() {
    // Twice what is read between two questions.
    let (dim, outputs) = (1 << 20, 17);
    let (x, w) = (vec![0f32; dim], vec![0f32; dim]);
    let weights = view(&w, outputs, dim, 0);
    let level = *levels().last().unwrap();
    let asked = std::cell::Cell::new(0);
    let stop = || {
        asked.set(asked.get() + 1);
        asked.get() == 2
    };
    let mut out = vec![0f32; outputs];
    let done = linear(&view(&x, 1, dim, 0), &weights, None, &mut out, (level, 1), &stop);
    assert!(matches!(done, Err(Error::Interrupted)));
}

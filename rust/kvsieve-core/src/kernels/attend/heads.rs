//! As many query heads at a time as the instruction set has registers for.

/// Calls `$run` with as many queries at a time as the instruction set has registers for.
macro_rules! by_heads {
    ($group:expr, |$h:ident, $HB:ident| $run:expr) => {{
        let mut $h = 0;
        while $h < $group {
            match ($group - $h).min(S::HEADS) {
                4 => {
                    const $HB: usize = 4;
                    $run
                }
                3 => {
                    const $HB: usize = 3;
                    $run
                }
                2 => {
                    const $HB: usize = 2;
                    $run
                }
                _ => {
                    const $HB: usize = 1;
                    $run
                }
            }
            $h += S::HEADS.min($group - $h);
        }
    }};
}

pub(super) use by_heads;

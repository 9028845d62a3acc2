// Half precision for the shim; included after the kernels' own types. Rounds to the nearest, ties to even.
#pragma once

inline float widen(f16 x) {
    const uint32_t sign = uint32_t(x.bits & 0x8000u) << 16, size = x.bits & 0x7fffu;
    if (size >= 0x7c00u) return __uint_as_float(sign | 0x7f800000u | size << 13);
    return __uint_as_float(sign | __float_as_uint(__uint_as_float(size << 13) * 0x1p112f));  // exact, also where it is subnormal
}

inline f16 narrow_f16(float x) {
    const uint16_t sign = uint16_t(__float_as_uint(x) >> 16 & 0x8000u);
    const float size = std::fabs(x);
    if (x != x) return {uint16_t(sign | 0x7e00u)};
    if (size >= 65520.f) return {uint16_t(sign | 0x7c00u)};
    if (size < 6.103515625e-5f) return {uint16_t(sign | uint16_t(std::nearbyint(std::ldexp(size, 24))))};
    int exponent;
    const float fraction = std::frexp(size, &exponent);  // [0.5, 1)
    auto digits = uint32_t(std::nearbyint(std::ldexp(fraction, 11)));
    if (digits == 2048) {
        digits = 1024;
        exponent++;
    }
    return {uint16_t(sign | uint16_t((exponent + 14) << 10) | (digits & 1023u))};
}

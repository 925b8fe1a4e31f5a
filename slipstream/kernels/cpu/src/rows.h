// Rows of numbers and rows of bytes: rounding to 8 bits and back.
#pragma once
#include "tensor.h"
#include "vector.h"

namespace slipstream {

// The largest magnitude of a row; NaN where the row holds NaN or infinity.
inline float largest_magnitude(const float* x, int64_t count) {
  Ints most = {};  // bits of magnitudes: in order as their numbers are, with infinity and NaN last
  for (int64_t i = 0; i < count; i += LANES)
    most = larger(most, reinterpret_cast<Ints>(magnitude(load_up_to(x + i, count - i < LANES ? count - i : LANES))));
  const int32_t bits = largest(most);
  float found;
  std::memcpy(&found, &bits, sizeof found);
  return found + found * 0.0f;
}

// round(x / scale), halves to even, as int8: multiplied and then mended, which gives the quotient's own bits.
inline void divide_to_int8(const float* x, int64_t count, float scale, float lowest, int8_t* to) {
  const float inverse = 1 / scale;
  for (int64_t i = 0; i < count; i += LANES) {
    const int64_t some = count - i < LANES ? count - i : LANES;
    const Floats v = smaller(larger(load_up_to(x + i, some), splat(lowest * scale)), splat(127 * scale));
    const Floats about = v * inverse;
    const Ints whole = __builtin_convertvector(nearest(about + (v - about * scale) * inverse), Ints);
    if (some == LANES) {
      narrow(whole, to + i);
      continue;
    }
    int8_t bytes[LANES];
    narrow(whole, bytes);
    std::memcpy(to + i, bytes, some);
  }
}

// A row of activations in 8 bits and the scale of each group of columns: the largest magnitude / 127, or input_scale
// where that is not 0. A group_size of 0 means all.
inline void quantize_row(const float* x, int64_t count, float input_scale, int64_t group_size, int8_t* to, float* scales) {
  const int64_t size = group_size > 0 && group_size < count ? group_size : count;
  for (int64_t first = 0; first < count; first += size) {
    const int64_t length = count - first < size ? count - first : size;
    float scale = input_scale;
    if (input_scale == 0) {
      const float most = largest_magnitude(x + first, length);
      scale = (most < 1e-12f ? 1e-12f : most) / 127;
    }
    divide_to_int8(x + first, length, scale, -128.0f, to + first);
    *scales++ = scale;
  }
}

// Nearest, ties to even.
inline uint16_t float_to_bfloat16(float value) {
  uint32_t bits;
  std::memcpy(&bits, &value, 4);
  if ((bits & 0x7fffffff) > 0x7f800000) return 0x7fc0;  // NaN, whose bits rounding could make another number's
  return static_cast<uint16_t>((bits + 0x7fff + (bits >> 16 & 1)) >> 16);
}

// The nearest, magnitudes beyond the largest of float16 as that. NaN stays.
inline void to_float16(const float* x, int64_t count, uint16_t* to) {
  for (int64_t i = 0; i < count; i += LANES) {
    const int64_t some = count - i < LANES ? count - i : LANES;
    const Floats v = load_up_to(x + i, some);
    uint16_t halves[LANES];
    narrow_halves(larger(splat(-65504.0f), smaller(splat(65504.0f), v)), halves);
    std::memcpy(to + i, halves, some * 2);
  }
}

// Nearest, ties to even, magnitudes beyond 448 as 448.
inline uint8_t float_to_float8(float value) {
  uint32_t bits;
  std::memcpy(&bits, &value, 4);
  const uint8_t sign = bits >> 24 & 128;
  bits &= 0x7fffffff;
  if (bits > 0x7f800000) return sign | 127;
  if (bits > 0x43e00000) return sign | 126;  // 448
  if (bits < 0x3c800000) {                   // below 2^-6: steps of 2^-9
    float small;
    std::memcpy(&small, &bits, 4);
    return sign | static_cast<uint8_t>(std::nearbyint(small * 512));
  }
  bits += 0x7ffff + (bits >> 20 & 1);
  return sign | static_cast<uint8_t>((bits >> 20) - ((127 - 7) << 3));
}

}  // namespace slipstream

// Vectors of floats as wide as the machine's, in the compiler's own notation: one source for AVX-512, AVX2 and NEON.
#pragma once
#include <cmath>
#include <cstdint>
#include <cstring>
#if defined(__x86_64__)
#include <immintrin.h>
#endif

namespace slipstream {

#if defined(__AVX512F__)
constexpr int LANES = 16;
#elif defined(__AVX2__)
constexpr int LANES = 8;
#else
constexpr int LANES = 4;
#endif

typedef float Floats __attribute__((vector_size(LANES * 4)));
typedef int32_t Ints __attribute__((vector_size(LANES * 4)));

inline Floats splat(float x) { return x - Floats{}; }

inline Floats load(const float* from) {
  Floats v;
  std::memcpy(&v, from, sizeof v);
  return v;
}

// The first `count` lanes, zeros in the others.
inline Floats load_some(const float* from, int64_t count) {
  Floats v = {};
  std::memcpy(&v, from, count * sizeof(float));
  return v;
}

inline void store(float* to, Floats v) { std::memcpy(to, &v, sizeof v); }
inline void store_some(float* to, Floats v, int64_t count) { std::memcpy(to, &v, count * sizeof(float)); }

inline Floats load_up_to(const float* from, int64_t count) { return count == LANES ? load(from) : load_some(from, count); }
inline void store_up_to(float* to, Floats v, int64_t count) { count == LANES ? store(to, v) : store_some(to, v, count); }

// 0, 1, 2, ...
inline Ints lane_numbers() {
  Ints numbers;
  for (int lane = 0; lane < LANES; ++lane) numbers[lane] = lane;
  return numbers;
}

// LANES bytes as whole numbers, and back. The compiler's own conversion goes through them one by one.
inline Ints widen(const int8_t* from) {
#if defined(__AVX512F__)
  return reinterpret_cast<Ints>(_mm512_cvtepi8_epi32(_mm_loadu_si128(reinterpret_cast<const __m128i*>(from))));
#elif defined(__AVX2__)
  return reinterpret_cast<Ints>(_mm256_cvtepi8_epi32(_mm_loadl_epi64(reinterpret_cast<const __m128i*>(from))));
#else
  Ints wide;
  for (int lane = 0; lane < LANES; ++lane) wide[lane] = from[lane];
  return wide;
#endif
}

inline Ints widen(const uint16_t* from) {
#if defined(__AVX512F__)
  return reinterpret_cast<Ints>(_mm512_cvtepu16_epi32(_mm256_loadu_si256(reinterpret_cast<const __m256i*>(from))));
#elif defined(__AVX2__)
  return reinterpret_cast<Ints>(_mm256_cvtepu16_epi32(_mm_loadu_si128(reinterpret_cast<const __m128i*>(from))));
#else
  Ints wide;
  for (int lane = 0; lane < LANES; ++lane) wide[lane] = from[lane];
  return wide;
#endif
}

inline void narrow(Ints from, int8_t* to) {
#if defined(__AVX512F__)
  _mm_storeu_si128(reinterpret_cast<__m128i*>(to), _mm512_cvtepi32_epi8(reinterpret_cast<__m512i>(from)));
#else
  for (int lane = 0; lane < LANES; ++lane) to[lane] = static_cast<int8_t>(from[lane]);
#endif
}

// LANES numbers in float16 as floats, and back: the nearest, ties to even.
inline Floats widen_halves(const uint16_t* from) {
#if defined(__AVX512F__)
  return reinterpret_cast<Floats>(_mm512_cvtph_ps(_mm256_loadu_si256(reinterpret_cast<const __m256i*>(from))));
#elif defined(__F16C__)
  return reinterpret_cast<Floats>(_mm256_cvtph_ps(_mm_loadu_si128(reinterpret_cast<const __m128i*>(from))));
#else
  Floats wide;
  for (int lane = 0; lane < LANES; ++lane) {
    _Float16 half;
    std::memcpy(&half, from + lane, 2);
    wide[lane] = static_cast<float>(half);
  }
  return wide;
#endif
}

inline void narrow_halves(Floats from, uint16_t* to) {
#if defined(__AVX512F__)
  const __m256i halves = _mm512_cvtps_ph(reinterpret_cast<__m512>(from), _MM_FROUND_TO_NEAREST_INT);
  _mm256_storeu_si256(reinterpret_cast<__m256i*>(to), halves);
#elif defined(__F16C__)
  const __m128i halves = _mm256_cvtps_ph(reinterpret_cast<__m256>(from), _MM_FROUND_TO_NEAREST_INT);
  _mm_storeu_si128(reinterpret_cast<__m128i*>(to), halves);
#else
  for (int lane = 0; lane < LANES; ++lane) {
    const _Float16 half = static_cast<_Float16>(from[lane]);
    std::memcpy(to + lane, &half, 2);
  }
#endif
}

inline Floats larger(Floats a, Floats b) { return a > b ? a : b; }
inline Floats smaller(Floats a, Floats b) { return a < b ? a : b; }
inline Ints larger(Ints a, Ints b) { return a > b ? a : b; }
inline Floats magnitude(Floats a) { return reinterpret_cast<Floats>(reinterpret_cast<Ints>(a) & 0x7fffffff); }

inline float sum(Floats v) {
#if defined(__AVX512F__)
  return _mm512_reduce_add_ps(reinterpret_cast<__m512>(v));
#else
  float total = 0;
  for (int lane = 0; lane < LANES; ++lane) total += v[lane];
  return total;
#endif
}

inline float largest(Floats v) {
#if defined(__AVX512F__)
  return _mm512_reduce_max_ps(reinterpret_cast<__m512>(v));
#endif
  float found = v[0];
  for (int lane = 1; lane < LANES; ++lane) found = v[lane] > found ? v[lane] : found;
  return found;
}

inline int32_t largest(Ints v) {
#if defined(__AVX512F__)
  return _mm512_reduce_max_epi32(reinterpret_cast<__m512i>(v));
#endif
  int32_t found = v[0];
  for (int lane = 1; lane < LANES; ++lane) found = v[lane] > found ? v[lane] : found;
  return found;
}

constexpr float HALVES_GONE = 12582912.0f;  // 1.5 · 2^23: a sum with it is rounded to whole numbers, in its lowest bits

// Nearest whole numbers, halves to even; magnitudes below 2^22.
inline Floats nearest(Floats v) { return v + HALVES_GONE - HALVES_GONE; }

// 2^n · 2^r with |r| <= 1/2 and a polynomial of degree 5, wrong by 1e-7 of it at most. `sum` is n + HALVES_GONE.
inline Floats power_of_two(Floats sum, Floats r) {
  Floats p = splat(1.3264726908e-3f);
  p = p * r + 9.6715126604e-3f;
  p = p * r + 5.5507337442e-2f;
  p = p * r + 2.4022242085e-1f;
  p = p * r + 6.9314697760e-1f;
  p = p * r + 1.0f;
  return p * reinterpret_cast<Floats>((reinterpret_cast<Ints>(sum) + 127) << 23);
}

// 2^x for x <= 127, 0 from -127 down.
inline Floats power_of_two(Floats x) {
  x = larger(splat(-127.0f), x);  // a NaN stays
  const Floats sum = x + HALVES_GONE;
  return power_of_two(sum, x - (sum - HALVES_GONE));
}

// e^x; what is beyond -87 and 87 counts as these. A NaN stays.
inline Floats exponential(Floats x) {
  x = smaller(splat(87.0f), larger(splat(-87.0f), x));
  const Floats sum = x * 1.44269504f + HALVES_GONE, n = sum - HALVES_GONE;
  return power_of_two(sum, x * 1.44269504f - n + x * 1.92596300e-8f);  // log2(e) in two parts
}

// 1 / x or a number next to it, for |x| <= 2^126: a division takes the time of ten products.
inline Floats reciprocal(Floats x) {
#if defined(__AVX512F__)
  const Floats about = reinterpret_cast<Floats>(_mm512_rcp14_ps(reinterpret_cast<__m512>(x)));
  return about + about * (1.0f - x * about);
#else
  return 1.0f / x;
#endif
}

// Near 0 by a polynomial (Cephes' tanhf), where 1 - 2 / (e^2x + 1) would cancel.
inline Floats hyperbolic_tangent(Floats x) {
  const Floats size = magnitude(x), square = x * x;
  const Floats far = 1.0f - 2.0f * reciprocal(exponential(2.0f * size) + 1.0f);
  Floats p = splat(-5.70498872745e-3f);
  p = p * square + 2.06390887954e-2f;
  p = p * square - 5.37397155531e-2f;
  p = p * square + 1.33314422036e-1f;
  p = p * square - 3.33332819422e-1f;
  const Floats near = p * square * x + x;
  return size < 0.625f ? near : (x < 0.0f ? -far : far);
}

inline Floats silu(Floats x) { return x * reciprocal(1.0f + exponential(-x)); }

#if defined(__AVX512F__)
#define SLIPSTREAM_LOW 0, 16, 1, 17, 2, 18, 3, 19, 4, 20, 5, 21, 6, 22, 7, 23
#define SLIPSTREAM_HIGH 8, 24, 9, 25, 10, 26, 11, 27, 12, 28, 13, 29, 14, 30, 15, 31
#elif defined(__AVX2__)
#define SLIPSTREAM_LOW 0, 8, 1, 9, 2, 10, 3, 11
#define SLIPSTREAM_HIGH 4, 12, 5, 13, 6, 14, 7, 15
#else
#define SLIPSTREAM_LOW 0, 4, 1, 5
#define SLIPSTREAM_HIGH 2, 6, 3, 7
#endif
#if defined(__clang__)
#define SLIPSTREAM_SHUFFLE(a, b, ...) __builtin_shufflevector(a, b, __VA_ARGS__)
#else
#define SLIPSTREAM_SHUFFLE(a, b, ...) __builtin_shuffle(a, b, Ints{__VA_ARGS__})
#endif

// Rows become columns: each round meets row i with row i + LANES / 2, lane by lane.
inline void transpose(Floats (&square)[LANES]) {
#pragma GCC unroll 4
  for (int round = 1; round < LANES; round *= 2) {
    Floats mixed[LANES];
#pragma GCC unroll 8
    for (int i = 0; i < LANES / 2; ++i) {
      mixed[2 * i] = SLIPSTREAM_SHUFFLE(square[i], square[i + LANES / 2], SLIPSTREAM_LOW);
      mixed[2 * i + 1] = SLIPSTREAM_SHUFFLE(square[i], square[i + LANES / 2], SLIPSTREAM_HIGH);
    }
#pragma GCC unroll 16
    for (int i = 0; i < LANES; ++i) square[i] = mixed[i];
  }
}

}  // namespace slipstream

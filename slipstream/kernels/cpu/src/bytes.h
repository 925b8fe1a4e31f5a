// Dot products of bytes: 16 rows of a weight, four columns of each, with four numbers of an activation row.
//
// A panel is 16 rows of a weight, interleaved so that 64 bytes hold four columns of all of them, as unsigned bytes; what that
// adds to each number (its zero) is taken off later, times the sum of the activations. AVX-512-VNNI multiplies such bytes
// as they are; AVX2 widens them to 16 bits. All of it is exact.
#pragma once
#include "tensor.h"
#include "vector.h"

namespace slipstream {

constexpr int PANEL = 16;      // rows of a panel
constexpr int STEP_BYTES = 64;  // four columns of a panel

// Sixteen floats, one for each row of a panel.
struct Sixteen {
  static constexpr int COUNT = PANEL / LANES;
  Floats part[COUNT];

  template <class Function>
  static Sixteen of(Function&& f) {
    Sixteen all;
#pragma GCC unroll 4
    for (int i = 0; i < COUNT; ++i) all.part[i] = f(i);
    return all;
  }
};

inline Sixteen load_sixteen(const float* from) {
  return Sixteen::of([&](int i) { return load(from + i * LANES); });
}

inline Sixteen load_halves(const uint16_t* from) {
  return Sixteen::of([&](int i) { return widen_halves(from + i * LANES); });
}

inline void store_sixteen(float* to, const Sixteen& v, int64_t count) {
  if (count >= PANEL) {
    for (int i = 0; i < Sixteen::COUNT; ++i) store(to + i * LANES, v.part[i]);
    return;
  }
  float room[PANEL];
  for (int i = 0; i < Sixteen::COUNT; ++i) store(room + i * LANES, v.part[i]);
  std::memcpy(to, room, count * sizeof(float));
}

#if defined(__AVX512VNNI__)

constexpr int ROWS_M = 4, PANELS_N = 3;  // rows of x and panels at once: 12 sums and 12 totals in 32 registers
constexpr int ROWS_ALONE = 8;            // rows with one panel: 8 and 8
struct Bytes {
  __m512i all;
};
struct Numbers {
  __m512i all;
};
struct Sums {
  __m512i all;
  void start(int32_t value) { all = _mm512_set1_epi32(value); }
  void add(const Bytes& w, const Numbers& x) { all = _mm512_dpbusd_epi32(all, w.all, x.all); }
  Sixteen floats() const { return {{reinterpret_cast<Floats>(_mm512_cvtepi32_ps(all))}}; }
};
inline Bytes load_bytes(const uint8_t* from) { return {_mm512_loadu_si512(from)}; }
inline void load_nibbles(const uint8_t* from, Bytes& low, Bytes& high) {
  const __m512i both = _mm512_loadu_si512(from), mask = _mm512_set1_epi8(15);
  low.all = _mm512_and_si512(both, mask);
  high.all = _mm512_and_si512(_mm512_srli_epi16(both, 4), mask);
}
inline Numbers load_numbers(const int32_t* four) {
  return {_mm512_set1_epi32(*four)};
}

#elif defined(__AVX2__)

constexpr int ROWS_M = 2, PANELS_N = 1, ROWS_ALONE = 2;
struct Bytes {
  __m256i wide[4];  // of four rows each
};
struct Numbers {
  __m256i wide;
};
struct Sums {
  __m256i pairs[4];  // of each row two sums
  void start(int32_t value) {
    for (__m256i& each : pairs) each = _mm256_set1_epi64x(static_cast<uint32_t>(value));
  }
  void add(const Bytes& w, const Numbers& x) {
#pragma GCC unroll 4
    for (int i = 0; i < 4; ++i) pairs[i] = _mm256_add_epi32(pairs[i], _mm256_madd_epi16(w.wide[i], x.wide));
  }
  Sixteen floats() const {
    return Sixteen::of([&](int i) {
      const __m256i mixed = _mm256_hadd_epi32(pairs[2 * i], pairs[2 * i + 1]);
      return reinterpret_cast<Floats>(_mm256_cvtepi32_ps(_mm256_permute4x64_epi64(mixed, 0xd8)));
    });
  }
};
inline Bytes load_bytes(const uint8_t* from) {
  Bytes bytes;
  for (int i = 0; i < 4; ++i)
    bytes.wide[i] = _mm256_cvtepu8_epi16(_mm_loadu_si128(reinterpret_cast<const __m128i*>(from) + i));
  return bytes;
}
inline void load_nibbles(const uint8_t* from, Bytes& low, Bytes& high) {
  const Bytes both = load_bytes(from);
  for (int i = 0; i < 4; ++i) {
    low.wide[i] = _mm256_and_si256(both.wide[i], _mm256_set1_epi16(15));
    high.wide[i] = _mm256_srli_epi16(both.wide[i], 4);
  }
}
inline Numbers load_numbers(const int32_t* four) {
  return {_mm256_broadcastq_epi64(_mm_cvtepi8_epi16(_mm_cvtsi32_si128(*four)))};
}

#else

constexpr int ROWS_M = 1, PANELS_N = 1, ROWS_ALONE = 1;
struct Bytes {
  uint8_t all[STEP_BYTES];
};
struct Numbers {
  int8_t four[4];
};
struct Sums {
  int32_t all[PANEL];
  void start(int32_t value) {
    for (int32_t& each : all) each = value;
  }
  void add(const Bytes& w, const Numbers& x) {
    for (int lane = 0; lane < PANEL; ++lane)
      for (int j = 0; j < 4; ++j) all[lane] += w.all[4 * lane + j] * x.four[j];
  }
  Sixteen floats() const {
    float wide[PANEL];
    for (int lane = 0; lane < PANEL; ++lane) wide[lane] = static_cast<float>(all[lane]);
    return load_sixteen(wide);
  }
};
inline Bytes load_bytes(const uint8_t* from) {
  Bytes bytes;
  std::memcpy(bytes.all, from, STEP_BYTES);
  return bytes;
}
inline void load_nibbles(const uint8_t* from, Bytes& low, Bytes& high) {
  for (int i = 0; i < STEP_BYTES; ++i) {
    low.all[i] = from[i] & 15;
    high.all[i] = from[i] >> 4;
  }
}
inline Numbers load_numbers(const int32_t* four) {
  Numbers numbers;
  std::memcpy(numbers.four, four, 4);
  return numbers;
}

#endif

}  // namespace slipstream

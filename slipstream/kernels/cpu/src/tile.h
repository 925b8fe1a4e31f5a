// Products of rows with rows: out[m][n] = x[m] · w[n], over K floats. Each sum is taken in the same order whatever else is in
// the tile, so a row of a result does not depend on how many there are.
#pragma once
#include <type_traits>

#include "vector.h"

namespace slipstream {

#if defined(__AVX512F__)
constexpr int TILE_M = 6, TILE_N = 4;  // 24 sums in 32 registers
#else
constexpr int TILE_M = 3, TILE_N = 4;  // 12 sums in 16
#endif

template <int M, int N>
inline void float_tile(const float* const* x, const float* const* w, int64_t num_columns, float* out, int64_t stride) {
  Floats sums[M][N] = {};
  int64_t column = 0;
  for (; column + LANES <= num_columns; column += LANES) {
    Floats row_of_w[N];
#pragma GCC unroll 8
    for (int n = 0; n < N; ++n) row_of_w[n] = load(w[n] + column);
#pragma GCC unroll 8
    for (int m = 0; m < M; ++m) {
      const Floats row_of_x = load(x[m] + column);
#pragma GCC unroll 8
      for (int n = 0; n < N; ++n) sums[m][n] += row_of_x * row_of_w[n];
    }
  }
  if (column < num_columns) {
    for (int m = 0; m < M; ++m)
      for (int n = 0; n < N; ++n)
        sums[m][n] += load_some(x[m] + column, num_columns - column) * load_some(w[n] + column, num_columns - column);
  }
#pragma GCC unroll 8
  for (int m = 0; m < M; ++m)
#pragma GCC unroll 8
    for (int n = 0; n < N; ++n) out[m * stride + n] = sum(sums[m][n]);
}

// Calls f(std::integral_constant<int, count>) for 1 <= count <= MOST.
template <int MOST, class Function>
inline void with_count(int64_t count, Function&& f) {
  if constexpr (MOST > 1) {
    if (count < MOST) return with_count<MOST - 1>(count, f);
  }
  f(std::integral_constant<int, MOST>{});
}

// Calls tile(rows, columns, m, n) with constant sizes for all of num_x rows and columns [first, end). is_cold: w comes from
// memory, which is read twice as fast in one stream as in TILE_N of them; so the first rows of x meet it row by row.
template <class Tile>
inline void for_tiles(int64_t num_x, int64_t first, int64_t end, bool is_cold, Tile&& tile) {
  for (int64_t m = 0; m < num_x; m += TILE_M) {
    with_count<TILE_M>(num_x - m < TILE_M ? num_x - m : TILE_M, [&](auto rows) {
      int64_t n = first;
      if (m > 0 || !is_cold)
        for (; n + TILE_N <= end; n += TILE_N) tile(rows, std::integral_constant<int, TILE_N>{}, m, n);
      for (; n < end; ++n) tile(rows, std::integral_constant<int, 1>{}, m, n);
    });
  }
}

// All products of num_x rows with num_w rows.
inline void float_products(const float* const* x, int64_t num_x, const float* const* w, int64_t num_w,
                           int64_t num_columns, float* out, int64_t stride, bool is_cold) {
  for_tiles(num_x, 0, num_w, is_cold, [&](auto rows, auto columns, int64_t m, int64_t n) {
    float_tile<rows.value, columns.value>(x + m, w + n, num_columns, out + m * stride + n, stride);
  });
}

}  // namespace slipstream

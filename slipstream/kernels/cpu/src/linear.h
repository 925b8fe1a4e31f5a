// What all products of rows with a weight share: who computes which rows of the weight, and how its scales are read.
#pragma once
#include "pool.h"
#include "tensor.h"
#include "tile.h"

namespace slipstream {

// function(first, end) over the rows of a weight. A part reads its rows once and meets them with all rows of x, so it is
// small enough to stay in the second-level cache, and there are some parts a thread. `unit`: rows that are computed at once.
template <class Function>
inline void parallel_weight(int64_t num_out, int64_t row_bytes, int64_t num_rows, int64_t unit, Function&& function) {
  constexpr int64_t CACHED = 256 << 10;
  const int64_t even = num_out / (8 * num_threads()) + 1, fits = CACHED / row_bytes + 1;
  const int64_t worth = 16384 / (row_bytes * num_rows) + 1;
  int64_t size = even < fits ? even : fits;
  if (size < worth) size = worth;
  size = (size + unit - 1) / unit * unit;
  parallel((num_out + size - 1) / size, [&](int64_t part) {
    const int64_t end = (part + 1) * size;
    function(part * size, end < num_out ? end : num_out);
  });
}

inline float bfloat16_to_float(uint16_t bits) {
  const uint32_t wide = static_cast<uint32_t>(bits) << 16;
  float value;
  std::memcpy(&value, &wide, 4);
  return value;
}

inline float float16_to_float(uint16_t bits) {
  _Float16 value;
  std::memcpy(&value, &bits, 2);
  return static_cast<float>(value);
}

// A row of scales as float32: where it lies, or converted into `room`.
inline const float* scales_of_row(const Tensor& scale, int64_t row, float* room) {
  if (scale.dtype == FLOAT32) return scale.row<float>(row);
  const uint16_t* bits = scale.row<uint16_t>(row);
  for (int64_t group = 0; group < scale.sizes[1]; ++group)
    room[group] = scale.dtype == BFLOAT16 ? bfloat16_to_float(bits[group]) : float16_to_float(bits[group]);
  return room;
}

// To columns [first, end) of every row.
inline void add_bias(const Tensor* bias, const Tensor& y, int64_t first, int64_t end) {
  if (bias == nullptr) return;
  for (int64_t m = 0; m < y.sizes[0]; ++m)
    for (int64_t n = first; n < end; ++n) y.row<float>(m)[n] += bias->row<float>(0)[n];
}

template <class T>
inline const T** pointers_to_rows(int slot, const Tensor& x) {
  const T** rows = scratch_of<const T*>(slot, x.sizes[0] + 1);
  for (int64_t row = 0; row < x.sizes[0]; ++row) rows[row] = x.row<T>(row);
  return rows;
}

}  // namespace slipstream

// linear_w8a16, linear_w4a16, linear_fp8a16, linear_nvfp4a16: weights of 8 and 4 bits with activations as they are. Some rows of the weight
// are widened to float32 in the cache, meet all rows of x, and are forgotten.
#include "linear.h"

using namespace slipstream;

namespace {

inline Ints widen_some(const char* from, int64_t count) {
  if (count == LANES) return widen(reinterpret_cast<const int8_t*>(from));
  int8_t padded[LANES] = {};
  std::memcpy(padded, from, count);
  return widen(padded);
}

inline Floats widen_int8(const char* from, int64_t count) {
  return __builtin_convertvector(widen_some(from, count), Floats);
}

// E4M3: its bits as those of a float32 are the number times 2^-120.
inline Floats widen_float8(const char* from, int64_t count) {
  const Ints bits = widen_some(from, count);
  const Ints moved = (bits & 127) << 20 | (bits & 128) << 24;
  const Floats value = reinterpret_cast<Floats>(moved) * 0x1p120f;
  return (bits & 127) == 127 ? splat(NAN) : value;
}

// Two neighbouring columns share a byte, the earlier in its low half.
inline Ints widen_halves(const char* from, int64_t count) {
  uint64_t halves = 0;
  if (count >= LANES) std::memcpy(&halves, from, LANES / 2);
  else std::memcpy(&halves, from, (count + 1) / 2);
  const Ints lanes = lane_numbers(), low = Ints{} + static_cast<int32_t>(halves),
             high = Ints{} + static_cast<int32_t>(halves >> 32);
  const Ints words = lanes < 8 ? low : high;
  return words >> ((lanes & 7) * 4) & 15;
}

inline Floats widen_int4(const char* from, int64_t count) {
  return __builtin_convertvector(widen_halves(from, count), Floats);
}

// E2M1: its bits as a float32's above an exponent of 126 are the number, but for 0 and 0.5, which are 0.5 and 0.75 then.
inline Floats widen_e2m1(const char* from, int64_t count) {
  const Ints bits = widen_halves(from, count), magnitude = bits & 7;
  const Floats near = reinterpret_cast<Floats>((magnitude << 22) + (126 << 23));
  const Floats value = magnitude < 2 ? near + near - 1 : near;
  return reinterpret_cast<Floats>(reinterpret_cast<Ints>(value) | (bits & 8) << 28);
}

template <class Function>
inline void widen_all(int64_t count, float* to, Function&& widen) {
  int64_t i = 0;
  for (; i + LANES <= count; i += LANES) store(to + i, widen(i, static_cast<int64_t>(LANES)));
  if (i < count) store_some(to + i, widen(i, count - i), count - i);
}

// A row's numbers as they are packed, as floats.
void widen_row(const Tensor& packed, int64_t row, int64_t num_columns, float* to) {
  const char* from = packed.row<char>(row);
  if (packed.dtype == INT8) widen_all(num_columns, to, [&](int64_t i, int64_t some) { return widen_int8(from + i, some); });
  else if (packed.dtype == UINT8)
    widen_all(num_columns, to, [&](int64_t i, int64_t some) { return widen_int4(from + i / 2, some); });
  else widen_all(num_columns, to, [&](int64_t i, int64_t some) { return widen_float8(from + i, some); });
}

float zero_of(const Tensor* zero, const Tensor& packed, int64_t row, int64_t group) {
  if (zero == nullptr) return packed.dtype == UINT8 ? 8 : 0;
  return packed.dtype == UINT8 ? zero->row<uint8_t>(row)[group] : zero->row<int8_t>(row)[group];
}

struct Weight {
  const Tensor &packed, &scale, *zero;
  int64_t num_columns, group_size;

  // (number - zero) · scale
  void dequantize_row(int64_t row, float* to) const {
    widen_row(packed, row, num_columns, to);
    float room[1024];
    const int64_t size = group_size == 0 || group_size > num_columns ? num_columns : group_size;
    const int64_t num_groups = scale.sizes[1];
    const float* scales = num_groups <= 1024 || scale.dtype == FLOAT32
                              ? scales_of_row(scale, row, room)
                              : scales_of_row(scale, row, scratch_of<float>(3, num_groups));
    for (int64_t group = 0; group < num_groups; ++group) {
      const int64_t first = group * size, end = first + size < num_columns ? first + size : num_columns;
      const float factor = scales[group], shift = -zero_of(zero, packed, row, group) * factor;
      int64_t i = first;
      for (; i + LANES <= end; i += LANES) store(to + i, load(to + i) * factor + shift);
      if (i < end) store_some(to + i, load_some(to + i, end - i) * factor + shift, end - i);
    }
  }
};

// E2M1, whose 16 columns share a scale in E4M3; row_scale multiplies all.
struct NVFP4Weight {
  const Tensor &packed, &scale, &row_scale;
  int64_t num_columns;

  void dequantize_row(int64_t row, float* to) const {
    const char *from = packed.row<char>(row), *scales = scale.row<char>(row);
    const float factor = row_scale.row<float>(row)[0];
    const int64_t num_groups = scale.sizes[1];
    float* group_scales = scratch_of<float>(3, num_groups);
    widen_all(num_groups, group_scales, [&](int64_t i, int64_t some) { return widen_float8(scales + i, some) * factor; });
    static_assert(16 % LANES == 0, "a vector is of one group");
    widen_all(num_columns, to, [&](int64_t i, int64_t some) { return widen_e2m1(from + i / 2, some) * group_scales[i / 16]; });
  }
};

template <class AnyWeight>
void multiply(const Tensor& x, const AnyWeight& weight, const Tensor* bias, const Tensor& y) {
  const int64_t num_rows = x.sizes[0], num_in = x.sizes[1], num_out = weight.packed.sizes[0];
  if (num_rows == 0) return;
  const float* const* x_rows = pointers_to_rows<float>(0, x);
  parallel_weight(num_out, num_in * 4, num_rows, TILE_N, [&](int64_t first, int64_t end) {
    // Few rows of x: as little of the weight at once as a tile takes, which stays in the first-level cache.
    const int64_t at_once = num_rows <= 2 * TILE_M ? TILE_N : end - first;
    float* numbers = scratch_of<float>(1, at_once * num_in);
    const float** w_rows = scratch_of<const float*>(2, at_once);
    for (int64_t start = first; start < end; start += at_once) {
      const int64_t count = end - start < at_once ? end - start : at_once;
      for (int64_t n = 0; n < count; ++n) {
        w_rows[n] = numbers + n * num_in;
        weight.dequantize_row(start + n, numbers + n * num_in);
      }
      float_products(x_rows, num_rows, w_rows, count, num_in, y.row<float>(0) + start, y.row_stride, false);
    }
    add_bias(bias, y, first, end);
  });
}

}  // namespace

SLIPSTREAM_KERNEL(linear_w8a16) {
  multiply(*in[0], Weight{*in[1], *in[2], in[3], in[0]->sizes[1], attributes[0].integer}, in[5], *out[0]);
}

SLIPSTREAM_KERNEL(linear_w4a16) {
  multiply(*in[0], Weight{*in[1], *in[2], in[3], in[0]->sizes[1], attributes[0].integer}, in[5], *out[0]);
}

SLIPSTREAM_KERNEL(linear_fp8a16) {
  multiply(*in[0], Weight{*in[1], *in[2], nullptr, in[0]->sizes[1], attributes[0].integer}, in[3], *out[0]);
}

SLIPSTREAM_KERNEL(linear_nvfp4a16) {
  multiply(*in[0], NVFP4Weight{*in[1], *in[2], *in[3], in[0]->sizes[1]}, in[4], *out[0]);
}

// linear_panels: weights of 8 or 4 bits in panels (bytes.h), with activations of 8 bits, a scale a row of these.
#include "bytes.h"
#include "linear.h"

using namespace slipstream;

namespace {

constexpr int64_t FEW_ROWS = 8;  // of x: the time is that of reading W
// Bytes: the processor fetches 8 bits early enough by itself, 4 bits it does not (half the rate without this).
constexpr int64_t AHEAD = 4096;

struct Product {
  const int8_t* x;        // [rows, row_bytes], zeros beyond the columns
  const int32_t* starts;  // [rows, groups]: what the zero of the weight adds, taken off
  const float* x_sums;    // [rows, groups], of the activations themselves: what a shift is multiplied with
  const Tensor &x_scale, &panels, &scale, *shift, *bias, &y;
  int64_t row_bytes, num_out, num_groups, group_bytes;  // bytes of x that share their scales; the last group may have less
  int64_t x_every, w_every;                             // groups for each scale of x, and of the weight

  const uint8_t* panel(int64_t p) const { return panels.row<uint8_t>(p); }
  Sixteen of_group(const Tensor& each, int64_t p, int64_t group) const {
    const int64_t place = group / w_every * PANEL;
    return each.dtype == FLOAT16 ? load_halves(each.row<uint16_t>(p) + place) : load_sixteen(each.row<float>(p) + place);
  }
  float x_scale_of(int64_t m, int64_t group) const { return x_scale.row<float>(m)[group / x_every]; }
};

// sums[m][n] += x[m] · panel[n] over `count` bytes of x, in as many chains as keep the units busy.
template <int BITS, int M, int N>
inline void add_products(Sums (&sums)[M][N], const int8_t* x, int64_t row_bytes, const uint8_t* const* panels, int64_t count) {
  constexpr int64_t COLUMNS = BITS == 8 ? 4 : 8;
  for (int64_t column = 0, place = 0; column < count; column += COLUMNS, place += STEP_BYTES) {
    if constexpr (BITS == 8) {
      Bytes w[N];
#pragma GCC unroll 4
      for (int n = 0; n < N; ++n) w[n] = load_bytes(panels[n] + place);
#pragma GCC unroll 16
      for (int m = 0; m < M; ++m) {
        const Numbers four = load_numbers(x + m * row_bytes + column);
#pragma GCC unroll 4
        for (int n = 0; n < N; ++n) sums[m][n].add(w[n], four);
      }
    } else {
      Bytes low[N], high[N];
#pragma GCC unroll 4
      for (int n = 0; n < N; ++n) {
        load_nibbles(panels[n] + place, low[n], high[n]);
        __builtin_prefetch(panels[n] + place + AHEAD);
      }
#pragma GCC unroll 16
      for (int m = 0; m < M; ++m) {
        const Numbers first = load_numbers(x + m * row_bytes + column), second = load_numbers(x + m * row_bytes + column + 4);
#pragma GCC unroll 4
        for (int n = 0; n < N; ++n) {
          sums[m][n].add(low[n], first);
          sums[m][n].add(high[n], second);
        }
      }
    }
  }
}

inline void finish(const Product& p, int64_t m, int64_t panel, const Sixteen& value) {
  const int64_t first = panel * PANEL, count = p.num_out - first;
  float room[PANEL] = {};
  if (p.bias != nullptr) std::memcpy(room, p.bias->row<float>(0) + first, (count < PANEL ? count : PANEL) * sizeof(float));
  const Sixteen bias = load_sixteen(room);
  store_sixteen(p.y.row<float>(m) + first, Sixteen::of([&](int i) { return value.part[i] + bias.part[i]; }), count);
}

// One scale a row, of the weight and of x.
template <int BITS, int M, int N>
void tile_of_rows(const Product& p, int64_t m0, int64_t n0) {
  const uint8_t* panels[N];
  for (int n = 0; n < N; ++n) panels[n] = p.panel(n0 + n);
  Sums sums[M][N];
#pragma GCC unroll 16
  for (int m = 0; m < M; ++m)
    for (int n = 0; n < N; ++n) sums[m][n].start(p.starts[m0 + m]);
  add_products<BITS, M, N>(sums, p.x + m0 * p.row_bytes, p.row_bytes, panels, p.row_bytes);
#pragma GCC unroll 4
  for (int n = 0; n < N; ++n) {
    const Sixteen scale = p.of_group(p.scale, n0 + n, 0);
#pragma GCC unroll 16
    for (int m = 0; m < M; ++m) {
      const float x_scale = p.x_scale_of(m0 + m, 0);
      const Sixteen sum = sums[m][n].floats();
      finish(p, m0 + m, n0 + n, Sixteen::of([&](int i) { return sum.part[i] * (scale.part[i] * x_scale); }));
    }
  }
}

template <int BITS, int M, int N, bool ARE_WEIGHTS_GROUPED>
void tile_of_groups(const Product& p, int64_t m0, int64_t n0) {
  Sixteen totals[M][N] = {};
  for (int64_t group = 0; group < p.num_groups; ++group) {
    const int64_t first = group * p.group_bytes, left = p.row_bytes - first;
    const uint8_t* panels[N];
    for (int n = 0; n < N; ++n) panels[n] = p.panel(n0 + n) + first / (BITS == 8 ? 4 : 8) * STEP_BYTES;
    Sums sums[M][N];
#pragma GCC unroll 16
    for (int m = 0; m < M; ++m)
      for (int n = 0; n < N; ++n) sums[m][n].start(p.starts[(m0 + m) * p.num_groups + group]);
    add_products<BITS, M, N>(sums, p.x + m0 * p.row_bytes + first, p.row_bytes, panels,
                             left < p.group_bytes ? left : p.group_bytes);
#pragma GCC unroll 4
    for (int n = 0; n < N; ++n) {
      Sixteen scale, shift;
      if constexpr (ARE_WEIGHTS_GROUPED) {
        scale = p.of_group(p.scale, n0 + n, group);
        if (p.shift != nullptr) shift = p.of_group(*p.shift, n0 + n, group);
      }
#pragma GCC unroll 16
      for (int m = 0; m < M; ++m) {
        const float x_scale = p.x_scale_of(m0 + m, group);
        const Sixteen sum = sums[m][n].floats();
#pragma GCC unroll 4
        for (int i = 0; i < Sixteen::COUNT; ++i) {
          Floats& total = totals[m][n].part[i];
          if constexpr (ARE_WEIGHTS_GROUPED) {
            total += sum.part[i] * (scale.part[i] * x_scale);
            if (p.shift != nullptr) total -= shift.part[i] * p.x_sums[(m0 + m) * p.num_groups + group];
          } else {
            total += sum.part[i] * x_scale;
          }
        }
      }
    }
  }
#pragma GCC unroll 4
  for (int n = 0; n < N; ++n) {
    const Sixteen scale = p.of_group(p.scale, n0 + n, 0);
#pragma GCC unroll 16
    for (int m = 0; m < M; ++m)
      finish(p, m0 + m, n0 + n, Sixteen::of([&](int i) {
               return ARE_WEIGHTS_GROUPED ? totals[m][n].part[i] : totals[m][n].part[i] * scale.part[i];
             }));
  }
}

// tile(count of rows, count of panels, first row, first panel) for all of num_rows and panels [first, end). Few rows of x
// read panel after panel: memory is fastest in one stream. With many, a number of x serves several panels.
template <int MOST, class Tile>
void for_all(int64_t num_rows, int64_t first, int64_t end, Tile&& tile) {
  const int64_t end_of_wide = num_rows <= FEW_ROWS ? first : end;
  for (int64_t m = 0; m < num_rows; m += MOST)
    with_count<MOST>(num_rows - m < MOST ? num_rows - m : MOST, [&](auto rows) {
      int64_t n = first;
      for (; n + BYTES_N <= end_of_wide; n += BYTES_N) tile(rows, std::integral_constant<int, BYTES_N>{}, m, n);
      for (; n < end; ++n) tile(rows, std::integral_constant<int, 1>{}, m, n);
    });
}

template <int BITS>
void multiply(const Product& p, int64_t first, int64_t end) {
  const int64_t num_rows = p.y.sizes[0];
  if (p.num_groups == 1 && p.shift == nullptr)
    for_all<BYTES_M>(num_rows, first, end, [&](auto rows, auto panels, int64_t m, int64_t n) {
      tile_of_rows<BITS, rows.value, panels.value>(p, m, n);
    });
  else if (p.w_every == p.num_groups && p.shift == nullptr)
    for_all<GROUPS_M>(num_rows, first, end, [&](auto rows, auto panels, int64_t m, int64_t n) {
      tile_of_groups<BITS, rows.value, panels.value, false>(p, m, n);
    });
  else
    for_all<GROUPS_M>(num_rows, first, end, [&](auto rows, auto panels, int64_t m, int64_t n) {
      tile_of_groups<BITS, rows.value, panels.value, true>(p, m, n);
    });
}

int32_t sum_of(const int8_t* x, int64_t count) {
  int32_t sum = 0;
  for (int64_t i = 0; i < count; ++i) sum += x[i];
  return sum;
}

// x as it lies, or with zeros to the end of its last four (or eight) columns.
const int8_t* padded_rows(const Tensor& x, int64_t row_bytes) {
  if (x.row_stride == row_bytes) return x.row<int8_t>(0);
  int8_t* padded = scratch_of<int8_t>(0, x.sizes[0] * row_bytes);
  for (int64_t m = 0; m < x.sizes[0]; ++m) {
    std::memcpy(padded + m * row_bytes, x.row<int8_t>(m), x.sizes[1]);
    std::memset(padded + m * row_bytes + x.sizes[1], 0, row_bytes - x.sizes[1]);
  }
  return padded;
}

}  // namespace

SLIPSTREAM_KERNEL(linear_panels) {
  const Tensor &x = *in[0], &panels = *in[2], *shift = in[4], &y = *out[0];
  const int64_t num_rows = x.sizes[0];
  if (num_rows == 0) return;
  const bool is_w4 = attributes[0].integer == 4;
  const int64_t row_bytes = panels.sizes[1] / STEP_BYTES * (is_w4 ? 8 : 4);
  const auto size_of = [&](int64_t size) { return size == 0 || size > row_bytes ? row_bytes : size; };
  const int64_t w_size = size_of(attributes[1].integer), x_size = size_of(attributes[2].integer);
  const int64_t size = w_size < x_size ? w_size : x_size, num_groups = (row_bytes + size - 1) / size;
  const auto groups_in = [&](int64_t whole) { return whole == row_bytes ? num_groups : whole / size; };
  int32_t* starts = scratch_of<int32_t>(1, 2 * num_rows * num_groups);
  float* x_sums = reinterpret_cast<float*>(starts + num_rows * num_groups);
  const Product p{padded_rows(x, row_bytes), starts, x_sums, *in[1], panels, *in[3], shift, in[5], y, row_bytes, y.sizes[1],
                  num_groups, size, groups_in(x_size), groups_in(w_size)};
  const int32_t zero = shift != nullptr ? 0 : is_w4 ? 8 : 128;
  parallel_rows(num_rows, row_bytes / 16.0, [&](int64_t first, int64_t end) {
    for (int64_t m = first; m < end; ++m)
      for (int64_t group = 0; group < num_groups; ++group) {
        const int64_t start = group * size, left = row_bytes - start;
        const int32_t sum = sum_of(p.x + m * row_bytes + start, left < size ? left : size);
        starts[m * num_groups + group] = -zero * sum;
        x_sums[m * num_groups + group] = static_cast<float>(sum) * p.x_scale_of(m, group);
      }
  });
  parallel_weight(panels.sizes[0], panels.sizes[1], num_rows, [&](int64_t first, int64_t end) {
    if (is_w4) multiply<4>(p, first, end);
    else multiply<8>(p, first, end);
  });
}

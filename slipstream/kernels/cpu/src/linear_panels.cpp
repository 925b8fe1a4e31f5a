// linear_panels: weights of 8 or 4 bits in panels (bytes.h), with activations of 8 bits, a scale a row or group of these.
// linear_panels_silu_and_mul_quantize: two of them, of which nothing but what the next product reads is written.
#include <type_traits>

#include "bytes.h"
#include "linear.h"
#include "rows.h"

using namespace slipstream;

namespace {

constexpr int64_t FEW_ROWS = 8;        // of x: the time is that of reading W
constexpr int64_t SOME_ROWS = 64;      // of x: worth reading the next of W while these are computed
constexpr int64_t ROWS_AT_ONCE = 192;  // of x: they stay in the second-level cache while panels pass by
constexpr int64_t USUAL_GROUP = 32;    // bytes of x; a loop over a known number of them has no counters
// Bytes: the processor fetches 8 bits early enough by itself, 4 bits it does not (half the rate without this).
constexpr int64_t AHEAD = 4096;

enum class Scales { ROW, GROUP, SHIFTED };  // of the weight: one a row; one a group of its columns; a shift beside each

// The rows of x as tiles read them: M rows side by side, group after group. Of a group there lie what the zero of the weight
// adds (taken off), M integers; its numbers, four and four, M of each; its scales, M; and the sums of the activations
// themselves, M, which shifts are multiplied with.
struct Rows {
  int32_t* memory;
  int64_t num_bytes, num_groups, group_bytes;  // bytes of a row, zeros beyond its columns, and of a group; the last may have less
  bool are_few;

  int64_t at_once() const { return are_few ? ROWS_ALONE : ROWS_M; }  // M, but for the last ones

  int64_t ints_of_row() const { return num_bytes / 4 + 3 * num_groups; }
  int32_t* tile(int64_t row) const { return memory + row * ints_of_row(); }

  // From rows [first, first + count) of x, whose scales are one for every x_every groups.
  void fill(int32_t* to, int64_t first, int64_t count, const Tensor& x, const Tensor& scale, int64_t x_every, int32_t zero) const {
    for (int64_t group = 0, start = 0; group < num_groups; ++group, start += group_bytes) {
      const int64_t bytes = num_bytes - start < group_bytes ? num_bytes - start : group_bytes;
      int32_t* const numbers = to + count;
      float* const scales = reinterpret_cast<float*>(numbers + bytes / 4 * count);
      for (int64_t m = 0; m < count; ++m) {
        const int8_t* const row = x.row<int8_t>(first + m) + start;
        const int64_t there = x.sizes[1] > start ? x.sizes[1] - start : 0;  // the rest are zeros
        const int32_t sum = bytes == USUAL_GROUP && there >= USUAL_GROUP
                                ? copy_fours(row, USUAL_GROUP, USUAL_GROUP, numbers + m, count)
                                : copy_fours(row, bytes, there < bytes ? there : bytes, numbers + m, count);
        to[m] = -zero * sum;
        scales[m] = scale.row<float>(first + m)[group / x_every];
        scales[count + m] = static_cast<float>(sum) * scales[m];
      }
      to = reinterpret_cast<int32_t*>(scales + 2 * count);
    }
  }

  // Four and four of `there` numbers and of the zeros after them, `every` integers apart. Returns the sum.
  static inline int32_t copy_fours(const int8_t* from, int64_t bytes, int64_t there, int32_t* to, int64_t every) {
    int32_t sum = 0;
    for (int64_t i = 0; i < there; ++i) sum += from[i];
    for (int64_t i = 0; i + 4 <= there; i += 4) std::memcpy(to + i / 4 * every, from + i, 4);
    for (int64_t i = there / 4 * 4; i < bytes; i += 4) {
      to[i / 4 * every] = 0;
      if (i < there) std::memcpy(to + i / 4 * every, from + i, there - i);
    }
    return sum;
  }
};

struct Product {
  Rows x;
  int64_t first_row, num_rows;  // those of x that lie there
  const Tensor &panels, &scale, *shift, *bias, &y;
  int64_t w_every;  // groups for each scale of the weight
  int64_t first_panel;  // whose columns are the first of y

  float* result(int64_t m, int64_t panel) const { return y.row<float>(first_row + m) + (panel - first_panel) * PANEL; }
};

inline Sixteen of_group(const Tensor& each, int64_t panel, int64_t place) {
  return each.dtype == FLOAT16 ? load_halves(each.row<uint16_t>(panel) + place) : load_sixteen(each.row<float>(panel) + place);
}

// sums[m][n] += x[m] · w[n] over `count` bytes of x, in as many chains as keep the units busy.
template <int BITS, int M, int N, class Count>
inline void add_products(Sums (&sums)[M][N], const int32_t* x, const uint8_t* const (&w)[N], Count count) {
  constexpr int64_t COLUMNS = BITS == 8 ? 4 : 8;
#pragma GCC unroll 1  // all steps of a group in a row are not faster, and many times the code
  for (int64_t step = 0; step < count / COLUMNS; ++step) {
    const int32_t* const numbers = x + step * (COLUMNS / 4) * M;
    if constexpr (BITS == 8) {
      Bytes bytes[N];
#pragma GCC unroll 4
      for (int n = 0; n < N; ++n) bytes[n] = load_bytes(w[n] + step * STEP_BYTES);
#pragma GCC unroll 16
      for (int m = 0; m < M; ++m) {
        const Numbers four = load_numbers(numbers + m);
#pragma GCC unroll 4
        for (int n = 0; n < N; ++n) sums[m][n].add(bytes[n], four);
      }
    } else {
      Bytes low[N], high[N];
#pragma GCC unroll 4
      for (int n = 0; n < N; ++n) {
        load_nibbles(w[n] + step * STEP_BYTES, low[n], high[n]);
        __builtin_prefetch(w[n] + step * STEP_BYTES + AHEAD);
      }
#pragma GCC unroll 16
      for (int m = 0; m < M; ++m) {
        const Numbers first = load_numbers(numbers + m), second = load_numbers(numbers + M + m);
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
  const int64_t first = panel * PANEL, count = p.y.sizes[1] - (panel - p.first_panel) * PANEL;
  float room[PANEL] = {};
  if (p.bias != nullptr) std::memcpy(room, p.bias->row<float>(0) + first, (count < PANEL ? count : PANEL) * sizeof(float));
  const Sixteen bias = load_sixteen(room);
  store_sixteen(p.result(m, panel), Sixteen::of([&](int i) { return value.part[i] + bias.part[i]; }), count);
}

// The panels that come after some, fetched from memory by the tiles of these: each has its share, group by group.
struct Ahead {
  const uint8_t* bytes;
  int64_t lines_a_group;

  void fetch() {
    for (int64_t line = 0; line < lines_a_group; ++line) __builtin_prefetch(bytes + line * STEP_BYTES, 0, 2);
    bytes += lines_a_group * STEP_BYTES;
  }
};

// y[m0 + m][16 of each panel]. `panels`: of rows n0 of the weight, as bytes or as nibbles. `ahead` may be nothing at all.
template <int BITS, Scales SCALES, int M, int N, class OptionalAhead>
void tile(const Product& p, const uint8_t* const* panels, int64_t m0, int64_t n0, OptionalAhead& ahead) {
  const int32_t* x = p.x.tile(m0);
  const uint8_t* w[N];
  for (int n = 0; n < N; ++n) w[n] = panels[n];
  Sixteen totals[M][N] = {};
  for (int m = 0; m < M; ++m)  // where the sums will go: 12 KB apart, in no cache, and a store waits for its line
    for (int n = 0; n < N; ++n) __builtin_prefetch(p.result(m0 + m, n0 + n), 1);
  int64_t scale_place = 0, uses = 0;  // of the weight's scales
  for (int64_t left = p.x.num_bytes; left > 0; left -= p.x.group_bytes) {
    const int64_t bytes = left < p.x.group_bytes ? left : p.x.group_bytes;
    if constexpr (std::is_same_v<OptionalAhead, Ahead>) ahead.fetch();
    Sums sums[M][N];
#pragma GCC unroll 16
    for (int m = 0; m < M; ++m)
      for (int n = 0; n < N; ++n) sums[m][n].start(x[m]);
    if (bytes == USUAL_GROUP) add_products<BITS, M, N>(sums, x + M, w, std::integral_constant<int64_t, USUAL_GROUP>{});
    else add_products<BITS, M, N>(sums, x + M, w, bytes);
    const float* const x_scales = reinterpret_cast<const float*>(x + M + bytes / 4 * M);
#pragma GCC unroll 4
    for (int n = 0; n < N; ++n) {
      Sixteen scale, shift;
      if constexpr (SCALES != Scales::ROW) scale = of_group(p.scale, n0 + n, scale_place);
      if constexpr (SCALES == Scales::SHIFTED) shift = of_group(*p.shift, n0 + n, scale_place);
#pragma GCC unroll 16
      for (int m = 0; m < M; ++m) {
        const Sixteen sum = sums[m][n].floats();
#pragma GCC unroll 4
        for (int i = 0; i < Sixteen::COUNT; ++i) {
          Floats& total = totals[m][n].part[i];
          if constexpr (SCALES == Scales::ROW) total += sum.part[i] * x_scales[m];
          else total += sum.part[i] * (scale.part[i] * x_scales[m]);
          if constexpr (SCALES == Scales::SHIFTED) total -= shift.part[i] * x_scales[M + m];
        }
      }
      w[n] += bytes / (BITS == 8 ? 4 : 8) * STEP_BYTES;
    }
    x += (3 + bytes / 4) * M;
    if (++uses == p.w_every) {
      uses = 0;
      scale_place += PANEL;
    }
  }
#pragma GCC unroll 4
  for (int n = 0; n < N; ++n) {
    Sixteen scale;
    if constexpr (SCALES == Scales::ROW) scale = of_group(p.scale, n0 + n, 0);
#pragma GCC unroll 16
    for (int m = 0; m < M; ++m)
      finish(p, m0 + m, n0 + n, Sixteen::of([&](int i) {
               return SCALES == Scales::ROW ? totals[m][n].part[i] * scale.part[i] : totals[m][n].part[i];
             }));
  }
}

// A panel of nibbles as one of bytes.
void widen(const uint8_t* nibbles, int64_t count, uint8_t* bytes) {
  for (int64_t step = 0; step < count; step += STEP_BYTES)
    for (int64_t i = 0; i < STEP_BYTES; ++i) {
      bytes[2 * step + i] = nibbles[step + i] & 15;
      bytes[2 * step + STEP_BYTES + i] = nibbles[step + i] >> 4;
    }
}

// All rows with panels [first, end). Few rows read panel after panel as it lies: memory is fastest in one stream. With many, a
// number of x serves several panels, and nibbles are split once for all.
template <int BITS, Scales SCALES>
void multiply(const Product& p, int64_t first, int64_t end) {
  const auto rows_meet = [&](auto bits, auto most, const uint8_t* const* panels, auto count, int64_t n, auto ahead) {
    for (int64_t m = 0; m < p.num_rows; m += most.value)
      with_count<most.value>(p.num_rows - m < most.value ? p.num_rows - m : most.value,
                             [&](auto rows) { tile<bits.value, SCALES, rows.value, count.value>(p, panels, m, n, ahead); });
  };
  const int64_t panel_bytes = p.panels.sizes[1], wide_bytes = p.x.num_bytes * PANEL;
  uint8_t* const room = BITS == 8 ? nullptr : scratch_of<uint8_t>(2, PANELS_N * wide_bytes);
  const auto panels_meet = [&](auto count, int64_t n) {
    const uint8_t* panels[count.value];
    for (int i = 0; i < count.value; ++i) {
      panels[i] = p.panels.row<uint8_t>(n + i);
      if constexpr (BITS == 4) {
        widen(panels[i], panel_bytes, room + i * wide_bytes);
        panels[i] = room + i * wide_bytes;
      }
    }
    const auto all_meet = [&](auto ahead) {
      rows_meet(std::integral_constant<int, 8>{}, std::integral_constant<int, ROWS_M>{}, panels, count, n, ahead);
    };
    if (p.num_rows > SOME_ROWS) return all_meet(std::false_type{});
    const int64_t num_groups = p.x.num_groups * ((p.num_rows + ROWS_M - 1) / ROWS_M);
    all_meet(Ahead{p.panels.row<uint8_t>(n + count.value), (PANELS_N * panel_bytes / STEP_BYTES + num_groups - 1) / num_groups});
  };
  int64_t n = first;
  if (p.x.are_few) {
    for (; n < end; ++n) {
      const uint8_t* const panel = p.panels.row<uint8_t>(n);
      rows_meet(std::integral_constant<int, BITS>{}, std::integral_constant<int, ROWS_ALONE>{}, &panel,
                std::integral_constant<int, 1>{}, n, std::false_type{});
    }
    return;
  }
  for (; n < end; n += PANELS_N)
    with_count<PANELS_N>(end - n < PANELS_N ? end - n : PANELS_N, [&](auto count) { panels_meet(count, n); });
}

template <int BITS>
void multiply(const Product& p, int64_t first, int64_t end) {
  if (p.shift != nullptr) multiply<BITS, Scales::SHIFTED>(p, first, end);
  else if (p.w_every != p.x.num_groups) multiply<BITS, Scales::GROUP>(p, first, end);
  else multiply<BITS, Scales::ROW>(p, first, end);
}

// The product that both kernels' inputs and attributes describe, some rows of x at a time. function(product): a weight's worth
// of work on these, with y's columns left to it.
template <class Function>
void with_rows(const Tensor* const* in, const Attribute* attributes, const Tensor& y, Function&& function) {
  const Tensor &x = *in[0], &x_scale = *in[1], &panels = *in[2], *shift = in[4];
  const int64_t num_rows = x.sizes[0];
  if (num_rows == 0) return;
  const bool is_w4 = attributes[0].integer == 4;
  const int64_t row_bytes = panels.sizes[1] / STEP_BYTES * (is_w4 ? 8 : 4);
  const auto size_of = [&](int64_t size) { return size == 0 || size > row_bytes ? row_bytes : size; };
  const int64_t w_size = size_of(attributes[1].integer), x_size = size_of(attributes[2].integer);
  const int64_t size = w_size < x_size ? w_size : x_size, num_groups = (row_bytes + size - 1) / size;
  const auto groups_in = [&](int64_t whole) { return whole == row_bytes ? num_groups : whole / size; };
  Rows rows{nullptr, row_bytes, num_groups, size, num_rows <= FEW_ROWS};
  const int64_t at_once = rows.at_once();
  rows.memory = scratch_of<int32_t>(1, (num_rows < ROWS_AT_ONCE ? num_rows : ROWS_AT_ONCE) * rows.ints_of_row());
  for (int64_t first_row = 0; first_row < num_rows; first_row += ROWS_AT_ONCE) {
    const int64_t count = num_rows - first_row < ROWS_AT_ONCE ? num_rows - first_row : ROWS_AT_ONCE;
    parallel_rows((count + at_once - 1) / at_once, row_bytes * at_once / 8.0, [&](int64_t first, int64_t end) {
      for (int64_t m = first * at_once; m < end * at_once && m < count; m += at_once)
        rows.fill(rows.tile(m), first_row + m, count - m < at_once ? count - m : at_once, x, x_scale, groups_in(x_size),
                  is_w4 ? (shift != nullptr ? 0 : 8) : 128);
    });
    function(Product{rows, first_row, count, panels, *in[3], shift, in[5], y, groups_in(w_size), 0}, is_w4);
  }
}

void multiply(const Product& p, bool is_w4, int64_t first, int64_t end) {
  if (is_w4) multiply<4>(p, first, end);
  else multiply<8>(p, first, end);
}

// silu(gate) · up, in 8 bits, of some groups of columns. room: [rows, 2 · num_columns], gate and up beside each other. Rounding
// is a loop of its own: a row's steps wait for each other, and shorter ones let the processor have more rows under way.
void activate(const Product& p, float* room, int64_t num_columns, int64_t size, int64_t group, const Tensor& numbers,
              const Tensor& scales) {
  for (int64_t m = 0; m < p.num_rows; ++m) {
    float *gate = room + m * 2 * num_columns, *up = gate + num_columns;
    for (int64_t i = 0; i < num_columns; i += LANES) store(gate + i, silu(load(gate + i)) * load(up + i));
  }
  for (int64_t m = 0; m < p.num_rows; ++m)
    quantize_row(room + m * 2 * num_columns, num_columns, 0, size, numbers.row<int8_t>(p.first_row + m) + group * size,
                 scales.row<float>(p.first_row + m) + group);
}

}  // namespace

SLIPSTREAM_KERNEL(linear_panels) {
  with_rows(in, attributes, *out[0], [](const Product& p, bool is_w4) {
    parallel_weight(p.panels.sizes[0], p.panels.sizes[1], p.num_rows, PANELS_N,
                    [&](int64_t first, int64_t end) { multiply(p, is_w4, first, end); });
  });
}

SLIPSTREAM_KERNEL(linear_panels_silu_and_mul_quantize) {
  constexpr int64_t AT_ONCE = PANELS_N;  // groups: their panels are whole tiles, however many a group has
  const int64_t size = attributes[4].integer, num_panels = size / PANEL;  // of a group: so many columns of the gate
  const int64_t num_groups = out[0]->sizes[1] / size;
  with_rows(in, attributes, *out[0], [&](const Product& rows, bool is_w4) {
    parallel_weight(num_groups, 2 * num_panels * rows.panels.sizes[1], rows.num_rows, AT_ONCE, [&](int64_t first, int64_t end) {
      float* const room = scratch_of<float>(3, rows.num_rows * 2 * AT_ONCE * size);
      for (int64_t group = first; group < end; group += AT_ONCE) {
        const int64_t count = end - group < AT_ONCE ? end - group : AT_ONCE, num_columns = count * size;
        for (int half = 0; half < 2; ++half) {
          const int64_t panel = (group + half * num_groups) * num_panels;
          const Tensor columns{
              reinterpret_cast<char*>(room + half * num_columns), {rows.num_rows, num_columns}, 2 * num_columns, FLOAT32, 2};
          multiply(Product{rows.x, 0, rows.num_rows, rows.panels, rows.scale, rows.shift, rows.bias, columns, rows.w_every, panel},
                   is_w4, panel, panel + count * num_panels);
        }
        activate(rows, room, num_columns, size, group, *out[0], *out[1]);
      }
    });
  });
}

// silu, gelu and their gated forms, as they are or in 8 bits; sums, products and factors of single numbers.
#include "pool.h"
#include "rows.h"
#include "tensor.h"

using namespace slipstream;

namespace {

inline Floats gelu_tanh(Floats x) {
  return x * reciprocal(1.0f + exponential(-1.5957691216f * (x + 0.044715f * x * x * x)));  // x/2 · (1 + tanh(u)) = x / (1 + e^-2u)
}

inline Floats gelu_exact(Floats x) {
  Floats result;
  for (int lane = 0; lane < LANES; ++lane) result[lane] = 0.5f * x[lane] * (1 + std::erf(x[lane] * 0.70710678f));
  return result;
}

// f(i, count) for whole vectors, then for what is left.
template <class Function>
inline void map_row(float* to, int64_t count, Function&& f) {
  int64_t i = 0;
  for (; i + LANES <= count; i += LANES) store(to + i, f(i, static_cast<int64_t>(LANES)));
  if (i < count) store_some(to + i, f(i, count - i), count - i);
}

// work: nanoseconds a column, about.
template <class Function>
void activate(const Tensor& x, bool is_gated, const Tensor& y, const Tensor* scales, const Attribute* quantization,
              double work, Function&& f) {
  const int64_t count = y.sizes[1];
  parallel_rows(x.sizes[0], count * work, [&](int64_t first, int64_t end) {
    float* room = scales == nullptr ? nullptr : scratch_of<float>(0, count);
    for (int64_t row = first; row < end; ++row) {
      const float *gate = x.row<float>(row), *up = gate + count;
      float* to = scales == nullptr ? y.row<float>(row) : room;
      map_row(to, count, [&](int64_t i, int64_t some) {
        const Floats activated = f(load_up_to(gate + i, some));
        return is_gated ? activated * load_up_to(up + i, some) : activated;
      });
      if (scales != nullptr)
        quantize_row(room, count, static_cast<float>(quantization[0].number), quantization[1].integer,
                     y.row<int8_t>(row), scales->row<float>(row));
    }
  });
}

void gelu(const Tensor& x, bool is_gated, bool is_approximate, const Tensor& y, const Tensor* scales,
          const Attribute* quantization) {
  if (is_approximate) activate(x, is_gated, y, scales, quantization, 0.5, [](Floats v) { return gelu_tanh(v); });
  else activate(x, is_gated, y, scales, quantization, 8, [](Floats v) { return gelu_exact(v); });
}

void silu(const Tensor& x, bool is_gated, const Tensor& y, const Tensor* scales, const Attribute* quantization) {
  activate(x, is_gated, y, scales, quantization, 0.4, [](Floats v) { return slipstream::silu(v); });
}

template <class Function>
void join(const Tensor& x, const Tensor& y, const Tensor& to, Function&& f) {
  parallel_rows(x.sizes[0], x.sizes[1] / 8.0, [&](int64_t first, int64_t end) {
    for (int64_t row = first; row < end; ++row)
      map_row(to.row<float>(row), x.sizes[1], [&](int64_t i, int64_t some) {
        return f(load_up_to(x.row<float>(row) + i, some), load_up_to(y.row<float>(row) + i, some));
      });
  });
}

}  // namespace

SLIPSTREAM_KERNEL(silu) { silu(*in[0], false, *out[0], nullptr, nullptr); }
SLIPSTREAM_KERNEL(silu_and_mul) { silu(*in[0], true, *out[0], nullptr, nullptr); }
SLIPSTREAM_KERNEL(silu_and_mul_quantize) { silu(*in[0], true, *out[0], out[1], attributes); }
SLIPSTREAM_KERNEL(gelu) { gelu(*in[0], false, attributes[0].integer, *out[0], nullptr, nullptr); }
SLIPSTREAM_KERNEL(gelu_and_mul) { gelu(*in[0], true, attributes[0].integer, *out[0], nullptr, nullptr); }
SLIPSTREAM_KERNEL(gelu_quantize) { gelu(*in[0], false, attributes[0].integer, *out[0], out[1], attributes + 1); }
SLIPSTREAM_KERNEL(gelu_and_mul_quantize) { gelu(*in[0], true, attributes[0].integer, *out[0], out[1], attributes + 1); }

SLIPSTREAM_KERNEL(quantize_w8a8) { activate(*in[0], false, *out[0], out[1], attributes, 0.2, [](Floats v) { return v; }); }

SLIPSTREAM_KERNEL(add) { join(*in[0], *in[1], *out[0], [](Floats x, Floats y) { return x + y; }); }
SLIPSTREAM_KERNEL(mul) { join(*in[0], *in[1], *out[0], [](Floats x, Floats y) { return x * y; }); }

SLIPSTREAM_KERNEL(scale) {
  const float factor = static_cast<float>(attributes[0].number);
  activate(*in[0], false, *out[0], nullptr, nullptr, 0.1, [=](Floats v) { return v * factor; });
}

SLIPSTREAM_KERNEL(soft_cap) {
  const float cap = static_cast<float>(attributes[0].number);
  activate(*in[0], false, *out[0], nullptr, nullptr, 0.5, [=](Floats v) { return cap * hyperbolic_tangent(v / cap); });
}

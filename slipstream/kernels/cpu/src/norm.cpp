// rms_norm and layer_norm: alone, with the residual sum before, and giving their result in 8 bits.
#include <cmath>

#include "pool.h"
#include "rows.h"
#include "tensor.h"

using namespace slipstream;

namespace {

template <class Function>
inline void by_lanes(int64_t count, Function&& f) {
  int64_t i = 0;
  for (; i + LANES <= count; i += LANES) f(i, static_cast<int64_t>(LANES));
  if (i < count) f(i, count - i);
}

void add_rows(const float* x, const float* y, float* total, int64_t count) {
  by_lanes(count, [&](int64_t i, int64_t some) {
    store_up_to(total + i, load_up_to(x + i, some) + load_up_to(y + i, some), some);
  });
}

void rms_norm_row(const float* x, const float* weight, int64_t count, float eps, float offset, float* to) {
  Floats squares = {};
  by_lanes(count, [&](int64_t i, int64_t some) {
    const Floats v = load_up_to(x + i, some);
    squares += v * v;
  });
  const float factor = 1 / std::sqrt(sum(squares) / static_cast<float>(count) + eps);
  by_lanes(count, [&](int64_t i, int64_t some) {
    store_up_to(to + i, load_up_to(x + i, some) * factor * (load_up_to(weight + i, some) + offset), some);
  });
}

void layer_norm_row(const float* x, const float* weight, const float* bias, int64_t count, float eps, float* to) {
  Floats values = {}, squares = {};
  by_lanes(count, [&](int64_t i, int64_t some) { values += load_up_to(x + i, some); });
  const float mean = sum(values) / static_cast<float>(count);
  by_lanes(count, [&](int64_t i, int64_t some) {
    const Floats centred = load_up_to(x + i, some) - mean;
    store_up_to(to + i, centred, some);
    const Floats counted = load_up_to(to + i, some);  // zeros beyond the row
    squares += counted * counted;
  });
  const float factor = 1 / std::sqrt(sum(squares) / static_cast<float>(count) + eps);
  by_lanes(count, [&](int64_t i, int64_t some) {
    Floats v = load_up_to(to + i, some) * factor * load_up_to(weight + i, some);
    if (bias != nullptr) v += load_up_to(bias + i, some);
    store_up_to(to + i, v, some);
  });
}

struct How {
  float eps, offset;
  bool is_layer;
  const Tensor *weight, *bias;
};

void norm_row(const How& how, const float* x, int64_t num_columns, float* to) {
  const int64_t size = how.weight->sizes[0];
  const float* weight = how.weight->row<float>(0);
  for (int64_t first = 0; first < num_columns; first += size) {
    if (how.is_layer) {
      const float* bias = how.bias == nullptr ? nullptr : how.bias->row<float>(0);
      layer_norm_row(x + first, weight, bias, size, how.eps, to + first);
    } else {
      rms_norm_row(x + first, weight, size, how.eps, how.offset, to + first);
    }
  }
}

// residual and total are null where there is no sum; scales where the result stays as it is.
void norm(const How& how, const Tensor& x, const Tensor* residual, const Tensor& y, const Tensor* scales,
          const Tensor* total, const Attribute* quantization) {
  const int64_t num_columns = x.sizes[1];
  parallel_rows(x.sizes[0], num_columns / 4.0, [&](int64_t first, int64_t end) {
    float* room = scales == nullptr ? nullptr : scratch_of<float>(0, num_columns);
    for (int64_t row = first; row < end; ++row) {
      const float* from = x.row<float>(row);
      if (residual != nullptr) {
        add_rows(from, residual->row<float>(row), total->row<float>(row), num_columns);
        from = total->row<float>(row);
      }
      norm_row(how, from, num_columns, scales == nullptr ? y.row<float>(row) : room);
      if (scales != nullptr)
        quantize_row(room, num_columns, static_cast<float>(quantization[0].number), quantization[1].integer,
                     y.row<int8_t>(row), scales->row<float>(row));
    }
  });
}

How rms(const Tensor* weight, const Attribute* attributes) {
  return {static_cast<float>(attributes[0].number), static_cast<float>(attributes[1].number), false, weight, nullptr};
}

How layer(const Tensor* weight, const Tensor* bias, const Attribute* attributes) {
  return {static_cast<float>(attributes[0].number), 0, true, weight, bias};
}

}  // namespace

SLIPSTREAM_KERNEL(rms_norm) { norm(rms(in[1], attributes), *in[0], nullptr, *out[0], nullptr, nullptr, nullptr); }

SLIPSTREAM_KERNEL(add_rms_norm) { norm(rms(in[2], attributes), *in[0], in[1], *out[0], nullptr, out[1], nullptr); }

SLIPSTREAM_KERNEL(layer_norm) { norm(layer(in[1], in[2], attributes), *in[0], nullptr, *out[0], nullptr, nullptr, nullptr); }

SLIPSTREAM_KERNEL(add_layer_norm) {
  norm(layer(in[2], in[3], attributes), *in[0], in[1], *out[0], nullptr, out[1], nullptr);
}

SLIPSTREAM_KERNEL(rms_norm_quantize) {
  norm(rms(in[1], attributes), *in[0], nullptr, *out[0], out[1], nullptr, attributes + 2);
}

SLIPSTREAM_KERNEL(add_rms_norm_quantize) {
  norm(rms(in[2], attributes), *in[0], in[1], *out[0], out[1], out[2], attributes + 2);
}

SLIPSTREAM_KERNEL(layer_norm_quantize) {
  norm(layer(in[1], in[2], attributes), *in[0], nullptr, *out[0], out[1], nullptr, attributes + 1);
}

SLIPSTREAM_KERNEL(add_layer_norm_quantize) {
  norm(layer(in[2], in[3], attributes), *in[0], in[1], *out[0], out[1], out[2], attributes + 1);
}

// linear: y = x Wᵀ + b in float32.
#include "linear.h"

using namespace slipstream;

SLIPSTREAM_KERNEL(linear) {
  const Tensor &x = *in[0], &weight = *in[1], *bias = in[2], &y = *out[0];
  const int64_t num_rows = x.sizes[0], num_out = weight.sizes[0], num_in = x.sizes[1];
  if (num_rows == 0) return;
  const float* const* x_rows = pointers_to_rows<float>(0, x);
  parallel_weight(num_out, num_in * 4, num_rows, TILE_N, [&](int64_t first, int64_t end) {
    const float** w_rows = scratch_of<const float*>(1, end - first);
    for (int64_t n = first; n < end; ++n) w_rows[n - first] = weight.row<float>(n);
    float_products(x_rows, num_rows, w_rows, end - first, num_in, y.row<float>(0) + first, y.row_stride, true);
    add_bias(bias, y, first, end);
  });
}

// greedy: the most likely token of each row of logits.
#include "pool.h"
#include "tensor.h"
#include "vector.h"

using namespace slipstream;

namespace {

constexpr int64_t NOTHING_TO_SAMPLE = -1;  // as kernels/sampling.py has it

// The first place of the largest number, or NOTHING_TO_SAMPLE where that is not finite or one is NaN.
int64_t place_of_largest(const float* x, int64_t count) {
  Floats most = splat(-INFINITY);
  Ints places = {}, is_nan = {};
  for (int64_t i = 0; i < count; i += LANES) {
    const Floats v = i + LANES <= count ? load(x + i) : load_some(x + i, count - i);
    const Ints is_there = lane_numbers() + static_cast<int32_t>(i) < static_cast<int32_t>(count);
    const Ints is_more = (v > most) & is_there;
    most = is_more ? v : most;
    places = is_more ? lane_numbers() + static_cast<int32_t>(i) : places;
    is_nan |= v != v;
  }
  const float top = largest(most);
  int64_t found = count;
  for (int lane = 0; lane < LANES; ++lane) {
    if (is_nan[lane]) return NOTHING_TO_SAMPLE;
    if (most[lane] == top && places[lane] < found) found = places[lane];
  }
  return std::isfinite(top) ? found : NOTHING_TO_SAMPLE;
}

}  // namespace

SLIPSTREAM_KERNEL(greedy) {
  const Tensor &logits = *in[0], &token_ids = *out[0];
  parallel_rows(logits.sizes[0], logits.sizes[1] / 4.0, [&](int64_t first, int64_t end) {
    for (int64_t row = first; row < end; ++row)
      *token_ids.row<int64_t>(row) = place_of_largest(logits.row<float>(row), logits.sizes[1]);
  });
}

// rope_cos_sin, rope, kv_write, rope_kv_write: angles, the rotation of queries and keys, and the write into pages.
#include <cmath>

#include "pool.h"
#include "rows.h"
#include "tensor.h"

using namespace slipstream;

namespace {

struct Angles {
  const Tensor &cos, &sin;
};

// The first 2F numbers of a head, the first F paired with the next F; the rest stays.
void rotate_head(const float* x, const float* cos, const float* sin, int64_t num_pairs, int64_t head_dim, float* to) {
  for (int64_t pair = 0; pair < num_pairs; ++pair) {
    const float first = x[pair], second = x[num_pairs + pair];
    to[pair] = first * cos[pair] - second * sin[pair];
    to[num_pairs + pair] = second * cos[pair] + first * sin[pair];
  }
  for (int64_t rest = 2 * num_pairs; rest < head_dim; ++rest) to[rest] = x[rest];
}

void rotate_row(const Tensor& x, const Angles& angles, int64_t token, int64_t head_dim, float* to) {
  const float *cos = angles.cos.row<float>(token), *sin = angles.sin.row<float>(token);
  for (int64_t column = 0; column < x.sizes[1]; column += head_dim)
    rotate_head(x.row<float>(token) + column, cos, sin, angles.cos.sizes[1], head_dim, to + column);
}

// A token's row of all heads into one plane of the cache [P, N, B, K, D].
void write_row(const float* x, const Tensor& kv, int64_t plane, int64_t slot, const float* scales) {
  const int64_t num_heads = kv.sizes[3], head_dim = kv.sizes[4], size = num_heads * head_dim;
  const int64_t place = ((plane * kv.sizes[1]) * kv.sizes[2] + slot) * size;
  if (kv.dtype == BFLOAT16) {
    for (int64_t i = 0; i < size; ++i) reinterpret_cast<uint16_t*>(kv.data)[place + i] = float_to_bfloat16(x[i]);
    return;
  }
  if (kv.dtype == FLOAT16) {
    to_float16(x, size, reinterpret_cast<uint16_t*>(kv.data) + place);
    return;
  }
  if (scales == nullptr) {
    std::memcpy(reinterpret_cast<float*>(kv.data) + place, x, size * sizeof(float));
    return;
  }
  for (int64_t head = 0; head < num_heads; ++head) {
    const int64_t first = head * head_dim;
    if (kv.dtype == INT8) {
      divide_to_int8(x + first, head_dim, scales[head], -127.0f, reinterpret_cast<int8_t*>(kv.data) + place + first);
      continue;
    }
    uint8_t* to = reinterpret_cast<uint8_t*>(kv.data) + place + first;
    for (int64_t i = 0; i < head_dim; ++i) to[i] = float_to_float8(x[first + i] / scales[head]);
  }
}

// v is null where the cache has one plane; angles where keys are written as they come.
void write(const Tensor& k, const Tensor* v, const Angles* angles, const Tensor& kv, const Tensor& slots,
           const Tensor* scales, int64_t token) {
  const int64_t slot = slots.row<int64_t>(0)[token], num_heads = kv.sizes[3], head_dim = kv.sizes[4];
  const float* k_row = k.row<float>(token);
  if (angles != nullptr) {
    float* rotated = scratch_of<float>(0, num_heads * head_dim);
    rotate_row(k, *angles, token, head_dim, rotated);
    k_row = rotated;
  }
  write_row(k_row, kv, 0, slot, scales == nullptr ? nullptr : scales->row<float>(0));
  if (kv.sizes[0] == 2) write_row(v->row<float>(token), kv, 1, slot, scales == nullptr ? nullptr : scales->row<float>(1));
}

}  // namespace

SLIPSTREAM_KERNEL(rope_cos_sin) {
  const Tensor &positions = *in[0], &frequencies = *in[1], &cos = *out[0], &sin = *out[1];
  const float factor = static_cast<float>(attributes[0].number);
  const int64_t count = frequencies.sizes[0];
  parallel_rows(positions.sizes[0], count * 20.0, [&](int64_t first, int64_t end) {
    for (int64_t token = first; token < end; ++token)
      for (int64_t i = 0; i < count; ++i) {
        const float angle = static_cast<float>(positions.row<int64_t>(0)[token]) * frequencies.row<float>(0)[i];
        cos.row<float>(token)[i] = std::cos(angle) * factor;
        sin.row<float>(token)[i] = std::sin(angle) * factor;
      }
  });
}

SLIPSTREAM_KERNEL(rope) {
  const Tensor &x = *in[0], &y = *out[0];
  const Angles angles{*in[1], *in[2]};
  parallel_rows(x.sizes[0], x.sizes[1] / 4.0, [&](int64_t first, int64_t end) {
    for (int64_t token = first; token < end; ++token)
      rotate_row(x, angles, token, attributes[0].integer, y.row<float>(token));
  });
}

SLIPSTREAM_KERNEL(kv_write) {
  const Tensor &k = *in[0], &kv = *in[2], &slots = *in[3];
  parallel_rows(k.sizes[0], k.sizes[1] / 2.0, [&](int64_t first, int64_t end) {
    for (int64_t token = first; token < end; ++token) write(k, in[1], nullptr, kv, slots, in[4], token);
  });
}

SLIPSTREAM_KERNEL(rope_kv_write) {
  const Tensor &q = *in[0], &k = *in[1], &v = *in[2], &kv = *in[5], &slots = *in[6], &rotated = *out[0];
  const Angles angles{*in[3], *in[4]};
  parallel_rows(q.sizes[0], q.sizes[1], [&](int64_t first, int64_t end) {
    for (int64_t token = first; token < end; ++token) {
      rotate_row(q, angles, token, kv.sizes[4], rotated.row<float>(token));
      write(k, &v, &angles, kv, slots, in[7], token);
    }
  });
}

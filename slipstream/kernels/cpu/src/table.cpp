// embedding and select_rows: rows of a table. embedding_panels: of one in panels (bytes.h).
#include "bytes.h"
#include "linear.h"
#include "pool.h"
#include "tensor.h"

using namespace slipstream;

namespace {

void copy_rows(const Tensor& table, const Tensor& indices, const Tensor& to) {
  const int64_t num_bytes = to.sizes[1] * DTYPE_BYTES[to.dtype];
  parallel_rows(to.sizes[0], num_bytes / 16.0, [&](int64_t first, int64_t end) {
    for (int64_t row = first; row < end; ++row) {
      const int64_t from = indices.row<int64_t>(0)[row] * table.row_stride * DTYPE_BYTES[table.dtype];
      std::memcpy(to.data + row * to.row_stride * DTYPE_BYTES[to.dtype], table.data + from, num_bytes);
    }
  });
}

float number_of(const Tensor& each, int64_t panel, int64_t place) {
  return each.dtype == FLOAT16 ? float16_to_float(each.row<uint16_t>(panel)[place]) : each.row<float>(panel)[place];
}

// Row `lane` of a panel: a group of columns after the other.
void widen_row(const Tensor& panels, const Tensor& scale, const Tensor* shift, int64_t row, bool is_w4, int64_t group_size,
               int64_t num_columns, float* to) {
  const int64_t panel = row / PANEL, lane = row % PANEL, columns = is_w4 ? 8 : 4;
  const uint8_t* bytes = panels.row<uint8_t>(panel) + 4 * lane;
  const int64_t size = group_size > 0 ? group_size : num_columns;
  const int zero = is_w4 ? (shift != nullptr ? 0 : 8) : 128;
  for (int64_t first = 0, place = lane; first < num_columns; first += size, place += PANEL) {
    const float factor = number_of(scale, panel, place), off = shift == nullptr ? 0 : number_of(*shift, panel, place);
    const int64_t end = first + size < num_columns ? first + size : num_columns;
    for (int64_t column = first; column < end; ++column) {
      const uint8_t byte = bytes[column / columns * STEP_BYTES + column % 4];
      const int number = !is_w4 ? byte : column % 8 < 4 ? byte & 15 : byte >> 4;
      to[column] = static_cast<float>(number - zero) * factor - off;
    }
  }
}

}  // namespace

SLIPSTREAM_KERNEL(embedding) { copy_rows(*in[0], *in[1], *out[0]); }
SLIPSTREAM_KERNEL(select_rows) { copy_rows(*in[0], *in[1], *out[0]); }

SLIPSTREAM_KERNEL(embedding_panels) {
  const Tensor& y = *out[0];
  parallel_rows(y.sizes[0], static_cast<double>(y.sizes[1]), [&](int64_t first, int64_t end) {
    for (int64_t token = first; token < end; ++token)
      widen_row(*in[0], *in[1], in[2], in[3]->row<int64_t>(0)[token], attributes[0].integer == 4, attributes[1].integer,
                y.sizes[1], y.row<float>(token));
  });
}

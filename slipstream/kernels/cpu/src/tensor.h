// What a kernel is given. The layout of these structs is mirrored in kernels/cpu/library.py.
#pragma once
#include <cstdint>
#include <cstring>

namespace slipstream {

enum DType : int32_t { FLOAT32, BFLOAT16, FLOAT16, FLOAT8, INT64, INT32, INT8, UINT8 };
constexpr int64_t DTYPE_BYTES[] = {4, 2, 2, 1, 8, 4, 1, 1};

constexpr int MAX_DIMS = 5;

struct Tensor {
  char* data;
  int64_t sizes[MAX_DIMS];
  int64_t row_stride;  // elements from one row (first dimension) to the next; what is inside a row lies together
  int32_t dtype;
  int32_t num_dims;

  template <class T>
  T* row(int64_t index) const {
    return reinterpret_cast<T*>(data) + index * row_stride;
  }
};

union Attribute {
  int64_t integer;
  double number;
};

// Inputs are null where an optional tensor is absent. Attributes are in the order of the op's schema; a dtype is none.
typedef void (*Kernel)(const Tensor* const* inputs, const Tensor* const* outputs, const Attribute* attributes);

}  // namespace slipstream

#define SLIPSTREAM_KERNEL(name)                                                   \
  extern "C" void slipstream_##name([[maybe_unused]] const slipstream::Tensor* const* in,  \
                                    [[maybe_unused]] const slipstream::Tensor* const* out, \
                                    [[maybe_unused]] const slipstream::Attribute* attributes)

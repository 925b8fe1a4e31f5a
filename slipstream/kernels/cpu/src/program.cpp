// A run of an engine's graph in one call: a flat list of kernels over values whose places are known but for a step's sizes.
#include <cstdlib>

#include "tensor.h"

namespace slipstream {
namespace {

constexpr int MAX_INPUTS = 24, MAX_OUTPUTS = 4, MAX_ATTRIBUTES = 8, NUM_LETTERS = 6;

enum Place : int32_t { FIXED, ARGUMENT, BUFFER };

// A size below 0 is a letter of the step: -1 the first, -2 the second, ...
struct Value {
  int64_t place_data;  // FIXED: address; ARGUMENT, BUFFER: index
  int64_t offset;      // bytes
  int64_t sizes[MAX_DIMS];
  int64_t row_stride;  // elements; 0 of an argument: as it comes
  int32_t place, dtype, num_dims, reserved;
};

struct Instruction {
  Kernel kernel;
  Attribute attributes[MAX_ATTRIBUTES];
  int32_t inputs[MAX_INPUTS];  // index of a value, -1 where absent
  int32_t outputs[MAX_OUTPUTS];
};

struct Buffer {
  int64_t bytes;   // a row's
  int32_t letter;  // that counts the rows, as sizes have it; 0: one row
  int32_t reserved;
};

struct Program {
  const Value* values;
  const Instruction* instructions;
  const Buffer* buffers;
  int32_t num_values, num_instructions, num_buffers;
};

struct Argument {
  char* data;
  int64_t row_stride;
};

int64_t size_of(int64_t size, const int64_t* letters) { return size < 0 ? letters[-size - 1] : size; }

int64_t bytes_of(const Buffer& buffer, const int64_t* letters) {
  const int64_t rows = buffer.letter == 0 ? 1 : size_of(buffer.letter, letters);
  return (buffer.bytes * rows + 63) / 64 * 64;
}

struct Memory {
  char* bytes = nullptr;
  int64_t size = 0;
  ~Memory() { std::free(bytes); }
  void grow(int64_t num_bytes) {
    if (num_bytes <= size) return;
    std::free(bytes);
    size = (num_bytes + (2 << 20) - 1) >> 21 << 21;
    bytes = static_cast<char*>(std::aligned_alloc(2 << 20, size));
    if (bytes == nullptr) size = 0;
  }
};

}  // namespace
}  // namespace slipstream

// letters: the step's T, S, S1, B, R, N. Gives 0, or 1 where the values in between find no memory.
extern "C" int32_t slipstream_run(const slipstream::Program* program, const slipstream::Argument* arguments,
                                  const int64_t* letters) {
  using namespace slipstream;
  thread_local Memory tensors_memory, buffers_memory;
  int64_t total = 0;
  for (int32_t i = 0; i < program->num_buffers; ++i) total += bytes_of(program->buffers[i], letters);
  buffers_memory.grow(total);
  tensors_memory.grow(program->num_values * static_cast<int64_t>(sizeof(Tensor) + sizeof(char*)));
  if ((total > 0 && buffers_memory.bytes == nullptr) || tensors_memory.bytes == nullptr) return 1;
  Tensor* tensors = reinterpret_cast<Tensor*>(tensors_memory.bytes);
  char** starts = reinterpret_cast<char**>(tensors + program->num_values);
  char* next = buffers_memory.bytes;
  for (int32_t i = 0; i < program->num_buffers; ++i) {
    starts[i] = next;
    next += bytes_of(program->buffers[i], letters);
  }
  for (int32_t i = 0; i < program->num_values; ++i) {
    const Value& value = program->values[i];
    Tensor& tensor = tensors[i];
    int64_t inner = 1;
    for (int dim = 0; dim < value.num_dims; ++dim) {
      tensor.sizes[dim] = size_of(value.sizes[dim], letters);
      if (dim > 0) inner *= tensor.sizes[dim];
    }
    tensor.row_stride = value.row_stride == 0 ? inner : value.row_stride;
    if (value.place == FIXED) tensor.data = reinterpret_cast<char*>(value.place_data);
    else if (value.place == BUFFER) tensor.data = starts[value.place_data];
    else {
      tensor.data = arguments[value.place_data].data;
      if (value.row_stride == 0) tensor.row_stride = arguments[value.place_data].row_stride;
    }
    tensor.data += value.offset;
    tensor.dtype = value.dtype;
    tensor.num_dims = value.num_dims;
  }
  for (int32_t i = 0; i < program->num_instructions; ++i) {
    const Instruction& instruction = program->instructions[i];
    const Tensor *inputs[MAX_INPUTS], *outputs[MAX_OUTPUTS];
    for (int k = 0; k < MAX_INPUTS; ++k)
      inputs[k] = instruction.inputs[k] < 0 ? nullptr : tensors + instruction.inputs[k];
    for (int k = 0; k < MAX_OUTPUTS; ++k)
      outputs[k] = instruction.outputs[k] < 0 ? nullptr : tensors + instruction.outputs[k];
    instruction.kernel(inputs, outputs, instruction.attributes);
  }
  return 0;
}

// Numbers as a KV cache keeps them, and as floats.
#pragma once
#include "tensor.h"
#include "vector.h"

namespace slipstream {

struct BrainFloat {
  uint16_t bits;  // the higher half of a float
};
struct Half {
  uint16_t bits;
};
struct Float8 {
  int8_t bits;  // E4M3
};

inline Floats widened(const float* from) { return load(from); }
inline Floats widened(const int8_t* from) { return __builtin_convertvector(widen(from), Floats); }
inline Floats widened(const BrainFloat* from) { return reinterpret_cast<Floats>(widen(&from->bits) << 16); }

inline Floats widened(const Half* from) { return widen_halves(&from->bits); }

// Its bits as those of a float are the number times 2^-120.
inline Floats widened(const Float8* from) {
  const Ints bits = widen(&from->bits), moved = (bits & 127) << 20 | (bits & 128) << 24;
  return (bits & 127) == 127 ? splat(NAN) : reinterpret_cast<Floats>(moved) * 0x1p120f;
}

// The first `count` of them, zeros in the other lanes.
template <class T>
Floats widened_some(const T* from, int64_t count) {
  T room[LANES] = {};
  std::memcpy(room, from, count * sizeof(T));
  return widened(room);
}

// function(T{}) for the type of a cache's numbers.
template <class Function>
void with_stored(int32_t dtype, Function&& function) {
  switch (dtype) {
    case BFLOAT16: return function(BrainFloat{});
    case FLOAT16: return function(Half{});
    case FLOAT8: return function(Float8{});
    case INT8: return function(int8_t{});
    default: return function(float{});
  }
}

}  // namespace slipstream

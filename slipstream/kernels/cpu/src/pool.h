// The one pool of threads. A job is cut into parts that threads take one by one, the caller among them: whoever is held up
// by a busy neighbour takes fewer, and a thread that sleeps costs nothing but its share.
#pragma once
#include <cstdint>

namespace slipstream {

int num_threads();

void run_parts(int64_t num_parts, void (*run)(void* context, int64_t part), void* context);

template <class Function>
void parallel(int64_t num_parts, Function&& function) {
  if (num_parts == 1 || num_threads() == 1) {
    for (int64_t part = 0; part < num_parts; ++part) function(part);
    return;
  }
  run_parts(
      num_parts, [](void* context, int64_t part) { (*static_cast<decltype(&function)>(context))(part); }, &function);
}

// function(first, end) over all rows, in parts worth a thread's while. `work`: about nanoseconds a row.
template <class Function>
void parallel_rows(int64_t num_rows, double work, Function&& function) {
  constexpr double WORTH_A_PART = 3000;
  int64_t size = static_cast<int64_t>(WORTH_A_PART / work) + 1;
  int64_t even = (num_rows + 4 * num_threads() - 1) / (4 * num_threads());
  if (even > size) size = even;
  parallel((num_rows + size - 1) / size, [&](int64_t part) {
    int64_t end = (part + 1) * size;
    function(part * size, end < num_rows ? end : num_rows);
  });
}

// Memory of the calling thread for the time of a kernel, at least this large; what it held is lost. `slot`: several at once.
char* scratch(int slot, int64_t num_bytes);

template <class T>
T* scratch_of(int slot, int64_t count) {
  return reinterpret_cast<T*>(scratch(slot, count * static_cast<int64_t>(sizeof(T))));
}

}  // namespace slipstream

#include "pool.h"

#include <sched.h>

#include <atomic>
#include <condition_variable>
#include <cstdlib>
#include <mutex>
#include <thread>
#include <vector>

#if defined(__x86_64__)
#include <immintrin.h>
#define SLIPSTREAM_PAUSE() _mm_pause()
#else
#define SLIPSTREAM_PAUSE() ((void)0)
#endif

namespace slipstream {
namespace {

// A waiting thread looks this often before it sleeps, or gives its turn away: some tens of microseconds, the time
// between two ops of a step. Longer would burn what a busy neighbour could use.
constexpr int LOOKS = 4000;

// The ticket says which job is on (high half) and which of its parts is next (low half). A part is taken by exchanging
// the whole ticket, so a thread that comes late cannot take a part of a job that it has not read.
constexpr uint64_t CLOSED = 0xffffffff;

class Pool {
 public:
  void resize(int count) {
    std::lock_guard<std::mutex> one_caller(callers_);
    {
      std::lock_guard<std::mutex> lock(mutex_);
      is_stopping_ = true;
    }
    wake_.notify_all();
    for (std::thread& thread : threads_) thread.join();
    threads_.clear();
    is_stopping_ = false;
    size_ = count < 1 ? 1 : count;
    for (int index = 1; index < size_; ++index) threads_.emplace_back([this] { serve(); });
  }

  int size() const { return size_; }

  void run(int64_t num_parts, void (*function)(void*, int64_t), void* context) {
    std::unique_lock<std::mutex> one_caller(callers_, std::try_to_lock);
    if (!one_caller.owns_lock()) {  // another engine of this process is in its step: each by itself
      for (int64_t part = 0; part < num_parts; ++part) function(context, part);
      return;
    }
    num_parts_.store(num_parts, std::memory_order_relaxed);
    function_.store(function, std::memory_order_relaxed);
    context_.store(context, std::memory_order_relaxed);
    done_.store(0, std::memory_order_relaxed);
    const uint64_t job = ++job_ << 32;
    ticket_.store(job);
    if (num_sleeping_.load() > 0) {
      { std::lock_guard<std::mutex> lock(mutex_); }
      wake_.notify_all();
    }
    take_parts(job);
    for (int look = 0; done_.load(std::memory_order_acquire) != num_parts; ++look) {
      if (look < LOOKS) SLIPSTREAM_PAUSE();
      else sched_yield();
    }
    ticket_.store(job | CLOSED);
  }

 private:
  void take_parts(uint64_t job) {
    uint64_t ticket = ticket_.load(std::memory_order_acquire);
    while (true) {
      const int64_t part = static_cast<int64_t>(ticket & CLOSED);
      if ((ticket & ~CLOSED) != job || part >= num_parts_.load(std::memory_order_relaxed)) return;
      const auto function = function_.load(std::memory_order_relaxed);
      void* const context = context_.load(std::memory_order_relaxed);
      if (!ticket_.compare_exchange_weak(ticket, ticket + 1, std::memory_order_acq_rel)) continue;
      function(context, part);
      done_.fetch_add(1, std::memory_order_release);
      ticket = ticket_.load(std::memory_order_acquire);
    }
  }

  void serve() {
    uint64_t seen = ticket_.load() & ~CLOSED;
    while (true) {
      uint64_t job = seen;
      for (int look = 0; look < LOOKS && job == seen; ++look) {
        SLIPSTREAM_PAUSE();
        job = ticket_.load(std::memory_order_acquire) & ~CLOSED;
      }
      if (job == seen) {
        std::unique_lock<std::mutex> lock(mutex_);
        num_sleeping_.fetch_add(1);
        wake_.wait(lock, [&] { return is_stopping_ || (ticket_.load() & ~CLOSED) != seen; });
        num_sleeping_.fetch_sub(1);
        if (is_stopping_) return;
        job = ticket_.load(std::memory_order_acquire) & ~CLOSED;
      }
      seen = job;
      take_parts(job);
    }
  }

  std::atomic<uint64_t> ticket_{CLOSED};
  std::atomic<int64_t> num_parts_{0};
  std::atomic<void (*)(void*, int64_t)> function_{nullptr};
  std::atomic<void*> context_{nullptr};
  alignas(64) std::atomic<int64_t> done_{0};
  alignas(64) std::atomic<int> num_sleeping_{0};
  uint64_t job_ = 0;
  int size_ = 1;
  bool is_stopping_ = false;
  std::mutex mutex_, callers_;
  std::condition_variable wake_;
  std::vector<std::thread> threads_;
};

// Never destroyed: its threads may outlive whatever the process ends with.
Pool& pool() {
  static Pool* const the_pool = new Pool;
  return *the_pool;
}

struct Scratch {
  char* memory = nullptr;
  int64_t size = 0;
  ~Scratch() { std::free(memory); }
};

}  // namespace

int num_threads() { return pool().size(); }

void run_parts(int64_t num_parts, void (*run)(void*, int64_t), void* context) { pool().run(num_parts, run, context); }

char* scratch(int slot, int64_t num_bytes) {
  thread_local Scratch slots[4];
  Scratch& found = slots[slot];
  if (found.size < num_bytes) {
    std::free(found.memory);
    found.size = (num_bytes + 4095) / 4096 * 4096;
    found.memory = static_cast<char*>(std::aligned_alloc(64, found.size));
    if (found.memory == nullptr) std::abort();
  }
  return found.memory;
}

}  // namespace slipstream

extern "C" void slipstream_set_threads(int count) { slipstream::pool().resize(count); }

// Who attends to what: the tasks that a step's attention is shared out into.
//
// The query heads that share a KV head are rows of one product, for each of their positions. A task is some rows and a range of
// tiles of keys. Many rows of a sequence are shared out by position and KV head, each task with all its keys (online softmax,
// arXiv:1805.02867). Few rows, as in decoding, take the time of reading the cache: their tasks have all heads, since a
// token's lie together, and where sequences are fewer than threads want, each task has a part of the tiles.
#pragma once
#include <algorithm>
#include <vector>

#include "attention_tile.h"
#include "pool.h"
#include "tensor.h"

namespace slipstream {

constexpr int64_t MOST_ROWS = 96;      // of a KV head in a task, unless one position has more
constexpr int64_t FEW_ROWS = 48;       // of a sequence, in all heads
constexpr int64_t TASKS_A_THREAD = 4;  // so that threads end together

struct Options {
  const Tensor *slopes, *sinks, *scales;
  float scale, soft_cap;
  int64_t window, value_dim, sink_tokens;
  const Tensor *positions, *tree_starts, *tree_masks;  // of drafts that branch
};

// Places of a sequence from `begin` to `end`, in tiles; of streaming's two ranges the first has the sinks.
struct Places {
  int64_t begin, end;
  int64_t num_tiles() const { return end <= begin ? 0 : (end + TILE - 1) / TILE - begin / TILE; }
};

struct Step {
  const Tensor &q, *sink_q, &kv, &starts, &lens, &tables, &out;
  Options options;
  int64_t num_kv_heads, head_dim, group;  // query heads of one KV head

  int64_t query_start(int64_t s) const { return starts.row<int64_t>(0)[s]; }
  int64_t num_queries(int64_t s) const { return query_start(s + 1) - query_start(s); }
  int64_t past(int64_t s) const { return lens.row<int64_t>(0)[s] - num_queries(s); }
  // The root's place in the cache; keys before it are where they are in the text.
  int64_t root(int64_t s) const { return options.tree_starts == nullptr ? INT64_MAX : options.tree_starts->row<int64_t>(0)[s]; }
  // Of a query in its text.
  int64_t position(int64_t s, int64_t query) const {
    return options.positions == nullptr ? past(s) + query : options.positions->row<int64_t>(0)[query_start(s) + query];
  }
  float slope(int64_t head) const { return options.slopes == nullptr ? 0 : options.slopes->row<float>(0)[head]; }
};

struct Task {
  int64_t sequence, first, count;     // query positions of the sequence's chunk
  int64_t first_head, num_heads;      // KV heads
  int64_t first_tile, num_tiles;
  int64_t partials;                   // where those of the sequence's tiles begin; -1 where the task has them all

  int64_t num_rows(const Step& step) const { return count * step.group; }
};

inline Places sinks_of(const Step& step, const Task& task) {
  return {0, std::min(step.options.sink_tokens, step.past(task.sequence) + task.first + task.count)};
}

inline Places newest_of(const Step& step, const Task& task) {
  const Options& options = step.options;
  const int64_t place = step.past(task.sequence) + task.first;
  const int64_t position = std::min(place, step.root(task.sequence));  // of all rows the first
  const int64_t begin =
      options.window > 0
          ? std::max<int64_t>(options.sink_tokens, position + 1 - (options.window - options.sink_tokens))
          : 0;
  return {begin, place + task.count};
}

inline int64_t num_tiles(const Step& step, const Task& task) {
  return sinks_of(step, task).num_tiles() + newest_of(step, task).num_tiles();
}

inline int64_t ceil(int64_t number, int64_t by) { return (number + by - 1) / by; }

// Tasks that make up a step.
struct Plan {
  std::vector<Task> tasks, shared;  // shared: sequences whose tiles several tasks have
  int64_t partials;                 // numbers that these leave

  void make(const Step& step) {
    tasks.clear();
    shared.clear();
    partials = 0;
    const int64_t num_wanted = TASKS_A_THREAD * num_threads();
    int64_t many_positions = 0, tiles_of_few = 0;
    for_sequences(step, [&](const Task& all) {
      if (has_few_rows(step, all)) tiles_of_few += all.num_tiles;
      else many_positions += all.count;
    });
    const int64_t even = ceil(many_positions * step.num_kv_heads, num_wanted);
    const int64_t most = std::max<int64_t>(1, std::min(even, MOST_ROWS / step.group));
    for_sequences(step, [&](const Task& all) {
      if (has_few_rows(step, all)) share_tiles(step, all, ceil(tiles_of_few, num_wanted));
      else share_rows(step, all, most);
    });
    std::sort(tasks.begin(), tasks.end(), [](const Task& a, const Task& b) {  // the longest first
      return a.num_tiles * a.count * a.num_heads > b.num_tiles * b.count * b.num_heads;
    });
  }

 private:
  template <class Function>
  static void for_sequences(const Step& step, Function&& function) {
    for (int64_t sequence = 0; sequence < step.lens.sizes[0]; ++sequence) {
      Task all{sequence, 0, step.num_queries(sequence), 0, step.num_kv_heads, 0, 0, -1};
      if (all.count == 0) continue;
      all.num_tiles = num_tiles(step, all);
      function(all);
    }
  }

  static bool has_few_rows(const Step& step, const Task& all) {
    return all.count == 1 || all.count * step.group * step.num_kv_heads <= FEW_ROWS;
  }

  void share_tiles(const Step& step, const Task& all, int64_t most) {
    Task part = all;
    if (all.num_tiles > most) {
      part.partials = partials;
      partials += all.num_tiles * Found::size(all.num_heads * all.num_rows(step), step.options.value_dim);
      shared.push_back(part);
    }
    for (; part.first_tile < all.num_tiles; part.first_tile += most) {
      part.num_tiles = std::min(most, all.num_tiles - part.first_tile);
      tasks.push_back(part);
    }
  }

  void share_rows(const Step& step, const Task& all, int64_t most) {
    for (int64_t first = 0; first < all.count; first += most)
      for (int64_t head = 0; head < step.num_kv_heads; ++head) {
        Task part{all.sequence, first, std::min(most, all.count - first), head, 1, 0, 0, -1};
        part.num_tiles = num_tiles(step, part);
        tasks.push_back(part);
      }
  }
};

}  // namespace slipstream

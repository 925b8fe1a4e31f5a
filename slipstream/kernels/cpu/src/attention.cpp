// attention, streaming_attention and tree_attention: softmax(q kᵀ · scale) v over a paged cache, read where it lies.
#include <type_traits>

#include "attention_tasks.h"

using namespace slipstream;

namespace {

// Where the tokens of a tile lie, in the first plane; what is not the tile's lies where its first one does.
void find_tokens(const Step& step, int64_t sequence, const Tile& tile, const char** tokens) {
  const Tensor& kv = step.kv;
  const int64_t block_size = kv.sizes[2], token_bytes = kv.sizes[3] * kv.sizes[4] * DTYPE_BYTES[kv.dtype];
  const int64_t* table = step.tables.row<int64_t>(sequence);
  for (int64_t i = tile.lead; i < tile.count; ++i) {
    const int64_t place = tile.first + i;
    tokens[i] = kv.data + (table[place / block_size] * block_size + place % block_size) * token_bytes;
  }
  std::fill(tokens, tokens + tile.lead, tokens[tile.lead]);
  std::fill(tokens + tile.count, tokens + TILE, tokens[tile.lead]);
}

// Memory of a task, for one tile after the other.
struct Room {
  float *keys, *values;  // [head_dim, TILE], [TILE, value_dim] where they are not read as they lie
  const char* tokens[2][TILE];  // of this tile and of the next one, taking turns
  const float* value_rows[TILE];
  int32_t places[TILE_M * TILE];
};

// One KV head of a tile: its keys packed, its values found. Their scales are left to what they are multiplied with.
void read_tile(const Step& step, int64_t head, const char* const* tokens, Room& room, Tile& tile) {
  const Tensor& kv = step.kv;
  const int64_t head_dim = step.head_dim, width = step.options.value_dim;
  const int64_t plane = (kv.sizes[0] - 1) * kv.sizes[1] * kv.sizes[2] * kv.sizes[3] * kv.sizes[4];
  with_stored(kv.dtype, [&](auto kind) {
    using T = decltype(kind);
    const T* keys[TILE];
    for (int64_t i = 0; i < TILE; ++i) keys[i] = reinterpret_cast<const T*>(tokens[i]) + head * head_dim;
    pack_keys(keys, tile.count, head_dim, tile.ahead, room.keys);
    for (int64_t i = tile.lead; i < tile.count; ++i) {
      const T* from = keys[i] + plane;
      if constexpr (std::is_same_v<T, float>) {
        room.value_rows[i] = from;
      } else {
        float* to = room.values + i * width;
        int64_t column = 0;
        for (; column + LANES <= width; column += LANES) store(to + column, widened(from + column));
        if (column < width) store_some(to + column, widened_some(from + column, width - column), width - column);
        room.value_rows[i] = to;
      }
    }
  });
  tile.keys = room.keys;
  tile.values = room.value_rows;
}

// How far after a query the keys of a tile stand in the text, of which the last are nodes of its tree.
void place_nodes(const Step& step, const Task& task, int64_t query, const Tile& tile, int32_t* places) {
  const int64_t sequence = task.sequence, past = step.past(sequence), root = step.root(sequence);
  const int64_t position = step.position(sequence, query);
  const int64_t* mask = step.options.tree_masks->row<int64_t>(step.query_start(sequence) + query);
  for (int64_t i = 0; i < TILE; ++i) {
    const int64_t place = tile.first + i, node = place - root;
    const bool is_hidden = i >= tile.count || (node >= 0 && (mask[node / 64] >> node % 64 & 1) == 0);
    const int64_t stands = is_hidden || node < 0 ? place : step.position(sequence, place - past);
    places[i] = is_hidden ? INT_MAX : static_cast<int32_t>(stands - position);
  }
}

Ahead ahead_of(const Step& step, int64_t head, const char* const* tokens) {
  const Tensor& kv = step.kv;
  const int64_t row_bytes = kv.sizes[4] * DTYPE_BYTES[kv.dtype];
  const int64_t plane_bytes = kv.sizes[1] * kv.sizes[2] * kv.sizes[3] * row_bytes;
  return {tokens, head * row_bytes, head * row_bytes + (kv.sizes[0] - 1) * plane_bytes, row_bytes};
}

// A task's first tile, which no other comes before.
void fetch(const Step& step, const Task& task, const Tile& tile, const char* const* tokens) {
  for (int64_t i = tile.lead; i < tile.count; ++i)
    for (int64_t head = task.first_head; head < task.first_head + task.num_heads; ++head) {
      const Ahead ahead = ahead_of(step, head, tokens);
      ahead.fetch(i, ahead.keys);
      ahead.fetch(i, ahead.values);
    }
}

// What each of some rows sees of a tile; rows of one query see the same.
void look_from(const Step& step, const Task& task, int64_t head, int64_t first_row, int64_t count, const Places& places,
               bool are_sinks, const Tile& tile, int32_t* room, Sight* sights) {
  const Options& options = step.options;
  const bool has_nodes = tile.first + tile.count > step.root(task.sequence);
  for (int64_t m = 0; m < count; ++m) {
    const int64_t row = first_row + m, query = task.first + row / step.group, head_of_row = row % step.group;
    const int64_t position = step.position(task.sequence, query);
    int64_t low = places.begin, high = position + 1;
    if (are_sinks) high = std::min(high, options.sink_tokens);
    else if (options.window > 0) low = std::max(low, high - (options.window - options.sink_tokens));
    if (has_nodes && (m == 0 || head_of_row == 0)) place_nodes(step, task, query, tile, room + m * TILE);
    const int32_t* nodes = !has_nodes ? nullptr : m == 0 || head_of_row == 0 ? room + m * TILE : sights[m - 1].places;
    sights[m] = {tile.first - position, low - position, high - position, nodes,
                 step.slope(head * step.group + head_of_row), options.soft_cap};
  }
}

// All rows of a task and one KV head with a tile. The first ones' products leave time to fetch what comes after it.
void meet(const Step& step, const Task& task, int64_t head, const float* q, const Places& places, bool are_sinks,
          Tile tile, Room& room, const Found& found) {
  const int64_t num_rows = task.num_rows(step);
  const bool are_in_order = step.options.positions == nullptr;
  for (int64_t row = 0; row < num_rows; row += TILE_M)
    with_count<TILE_M>(num_rows - row, [&](auto rows) {
      constexpr int M = rows.value;
      Sight sights[M];
      look_from(step, task, head, row, M, places, are_sinks, tile, room.places, sights);
      int64_t first = tile.lead, end = tile.count;
      if (are_in_order) {  // the first of them sees furthest back, the last one furthest on
        first = std::max(first, sights[0].low - sights[0].first);
        end = std::min(end, sights[M - 1].high - sights[M - 1].first);
      }
      const Found some = found.from(row);
      if (first < end) {
        attend<M>(q + row * step.head_dim, step.head_dim, tile, sights, first, end, some);
        tile.ahead.tokens = nullptr;
      } else {
        std::fill_n(some.largest, M, -INFINITY);
        std::fill_n(some.total, M, 0.0f);
      }
    });
}

// Rows of a KV head, multiplied with all that their scores are.
void scale_rows(const Step& step, const Task& task, const Tensor& q, int64_t head, float* to) {
  const Options& options = step.options;
  const float key_scale = options.scales == nullptr ? 1 : options.scales->row<float>(0)[head];
  const float factor = options.scale * key_scale * (options.soft_cap == 0 ? LOG2_E : 1 / options.soft_cap);
  for (int64_t row = 0; row < task.num_rows(step); ++row) {
    const float* from = q.row<float>(step.query_start(task.sequence) + task.first + row / step.group) +
                        (head * step.group + row % step.group) * step.head_dim;
    for (int64_t d = 0; d < step.head_dim; ++d) to[row * step.head_dim + d] = from[d] * factor;
  }
}

// What rows have before they met any key: a sink is a score without a value.
void start(const Step& step, const Task& task, const Found& so_far) {
  const int64_t num_rows = task.num_rows(step);
  const Tensor* sinks = step.options.sinks;
  std::fill_n(so_far.values, task.num_heads * num_rows * so_far.width, 0.0f);
  for (int64_t head = 0; head < task.num_heads; ++head)
    for (int64_t row = 0; row < num_rows; ++row) {
      const int64_t query_head = (task.first_head + head) * step.group + row % step.group;
      so_far.largest[head * num_rows + row] = sinks == nullptr ? -INFINITY : sinks->row<float>(0)[query_head] * LOG2_E;
      so_far.total[head * num_rows + row] = sinks == nullptr ? 0 : 1;
    }
}

void finish(const Step& step, const Task& task, const Found& so_far) {
  const int64_t num_rows = task.num_rows(step), width = so_far.width;
  for (int64_t head = task.first_head; head < task.first_head + task.num_heads; ++head) {
    const Tensor* scales = step.options.scales;
    const float scale = scales == nullptr ? 1 : scales->row<float>(step.kv.sizes[0] - 1)[head];
    for (int64_t row = 0; row < num_rows; ++row) {
      const Found of_row = so_far.from((head - task.first_head) * num_rows + row);
      const float factor = scale / *of_row.total;
      float* to = step.out.row<float>(step.query_start(task.sequence) + task.first + row / step.group) +
                  (head * step.group + row % step.group) * width;
      for (int64_t column = 0; column < width; ++column) to[column] = of_row.values[column] * factor;
    }
  }
}

void merge_all(const Found& so_far, const Found& found, int64_t num_rows) {
  for (int64_t row = 0; row < num_rows; ++row) merge(so_far.from(row), found.from(row));
}

// The tile of this index among a task's: the sinks' first.
Tile tile_at(const Step& step, const Task& task, int64_t index) {
  const Places sinks = sinks_of(step, task), newest = newest_of(step, task);
  const bool is_newest = index >= sinks.num_tiles();
  const Places& places = is_newest ? newest : sinks;
  Tile tile{};
  tile.first = is_newest ? (newest.begin / TILE + index - sinks.num_tiles()) * TILE : index * TILE;
  tile.lead = std::max<int64_t>(0, places.begin - tile.first);
  tile.count = std::min(places.end - tile.first, TILE);
  return tile;
}

// partials: what each tile of a shared sequence gave, merged later.
void run(const Step& step, const Task& task, float* partials) {
  const int64_t head_dim = step.head_dim, width = step.options.value_dim;
  const int64_t num_rows = task.num_rows(step), all_rows = task.num_heads * num_rows, size = Found::size(all_rows, width);
  const Places sinks = sinks_of(step, task), newest = newest_of(step, task);
  float* q = scratch_of<float>(0, 2 * all_rows * head_dim + 2 * size);  // for the sinks, and for the newest
  const Found so_far = Found::in(q + 2 * all_rows * head_dim, all_rows, width);
  const Found here = Found::in(q + 2 * all_rows * head_dim + size, all_rows, width);
  for (int64_t head = 0; head < task.num_heads; ++head) {
    float* to = q + head * num_rows * head_dim;
    if (sinks.num_tiles() > 0) scale_rows(step, task, *step.sink_q, task.first_head + head, to);
    scale_rows(step, task, step.q, task.first_head + head, to + all_rows * head_dim);
  }
  Room room;
  room.keys = scratch_of<float>(1, TILE * (head_dim + width));
  room.values = room.keys + TILE * head_dim;
  const bool is_whole = task.partials < 0;
  if (is_whole) start(step, task, so_far);
  const int64_t end = task.first_tile + task.num_tiles;
  Tile tile = tile_at(step, task, task.first_tile);
  find_tokens(step, task.sequence, tile, room.tokens[task.first_tile % 2]);
  fetch(step, task, tile, room.tokens[task.first_tile % 2]);
  for (int64_t index = task.first_tile; index < end; ++index) {
    const char **tokens = room.tokens[index % 2], **next_tokens = index + 1 < end ? room.tokens[(index + 1) % 2] : nullptr;
    Tile next{};
    if (next_tokens != nullptr) {
      next = tile_at(step, task, index + 1);
      find_tokens(step, task.sequence, next, next_tokens);
    }
    const bool are_sinks = index < sinks.num_tiles();
    const float* rows = are_sinks ? q : q + all_rows * head_dim;
    const Found found = is_whole ? here : Found::in(partials + task.partials + index * size, all_rows, width);
    for (int64_t head = 0; head < task.num_heads; ++head) {
      tile.ahead = ahead_of(step, task.first_head + head, next_tokens);
      read_tile(step, task.first_head + head, tokens, room, tile);
      meet(step, task, task.first_head + head, rows + head * num_rows * head_dim, are_sinks ? sinks : newest, are_sinks,
           tile, room, found.from(head * num_rows));
    }
    if (is_whole) merge_all(so_far, found, all_rows);
    tile = next;
  }
  if (is_whole) finish(step, task, so_far);
}

// Of a task that was shared out by its tiles.
void merge_tiles(const Step& step, const Task& task, float* partials) {
  const int64_t width = step.options.value_dim, all_rows = task.num_heads * task.num_rows(step);
  const int64_t size = Found::size(all_rows, width);
  const Found so_far = Found::in(scratch_of<float>(0, size), all_rows, width);
  start(step, task, so_far);
  for (int64_t index = 0; index < task.num_tiles; ++index)
    merge_all(so_far, Found::in(partials + task.partials + index * size, all_rows, width), all_rows);
  finish(step, task, so_far);
}

void attend_all(const Step& step) {
  static thread_local Plan plan;
  plan.make(step);
  const Plan& made = plan;  // the caller's, for all threads
  float* partials = scratch_of<float>(2, made.partials);
  parallel(static_cast<int64_t>(made.tasks.size()), [&](int64_t part) { run(step, made.tasks[part], partials); });
  parallel(static_cast<int64_t>(made.shared.size()), [&](int64_t part) { merge_tiles(step, made.shared[part], partials); });
}

Step step_of(const Tensor& q, const Tensor* sink_q, const Tensor& kv, const Tensor* const* metadata, const Tensor& out,
             const Options& options) {
  const int64_t num_kv_heads = kv.sizes[3], head_dim = kv.sizes[4];
  return {q,   sink_q,       kv,       *metadata[0], *metadata[1], *metadata[2],
          out, options, num_kv_heads, head_dim, q.sizes[1] / head_dim / num_kv_heads};
}

}  // namespace

SLIPSTREAM_KERNEL(attention) {
  const Options options{in[5],
                        in[6],
                        in[7],
                        static_cast<float>(attributes[0].number),
                        static_cast<float>(attributes[2].number),
                        attributes[1].integer,
                        attributes[3].integer,
                        0,
                        nullptr,
                        nullptr,
                        nullptr};
  attend_all(step_of(*in[0], nullptr, *in[1], in + 2, *out[0], options));
}

SLIPSTREAM_KERNEL(tree_attention) {
  const Options options{in[8],
                        in[9],
                        in[10],
                        static_cast<float>(attributes[0].number),
                        static_cast<float>(attributes[2].number),
                        attributes[1].integer,
                        attributes[3].integer,
                        0,
                        in[5],
                        in[6],
                        in[7]};
  attend_all(step_of(*in[0], nullptr, *in[1], in + 2, *out[0], options));
}

SLIPSTREAM_KERNEL(streaming_attention) {
  const Options options{nullptr,
                        nullptr,
                        in[6],
                        static_cast<float>(attributes[0].number),
                        static_cast<float>(attributes[2].number),
                        attributes[1].integer,
                        attributes[3].integer,
                        attributes[4].integer,
                        nullptr,
                        nullptr,
                        nullptr};
  attend_all(step_of(*in[0], in[1], *in[2], in + 3, *out[0], options));
}

// Some rows of queries and a tile of the keys and values that they share.
//
// What a row finds in a tile does not depend on the other rows, nor on who looks for it, and tiles lie where the places of their
// keys say. So rows and tiles may be shared out among threads in any way: merged in their order, the sums are the same.
#pragma once
#include <algorithm>
#include <climits>

#include "stored.h"
#include "tile.h"

namespace slipstream {

constexpr int64_t TILE = 128;  // keys
constexpr float LOG2_E = 1.44269504f;

// Of some rows: the largest score, in powers of two, and Σ 2^(score - largest), also times the values.
struct Found {
  float *values, *largest, *total;  // [rows, width], [rows], [rows]
  int64_t width;

  static int64_t size(int64_t rows, int64_t width) { return rows * (width + 2); }
  static Found in(float* room, int64_t rows, int64_t width) {
    return {room, room + rows * width, room + rows * (width + 1), width};
  }
  Found from(int64_t row) const { return {values + row * width, largest + row, total + row, width}; }
};

// The tile that comes after one, fetched from memory while that one is computed: a few cache lines for each key.
struct Ahead {
  const char* const* tokens;  // [TILE], null where nothing is left to be fetched
  int64_t keys, values;       // where a KV head's are in a token, in bytes, and how many bytes it has
  int64_t num_bytes;

  void fetch(int64_t token, int64_t offset) const {
    for (int64_t byte = 0; byte < num_bytes; byte += 64) __builtin_prefetch(tokens[token] + offset + byte, 0, 2);
  }
};

// A tile's rows of one KV head.
struct Tile {
  int64_t first, lead, count;  // keys at places [first + lead, first + count)
  const float* keys;           // [head_dim, TILE]
  const float* const* values;  // [TILE] rows
  Ahead ahead;
};

// What a row sees: keys that stand at [low, high) in the text. All numbers are counted from the row itself.
struct Sight {
  int64_t first, low, high;  // first: of the tile's first key
  const int32_t* places;     // where each key of the tile stands, INT_MAX if hidden; null where they are in order
  float slope, soft_cap;     // soft_cap: its scores are already divided by it
};

// LANES keys and as many of their columns, `width` of which there are, become columns of `packed`.
template <class T>
inline void pack_square(const T* const* keys, int64_t column, int64_t width, float* packed) {
  Floats square[LANES];
#pragma GCC unroll 16
  for (int i = 0; i < LANES; ++i) square[i] = width == LANES ? widened(keys[i] + column) : widened_some(keys[i] + column, width);
  transpose(square);
#pragma GCC unroll 16
  for (int i = 0; i < LANES; ++i)
    if (i < width) store(packed + i * TILE, square[i]);
}

// keys: a row each, TILE of them, of which all from `count` on are any.
template <class T>
void pack_keys(const T* const* keys, int64_t count, int64_t head_dim, const Ahead& ahead, float* packed) {
  for (int64_t key = 0; key < count; key += LANES) {
    for (int64_t i = key; ahead.tokens != nullptr && i < key + LANES; ++i) ahead.fetch(i, ahead.keys);
    int64_t column = 0;
    for (; column + LANES <= head_dim; column += LANES) pack_square(keys + key, column, LANES, packed + column * TILE + key);
    if (column < head_dim) pack_square(keys + key, column, head_dim - column, packed + column * TILE + key);
  }
}

// out[m][0 … V · LANES) = Σ x[m][step] · row(step), M rows at once.
template <int M, int V, class Row>
inline void sum_rows(const float* x, int64_t x_stride, int64_t first, int64_t end, Row&& row, float* out, int64_t out_stride) {
  Floats sums[M][V] = {};
  for (int64_t step = first; step < end; ++step) {
    const float* from = row(step);
    Floats columns[V];
#pragma GCC unroll 4
    for (int v = 0; v < V; ++v) columns[v] = load(from + v * LANES);
#pragma GCC unroll 8
    for (int m = 0; m < M; ++m) {
      const Floats factor = splat(x[m * x_stride + step]);
#pragma GCC unroll 4
      for (int v = 0; v < V; ++v) sums[m][v] += factor * columns[v];
    }
  }
#pragma GCC unroll 8
  for (int m = 0; m < M; ++m)
#pragma GCC unroll 4
    for (int v = 0; v < V; ++v) store(out + m * out_stride + v * LANES, sums[m][v]);
}

// Hides and bends the scores at [first, end) of a tile, multiples of LANES.
inline void look(const Sight& sight, float* scores, int64_t first, int64_t end) {
  for (int64_t i = first; i < end; i += LANES) {
    Floats score = load(scores + i);
    if (sight.soft_cap != 0) score = sight.soft_cap * LOG2_E * hyperbolic_tangent(score);
    Ints place = lane_numbers() + static_cast<int32_t>(sight.first + i), is_seen = ~Ints{};
    if (sight.places != nullptr) {
      std::memcpy(&place, sight.places + i, sizeof place);
      is_seen = place != INT_MAX;
    }
    if (sight.slope != 0) score += sight.slope * LOG2_E * __builtin_convertvector(place, Floats);
    is_seen &= (place >= static_cast<int32_t>(sight.low)) & (place < static_cast<int32_t>(sight.high));
    store(scores + i, is_seen ? score : splat(-INFINITY));
  }
}

// Scores of M rows at [first, end) become shares of 2^(score - largest), exactly 0 where hidden. The rows take turns: a vector's
// steps wait for each other.
template <int M>
inline void share(float* scores, int64_t first, int64_t end, float* most, float* total) {
  Floats found[M], sums[M] = {};
#pragma GCC unroll 8
  for (int m = 0; m < M; ++m) found[m] = splat(-INFINITY);
  for (int64_t i = first; i < end; i += LANES)
#pragma GCC unroll 8
    for (int m = 0; m < M; ++m) found[m] = larger(found[m], load(scores + m * TILE + i));
#pragma GCC unroll 8
  for (int m = 0; m < M; ++m) {
    most[m] = largest(found[m]);
    found[m] = splat(most[m] == -INFINITY ? 0.0f : most[m]);
  }
  for (int64_t i = first; i < end; i += LANES)
#pragma GCC unroll 8
    for (int m = 0; m < M; ++m) {
      const Floats each = power_of_two(load(scores + m * TILE + i) - found[m]);
      store(scores + m * TILE + i, each);
      sums[m] += each;
    }
#pragma GCC unroll 8
  for (int m = 0; m < M; ++m) total[m] = sum(sums[m]);
}

// What M rows of q, scaled, find in a tile.
template <int M>
void attend(const float* q, int64_t head_dim, const Tile& tile, const Sight* sights, int64_t first, int64_t end,
            const Found& found) {
  constexpr int V = TILE_N;
  alignas(64) float scores[M * TILE];
  const int64_t start = first / LANES * LANES, stop = (end + LANES - 1) / LANES * LANES;
  for (int64_t key = start; key < stop; key += V * LANES)
    with_count<V>((stop - key) / LANES, [&](auto vectors) {
      sum_rows<M, vectors.value>(q, head_dim, 0, head_dim, [&](int64_t d) { return tile.keys + d * TILE + key; },
                                 scores + key, TILE);
    });
  for (int m = 0; m < M; ++m) {
    const Sight& sight = sights[m];
    const bool sees_all = sight.places == nullptr && sight.low <= sight.first + start && sight.high >= sight.first + stop;
    if (!sees_all || sight.slope != 0 || sight.soft_cap != 0) look(sight, scores + m * TILE, start, stop);
  }
  share<M>(scores, start, stop, found.largest, found.total);
  int64_t column = 0;
  for (; column + LANES <= found.width; column += V * LANES)
    with_count<V>((found.width - column) / LANES, [&](auto vectors) {
      const auto add_up = [&](auto&& value) {
        sum_rows<M, vectors.value>(scores, TILE, first, end, value, found.values + column, found.width);
      };
      if (column == 0 && tile.ahead.tokens != nullptr)
        add_up([&](int64_t key) {
          tile.ahead.fetch(key, tile.ahead.values);
          return tile.values[key];
        });
      else
        add_up([&](int64_t key) { return tile.values[key] + column; });
    });
  for (column = found.width / LANES * LANES; column < found.width; ++column)
    for (int m = 0; m < M; ++m) {
      float sum = 0;
      for (int64_t key = first; key < end; ++key) sum += scores[m * TILE + key] * tile.values[key][column];
      found.values[m * found.width + column] = sum;
    }
}

// Adds what a row found in the next tile to what it found before: always by this code, so that it is always the same.
__attribute__((noinline)) inline void merge(const Found& so_far, const Found& found) {
  if (*found.largest == -INFINITY && *found.total == 0) return;  // it saw nothing
  const float most = *found.largest > *so_far.largest ? *found.largest : *so_far.largest;
  const float kept = power_of_two(splat(*so_far.largest - most))[0], added = power_of_two(splat(*found.largest - most))[0];
  *so_far.largest = most;
  *so_far.total = *so_far.total * kept + *found.total * added;
  for (int64_t column = 0; column < so_far.width; ++column)
    so_far.values[column] = so_far.values[column] * kept + found.values[column] * added;
}

}  // namespace slipstream

// Attention over a pool of cache slots: keys and values are read where they lie, whatever path they belong to.
//
// A pass is described by a table (see `table.py`): *parts*, each some rows (tokens of the batch) that read one and the
// same context, a list of stretches of consecutive slots. A row sees the places `low <= place < high` of its part's
// context, and where the part has a mask, those of them that the mask allows. A token may be a row of several parts
// (a prefix that many share, then its own): each part, and each piece of a long part, gives a maximum, a sum and a
// weighted sum of values, and the pieces of a token are merged by log-sum-exp at the end. A token with a single piece is
// written out at once.
//
// Queries and keys may come before their rotary positions (Su et al. 2021, https://arxiv.org/abs/2104.09864), with the
// cosines and sines of these, and are rotated as they are read.
//
// All sums are float32, whatever the pool's dtype. Few rows are scored by dot products; for many rows a block of keys is
// laid out once, transposed, and both products run in register tiles. Where the processor multiplies pairs of bfloat16
// numbers, queries and keys of bfloat16 are multiplied so, and by tiles where it has those (`pairs.h`).

#include <ATen/Parallel.h>
#include <ATen/ops/empty.h>
#include <torch/csrc/inductor/aoti_torch/utils.h>
#include <torch/library.h>

#include <algorithm>
#include <atomic>
#include <cmath>
#include <cstdint>
#include <cstring>
#include <numeric>
#include <optional>
#include <type_traits>
#include <vector>

#include "pairs.h"
#include "tiles.h"
#include "vectors.h"
#include "work.h"

namespace {

using namespace unspool;

constexpr int TILE = 96;    // query rows that share a block laid out once
constexpr int FEW = 4;      // so many of fewer than 8 are looked at together
constexpr int NV = W / 4;   // and vectors of columns
constexpr int DIRECT = 24;  // so many rows read values as they lie, widening them anew for each tile

// out[i][j] += sum over k of a[i][k] * b[k][j], for M rows, N columns of a multiple of one vector.
template <typename T, int M, int V>
inline void tile(const float* a, int64_t lda, const T* b, int64_t ldb, float* out, int64_t ldo, int64_t depth,
                 Ahead<T>* ahead) {
  Vector total[M][V];
  for (int i = 0; i < M; ++i)
    for (int v = 0; v < V; ++v) total[i][v] = *reinterpret_cast<Loose*>(out + i * ldo + v * W);
  for (int64_t k = 0; k < depth; ++k) {
    if (ahead) ahead->fetch();
    Vector column[V];
    for (int v = 0; v < V; ++v) column[v] = Element<T>::load(b + k * ldb + v * W);
    for (int i = 0; i < M; ++i) {
      Vector factor = all(a[i * lda + k]);
      for (int v = 0; v < V; ++v) total[i][v] += factor * column[v];
    }
  }
  for (int i = 0; i < M; ++i)
    for (int v = 0; v < V; ++v) *reinterpret_cast<Loose*>(out + i * ldo + v * W) = total[i][v];
}

template <typename T, int M>
inline void strip(const float* a, int64_t lda, const T* b, int64_t ldb, float* out, int64_t ldo, int64_t columns,
                  int64_t depth, Ahead<T>* ahead) {
  int64_t j = 0;
  for (; j + NV * W <= columns; j += NV * W)
    tile<T, M, NV>(a, lda, b + j, ldb, out + j, ldo, depth, j ? nullptr : ahead);
  for (; j + W <= columns; j += W) tile<T, M, 1>(a, lda, b + j, ldb, out + j, ldo, depth, j ? nullptr : ahead);
  for (; j < columns; ++j)
    for (int i = 0; i < M; ++i) {
      float s = out[i * ldo + j];
      for (int64_t k = 0; k < depth; ++k) s += a[i * lda + k] * Element<T>::one(b + k * ldb + j);
      out[i * ldo + j] = s;
    }
}

template <typename T>
void multiply(const float* a, int64_t lda, const T* b, int64_t ldb, float* out, int64_t ldo, int64_t rows,
              int64_t columns, int64_t depth, Ahead<T>* ahead = nullptr) {
  auto some = [&](auto strips, int64_t i) {
    strips(a + i * lda, lda, b, ldb, out + i * ldo, ldo, columns, depth, i ? nullptr : ahead);
  };
  int64_t i = 0;
  for (; i + MR <= rows; i += MR) some(strip<T, MR>, i);
  for (; i + 3 <= rows; i += 3) some(strip<T, 3>, i);
  for (; i < rows; ++i) some(strip<T, 1>, i);
}

// out[r] = the dot product of row r of the query with one key, for R rows.
template <typename T, int R>
inline void dots(const float* query, int64_t width, const T* key, float* out) {
  const int64_t whole = width / W * W;
  Vector total[R] = {};
  for (int64_t d = 0; d < whole; d += W) {
    const Vector k = Element<T>::load(key + d);
    for (int r = 0; r < R; ++r) total[r] += *reinterpret_cast<const Loose*>(query + r * width + d) * k;
  }
  for (int r = 0; r < R; ++r) {
    float s = sum(total[r]);
    for (int64_t d = whole; d < width; ++d) s += query[r * width + d] * Element<T>::one(key + d);
    out[r * BLOCK] = s;
  }
}

// The scores of a few rows with a block of keys.
template <typename T>
void score(const float* query, int64_t rows, int64_t width, const T* keys, int64_t count, Ahead<T>& ahead,
           float* scores) {
  for (int64_t r = 0; r < rows; r += 4) {
    auto some = [&](auto dots) {
      for (int64_t j = 0; j < count; ++j) {
        if (r == 0) ahead.fetch();
        dots(query + r * width, width, keys + j * width, scores + r * BLOCK + j);
      }
    };
    switch (rows - r) {
      case 1:
        some(dots<T, 1>);
        break;
      case 2:
        some(dots<T, 2>);
        break;
      case 3:
        some(dots<T, 3>);
        break;
      default:
        some(dots<T, 4>);
    }
  }
}

struct Part {
  const int64_t* rows;  // [count][3]: token, low, high
  int64_t count;
  const int64_t* stretches;  // [stretch_count][2]: first slot, length
  int64_t stretch_count, length;
  const uint8_t* mask;  // [count][length], or null
};

struct Item {  // some rows of a part, over a piece of its context, for one head of keys
  int64_t part, head, first, last, begin, end;
  int64_t scratch;  // where its results are kept until all pieces of its tokens are there; `ALONE`: there are no others
};
constexpr int64_t ALONE = -1;

// The cosines and sines, [tokens][turned], by which queries and keys are to be rotated, or nothing. They may be for the
// first numbers of a head only.
template <typename T>
struct Rotation {
  const T *cosines = nullptr, *sines = nullptr;
  int64_t turned = 0;

  // Write down the row of a token: rotated if it is to be.
  void keep(const T* row, int64_t width, int64_t token, T* to) const {
    std::memcpy(static_cast<void*>(to + turned), row + turned, (width - turned) * sizeof(T));
    const int64_t half = turned / 2;
    const T *cosine = cosines + token * turned, *sine = sines + token * turned;
    int64_t d = 0;
    for (; d + W <= half; d += W) {
      const Vector one = Element<T>::load(row + d), other = Element<T>::load(row + half + d);
      auto at = [](const T* from) { return Element<T>::load(from); };
      Element<T>::store(to + d, one * at(cosine + d) - other * at(sine + d));
      Element<T>::store(to + half + d, other * at(cosine + half + d) + one * at(sine + half + d));
    }
    for (; d < half; ++d) {
      const float one = Element<T>::one(row + d), other = Element<T>::one(row + half + d);
      auto at = [](const T* from) { return Element<T>::one(from); };
      to[d] = Element<T>::rounded(one * at(cosine + d) - other * at(sine + d));
      to[half + d] = Element<T>::rounded(other * at(cosine + half + d) + one * at(sine + half + d));
    }
  }
};

struct Block {  // consecutive slots, at a place of the context
  int64_t slot, place, count;
};

// Goes through the blocks of a piece of a context.
class Blocks {
 public:
  Blocks(const Part& part, const Item& item) : part_(part), item_(item), place_(item.begin) {}

  // Give the next one; its count is 0 at the end.
  Block next() {
    if (place_ >= item_.end) return {0, place_, 0};
    const int64_t* stretch = part_.stretches + 2 * stretch_;
    while (place_ >= at_ + stretch[1]) {
      at_ += stretch[1];
      stretch += 2;
      ++stretch_;
    }
    const int64_t end = std::min(item_.end, at_ + stretch[1]);
    const Block block{stretch[0] + place_ - at_, place_, std::min<int64_t>(BLOCK, end - place_)};
    place_ += block.count;
    return block;
  }

 private:
  const Part& part_;
  const Item& item_;
  int64_t place_, stretch_ = 0, at_ = 0;  // `at_`: the place of the stretch's first slot
};

// Weights as they are, in place of the scores.
struct Plain {
  static constexpr int AT_ONCE = 1;    // vectors
  static constexpr float UNIT = 1.0f;  // of the exponents
  float* to;

  static Vector of(Vector exponent) { return exponential(exponent); }
  void keep(int64_t at, const Vector* weight) const { Element<float>::store(to + at, *weight); }
};

struct Shape {
  int64_t heads, kv_heads, group, width, value_width;
  float scaling, softcap;  // softcap 0: none
};

template <typename T>
struct Buffers {
  Room<T> row;
  Room<float> query, scores, keys, values, results;
  Room<at::BFloat16> halves, weights;
  Room<int32_t> pairs, value_pairs;
};

// What a token sees of a block of keys, from `first` to `last`, and of those what `allowed` (or null) says.
struct Seen {
  int64_t first, last;
  const uint8_t* allowed;

  Seen(const Part& part, int64_t number, const Block& block) {
    const int64_t* row = part.rows + number * 3;
    first = std::clamp<int64_t>(row[1] - block.place, 0, block.count);
    last = std::clamp<int64_t>(row[2] - block.place, 0, block.count);
    allowed = part.mask ? part.mask + number * part.length + block.place : nullptr;
  }

  // Leave out of a row's scores what it does not see.
  void mask(float* line) const {
    if (first > 0 || last < BLOCK)
      for (int j = 0; j < BLOCK; j += W) {
        const Whole place = lanes() + j;
        Loose* scores = reinterpret_cast<Loose*>(line + j);
        *scores = place >= static_cast<int>(first) && place < static_cast<int>(last) ? *scores : all(NONE);
      }
    if (allowed)
      for (int64_t j = first; j < last; ++j)
        if (!allowed[j]) line[j] = NONE;
  }
};

// Turn scores of rows with a block of keys into weights, exp(score - greatest), and what was summed up before to the
// new greatest. A score that is not a number makes its weight and with it all sums of its row so. Scores are to be
// multiplied by `scale` first. N rows are looked at together.
template <int N, typename Weights>
inline void weigh(const Part& part, const Item& item, const Shape& shape, const Block& block, float scale,
                  float* scores, float* weighted, float* sum, float* most, const Weights& weights) {
  constexpr int V = Weights::AT_ONCE;
  const int64_t rows = (item.last - item.first) * shape.group, width = shape.value_width;
  const int64_t reach = up_to(block.count, V * W);
  for (int64_t begin = 0, t = item.first, g = 0; begin < rows; begin += N) {
    const int64_t here = std::min<int64_t>(N, rows - begin);
    Vector best[N], total[N] = {}, before = all(NONE), sum_before{};
    std::fill(best, best + N, all(NONE));
    Seen seen(part, t, block);
    for (int64_t i = 0; i < here; ++i) {
      float* line = scores + (begin + i) * BLOCK;
      if (shape.softcap > 0)
        for (int64_t j = 0; j < block.count; ++j)
          line[j] = shape.softcap / scale * std::tanh(line[j] * scale / shape.softcap);
      seen.mask(line);
      for (int64_t j = 0; j < reach; j += W) {
        const Vector v = Element<float>::load(line + j) * scale;
        best[i] = v > best[i] ? v : best[i];
      }
      if (++g == shape.group && ++t < item.last) {
        g = 0;
        seen = Seen(part, t, block);
      }
    }
    std::memcpy(&before, most + begin, here * sizeof(float));
    std::memcpy(&sum_before, sum + begin, here * sizeof(float));
    const Vector now = greatests<N>(best), top = now > before ? now : before;
    const Vector from = top == all(NONE) ? Vector{} : top;  // where nothing was seen yet all weights are 0
    const Vector shrink = exponential(before - from);
    for (int64_t i = 0; i < here; ++i) {
      float* line = scores + (begin + i) * BLOCK;
      const Vector own = all(from[i] * Weights::UNIT);
      for (int64_t j = 0; j < reach; j += V * W) {
        Vector weight[V];
        for (int v = 0; v < V; ++v) {
          weight[v] = Weights::of(Element<float>::load(line + j + v * W) * (scale * Weights::UNIT) - own);
          total[i] += weight[v];
        }
        weights.keep((begin + i) * BLOCK + j, weight);
      }
      if (shrink[i] != 1.0f && before[i] != NONE)
        for (int64_t e = 0; e < width; ++e) weighted[(begin + i) * width + e] *= shrink[i];
    }
    const Vector sum_now = sum_before * shrink + sums<N>(total);
    std::memcpy(sum + begin, &sum_now, here * sizeof(float));
    std::memcpy(most + begin, &top, here * sizeof(float));
  }
}

// The first keys and values of what a thread computes next.
template <typename P>
struct Upcoming {
  const P* keys;
  const P* values;
  Block block;
};

// Divide weighted values by the sum of their weights.
template <typename T>
inline void divide(const float* weighted, float sum, int64_t width, T* to) {
  const float share = 1.0f / sum;
  int64_t e = 0;
  for (; e + W <= width; e += W) Element<T>::store(to + e, Element<float>::load(weighted + e) * share);
  for (; e < width; ++e) to[e] = Element<T>::rounded(weighted[e] * share);
}

// Write out the weighted values of an item, whose tokens have no other.
template <typename T>
void write_out(const Item& item, const Part& part, const Shape& shape, const float* weighted, const float* sums,
               T* output) {
  const int64_t E = shape.value_width;
  for (int64_t t = item.first, r = 0; t < item.last; ++t)
    for (int64_t g = 0; g < shape.group; ++g, ++r)
      divide(weighted + r * E, sums[r], E, output + (part.rows[3 * t] * shape.heads + item.head * shape.group + g) * E);
}

template <typename T, typename P>
void run(const Item& item, const Part& part, const Shape& shape, const at::Tensor& query, const Rotation<T>& rotation,
         const P* keys, const P* values, const Upcoming<P>& upcoming, Buffers<T>& buffers, float* scratch, T* output) {
  const int64_t tokens = item.last - item.first, rows = tokens * shape.group;
  const int64_t D = shape.width, E = shape.value_width;
  const bool few = rows < 8;
  constexpr bool halves = PAIRS && std::is_same_v<T, at::BFloat16> && std::is_same_v<P, at::BFloat16>;
  const bool by_pairs = halves && D % (2 * W) == 0;
  const bool by_tiles = by_pairs && !few && in_tiles() && E % (2 * W) == 0 && shape.scaling > 0;
  Tiles tiles;
  at::BFloat16* half_query = by_pairs ? buffers.halves.of(rows * D) : nullptr;
  int32_t* turned_pairs = by_pairs ? buffers.pairs.of(D / 2 * BLOCK) : nullptr;
  at::BFloat16* weights = by_tiles ? buffers.weights.of(2 * rows * BLOCK) : nullptr;
  int32_t* value_pairs = by_tiles ? buffers.value_pairs.of(BLOCK / 2 * E) : nullptr;
  float* q = by_pairs ? nullptr : buffers.query.of(rows * D);
  float* scores = buffers.scores.of(rows * BLOCK);
  const T* source = query.const_data_ptr<T>();
  for (int64_t t = 0; t < tokens; ++t) {
    const int64_t token = part.rows[(item.first + t) * 3];
    for (int64_t g = 0; g < shape.group; ++g) {
      const T* from = source + (item.head * shape.group + g) * query.stride(1) + token * query.stride(2);
      const int64_t r = t * shape.group + g;
      if (by_pairs) {
        if constexpr (halves) rotation.keep(from, D, token, half_query + r * D);
      } else {
        T* row = buffers.row.of(D);
        rotation.keep(from, D, token, row);
        for (int64_t d = 0; d < D; ++d) q[r * D + d] = Element<T>::one(row + d) * shape.scaling;
      }
    }
  }
  // [rows][E], then sums [rows], then maxima [rows]
  float* weighted = scratch ? scratch : buffers.results.of(rows * (E + 2));
  float* sums = weighted + rows * E;
  float* most = sums + rows;
  if (!by_tiles) std::fill(weighted, sums, 0.0f);
  std::fill(sums, most, 0.0f);
  std::fill(most, most + rows, NONE);
  Blocks blocks(part, item);
  for (Block block = blocks.next(), then; block.count; block = then) {
    then = blocks.next();
    const int64_t count = block.count;
    const P* key = keys + block.slot * D;
    const P* value = values + block.slot * E;
    const Block& soon = then.count ? then : upcoming.block;
    auto next_keys = Ahead<P>::of((then.count ? keys : upcoming.keys) + soon.slot * D, soon.count, D, count);
    auto next_values = Ahead<P>::of((then.count ? values : upcoming.values) + soon.slot * E, soon.count, E, count);
    if (by_pairs) {
      if constexpr (halves) {
        if (few) {
          score_few(half_query, rows, D, key, count, shape.scaling, next_keys, scores);
        } else {
          turn(key, D, count, next_keys, turned_pairs);
          if (by_tiles)
            tiles.score(half_query, rows, D, turned_pairs, count, scores);
          else
            score_many(half_query, rows, D, turned_pairs, count, shape.scaling, scores);
        }
      }
    } else if (few) {
      score<P>(q, rows, D, key, count, next_keys, scores);
    } else {
      float* turned = buffers.keys.of(D * BLOCK);
      for (int64_t j = 0; j < count; ++j) {
        next_keys.fetch();
        for (int64_t d = 0; d < D; ++d) turned[d * BLOCK + j] = Element<P>::one(key + j * D + d);
      }
      for (int64_t j = count; j < BLOCK; ++j)
        for (int64_t d = 0; d < D; ++d) turned[d * BLOCK + j] = 0;
      std::fill(scores, scores + rows * BLOCK, 0.0f);
      multiply<float>(q, D, turned, BLOCK, scores, BLOCK, rows, BLOCK, D);
    }
    if (by_tiles) {
      if constexpr (halves) {
        const Split split(weights, rows);
        weigh<W>(part, item, shape, block, shape.scaling, scores, weighted, sums, most, split);
        pair_up(value, E, count, next_values, value_pairs);
        tiles.add(weights, rows, value_pairs, count, E, block.place == item.begin, weighted);
      }
      continue;
    }
    if (few)
      weigh<FEW>(part, item, shape, block, 1.0f, scores, weighted, sums, most, Plain{scores});
    else
      weigh<W>(part, item, shape, block, 1.0f, scores, weighted, sums, most, Plain{scores});
    if (rows <= DIRECT || sizeof(P) == sizeof(float)) {
      multiply<P>(scores, BLOCK, value, E, weighted, E, rows, E, count, &next_values);
    } else {
      float* wide = buffers.values.of(BLOCK * E);
      int64_t i = 0;
      for (; i + W <= count * E; i += W) {
        if (i % E < W) next_values.fetch();
        *reinterpret_cast<Loose*>(wide + i) = Element<P>::load(value + i);
      }
      for (; i < count * E; ++i) wide[i] = Element<P>::one(value + i);
      multiply<float>(scores, BLOCK, wide, E, weighted, E, rows, E, count);
    }
  }
  if (!scratch) write_out(item, part, shape, weighted, sums, output);
}

// The pieces of each token: the item that has it for the first head of keys, and its row there.
struct Pieces {
  std::vector<int64_t> begin;  // [tokens + 1]
  std::vector<std::pair<int64_t, int64_t>> all;

  Pieces(const std::vector<Part>& parts, const std::vector<Item>& items, int64_t kv_heads, int64_t tokens)
      : begin(tokens + 2) {
    auto each = [&](auto what) {
      for (size_t i = 0; i < items.size(); i += kv_heads)
        for (int64_t t = items[i].first; t < items[i].last; ++t)
          what(parts[items[i].part].rows[3 * t], std::pair<int64_t, int64_t>(i, t - items[i].first));
    };
    each([&](int64_t token, auto) { ++begin[token + 2]; });
    std::partial_sum(begin.begin(), begin.end(), begin.begin());
    all.resize(begin.back());
    each([&](int64_t token, auto piece) { all[begin[token + 1]++] = piece; });  // which moves each begin to its place
  }

  // Whether the tokens of an item have no other.
  bool alone(const Part& part, const Item& item) const {
    for (int64_t t = item.first; t < item.last; ++t) {
      const int64_t token = part.rows[3 * t];
      if (begin[token + 1] - begin[token] > 1) return false;
    }
    return true;
  }
};

// Merge the pieces of each token that has several, or sinks, and each head, and write them out.
template <typename T>
void finish(const Pieces& pieces, const std::vector<Item>& items, const Shape& shape, const float* scratch,
            const float* sinks, int64_t tokens, T* output) {
  const int64_t E = shape.value_width;
  at::parallel_for(0, tokens, 8, [&](int64_t begin, int64_t end) {
    std::vector<float> merged(E);
    for (int64_t token = begin; token < end; ++token) {
      const auto* first = pieces.all.data() + pieces.begin[token];
      const auto* last = pieces.all.data() + pieces.begin[token + 1];
      if (first < last && items[first->first].scratch == ALONE) continue;
      for (int64_t head = 0; head < shape.heads; ++head) {
        const int64_t g = head % shape.group;
        float most = sinks ? sinks[head] : NONE, total = sinks ? 1.0f : 0.0f;
        std::fill(merged.begin(), merged.end(), 0.0f);
        for (const auto* piece = first; piece < last; ++piece) {
          const Item& item = items[piece->first + head / shape.group];
          const int64_t rows = (item.last - item.first) * shape.group, r = piece->second * shape.group + g;
          const float* found = scratch + item.scratch;
          const float top = found[rows * (E + 1) + r];
          const float sum = found[rows * E + r];
          if (sum == 0) continue;
          const float best = std::max(most, top);
          const float old = most == NONE ? 0.0f : std::exp(most - best), now = std::exp(top - best);
          total = total * old + sum * now;
          for (int64_t e = 0; e < E; ++e) merged[e] = merged[e] * old + found[r * E + e] * now;
          most = best;
        }
        divide(merged.data(), total, E, output + (token * shape.heads + head) * E);
      }
    }
  });
}

template <typename T, typename P>
void keep(const T* from, int64_t count, P* to) {
  if constexpr (std::is_same_v<T, P>)
    std::memcpy(static_cast<void*>(to), from, count * sizeof(T));
  else
    for (int64_t i = 0; i < count; ++i) to[i] = Element<P>::rounded(Element<T>::one(from + i));
}

template <typename T, typename P>
void attend_as(const at::Tensor& query, const at::Tensor& key, const at::Tensor& value, at::Tensor& keys,
               at::Tensor& values, const at::Tensor& table, const at::Tensor& mask, const float* sinks,
               const Rotation<T>& rotation, const Shape& shape, at::Tensor& output) {
  const int64_t* head = table.const_data_ptr<int64_t>();
  const int64_t part_count = head[0];
  const int64_t *parts_at = head + head[1], *rows_at = head + head[2], *stretches_at = head + head[3];
  const int64_t* slots = head + head[4];
  const int64_t n = query.size(2), D = shape.width, E = shape.value_width, S = keys.size(2);
  P* pool_keys = keys.data_ptr<P>();
  P* pool_values = values.data_ptr<P>();
  at::parallel_for(0, shape.kv_heads * n, 128, [&](int64_t begin, int64_t end) {
    std::vector<T> row(std::is_same_v<T, P> ? 0 : D);
    for (int64_t at = begin; at < end; ++at) {
      const int64_t h = at % shape.kv_heads, i = at / shape.kv_heads;
      const T* k = key.const_data_ptr<T>() + h * key.stride(1) + i * key.stride(2);
      const T* v = value.const_data_ptr<T>() + h * value.stride(1) + i * value.stride(2);
      P* kept_key = pool_keys + (h * S + slots[i]) * D;
      P* kept_value = pool_values + (h * S + slots[i]) * E;
      if constexpr (std::is_same_v<T, P>) {
        rotation.keep(k, D, i, kept_key);
      } else {
        rotation.keep(k, D, i, row.data());
        keep(row.data(), D, kept_key);
      }
      keep(v, E, kept_value);
    }
  });
  std::vector<Part> parts(part_count);
  int64_t work = 0;
  for (int64_t p = 0; p < part_count; ++p) {
    const int64_t* from = parts_at + 6 * p;
    parts[p] = {rows_at + 3 * from[0], from[1], stretches_at + 2 * from[2], from[3], from[4],
                from[5] < 0 ? nullptr : mask.const_data_ptr<uint8_t>() + from[5]};
    work += from[1] * from[4] * shape.kv_heads;
  }
  const int64_t threads = at::get_num_threads();
  const int64_t tall = std::max<int64_t>(1, TILE / shape.group);
  std::vector<Item> items;
  for (int64_t p = 0; p < part_count; ++p) {
    const Part& part = parts[p];
    for (int64_t first = 0; first < part.count; first += tall) {
      const int64_t last = std::min(part.count, first + tall);
      int64_t low = part.length, high = 0;
      for (int64_t t = first; t < last; ++t) {
        low = std::min(low, part.rows[3 * t + 1]);
        high = std::max(high, part.rows[3 * t + 2]);
      }
      const int64_t fair = threads > 1 ? work / (threads * 4) / (last - first) : high;
      const int64_t piece = std::max<int64_t>(256, fair / BLOCK * BLOCK);
      for (int64_t begin = low; begin < high; begin += piece) {
        for (int64_t h = 0; h < shape.kv_heads; ++h)
          items.push_back({p, h, first, last, begin, std::min(high, begin + piece), ALONE});
      }
    }
  }
  const Pieces pieces(parts, items, shape.kv_heads, n);
  int64_t scratch = 0;
  for (Item& item : items) {
    if (!sinks && pieces.alone(parts[item.part], item)) continue;
    item.scratch = scratch;
    scratch += up_to((item.last - item.first) * shape.group * (E + 2), W);
  }
  // The longest first, so that no thread is left with one at the end.
  std::vector<size_t> order(items.size());
  std::iota(order.begin(), order.end(), 0);
  auto size = [&](size_t i) { return (items[i].last - items[i].first) * (items[i].end - items[i].begin); };
  std::stable_sort(order.begin(), order.end(), [&](size_t a, size_t b) { return size(a) > size(b); });
  static thread_local Room<float> found;
  float* results = found.of(scratch);
  std::atomic<size_t> next{0};
  at::parallel_for(0, threads, 1, [&](int64_t, int64_t) {
    static thread_local Buffers<T> buffers;
    for (size_t turn = next.fetch_add(1), then; turn < items.size(); turn = then) {
      then = next.fetch_add(1);
      Upcoming<P> upcoming{pool_keys, pool_values, {}};
      if (then < items.size()) {
        const Item& item = items[order[then]];
        upcoming = {pool_keys + item.head * S * D, pool_values + item.head * S * E,
                    Blocks(parts[item.part], item).next()};
      }
      const Item& item = items[order[turn]];
      float* kept = item.scratch == ALONE ? nullptr : results + item.scratch;
      run<T, P>(item, parts[item.part], shape, query, rotation, pool_keys + item.head * S * D,
                pool_values + item.head * S * E, upcoming, buffers, kept, output.data_ptr<T>());
    }
  });
  if (scratch) finish<T>(pieces, items, shape, results, sinks, n, output.data_ptr<T>());
}

at::Tensor attend(const at::Tensor& query_, const at::Tensor& key_, const at::Tensor& value_, at::Tensor keys,
                  at::Tensor values, const at::Tensor& table, const at::Tensor& mask,
                  const std::optional<at::Tensor>& sinks, const std::optional<at::Tensor>& cosines_,
                  const std::optional<at::Tensor>& sines_, double scaling, double softcap) {
  auto plain = [](const at::Tensor& t) { return t.stride(3) == 1 ? t : t.contiguous(); };
  const at::Tensor query = plain(query_), key = plain(key_), value = plain(value_);
  const int64_t heads = query.size(1), kv_heads = keys.size(1);
  Shape shape{heads, kv_heads, heads / kv_heads, query.size(3), value.size(3), static_cast<float>(scaling),
              static_cast<float>(softcap)};
  at::Tensor output = at::empty({1, query.size(2), heads, value.size(3)}, query.options());
  std::vector<float> sink;
  if (sinks) {
    at::Tensor wide = sinks->to(at::kFloat).contiguous().view(-1);
    sink.assign(wide.const_data_ptr<float>(), wide.const_data_ptr<float>() + heads);
  }
  const float* given = sinks ? sink.data() : nullptr;
  auto rotations = [&](const std::optional<at::Tensor>& of) {
    if (!of) return at::Tensor();
    const int64_t turned = of->size(-1);
    TORCH_CHECK(of->scalar_type() == query.scalar_type() && of->numel() == query.size(2) * turned && turned % 2 == 0 &&
                    turned <= shape.width,
                "unspool::attend takes cosines and sines of the queries' dtype for each token, an even number up to ",
                shape.width);
    return of->contiguous();
  };
  const at::Tensor cosines = rotations(cosines_), sines = rotations(sines_);
  TORCH_CHECK(cosines_.has_value() == sines_.has_value() && (!cosines_ || cosines.sizes() == sines.sizes()),
              "unspool::attend takes as many sines as cosines");
  auto with = [&](auto pool) {
    using P = decltype(pool);
    auto as = [&](auto own) {
      using T = decltype(own);
      Rotation<T> rotation;
      if (cosines_) rotation = {cosines.const_data_ptr<T>(), sines.const_data_ptr<T>(), cosines.size(-1)};
      attend_as<T, P>(query, key, value, keys, values, table, mask, given, rotation, shape, output);
    };
    query.scalar_type() == keys.scalar_type() ? as(P{}) : as(float{});
  };
  TORCH_CHECK(query.scalar_type() == at::kFloat || query.scalar_type() == keys.scalar_type(),
              "unspool::attend takes queries of float32 or of the pool's dtype, not ", query.scalar_type());
  by_dtype(keys.scalar_type(), "unspool::attend keeps", with);
  return output;
}

}  // namespace

TORCH_LIBRARY_FRAGMENT(unspool, library) {
  library.def(
      "attend(Tensor query, Tensor key, Tensor value, Tensor(a!) keys, Tensor(b!) values, Tensor table, Tensor mask, "
      "Tensor? sinks, Tensor? cosines, Tensor? sines, float scaling, float softcap) -> Tensor");
}

TORCH_LIBRARY_IMPL(unspool, CPU, library) { library.impl("attend", attend); }

// As packages call it.
extern "C" AOTITorchError aoti_torch_cpu_attend(AtenTensorHandle query, AtenTensorHandle key, AtenTensorHandle value,
                                                AtenTensorHandle keys, AtenTensorHandle values, AtenTensorHandle table,
                                                AtenTensorHandle mask, AtenTensorHandle* sinks,
                                                AtenTensorHandle* cosines, AtenTensorHandle* sines, double scaling,
                                                double softcap, AtenTensorHandle* attended) {
  using namespace torch::aot_inductor;
  AOTI_TORCH_CONVERT_EXCEPTION_TO_ERROR_CODE({
    auto plain = [](AtenTensorHandle handle) { return resolve_tensor_dispatch_flags(handle); };
    *attended = new_tensor_handle(attend(plain(query), plain(key), plain(value), plain(keys), plain(values),
                                         plain(table), plain(mask), resolve_tensor_dispatch_flags(sinks),
                                         resolve_tensor_dispatch_flags(cosines), resolve_tensor_dispatch_flags(sines),
                                         scaling, softcap));
  });
}

// Attention over a pool of cache slots: keys and values are read where they lie, whatever path they belong to.
//
// A pass is described by a table (see `table.py`): *parts*, each some rows (tokens of the batch) that read one and the
// same context, a list of stretches of consecutive slots. A row sees the places `low <= place < high` of its part's
// context, and where the part has a mask, those of them that the mask allows. A token may be a row of several parts
// (a prefix that many share, then its own): each part, and each piece of a long part, gives a maximum, a sum and a
// weighted sum of values, and the pieces of a token are merged by log-sum-exp at the end.
//
// All arithmetic is float32, whatever the pool's dtype. Few rows are scored by dot products; for many rows a block of
// keys is laid out once, transposed, and both products run in register tiles.

#include <ATen/Parallel.h>
#include <ATen/ops/empty.h>
#include <torch/library.h>

#include <algorithm>
#include <atomic>
#include <cmath>
#include <cstdint>
#include <cstring>
#include <limits>
#include <optional>
#include <vector>

namespace {

#if defined(__AVX512F__)
constexpr int W = 16;
#else
constexpr int W = 8;
#endif
constexpr int BLOCK = 64;      // keys that are scored together
constexpr int TILE = 96;       // query rows that share a block laid out once
constexpr int MR = 6, NV = 2;  // a register tile: rows by vectors
constexpr float NONE = -std::numeric_limits<float>::infinity();

typedef float Vector __attribute__((vector_size(W * 4)));
typedef float Loose __attribute__((vector_size(W * 4), aligned(4), may_alias));
typedef int32_t Whole __attribute__((vector_size(W * 4)));

template <typename T>
struct Element;

template <>
struct Element<float> {
  static Vector load(const float* p) { return *reinterpret_cast<const Loose*>(p); }
  static float one(const float* p) { return *p; }
  static float rounded(float x) { return x; }
};

template <>
struct Element<at::BFloat16> {
  static Vector load(const at::BFloat16* p) {
    typedef uint16_t Half __attribute__((vector_size(W * 2)));
    typedef uint32_t Word __attribute__((vector_size(W * 4)));
    Half half;
    std::memcpy(&half, p, sizeof half);
    Word word = __builtin_convertvector(half, Word) << 16;
    return reinterpret_cast<Vector>(word);
  }
  static float one(const at::BFloat16* p) { return static_cast<float>(*p); }
  static at::BFloat16 rounded(float x) { return at::BFloat16(x); }
};

template <>
struct Element<at::Half> {
  static Vector load(const at::Half* p) {
    Vector out;
    for (int i = 0; i < W; ++i) out[i] = static_cast<float>(p[i]);
    return out;
  }
  static float one(const at::Half* p) { return static_cast<float>(*p); }
  static at::Half rounded(float x) { return at::Half(x); }
};

inline Vector all(float x) { return x - Vector{}; }  // unlike 0 + x, nothing is left of it but the copies

typedef float Four __attribute__((vector_size(16)));

inline float sum(Vector v) {
#if defined(__AVX512F__)
  typedef float Eight __attribute__((vector_size(32)));
  Eight half = __builtin_shufflevector(v, v, 0, 1, 2, 3, 4, 5, 6, 7) +
               __builtin_shufflevector(v, v, 8, 9, 10, 11, 12, 13, 14, 15);
#else
  Vector half = v;
#endif
  Four four = __builtin_shufflevector(half, half, 0, 1, 2, 3) + __builtin_shufflevector(half, half, 4, 5, 6, 7);
  four += __builtin_shufflevector(four, four, 2, 3, 0, 1);
  return four[0] + four[1];
}

// exp(x) for x <= 0 to within 2 units in the last place; below -87 it is 0.
inline Vector exponential(Vector x) {
  Whole tiny = x < all(-87.0f);
  Vector kept = tiny ? all(-87.0f) : x;
  Vector whole = kept * 1.44269504088896341f;
  Whole power = __builtin_convertvector(whole - 0.5f, Whole);  // x <= 0: rounds to nearest
  Vector floor = __builtin_convertvector(power, Vector);
  Vector r = kept - floor * 0.693359375f;
  r = r + floor * 2.12194440e-4f;
  Vector y = all(1.9875691500e-4f);
  y = y * r + 1.3981999507e-3f;
  y = y * r + 8.3334519073e-3f;
  y = y * r + 4.1665795894e-2f;
  y = y * r + 1.6666665459e-1f;
  y = y * r + 5.0000001201e-1f;
  y = y * r * r + r + 1.0f;
  Whole bits = reinterpret_cast<Whole>(y) + (power << 23);
  return tiny ? Vector{} : reinterpret_cast<Vector>(bits);
}

// out[i][j] += sum over k of a[i][k] * b[k][j], for M rows, N columns of a multiple of one vector.
template <typename T, int M, int V>
inline void tile(const float* a, int64_t lda, const T* b, int64_t ldb, float* out, int64_t ldo, int64_t depth) {
  Vector total[M][V];
  for (int i = 0; i < M; ++i)
    for (int v = 0; v < V; ++v) total[i][v] = *reinterpret_cast<Loose*>(out + i * ldo + v * W);
  for (int64_t k = 0; k < depth; ++k) {
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
                  int64_t depth) {
  int64_t j = 0;
  for (; j + NV * W <= columns; j += NV * W) tile<T, M, NV>(a, lda, b + j, ldb, out + j, ldo, depth);
  for (; j + W <= columns; j += W) tile<T, M, 1>(a, lda, b + j, ldb, out + j, ldo, depth);
  for (; j < columns; ++j)
    for (int i = 0; i < M; ++i) {
      float s = out[i * ldo + j];
      for (int64_t k = 0; k < depth; ++k) s += a[i * lda + k] * Element<T>::one(b + k * ldb + j);
      out[i * ldo + j] = s;
    }
}

template <typename T>
void multiply(const float* a, int64_t lda, const T* b, int64_t ldb, float* out, int64_t ldo, int64_t rows,
              int64_t columns, int64_t depth) {
  int64_t i = 0;
  for (; i + MR <= rows; i += MR) strip<T, MR>(a + i * lda, lda, b, ldb, out + i * ldo, ldo, columns, depth);
  for (; i + 3 <= rows; i += 3) strip<T, 3>(a + i * lda, lda, b, ldb, out + i * ldo, ldo, columns, depth);
  for (; i < rows; ++i) strip<T, 1>(a + i * lda, lda, b, ldb, out + i * ldo, ldo, columns, depth);
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
void score(const float* query, int64_t rows, int64_t width, const T* keys, int64_t count, float* scores) {
  for (int64_t r = 0; r < rows;) {
    const float* q = query + r * width;
    float* out = scores + r * BLOCK;
    const int64_t left = rows - r;
    if (left >= 4) {
      for (int64_t j = 0; j < count; ++j) dots<T, 4>(q, width, keys + j * width, out + j);
      r += 4;
    } else if (left == 3) {
      for (int64_t j = 0; j < count; ++j) dots<T, 3>(q, width, keys + j * width, out + j);
      r += 3;
    } else if (left == 2) {
      for (int64_t j = 0; j < count; ++j) dots<T, 2>(q, width, keys + j * width, out + j);
      r += 2;
    } else {
      for (int64_t j = 0; j < count; ++j) dots<T, 1>(q, width, keys + j * width, out + j);
      r += 1;
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
  int64_t part, head, first, last, begin, end, scratch;
};

struct Shape {
  int64_t heads, kv_heads, group, width, value_width;
  float scaling, softcap;  // softcap 0: none
};

// The running result of a row: the weighted sum of values, the sum of weights, and the greatest score.
struct Running {
  float* values;
  float* sum;
  float* most;
};

struct Buffers {
  std::vector<float> query, scores, keys, values, running;
};

template <typename T, typename P>
void run(const Item& item, const Part& part, const Shape& shape, const at::Tensor& query, const P* keys,
         const P* values, Buffers& buffers, float* output) {
  const int64_t tokens = item.last - item.first, rows = tokens * shape.group;
  const int64_t D = shape.width, E = shape.value_width;
  const bool few = rows < 8;
  buffers.query.resize(rows * D);
  buffers.scores.resize(rows * BLOCK);
  buffers.keys.resize(D * BLOCK);
  buffers.values.resize(BLOCK * E);
  float* q = buffers.query.data();
  float* scores = buffers.scores.data();
  const T* source = query.const_data_ptr<T>();
  int64_t low = std::numeric_limits<int64_t>::max(), high = 0;
  for (int64_t t = 0; t < tokens; ++t) {
    const int64_t* row = part.rows + (item.first + t) * 3;
    low = std::min(low, row[1]);
    high = std::max(high, row[2]);
    for (int64_t g = 0; g < shape.group; ++g) {
      const T* from = source + (item.head * shape.group + g) * query.stride(1) + row[0] * query.stride(2);
      for (int64_t d = 0; d < D; ++d) q[(t * shape.group + g) * D + d] = Element<T>::one(from + d) * shape.scaling;
    }
  }
  low = std::max(low, item.begin);
  high = std::min(high, item.end);
  float* weighted = output;  // [rows][E], then sums [rows], then maxima [rows]
  float* sums = output + rows * E;
  float* most = sums + rows;
  std::fill(output, output + rows * (E + 1), 0.0f);
  std::fill(most, most + rows, NONE);
  int64_t at = 0;  // place in the context of the stretch's first slot
  for (int64_t s = 0; s < part.stretch_count && at < high; ++s) {
    const int64_t start = part.stretches[2 * s], length = part.stretches[2 * s + 1];
    int64_t from = std::max<int64_t>(0, low - at);
    const int64_t to = std::min(length, high - at);
    for (; from < to; from += BLOCK) {
      const int64_t count = std::min<int64_t>(BLOCK, to - from), place = at + from;
      const P* key = keys + (start + from) * D;
      const P* value = values + (start + from) * E;
      if (few) {
        score<P>(q, rows, D, key, count, scores);
      } else {
        float* turned = buffers.keys.data();
        for (int64_t j = 0; j < count; ++j)
          for (int64_t d = 0; d < D; ++d) turned[d * BLOCK + j] = Element<P>::one(key + j * D + d);
        for (int64_t j = count; j < BLOCK; ++j)
          for (int64_t d = 0; d < D; ++d) turned[d * BLOCK + j] = 0;
        std::fill(scores, scores + rows * BLOCK, 0.0f);
        multiply<float>(q, D, turned, BLOCK, scores, BLOCK, rows, BLOCK, D);
      }
      for (int64_t t = 0; t < tokens; ++t) {
        const int64_t* row = part.rows + (item.first + t) * 3;
        const int64_t first = std::clamp<int64_t>(row[1] - place, 0, count);
        const int64_t last = std::clamp<int64_t>(row[2] - place, 0, count);
        const uint8_t* allowed = part.mask ? part.mask + (item.first + t) * part.length + place : nullptr;
        for (int64_t g = 0; g < shape.group; ++g) {
          const int64_t r = t * shape.group + g;
          float* line = scores + r * BLOCK;
          if (shape.softcap > 0)
            for (int64_t j = 0; j < count; ++j) line[j] = shape.softcap * std::tanh(line[j] / shape.softcap);
          for (int64_t j = 0; j < first; ++j) line[j] = NONE;
          for (int64_t j = last; j < BLOCK; ++j) line[j] = NONE;
          if (allowed)
            for (int64_t j = first; j < last; ++j)
              if (!allowed[j]) line[j] = NONE;
          Vector best = all(NONE);
          Whole strange{};
          for (int64_t j = 0; j < BLOCK; j += W) {
            Vector v = *reinterpret_cast<Loose*>(line + j);
            best = v > best ? v : best;
            strange |= v != v;
          }
          float top = most[r];
          bool odd = false;
          for (int i = 0; i < W; ++i) {
            top = std::max(top, best[i]);
            odd |= strange[i] != 0;
          }
          if (odd) top = std::numeric_limits<float>::quiet_NaN();
          if (top == NONE) {  // nothing seen yet
            std::fill(line, line + BLOCK, 0.0f);
            continue;
          }
          const float shrink = most[r] == NONE ? 0.0f : std::exp(most[r] - top);
          Vector total{};
          for (int64_t j = 0; j < BLOCK; j += W) {
            Loose* v = reinterpret_cast<Loose*>(line + j);
            Vector weight = exponential(*v - top);
            *v = weight;
            total += weight;
          }
          if (odd) std::fill(line + first, line + last, top);
          sums[r] = sums[r] * shrink + (odd ? top : sum(total));
          most[r] = top;
          if (shrink != 1.0f)
            for (int64_t e = 0; e < E; ++e) weighted[r * E + e] *= shrink;
        }
      }
      if (few || sizeof(P) == sizeof(float)) {
        multiply<P>(scores, BLOCK, value, E, weighted, E, rows, E, count);
      } else {
        float* wide = buffers.values.data();
        int64_t i = 0;
        for (; i + W <= count * E; i += W) *reinterpret_cast<Loose*>(wide + i) = Element<P>::load(value + i);
        for (; i < count * E; ++i) wide[i] = Element<P>::one(value + i);
        multiply<float>(scores, BLOCK, wide, E, weighted, E, rows, E, count);
      }
    }
    at += length;
  }
}

// Merge the pieces of each token and head, and write them out.
template <typename T>
void finish(const std::vector<std::vector<std::pair<int64_t, int64_t>>>& pieces, const std::vector<Item>& items,
            const Shape& shape, const float* scratch, const float* sinks, T* output) {
  const int64_t E = shape.value_width, tokens = static_cast<int64_t>(pieces.size());
  at::parallel_for(0, tokens, 8, [&](int64_t begin, int64_t end) {
    std::vector<float> merged(E);
    for (int64_t token = begin; token < end; ++token) {
      for (int64_t head = 0; head < shape.heads; ++head) {
        const int64_t g = head % shape.group;
        float most = sinks ? sinks[head] : NONE, total = sinks ? 1.0f : 0.0f;
        std::fill(merged.begin(), merged.end(), 0.0f);
        for (auto [number, row] : pieces[token]) {
          const Item& item = items[number + head / shape.group];
          const int64_t rows = (item.last - item.first) * shape.group, r = row * shape.group + g;
          const float* found = scratch + item.scratch;
          const float top = found[rows * (E + 1) + r];
          if (top == NONE) continue;
          const float best = std::isnan(top) ? top : std::max(most, top);
          const float old = most == NONE ? 0.0f : std::exp(most - best), now = std::exp(top - best);
          total = total * old + found[rows * E + r] * now;
          for (int64_t e = 0; e < E; ++e) merged[e] = merged[e] * old + found[r * E + e] * now;
          most = best;
        }
        T* to = output + (token * shape.heads + head) * E;
        for (int64_t e = 0; e < E; ++e) to[e] = Element<T>::rounded(merged[e] / total);
      }
    }
  });
}

template <typename T, typename P>
void attend_as(const at::Tensor& query, const at::Tensor& key, const at::Tensor& value, at::Tensor& keys,
               at::Tensor& values, const at::Tensor& table, const at::Tensor& mask, const float* sinks, Shape shape,
               at::Tensor& output) {
  const int64_t* head = table.const_data_ptr<int64_t>();
  const int64_t part_count = head[0];
  const int64_t *parts_at = head + head[1], *rows_at = head + head[2], *stretches_at = head + head[3];
  const int64_t* slots = head + head[4];
  const int64_t n = query.size(2), D = shape.width, E = shape.value_width, S = keys.size(2);
  P* pool_keys = keys.data_ptr<P>();
  P* pool_values = values.data_ptr<P>();
  for (int64_t h = 0; h < shape.kv_heads; ++h)
    for (int64_t i = 0; i < n; ++i) {
      const T* k = key.const_data_ptr<T>() + h * key.stride(1) + i * key.stride(2);
      const T* v = value.const_data_ptr<T>() + h * value.stride(1) + i * value.stride(2);
      P* kept_key = pool_keys + (h * S + slots[i]) * D;
      P* kept_value = pool_values + (h * S + slots[i]) * E;
      for (int64_t d = 0; d < D; ++d) kept_key[d] = Element<P>::rounded(Element<T>::one(k + d));
      for (int64_t e = 0; e < E; ++e) kept_value[e] = Element<P>::rounded(Element<T>::one(v + e));
    }
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
  std::vector<std::vector<std::pair<int64_t, int64_t>>> pieces(n);  // token -> (item of head 0, row there)
  int64_t scratch = 0;
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
        for (int64_t t = first; t < last; ++t) pieces[part.rows[3 * t]].emplace_back(items.size(), t - first);
        for (int64_t h = 0; h < shape.kv_heads; ++h) {
          items.push_back({p, h, first, last, begin, std::min(high, begin + piece), scratch});
          scratch += (last - first) * shape.group * (E + 2);
        }
      }
    }
  }
  static thread_local std::vector<float> found;
  if (static_cast<int64_t>(found.size()) < scratch) found.resize(scratch);
  float* results = found.data();
  std::atomic<size_t> next{0};
  at::parallel_for(0, threads, 1, [&](int64_t, int64_t) {
    static thread_local Buffers buffers;
    for (size_t i; (i = next.fetch_add(1)) < items.size();) {
      const Item& item = items[i];
      run<T, P>(item, parts[item.part], shape, query, pool_keys + item.head * S * D, pool_values + item.head * S * E,
             buffers, results + item.scratch);
    }
  });
  finish<T>(pieces, items, shape, results, sinks, output.data_ptr<T>());
}

at::Tensor attend(const at::Tensor& query_, const at::Tensor& key_, const at::Tensor& value_, at::Tensor keys,
                  at::Tensor values, const at::Tensor& table, const at::Tensor& mask,
                  const std::optional<at::Tensor>& sinks, double scaling, double softcap) {
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
  auto with = [&](auto pool) {
    using P = decltype(pool);
    if (query.scalar_type() == keys.scalar_type())
      attend_as<P, P>(query, key, value, keys, values, table, mask, given, shape, output);
    else
      attend_as<float, P>(query, key, value, keys, values, table, mask, given, shape, output);
  };
  TORCH_CHECK(query.scalar_type() == at::kFloat || query.scalar_type() == keys.scalar_type(),
              "unspool::attend takes queries of float32 or of the pool's dtype, not ", query.scalar_type());
  switch (keys.scalar_type()) {
    case at::kFloat:
      with(float{});
      break;
    case at::kBFloat16:
      with(at::BFloat16{});
      break;
    case at::kHalf:
      with(at::Half{});
      break;
    default:
      TORCH_CHECK(false, "unspool::attend keeps float32, bfloat16 and float16, not ", keys.scalar_type());
  }
  return output;
}

}  // namespace

TORCH_LIBRARY_FRAGMENT(unspool, library) {
  library.def(
      "attend(Tensor query, Tensor key, Tensor value, Tensor(a!) keys, Tensor(b!) values, Tensor table, Tensor mask, "
      "Tensor? sinks, float scaling, float softcap) -> Tensor");
}

TORCH_LIBRARY_IMPL(unspool, CPU, library) { library.impl("attend", attend); }

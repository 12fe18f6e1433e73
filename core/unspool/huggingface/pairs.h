// The two products of attention where pairs of bfloat16 numbers are multiplied: of queries with keys, and where the
// processor has tiles (`tiles.h`), of weights with values. The products are exact, and all sums float32; a weight is
// split into two bfloat16 numbers, which leaves out a hundred-thousandth of it.
#pragma once

#include <algorithm>
#include <cstdint>
#include <cstring>

#include "tiles.h"
#include "vectors.h"

namespace unspool {

constexpr int BLOCK = 64;  // keys that are scored together
constexpr int MR = 6;      // rows in a register tile

constexpr int64_t up_to(int64_t n, int64_t unit) { return (n + unit - 1) / unit * unit; }

// What memory is asked for while something else is computed, since a decode step waits for little else: a block that is
// read soon. It comes into the second cache; the first takes so few requests at a time that it would wait for them.
template <typename T>
struct Ahead {
  const T* from;
  int64_t left, step;  // numbers

  // Of so many rows in a block, to be asked for while so many others are computed.
  static Ahead of(const T* block, int64_t rows, int64_t width, int64_t meanwhile) {
    return {block, rows * width, (rows + meanwhile - 1) / std::max<int64_t>(1, meanwhile) * width};
  }

  // Ask for some more.
  void fetch() {
    if (left <= 0) return;
    for (int64_t at = 0; at < step; at += 64 / sizeof(T)) __builtin_prefetch(from + at, 0, 2);
    from += step;
    left -= step;
  }
};

#if defined(__AVX512BF16__)
// The scores of a few rows with a block of keys, 16 of these a time.
inline void score_few(const at::BFloat16* query, int64_t rows, int64_t width, const at::BFloat16* keys, int64_t count,
                      float scaling, Ahead<at::BFloat16>& ahead, float* scores) {
  for (int64_t j = 0; j < count; j += W) {
    const at::BFloat16* key[W];
    for (int i = 0; i < W; ++i) key[i] = keys + std::min(j + i, count - 1) * width;
    for (int64_t r = 0; r < rows; ++r) {
      Vector total[W] = {};
      for (int64_t d = 0; d < width; d += 2 * W)
        for (int i = 0; i < W; ++i) total[i] = paired(total[i], query + r * width + d, key[i] + d);
      for (int64_t i = r * W / rows; i < (r + 1) * W / rows; ++i) ahead.fetch();
      *reinterpret_cast<Loose*>(scores + r * BLOCK + j) = sums<W>(total) * scaling;
    }
  }
}

// Lay a block of keys out: `turned[d][j]` is the pair of numbers 2d, 2d + 1 of key j.
inline void turn(const at::BFloat16* keys, int64_t width, int64_t count, Ahead<at::BFloat16>& ahead, int32_t* turned) {
  for (int64_t j = 0; j < BLOCK; j += W) {
    for (int64_t i = j; i < std::min(j + W, count); ++i) ahead.fetch();
    for (int64_t d = 0; d < width / 2; d += W) {
      __m512i v[W], w[W];
      for (int i = 0; i < W; ++i)
        v[i] = j + i < count ? _mm512_loadu_si512(keys + (j + i) * width + 2 * d) : _mm512_setzero_si512();
      for (int i = 0; i < W; i += 2) {
        w[i] = _mm512_unpacklo_epi32(v[i], v[i + 1]);
        w[i + 1] = _mm512_unpackhi_epi32(v[i], v[i + 1]);
      }
      for (int i = 0; i < W; i += 4)
        for (int k = 0; k < 2; ++k) {
          v[i + 2 * k] = _mm512_unpacklo_epi64(w[i + k], w[i + 2 + k]);
          v[i + 2 * k + 1] = _mm512_unpackhi_epi64(w[i + k], w[i + 2 + k]);
        }
      for (int i = 0; i < 4; ++i)  // v[4g + i]: of keys 4g to 4g + 3 the pairs i, 4 + i, 8 + i, 12 + i
        for (int k = 0; k < 2; ++k) {
          w[i + 8 * k] = _mm512_shuffle_i32x4(v[8 * k + i], v[8 * k + 4 + i], 0x88);
          w[i + 8 * k + 4] = _mm512_shuffle_i32x4(v[8 * k + i], v[8 * k + 4 + i], 0xdd);
        }
      for (int i = 0; i < 8; ++i) {  // w[i] and w[i + 8]: the pairs i and 8 + i, of keys 0 to 7 and 8 to 15
        _mm512_storeu_si512(turned + (d + i) * BLOCK + j, _mm512_shuffle_i32x4(w[i], w[i + 8], 0x88));
        _mm512_storeu_si512(turned + (d + 8 + i) * BLOCK + j, _mm512_shuffle_i32x4(w[i], w[i + 8], 0xdd));
      }
    }
  }
}

// The scores of M rows with 16 V keys that are laid out.
template <int M, int V>
inline void tile_of_pairs(const at::BFloat16* query, int64_t width, const int32_t* turned, float scaling,
                          float* scores) {
  Vector total[M][V];
  for (int i = 0; i < M; ++i)
    for (int v = 0; v < V; ++v) total[i][v] = Vector{};  // `= {}` above would be a call
  for (int64_t d = 0; d < width; d += 2) {
    __m512i pairs[V];
    for (int v = 0; v < V; ++v) pairs[v] = _mm512_loadu_si512(turned + d / 2 * BLOCK + v * W);
    for (int i = 0; i < M; ++i) {
      int32_t pair;
      std::memcpy(&pair, query + i * width + d, sizeof pair);
      const __m512i factor = _mm512_set1_epi32(pair);
      for (int v = 0; v < V; ++v) total[i][v] = paired(total[i][v], factor, pairs[v]);
    }
  }
  for (int i = 0; i < M; ++i)
    for (int v = 0; v < V; ++v) *reinterpret_cast<Loose*>(scores + i * BLOCK + v * W) = total[i][v] * scaling;
}

inline void score_many(const at::BFloat16* query, int64_t rows, int64_t width, const int32_t* turned, int64_t count,
                       float scaling, float* scores) {
  auto strips = [&](auto tiles, auto three, auto tile, int64_t j) {
    int64_t r = 0;
    for (; r + MR <= rows; r += MR) tiles(query + r * width, width, turned + j, scaling, scores + r * BLOCK + j);
    for (; r + 3 <= rows; r += 3) three(query + r * width, width, turned + j, scaling, scores + r * BLOCK + j);
    for (; r < rows; ++r) tile(query + r * width, width, turned + j, scaling, scores + r * BLOCK + j);
  };
  if (count + W > BLOCK)
    strips(tile_of_pairs<MR, BLOCK / W>, tile_of_pairs<3, BLOCK / W>, tile_of_pairs<1, BLOCK / W>, 0);
  else
    for (int64_t j = 0; j < count; j += W) strips(tile_of_pairs<MR, 1>, tile_of_pairs<3, 1>, tile_of_pairs<1, 1>, j);
}
#else
inline void score_few(const at::BFloat16*, int64_t, int64_t, const at::BFloat16*, int64_t, float, Ahead<at::BFloat16>&,
                      float*) {}
inline void turn(const at::BFloat16*, int64_t, int64_t, Ahead<at::BFloat16>&, int32_t*) {}
inline void score_many(const at::BFloat16*, int64_t, int64_t, const int32_t*, int64_t, float, float*) {}
#endif

#if defined(UNSPOOL_TILES)
// Weights of rows with a block of keys, split: what is nearest to them, [rows][64], then what is left of them.
class Split {
 public:
  static constexpr int AT_ONCE = 2;                    // vectors
  static constexpr float UNIT = 1.44269504088896341f;  // of the exponents, which are those of 2

  Split(at::BFloat16* halves, int64_t rows) : halves_(halves), rests_(halves + rows * BLOCK) {}

  // 2 to the power of x <= 0 to within 2e-7, a fortieth of what a split weight leaves out; below -126 it is 0.
  static Vector of(Vector x) {
    const auto given = reinterpret_cast<__m512>(x);
    const __mmask16 normal = _mm512_cmp_ps_mask(given, _mm512_set1_ps(-126.0f), _CMP_NLT_UQ);  // or no number
    const __m512 whole = _mm512_roundscale_ps(given, _MM_FROUND_TO_NEAREST_INT);
    const Vector r = x - reinterpret_cast<Vector>(whole);
    Vector y = r * 1.3276379e-3f + 9.6755102e-3f;
    y = y * r + 5.5507131e-2f;
    y = y * r + 2.4022120e-1f;
    y = y * r + 6.9314694e-1f;
    y = y * r + 1.0f;
    return reinterpret_cast<Vector>(_mm512_maskz_scalef_ps(normal, reinterpret_cast<__m512>(y), whole));
  }

  void keep(int64_t at, const Vector* weight) const {
    const Vector first = nearest(weight[0]), second = nearest(weight[1]);
    store(halves_ + at, first, second);
    store(rests_ + at, weight[0] - first, weight[1] - second);
  }

 private:
  // The nearest bfloat16 number; of what is no number, that or infinity.
  static Vector nearest(Vector v) {
    const __m512i bits = _mm512_add_epi32(reinterpret_cast<__m512i>(v), _mm512_set1_epi32(0x8000));
    return reinterpret_cast<Vector>(_mm512_and_si512(bits, _mm512_set1_epi32(-0x10000)));
  }

  static void store(at::BFloat16* to, Vector first, Vector second) {
    const auto both = _mm512_cvtne2ps_pbh(reinterpret_cast<__m512>(second), reinterpret_cast<__m512>(first));
    _mm512_storeu_si512(to, reinterpret_cast<__m512i>(both));
  }

  at::BFloat16 *halves_, *rests_;
};

// Lay a block of values out: `pairs[k][e]` is the pair of column e of the keys 2k and 2k + 1.
inline void pair_up(const at::BFloat16* values, int64_t width, int64_t count, Ahead<at::BFloat16>& ahead,
                    int32_t* pairs) {
  for (int64_t k = 0; k < up_to(count, tiles::DEEP); k += 2)
    for (int64_t e = 0; e < width; e += W) {
      auto half = [&](int64_t key) {
        return key < count ? _mm512_cvtepu16_epi32(_mm256_loadu_si256(
                                 reinterpret_cast<const __m256i*>(values + key * width + e)))
                           : __m512i{};
      };
      if (e < 2 * W) ahead.fetch();
      _mm512_storeu_si512(pairs + k / 2 * width + e, _mm512_or_si512(half(k), _mm512_slli_epi32(half(k + 1), 16)));
    }
}

// Multiplies by tiles: up to 32 rows with 32 columns at once.
class Tiles {
 public:
  // The scores of rows with keys that are laid out by `turn`; not scaled.
  void score(const at::BFloat16* query, int64_t rows, int64_t width, const int32_t* turned, int64_t count,
             float* scores) {
    each(rows, [&](int64_t r, bool second) {
      for (int64_t j = 0; j < count; j += 2 * W) {
        tiles::clear();
        for (int64_t d = 0; d < width; d += tiles::DEEP) {
          const int32_t* columns = turned + d / 2 * BLOCK + j;
          tiles::take(columns, columns + W, BLOCK * sizeof *columns);
          tiles::multiply(query + r * width + d, width, second);
        }
        tiles::keep(scores + r * BLOCK + j, BLOCK, second);
      }
    });
  }

  // Add up values, laid out by `pair_up`, by weights that were split: [rows][width]. `first`: there is nothing yet.
  void add(const at::BFloat16* weights, int64_t rows, const int32_t* pairs, int64_t count, int64_t width, bool first,
           float* weighted) {
    each(rows, [&](int64_t r, bool second) {
      for (int64_t e = 0; e < width; e += 2 * W) {
        float* sums = weighted + r * width + e;
        first ? tiles::clear() : tiles::resume(sums, width, second);
        for (int64_t k = 0; k < count; k += tiles::DEEP) {
          const int32_t* columns = pairs + k / 2 * width + e;
          tiles::take(columns, columns + W, width * sizeof *columns);
          for (const at::BFloat16* part : {weights, weights + rows * BLOCK})
            tiles::multiply(part + r * BLOCK + k, BLOCK, second);
        }
        tiles::keep(sums, width, second);
      }
    });
  }

 private:
  template <typename What>
  void each(int64_t rows, What what) {
    tiles::written();
    for (int64_t r = 0; r < rows; r += 2 * tiles::ROWS) {
      const int64_t here = std::min(rows - r, 2 * tiles::ROWS);
      shaped_.hold(here);
      what(r, here > tiles::ROWS);
    }
  }

  tiles::Shaped shaped_;
};
#else
struct Split {
  static constexpr int AT_ONCE = 2;
  static constexpr float UNIT = 1.0f;
  Split(at::BFloat16*, int64_t) {}
  static Vector of(Vector x) { return x; }
  void keep(int64_t, const Vector*) const {}
};
inline void pair_up(const at::BFloat16*, int64_t, int64_t, Ahead<at::BFloat16>&, int32_t*) {}

struct Tiles {
  void score(const at::BFloat16*, int64_t, int64_t, const int32_t*, int64_t, float*) {}
  void add(const at::BFloat16*, int64_t, const int32_t*, int64_t, int64_t, bool, float*) {}
};
#endif

}  // namespace unspool

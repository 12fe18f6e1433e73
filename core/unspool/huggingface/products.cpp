// Products of any number of rows with a matrix of weights that lies as these read it: bfloat16, or 8-bit integers.
//
// Few rows cost what reading the weights does, many what multiplying does. Of the output 32 columns are computed at once,
// for up to 12 rows: 24 sums, which are all that the registers hold. Their weights, a *group*, lie in the order in which
// they are read, and memory is asked for them a little ahead, so it gives them as fast as it can. Each column of a group
// is read as pairs (`vectors.h`), against which a pair of each row is multiplied. An integer of 8 bits becomes the
// bfloat16 number of its value by looking its two bytes up, which is quicker than memory gives the next.
//
// All sums are float32, and each runs over the row in the same order, however many rows there are: a row's product is the
// same to the last bit beside any others. There are no such operators where the processor does not multiply pairs, or has
// no tables of bytes.

#include <ATen/Parallel.h>
#include <ATen/ops/constant_pad_nd.h>
#include <ATen/ops/empty.h>
#include <torch/library.h>

#include <algorithm>
#include <cstdint>
#include <cstring>
#include <optional>
#include <type_traits>
#include <vector>

#include "vectors.h"

#if defined(__AVX512BF16__) && defined(__AVX512VBMI__)
namespace {

using namespace unspool;

constexpr int64_t VECTORS = 2;            // of sums beside each other
constexpr int64_t COLUMNS = VECTORS * W;  // in a group
constexpr int64_t TALL = 12;              // rows whose sums the registers hold
constexpr int64_t STRIDE = 8;             // numbers of a row that are multiplied in a round
constexpr int64_t LINE = 64;              // bytes that memory gives at once
constexpr int64_t AHEAD = 6144;           // bytes

// Lay weights out, [width, depth] to [groups, ...]: 32 columns a group, the last of them filled up with zeros.
at::Tensor lay_out(const at::Tensor& weight) {
  const int64_t width = weight.size(0), depth = weight.size(1), groups = (width + COLUMNS - 1) / COLUMNS;
  TORCH_CHECK(depth % STRIDE == 0, "unspool::lay_out takes rows of a multiple of ", STRIDE, " numbers, not ", depth);
  const at::Tensor whole = at::constant_pad_nd(weight, {0, 0, 0, groups * COLUMNS - width});
  if (weight.scalar_type() == at::kBFloat16)  // a pair of each column, then the next pair
    return whole.view({groups, COLUMNS, depth / 2, 2}).permute({0, 2, 1, 3}).contiguous();
  TORCH_CHECK(weight.scalar_type() == at::kChar, "unspool::lay_out takes bfloat16 or int8, not ", weight.scalar_type());
  TORCH_CHECK(whole.ge(-127).all().item<bool>(), "unspool::lay_out takes whole numbers from -127 to 127, not -128");
  // Sign and magnitude, and in each quarter of a vector two pairs of four columns: that is how bytes are interleaved.
  const at::Tensor bytes = whole.abs().to(at::kByte).bitwise_or(whole.lt(0).to(at::kByte).mul(128));
  return bytes.view({groups, VECTORS, 4, W / 4, depth / 4, 2, 2}).permute({0, 4, 1, 2, 5, 3, 6}).contiguous();
}

// How weights of a group are read: `AT_ONCE` pairs of each column together.
struct Halves {
  using Stored = at::BFloat16;
  static constexpr int AT_ONCE = 1;
  static void read(const Stored* from, __m512i pairs[AT_ONCE][VECTORS]) {
    for (int v = 0; v < VECTORS; ++v) pairs[0][v] = _mm512_loadu_si512(from + v * 2 * W);
  }
};

// The two bytes of each bfloat16 number from 0 to 127.
struct Table {
  uint8_t low[128], high[128];

  Table() {
    for (int i = 0; i < 128; ++i) {
      const uint16_t bits = at::BFloat16(static_cast<float>(i)).x;
      low[i] = bits & 255;
      high[i] = bits >> 8;
    }
  }
};
const Table TABLE;

struct Bytes {
  using Stored = uint8_t;
  static constexpr int AT_ONCE = 2;
  static void read(const Stored* from, __m512i pairs[AT_ONCE][VECTORS]) {
    for (int v = 0; v < VECTORS; ++v) {
      const __m512i stored = _mm512_loadu_si512(from + v * LINE);
      const __m512i low = found(TABLE.low, stored), magnitude = found(TABLE.high, stored);
      const __m512i high = _mm512_or_si512(magnitude, _mm512_and_si512(stored, _mm512_set1_epi8(-128)));
      pairs[0][v] = _mm512_unpacklo_epi8(low, high);
      pairs[1][v] = _mm512_unpackhi_epi8(low, high);
    }
  }

  static __m512i found(const uint8_t* table, __m512i which) {  // by the lowest seven bits of each byte
    return _mm512_permutex2var_epi8(_mm512_loadu_si512(table), which, _mm512_loadu_si512(table + LINE));
  }
};

// What becomes of the sums of a group's columns, unless nothing does.
struct Finish {
  bool any;
  float scale[COLUMNS], bias[COLUMNS];

  Finish(const float* scales, const at::BFloat16* biases, int64_t first, int64_t columns) : any(scales || biases) {
    for (int64_t n = 0; any && n < COLUMNS; ++n) {
      scale[n] = scales && n < columns ? scales[first + n] : 1.0f;
      bias[n] = biases && n < columns ? static_cast<float>(biases[first + n]) : 0.0f;
    }
  }

  // Of the vector of columns from n.
  Vector of(Vector sum, int n) const {
    if (!any) return sum;
    return sum * *reinterpret_cast<const Loose*>(scale + n) + *reinterpret_cast<const Loose*>(bias + n);
  }
};

// Ask memory for what a round reads some rounds later. It comes into the second cache.
template <typename Stored>
inline void ask(const Stored* round) {
  for (size_t at = 0; at < STRIDE * COLUMNS * sizeof(Stored); at += LINE)
    __builtin_prefetch(reinterpret_cast<const char*>(round) + AHEAD + at, 0, 2);
}

// The products of R rows with a group, of which so many columns are wanted. Unless it was read before, it is asked for.
template <typename Weights, int R>
void tile(const at::BFloat16* rows, int64_t depth, const typename Weights::Stored* group, bool near,
          const Finish& finish, int64_t columns, at::BFloat16* output, int64_t width) {
  Vector total[R][VECTORS];
  for (int r = 0; r < R; ++r)
    for (int v = 0; v < VECTORS; ++v) total[r][v] = Vector{};  // `= {}` above would be a call
  for (const at::BFloat16* x = rows; x < rows + depth; x += STRIDE, group += STRIDE * COLUMNS) {
    if (!near) ask(group);
    for (int k = 0; k < STRIDE; k += 2 * Weights::AT_ONCE) {
      __m512i pairs[Weights::AT_ONCE][VECTORS];
      Weights::read(group + k * COLUMNS, pairs);
      for (int i = 0; i < Weights::AT_ONCE; ++i)
        for (int r = 0; r < R; ++r) {
          int32_t pair;
          std::memcpy(&pair, x + r * depth + k + 2 * i, sizeof pair);
          const __m512i factor = _mm512_set1_epi32(pair);
          for (int v = 0; v < VECTORS; ++v) total[r][v] = paired(total[r][v], pairs[i][v], factor);
        }
    }
  }
  for (int r = 0; r < R; ++r)
    for (int v = 0; v < VECTORS && v * W < columns; ++v) {
      const int64_t left = std::min<int64_t>(W, columns - v * W);
      const auto halves = reinterpret_cast<__m256i>(halved(finish.of(total[r][v], v * W)));
      _mm256_mask_storeu_epi16(output + r * width + v * W, (1u << left) - 1, halves);
    }
}

template <typename Weights, typename... Arguments>
void tile_of(int64_t count, const Arguments&... arguments) {
  static_assert(TALL == 12);
  constexpr decltype(&tile<Weights, 1>) tiles[] = {
      tile<Weights, 1>, tile<Weights, 2>, tile<Weights, 3>, tile<Weights, 4>,  tile<Weights, 5>,  tile<Weights, 6>,
      tile<Weights, 7>, tile<Weights, 8>, tile<Weights, 9>, tile<Weights, 10>, tile<Weights, 11>, tile<Weights, 12>};
  tiles[count - 1](arguments...);
}

// Turn the integers of a group to bfloat16, which pays where several tiles read it.
const at::BFloat16* turned(const uint8_t* group, int64_t depth) {
  static thread_local std::vector<at::BFloat16> halves;
  halves.resize(depth * COLUMNS);
  for (int64_t k = 0; k < depth; k += 2 * Bytes::AT_ONCE) {
    if (k % STRIDE == 0) ask(group + k * COLUMNS);
    __m512i pairs[Bytes::AT_ONCE][VECTORS];
    Bytes::read(group + k * COLUMNS, pairs);
    std::memcpy(static_cast<void*>(halves.data() + k * COLUMNS), pairs, sizeof pairs);
  }
  return halves.data();
}

template <typename Weights>
void multiply(const at::Tensor& x, const at::Tensor& laid, const float* scales, const at::BFloat16* biases,
              at::Tensor& output) {
  using Stored = typename Weights::Stored;
  const int64_t count = x.size(0), depth = x.size(1), width = output.size(1), groups = laid.size(0);
  const at::BFloat16* rows = x.const_data_ptr<at::BFloat16>();
  const Stored* weights = laid.const_data_ptr<Stored>();
  at::BFloat16* to = output.data_ptr<at::BFloat16>();
  // Where there are too few groups for all threads, each is multiplied with several shares of the rows.
  const int64_t fair = 4 * at::get_num_threads(), most = (count + TALL - 1) / TALL;
  const int64_t shares = groups >= fair ? 1 : std::min(most, (fair + groups - 1) / groups);
  at::parallel_for(0, groups * shares, 1, [&](int64_t begin, int64_t end) {
    for (int64_t task = begin; task < end; ++task) {
      const int64_t first = task / shares * COLUMNS, share = task % shares, columns = std::min(COLUMNS, width - first);
      const int64_t start = count * share / shares, here = count * (share + 1) / shares - start;
      const int64_t tiles = (here + TALL - 1) / TALL;
      const Finish finish(scales, biases, first, columns);
      const Stored* group = weights + first * depth;
      auto all = [&](auto kind, const auto* group, bool near) {
        for (int64_t t = 0; t < tiles; ++t) {
          const int64_t row = start + here * t / tiles, rest = start + here * (t + 1) / tiles - row;
          tile_of<decltype(kind)>(rest, rows + row * depth, depth, group, near || t, finish, columns,
                                  to + row * width + first, width);
        }
      };
      if constexpr (std::is_same_v<Weights, Bytes>) {
        if (tiles > 1) {
          all(Halves{}, turned(group, depth), true);
          continue;
        }
      }
      all(Weights{}, group, false);
    }
  });
}

// x [n, depth] times a laid out weight [width, depth] transposed, times scale [width], plus bias [width].
at::Tensor project(const at::Tensor& x_, const at::Tensor& laid_, const std::optional<at::Tensor>& scale_,
                   const std::optional<at::Tensor>& bias_, int64_t width) {
  const at::Tensor x = x_.contiguous(), laid = laid_.contiguous();
  const int64_t depth = x.size(1), groups = laid.size(0);
  TORCH_CHECK(x.scalar_type() == at::kBFloat16, "unspool::project takes rows of bfloat16, not ", x.scalar_type());
  TORCH_CHECK(laid.numel() == groups * COLUMNS * depth, "unspool::project takes weights that are laid out for ",
              "rows of ", depth, " numbers");
  TORCH_CHECK(width > (groups - 1) * COLUMNS && width <= groups * COLUMNS, "unspool::project has ", groups * COLUMNS,
              " columns, not ", width);
  const at::Tensor scale = scale_ ? scale_->contiguous() : at::Tensor();
  const at::Tensor bias = bias_ ? bias_->contiguous() : at::Tensor();
  TORCH_CHECK((!scale_ || scale.numel() == width) && (!bias_ || bias.numel() == width),
              "unspool::project takes a scale and a bias of ", width, " numbers");
  const float* scales = scale_ ? scale.const_data_ptr<float>() : nullptr;
  const at::BFloat16* biases = bias_ ? bias.const_data_ptr<at::BFloat16>() : nullptr;
  at::Tensor output = at::empty({x.size(0), width}, x.options());
  if (laid.scalar_type() == at::kByte)
    multiply<Bytes>(x, laid, scales, biases, output);
  else
    multiply<Halves>(x, laid, scales, biases, output);
  return output;
}

}  // namespace

TORCH_LIBRARY_FRAGMENT(unspool, library) {
  library.def("lay_out(Tensor weight) -> Tensor");
  library.def("project(Tensor x, Tensor laid, Tensor? scale, Tensor? bias, int width) -> Tensor");
}

TORCH_LIBRARY_IMPL(unspool, CPU, library) {
  library.impl("lay_out", lay_out);
  library.impl("project", project);
}
#endif

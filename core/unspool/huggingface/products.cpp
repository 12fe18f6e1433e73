// Products of any number of rows with a matrix of weights that lies as these read it: bfloat16, or 8-bit integers.
//
// Few rows cost what reading the weights does, many what multiplying does. Of the output 32 columns are computed at once,
// for up to 12 rows: 24 sums, which are all that the registers hold. Their weights, a *group*, lie in the order in which
// they are read, and memory is asked for them a little ahead, so it gives them as fast as it can. Each column of a group
// is read as pairs (`vectors.h`), against which a pair of each row is multiplied.
//
// Weights of bfloat16 are kept in 12 bits, exactly: a sign and 7 bits of fraction, and a code of 4 bits for the exponent.
// The weights of a group have few exponents: of numbers of a normal distribution 15 are all but one in ten thousand. The
// rest, *strays*, are kept beside the group. (Lossless codes for exponents: Zhang et al. 2025, "70% Size, 100% Accuracy",
// https://arxiv.org/abs/2504.11651; theirs have no fixed length.) A code becomes the two bytes of its exponent, and an
// integer of 8 bits those of the bfloat16 number of its value, by looking them up, which is quicker than memory gives the
// next.
//
// The two products of a gated unit (Shazeer 2020, https://arxiv.org/abs/2002.05202: silu of the one times the other) are made
// group beside group, and joined before they are written down.
//
// Where the processor has tiles (`tiles.h`), up to 32 rows are multiplied with a group at once. Its weights are written down
// as tiles just before, once for all rows that a thread has. What is left to do with the sums is done while the next rows, or
// the next group, are multiplied.
//
// All sums are float32, and each runs over the row in the same order, however many rows there are: a row's product is the
// same to the last bit beside any others. There are no such operators where the processor does not multiply pairs, or has
// no tables of bytes.

#include <ATen/ops/constant_pad_nd.h>
#include <ATen/ops/empty.h>
#include <ATen/ops/zeros.h>
#include <torch/csrc/inductor/aoti_torch/utils.h>
#include <torch/library.h>

#include <algorithm>
#include <cstdint>
#include <cstring>
#include <numeric>
#include <optional>
#include <type_traits>
#include <vector>

#include "tiles.h"
#include "vectors.h"
#include "work.h"

#if defined(__AVX512BF16__) && defined(__AVX512VBMI__)
namespace {

using namespace unspool;

constexpr int64_t VECTORS = 2;            // of sums beside each other
constexpr int64_t COLUMNS = VECTORS * W;  // in a group
constexpr int64_t TALL = 12;              // rows whose sums the registers hold
constexpr int64_t MOST = 32;              // rows whose sums tiles hold
constexpr int64_t LEAST = 2;              // rows of them that are finished at once
constexpr int64_t STRIDE = 8;             // numbers of a row that are multiplied in a round
constexpr int64_t LINE = 64;              // bytes that memory gives at once
constexpr int64_t AHEAD = 6144;           // bytes
constexpr int64_t APART = 2;              // times as many for each thread, from which on each has rows of its own,
constexpr int64_t TILES_APART = 8;        // or with tiles, which need weights turned for each thread,
constexpr int64_t TOGETHER = 1 << 20;     // if all rows are so many bytes
constexpr int64_t RARE = 16;              // places of a row for each stray that a group may have

// How weights of a group are read: `AT_ONCE` pairs of each column together, from a *block*.
struct Halves {
  static constexpr int AT_ONCE = 1;
  static constexpr int64_t HEAD = 0, BLOCK = VECTORS * LINE;  // bytes

  explicit Halves(const char*) {}

  void read(const char* block, __m512i pairs[AT_ONCE][VECTORS]) const {
    for (int v = 0; v < VECTORS; ++v) pairs[0][v] = _mm512_loadu_si512(block + v * LINE);
  }
};

// The two bytes of each bfloat16 number from 0 to 63. From 64 to 127 the lower one is twice the number and the upper one
// always the same: to look bytes up among 128 takes some processors three steps, among 64 one.
struct Table {
  static constexpr char BEYOND = 0x42;
  uint8_t low[LINE], high[LINE];

  Table() {
    for (int i = 0; i < LINE; ++i) {
      const uint16_t bits = at::BFloat16(static_cast<float>(i)).x;
      low[i] = bits & 255;
      high[i] = bits >> 8;
    }
  }
};
const Table TABLE;

struct Bytes {
  static constexpr int AT_ONCE = 2;
  static constexpr int64_t HEAD = 0, BLOCK = VECTORS * LINE;

  explicit Bytes(const char*) : low_(_mm512_loadu_si512(TABLE.low)), high_(_mm512_loadu_si512(TABLE.high)) {}

  void read(const char* block, __m512i pairs[AT_ONCE][VECTORS]) const {
    for (int v = 0; v < VECTORS; ++v) {
      const __m512i stored = _mm512_loadu_si512(block + v * LINE), twice = _mm512_add_epi8(stored, stored);
      const __mmask64 in_table = ~_mm512_movepi8_mask(twice);
      const __m512i low = _mm512_mask_permutexvar_epi8(twice, in_table, stored, low_);
      const __m512i beyond = _mm512_set1_epi8(Table::BEYOND), sign = _mm512_set1_epi8(-128);
      const __m512i magnitude = _mm512_mask_permutexvar_epi8(beyond, in_table, stored, high_);
      const __m512i high = _mm512_or_si512(magnitude, _mm512_and_si512(stored, sign));
      pairs[0][v] = _mm512_unpacklo_epi8(low, high);
      pairs[1][v] = _mm512_unpackhi_epi8(low, high);
    }
  }

 private:
  __m512i low_, high_;
};

constexpr int CODES = 16;

// What a group of codes begins with.
struct Head {
  uint8_t low[CODES], high[CODES];  // bytes of the bfloat16 number that has an exponent and nothing else
  int32_t depth, strays;            // numbers in a row; how many lie behind the blocks
  char unused[24];
};
static_assert(sizeof(Head) == LINE);

// A weight whose exponent has no code. It lies as a zero among the others, so beside an infinite number of a row the sum
// becomes NaN, not infinite; but in tiles it is put in its place.
struct Stray {
  int32_t place;  // in the row
  uint16_t column;
  at::BFloat16 weight;
};
static_assert(sizeof(Stray) == 8);

// A block is the codes of two pairs of each column, four bits each, then signs and fractions of one pair and of the other.
struct Coded {
  static constexpr int AT_ONCE = 2;
  static constexpr int64_t HEAD = sizeof(Head), BLOCK = 3 * LINE;

  explicit Coded(const char* group)
      : low_(four(reinterpret_cast<const Head*>(group)->low)), high_(four(reinterpret_cast<const Head*>(group)->high)) {}

  void read(const char* block, __m512i pairs[AT_ONCE][VECTORS]) const {
    static_assert(VECTORS == 2);
    const __m512i codes = _mm512_loadu_si512(block), nibble = _mm512_set1_epi8(15);
    for (int i = 0; i < AT_ONCE; ++i) {
      const __m512i code = _mm512_and_si512(i ? _mm512_srli_epi16(codes, 4) : codes, nibble);
      const __m512i stored = _mm512_loadu_si512(block + (1 + i) * LINE), sign = _mm512_set1_epi8(-128);
      const __m512i low = _mm512_or_si512(_mm512_andnot_si512(sign, stored), _mm512_shuffle_epi8(low_, code));
      const __m512i high = _mm512_or_si512(_mm512_and_si512(sign, stored), _mm512_shuffle_epi8(high_, code));
      pairs[i][0] = _mm512_unpacklo_epi8(low, high);
      pairs[i][1] = _mm512_unpackhi_epi8(low, high);
    }
  }

  // Where in a vector of the first pairs, or of the second, the byte of one of a column's two numbers lies.
  static int64_t within(int64_t column, int64_t number) {
    return column % W / 4 * 16 + column / W * 8 + column % 4 * 2 + number;
  }

 private:
  static __m512i four(const uint8_t* table) {  // a copy for each quarter of a vector
    return _mm512_broadcast_i32x4(_mm_loadu_si128(reinterpret_cast<const __m128i*>(table)));
  }
  __m512i low_, high_;
};

// Lay integers out, [groups * 32, depth] to [groups, ...].
at::Tensor bytes_of(const at::Tensor& whole) {
  TORCH_CHECK(whole.ge(-127).all().item<bool>(), "unspool::lay_out takes whole numbers from -127 to 127, not -128");
  // Sign and magnitude, and in each quarter of a vector two pairs of four columns: that is how bytes are interleaved.
  const at::Tensor bytes = whole.abs().bitwise_or(whole.lt(0).to(at::kChar).mul(-128));
  return bytes.view({-1, VECTORS, 4, W / 4, whole.size(1) / 4, 2, 2}).permute({0, 4, 1, 2, 5, 3, 6}).contiguous();
}

// Lay bfloat16 weights out as codes, [groups * 32, depth] to [groups, bytes]; nothing: they have too many strays.
std::optional<at::Tensor> codes_of(const at::Tensor& whole) {
  const int64_t depth = whole.size(1), groups = whole.size(0) / COLUMNS, blocks = depth / (2 * Coded::AT_ONCE);
  const auto* weights = reinterpret_cast<const uint16_t*>(whole.const_data_ptr());
  auto exponent = [](uint16_t weight) { return weight >> 7 & 255; };
  struct Code {
    uint8_t of[256], exponents[CODES];
    int64_t strays;
  };
  std::vector<Code> code(groups);
  each(groups, [&](int64_t g) {
    int64_t counts[256] = {};
    for (int64_t i = 0; i < COLUMNS * depth; ++i) ++counts[exponent(weights[g * COLUMNS * depth + i])];
    counts[0] = COLUMNS * depth + 1;  // zero is what strays are read as
    uint8_t order[256];
    std::iota(order, order + 256, 0);
    std::stable_sort(order, order + 256, [&](uint8_t a, uint8_t b) { return counts[a] > counts[b]; });
    std::memset(code[g].of, CODES, sizeof code[g].of);  // none
    for (int c = 0; c < CODES; ++c) code[g].of[code[g].exponents[c] = order[c]] = c;
    code[g].strays = 0;
    for (int c = CODES; c < 256; ++c) code[g].strays += counts[order[c]];
  });
  int64_t most = 0;
  for (const Code& each : code) most = std::max(most, each.strays);
  if (most > depth / RARE) return std::nullopt;
  const int64_t record = (Coded::HEAD + blocks * Coded::BLOCK + most * sizeof(Stray) + LINE - 1) / LINE * LINE;
  at::Tensor laid = at::zeros({groups, record}, whole.options().dtype(at::kByte));
  char* to = reinterpret_cast<char*>(laid.mutable_data_ptr());
  each(groups, [&](int64_t g) {
    Head* head = reinterpret_cast<Head*>(to + g * record);
    char* block = to + g * record + Coded::HEAD;
    Stray* stray = reinterpret_cast<Stray*>(block + blocks * Coded::BLOCK);
    head->depth = depth;
    for (int c = 0; c < CODES; ++c) {
      head->low[c] = code[g].exponents[c] << 7;
      head->high[c] = code[g].exponents[c] >> 1;
    }
    for (int64_t k = 0; k < depth; ++k)
      for (int64_t n = 0; n < COLUMNS; ++n) {
        const uint16_t weight = weights[(g * COLUMNS + n) * depth + k];
        const uint8_t found = code[g].of[exponent(weight)];
        char* here = block + k / 4 * Coded::BLOCK + Coded::within(n, k % 2);
        if (found == CODES) {
          stray[head->strays++] = {static_cast<int32_t>(k), static_cast<uint16_t>(n),
                                   at::BFloat16(weight, at::BFloat16::from_bits())};
        } else {
          here[(1 + k % 4 / 2) * LINE] = weight >> 8 & 128 | weight & 127;
          here[0] |= found << k % 4 / 2 * 4;
        }
      }
  });
  return laid;
}

// Lay weights out, [width, depth] to [groups, ...]: 32 columns a group, the last of them filled up with zeros. The dtype
// says how they are read: int8 `Bytes`, uint8 `Coded`, bfloat16 `Halves`.
at::Tensor lay_out(const at::Tensor& weight) {
  const int64_t width = weight.size(0), depth = weight.size(1), groups = (width + COLUMNS - 1) / COLUMNS;
  TORCH_CHECK(depth % STRIDE == 0, "unspool::lay_out takes rows of a multiple of ", STRIDE, " numbers, not ", depth);
  const at::Tensor whole = at::constant_pad_nd(weight, {0, 0, 0, groups * COLUMNS - width}).contiguous();
  if (weight.scalar_type() == at::kChar) return bytes_of(whole);
  TORCH_CHECK(weight.scalar_type() == at::kBFloat16, "unspool::lay_out takes bfloat16 or int8, not ",
              weight.scalar_type());
  if (const std::optional<at::Tensor> laid = codes_of(whole)) return *laid;
  // A pair of each column, then the next pair.
  return whole.view({groups, COLUMNS, depth / 2, 2}).permute({0, 2, 1, 3}).contiguous();
}

// What becomes of the sums of a group's columns, of which so many are wanted, unless nothing does.
struct Finish {
  const float* scales;
  const at::BFloat16* biases;
  int64_t columns;

  Finish(const float* all_scales, const at::BFloat16* all_biases, int64_t first, int64_t wanted)
      : scales(all_scales ? all_scales + first : nullptr), biases(all_biases ? all_biases + first : nullptr),
        columns(wanted) {}

  bool nothing() const { return !scales && !biases; }

  // Of the vector of columns from n.
  [[gnu::always_inline]] Vector of(Vector sum, int64_t n) const {
    const Vector scaled = scales ? sum * some(scales + n, columns - n, 1.0f) : sum;
    return biases ? scaled + some(biases + n, columns - n, 0.0f) : scaled;
  }
};

// Write down what is wanted of a vector. (To store what a mask says takes longer, even if it says all.)
inline void write_down(Vector sum, int64_t wanted, at::BFloat16* to) {
  if (wanted >= W) return Element<at::BFloat16>::store(to, sum);
  const __mmask16 some = (1u << wanted) - 1;
  _mm256_mask_storeu_epi16(to, some, reinterpret_cast<__m256i>(halved(sum)));
}

// Write down two vectors, one beside the other.
inline void write_down(Vector first, Vector second, at::BFloat16* to) {
  const __m512bh both = _mm512_cvtne2ps_pbh(reinterpret_cast<__m512>(second), reinterpret_cast<__m512>(first));
  _mm512_storeu_si512(to, reinterpret_cast<__m512i>(both));
}

// x / (1 + exp(-x)), to within a ten-thousandth: a fortieth of what is lost when it is rounded.
inline Vector silu(Vector x) {
  auto wide = [](Vector v) { return reinterpret_cast<__m512>(v); };
  // The logarithm of exp(-x) to the base of 2, or what gives as little; NaN stays.
  const __m512 some = _mm512_max_ps(_mm512_set1_ps(-126.0f), wide(x * -1.44269504088896341f));
  const __m512 log = _mm512_min_ps(_mm512_set1_ps(256.0f), some);
  const __m512 whole = _mm512_roundscale_ps(log, _MM_FROUND_TO_NEAREST_INT);
  const Vector r = reinterpret_cast<Vector>(log) - reinterpret_cast<Vector>(whole);
  Vector y = r * 9.618129e-3f + 5.550411e-2f;  // the first powers of log(2), over factorials: 2 to the power of r
  y = y * r + 2.4022651e-1f;
  y = y * r + 6.9314718e-1f;
  y = y * r + 1.0f;
  const Vector power = reinterpret_cast<Vector>(_mm512_scalef_ps(wide(y), whole));
  return x * reinterpret_cast<Vector>(_mm512_rcp14_ps(wide(power + 1.0f)));
}

// Ask memory for what is read some blocks later. It comes into the second cache.
template <typename Weights>
inline void ask(const char* block) {
  for (int64_t at = 0; at < Weights::BLOCK; at += LINE) __builtin_prefetch(block + AHEAD + at, 0, 2);
}

// A group, and what lies beside its blocks.
template <typename Weights>
struct Group {
  const char* blocks;
  Weights weights;
  const Stray *stray, *end;

  Group(const char* start, int64_t depth)
      : blocks(start + Weights::HEAD), weights(start), stray(nullptr), end(nullptr) {
    if constexpr (std::is_same_v<Weights, Coded>) {
      stray = reinterpret_cast<const Stray*>(blocks + depth / (2 * Weights::AT_ONCE) * Weights::BLOCK);
      end = stray + reinterpret_cast<const Head*>(start)->strays;
    }
  }
};

// The products of R rows with a group, of which so many columns are wanted. Unless it was read before, it is asked for.
template <typename Weights, int R>
void tile(const at::BFloat16* rows, int64_t depth, const Group<Weights>& group, bool near, const Finish& finish,
          int64_t columns, at::BFloat16* output, int64_t width) {
  Vector total[R][VECTORS];
  for (int r = 0; r < R; ++r)
    for (int v = 0; v < VECTORS; ++v) total[r][v] = Vector{};  // `= {}` above would be a call
  const Weights weights = group.weights;
  const char* block = group.blocks;
  for (const at::BFloat16* x = rows; x < rows + depth; x += STRIDE)
    for (int k = 0; k < STRIDE; k += 2 * Weights::AT_ONCE, block += Weights::BLOCK) {
      if (!near) ask<Weights>(block);
      __m512i pairs[Weights::AT_ONCE][VECTORS];
      weights.read(block, pairs);
      for (int i = 0; i < Weights::AT_ONCE; ++i)
        for (int r = 0; r < R; ++r) {
          int32_t pair;
          std::memcpy(&pair, x + r * depth + k + 2 * i, sizeof pair);
          const __m512i factor = _mm512_set1_epi32(pair);
          for (int v = 0; v < VECTORS; ++v) total[r][v] = paired(total[r][v], pairs[i][v], factor);
        }
    }
  for (const Stray* stray = group.stray; stray != group.end; ++stray)
    for (int r = 0; r < R; ++r) {
      const auto product = reinterpret_cast<__m512>(
          all(static_cast<float>(rows[r * depth + stray->place]) * static_cast<float>(stray->weight)));
      for (int v = 0; v < VECTORS; ++v) {
        const auto sum = reinterpret_cast<__m512>(total[r][v]);
        const __mmask16 one = uint64_t{1} << stray->column >> v * W;
        total[r][v] = reinterpret_cast<Vector>(_mm512_mask_add_ps(sum, one, sum, product));
      }
    }
  for (int r = 0; r < R; ++r)
    for (int v = 0; v < VECTORS && v * W < columns; ++v)
      write_down(finish.of(total[r][v], v * W), columns - v * W, output + r * width + v * W);
}

template <typename Weights, typename... Arguments>
void tile_of(int64_t count, const Arguments&... arguments) {
  static_assert(TALL == 12);
  constexpr decltype(&tile<Weights, 1>) tiles[] = {
      tile<Weights, 1>, tile<Weights, 2>, tile<Weights, 3>, tile<Weights, 4>,  tile<Weights, 5>,  tile<Weights, 6>,
      tile<Weights, 7>, tile<Weights, 8>, tile<Weights, 9>, tile<Weights, 10>, tile<Weights, 11>, tile<Weights, 12>};
  tiles[count - 1](arguments...);
}

#if defined(UNSPOOL_TILES)
constexpr int64_t PANEL = VECTORS * tiles::SIZE;  // bytes of the weights of a group that are in tiles at once
constexpr int64_t KEPT = 40 << 10;                // bytes that the first cache keeps while others pass

// Write down as tiles what is left of a group's weights from a pair on, with its strays from `stray` on, zeros where there
// are no more. Gives the first stray that lies behind.
template <typename Weights>
const Stray* write_panel(const Group<Weights>& group, int64_t from, int64_t end, const Stray* stray, char* panel) {
  const Weights weights = group.weights;
  const char* block = group.blocks + from / Weights::AT_ONCE * Weights::BLOCK;
  const int64_t there = std::min(end - from, tiles::ROWS);
  for (int64_t p = 0; p < there; p += Weights::AT_ONCE, block += Weights::BLOCK) {
    ask<Weights>(block);
    __m512i pairs[Weights::AT_ONCE][VECTORS];
    weights.read(block, pairs);
    for (int i = 0; i < Weights::AT_ONCE; ++i)
      for (int v = 0; v < VECTORS; ++v) _mm512_store_si512(panel + v * tiles::SIZE + (p + i) * tiles::BYTES, pairs[i][v]);
  }
  for (int64_t p = there; p < tiles::ROWS; ++p)
    for (int v = 0; v < VECTORS; ++v) _mm512_store_si512(panel + v * tiles::SIZE + p * tiles::BYTES, __m512i{});
  for (; stray != group.end && stray->place / 2 < from + tiles::ROWS; ++stray) {
    char* column = panel + stray->column / W * tiles::SIZE + stray->column % W * sizeof(int32_t);
    char* to = column + (stray->place / 2 - from) * tiles::BYTES + stray->place % 2 * sizeof stray->weight;
    std::memcpy(to, &stray->weight, sizeof stray->weight);
  }
  return stray;
}

// What is due after tiles have summed up: sums of some rows with a group are written down, or become factors of what a gate
// lets through, or are multiplied by these first. A few rows are finished at a time, while the next are multiplied: a
// processor does both at once.
class Due {
 public:
  Due() = default;
  Due(const Due&) = delete;
  Due& operator=(const Due&) = delete;
  ~Due() { go_on(left()); }

  float* sums() { return *sums_; }
  int64_t left() const { return count_ - row_; }

  // So many rows of sums are there. Nothing may be left of those before.
  void write(int64_t count, const Finish& finish, at::BFloat16* to, int64_t width) {
    begin(count, finish, nullptr, to, width);
  }
  void open(int64_t count, const Finish& finish, at::BFloat16* factors) { begin(count, finish, factors, nullptr, 0); }
  void let_through(int64_t count, const Finish& finish, at::BFloat16* factors, at::BFloat16* to, int64_t width) {
    begin(count, finish, factors, to, width);
  }

  // Finish up to so many rows.
  void go_on(int64_t rows) {
    const int64_t from = row_, end = std::min(count_, from + rows);
    row_ = end;
    if (!factors_) {
      for (int64_t r = from; r < end; ++r) write_down_all(sums_[r], to_ + r * width_);
    } else if (!to_) {
      for (int64_t r = from; r < end; ++r)
        both(factors_ + r * COLUMNS, [&](int v) { return silu(finished(sums_[r], v)); });
    } else {
      for (int64_t r = from; r < end; ++r)
        both(to_ + r * width_, [&](int v) {
          return Element<at::BFloat16>::load(factors_ + r * COLUMNS + v * W) * finished(sums_[r], v);
        });
    }
  }

 private:
  void begin(int64_t count, const Finish& finish, at::BFloat16* factors, at::BFloat16* to, int64_t width) {
    row_ = 0;
    count_ = count;
    finish_ = finish;
    factors_ = factors;
    to_ = to;
    width_ = width;
  }

  [[gnu::always_inline]] Vector finished(const float* sums, int v) const {
    return finish_.of(Element<float>::load(sums + v * W), v * W);
  }

  template <typename Of>
  [[gnu::always_inline]] static void both(at::BFloat16* to, Of of) {
    static_assert(VECTORS == 2);
    const Vector first = of(0);
    write_down(first, of(1), to);
  }

  [[gnu::always_inline]] void write_down_all(const float* sums, at::BFloat16* to) const {
    if (finish_.columns == COLUMNS) return both(to, [&](int v) { return finished(sums, v); });
    for (int v = 0; v < VECTORS && v * W < finish_.columns; ++v)
      write_down(finished(sums, v), finish_.columns - v * W, to + v * W);
  }

  alignas(64) float sums_[MOST][COLUMNS];
  Finish finish_{nullptr, nullptr, 0, 0};
  at::BFloat16 *factors_ = nullptr, *to_ = nullptr;
  int64_t width_ = 0, row_ = 0, count_ = 0;
};

// Sum up what up to two tiles of rows and a group give; what is due is finished meanwhile. Panels of the group are written
// one ahead of their use; into two by turns, unless other rows need them as well.
template <typename Weights>
void by_tiles(const at::BFloat16* rows, int64_t depth, const Group<Weights>& group, bool near, bool again, char* panels,
              int64_t count, Due& due) {
  const int64_t pairs = depth / 2, all = (pairs + tiles::ROWS - 1) / tiles::ROWS, left = depth % tiles::DEEP;
  const bool second = count > tiles::ROWS, keep = near || again, passing = keep && all * PANEL <= KEPT;
  auto panel = [&](int64_t number) { return panels + (keep ? number : number % 2) * PANEL; };
  alignas(64) at::BFloat16 rest[2 * tiles::ROWS * tiles::DEEP];  // the ends of rows, with zeros after them
  if (left)
    for (int64_t r = 0; r < count; ++r) {
      at::BFloat16* to = rest + r * tiles::DEEP;
      std::memcpy(static_cast<void*>(to), rows + (r + 1) * depth - left, left * sizeof *rows);
      std::memset(static_cast<void*>(to + left), 0, (tiles::DEEP - left) * sizeof *rows);
    }
  const int64_t pace = std::max(LEAST, (due.left() + all - 1) / all);
  tiles::clear();
  const Stray* stray = group.stray;
  if (!near) stray = write_panel(group, 0, pairs, stray, panel(0));
  for (int64_t number = 0; number < all; ++number) {
    if (!near && number + 1 < all)
      stray = write_panel(group, (number + 1) * tiles::ROWS, pairs, stray, panel(number + 1));
    const bool whole = (number + 1) * tiles::DEEP <= depth;
    const at::BFloat16* x = whole ? rows + number * tiles::DEEP : rest;
    tiles::written();
    tiles::multiply(panel(number), x, whole ? depth : tiles::DEEP, second, passing);
    if (number && due.left()) due.go_on(pace);
  }
  due.go_on(due.left());
  tiles::keep(due.sums(), COLUMNS, second);
  tiles::written();
}
#endif

// Rows from one on.
struct Rows {
  int64_t first, count;
};

// Call `what(some, near, again)` for some rows after others, no more than so many each: whether the weights were read for
// others just before, and will be for others next.
template <typename What>
void in_parts(const Rows& rows, int64_t most, What what) {
  const int64_t parts = (rows.count + most - 1) / most;
  for (int64_t p = 0; p < parts; ++p) {
    const int64_t first = rows.count * p / parts, end = rows.count * (p + 1) / parts;
    what(Rows{rows.first + first, end - first}, p > 0, p + 1 < parts);
  }
}

// What a thread multiplies with: if by tiles, their shape, what is due, and room.
struct Hands {
#if defined(UNSPOOL_TILES)
  tiles::Shaped shaped;
  Due due;

  // For all panels of a group, or two at a time.
  char* panels(int64_t depth) { return rooms_.panels.of(((depth + tiles::DEEP - 1) / tiles::DEEP + 1) * PANEL); }

  // For the factors that a gate makes of so many rows. It has to be enough for all: what is due has some of it.
  at::BFloat16* factors(int64_t count) { return rooms_.factors.of(count * COLUMNS); }

 private:
  struct Rooms {
    Room<char> panels;
    Room<at::BFloat16> factors;
  };

  static Rooms& own() {
    thread_local Rooms rooms;
    return rooms;
  }

  Rooms& rooms_ = own();
#endif
};

// Share out so many rows and units of columns among the threads: `multiply(unit, rows, hands)`.
//
// Many rows are shared out as they are by what comes before and after: each thread has its own at hand. With tiles it
// takes more rows, and more than a thread's second cache holds of them: up to there weights are written down as tiles once,
// not once a thread. Rows are shared out as well where there are too few units for all threads.
template <typename Multiply>
void share_out(int64_t count, int64_t depth, int64_t units, Multiply multiply) {
  const int64_t threads = at::get_num_threads(), bytes = count * depth * sizeof(at::BFloat16);
  const int64_t tall = in_tiles() ? MOST : TALL, apart = in_tiles() ? TILES_APART : APART;
  const int64_t fair = 4 * threads, most = (count + tall - 1) / tall;
  const bool many = count >= apart * tall * threads && (!in_tiles() || bytes >= TOGETHER);
  const int64_t shares = many ? threads : units >= fair ? 1 : std::min(most, (fair + units - 1) / units);
  each<Hands>(units * shares, [&](int64_t task, Hands& hands) {
    const int64_t share = task / units, first = count * share / shares;
    multiply(task % units, Rows{first, count * (share + 1) / shares - first}, hands);
  });
}

// What a product is made of.
struct Product {
  const at::BFloat16* rows;
  int64_t count, depth;
  const char* laid;
  int64_t groups, record;
  const float* scales;
  const at::BFloat16* biases;
  bool tiled = in_tiles();

  template <typename Weights>
  Group<Weights> group(int64_t number) const {
    return Group<Weights>(laid + number * record, depth);
  }

  Finish finish(int64_t number, int64_t columns) const { return Finish(scales, biases, number * COLUMNS, columns); }

#if defined(UNSPOOL_TILES)
  // Sum up rows with a group, some after others: `then(some)` begins what is due of these.
  template <typename Weights, typename Then>
  void by_tiles_with(const Group<Weights>& group, const Rows& all, Hands& hands, Then then) const {
    char* panels = hands.panels(depth);
    in_parts(all, MOST, [&](const Rows& some, bool near, bool again) {
      hands.shaped.hold(some.count);
      by_tiles(rows + some.first * depth, depth, group, near, again, panels, some.count, hands.due);
      then(some);
    });
  }
#endif
};

template <typename Weights>
void multiply(const Product& product, at::BFloat16* to, int64_t width) {
  const int64_t depth = product.depth;
  share_out(product.count, depth, product.groups, [&](int64_t number, const Rows& rows, Hands& hands) {
    at::BFloat16* columns = to + number * COLUMNS;
    const Finish finish = product.finish(number, std::min(COLUMNS, width - number * COLUMNS));
    const auto group = product.group<Weights>(number);
#if defined(UNSPOOL_TILES)
    if (product.tiled)
      return product.by_tiles_with(group, rows, hands, [&](const Rows& some) {
        hands.due.write(some.count, finish, columns + some.first * width, width);
      });
#endif
    in_parts(rows, TALL, [&](const Rows& some, bool near, bool) {
      tile_of<Weights>(some.count, product.rows + some.first * depth, depth, group, near, finish, finish.columns,
                       columns + some.first * width, width);
    });
  });
}

// Groups by turns: of a gate, and of what it lets through.
template <typename Weights>
void multiply_gated(const Product& product, at::BFloat16* to, int64_t width) {
  const int64_t depth = product.depth;
  share_out(product.count, depth, product.groups / 2, [&](int64_t unit, const Rows& rows, Hands& hands) {
    at::BFloat16* columns = to + unit * COLUMNS;
    const Finish opening = product.finish(2 * unit, COLUMNS), finish = product.finish(2 * unit + 1, COLUMNS);
    const auto gate = product.group<Weights>(2 * unit), up = product.group<Weights>(2 * unit + 1);
#if defined(UNSPOOL_TILES)
    if (product.tiled) {
      at::BFloat16* factors = hands.factors(product.count);
      auto factors_of = [&](const Rows& some) { return factors + some.first * COLUMNS; };
      product.by_tiles_with(gate, rows, hands,
                            [&](const Rows& some) { hands.due.open(some.count, opening, factors_of(some)); });
      return product.by_tiles_with(up, rows, hands, [&](const Rows& some) {
        hands.due.let_through(some.count, finish, factors_of(some), columns + some.first * width, width);
      });
    }
#endif
    in_parts(rows, TALL, [&](const Rows& some, bool near, bool) {
      at::BFloat16 room[2][TALL * COLUMNS], *gates = room[0], *ups = room[1];
      const at::BFloat16* x = product.rows + some.first * depth;
      tile_of<Weights>(some.count, x, depth, gate, near, opening, COLUMNS, gates, COLUMNS);
      tile_of<Weights>(some.count, x, depth, up, near, finish, COLUMNS, ups, COLUMNS);
      for (int64_t r = 0; r < some.count; ++r)
        for (int64_t n = 0; n < COLUMNS; n += W) {
          const Vector factor = silu(Element<at::BFloat16>::load(gates + r * COLUMNS + n));
          const Vector through = Element<at::BFloat16>::load(ups + r * COLUMNS + n);
          Element<at::BFloat16>::store(columns + (some.first + r) * width + n, factor * through);
        }
    });
  });
}

// A product of x [n, depth] with laid out weights transposed, times scale, plus bias; gated: each 32 columns of the output
// are silu of the one 32 of it times the next.
at::Tensor product_of(const at::Tensor& x_, const at::Tensor& laid_, const std::optional<at::Tensor>& scale_,
                      const std::optional<at::Tensor>& bias_, int64_t width, bool gated) {
  const at::Tensor x = x_.contiguous(), laid = laid_.contiguous();
  const int64_t depth = x.size(1), groups = laid.size(0), columns = groups * COLUMNS;
  TORCH_CHECK(x.scalar_type() == at::kBFloat16, "unspool::project takes rows of bfloat16, not ", x.scalar_type());
  const bool coded = laid.scalar_type() == at::kByte;
  const int64_t laid_for = coded ? static_cast<const Head*>(laid.const_data_ptr())->depth : laid.numel() / columns;
  TORCH_CHECK(laid_for == depth, "unspool::project takes rows of ", laid_for, " numbers for these weights, not ", depth);
  TORCH_CHECK(!gated || 2 * width == columns, "unspool::project_gated has ", columns / 2, " columns, not ", width);
  TORCH_CHECK(gated || (width > columns - COLUMNS && width <= columns), "unspool::project has ", columns,
              " columns, not ", width);
  const int64_t all = gated ? columns : width;
  const at::Tensor scale = scale_ ? scale_->contiguous() : at::Tensor();
  const at::Tensor bias = bias_ ? bias_->contiguous() : at::Tensor();
  TORCH_CHECK((!scale_ || scale.numel() == all) && (!bias_ || bias.numel() == all),
              "unspool::project takes a scale and a bias of ", all, " numbers");
  const Product product{x.const_data_ptr<at::BFloat16>(), x.size(0), depth, static_cast<const char*>(laid.const_data_ptr()),
                        groups, static_cast<int64_t>(laid.nbytes()) / groups,
                        scale_ ? scale.const_data_ptr<float>() : nullptr,
                        bias_ ? bias.const_data_ptr<at::BFloat16>() : nullptr};
  at::Tensor output = at::empty({x.size(0), width}, x.options());
  at::BFloat16* to = output.data_ptr<at::BFloat16>();
  auto with = [&](auto weights) {
    using Weights = typename decltype(weights)::type;
    gated ? multiply_gated<Weights>(product, to, width) : multiply<Weights>(product, to, width);
  };
  if (laid.scalar_type() == at::kChar)
    with(std::type_identity<Bytes>{});
  else if (coded)
    with(std::type_identity<Coded>{});
  else
    with(std::type_identity<Halves>{});
  return output;
}

at::Tensor project(const at::Tensor& x, const at::Tensor& laid, const std::optional<at::Tensor>& scale,
                   const std::optional<at::Tensor>& bias, int64_t width) {
  return product_of(x, laid, scale, bias, width, false);
}

at::Tensor project_gated(const at::Tensor& x, const at::Tensor& laid, const std::optional<at::Tensor>& scale,
                         const std::optional<at::Tensor>& bias, int64_t width) {
  return product_of(x, laid, scale, bias, width, true);
}

}  // namespace

TORCH_LIBRARY_FRAGMENT(unspool, library) {
  library.def("lay_out(Tensor weight) -> Tensor");
  library.def("project(Tensor x, Tensor laid, Tensor? scale, Tensor? bias, int width) -> Tensor");
  library.def("project_gated(Tensor x, Tensor laid, Tensor? scale, Tensor? bias, int width) -> Tensor");
}

TORCH_LIBRARY_IMPL(unspool, CPU, library) {
  library.impl("lay_out", lay_out);
  library.impl("project", project);
  library.impl("project_gated", project_gated);
}

// As packages call them.
#define UNSPOOL_SHIM(name)                                                                                        \
  extern "C" AOTITorchError aoti_torch_cpu_##name(AtenTensorHandle x, AtenTensorHandle laid, AtenTensorHandle* scale, \
                                                  AtenTensorHandle* bias, int64_t width, AtenTensorHandle* product) { \
    using namespace torch::aot_inductor;                                                                          \
    AOTI_TORCH_CONVERT_EXCEPTION_TO_ERROR_CODE({                                                                  \
      *product = new_tensor_handle(name(resolve_tensor_dispatch_flags(x), resolve_tensor_dispatch_flags(laid),    \
                                        resolve_tensor_dispatch_flags(scale), resolve_tensor_dispatch_flags(bias), \
                                        width));                                                                  \
    });                                                                                                           \
  }
UNSPOOL_SHIM(project)
UNSPOOL_SHIM(project_gated)
#endif

// Who may win a draw: tokens whose logits with Gumbel noise come near the largest of their row.
//
// `unspool.noise` says what the noise of a token is, by the bits of one integer hash. Most tokens need no more than a bound
// of it, which the exponent of its uniform number gives; the others need it to within a thousandth. Who of several wins is
// left to exact numbers: nearly always there is one.

#include <ATen/ops/empty.h>
#include <torch/library.h>

#include <algorithm>
#include <cmath>
#include <cstdint>
#include <limits>
#include <vector>

#include "vectors.h"
#include "work.h"

namespace {

using namespace unspool;

constexpr float MOST = 22.2f;  // above all noise
constexpr float LOG2 = 0.69314718f;
constexpr float NEAR = 1e-3f, RELATIVE = 1e-5f;  // how far below the best one a token may still be it

inline Word mixed(Word v) {
  v = (v ^ v >> 17) * 0xED5AD4BBu;
  v = (v ^ v >> 11) * 0xAC4C1B51u;
  v = (v ^ v >> 15) * 0x31848BABu;
  return v ^ v >> 14;
}

inline Vector gumbel(Vector uniform) {
  const Vector rest = 1.0f - uniform;
  return -logarithm(((rest - 1.0f) + uniform) / rest - logarithm(rest));
}

struct Contender {
  int64_t token;
  float score;
};

// The tokens of a row that may win with a key's noise, in order. Where none is possible it is the first.
void contend(const float* logits, int64_t vocab, uint64_t key, std::vector<Contender>& found) {
  Word token = reinterpret_cast<Word>(lanes()), low, high;
  for (int i = 0; i < W; ++i) low[i] = static_cast<uint32_t>(key), high[i] = static_cast<uint32_t>(key >> 32);
  float best = NONE, least = NONE;
  found.clear();
  for (int64_t i = 0; i < vocab; i += W, token += W) {
    const Vector logit = some(logits + i, vocab - i, NONE);
    if (!any(logit + MOST > all(least))) continue;
    const Word hash = mixed(mixed(token ^ low) ^ high);
    const Whole whole = (reinterpret_cast<Whole>(hash) >> 1) + (1 << 30);
    Vector uniform = (__builtin_convertvector(whole, Vector) + 0.5f) * 0x1p-31f;
    uniform = uniform > all(1 - 0x1p-24f) ? all(1 - 0x1p-24f) : uniform;
    const Vector bound = __builtin_convertvector(127 - (reinterpret_cast<Whole>(uniform) >> 23), Vector) * LOG2;
    if (!any(logit + bound > all(least))) continue;
    const Vector score = logit + gumbel(uniform);
    if (!any(score > all(least))) continue;
    for (int lane = 0; lane < W; ++lane)
      if (score[lane] > least) {
        found.push_back({i + lane, score[lane]});
        best = std::max(best, score[lane]);
      }
    least = std::isinf(best) ? std::numeric_limits<float>::max() : best - NEAR - RELATIVE * std::abs(best);
  }
  std::erase_if(found, [&](const Contender& one) { return !(one.score > least); });
  if (found.empty()) found.push_back({0, NONE});
}

// logits [n, vocab] float32, keys [n]: where in all the logits, flattened, those tokens are. Each row has one or more.
at::Tensor contenders(const at::Tensor& logits_, const at::Tensor& keys_) {
  const at::Tensor logits = logits_.contiguous(), keys = keys_.contiguous();
  TORCH_CHECK(logits.dim() == 2 && logits.size(1) > 0 && logits.scalar_type() == at::kFloat,
              "unspool::contenders takes logits [n, vocab] of float32, not ", logits.sizes(), " of ", logits.scalar_type());
  TORCH_CHECK(keys.dim() == 1 && keys.size(0) == logits.size(0) && keys.scalar_type() == at::kLong,
              "unspool::contenders takes an int64 key for each row, not ", keys.sizes(), " of ", keys.scalar_type());
  const int64_t rows = logits.size(0), vocab = logits.size(1);
  const float* from = logits.const_data_ptr<float>();
  const int64_t* key = keys.const_data_ptr<int64_t>();
  std::vector<std::vector<Contender>> found(rows);
  each(rows, [&](int64_t row) {
    contend(from + row * vocab, vocab, static_cast<uint64_t>(key[row]), found[row]);
  });
  int64_t count = 0;
  for (const auto& row : found) count += row.size();
  at::Tensor places = at::empty({count}, keys.options());
  int64_t* to = places.mutable_data_ptr<int64_t>();
  for (int64_t row = 0; row < rows; ++row)
    for (const Contender& one : found[row]) *to++ = row * vocab + one.token;
  return places;
}

}  // namespace

TORCH_LIBRARY_FRAGMENT(unspool, library) { library.def("contenders(Tensor logits, Tensor keys) -> Tensor"); }

TORCH_LIBRARY_IMPL(unspool, CPU, library) { library.impl("contenders", contenders); }

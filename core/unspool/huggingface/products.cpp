// Products of a few rows with a matrix of bfloat16 weights, which cost what reading the weights does.
//
// A step of a few rows reads every weight once, and multiplies little. So the weights are read in their own order, each
// once for all rows, as fast as memory gives them, and multiplied as pairs (`vectors.h`); the rows stay in the first cache.
// All sums are float32. There is no such operator where the processor does not multiply pairs.

#include <ATen/Parallel.h>
#include <ATen/ops/constant_pad_nd.h>
#include <ATen/ops/empty.h>
#include <torch/library.h>

#include <algorithm>
#include <cstdint>
#include <optional>

#include "vectors.h"

#if defined(__AVX512BF16__)
namespace {

using namespace unspool;

constexpr int64_t PAIRED = 2 * W;  // numbers in a vector of pairs
constexpr int64_t AHEAD = 16384;   // bytes: how far ahead memory is asked for weights
constexpr int64_t CHUNK = 64;      // columns

// Columns `begin` to `end` of the output for R rows, of which so many are wanted; 16 / R columns at a time, so that there
// are 16 sums.
template <int R>
void columns(const at::BFloat16* rows, int64_t wanted, const at::BFloat16* weight, const at::BFloat16* bias,
             int64_t depth, int64_t width, int64_t begin, int64_t end, at::BFloat16* output) {
  constexpr int C = W / R;
  for (int64_t n = begin; n < end; n += C) {
    const at::BFloat16* line[C];
    for (int c = 0; c < C; ++c) line[c] = weight + std::min<int64_t>(n + c, end - 1) * depth;
    Vector total[W] = {};
    for (int64_t k = 0; k < depth; k += PAIRED) {
      for (int c = 0; c < C; ++c) {
        __builtin_prefetch(reinterpret_cast<const char*>(line[c] + k) + AHEAD, 0, 2);
        for (int r = 0; r < R; ++r) total[c * R + r] = paired(total[c * R + r], rows + r * depth + k, line[c] + k);
      }
    }
    const Vector found = sums(total);
    for (int c = 0; c < C && n + c < end; ++c)
      for (int r = 0; r < wanted; ++r)
        output[r * width + n + c] = at::BFloat16(found[c * R + r] + (bias ? static_cast<float>(bias[n + c]) : 0.0f));
  }
}

// x [n, depth] times weight [width, depth] transposed, plus bias [width].
at::Tensor project(const at::Tensor& x_, const at::Tensor& weight_, const std::optional<at::Tensor>& bias_) {
  const at::Tensor x = x_.contiguous(), weight = weight_.contiguous();
  const int64_t count = x.size(0), depth = x.size(1), width = weight.size(0);
  TORCH_CHECK(x.scalar_type() == at::kBFloat16 && weight.scalar_type() == at::kBFloat16,
              "unspool::project takes bfloat16");
  TORCH_CHECK(weight.size(1) == depth && depth % PAIRED == 0, "unspool::project takes rows of a multiple of ", PAIRED,
              " numbers, as wide as the weight, not ", depth);
  at::Tensor bias = bias_ ? bias_->contiguous() : at::Tensor();
  at::Tensor output = at::empty({count, width}, x.options());
  // Of 3, 5, 6 and 7 rows, so many more of zeros that there are 4 or 8.
  const int64_t most = 8, together = std::min(most, count < 3 ? count : count < 5 ? 4 : most);
  const int64_t padded = (count + together - 1) / together * together;
  const at::Tensor rows_ = padded == count ? x : at::constant_pad_nd(x, {0, 0, 0, padded - count});
  const at::BFloat16* rows = rows_.const_data_ptr<at::BFloat16>();
  const at::BFloat16* weights = weight.const_data_ptr<at::BFloat16>();
  const at::BFloat16* added = bias_ ? bias.const_data_ptr<at::BFloat16>() : nullptr;
  at::BFloat16* to = output.data_ptr<at::BFloat16>();
  at::parallel_for(0, (width + W - 1) / W, 1, [&](int64_t begin, int64_t end) {
    auto run = together == 8 ? columns<8> : together == 4 ? columns<4> : together == 2 ? columns<2> : columns<1>;
    const int64_t last = std::min(width, end * W);
    for (int64_t first = begin * W; first < last; first += CHUNK)  // all rows read a chunk while it is near
      for (int64_t r = 0; r < count; r += together)
        run(rows + r * depth, std::min(together, count - r), weights, added, depth, width, first,
            std::min(last, first + CHUNK), to + r * width);
  });
  return output;
}

}  // namespace

TORCH_LIBRARY_FRAGMENT(unspool, library) { library.def("project(Tensor x, Tensor weight, Tensor? bias) -> Tensor"); }

TORCH_LIBRARY_IMPL(unspool, CPU, library) { library.impl("project", project); }
#endif

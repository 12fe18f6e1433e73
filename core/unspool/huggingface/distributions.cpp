// How far distributions over a vocabulary are apart, in two readings of each instead of a dozen.
//
// What lies between the readings stays in a core's cache: a row is one core's. Each row is summed in the same order whatever
// others there are.

#include <ATen/Parallel.h>
#include <ATen/ops/empty.h>
#include <torch/library.h>

#include <algorithm>
#include <array>
#include <cmath>
#include <cstdint>
#include <limits>
#include <vector>

#include "vectors.h"

namespace {

using namespace unspool;

constexpr int64_t BLOCK = 32 * W;  // numbers that are summed before they are added to the others
constexpr float TINY = std::numeric_limits<float>::min();
constexpr float LOWEST = -150.0f;  // of an exponent: the power is 0

// Sum each of N vectors that are made of the numbers at 0, W, ... below n.
template <int N, typename Make>
inline std::array<float, N> totals(int64_t n, Make make) {
  Vector sums[N] = {};
  for (int64_t block = 0; block < n; block += BLOCK) {
    Vector here[N] = {};
    for (int64_t i = block; i < std::min(n, block + BLOCK); i += W) make(i, here);
    for (int k = 0; k < N; ++k) sums[k] += here[k];
  }
  std::array<float, N> found;
  for (int k = 0; k < N; ++k) found[k] = sum(sums[k]);
  return found;
}

inline Vector times_its_log(Vector p) {  // 0 where p is 0; a NaN remains
  const Vector kept = p < all(TINY) ? all(TINY) : p, found = kept * logarithm(kept);
  return p == p ? found : p;
}

// The Jensen-Shannon divergence of p and of the softmax of logits, where the sum of p log p is known.
template <typename T>
float divergence_of(const float* p, float known, const T* logits, int64_t n) {
  static thread_local std::vector<float> powers;
  powers.resize(n + W);
  Vector tops = all(NONE);
  for (int64_t i = 0; i < n; i += W) {
    const Vector v = some(logits + i, n - i, NONE);
    tops = v > tops ? v : tops;
  }
  const float top = joined(tops, [](auto a, auto b) { return a > b ? a : b; });
  const auto [norm, weighted] = totals<2>(n, [&](int64_t i, Vector* sums) {
    const Vector x = some(logits + i, n - i, NONE) - top, kept = x < all(LOWEST) ? all(LOWEST) : x;
    const Vector power = kept == kept ? exponential(kept) : kept;
    *reinterpret_cast<Loose*>(powers.data() + i) = power;
    sums[0] += power;
    sums[1] += power * kept;
  });
  const float share = 1 / norm;
  const auto [both] = totals<1>(n, [&](int64_t i, Vector* sums) {
    const Vector q = *reinterpret_cast<const Loose*>(powers.data() + i) * share;
    sums[0] += times_its_log(some(p + i, n - i, 0.0f) + q);
  });
  const float own = weighted * share - std::log(norm);  // the sum of q log q
  return std::log(2.0f) - both / 2 + (known + own) / 2;
}

// p [n, vocab] float32, logits [m, vocab], m a multiple of n: the divergence of each row of logits from row i mod n of p.
at::Tensor divergence(const at::Tensor& p_, const at::Tensor& logits_) {
  const at::Tensor p = p_.contiguous(), logits = logits_.contiguous();
  TORCH_CHECK(p.dim() == 2 && logits.dim() == 2 && p.size(1) == logits.size(1) && p.size(0) > 0 &&
                  logits.size(0) % p.size(0) == 0,
              "unspool::divergence takes [n, vocab] and [m, vocab], m a multiple of n, not ", p.sizes(), " and ",
              logits.sizes());
  TORCH_CHECK(p.scalar_type() == at::kFloat, "unspool::divergence takes float32 probabilities, not ", p.scalar_type());
  const int64_t n = p.size(0), m = logits.size(0), vocab = p.size(1);
  const float* ps = p.const_data_ptr<float>();
  std::vector<float> known(n);
  at::parallel_for(0, n, 1, [&](int64_t begin, int64_t end) {
    for (int64_t row = begin; row < end; ++row)
      known[row] = totals<1>(vocab, [&](int64_t i, Vector* sums) {
        sums[0] += times_its_log(some(ps + row * vocab + i, vocab - i, 0.0f));
      })[0];
  });
  at::Tensor output = at::empty({m}, p.options());
  float* to = output.mutable_data_ptr<float>();
  auto with = [&](auto dtype) {
    using T = decltype(dtype);
    const T* from = logits.const_data_ptr<T>();
    at::parallel_for(0, m, 1, [&](int64_t begin, int64_t end) {
      for (int64_t row = begin; row < end; ++row)
        to[row] = divergence_of(ps + row % n * vocab, known[row % n], from + row * vocab, vocab);
    });
  };
  by_dtype(logits.scalar_type(), "unspool::divergence takes logits of", with);
  return output;
}

}  // namespace

TORCH_LIBRARY_FRAGMENT(unspool, library) { library.def("divergence(Tensor p, Tensor logits) -> Tensor"); }

TORCH_LIBRARY_IMPL(unspool, CPU, library) { library.impl("divergence", divergence); }

// How far distributions over a vocabulary are apart, and the ratio of two, in two or three readings instead of a dozen.
//
// What lies between the readings stays in a core's cache: a row is one core's. Each row is summed in the same order whatever
// others there are.

#include <ATen/ops/empty.h>
#include <torch/library.h>

#include <algorithm>
#include <array>
#include <cmath>
#include <cstdint>
#include <limits>
#include <vector>

#include "vectors.h"
#include "work.h"

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

template <typename T>
float greatest(const T* logits, int64_t n) {  // NaN is not seen
  Vector tops = all(NONE);
  for (int64_t i = 0; i < n; i += W) {
    const Vector v = some(logits + i, n - i, NONE);
    tops = v > tops ? v : tops;
  }
  return joined(tops, [](auto a, auto b) { return a > b ? a : b; });
}

struct Summed {
  float norm;      // the sum of exp(x), x a logit less the greatest
  float weighted;  // and of x exp(x)
};

// Write exp(x) of each logit to `powers`, which has room for a vector more.
template <typename T>
Summed raise(const T* logits, int64_t n, float* powers) {
  const float top = greatest(logits, n);
  const auto [norm, weighted] = totals<2>(n, [&](int64_t i, Vector* sums) {
    const Vector x = some(logits + i, n - i, NONE) - top, kept = x < all(LOWEST) ? all(LOWEST) : x;
    const Vector power = kept == kept ? exponential(kept) : kept;
    *reinterpret_cast<Loose*>(powers + i) = power;
    sums[0] += power;
    sums[1] += power * kept;
  });
  return {norm, weighted};
}

inline float negative_entropy(Summed of) { return of.weighted / of.norm - std::log(of.norm); }  // the sum of p log p

// The Jensen-Shannon divergence of two softmaxes, of which p is there and its sum of p log p is known.
template <typename T>
float divergence_of(const float* p, float known, const T* logits, int64_t n) {
  static thread_local std::vector<float> powers;
  powers.resize(n + W);
  const Summed sums = raise(logits, n, powers.data());
  const float share = 1 / sums.norm;
  const auto [both] = totals<1>(n, [&](int64_t i, Vector* sums) {
    const Vector q = *reinterpret_cast<const Loose*>(powers.data() + i) * share;
    sums[0] += times_its_log(some(p + i, n - i, 0.0f) + q);
  });
  return std::log(2.0f) - both / 2 + (known + negative_entropy(sums)) / 2;
}

// Logits [n, vocab] and [m, vocab], m a multiple of n: the divergence of each row of the second from row i mod n of the first.
at::Tensor divergence(const at::Tensor& logits_, const at::Tensor& others_) {
  const at::Tensor logits = logits_.contiguous(), others = others_.contiguous();
  TORCH_CHECK(logits.dim() == 2 && others.dim() == 2 && logits.size(1) == others.size(1) && logits.size(0) > 0 &&
                  others.size(0) % logits.size(0) == 0 && logits.scalar_type() == others.scalar_type(),
              "unspool::divergence takes [n, vocab] and [m, vocab] of one dtype, m a multiple of n, not ", logits.sizes(),
              " of ", logits.scalar_type(), " and ", others.sizes(), " of ", others.scalar_type());
  const int64_t n = logits.size(0), m = others.size(0), vocab = logits.size(1), room = vocab + W;
  const at::Tensor ps = at::empty({n, room}, logits.options().dtype(at::kFloat));
  at::Tensor output = at::empty({m}, ps.options());
  float *const p = ps.mutable_data_ptr<float>(), *const to = output.mutable_data_ptr<float>();
  std::vector<float> known(n);
  auto with = [&](auto dtype) {
    using T = decltype(dtype);
    const T *one = logits.const_data_ptr<T>(), *other = others.const_data_ptr<T>();
    each(n, [&](int64_t row) {
      const Summed sums = raise(one + row * vocab, vocab, p + row * room);
      known[row] = negative_entropy(sums);
      const float share = 1 / sums.norm;
      for (int64_t i = 0; i < vocab; ++i) p[row * room + i] *= share;
    });
    each(m, [&](int64_t row) {
      to[row] = divergence_of(p + row % n * room, known[row % n], other + row * vocab, vocab);
    });
  };
  by_dtype(logits.scalar_type(), "unspool::divergence takes logits of", with);
  return output;
}

// The logarithm of the sum of exp(logit).
template <typename T>
float log_norm(const T* logits, int64_t n, float top) {
  const auto [norm] = totals<1>(n, [&](int64_t i, Vector* sums) {
    const Vector x = some(logits + i, n - i, NONE) - top, kept = x < all(LOWEST) ? all(LOWEST) : x;
    sums[0] += kept == kept ? exponential(kept) : kept;
  });
  return top + std::log(norm);
}

// gain log p - weight log q instead of the logits of p, where p is at least alpha of its greatest; -inf elsewhere.
template <typename T>
void ratio_of(float* p, const T* q, int64_t n, float alpha, float gain, float weight) {
  const float top = greatest(p, n), least = std::max(top + std::log(alpha), std::numeric_limits<float>::lowest());
  const float own = top == NONE ? 0.0f : log_norm(p, n, top), other = log_norm(q, n, greatest(q, n));
  for (int64_t i = 0; i < n; i += W) {
    const Vector x = some(p + i, n - i, NONE), y = some(q + i, n - i, NONE);
    const Vector out = x < all(least) ? all(NONE) : gain * (x - own) - weight * (y - other);
    if (n - i >= W) {
      *reinterpret_cast<Loose*>(p + i) = out;
    } else {
      for (int64_t k = 0; k < n - i; ++k) p[i + k] = out[k];
    }
  }
}

// p [n, vocab] float32, of which all is written anew, q [n, vocab], the others [n] float32.
void log_ratio(at::Tensor& p, const at::Tensor& q_, const at::Tensor& alpha_, const at::Tensor& gain_,
               const at::Tensor& weight_) {
  const at::Tensor q = q_.contiguous(), alpha = alpha_.contiguous(), gain = gain_.contiguous();
  const at::Tensor weight = weight_.contiguous();
  TORCH_CHECK(p.dim() == 2 && p.is_contiguous() && p.scalar_type() == at::kFloat && q.sizes() == p.sizes(),
              "unspool::log_ratio_ takes float32 logits [n, vocab] in one piece and others as many, not ", p.sizes(), " of ",
              p.scalar_type(), " and ", q.sizes());
  const int64_t n = p.size(0), vocab = p.size(1);
  for (const at::Tensor& each : {alpha, gain, weight})
    TORCH_CHECK(each.numel() == n && each.scalar_type() == at::kFloat,
                "unspool::log_ratio_ takes a float32 number for each row, not ", each.sizes(), " of ", each.scalar_type());
  float* to = p.mutable_data_ptr<float>();
  const float *alphas = alpha.const_data_ptr<float>(), *gains = gain.const_data_ptr<float>();
  const float* weights = weight.const_data_ptr<float>();
  auto with = [&](auto dtype) {
    using T = decltype(dtype);
    const T* other = q.const_data_ptr<T>();
    each(n, [&](int64_t row) {
      ratio_of(to + row * vocab, other + row * vocab, vocab, alphas[row], gains[row], weights[row]);
    });
  };
  by_dtype(q.scalar_type(), "unspool::log_ratio_ takes others of", with);
}

}  // namespace

TORCH_LIBRARY_FRAGMENT(unspool, library) {
  library.def("divergence(Tensor logits, Tensor others) -> Tensor");
  library.def("log_ratio_(Tensor(a!) p, Tensor q, Tensor alpha, Tensor gain, Tensor weight) -> ()");
}

TORCH_LIBRARY_IMPL(unspool, CPU, library) {
  library.impl("divergence", divergence);
  library.impl("log_ratio_", log_ratio);
}

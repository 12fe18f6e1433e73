// What masks of bits forbid becomes -inf, and nothing else is read or written.

#include <torch/library.h>

#include <cstdint>
#include <cstring>

#include "vectors.h"
#include "work.h"

namespace {

using namespace unspool;

constexpr int64_t WORD = 64;  // bits that are looked at together

// Forbid those of n numbers whose bit is 0, the lowest bit of a byte first.
void forbid_row(float* to, const uint8_t* bits, int64_t n) {
  int64_t i = 0;
  for (; i + WORD <= n; i += WORD) {
    uint64_t word;
    std::memcpy(&word, bits + i / 8, sizeof word);
    if (word == ~uint64_t{0}) continue;
    for (int64_t j = 0; j < WORD; j += W) {
#if defined(__AVX512F__)
      const auto forbidden = static_cast<__mmask16>(~(word >> j));
      _mm512_mask_storeu_ps(to + i + j, forbidden, reinterpret_cast<__m512>(all(NONE)));
#else
      for (int64_t k = 0; k < W; ++k)
        if (!(word >> (j + k) & 1)) to[i + j + k] = NONE;
#endif
    }
  }
  for (; i < n; ++i)
    if (!(bits[i / 8] >> i % 8 & 1)) to[i] = NONE;
}

// logits [n, vocab] float32, octets [n, at least vocab / 8] uint8.
void forbid(at::Tensor& logits, const at::Tensor& octets_) {
  const at::Tensor octets = octets_.contiguous();
  TORCH_CHECK(logits.dim() == 2 && octets.dim() == 2 && logits.size(0) == octets.size(0) &&
                  octets.size(1) * 8 >= logits.size(1) && logits.is_contiguous(),
              "unspool::forbid_ takes [n, vocab] in one piece and [n, vocab / 8], not ", logits.sizes(), " and ",
              octets.sizes());
  TORCH_CHECK(logits.scalar_type() == at::kFloat && octets.scalar_type() == at::kByte,
              "unspool::forbid_ takes float32 and uint8, not ", logits.scalar_type(), " and ", octets.scalar_type());
  const int64_t rows = logits.size(0), width = logits.size(1), stride = octets.size(1);
  float* to = logits.mutable_data_ptr<float>();
  const uint8_t* bits = octets.const_data_ptr<uint8_t>();
  each(rows, [&](int64_t row) { forbid_row(to + row * width, bits + row * stride, width); });
}

}  // namespace

TORCH_LIBRARY_FRAGMENT(unspool, library) { library.def("forbid_(Tensor(a!) logits, Tensor octets) -> ()"); }

TORCH_LIBRARY_IMPL(unspool, CPU, library) { library.impl("forbid_", forbid); }

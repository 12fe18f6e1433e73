// Compiled passes, run without the interpreter's lock: threads of Python that look for masks, or answer clients, go on
// meanwhile. torch's own binding keeps the lock for as long as a pass takes.
//
// Each pass reads all weights, and of every page the processor looks up where it is. So they are put into large pages, if
// the system has these.

#include <torch/csrc/inductor/aoti_runner/model_container_runner_cpu.h>
#include <torch/custom_class.h>

#if defined(__linux__)
#include <sys/mman.h>
#endif

#include <algorithm>
#include <cstdint>
#include <string>
#include <utility>
#include <vector>

namespace {

constexpr uintptr_t APART = 4096;  // bytes between two pieces of memory that are taken for one, at most

#if defined(__linux__)
constexpr uintptr_t LARGE = 2 << 20;  // bytes
constexpr int COLLAPSE = 25;          // MADV_COLLAPSE, of Linux 6.1, which older headers do not name

// Have the system put the memory that lies from `begin` to `end` into large pages: now, or if it cannot, when it has the
// time. Where it does neither, nothing is changed.
void put_into_large_pages(uintptr_t begin, uintptr_t end) {
  const uintptr_t first = (begin + LARGE - 1) / LARGE * LARGE, last = end / LARGE * LARGE;
  if (first >= last) return;
  void* from = reinterpret_cast<void*>(first);
  madvise(from, last - first, MADV_HUGEPAGE);
  madvise(from, last - first, COLLAPSE);
}
#else
void put_into_large_pages(uintptr_t, uintptr_t) {}
#endif

struct Pass : torch::CustomClassHolder {
  explicit Pass(std::string library) : runner(library, 1) {
    using Piece = std::pair<uintptr_t, uintptr_t>;  // of memory: where it begins and ends
    std::vector<Piece> pieces;
    for (const auto& [name, constant] : runner.extract_constants_map(false)) {
      if (!constant.has_storage()) continue;  // it is laid out for oneDNN
      const auto at = reinterpret_cast<uintptr_t>(constant.const_data_ptr());
      pieces.emplace_back(at, at + constant.nbytes());
    }
    std::sort(pieces.begin(), pieces.end());
    for (size_t next = 0; next < pieces.size();) {  // most lie one behind the other
      Piece whole = pieces[next++];
      while (next < pieces.size() && pieces[next].first <= whole.second + APART)
        whole.second = std::max(whole.second, pieces[next++].second);
      put_into_large_pages(whole.first, whole.second);
    }
  }

  std::vector<at::Tensor> run(std::vector<at::Tensor> inputs) { return runner.run(inputs); }

  torch::inductor::AOTIModelContainerRunnerCpu runner;
};

}  // namespace

TORCH_LIBRARY_FRAGMENT(unspool, library) {
  library.class_<Pass>("Pass").def(torch::init<std::string>()).def("run", &Pass::run);
}

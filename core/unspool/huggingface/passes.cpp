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
#include <limits>
#include <string>
#include <vector>

namespace {

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
    uintptr_t begin = std::numeric_limits<uintptr_t>::max(), end = 0;  // of its constants: they lie in one piece
    for (const auto& [name, constant] : runner.extract_constants_map(false)) {
      const auto at = reinterpret_cast<uintptr_t>(constant.const_data_ptr());
      begin = std::min(begin, at);
      end = std::max(end, at + constant.nbytes());
    }
    put_into_large_pages(begin, end);
  }

  std::vector<at::Tensor> run(std::vector<at::Tensor> inputs) { return runner.run(inputs); }

  torch::inductor::AOTIModelContainerRunnerCpu runner;
};

}  // namespace

TORCH_LIBRARY_FRAGMENT(unspool, library) {
  library.class_<Pass>("Pass").def(torch::init<std::string>()).def("run", &Pass::run);
}

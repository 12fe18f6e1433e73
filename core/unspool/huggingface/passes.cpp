// Compiled passes, run without the interpreter's lock: threads of Python that look for masks, or answer clients, go on
// meanwhile. torch's own binding keeps the lock for as long as a pass takes.

#include <torch/csrc/inductor/aoti_runner/model_container_runner_cpu.h>
#include <torch/custom_class.h>

#include <string>
#include <vector>

namespace {

struct Pass : torch::CustomClassHolder {
  explicit Pass(std::string library) : runner(library, 1) {}

  std::vector<at::Tensor> run(std::vector<at::Tensor> inputs) { return runner.run(inputs); }

  torch::inductor::AOTIModelContainerRunnerCpu runner;
};

}  // namespace

TORCH_LIBRARY_FRAGMENT(unspool, library) {
  library.class_<Pass>("Pass").def(torch::init<std::string>()).def("run", &Pass::run);
}

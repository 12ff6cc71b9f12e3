// The contract of libhcmen_trt.so, called as TensorRT calls it, without TensorRT: expression builder, resource context
// and logger are these tests' own.
//
//   trt_test LIBRARY contract        every method in the documented order, with good and with bad arguments
//   trt_test LIBRARY enqueue-host CASES RESULTS      computes the cases of a file; the library has host kernels
//   trt_test LIBRARY enqueue-emulated CASES RESULTS  likewise; the library has the CUDA kernels, compiled for the host
//   trt_test LIBRARY enqueue-gpu CASES RESULTS       the same with device memory and a stream, and as a CUDA graph
//   trt_test LIBRARY no-gpu          without a usable GPU `enqueue` is an error, and nothing worse
//   trt_test LIBRARY foreign-logger  the logger of another major version is left alone: errors are on stderr
//   trt_test LIBRARY no-memory       failing allocations are errors, and nothing worse
//
// Prints what failed, and returns the number of failures (at most 100). Cases and results are for
// tests/helpers/trt_program.py, which holds the numbers to float64.
#include "trt_test.h"

namespace {

void test_foreign_logger() {
  reported_version = NV_TENSORRT_MAJOR == 10 ? 110400 : 100300;
  set_finder(&finder);
  Fields bad;
  bad.flag("gated", 2);
  check(!create("SelectiveScan", bad), "a bad field is refused whatever the logger");
  check(finder.asked == 0 && logger.lines.empty(), "the logger of another major version is not touched");
  reported_version = NV_TENSORRT_VERSION;
  set_finder(&finder);
  check(!create("SelectiveScan", bad) && finder.asked == 1 && logger.lines.size() == 1, "the own one is");
  set_finder(nullptr);
  check(!create("SelectiveScan", bad) && finder.asked == 1, "and can be taken away again");
  logger.lines.clear();
}

#if !defined(__SANITIZE_ADDRESS__)
bool no_memory = false;

void test_no_memory() {
  Plugin plugin = Switches::of(15).create();
  Fields fields = Switches::of(15).fields();
  fields.get();
  Context context;
  logger.lines.reserve(100);
  for (int i = 0; i < 4; ++i) {
    std::string text(200, ' ');
    logger.lines.clear();
    no_memory = true;
    trt::IPluginV3* const made =
        i == 0   ? creators.find("SelectiveScan")->second->createPlugin("n", fields.get(), TensorRTPhase::kBUILD)
        : i == 1 ? creators.find("SelectiveScan")->second->createPlugin("n", fields.get(), TensorRTPhase::kRUNTIME)
        : i == 2 ? plugin.self->clone()
                 : plugin.runtime->attachToContext(&context);
    no_memory = false;
    check(!made, "without memory no plugin is made");
    delete made;
  }
}
#endif

}  // namespace

// What the library asks TensorRT for, which is this program here.
extern "C" __attribute__((visibility("default"))) int32_t getInferLibVersion() noexcept { return reported_version; }

#if !defined(__SANITIZE_ADDRESS__)
// Every allocation of this process, the library's included, unless told to fail.
extern "C" void* __libc_malloc(size_t);
extern "C" __attribute__((visibility("default"))) void* malloc(size_t size) {
  return no_memory ? nullptr : __libc_malloc(size);
}
#endif

int main(int count, char** arguments) {
  const std::string mode = count > 2 ? arguments[2] : "";
  const std::map<std::string, Kernels> enqueues = {
      {"enqueue-host", Kernels::kHost}, {"enqueue-emulated", Kernels::kEmulated}, {"enqueue-gpu", Kernels::kGpu}};
  const bool enqueue = enqueues.count(mode) != 0;
  if (count != (enqueue ? 5 : 3)) {
    fprintf(stderr, "usage: trt_test LIBRARY MODE [CASES RESULTS]\n");
    return 100;
  }
  load(arguments[1]);
  printf("TensorRT headers %d.%d.%d\n", NV_TENSORRT_MAJOR, NV_TENSORRT_MINOR, NV_TENSORRT_PATCH);
  test_creators();
  if (mode != "no-memory") set_finder(&finder);
  if (enqueue) {
    test_enqueue(enqueues.at(mode), arguments[3], arguments[4]);
  } else if (mode == "contract") {
    test_fields();
    test_sides();
    test_dual();
  } else if (mode == "no-gpu") {
    test_no_gpu();
  } else if (mode == "foreign-logger") {
    test_foreign_logger();
#if !defined(__SANITIZE_ADDRESS__)
  } else if (mode == "no-memory") {
    test_no_memory();
#endif
  } else {
    fprintf(stderr, "unknown mode %s\n", mode.c_str());
    return 100;
  }
  for (const auto& [severity, line] : logger.lines) check(false, "left in the logger: " + line);
  printf("%d checks, %d failures\n", checks, failures);
  return std::min(failures, 100);
}

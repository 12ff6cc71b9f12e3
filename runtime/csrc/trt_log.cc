#include "trt_log.h"

#include <dlfcn.h>
#include <stdio.h>
#include <string.h>

#include <atomic>

#include "trt_plugin.h"

namespace hcmen {
namespace {

std::atomic<nvinfer1::ILoggerFinder*> logger_finder{nullptr};

// The major version of the TensorRT whose object this is, or 0. ILoggerFinder and ILogger are laid out differently in
// TensorRT 10 and 11, while all that plugins are made of is not: this library works in either, whichever it was built
// for, as long as it leaves the other one's logger alone.
int major_version_behind(const void* object) {
  const void* functions;
  memcpy(&functions, object, sizeof functions);
  Dl_info where;
  if (dladdr(functions, &where) == 0) return 0;
  void* library = dlopen(where.dli_fname, RTLD_LAZY | RTLD_NOLOAD);
  void* const found = dlsym(library ? library : RTLD_DEFAULT, "getInferLibVersion");
  int version = 0;
  if (found) {
    int32_t (*get_version)();
    memcpy(&get_version, &found, sizeof get_version);
    version = get_version();
  }
  if (library) dlclose(library);
  // 10.3.0 is 100300; before 10 it was 8601 for 8.6.1.
  return version / 10000;
}

}  // namespace

op::Line& add_shown(op::Line& line, const char* bytes, size_t size) {
  constexpr size_t kMost = 80;
  for (size_t i = 0; i < size && i < kMost; ++i) {
    const bool plain = bytes[i] >= ' ' && bytes[i] <= '~';
    plain ? line.add("%c", bytes[i]) : line.add("\\x%02x", (unsigned)(unsigned char)bytes[i]);
  }
  return size > kMost ? line.add("...") : line;
}

op::Line& add_shown(op::Line& line, const char* string) { return add_shown(line, string, strlen(string)); }

void report(nvinfer1::ILogger::Severity severity, const op::Line& line) {
  nvinfer1::ILogger* logger = nullptr;
  if (nvinfer1::ILoggerFinder* finder = logger_finder.load()) {
    try {
      logger = finder->findLogger();
    } catch (...) {  // not declared noexcept; without a logger there is still stderr
    }
  }
  if (logger) {
    logger->log(severity, line.text());
  } else {
    const bool warning = severity == nvinfer1::ILogger::Severity::kWARNING;
    fprintf(stderr, "%s: %s\n", warning ? "warning" : "error", line.text());
  }
}

}  // namespace hcmen

extern "C" HCMEN_TRT_EXPORT void setLoggerFinder(nvinfer1::ILoggerFinder* finder) {
  const bool own = finder && hcmen::major_version_behind(finder) == NV_TENSORRT_MAJOR;
  hcmen::logger_finder.store(own ? finder : nullptr);
}

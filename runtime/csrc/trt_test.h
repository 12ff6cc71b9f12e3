// What the tests of the TensorRT plugins share: what TensorRT would bring, the library, and tensors as docs/op.md has
// them, written down apart from op_table.h.
#ifndef HCMEN_TRT_TEST_H_
#define HCMEN_TRT_TEST_H_

#include <string.h>

#include <algorithm>
#include <functional>
#include <map>
#include <memory>
#include <string>
#include <vector>

#include <dlfcn.h>
#include <stdio.h>
#include <stdlib.h>

#include "trt_plugin.h"

namespace trt = nvinfer1;
using trt::DataType;
using trt::PluginFieldType;
using trt::TensorRTPhase;

inline int checks = 0, failures = 0;

inline void check(bool good, const std::string& what) {
  ++checks;
  if (good) return;
  ++failures;
  printf("FAILED %s\n", what.c_str());
}

// --- what TensorRT would bring --------------------------------------------------------------------------------------

// Its version, as the library asks for it.
inline int32_t reported_version = NV_TENSORRT_VERSION;

inline struct Logger final : trt::ILogger {
  std::vector<std::pair<Severity, std::string>> lines;
  void log(Severity severity, const char* line) noexcept override { lines.emplace_back(severity, line); }
} logger;

inline struct Finder final : trt::ILoggerFinder {
  int asked = 0;
  trt::ILogger* findLogger() override { return ++asked, &logger; }
} finder;

// `call` says "no" and logs exactly one error, of one line, that holds `text`.
inline void refused(bool no, const std::string& what, const std::string& text) {
  check(no, what + ": accepted, expected an error");
  const bool one = logger.lines.size() == 1 && logger.lines[0].first == trt::ILogger::Severity::kERROR;
  check(one, what + ": " + std::to_string(logger.lines.size()) + " lines logged, expected one error");
  if (!logger.lines.empty()) {
    const std::string& line = logger.lines[0].second;
    check(line.find(text) != std::string::npos, what + ": the error is \"" + line + "\", expected \"" + text + "\"");
    check(line.find('\n') == std::string::npos, what + ": the error has several lines");
  }
  logger.lines.clear();
}

// `call` says "yes" and logs nothing.
inline void accepted(bool yes, const std::string& what) {
  std::string line = logger.lines.empty() ? "" : ": " + logger.lines[0].second;
  check(yes, what + ": refused" + line);
  check(!yes || logger.lines.empty(), what + ": accepted, but logged" + line);
  logger.lines.clear();
}

// Expressions: constants, and named sizes that become numbers later.
struct Expression final : trt::IDimensionExpr {
  struct Impl final : trt::apiv::VDimensionExpr {
    bool constant = false;
    int64_t value = 0;
    bool isConstant() const override { return constant; }
    int64_t getConstantValue() const override { return constant ? value : INT64_MIN; }
    bool isSizeTensor() const override { return false; }
  } impl;
  std::function<int64_t()> evaluate;
  Expression() { mImpl = &impl; }
  ~Expression() noexcept override = default;
};

struct Builder final : trt::IExprBuilder {
  struct Impl final : trt::apiv::VExprBuilder {
    std::vector<std::unique_ptr<Expression>> all;
    Expression* add(std::function<int64_t()> evaluate) {
      all.push_back(std::make_unique<Expression>());
      all.back()->evaluate = std::move(evaluate);
      return all.back().get();
    }
    const trt::IDimensionExpr* constant(int64_t value) override {
      Expression* const made = add([value] { return value; });
      made->impl.constant = true, made->impl.value = value;
      return made;
    }
    // The plugins' sizes are those of their inputs: nothing is computed.
    const trt::IDimensionExpr* operation(trt::DimensionOperation, const trt::IDimensionExpr&,
                                         const trt::IDimensionExpr&) override {
      return nullptr;
    }
    const trt::IDimensionExpr* declareSizeTensor(int32_t, const trt::IDimensionExpr&,
                                                 const trt::IDimensionExpr&) override {
      return nullptr;
    }
  } impl;
  Builder() { mImpl = &impl; }
  ~Builder() noexcept override = default;
};

struct Context final : trt::IPluginResourceContext {
  trt::IGpuAllocator* getGpuAllocator() const noexcept override { return nullptr; }
  trt::IErrorRecorder* getErrorRecorder() const noexcept override { return nullptr; }
};

// --- the library ----------------------------------------------------------------------------------------------------

inline std::map<std::string, trt::IPluginCreatorV3One*> creators;
inline void (*set_finder)(trt::ILoggerFinder*) = nullptr;

inline void load(const char* path) {
  void* const library = dlopen(path, RTLD_NOW | RTLD_LOCAL);
  if (!library) {
    printf("FAILED %s\n", dlerror());
    exit(100);
  }
  const auto get_creators = (trt::IPluginCreatorInterface* const* (*)(int32_t&))dlsym(library, "getCreators");
  set_finder = (void (*)(trt::ILoggerFinder*))dlsym(library, "setLoggerFinder");
  check(get_creators && set_finder, "getCreators and setLoggerFinder are exported");
  if (!get_creators || !set_finder) exit(100);
  int32_t count = -1, again = -1;
  trt::IPluginCreatorInterface* const* all = get_creators(count);
  check(count == 3, "getCreators gives three creators");
  check(get_creators(again) == all && again == count, "getCreators gives the same creators again");
  for (int i = 0; i < count; ++i) {
    const trt::InterfaceInfo info = all[i]->getInterfaceInfo();
    check(!strcmp(info.kind, "PLUGIN CREATOR_V3ONE") && info.major == 1, "creators are of the kind V3ONE");
    auto* const creator = static_cast<trt::IPluginCreatorV3One*>(all[i]);
    creators[creator->getPluginName()] = creator;
  }
}

struct Deleter {
  void operator()(trt::IPluginV3* plugin) const { delete plugin; }
};

// A plugin and its three sides.
struct Plugin {
  std::unique_ptr<trt::IPluginV3, Deleter> self;
  trt::IPluginV3OneCore* core = nullptr;
  trt::IPluginV3OneBuild* build = nullptr;
  trt::IPluginV3OneRuntime* runtime = nullptr;

  explicit Plugin(trt::IPluginV3* plugin) : self(plugin) {
    if (!plugin) return;
    core = static_cast<trt::IPluginV3OneCore*>(plugin->getCapabilityInterface(trt::PluginCapabilityType::kCORE));
    build = static_cast<trt::IPluginV3OneBuild*>(plugin->getCapabilityInterface(trt::PluginCapabilityType::kBUILD));
    runtime =
        static_cast<trt::IPluginV3OneRuntime*>(plugin->getCapabilityInterface(trt::PluginCapabilityType::kRUNTIME));
  }
  explicit operator bool() const { return self != nullptr; }
  std::string id() const { return build->getTimingCacheID(); }
};

// Plugin fields as the ONNX parser hands them over: data that is gone after the call, at any address.
class Fields {
 public:
  template <class T>
  Fields& number(const char* name, T value, PluginFieldType type, int32_t length = 1) {
    return bytes(name, &value, sizeof value, type, length);
  }
  Fields& flag(const char* name, int32_t value) { return number(name, value, PluginFieldType::kINT32); }
  Fields& text(const char* name, const std::string& value) {
    return bytes(name, value.data(), value.size(), PluginFieldType::kCHAR, (int32_t)value.size());
  }
  Fields& bytes(const char* name, const void* data, size_t size, PluginFieldType type, int32_t length) {
    // One byte past an even address, and not a byte more than there is.
    std::shared_ptr<char[]> block(new char[size + 1]);
    if (size) memcpy(block.get() + 1, data, size);
    names_.push_back(name ? std::make_shared<std::string>(name) : nullptr);
    fields_.emplace_back(name ? names_.back()->c_str() : nullptr, data ? block.get() + 1 : nullptr, type, length);
    blocks_.push_back(block);
    return *this;
  }
  // A deep copy of what a plugin serialises, as an engine keeps it.
  static Fields of(const trt::PluginFieldCollection* collection) {
    Fields copy;
    for (int i = 0; i < collection->nbFields; ++i) {
      const trt::PluginField& field = collection->fields[i];
      const size_t size = field.type == PluginFieldType::kCHAR ? 1 : 4;
      copy.bytes(field.name, field.data, size * (size_t)field.length, field.type, field.length);
    }
    return copy;
  }
  const trt::PluginFieldCollection* get() {
    collection_.nbFields = (int32_t)fields_.size();
    collection_.fields = fields_.data();
    return &collection_;
  }
  void drop(size_t i) { fields_.erase(fields_.begin() + (long)i); }

 private:
  std::vector<std::shared_ptr<std::string>> names_;
  std::vector<std::shared_ptr<char[]>> blocks_;
  std::vector<trt::PluginField> fields_;
  trt::PluginFieldCollection collection_;
};

inline Plugin create(const char* name, Fields& fields, TensorRTPhase phase = TensorRTPhase::kBUILD,
              const char* layer = "node") {
  return Plugin(creators.at(name)->createPlugin(layer, fields.get(), phase));
}

// The switches of a scan.
struct Switches {
  bool softplus = false, reverse = false, gated = false, stateful = false;

  static Switches of(int bits) { return {(bits & 1) != 0, (bits & 2) != 0, (bits & 4) != 0, (bits & 8) != 0}; }
  Fields fields() const {
    Fields made;
    made.flag("delta_softplus", softplus).flag("reverse", reverse).flag("gated", gated).flag("stateful", stateful);
    return made;
  }
  Plugin create() const {
    Fields made = fields();
    return ::create("SelectiveScan", made);
  }
  int inputs() const { return 7 + gated + stateful; }
  int outputs() const { return 1 + stateful; }
};

// --- tensors --------------------------------------------------------------------------------------------------------

// One tensor as the specification has it. `shared`: of the type of the first input.
struct Tensor {
  std::string name;
  bool shared;
  std::vector<int64_t> shape;
};

struct ScanSizes {
  int64_t batch = 2, time = 5, channel = 6, state = 3, group = 0;  // group 0: B and C of rank 3
};

inline std::vector<Tensor> scan_tensors(const ScanSizes& s, const Switches& switches) {
  const std::vector<int64_t> series = {s.batch, s.time, s.channel}, states = {s.batch, s.channel, s.state};
  const std::vector<int64_t> projection = s.group ? std::vector<int64_t>{s.batch, s.time, s.group, s.state}
                                                  : std::vector<int64_t>{s.batch, s.time, s.state};
  std::vector<Tensor> all = {
      {"u", true, series},     {"delta", true, series},   {"A", false, {s.channel, s.state}}, {"B", true, projection},
      {"C", true, projection}, {"D", false, {s.channel}}, {"delta_bias", false, {s.channel}}};
  if (switches.gated) all.push_back({"z", true, series});
  if (switches.stateful) all.push_back({"initial_state", false, states});
  all.push_back({"y", true, series});
  if (switches.stateful) all.push_back({"last_state", false, states});
  return all;
}

inline std::vector<Tensor> conv_tensors(int64_t batch, int64_t time, int64_t channel, int64_t width,
                                        bool stateful = false) {
  std::vector<Tensor> all = {
      {"x", true, {batch, time, channel}}, {"weight", false, {channel, width}}, {"bias", false, {channel}}};
  if (stateful) all.push_back({"initial_state", false, {batch, width - 1, channel}});
  all.push_back({"y", true, {batch, time, channel}});
  if (stateful) all.push_back({"last_state", false, {batch, width - 1, channel}});
  return all;
}

inline Plugin create_conv(bool stateful) {
  Fields fields;
  fields.flag("stateful", stateful);
  return create("CausalConv1d", fields);
}

inline trt::Dims dims_of(const std::vector<int64_t>& shape) {
  trt::Dims dims = {};
  dims.nbDims = (int32_t)shape.size();
  std::copy(shape.begin(), shape.end(), dims.d);
  return dims;
}

inline std::vector<trt::PluginTensorDesc> descs_of(const std::vector<Tensor>& tensors, DataType type) {
  std::vector<trt::PluginTensorDesc> descs;
  for (const Tensor& tensor : tensors) {
    trt::PluginTensorDesc desc = {};
    desc.dims = dims_of(tensor.shape);
    desc.type = tensor.shared ? type : DataType::kFLOAT;
    desc.format = trt::TensorFormat::kLINEAR;
    desc.scale = 1;
    descs.push_back(desc);
  }
  return descs;
}

// As the builder gives them: batch and time unknown, with bounds.
inline std::vector<trt::DynamicPluginTensorDesc> dynamic_of(const std::vector<Tensor>& most, DataType type) {
  std::vector<trt::DynamicPluginTensorDesc> all;
  for (const Tensor& tensor : most) {
    const trt::PluginTensorDesc desc = descs_of({tensor}, type)[0];
    trt::DynamicPluginTensorDesc one = {desc, desc.dims, desc.dims, desc.dims};
    const bool states = tensor.name == "initial_state" || tensor.name == "last_state";
    for (int i = 0; one.desc.dims.nbDims >= 3 && i < (states ? 1 : 2); ++i) one.desc.dims.d[i] = -1, one.min.d[i] = 1;
    all.push_back(one);
  }
  return all;
}

// Tensors spoilt in one way each, and a part of the error that says so.
inline std::string shown(const std::vector<int64_t>& shape) {
  std::string text = "[";
  for (size_t i = 0; i < shape.size(); ++i) text += (i ? ", " : "") + std::to_string(shape[i]);
  return text + "]";
}

// Every dimension of every input wrong in turn, every rank wrong, and the few that go wrong in a way of their own.
struct Spoiled {
  std::vector<Tensor> tensors;
  std::string error;
};

inline std::vector<Spoiled> spoil(const std::vector<Tensor>& tensors, size_t count, bool scan) {
  std::vector<Spoiled> all;
  const auto add = [&](size_t i, std::vector<int64_t> shape, const std::string& error) {
    std::vector<Tensor> copy = tensors;
    copy[i].shape = std::move(shape);
    all.push_back({copy, error});
  };
  for (size_t i = 0; i < count; ++i) {
    const std::vector<int64_t>& shape = tensors[i].shape;
    const std::string own = "'" + tensors[i].name + "' has shape ";
    for (size_t k = 0; k < shape.size(); ++k) {
      std::vector<int64_t> wrong = shape;
      wrong[k] += 1;
      // The first tensor sets the sizes, A the state, B the groups, a weight its width: then another one is wrong.
      const bool sets = i == 0 || (scan && tensors[i].name == "A" && k == 1) || tensors[i].name == "weight" ||
                        (tensors[i].name == "B" && shape.size() == 4 && k == 2);
      // Nor does another know the width, then.
      const bool width = tensors[i].name == "weight" && k == 1 && tensors.size() == 4;
      // Of a convolution's inputs, only the first knows of time, and of the batch unless there is a state.
      const bool alone = !scan && i == 0 && (k == 1 || (k == 0 && count == 3)) && count < tensors.size();
      if (!width && !alone) add(i, wrong, sets ? "has " : own + shown(wrong) + ", expected ");
      wrong[k] = 0;
      add(i, wrong, own + shown(wrong) + ", expected ");
      all.back().error = "every size at least 1";
    }
    std::vector<int64_t> longer = shape, shorter = shape;
    longer.push_back(1), longer.push_back(1);
    shorter.pop_back();
    add(i, longer, own);
    if (!(scan && shape.size() == 4 && tensors[i].name == "B")) add(i, shorter, own);
    add(i, {}, own + "[]");
  }
  if (scan) {
    // B and C are of one shape, even where both mean the same.
    std::vector<int64_t> shape = tensors[4].shape;
    shape.size() == 3 ? (void)shape.insert(shape.begin() + 2, 1) : (void)shape.erase(shape.begin() + 2);
    add(4, shape, "'C' has shape ");
    for (int64_t group : {4, 5, 7, 12}) {
      std::vector<Tensor> copy = tensors;
      const std::vector<int64_t>& b = tensors[3].shape;
      copy[3].shape = copy[4].shape = {b[0], b[1], group, b.back()};
      all.push_back({copy, "input 'B' has " + std::to_string(group) + " groups, expected a number that divides"});
    }
  }
  return all;
}

// --- the tests ------------------------------------------------------------------------------------------------------

// trt_test_fields.cc
void test_creators();
void test_fields();
// trt_test_sides.cc
void test_sides();
// trt_test_dual.cc
void test_dual();
// trt_test_enqueue.cc
enum class Kernels { kHost, kEmulated, kGpu };
void test_enqueue(Kernels kernels, const char* cases, const char* results);
void test_no_gpu();

#endif  // HCMEN_TRT_TEST_H_

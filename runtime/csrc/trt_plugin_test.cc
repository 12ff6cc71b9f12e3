// The contract of libhcmen_trt.so, called as TensorRT calls it, without TensorRT: expression builder, resource context
// and logger are this file's own.
//
//   trt_plugin_test LIBRARY contract        every method in the documented order, with good and with bad arguments
//   trt_plugin_test LIBRARY enqueue-host    results against a double-precision oracle; the library has host kernels
//   trt_plugin_test LIBRARY enqueue-emulated    likewise; the library has the CUDA kernels, compiled for the host
//   trt_plugin_test LIBRARY enqueue-gpu     the same with device memory and a stream, and as a CUDA graph
//   trt_plugin_test LIBRARY no-gpu          without a usable GPU `enqueue` is an error, and nothing worse
//   trt_plugin_test LIBRARY foreign-logger  the logger of another major version is left alone: errors are on stderr
//   trt_plugin_test LIBRARY no-memory       failing allocations are errors, and nothing worse
//
// Prints what failed, and returns the number of failures (at most 100).
#include "trt_plugin.h"

#include <cuda_runtime_api.h>
#include <dlfcn.h>
#include <math.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>

#include <algorithm>
#include <functional>
#include <map>
#include <memory>
#include <set>
#include <string>
#include <vector>

namespace trt = nvinfer1;
using trt::DataType;
using trt::PluginFieldType;
using trt::TensorRTPhase;

namespace {

int checks = 0, failures = 0;

void check(bool good, const std::string& what) {
  ++checks;
  if (good) return;
  ++failures;
  printf("FAILED %s\n", what.c_str());
}

// --- what TensorRT would bring --------------------------------------------------------------------------------------

// Its version, as the library asks for it.
int32_t reported_version = NV_TENSORRT_VERSION;

struct Logger final : trt::ILogger {
  std::vector<std::pair<Severity, std::string>> lines;
  void log(Severity severity, const char* line) noexcept override { lines.emplace_back(severity, line); }
} logger;

struct Finder final : trt::ILoggerFinder {
  int asked = 0;
  trt::ILogger* findLogger() override { return ++asked, &logger; }
} finder;

// `call` says "no" and logs exactly one error, of one line, that holds `text`.
void refused(bool no, const std::string& what, const std::string& text) {
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
void accepted(bool yes, const std::string& what) {
  std::string line = logger.lines.empty() ? "" : ": " + logger.lines[0].second;
  check(yes, what + ": refused" + line);
  check(!yes || logger.lines.empty(), what + ": accepted, but logged" + line);
  logger.lines.clear();
}

// Expressions: constants, named sizes that become numbers later, and operations on them.
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
    const trt::IDimensionExpr* operation(trt::DimensionOperation op, const trt::IDimensionExpr& first,
                                         const trt::IDimensionExpr& second) override {
      const Expression *a = static_cast<const Expression*>(&first), *b = static_cast<const Expression*>(&second);
      return add([op, a, b]() -> int64_t {
        const int64_t x = a->evaluate(), y = b->evaluate();
        switch (op) {
          case trt::DimensionOperation::kSUM:
            return x + y;
          case trt::DimensionOperation::kPROD:
            return x * y;
          case trt::DimensionOperation::kSUB:
            return x - y;
          case trt::DimensionOperation::kMAX:
            return std::max(x, y);
          case trt::DimensionOperation::kMIN:
            return std::min(x, y);
          default:
            return INT64_MIN;
        }
      });
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

std::map<std::string, trt::IPluginCreatorV3One*> creators;
void (*set_finder)(trt::ILoggerFinder*) = nullptr;

void load(const char* path) {
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
  check(count == 2, "getCreators gives two creators");
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
      const size_t size = field.type == PluginFieldType::kINT32 ? 4 : 1;
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

Plugin create(const char* name, Fields& fields, TensorRTPhase phase = TensorRTPhase::kBUILD,
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

std::vector<Tensor> scan_tensors(const ScanSizes& s, const Switches& switches) {
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

std::vector<Tensor> conv_tensors(int64_t batch, int64_t time, int64_t channel, int64_t width) {
  return {{"x", true, {batch, time, channel}},
          {"weight", false, {channel, width}},
          {"bias", false, {channel}},
          {"y", true, {batch, time, channel}}};
}

trt::Dims dims_of(const std::vector<int64_t>& shape) {
  trt::Dims dims = {};
  dims.nbDims = (int32_t)shape.size();
  std::copy(shape.begin(), shape.end(), dims.d);
  return dims;
}

std::vector<trt::PluginTensorDesc> descs_of(const std::vector<Tensor>& tensors, DataType type) {
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
std::vector<trt::DynamicPluginTensorDesc> dynamic_of(const std::vector<Tensor>& most, DataType type) {
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

// --- creators and attributes ----------------------------------------------------------------------------------------

void test_creators() {
  const std::map<std::string, std::set<std::string>> expected = {
      {"SelectiveScan", {"delta_softplus", "reverse", "gated", "stateful"}},
      {"CausalConv1d", {"activation", "reverse"}}};
  for (const auto& [name, attributes] : expected) {
    check(creators.count(name) == 1, "there is a creator of " + name);
    if (!creators.count(name)) exit(100);
    trt::IPluginCreatorV3One* const creator = creators[name];
    check(!strcmp(creator->getPluginVersion(), "1"), name + " has version 1");
    check(!strcmp(creator->getPluginNamespace(), "hcmen"), name + " is in the namespace hcmen");
    std::set<std::string> names;
    const trt::PluginFieldCollection* fields = creator->getFieldNames();
    for (int i = 0; i < fields->nbFields; ++i) {
      names.insert(fields->fields[i].name);
      const bool text = !strcmp(fields->fields[i].name, "activation");
      check(fields->fields[i].type == (text ? PluginFieldType::kCHAR : PluginFieldType::kINT32),
            name + " announces the type of " + fields->fields[i].name);
    }
    check(names == attributes, name + " announces its attributes");
  }
}

void test_good_fields() {
  std::set<std::string> ids;
  for (int bits = 0; bits < 16; ++bits) {
    const Switches s = Switches::of(bits);
    const std::string what = "SelectiveScan with switches " + std::to_string(bits);
    Fields narrow = s.fields(), wide;
    wide.number("stateful", (int64_t)s.stateful, PluginFieldType::kINT64)
        .number("gated", (int64_t)s.gated, PluginFieldType::kINT64)
        .number("reverse", (int64_t)s.reverse, PluginFieldType::kINT64)
        .number("delta_softplus", (int64_t)s.softplus, PluginFieldType::kINT64);
    const int32_t directions[4] = {s.reverse, s.reverse, s.reverse, s.reverse};
    wide.bytes("scan_input_directions", directions, sizeof directions, PluginFieldType::kINT32, 4)
        .bytes("scan_output_directions", directions, 4, PluginFieldType::kINT32, 1)
        .text("plugin_namespace", std::string("hcmen\0", 6))
        .text("plugin_version", "1");
    Plugin first = create("SelectiveScan", narrow);
    accepted((bool)first, what);
    Plugin second = create("SelectiveScan", wide);
    accepted((bool)second, what + " as 64-bit integers, among attributes for others");
    if (!first || !second) continue;
    check(first.id() == second.id(), what + ": the same timing-cache id from either integer");
    check(first.build->getNbOutputs() == s.outputs(), what + ": number of outputs");
    ids.insert(first.id());
  }
  check(ids.size() == 16, "each set of switches has a timing-cache id of its own");

  Fields nothing;
  Plugin by_default = create("SelectiveScan", nothing);
  accepted((bool)by_default, "SelectiveScan without fields");
  check(by_default && by_default.id() == Switches().create().id(), "SelectiveScan without fields has the defaults");
  Plugin from_null(creators["SelectiveScan"]->createPlugin(nullptr, nullptr, TensorRTPhase::kBUILD));
  accepted((bool)from_null, "SelectiveScan from null, without a name");

  for (int reverse = 0; reverse < 2; ++reverse) {
    for (const char* activation : {"none", "silu"}) {
      std::set<std::string> same;
      for (size_t zeros : {0, 1, 3}) {
        Fields fields;
        const int32_t pads[2] = {3, 0};
        fields.text("activation", activation + std::string(zeros, '\0')).flag("reverse", reverse).flag("group", 6);
        fields.bytes("pads", pads, sizeof pads, PluginFieldType::kINT32, 2);
        Plugin conv = create("CausalConv1d", fields);
        accepted((bool)conv, std::string("CausalConv1d with activation ") + activation);
        if (!conv) continue;
        same.insert(conv.id());
        check(conv.build->getNbOutputs() == 1, "CausalConv1d has one output");
      }
      check(same.size() == 1, "closing zeros of a string mean nothing");
      ids.insert(same.begin(), same.end());
    }
  }
  check(ids.size() == 20, "each convolution has a timing-cache id of its own");

  Fields unknown;
  unknown.flag("gated", 1).flag("fla\nvour", 3);
  Plugin plugin = create("SelectiveScan", unknown);
  check(plugin && logger.lines.size() == 1 && logger.lines[0].first == trt::ILogger::Severity::kWARNING &&
            logger.lines[0].second.find("'fla\\x0avour' is unknown") != std::string::npos,
        "an unknown attribute is let pass with a warning while an engine is built");
  logger.lines.clear();
}

void test_bad_fields() {
  const auto bad = [](const char* name, Fields fields, const std::string& text, const char* layer = "node",
                      TensorRTPhase phase = TensorRTPhase::kBUILD) {
    refused(!create(name, fields, phase, layer), std::string(name) + " expecting '" + text + "'", text);
  };
  const int64_t wide = (int64_t)1 << 32;
  const float real = 1;
  for (const char* name : {"delta_softplus", "reverse", "gated", "stateful"}) {
    const std::string attribute = std::string("attribute '") + name + "' ";
    bad("SelectiveScan", Fields().flag(name, 2), attribute + "is 2, expected 0 or 1 (layer 'node')");
    bad("SelectiveScan", Fields().flag(name, -1), attribute + "is -1, expected 0 or 1");
    bad("SelectiveScan", Fields().number(name, wide, PluginFieldType::kINT64), attribute + "is 4294967296");
    bad("SelectiveScan", Fields().number(name, wide + 1, PluginFieldType::kINT64), attribute + "is 4294967297");
    bad("SelectiveScan", Fields().number(name, real, PluginFieldType::kFLOAT32), attribute + "is a field of type 1");
    bad("SelectiveScan", Fields().number(name, (int16_t)1, PluginFieldType::kINT16), "expected one integer");
    bad("SelectiveScan", Fields().number(name, 1, PluginFieldType::kUNKNOWN), "expected one integer");
    bad("SelectiveScan", Fields().number(name, 1, PluginFieldType::kINT32, 0), "and length 0");
    bad("SelectiveScan", Fields().number(name, 1, PluginFieldType::kINT32, -1), "and length -1");
    bad("SelectiveScan", Fields().number(name, wide, PluginFieldType::kINT32, 2), "and length 2");
    bad("SelectiveScan", Fields().text(name, "1"), "expected one integer");
    bad("SelectiveScan", Fields().bytes(name, nullptr, 0, PluginFieldType::kINT32, 1), attribute + "has no data");
    bad("SelectiveScan", Fields().flag(name, 1).flag(name, 1), "is given twice");
  }
  bad("CausalConv1d", Fields().flag("reverse", 7), "CausalConv1d: attribute 'reverse' is 7");
  bad("CausalConv1d", Fields().text("activation", "relu"), R"(is "relu", expected "none" or "silu")");
  bad("CausalConv1d", Fields().text("activation", ""), R"(is "", expected)");
  bad("CausalConv1d", Fields().text("activation", "sil"), R"(is "sil", expected)");
  bad("CausalConv1d", Fields().text("activation", "silu2"), R"(is "silu2", expected)");
  bad("CausalConv1d", Fields().text("activation", std::string("silu\0x", 6)), R"(is "silu\x00x", expected)");
  bad("CausalConv1d", Fields().text("activation", "a\nb\xff"), R"(is "a\x0ab\xff", expected)");
  bad("CausalConv1d", Fields().text("activation", std::string(5000, 'a')), "aaa...\", expected");
  bad("CausalConv1d", Fields().flag("activation", 1), "expected a string");
  bad("CausalConv1d", Fields().bytes("activation", "silu", 4, PluginFieldType::kCHAR, -1), "and length -1");
  bad("CausalConv1d", Fields().bytes("activation", nullptr, 0, PluginFieldType::kCHAR, 4), "has no data");
  bad("SelectiveScan", Fields().flag(nullptr, 1), "plugin field 0 has no name");
  bad("SelectiveScan", Fields().flag("gated", 3), "expected 0 or 1 (layer 'two\\x0alines')", "two\nlines");
  bad("SelectiveScan", Fields().flag("gated", 3), "(layer 'nnn", std::string(3000, 'n').c_str());
  bad("SelectiveScan", Fields(), "unknown phase 7", "node", (TensorRTPhase)7);

  // What an engine holds is complete and known, or it is refused.
  const auto damaged = [&](Fields fields, const std::string& text) {
    bad("SelectiveScan", std::move(fields), text, "node", TensorRTPhase::kRUNTIME);
  };
  damaged(Fields(), "the engine holds no field 'delta_softplus'");
  damaged(Switches().fields().flag("flavour", 1), "the engine holds a field 'flavour', unknown to this library");
  for (size_t i = 0; i < 4; ++i) {
    Fields fields = Switches().fields();
    fields.drop(i);
    damaged(std::move(fields), "the engine holds no field '");
  }
  trt::IPluginCreatorV3One* const creator = creators["SelectiveScan"];
  refused(!creator->createPlugin("node", nullptr, TensorRTPhase::kRUNTIME), "no fields at run time", "holds no field");
  trt::PluginFieldCollection collection = {};
  collection.nbFields = 2;
  refused(!creator->createPlugin("node", &collection, TensorRTPhase::kBUILD), "fields at null", "got 2 plugin fields");
  collection.nbFields = -1;
  refused(!creator->createPlugin("node", &collection, TensorRTPhase::kBUILD), "-1 fields", "got -1 plugin fields");
}

// --- the sides of a plugin ------------------------------------------------------------------------------------------

void test_identity() {
  for (const char* name : {"SelectiveScan", "CausalConv1d"}) {
    Fields nothing;
    Plugin plugin = create(name, nothing);
    const std::string what = name;
    check(plugin.core && plugin.build && plugin.runtime, what + " has its three capabilities");
    check(!strcmp(plugin.self->getInterfaceInfo().kind, "PLUGIN"), what + " is a PLUGIN");
    check(!strcmp(plugin.core->getInterfaceInfo().kind, "PLUGIN_V3ONE_CORE"), what + ": the core side is one");
    check(!strcmp(plugin.build->getInterfaceInfo().kind, "PLUGIN_V3ONE_BUILD"), what + ": the build side is one");
    check(!strcmp(plugin.runtime->getInterfaceInfo().kind, "PLUGIN_V3ONE_RUNTIME"), what + ": the runtime side is one");
    check(!strcmp(plugin.core->getPluginName(), name) && !strcmp(plugin.core->getPluginVersion(), "1") &&
              !strcmp(plugin.core->getPluginNamespace(), "hcmen"),
          what + " names itself as its creator does");
    refused(!plugin.self->getCapabilityInterface((trt::PluginCapabilityType)9), what + " capability 9", "capability 9");
    check(plugin.build->getNbTactics() == 0, what + " has no tactics");
    check(plugin.build->getValidTactics(nullptr, 0) == 0, what + " lists no tactics");
    accepted(plugin.runtime->setTactic(0) == 0, what + " takes the default tactic");
    refused(plugin.runtime->setTactic(3) != 0, what + " tactic 3", "tactic 3");
    check(plugin.build->getMetadataString() && strlen(plugin.build->getMetadataString()) < 1024, what + " metadata");
    const std::string id = plugin.id();
    check(plugin.id() == id, what + ": the timing-cache id stays");
    Plugin renamed = create(name, nothing, TensorRTPhase::kBUILD, "another node");
    check(renamed.id() == id, what + ": the name of a layer is not in the timing-cache id");
    Plugin unnamed = create(name, nothing, TensorRTPhase::kBUILD, "");
    refused(unnamed.runtime->setTactic(1) != 0, "an unnamed layer", "no tactics");
  }
}

void test_types() {
  const auto all = {DataType::kFLOAT, DataType::kHALF, DataType::kINT8, DataType::kINT32, DataType::kBOOL,
                    DataType::kUINT8, DataType::kFP8,  DataType::kBF16, DataType::kINT64, DataType::kINT4};
  for (int bits = 0; bits < 16; ++bits) {
    const Switches s = Switches::of(bits);
    Plugin plugin = s.create();
    const std::vector<Tensor> tensors = scan_tensors(ScanSizes(), s);
    const int inputs = s.inputs(), outputs = s.outputs();
    const std::string what = "switches " + std::to_string(bits);
    for (DataType type : {DataType::kFLOAT, DataType::kHALF}) {
      std::vector<DataType> in, out((size_t)outputs, DataType::kINT4);
      for (int i = 0; i < inputs; ++i) in.push_back(tensors[(size_t)i].shared ? type : DataType::kFLOAT);
      accepted(plugin.build->getOutputDataTypes(out.data(), outputs, in.data(), inputs) == 0, what + " output types");
      check(out[0] == type && (outputs == 1 || out[1] == DataType::kFLOAT), what + ": y as u, last_state float32");
      for (int i = 0; i < inputs; ++i) {
        for (DataType wrong : all) {
          if (wrong == in[(size_t)i] || (i == 0 && wrong == DataType::kHALF)) continue;
          std::vector<DataType> spoiled = in;
          spoiled[(size_t)i] = wrong;
          if (i == 0 && wrong == DataType::kFLOAT) {
            refused(plugin.build->getOutputDataTypes(out.data(), outputs, spoiled.data(), inputs) != 0, what,
                    "input 'delta' is float16, expected float32, the type of 'u'");
            continue;
          }
          refused(plugin.build->getOutputDataTypes(out.data(), outputs, spoiled.data(), inputs) != 0, what,
                  "input '" + tensors[(size_t)i].name + "' is ");
        }
      }
      refused(plugin.build->getOutputDataTypes(out.data(), outputs + 1, in.data(), inputs) != 0, what, "outputs, exp");
      refused(plugin.build->getOutputDataTypes(out.data(), outputs, in.data(), inputs - 1) != 0, what,
              "got " + std::to_string(inputs - 1) + " inputs");
      refused(plugin.build->getOutputDataTypes(nullptr, outputs, in.data(), inputs) != 0, what, "no array");
      refused(plugin.build->getOutputDataTypes(out.data(), outputs, nullptr, inputs) != 0, what, "no array");
    }
  }
}

// Asks as the builder does: depth first, each position given all that was accepted before it, and nothing after.
int count_formats(trt::IPluginV3OneBuild* build, const std::vector<Tensor>& tensors, int inputs,
                  std::vector<trt::DynamicPluginTensorDesc>& chosen, bool& as_specified) {
  const int position = (int)chosen.size(), total = (int)tensors.size();
  if (position == total) {
    const DataType first = chosen[0].desc.type;
    for (int i = 0; i < total; ++i) {
      as_specified &= chosen[(size_t)i].desc.type == (tensors[(size_t)i].shared ? first : DataType::kFLOAT);
    }
    return 1;
  }
  int found = 0;
  for (int type = 0; type < 10; ++type) {
    for (int format = 0; format < 13; ++format) {
      trt::DynamicPluginTensorDesc desc = {};
      desc.desc.dims = dims_of(tensors[(size_t)position].shape);
      desc.desc.type = (DataType)type, desc.desc.format = (trt::TensorFormat)format;
      chosen.push_back(desc);
      // A heap block that ends here: whoever looks at a later position is caught.
      std::unique_ptr<trt::DynamicPluginTensorDesc[]> exact(new trt::DynamicPluginTensorDesc[chosen.size()]);
      std::copy(chosen.begin(), chosen.end(), exact.get());
      if (build->supportsFormatCombination(position, exact.get(), inputs, total - inputs)) {
        as_specified &= format == (int)trt::TensorFormat::kLINEAR;
        found += count_formats(build, tensors, inputs, chosen, as_specified);
      }
      chosen.pop_back();
    }
  }
  return found;
}

void test_formats() {
  const auto ask = [](Plugin& plugin, const std::vector<Tensor>& tensors, int inputs, const std::string& what) {
    std::vector<trt::DynamicPluginTensorDesc> chosen;
    bool as_specified = true;
    check(count_formats(plugin.build, tensors, inputs, chosen, as_specified) == 2, what + ": two format combinations");
    check(as_specified, what + ": linear, one shared type, parameters and states float32");
    const int outputs = (int)tensors.size() - inputs;
    const std::vector<trt::DynamicPluginTensorDesc> all = dynamic_of(tensors, DataType::kFLOAT);
    check(plugin.build->supportsFormatCombination(inputs, all.data(), inputs, outputs), what + ": float32 outputs");
    check(!plugin.build->supportsFormatCombination(-1, all.data(), inputs, outputs), what + ": position -1");
    check(!plugin.build->supportsFormatCombination(inputs + outputs, all.data(), inputs, outputs),
          what + ": past the end");
    check(!plugin.build->supportsFormatCombination(0, all.data(), inputs - 1, outputs), what + ": an input too few");
    check(!plugin.build->supportsFormatCombination(0, all.data(), inputs, outputs + 1), what + ": an output too many");
    check(!plugin.build->supportsFormatCombination(0, nullptr, inputs, outputs), what + ": null");
    check(logger.lines.empty(), what + ": asking for formats logs nothing");
  };
  for (int bits = 0; bits < 16; ++bits) {
    const Switches s = Switches::of(bits);
    Plugin plugin = s.create();
    ask(plugin, scan_tensors(ScanSizes(), s), s.inputs(), "switches " + std::to_string(bits));
  }
  Fields nothing;
  Plugin conv = create("CausalConv1d", nothing);
  ask(conv, conv_tensors(2, 5, 6, 4), 3, "CausalConv1d");
}

// --- shapes ---------------------------------------------------------------------------------------------------------

// Output shapes from symbolic input shapes. A dimension of `unknown` becomes a symbol, which is what its tensor's
// number says when asked.
struct Symbolic {
  Builder builder;
  std::vector<trt::DimsExprs> in, out;

  Symbolic(const std::vector<Tensor>& tensors, int inputs, bool dynamic) : out(tensors.size() - (size_t)inputs) {
    for (int i = 0; i < inputs; ++i) {
      trt::DimsExprs dims = {};
      dims.nbDims = (int32_t)tensors[(size_t)i].shape.size();
      for (size_t k = 0; k < tensors[(size_t)i].shape.size(); ++k) {
        const int64_t size = tensors[(size_t)i].shape[k];
        const bool series = dims.nbDims >= 3 && k < 2 && tensors[(size_t)i].name != "initial_state";
        const bool symbol = dynamic && (series || (dims.nbDims >= 3 && k == 0));
        dims.d[k] = symbol ? builder.impl.add([size] { return size; }) : builder.constant(size);
      }
      in.push_back(dims);
    }
    for (trt::DimsExprs& dims : out) dims.nbDims = -77;
  }
  int run(Plugin& plugin, int shape_inputs = 0) {
    return plugin.build->getOutputShapes(in.data(), (int32_t)in.size(), nullptr, shape_inputs, out.data(),
                                         (int32_t)out.size(), builder);
  }
  std::vector<int64_t> evaluate(size_t i) const {
    std::vector<int64_t> shape;
    for (int k = 0; k < out[i].nbDims; ++k) shape.push_back(static_cast<const Expression*>(out[i].d[k])->evaluate());
    return shape;
  }
};

std::string shown(const std::vector<int64_t>& shape) {
  std::string text = "[";
  for (size_t i = 0; i < shape.size(); ++i) text += (i ? ", " : "") + std::to_string(shape[i]);
  return text + "]";
}

// Every dimension of every input wrong in turn, every rank wrong, and the few that go wrong in a way of their own.
struct Spoiled {
  std::vector<Tensor> tensors;
  std::string error;
};

std::vector<Spoiled> spoil(const std::vector<Tensor>& tensors, size_t count, bool scan) {
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
      const bool width = tensors[i].name == "weight" && k == 1;
      // Of a convolution's inputs, only the first knows of batch and time.
      const bool alone = !scan && i == 0 && k < 2 && count == 3;
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

void test_output_shapes() {
  for (int bits = 0; bits < 16; ++bits) {
    const Switches s = Switches::of(bits);
    Plugin plugin = s.create();
    for (int64_t group : {0, 1, 2, 6}) {
      const ScanSizes sizes = {3, 7, 6, 5, group};
      const std::vector<Tensor> tensors = scan_tensors(sizes, s);
      const std::string what = "switches " + std::to_string(bits) + " group " + std::to_string(group);
      for (bool dynamic : {false, true}) {
        Symbolic shapes(tensors, s.inputs(), dynamic);
        accepted(shapes.run(plugin) == 0, what + " output shapes");
        for (size_t i = 0; i < shapes.out.size(); ++i) {
          const Tensor& output = tensors[(size_t)s.inputs() + i];
          check(shapes.evaluate(i) == output.shape, what + ": " + output.name + " is " + shown(shapes.evaluate(i)));
          check(shapes.out[i].d[output.shape.size() - 1]->isConstant(), what + ": constants stay constant");
        }
      }
      if (bits % 5) continue;
      for (const Spoiled& one : spoil(tensors, (size_t)s.inputs(), true)) {
        Symbolic wrong(one.tensors, s.inputs(), false);
        refused(wrong.run(plugin) != 0, what + " output shapes", one.error);
      }
      Symbolic shapes(tensors, s.inputs(), true);
      refused(shapes.run(plugin, 1) != 0, what, "got 1 shape inputs");
      shapes.in[3].nbDims = 9;
      refused(shapes.run(plugin) != 0, what, "input 'B' has 9 dimensions");
      shapes.in[3].nbDims = -1;
      refused(shapes.run(plugin) != 0, what, "input 'B' has -1 dimensions");
      Symbolic fewer(tensors, s.inputs() - 1, true);
      refused(fewer.run(plugin) != 0, what, "inputs and ");
      Builder& builder = shapes.builder;
      refused(
          plugin.build->getOutputShapes(nullptr, s.inputs(), nullptr, 0, shapes.out.data(), s.outputs(), builder) != 0,
          what, "no array of shapes");
      refused(
          plugin.build->getOutputShapes(shapes.in.data(), s.inputs(), nullptr, 0, nullptr, s.outputs(), builder) != 0,
          what, "no array of shapes");
    }
  }
  Fields nothing;
  Plugin conv = create("CausalConv1d", nothing);
  const std::vector<Tensor> tensors = conv_tensors(2, 9, 6, 4);
  Symbolic shapes(tensors, 3, true);
  accepted(shapes.run(conv) == 0 && shapes.evaluate(0) == tensors[3].shape, "CausalConv1d output shapes");
  for (const Spoiled& one : spoil(tensors, 3, false)) {
    Symbolic wrong(one.tensors, 3, false);
    refused(wrong.run(conv) != 0, "CausalConv1d output shapes", one.error);
  }
}

void test_configuration(Plugin& plugin, const std::vector<Tensor>& tensors, int inputs, bool scan,
                        const std::string& what) {
  const int outputs = (int)tensors.size() - inputs;
  for (DataType type : {DataType::kFLOAT, DataType::kHALF}) {
    const auto dynamic = dynamic_of(tensors, type);
    accepted(plugin.build->configurePlugin(dynamic.data(), inputs, dynamic.data() + inputs, outputs) == 0, what);
    const auto descs = descs_of(tensors, type);
    const auto change = [&](const std::vector<trt::PluginTensorDesc>& d) {
      return plugin.runtime->onShapeChange(d.data(), inputs, d.data() + inputs, outputs);
    };
    accepted(change(descs) == 0, what + " onShapeChange");
    // Twice in a row, as when a binding changes its address alone.
    accepted(change(descs) == 0, what + " onShapeChange");
    for (const Spoiled& one : spoil(tensors, tensors.size(), scan)) {
      const auto wrong = descs_of(one.tensors, type);
      refused(change(wrong) != 0, what + " onShapeChange", one.error);
      std::vector<trt::DynamicPluginTensorDesc> full;
      for (const trt::PluginTensorDesc& desc : wrong) full.push_back({desc, desc.dims, desc.dims, desc.dims});
      refused(plugin.build->configurePlugin(full.data(), inputs, full.data() + inputs, outputs) != 0,
              what + " configurePlugin", one.error);
    }
    for (size_t i = 0; i < descs.size(); ++i) {
      const std::string own = "'" + tensors[i].name + "' ";
      auto wrong = descs;
      wrong[i].format = trt::TensorFormat::kCHW4;
      refused(change(wrong) != 0, what, own + "has memory format");
      auto dynamic_wrong = dynamic;
      dynamic_wrong[i].desc.format = trt::TensorFormat::kHWC;
      refused(plugin.build->configurePlugin(dynamic_wrong.data(), inputs, dynamic_wrong.data() + inputs, outputs) != 0,
              what, own + "has memory format");
      wrong = descs;
      wrong[i].type = DataType::kINT32;
      refused(change(wrong) != 0, what, own + "is int32, expected float");
      wrong = descs;
      wrong[i].dims.d[0] = -1;
      refused(change(wrong) != 0, what, own + "has shape [?");
      wrong[i].dims.nbDims = 9;
      refused(change(wrong) != 0, what, own + "has 9 dimensions");
    }
    refused(plugin.runtime->onShapeChange(descs.data(), inputs + 1, descs.data() + inputs, outputs) != 0, what,
            "inputs");
    refused(plugin.runtime->onShapeChange(descs.data(), inputs, descs.data() + inputs, 0) != 0, what, "0 outputs");
    refused(plugin.runtime->onShapeChange(nullptr, inputs, descs.data() + inputs, outputs) != 0, what, "no array");
    refused(plugin.runtime->onShapeChange(descs.data(), inputs, nullptr, outputs) != 0, what, "no array");
    refused(plugin.build->configurePlugin(nullptr, inputs, dynamic.data(), outputs) != 0, what, "no array");
    refused(plugin.build->configurePlugin(dynamic.data(), inputs, nullptr, outputs) != 0, what, "no array");
    refused(plugin.build->configurePlugin(dynamic.data(), 1, dynamic.data(), outputs) != 0, what, "got 1 inputs");
  }
}

void test_configurations() {
  for (int bits : {0, 3, 4, 8, 15}) {
    const Switches s = Switches::of(bits);
    for (int64_t group : {0, 2}) {
      Plugin plugin = s.create();
      test_configuration(plugin, scan_tensors({3, 7, 6, 5, group}, s), s.inputs(), true,
                         "switches " + std::to_string(bits) + " group " + std::to_string(group));
    }
  }
  Fields nothing;
  Plugin conv = create("CausalConv1d", nothing);
  test_configuration(conv, conv_tensors(3, 7, 6, 4), 3, false, "CausalConv1d");
}

void test_workspace() {
  const auto bytes = [](Plugin& plugin, const std::vector<Tensor>& tensors, int inputs) {
    const auto dynamic = dynamic_of(tensors, DataType::kFLOAT);
    return plugin.build->getWorkspaceSize(dynamic.data(), inputs, dynamic.data() + inputs,
                                          (int)tensors.size() - inputs);
  };
  for (int bits : {0, 15}) {
    const Switches s = Switches::of(bits);
    Plugin plugin = s.create();
    for (int64_t channel : {1, 64, 2048}) {
      // Each is enough for every smaller batch and length: sizes that grow never ask for less.
      const std::vector<int64_t> batches = {1, 2, 3, 16, 256}, times = {1, 50, 64, 500, 4096, 100000};
      std::map<std::pair<int64_t, int64_t>, size_t> all;
      for (int64_t batch : batches) {
        for (int64_t time : times) {
          const size_t own = all[{batch, time}] =
              bytes(plugin, scan_tensors({batch, time, channel, 16, 0}, s), s.inputs());
          check(own < ((size_t)1 << 34), "a workspace is not huge");
          for (const auto& [other, less] : all) {
            if (other.first <= batch && other.second <= time) check(less <= own, "the workspace grows with the sizes");
          }
        }
      }
    }
    accepted(true, "workspaces");
    const auto many = dynamic_of(scan_tensors({2, 5, 6, 600, 0}, s), DataType::kFLOAT);
    refused(plugin.build->configurePlugin(many.data(), s.inputs(), many.data() + s.inputs(), s.outputs()) != 0,
            "states", "input 'A' has 600 states, expected at most 512");
    refused(plugin.build->getWorkspaceSize(many.data(), s.inputs(), nullptr, s.outputs()) == 0, "states", "refused");
    const auto dynamic = dynamic_of(scan_tensors(ScanSizes(), s), DataType::kFLOAT);
    refused(plugin.build->getWorkspaceSize(nullptr, s.inputs(), nullptr, s.outputs()) == 0, "workspace", "no array");
    refused(plugin.build->getWorkspaceSize(dynamic.data(), 2, nullptr, s.outputs()) == 0, "workspace", "got 2 inputs");
    auto wrong = dynamic;
    wrong[2].max.nbDims = 1;
    refused(plugin.build->getWorkspaceSize(wrong.data(), s.inputs(), nullptr, s.outputs()) == 0, "workspace", "'A'");
  }
  Fields nothing;
  Plugin conv = create("CausalConv1d", nothing);
  check(bytes(conv, conv_tensors(16, 4096, 2048, 4), 3) == 0, "a convolution needs no workspace");
}

// --- copies ---------------------------------------------------------------------------------------------------------

// `copy` came from `plugin`, which is destroyed here; then its fields make a third one.
void test_copy(Plugin plugin, Plugin copy, const std::string& name, const std::string& what) {
  check((bool)copy, what + " makes a plugin");
  if (!copy) return;
  check(copy.self != plugin.self && copy.id() == plugin.id() && copy.core->getPluginName() == name, what + " is equal");
  const trt::PluginFieldCollection *ours = plugin.runtime->getFieldsToSerialize(),
                                   *theirs = copy.runtime->getFieldsToSerialize();
  check(ours != theirs && ours->fields != theirs->fields, what + " has fields of its own");
  check(ours->nbFields == theirs->nbFields, what + " serialises as much");
  for (int i = 0; i < ours->nbFields && i < theirs->nbFields; ++i) {
    const bool text = theirs->fields[i].type == PluginFieldType::kCHAR;
    check(text || ours->fields[i].data != theirs->fields[i].data, what + " points into itself");
  }
  const std::string id = plugin.id();
  const int outputs = plugin.build->getNbOutputs();
  const std::set<const void*> old = {plugin.build->getTimingCacheID(), plugin.build->getMetadataString()};
  check(!old.count(copy.build->getTimingCacheID()) && !old.count(copy.build->getMetadataString()), what + " strings");
  plugin = Plugin(nullptr);
  theirs = copy.runtime->getFieldsToSerialize();
  Fields kept = Fields::of(theirs);
  copy = Plugin(nullptr);
  Plugin again = create(name.c_str(), kept, TensorRTPhase::kRUNTIME);
  accepted((bool)again, what + ", serialised and read again");
  if (!again) return;
  check(again.id() == id && again.build->getNbOutputs() == outputs, what + ", serialised and read again, is equal");
}

void test_copies() {
  Context context;
  const auto each = [&](const std::function<Plugin()>& make, const std::string& name) {
    Plugin one = make(), two = make(), three = make();
    trt::IPluginV3* const cloned = one.self->clone();
    test_copy(std::move(one), Plugin(cloned), name, name + "::clone");
    trt::IPluginV3* const attached = two.runtime->attachToContext(&context);
    test_copy(std::move(two), Plugin(attached), name, name + "::attachToContext");
    trt::IPluginV3* const bare = three.runtime->attachToContext(nullptr);
    test_copy(std::move(three), Plugin(bare), name, name + "::attachToContext of null");
  };
  for (int bits = 0; bits < 16; ++bits) {
    each([&] { return Switches::of(bits).create(); }, "SelectiveScan");
  }
  for (const char* activation : {"none", "silu"}) {
    each(
        [&] {
          Fields fields;
          fields.text("activation", activation).flag("reverse", 1);
          return create("CausalConv1d", fields);
        },
        "CausalConv1d");
  }
}

// --- enqueue --------------------------------------------------------------------------------------------------------

uint64_t seed = 1;
double uniform() {
  seed = seed * 6364136223846793005u + 1442695040888963407u;
  return (double)(seed >> 40) / (double)(1 << 24);
}
double normal() { return sqrt(-2 * log(uniform() + 1e-9)) * cos(6.283185307179586 * uniform()); }
double softplus(double x) { return x > 20 ? x : log1p(exp(x)); }
double silu(double x) { return x / (1 + exp(-x)); }

bool on_gpu = false;
bool counts_launches = true;  // the host kernels, which know a broken stream from a good one

void cuda(cudaError_t status, const char* what) {
  if (status == cudaSuccess) return;
  printf("FAILED %s: %s\n", what, cudaGetErrorString(status));
  exit(100);
}

// A block of memory where the kernels look for it, of exactly its size; on a GPU, where nothing guards the end, with
// marked bytes behind it.
class Memory {
 public:
  explicit Memory(size_t size) : size_(size) {
    if (!on_gpu) {
      data_ = malloc(size);
      return;
    }
    cuda(cudaMalloc(&data_, size + kMark), "cudaMalloc");
    cuda(cudaMemset(data_, 0x5a, size + kMark), "cudaMemset");
  }
  ~Memory() { on_gpu ? (void)cudaFree(data_) : free(data_); }
  Memory(const Memory&) = delete;
  Memory& operator=(const Memory&) = delete;

  void write(const void* from) {
    if (!on_gpu) return (void)memcpy(data_, from, size_);
    cuda(cudaMemcpy(data_, from, size_, cudaMemcpyHostToDevice), "cudaMemcpy");
    // A copy may return before its last bytes are there, and the stream of the tests waits for no other.
    cuda(cudaDeviceSynchronize(), "cudaMemcpy");
  }
  void read(void* to) const {
    on_gpu ? cuda(cudaMemcpy(to, data_, size_, cudaMemcpyDeviceToHost), "cudaMemcpy") : (void)memcpy(to, data_, size_);
  }
  bool mark_is_whole() const {
    if (!on_gpu) return true;
    unsigned char mark[kMark];
    cuda(cudaMemcpy(mark, (char*)data_ + size_, kMark, cudaMemcpyDeviceToHost), "cudaMemcpy");
    return std::all_of(mark, mark + kMark, [](unsigned char x) { return x == 0x5a; });
  }
  void* get() const { return data_; }

 private:
  static constexpr size_t kMark = 512;
  void* data_ = nullptr;
  size_t size_;
};

// One tensor with its numbers: as the kernels get it, and as doubles.
struct Values {
  bool half;
  std::vector<double> value;
  Memory memory;

  Values(const Tensor& tensor, bool half_form)
      : half(half_form && tensor.shared), value(elements(tensor)), memory(value.size() * (half ? 2 : 4)) {}

  static size_t elements(const Tensor& tensor) {
    size_t count = 1;
    for (int64_t size : tensor.shape) count *= (size_t)size;
    return count;
  }
  // Rounds the doubles to the type and hands them over.
  void write() {
    std::vector<float> single(value.size());
    std::vector<_Float16> narrow(value.size());
    for (size_t i = 0; i < value.size(); ++i) {
      single[i] = (float)value[i], narrow[i] = (_Float16)value[i];
      value[i] = half ? (double)narrow[i] : (double)single[i];
    }
    memory.write(half ? (const void*)narrow.data() : (const void*)single.data());
  }
  void read() {
    std::vector<float> single(value.size());
    std::vector<_Float16> narrow(value.size());
    memory.read(half ? (void*)narrow.data() : (void*)single.data());
    for (size_t i = 0; i < value.size(); ++i) value[i] = half ? (double)narrow[i] : (double)single[i];
  }
};

// All tensors of one call of a plugin.
struct Call {
  std::vector<Tensor> tensors;
  int inputs;
  bool half;
  std::vector<std::unique_ptr<Values>> values;
  std::vector<trt::PluginTensorDesc> descs;
  std::vector<void*> addresses;
  std::unique_ptr<Memory> workspace;

  // `largest`: what the workspace is for.
  Call(Plugin& plugin, std::vector<Tensor> all, int input_count, bool half_form, const std::vector<Tensor>& largest)
      : tensors(std::move(all)), inputs(input_count), half(half_form) {
    const DataType type = half ? DataType::kHALF : DataType::kFLOAT;
    descs = descs_of(tensors, type);
    for (const Tensor& tensor : tensors) {
      values.push_back(std::make_unique<Values>(tensor, half));
      addresses.push_back(values.back()->memory.get());
      // Outputs start as something that no kernel would write.
      for (double& x : values.back()->value) x = -12345;
    }
    const auto dynamic = dynamic_of(largest, type);
    const size_t bytes = plugin.build->getWorkspaceSize(dynamic.data(), inputs, dynamic.data() + inputs, outputs());
    if (bytes) workspace = std::make_unique<Memory>(bytes);
  }
  Call(Plugin& plugin, const std::vector<Tensor>& all, int input_count, bool half_form)
      : Call(plugin, all, input_count, half_form, all) {}
  int outputs() const { return (int)tensors.size() - inputs; }
  std::vector<double>& operator[](const std::string& name) {
    for (size_t i = 0; i < tensors.size(); ++i) {
      if (tensors[i].name == name) return values[i]->value;
    }
    printf("no tensor %s\n", name.c_str());
    abort();
  }
  int enqueue(Plugin& plugin, void* stream) {
    return plugin.runtime->enqueue(descs.data(), descs.data() + inputs, addresses.data(), addresses.data() + inputs,
                                   workspace ? workspace->get() : nullptr, (cudaStream_t)stream);
  }
};

int64_t launches = 0;
cudaStream_t gpu_stream = nullptr;

// Runs it as an execution context does, and reads the outputs; on a GPU once more, as a replayed graph.
bool run(Plugin& plugin, Call& call, const std::string& what) {
  for (std::unique_ptr<Values>& one : call.values) one->write();
  accepted(plugin.runtime->setTactic(0) == 0, what + " setTactic");
  accepted(plugin.runtime->onShapeChange(call.descs.data(), call.inputs, call.descs.data() + call.inputs,
                                         call.outputs()) == 0,
           what + " onShapeChange");
  const int64_t before = launches;
  const bool good = call.enqueue(plugin, on_gpu ? (void*)gpu_stream : (void*)&launches) == 0;
  accepted(good, what + " enqueue");
  if (!good) return false;
  check(!counts_launches || launches == before + 1, what + ": launched once, on the stream given");
  if (on_gpu) cuda(cudaStreamSynchronize(gpu_stream), "enqueue");
  const auto read_outputs = [&] {
    for (size_t i = (size_t)call.inputs; i < call.values.size(); ++i) call.values[i]->read();
  };
  read_outputs();
  for (size_t i = 0; i < call.values.size(); ++i) {
    check(call.values[i]->memory.mark_is_whole(), what + ": nothing is written behind " + call.tensors[i].name);
  }
  if (call.workspace) check(call.workspace->mark_is_whole(), what + ": nothing is written behind the workspace");
  if (!on_gpu) return true;
  std::vector<std::vector<double>> first;
  for (size_t i = (size_t)call.inputs; i < call.values.size(); ++i) {
    first.push_back(call.values[i]->value);
    for (double& x : call.values[i]->value) x = -12345;
    call.values[i]->write();
  }
  cudaGraph_t graph = nullptr;
  cudaGraphExec_t replay = nullptr;
  cuda(cudaStreamBeginCapture(gpu_stream, cudaStreamCaptureModeGlobal), "capture");
  accepted(call.enqueue(plugin, gpu_stream) == 0, what + " enqueue while captured");
  cuda(cudaStreamEndCapture(gpu_stream, &graph), "the capture of enqueue");
  cuda(cudaGraphInstantiate(&replay, graph, 0), "the graph of enqueue");
  cuda(cudaGraphLaunch(replay, gpu_stream), "the replay of enqueue");
  cuda(cudaStreamSynchronize(gpu_stream), "the replay of enqueue");
  cudaGraphExecDestroy(replay);
  cudaGraphDestroy(graph);
  read_outputs();
  for (size_t i = 0; i < first.size(); ++i) {
    check(call.values[(size_t)call.inputs + i]->value == first[i], what + ": a replayed graph gives the same numbers");
  }
  return true;
}

// The bounds of docs/op.md. `scale` is what they are relative to: the largest output, or, in the few outputs of small
// cases, what the terms of the largest would be without cancelling out.
void compare(const std::string& what, const std::vector<double>& got, const std::vector<double>& want, bool half,
             double scale = 0) {
  double largest = fmax(scale, 1e-30);
  for (double x : want) largest = fmax(largest, fabs(x));
  for (size_t i = 0; i < want.size(); ++i) {
    const double error = fabs(got[i] - want[i]), bound = half ? 1e-4 + 1e-3 * fabs(want[i]) : 1e-6 * largest;
    if (error <= bound) continue;
    return check(false, what + "[" + std::to_string(i) + "] is " + std::to_string(got[i]) + ", expected " +
                            std::to_string(want[i]));
  }
  check(true, what);
}

void test_scan(const Switches& s, const ScanSizes& sizes, bool half, int masked = 0,
               const ScanSizes* largest = nullptr) {
  const std::string what = "scan b" + std::to_string(sizes.batch) + " t" + std::to_string(sizes.time) + " c" +
                           std::to_string(sizes.channel) + " n" + std::to_string(sizes.state) + " g" +
                           std::to_string(sizes.group) + (half ? " half" : "") + (s.softplus ? " softplus" : "") +
                           (s.reverse ? " reverse" : "") + (s.gated ? " gated" : "") + (s.stateful ? " stateful" : "") +
                           (masked ? " masked" : "");
  // As in an engine: from serialised fields, then a clone for the context.
  Plugin built = s.create();
  Fields kept = Fields::of(built.runtime->getFieldsToSerialize());
  Plugin loaded = create("SelectiveScan", kept, TensorRTPhase::kRUNTIME);
  Context context;
  Plugin plugin(loaded.runtime->attachToContext(&context));
  if (!plugin) return check(false, what + " could not be made");
  Call call(plugin, scan_tensors(sizes, s), s.inputs(), half, scan_tensors(largest ? *largest : sizes, s));
  for (const char* name : {"u", "B", "C", "D"}) {
    for (double& x : call[name]) x = normal();
  }
  for (double& x : call["delta"]) x = s.softplus ? -4 + normal() : softplus(-4 + normal());
  for (double& x : call["delta_bias"]) x = (s.softplus ? 0.1 : 0.001) * uniform();
  std::vector<double>& A = call["A"];
  for (size_t i = 0; i < A.size(); ++i) A[i] = -(1 + (double)(i % (size_t)sizes.state) * 15 / (double)sizes.state);
  if (s.gated) {
    for (double& x : call["z"]) x = normal();
  }
  if (s.stateful) {
    for (double& x : call["initial_state"]) x = normal();
  }
  const int64_t b = sizes.batch, t = sizes.time, c = sizes.channel, n = sizes.state,
                g = std::max<int64_t>(1, sizes.group);
  // A ragged batch: the last steps of the last element are masked.
  for (int64_t i = (b * t - masked) * c; masked && i < b * t * c; ++i) call["delta"][(size_t)i] = -1e4;
  if (!run(plugin, call, what)) return;

  const std::vector<double>&u = call["u"], &delta = call["delta"], &B = call["B"], &C = call["C"], &D = call["D"];
  std::vector<double> y((size_t)(b * t * c)), last((size_t)(b * c * n)), h((size_t)n);
  double scale = 0;
  for (int64_t i = 0; i < b * c; ++i) {
    const int64_t batch = i / c, channel = i % c, group = channel / (c / g);
    for (int64_t k = 0; k < n; ++k) h[(size_t)k] = s.stateful ? call["initial_state"][(size_t)(i * n + k)] : 0;
    for (int64_t rank = 0; rank < t; ++rank) {
      const int64_t step = batch * t + (s.reverse ? t - 1 - rank : rank);
      const size_t at = (size_t)(step * c + channel), row = (size_t)((step * g + group) * n);
      double d = delta[at] + call["delta_bias"][(size_t)channel];
      if (s.softplus) d = softplus(d);
      double sum = D[(size_t)channel] * u[at], terms = fabs(sum);
      for (size_t k = 0; k < (size_t)n; ++k) {
        h[k] = exp(d * A[(size_t)(channel * n) + k]) * h[k] + d * B[row + k] * u[at];
        sum += C[row + k] * h[k], terms += fabs(C[row + k] * h[k]);
      }
      const double gate = s.gated ? silu(call["z"][at]) : 1;
      y[at] = sum * gate;
      scale = fmax(scale, terms * fabs(gate));
    }
    std::copy(h.begin(), h.end(), last.begin() + i * n);
  }
  compare(what + " y", call["y"], y, half, scale);
  if (s.stateful) compare(what + " last_state", call["last_state"], last, false);
}

void test_conv(int64_t batch, int64_t time, int64_t channel, int64_t width, bool half, bool active, bool reverse) {
  const std::string what = "conv b" + std::to_string(batch) + " t" + std::to_string(time) + " c" +
                           std::to_string(channel) + " w" + std::to_string(width) + (half ? " half" : "") +
                           (active ? " silu" : "") + (reverse ? " reverse" : "");
  Fields fields;
  fields.text("activation", active ? "silu" : "none").flag("reverse", reverse);
  Plugin built = create("CausalConv1d", fields);
  Fields kept = Fields::of(built.runtime->getFieldsToSerialize());
  Plugin plugin = create("CausalConv1d", kept, TensorRTPhase::kRUNTIME);
  if (!plugin) return check(false, what + " could not be made");
  Call call(plugin, conv_tensors(batch, time, channel, width), 3, half);
  for (const char* name : {"x", "weight", "bias"}) {
    for (double& x : call[name]) x = normal();
  }
  if (!run(plugin, call, what)) return;
  std::vector<double> want((size_t)(batch * time * channel));
  for (int64_t i = 0; i < batch * time * channel; ++i) {
    const int64_t c = i % channel, t = i / channel % time, b = i / channel / time;
    double sum = call["bias"][(size_t)c];
    for (int64_t k = 0; k < width; ++k) {
      const int64_t from = reverse ? t + width - 1 - k : t - (width - 1) + k;
      if (from < 0 || from >= time) continue;
      sum += call["weight"][(size_t)(c * width + k)] * call["x"][(size_t)((b * time + from) * channel + c)];
    }
    want[(size_t)i] = active ? silu(sum) : sum;
  }
  compare(what + " y", call["y"], want, half);
}

void test_enqueue() {
  int turn = 0;
  for (int64_t batch : {1, 3}) {
    for (int64_t time : {1, 2, 65}) {
      for (int64_t channel : {1, 6, 33}) {
        for (int64_t state : {1, 4, 16, 17}) {
          for (int64_t group : {0, 1, 3}) {
            if (group && channel % group) continue;
            ++turn;
            test_scan(Switches::of((turn * 7) % 16), {batch, time, channel, state, group}, turn % 3 == 0);
          }
        }
      }
    }
  }
  for (int bits = 0; bits < 16; ++bits) {
    for (bool half : {false, true}) {
      test_scan(Switches::of(bits), {2, 9, 6, 5, 2}, half);
      if (bits & 1) test_scan(Switches::of(bits), {2, 9, 6, 5, 0}, half, 4);
    }
  }
  // One context, any sizes up to its profile's largest: the workspace is for those.
  const ScanSizes largest = {5, 12, 6, 5, 0};
  for (int64_t batch = 1; batch <= largest.batch; ++batch) {
    for (int64_t time = 1; time <= largest.time; ++time) {
      test_scan(Switches::of(15), {batch, time, 6, 5, 0}, false, 0, &largest);
    }
  }
  // More than the plugin's budget, by the plan of the host kernels.
  if (counts_launches) test_scan(Switches::of(9), {1, 6, 2048, 5, 0}, false);
  for (int bits = 0; bits < 8; ++bits) {
    for (int64_t width : {1, 2, 4, 6}) {
      test_conv(2, 3, 5, width, bits & 1, bits & 2, bits & 4);
      test_conv(1, 40, 64, width, bits & 1, bits & 2, bits & 4);
    }
  }
  // Long enough, and few enough channels, to be cut into chunks of time, in a workspace for more than that.
  if (!counts_launches) {
    const ScanSizes largest = on_gpu ? ScanSizes{16, 5001, 64, 16, 0} : ScanSizes{2, 1100, 3, 2, 0};
    for (int64_t batch : {(int64_t)1, (int64_t)2, largest.batch}) {
      for (int64_t time : {(int64_t)300, (int64_t)1024, largest.time}) {
        test_scan(Switches::of(15), {batch, time, largest.channel, largest.state, 0}, false, 0, &largest);
      }
    }
  }
  if (on_gpu) test_scan(Switches::of(7), {16, 500, 512, 16, 0}, true);
}

void test_bad_enqueue() {
  const Switches s = Switches::of(15);
  Plugin plugin = s.create();
  const auto fresh = [&] {
    auto call = std::make_unique<Call>(plugin, scan_tensors({2, 5, 6, 3, 0}, s), s.inputs(), false);
    for (std::unique_ptr<Values>& one : call->values) {
      std::fill(one->value.begin(), one->value.end(), 0);
      one->write();
    }
    return call;
  };
  void* const stream = on_gpu ? (void*)gpu_stream : (void*)&launches;
  accepted(fresh()->enqueue(plugin, stream) == 0, "enqueue");
  const int64_t before = launches;
  for (size_t i = 0; i < (size_t)(s.inputs() + s.outputs()); ++i) {
    auto call = fresh();
    call->addresses[i] = nullptr;
    refused(call->enqueue(plugin, stream) != 0, "enqueue", "'" + call->tensors[i].name + "' has no memory");
  }
  for (const Spoiled& one : spoil(scan_tensors({2, 5, 6, 3, 0}, s), (size_t)(s.inputs() + s.outputs()), true)) {
    auto call = fresh();
    call->descs = descs_of(one.tensors, DataType::kFLOAT);
    refused(call->enqueue(plugin, stream) != 0, "enqueue", one.error);
  }
  auto call = fresh();
  const auto direct = [&](const trt::PluginTensorDesc* in, const trt::PluginTensorDesc* out, void** inputs,
                          void** outputs) {
    return plugin.runtime->enqueue(in, out, inputs, outputs, call->workspace ? call->workspace->get() : nullptr,
                                   (cudaStream_t)stream);
  };
  const int n = s.inputs();
  const trt::PluginTensorDesc *in = call->descs.data(), *out = in + n;
  void **from = call->addresses.data(), **to = from + n;
  refused(direct(nullptr, out, from, to) != 0, "enqueue", "no array of tensor descriptions");
  refused(direct(in, nullptr, from, to) != 0, "enqueue", "no array of tensor descriptions");
  refused(direct(in, out, nullptr, to) != 0, "enqueue", "no array of addresses");
  refused(direct(in, out, from, nullptr) != 0, "enqueue", "no array of addresses");
  if (counts_launches) {  // where these sizes want one
    call->workspace.reset();
    refused(call->enqueue(plugin, stream) != 0, "enqueue", "the kernel refused its arguments: error 1");
  }
  check(launches == before, "what is refused is not launched");
  if (!counts_launches) return;
  int64_t broken = -1;
  refused(fresh()->enqueue(plugin, &broken) != 0, "enqueue",
          "could not be launched: the stream is broken (layer 'node')");
  refused(fresh()->enqueue(plugin, nullptr) != 0, "enqueue", "refused its arguments: error 1");
}

// Without a device nothing can run, and that is an error like any other.
void test_no_gpu() {
  Plugin plugin = Switches::of(15).create();
  Call call(plugin, scan_tensors(ScanSizes(), Switches::of(15)), Switches::of(15).inputs(), false);
  refused(call.enqueue(plugin, nullptr) != 0, "SelectiveScan without a GPU", "the kernel could not be launched: ");
  Fields nothing;
  Plugin conv = create("CausalConv1d", nothing);
  Call other(conv, conv_tensors(2, 5, 6, 4), 3, true);
  refused(other.enqueue(conv, nullptr) != 0, "CausalConv1d without a GPU", "the kernel could not be launched: ");
}

// --- loggers and memory ---------------------------------------------------------------------------------------------

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
  if (count != 3) {
    fprintf(stderr, "usage: trt_plugin_test LIBRARY MODE\n");
    return 100;
  }
  const std::string mode = arguments[2];
  load(arguments[1]);
  printf("TensorRT headers %d.%d.%d\n", NV_TENSORRT_MAJOR, NV_TENSORRT_MINOR, NV_TENSORRT_PATCH);
  test_creators();
  if (mode != "no-memory") set_finder(&finder);
  if (mode == "contract") {
    test_good_fields();
    test_bad_fields();
    test_identity();
    test_types();
    test_formats();
    test_output_shapes();
    test_configurations();
    test_workspace();
    test_copies();
  } else if (mode == "enqueue-host") {
    test_enqueue();
    test_bad_enqueue();
  } else if (mode == "enqueue-emulated") {
    counts_launches = false;
    test_enqueue();
    test_bad_enqueue();
  } else if (mode == "enqueue-gpu") {
    on_gpu = true, counts_launches = false;
    cuda(cudaStreamCreateWithFlags(&gpu_stream, cudaStreamNonBlocking), "cudaStreamCreate");
    test_enqueue();
    test_bad_enqueue();
    cudaStreamDestroy(gpu_stream);
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

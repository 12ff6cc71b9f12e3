#include "trt_plugin.h"

#include <dlfcn.h>
#include <inttypes.h>
#include <stdarg.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>

#include <atomic>
#include <new>

#include "causal_conv1d.h"
#include "cuda_ops.h"
#include "selective_scan.h"

namespace hcmen {
namespace {

namespace trt = nvinfer1;
using trt::DataType;
using Severity = trt::ILogger::Severity;

constexpr const char* kNamespace = "hcmen";
constexpr const char* kVersion = "1";

// --- messages -------------------------------------------------------------------------------------------------------

// One line of text in place: an error must be told even when memory is what is missing.
class Line {
 public:
  Line() { text_[0] = '\0'; }

  __attribute__((format(printf, 2, 3))) Line& add(const char* format, ...) {
    va_list arguments;
    va_start(arguments, format);
    const int wanted = vsnprintf(text_ + used_, sizeof text_ - used_, format, arguments);
    va_end(arguments);
    if (wanted > 0) {
      const size_t room = sizeof text_ - used_ - 1;
      used_ += (size_t)wanted < room ? (size_t)wanted : room;
    }
    return *this;
  }

  // Somebody else's bytes: printable ones as they are, so that the line stays one line; a long text is cut.
  Line& shown(const char* bytes, size_t size) {
    constexpr size_t kMost = 80;
    for (size_t i = 0; i < size && i < kMost; ++i) {
      const bool plain = bytes[i] >= ' ' && bytes[i] <= '~';
      plain ? add("%c", bytes[i]) : add("\\x%02x", (unsigned)(unsigned char)bytes[i]);
    }
    return size > kMost ? add("...") : *this;
  }
  Line& shown(const char* string) { return shown(string, strlen(string)); }

  const char* text() const { return text_; }

 private:
  char text_[1024];
  size_t used_ = 0;
};

std::atomic<trt::ILoggerFinder*> logger_finder{nullptr};

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

void report(Severity severity, const Line& line) {
  trt::ILogger* logger = nullptr;
  if (trt::ILoggerFinder* finder = logger_finder.load()) {
    try {
      logger = finder->findLogger();
    } catch (...) {  // not declared noexcept; without a logger there is still stderr
    }
  }
  if (logger) {
    logger->log(severity, line.text());
  } else {
    fprintf(stderr, "%s: %s\n", severity == Severity::kWARNING ? "warning" : "error", line.text());
  }
}

const char* type_name(DataType type) {
  switch (type) {
    case DataType::kFLOAT:
      return "float32";
    case DataType::kHALF:
      return "float16";
    case DataType::kBF16:
      return "bfloat16";
    case DataType::kINT8:
      return "int8";
    case DataType::kINT32:
      return "int32";
    case DataType::kINT64:
      return "int64";
    case DataType::kUINT8:
      return "uint8";
    case DataType::kBOOL:
      return "bool";
    default:
      return "another type";
  }
}

// --- the operators as tables ----------------------------------------------------------------------------------------

enum Size { kBatch, kTime, kChannel, kState, kGroup, kWidth, kSizes };
constexpr const char* kSizeNames[kSizes] = {"batch", "time", "channel", "state", "group", "width"};
constexpr int64_t kUnknown = -1;

constexpr int kMostAttributes = 4, kMostInputs = 9, kMostOutputs = 2, kMostTensors = kMostInputs + kMostOutputs;

struct Attribute {
  const char* name;
  const char* words[3];  // what a string may be, the default first; none: an integer, 0 (the default) or 1
};

// A tensor of an operator. `shared`: float32 or float16, the same for all that are marked so; else float32.
struct Tensor {
  const char* name;
  bool shared;
  int rank;
  Size sizes[4];
  int only_with;  // there only if this attribute is 1; -1: always
};

// What a kernel needs to know of one call.
struct Call {
  const int32_t* attributes;
  const int64_t* sizes;
  int32_t dtype;
  const void* const* inputs;
  void* const* outputs;
  void* workspace;
  cudaStream_t stream;
};

struct Operator {
  const char* name;
  int attribute_count, input_count, output_count;
  Attribute attributes[kMostAttributes];
  Tensor inputs[kMostInputs];
  Tensor outputs[kMostOutputs];
  int (*workspace)(const Call& call, size_t* bytes);
  int (*launch)(const Call& call);
};

enum { kSoftplus, kReverse, kGated, kStateful };
enum { kActivation, kConvReverse };

// Pointers where `call` has them, else none.
hcmen_scan scan_of(const Call& call) {
  hcmen_scan scan = {};
  scan.batch = call.sizes[kBatch], scan.time = call.sizes[kTime], scan.channel = call.sizes[kChannel];
  scan.state = call.sizes[kState], scan.group = call.sizes[kGroup];
  scan.dtype = call.dtype;
  scan.delta_softplus = call.attributes[kSoftplus], scan.reverse = call.attributes[kReverse];
  if (!call.inputs) return scan;
  const void* const* in = call.inputs;
  scan.u = in[0], scan.delta = in[1], scan.A = (const float*)in[2], scan.B = in[3], scan.C = in[4];
  scan.D = (const float*)in[5], scan.delta_bias = (const float*)in[6];
  const bool gated = call.attributes[kGated], stateful = call.attributes[kStateful];
  scan.z = gated ? in[7] : nullptr;
  scan.initial_state = stateful ? (const float*)in[gated ? 8 : 7] : nullptr;
  scan.y = call.outputs[0];
  scan.last_state = stateful ? (float*)call.outputs[1] : nullptr;
  return scan;
}

// Bytes set aside for scans of sequences cut into chunks. TensorRT asks once, for the largest sizes of a profile, and
// then runs any smaller ones in that much, while it is the small ones that are cut most; and at run time nobody says
// how much there is. So it depends on nothing that changes from call to call. The kernel's own plan has less than
// 2^17 channels of chunks at once, each with its states and one sum.
int64_t scan_budget(const Call& call) { return (call.sizes[kState] + 1) << 19; }

// How the kernel shall run: as it likes where that fits the budget, else with each sequence in one piece, which needs
// no workspace.
int plan_scan(const hcmen_scan& scan, const Call& call, hcmen_cuda_launch* launch) {
  *launch = {};
  launch->stream = call.stream;
  int64_t bytes = 0;
  if (const int status = hcmen_cuda_selective_scan_workspace(&scan, nullptr, 0, &bytes)) return status;
  if (bytes > scan_budget(call)) {
    launch->steps_per_chunk = -1;
  } else if (bytes > 0) {
    launch->workspace = call.workspace, launch->workspace_bytes = bytes;
  }
  return HCMEN_OK;
}

int scan_workspace(const Call& call, size_t* bytes) {
  const hcmen_scan scan = scan_of(call);
  hcmen_cuda_launch launch;
  *bytes = (size_t)scan_budget(call);
  return plan_scan(scan, call, &launch);  // whether the kernel takes these sizes at all
}

int scan_launch(const Call& call) {
  const hcmen_scan scan = scan_of(call);
  hcmen_cuda_launch launch;
  if (const int status = plan_scan(scan, call, &launch)) return status;
  return hcmen_cuda_selective_scan_forward(&scan, &launch);
}

int conv_workspace(const Call&, size_t* bytes) {
  *bytes = 0;
  return HCMEN_OK;
}

int conv_launch(const Call& call) {
  hcmen_conv conv = {};
  conv.batch = call.sizes[kBatch], conv.time = call.sizes[kTime], conv.channel = call.sizes[kChannel];
  conv.width = call.sizes[kWidth];
  conv.dtype = call.dtype, conv.silu = call.attributes[kActivation], conv.reverse = call.attributes[kConvReverse];
  conv.x = call.inputs[0], conv.weight = (const float*)call.inputs[1], conv.bias = (const float*)call.inputs[2];
  conv.y = call.outputs[0];
  hcmen_cuda_launch launch = {};
  launch.stream = call.stream;
  return hcmen_cuda_causal_conv1d_forward(&conv, &launch);
}

constexpr Operator kSelectiveScan = {
    "SelectiveScan",
    4,
    9,
    2,
    {{"delta_softplus", {}}, {"reverse", {}}, {"gated", {}}, {"stateful", {}}},
    {{"u", true, 3, {kBatch, kTime, kChannel}, -1},
     {"delta", true, 3, {kBatch, kTime, kChannel}, -1},
     {"A", false, 2, {kChannel, kState}, -1},
     {"B", true, 4, {kBatch, kTime, kGroup, kState}, -1},
     {"C", true, 4, {kBatch, kTime, kGroup, kState}, -1},
     {"D", false, 1, {kChannel}, -1},
     {"delta_bias", false, 1, {kChannel}, -1},
     {"z", true, 3, {kBatch, kTime, kChannel}, kGated},
     {"initial_state", false, 3, {kBatch, kChannel, kState}, kStateful}},
    {{"y", true, 3, {kBatch, kTime, kChannel}, -1}, {"last_state", false, 3, {kBatch, kChannel, kState}, kStateful}},
    scan_workspace,
    scan_launch,
};

constexpr Operator kCausalConv1d = {
    "CausalConv1d",
    2,
    3,
    1,
    {{"activation", {"none", "silu"}}, {"reverse", {}}},
    {{"x", true, 3, {kBatch, kTime, kChannel}, -1},
     {"weight", false, 2, {kChannel, kWidth}, -1},
     {"bias", false, 1, {kChannel}, -1}},
    {{"y", true, 3, {kBatch, kTime, kChannel}, -1}},
    conv_workspace,
    conv_launch,
};

// Attributes of a node that are for TensorRT's parser or for the model-local function.
constexpr const char* kNotForPlugins[] = {"plugin_namespace",       "plugin_version", "scan_input_directions",
                                          "scan_output_directions", "group",          "pads"};

// --- attributes -----------------------------------------------------------------------------------------------------

struct Attributes {
  int32_t value[kMostAttributes] = {};
};

// Says what is wrong with a field and returns false, or reads it.
bool read_field(const Attribute& attribute, const trt::PluginField& field, int32_t& value, Line& error) {
  error.add("attribute '%s' ", attribute.name);
  if (!field.data) return error.add("has no data"), false;
  if (attribute.words[0]) {
    if (field.type != trt::PluginFieldType::kCHAR || field.length < 0) {
      return error.add("is a field of type %d and length %d, expected a string, type %d (kCHAR)", (int)field.type,
                       (int)field.length, (int)trt::PluginFieldType::kCHAR),
             false;
    }
    const char* bytes = static_cast<const char*>(field.data);
    size_t size = (size_t)field.length;
    while (size > 0 && bytes[size - 1] == '\0') --size;
    for (int i = 0; attribute.words[i]; ++i) {
      if (size == strlen(attribute.words[i]) && memcmp(bytes, attribute.words[i], size) == 0) return value = i, true;
    }
    error.add("is \"").shown(bytes, size).add("\", expected ");
    for (int i = 0; attribute.words[i]; ++i) error.add("%s\"%s\"", i ? " or " : "", attribute.words[i]);
    return false;
  }
  int64_t number = 0;
  // Serialised data lies where it lies: no alignment is promised.
  if (field.length == 1 && field.type == trt::PluginFieldType::kINT32) {
    int32_t narrow;
    memcpy(&narrow, field.data, sizeof narrow);
    number = narrow;
  } else if (field.length == 1 && field.type == trt::PluginFieldType::kINT64) {
    memcpy(&number, field.data, sizeof number);
  } else {
    return error.add("is a field of type %d and length %d, expected one integer, type %d (kINT32) or %d (kINT64)",
                     (int)field.type, (int)field.length, (int)trt::PluginFieldType::kINT32,
                     (int)trt::PluginFieldType::kINT64),
           false;
  }
  if (number != 0 && number != 1) return error.add("is %" PRId64 ", expected 0 or 1", number), false;
  return value = (int32_t)number, true;
}

// In the build phase attributes have defaults, and unknown ones are let pass as everywhere (docs/op.md). An engine
// gives back exactly what a plugin serialised: a field too many comes from a newer library, and to ignore it could
// change what is computed.
bool read_fields(const Operator& op, const trt::PluginFieldCollection* collection, trt::TensorRTPhase phase,
                 Attributes& attributes, Line& error) {
  const bool runtime = phase == trt::TensorRTPhase::kRUNTIME;
  if (!runtime && phase != trt::TensorRTPhase::kBUILD) return error.add("unknown phase %d", (int)phase), false;
  const int count = collection ? collection->nbFields : 0;
  if (count < 0 || (count > 0 && !collection->fields)) {
    return error.add("got %d plugin fields at %p", count, (const void*)collection->fields), false;
  }
  bool given[kMostAttributes] = {};
  for (int i = 0; i < count; ++i) {
    const trt::PluginField& field = collection->fields[i];
    if (!field.name) return error.add("plugin field %d has no name", i), false;
    int at = 0;
    while (at < op.attribute_count && strcmp(op.attributes[at].name, field.name) != 0) ++at;
    if (at < op.attribute_count) {
      if (given[at]) return error.add("attribute '%s' is given twice", field.name), false;
      given[at] = true;
      Line problem;
      if (!read_field(op.attributes[at], field, attributes.value[at], problem)) {
        return error.add("%s", problem.text()), false;
      }
      continue;
    }
    if (runtime) {
      return error.add("the engine holds a field '")
                 .shown(field.name)
                 .add("', unknown to this library: use the library that the engine was built with, or build it again"),
             false;
    }
    bool known = false;
    for (const char* name : kNotForPlugins) known = known || strcmp(name, field.name) == 0;
    if (!known) {
      report(Severity::kWARNING, Line().add("%s: attribute '", op.name).shown(field.name).add("' is unknown, ignored"));
    }
  }
  for (int at = 0; runtime && at < op.attribute_count; ++at) {
    if (!given[at]) {
      return error.add("the engine holds no field '%s': build it again with this library", op.attributes[at].name),
             false;
    }
  }
  return true;
}

// --- types and shapes -----------------------------------------------------------------------------------------------

// Sizes of one tensor, kUnknown where a network does not say yet.
struct Shape {
  int rank;
  int64_t size[trt::Dims::MAX_DIMS];

  Shape() : rank(-1) {}

  explicit Shape(const trt::Dims& dims) : rank(dims.nbDims) {
    for (int i = 0; i < rank && i < trt::Dims::MAX_DIMS; ++i) size[i] = dims.d[i] < 0 ? kUnknown : (int64_t)dims.d[i];
  }

  explicit Shape(const trt::DimsExprs& dims) : rank(dims.nbDims) {
    for (int i = 0; i < rank && i < trt::Dims::MAX_DIMS; ++i) {
      size[i] = dims.d[i] && dims.d[i]->isConstant() ? dims.d[i]->getConstantValue() : kUnknown;
    }
  }

  bool usable() const { return rank >= 0 && rank <= trt::Dims::MAX_DIMS; }
};

void add_shape(Line& line, const Shape& shape) {
  line.add("[");
  for (int i = 0; i < shape.rank; ++i) {
    line.add(i ? ", " : "");
    shape.size[i] == kUnknown ? line.add("?") : line.add("%" PRId64, shape.size[i]);
  }
  line.add("]");
}

// The sizes of an operator, as far as the shapes seen so far tell them.
struct Sizes {
  int64_t value[kSizes];
  int projection_rank = 0;  // of B and C: 3 without groups, 4 with; 0: none seen

  Sizes() {
    for (int64_t& one : value) one = kUnknown;
  }
};

void add_expected(Line& line, const Tensor& tensor, const Sizes& sizes, bool with_group) {
  for (int names = 0; names < 2; ++names) {
    line.add(names ? " = [" : "[");
    bool first = true;
    for (int i = 0; i < tensor.rank; ++i) {
      const Size size = tensor.sizes[i];
      if (size == kGroup && !with_group) continue;
      line.add(first ? "" : ", ");
      first = false;
      const bool number = !names && sizes.value[size] != kUnknown;
      number ? line.add("%" PRId64, sizes.value[size]) : line.add("%s", kSizeNames[size]);
    }
    line.add("]");
  }
}

// Whether `shape` fits what is known, to which it adds. Dimensions that are unknown fit anything.
bool fit(const char* kind, const Tensor& tensor, const Shape& shape, Sizes& sizes, Line& error) {
  const bool projection = tensor.rank == 4;
  const Sizes before = sizes;
  bool good = shape.usable() && (projection ? shape.rank == 3 || shape.rank == 4 : shape.rank == tensor.rank);
  bool empty = false;
  if (good && projection) {
    if (sizes.projection_rank == 0) sizes.projection_rank = shape.rank;
    good = shape.rank == sizes.projection_rank;
    if (shape.rank == 3) sizes.value[kGroup] = 1;
  }
  if (good) {
    int at = 0;
    for (int i = 0; i < tensor.rank; ++i) {
      if (projection && shape.rank == 3 && tensor.sizes[i] == kGroup) continue;
      const int64_t got = shape.size[at++];
      int64_t& known = sizes.value[tensor.sizes[i]];
      if (got == kUnknown) continue;
      empty = empty || got < 1;
      if (known == kUnknown) known = got;
      good = good && got == known && got >= 1;
    }
  }
  if (good) return true;
  error.add("%s '%s' has ", kind, tensor.name);
  if (!shape.usable()) return error.add("%d dimensions", shape.rank), false;
  error.add("shape ");
  add_shape(error, shape);
  error.add(", expected ");
  // An input that is known already and differs, or both ways to write a projection.
  if (before.projection_rank != 4 || !projection) add_expected(error, tensor, before, !projection);
  if (projection && before.projection_rank == 0) error.add(" or ");
  if (projection && before.projection_rank != 3) add_expected(error, tensor, before, true);
  if (empty) error.add(", every size at least 1");
  return false;
}

// --- the plugin -----------------------------------------------------------------------------------------------------

class Plugin final : public trt::IPluginV3,
                     public trt::IPluginV3OneCore,
                     public trt::IPluginV3OneBuild,
                     public trt::IPluginV3OneRuntime {
 public:
  Plugin(const Operator& op, const Attributes& attributes, const char* layer) noexcept
      : op_(op), attributes_(attributes) {
    snprintf(layer_, sizeof layer_, "%s", layer ? layer : "");
    for (int i = 0; i < op_.input_count; ++i) {
      if (is_there(op_.inputs[i])) tensors_[inputs_++] = &op_.inputs[i];
    }
    for (int i = 0; i < op_.output_count; ++i) {
      if (is_there(op_.outputs[i])) tensors_[inputs_ + outputs_++] = &op_.outputs[i];
    }
    // Everything that decides what is computed, and nothing else: names of layers differ between like nodes.
    for (int i = 0; i < op_.attribute_count; ++i) {
      id_.add("%s%s=%d", i ? "," : "", op_.attributes[i].name, (int)attributes_.value[i]);
    }
  }

  // Straight from malloc: where memory is short, the C++ library's own operator, nothrow or not, throws inside itself
  // first, and may end the process for want of memory to do so.
  static void* operator new(size_t size, const std::nothrow_t&) noexcept { return malloc(size); }
  static void operator delete(void* plugin) noexcept { free(plugin); }
  static void operator delete(void* plugin, const std::nothrow_t&) noexcept { free(plugin); }

  // A clone points at its own fields from the start: `getFieldsToSerialize` fills them in.
  Plugin(const Plugin& other) noexcept : Plugin(other.op_, other.attributes_, other.layer_) {}
  Plugin& operator=(const Plugin&) = delete;

  // IPluginV3
  trt::IPluginCapability* getCapabilityInterface(trt::PluginCapabilityType type) noexcept override {
    switch (type) {
      case trt::PluginCapabilityType::kCORE:
        return static_cast<trt::IPluginV3OneCore*>(this);
      case trt::PluginCapabilityType::kBUILD:
        return static_cast<trt::IPluginV3OneBuild*>(this);
      case trt::PluginCapabilityType::kRUNTIME:
        return static_cast<trt::IPluginV3OneRuntime*>(this);
    }
    return fail(Line().add("unknown capability %d", (int)type)), nullptr;
  }

  trt::IPluginV3* clone() noexcept override {
    Plugin* const copy = new (std::nothrow) Plugin(*this);
    if (!copy) fail(Line().add("no memory for a clone"));
    return copy;
  }

  // IPluginV3OneCore
  const char* getPluginName() const noexcept override { return op_.name; }
  const char* getPluginVersion() const noexcept override { return kVersion; }
  const char* getPluginNamespace() const noexcept override { return kNamespace; }

  // IPluginV3OneBuild
  int32_t getNbOutputs() const noexcept override { return outputs_; }

  int32_t getOutputDataTypes(DataType* output_types, int32_t outputs, const DataType* input_types,
                             int32_t inputs) const noexcept override {
    if (!expect_counts(inputs, outputs)) return kFailed;
    if (!output_types || !input_types) return fail(Line().add("got no array of data types"));
    for (int i = 0; i < inputs_; ++i) {
      if (!expect_type(i, input_types[i], input_types[0])) return kFailed;
    }
    for (int i = 0; i < outputs_; ++i) output_types[i] = output(i).shared ? input_types[0] : DataType::kFLOAT;
    return 0;
  }

  int32_t getOutputShapes(const trt::DimsExprs* inputs, int32_t input_count, const trt::DimsExprs*,
                          int32_t shape_inputs, trt::DimsExprs* outputs, int32_t output_count,
                          trt::IExprBuilder& builder) noexcept override {
    if (!expect_counts(input_count, output_count)) return kFailed;
    if (!inputs || !outputs) return fail(Line().add("got no array of shapes"));
    if (shape_inputs != 0) return fail(Line().add("got %d shape inputs, expected none", (int)shape_inputs));
    Sizes sizes;
    const trt::IDimensionExpr* expression[kSizes] = {};
    for (int i = 0; i < inputs_; ++i) {
      if (!expect_shape(i, Shape(inputs[i]), sizes)) return kFailed;
      // The first input that has a size names it; a number, where one is known, says more than any expression.
      const bool no_group = tensors_[i]->rank == 4 && inputs[i].nbDims == 3;
      for (int k = 0, at = 0; k < tensors_[i]->rank; ++k) {
        if (no_group && tensors_[i]->sizes[k] == kGroup) continue;
        const trt::IDimensionExpr*& known = expression[tensors_[i]->sizes[k]];
        if (!known) known = inputs[i].d[at];
        ++at;
      }
    }
    if (!expect_servable(sizes)) return kFailed;
    for (int i = 0; i < outputs_; ++i) {
      outputs[i].nbDims = output(i).rank;
      for (int k = 0; k < output(i).rank; ++k) {
        const Size size = output(i).sizes[k];
        outputs[i].d[k] = sizes.value[size] != kUnknown ? builder.constant(sizes.value[size]) : expression[size];
        if (!outputs[i].d[k]) return fail(Line().add("got no expression for the size '%s'", kSizeNames[size]));
      }
    }
    return 0;
  }

  bool supportsFormatCombination(int32_t position, const trt::DynamicPluginTensorDesc* all, int32_t inputs,
                                 int32_t outputs) noexcept override {
    // A question, not an error: no line is logged for a "no".
    if (!all || inputs != inputs_ || outputs != outputs_ || position < 0 || position >= inputs_ + outputs_)
      return false;
    const trt::PluginTensorDesc& asked = all[position].desc;
    if (asked.format != trt::TensorFormat::kLINEAR) return false;
    const DataType first = all[0].desc.type;
    return position == 0 ? first == DataType::kFLOAT || first == DataType::kHALF
                         : asked.type == (tensors_[position]->shared ? first : DataType::kFLOAT);
  }

  int32_t configurePlugin(const trt::DynamicPluginTensorDesc* in, int32_t inputs,
                          const trt::DynamicPluginTensorDesc* out, int32_t outputs) noexcept override {
    if (!expect_counts(inputs, outputs)) return kFailed;
    if (!in || !out) return fail(Line().add("got no array of tensor descriptions"));
    // min, opt and max are bounds that TensorRT works out for each tensor alone: like sizes need not have like bounds.
    Sizes sizes;
    for (int i = 0; i < inputs_ + outputs_; ++i) {
      const trt::PluginTensorDesc& desc = i < inputs_ ? in[i].desc : out[i - inputs_].desc;
      if (!expect_desc(i, desc, in[0].desc.type) || !expect_shape(i, Shape(desc.dims), sizes)) return kFailed;
    }
    return expect_servable(sizes) ? 0 : kFailed;
  }

  // Enough for the largest sizes, and for all smaller ones.
  size_t getWorkspaceSize(const trt::DynamicPluginTensorDesc* in, int32_t inputs, const trt::DynamicPluginTensorDesc*,
                          int32_t outputs) const noexcept override {
    if (!expect_counts(inputs, outputs)) return 0;
    if (!in) return fail(Line().add("got no array of tensor descriptions")), 0;
    int64_t largest[kSizes];
    for (int64_t& one : largest) one = 1;
    for (int i = 0; i < inputs_; ++i) {
      const Shape shape(in[i].max);
      const bool no_group = tensors_[i]->rank == 4 && shape.rank == 3;
      if (shape.rank != tensors_[i]->rank - no_group) {
        return fail(Line().add("input '%s' has %d dimensions in its upper bound", tensors_[i]->name, shape.rank)), 0;
      }
      for (int k = 0, at = 0; k < tensors_[i]->rank; ++k) {
        if (no_group && tensors_[i]->sizes[k] == kGroup) continue;
        const int64_t size = shape.size[at++];
        if (size > largest[tensors_[i]->sizes[k]]) largest[tensors_[i]->sizes[k]] = size;
      }
    }
    Call call = {};
    call.attributes = attributes_.value, call.sizes = largest, call.dtype = kernel_dtype(in[0].desc.type);
    size_t bytes = 0;
    if (const int status = op_.workspace(call, &bytes)) return kernel_failed(status), 0;
    return bytes;
  }

  const char* getTimingCacheID() noexcept override { return id_.text(); }
  const char* getMetadataString() noexcept override { return id_.text(); }

  // IPluginV3OneRuntime
  int32_t setTactic(int32_t tactic) noexcept override {
    return tactic == 0 ? 0 : fail(Line().add("got tactic %d, expected 0: there are no tactics", (int)tactic));
  }

  int32_t onShapeChange(const trt::PluginTensorDesc* in, int32_t inputs, const trt::PluginTensorDesc* out,
                        int32_t outputs) noexcept override {
    if (!expect_counts(inputs, outputs)) return kFailed;
    Sizes sizes;
    return expect_call(in, out, sizes) ? 0 : kFailed;
  }

  int32_t enqueue(const trt::PluginTensorDesc* in, const trt::PluginTensorDesc* out, const void* const* inputs,
                  void* const* outputs, void* workspace, cudaStream_t stream) noexcept override {
    // Checked again: the shapes of this call are what the kernel walks over, and a check costs less than its launch.
    Sizes sizes;
    if (!expect_call(in, out, sizes)) return kFailed;
    if (!inputs || !outputs) return fail(Line().add("got no array of addresses"));
    for (int i = 0; i < inputs_ + outputs_; ++i) {
      if (!(i < inputs_ ? inputs[i] : outputs[i - inputs_])) {
        return fail(Line().add("%s '%s' has no memory", kind(i), tensors_[i]->name));
      }
    }
    Call call = {attributes_.value, sizes.value, kernel_dtype(in[0].type), inputs, outputs, workspace, stream};
    if (const int status = op_.launch(call)) return kernel_failed(status);
    return 0;
  }

  trt::IPluginV3* attachToContext(trt::IPluginResourceContext*) noexcept override { return clone(); }

  const trt::PluginFieldCollection* getFieldsToSerialize() noexcept override {
    for (int i = 0; i < op_.attribute_count; ++i) {
      const Attribute& attribute = op_.attributes[i];
      if (attribute.words[0]) {
        const char* const word = attribute.words[attributes_.value[i]];
        fields_[i] = {attribute.name, word, trt::PluginFieldType::kCHAR, (int32_t)strlen(word) + 1};
      } else {
        fields_[i] = {attribute.name, &attributes_.value[i], trt::PluginFieldType::kINT32, 1};
      }
    }
    collection_.nbFields = op_.attribute_count;
    collection_.fields = fields_;
    return &collection_;
  }

 private:
  static constexpr int32_t kFailed = 1;

  bool is_there(const Tensor& tensor) const { return tensor.only_with < 0 || attributes_.value[tensor.only_with]; }
  const Tensor& output(int i) const { return *tensors_[inputs_ + i]; }
  const char* kind(int i) const { return i < inputs_ ? "input" : "output"; }

  static int32_t kernel_dtype(DataType type) { return type == DataType::kHALF ? HCMEN_FLOAT16 : HCMEN_FLOAT32; }

  int32_t fail(const Line& what) const {
    Line line;
    line.add("%s: %s", op_.name, what.text());
    if (layer_[0]) line.add(" (layer '").shown(layer_).add("')");
    report(Severity::kERROR, line);
    return kFailed;
  }

  int32_t kernel_failed(int status) const {
    Line line;
    if (status == HCMEN_CUDA_FAILED) {
      line.add("the kernel could not be launched: %s", hcmen_cuda_problem());
    } else {
      line.add("the kernel refused its arguments: error %d", status);
    }
    return fail(line);
  }

  bool expect_counts(int inputs, int outputs) const {
    if (inputs == inputs_ && outputs == outputs_) return true;
    Line line;
    line.add("got %d inputs and %d outputs, expected ", inputs, outputs);
    for (int i = 0; i < inputs_ + outputs_; ++i) {
      line.add(i == inputs_ ? " and " : i ? ", " : "").add("%s", tensors_[i]->name);
    }
    line.add(" with %s", id_.text());
    return fail(line), false;
  }

  bool expect_type(int i, DataType type, DataType first) const {
    if (i == 0) {
      if (type == DataType::kFLOAT || type == DataType::kHALF) return true;
      return fail(Line().add("input '%s' is %s, expected float32 or float16", tensors_[0]->name, type_name(type))),
             false;
    }
    const DataType expected = tensors_[i]->shared ? first : DataType::kFLOAT;
    if (type == expected) return true;
    Line line;
    line.add("%s '%s' is %s, expected %s", kind(i), tensors_[i]->name, type_name(type), type_name(expected));
    if (tensors_[i]->shared) line.add(", the type of '%s'", tensors_[0]->name);
    return fail(line), false;
  }

  bool expect_desc(int i, const trt::PluginTensorDesc& desc, DataType first) const {
    if (!expect_type(i, desc.type, first)) return false;
    if (desc.format == trt::TensorFormat::kLINEAR) return true;
    return fail(Line().add("%s '%s' has memory format %d, expected %d (kLINEAR)", kind(i), tensors_[i]->name,
                           (int)desc.format, (int)trt::TensorFormat::kLINEAR)),
           false;
  }

  bool expect_shape(int i, const Shape& shape, Sizes& sizes) const {
    Line error;
    return fit(kind(i), *tensors_[i], shape, sizes, error) || (fail(error), false);
  }

  bool expect_servable(const Sizes& sizes) const {
    if (sizes.value[kState] > HCMEN_CUDA_FORWARD_STATES) {
      return fail(Line().add("input 'A' has %" PRId64 " states, expected at most %d", sizes.value[kState],
                             (int)HCMEN_CUDA_FORWARD_STATES)),
             false;
    }
    const int64_t channel = sizes.value[kChannel], group = sizes.value[kGroup];
    if (channel == kUnknown || group == kUnknown || channel % group == 0) return true;
    return fail(Line().add("input 'B' has %" PRId64 " groups, expected a number that divides the %" PRId64 " channels",
                           group, channel)),
           false;
  }

  // One call with all its sizes.
  bool expect_call(const trt::PluginTensorDesc* in, const trt::PluginTensorDesc* out, Sizes& sizes) const {
    if (!in || !out) return fail(Line().add("got no array of tensor descriptions")), false;
    for (int i = 0; i < inputs_ + outputs_; ++i) {
      const trt::PluginTensorDesc& desc = i < inputs_ ? in[i] : out[i - inputs_];
      const Shape shape(desc.dims);
      if (!expect_desc(i, desc, in[0].type) || !expect_shape(i, shape, sizes)) return false;
      for (int k = 0; k < shape.rank; ++k) {
        if (shape.size[k] != kUnknown) continue;
        Line line;
        add_shape(line.add("%s '%s' has shape ", kind(i), tensors_[i]->name), shape);
        return fail(line.add(", expected every size to be known")), false;
      }
    }
    return expect_servable(sizes);
  }

  const Operator& op_;
  const Attributes attributes_;
  const Tensor* tensors_[kMostTensors] = {};  // inputs that are there, then outputs
  int inputs_ = 0, outputs_ = 0;
  char layer_[128];
  Line id_;
  trt::PluginField fields_[kMostAttributes];
  trt::PluginFieldCollection collection_;
};

class Creator final : public trt::IPluginCreatorV3One {
 public:
  explicit Creator(const Operator& op) : op_(op) {
    for (int i = 0; i < op_.attribute_count; ++i) {
      const bool text = op_.attributes[i].words[0];
      fields_[i] = {op_.attributes[i].name, nullptr, text ? trt::PluginFieldType::kCHAR : trt::PluginFieldType::kINT32,
                    1};
    }
    collection_.nbFields = op_.attribute_count;
    collection_.fields = fields_;
  }

  trt::IPluginV3* createPlugin(const char* layer, const trt::PluginFieldCollection* fields,
                               trt::TensorRTPhase phase) noexcept override {
    Line error;
    error.add("%s: ", op_.name);
    Attributes attributes;
    if (read_fields(op_, fields, phase, attributes, error)) {
      if (Plugin* const plugin = new (std::nothrow) Plugin(op_, attributes, layer)) return plugin;
      error.add("no memory for a plugin");
    }
    if (layer && layer[0]) error.add(" (layer '").shown(layer).add("')");
    report(Severity::kERROR, error);
    return nullptr;
  }

  const trt::PluginFieldCollection* getFieldNames() noexcept override { return &collection_; }
  const char* getPluginName() const noexcept override { return op_.name; }
  const char* getPluginVersion() const noexcept override { return kVersion; }
  const char* getPluginNamespace() const noexcept override { return kNamespace; }

 private:
  const Operator& op_;
  trt::PluginField fields_[kMostAttributes];
  trt::PluginFieldCollection collection_;
};

// Never destroyed: a registry may ask for a creator's name after this library's destructors have run.
template <class T>
class Lasting {
 public:
  explicit Lasting(const Operator& op) : object_(*new (memory_) T(op)) {}
  T* get() { return &object_; }

 private:
  alignas(T) unsigned char memory_[sizeof(T)];
  T& object_;
};

}  // namespace
}  // namespace hcmen

extern "C" {

HCMEN_TRT_EXPORT nvinfer1::IPluginCreatorInterface* const* getCreators(int32_t& count) {
  static hcmen::Lasting<hcmen::Creator> scan(hcmen::kSelectiveScan), conv(hcmen::kCausalConv1d);
  static nvinfer1::IPluginCreatorInterface* const all[] = {scan.get(), conv.get()};
  count = 2;
  return all;
}

HCMEN_TRT_EXPORT void setLoggerFinder(nvinfer1::ILoggerFinder* finder) {
  const bool own = finder && hcmen::major_version_behind(finder) == NV_TENSORRT_MAJOR;
  hcmen::logger_finder.store(own ? finder : nullptr);
}

}  // extern "C"

#include "trt_plugin.h"

#include <inttypes.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>

#include <new>

#include "cuda_ops.h"
#include "op_node.h"
#include "trt_fields.h"
#include "trt_log.h"

namespace hcmen {
namespace {

namespace trt = nvinfer1;
using op::Call;
using op::kUnknown;
using op::Line;
using op::Operator;
using op::Sizes;
using trt::DataType;
using Severity = trt::ILogger::Severity;

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

// --- the kernels ----------------------------------------------------------------------------------------------------

// Bytes set aside for sequences cut into chunks. TensorRT asks once, for the largest sizes of a profile, and
// then runs any smaller ones in that much, while it is the small ones that are cut most; and at run time nobody says
// how much there is. So it depends on nothing that changes from call to call. The kernel's own plan has less than
// 2^17 channels of chunks at once, each with its states and one sum. Of the dual it has less than 2^16 times 32 lanes,
// each with four rows of eight states, or sixteen where there are more than 256; and no more sums than 2^16.
int64_t budget_of(const hcmen_scan& scan) { return (scan.state + 1) << 19; }
int64_t budget_of(const hcmen_dual& dual) { return (int64_t)(dual.state > 256 ? 17 : 9) << 20; }

int workspace_of(const hcmen_scan& scan, int64_t* bytes) {
  return hcmen_cuda_selective_scan_workspace(&scan, nullptr, 0, bytes);
}
int workspace_of(const hcmen_dual& dual, int64_t* bytes) {
  return hcmen_cuda_state_space_dual_workspace(&dual, nullptr, 0, bytes);
}

// How the kernel shall run: as it likes where that fits the budget, else with each sequence in one piece, which needs
// no workspace.
template <class Arguments>
int plan(const Arguments& arguments, void* workspace, hcmen_cuda_launch* launch) {
  int64_t bytes = 0;
  if (const int status = workspace_of(arguments, &bytes)) return status;
  if (bytes > budget_of(arguments)) {
    launch->steps_per_chunk = -1;
  } else if (bytes > 0) {
    launch->workspace = workspace, launch->workspace_bytes = bytes;
  }
  return HCMEN_OK;
}

// Bytes for any call; and whether the kernel takes these sizes at all.
template <class Arguments>
int budget_for(const Arguments& arguments, size_t* bytes) {
  hcmen_cuda_launch launch = {};
  *bytes = (size_t)budget_of(arguments);
  return plan(arguments, nullptr, &launch);
}

int budget_for(const Operator& of, const Call& call, size_t* bytes) {
  *bytes = 0;
  if (&of == &op::kSelectiveScan) return budget_for(scan_of(call), bytes);
  if (&of == &op::kStateSpaceDual) return budget_for(dual_of(call), bytes);
  return HCMEN_OK;
}

int launch_on(cudaStream_t stream, const Operator& of, const Call& call, void* workspace) {
  hcmen_cuda_launch launch = {};
  launch.stream = stream;
  if (&of == &op::kSelectiveScan) {
    const hcmen_scan scan = scan_of(call);
    const int status = plan(scan, workspace, &launch);
    return status ? status : hcmen_cuda_selective_scan_forward(&scan, &launch);
  }
  if (&of == &op::kStateSpaceDual) {
    const hcmen_dual dual = dual_of(call);
    const int status = plan(dual, workspace, &launch);
    return status ? status : hcmen_cuda_state_space_dual_forward(&dual, &launch);
  }
  const hcmen_conv conv = conv_of(call);
  return hcmen_cuda_causal_conv1d_forward(&conv, &launch);
}

// --- shapes ---------------------------------------------------------------------------------------------------------

// Sizes of one tensor, kUnknown where a network does not say yet.
struct Shape {
  int rank;
  int64_t size[trt::Dims::MAX_DIMS];

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

// --- the plugin -----------------------------------------------------------------------------------------------------

class Plugin final : public trt::IPluginV3,
                     public trt::IPluginV3OneCore,
                     public trt::IPluginV3OneBuild,
                     public trt::IPluginV3OneRuntime {
 public:
  Plugin(const op::Node& node, const char* layer) noexcept : node_(node) {
    snprintf(layer_, sizeof layer_, "%s", layer ? layer : "");
    // Everything that decides what is computed, and nothing else: names of layers differ between like nodes.
    for (int i = 0; i < node_.op.attribute_count(); ++i) {
      const op::Attribute& attribute = node_.op.attributes[i];
      id_.add("%s%s=", i ? "," : "", attribute.name);
      attribute.is_number ? id_.add("%.9g", op::number_of(node_.attributes[i])) : id_.add("%d", (int)node_.attributes[i]);
    }
  }

  // Straight from malloc: where memory is short, the C++ library's own operator, nothrow or not, throws inside itself
  // first, and may end the process for want of memory to do so.
  static void* operator new(size_t size, const std::nothrow_t&) noexcept { return malloc(size); }
  static void operator delete(void* plugin) noexcept { free(plugin); }
  static void operator delete(void* plugin, const std::nothrow_t&) noexcept { free(plugin); }

  // A clone points at its own fields from the start: `getFieldsToSerialize` fills them in.
  Plugin(const Plugin& other) noexcept : Plugin(other.node_, other.layer_) {}
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
  const char* getPluginName() const noexcept override { return node_.op.name; }
  const char* getPluginVersion() const noexcept override { return op::kVersion; }
  const char* getPluginNamespace() const noexcept override { return op::kDomain; }

  // IPluginV3OneBuild
  int32_t getNbOutputs() const noexcept override { return node_.outputs; }

  int32_t getOutputDataTypes(DataType* output_types, int32_t outputs, const DataType* input_types,
                             int32_t inputs) const noexcept override {
    if (!expect_counts(inputs, outputs)) return kFailed;
    if (!output_types || !input_types) return fail(Line().add("got no array of data types"));
    for (int i = 0; i < node_.inputs; ++i) {
      if (!expect_type(i, input_types[i], input_types[0])) return kFailed;
    }
    for (int i = 0; i < node_.outputs; ++i) {
      output_types[i] = node_.output(i).type == op::kShared ? input_types[0] : DataType::kFLOAT;
    }
    return 0;
  }

  int32_t getOutputShapes(const trt::DimsExprs* inputs, int32_t input_count, const trt::DimsExprs*,
                          int32_t shape_inputs, trt::DimsExprs* outputs, int32_t output_count,
                          trt::IExprBuilder& builder) noexcept override {
    if (!expect_counts(input_count, output_count)) return kFailed;
    if (!inputs || !outputs) return fail(Line().add("got no array of shapes"));
    if (shape_inputs != 0) return fail(Line().add("got %d shape inputs, expected none", (int)shape_inputs));
    Sizes sizes;
    const trt::IDimensionExpr* expression[op::kSizes] = {};
    for (int i = 0; i < node_.inputs; ++i) {
      if (!expect_shape(i, Shape(inputs[i]), sizes)) return kFailed;
      // The first input that has a size names it; a number, where one is known, says more than any expression.
      for (int k = 0; k < inputs[i].nbDims; ++k) {
        const trt::IDimensionExpr*& known = expression[size_at(*node_.tensors[i], inputs[i].nbDims, k)];
        if (!known) known = inputs[i].d[k];
      }
    }
    if (!expect_servable(sizes)) return kFailed;
    for (int i = 0; i < node_.outputs; ++i) {
      const op::Tensor& output = node_.output(i);
      outputs[i].nbDims = output.rank();
      for (int k = 0; k < output.rank(); ++k) {
        const op::Size size = output.sizes[k];
        outputs[i].d[k] = sizes.value[size] != kUnknown ? builder.constant(sizes.value[size]) : expression[size];
        if (!outputs[i].d[k]) return fail(Line().add("got no expression for the size '%s'", op::kSizeNames[size]));
      }
    }
    return 0;
  }

  bool supportsFormatCombination(int32_t position, const trt::DynamicPluginTensorDesc* all, int32_t inputs,
                                 int32_t outputs) noexcept override {
    // A question, not an error: no line is logged for a "no".
    if (!all || inputs != node_.inputs || outputs != node_.outputs || position < 0 || position >= node_.count())
      return false;
    const trt::PluginTensorDesc& asked = all[position].desc;
    return asked.format == trt::TensorFormat::kLINEAR &&
           node_.fits_type(position, type_name(asked.type), type_name(all[0].desc.type));
  }

  int32_t configurePlugin(const trt::DynamicPluginTensorDesc* in, int32_t inputs,
                          const trt::DynamicPluginTensorDesc* out, int32_t outputs) noexcept override {
    if (!expect_counts(inputs, outputs)) return kFailed;
    if (!in || !out) return fail(Line().add("got no array of tensor descriptions"));
    // min, opt and max are bounds that TensorRT works out for each tensor alone: like sizes need not have like bounds.
    Sizes sizes;
    for (int i = 0; i < node_.count(); ++i) {
      const trt::PluginTensorDesc& desc = i < node_.inputs ? in[i].desc : out[i - node_.inputs].desc;
      if (!expect_desc(i, desc, in[0].desc.type) || !expect_shape(i, Shape(desc.dims), sizes)) return kFailed;
    }
    return expect_servable(sizes) ? 0 : kFailed;
  }

  // Enough for the largest sizes, and for all smaller ones.
  size_t getWorkspaceSize(const trt::DynamicPluginTensorDesc* in, int32_t inputs, const trt::DynamicPluginTensorDesc*,
                          int32_t outputs) const noexcept override {
    if (!expect_counts(inputs, outputs)) return 0;
    if (!in) return fail(Line().add("got no array of tensor descriptions")), 0;
    int64_t largest[op::kSizes];
    for (int64_t& one : largest) one = 1;
    for (int i = 0; i < node_.inputs; ++i) {
      const op::Tensor& tensor = *node_.tensors[i];
      const Shape shape(in[i].max);
      if (shape.rank != tensor.rank() && !((has_group(tensor) || tensor.spread) && shape.rank == tensor.rank() - 1)) {
        return fail(Line().add("input '%s' has %d dimensions in its upper bound", tensor.name, shape.rank)), 0;
      }
      for (int k = 0; k < shape.rank; ++k) {
        int64_t& most = largest[size_at(tensor, shape.rank, k)];
        if (shape.size[k] > most) most = shape.size[k];
      }
    }
    const Call call = {node_.attributes, largest, kernel_dtype(in[0].desc.type)};
    size_t bytes = 0;
    if (const int status = budget_for(node_.op, call, &bytes)) return kernel_failed(status), 0;
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
    for (int i = 0; i < node_.count(); ++i) {
      if (!(i < node_.inputs ? inputs[i] : outputs[i - node_.inputs])) {
        return fail(Line().add("%s '%s' has no memory", node_.kind(i), node_.tensors[i]->name));
      }
    }
    const Call call = {node_.attributes, sizes.value, kernel_dtype(in[0].type), inputs, outputs, sizes.wide};
    if (const int status = launch_on(stream, node_.op, call, workspace)) return kernel_failed(status);
    return 0;
  }

  trt::IPluginV3* attachToContext(trt::IPluginResourceContext*) noexcept override { return clone(); }

  const trt::PluginFieldCollection* getFieldsToSerialize() noexcept override {
    collection_.nbFields = node_.op.attribute_count();
    for (int i = 0; i < collection_.nbFields; ++i) fields_[i] = field_of(node_.op.attributes[i], &node_.attributes[i]);
    collection_.fields = fields_;
    return &collection_;
  }

 private:
  static constexpr int32_t kFailed = 1;

  static int32_t kernel_dtype(DataType type) { return op::kernel_dtype(type == DataType::kHALF); }

  int32_t fail(const Line& what) const {
    Line line;
    line.add("%s: %s", node_.op.name, what.text());
    if (layer_[0]) add_shown(line.add(" (layer '"), layer_).add("')");
    report(Severity::kERROR, line);
    return kFailed;
  }

  int32_t kernel_failed(int status) const {
    Line line;
    if (status == HCMEN_CUDA_FAILED || status == HCMEN_CUDA_TOO_LARGE) {
      line.add("the kernel could not be launched: %s: %s", hcmen_cuda_problem(), hcmen_cuda_fix());
    } else {
      line.add("the kernel refused its arguments: error %d", status);
    }
    return fail(line);
  }

  bool expect_counts(int inputs, int outputs) const {
    if (inputs == node_.inputs && outputs == node_.outputs) return true;
    Line line;
    line.add("got %d inputs and %d outputs, expected ", inputs, outputs);
    for (int i = 0; i < node_.count(); ++i) {
      line.add(i == node_.inputs ? " and " : i ? ", " : "").add("%s", node_.tensors[i]->name);
    }
    line.add(" with %s", id_.text());
    return fail(line), false;
  }

  bool expect_type(int i, DataType type, DataType first) const {
    Line error;
    return node_.expect_type(i, type_name(type), type_name(first), error) || (fail(error), false);
  }

  bool expect_desc(int i, const trt::PluginTensorDesc& desc, DataType first) const {
    if (!expect_type(i, desc.type, first)) return false;
    if (desc.format == trt::TensorFormat::kLINEAR) return true;
    return fail(Line().add("%s '%s' has memory format %d, expected %d (kLINEAR)", node_.kind(i),
                           node_.tensors[i]->name, (int)desc.format, (int)trt::TensorFormat::kLINEAR)),
           false;
  }

  bool expect_shape(int i, const Shape& shape, Sizes& sizes) const {
    Line error;
    if (shape.usable()) {
      return node_.expect_shape(i, shape.rank, shape.size, sizes, error) || (fail(error), false);
    }
    return fail(error.add("%s '%s' has %d dimensions", node_.kind(i), node_.tensors[i]->name, shape.rank)), false;
  }

  bool expect_servable(const Sizes& sizes) const {
    Line error;
    if (sizes.value[op::kState] > HCMEN_CUDA_FORWARD_STATES) {
      return fail(error.add("input '%s' has %" PRId64 " states, expected at most %d",
                            sizes.value[op::kHead] == kUnknown ? "A" : "B", sizes.value[op::kState],
                            (int)HCMEN_CUDA_FORWARD_STATES)),
             false;
    }
    return fit_groups(sizes, error) || (fail(error), false);
  }

  // One call with all its sizes.
  bool expect_call(const trt::PluginTensorDesc* in, const trt::PluginTensorDesc* out, Sizes& sizes) const {
    if (!in || !out) return fail(Line().add("got no array of tensor descriptions")), false;
    for (int i = 0; i < node_.count(); ++i) {
      const trt::PluginTensorDesc& desc = i < node_.inputs ? in[i] : out[i - node_.inputs];
      const Shape shape(desc.dims);
      if (!expect_desc(i, desc, in[0].type) || !expect_shape(i, shape, sizes)) return false;
      for (int k = 0; k < shape.rank; ++k) {
        if (shape.size[k] != kUnknown) continue;
        Line line;
        add_shape(line.add("%s '%s' has shape ", node_.kind(i), node_.tensors[i]->name), shape.rank, shape.size);
        return fail(line.add(", expected every size to be known")), false;
      }
    }
    return expect_servable(sizes);
  }

  const op::Node node_;
  char layer_[128];
  Line id_;
  trt::PluginField fields_[op::kMostAttributes];
  trt::PluginFieldCollection collection_;
};

class Creator final : public trt::IPluginCreatorV3One {
 public:
  explicit Creator(const Operator& of) : of_(of) {
    collection_.nbFields = of_.attribute_count();
    for (int i = 0; i < collection_.nbFields; ++i) fields_[i] = field_of(of_.attributes[i], nullptr);
    collection_.fields = fields_;
  }

  trt::IPluginV3* createPlugin(const char* layer, const trt::PluginFieldCollection* fields,
                               trt::TensorRTPhase phase) noexcept override {
    Line error;
    error.add("%s: ", of_.name);
    int32_t attributes[op::kMostAttributes] = {};
    if (read_fields(of_, fields, phase, attributes, error)) {
      const op::Node node(of_, attributes);
      if (node.expect_attributes(error)) {
        if (Plugin* const plugin = new (std::nothrow) Plugin(node, layer)) return plugin;
        error.add("no memory for a plugin");
      }
    }
    if (layer && layer[0]) add_shown(error.add(" (layer '"), layer).add("')");
    report(Severity::kERROR, error);
    return nullptr;
  }

  const trt::PluginFieldCollection* getFieldNames() noexcept override { return &collection_; }
  const char* getPluginName() const noexcept override { return of_.name; }
  const char* getPluginVersion() const noexcept override { return op::kVersion; }
  const char* getPluginNamespace() const noexcept override { return op::kDomain; }

 private:
  const Operator& of_;
  trt::PluginField fields_[op::kMostAttributes];
  trt::PluginFieldCollection collection_;
};

// Never destroyed: a registry may ask for a creator's name after this library's destructors have run.
template <class T>
class Lasting {
 public:
  explicit Lasting(const Operator& of) : object_(*new (memory_) T(of)) {}
  T* get() { return &object_; }

 private:
  alignas(T) unsigned char memory_[sizeof(T)];
  T& object_;
};

}  // namespace
}  // namespace hcmen

extern "C" HCMEN_TRT_EXPORT nvinfer1::IPluginCreatorInterface* const* getCreators(int32_t& count) {
  static hcmen::Lasting<hcmen::Creator> scan(hcmen::op::kSelectiveScan), conv(hcmen::op::kCausalConv1d),
      dual(hcmen::op::kStateSpaceDual);
  static nvinfer1::IPluginCreatorInterface* const all[] = {scan.get(), conv.get(), dual.get()};
  count = 3;
  return all;
}

// The operators of op_table.h for ONNX Runtime, whatever the device; docs/op.md specifies them. Included once by a library, with a class that knows its device:
//
//   struct Device {
//     static constexpr const char* kProvider, kLibrary, kOtherLibrary;    // names
//     static constexpr const char* kMark, kOtherMark;                     // in session options that hold the operators
//     Device(const Functions&, const Api*)                                // one for each node; may own memory
//     int run(const Functions&, KernelContext*, const hcmen_scan&)        // computes, or queues the computation
//     int run(const Functions&, KernelContext*, const hcmen_conv&)
//     int run(const Functions&, KernelContext*, const hcmen_dual&)
//     static std::string problem(int status)                              // what a status of `run` means, in words
//   };
//
// Everything about a node that is known when a session is made (attributes, number and types of inputs) is checked
// there, and all shapes at every run, before any data is touched. An error is one line: what came, what was expected.
#ifndef HCMEN_ORT_OPERATORS_H_
#define HCMEN_ORT_OPERATORS_H_

#include <cstddef>
#include <cstdint>
#include <memory>
#include <mutex>
#include <new>
#include <string>
#include <vector>

#include "op_node.h"
#include "ort_abi.h"

namespace hcmen::ort {
namespace {

using op::Line;

// --- errors ---------------------------------------------------------------------------------------------------------

// Leaves a callback as a Status; see `guarded`.
struct Failure {
  ErrorCode code;
  Line message;
};

// An error that the runtime itself reported.
struct Refusal {
  Status* status;
};

void check(Status* status) {
  if (status != nullptr) {
    throw Refusal{status};
  }
}

// Runs `work` and turns whatever it throws into a Status: no exception may pass into the runtime.
template <class Work>
Status* guarded(const Functions& ort, const char* op, Work work) noexcept {
  try {
    work();
    return nullptr;
  } catch (const Refusal& refusal) {
    return refusal.status;
  } catch (const Failure& failure) {
    return ort.CreateStatus(failure.code, Line().add("%s: %s", op, failure.message.text()).text());
  } catch (const std::bad_alloc&) {
    return ort.CreateStatus(kFail, "hcmen operator: out of memory");
  } catch (...) {
    return ort.CreateStatus(kFail, "hcmen operator: unexpected exception");
  }
}

const char* type_name(ElementType type) {
  static const char* const names[] = {"undefined", "float32", "uint8",     "int8",       "uint16",  "int16",
                                      "int32",     "int64",   "string",    "bool",       "float16", "float64",
                                      "uint32",    "uint64",  "complex64", "complex128", "bfloat16"};
  return static_cast<size_t>(type) < sizeof names / sizeof names[0] ? names[type] : "another type";
}

// A string from a model, safe to show in one line.
std::string shown(const std::string& text) {
  std::string out;
  for (const char c : text.substr(0, 40)) {
    out += c >= ' ' && c <= '~' ? c : '?';
  }
  return out + (text.size() > 40 ? "..." : "");
}

// --- what a kernel learns of its node when a session is made --------------------------------------------------------

class Info {
 public:
  Info(const Functions& ort, const KernelInfo* info) : ort_(ort), info_(info) {}

  // The node, with its attributes and the number of its inputs and outputs checked.
  op::Node node(const op::Operator& of) const {
    int32_t values[op::kMostAttributes] = {};
    for (int i = 0; i < of.attribute_count(); ++i) {
      const op::Attribute& attribute = of.attributes[i];
      values[i] = attribute.is_number ? number(attribute) : attribute.words[0] ? word(attribute) : flag(attribute);
    }
    const op::Node node(of, values);
    Line problem;
    if (!node.expect_attributes(problem)) {
      fail(problem);
    }
    size_t count = 0;
    check(ort_.KernelInfo_GetInputCount(info_, &count));
    expect_count(node, "inputs", count, 0, node.inputs);
    check(ort_.KernelInfo_GetOutputCount(info_, &count));
    expect_count(node, "outputs", count, node.inputs, node.count());
    return node;
  }

  // Checks the types of all inputs. Returns the type they share.
  ElementType expect_types(const op::Node& node) const {
    const ElementType first = type(0, *node.tensors[0]);
    for (int i = 0; i < node.inputs; ++i) {
      Line problem;
      const ElementType got = i ? type(i, *node.tensors[i]) : first;
      if (!node.expect_type(i, type_name(got), type_name(first), problem)) {
        fail(problem);
      }
    }
    return first;
  }

 private:
  bool flag(const op::Attribute& attribute) const {
    int64_t value = 0;
    if (absent(ort_.KernelInfoGetAttribute_int64(info_, attribute.name, &value))) {
      expect_no_attribute(attribute);
      return false;
    }
    if (value != 0 && value != 1) {
      fail(Line().add("attribute '%s' is %" PRId64 ", expected 0 or 1", attribute.name, value));
    }
    return value == 1;
  }

  int32_t number(const op::Attribute& attribute) const {
    float value = 0;
    if (absent(ort_.KernelInfoGetAttribute_float(info_, attribute.name, &value))) {
      expect_no_attribute(attribute);
      return op::default_of(attribute);
    }
    if (value != value) {
      Line problem;
      fail(add_choice(problem.add("attribute '%s' is NaN, expected ", attribute.name), attribute));
    }
    return op::bits_of(value);
  }

  int word(const op::Attribute& attribute) const {
    size_t size = 0;
    if (absent(ort_.KernelInfoGetAttribute_string(info_, attribute.name, nullptr, &size))) {
      expect_no_attribute(attribute);
      return 0;
    }
    std::string value(size, '\0');
    check(ort_.KernelInfoGetAttribute_string(info_, attribute.name, value.data(), &size));
    value.resize(size == 0 ? 0 : size - 1);
    for (int i = 0; i < op::kMostWords && attribute.words[i]; ++i) {
      if (value == attribute.words[i]) return i;
    }
    Line problem;
    fail(add_choice(problem.add("attribute '%s' is \"%s\", expected ", attribute.name, shown(value).c_str()), attribute));
  }

  [[noreturn]] void fail(const Line& message) const {
    size_t size = 0;
    Line line = message;
    if (!absent(ort_.KernelInfo_GetNodeName(info_, nullptr, &size)) && size > 1) {
      std::string name(size, '\0');
      check(ort_.KernelInfo_GetNodeName(info_, name.data(), &size));
      name.resize(size - 1);
      line.add(" (node '%s')", shown(name).c_str());
    }
    throw Failure{kInvalidArgument, line};
  }

  // Whether a query came back with an error, which is released.
  bool absent(Status* status) const {
    if (status != nullptr) {
      ort_.ReleaseStatus(status);
    }
    return status != nullptr;
  }

  // The runtime answers alike for a missing attribute and one of another type: ask for the other types.
  void expect_no_attribute(const op::Attribute& attribute) const {
    const char* const name = attribute.name;
    size_t size = 0;
    int64_t integer = 0;
    float real = 0;
    const char* got = nullptr;
    if (!absent(ort_.KernelInfoGetAttribute_int64(info_, name, &integer))) {
      got = "an integer";
    } else if (!absent(ort_.KernelInfoGetAttribute_float(info_, name, &real))) {
      got = "a float";
    } else if (!absent(ort_.KernelInfoGetAttribute_string(info_, name, nullptr, &(size = 0)))) {
      got = "a string";
    } else if (!absent(ort_.KernelInfoGetAttributeArray_int64(info_, name, nullptr, &(size = 0)))) {
      // A list of the other type answers too, with no elements.
      if (size > 0) {
        got = "a list of integers";
      } else {
        check(ort_.KernelInfoGetAttributeArray_float(info_, name, nullptr, &size));
        got = size > 0 ? "a list of floats" : "an empty list";
      }
    }
    if (got != nullptr) {
      Line problem;
      fail(add_choice(problem.add("attribute '%s' is %s, expected ", name, got), attribute));
    }
  }

  // The tensors of `node` from `begin` to `end` are all that it may have of this kind.
  void expect_count(const op::Node& node, const char* kind, size_t got, int begin, int end) const {
    if (got == static_cast<size_t>(end - begin)) {
      return;
    }
    Line line;
    node.add_presence(line.add("got %zu %s, expected %d", got, kind, end - begin));
    for (int i = begin; i < end; ++i) {
      line.add("%s%s", i == begin ? ": " : ", ", node.tensors[i]->name);
    }
    fail(line);
  }

  ElementType type(int index, const op::Tensor& input) const {
    TypeInfo* type = nullptr;
    if (absent(ort_.KernelInfo_GetInputTypeInfo(info_, static_cast<size_t>(index), &type)) || type == nullptr) {
      fail(Line().add("input '%s' is absent, expected a float32%s tensor: an input is left out by leaving its attribute "
                      "(gated, stateful) 0, never by an empty name",
                      input.name, input.type == op::kShared ? " or float16" : ""));
    }
    const TensorInfo* info = nullptr;
    ElementType element = kUndefined;
    Status* status = ort_.CastTypeInfoToTensorInfo(type, &info);
    if (status == nullptr && info != nullptr) {
      status = ort_.GetTensorElementType(info, &element);
    }
    ort_.ReleaseTypeInfo(type);
    check(status);
    return element;
  }

  const Functions& ort_;
  const KernelInfo* info_;
};

// --- what a kernel does ---------------------------------------------------------------------------------------------

template <class Device>
class Kernel {
 public:
  Kernel(const Functions& ort, const Api* api, const op::Operator& of, const Info& info)
      : ort_(ort), device_(ort, api), node_(info.node(of)), type_(info.expect_types(node_)) {}

  const Functions& ort() const { return ort_; }
  const char* name() const { return node_.op.name; }

  void compute(KernelContext* context) {
    const void* inputs[op::kMostInputs] = {};
    void* outputs[op::kMostOutputs] = {};
    op::Sizes sizes;
    for (int i = 0; i < node_.inputs; ++i) {
      inputs[i] = input(context, i, sizes);
    }
    Line problem;
    if (!fit_groups(sizes, problem)) {
      throw Failure{kInvalidArgument, problem};
    }
    for (int i = 0; i < node_.outputs; ++i) {
      outputs[i] = output(context, i, sizes);
    }
    const op::Call call{node_.attributes, sizes.value, op::kernel_dtype(type_ == kFloat16), inputs, outputs, sizes.wide};
    const int status = &node_.op == &op::kSelectiveScan   ? device_.run(ort_, context, scan_of(call))
                       : &node_.op == &op::kStateSpaceDual ? device_.run(ort_, context, dual_of(call))
                                                           : device_.run(ort_, context, conv_of(call));
    if (status == HCMEN_NO_MEMORY) {
      throw std::bad_alloc();
    }
    if (status == HCMEN_BAD_ARGUMENT) {
      throw Failure{kInvalidArgument, Line().add("the kernel refuses these sizes (status %d)", status)};
    }
    if (status != HCMEN_OK) {
      throw Failure{kFail, Line().add("%s", Device::problem(status).c_str())};
    }
  }

 private:
  const void* input(KernelContext* context, int index, op::Sizes& sizes) const {
    const char* const name = node_.tensors[index]->name;
    const Value* value = nullptr;
    check(ort_.KernelContext_GetInput(context, static_cast<size_t>(index), &value));
    if (value == nullptr) {
      throw Failure{kInvalidArgument, Line().add("input '%s' is absent", name)};
    }
    TensorInfo* info = nullptr;
    check(ort_.GetTensorTypeAndShape(value, &info));
    const auto release = [this](TensorInfo* held) { ort_.ReleaseTensorTypeAndShapeInfo(held); };
    const std::unique_ptr<TensorInfo, decltype(release)> held(info, release);
    ElementType type = kUndefined;
    check(ort_.GetTensorElementType(info, &type));
    size_t rank = 0;
    check(ort_.GetDimensionsCount(info, &rank));
    std::vector<int64_t> shape(rank);
    check(ort_.GetDimensions(info, shape.data(), rank));
    Line problem;
    if (!node_.expect_type(index, type_name(type), type_name(type_), problem) ||
        !node_.expect_shape(index, static_cast<int>(rank), shape.data(), sizes, problem)) {
      throw Failure{kInvalidArgument, problem};
    }
    void* data = nullptr;
    check(ort_.GetTensorMutableData(const_cast<Value*>(value), &data));
    return data;
  }

  void* output(KernelContext* context, int index, const op::Sizes& sizes) const {
    const op::Tensor& tensor = node_.output(index);
    int64_t shape[op::kMostRank];
    for (int i = 0; i < tensor.rank(); ++i) {
      shape[i] = sizes.value[tensor.sizes[i]];
    }
    Value* value = nullptr;
    const size_t rank = static_cast<size_t>(tensor.rank());
    check(ort_.KernelContext_GetOutput(context, static_cast<size_t>(index), shape, rank, &value));
    if (value == nullptr) {
      throw Failure{kInvalidArgument, Line().add("output '%s' is left out, expected a name for it", tensor.name)};
    }
    void* data = nullptr;
    check(ort_.GetTensorMutableData(value, &data));
    return data;
  }

  const Functions& ort_;
  Device device_;
  const op::Node node_;
  const ElementType type_;
};

// --- registration ---------------------------------------------------------------------------------------------------

// One operator for one type of its first input: from that type the runtime infers the type of the first output. All
// other inputs are declared without a type and, past the first, optional, so that what is wrong with them is said here,
// by name, rather than by the runtime in general terms. For the same reason types that no kernel takes are registered
// too: their kernels fail when they are made.
struct Op : CustomOp {
  const Functions* ort = nullptr;
  const op::Operator* of = nullptr;
  ElementType first = kUndefined;
};

constexpr ElementType kFirstTypes[] = {kFloat, kFloat16, kDouble, kBFloat16, kBool,   kString, kUint8,
                                       kInt8,  kUint16,  kInt16,  kInt32,    kUint32, kInt64,  kUint64};

template <class Device>
Op make_op(const Functions& ort, const op::Operator& of, ElementType first) {
  Op op;
  op.ort = &ort;
  op.of = &of;
  op.first = first;
  op.GetName = [](const CustomOp* self) { return static_cast<const Op*>(self)->of->name; };
  op.GetExecutionProviderType = [](const CustomOp*) { return Device::kProvider; };
  op.GetInputTypeCount = [](const CustomOp* self) {
    return static_cast<size_t>(static_cast<const Op*>(self)->of->input_count());
  };
  op.GetOutputTypeCount = [](const CustomOp* self) {
    return static_cast<size_t>(static_cast<const Op*>(self)->of->output_count());
  };
  op.GetInputType = [](const CustomOp* self, size_t i) {
    return i == 0 ? static_cast<const Op*>(self)->first : kUndefined;
  };
  op.GetOutputType = [](const CustomOp* self, size_t i) {
    return i == 0 ? static_cast<const Op*>(self)->first : kFloat;
  };
  op.GetInputCharacteristic = [](const CustomOp*, size_t i) { return i == 0 ? kRequired : kOptional; };
  op.GetOutputCharacteristic = op.GetInputCharacteristic;
  op.GetInputMemoryType = [](const CustomOp*, size_t) { return kDefaultMemory; };
  op.GetVariadicInputMinArity = [](const CustomOp*) { return 0; };
  op.GetVariadicInputHomogeneity = op.GetVariadicInputMinArity;
  op.GetVariadicOutputMinArity = op.GetVariadicInputMinArity;
  op.GetVariadicOutputHomogeneity = op.GetVariadicInputMinArity;
  op.CreateKernelV2 = [](const CustomOp* self, const Api* api, const KernelInfo* info, void** kernel) {
    const Op& op = *static_cast<const Op*>(self);
    return guarded(*op.ort, op.of->name, [&] { *kernel = new Kernel<Device>(*op.ort, api, *op.of, Info(*op.ort, info)); });
  };
  op.KernelComputeV2 = [](void* kernel, KernelContext* context) {
    Kernel<Device>& self = *static_cast<Kernel<Device>*>(kernel);
    return guarded(self.ort(), self.name(), [&] { self.compute(context); });
  };
  op.KernelDestroy = [](void* kernel) { delete static_cast<Kernel<Device>*>(kernel); };
  return op;
}

// The operators as one runtime knows them. A process may hold several runtimes (two versions, say), each with its own
// table of functions.
template <class Device>
struct Registration {
  const Api* api;
  Functions ort;
  std::vector<Op> ops;
  CustomOpDomain* domain = nullptr;

  Registration(const Api* api, bool parallel_for) : api(api), ort(api, parallel_for) {
    for (const ElementType type : kFirstTypes) {
      for (const op::Operator* const of : op::kOperators) {
        ops.push_back(make_op<Device>(ort, *of, type));
      }
    }
    check(ort.CreateCustomOpDomain(op::kDomain, &domain));
    for (const Op& op : ops) {
      check(ort.CustomOpDomain_Add(domain, &op));
    }
  }
};

// The registration for `api`, made at the first call. Sessions point into it for as long as they live, and nothing says
// when the last is gone, so it is kept until the process ends (this library is never unloaded, see CMakeLists.txt).
template <class Device>
const Registration<Device>& registration(const Api* api, bool parallel_for) {
  static std::mutex mutex;
  static auto& all = *new std::vector<std::unique_ptr<const Registration<Device>>>;
  const std::lock_guard<std::mutex> lock(mutex);
  for (const auto& one : all) {
    if (one->api == api) {
      return *one;
    }
  }
  all.push_back(std::make_unique<const Registration<Device>>(api, parallel_for));
  return *all.back();
}

// What a library's RegisterCustomOps does.
template <class Device>
Status* register_operators(SessionOptions* options, const ApiBase* base) {
  const Api* api = base->GetApi(kApiVersion);
  if (api == nullptr) {
    // An older runtime has a shorter table: nothing but its first function, there since version 1, may be touched.
    const auto create_status = *reinterpret_cast<decltype(Functions::CreateStatus) const*>(base->GetApi(1));
    return create_status(kFail, "hcmen operators need ONNX Runtime 1.16 or later");
  }
  const Functions ort(api, false);
  return guarded(ort, "RegisterCustomOps", [&] {
    // Session options that hold a domain twice make no session, so registering once more is made to mean nothing.
    int registered = 0;
    check(ort.HasSessionConfigEntry(options, Device::kMark, &registered));
    if (registered) return;
    check(ort.HasSessionConfigEntry(options, Device::kOtherMark, &registered));
    if (registered) {
      throw Failure{kInvalidArgument,
                    Line().add("these session options hold %s already: register that library or %s, not both",
                               Device::kOtherLibrary, Device::kLibrary)};
    }
    const bool parallel_for = base->GetApi(kParallelForVersion) != nullptr;
    check(ort.AddCustomOpDomain(options, registration<Device>(api, parallel_for).domain));
    check(ort.AddSessionConfigEntry(options, Device::kMark, "1"));
  });
}

}  // namespace
}  // namespace hcmen::ort

#endif  // HCMEN_ORT_OPERATORS_H_

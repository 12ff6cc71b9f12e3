// The operators hcmen::SelectiveScan and hcmen::CausalConv1d for ONNX Runtime, whatever the device; docs/op.md specifies
// them. Included once by a library, with a class that knows its device:
//
//   struct Device {
//     static constexpr const char* kProvider, kLibrary, kOtherLibrary;    // names
//     static constexpr const char* kMark, kOtherMark;                     // in session options that hold the operators
//     Device(const Functions&, const Api*)                                // one for each node; may own memory
//     int run(const Functions&, KernelContext*, const hcmen_scan&)        // computes, or queues the computation
//     int run(const Functions&, KernelContext*, const hcmen_conv&)
//     static std::string problem(int status)                              // what a status of `run` means, in words
//   };
//
// Everything about a node that is known when a session is made (attributes, number and types of inputs) is checked
// there, and all shapes at every run, before any data is touched. An error is one line: what came, what was expected.
#ifndef HCMEN_ORT_OPERATORS_H_
#define HCMEN_ORT_OPERATORS_H_

#include <cstddef>
#include <cstdint>
#include <exception>
#include <initializer_list>
#include <memory>
#include <mutex>
#include <new>
#include <string>
#include <vector>

#include "causal_conv1d.h"
#include "ort_abi.h"
#include "selective_scan.h"

namespace hcmen::ort {
namespace {

// --- errors ---------------------------------------------------------------------------------------------------------

// Leaves a callback as a Status; see `guarded`.
struct Failure {
  ErrorCode code;
  std::string message;
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
    try {
      return ort.CreateStatus(failure.code, (std::string(op) + ": " + failure.message).c_str());
    } catch (const std::exception&) {
      return ort.CreateStatus(failure.code, op);
    }
  } catch (const std::bad_alloc&) {
    return ort.CreateStatus(kFail, "hcmen operator: out of memory");
  } catch (...) {
    return ort.CreateStatus(kFail, "hcmen operator: unexpected exception");
  }
}

std::string type_name(int type) {
  static const char* const names[] = {"undefined", "float32", "uint8",     "int8",       "uint16",  "int16",
                                      "int32",     "int64",   "string",    "bool",       "float16", "float64",
                                      "uint32",    "uint64",  "complex64", "complex128", "bfloat16"};
  if (type >= 0 && type < static_cast<int>(sizeof(names) / sizeof(names[0]))) {
    return names[type];
  }
  return "element type " + std::to_string(type);
}

// A string from a model, safe to show in one line.
std::string shown(const std::string& text) {
  std::string out;
  for (const char c : text.substr(0, 40)) {
    out += c >= ' ' && c <= '~' ? c : '?';
  }
  return out + (text.size() > 40 ? "..." : "");
}

// --- shapes ---------------------------------------------------------------------------------------------------------

// One size of an expected shape: a number where it is known, and what it counts.
struct Size {
  const char* name;
  int64_t value;  // kAny: any number above zero
};
constexpr int64_t kAny = -1;

std::string join(const std::vector<int64_t>& sizes) {
  std::string out = "[";
  for (size_t i = 0; i < sizes.size(); ++i) {
    out += (i ? ", " : "") + std::to_string(sizes[i]);
  }
  return out + "]";
}

// "[2, time, 16]", followed by " = [batch, time, channel]" where a number hides what it stands for.
std::string join(const std::vector<Size>& sizes) {
  std::string values = "[", names = "[";
  bool known = false;
  for (size_t i = 0; i < sizes.size(); ++i) {
    const bool any = sizes[i].value == kAny;
    known = known || !any;
    values += (i ? ", " : "") + (any ? std::string(sizes[i].name) : std::to_string(sizes[i].value));
    names += (i ? ", " : "") + std::string(sizes[i].name);
  }
  return known ? values + "] = " + names + "]" : values + "]";
}

struct Tensor {
  const char* name = "";
  ElementType type = kUndefined;
  std::vector<int64_t> sizes;
  const void* data = nullptr;

  int64_t operator[](size_t axis) const { return sizes[axis]; }

  bool has_shape(const std::vector<Size>& expected) const {
    if (sizes.size() != expected.size()) {
      return false;
    }
    for (size_t i = 0; i < sizes.size(); ++i) {
      if (sizes[i] < 1 || (expected[i].value != kAny && sizes[i] != expected[i].value)) {
        return false;
      }
    }
    return true;
  }

  [[noreturn]] void wrong_shape(const std::string& expected) const {
    const bool empty = [this] {
      for (const int64_t size : sizes) {
        if (size < 1) {
          return true;
        }
      }
      return false;
    }();
    throw Failure{kInvalidArgument, std::string("input '") + name + "' has shape " + join(sizes) + ", expected " +
                                        expected + (empty ? ", every size at least 1" : "")};
  }

  void expect(const std::vector<Size>& expected) const {
    if (!has_shape(expected)) {
      wrong_shape(join(expected));
    }
  }

  const float* floats() const { return static_cast<const float*>(data); }
};

// --- what a kernel learns of its node when a session is made --------------------------------------------------------

// An input of an operator, in order. `shared`: float32 or float16, the same type as the first input; else float32.
struct Input {
  const char* name;
  bool shared;
};

class Node {
 public:
  Node(const Functions& ort, const KernelInfo* info) : ort_(ort), info_(info) {}

  bool flag(const char* name) const {
    int64_t value = 0;
    if (absent(ort_.KernelInfoGetAttribute_int64(info_, name, &value))) {
      expect_no_attribute(name, "0 or 1");
      return false;
    }
    if (value != 0 && value != 1) {
      fail("attribute '" + std::string(name) + "' is " + std::to_string(value) + ", expected 0 or 1");
    }
    return value == 1;
  }

  std::string text(const char* name, const char* otherwise, const char* expected) const {
    size_t size = 0;
    if (absent(ort_.KernelInfoGetAttribute_string(info_, name, nullptr, &size))) {
      expect_no_attribute(name, expected);
      return otherwise;
    }
    std::string value(size, '\0');
    check(ort_.KernelInfoGetAttribute_string(info_, name, value.data(), &size));
    value.resize(size == 0 ? 0 : size - 1);
    return value;
  }

  void expect_counts(const std::vector<Input>& inputs, std::initializer_list<const char*> outputs,
                     const std::string& when) const {
    std::vector<const char*> input_names;
    for (const Input& input : inputs) {
      input_names.push_back(input.name);
    }
    size_t count = 0;
    check(ort_.KernelInfo_GetInputCount(info_, &count));
    expect_count("inputs", count, input_names, when);
    check(ort_.KernelInfo_GetOutputCount(info_, &count));
    expect_count("outputs", count, outputs, when);
  }

  // The type of every input is as `inputs` says. Returns the type they share.
  ElementType expect_types(const std::vector<Input>& inputs) const {
    const ElementType first = type(0, inputs[0]);
    if (first != kFloat && first != kFloat16) {
      fail("input '" + std::string(inputs[0].name) + "' is " + type_name(first) + ", expected float32 or float16");
    }
    for (size_t i = 1; i < inputs.size(); ++i) {
      const ElementType got = type(i, inputs[i]);
      const ElementType expected = inputs[i].shared ? first : kFloat;
      if (got != expected) {
        fail("input '" + std::string(inputs[i].name) + "' is " + type_name(got) + ", expected " + type_name(expected) +
             (inputs[i].shared ? std::string(", the type of '") + inputs[0].name + "'" : ""));
      }
    }
    return first;
  }

  [[noreturn]] void fail(const std::string& message) const {
    size_t size = 0;
    std::string name;
    if (!absent(ort_.KernelInfo_GetNodeName(info_, nullptr, &size)) && size > 1) {
      name.resize(size);
      check(ort_.KernelInfo_GetNodeName(info_, name.data(), &size));
      name.resize(size - 1);
    }
    throw Failure{kInvalidArgument, message + (name.empty() ? "" : " (node '" + shown(name) + "')")};
  }

 private:
  // Whether a query came back with an error, which is released.
  bool absent(Status* status) const {
    if (status != nullptr) {
      ort_.ReleaseStatus(status);
    }
    return status != nullptr;
  }

  // The runtime answers alike for a missing attribute and one of another type: ask for the other types.
  void expect_no_attribute(const char* name, const char* expected) const {
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
      fail("attribute '" + std::string(name) + "' is " + got + ", expected " + expected);
    }
  }

  void expect_count(const char* kind, size_t got, const std::vector<const char*>& names,
                    const std::string& when) const {
    if (got == names.size()) {
      return;
    }
    std::string list;
    for (const char* name : names) {
      list += (list.empty() ? "" : ", ") + std::string(name);
    }
    fail("got " + std::to_string(got) + " " + kind + ", expected " + std::to_string(names.size()) + when + ": " + list);
  }

  ElementType type(size_t index, const Input& input) const {
    TypeInfo* type = nullptr;
    if (absent(ort_.KernelInfo_GetInputTypeInfo(info_, index, &type)) || type == nullptr) {
      fail("input '" + std::string(input.name) + "' is absent, expected " +
           (input.shared ? "a float32 or float16" : "a float32") +
           " tensor: an input is left out by leaving its attribute (gated, stateful) 0, never by an empty name");
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

// --- what a kernel sees at a run ------------------------------------------------------------------------------------

class Run {
 public:
  Run(const Functions& ort, KernelContext* context) : ort_(ort), context_(context) {}

  Tensor input(size_t index, const Input& input, ElementType shared) const {
    const Value* value = nullptr;
    check(ort_.KernelContext_GetInput(context_, index, &value));
    if (value == nullptr) {
      throw Failure{kInvalidArgument, std::string("input '") + input.name + "' is absent"};
    }
    Tensor tensor;
    tensor.name = input.name;
    TensorInfo* info = nullptr;
    check(ort_.GetTensorTypeAndShape(value, &info));
    const auto release = [this](TensorInfo* held) { ort_.ReleaseTensorTypeAndShapeInfo(held); };
    const std::unique_ptr<TensorInfo, decltype(release)> held(info, release);
    check(ort_.GetTensorElementType(info, &tensor.type));
    size_t rank = 0;
    check(ort_.GetDimensionsCount(info, &rank));
    tensor.sizes.resize(rank);
    check(ort_.GetDimensions(info, tensor.sizes.data(), rank));
    const ElementType expected = input.shared ? shared : kFloat;
    if (tensor.type != expected) {
      throw Failure{kInvalidArgument, std::string("input '") + input.name + "' is " + type_name(tensor.type) +
                                          ", expected " + type_name(expected)};
    }
    void* data = nullptr;
    check(ort_.GetTensorMutableData(const_cast<Value*>(value), &data));
    tensor.data = data;
    return tensor;
  }

  void* output(size_t index, const char* name, std::initializer_list<int64_t> sizes) const {
    Value* value = nullptr;
    check(ort_.KernelContext_GetOutput(context_, index, sizes.begin(), sizes.size(), &value));
    if (value == nullptr) {
      throw Failure{kInvalidArgument, std::string("output '") + name + "' is left out, expected a name for it"};
    }
    void* data = nullptr;
    check(ort_.GetTensorMutableData(value, &data));
    return data;
  }

  // Computes on the device of the node, or queues it there.
  template <class Device, class Arguments>
  void compute(Device& device, const Arguments& arguments) const {
    const int status = device.run(ort_, context_, arguments);
    if (status == HCMEN_NO_MEMORY) {
      throw std::bad_alloc();
    }
    if (status == HCMEN_BAD_ARGUMENT) {
      throw Failure{kInvalidArgument, "the kernel refuses these sizes (status " + std::to_string(status) + ")"};
    }
    if (status != HCMEN_OK) {
      throw Failure{kFail, Device::problem(status)};
    }
  }

 private:
  const Functions& ort_;
  KernelContext* context_;
};

int32_t kernel_dtype(ElementType type) { return type == kFloat16 ? HCMEN_FLOAT16 : HCMEN_FLOAT32; }

// --- the operators --------------------------------------------------------------------------------------------------

template <class Device>
class SelectiveScan {
 public:
  static constexpr const char* kName = "SelectiveScan";
  static constexpr size_t kInputs = 9, kOutputs = 2;  // at most

  SelectiveScan(const Functions& ort, const Api* api, const Node& node)
      : ort(ort),
        device_(ort, api),
        softplus_(node.flag("delta_softplus")),
        reverse_(node.flag("reverse")),
        gated_(node.flag("gated")),
        stateful_(node.flag("stateful")),
        inputs_{{"u", true}, {"delta", true}, {"A", false},         {"B", true},
                {"C", true}, {"D", false},    {"delta_bias", false}} {
    if (gated_) {
      inputs_.push_back({"z", true});
    }
    if (stateful_) {
      inputs_.push_back({"initial_state", false});
    }
    const std::string when = " with gated = " + std::to_string(gated_) + " and stateful = " + std::to_string(stateful_);
    if (stateful_) {
      node.expect_counts(inputs_, {"y", "last_state"}, when);
    } else {
      node.expect_counts(inputs_, {"y"}, when);
    }
    type_ = node.expect_types(inputs_);
  }

  void compute(const Run& run) {
    std::vector<Tensor> tensors;
    for (size_t i = 0; i < inputs_.size(); ++i) {
      tensors.push_back(run.input(i, inputs_[i], type_));
    }
    const Tensor &u = tensors[0], &delta = tensors[1], &A = tensors[2], &B = tensors[3], &C = tensors[4],
                 &D = tensors[5], &bias = tensors[6];
    u.expect({{"batch", kAny}, {"time", kAny}, {"channel", kAny}});
    const Size batch{"batch", u[0]}, time{"time", u[1]}, channel{"channel", u[2]};
    delta.expect({batch, time, channel});
    A.expect({channel, {"state", kAny}});
    const Size state{"state", A[1]};
    const std::vector<Size> one_group{batch, time, state}, groups{batch, time, {"group", kAny}, state};
    if (!B.has_shape(one_group) && !B.has_shape(groups)) {
      B.wrong_shape(B.sizes.size() == 4 ? join(groups) : join(one_group) + " or " + join(groups));
    }
    const int64_t group = B.sizes.size() == 4 ? B[2] : 1;
    if (channel.value % group != 0) {
      throw Failure{kInvalidArgument, "input 'B' has shape " + join(B.sizes) + ", expected a number of groups that " +
                                          "divides the " + std::to_string(channel.value) + " channels, got " +
                                          std::to_string(group)};
    }
    if (C.sizes != B.sizes) {
      C.wrong_shape(join(B.sizes) + ", the shape of 'B'");
    }
    D.expect({channel});
    bias.expect({channel});
    const Tensor* z = gated_ ? &tensors[7] : nullptr;
    const Tensor* initial = stateful_ ? &tensors.back() : nullptr;
    if (z != nullptr) {
      z->expect({batch, time, channel});
    }
    if (initial != nullptr) {
      initial->expect({batch, channel, state});
    }

    hcmen_scan scan{};
    scan.batch = u[0], scan.time = u[1], scan.channel = u[2], scan.state = A[1], scan.group = group;
    scan.dtype = kernel_dtype(type_), scan.delta_softplus = softplus_, scan.reverse = reverse_;
    scan.u = u.data, scan.delta = delta.data, scan.B = B.data, scan.C = C.data;
    scan.A = A.floats(), scan.D = D.floats(), scan.delta_bias = bias.floats();
    scan.z = z != nullptr ? z->data : nullptr;
    scan.initial_state = initial != nullptr ? initial->floats() : nullptr;
    scan.y = run.output(0, "y", {u[0], u[1], u[2]});
    if (stateful_) {
      scan.last_state = static_cast<float*>(run.output(1, "last_state", {u[0], u[2], A[1]}));
    }
    run.compute(device_, scan);
  }

  const Functions& ort;

 private:
  Device device_;
  bool softplus_, reverse_, gated_, stateful_;
  std::vector<Input> inputs_;
  ElementType type_ = kUndefined;
};

template <class Device>
class CausalConv1d {
 public:
  static constexpr const char* kName = "CausalConv1d";
  static constexpr size_t kInputs = 3, kOutputs = 1;

  CausalConv1d(const Functions& ort, const Api* api, const Node& node)
      : ort(ort), device_(ort, api), reverse_(node.flag("reverse")), inputs_{{"x", true}, {"weight", false}, {"bias", false}} {
    const std::string activation = node.text("activation", "none", "\"none\" or \"silu\"");
    if (activation != "none" && activation != "silu") {
      node.fail("attribute 'activation' is \"" + shown(activation) + "\", expected \"none\" or \"silu\"");
    }
    silu_ = activation == "silu";
    node.expect_counts(inputs_, {"y"}, "");
    type_ = node.expect_types(inputs_);
  }

  void compute(const Run& run) {
    const Tensor x = run.input(0, inputs_[0], type_), weight = run.input(1, inputs_[1], type_),
                 bias = run.input(2, inputs_[2], type_);
    x.expect({{"batch", kAny}, {"time", kAny}, {"channel", kAny}});
    const Size channel{"channel", x[2]};
    weight.expect({channel, {"width", kAny}});
    bias.expect({channel});

    hcmen_conv conv{};
    conv.batch = x[0], conv.time = x[1], conv.channel = x[2], conv.width = weight[1];
    conv.dtype = kernel_dtype(type_), conv.silu = silu_, conv.reverse = reverse_;
    conv.x = x.data, conv.weight = weight.floats(), conv.bias = bias.floats();
    conv.y = run.output(0, "y", {x[0], x[1], x[2]});
    run.compute(device_, conv);
  }

  const Functions& ort;

 private:
  Device device_;
  bool reverse_, silu_ = false;
  std::vector<Input> inputs_;
  ElementType type_ = kUndefined;
};

// --- registration ---------------------------------------------------------------------------------------------------

// One operator for one type of its first input: from that type the runtime infers the type of the first output. All
// other inputs are declared without a type and, past the first, optional, so that what is wrong with them is said here,
// by name, rather than by the runtime in general terms. For the same reason types that no kernel takes are registered
// too: their kernels fail when they are made.
struct Op : CustomOp {
  const Functions* ort = nullptr;
  ElementType first = kUndefined;
};

constexpr ElementType kFirstTypes[] = {kFloat, kFloat16, kDouble, kBFloat16, kBool,   kString, kUint8,
                                       kInt8,  kUint16,  kInt16,  kInt32,    kUint32, kInt64,  kUint64};

template <class Device, class Kernel>
Op make_op(const Functions& ort, ElementType first) {
  Op op;
  op.ort = &ort;
  op.first = first;
  op.GetName = [](const CustomOp*) { return Kernel::kName; };
  op.GetExecutionProviderType = [](const CustomOp*) { return Device::kProvider; };
  op.GetInputTypeCount = [](const CustomOp*) { return Kernel::kInputs; };
  op.GetOutputTypeCount = [](const CustomOp*) { return Kernel::kOutputs; };
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
    const Functions& ort = *static_cast<const Op*>(self)->ort;
    return guarded(ort, Kernel::kName, [&] { *kernel = new Kernel(ort, api, Node(ort, info)); });
  };
  op.KernelComputeV2 = [](void* kernel, KernelContext* context) {
    Kernel& self = *static_cast<Kernel*>(kernel);
    return guarded(self.ort, Kernel::kName, [&] { self.compute(Run(self.ort, context)); });
  };
  op.KernelDestroy = [](void* kernel) { delete static_cast<Kernel*>(kernel); };
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
      ops.push_back(make_op<Device, SelectiveScan<Device>>(ort, type));
      ops.push_back(make_op<Device, CausalConv1d<Device>>(ort, type));
    }
    check(ort.CreateCustomOpDomain("hcmen", &domain));
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
      throw Failure{kInvalidArgument, std::string("these session options hold ") + Device::kOtherLibrary +
                                          " already: register that library or " + Device::kLibrary + ", not both"};
    }
    const bool parallel_for = base->GetApi(kParallelForVersion) != nullptr;
    check(ort.AddCustomOpDomain(options, registration<Device>(api, parallel_for).domain));
    check(ort.AddSessionConfigEntry(options, Device::kMark, "1"));
  });
}

}  // namespace
}  // namespace hcmen::ort

#endif  // HCMEN_ORT_OPERATORS_H_

// A node of an operator, whatever the host: which tensors it has, what is wrong with it in words, and the arguments of
// its kernel. A host brings types by their names and shapes as they come (ort_operators.h, trt_plugin.cc).
#ifndef HCMEN_OP_NODE_H_
#define HCMEN_OP_NODE_H_

#include <inttypes.h>
#include <stdarg.h>
#include <stdint.h>
#include <stdio.h>
#include <string.h>

#include "causal_conv1d.h"
#include "op_table.h"
#include "selective_scan.h"
#include "state_space_dual.h"

namespace hcmen::op {

// --- messages -------------------------------------------------------------------------------------------------------

// One line of text in place: an error must be told even when memory is what is missing. A text too long is cut.
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

  const char* text() const { return text_; }

 private:
  char text_[1024];
  size_t used_ = 0;
};

constexpr int64_t kUnknown = -1;

inline Line& add_shape(Line& line, int rank, const int64_t* shape) {
  for (int i = 0; i < rank; ++i) {
    line.add(i ? ", " : "[");
    shape[i] == kUnknown ? line.add("?") : line.add("%" PRId64, shape[i]);
  }
  return line.add(rank > 0 ? "]" : "[]");
}

// What an attribute may be.
inline Line& add_choice(Line& line, const Attribute& attribute) {
  if (attribute.is_number) return line.add("a float that is a number");
  if (!attribute.words[0]) return line.add("0 or 1");
  for (int i = 0; i < kMostWords && attribute.words[i]; ++i) line.add("%s\"%s\"", i ? " or " : "", attribute.words[i]);
  return line;
}

// --- shapes ---------------------------------------------------------------------------------------------------------

// What a float attribute is, and as what it stands among a node's attributes: its bits.
inline float number_of(int32_t bits) {
  float number;
  memcpy(&number, &bits, sizeof number);
  return number;
}
inline int32_t bits_of(float number) {
  int32_t bits;
  memcpy(&bits, &number, sizeof bits);
  return bits;
}

// What an attribute is where a node does not have it.
inline int32_t default_of(const Attribute& attribute) { return attribute.is_number ? bits_of(attribute.number) : 0; }

// Where a tensor has its groups; kMostRank: it has none.
inline int group_axis(const Tensor& tensor) {
  int axis = 0;
  while (axis < kMostRank && tensor.sizes[axis] != kGroup) ++axis;
  return axis;
}
inline bool has_group(const Tensor& tensor) { return group_axis(tensor) < kMostRank; }

// The size at `axis` of a shape of `rank` sizes, which may be one fewer than the tensor's: then the group is left out, or
// the last one of a tensor that is spread.
inline Size size_at(const Tensor& tensor, int rank, int axis) {
  return tensor.sizes[rank == tensor.rank() || axis < group_axis(tensor) ? axis : axis + 1];
}

// The sizes of a node, as far as the shapes seen so far tell them.
struct Sizes {
  int64_t value[kSizes];
  const Tensor* grouped = nullptr;  // the first tensor seen that may have groups, whose shape others like it share
  bool with_group = false;          // whether it has
  bool wide = false;                // whether the tensor that may be spread has its last size

  Sizes() {
    for (int64_t& one : value) one = kUnknown;
  }
};

// "[2, time, 16]", followed by " = [batch, time, channel]" where a number hides what it stands for.
// `all`: with the size that may be left out.
inline void add_expected(Line& line, const Tensor& tensor, const Sizes& sizes, bool all, bool names = true) {
  const int rank = tensor.rank() - ((has_group(tensor) || tensor.spread) && !all);
  bool known = false;
  for (int i = 0; i < rank; ++i) {
    const Size size = size_at(tensor, rank, i);
    line.add(i ? ", " : "[");
    const bool number = sizes.value[size] != kUnknown;
    number ? line.add("%" PRId64, sizes.value[size]) : line.add("%s", kSizeNames[size]);
    known = known || number;
  }
  line.add("]");
  if (!known || !names) return;
  for (int i = 0; i < rank; ++i) line.add(i ? ", %s" : " = [%s", kSizeNames[size_at(tensor, rank, i)]);
  line.add("]");
}

// Whether a shape fits what is known, to which it adds. A size that is kUnknown fits anything.
inline bool fit(const char* kind, const Tensor& tensor, int rank, const int64_t* shape, Sizes& sizes, Line& error) {
  const Sizes before = sizes;
  const bool grouped = has_group(tensor), with_group = grouped && rank == tensor.rank();
  bool good = rank == tensor.rank() || ((grouped || tensor.spread) && rank == tensor.rank() - 1);
  if (good && tensor.spread) sizes.wide = rank == tensor.rank();
  if (good && grouped) {
    good = !before.grouped || before.with_group == with_group;
    if (!before.grouped) sizes.grouped = &tensor, sizes.with_group = with_group;
    if (!with_group) sizes.value[kGroup] = 1;
  }
  const auto none = [](int64_t size) { return size != kUnknown && size < 1; };
  bool empty = false;
  for (int i = 0; i < rank; ++i) {
    empty = empty || none(shape[i]);
    if (!good) continue;
    int64_t& known = sizes.value[size_at(tensor, rank, i)];
    if (known == kUnknown) known = shape[i];
    empty = empty || none(known);  // a size that follows from another
    good = (shape[i] == known || shape[i] == kUnknown) && !none(known);
  }
  for (const DerivedSize& one : kDerivedSizes) {
    const int64_t from = sizes.value[one.of];
    if (sizes.value[one.size] == kUnknown && from != kUnknown) sizes.value[one.size] = from + one.plus;
  }
  if (good) return true;
  add_shape(error.add("%s '%s' has shape ", kind, tensor.name), rank, shape).add(", expected ");
  if (before.grouped && grouped) {
    add_expected(error, tensor, before, before.with_group, false);
    error.add(", the shape of '%s'", before.grouped->name);
  } else {
    if ((grouped && !with_group) || tensor.spread) add_expected(error, tensor, before, false), error.add(" or ");
    add_expected(error, tensor, before, true);
  }
  if (empty) error.add(", every size at least 1");
  return false;
}

// Whether the groups divide the channels, or the heads, as far as both are known.
inline bool fit_groups(const Sizes& sizes, Line& error) {
  const Size whole = sizes.value[kHead] == kUnknown ? kChannel : kHead;
  const int64_t count = sizes.value[whole], group = sizes.value[kGroup];
  if (count == kUnknown || group == kUnknown || count % group == 0) return true;
  error.add("input '%s' has %" PRId64 " groups, expected a number that divides the %" PRId64 " %ss",
            sizes.grouped->name, group, count, kSizeNames[whole]);
  return false;
}

// --- a node ---------------------------------------------------------------------------------------------------------

struct Node {
  const Operator& op;
  int32_t attributes[kMostAttributes] = {};  // an integer, the number of a word, or the bits of a float
  const Tensor* tensors[kMostTensors] = {};  // inputs that are there, then outputs
  int inputs = 0, outputs = 0;

  Node(const Operator& of, const int32_t (&values)[kMostAttributes]) : op(of) {
    memcpy(attributes, values, sizeof attributes);
    for (const Tensor& tensor : op.inputs) {
      if (is_there(tensor)) tensors[inputs++] = &tensor;
    }
    for (const Tensor& tensor : op.outputs) {
      if (is_there(tensor)) tensors[inputs + outputs++] = &tensor;
    }
  }

  int count() const { return inputs + outputs; }
  const Tensor& output(int i) const { return *tensors[inputs + i]; }
  const char* kind(int i) const { return i < inputs ? "input" : "output"; }

  // " with gated = 0 and stateful = 0": the attributes that decide which tensors are there.
  Line& add_presence(Line& line) const {
    const char* before = " with ";
    for (int i = 0; i < op.attribute_count(); ++i) {
      if (!decides(op.inputs, i) && !decides(op.outputs, i)) continue;
      line.add("%s%s = %d", before, op.attributes[i].name, (int)attributes[i]);
      before = " and ";
    }
    return line;
  }

  // Whether the attributes agree with each other.
  bool expect_attributes(Line& error) const {
    if (&op != &kStateSpaceDual) return true;
    const float least = number_of(attributes[kDualDtMin]), most = number_of(attributes[kDualDtMax]);
    if (least <= most) return true;
    error.add("attributes 'dt_min' and 'dt_max' are %g and %g, expected dt_min to be no more than dt_max", least, most);
    return false;
  }

  // Types are given by name, `first` being that of the first input.
  bool fits_type(int i, const char* type, const char* first) const {
    if (i == 0) return !strcmp(type, "float32") || !strcmp(type, "float16");
    return !strcmp(type, tensors[i]->type == kShared ? first : "float32");
  }

  // As `fits_type`; says what is wrong.
  bool expect_type(int i, const char* type, const char* first, Line& error) const {
    if (fits_type(i, type, first)) return true;
    const Tensor& tensor = *tensors[i];
    error.add("%s '%s' is %s, expected ", kind(i), tensor.name, type);
    if (i == 0) return error.add("float32 or float16"), false;
    if (tensor.type != kShared) return error.add("float32"), false;
    return error.add("%s, the type of '%s'", first, tensors[0]->name), false;
  }

  // See `fit`.
  bool expect_shape(int i, int rank, const int64_t* shape, Sizes& sizes, Line& error) const {
    return fit(kind(i), *tensors[i], rank, shape, sizes, error);
  }

 private:
  bool is_there(const Tensor& tensor) const {
    return tensor.name && (tensor.only_with == kAlways || attributes[tensor.only_with]);
  }
  template <int N>
  static bool decides(const Tensor (&all)[N], int attribute) {
    for (const Tensor& tensor : all) {
      if (tensor.name && tensor.only_with == attribute) return true;
    }
    return false;
  }
};

// --- the kernels' arguments -----------------------------------------------------------------------------------------

// One call of a node. Without pointers: its sizes and attributes alone.
struct Call {
  const int32_t* attributes;
  const int64_t* sizes;
  int32_t dtype;
  const void* const* inputs = nullptr;
  void* const* outputs = nullptr;
  bool wide = false;  // see Sizes
};

inline int32_t kernel_dtype(bool half) { return half ? HCMEN_FLOAT16 : HCMEN_FLOAT32; }

inline hcmen_scan scan_of(const Call& call) {
  hcmen_scan scan = {};
  scan.batch = call.sizes[kBatch], scan.time = call.sizes[kTime], scan.channel = call.sizes[kChannel];
  scan.state = call.sizes[kState], scan.group = call.sizes[kGroup];
  scan.dtype = call.dtype;
  scan.delta_softplus = call.attributes[kScanSoftplus], scan.reverse = call.attributes[kScanReverse];
  if (!call.inputs) return scan;
  const void* const* in = call.inputs;
  scan.u = in[0], scan.delta = in[1], scan.A = (const float*)in[2], scan.B = in[3], scan.C = in[4];
  scan.D = (const float*)in[5], scan.delta_bias = (const float*)in[6];
  const bool gated = call.attributes[kScanGated], stateful = call.attributes[kScanStateful];
  scan.z = gated ? in[7] : nullptr;
  scan.initial_state = stateful ? (const float*)in[gated ? 8 : 7] : nullptr;
  scan.y = call.outputs[0];
  scan.last_state = stateful ? (float*)call.outputs[1] : nullptr;
  return scan;
}

inline hcmen_dual dual_of(const Call& call) {
  hcmen_dual dual = {};
  dual.batch = call.sizes[kBatch], dual.time = call.sizes[kTime], dual.head = call.sizes[kHead];
  dual.head_dim = call.sizes[kHeadDim], dual.group = call.sizes[kGroup], dual.state = call.sizes[kState];
  dual.dtype = call.dtype, dual.wide_D = call.wide;
  dual.delta_softplus = call.attributes[kDualSoftplus], dual.reverse = call.attributes[kDualReverse];
  dual.dt_min = number_of(call.attributes[kDualDtMin]), dual.dt_max = number_of(call.attributes[kDualDtMax]);
  if (!call.inputs) return dual;
  const void* const* in = call.inputs;
  dual.x = in[0], dual.dt = in[1], dual.A = (const float*)in[2], dual.B = in[3], dual.C = in[4];
  dual.D = (const float*)in[5], dual.dt_bias = (const float*)in[6];
  const bool gated = call.attributes[kDualGated], stateful = call.attributes[kDualStateful];
  dual.z = gated ? in[7] : nullptr;
  dual.initial_state = stateful ? (const float*)in[gated ? 8 : 7] : nullptr;
  dual.y = call.outputs[0];
  dual.last_state = stateful ? (float*)call.outputs[1] : nullptr;
  return dual;
}

inline hcmen_conv conv_of(const Call& call) {
  hcmen_conv conv = {};
  conv.batch = call.sizes[kBatch], conv.time = call.sizes[kTime], conv.channel = call.sizes[kChannel];
  conv.width = call.sizes[kWidth];
  conv.dtype = call.dtype, conv.silu = call.attributes[kConvActivation], conv.reverse = call.attributes[kConvReverse];
  if (!call.inputs) return conv;
  conv.x = call.inputs[0], conv.weight = (const float*)call.inputs[1], conv.bias = (const float*)call.inputs[2];
  const bool stateful = call.attributes[kConvStateful];
  conv.initial_state = stateful ? (const float*)call.inputs[3] : nullptr;
  conv.y = call.outputs[0];
  conv.last_state = stateful ? (float*)call.outputs[1] : nullptr;
  return conv;
}

}  // namespace hcmen::op

#endif  // HCMEN_OP_NODE_H_

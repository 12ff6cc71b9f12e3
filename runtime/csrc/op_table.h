// The operators of docs/op.md as tables: names, order, types, shapes and attributes. Every host in C++ reads them, and
// tests/base/test_op_table.py holds them to the table in Python (hcmen/base/op.py) and to docs/op.md.
#ifndef HCMEN_OP_TABLE_H_
#define HCMEN_OP_TABLE_H_

namespace hcmen::op {

constexpr const char* kDomain = "hcmen";
constexpr const char* kVersion = "1";

// What the sizes of a shape are called.
enum Size { kNone, kBatch, kTime, kChannel, kState, kGroup, kWidth, kHead, kHeadDim, kPast, kSizes };
constexpr const char* kSizeNames[kSizes] = {"",      "batch", "time", "channel",  "state",
                                            "group", "width", "head", "head_dim", "width - 1"};

// Sizes that follow from another one: that one, and what is added to it.
struct DerivedSize {
  Size size, of;
  int plus;
};
constexpr DerivedSize kDerivedSizes[] = {{kPast, kWidth, -1}};

// kShared: float32 or float16, the same for all tensors of a node that are marked so.
enum Type { kFloat32, kShared };

constexpr int kMostRank = 4, kMostWords = 2, kMostAttributes = 6, kMostOthers = 2, kMostInputs = 9, kMostOutputs = 2;
constexpr int kMostTensors = kMostInputs + kMostOutputs;
constexpr int kAlways = -1;

template <class T, int N>
constexpr int named(const T (&all)[N]) {
  int count = 0;
  while (count < N && all[count].name) ++count;
  return count;
}

struct Attribute {
  const char* name;
  const char* words[kMostWords];  // what a string may be, the default first; none: an integer, 0 (the default) or 1
  bool is_number = false;         // a float, any but NaN
  float number = 0.0f;            // its default
};

struct Tensor {
  const char* name;
  Type type;
  Size sizes[kMostRank];     // kGroup may be left out of a shape, which means one group
  int only_with = kAlways;  // there exactly if this attribute is 1
  bool spread = false;      // the last size may be left out of a shape, which means the same for all of it

  constexpr int rank() const {
    int count = 0;
    while (count < kMostRank && sizes[count] != kNone) ++count;
    return count;
  }
};

struct Operator {
  const char* name;
  Attribute attributes[kMostAttributes];
  const char* others[kMostOthers];  // attributes of the model-local function; no kernel reads them
  Tensor inputs[kMostInputs];
  Tensor outputs[kMostOutputs];

  constexpr int attribute_count() const { return named(attributes); }
  constexpr int input_count() const { return named(inputs); }
  constexpr int output_count() const { return named(outputs); }
};

// Attributes that every node may have, for TensorRT's parser.
constexpr const char* kParserAttributes[] = {"plugin_namespace", "plugin_version"};

enum { kScanSoftplus, kScanReverse, kScanGated, kScanStateful };
constexpr Operator kSelectiveScan = {
    "SelectiveScan",
    {{"delta_softplus", {}}, {"reverse", {}}, {"gated", {}}, {"stateful", {}}},
    {"scan_input_directions", "scan_output_directions"},
    {{"u", kShared, {kBatch, kTime, kChannel}},
     {"delta", kShared, {kBatch, kTime, kChannel}},
     {"A", kFloat32, {kChannel, kState}},
     {"B", kShared, {kBatch, kTime, kGroup, kState}},
     {"C", kShared, {kBatch, kTime, kGroup, kState}},
     {"D", kFloat32, {kChannel}},
     {"delta_bias", kFloat32, {kChannel}},
     {"z", kShared, {kBatch, kTime, kChannel}, kScanGated},
     {"initial_state", kFloat32, {kBatch, kChannel, kState}, kScanStateful}},
    {{"y", kShared, {kBatch, kTime, kChannel}},
     {"last_state", kFloat32, {kBatch, kChannel, kState}, kScanStateful}},
};

enum { kConvActivation, kConvReverse, kConvStateful };
constexpr Operator kCausalConv1d = {
    "CausalConv1d",
    {{"activation", {"none", "silu"}}, {"reverse", {}}, {"stateful", {}}},
    {"group", "pads"},
    {{"x", kShared, {kBatch, kTime, kChannel}},
     {"weight", kFloat32, {kChannel, kWidth}},
     {"bias", kFloat32, {kChannel}},
     {"initial_state", kFloat32, {kBatch, kPast, kChannel}, kConvStateful}},
    {{"y", kShared, {kBatch, kTime, kChannel}},
     {"last_state", kFloat32, {kBatch, kPast, kChannel}, kConvStateful}},
};

enum { kDualSoftplus, kDualReverse, kDualGated, kDualStateful, kDualDtMin, kDualDtMax };
constexpr Operator kStateSpaceDual = {
    "StateSpaceDual",
    {{"delta_softplus", {}},
     {"reverse", {}},
     {"gated", {}},
     {"stateful", {}},
     {"dt_min", {}, true, 0.0f},
     {"dt_max", {}, true, __builtin_inff()}},
    {"scan_input_directions", "scan_output_directions"},
    {{"x", kShared, {kBatch, kTime, kHead, kHeadDim}},
     {"dt", kShared, {kBatch, kTime, kHead}},
     {"A", kFloat32, {kHead}},
     {"B", kShared, {kBatch, kTime, kGroup, kState}},
     {"C", kShared, {kBatch, kTime, kGroup, kState}},
     {"D", kFloat32, {kHead, kHeadDim}, kAlways, true},
     {"dt_bias", kFloat32, {kHead}},
     {"z", kShared, {kBatch, kTime, kHead, kHeadDim}, kDualGated},
     {"initial_state", kFloat32, {kBatch, kHead, kHeadDim, kState}, kDualStateful}},
    {{"y", kShared, {kBatch, kTime, kHead, kHeadDim}},
     {"last_state", kFloat32, {kBatch, kHead, kHeadDim, kState}, kDualStateful}},
};

constexpr const Operator* kOperators[] = {&kSelectiveScan, &kCausalConv1d, &kStateSpaceDual};

}  // namespace hcmen::op

#endif  // HCMEN_OP_TABLE_H_

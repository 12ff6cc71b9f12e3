// The plugin of StateSpaceDual: what the other operators do not have, attributes that are floats and a D of two ranks.
#include <math.h>

#include "trt_test.h"

namespace {

struct DualSizes {
  int64_t batch = 2, time = 5, head = 6, rows = 3, state = 4, group = 0;  // group 0: B and C of rank 3
  bool wide = false;                                                     // D of rank 2
};

std::vector<Tensor> dual_tensors(const DualSizes& s, const Switches& switches) {
  const std::vector<int64_t> series = {s.batch, s.time, s.head, s.rows}, states = {s.batch, s.head, s.rows, s.state};
  const std::vector<int64_t> projection = s.group ? std::vector<int64_t>{s.batch, s.time, s.group, s.state}
                                                  : std::vector<int64_t>{s.batch, s.time, s.state};
  const std::vector<int64_t> skip = s.wide ? std::vector<int64_t>{s.head, s.rows} : std::vector<int64_t>{s.head};
  std::vector<Tensor> all = {{"x", true, series},     {"dt", true, {s.batch, s.time, s.head}},
                             {"A", false, {s.head}},  {"B", true, projection},
                             {"C", true, projection}, {"D", false, skip},
                             {"dt_bias", false, {s.head}}};
  if (switches.gated) all.push_back({"z", true, series});
  if (switches.stateful) all.push_back({"initial_state", false, states});
  all.push_back({"y", true, series});
  if (switches.stateful) all.push_back({"last_state", false, states});
  return all;
}

Fields dual_fields(const Switches& s) {
  return s.fields().number("dt_min", 0.5f, PluginFieldType::kFLOAT32).number("dt_max", 2.0f, PluginFieldType::kFLOAT32);
}

Plugin dual_of(const Switches& s) {
  Fields fields = dual_fields(s);
  return create("StateSpaceDual", fields);
}

void test_floats() {
  const auto id = [](float least, float most) {
    Fields fields;
    fields.number("dt_min", least, PluginFieldType::kFLOAT32).number("dt_max", most, PluginFieldType::kFLOAT32);
    Plugin plugin = create("StateSpaceDual", fields);
    accepted((bool)plugin, "StateSpaceDual with limits");
    return plugin ? plugin.id() : "";
  };
  Fields nothing;
  Plugin by_default = create("StateSpaceDual", nothing);
  accepted((bool)by_default, "StateSpaceDual without fields");
  check(by_default && by_default.id() == id(0.0f, INFINITY), "StateSpaceDual without fields has the defaults");
  check(id(0.1f, 0.2f) == id(0.1f, 0.2f), "the same limits have one timing-cache id");
  check(id(0.1f, 0.2f) != id(0.1f, nextafterf(0.2f, 1.0f)), "limits that differ in one bit have two");
  check(id(-INFINITY, INFINITY) != id(0.0f, INFINITY), "and so have infinite ones");
  check(id(1.0f, 1.0f) != "", "one step size for all is a limit too");

  const auto bad = [](Fields fields, const std::string& text, TensorRTPhase phase = TensorRTPhase::kBUILD) {
    refused(!create("StateSpaceDual", fields, phase), "StateSpaceDual expecting '" + text + "'", text);
  };
  for (const char* name : {"dt_min", "dt_max"}) {
    const std::string attribute = std::string("attribute '") + name + "' ";
    bad(Fields().number(name, NAN, PluginFieldType::kFLOAT32), attribute + "is NaN, expected a float that is a number");
    bad(Fields().flag(name, 1), attribute + "is a field of type");
    bad(Fields().number(name, 1.0, PluginFieldType::kFLOAT64), "expected one float");
    bad(Fields().number(name, 1.0, PluginFieldType::kFLOAT32, 2), "and length 2");
    bad(Fields().text(name, "1.0"), "expected one float");
    bad(Fields().bytes(name, nullptr, 0, PluginFieldType::kFLOAT32, 1), attribute + "has no data");
  }
  bad(Fields().number("dt_max", -1.0f, PluginFieldType::kFLOAT32), "expected dt_min to be no more than dt_max (layer 'node')");
  for (size_t i = 0; i < 6; ++i) {
    Fields fields = dual_fields(Switches());
    fields.drop(i);
    bad(std::move(fields), "the engine holds no field '", TensorRTPhase::kRUNTIME);
  }
}

void test_shapes(const Switches& s, const DualSizes& sizes, const std::string& what) {
  Plugin plugin = dual_of(s);
  const std::vector<Tensor> tensors = dual_tensors(sizes, s);
  const int inputs = s.inputs(), outputs = s.outputs();
  const auto output_shapes = [&](const std::vector<Tensor>& of, std::vector<std::vector<int64_t>>* found) {
    Builder builder;
    std::vector<trt::DimsExprs> in, out((size_t)outputs);
    for (int i = 0; i < inputs; ++i) {
      trt::DimsExprs dims = {};
      dims.nbDims = (int32_t)of[(size_t)i].shape.size();
      for (int k = 0; k < dims.nbDims; ++k) {
        const int64_t size = of[(size_t)i].shape[(size_t)k];
        // Batch and time as symbols.
        const bool symbol = found && dims.nbDims >= 3 && k < (of[(size_t)i].name == "initial_state" ? 1 : 2);
        dims.d[k] = symbol ? builder.impl.add([size] { return size; }) : builder.constant(size);
      }
      in.push_back(dims);
    }
    if (plugin.build->getOutputShapes(in.data(), inputs, nullptr, 0, out.data(), outputs, builder) != 0) return false;
    for (int i = 0; found && i < outputs; ++i) {
      std::vector<int64_t> shape;
      for (int k = 0; k < out[(size_t)i].nbDims; ++k) {
        shape.push_back(static_cast<const Expression*>(out[(size_t)i].d[k])->evaluate());
      }
      found->push_back(shape);
    }
    return true;
  };
  std::vector<std::vector<int64_t>> found;
  accepted(output_shapes(tensors, &found), what + " output shapes");
  for (size_t i = 0; i < found.size(); ++i) {
    check(found[i] == tensors[(size_t)inputs + i].shape, what + ": output " + std::to_string(i) + " is " + shown(found[i]));
  }

  for (DataType type : {DataType::kFLOAT, DataType::kHALF}) {
    const auto dynamic = dynamic_of(tensors, type);
    const auto descs = descs_of(tensors, type);
    for (int i = 0; i < inputs + outputs; ++i) {
      check(plugin.build->supportsFormatCombination(i, dynamic.data(), inputs, outputs), what + ": formats");
    }
    accepted(plugin.build->configurePlugin(dynamic.data(), inputs, dynamic.data() + inputs, outputs) == 0, what);
    accepted(plugin.runtime->onShapeChange(descs.data(), inputs, descs.data() + inputs, outputs) == 0, what);
  }
  const auto change = [&](size_t at, std::vector<int64_t> shape, const std::string& text) {
    std::vector<Tensor> wrong = tensors;
    wrong[at].shape = std::move(shape);
    const auto descs = descs_of(wrong, DataType::kFLOAT);
    refused(plugin.runtime->onShapeChange(descs.data(), inputs, descs.data() + inputs, outputs) != 0, what, text);
    if ((int)at < inputs) refused(!output_shapes(wrong, nullptr), what, text);
  };
  change(0, {2, 5, 6}, "input 'x' has shape [2, 5, 6], expected [batch, time, head, head_dim]");
  change(1, {2, 5, 7}, "input 'dt' has shape [2, 5, 7], expected [2, 5, 6] = [batch, time, head]");
  change(2, {6, 4}, "input 'A' has shape [6, 4], expected [6] = [head]");
  change(5, {7}, "input 'D' has shape [7], expected [6] = [head] or [6, 3] = [head, head_dim]");
  change(5, {6, 4}, "input 'D' has shape [6, 4], expected [6] = [head] or [6, 3]");
  change(5, {6, 3, 1}, "input 'D' has shape [6, 3, 1], expected");
  change((size_t)inputs, {2, 5, 6, 0}, "every size at least 1");
  std::vector<Tensor> wrong = tensors;
  wrong[3].shape = wrong[4].shape = {2, 5, 4, 4};
  const auto descs = descs_of(wrong, DataType::kFLOAT);
  refused(plugin.runtime->onShapeChange(descs.data(), inputs, descs.data() + inputs, outputs) != 0, what,
          "input 'B' has 4 groups, expected a number that divides the 6 heads");
}

void test_workspace() {
  const Switches s = Switches::of(15);
  Plugin plugin = dual_of(s);
  const auto bytes = [&](const DualSizes& sizes) {
    const auto dynamic = dynamic_of(dual_tensors(sizes, s), DataType::kFLOAT);
    return plugin.build->getWorkspaceSize(dynamic.data(), s.inputs(), dynamic.data() + s.inputs(), s.outputs());
  };
  // Enough for every smaller batch and length, so nothing that depends on them.
  const size_t least = bytes({1, 1, 24, 64, 128, 0, false});
  check(least > 0 && least < ((size_t)1 << 25), "the workspace of a dual is not huge");
  for (int64_t batch : {1, 3, 256}) {
    for (int64_t time : {1, 64, 4096}) check(bytes({batch, time, 24, 64, 128, 8, true}) == least, "it is one for all");
  }
  accepted(true, "workspaces of a dual");
  const auto many = dynamic_of(dual_tensors({2, 5, 6, 3, 600, 0, false}, s), DataType::kFLOAT);
  refused(plugin.build->configurePlugin(many.data(), s.inputs(), many.data() + s.inputs(), s.outputs()) != 0, "states",
          "input 'B' has 600 states, expected at most 512");
  auto wrong = dynamic_of(dual_tensors(DualSizes(), s), DataType::kFLOAT);
  wrong[5].max.nbDims = 3;
  refused(plugin.build->getWorkspaceSize(wrong.data(), s.inputs(), nullptr, s.outputs()) == 0, "workspace", "'D'");
}

}  // namespace

void test_dual() {
  test_floats();
  for (int bits = 0; bits < 16; ++bits) {
    for (const auto& [group, wide] : {std::pair<int64_t, bool>{0, false}, {2, true}}) {
      const std::string what = "dual with switches " + std::to_string(bits) + " group " + std::to_string(group);
      test_shapes(Switches::of(bits), {2, 5, 6, 3, 4, group, wide}, what);
    }
    // Serialised and read again.
    Plugin first = dual_of(Switches::of(bits));
    Fields kept = Fields::of(first.runtime->getFieldsToSerialize());
    Plugin again = create("StateSpaceDual", kept, TensorRTPhase::kRUNTIME);
    accepted(again && again.id() == first.id(), "a dual, serialised and read again, is equal");
  }
  test_workspace();
}

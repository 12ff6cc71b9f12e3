// The core, build and runtime sides of a plugin, all but `enqueue`.
#include <set>

#include "trt_test.h"

namespace {

// --- the sides of a plugin ------------------------------------------------------------------------------------------

void test_identity() {
  for (const char* name : {"SelectiveScan", "CausalConv1d", "StateSpaceDual"}) {
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
  Plugin conv = create("CausalConv1d", nothing), continued = create_conv(true);
  ask(conv, conv_tensors(2, 5, 6, 4), 3, "CausalConv1d");
  ask(continued, conv_tensors(2, 5, 6, 4, true), 4, "CausalConv1d with a state");
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
  for (bool stateful : {false, true}) {
    Plugin conv = create_conv(stateful);
    const std::vector<Tensor> tensors = conv_tensors(2, 9, 6, 4, stateful);
    const int inputs = 3 + stateful;
    for (bool dynamic : {false, true}) {
      Symbolic shapes(tensors, inputs, dynamic);
      accepted(shapes.run(conv) == 0, "CausalConv1d output shapes");
      for (size_t i = 0; i < shapes.out.size(); ++i) {
        check(shapes.evaluate(i) == tensors[(size_t)inputs + i].shape, "CausalConv1d: shape of an output");
      }
    }
    for (const Spoiled& one : spoil(tensors, (size_t)inputs, false)) {
      Symbolic wrong(one.tensors, inputs, false);
      refused(wrong.run(conv) != 0, "CausalConv1d output shapes", one.error);
    }
  }
  Plugin conv = create_conv(true);
  Symbolic none(conv_tensors(2, 9, 6, 1, true), 4, false);
  refused(none.run(conv) != 0, "a state of width 1",
          "input 'initial_state' has shape [2, 0, 6], expected [2, 0, 6] = [batch, width - 1, channel], every size");
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
  Plugin continued = create_conv(true);
  test_configuration(continued, conv_tensors(3, 7, 6, 4, true), 4, false, "CausalConv1d with a state");
  auto dynamic = dynamic_of(conv_tensors(3, 7, 6, 1, true), DataType::kFLOAT);
  for (size_t i : {3, 5}) dynamic[i].desc.dims.d[1] = -1;
  refused(continued.build->configurePlugin(dynamic.data(), 4, dynamic.data() + 4, 2) != 0, "a state of width 1",
          "input 'initial_state' has shape [?, ?, 6], expected [batch, 0, 6] = [batch, width - 1, channel], every size");
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
  Plugin conv = create("CausalConv1d", nothing), continued = create_conv(true);
  check(bytes(conv, conv_tensors(16, 4096, 2048, 4), 3) == 0, "a convolution needs no workspace");
  check(bytes(continued, conv_tensors(16, 4096, 2048, 4, true), 4) == 0, "a convolution with a state needs none either");
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
          fields.text("activation", activation).flag("reverse", 1).flag("stateful", activation[0] == 's');
          return create("CausalConv1d", fields);
        },
        "CausalConv1d");
  }
}

}  // namespace

void test_sides() {
  test_identity();
  test_types();
  test_formats();
  test_output_shapes();
  test_configurations();
  test_workspace();
  test_copies();
}

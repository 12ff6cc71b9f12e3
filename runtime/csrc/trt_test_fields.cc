// Creators, and a node's attributes as plugin fields.
#include <set>

#include "trt_test.h"

namespace {

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

  for (int flags = 0; flags < 4; ++flags) {
    const int reverse = flags % 2, stateful = flags / 2;
    for (const char* activation : {"none", "silu"}) {
      std::set<std::string> same;
      for (size_t zeros : {0, 1, 3}) {
        Fields fields;
        const int32_t pads[2] = {3, 0};
        fields.text("activation", activation + std::string(zeros, '\0')).flag("reverse", reverse).flag("group", 6);
        if (stateful) fields.flag("stateful", 1);
        fields.bytes("pads", pads, sizeof pads, PluginFieldType::kINT32, 2);
        Plugin conv = create("CausalConv1d", fields);
        accepted((bool)conv, std::string("CausalConv1d with activation ") + activation);
        if (!conv) continue;
        same.insert(conv.id());
        check(conv.build->getNbOutputs() == 1 + stateful, "number of outputs of a CausalConv1d");
      }
      check(same.size() == 1, "closing zeros of a string mean nothing");
      ids.insert(same.begin(), same.end());
    }
  }
  check(ids.size() == 24, "each convolution has a timing-cache id of its own");

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
  bad("CausalConv1d", Fields().flag("stateful", 2), "CausalConv1d: attribute 'stateful' is 2, expected 0 or 1");
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

}  // namespace

void test_creators() {
  const std::map<std::string, std::set<std::string>> expected = {
      {"SelectiveScan", {"delta_softplus", "reverse", "gated", "stateful"}},
      {"CausalConv1d", {"activation", "reverse", "stateful"}},
      {"StateSpaceDual", {"delta_softplus", "reverse", "gated", "stateful", "dt_min", "dt_max"}}};
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
      const bool text = !strcmp(fields->fields[i].name, "activation"), real = !strncmp(fields->fields[i].name, "dt_", 3);
      check(fields->fields[i].type == (text   ? PluginFieldType::kCHAR
                                       : real ? PluginFieldType::kFLOAT32
                                              : PluginFieldType::kINT32),
            name + " announces the type of " + fields->fields[i].name);
    }
    check(names == attributes, name + " announces its attributes");
  }
}

void test_fields() {
  test_good_fields();
  test_bad_fields();
}

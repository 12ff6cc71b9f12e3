#include "trt_fields.h"

#include <inttypes.h>
#include <string.h>

#include "trt_log.h"

namespace hcmen {

namespace trt = nvinfer1;
using op::Line;

namespace {

// Says what is wrong with a field and returns false, or reads it.
bool read_field(const op::Attribute& attribute, const trt::PluginField& field, int32_t& value, Line& error) {
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
    for (int i = 0; i < op::kMostWords && attribute.words[i]; ++i) {
      if (size == strlen(attribute.words[i]) && memcmp(bytes, attribute.words[i], size) == 0) return value = i, true;
    }
    add_choice(add_shown(error.add("is \""), bytes, size).add("\", expected "), attribute);
    return false;
  }
  if (attribute.is_number) {
    if (field.type != trt::PluginFieldType::kFLOAT32 || field.length != 1) {
      return error.add("is a field of type %d and length %d, expected one float, type %d (kFLOAT32)", (int)field.type,
                       (int)field.length, (int)trt::PluginFieldType::kFLOAT32),
             false;
    }
    memcpy(&value, field.data, sizeof value);
    if (op::number_of(value) == op::number_of(value)) return true;
    return add_choice(error.add("is NaN, expected "), attribute), false;
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

bool is_for_others(const op::Operator& of, const char* name) {
  for (const char* other : of.others) {
    if (other && !strcmp(other, name)) return true;
  }
  for (const char* other : op::kParserAttributes) {
    if (!strcmp(other, name)) return true;
  }
  return false;
}

}  // namespace

trt::PluginField field_of(const op::Attribute& attribute, const int32_t* value) {
  if (attribute.is_number) return {attribute.name, value, trt::PluginFieldType::kFLOAT32, 1};
  if (!attribute.words[0]) return {attribute.name, value, trt::PluginFieldType::kINT32, 1};
  if (!value) return {attribute.name, nullptr, trt::PluginFieldType::kCHAR, 1};
  const char* const word = attribute.words[*value];
  return {attribute.name, word, trt::PluginFieldType::kCHAR, (int32_t)strlen(word) + 1};
}

bool read_fields(const op::Operator& of, const trt::PluginFieldCollection* collection, trt::TensorRTPhase phase,
                 int32_t (&values)[op::kMostAttributes], Line& error) {
  const bool runtime = phase == trt::TensorRTPhase::kRUNTIME;
  if (!runtime && phase != trt::TensorRTPhase::kBUILD) return error.add("unknown phase %d", (int)phase), false;
  const int count = collection ? collection->nbFields : 0;
  if (count < 0 || (count > 0 && !collection->fields)) {
    return error.add("got %d plugin fields at %p", count, (const void*)collection->fields), false;
  }
  bool given[op::kMostAttributes] = {};
  const int attributes = of.attribute_count();
  for (int at = 0; at < attributes; ++at) values[at] = default_of(of.attributes[at]);
  for (int i = 0; i < count; ++i) {
    const trt::PluginField& field = collection->fields[i];
    if (!field.name) return error.add("plugin field %d has no name", i), false;
    int at = 0;
    while (at < attributes && strcmp(of.attributes[at].name, field.name) != 0) ++at;
    if (at < attributes) {
      if (given[at]) return error.add("attribute '%s' is given twice", field.name), false;
      given[at] = true;
      Line problem;
      if (!read_field(of.attributes[at], field, values[at], problem)) {
        return error.add("%s", problem.text()), false;
      }
      continue;
    }
    if (runtime) {
      add_shown(error.add("the engine holds a field '"), field.name)
          .add("', unknown to this library: use the library that the engine was built with, or build it again");
      return false;
    }
    if (!is_for_others(of, field.name)) {
      Line line;
      add_shown(line.add("%s: attribute '", of.name), field.name).add("' is unknown, ignored");
      report(trt::ILogger::Severity::kWARNING, line);
    }
  }
  for (int at = 0; runtime && at < attributes; ++at) {
    if (!given[at]) {
      return error.add("the engine holds no field '%s': build it again with this library", of.attributes[at].name),
             false;
    }
  }
  return true;
}

}  // namespace hcmen

// A node's attributes as TensorRT hands them over: plugin fields.
#ifndef HCMEN_TRT_FIELDS_H_
#define HCMEN_TRT_FIELDS_H_

#include <NvInferRuntime.h>
#include <stdint.h>

#include "op_node.h"

namespace hcmen {

// A field that announces, or holds, `attribute`: a word by itself, an integer or a float where it lies.
nvinfer1::PluginField field_of(const op::Attribute& attribute, const int32_t* value);

// Reads the attributes of a node, or says what is wrong and returns false. In the build phase attributes have defaults,
// and unknown ones are let pass as everywhere (docs/op.md). An engine gives back exactly what a plugin serialised: a
// field too many comes from a newer library, and to ignore it could change what is computed.
bool read_fields(const op::Operator& of, const nvinfer1::PluginFieldCollection* collection,
                 nvinfer1::TensorRTPhase phase, int32_t (&values)[op::kMostAttributes], op::Line& error);

}  // namespace hcmen

#endif  // HCMEN_TRT_FIELDS_H_

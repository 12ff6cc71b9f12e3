// What the TensorRT plugins have to say, and to whom.
#ifndef HCMEN_TRT_LOG_H_
#define HCMEN_TRT_LOG_H_

#include <NvInferRuntime.h>
#include <stddef.h>

#include "op_node.h"

namespace hcmen {

// Somebody else's bytes: printable ones as they are, so that the line stays one line; a long text is cut.
op::Line& add_shown(op::Line& line, const char* bytes, size_t size);
op::Line& add_shown(op::Line& line, const char* string);

// One line in the logger that TensorRT gave, or on stderr where it gave none.
void report(nvinfer1::ILogger::Severity severity, const op::Line& line);

}  // namespace hcmen

#endif  // HCMEN_TRT_LOG_H_

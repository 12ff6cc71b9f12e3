// TensorRT plugins SelectiveScan and CausalConv1d, namespace "hcmen", version "1": docs/op.md as IPluginV3.
//
// libhcmen_trt.so shows two functions and needs nothing of TensorRT when it is loaded, neither a library nor a call of
// a registry: `IPluginRegistry::loadLibrary(path)`, `trtexec --dynamicPlugins=path` and
// `IBuilderConfig::setPluginsToSerialize` take it as it is. One source for TensorRT 10.3 to 11.1.
//
// What reaches a plugin, and how (docs/tensorrt.md has the rest):
//   - attributes as plugin fields: integers as kINT32 (the ONNX parser) or kINT64, strings as kCHAR with or without a
//     closing NUL. Each one is serialised, and an engine gets back exactly those.
//   - inputs and outputs in the order of docs/op.md; which are there follows from the attributes alone, because
//     `enqueue` is told no number of inputs.
//   - ragged batches as steps masked through `delta`: nothing here knows of lengths.
// An error is a return value and one line in the logger that TensorRT gave, or on stderr where it gave none.
#ifndef HCMEN_TRT_PLUGIN_H_
#define HCMEN_TRT_PLUGIN_H_

#include <NvInferRuntime.h>
#include <stdint.h>

// TENSORRTAPI means nothing outside TensorRT's own build, and this library is built with hidden visibility.
#define HCMEN_TRT_EXPORT __attribute__((visibility("default")))

extern "C" {

// The two creators, which live as long as the library is loaded.
HCMEN_TRT_EXPORT nvinfer1::IPluginCreatorInterface* const* getCreators(int32_t& count);

// Where to find the logger that errors go to. Null takes it away again.
HCMEN_TRT_EXPORT void setLoggerFinder(nvinfer1::ILoggerFinder* finder);

}  // extern "C"

#endif  // HCMEN_TRT_PLUGIN_H_

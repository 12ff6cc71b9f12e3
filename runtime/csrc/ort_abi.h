// The part of ONNX Runtime's C interface that an operator library needs, in our own words.
//
// The onnxruntime wheel ships no C headers, and a library built against new headers is refused by an older runtime. The
// interface itself is append-only: a function keeps its position in the table for ever, and a runtime reads of a custom
// operator's structure only the fields that belong to the version the structure names. So this header names the
// functions used by position, asks for an old version, and one binary serves ONNX Runtime 1.16 and everything later.
//
// ort_abi_check.cc compares all of it with the official header where that is at hand.
#ifndef HCMEN_ORT_ABI_H_
#define HCMEN_ORT_ABI_H_

#include <stddef.h>
#include <stdint.h>

namespace hcmen::ort {

// The version asked for: the oldest whose custom operators can return errors from creation and computation.
constexpr uint32_t kApiVersion = 16;
// The version that brought KernelContext_ParallelFor. Without it the kernels run on the calling thread.
constexpr uint32_t kParallelForVersion = 17;

// Objects of the runtime, only ever handled by pointer.
struct Api;
struct Status;
struct SessionOptions;
struct CustomOpDomain;
struct KernelInfo;
struct KernelContext;
struct Value;
struct TypeInfo;
struct TensorInfo;
struct CustomOp;

enum ErrorCode { kFail = 1, kInvalidArgument = 2 };
enum Characteristic { kRequired = 0, kOptional = 1 };
enum MemoryType { kDefaultMemory = 0 };
enum ElementType {
  kUndefined = 0,
  kFloat = 1,
  kUint8 = 2,
  kInt8 = 3,
  kUint16 = 4,
  kInt16 = 5,
  kInt32 = 6,
  kInt64 = 7,
  kString = 8,
  kBool = 9,
  kFloat16 = 10,
  kDouble = 11,
  kUint32 = 12,
  kUint64 = 13,
  kBFloat16 = 16,
};

// What RegisterCustomOps is handed.
struct ApiBase {
  const Api* (*GetApi)(uint32_t version);  // null if the runtime is older than `version`
  const char* (*GetVersionString)();
};

// name, position in the table, result, parameters. A returned Status is null on success and owned by the caller.
#define HCMEN_ORT_FUNCTIONS(F)                                                                                       \
  F(CreateStatus, 0, Status*, (ErrorCode code, const char* message))                                                 \
  F(CreateCustomOpDomain, 26, Status*, (const char* domain, CustomOpDomain** out))                                   \
  F(CustomOpDomain_Add, 27, Status*, (CustomOpDomain * domain, const CustomOp* op))                                  \
  F(AddCustomOpDomain, 28, Status*, (SessionOptions * options, CustomOpDomain * domain))                             \
  F(GetTensorMutableData, 51, Status*, (Value * value, void** out))                                                  \
  F(CastTypeInfoToTensorInfo, 55, Status*, (const TypeInfo* type, const TensorInfo** out))                           \
  F(GetTensorElementType, 60, Status*, (const TensorInfo* info, ElementType* out))                                   \
  F(GetDimensionsCount, 61, Status*, (const TensorInfo* info, size_t* out))                                          \
  F(GetDimensions, 62, Status*, (const TensorInfo* info, int64_t* values, size_t count))                             \
  F(GetTensorTypeAndShape, 65, Status*, (const Value* value, TensorInfo** out))                                      \
  F(KernelInfoGetAttribute_float, 85, Status*, (const KernelInfo* info, const char* name, float* out))               \
  F(KernelInfoGetAttribute_int64, 86, Status*, (const KernelInfo* info, const char* name, int64_t* out))             \
  F(KernelInfoGetAttribute_string, 87, Status*, (const KernelInfo* info, const char* name, char* out, size_t* size)) \
  F(KernelContext_GetInput, 90, Status*, (const KernelContext* context, size_t index, const Value** out))            \
  F(KernelContext_GetOutput, 91, Status*,                                                                            \
    (KernelContext * context, size_t index, const int64_t* sizes, size_t rank, Value** out))                         \
  F(ReleaseStatus, 93, void, (Status * status))                                                                      \
  F(ReleaseTypeInfo, 98, void, (TypeInfo * type))                                                                    \
  F(ReleaseTensorTypeAndShapeInfo, 99, void, (TensorInfo * info))                                                    \
  F(AddSessionConfigEntry, 130, Status*, (SessionOptions * options, const char* key, const char* value))             \
  F(KernelInfoGetAttributeArray_float, 162, Status*,                                                                 \
    (const KernelInfo* info, const char* name, float* out, size_t* size))                                            \
  F(KernelInfoGetAttributeArray_int64, 163, Status*,                                                                 \
    (const KernelInfo* info, const char* name, int64_t* out, size_t* size))                                          \
  F(KernelContext_GetGPUComputeStream, 193, Status*, (const KernelContext* context, void** out))                     \
  F(KernelInfo_GetInputCount, 230, Status*, (const KernelInfo* info, size_t* out))                                   \
  F(KernelInfo_GetOutputCount, 231, Status*, (const KernelInfo* info, size_t* out))                                  \
  F(KernelInfo_GetInputTypeInfo, 234, Status*, (const KernelInfo* info, size_t index, TypeInfo** out))               \
  F(HasSessionConfigEntry, 237, Status*, (const SessionOptions* options, const char* key, int* out))                 \
  F(KernelInfo_GetNodeName, 244, Status*, (const KernelInfo* info, char* out, size_t* size))

// Runs function(data, 0) .. function(data, total - 1) on the session's own threads. `batches` 0: as they come.
#define HCMEN_ORT_PARALLEL_FOR(F)            \
  F(KernelContext_ParallelFor, 274, Status*, \
    (const KernelContext* context, void (*function)(void*, size_t), size_t total, size_t batches, void* data))

// The functions above, taken out of a runtime's table.
struct Functions {
#define HCMEN_ORT_MEMBER(name, position, result, parameters) result(*name) parameters = nullptr;
  HCMEN_ORT_FUNCTIONS(HCMEN_ORT_MEMBER)
  HCMEN_ORT_PARALLEL_FOR(HCMEN_ORT_MEMBER)  // null before kParallelForVersion
#undef HCMEN_ORT_MEMBER

  Functions(const Api* api, bool parallel_for) {
    using Untyped = void (*)();
    const Untyped* const table = reinterpret_cast<const Untyped*>(api);
#define HCMEN_ORT_TAKE(name, position, result, parameters) \
  name = reinterpret_cast<result(*) parameters>(table[position]);
    HCMEN_ORT_FUNCTIONS(HCMEN_ORT_TAKE)
    if (parallel_for) {
      HCMEN_ORT_PARALLEL_FOR(HCMEN_ORT_TAKE)
    }
#undef HCMEN_ORT_TAKE
  }
};

// A custom operator, as version 16 has it. Later versions have more fields, which a runtime reads only if `version`
// says that they are there. CreateKernel and KernelCompute are the forms without errors; the V2 forms replace them.
#define HCMEN_ORT_CUSTOM_OP(F)                                                                            \
  F(CreateKernel, void*, (const CustomOp* op, const Api* api, const KernelInfo* info))                    \
  F(GetName, const char*, (const CustomOp* op))                                                           \
  F(GetExecutionProviderType, const char*, (const CustomOp* op))                                          \
  F(GetInputType, ElementType, (const CustomOp* op, size_t index))                                        \
  F(GetInputTypeCount, size_t, (const CustomOp* op))                                                      \
  F(GetOutputType, ElementType, (const CustomOp* op, size_t index))                                       \
  F(GetOutputTypeCount, size_t, (const CustomOp* op))                                                     \
  F(KernelCompute, void, (void* kernel, KernelContext* context))                                          \
  F(KernelDestroy, void, (void* kernel))                                                                  \
  F(GetInputCharacteristic, Characteristic, (const CustomOp* op, size_t index))                           \
  F(GetOutputCharacteristic, Characteristic, (const CustomOp* op, size_t index))                          \
  F(GetInputMemoryType, MemoryType, (const CustomOp* op, size_t index))                                   \
  F(GetVariadicInputMinArity, int, (const CustomOp* op))                                                  \
  F(GetVariadicInputHomogeneity, int, (const CustomOp* op))                                               \
  F(GetVariadicOutputMinArity, int, (const CustomOp* op))                                                 \
  F(GetVariadicOutputHomogeneity, int, (const CustomOp* op))                                              \
  F(CreateKernelV2, Status*, (const CustomOp* op, const Api* api, const KernelInfo* info, void** kernel)) \
  F(KernelComputeV2, Status*, (void* kernel, KernelContext* context))

struct CustomOp {
  uint32_t version = kApiVersion;
#define HCMEN_ORT_MEMBER(name, result, parameters) result(*name) parameters = nullptr;
  HCMEN_ORT_CUSTOM_OP(HCMEN_ORT_MEMBER)
#undef HCMEN_ORT_MEMBER
};

}  // namespace hcmen::ort

#endif  // HCMEN_ORT_ABI_H_

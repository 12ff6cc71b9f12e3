// Compiles only if ort_abi.h agrees with ONNX Runtime's official header: positions, signatures, fields, enumerators.
//
//   c++ -std=c++17 -fsyntax-only -Wno-ignored-attributes -I <folder of onnxruntime_c_api.h> ort_abi_check.cc
//
// Not part of the library: it checks, and makes no code.
#include <stddef.h>

#include <type_traits>
#include <utility>

#include "onnxruntime_c_api.h"
#include "ort_abi.h"

#if ORT_API_VERSION < 16
#error "ort_abi.h begins with API version 16"
#endif

namespace hcmen::ort {
namespace {

// What a calling convention sees of a type: a pointer, an integer of some size, or nothing.
template <class T>
constexpr size_t seen() {
  if constexpr (std::is_void_v<T>) {
    return 0;
  } else if constexpr (std::is_pointer_v<T>) {
    return 1000;
  } else {
    static_assert(std::is_integral_v<T> || std::is_enum_v<T>);
    return sizeof(T);
  }
}

template <class T>
struct Signature;
template <class R, class... A>
struct Signature<R (*)(A...)> {
  using type = std::integer_sequence<size_t, seen<R>(), seen<A>()...>;
};
template <class R, class... A>
struct Signature<R (*)(A...) noexcept> : Signature<R (*)(A...)> {};

template <class A, class B>
constexpr bool alike = std::is_same_v<typename Signature<A>::type, typename Signature<B>::type>;

#define CHECK_FUNCTION(name, position, result, parameters)                                   \
  static_assert(offsetof(::OrtApi, name) == (position) * sizeof(void*), #name " has moved"); \
  static_assert(alike<decltype(::OrtApi::name), result(*) parameters>, #name " has another signature");
HCMEN_ORT_FUNCTIONS(CHECK_FUNCTION)
#if ORT_API_VERSION >= 17
HCMEN_ORT_PARALLEL_FOR(CHECK_FUNCTION)
static_assert(kParallelForVersion == 17);
#endif

#define CHECK_FIELD(name, result, parameters)                                                   \
  static_assert(offsetof(::OrtCustomOp, name) == offsetof(CustomOp, name), #name " has moved"); \
  static_assert(alike<decltype(::OrtCustomOp::name), result(*) parameters>, #name " has another signature");
HCMEN_ORT_CUSTOM_OP(CHECK_FIELD)
static_assert(offsetof(::OrtCustomOp, version) == offsetof(CustomOp, version));
static_assert(sizeof(CustomOp) <= sizeof(::OrtCustomOp));

static_assert(offsetof(::OrtApiBase, GetApi) == offsetof(ApiBase, GetApi));
static_assert(offsetof(::OrtApiBase, GetVersionString) == offsetof(ApiBase, GetVersionString));
static_assert(alike<decltype(::OrtApiBase::GetApi), decltype(ApiBase::GetApi)>);
static_assert(alike<decltype(::OrtApiBase::GetVersionString), decltype(ApiBase::GetVersionString)>);

template <class A, class B>
constexpr bool same(A official, B ours) {
  return static_cast<int>(official) == static_cast<int>(ours);
}

static_assert(same(ORT_FAIL, kFail) && same(ORT_INVALID_ARGUMENT, kInvalidArgument));
static_assert(same(INPUT_OUTPUT_REQUIRED, kRequired) && same(INPUT_OUTPUT_OPTIONAL, kOptional));
static_assert(same(OrtMemTypeDefault, kDefaultMemory));
static_assert(same(ONNX_TENSOR_ELEMENT_DATA_TYPE_UNDEFINED, kUndefined));
static_assert(same(ONNX_TENSOR_ELEMENT_DATA_TYPE_FLOAT, kFloat));
static_assert(same(ONNX_TENSOR_ELEMENT_DATA_TYPE_UINT8, kUint8));
static_assert(same(ONNX_TENSOR_ELEMENT_DATA_TYPE_INT8, kInt8));
static_assert(same(ONNX_TENSOR_ELEMENT_DATA_TYPE_UINT16, kUint16));
static_assert(same(ONNX_TENSOR_ELEMENT_DATA_TYPE_INT16, kInt16));
static_assert(same(ONNX_TENSOR_ELEMENT_DATA_TYPE_INT32, kInt32));
static_assert(same(ONNX_TENSOR_ELEMENT_DATA_TYPE_INT64, kInt64));
static_assert(same(ONNX_TENSOR_ELEMENT_DATA_TYPE_STRING, kString));
static_assert(same(ONNX_TENSOR_ELEMENT_DATA_TYPE_BOOL, kBool));
static_assert(same(ONNX_TENSOR_ELEMENT_DATA_TYPE_FLOAT16, kFloat16));
static_assert(same(ONNX_TENSOR_ELEMENT_DATA_TYPE_DOUBLE, kDouble));
static_assert(same(ONNX_TENSOR_ELEMENT_DATA_TYPE_UINT32, kUint32));
static_assert(same(ONNX_TENSOR_ELEMENT_DATA_TYPE_UINT64, kUint64));
static_assert(same(ONNX_TENSOR_ELEMENT_DATA_TYPE_BFLOAT16, kBFloat16));

}  // namespace
}  // namespace hcmen::ort

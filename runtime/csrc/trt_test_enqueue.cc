// `enqueue`: what it computes of the cases in a file, and what it refuses.
#include <cuda_runtime_api.h>

#include "trt_test.h"

namespace {

bool on_gpu = false;
bool counts_launches = true;  // the host kernels, which know a broken stream from a good one

void cuda(cudaError_t status, const char* what) {
  if (status == cudaSuccess) return;
  printf("FAILED %s: %s\n", what, cudaGetErrorString(status));
  exit(100);
}

// A block of memory where the kernels look for it, of exactly its size; on a GPU, where nothing guards the end, with
// marked bytes behind it.
class Memory {
 public:
  explicit Memory(size_t size) : size_(size) {
    if (!on_gpu) {
      data_ = malloc(size);
      return;
    }
    cuda(cudaMalloc(&data_, size + kMark), "cudaMalloc");
    cuda(cudaMemset(data_, 0x5a, size + kMark), "cudaMemset");
  }
  ~Memory() { on_gpu ? (void)cudaFree(data_) : free(data_); }
  Memory(const Memory&) = delete;
  Memory& operator=(const Memory&) = delete;

  void write(const void* from) {
    if (!on_gpu) return (void)memcpy(data_, from, size_);
    cuda(cudaMemcpy(data_, from, size_, cudaMemcpyHostToDevice), "cudaMemcpy");
    // A copy may return before its last bytes are there, and the stream of the tests waits for no other.
    cuda(cudaDeviceSynchronize(), "cudaMemcpy");
  }
  void read(void* to) const {
    on_gpu ? cuda(cudaMemcpy(to, data_, size_, cudaMemcpyDeviceToHost), "cudaMemcpy") : (void)memcpy(to, data_, size_);
  }
  bool mark_is_whole() const {
    if (!on_gpu) return true;
    unsigned char mark[kMark];
    cuda(cudaMemcpy(mark, (char*)data_ + size_, kMark, cudaMemcpyDeviceToHost), "cudaMemcpy");
    return std::all_of(mark, mark + kMark, [](unsigned char x) { return x == 0x5a; });
  }
  void* get() const { return data_; }

 private:
  static constexpr size_t kMark = 512;
  void* data_ = nullptr;
  size_t size_;
};

// One tensor with its numbers, as the kernels get them.
struct Values {
  std::vector<char> bytes;
  Memory memory;

  Values(const Tensor& tensor, bool half)
      : bytes(elements(tensor) * (half && tensor.shared ? 2 : 4)), memory(bytes.size()) {
    spoil();
  }

  static size_t elements(const Tensor& tensor) {
    size_t count = 1;
    for (int64_t size : tensor.shape) count *= (size_t)size;
    return count;
  }
  // NaN in either type, which no kernel writes of numbers.
  void spoil() { std::fill(bytes.begin(), bytes.end(), (char)0xff); }
  void write() { memory.write(bytes.data()); }
  void read() { memory.read(bytes.data()); }
};

// All tensors of one call of a plugin.
struct Call {
  std::vector<Tensor> tensors;
  int inputs;
  std::vector<std::unique_ptr<Values>> values;
  std::vector<trt::PluginTensorDesc> descs;
  std::vector<void*> addresses;
  std::unique_ptr<Memory> workspace;

  // `largest`: what the workspace is for.
  Call(Plugin& plugin, std::vector<Tensor> all, int input_count, bool half, const std::vector<Tensor>& largest)
      : tensors(std::move(all)), inputs(input_count) {
    const DataType type = half ? DataType::kHALF : DataType::kFLOAT;
    descs = descs_of(tensors, type);
    for (const Tensor& tensor : tensors) {
      values.push_back(std::make_unique<Values>(tensor, half));
      addresses.push_back(values.back()->memory.get());
    }
    const auto dynamic = dynamic_of(largest, type);
    const size_t bytes = plugin.build->getWorkspaceSize(dynamic.data(), inputs, dynamic.data() + inputs, outputs());
    if (bytes) workspace = std::make_unique<Memory>(bytes);
  }
  Call(Plugin& plugin, const std::vector<Tensor>& all, int input_count, bool half)
      : Call(plugin, all, input_count, half, all) {}
  int outputs() const { return (int)tensors.size() - inputs; }
  int enqueue(Plugin& plugin, void* stream) {
    return plugin.runtime->enqueue(descs.data(), descs.data() + inputs, addresses.data(), addresses.data() + inputs,
                                   workspace ? workspace->get() : nullptr, (cudaStream_t)stream);
  }
};

int64_t launches = 0;
cudaStream_t gpu_stream = nullptr;

// Runs it as an execution context does, and reads the outputs; on a GPU once more, as a replayed graph.
bool run(Plugin& plugin, Call& call, const std::string& what) {
  for (std::unique_ptr<Values>& one : call.values) one->write();
  accepted(plugin.runtime->setTactic(0) == 0, what + " setTactic");
  accepted(plugin.runtime->onShapeChange(call.descs.data(), call.inputs, call.descs.data() + call.inputs,
                                         call.outputs()) == 0,
           what + " onShapeChange");
  const int64_t before = launches;
  const bool good = call.enqueue(plugin, on_gpu ? (void*)gpu_stream : (void*)&launches) == 0;
  accepted(good, what + " enqueue");
  if (!good) return false;
  check(!counts_launches || launches == before + 1, what + ": launched once, on the stream given");
  if (on_gpu) cuda(cudaStreamSynchronize(gpu_stream), "enqueue");
  const auto read_outputs = [&] {
    for (size_t i = (size_t)call.inputs; i < call.values.size(); ++i) call.values[i]->read();
  };
  read_outputs();
  for (size_t i = 0; i < call.values.size(); ++i) {
    check(call.values[i]->memory.mark_is_whole(), what + ": nothing is written behind " + call.tensors[i].name);
  }
  if (call.workspace) check(call.workspace->mark_is_whole(), what + ": nothing is written behind the workspace");
  if (!on_gpu) return true;
  std::vector<std::vector<char>> first;
  for (size_t i = (size_t)call.inputs; i < call.values.size(); ++i) {
    first.push_back(call.values[i]->bytes);
    call.values[i]->spoil();
    call.values[i]->write();
  }
  cudaGraph_t graph = nullptr;
  cudaGraphExec_t replay = nullptr;
  cuda(cudaStreamBeginCapture(gpu_stream, cudaStreamCaptureModeGlobal), "capture");
  accepted(call.enqueue(plugin, gpu_stream) == 0, what + " enqueue while captured");
  cuda(cudaStreamEndCapture(gpu_stream, &graph), "the capture of enqueue");
  cuda(cudaGraphInstantiate(&replay, graph, 0), "the graph of enqueue");
  cuda(cudaGraphLaunch(replay, gpu_stream), "the replay of enqueue");
  cuda(cudaStreamSynchronize(gpu_stream), "the replay of enqueue");
  cudaGraphExecDestroy(replay);
  cudaGraphDestroy(graph);
  read_outputs();
  for (size_t i = 0; i < first.size(); ++i) {
    check(call.values[(size_t)call.inputs + i]->bytes == first[i], what + ": a replayed graph gives the same numbers");
  }
  return true;
}

// --- cases of a file ------------------------------------------------------------------------------------------------

class File {
 public:
  File(const char* path, const char* mode) : file_(fopen(path, mode)) {
    if (file_) return;
    printf("FAILED %s cannot be opened\n", path);
    exit(100);
  }
  ~File() { fclose(file_); }
  File(const File&) = delete;
  File& operator=(const File&) = delete;

  void read(void* to, size_t size) { expect(fread(to, 1, size, file_) == size); }
  void write(const std::vector<char>& bytes) { expect(fwrite(bytes.data(), 1, bytes.size(), file_) == bytes.size()); }
  int64_t number() {
    int64_t value = 0;
    read(&value, sizeof value);
    return value;
  }
  std::string text() {
    std::string value((size_t)number(), ' ');
    read(value.data(), value.size());
    return value;
  }
  std::vector<int64_t> numbers() {
    std::vector<int64_t> values((size_t)number());
    for (int64_t& value : values) value = number();
    return values;
  }

 private:
  static void expect(bool good) {
    if (good) return;
    printf("FAILED a file of cases or results ends too early\n");
    exit(100);
  }
  FILE* file_;
};

// One case: an operator, its attributes (words; where the word is empty, integers, or floats by their bits), its tensors with their largest
// shapes, and the bytes of its inputs. The outputs' bytes go to `results`.
void run_case(File& cases, File& results, const std::string& what) {
  const std::string name = cases.text();
  Fields fields;
  for (int64_t left = cases.number(); left > 0; --left) {
    const std::string attribute = cases.text(), word = cases.text();
    const bool real = cases.number();
    const int32_t value = (int32_t)cases.number();
    if (real) {
      fields.bytes(attribute.c_str(), &value, sizeof value, PluginFieldType::kFLOAT32, 1);
    } else {
      word.empty() ? fields.flag(attribute.c_str(), value) : fields.text(attribute.c_str(), word);
    }
  }
  const bool half = cases.number();
  const int inputs = (int)cases.number();
  std::vector<Tensor> tensors((size_t)cases.number()), largest;
  for (Tensor& tensor : tensors) {
    tensor.name = cases.text(), tensor.shared = cases.number(), tensor.shape = cases.numbers();
    largest.push_back({tensor.name, tensor.shared, cases.numbers()});
  }
  // As in an engine: from serialised fields, then a clone for the context.
  Plugin built = create(name.c_str(), fields);
  if (!built) return check(false, what + " could not be made");
  Fields kept = Fields::of(built.runtime->getFieldsToSerialize());
  Plugin loaded = create(name.c_str(), kept, TensorRTPhase::kRUNTIME);
  Context context;
  Plugin plugin(loaded.runtime->attachToContext(&context));
  if (!plugin) return check(false, what + " could not be made again");
  Call call(plugin, tensors, inputs, half, largest);
  for (int i = 0; i < inputs; ++i) cases.read(call.values[(size_t)i]->bytes.data(), call.values[(size_t)i]->bytes.size());
  run(plugin, call, what);
  for (size_t i = (size_t)inputs; i < call.values.size(); ++i) results.write(call.values[i]->bytes);
}

void test_bad_enqueue() {
  const Switches s = Switches::of(15);
  Plugin plugin = s.create();
  const auto fresh = [&] {
    auto call = std::make_unique<Call>(plugin, scan_tensors({2, 5, 6, 3, 0}, s), s.inputs(), false);
    for (std::unique_ptr<Values>& one : call->values) {
      std::fill(one->bytes.begin(), one->bytes.end(), 0);
      one->write();
    }
    return call;
  };
  void* const stream = on_gpu ? (void*)gpu_stream : (void*)&launches;
  accepted(fresh()->enqueue(plugin, stream) == 0, "enqueue");
  const int64_t before = launches;
  for (size_t i = 0; i < (size_t)(s.inputs() + s.outputs()); ++i) {
    auto call = fresh();
    call->addresses[i] = nullptr;
    refused(call->enqueue(plugin, stream) != 0, "enqueue", "'" + call->tensors[i].name + "' has no memory");
  }
  for (const Spoiled& one : spoil(scan_tensors({2, 5, 6, 3, 0}, s), (size_t)(s.inputs() + s.outputs()), true)) {
    auto call = fresh();
    call->descs = descs_of(one.tensors, DataType::kFLOAT);
    refused(call->enqueue(plugin, stream) != 0, "enqueue", one.error);
  }
  auto call = fresh();
  const auto direct = [&](const trt::PluginTensorDesc* in, const trt::PluginTensorDesc* out, void** inputs,
                          void** outputs) {
    return plugin.runtime->enqueue(in, out, inputs, outputs, call->workspace ? call->workspace->get() : nullptr,
                                   (cudaStream_t)stream);
  };
  const int n = s.inputs();
  const trt::PluginTensorDesc *in = call->descs.data(), *out = in + n;
  void **from = call->addresses.data(), **to = from + n;
  refused(direct(nullptr, out, from, to) != 0, "enqueue", "no array of tensor descriptions");
  refused(direct(in, nullptr, from, to) != 0, "enqueue", "no array of tensor descriptions");
  refused(direct(in, out, nullptr, to) != 0, "enqueue", "no array of addresses");
  refused(direct(in, out, from, nullptr) != 0, "enqueue", "no array of addresses");
  if (counts_launches) {  // where these sizes want one
    call->workspace.reset();
    refused(call->enqueue(plugin, stream) != 0, "enqueue", "the kernel refused its arguments: error 1");
  }
  check(launches == before, "what is refused is not launched");
  if (!counts_launches) return;
  int64_t broken = -1;
  refused(fresh()->enqueue(plugin, &broken) != 0, "enqueue",
          "could not be launched: the stream is broken: mend it (layer 'node')");
  refused(fresh()->enqueue(plugin, nullptr) != 0, "enqueue", "refused its arguments: error 1");
}

}  // namespace

void test_enqueue(Kernels kernels, const char* cases, const char* results) {
  on_gpu = kernels == Kernels::kGpu, counts_launches = kernels == Kernels::kHost;
  if (on_gpu) cuda(cudaStreamCreateWithFlags(&gpu_stream, cudaStreamNonBlocking), "cudaStreamCreate");
  File from(cases, "rb"), to(results, "wb");
  const int64_t count = from.number();
  for (int64_t i = 0; i < count; ++i) run_case(from, to, "case " + std::to_string(i));
  test_bad_enqueue();
  if (on_gpu) cudaStreamDestroy(gpu_stream);
}

// Without a device nothing can run, and that is an error like any other.
void test_no_gpu() {
  Plugin plugin = Switches::of(15).create();
  Call call(plugin, scan_tensors(ScanSizes(), Switches::of(15)), Switches::of(15).inputs(), false);
  refused(call.enqueue(plugin, nullptr) != 0, "SelectiveScan without a GPU", "the kernel could not be launched: ");
  Fields nothing;
  Plugin conv = create("CausalConv1d", nothing);
  Call other(conv, conv_tensors(2, 5, 6, 4), 3, true);
  refused(other.enqueue(conv, nullptr) != 0, "CausalConv1d without a GPU", "the kernel could not be launched: ");
}

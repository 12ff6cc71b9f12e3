// Greedy text generation in C++ with ONNX Runtime and libhcmen_ops.so, without Python.
//
// The model is a language model with states, as `hcmen-export-mamba --states` writes it: token ids [1, time] and one
// input for each state, logits and the same states under the name NAME.next.
//
// Build, with the headers and the library of ONNX Runtime (on Debian 13: libonnxruntime-dev):
//
//     c++ -std=c++17 -I HEADERS samples/cpp/generate.cc -L FOLDER -lonnxruntime -o generate
//     ./generate mamba.onnx libhcmen_ops.so 20 5 17 3          20 tokens after the prompt 5 17 3
//
// Give - in place of the library and the standard operators run, only slower.
#include <algorithm>
#include <chrono>
#include <cstdint>
#include <cstdio>
#include <cstdlib>
#include <exception>
#include <stdexcept>
#include <string>
#include <vector>

#include <onnxruntime_cxx_api.h>

namespace {

// A session and the states between its runs.
class Stepper {
 public:
  Stepper(const Ort::Env& env, const char* model, const std::string& library) : session_(nullptr) {
    Ort::SessionOptions options;
    options.SetIntraOpNumThreads(1);
    if (library != "-") options.RegisterCustomOpsLibrary(library.c_str());
    session_ = Ort::Session(env, model, options);
    Ort::AllocatorWithDefaultOptions allocator;
    std::vector<std::string> outputs;
    for (size_t i = 0; i < session_.GetOutputCount(); ++i) {
      outputs.push_back(session_.GetOutputNameAllocated(i, allocator).get());
    }
    for (size_t i = 0; i < session_.GetInputCount(); ++i) {
      const std::string name = session_.GetInputNameAllocated(i, allocator).get();
      if (std::find(outputs.begin(), outputs.end(), name + ".next") == outputs.end()) {
        if (!ids_.empty()) {
          throw std::runtime_error("the model takes '" + ids_ + "' and '" + name + "', expected token ids alone");
        }
        ids_ = name;
        continue;
      }
      // A size that is not known before a run is the batch.
      auto shape = session_.GetInputTypeInfo(i).GetTensorTypeAndShapeInfo().GetShape();
      for (int64_t& size : shape) size = size < 1 ? 1 : size;
      Ort::Value state = Ort::Value::CreateTensor<float>(allocator, shape.data(), shape.size());
      std::fill_n(state.GetTensorMutableData<float>(), state.GetTensorTypeAndShapeInfo().GetElementCount(), 0.0f);
      states_.push_back(name);
      next_.push_back(name + ".next");
      values_.push_back(std::move(state));
    }
    if (ids_.empty() || states_.empty()) throw std::runtime_error("the model has no states: export it with --states");
    const auto logits = std::find_if(outputs.begin(), outputs.end(), [this](const std::string& name) {
      return std::find(next_.begin(), next_.end(), name) == next_.end();
    });
    if (logits == outputs.end()) throw std::runtime_error("the model has no output besides its states");
    logits_ = *logits;
  }

  // The likeliest token after `ids`, which follow all that was fed before.
  int64_t feed(std::vector<int64_t> ids) {
    const auto memory = Ort::MemoryInfo::CreateCpu(OrtArenaAllocator, OrtMemTypeDefault);
    const int64_t shape[] = {1, (int64_t)ids.size()};
    std::vector<Ort::Value> inputs;
    inputs.push_back(Ort::Value::CreateTensor<int64_t>(memory, ids.data(), ids.size(), shape, 2));
    std::vector<const char*> names = {ids_.c_str()}, wanted = {logits_.c_str()};
    for (size_t i = 0; i < states_.size(); ++i) {
      names.push_back(states_[i].c_str());
      wanted.push_back(next_[i].c_str());
      inputs.push_back(std::move(values_[i]));
    }
    std::vector<Ort::Value> outputs = session_.Run(Ort::RunOptions{nullptr}, names.data(), inputs.data(), inputs.size(),
                                                   wanted.data(), wanted.size());
    for (size_t i = 0; i < states_.size(); ++i) values_[i] = std::move(outputs[i + 1]);
    const auto sizes = outputs[0].GetTensorTypeAndShapeInfo().GetShape();
    const int64_t vocabulary = sizes.back(), steps = sizes[sizes.size() - 2];
    const float* const last = outputs[0].GetTensorData<float>() + (steps - 1) * vocabulary;
    return std::max_element(last, last + vocabulary) - last;
  }

 private:
  Ort::Session session_;
  std::string ids_, logits_;
  std::vector<std::string> states_, next_;
  std::vector<Ort::Value> values_;
};

}  // namespace

int main(int count, char** arguments) {
  if (count < 5) {
    std::fprintf(stderr, "usage: generate MODEL.onnx LIBRARY|- TOKENS ID [ID ...]\n");
    return 2;
  }
  try {
    const Ort::Env env;
    Stepper stepper(env, arguments[1], arguments[2]);
    std::vector<int64_t> given;
    for (int i = 4; i < count; ++i) given.push_back(std::strtoll(arguments[i], nullptr, 10));
    const int tokens = std::atoi(arguments[3]);
    const auto start = std::chrono::steady_clock::now();
    for (int i = 0; i < tokens; ++i) {
      const int64_t token = stepper.feed(given);
      std::printf("%s%lld", i ? " " : "", (long long)token);
      given = {token};
    }
    const std::chrono::duration<double> taken = std::chrono::steady_clock::now() - start;
    std::printf("\n");
    std::fprintf(stderr, "%d tokens, %.0f a second\n", tokens, tokens / taken.count());
  } catch (const std::exception& error) {
    std::fprintf(stderr, "%s\n", error.what());
    return 1;
  }
}

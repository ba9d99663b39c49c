// ONNX Runtime's CPU provider: the library, and sessions that share the base's weights.
#pragma once

#include <filesystem>
#include <map>
#include <memory>
#include <set>
#include <string>
#include <vector>

#include "inputs.hpp"
#include "linked.hpp"
#include "lorafuse/runtime.hpp"
#include "onnxruntime_api.hpp"

namespace lorafuse {

template <typename T>
using Handle = std::unique_ptr<T, void (*)(T*)>;

// The library and what all sessions share. Values and sessions keep it alive.
class Environment {
public:
    // Throws Error when the library can't be loaded, or is older than what is called here.
    explicit Environment(const std::string& library);

    const OrtApi& api() const { return *api_; }
    const char* version() const { return version_; }
    const OrtEnv* env() const { return env_.get(); }
    OrtPrepackedWeightsContainer* prepacked() const { return prepacked_.get(); }
    OrtAllocator* allocator() const { return allocator_; }

    // Nothing, or throws Error with ONNX Runtime's words.
    void check(OrtStatus* status) const;

    // A value in the tensor's own memory.
    Handle<OrtValue> value_of(const TensorView& tensor) const;

private:
    const OrtApi* api_ = nullptr;
    const char* version_ = nullptr;
    Handle<OrtEnv> env_{nullptr, nullptr};
    Handle<OrtMemoryInfo> memory_{nullptr, nullptr};
    Handle<OrtPrepackedWeightsContainer> prepacked_{nullptr, nullptr};
    OrtAllocator* allocator_ = nullptr;  // ONNX Runtime's own
};

// What a session is made of: all of it is in memory, and no file is opened for it.
struct Model {
    std::string graph;             // serialized ONNX
    std::filesystem::path folder;  // for messages
    Tensors weights;               // of every initializer whose values the graph does not hold
    std::set<std::string> shared;  // of these, what all sessions have in common: prepacked once
    TensorFiles files;             // where the weights lie: the session keeps them mapped
};

// Tensors that go into every run of a task, by name.
class Bound {
public:
    Bound() = default;
    Bound(const Environment& environment, const Tensors& tensors);
    std::size_t size() const { return names_.size(); }
    const std::string& name(std::size_t i) const { return names_[i]; }
    const OrtValue* value(std::size_t i) const { return values_[i].get(); }

private:
    std::vector<std::string> names_;
    std::vector<Handle<OrtValue>> values_;
};

class Session {
public:
    // Throws Error when the model can't be loaded. `threads` 0: every core.
    Session(std::shared_ptr<const Environment> environment, const Model& model, int threads);

    // The outputs by name. Throws Error when the inputs do not fit.
    Outputs run(const Inputs& inputs, const Bound& bound) const;

    OrtSession* handle() const { return session_.get(); }

private:
    void give(OrtSessionOptions* options, const Model& model, const std::set<std::string>& shared);
    void open(const Model& model, int threads, const std::set<std::string>& shared);
    void read_ports();
    Takes taken_at(std::size_t index) const;
    TensorView described_by(const OrtTensorTypeAndShapeInfo* info) const;  // dtype and shape
    Tensor tensor_of(Handle<OrtValue> value) const;

    std::shared_ptr<const Environment> environment_;
    TensorFiles files_;
    std::vector<Handle<OrtValue>> initializers_;  // the session reads them where they are
    Handle<OrtSession> session_{nullptr, nullptr};
    std::map<std::string, Takes> inputs_;
    std::vector<std::string> outputs_;
    std::vector<const char*> output_names_;
};

}  // namespace lorafuse

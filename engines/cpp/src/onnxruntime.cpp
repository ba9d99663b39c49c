#include "onnxruntime.hpp"

#include <dlfcn.h>

#include <cstdio>
#include <limits>
#include <optional>

#include "dtype.hpp"

namespace lorafuse {
namespace {

// https://github.com/microsoft/onnxruntime/blob/main/include/onnxruntime/core/session/onnxruntime_session_options_config_keys.h
constexpr const char* kFormat = "session.load_model_format";  // else the bytes choose, and may be ONNX Runtime's own
constexpr const char* kDirectly =                             // no copies; not known to earlier versions
    "session.use_external_initializer_file_buffers_directly";
constexpr const char* kSpinning = "session.intra_op.allow_spinning";

template <typename T>
Handle<T> owned(T* value, void (*release)(T*)) {
    return Handle<T>(value, release);
}

constexpr unsigned kOldest = 24;  // of ONNX Runtime 1.x, as in engines/backends/onnxruntime.py

// Of "1.24.0"; of a later major version, more than any.
unsigned minor_of(const char* version) {
    unsigned major = 0, minor = 0;
    if (std::sscanf(version, "%u.%u", &major, &minor) != 2 || major == 0) return 0;
    return major > 1 ? std::numeric_limits<unsigned>::max() : minor;
}

std::string first_line(const std::string& text) { return text.substr(0, text.find('\n')); }

}  // namespace

Environment::Environment(const std::string& library) {
    // Never closed: ONNX Runtime keeps threads and statics of its own until the process ends.
    void* loaded = ::dlopen(library.c_str(), RTLD_NOW | RTLD_LOCAL);
    if (loaded == nullptr)
        throw Error(std::string("ONNX Runtime can't be loaded (") + ::dlerror() +
                    "); give its library's path as Options::onnxruntime");
    auto* entry = reinterpret_cast<const OrtApiBase* (*)() noexcept>(::dlsym(loaded, "OrtGetApiBase"));
    if (entry == nullptr)
        throw Error(library +
                    ": not ONNX Runtime (it has no OrtGetApiBase); give its library's path as Options::onnxruntime");
    version_ = entry()->GetVersionString();
    if (minor_of(version_) < kOldest) {
        throw Error(library + ": ONNX Runtime " + version_ + " is too old; expected 1." + std::to_string(kOldest) +
                    " or newer");
    }
    api_ = entry()->GetApi(kApiVersion);
    OrtEnv* env = nullptr;
    check(api_->CreateEnv(ORT_LOGGING_LEVEL_FATAL, "lorafuse", &env));
    env_ = owned(env, api_->ReleaseEnv);
    OrtMemoryInfo* memory = nullptr;
    check(api_->CreateCpuMemoryInfo(OrtArenaAllocator, OrtMemTypeDefault, &memory));
    memory_ = owned(memory, api_->ReleaseMemoryInfo);
    OrtPrepackedWeightsContainer* prepacked = nullptr;
    check(api_->CreatePrepackedWeightsContainer(&prepacked));
    prepacked_ = owned(prepacked, api_->ReleasePrepackedWeightsContainer);
    check(api_->GetAllocatorWithDefaultOptions(&allocator_));
}

void Environment::check(OrtStatus* status) const {
    if (status == nullptr) return;
    const auto refused = owned(status, api_->ReleaseStatus);
    throw Error(first_line(api_->GetErrorMessage(status)));
}

Handle<OrtValue> Environment::value_of(const TensorView& tensor) const {
    if (tensor.data == nullptr && tensor.bytes > 0)
        throw Error("a tensor of " + std::to_string(tensor.bytes) + " bytes lies nowhere; give its data");
    OrtValue* value = nullptr;
    const auto element = static_cast<ONNXTensorElementDataType>(names_of(tensor.dtype).element);
    check(api_->CreateTensorWithDataAsOrtValue(memory_.get(), const_cast<void*>(tensor.data), tensor.bytes,
                                               tensor.shape.data(), tensor.shape.size(), element, &value));
    return owned(value, api_->ReleaseValue);
}

Bound::Bound(const Environment& environment, const Tensors& tensors) {
    for (const auto& [name, tensor] : tensors) {
        names_.push_back(name);
        values_.push_back(environment.value_of(tensor));
    }
}

Session::Session(std::shared_ptr<const Environment> environment, const Model& model, int threads)
    : environment_(std::move(environment)), files_(model.files) {
    try {
        open(model, threads, model.shared);
        return;
    } catch (const Error&) {
        initializers_.clear();
    }
    try {  // some kernels prepack weights in a form that can't be shared, and refuse: then the session has its own
        open(model, threads, {});
    } catch (const Error& error) {
        throw Error(model.folder.string() + ": ONNX Runtime " + environment_->version() + " can't load the model (" +
                    error.what() + ")");
    }
}

// Hand over the tensors. What is shared is given by its name alone, to be prepacked for all sessions; the files are
// there for optimizers, which would otherwise open what the graph names.
void Session::give(OrtSessionOptions* options, const Model& model, const std::set<std::string>& shared) {
    const OrtApi& api = environment_->api();
    std::vector<const char*> names;
    std::vector<const OrtValue*> values;
    for (const auto& [name, tensor] : model.weights) {
        const OrtValue* value = initializers_.emplace_back(environment_->value_of(tensor)).get();
        if (shared.count(name) != 0) {
            environment_->check(api.AddInitializer(options, name.c_str(), value));
            continue;
        }
        names.push_back(name.c_str());
        values.push_back(value);
    }
    if (!names.empty())
        environment_->check(api.AddExternalInitializers(options, names.data(), values.data(), names.size()));
    std::vector<std::string> files;
    std::vector<char*> contents;
    std::vector<std::size_t> sizes;
    for (const auto& file : model.files) {
        if (file->content().size() == 0) continue;
        files.push_back(file->path().filename().string());
        contents.push_back(const_cast<char*>(reinterpret_cast<const char*>(file->content().data())));
        sizes.push_back(file->content().size());
    }
    std::vector<const char*> places;
    for (const std::string& file : files) places.push_back(file.c_str());
    environment_->check(api.AddExternalInitializersFromFilesInMemory(options, places.data(), contents.data(),
                                                                     sizes.data(), places.size()));
}

void Session::open(const Model& model, int threads, const std::set<std::string>& shared) {
    const OrtApi& api = environment_->api();
    const auto check = [&](OrtStatus* status) { environment_->check(status); };
    OrtSessionOptions* options = nullptr;
    check(api.CreateSessionOptions(&options));
    const auto released = owned(options, api.ReleaseSessionOptions);
    check(api.SetSessionLogSeverityLevel(options, ORT_LOGGING_LEVEL_FATAL));
    check(api.AddSessionConfigEntry(options, kFormat, "ONNX"));
    check(api.AddSessionConfigEntry(options, kDirectly, "1"));
    if (threads > 0) {
        check(api.SetIntraOpNumThreads(options, threads));
        check(api.AddSessionConfigEntry(options, kSpinning, "0"));
    }
    give(options, model, shared);
    OrtSession* session = nullptr;
    check(api.CreateSessionFromArrayWithPrepackedWeightsContainer(
        environment_->env(), model.graph.data(), model.graph.size(), options, environment_->prepacked(), &session));
    session_ = owned(session, api.ReleaseSession);
    read_ports();
}

void Session::read_ports() {
    const OrtApi& api = environment_->api();
    const auto name_at = [&](auto get, std::size_t index) {
        char* text = nullptr;
        environment_->check(get(session_.get(), index, environment_->allocator(), &text));
        std::string name(text);
        environment_->check(api.AllocatorFree(environment_->allocator(), text));
        return name;
    };
    std::size_t count = 0;
    environment_->check(api.SessionGetInputCount(session_.get(), &count));
    for (std::size_t i = 0; i < count; ++i) inputs_.emplace(name_at(api.SessionGetInputName, i), taken_at(i));
    environment_->check(api.SessionGetOutputCount(session_.get(), &count));
    for (std::size_t i = 0; i < count; ++i) outputs_.push_back(name_at(api.SessionGetOutputName, i));
    for (const std::string& name : outputs_) output_names_.push_back(name.c_str());
}

Takes Session::taken_at(std::size_t index) const {
    const OrtApi& api = environment_->api();
    OrtTypeInfo* type = nullptr;
    environment_->check(api.SessionGetInputTypeInfo(session_.get(), index, &type));
    const auto released = owned(type, api.ReleaseTypeInfo);
    const OrtTensorTypeAndShapeInfo* tensor = nullptr;
    environment_->check(api.CastTypeInfoToTensorInfo(type, &tensor));
    const TensorView described = described_by(tensor);
    return {described.dtype, described.shape.size()};
}

TensorView Session::described_by(const OrtTensorTypeAndShapeInfo* info) const {
    const OrtApi& api = environment_->api();
    ONNXTensorElementDataType element{};
    environment_->check(api.GetTensorElementType(info, &element));
    std::size_t rank = 0;
    environment_->check(api.GetDimensionsCount(info, &rank));
    const std::optional<DType> dtype = dtype_of_element(element);
    if (!dtype) throw Error("a tensor has element type " + std::to_string(element) + ", which engines don't have");
    TensorView described{*dtype, std::vector<std::int64_t>(rank), nullptr, 0};
    environment_->check(api.GetDimensions(info, described.shape.data(), rank));
    return described;
}

Outputs Session::run(const Inputs& inputs, const Bound& bound) const {
    check_sizes(inputs);
    std::vector<const char*> names;
    std::vector<const OrtValue*> values;
    std::vector<Handle<OrtValue>> given;
    std::vector<OrtValue*> found(outputs_.size(), nullptr);
    try {
        for (const auto& [name, tensor] : inputs) {
            given.push_back(environment_->value_of(tensor));
            names.push_back(name.c_str());
            values.push_back(given.back().get());
        }
        for (std::size_t i = 0; i < bound.size(); ++i) {
            names.push_back(bound.name(i).c_str());
            values.push_back(bound.value(i));
        }
        environment_->check(environment_->api().Run(session_.get(), nullptr, names.data(), values.data(), names.size(),
                                                    output_names_.data(), output_names_.size(), found.data()));
    } catch (const Error& error) {
        // The inputs are looked at only when ONNX Runtime has refused them.
        throw Error(misfit(inputs, inputs_)
                        .value_or("ONNX Runtime can't run these inputs (" + std::string(error.what()) + ")"));
    }
    std::vector<Handle<OrtValue>> made;
    for (OrtValue* value : found) made.push_back(owned(value, environment_->api().ReleaseValue));
    Outputs outputs;
    for (std::size_t i = 0; i < made.size(); ++i) outputs.emplace(outputs_[i], tensor_of(std::move(made[i])));
    return outputs;
}

Tensor Session::tensor_of(Handle<OrtValue> value) const {
    const OrtApi& api = environment_->api();
    OrtTensorTypeAndShapeInfo* info = nullptr;
    environment_->check(api.GetTensorTypeAndShape(value.get(), &info));
    const auto released = owned(info, api.ReleaseTensorTypeAndShapeInfo);
    TensorView content = described_by(info);
    void* data = nullptr;
    environment_->check(api.GetTensorMutableData(value.get(), &data));
    content.data = data;
    content.bytes = size_of(content.dtype);
    for (const std::int64_t size : content.shape) content.bytes *= static_cast<std::size_t>(size);
    const auto release = [environment = environment_](OrtValue* held) { environment->api().ReleaseValue(held); };
    return Tensor(std::move(content), std::shared_ptr<void>(value.release(), [release](void* held) {
                      release(static_cast<OrtValue*>(held));
                  }));
}

}  // namespace lorafuse

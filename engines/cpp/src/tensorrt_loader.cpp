// Tasks as TensorRT's plans: an engine for each, with a context, a stream, and buffers for the largest shapes of its
// profiles. API: https://docs.nvidia.com/deeplearning/tensorrt/latest/_static/c-api/
#include <NvInferRuntime.h>

#include <algorithm>
#include <cstring>
#include <iterator>
#include <mutex>
#include <utility>

#include "cuda.hpp"
#include "dtype.hpp"
#include "inputs.hpp"
#include "loader.hpp"
#include "mapped_file.hpp"
#include "plan.hpp"

namespace lorafuse {
namespace {

using Shape = std::vector<std::int64_t>;
using Shapes = std::map<std::string, Shape>;

constexpr const char* kBackend = LORAFUSE_TENSORRT_FLAVOUR;  // "tensorrt" or "tensorrt-rtx"

std::string version() {
    std::string text;
    for (const int part :
         {getInferLibMajorVersion(), getInferLibMinorVersion(), getInferLibPatchVersion(), getInferLibBuildVersion()}) {
        text += (text.empty() ? "" : ".") + std::to_string(part);
    }
    return text;
}

// Most of the API's failures are an answer of nothing and a line here.
class Log : public nvinfer1::ILogger {
public:
    void log(Severity severity, const char* message) noexcept override try {
        if (severity > Severity::kERROR) return;
        const std::lock_guard lock(mutex_);
        if (said_.size() > kKept) said_.clear();
        said_ += (said_.empty() ? "" : "; ") + std::string(message);
    } catch (const std::exception&) {  // no memory for the line
    }

    // With what was said since the last error, in one line.
    Error error(const std::string& what) {
        const std::lock_guard lock(mutex_);
        std::string said = std::exchange(said_, "");
        std::replace_if(said.begin(), said.end(), [](char c) { return c == '\n' || c == '\r'; }, ' ');
        return Error(std::string(kBackend) + " " + version() + ": " + what + ": " +
                     (said.empty() ? "it gave no reason" : said));
    }

private:
    static constexpr std::size_t kKept = 1u << 14;

    std::mutex mutex_;
    std::string said_;
};

// One, and never given back: TensorRT keeps the first logger that it is handed for all that comes later.
Log& the_log() {
    static Log& log = *new Log;
    return log;
}

template <typename T>
std::unique_ptr<T> made(T* object, const std::string& otherwise) {
    if (object == nullptr) throw the_log().error(otherwise);
    return std::unique_ptr<T>(object);
}

DType dtype_of(nvinfer1::DataType type, const std::string& name) {
    switch (type) {
        case nvinfer1::DataType::kFLOAT: return DType::float32;
        case nvinfer1::DataType::kHALF: return DType::float16;
        case nvinfer1::DataType::kBF16: return DType::bfloat16;
        case nvinfer1::DataType::kINT32: return DType::int32;
        case nvinfer1::DataType::kINT64: return DType::int64;
        case nvinfer1::DataType::kINT8: return DType::int8;
        case nvinfer1::DataType::kUINT8: return DType::uint8;
        case nvinfer1::DataType::kBOOL: return DType::boolean;
        default: throw Error("'" + name + "' is of a dtype that this runtime does not take");
    }
}

Shape shape_of(const nvinfer1::Dims& dims) { return {dims.d, dims.d + std::max(0, dims.nbDims)}; }

nvinfer1::Dims dims_of(const Shape& shape) {
    nvinfer1::Dims dims{};
    dims.nbDims = static_cast<std::int32_t>(shape.size());
    std::copy(shape.begin(), shape.end(), dims.d);
    return dims;
}

std::string shown(const Shapes& shapes) {
    std::string text;
    for (const auto& [name, shape] : shapes) {
        text += (text.empty() ? "" : ", ") + name;
        for (std::size_t i = 0; i < shape.size(); ++i) text += (i == 0 ? " " : "x") + std::to_string(shape[i]);
    }
    return text;
}

// The shapes that an engine was built for.
struct Profile {
    Shapes smallest, largest;

    bool takes(const Shapes& shapes) const {
        return std::all_of(shapes.begin(), shapes.end(), [&](const auto& given) {
            const auto& [name, shape] = given;
            const Shape &low = smallest.at(name), &high = largest.at(name);
            for (std::size_t i = 0; i < shape.size(); ++i) {
                if (shape[i] < low[i] || shape[i] > high[i]) return false;
            }
            return true;
        });
    }
};

class Plan : public Loaded {
public:
    explicit Plan(const PlanFile& plan)
        : runtime_(made(nvinfer1::createInferRuntime(the_log()), "no runtime could be made")),
          engine_(deserialized(plan)),
          context_(made(engine_->createExecutionContext(), "no execution context could be made")) {
        read_ports();
        allocate();
    }

    Outputs run(const Inputs& inputs) const override {
        check_sizes(inputs);
        if (const auto reason = misfit(inputs, inputs_)) throw Error(*reason);
        const std::lock_guard lock(mutex_);
        const OnFirstDevice here;
        set_shapes(inputs);
        for (const auto& [name, tensor] : inputs) {
            if (tensor.bytes > 0) std::memcpy(buffers_.at(name).pinned(), tensor.data, tensor.bytes);
            buffers_.at(name).to_device(tensor.bytes, stream_);
        }
        if (!context_->enqueueV3(stream_.handle())) throw the_log().error("the engine did not run");
        Outputs outputs;
        for (const auto& [name, dtype] : outputs_) outputs.emplace(name, output(name, dtype));
        stream_.wait();
        for (const auto& [name, tensor] : outputs) {
            std::memcpy(const_cast<void*>(tensor.view().data), buffers_.at(name).pinned(), tensor.view().bytes);
        }
        return outputs;
    }

private:
    std::unique_ptr<nvinfer1::ICudaEngine> deserialized(const PlanFile& plan) {
        return made(runtime_->deserializeCudaEngine(plan.content->data(), plan.content->size()),
                    plan.path.string() + ": the plan was refused");
    }

    void read_ports() {
        for (std::int32_t i = 0; i < engine_->getNbIOTensors(); ++i) {
            const std::string name = engine_->getIOTensorName(i);
            const DType dtype = dtype_of(engine_->getTensorDataType(name.c_str()), name);
            if (engine_->getTensorIOMode(name.c_str()) == nvinfer1::TensorIOMode::kINPUT) {
                inputs_[name] = {dtype, shape_of(engine_->getTensorShape(name.c_str())).size()};
            } else {
                outputs_[name] = dtype;
            }
        }
        for (std::int32_t i = 0; i < engine_->getNbOptimizationProfiles(); ++i) profiles_.push_back(profile_at(i));
    }

    Profile profile_at(std::int32_t index) const {
        using nvinfer1::OptProfileSelector;
        Profile profile;
        for (const auto& [name, _] : inputs_) {
            profile.smallest[name] = shape_of(engine_->getProfileShape(name.c_str(), index, OptProfileSelector::kMIN));
            profile.largest[name] = shape_of(engine_->getProfileShape(name.c_str(), index, OptProfileSelector::kMAX));
        }
        return profile;
    }

    // Buffers for the largest shapes of any profile, whose addresses then never change.
    void allocate() {
        std::map<std::string, std::size_t> sizes;
        for (std::size_t i = 0; i < profiles_.size(); ++i) {
            choose(i);
            for (const auto& [name, shape] : profiles_[i].largest) set_shape(name, shape);
            for (const auto& [name, takes] : inputs_) sizes[name] = std::max(sizes[name], bytes_now(name, takes.dtype));
            for (const auto& [name, dtype] : outputs_) sizes[name] = std::max(sizes[name], bytes_now(name, dtype));
        }
        for (const auto& [name, size] : sizes) {
            const Buffer& buffer = buffers_.try_emplace(name, size).first->second;
            if (!context_->setTensorAddress(name.c_str(), buffer.device()))
                throw the_log().error("no address for '" + name + "'");
        }
    }

    void choose(std::size_t profile) const {
        if (profile == profile_) return;
        if (!context_->setOptimizationProfileAsync(static_cast<std::int32_t>(profile), stream_.handle())) {
            throw the_log().error("optimization profile " + std::to_string(profile) + " was refused");
        }
        stream_.wait();
        profile_ = profile;
    }

    void set_shape(const std::string& name, const Shape& shape) const {
        if (!context_->setInputShape(name.c_str(), dims_of(shape)))
            throw the_log().error("input " + shown({{name, shape}}) + " was refused");
    }

    // By the last profile that takes the shapes: later ones are narrower.
    void set_shapes(const Inputs& inputs) const {
        Shapes shapes;
        for (const auto& [name, tensor] : inputs) shapes[name] = tensor.shape;
        const auto fits = [&](const Profile& profile) { return profile.takes(shapes); };
        const auto found = std::find_if(profiles_.rbegin(), profiles_.rend(), fits);
        if (found == profiles_.rend()) {
            throw Error("no optimization profile of this engine takes " + shown(shapes) +
                        "; build it with a --profile that does");
        }
        choose(static_cast<std::size_t>(std::distance(found, profiles_.rend()) - 1));
        for (const auto& [name, shape] : shapes) set_shape(name, shape);
    }

    std::size_t bytes_now(const std::string& name, DType dtype) const {
        const auto bytes = bytes_of(shape_of(context_->getTensorShape(name.c_str())), dtype);
        if (bytes) return static_cast<std::size_t>(*bytes);
        throw Error("output '" + name +
                    "' has a size that depends on the data; expected one that follows from the inputs' shapes");
    }

    // Memory for an output, and its way there begun.
    Tensor output(const std::string& name, DType dtype) const {
        const std::size_t bytes = bytes_now(name, dtype);
        buffers_.at(name).to_host(bytes, stream_);
        auto memory = std::make_shared<std::vector<std::byte>>(bytes);
        TensorView content{dtype, shape_of(context_->getTensorShape(name.c_str())), memory->data(), bytes};
        return Tensor(std::move(content), std::shared_ptr<void>(memory, memory->data()));
    }

    std::unique_ptr<nvinfer1::IRuntime> runtime_;
    std::unique_ptr<nvinfer1::ICudaEngine> engine_;
    std::unique_ptr<nvinfer1::IExecutionContext> context_;
    Stream stream_;
    std::map<std::string, Takes> inputs_;
    std::map<std::string, DType> outputs_;
    std::vector<Profile> profiles_;
    std::map<std::string, Buffer> buffers_;
    mutable std::size_t profile_ = 0;
    mutable std::mutex mutex_;  // one context: runs take turns
};

// Where it was loaded.
void unload(const Plan* plan) try {
    const OnFirstDevice here;
    delete plan;
} catch (const Error&) {  // there is no device any more, and so nothing to be given back
}

class TensorRTLoader : public Loader {
public:
    // The plan has the weights, merged.
    bool takes(const TaskRecord&) const override { return true; }

    std::shared_ptr<const Loaded> load(const Bundle& bundle, const TaskPart& part, bool adapted) override {
        const PlanFile plan = plan_of(bundle, part, adapted, library());
        const OnFirstDevice here;
        return {new Plan(plan), unload};
    }

    std::uint64_t cost(const Bundle& bundle, const TaskPart& part, bool adapted) const override {
        return plan_size(bundle, part, adapted, library());
    }

    void reloaded(const Bundle&) override {}  // plans are each a task's own

private:
    static Library library() { return {kBackend, version(), first_device}; }
};

}  // namespace

std::unique_ptr<Loader> tensorrt_loader(const Options& options) {
    const std::string asked = options.backend == Backend::tensorrt ? "tensorrt" : "tensorrt-rtx";
    if (asked != kBackend) throw Error("this library was built with " + std::string(kBackend) + ", not with " + asked);
    if (options.mode != Mode::dedicated) throw Error("TensorRT's plans are each a task's own; choose Mode::dedicated");
    return std::make_unique<TensorRTLoader>();
}

}  // namespace lorafuse

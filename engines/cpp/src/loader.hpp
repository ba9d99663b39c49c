// What a backend is to the runtime: it loads the parts of tasks, and a loaded part answers.
#pragma once

#include <cstdint>
#include <memory>

#include "bundle.hpp"

namespace lorafuse {

// A part of a task that is loaded. It may be asked from any thread.
class Loaded {
public:
    virtual ~Loaded() = default;
    virtual Outputs run(const Inputs& inputs) const = 0;
};

// The bundle that it is made of must outlive it. Every method may be called from any thread.
class Loader {
public:
    virtual ~Loader() = default;

    // Whether the backend takes tasks that are stored as this one is.
    virtual bool takes(const TaskRecord& task) const = 0;

    // Throws Error when the part can't be loaded. Without `adapted`, the base under the task's head.
    virtual std::shared_ptr<const Loaded> load(const TaskPart& part, bool adapted) = 0;

    // The bytes of weights that the part holds beside the base.
    virtual std::uint64_t cost(const TaskPart& part, bool adapted) const = 0;
};

// Each throws Error when its library can't be used, or not as the options say.
std::unique_ptr<Loader> onnxruntime_loader(const Bundle& bundle, const Options& options);
std::unique_ptr<Loader> tensorrt_loader(const Bundle& bundle, const Options& options);

}  // namespace lorafuse

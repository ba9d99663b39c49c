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

// What the tasks of a bundle are loaded by, as it is and as it becomes. Every method may be called from any thread.
class Loader {
public:
    virtual ~Loader() = default;

    // Whether the backend takes tasks that are stored as this one is.
    virtual bool takes(const TaskRecord& task) const = 0;

    // Throws Error when the part can't be loaded. Without `adapted`, the base under the task's head.
    virtual std::shared_ptr<const Loaded> load(const Bundle& bundle, const TaskPart& part, bool adapted) = 0;

    // The bytes of weights that the part holds beside the base.
    virtual std::uint64_t cost(const Bundle& bundle, const TaskPart& part, bool adapted) const = 0;

    // From now on parts are those of this bundle: what only others need is given up.
    virtual void reloaded(const Bundle& bundle) = 0;
};

// Each throws Error when its library can't be used, or not as the options say.
std::unique_ptr<Loader> onnxruntime_loader(const Options& options);
std::unique_ptr<Loader> tensorrt_loader(const Options& options);

}  // namespace lorafuse

#include "lorafuse/runtime.hpp"

#include <utility>

#include "bundle.hpp"
#include "loader.hpp"
#include "pool.hpp"

namespace lorafuse {
namespace {

std::unique_ptr<Loader> loader_of(const Bundle& bundle, const Options& options) {
    return options.backend == Backend::onnxruntime ? onnxruntime_loader(bundle, options)
                                                   : tensorrt_loader(bundle, options);
}

}  // namespace

Outputs Task::run(const Inputs& inputs) const { return loaded_->run(inputs); }

struct Runtime::State {
    using Key = std::pair<std::string, bool>;  // a task, and whether its adapter counts

    State(const std::filesystem::path& path, const Options& options)
        : bundle(path),
          loader(loader_of(bundle, options)),
          tasks([this](const Key& key) { return loader->load(bundle.task(key.first), key.second); },
                [this](const Key& key) { return loader->cost(bundle.task(key.first), key.second); }, options.memory) {}

    Bundle bundle;
    std::unique_ptr<Loader> loader;
    Pool<Key, Loaded> tasks;
};

Runtime::Runtime(const std::filesystem::path& bundle, const Options& options)
    : state_(std::make_shared<State>(bundle, options)) {}
Runtime::~Runtime() = default;
Runtime::Runtime(Runtime&&) noexcept = default;
Runtime& Runtime::operator=(Runtime&&) noexcept = default;

std::vector<std::string> Runtime::tasks() const {
    std::vector<std::string> names;
    for (const auto& [name, task] : state_->bundle.manifest().tasks) {
        if (state_->loader->takes(task)) names.push_back(name);
    }
    return names;
}

std::vector<std::string> Runtime::loaded() const {
    std::vector<std::string> names;
    for (const auto& [task, adapted] : state_->tasks.held()) {
        if (adapted) names.push_back(task);
    }
    return names;
}

const std::vector<std::string>& Runtime::labels(const std::string& task) const {
    return state_->bundle.task(task).labels;
}

std::vector<Port> Runtime::inputs(const std::string& task) const {
    return state_->bundle.inputs(state_->bundle.task(task));
}

Task Runtime::use(const std::string& task, bool adapted) { return Task(state_, state_->tasks.use({task, adapted})); }

Outputs Runtime::run(const std::string& task, const Inputs& inputs, bool adapted) {
    return use(task, adapted).run(inputs);
}

}  // namespace lorafuse

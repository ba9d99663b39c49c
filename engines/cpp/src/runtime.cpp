#include "lorafuse/runtime.hpp"

#include <thread>
#include <utility>

#include "bundle.hpp"
#include "loader.hpp"
#include "pool.hpp"

namespace lorafuse {

// A task, loaded whole: each of its parts, by role.
class LoadedTask {
public:
    LoadedTask(std::string name, std::map<std::string, std::shared_ptr<const Loaded>> parts)
        : name_(std::move(name)), parts_(std::move(parts)) {}

    Outputs run(const Inputs& inputs, const std::string& part) const {
        const auto found = parts_.find(part);
        if (found != parts_.end()) return found->second->run(inputs);
        std::string known;
        for (const auto& [role, _] : parts_) known += (known.empty() ? "" : ", ") + role;
        throw Error("task '" + name_ + "' has no part '" + part + "'; give one of its parts: " + known);
    }

private:
    std::string name_;
    std::map<std::string, std::shared_ptr<const Loaded>> parts_;
};

namespace {

// Throws Error unless the number is one that this machine has.
void check_threads(int threads) {
    const unsigned cores = std::thread::hardware_concurrency();
    const bool too_many = cores > 0 && threads > 0 && static_cast<unsigned>(threads) > cores;
    if (threads < 0 || too_many) {
        throw Error("threads " + std::to_string(threads) + ": expected 0 for every core, or 1 to " +
                    std::to_string(cores) + ", which this machine has");
    }
}

std::unique_ptr<Loader> loader_of(const Bundle& bundle, const Options& options) {
    check_threads(options.threads);
    return options.backend == Backend::onnxruntime ? onnxruntime_loader(bundle, options)
                                                   : tensorrt_loader(bundle, options);
}

}  // namespace

Outputs Task::run(const Inputs& inputs, const std::string& part) const { return loaded_->run(inputs, part); }

struct Runtime::State {
    using Key = std::pair<std::string, bool>;  // a task, and whether its adapter counts

    State(const std::filesystem::path& path, const Options& options)
        : bundle(path),
          loader(loader_of(bundle, options)),
          tasks([this](const Key& key) { return load(key); }, [this](const Key& key) { return cost(key); },
                options.memory) {}

    std::shared_ptr<const LoadedTask> load(const Key& key) const {
        const auto& [task, adapted] = key;
        std::map<std::string, std::shared_ptr<const Loaded>> parts;
        for (const TaskPart& part : bundle.parts(bundle.task(task))) parts[part.role()] = loader->load(part, adapted);
        return std::make_shared<const LoadedTask>(task, std::move(parts));
    }

    std::uint64_t cost(const Key& key) const {
        const auto& [task, adapted] = key;
        std::uint64_t bytes = 0;
        for (const TaskPart& part : bundle.parts(bundle.task(task))) bytes += loader->cost(part, adapted);
        return bytes;
    }

    Bundle bundle;
    std::unique_ptr<Loader> loader;
    Pool<Key, LoadedTask> tasks;
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

std::vector<std::string> Runtime::parts(const std::string& task) const {
    std::vector<std::string> roles;
    for (const TaskPart& part : state_->bundle.parts(state_->bundle.task(task))) roles.push_back(part.role());
    return roles;
}

std::vector<Port> Runtime::inputs(const std::string& task, const std::string& part) const {
    const Bundle& bundle = state_->bundle;
    return bundle.inputs(bundle.part(bundle.task(task), part));
}

Task Runtime::use(const std::string& task, bool adapted) { return Task(state_, state_->tasks.use({task, adapted})); }

Outputs Runtime::run(const std::string& task, const Inputs& inputs, bool adapted, const std::string& part) {
    return use(task, adapted).run(inputs, part);
}

}  // namespace lorafuse

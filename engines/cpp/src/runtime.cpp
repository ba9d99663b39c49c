#include "lorafuse/runtime.hpp"

#include <algorithm>
#include <map>
#include <mutex>
#include <set>
#include <thread>
#include <utility>

#include "bundle.hpp"
#include "limits.hpp"
#include "loader.hpp"
#include "pool.hpp"

namespace lorafuse {

// A part of a task, and what it may be given.
struct LoadedPart {
    Limits limits;
    std::shared_ptr<const Loaded> loaded;
};

// A task, loaded whole: each of its parts, by role.
class LoadedTask {
public:
    LoadedTask(std::string name, std::map<std::string, LoadedPart> parts)
        : name_(std::move(name)), parts_(std::move(parts)) {}

    Outputs run(const Inputs& inputs, const std::string& part) const {
        const auto found = parts_.find(part);
        if (found == parts_.end()) throw no_part(part);
        found->second.limits.check(inputs);
        return found->second.loaded->run(inputs);
    }

private:
    Error no_part(const std::string& part) const {
        std::string known;
        for (const auto& [role, _] : parts_) known += (known.empty() ? "" : ", ") + role;
        return Error("task '" + name_ + "' has no part '" + part + "'; give one of its parts: " + known);
    }

    std::string name_;
    std::map<std::string, LoadedPart> parts_;
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

std::unique_ptr<Loader> loader_of(const Options& options) {
    check_threads(options.threads);
    return options.backend == Backend::onnxruntime ? onnxruntime_loader(options) : tensorrt_loader(options);
}

bool has_changed(const Bundle& bundle) {
    try {
        return Bundle(bundle.path()).manifest().digest != bundle.manifest().digest;
    } catch (const Error&) {
        return false;
    }
}

// A task as a manifest has it, and whether its adapter counts.
struct Key {
    std::string task;
    bool adapted;
    std::string version;  // TaskRecord::version
    std::shared_ptr<const Bundle> bundle;

    bool operator==(const Key& other) const {
        return task == other.task && adapted == other.adapted && version == other.version;
    }
};

}  // namespace

Outputs Task::run(const Inputs& inputs, const std::string& part) const { return loaded_->run(inputs, part); }

struct Runtime::State {
    State(const std::filesystem::path& path, const Options& options)
        : pinned(!options.digest.empty()),
          opened(std::make_shared<const Bundle>(path, options.digest)),
          loader(loader_of(options)),
          tasks([this](const Key& key) { return load(key); }, [this](const Key& key) { return cost(key); },
                options.memory) {}

    // The bundle as it was when the runtime was opened, or reloaded last.
    std::shared_ptr<const Bundle> bundle() const {
        const std::lock_guard lock(mutex);
        return opened;
    }

    Key key_of(const std::string& task, bool adapted) const {
        std::shared_ptr<const Bundle> present = bundle();
        const std::string& version = present->task(task).version;
        return {task, adapted, version, std::move(present)};
    }

    // A file that is gone because the bundle was changed is no damage: the error says what to do.
    std::shared_ptr<const LoadedTask> load(const Key& key) const {
        try {
            return loaded(key);
        } catch (const Damaged& error) {
            if (!has_changed(*key.bundle)) throw;
            throw Error(key.bundle->path().string() + ": has changed since the runtime read its manifest, and task '" +
                        key.task + "' is not loaded; call reload() (" + error.what() + ")");
        }
    }

    std::shared_ptr<const LoadedTask> loaded(const Key& key) const {
        const Bundle& of = *key.bundle;
        std::map<std::string, LoadedPart> parts;
        for (const TaskPart& part : of.parts(of.task(key.task)))
            parts.emplace(part.role(), LoadedPart{Limits(of, part), loader->load(of, part, key.adapted)});
        return std::make_shared<const LoadedTask>(key.task, std::move(parts));
    }

    std::uint64_t cost(const Key& key) const {
        const Bundle& of = *key.bundle;
        std::uint64_t bytes = 0;
        for (const TaskPart& part : of.parts(of.task(key.task))) bytes += loader->cost(of, part, key.adapted);
        return bytes;
    }

    void reload(const std::string& digest) {
        const std::lock_guard one(reloading);
        const std::shared_ptr<const Bundle> former = bundle();
        if (pinned && digest.empty()) {
            throw Error(former->path().string() + ": the runtime is pinned to " + former->manifest().digest +
                        "; give the digest of what is to be taken");
        }
        auto present = std::make_shared<const Bundle>(former->path(), digest, former->files());
        {
            const std::lock_guard lock(mutex);
            opened = present;
        }
        loader->reloaded(*present);
        std::set<std::string> current;
        for (const auto& [_, task] : present->manifest().tasks) current.insert(task.version);
        tasks.evict([&](const Key& key) { return current.count(key.version) == 0; });
        present->files()->forget_unmapped();
    }

    const bool pinned;
    mutable std::mutex mutex;  // of `opened`
    std::mutex reloading;
    std::shared_ptr<const Bundle> opened;
    std::unique_ptr<Loader> loader;
    Pool<Key, LoadedTask> tasks;
};

Runtime::Runtime(const std::filesystem::path& bundle, const Options& options)
    : state_(std::make_shared<State>(bundle, options)) {}
Runtime::~Runtime() = default;
Runtime::Runtime(Runtime&&) noexcept = default;
Runtime& Runtime::operator=(Runtime&&) noexcept = default;

std::vector<std::string> Runtime::tasks() const {
    const std::shared_ptr<const Bundle> bundle = state_->bundle();
    std::vector<std::string> names;
    for (const auto& [name, task] : bundle->manifest().tasks) {
        if (state_->loader->takes(task)) names.push_back(name);
    }
    return names;
}

std::vector<std::string> Runtime::loaded() const {
    std::vector<std::string> names;
    for (const Key& key : state_->tasks.held()) {
        const bool known = std::find(names.begin(), names.end(), key.task) != names.end();
        if (key.adapted && !known) names.push_back(key.task);
    }
    return names;
}

std::string Runtime::digest() const { return state_->bundle()->manifest().digest; }

std::vector<std::string> Runtime::labels(const std::string& task) const { return state_->bundle()->task(task).labels; }

std::vector<std::string> Runtime::parts(const std::string& task) const {
    const std::shared_ptr<const Bundle> bundle = state_->bundle();
    std::vector<std::string> roles;
    for (const TaskPart& part : bundle->parts(bundle->task(task))) roles.push_back(part.role());
    return roles;
}

std::vector<Port> Runtime::inputs(const std::string& task, const std::string& part) const {
    const std::shared_ptr<const Bundle> bundle = state_->bundle();
    return bundle->inputs(bundle->part(bundle->task(task), part));
}

void Runtime::preload(const std::string& task) { use(task); }

void Runtime::evict(const std::string& task) {
    state_->bundle()->task(task);
    state_->tasks.evict([&](const Key& key) { return key.task == task; });
}

void Runtime::reload(const std::string& digest) { state_->reload(digest); }

// Its own hold on the state: the runtime may end meanwhile, by another thread.
Task Runtime::use(const std::string& task, bool adapted) {
    const std::shared_ptr<State> state = state_;
    std::shared_ptr<const LoadedTask> loaded = state->tasks.use(state->key_of(task, adapted));
    return Task(state, std::move(loaded));
}

Outputs Runtime::run(const std::string& task, const Inputs& inputs, bool adapted, const std::string& part) {
    return use(task, adapted).run(inputs, part);
}

}  // namespace lorafuse

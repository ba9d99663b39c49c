#include "lorafuse/runtime.hpp"

#include <mutex>
#include <set>
#include <utility>

#include "bundle.hpp"
#include "models.hpp"
#include "onnxruntime.hpp"
#include "pool.hpp"

namespace lorafuse {

// A loaded task: a session, of its own or shared, and what goes into every run.
struct Task::State {
    State(const Bundle& bundle, const TaskRecord& task) : stored(bundle, task) {}

    Stored stored;  // mapped for as long as the session reads it
    std::shared_ptr<const Session> session;
    Bound bound;
};

Outputs Task::run(const Inputs& inputs) const { return state_->session->run(inputs, state_->bound); }

struct Runtime::State {
    using Key = std::pair<std::string, bool>;  // a task, and whether its adapter counts

    // A session that the tasks of a graph share, and the names of what any of them changes.
    struct Shared {
        Shared(const Bundle& bundle, const TaskRecord& task) : stored(bundle, task) {}

        Stored stored;
        std::set<std::string> exchanged;
        std::shared_ptr<const Session> session;
    };

    State(const std::filesystem::path& path, const Options& given)
        : bundle(path),
          options(given),
          environment(std::make_shared<Environment>(given.onnxruntime.empty() ? LORAFUSE_ONNXRUNTIME_LIBRARY : given.onnxruntime)),
          tasks([this](const Key& key) { return load(key); }, [this](const Key& key) { return cost(key); }, given.memory) {}

    std::shared_ptr<const Task::State> load(const Key& key) {
        return options.mode == Mode::dedicated ? dedicated(key) : resident(key);
    }

    // What a task holds beside the base, which all sessions share. Its own weights they don't: what is prepacked for all stays.
    std::uint64_t cost(const Key& key) const {
        const TaskRecord& task = bundle.task(key.first);
        return task.weights ? static_cast<std::uint64_t>(task.weights->size) : 0;
    }

    std::shared_ptr<const Task::State> dedicated(const Key& key) const {
        auto loaded = std::make_shared<Task::State>(bundle, bundle.task(key.first));
        const Model model = dedicated_model(bundle, loaded->stored, key.second);
        loaded->session = std::make_shared<Session>(environment, model, options.threads);
        return loaded;
    }

    std::shared_ptr<const Task::State> resident(const Key& key) {
        const TaskRecord& task = bundle.task(key.first);
        const Shared& graph = shared(task);
        auto loaded = std::make_shared<Task::State>(bundle, task);
        for (const auto& [name, _] : loaded->stored.own.tensors) {
            if (graph.exchanged.count(name) == 0) {
                throw Error("task '" + task.name + "' could not be read when the runtime opened its graph, and changes '" + name +
                            "'; open the runtime again");
            }
        }
        loaded->session = graph.session;
        loaded->bound = Bound(*environment, chosen(bundle, loaded->stored, graph.exchanged, key.second));
        return loaded;
    }

    const Shared& shared(const TaskRecord& task) {
        const std::lock_guard lock(opening);
        auto& kept = graphs[task.graph];
        if (!kept) kept = opened(task);
        return *kept;
    }

    std::unique_ptr<const Shared> opened(const TaskRecord& task) const {
        auto graph = std::make_unique<Shared>(bundle, task);
        for (const auto& [_, other] : bundle.manifest().tasks) {
            if (other.graph == task.graph && !other.factors) add_changed(graph->exchanged, other);
        }
        const Model model = resident_model(bundle, graph->stored, graph->exchanged);
        graph->session = std::make_shared<Session>(environment, model, options.threads);
        return graph;
    }

    // A damaged task harms no other; who asks for it is told.
    void add_changed(std::set<std::string>& names, const TaskRecord& task) const {
        try {
            names.merge(bundle.own_names(task));
        } catch (const Error&) {
        }
    }

    Bundle bundle;
    Options options;
    std::shared_ptr<const Environment> environment;
    std::mutex opening;
    std::map<std::string, std::unique_ptr<const Shared>> graphs;  // by digest
    Pool<Key, Task::State> tasks;
};

Runtime::Runtime(const std::filesystem::path& bundle, const Options& options) : state_(std::make_shared<State>(bundle, options)) {}
Runtime::~Runtime() = default;
Runtime::Runtime(Runtime&&) noexcept = default;
Runtime& Runtime::operator=(Runtime&&) noexcept = default;

std::vector<std::string> Runtime::tasks() const {
    std::vector<std::string> names;
    for (const auto& [name, task] : state_->bundle.manifest().tasks) {
        if (!task.factors) names.push_back(name);
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

const std::vector<std::string>& Runtime::labels(const std::string& task) const { return state_->bundle.task(task).labels; }

std::vector<Port> Runtime::inputs(const std::string& task) const { return state_->bundle.inputs(state_->bundle.task(task)); }

Task Runtime::use(const std::string& task, bool adapted) { return Task(state_, state_->tasks.use({task, adapted})); }

Outputs Runtime::run(const std::string& task, const Inputs& inputs, bool adapted) { return use(task, adapted).run(inputs); }

}  // namespace lorafuse

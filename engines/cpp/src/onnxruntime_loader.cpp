// Tasks on ONNX Runtime's CPU provider, in both modes.
#include <map>
#include <mutex>
#include <set>
#include <utility>

#include "loader.hpp"
#include "models.hpp"
#include "onnxruntime.hpp"

namespace lorafuse {
namespace {

// A session of a part, of its own or shared, and what goes into every run.
struct LoadedSession : Loaded {
    LoadedSession(const Bundle& bundle, const TaskPart& part) : stored(bundle, part) {}

    Outputs run(const Inputs& inputs) const override { return session->run(inputs, bound); }

    Stored stored;  // mapped for as long as the session reads it
    std::shared_ptr<const Session> session;
    Bound bound;
};

class OnnxRuntimeLoader : public Loader {
public:
    OnnxRuntimeLoader(const Bundle& bundle, const Options& options)
        : bundle_(bundle),
          options_(options),
          environment_(std::make_shared<Environment>(options.onnxruntime.empty() ? LORAFUSE_ONNXRUNTIME_LIBRARY
                                                                                 : options.onnxruntime)) {}

    bool takes(const TaskRecord& task) const override { return !task.factors; }

    std::shared_ptr<const Loaded> load(const TaskPart& part, bool adapted) override {
        if (!takes(part.task)) {
            throw Error(bundle_.path().string() + ": task '" + part.task.name +
                        "' is stored as factors, which the Python runtime merges and this one does not; add it with "
                        "'--store dense'");
        }
        return options_.mode == Mode::dedicated ? dedicated(part, adapted) : resident(part, adapted);
    }

    // The base is shared by all sessions. A task's own weights are not: what is prepacked for all stays.
    std::uint64_t cost(const TaskPart& part, bool) const override {
        return part.part.weights ? static_cast<std::uint64_t>(part.part.weights->size) : 0;
    }

private:
    // A session that the tasks of a graph share, and the names of what any of them changes.
    struct Shared {
        Shared(const Bundle& bundle, const TaskPart& part) : stored(bundle, part) {}

        Stored stored;
        std::set<std::string> exchanged;
        std::shared_ptr<const Session> session;
    };

    std::shared_ptr<const Loaded> dedicated(const TaskPart& part, bool adapted) const {
        auto loaded = std::make_shared<LoadedSession>(bundle_, part);
        const Model model = dedicated_model(bundle_, loaded->stored, adapted);
        loaded->session = std::make_shared<Session>(environment_, model, options_.threads);
        return loaded;
    }

    std::shared_ptr<const Loaded> resident(const TaskPart& part, bool adapted) {
        const Shared& graph = shared(part);
        auto loaded = std::make_shared<LoadedSession>(bundle_, part);
        for (const auto& [name, _] : loaded->stored.own.tensors) {
            if (graph.exchanged.count(name) == 0) {
                throw Error("task '" + part.task.name +
                            "' could not be read when the runtime opened its graph, and changes '" + name +
                            "'; open the runtime again");
            }
        }
        loaded->session = graph.session;
        loaded->bound = Bound(*environment_, chosen(bundle_, loaded->stored, graph.exchanged, adapted));
        return loaded;
    }

    const Shared& shared(const TaskPart& part) {
        const std::lock_guard lock(opening_);
        auto& kept = graphs_[part.part.graph];
        if (!kept) kept = opened(part);
        return *kept;
    }

    std::unique_ptr<const Shared> opened(const TaskPart& part) const {
        auto graph = std::make_unique<Shared>(bundle_, part);
        for (const auto& [_, task] : bundle_.manifest().tasks) {
            if (takes(task)) add_changed(graph->exchanged, task, part.part.graph);
        }
        const Model model = resident_model(bundle_, graph->stored, graph->exchanged);
        graph->session = std::make_shared<Session>(environment_, model, options_.threads);
        return graph;
    }

    // A damaged task harms no other; who asks for it is told.
    void add_changed(std::set<std::string>& names, const TaskRecord& task, const std::string& graph) const {
        for (const TaskPart& part : bundle_.parts(task)) {
            if (part.part.graph != graph) continue;
            try {
                names.merge(bundle_.own_names(part));
            } catch (const Error&) {
            }
        }
    }

    const Bundle& bundle_;
    Options options_;
    std::shared_ptr<const Environment> environment_;
    std::mutex opening_;
    std::map<std::string, std::unique_ptr<const Shared>> graphs_;  // by digest
};

}  // namespace

std::unique_ptr<Loader> onnxruntime_loader(const Bundle& bundle, const Options& options) {
    return std::make_unique<OnnxRuntimeLoader>(bundle, options);
}

}  // namespace lorafuse

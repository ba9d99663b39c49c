// Tasks on ONNX Runtime's CPU provider, in both modes.
#include <map>
#include <mutex>
#include <set>
#include <tuple>
#include <utility>

#include "loader.hpp"
#include "onnxruntime.hpp"
#include "opened_part.hpp"

namespace lorafuse {
namespace {

using Names = std::set<std::string>;

// A session of a part, of its own or shared, and what goes into every run.
struct LoadedSession : Loaded {
    Outputs run(const Inputs& inputs) const override { return session->run(inputs, bound); }

    TensorFiles files;  // mapped for as long as `bound` is read
    std::shared_ptr<const Session> session;
    Bound bound;
};

class OnnxRuntimeLoader : public Loader {
public:
    explicit OnnxRuntimeLoader(const Options& options)
        : options_(options),
          environment_(std::make_shared<Environment>(options.onnxruntime.empty() ? LORAFUSE_ONNXRUNTIME_LIBRARY
                                                                                 : options.onnxruntime)) {}

    bool takes(const TaskRecord& task) const override { return !task.factors; }

    std::shared_ptr<const Loaded> load(const Bundle& bundle, const TaskPart& part, bool adapted) override {
        if (!takes(part.task)) {
            throw Error(bundle.path().string() + ": task '" + part.task.name +
                        "' is stored as factors, which the Python runtime merges and this one does not; add it with "
                        "'--store dense'");
        }
        OpenedPart opened(bundle, part);
        return options_.mode == Mode::dedicated ? dedicated(opened, adapted) : resident(bundle, opened, adapted);
    }

    // The base is shared by all sessions. A task's own weights are not: what is prepacked for all stays.
    std::uint64_t cost(const Bundle&, const TaskPart& part, bool) const override {
        return part.part.weights ? static_cast<std::uint64_t>(part.part.weights->size) : 0;
    }

    void reloaded(const Bundle& bundle) override {
        const std::lock_guard lock(opening_);
        names_.clear();
        for (auto graph = graphs_.begin(); graph != graphs_.end();) {
            const bool current = std::get<0>(graph->first) == bundle.manifest().base_version;
            graph = current ? std::next(graph) : graphs_.erase(graph);
        }
    }

private:
    // Of a resident session: the base that it stands on; its graph, by digest and by what the file computes (the
    // digest is a word of the manifest's, which nobody checks here); and what it lets be exchanged.
    using Shared = std::tuple<std::string, std::string, Names>;

    std::shared_ptr<const Loaded> dedicated(OpenedPart& opened, bool adapted) const {
        auto loaded = std::make_shared<LoadedSession>();
        loaded->session = std::make_shared<Session>(environment_, opened.dedicated_model(adapted), options_.threads);
        return loaded;
    }

    std::shared_ptr<const Loaded> resident(const Bundle& bundle, OpenedPart& opened, bool adapted) {
        const Names exchanged = exchanged_names(bundle, opened.part().part.graph);
        const Tensors values = opened.chosen(exchanged, adapted);
        for (const auto& [name, _] : opened.own()) {
            if (exchanged.count(name) == 0) {
                throw Error("task '" + opened.part().task.name +
                            "' could not be read when the runtime opened its graph, and changes '" + name +
                            "'; reload the runtime");
            }
        }
        auto loaded = std::make_shared<LoadedSession>();
        loaded->files = opened.files();
        loaded->session = shared(bundle, opened, exchanged);
        loaded->bound = Bound(*environment_, values);
        return loaded;
    }

    std::shared_ptr<const Session> shared(const Bundle& bundle, OpenedPart& opened, const Names& exchanged) {
        const std::string graph = opened.part().part.graph + " " + opened.skeleton();
        const std::lock_guard lock(opening_);
        auto& kept = graphs_[{bundle.manifest().base_version, graph, exchanged}];
        if (!kept) kept = std::make_shared<Session>(environment_, opened.resident_model(exchanged), options_.threads);
        return kept;
    }

    // What any task of the graph changes: with every run the session is given all of it.
    Names exchanged_names(const Bundle& bundle, const std::string& graph) {
        const std::lock_guard lock(opening_);
        const auto [place, first] = names_.try_emplace({bundle.manifest().digest, graph});
        if (first) {
            for (const auto& [_, task] : bundle.manifest().tasks) {
                if (takes(task)) add_changed(place->second, bundle, task, graph);
            }
        }
        return place->second;
    }

    // A damaged task harms no other; who asks for it is told.
    static void add_changed(Names& names, const Bundle& bundle, const TaskRecord& task, const std::string& graph) {
        for (const TaskPart& part : bundle.parts(task)) {
            if (part.part.graph != graph) continue;
            try {
                names.merge(own_names(bundle, part));
            } catch (const Error&) {
            }
        }
    }

    Options options_;
    std::shared_ptr<const Environment> environment_;
    std::mutex opening_;
    std::map<Shared, std::shared_ptr<const Session>> graphs_;
    std::map<std::pair<std::string, std::string>, Names> names_;  // by the manifest's and the graph's digest
};

}  // namespace

std::unique_ptr<Loader> onnxruntime_loader(const Options& options) {
    return std::make_unique<OnnxRuntimeLoader>(options);
}

}  // namespace lorafuse

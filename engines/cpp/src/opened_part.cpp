#include "opened_part.hpp"

#include <utility>

#include "overridable.hpp"

namespace lorafuse {
namespace {

std::shared_ptr<const TensorFile> tensors_of(const Bundle& bundle, const File& file) {
    return std::make_shared<const TensorFile>(bundle.files()->path_of(file), bundle.files()->mapped(file));
}

TensorFiles base_files(const Bundle& bundle) {
    TensorFiles files;
    for (const File& file : bundle.manifest().base_weights) files.push_back(tensors_of(bundle, file));
    return files;
}

TensorFiles own_files(const Bundle& bundle, const TaskPart& part) {
    if (!part.part.weights) return {};
    TensorFiles files{tensors_of(bundle, *part.part.weights)};
    check_claimed(*files.front(), part.graph.weights);
    return files;
}

// Vectors are small, and ONNX Runtime refuses to share those that a kernel prepacks (LayerNormalization in float16).
bool is_shared(const TensorView& tensor) { return tensor.shape.size() > 1; }

}  // namespace

std::set<std::string> own_names(const Bundle& bundle, const TaskPart& part) {
    std::set<std::string> names;
    if (!part.part.weights) return names;
    const File& file = *part.part.weights;
    const auto tensors =
        std::make_shared<const TensorFile>(bundle.files()->path_of(file), bundle.files()->described(file));
    check_claimed(*tensors, part.graph.weights);
    for (const auto& [name, _] : weights_in({tensors}, part.graph.weights)) names.insert(name);
    return names;
}

OpenedPart::OpenedPart(const Bundle& bundle, const TaskPart& part)
    : bundle_(bundle), part_(part), graph_path_(bundle.files()->path_of(part.part.model)) {}

const TensorFiles& OpenedPart::files() {
    if (!files_.empty()) return files_;
    const TensorFiles own = own_files(bundle_, part_);
    TensorFiles all = base_files(bundle_);
    base_ = weights_in(all, part_.graph.weights), own_ = weights_in(own, part_.graph.weights);
    all.insert(all.end(), own.begin(), own.end());
    files_ = std::move(all);
    return files_;
}

const Tensors& OpenedPart::own() {
    files();
    return own_;
}

Tensors OpenedPart::chosen(const std::set<std::string>& names, bool adapted) {
    files();
    const Tensors &first = adapted ? own_ : base_, &second = adapted ? base_ : own_;
    Tensors values;
    for (const std::string& name : names) {
        const bool in_first = first.count(name) != 0;
        if (!in_first && second.count(name) == 0) {
            throw Error(bundle_.path().string() + ": neither the base nor task '" + part_.task.name +
                        "' has the weight '" + name + "'; export the task again");
        }
        values.emplace(name, (in_first ? first : second).at(name));
    }
    return values;
}

const GraphFile& OpenedPart::graph() {
    if (graph_content_) return graph_;
    const auto content = bundle_.files()->mapped(part_.part.model);
    graph_ = read_graph(graph_path_, {reinterpret_cast<const char*>(content->data()), content->size()});
    check_mapped(graph_path_, graph_, part_.graph.weights);
    check_homes(graph_path_, graph_, part_.graph.weights, files());
    graph_content_ = content;
    return graph_;
}

const std::string& OpenedPart::skeleton() { return graph().skeleton; }

Model OpenedPart::model(const std::set<std::string>& changed, const GraphFile& checked) {
    Model model{"", bundle_.path(), linked(graph_path_, checked, part_.graph.weights, files()), {}, {}};
    model.graph.assign(reinterpret_cast<const char*>(graph_content_->data()), graph_content_->size());
    for (const auto& [name, tensor] : model.weights) {
        if (changed.count(name) == 0 && is_shared(tensor)) model.shared.insert(name);
    }
    model.files = files();
    return model;
}

Model OpenedPart::dedicated_model(bool adapted) {
    std::set<std::string> changed;
    const GraphFile& checked = graph();  // before the weights, as in Python
    for (const auto& [name, _] : own()) changed.insert(name);
    Model made = model(changed, checked);
    if (adapted) return made;
    for (const auto& [name, tensor] : chosen(changed, adapted)) made.weights[name] = tensor;
    return made;
}

Model OpenedPart::resident_model(const std::set<std::string>& exchanged) {
    Model made = model(exchanged, graph());
    const Tensors defaults = chosen(exchanged, /*adapted=*/false);
    made.graph = overridable(made.graph, defaults);
    for (const auto& [name, tensor] : defaults) made.weights[name] = tensor;
    return made;
}

}  // namespace lorafuse

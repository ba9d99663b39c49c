#include "models.hpp"

#include "overridable.hpp"

namespace lorafuse {
namespace {

// Vectors are small, and ONNX Runtime refuses to share those that a kernel prepacks (LayerNormalization in float16).
bool is_shared(const TensorView& tensor) { return tensor.shape.size() > 1; }

}  // namespace

Model dedicated_model(const Bundle& bundle, const Stored& stored, bool adapted) {
    Model model{bundle.model(stored.part), bundle.path(), {}, {}};
    for (const auto& [name, tensor] : stored.base.tensors) {
        const bool changed = stored.own.tensors.count(name) != 0;
        if (changed && !adapted) model.replaced.emplace(name, tensor);
        if (!changed && is_shared(tensor)) model.shared.emplace(name, tensor);
    }
    return model;
}

Model resident_model(const Bundle& bundle, const Stored& stored, const std::set<std::string>& exchanged) {
    const Tensors defaults = chosen(bundle, stored, exchanged, /*adapted=*/false);
    Model model{overridable(bundle.model(stored.part), defaults), bundle.path(), {}, {}};
    for (const auto& [name, tensor] : stored.base.tensors) {
        if (exchanged.count(name) == 0 && is_shared(tensor)) model.shared.emplace(name, tensor);
    }
    return model;
}

Tensors chosen(const Bundle& bundle, const Stored& stored, const std::set<std::string>& names, bool adapted) {
    const Tensors &own = stored.own.tensors, &base = stored.base.tensors;
    Tensors values;
    for (const std::string& name : names) {
        const bool in_own = own.count(name) != 0, in_base = base.count(name) != 0;
        if (!in_own && !in_base) {
            throw Error(bundle.path().string() + ": neither the base nor task '" + stored.part.task.name +
                        "' has the weight '" + name + "'; export the task again");
        }
        values.emplace(name, in_own && (adapted || !in_base) ? own.at(name) : base.at(name));
    }
    return values;
}

}  // namespace lorafuse

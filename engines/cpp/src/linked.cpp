#include "linked.hpp"

#include "dtype.hpp"
#include "printable.hpp"

namespace lorafuse {
namespace {

namespace fs = std::filesystem;

[[noreturn]] void refuse(const fs::path& path, const std::string& what) {
    throw Error(path.string() + ": " + what + "; export the task again");
}

std::string shown(const std::string& dtype, const std::vector<std::int64_t>& shape) {
    std::string sizes;
    for (const std::int64_t size : shape) sizes += (sizes.empty() ? "" : ", ") + std::to_string(size);
    return dtype + " of shape [" + sizes + "]";
}

std::string shown(const TensorView& tensor) { return shown(name_of(tensor.dtype), tensor.shape); }

bool is(const WeightRecord& weight, const TensorView& tensor) {
    return weight.shape == tensor.shape && weight.dtype == name_of(tensor.dtype);
}

const TensorView* tensor_in(const TensorFile& file, const std::string& stored) {
    const auto found = file.tensors().find(stored);
    return found == file.tensors().end() ? nullptr : &found->second;
}

std::string stored_name(const std::string& name, const WeightMap& weights) {
    const auto weight = weights.find(name);
    return weight == weights.end() ? name : key_of(name, weight->second);
}

const TensorFile& file_named(const fs::path& path, const std::string& name, const External& external,
                             const TensorFiles& files) {
    const TensorFile* place = nullptr;
    for (const auto& file : files) {
        if (file->path().filename() == external.location) place = file.get();
    }
    if (place != nullptr && place->path().parent_path() == path.parent_path()) return *place;
    refuse(path, "the weight " + in_quotes(name) + " lies in " + in_quotes(external.location) +
                     ", which is no weights file of this task beside it");
}

// The tensor that lies exactly where the graph says.
const TensorView& tensor_at(const fs::path& path, const std::string& name, const Initializer& described,
                            const std::string& stored, const TensorFile& file) {
    const External& external = *described.external;
    const std::string of = in_quotes(stored) + " of " + in_quotes(external.location);
    const TensorView* tensor = tensor_in(file, stored);
    if (tensor == nullptr || file.offset_of(*tensor) != external.offset || tensor->bytes != external.length) {
        refuse(path, "the weight " + in_quotes(name) + " lies at " + std::to_string(external.offset) + ", " +
                         std::to_string(external.length) + " bytes, which is not the tensor " + of);
    }
    if (name_of(tensor->dtype) != described.dtype || tensor->shape != described.shape) {
        refuse(path, "the weight " + in_quotes(name) + " is " + shown(described.dtype, described.shape) +
                         ", but its tensor in " + in_quotes(external.location) + " is " + shown(*tensor));
    }
    if (external.offset % size_of(tensor->dtype) != 0)
        refuse(path, "the tensor " + of + " is not aligned to its elements");
    return *tensor;
}

}  // namespace

const TensorFile* home_of(const std::string& name, const WeightRecord& weight, const TensorFiles& files) {
    const TensorFile* found = nullptr;
    for (const auto& file : files) {
        const TensorView* tensor = tensor_in(*file, key_of(name, weight));
        if (tensor != nullptr && is(weight, *tensor)) found = file.get();
    }
    return found;
}

Tensors weights_in(const TensorFiles& files, const WeightMap& weights) {
    Tensors tensors;
    for (const auto& [name, weight] : weights) {
        if (const TensorFile* home = home_of(name, weight, files))
            tensors.emplace(name, *tensor_in(*home, key_of(name, weight)));
    }
    return tensors;
}

void check_claimed(const TensorFile& file, const WeightMap& weights) {
    std::map<std::string, const WeightRecord*> claimed;
    for (const auto& [name, weight] : weights) claimed[key_of(name, weight)] = &weight;
    for (const auto& [stored, tensor] : file.tensors()) {
        const auto weight = claimed.find(stored);
        if (weight == claimed.end()) refuse(file.path(), "no weight of the graph is the tensor " + in_quotes(stored));
        if (!is(*weight->second, tensor)) {
            refuse(file.path(), "the tensor " + in_quotes(stored) + " is " + shown(tensor) +
                                    ", but the weight map says " + shown(weight->second->dtype, weight->second->shape));
        }
    }
}

void check_mapped(const fs::path& path, const GraphFile& graph, const WeightMap& weights) {
    for (const auto& [name, weight] : weights) {
        const auto found = graph.initializers.find(name);
        if (found == graph.initializers.end() || !found->second.external)
            refuse(path, "the weight " + in_quotes(name) + " has no place in the graph");
        const Initializer& described = found->second;
        if (described.dtype != weight.dtype || described.shape != weight.shape) {
            refuse(path, "the weight " + in_quotes(name) + " is " + shown(described.dtype, described.shape) +
                             ", but the weight map says " + shown(weight.dtype, weight.shape));
        }
    }
    for (const auto& [name, described] : graph.initializers) {
        if (described.external && weights.count(name) == 0)
            refuse(path, "the weight map has no entry for the weight " + in_quotes(name));
    }
}

void check_homes(const fs::path& path, const GraphFile& graph, const WeightMap& weights, const TensorFiles& files) {
    for (const auto& [name, weight] : weights) {
        const std::string& location = graph.initializers.at(name).external->location;
        const TensorFile* home = home_of(name, weight, files);
        if (home != nullptr && home->path().filename() == location) continue;
        refuse(path,
               "the weight " + in_quotes(name) + " lies in " + in_quotes(location) + "; expected " +
                   (home == nullptr ? "a weights file of the bundle" : in_quotes(home->path().filename().string())));
    }
}

Tensors linked(const fs::path& path, const GraphFile& graph, const WeightMap& weights, const TensorFiles& files) {
    Tensors values;
    for (const auto& [name, described] : graph.initializers) {
        if (!described.external) continue;
        const TensorFile& file = file_named(path, name, *described.external, files);
        values.emplace(name, tensor_at(path, name, described, stored_name(name, weights), file));
    }
    return values;
}

}  // namespace lorafuse

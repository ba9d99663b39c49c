#include "bundle.hpp"

#include <utility>

#include "dtype.hpp"
#include "printable.hpp"
#include "sha256.hpp"

namespace lorafuse {

namespace fs = std::filesystem;

Bundle::Bundle(const fs::path& path, const std::string& digest, std::shared_ptr<VerifiedFiles> files)
    : path_(tidy(path)),
      manifest_(read_manifest(path_, digest)),
      files_(files ? std::move(files) : std::make_shared<VerifiedFiles>(path_)) {}

const TaskRecord& Bundle::task(const std::string& name) const {
    const auto found = manifest_.tasks.find(name);
    if (found == manifest_.tasks.end()) {
        std::string known;
        for (const auto& [task, _] : manifest_.tasks) known += (known.empty() ? "" : ", ") + task;
        throw Error(path_.string() + ": no task '" + name +
                    "' in this bundle; it holds: " + (known.empty() ? "none" : known));
    }
    return found->second;
}

TaskPart Bundle::part(const TaskRecord& task, const std::string& role) const {
    const auto found = task.parts.find(role);
    if (found == task.parts.end()) {
        std::string known;
        for (const auto& [name, _] : task.parts) known += (known.empty() ? "" : ", ") + name;
        throw Error(path_.string() + ": task '" + task.name + "' has no part '" + role +
                    "'; give one of its parts: " + known);
    }
    return {task, found->second, manifest_.graphs.at(found->second.graph)};
}

std::vector<TaskPart> Bundle::parts(const TaskRecord& task) const {
    std::vector<TaskPart> parts;
    for (const auto& [role, _] : task.parts) parts.push_back(part(task, role));
    return parts;
}

std::vector<Port> Bundle::inputs(const TaskPart& part) const {
    std::vector<Port> ports;
    for (const PortRecord& port : part.graph.inputs) {
        const std::optional<DType> dtype = dtype_named(port.dtype);
        if (!dtype) {
            throw Error(path_.string() + ": task '" + part.task.name + "' takes " + in_quotes(port.dtype) + " as " +
                        in_quotes(port.name) + ", a dtype that is not known; export the task again");
        }
        ports.push_back({port.name, *dtype, port.shape});
    }
    return ports;
}

std::string Bundle::weights_sha256(const TaskPart& part, bool adapted) const {
    std::string identified = manifest_.base_sha256 + " " + manifest_.precision;
    if (adapted) {
        if (part.part.weights) identified += " " + part.part.weights->sha256;
        identified += " " + part.task.adapter_sha256;
    }
    return sha256(identified.data(), identified.size());
}

}  // namespace lorafuse

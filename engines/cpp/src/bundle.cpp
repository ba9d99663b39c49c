#include "bundle.hpp"

#include <sys/stat.h>

#include <algorithm>
#include <cerrno>
#include <system_error>

#include "dtype.hpp"
#include "printable.hpp"
#include "sha256.hpp"

namespace lorafuse {
namespace {

namespace fs = std::filesystem;

// Seconds: a file that changes twice within a step of its file system's clock may show one time for both.
constexpr time_t kClockStep = 2;

[[noreturn]] void refuse(const fs::path& path, const std::string& what) {
    throw Error(path.string() + ": " + what + "; export the task again");
}

struct stat stat_of(const fs::path& path) {
    struct stat found{};
    if (::lstat(path.c_str(), &found) == 0) return found;
    if (errno == ENOENT || errno == ENOTDIR) refuse(path, "missing from the bundle");
    refuse(path, "can't be read (" + std::generic_category().message(errno) + ")");
}

std::string described(const std::string& dtype, const std::vector<std::int64_t>& shape) {
    std::string sizes;
    for (const std::int64_t size : shape) sizes += (sizes.empty() ? "" : ", ") + std::to_string(size);
    return dtype + " [" + sizes + "]";
}

// A weight of a graph, with the tensor that a file has of it.
struct Found {
    const std::string& name;
    const WeightRecord& weight;
    const TensorView& tensor;

    bool fits() const { return tensor.shape == weight.shape && name_of(tensor.dtype) == weight.dtype; }

    void check(const fs::path& path) const {
        if (fits()) return;
        refuse(path, "tensor " + in_quotes(key_of(name, weight)) + " is " +
                         described(name_of(tensor.dtype), tensor.shape) + ", but the manifest says " +
                         described(printable(weight.dtype), weight.shape));
    }
};

std::vector<Found> found_in(const TensorFile& file, const Graph& graph) {
    std::vector<Found> all;
    for (const auto& [name, weight] : graph.weights) {
        const auto tensor = file.tensors().find(key_of(name, weight));
        if (tensor != file.tensors().end()) all.push_back({name, weight, tensor->second});
    }
    return all;
}

}  // namespace

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

std::string Bundle::model(const TaskPart& part) const {
    const MappedFile file(checked(part.part.model));
    return {reinterpret_cast<const char*>(file.data()), file.size()};
}

Weights Bundle::own_weights(const TaskPart& part) const {
    if (!part.part.weights) return {};
    Weights own;
    const auto& file = own.files.emplace_back(mapped(*part.part.weights));
    for (const Found& found : found_in(*file, part.graph)) {
        found.check(path_ / part.part.weights->path);
        own.tensors[found.name] = found.tensor;
    }
    return own;
}

Weights Bundle::base_weights(const TaskPart& part, const Weights& own) const {
    Weights base;
    for (const File& of_base : manifest_.base_weights) {
        const auto& file = base.files.emplace_back(mapped(of_base));
        for (const Found& found : found_in(*file, part.graph)) {
            if (!found.fits() && own.tensors.count(found.name) != 0) continue;  // a head of another size
            found.check(path_ / of_base.path);
            base.tensors[found.name] = found.tensor;
        }
    }
    return base;
}

std::string Bundle::weights_sha256(const TaskPart& part, bool adapted) const {
    std::string identified = manifest_.base_sha256 + " " + manifest_.precision;
    if (adapted) {
        if (part.part.weights) identified += " " + part.part.weights->sha256;
        identified += " " + part.task.adapter_sha256;
    }
    return sha256(identified.data(), identified.size());
}

std::set<std::string> Bundle::own_names(const TaskPart& part) const {
    std::set<std::string> names;
    if (!part.part.weights) return names;
    const fs::path path = present(*part.part.weights);
    const TensorFile file(path);
    for (const Found& found : found_in(file, part.graph)) {
        found.check(path);
        names.insert(found.name);
    }
    return names;
}

fs::path Bundle::present(const File& file) const {
    fs::path path = tidy(path_ / file.path);
    const struct stat found = stat_of(path);
    if (!S_ISREG(found.st_mode)) refuse(path, "missing from the bundle");
    if (found.st_size != file.size) {
        refuse(path, std::to_string(found.st_size) + " bytes, but the manifest says " + std::to_string(file.size));
    }
    return path;
}

// A process that goes from task to task does not hash a file again that nobody touched. The time is the kernel's.
fs::path Bundle::checked(const File& file) const {
    fs::path path = present(file);
    const struct stat found = stat_of(path);
    const State state{found.st_ino, found.st_size, found.st_ctim.tv_sec, found.st_ctim.tv_nsec};
    {
        const std::lock_guard lock(mutex_);
        const auto seen = seen_.find(file.path);
        if (seen != seen_.end() && seen->second == state) return path;
    }
    const bool settled = ::time(nullptr) - found.st_ctim.tv_sec > kClockStep;
    try {
        const MappedFile mapped(path);
        if (sha256(mapped.data(), mapped.size()) != file.sha256)
            refuse(path, "content does not match the manifest's SHA-256");
    } catch (const std::system_error& error) {
        refuse(path, "can't be read (" + error.code().message() + ")");
    }
    if (settled) {
        const std::lock_guard lock(mutex_);
        seen_[file.path] = state;
    }
    return path;
}

std::shared_ptr<const TensorFile> Bundle::mapped(const File& file) const {
    const fs::path path = checked(file);
    const bool of_base = std::any_of(manifest_.base_weights.begin(), manifest_.base_weights.end(),
                                     [&](const File& weights) { return weights.path == file.path; });
    if (!of_base) return std::make_shared<TensorFile>(path);
    const std::lock_guard lock(mutex_);
    auto& kept = base_[file.path];
    if (!kept) kept = std::make_shared<TensorFile>(path);
    return kept;
}

}  // namespace lorafuse

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

std::vector<Port> Bundle::inputs(const TaskRecord& task) const {
    std::vector<Port> ports;
    for (const PortRecord& port : graph(task).inputs) {
        const std::optional<DType> dtype = dtype_named(port.dtype);
        if (!dtype) {
            throw Error(path_.string() + ": task '" + task.name + "' takes " + in_quotes(port.dtype) + " as " +
                        in_quotes(port.name) + ", a dtype that there is not; export the task again");
        }
        ports.push_back({port.name, *dtype, port.shape});
    }
    return ports;
}

std::string Bundle::model(const TaskRecord& task) const {
    const MappedFile file(checked(task.model));
    return {reinterpret_cast<const char*>(file.data()), file.size()};
}

Weights Bundle::base_weights(const TaskRecord& task) const {
    Weights base = opened(manifest_.base_weights, task);
    for (const auto& [name, own] : own_weights(task).tensors) {  // a head of another size is another graph's
        const auto found = base.tensors.find(name);
        if (found != base.tensors.end() && found->second.shape != own.shape) base.tensors.erase(found);
    }
    return base;
}

Weights Bundle::own_weights(const TaskRecord& task) const {
    return task.weights ? opened({*task.weights}, task) : Weights{};
}

std::string Bundle::weights_sha256(const TaskRecord* task) const {
    std::string told = manifest_.base_sha256 + " " + manifest_.precision;
    if (task != nullptr) told += (task->weights ? " " + task->weights->sha256 : "") + " " + task->adapter_sha256;
    return sha256(told.data(), told.size());
}

std::set<std::string> Bundle::own_names(const TaskRecord& task) const {
    std::set<std::string> names;
    if (!task.weights) return names;
    const TensorFile file(present(*task.weights));
    for (const auto& [name, key] : graph(task).weights) {
        if (file.tensors().count(key) != 0) names.insert(name);
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

Weights Bundle::opened(const std::vector<File>& files, const TaskRecord& task) const {
    Weights weights;
    for (const File& file : files) {
        weights.files.push_back(mapped(file));
        const auto& tensors = weights.files.back()->tensors();
        for (const auto& [name, key] : graph(task).weights) {
            if (const auto found = tensors.find(key); found != tensors.end()) weights.tensors[name] = found->second;
        }
    }
    return weights;
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

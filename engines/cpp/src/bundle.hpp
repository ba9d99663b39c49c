// An opened bundle: its files are compared with the manifest before they are read.
#pragma once

#include <ctime>
#include <map>
#include <memory>
#include <mutex>
#include <set>
#include <string>
#include <sys/types.h>
#include <tuple>
#include <vector>

#include "manifest.hpp"
#include "safetensors.hpp"

namespace lorafuse {

// A graph's parameters by name, in files that stay mapped while this object lives.
struct Weights {
    std::vector<std::shared_ptr<const TensorFile>> files;
    std::map<std::string, TensorView> tensors;
};

class Bundle {
public:
    explicit Bundle(const std::filesystem::path& path) : path_(tidy(path)), manifest_(read_manifest(path_)) {}

    const std::filesystem::path& path() const { return path_; }
    const Manifest& manifest() const { return manifest_; }

    // Throws Error listing the tasks there are.
    const TaskRecord& task(const std::string& name) const;
    const Graph& graph(const TaskRecord& task) const { return manifest_.graphs.at(task.graph); }

    // What the task's graph takes. Throws Error where that is of a dtype that engines don't have.
    std::vector<Port> inputs(const TaskRecord& task) const;

    // The task's ONNX graph, and the parameters that are the base's and the task's own, after the files' hashes were
    // compared. A base's own head is not among them where the task brought one of another size.
    std::string model(const TaskRecord& task) const;
    Weights base_weights(const TaskRecord& task) const;
    Weights own_weights(const TaskRecord& task) const;

    // What an engine's weights are told by: the base, and what the task adds (none: nothing).
    std::string weights_sha256(const TaskRecord* task) const;

    // The file's path, after its size and SHA-256 were compared. Throws Error when they differ or it is missing.
    std::filesystem::path checked(const File& file) const;

    // The names of `own_weights`, from the file's header alone: nothing is hashed, for no value is read.
    std::set<std::string> own_names(const TaskRecord& task) const;

private:
    using State = std::tuple<ino_t, off_t, time_t, long>;

    std::filesystem::path present(const File& file) const;
    Weights opened(const std::vector<File>& files, const TaskRecord& task) const;
    std::shared_ptr<const TensorFile> mapped(const File& file) const;

    std::filesystem::path path_;
    Manifest manifest_;
    mutable std::mutex mutex_;
    mutable std::map<std::string, State> seen_;  // the state of each file whose hash was compared, by its path
    mutable std::map<std::string, std::shared_ptr<const TensorFile>> base_;  // mapped once, for every task
};

}  // namespace lorafuse

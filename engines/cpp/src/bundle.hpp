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
#include "manifest_checks.hpp"
#include "safetensors.hpp"

namespace lorafuse {

// A graph's parameters by name, in files that stay mapped while this object lives.
struct Weights {
    std::vector<std::shared_ptr<const TensorFile>> files;
    std::map<std::string, TensorView> tensors;
};

// A part of a task, with its graph: what is recorded of it. The bundle must outlive it.
struct TaskPart {
    const TaskRecord& task;
    const PartRecord& part;
    const Graph& graph;

    const std::string& role() const { return graph.part; }
};

class Bundle {
public:
    explicit Bundle(const std::filesystem::path& path) : path_(tidy(path)), manifest_(read_manifest(path_)) {}

    const std::filesystem::path& path() const { return path_; }
    const Manifest& manifest() const { return manifest_; }

    // Each throws Error listing the tasks, or the task's parts, that there are.
    const TaskRecord& task(const std::string& name) const;
    TaskPart part(const TaskRecord& task, const std::string& role) const;

    // All parts of a task, in the order of their roles.
    std::vector<TaskPart> parts(const TaskRecord& task) const;

    // What the part's graph takes. Throws Error where that is of a dtype that engines don't have.
    std::vector<Port> inputs(const TaskPart& part) const;

    // The part's ONNX graph, and the parameters that are the task's own and the base's, after the files' hashes were
    // compared. Throws Error where a tensor has another shape or dtype than the graph reads; but a base's own head may
    // have another size than the task's `own`, and is then not among the base's.
    std::string model(const TaskPart& part) const;
    Weights own_weights(const TaskPart& part) const;
    Weights base_weights(const TaskPart& part, const Weights& own) const;

    // Identifies the weights that an engine was built from: the base's, and with `adapted` those that the task adds.
    std::string weights_sha256(const TaskPart& part, bool adapted) const;

    // The file's path, after its size and SHA-256 were compared. Throws Error when they differ or it is missing.
    std::filesystem::path checked(const File& file) const;

    // The names of `own_weights`, from the file's header alone: nothing is hashed, for no value is read.
    std::set<std::string> own_names(const TaskPart& part) const;

private:
    using State = std::tuple<ino_t, off_t, time_t, long>;

    std::filesystem::path present(const File& file) const;
    std::shared_ptr<const TensorFile> mapped(const File& file) const;

    std::filesystem::path path_;
    Manifest manifest_;
    mutable std::mutex mutex_;
    mutable std::map<std::string, State> seen_;  // the state of each file whose hash was compared, by its path
    mutable std::map<std::string, std::shared_ptr<const TensorFile>> base_;  // mapped once, for every task
};

}  // namespace lorafuse

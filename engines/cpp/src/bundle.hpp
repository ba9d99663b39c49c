// An opened bundle: its manifest, and its files, which are compared with it before they are read.
#pragma once

#include <memory>
#include <string>
#include <vector>

#include "manifest.hpp"
#include "manifest_checks.hpp"
#include "verified_files.hpp"

namespace lorafuse {

// A part of a task, with its graph: what is recorded of it. The bundle must outlive it.
struct TaskPart {
    const TaskRecord& task;
    const PartRecord& part;
    const Graph& graph;

    const std::string& role() const { return graph.part; }
};

class Bundle {
public:
    // `digest` pins the bundle; empty: any. `files` are those of the same bundle, opened earlier. Throws Error as
    // `read_manifest` does.
    explicit Bundle(const std::filesystem::path& path, const std::string& digest = "",
                    std::shared_ptr<VerifiedFiles> files = nullptr);

    const std::filesystem::path& path() const { return path_; }
    const Manifest& manifest() const { return manifest_; }
    const std::shared_ptr<VerifiedFiles>& files() const { return files_; }

    // Each throws Error listing the tasks, or the task's parts, that there are.
    const TaskRecord& task(const std::string& name) const;
    TaskPart part(const TaskRecord& task, const std::string& role) const;

    // All parts of a task, in the order of their roles.
    std::vector<TaskPart> parts(const TaskRecord& task) const;

    // What the part's graph takes. Throws Error where that is of a dtype that engines don't have.
    std::vector<Port> inputs(const TaskPart& part) const;

    // Identifies the weights that an engine was built from: the base's, and with `adapted` those that the task adds.
    std::string weights_sha256(const TaskPart& part, bool adapted) const;

private:
    std::filesystem::path path_;
    Manifest manifest_;
    std::shared_ptr<VerifiedFiles> files_;
};

}  // namespace lorafuse

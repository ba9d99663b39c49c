// A part of a task, opened: its tensors and its graph, each read from the bytes that were compared with their hash.
#pragma once

#include <memory>
#include <set>
#include <string>

#include "bundle.hpp"
#include "linked.hpp"
#include "onnxruntime.hpp"

namespace lorafuse {

// The names of the tensors that the bundle stores for the task, from the file's header alone: nothing is hashed, for no
// value is read.
std::set<std::string> own_names(const Bundle& bundle, const TaskPart& part);

// Its files are opened when they are first asked for: every method throws Error where one is damaged, or holds a tensor
// that the weight map does not claim. The bundle must outlive it; what it makes keeps the files mapped by itself.
class OpenedPart {
public:
    OpenedPart(const Bundle& bundle, const TaskPart& part);

    const TaskPart& part() const { return part_; }
    const TensorFiles& files();
    const Tensors& own();  // the task's own tensors, by parameter

    // Each parameter's value: the task's where it changes it, else the base's; without `adapted`, the other way round.
    Tensors chosen(const std::set<std::string>& names, bool adapted);

    // What the ONNX file computes, whatever the weights (GraphFile::skeleton). Throws Error where it does not fit the
    // weight map and the files.
    const std::string& skeleton();

    // A session of this part alone; without `adapted`, of the base under the task's head. Throws as `skeleton` does.
    Model dedicated_model(bool adapted);

    // A session of all the tasks of the graph, which takes the weights in `exchanged` with each run.
    Model resident_model(const std::set<std::string>& exchanged);

private:
    const GraphFile& graph();
    Model model(const std::set<std::string>& changed, const GraphFile& checked);

    const Bundle& bundle_;
    TaskPart part_;
    TensorFiles files_;  // the base's, then the task's own
    Tensors base_, own_;
    std::filesystem::path graph_path_;
    std::shared_ptr<const MappedFile> graph_content_;
    GraphFile graph_;
};

}  // namespace lorafuse

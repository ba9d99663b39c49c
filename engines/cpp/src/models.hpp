// What the sessions of a bundle are made of: which weights come from where.
#pragma once

#include <set>
#include <string>

#include "bundle.hpp"
#include "onnxruntime.hpp"

namespace lorafuse {

// A task's weights, as the bundle stores them.
struct Stored {
    Stored(const Bundle& bundle, const TaskRecord& of)
        : task(of), base(bundle.base_weights(of)), own(bundle.own_weights(of)) {}

    const TaskRecord& task;
    Weights base, own;
};

// A session of one task; without `adapted`, of the base under the task's head.
Model dedicated_model(const Bundle& bundle, const Stored& stored, bool adapted);

// A session of all the tasks of a graph, which takes the weights in `exchanged` with each run.
Model resident_model(const Bundle& bundle, const Stored& stored, const std::set<std::string>& exchanged);

// Each parameter's value: the task's where it changes it, else the base's; without `adapted`, the other way round.
Tensors chosen(const Bundle& bundle, const Stored& stored, const std::set<std::string>& names, bool adapted);

}  // namespace lorafuse

// What the sessions of a bundle are made of: which weights come from where.
#pragma once

#include <set>
#include <string>

#include "bundle.hpp"
#include "onnxruntime.hpp"

namespace lorafuse {

// The weights of a part of a task, as the bundle stores them.
struct Stored {
    Stored(const Bundle& bundle, const TaskPart& of)
        : part(of), own(bundle.own_weights(of)), base(bundle.base_weights(of, own)) {}

    TaskPart part;
    Weights own, base;
};

// A session of one task's part; without `adapted`, of the base under the task's head.
Model dedicated_model(const Bundle& bundle, const Stored& stored, bool adapted);

// A session of all the tasks of a graph, which takes the weights in `exchanged` with each run.
Model resident_model(const Bundle& bundle, const Stored& stored, const std::set<std::string>& exchanged);

// Each parameter's value: the task's where it changes it, else the base's; without `adapted`, the other way round.
Tensors chosen(const Bundle& bundle, const Stored& stored, const std::set<std::string>& names, bool adapted);

}  // namespace lorafuse

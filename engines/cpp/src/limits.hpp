// Inputs are looked at before an engine is: token ids, masks and lengths that a graph would answer, wrongly or in its
// library's words. See engines/serving/checked.py.
#pragma once

#include <cstdint>
#include <optional>
#include <string>
#include <utility>

#include "bundle.hpp"

namespace lorafuse {

// What a graph's inputs may be: ids below `vocabulary`, at most `longest` tokens with those of the past (each 0 where
// there is no limit).
class Limits {
public:
    Limits(const Bundle& bundle, const TaskPart& part);

    // Throws Error naming the input and the value, or where an input's bytes are not what its shape says. What is
    // missing, or of another dtype or rank, is the engine's to refuse.
    void check(const Inputs& inputs) const;

private:
    void check_length(const std::string& name, const TensorView& ids, const Inputs& inputs, bool has_past) const;
    std::int64_t past_of(const Inputs& inputs) const;

    std::int64_t vocabulary_, longest_;
    std::optional<std::pair<std::string, std::size_t>> past_;  // an input with the cache's axis, and which axis it is
};

}  // namespace lorafuse

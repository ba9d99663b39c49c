// The inputs of a run, held against what an engine takes.
#pragma once

#include <map>
#include <optional>
#include <string>

#include "lorafuse/runtime.hpp"

namespace lorafuse {

struct Takes {
    DType dtype;
    std::size_t rank;
};

// Throws Error where an input's bytes are not what its shape says: read by its shape alone, it would be cut.
void check_sizes(const Inputs& inputs);

// What is wrong with the inputs' names, dtypes and ranks; nothing where they fit.
std::optional<std::string> misfit(const Inputs& inputs, const std::map<std::string, Takes>& takes);

}  // namespace lorafuse

#include "inputs.hpp"

#include <algorithm>

#include "dtype.hpp"

namespace lorafuse {
namespace {

// As Python shows a list of strings.
template <typename Names>
std::string listed(const Names& names) {
    std::string text;
    for (const auto& [name, _] : names) text += (text.empty() ? "'" : ", '") + name + "'";
    return "[" + text + "]";
}

std::string described(DType dtype, std::size_t rank) {
    return std::string(name_of(dtype)) + " of rank " + std::to_string(rank);
}

}  // namespace

void check_sizes(const Inputs& inputs) {
    for (const auto& [name, tensor] : inputs) {
        const std::optional<std::uint64_t> bytes = bytes_of(tensor.shape, tensor.dtype);
        if (bytes && *bytes != tensor.bytes) {
            throw Error("input '" + name + "' has " + std::to_string(tensor.bytes) + " bytes; its shape takes " +
                        std::to_string(*bytes));
        }
    }
}

std::optional<std::string> misfit(const Inputs& inputs, const std::map<std::string, Takes>& takes) {
    const auto same_name = [](const auto& one, const auto& two) { return one.first == two.first; };
    if (inputs.size() != takes.size() || !std::equal(inputs.begin(), inputs.end(), takes.begin(), same_name)) {
        return "inputs " + listed(inputs) + " given; this engine takes exactly " + listed(takes);
    }
    for (const auto& [name, wanted] : takes) {
        const TensorView& given = inputs.at(name);
        if (given.dtype != wanted.dtype || given.shape.size() != wanted.rank) {
            return "input '" + name + "' is " + described(given.dtype, given.shape.size()) + "; expected " +
                   described(wanted.dtype, wanted.rank);
        }
    }
    return std::nullopt;
}

}  // namespace lorafuse

#include "limits.hpp"

#include <algorithm>
#include <cstring>

#include "dtype.hpp"
#include "inputs.hpp"

namespace lorafuse {
namespace {

constexpr const char* kIds[] = {"input_ids", "decoder_input_ids"};
constexpr const char* kMask = "attention_mask";
constexpr const char* kPast = "past_sequence";  // the axis of a decoder's cache

struct Extremes {
    std::int64_t lowest, highest;
};

// The elements need not be aligned.
template <typename T>
Extremes extremes_of(const TensorView& tensor) {
    const auto at = [&](std::size_t i) {
        T value;
        std::memcpy(&value, static_cast<const char*>(tensor.data) + i * sizeof(T), sizeof(T));
        return value;
    };
    T lowest = at(0), highest = at(0);
    for (std::size_t i = 1; i < tensor.bytes / sizeof(T); ++i) {
        lowest = std::min(lowest, at(i));
        highest = std::max(highest, at(i));
    }
    return {lowest, highest};
}

// Of whole numbers with a sign that lie somewhere; nothing of other tensors, and of empty ones.
std::optional<Extremes> extremes_in(const TensorView& tensor) {
    if (tensor.data == nullptr || tensor.bytes == 0) return std::nullopt;
    switch (tensor.dtype) {
        case DType::int64: return extremes_of<std::int64_t>(tensor);
        case DType::int32: return extremes_of<std::int32_t>(tensor);
        case DType::int16: return extremes_of<std::int16_t>(tensor);
        case DType::int8: return extremes_of<std::int8_t>(tensor);
        default: return std::nullopt;
    }
}

bool is_signed(DType dtype) {
    return dtype == DType::int64 || dtype == DType::int32 || dtype == DType::int16 || dtype == DType::int8;
}

// Throws Error unless the values are 0 to `end` - 1; an `end` of 0 is none.
void check_range(const std::string& name, const TensorView& values, std::int64_t end) {
    const std::optional<Extremes> found = extremes_in(values);
    if (!found || (found->lowest >= 0 && (end <= 0 || found->highest < end))) return;
    throw Error("input '" + name + "' holds " + std::to_string(found->lowest < 0 ? found->lowest : found->highest) +
                "; expected " + (end != 0 ? "0 to " + std::to_string(end - 1) : "0 or more"));
}

const TensorView* input_of(const Inputs& inputs, const std::string& name) {
    const auto found = inputs.find(name);
    return found == inputs.end() ? nullptr : &found->second;
}

std::string shown(std::int64_t rows, std::int64_t length) {
    return "[" + std::to_string(rows) + ", " + std::to_string(length) + "]";
}

}  // namespace

Limits::Limits(const Bundle& bundle, const TaskPart& part)
    : vocabulary_(bundle.manifest().vocabulary), longest_(bundle.manifest().longest) {
    for (const PortRecord& port : part.graph.inputs) {
        const auto axis = std::find_if(port.shape.begin(), port.shape.end(), [](const auto& size) {
            const auto* name = std::get_if<std::string>(&size);
            return name != nullptr && *name == kPast;
        });
        if (axis == port.shape.end()) continue;
        past_ = {port.name, static_cast<std::size_t>(axis - port.shape.begin())};
        return;
    }
}

void Limits::check(const Inputs& inputs) const {
    check_sizes(inputs);
    for (const char* name : kIds) {
        const TensorView* ids = input_of(inputs, name);
        if (ids == nullptr || !is_signed(ids->dtype) || ids->shape.size() != 2) continue;
        check_range(name, *ids, vocabulary_);
        check_length(name, *ids, inputs, /*has_past=*/name == kIds[0]);
    }
    if (const TensorView* positions = input_of(inputs, "position_ids"))
        check_range("position_ids", *positions, longest_);
    if (const TensorView* types = input_of(inputs, "token_type_ids")) check_range("token_type_ids", *types, 0);
}

std::int64_t Limits::past_of(const Inputs& inputs) const {
    const TensorView* cache = past_ ? input_of(inputs, past_->first) : nullptr;
    return cache != nullptr && cache->shape.size() > past_->second ? cache->shape[past_->second] : 0;
}

// A decoder's own ids have neither the cache's past nor the mask, which are the encoder's.
void Limits::check_length(const std::string& name, const TensorView& ids, const Inputs& inputs, bool has_past) const {
    const std::int64_t rows = ids.shape[0], past = has_past ? past_of(inputs) : 0, length = past + ids.shape[1];
    if (longest_ > 0 && length > longest_) {
        throw Error("input '" + name + "' makes " + std::to_string(length) + " tokens a row; expected at most " +
                    std::to_string(longest_));
    }
    const TensorView* mask = has_past ? input_of(inputs, kMask) : nullptr;
    if (mask == nullptr || mask->shape.size() != 2 || mask->shape == std::vector<std::int64_t>{rows, length}) return;
    throw Error(std::string("input '") + kMask + "' is of shape " + shown(mask->shape[0], mask->shape[1]) +
                "; expected " + shown(rows, length) + ", as long as '" + name + "'" +
                (past != 0 ? " with the past" : ""));
}

}  // namespace lorafuse

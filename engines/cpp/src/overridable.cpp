#include "overridable.hpp"

#include <cstdint>

#include "dtype.hpp"

namespace lorafuse {
namespace {

// onnx.proto3: the numbers of the fields on the way from a model to an input's dimension.
constexpr std::uint64_t kModelGraph = 7, kGraphInput = 11, kValueName = 1, kValueType = 2, kTypeTensor = 1,
                        kTensorElement = 1, kTensorShape = 2, kShapeDimension = 1, kDimensionValue = 1;

// Seven bits a byte, the lowest first; all but the last byte have the highest bit set.
std::string varint(std::uint64_t value) {
    std::string encoded;
    for (; value > 0x7f; value >>= 7) encoded += static_cast<char>((value & 0x7f) | 0x80);
    return encoded += static_cast<char>(value);
}

std::string message(std::uint64_t field, const std::string& content) {
    return varint(field << 3 | 2) + varint(content.size()) + content;
}

std::string number(std::uint64_t field, std::uint64_t value) { return varint(field << 3) + varint(value); }

std::string input_of(const std::string& name, const TensorView& tensor) {
    std::string dimensions;
    for (const std::int64_t size : tensor.shape) {
        dimensions += message(kShapeDimension, number(kDimensionValue, static_cast<std::uint64_t>(size)));
    }
    const auto element = static_cast<std::uint64_t>(names_of(tensor.dtype).element);
    const std::string described = number(kTensorElement, element) + message(kTensorShape, dimensions);
    return message(kValueName, name) + message(kValueType, message(kTypeTensor, described));
}

}  // namespace

// A message that comes twice is merged field by field
// (https://protobuf.dev/programming-guides/encoding/#last-one-wins).
std::string overridable(const std::string& model, const std::map<std::string, TensorView>& values) {
    std::string inputs;
    for (const auto& [name, tensor] : values) inputs += message(kGraphInput, input_of(name, tensor));
    return model + message(kModelGraph, inputs);
}

}  // namespace lorafuse

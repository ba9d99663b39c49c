// What each dtype is called: in the manifest (numpy's names), in safetensors, in ONNX Runtime, in overridable.cpp's
// protobuf.
#pragma once

#include <cstddef>
#include <cstdint>
#include <optional>
#include <string_view>
#include <vector>

#include "lorafuse/runtime.hpp"

namespace lorafuse {

struct DTypeNames {
    DType dtype;
    const char* name;
    std::size_t size;
    const char* safetensors;
    int element;  // ONNXTensorElementDataType, whose numbers are those of TensorProto.DataType
};

const DTypeNames& names_of(DType dtype);
std::optional<DType> dtype_named(std::string_view name);
std::optional<DType> dtype_in_safetensors(std::string_view code);
std::optional<DType> dtype_of_element(int element);

// The bytes that a shape takes, or nothing where they can't be counted.
std::optional<std::uint64_t> bytes_of(const std::vector<std::int64_t>& shape, DType dtype);

}  // namespace lorafuse

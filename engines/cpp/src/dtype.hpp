// What each dtype is called: in the manifest (numpy's names), in safetensors, in ONNX Runtime, in overridable.cpp's protobuf.
#pragma once

#include <cstddef>
#include <optional>
#include <string_view>

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

}  // namespace lorafuse

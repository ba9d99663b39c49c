#include "dtype.hpp"

#include <algorithm>
#include <array>

namespace lorafuse {
namespace {

constexpr std::array<DTypeNames, 13> kDTypes = {{{DType::float32, "float32", 4, "F32", 1},
                                                 {DType::float16, "float16", 2, "F16", 10},
                                                 {DType::bfloat16, "bfloat16", 2, "BF16", 16},
                                                 {DType::float64, "float64", 8, "F64", 11},
                                                 {DType::int64, "int64", 8, "I64", 7},
                                                 {DType::int32, "int32", 4, "I32", 6},
                                                 {DType::int16, "int16", 2, "I16", 5},
                                                 {DType::int8, "int8", 1, "I8", 3},
                                                 {DType::uint8, "uint8", 1, "U8", 2},
                                                 {DType::boolean, "bool", 1, "BOOL", 9},
                                                 {DType::uint16, "uint16", 2, "U16", 4},
                                                 {DType::uint32, "uint32", 4, "U32", 12},
                                                 {DType::uint64, "uint64", 8, "U64", 13}}};

template <typename Matches>
std::optional<DType> found(Matches matches) {
    const auto it = std::find_if(kDTypes.begin(), kDTypes.end(), matches);
    return it == kDTypes.end() ? std::nullopt : std::optional(it->dtype);
}

}  // namespace

const DTypeNames& names_of(DType dtype) {
    const auto it =
        std::find_if(kDTypes.begin(), kDTypes.end(), [&](const DTypeNames& known) { return known.dtype == dtype; });
    if (it == kDTypes.end()) {
        throw Error("unknown dtype " + std::to_string(static_cast<int>(dtype)) + "; expected one of lorafuse::DType");
    }
    return *it;
}

const char* name_of(DType dtype) { return names_of(dtype).name; }

std::size_t size_of(DType dtype) { return names_of(dtype).size; }

std::optional<DType> dtype_named(std::string_view name) {
    return found([&](const DTypeNames& known) { return known.name == name; });
}

std::optional<DType> dtype_in_safetensors(std::string_view code) {
    return found([&](const DTypeNames& known) { return known.safetensors == code; });
}

std::optional<DType> dtype_of_element(int element) {
    return found([&](const DTypeNames& known) { return known.element == element; });
}

std::optional<std::uint64_t> bytes_of(const std::vector<std::int64_t>& shape, DType dtype) {
    std::uint64_t bytes = size_of(dtype);
    for (const std::int64_t size : shape) {
        if (size < 0 || __builtin_mul_overflow(bytes, static_cast<std::uint64_t>(size), &bytes)) return std::nullopt;
    }
    return bytes;
}

}  // namespace lorafuse

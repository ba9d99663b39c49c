// An ONNX model whose weights can be given with every run: initializers that are inputs too.
#pragma once

#include <map>
#include <string>

#include "lorafuse/runtime.hpp"

namespace lorafuse {

// `model`, serialized, with the initializers that `values` name as inputs of their dtypes and shapes. See
// engines/serving/overridable.py.
std::string overridable(const std::string& model, const std::map<std::string, TensorView>& values);

}  // namespace lorafuse

// A safetensors file (https://github.com/huggingface/safetensors#format): eight bytes of header size, a JSON header,
// then the tensors' bytes without gaps. Its header is checked as a stranger's.
#pragma once

#include <map>
#include <string>

#include "lorafuse/runtime.hpp"
#include "mapped_file.hpp"

namespace lorafuse {

class TensorFile {
public:
    // Throws Error when the file is missing, is not safetensors, is truncated, or holds a dtype that engines don't
    // take.
    explicit TensorFile(const std::filesystem::path& path);

    // The tensors by name. They lie in the file's mapping, and live as long as this object.
    const std::map<std::string, TensorView>& tensors() const { return tensors_; }

private:
    MappedFile file_;
    std::map<std::string, TensorView> tensors_;
};

}  // namespace lorafuse

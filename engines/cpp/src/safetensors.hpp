// A safetensors file (https://github.com/huggingface/safetensors#format): eight bytes of header size, a JSON header,
// then the tensors' bytes without gaps. Its header is checked as a stranger's.
#pragma once

#include <filesystem>
#include <map>
#include <memory>
#include <string>

#include "lorafuse/runtime.hpp"
#include "mapped_file.hpp"

namespace lorafuse {

class TensorFile {
public:
    // Of a file that is mapped; `path` is for messages. Throws Error when it is not safetensors, is truncated, or holds
    // a dtype that engines don't take.
    TensorFile(std::filesystem::path path, std::shared_ptr<const MappedFile> file);

    const std::filesystem::path& path() const { return path_; }

    // The tensors by name. They lie in the file's mapping, and live as long as this object.
    const std::map<std::string, TensorView>& tensors() const { return tensors_; }

    const MappedFile& content() const { return *file_; }

    // Where one of them lies, in bytes from the file's start.
    std::uint64_t offset_of(const TensorView& tensor) const {
        return static_cast<std::uint64_t>(static_cast<const std::byte*>(tensor.data) - file_->data());
    }

private:
    void read();

    std::filesystem::path path_;
    std::shared_ptr<const MappedFile> file_;
    std::map<std::string, TensorView> tensors_;
};

}  // namespace lorafuse

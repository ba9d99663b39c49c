// A file, mapped read-only: its pages are the system's, shared with every process that maps it.
#pragma once

#include <cstddef>
#include <filesystem>

namespace lorafuse {

class MappedFile {
public:
    // Throws std::system_error when the file can't be opened or mapped.
    explicit MappedFile(const std::filesystem::path& path);
    ~MappedFile();
    MappedFile(const MappedFile&) = delete;
    MappedFile& operator=(const MappedFile&) = delete;

    const std::byte* data() const { return data_; }
    std::size_t size() const { return size_; }

private:
    const std::byte* data_ = nullptr;
    std::size_t size_ = 0;
};

}  // namespace lorafuse

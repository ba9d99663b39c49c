// A file, opened once and without following a link, and mapped read-only: what is hashed is what is read later, whoever
// renames another file into its place. Its pages are the system's, shared with every process that maps it.
//
// Truncating a mapped file ends the process that reads it (SIGBUS): the system has no other answer to a page that is
// gone.
#pragma once

#include <sys/types.h>

#include <cstddef>
#include <ctime>
#include <filesystem>
#include <string>
#include <tuple>

namespace lorafuse {

// Device, inode, size, and the time of change, which is the kernel's and no program sets.
using FileState = std::tuple<dev_t, ino_t, off_t, time_t, long>;

// A regular file below a folder. The folder itself may be a link; nothing on the way from it to the file is.
class OpenedFile {
public:
    // Throws std::system_error when the file is missing or no file, or a link is in the way.
    OpenedFile(const std::filesystem::path& folder, const std::filesystem::path& relative);
    ~OpenedFile();
    OpenedFile(const OpenedFile&) = delete;
    OpenedFile& operator=(const OpenedFile&) = delete;

    int descriptor() const { return descriptor_; }
    const FileState& state() const { return state_; }
    std::size_t size() const { return static_cast<std::size_t>(std::get<2>(state_)); }
    time_t changed() const { return std::get<3>(state_); }  // in seconds

private:
    int descriptor_;
    FileState state_;
};

class MappedFile {
public:
    // The mapping lives on when the file is closed. Throws std::system_error when it can't be mapped.
    explicit MappedFile(const OpenedFile& file);
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

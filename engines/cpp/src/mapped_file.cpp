#include "mapped_file.hpp"

#include <fcntl.h>
#include <sys/mman.h>
#include <sys/stat.h>
#include <unistd.h>

#include <cerrno>
#include <memory>
#include <system_error>

namespace lorafuse {
namespace {

struct Descriptor {
    int value;
    ~Descriptor() {
        if (value >= 0) ::close(value);
    }
};

[[noreturn]] void refuse() { throw std::system_error(errno, std::generic_category()); }

}  // namespace

MappedFile::MappedFile(const std::filesystem::path& path) {
    const Descriptor file{::open(path.c_str(), O_RDONLY | O_CLOEXEC)};
    if (file.value < 0) refuse();
    struct stat found{};
    if (::fstat(file.value, &found) != 0) refuse();
    size_ = static_cast<std::size_t>(found.st_size);
    if (size_ == 0) return;  // an empty range can't be mapped
    void* mapped = ::mmap(nullptr, size_, PROT_READ, MAP_SHARED, file.value, 0);
    if (mapped == MAP_FAILED) refuse();
    data_ = static_cast<const std::byte*>(mapped);
}

MappedFile::~MappedFile() {
    if (data_ != nullptr) ::munmap(const_cast<std::byte*>(data_), size_);
}

}  // namespace lorafuse

#include "mapped_file.hpp"

#include <fcntl.h>
#include <sys/mman.h>
#include <sys/stat.h>
#include <unistd.h>

#include <cerrno>
#include <system_error>
#include <utility>

namespace lorafuse {
namespace {

namespace fs = std::filesystem;

constexpr int kFolder = O_RDONLY | O_DIRECTORY | O_CLOEXEC;
constexpr int kFile = O_RDONLY | O_NOFOLLOW | O_NONBLOCK | O_CLOEXEC;  // non-blocking: a pipe would wait for its writer

[[noreturn]] void refuse(int error) { throw std::system_error(error, std::generic_category()); }

// A descriptor, closed at the end unless it is taken.
class Descriptor {
public:
    explicit Descriptor(int value) : value_(value) {
        if (value < 0) refuse(errno);
    }
    Descriptor(Descriptor&& other) noexcept : value_(std::exchange(other.value_, -1)) {}
    Descriptor& operator=(Descriptor&& other) noexcept {
        std::swap(value_, other.value_);
        return *this;
    }
    ~Descriptor() {
        if (value_ >= 0) ::close(value_);
    }

    int get() const { return value_; }
    int taken() { return std::exchange(value_, -1); }

private:
    int value_;
};

// Step by step: a link in the place of a folder would be followed by one long path.
Descriptor descended(const fs::path& folder, const fs::path& relative) {
    Descriptor place(::open(folder.c_str(), kFolder));
    for (const fs::path& part : relative.parent_path()) {
        if (part.empty() || part == ".") continue;
        place = Descriptor(::openat(place.get(), part.c_str(), kFolder | O_NOFOLLOW));
    }
    return Descriptor(::openat(place.get(), relative.filename().c_str(), kFile));
}

struct stat stat_of(int descriptor) {
    struct stat found{};
    if (::fstat(descriptor, &found) != 0) refuse(errno);
    if (!S_ISREG(found.st_mode)) refuse(ENOENT);
    return found;
}

}  // namespace

OpenedFile::OpenedFile(const fs::path& folder, const fs::path& relative) {
    Descriptor file = descended(folder, relative);
    const struct stat found = stat_of(file.get());
    state_ = {found.st_dev, found.st_ino, found.st_size, found.st_ctim.tv_sec, found.st_ctim.tv_nsec};
    descriptor_ = file.taken();
}

OpenedFile::~OpenedFile() { ::close(descriptor_); }

MappedFile::MappedFile(const OpenedFile& file) : size_(file.size()) {
    if (size_ == 0) return;  // an empty range can't be mapped
    void* mapped = ::mmap(nullptr, size_, PROT_READ, MAP_SHARED, file.descriptor(), 0);
    if (mapped == MAP_FAILED) refuse(errno);
    data_ = static_cast<const std::byte*>(mapped);
}

MappedFile::~MappedFile() {
    if (data_ != nullptr) ::munmap(const_cast<std::byte*>(data_), size_);
}

}  // namespace lorafuse

#include "verified_files.hpp"

#include <cerrno>
#include <iterator>
#include <system_error>

#include "manifest_checks.hpp"
#include "sha256.hpp"

namespace lorafuse {
namespace {

namespace fs = std::filesystem;

// Seconds: a file that changes twice within a step of its file system's clock may show one time for both.
constexpr time_t kClockStep = 2;

[[noreturn]] void refuse(const fs::path& path, const std::string& what) {
    throw Damaged(path.string() + ": " + what + "; export the task again");
}

// What the system says of a file that is not there as a file: no entry, a folder on the way that is none, a link, a
// folder or a socket in its place.
bool is_absent(int error) {
    return error == ENOENT || error == ENOTDIR || error == ELOOP || error == EISDIR || error == ENXIO;
}

// What `read` gives, or Damaged where the system refuses.
template <typename Read>
auto reading(const fs::path& path, Read read) {
    try {
        return read();
    } catch (const std::system_error& error) {
        if (is_absent(error.code().value())) refuse(path, "missing from the bundle");
        refuse(path, "can't be read (" + error.code().message() + ")");
    }
}

void check_size(const fs::path& path, const File& file, const OpenedFile& opened) {
    if (static_cast<std::int64_t>(opened.size()) == file.size) return;
    refuse(path, std::to_string(opened.size()) + " bytes, but the manifest says " + std::to_string(file.size));
}

}  // namespace

fs::path VerifiedFiles::path_of(const File& file) const { return tidy(folder_ / file.path); }

std::shared_ptr<const MappedFile> VerifiedFiles::described(const File& file) const {
    return reading(path_of(file), [&] {
        const OpenedFile opened(folder_, tidy(file.path));
        check_size(path_of(file), file, opened);
        return std::make_shared<const MappedFile>(opened);
    });
}

std::shared_ptr<const MappedFile> VerifiedFiles::mapped(const File& file) {
    return reading(path_of(file), [&] {
        const OpenedFile opened(folder_, tidy(file.path));
        check_size(path_of(file), file, opened);
        return compared(file, opened);
    });
}

std::shared_ptr<const MappedFile> VerifiedFiles::compared(const File& file, const OpenedFile& opened) {
    const Key key{file.path, file.size, file.sha256};
    bool known = false;
    {
        const std::lock_guard lock(mutex_);
        const auto seen = seen_.find(key);
        known = seen != seen_.end() && seen->second.state == opened.state();
        if (known) {
            if (auto held = seen->second.content.lock()) return held;
        }
    }
    const bool settled = ::time(nullptr) - opened.changed() > kClockStep;
    auto found = std::make_shared<const MappedFile>(opened);
    if (!known && sha256(found->data(), found->size()) != file.sha256)
        refuse(path_of(file), "content does not match the manifest's SHA-256");
    if (settled) {
        const std::lock_guard lock(mutex_);
        seen_[key] = {opened.state(), found};
    }
    return found;
}

void VerifiedFiles::forget_unmapped() {
    const std::lock_guard lock(mutex_);
    for (auto seen = seen_.begin(); seen != seen_.end();) {
        seen = seen->second.content.expired() ? seen_.erase(seen) : std::next(seen);
    }
}

}  // namespace lorafuse

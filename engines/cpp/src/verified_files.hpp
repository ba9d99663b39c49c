// The files that a manifest names, each compared with its size and hash through the mapping that is read later.
#pragma once

#include <filesystem>
#include <map>
#include <memory>
#include <mutex>
#include <string>
#include <tuple>

#include "manifest.hpp"
#include "mapped_file.hpp"

namespace lorafuse {

// A file is missing, or is not what the manifest says of it.
class Damaged : public Error {
public:
    using Error::Error;
};

// Every method may be called from any thread.
class VerifiedFiles {
public:
    explicit VerifiedFiles(std::filesystem::path folder) : folder_(std::move(folder)) {}

    // The file, mapped, after its size and SHA-256 were compared. Who has it in hand shares one mapping of it, and a
    // file that nobody touched is not hashed again. Throws Damaged when it is missing, a link, or another.
    std::shared_ptr<const MappedFile> mapped(const File& file);

    // The same for who reads no values: its size alone is compared.
    std::shared_ptr<const MappedFile> described(const File& file) const;

    // Where the file lies, for messages.
    std::filesystem::path path_of(const File& file) const;

    // Forget the states of files that nobody has mapped: there would be more of them with every change.
    void forget_unmapped();

private:
    using Key = std::tuple<std::string, std::int64_t, std::string>;
    struct Seen {
        FileState state;
        std::weak_ptr<const MappedFile> content;
    };

    std::shared_ptr<const MappedFile> compared(const File& file, const OpenedFile& opened);

    std::filesystem::path folder_;
    std::mutex mutex_;
    std::map<Key, Seen> seen_;  // what each file was when its hash was compared
};

}  // namespace lorafuse

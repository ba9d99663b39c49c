// What a manifest says goes together, and leads nowhere out of its bundle.
#pragma once

#include <filesystem>

#include "manifest.hpp"

namespace lorafuse {

// The path as Python shows it: without needless dots and slashes.
std::filesystem::path tidy(const std::filesystem::path& path);

// Each throws Error naming what does not fit: in the manifest, whose file `path` is, and among the files that it names.
void check_schema(const std::filesystem::path& path, std::int64_t schema);
void check_manifest(const std::filesystem::path& path, const Manifest& manifest);
void check_paths(const std::filesystem::path& path, const Files& files);

}  // namespace lorafuse

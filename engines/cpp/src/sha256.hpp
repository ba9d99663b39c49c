// SHA-256 (FIPS 180-4), in hex.
#pragma once

#include <cstddef>
#include <string>

namespace lorafuse {

// By the processor's own instructions where it has them.
std::string sha256(const void* data, std::size_t size);

// The same without them, six times as slow.
std::string sha256_portable(const void* data, std::size_t size);

}  // namespace lorafuse

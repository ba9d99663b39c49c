// SHA-256 (FIPS 180-4), in hex.
#pragma once

#include <cstddef>
#include <string>

namespace lorafuse {

std::string sha256(const void* data, std::size_t size);

}  // namespace lorafuse

#include "lorafuse/runtime.hpp"
#include "printable.hpp"

namespace lorafuse {

Error::Error(const std::string& message) : std::runtime_error(printable(message)) {}

}  // namespace lorafuse

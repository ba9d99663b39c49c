// What stands for TensorRT's loader in a library that was built without it.
#include "loader.hpp"

namespace lorafuse {

std::unique_ptr<Loader> tensorrt_loader(const Options&) {
    throw Error("this library was built without TensorRT; build it with TENSORRT_ROOT, as docs/cpp.md says");
}

}  // namespace lorafuse

// The CUDA device: whether there is one, and its stream and memory with an owner each.
#pragma once

#include <cuda_runtime_api.h>

#include <cstddef>

#include "plan.hpp"

namespace lorafuse {

// The first device. Throws Error where there is none; to be asked before TensorRT's runtime is made, which may crash
// without one.
Device first_device();

// Inside, the first device is this thread's, whatever the program has made it; afterwards it is as it was.
class OnFirstDevice {
public:
    OnFirstDevice();
    ~OnFirstDevice();
    OnFirstDevice(const OnFirstDevice&) = delete;
    OnFirstDevice& operator=(const OnFirstDevice&) = delete;

private:
    int before_ = 0;
};

// A stream of its own, so that tasks do not wait for each other.
class Stream {
public:
    Stream();
    ~Stream();
    Stream(const Stream&) = delete;
    Stream& operator=(const Stream&) = delete;
    cudaStream_t handle() const { return handle_; }
    void wait() const;

private:
    cudaStream_t handle_ = nullptr;
};

// As many bytes on the device as in pinned memory beside it, for copies that don't block.
class Buffer {
public:
    explicit Buffer(std::size_t size);
    ~Buffer();
    Buffer(const Buffer&) = delete;
    Buffer& operator=(const Buffer&) = delete;
    void* device() const { return device_; }
    void* pinned() const { return pinned_; }
    void to_device(std::size_t size, const Stream& stream) const;
    void to_host(std::size_t size, const Stream& stream) const;

private:
    void* device_ = nullptr;
    void* pinned_ = nullptr;
};

}  // namespace lorafuse

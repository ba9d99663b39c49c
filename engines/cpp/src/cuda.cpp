// API: https://docs.nvidia.com/cuda/cuda-runtime-api/
#include "cuda.hpp"

#include <algorithm>
#include <string>

namespace lorafuse {
namespace {

std::string words(cudaError_t status) {
    return "CUDA error " + std::to_string(static_cast<int>(status)) + ": " + cudaGetErrorString(status);
}

void check(cudaError_t status) {
    if (status != cudaSuccess) throw Error(words(status));
}

std::string without_device(cudaError_t status) {
    if (status == cudaErrorInsufficientDriver) return "no NVIDIA driver on this machine, or one that is too old";
    if (status == cudaErrorNoDevice) return "no CUDA device on this machine";
    return "CUDA finds no device";
}

int attribute(cudaDeviceAttr which) {
    int value = 0;
    check(cudaDeviceGetAttribute(&value, which, 0));
    return value;
}

}  // namespace

Device first_device() {
    int count = 0;
    cudaError_t status = cudaGetDeviceCount(&count);
    if (status == cudaSuccess && count == 0) status = cudaErrorNoDevice;
    if (status != cudaSuccess) throw Error(without_device(status) + " (" + words(status) + ")");
    cudaDeviceProp properties;
    check(cudaGetDeviceProperties(&properties, 0));
    return {properties.name, attribute(cudaDevAttrComputeCapabilityMajor),
            attribute(cudaDevAttrComputeCapabilityMinor)};
}

OnFirstDevice::OnFirstDevice() {
    check(cudaGetDevice(&before_));
    if (before_ != 0) check(cudaSetDevice(0));
}

OnFirstDevice::~OnFirstDevice() {
    if (before_ != 0) cudaSetDevice(before_);
}

Stream::Stream() { check(cudaStreamCreateWithFlags(&handle_, cudaStreamNonBlocking)); }

Stream::~Stream() { cudaStreamDestroy(handle_); }

void Stream::wait() const { check(cudaStreamSynchronize(handle_)); }

Buffer::Buffer(std::size_t size) {
    const std::size_t taken = std::max<std::size_t>(1, size);  // an empty tensor still wants an address
    check(cudaMalloc(&device_, taken));
    if (const cudaError_t status = cudaMallocHost(&pinned_, taken); status != cudaSuccess) {
        cudaFree(device_);
        check(status);
    }
}

Buffer::~Buffer() {
    cudaFree(device_);
    cudaFreeHost(pinned_);
}

void Buffer::to_device(std::size_t size, const Stream& stream) const {
    if (size > 0) check(cudaMemcpyAsync(device_, pinned_, size, cudaMemcpyHostToDevice, stream.handle()));
}

void Buffer::to_host(std::size_t size, const Stream& stream) const {
    if (size > 0) check(cudaMemcpyAsync(pinned_, device_, size, cudaMemcpyDeviceToHost, stream.handle()));
}

}  // namespace lorafuse

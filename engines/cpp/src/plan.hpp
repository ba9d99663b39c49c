// The plan that was built for a part of a task, and whether it may be used here.
#pragma once

#include <cstdint>
#include <filesystem>
#include <functional>
#include <memory>
#include <string>

#include "bundle.hpp"

namespace lorafuse {

// A CUDA device, with its compute capability.
struct Device {
    std::string name;
    int major, minor;
};

// A library that runs plans: the backend's name and version, and its device, which throws Error where there is none.
struct Library {
    std::string backend, version;
    std::function<Device()> device;
};

// Whether a plan for `target` runs on a device of this capability: "portable", "8.0+", "8.9" or "8.6, 8.9".
bool runs_on(const std::string& target, int major, int minor);

// The bytes of the part's own plan for this device, or without `adapted` of the unadapted graph's. Throws Error where
// there is none.
std::uint64_t plan_size(const Bundle& bundle, const TaskPart& part, bool adapted, const Library& library);

// A plan, mapped after its hash was compared.
struct PlanFile {
    std::filesystem::path path;
    std::shared_ptr<const MappedFile> content;
};

// The part's plan. Throws Error when it is damaged, of an earlier export, of another version, or for another device.
PlanFile plan_of(const Bundle& bundle, const TaskPart& part, bool adapted, const Library& library);

}  // namespace lorafuse

// The bundle's manifest, as docs/bundle.md and exporter/bundle/manifest.py have it; here as far as a runtime needs it,
// but checked whole.
#pragma once

#include <cstdint>
#include <filesystem>
#include <map>
#include <optional>
#include <string>
#include <variant>
#include <vector>

#include "lorafuse/runtime.hpp"

namespace lorafuse {

constexpr std::int64_t kSchema = 3;

struct File {
    std::string path;  // relative to the bundle
    std::int64_t size;
    std::string sha256;
};

// An input of a graph, whose dtype need not be one that engines take.
struct PortRecord {
    std::string name, dtype;
    std::vector<std::variant<std::int64_t, std::string>> shape;
};

// A built engine: of which backend and version, for which devices, from which graph and weights.
struct EngineRecord {
    std::string backend, version, target, model_sha256, weights_sha256, mode;
    std::optional<File> file;
};

using Engines = std::map<std::string, EngineRecord>;  // by backend

struct Head {
    std::string task_type;
    std::int64_t outputs;
};

struct Graph {
    Head head;
    std::vector<PortRecord> inputs, outputs;
    std::map<std::string, std::string> weights;  // each parameter's name, and its key in a weights file
    Engines engines;                             // of the unadapted model
};

struct TaskRecord {
    std::string name;
    std::string graph;
    File model;
    std::optional<File> weights;
    bool factors;  // merged when it is loaded
    std::string adapter_sha256;
    std::vector<std::string> labels;
    Engines engines;
};

struct Manifest {
    std::string base_sha256, precision;  // of the checkpoint, and what the graphs compute in
    std::int64_t longest;                // sequence that the base takes, in tokens
    std::vector<File> base_weights;
    std::map<std::string, Graph> graphs;
    std::map<std::string, TaskRecord> tasks;
};

// The path as Python shows it: without needless dots and slashes.
std::filesystem::path tidy(const std::filesystem::path& path);

// The manifest of the bundle in `bundle`. Throws Error when it is none, is damaged, is of another schema or leads out
// of the bundle.
Manifest read_manifest(const std::filesystem::path& bundle);

}  // namespace lorafuse

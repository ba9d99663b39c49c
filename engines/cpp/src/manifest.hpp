// The bundle's manifest, as docs/bundle.md and exporter/bundle/records.py have it; here as far as a runtime needs it,
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

constexpr std::int64_t kSchema = 4;
constexpr const char* kManifest = "manifest.json";

struct File {
    std::string path;  // relative to the bundle
    std::int64_t size;
    std::string sha256;
};

// Every file that a manifest names, whether a runtime reads it or not: each path is checked.
using Files = std::vector<File>;

// An input or output of a graph, whose dtype need not be one that engines take.
struct PortRecord {
    std::string name, dtype;
    std::vector<std::variant<std::int64_t, std::string>> shape;
};

// A built engine: of which backend and version, for which devices, from which graph and weights.
struct EngineRecord {
    std::string backend, version, target, model_sha256, weights_sha256, mode;
    std::optional<File> file;
};

using Engines = std::vector<EngineRecord>;  // of a backend, one for each target

// A weight as the graph reads it.
struct WeightRecord {
    std::optional<std::vector<std::int64_t>> order;  // of the axes of the model's parameter, in which it is stored
    std::vector<std::int64_t> shape;
    std::string dtype;
    std::string stored;  // "plain", or the type of the integers that stand for it
};

// The name under which a weights file keeps a parameter: it says the axis order.
std::string key_of(const std::string& name, const WeightRecord& weight);

struct Head {
    std::string task_type;
    std::int64_t outputs;
};

struct Graph {
    std::string part;  // of the model, whose graph it is
    Head head;
    std::vector<PortRecord> inputs, outputs;
    std::map<std::string, WeightRecord> weights;  // by the parameter's name
    Engines engines;                              // of the unadapted graph
    std::string version;                          // SHA-256 of all that the manifest says of it
};

// What a task has of a part of the model.
struct PartRecord {
    std::string graph;
    File model;
    std::optional<File> weights;
    Engines engines;
};

struct TaskRecord {
    std::string name;
    std::map<std::string, PartRecord> parts;  // by role
    bool factors;                             // merged when it is loaded
    std::string adapter_sha256;
    std::vector<std::string> labels;
    std::string version;  // SHA-256 of all that the manifest says of it, its graphs and the base
};

struct Manifest {
    std::string digest;                  // "sha256:…" of its file
    std::string base_sha256, precision;  // of the checkpoint, and what the graphs compute in
    std::string base_version;            // SHA-256 of all that it says of the base
    std::int64_t longest, vocabulary;    // the tokens that the base takes in a row, and knows; 0: no limit
    std::vector<File> base_weights;
    std::map<std::string, Graph> graphs;
    std::map<std::string, TaskRecord> tasks;
};

// The manifest of the bundle in `bundle`. Throws Error when it is none, is damaged, is of another schema, leads out of
// the bundle, or has another digest than `digest`, where that is not empty.
Manifest read_manifest(const std::filesystem::path& bundle, const std::string& digest);

}  // namespace lorafuse

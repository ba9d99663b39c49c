// A task's ONNX file: its initializers and where their bytes lie, and nothing that reads a file.
//
// Fields: https://github.com/onnx/onnx/blob/main/onnx/onnx.proto3. Every message on the way to a tensor is walked, and
// a field that is not known is refused: what this reader overlooks, a runtime might open. See
// exporter/bundle/graph_file.py.
#pragma once

#include <cstdint>
#include <filesystem>
#include <map>
#include <optional>
#include <string>
#include <string_view>
#include <vector>

namespace lorafuse {

// Where an initializer's bytes lie: the name of a file, and the range in it, in bytes.
struct External {
    std::string location;
    std::uint64_t offset, length;
};

// A tensor of the graph; without `external`, the graph holds its values.
struct Initializer {
    std::string dtype;
    std::vector<std::int64_t> shape;
    std::optional<External> external;
};

struct GraphFile {
    std::map<std::string, Initializer> initializers;
    // The SHA-256 of the file without what it says about where weights lie: two files of one skeleton are one
    // computation on different weights.
    std::string skeleton;
};

// The graph in `content`, found in the file `path`. Throws Error where it is no ONNX model, holds a field that is not
// known, or keeps anything but an initializer's values in another file.
GraphFile read_graph(const std::filesystem::path& path, std::string_view content);

}  // namespace lorafuse

#include "graph_file.hpp"

#include <algorithm>

#include "dtype.hpp"
#include "lorafuse/runtime.hpp"
#include "sha256.hpp"
#include "wire.hpp"

namespace lorafuse {
namespace {

constexpr std::uint64_t kExternal = 1;        // TensorProto.DataLocation
constexpr std::size_t kLongestNumber = 18;    // digits, so that it fits into 63 bits
constexpr int kDeepest = 100;                 // messages inside each other, as protobuf's own parser
constexpr const char* kReader = "EPContext";  // ONNX Runtime's node for a compiled model, in a file of its own

const MessageKind kModel{"model",
                         {{1, "ir_version", Wire::number, false},
                          {2, "producer_name", Wire::bytes, false},
                          {3, "producer_version", Wire::bytes, false},
                          {4, "domain", Wire::bytes, false},
                          {5, "model_version", Wire::number, false},
                          {6, "doc_string", Wire::bytes, false},
                          {7, "graph", Wire::bytes, false},
                          {8, "opset_import", Wire::bytes, true},
                          {14, "metadata_props", Wire::bytes, true},
                          {25, "functions", Wire::bytes, true}}};
const MessageKind kGraph{"graph",
                         {{1, "node", Wire::bytes, true},
                          {2, "name", Wire::bytes, false},
                          {5, "initializer", Wire::bytes, true},
                          {10, "doc_string", Wire::bytes, false},
                          {11, "input", Wire::bytes, true},
                          {12, "output", Wire::bytes, true},
                          {13, "value_info", Wire::bytes, true},
                          {14, "quantization_annotation", Wire::bytes, true},
                          {16, "metadata_props", Wire::bytes, true}}};
const MessageKind kFunction{"function",
                            {{1, "name", Wire::bytes, false},
                             {4, "input", Wire::bytes, true},
                             {5, "output", Wire::bytes, true},
                             {6, "attribute_name", Wire::bytes, true},
                             {7, "node", Wire::bytes, true},
                             {8, "doc_string", Wire::bytes, false},
                             {9, "opset_import", Wire::bytes, true},
                             {10, "domain", Wire::bytes, false},
                             {11, "attribute", Wire::bytes, true},
                             {12, "value_info", Wire::bytes, true},
                             {13, "overload", Wire::bytes, false},
                             {14, "metadata_props", Wire::bytes, true}}};
const MessageKind kNode{"node",
                        {{1, "input", Wire::bytes, true},
                         {2, "output", Wire::bytes, true},
                         {3, "name", Wire::bytes, false},
                         {4, "op_type", Wire::bytes, false},
                         {5, "attribute", Wire::bytes, true},
                         {6, "doc_string", Wire::bytes, false},
                         {7, "domain", Wire::bytes, false},
                         {8, "overload", Wire::bytes, false},
                         {9, "metadata_props", Wire::bytes, true}}};
const MessageKind kAttribute{"attribute",
                             {{1, "name", Wire::bytes, false},
                              {2, "f", Wire::four, false},
                              {3, "i", Wire::number, false},
                              {4, "s", Wire::bytes, false},
                              {5, "t", Wire::bytes, false},
                              {6, "g", Wire::bytes, false},
                              {7, "floats", Wire::fours, true},
                              {8, "ints", Wire::numbers, true},
                              {9, "strings", Wire::bytes, true},
                              {10, "tensors", Wire::bytes, true},
                              {11, "graphs", Wire::bytes, true},
                              {13, "doc_string", Wire::bytes, false},
                              {14, "tp", Wire::bytes, false},
                              {15, "type_protos", Wire::bytes, true},
                              {20, "type", Wire::number, false},
                              {21, "ref_attr_name", Wire::bytes, false}}};
const MessageKind kTensor{"tensor",
                          {{1, "dims", Wire::numbers, true},
                           {2, "data_type", Wire::number, false},
                           {4, "float_data", Wire::fours, true},
                           {5, "int32_data", Wire::numbers, true},
                           {6, "string_data", Wire::bytes, true},
                           {7, "int64_data", Wire::numbers, true},
                           {8, "name", Wire::bytes, false},
                           {9, "raw_data", Wire::bytes, false},
                           {10, "double_data", Wire::eights, true},
                           {11, "uint64_data", Wire::numbers, true},
                           {12, "doc_string", Wire::bytes, false},
                           {13, "external_data", Wire::bytes, true},
                           {14, "data_location", Wire::number, false},
                           {16, "metadata_props", Wire::bytes, true}}};
const MessageKind kEntry{"entry of external data", {{1, "key", Wire::bytes, false}, {2, "value", Wire::bytes, false}}};
const MessageKind kValue{"value",
                         {{1, "name", Wire::bytes, false},
                          {2, "type", Wire::bytes, false},
                          {3, "doc_string", Wire::bytes, false},
                          {4, "metadata_props", Wire::bytes, true}}};

const MessageKind kType{"type",
                        {{1, "tensor_type", Wire::bytes, false},
                         {4, "sequence_type", Wire::bytes, false},
                         {5, "map_type", Wire::bytes, false},
                         {6, "denotation", Wire::bytes, false},
                         {8, "sparse_tensor_type", Wire::bytes, false},
                         {9, "optional_type", Wire::bytes, false}}};
const MessageKind kTensorType{"tensor type", {{1, "elem_type", Wire::number, false}, {2, "shape", Wire::bytes, false}}};
const MessageKind kShape{"shape", {{1, "dim", Wire::bytes, true}}};
const MessageKind kDimension{"dimension",
                             {{1, "dim_value", Wire::number, false},
                              {2, "dim_param", Wire::bytes, false},
                              {3, "denotation", Wire::bytes, false}}};

// Fields, each with its name and its length, so that no two lists of fields look alike.
class Skeleton {
public:
    void add(const Field& field) {
        const std::string number = field.is_number ? std::to_string(field.number) : "";
        const std::string_view held = field.is_number ? std::string_view(number) : field.bytes;
        said_.append(field.name).append(" ").append(std::to_string(held.size())).append(" ").append(held);
    }

    std::string digest() const { return sha256(said_.data(), said_.size()); }

private:
    std::string said_;
};

void check_inline(std::string_view tensor) {
    each_field(tensor, kTensor, [](const Field& field) {
        if (field.name == "external_data" || (field.name == "data_location" && field.number != 0))
            throw WireError("a tensor that is no initializer of the graph lies in another file");
    });
}

// Refuse what reads a file, in this message and in those inside it.
void walk(std::string_view message, const MessageKind& kind, int depth) {
    if (depth > kDeepest) throw WireError("messages are nested more than 100 deep");
    each_field(message, kind, [&](const Field& field) {
        if (field.name == "node") walk(field.bytes, kNode, depth + 1);
        else if (field.name == "attribute") walk(field.bytes, kAttribute, depth + 1);
        else if (field.name == "g" || field.name == "graphs") walk(field.bytes, kGraph, depth + 1);
        else if (field.name == "t" || field.name == "tensors" || field.name == "initializer") check_inline(field.bytes);
        else if (field.name == "op_type" && text_of(field) == kReader)
            throw WireError(std::string("a node ") + kReader + " may read a file");
    });
}

// An input or output, whose axes have names of text as it has itself: runtimes ask for them.
void check_port(std::string_view message, const MessageKind& kind) {
    each_field(message, kind, [](const Field& field) {
        if (field.name == "name" || field.name == "dim_param") text_of(field);
        else if (field.name == "type") check_port(field.bytes, kType);
        else if (field.name == "tensor_type") check_port(field.bytes, kTensorType);
        else if (field.name == "shape") check_port(field.bytes, kShape);
        else if (field.name == "dim") check_port(field.bytes, kDimension);
    });
}

std::uint64_t size_in(const std::string& name, const std::string& text) {
    const auto is_digit = [](char c) { return c >= '0' && c <= '9'; };
    if (text.empty() || text.size() > kLongestNumber || !std::all_of(text.begin(), text.end(), is_digit))
        throw WireError("the external data of '" + name + "' lie at " + text);
    return std::stoull(text);
}

External external_of(const std::string& name, const std::vector<std::string_view>& entries) {
    std::map<std::string, std::string> said;
    for (const std::string_view entry : entries) {
        std::map<std::string_view, std::string> pair;
        each_field(entry, kEntry, [&](const Field& field) { pair[field.name] = text_of(field); });
        if (pair.size() != 2 || !said.emplace(pair.at("key"), pair.at("value")).second)
            throw WireError("the external data of '" + name + "' are not described once");
    }
    for (const char* field : {"location", "offset", "length"}) {
        if (said.size() != 3 || said.count(field) == 0)
            throw WireError("the external data of '" + name + "' are not length, location and offset");
    }
    return {said["location"], size_in(name, said["offset"]), size_in(name, said["length"])};
}

// A tensor as its message has it, before it is known to make sense.
struct Described {
    std::string name;
    std::uint64_t dtype = 0, location = 0;
    std::vector<std::uint64_t> sizes;
    std::vector<std::string_view> entries;
    bool holds = false;  // values

    void add(const Field& field) {
        if (field.name == "name") name = text_of(field);
        else if (field.name == "data_type") dtype = field.number;
        else if (field.name == "data_location") location = field.number;
        else if (field.name == "external_data") entries.push_back(field.bytes);
        else if (field.name == "dims") {
            for (const std::uint64_t size : numbers_of(field)) sizes.push_back(size);
        } else if (field.name != "doc_string" && field.name != "metadata_props") holds = true;
    }

    std::string dtype_name() const {
        const auto known = dtype <= 16 ? dtype_of_element(static_cast<int>(dtype)) : std::nullopt;
        return known ? name_of(*known) : "type " + std::to_string(dtype);
    }
};

Initializer initializer_of(const Described& tensor) {
    Initializer found{tensor.dtype_name(), {}, std::nullopt};
    for (const std::uint64_t size : tensor.sizes) {
        if (size >> 63 != 0) throw WireError("the initializer '" + tensor.name + "' has a negative size");
        found.shape.push_back(static_cast<std::int64_t>(size));
    }
    if (tensor.location == 0 && tensor.entries.empty()) return found;
    if (tensor.location != kExternal || tensor.holds)
        throw WireError("the initializer '" + tensor.name + "' has values here and in another file");
    found.external = external_of(tensor.name, tensor.entries);
    return found;
}

void add_initializer(std::string_view message, GraphFile& graph, Skeleton& skeleton) {
    Described tensor;
    each_field(message, kTensor, [&](const Field& field) {
        tensor.add(field);
        if (field.name != "external_data") skeleton.add(field);
    });
    skeleton.add({"end", true, 0, {}});
    if (tensor.name.empty() || !graph.initializers.emplace(tensor.name, initializer_of(tensor)).second)
        throw WireError("the initializer '" + tensor.name + "' has no name of its own");
}

void add_field(const Field& field, GraphFile& graph, Skeleton& skeleton) {
    if (field.name == "initializer") return add_initializer(field.bytes, graph, skeleton);
    skeleton.add(field);
    if (field.name == "node") walk(field.bytes, kNode, 1);
    else if (field.name == "input" || field.name == "output") check_port(field.bytes, kValue);
}

GraphFile graph_in(std::string_view content) {
    std::optional<std::string_view> graph;
    Skeleton skeleton;
    each_field(content, kModel, [&](const Field& field) {
        if (field.name == "graph") graph = field.bytes;
        else skeleton.add(field);
        if (field.name == "functions") walk(field.bytes, kFunction, 1);
    });
    if (!graph) throw WireError("it has no graph");
    GraphFile found;
    each_field(*graph, kGraph, [&](const Field& field) { add_field(field, found, skeleton); });
    found.skeleton = skeleton.digest();
    return found;
}

}  // namespace

GraphFile read_graph(const std::filesystem::path& path, std::string_view content) {
    try {
        return graph_in(content);
    } catch (const WireError& error) {
        throw Error(path.string() + ": not an ONNX model that can be served (" + error.what() +
                    "); export the task again");
    }
}

}  // namespace lorafuse

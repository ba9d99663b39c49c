#include "manifest.hpp"

#include <algorithm>
#include <iterator>
#include <set>
#include <system_error>

#include "json_reader.hpp"
#include "mapped_file.hpp"
#include "printable.hpp"

namespace lorafuse {
namespace {

namespace fs = std::filesystem;

constexpr const char* kManifest = "manifest.json";
constexpr const char* kFolders[] = {"adapters", "base", "engines"};
// Task types whose outputs are classes, with labels.
constexpr const char* kClassifiers[] = {"SEQ_CLS", "TOKEN_CLS", "IMAGE_CLS"};

// Every file that the manifest names, whether a runtime reads it or not: each path is checked.
using Files = std::vector<File>;

File file_of(const JsonReader& json, Files& files) {
    json.check_fields({"path", "size", "sha256"});
    files.push_back({json.at("path").text(), json.at("size").number(), json.at("sha256").text()});
    return files.back();
}

std::vector<File> files_of(const JsonReader& json, Files& files) {
    std::vector<File> found;
    json.each([&](const JsonReader& file) { found.push_back(file_of(file, files)); });
    return found;
}

std::vector<std::string> texts_of(const JsonReader& json) {
    std::vector<std::string> texts;
    json.each([&](const JsonReader& text) { texts.push_back(text.text()); });
    return texts;
}

PortRecord port_of(const JsonReader& json) {
    json.check_fields({"name", "dtype", "shape"});
    PortRecord port{json.at("name").text(), json.at("dtype").text(), {}};
    json.at("shape").each([&](const JsonReader& size) {
        if (size.is_text()) port.shape.emplace_back(size.text());
        else port.shape.emplace_back(size.number_or_text());
    });
    return port;
}

std::vector<PortRecord> ports_of(const JsonReader& json) {
    std::vector<PortRecord> ports;
    json.each([&](const JsonReader& port) { ports.push_back(port_of(port)); });
    return ports;
}

// The name under which a weights file keeps a parameter: it says the axis order in which the graph reads it.
std::string key_of(const std::string& name, const JsonReader& order) {
    if (order.is_null()) return name;
    std::string axes;
    order.or_null().each(
        [&](const JsonReader& axis) { axes += (axes.empty() ? "" : ",") + std::to_string(axis.number()); });
    return name + "@" + axes;
}

EngineRecord engine_of(const JsonReader& json, Files& files) {
    json.check_fields({"backend", "version", "target", "model_sha256", "weights_sha256"},
                      {"file", "mode", "refittable", "proven"});
    const auto text = [&](const char* field) { return json.at(field).text(); };
    EngineRecord engine{text("backend"),        text("version"), text("target"), text("model_sha256"),
                        text("weights_sha256"), "rebuild",       std::nullopt};
    if (json.has("file") && !json.at("file").is_null()) engine.file = file_of(json.at("file").or_null(), files);
    if (json.has("mode")) engine.mode = json.at("mode").one_of({"rebuild", "refit", "stripped"});
    if (json.has("refittable")) texts_of(json.at("refittable"));
    if (json.has("proven")) json.at("proven").each([](const std::string&, const JsonReader& hash) { hash.text(); });
    return engine;
}

Engines engines_of(const JsonReader& owner, Files& files) {
    Engines engines;
    if (!owner.has("engines")) return engines;
    owner.at("engines").each([&](const std::string& backend, const JsonReader& engine) {
        engines.emplace(backend, engine_of(engine, files));
    });
    return engines;
}

Graph graph_of(const JsonReader& json, Files& files) {
    json.check_fields({"head", "inputs", "outputs", "weights"}, {"engines"});
    const JsonReader head = json.at("head");
    head.check_fields({"task_type", "outputs"}, {"tied"});
    Graph graph{{head.at("task_type").text(), head.at("outputs").number()}, {}, {}, {}, {}};
    if (head.has("tied")) head.at("tied").boolean();
    graph.outputs = ports_of(json.at("outputs"));
    graph.inputs = ports_of(json.at("inputs"));
    json.at("weights").each(
        [&](const std::string& name, const JsonReader& order) { graph.weights[name] = key_of(name, order); });
    graph.engines = engines_of(json, files);
    return graph;
}

TaskRecord task_of(const std::string& name, const JsonReader& json, Files& files) {
    json.check_fields({"graph", "model", "weights", "store", "adapter", "adapter_sha256", "labels"}, {"engines"});
    TaskRecord task{name, json.at("graph").text(), file_of(json.at("model"), files), std::nullopt, false, {}, {}, {}};
    if (!json.at("weights").is_null()) task.weights = file_of(json.at("weights").or_null(), files);
    const bool stored_as_factors = json.at("store").one_of({"dense", "factors"}) == "factors";
    task.factors = stored_as_factors && !files_of(json.at("adapter"), files).empty();
    if (!stored_as_factors) files_of(json.at("adapter"), files);
    task.adapter_sha256 = json.at("adapter_sha256").text();
    task.labels = texts_of(json.at("labels"));
    task.engines = engines_of(json, files);
    return task;
}

void read_base(const JsonReader& json, Files& files, Manifest& manifest) {
    json.check_fields({"sha256", "precision", "longest", "vocabulary", "weights", "files"});
    manifest.base_sha256 = json.at("sha256").text();
    manifest.longest = json.at("longest").number();
    json.at("vocabulary").number();
    manifest.precision = json.at("precision").one_of({"float32", "float16", "bfloat16"});
    files_of(json.at("files"), files);
    manifest.base_weights = files_of(json.at("weights"), files);
}

Manifest manifest_of(const JsonReader& json, Files& files) {
    json.check_fields({"schema", "base", "graphs", "tasks", "versions"}, {"timing_caches"});
    Manifest manifest;
    read_base(json.at("base"), files, manifest);
    json.at("graphs").each(
        [&](const std::string& name, const JsonReader& graph) { manifest.graphs[name] = graph_of(graph, files); });
    json.at("tasks").each(
        [&](const std::string& name, const JsonReader& task) { manifest.tasks[name] = task_of(name, task, files); });
    json.at("versions").each([](const std::string&, const JsonReader& version) { version.text(); });
    if (json.has("timing_caches")) {
        json.at("timing_caches").each([&](const std::string&, const JsonReader& cache) { file_of(cache, files); });
    }
    return manifest;
}

bool is_task_name(const std::string& name) {
    const auto plain = [](char c) { return (c >= 'a' && c <= 'z') || (c >= '0' && c <= '9'); };
    const auto allowed = [&](char c) { return plain(c) || c == '_' || c == '.' || c == '-'; };
    const bool reserved =
        name == "manifest" || std::find(std::begin(kFolders), std::end(kFolders), name) != std::end(kFolders);
    return !name.empty() && name.size() <= 64 && plain(name[0]) && std::all_of(name.begin(), name.end(), allowed) &&
           !reserved;
}

void check_graphs(const fs::path& path, const Manifest& manifest) {
    if (manifest.longest < 0) {
        throw Error(path.string() + ": the base's longest is " + std::to_string(manifest.longest) +
                    "; expected a number of tokens, or 0 for none; export the tasks again");
    }
    for (const auto& [digest, graph] : manifest.graphs) {
        const std::string named = path.string() + ": the graph " + in_quotes(beginning(digest, 12)) + "… ";
        if (graph.outputs.empty()) throw Error(named + "has no outputs; export its tasks again");
        if (!is_printable(graph.head.task_type)) {
            throw Error(named + "is of the task type " + in_quotes(graph.head.task_type) +
                        ", which can't be printed; export its tasks again");
        }
    }
}

void check_labels(const fs::path& path, const TaskRecord& task, const Head& head) {
    const bool classifies =
        std::find(std::begin(kClassifiers), std::end(kClassifiers), head.task_type) != std::end(kClassifiers);
    if (task.labels.empty() || !classifies || head.outputs <= 1) return;
    if (static_cast<std::int64_t>(task.labels.size()) == head.outputs) return;
    throw Error(path.string() + ": task '" + task.name + "' has " + std::to_string(task.labels.size()) +
                " labels, but its head has " + std::to_string(head.outputs) + " outputs; export the task again");
}

void check_tasks(const fs::path& path, const Manifest& manifest) {
    for (const auto& [name, task] : manifest.tasks) {
        if (!is_task_name(name)) {
            throw Error("task name " + in_quotes(name) +
                        " can't be used; expected lower-case letters, digits, '_', '.', '-', and none of adapters, "
                        "base, engines, "
                        "manifest");
        }
        if (manifest.graphs.count(task.graph) == 0) {
            throw Error(path.string() + ": task '" + name + "' names the graph " +
                        in_quotes(beginning(task.graph, 12)) + "…, which the manifest lacks; export the task again");
        }
        check_labels(path, task, manifest.graphs.at(task.graph).head);
    }
}

// The parts of a path in the bundle; none where it leaves the bundle or can't be printed.
std::vector<std::string> parts_of(const std::string& path) {
    if (path.empty() || path[0] == '/' || path.find('\\') != std::string::npos || !is_printable(path)) return {};
    std::vector<std::string> parts;
    for (const fs::path& part : fs::path(path)) {
        if (part == "..") return {};
        if (!part.empty() && part != ".") parts.push_back(part.string());
    }
    return parts;
}

// As Python says it of a file that the system refuses.
[[noreturn]] void refuse(const std::error_code& error, const fs::path& path) {
    throw JsonError("[Errno " + std::to_string(error.value()) + "] " + error.message() + ": " +
                    in_quotes(path.string()));
}

bool is_link(const fs::path& path) {
    std::error_code error;
    const fs::file_status found = fs::symlink_status(path, error);
    if (found.type() == fs::file_type::none) refuse(error, path);
    return fs::is_symlink(found);
}

// A folder that is a link would lead the reading of files out of the bundle.
void check_paths(const fs::path& bundle, const Files& files) {
    std::set<fs::path> folders(std::begin(kFolders), std::end(kFolders));
    for (const File& file : files) {
        const std::vector<std::string> parts = parts_of(file.path);
        if (parts.empty() || parts == std::vector<std::string>{kManifest}) {
            throw Error(tidy(bundle / kManifest).string() + ": file path " + in_quotes(file.path) +
                        " leaves the bundle, is its manifest or can't be printed; refusing to follow it");
        }
        fs::path folder;
        for (std::size_t i = 0; i + 1 < parts.size(); ++i) folders.insert(folder /= parts[i]);
    }
    for (const fs::path& folder : folders) {
        if (const fs::path path = tidy(bundle / folder); is_link(path)) {
            throw Error(path.string() + ": a link, which may lead out of the bundle; refusing to follow it");
        }
    }
}

std::string content_of(const fs::path& path) try {
    const MappedFile file(path);
    return {reinterpret_cast<const char*>(file.data()), file.size()};
} catch (const std::system_error& error) {
    refuse(error.code(), path);
}

void check_schema(const fs::path& path, const JsonReader& json) {
    json.check_has("schema");
    const std::int64_t schema = json.at("schema").number();
    const std::string found = path.string() + ": schema " + std::to_string(schema), ours = std::to_string(kSchema);
    if (schema > kSchema) throw Error(found + " is newer than this program reads (" + ours + "); update lorafuse");
    if (schema < kSchema)
        throw Error(found + " is of an earlier lorafuse, and this one reads " + ours + "; export the tasks again");
}

}  // namespace

fs::path tidy(const fs::path& path) {
    fs::path parts;
    for (const fs::path& part : path) {
        if (!part.empty() && part != ".") parts /= part;
    }
    return parts.empty() ? "." : parts;
}

Manifest read_manifest(const fs::path& bundle) {
    const fs::path path = tidy(bundle / kManifest);
    std::error_code unread;
    if (!fs::is_regular_file(path, unread)) {
        throw Error(bundle.string() + ": not a bundle (no " + kManifest + "); create one with 'lorafuse export'");
    }
    try {
        const JsonDocument json(content_of(path));
        check_schema(path, json.root());
        Files files;
        Manifest manifest = manifest_of(json.root(), files);
        check_graphs(path, manifest);
        check_tasks(path, manifest);
        check_paths(bundle, files);
        return manifest;
    } catch (const JsonError& error) {
        throw Error(path.string() + ": not a bundle's manifest (" + printable(error.what()) +
                    "); export the tasks again");
    }
}

}  // namespace lorafuse

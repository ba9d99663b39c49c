#include "manifest.hpp"

#include <algorithm>
#include <cerrno>
#include <string_view>
#include <system_error>

#include "json_reader.hpp"
#include "manifest_checks.hpp"
#include "mapped_file.hpp"
#include "printable.hpp"
#include "sha256.hpp"

namespace lorafuse {
namespace {

namespace fs = std::filesystem;

File file_of(const JsonReader& json, Files& files) {
    json.check_fields({"path", "size", "sha256"});
    files.push_back({json.at("path").text(), json.at("size").number(), json.at("sha256").text()});
    return files.back();
}

// Of a field that may be missing or null.
std::optional<File> file_if_any(const JsonReader& owner, const char* field, Files& files) {
    if (!owner.has(field) || owner.at(field).is_null()) return std::nullopt;
    return file_of(owner.at(field), files);
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

std::vector<std::int64_t> numbers_of(const JsonReader& json) {
    std::vector<std::int64_t> numbers;
    json.each([&](const JsonReader& number) { numbers.push_back(number.number()); });
    return numbers;
}

PortRecord port_of(const JsonReader& json) {
    json.check_fields({"name", "dtype", "shape"});
    PortRecord port{json.at("name").text(), json.at("dtype").text(), {}};
    json.at("shape").each([&](const JsonReader& size) {
        if (size.is_text()) port.shape.emplace_back(size.text());
        else port.shape.emplace_back(size.number());
    });
    return port;
}

std::vector<PortRecord> ports_of(const JsonReader& json) {
    std::vector<PortRecord> ports;
    json.each([&](const JsonReader& port) { ports.push_back(port_of(port)); });
    return ports;
}

std::string stored_of(const JsonReader& json) {
    if (json.is_text()) return json.one_of({"plain"});
    json.check_fields({"as", "block", "axis"});
    json.at("block").number();
    json.at("axis").number();
    return json.at("as").one_of({"int4", "int8"});
}

WeightRecord weight_of(const JsonReader& json) {
    json.check_fields({"order", "shape", "dtype"}, {"stored"});
    WeightRecord weight{std::nullopt, numbers_of(json.at("shape")), json.at("dtype").text(), "plain"};
    if (!json.at("order").is_null()) weight.order = numbers_of(json.at("order"));
    if (json.has("stored")) weight.stored = stored_of(json.at("stored"));
    return weight;
}

EngineRecord engine_of(const JsonReader& json, Files& files) {
    json.check_fields({"backend", "version", "target", "model_sha256", "weights_sha256"},
                      {"file", "mode", "refittable", "proven"});
    const auto text = [&](const char* field) { return json.at(field).text(); };
    EngineRecord engine{text("backend"),        text("version"), text("target"), text("model_sha256"),
                        text("weights_sha256"), "rebuild",       std::nullopt};
    engine.file = file_if_any(json, "file", files);
    if (json.has("mode")) engine.mode = json.at("mode").one_of({"rebuild", "refit", "stripped"});
    if (json.has("refittable")) texts_of(json.at("refittable"));
    if (json.has("proven")) json.at("proven").each([](const std::string&, const JsonReader& hash) { hash.text(); });
    return engine;
}

Engines engines_of(const JsonReader& owner, Files& files) {
    Engines engines;
    if (!owner.has("engines")) return engines;
    owner.at("engines").each([&](const JsonReader& engine) { engines.push_back(engine_of(engine, files)); });
    return engines;
}

std::string versioned(const std::string& said) { return sha256(said.data(), said.size()); }

Head head_of(const JsonReader& json) {
    json.check_fields({"task_type", "outputs"}, {"tied"});
    if (json.has("tied")) json.at("tied").boolean();
    return {json.at("task_type").text(), json.at("outputs").number()};
}

Graph graph_of(const JsonReader& json, Files& files) {
    json.check_fields({"part", "head", "inputs", "outputs", "weights"}, {"engines"});
    Graph graph{json.at("part").text(),
                head_of(json.at("head")),
                ports_of(json.at("inputs")),
                ports_of(json.at("outputs")),
                {},
                {},
                versioned(json.canonical())};
    json.at("weights").each(
        [&](const std::string& name, const JsonReader& weight) { graph.weights.emplace(name, weight_of(weight)); });
    graph.engines = engines_of(json, files);
    return graph;
}

PartRecord part_of(const JsonReader& json, Files& files) {
    json.check_fields({"graph", "model"}, {"weights", "engines"});
    PartRecord part{json.at("graph").text(), file_of(json.at("model"), files), std::nullopt, {}};
    part.weights = file_if_any(json, "weights", files);
    part.engines = engines_of(json, files);
    return part;
}

TaskRecord task_of(const std::string& name, const JsonReader& json, Files& files) {
    json.check_fields({"parts", "store", "adapter", "adapter_sha256", "labels"});
    TaskRecord task{name, {}, false, json.at("adapter_sha256").text(), texts_of(json.at("labels")), json.canonical()};
    json.at("parts").each(
        [&](const std::string& role, const JsonReader& part) { task.parts.emplace(role, part_of(part, files)); });
    const bool has_adapter = !files_of(json.at("adapter"), files).empty();
    task.factors = json.at("store").one_of({"dense", "factors"}) == "factors" && has_adapter;
    return task;
}

void read_base(const JsonReader& json, Files& files, Manifest& manifest) {
    json.check_fields({"sha256", "precision", "longest", "vocabulary", "weights", "files"}, {"tied", "structure"});
    manifest.base_sha256 = json.at("sha256").text();
    manifest.longest = json.at("longest").number();
    manifest.vocabulary = json.at("vocabulary").number();
    manifest.base_version = versioned(json.canonical());
    manifest.precision = json.at("precision").one_of({"float32", "float16", "bfloat16"});
    files_of(json.at("files"), files);
    manifest.base_weights = files_of(json.at("weights"), files);
    file_if_any(json, "structure", files);
    if (json.has("tied")) json.at("tied").each([](const JsonReader& group) { texts_of(group); });
}

// A task is the same before and after a change that left alone what the manifest says of it, its graphs and the base.
void set_version(TaskRecord& task, const Manifest& manifest) {
    std::string said = task.version + manifest.base_version;
    for (const auto& [_, part] : task.parts) said += manifest.graphs.at(part.graph).version;
    task.version = versioned(said);
}

Manifest manifest_of(const JsonReader& json, Files& files) {
    json.check_fields({"schema", "base", "graphs", "tasks", "versions"}, {"timing_caches"});
    Manifest manifest;
    read_base(json.at("base"), files, manifest);
    json.at("graphs").each([&](const std::string& digest, const JsonReader& graph) {
        manifest.graphs.emplace(digest, graph_of(graph, files));
    });
    json.at("tasks").each([&](const std::string& name, const JsonReader& task) {
        manifest.tasks.emplace(name, task_of(name, task, files));
    });
    json.at("versions").each([](const std::string&, const JsonReader& version) { version.text(); });
    if (json.has("timing_caches")) {
        json.at("timing_caches").each([&](const std::string&, const JsonReader& cache) { file_of(cache, files); });
    }
    return manifest;
}

constexpr std::string_view kAlgorithm = "sha256:";

bool is_digest(const std::string& text) {
    const auto is_hex = [](char c) { return (c >= '0' && c <= '9') || (c >= 'a' && c <= 'f'); };
    return text.size() == kAlgorithm.size() + 64 && text.compare(0, kAlgorithm.size(), kAlgorithm) == 0 &&
           std::all_of(text.begin() + kAlgorithm.size(), text.end(), is_hex);
}

// What a bundle is pinned by, as registries write digests.
std::string digest_of(const std::string& content) {
    return std::string(kAlgorithm) + sha256(content.data(), content.size());
}

std::string manifest_bytes(const fs::path& bundle) {
    try {
        const MappedFile file(OpenedFile(bundle, kManifest));
        return {reinterpret_cast<const char*>(file.data()), file.size()};
    } catch (const std::system_error& error) {
        switch (error.code().value()) {
            case ENOENT:
            case ENOTDIR:
                throw Error(bundle.string() + ": not a bundle (no " + kManifest +
                            "); create one with 'lorafuse export'");
            case ELOOP:
                throw Error(tidy(bundle / kManifest).string() +
                            ": a link, which may lead out of the bundle; refusing to follow it");
            default:
                throw Error(bundle.string() + ": can't be read (" + error.code().message() +
                            "); export the tasks again");
        }
    }
}

std::string pinned_bytes(const fs::path& bundle, const std::string& digest) {
    if (!digest.empty() && !is_digest(digest)) {
        throw Error(bundle.string() + ": " + in_quotes(digest) +
                    " is no digest; expected sha256: and 64 hexadecimal digits, as 'lorafuse bundle ls' prints");
    }
    std::string content = manifest_bytes(bundle);
    const std::string found = digest_of(content);
    if (!digest.empty() && digest != found) {
        throw Error(bundle.string() + ": the bundle is " + found + ", but " + digest +
                    " was asked for; fetch that one, or ask for this");
    }
    return content;
}

}  // namespace

std::string key_of(const std::string& name, const WeightRecord& weight) {
    if (!weight.order) return name;
    std::string axes;
    for (const std::int64_t axis : *weight.order) axes += (axes.empty() ? "" : ",") + std::to_string(axis);
    return name + "@" + axes;
}

Manifest read_manifest(const fs::path& bundle, const std::string& digest) {
    const fs::path path = tidy(bundle / kManifest);
    const std::string content = pinned_bytes(bundle, digest);
    try {
        const JsonDocument document(content);
        const JsonReader json = document.root();
        check_schema(path, json.at("schema").number());
        Files files;
        Manifest manifest = manifest_of(json, files);
        check_manifest(path, manifest);
        check_paths(path, files);
        for (auto& [_, task] : manifest.tasks) set_version(task, manifest);
        manifest.digest = digest_of(content);
        return manifest;
    } catch (const JsonError& error) {
        throw Error(path.string() + ": not a bundle's manifest (" + printable(error.what()) +
                    "); export the tasks again");
    }
}

}  // namespace lorafuse

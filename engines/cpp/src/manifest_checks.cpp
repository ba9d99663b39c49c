#include "manifest_checks.hpp"

#include <algorithm>
#include <iterator>
#include <numeric>
#include <set>
#include <system_error>
#include <utility>

#include "printable.hpp"

namespace lorafuse {
namespace {

namespace fs = std::filesystem;

constexpr const char* kFolders[] = {"adapters", "base", "engines"};
// Task types whose outputs are classes, with labels.
constexpr const char* kClassifiers[] = {"SEQ_CLS", "TOKEN_CLS", "IMAGE_CLS"};
constexpr std::int64_t kUpgraded = 3;         // the schema that `lorafuse bundle upgrade` reads
constexpr std::size_t kLongestPath = 4096;    // Linux's own limit
constexpr std::size_t kShownOfDigest = 12;    // characters
constexpr std::size_t kLongestTaskName = 64;  // characters
constexpr std::size_t kLongestRole = 32;      // characters

template <typename Names>
bool contains(const Names& names, const std::string& name) {
    return std::find(std::begin(names), std::end(names), name) != std::end(names);
}

bool is_lower(char c) { return c >= 'a' && c <= 'z'; }
bool is_digit(char c) { return c >= '0' && c <= '9'; }

bool is_task_name(const std::string& name) {
    const auto plain = [](char c) { return is_lower(c) || is_digit(c); };
    const auto allowed = [&](char c) { return plain(c) || c == '_' || c == '.' || c == '-'; };
    return !name.empty() && name.size() <= kLongestTaskName && plain(name[0]) &&
           std::all_of(name.begin(), name.end(), allowed) && name != "manifest" && !contains(kFolders, name);
}

bool is_role(const std::string& name) {
    const auto allowed = [](char c) { return is_lower(c) || is_digit(c) || c == '_'; };
    return !name.empty() && name.size() <= kLongestRole && is_lower(name[0]) &&
           std::all_of(name.begin(), name.end(), allowed);
}

std::string digest_of(const std::string& digest) { return in_quotes(beginning(digest, kShownOfDigest)) + "…"; }

bool orders_its_axes(const WeightRecord& weight) {
    if (!weight.order) return true;
    std::vector<std::int64_t> axes(weight.shape.size()), order = *weight.order;
    std::iota(axes.begin(), axes.end(), std::int64_t{0});
    std::sort(order.begin(), order.end());
    return order == axes;
}

// An engine whose backend and target another has too; nothing where each has its own.
const EngineRecord* double_of(const Engines& engines) {
    std::set<std::pair<std::string, std::string>> seen;
    for (const EngineRecord& engine : engines) {
        if (!seen.emplace(engine.backend, engine.target).second) return &engine;
    }
    return nullptr;
}

void check_graph(const fs::path& path, const std::string& digest, const Graph& graph) {
    const auto refuse = [&](const std::string& what) {
        throw Error(path.string() + ": the graph " + digest_of(digest) + " " + what + "; export its tasks again");
    };
    if (!is_role(graph.part)) refuse("is of the part " + in_quotes(graph.part) + ", which is no name of a part");
    if (graph.outputs.empty()) refuse("has no outputs");
    if (!is_printable(graph.head.task_type))
        refuse("is of the task type " + in_quotes(graph.head.task_type) + ", which can't be printed");
    if (const EngineRecord* twice = double_of(graph.engines))
        refuse("has two " + printable(twice->backend) + " engines for " + in_quotes(twice->target));
    for (const auto& [name, weight] : graph.weights) {
        if (!orders_its_axes(weight))
            refuse("stores " + in_quotes(name) + " in an order of axes that its shape does not have");
        if (weight.stored != "plain") {
            throw Error(path.string() + ": weight " + in_quotes(name) + " is stored as " + weight.stored +
                        ", which this version can't read; update lorafuse");
        }
    }
}

void check_part(const fs::path& path, const TaskRecord& task, const std::string& role, const Manifest& manifest) {
    const auto refuse = [&](const std::string& what) {
        throw Error(path.string() + ": task '" + task.name + "' " + what + "; export the task again");
    };
    const PartRecord& part = task.parts.at(role);
    const auto graph = manifest.graphs.find(part.graph);
    if (graph == manifest.graphs.end())
        refuse("names the graph " + digest_of(part.graph) + ", which the manifest lacks");
    if (graph->second.part != role)
        refuse("has as its part " + in_quotes(role) + " a graph of the part " + in_quotes(graph->second.part));
    if (const EngineRecord* twice = double_of(part.engines))
        refuse("has two " + printable(twice->backend) + " engines for " + in_quotes(twice->target));
    const Head& head = graph->second.head;
    const auto labels = static_cast<std::int64_t>(task.labels.size());
    if (labels > 0 && contains(kClassifiers, head.task_type) && head.outputs != 1 && head.outputs != labels) {
        refuse("has " + std::to_string(labels) + " labels, but its head has " + std::to_string(head.outputs) +
               " outputs");
    }
}

void check_task(const fs::path& path, const TaskRecord& task, const Manifest& manifest) {
    if (!is_task_name(task.name)) {
        throw Error("task name " + in_quotes(task.name) +
                    " can't be used; expected lower-case letters, digits, '_', '.', '-', and none of adapters, base, "
                    "engines, manifest");
    }
    if (task.parts.empty())
        throw Error(path.string() + ": task '" + task.name + "' has no parts; export the task again");
    for (const auto& [role, _] : task.parts) check_part(path, task, role, manifest);
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

// A folder that is a link would lead the reading of files out of the bundle. Whether there is anything at `path`.
bool checked_folder(const fs::path& path) {
    std::error_code error;
    const fs::file_status found = fs::symlink_status(path, error);
    if (found.type() == fs::file_type::none)
        throw Error(printable(path.string()) + ": can't be read (" + error.message() + "); export the tasks again");
    if (fs::is_symlink(found))
        throw Error(path.string() + ": a link, which may lead out of the bundle; refusing to follow it");
    return found.type() != fs::file_type::not_found;
}

// The folders of one file, from the bundle down to the first that there is not, but for those that were `seen`.
void check_folders(const fs::path& bundle, const std::vector<std::string>& parts, std::set<std::string>& seen) {
    fs::path folder = bundle;
    for (std::size_t i = 0; i + 1 < parts.size(); ++i) {
        folder /= parts[i];
        if (seen.insert(folder.string()).second && !checked_folder(folder)) return;
    }
}

// The parts of a file's path. Throws Error where it leads out of the bundle.
std::vector<std::string> checked_parts(const fs::path& manifest, const File& file) {
    if (file.path.size() > kLongestPath) {
        throw Error(manifest.string() + ": a file path of " + std::to_string(file.path.size()) + " bytes; expected " +
                    std::to_string(kLongestPath) + " at most; export the tasks again");
    }
    std::vector<std::string> parts = parts_of(file.path);
    if (parts.empty() || parts == std::vector<std::string>{kManifest}) {
        throw Error(manifest.string() + ": file path " + in_quotes(file.path) +
                    " leaves the bundle, is its manifest or can't be printed; refusing to follow it");
    }
    return parts;
}

}  // namespace

fs::path tidy(const fs::path& path) {
    fs::path parts;
    for (const fs::path& part : path) {
        if (!part.empty() && part != ".") parts /= part;
    }
    return parts.empty() ? "." : parts;
}

void check_schema(const fs::path& path, std::int64_t schema) {
    const std::string found = path.string() + ": schema " + std::to_string(schema), ours = std::to_string(kSchema);
    if (schema > kSchema) throw Error(found + " is newer than this program reads (" + ours + "); update lorafuse");
    if (schema == kSchema) return;
    const std::string earlier = found + " is of an earlier lorafuse, and this one reads " + ours + "; ";
    if (schema == kUpgraded)
        throw Error(earlier + "run 'lorafuse bundle upgrade " + tidy(path.parent_path()).string() + "'");
    throw Error(earlier + "export the tasks again");
}

void check_manifest(const fs::path& path, const Manifest& manifest) {
    if (manifest.longest < 0) {
        throw Error(path.string() + ": the base's longest is " + std::to_string(manifest.longest) +
                    "; expected a number of tokens, or 0 for none; export the tasks again");
    }
    for (const auto& [digest, graph] : manifest.graphs) check_graph(path, digest, graph);
    for (const auto& [_, task] : manifest.tasks) check_task(path, task, manifest);
}

void check_paths(const fs::path& path, const Files& files) {
    const fs::path bundle = path.parent_path();
    std::vector<std::vector<std::string>> paths;
    for (const File& file : files) paths.push_back(checked_parts(path, file));
    for (const char* folder : kFolders) checked_folder(bundle / folder);
    std::set<std::string> seen;
    for (const auto& parts : paths) check_folders(bundle, parts, seen);
}

}  // namespace lorafuse

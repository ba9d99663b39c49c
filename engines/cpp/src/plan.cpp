#include "plan.hpp"

#include <algorithm>
#include <cctype>

namespace lorafuse {
namespace {

constexpr int kAmpere = 8;  // the major compute capability

// As Python's shlex.quote: a word that a shell takes as it is.
std::string quoted(const std::string& word) {
    const auto is_plain = [](unsigned char c) {
        return c < 128 && (std::isalnum(c) != 0 ||
                           std::string_view("_@%+=:,./-").find(static_cast<char>(c)) != std::string_view::npos);
    };
    if (!word.empty() && std::all_of(word.begin(), word.end(), is_plain)) return word;
    std::string text = "'";
    for (const char c : word) text += c == '\'' ? std::string("'\"'\"'") : std::string(1, c);
    return text + "'";
}

// Python's package of TensorRT up to 10.7 says three parts of its version, and what it is the how-manyth package of.
bool is_version(const std::string& recorded, const std::string& library) {
    const std::string parts = recorded.substr(0, recorded.find(".post"));
    const bool has_three = std::count(parts.begin(), parts.end(), '.') == 2;
    return parts == library || (has_three && library.compare(0, parts.size() + 1, parts + ".") == 0);
}

// Which plan of a task is meant: its own, or the unadapted graph's.
struct Wanted {
    const Bundle& bundle;
    const TaskRecord& task;
    bool adapted;
    const std::string& backend;

    Error refusal(const std::string& reason, const std::string& mode) const {
        return Error(bundle.path().string() + ": " + reason + "; run 'lorafuse build " +
                     quoted(bundle.path().string()) + " --task " + task.name + " --backend " + backend +
                     (mode == "rebuild" ? "" : " --mode " + mode) + (adapted ? "" : " --unadapted") + "'");
    }

    Error unusable(const std::string& reason, const std::string& mode) const {
        const std::string of = (adapted ? "'" : "the base under '") + task.name + "'";
        return refusal("the " + backend + " engine of " + of + " can't be used: " + reason, mode);
    }
};

const EngineRecord& recorded(const Wanted& wanted) {
    const Engines& engines = wanted.adapted ? wanted.task.engines : wanted.bundle.graph(wanted.task).engines;
    if (const auto found = engines.find(wanted.backend); found != engines.end()) return found->second;
    const std::string who = (wanted.adapted ? "task '" : "the base under task '") + wanted.task.name + "'";
    throw wanted.refusal(who + " has no " + wanted.backend + " engine", "rebuild");
}

std::string capability(int major, int minor) { return std::to_string(major) + "." + std::to_string(minor); }

}  // namespace

bool runs_on(const std::string& target, int major, int minor) {
    if (target == "portable" || target == "8.0+") return major >= kAmpere;
    return (", " + target + ", ").find(", " + capability(major, minor) + ", ") != std::string::npos;
}

std::uint64_t plan_size(const Bundle& bundle, const TaskRecord& task, bool adapted, const std::string& backend) {
    const EngineRecord& engine = recorded({bundle, task, adapted, backend});
    return engine.file ? static_cast<std::uint64_t>(engine.file->size) : 0;
}

std::filesystem::path plan_of(const Bundle& bundle, const TaskRecord& task, bool adapted, const Library& library) {
    const Wanted wanted{bundle, task, adapted, library.backend};
    const EngineRecord& engine = recorded(wanted);
    if (engine.mode == "stripped")
        throw wanted.unusable("its weights are put in at load, which this runtime does not do", "rebuild");
    if (adapted &&
        (engine.model_sha256 != task.model.sha256 || engine.weights_sha256 != bundle.weights_sha256(&task))) {
        throw wanted.unusable("it was built from an earlier export of the task", engine.mode);
    }
    if (!adapted && engine.weights_sha256 != bundle.weights_sha256(nullptr)) {
        throw wanted.unusable("it was built from another base", engine.mode);
    }
    if (!engine.file) throw wanted.unusable("the manifest names no plan", engine.mode);
    std::filesystem::path plan = bundle.checked(*engine.file);
    if (!is_version(engine.version, library.version)) {
        throw wanted.unusable("it was built by version " + engine.version + ", and this is " + library.version,
                              engine.mode);
    }
    const Device device = library.device();
    if (!runs_on(engine.target, device.major, device.minor)) {
        throw wanted.unusable("it was built for " + engine.target + ", and this is an " + device.name + " (" +
                                  capability(device.major, device.minor) + ")",
                              engine.mode);
    }
    return plan;
}

}  // namespace lorafuse

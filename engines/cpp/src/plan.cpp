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

// Which plan of a part is meant: its own, or the unadapted graph's.
struct Wanted {
    const Bundle& bundle;
    const TaskPart& part;
    bool adapted;
    const std::string& backend;

    const Engines& engines() const { return adapted ? part.part.engines : part.graph.engines; }

    Error refusal(const std::string& reason, const std::string& mode) const {
        return Error(bundle.path().string() + ": " + reason + "; run 'lorafuse build " +
                     quoted(bundle.path().string()) + " --task " + part.task.name + " --backend " + backend +
                     (mode == "rebuild" ? "" : " --mode " + mode) + (adapted ? "" : " --unadapted") + "'");
    }

    Error unusable(const std::string& reason, const std::string& mode) const {
        const std::string of = (adapted ? "'" : "the base under '") + part.task.name + "'";
        return refusal("the " + backend + " engine of " + of + " can't be used: " + reason, mode);
    }

    Error missing() const {
        const std::string who = (adapted ? "task '" : "the base under task '") + part.task.name + "'";
        return refusal(who + " has no " + backend + " engine", "rebuild");
    }
};

bool runs_here(const EngineRecord& engine, const Device& device) {
    return runs_on(engine.target, device.major, device.minor);
}

// Of the backend's engines, the one whose target this device can run; where none can, the first, to be refused. Where
// there is but one, the device is not asked for.
const EngineRecord& engine_here(const Wanted& wanted, const Library& library) {
    std::vector<const EngineRecord*> built;
    for (const EngineRecord& engine : wanted.engines()) {
        if (engine.backend == library.backend) built.push_back(&engine);
    }
    if (built.empty()) throw wanted.missing();
    if (built.size() == 1) return *built.front();
    const Device device = library.device();
    const auto found = std::find_if(built.begin(), built.end(),
                                    [&](const EngineRecord* engine) { return runs_here(*engine, device); });
    return found == built.end() ? *built.front() : **found;
}

// Further targets that engines of the backend were built for, none of which runs here either.
std::string other_targets(const Wanted& wanted, const EngineRecord& refused) {
    std::string others;
    for (const EngineRecord& engine : wanted.engines()) {
        if (engine.backend == refused.backend && engine.target != refused.target)
            others += (others.empty() ? "" : "; ") + engine.target;
    }
    return others.empty() ? "" : " (others were built for " + others + ")";
}

std::string capability(int major, int minor) { return std::to_string(major) + "." + std::to_string(minor); }

}  // namespace

bool runs_on(const std::string& target, int major, int minor) {
    if (target == "portable" || target == "8.0+") return major >= kAmpere;
    return (", " + target + ", ").find(", " + capability(major, minor) + ", ") != std::string::npos;
}

std::uint64_t plan_size(const Bundle& bundle, const TaskPart& part, bool adapted, const Library& library) {
    const EngineRecord& engine = engine_here({bundle, part, adapted, library.backend}, library);
    return engine.file ? static_cast<std::uint64_t>(engine.file->size) : 0;
}

PlanFile plan_of(const Bundle& bundle, const TaskPart& part, bool adapted, const Library& library) {
    const Wanted wanted{bundle, part, adapted, library.backend};
    const EngineRecord& engine = engine_here(wanted, library);
    if (engine.mode == "stripped")
        throw wanted.unusable("its weights are put in at load, which this runtime does not do", "rebuild");
    const bool same_weights = engine.weights_sha256 == bundle.weights_sha256(part, adapted);
    if (adapted && (!same_weights || engine.model_sha256 != part.part.model.sha256))
        throw wanted.unusable("it was built from an earlier export of the task", engine.mode);
    if (!adapted && !same_weights) throw wanted.unusable("it was built from another base", engine.mode);
    if (!engine.file) throw wanted.unusable("the manifest names no plan", engine.mode);
    PlanFile plan{bundle.files()->path_of(*engine.file), bundle.files()->mapped(*engine.file)};
    if (!is_version(engine.version, library.version)) {
        throw wanted.unusable("it was built by version " + engine.version + ", and this is " + library.version,
                              engine.mode);
    }
    const Device device = library.device();
    if (!runs_here(engine, device)) {
        throw wanted.unusable("it was built for " + engine.target + ", and this is an " + device.name + " (" +
                                  capability(device.major, device.minor) + ")" + other_targets(wanted, engine),
                              engine.mode);
    }
    return plan;
}

}  // namespace lorafuse

// What a call of lorafuse costs over ONNX Runtime's own, on one session and in turn; and what finding a loaded task
// costs.
//
//     lorafuse-overhead BUNDLE TASK LENGTH TURNS [LIBRARY]
#include <algorithm>
#include <chrono>
#include <cstdio>
#include <functional>

#include "opened_part.hpp"

namespace {

using Clock = std::chrono::steady_clock;
using lorafuse::Handle;

double microseconds(const std::function<void()>& call) {
    const auto started = Clock::now();
    call();
    return std::chrono::duration<double, std::micro>(Clock::now() - started).count();
}

double median(std::vector<double> values) {
    std::nth_element(values.begin(), values.begin() + static_cast<std::ptrdiff_t>(values.size() / 2), values.end());
    return values[values.size() / 2];
}

struct Compared {
    double first, added;  // medians, in microseconds: of the first call, and of what the second takes more
};

// Calls in turn, either first as often as the other.
Compared compared(const std::function<void()>& first, const std::function<void()>& second, int turns) {
    std::vector<double> took, added;
    for (int turn = 0; turn < turns; ++turn) {
        const double early = turn % 2 == 0 ? microseconds(first) : microseconds(second);
        const double late = turn % 2 == 0 ? microseconds(second) : microseconds(first);
        took.push_back(turn % 2 == 0 ? early : late);
        added.push_back(turn % 2 == 0 ? late - early : early - late);
    }
    return {median(took), median(added)};
}

// ONNX Runtime's own call with everything at hand that can be.
void run_raw(const lorafuse::Environment& environment, OrtSession* session, const lorafuse::Inputs& inputs) {
    std::vector<const char*> names;
    std::vector<Handle<OrtValue>> given;
    std::vector<const OrtValue*> values;
    for (const auto& [name, tensor] : inputs) {
        names.push_back(name.c_str());
        given.push_back(environment.value_of(tensor));
        values.push_back(given.back().get());
    }
    const char* const output = "logits";
    OrtValue* found = nullptr;
    environment.check(
        environment.api().Run(session, nullptr, names.data(), values.data(), names.size(), &output, 1, &found));
    environment.api().ReleaseValue(found);
}

// The task as the runtime has it, whose session shares the base's weights, beside one of its own.
void measure(const std::string& path, const std::string& name, std::int64_t length, int turns,
             const std::string& library) {
    const lorafuse::Bundle bundle(path);
    lorafuse::OpenedPart part(bundle, bundle.part(bundle.task(name), "model"));
    const auto environment = std::make_shared<const lorafuse::Environment>(library);
    lorafuse::Model model = part.dedicated_model(true);
    const lorafuse::Session sharing(environment, model, 1);
    model.shared.clear();
    const lorafuse::Session alone(environment, model, 1), another(environment, model, 1);
    lorafuse::Options options;
    options.threads = 1, options.onnxruntime = library;
    lorafuse::Runtime runtime(path, options);
    const std::vector<std::int64_t> ones(static_cast<std::size_t>(length), 1);
    lorafuse::Inputs inputs;
    for (const lorafuse::Port& port : bundle.inputs(part.part())) inputs[port.name] = lorafuse::view(ones, {1, length});
    runtime.run(name, inputs);
    const auto raw_alone = [&] { run_raw(*environment, alone.handle(), inputs); };
    const auto raw_sharing = [&] { run_raw(*environment, sharing.handle(), inputs); };
    const Compared control = compared(raw_alone, [&] { run_raw(*environment, another.handle(), inputs); }, turns);
    const Compared shared = compared(raw_alone, raw_sharing, turns);
    const auto ask = [&] {
        const lorafuse::Task task = runtime.use(name);
        sharing.run(inputs, {});
    };
    const Compared ours = compared(raw_sharing, ask, turns);
    std::printf(
        "ONNX Runtime alone %.1f us; sharing the base's weights adds %.1f us (another session like the first: %.1f "
        "us)\n",
        shared.first, shared.added, control.added);
    std::printf("ONNX Runtime %.1f us; finding the task and calling by lorafuse adds %.1f us (%.2f %%)\n", ours.first,
                ours.added, 100 * ours.added / ours.first);
}

}  // namespace

int main(int count, char** values) {
    try {
        if (count < 5) throw lorafuse::Error("usage: lorafuse-overhead BUNDLE TASK LENGTH TURNS [LIBRARY]");
        measure(values[1], values[2], std::stoll(values[3]), std::stoi(values[4]),
                count > 5 ? values[5] : LORAFUSE_ONNXRUNTIME_LIBRARY);
        return 0;
    } catch (const std::exception& error) {
        std::fprintf(stderr, "lorafuse-overhead: %s\n", error.what());
        return 3;
    }
}

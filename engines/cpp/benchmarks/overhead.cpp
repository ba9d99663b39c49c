// What a call of lorafuse costs over ONNX Runtime's own, on one session and in turn; and what finding a loaded task costs.
//
//     lorafuse-overhead BUNDLE TASK LENGTH TURNS [LIBRARY]
#include <algorithm>
#include <array>
#include <chrono>
#include <cstdio>
#include <functional>

#include "models.hpp"

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
    environment.check(environment.api().Run(session, nullptr, names.data(), values.data(), names.size(), &output, 1, &found));
    environment.api().ReleaseValue(found);
}

// The task as the runtime has it, whose session shares the base's weights, beside a session of its own from the files.
void measure(const std::string& path, const std::string& name, std::int64_t length, int turns, const std::string& library) {
    const lorafuse::Bundle bundle(path);
    const lorafuse::Stored stored(bundle, bundle.task(name));
    const auto environment = std::make_shared<const lorafuse::Environment>(library);
    const lorafuse::Session alone(environment, {bundle.model(stored.task), bundle.path(), {}, {}}, 1);
    const lorafuse::Session sharing(environment, lorafuse::dedicated_model(bundle, stored, true), 1);
    lorafuse::Options options;
    options.threads = 1, options.onnxruntime = library;
    lorafuse::Runtime runtime(path, options);
    const std::vector<std::int64_t> ones(static_cast<std::size_t>(length), 1);
    lorafuse::Inputs inputs;
    for (const lorafuse::Port& port : bundle.inputs(stored.task)) inputs[port.name] = lorafuse::view(ones, {1, length});
    runtime.run(name, inputs);
    const std::array<std::function<void()>, 3> calls = {[&] { run_raw(*environment, alone.handle(), inputs); },
                                                        [&] { run_raw(*environment, sharing.handle(), inputs); },
                                                        [&] { sharing.run(inputs, {}); }};
    std::vector<double> raw, shared, added, found;
    for (std::size_t turn = 0; turn < static_cast<std::size_t>(turns); ++turn) {
        std::array<double, 3> took{};
        for (std::size_t i = 0; i < 3; ++i) took[(turn + i) % 3] = microseconds(calls[(turn + i) % 3]);
        raw.push_back(took[0]), shared.push_back(took[1] - took[0]), added.push_back(took[2] - took[1]);
        found.push_back(microseconds([&] { runtime.use(name); }));
    }
    const double call = median(raw), of_sharing = median(shared), ours = median(added) + median(found);
    std::printf("ONNX Runtime alone %.1f us; sharing the base's weights adds %.1f us (%.2f %%)\n", call, of_sharing,
                100 * of_sharing / call);
    std::printf("a run adds %.1f us, finding the task %.1f us: %.2f %%\n", median(added), median(found), 100 * ours / call);
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

// What a call of lorafuse costs over ONNX Runtime's own, on one session and in turn; and what finding a loaded task costs.
//
//     lorafuse-overhead BUNDLE TASK LENGTH PAIRS [LIBRARY]
#include <algorithm>
#include <chrono>
#include <cstdio>
#include <functional>

#include "bundle.hpp"
#include "onnxruntime.hpp"

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

void measure(const std::string& path, const std::string& name, std::int64_t length, int pairs, const std::string& library) {
    const lorafuse::Bundle bundle(path);
    const lorafuse::TaskRecord& record = bundle.task(name);
    const auto environment = std::make_shared<const lorafuse::Environment>(library);
    const lorafuse::Session session(environment, {bundle.model(record), bundle.path(), {}, {}}, 1);
    lorafuse::Options options;
    options.threads = 1, options.onnxruntime = library;
    lorafuse::Runtime runtime(path, options);
    const std::vector<std::int64_t> ones(static_cast<std::size_t>(length), 1);
    lorafuse::Inputs inputs;
    for (const lorafuse::Port& port : bundle.graph(record).inputs) inputs[port.name] = lorafuse::view(ones, {1, length});
    runtime.run(name, inputs);
    std::vector<double> raw, added, found;
    for (int i = 0; i < pairs; ++i) {
        double ours = 0, theirs = 0;
        const auto run_ours = [&] { ours = microseconds([&] { session.run(inputs, {}); }); };
        const auto run_theirs = [&] { theirs = microseconds([&] { run_raw(*environment, session.handle(), inputs); }); };
        if (i % 2 == 0) run_ours(), run_theirs();
        else run_theirs(), run_ours();
        raw.push_back(theirs), added.push_back(ours - theirs);
        found.push_back(microseconds([&] { runtime.use(name); }));
    }
    std::printf("raw %.1f us; a run adds %.1f us, finding the task %.1f us: %.2f %%\n", median(raw), median(added), median(found),
                100 * (median(added) + median(found)) / median(raw));
}

}  // namespace

int main(int count, char** values) {
    try {
        if (count < 5) throw lorafuse::Error("usage: lorafuse-overhead BUNDLE TASK LENGTH PAIRS [LIBRARY]");
        measure(values[1], values[2], std::stoll(values[3]), std::stoi(values[4]),
                count > 5 ? values[5] : LORAFUSE_ONNXRUNTIME_LIBRARY);
        return 0;
    } catch (const std::exception& error) {
        std::fprintf(stderr, "lorafuse-overhead: %s\n", error.what());
        return 3;
    }
}

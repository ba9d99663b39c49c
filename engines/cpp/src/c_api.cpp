#include <map>
#include <new>
#include <string>
#include <utility>
#include <vector>

#include "lorafuse.h"
#include "lorafuse/runtime.hpp"

struct lorafuse_runtime {
    lorafuse::Runtime runtime;
    std::vector<std::string> tasks;
    std::map<std::string, std::vector<std::string>> parts;  // the roles, by task
};

struct lorafuse_outputs {
    std::vector<std::pair<std::string, lorafuse::Tensor>> tensors;
};

namespace {

thread_local std::string last_error;

// No exception may cross into C.
template <typename Call>
int guarded(Call call) noexcept {
    try {
        call();
        return LORAFUSE_OK;
    } catch (const std::exception& error) {
        try {
            last_error = error.what();
        } catch (const std::bad_alloc&) {
            last_error.clear();
        }
        return LORAFUSE_REFUSED;
    }
}

template <typename T>
T* given(T* pointer, const char* what) {
    if (pointer == nullptr) throw lorafuse::Error(std::string(what) + " is NULL");
    return pointer;
}

lorafuse::Options options_of(const lorafuse_options* options) {
    if (options == nullptr) return {};
    if (options->mode != LORAFUSE_DEDICATED && options->mode != LORAFUSE_RESIDENT) {
        throw lorafuse::Error("mode " + std::to_string(options->mode) +
                              " is not known; expected LORAFUSE_DEDICATED or LORAFUSE_RESIDENT");
    }
    if (options->backend < LORAFUSE_ONNXRUNTIME || options->backend > LORAFUSE_TENSORRT_RTX) {
        throw lorafuse::Error(
            "backend " + std::to_string(options->backend) +
            " is not known; expected LORAFUSE_ONNXRUNTIME, LORAFUSE_TENSORRT or LORAFUSE_TENSORRT_RTX");
    }
    const auto mode = options->mode == LORAFUSE_RESIDENT ? lorafuse::Mode::resident : lorafuse::Mode::dedicated;
    const auto backend = static_cast<lorafuse::Backend>(options->backend);
    return {mode, backend, options->threads, options->memory,
            options->onnxruntime == nullptr ? "" : options->onnxruntime};
}

lorafuse::Inputs inputs_of(const lorafuse_tensor* tensors, size_t count) {
    lorafuse::Inputs inputs;
    if (count > 0) given(tensors, "the list of inputs");
    for (size_t i = 0; i < count; ++i) {
        const lorafuse_tensor& tensor = tensors[i];
        const char* name = given(tensor.name, "an input's name");
        if (tensor.rank > 0) given(tensor.shape, "an input's shape");
        const auto dtype = static_cast<lorafuse::DType>(tensor.dtype);
        if (!inputs
                 .emplace(
                     name,
                     lorafuse::TensorView{dtype, {tensor.shape, tensor.shape + tensor.rank}, tensor.data, tensor.bytes})
                 .second) {
            throw lorafuse::Error(std::string("input '") + name + "' is given twice");
        }
    }
    return inputs;
}

lorafuse_runtime* opened(const char* bundle, const lorafuse_options* options) {
    lorafuse::Runtime runtime(given(bundle, "the bundle"), options_of(options));
    std::vector<std::string> tasks = runtime.tasks();
    std::map<std::string, std::vector<std::string>> parts;
    for (const std::string& task : tasks) parts[task] = runtime.parts(task);
    return new lorafuse_runtime{std::move(runtime), std::move(tasks), std::move(parts)};
}

}  // namespace

const char* lorafuse_error(void) { return last_error.c_str(); }

int lorafuse_open(const char* bundle, const lorafuse_options* options, lorafuse_runtime** runtime) {
    return guarded([&] {
        given(runtime, "where the runtime goes");
        *runtime = opened(bundle, options);
    });
}

void lorafuse_close(lorafuse_runtime* runtime) { delete runtime; }

const char* lorafuse_task(const lorafuse_runtime* runtime, size_t index) {
    return runtime != nullptr && index < runtime->tasks.size() ? runtime->tasks[index].c_str() : nullptr;
}

const char* lorafuse_label(const lorafuse_runtime* runtime, const char* task, size_t index) {
    const char* label = nullptr;
    guarded([&] {
        const std::vector<std::string>& labels = given(runtime, "the runtime")->runtime.labels(given(task, "the task"));
        if (index < labels.size()) label = labels[index].c_str();
    });
    return label;
}

const char* lorafuse_part(const lorafuse_runtime* runtime, const char* task, size_t index) {
    if (runtime == nullptr || task == nullptr) return nullptr;
    const auto found = runtime->parts.find(task);
    return found != runtime->parts.end() && index < found->second.size() ? found->second[index].c_str() : nullptr;
}

int lorafuse_run_part(lorafuse_runtime* runtime, const char* task, const char* part, int adapted,
                      const lorafuse_tensor* inputs, size_t count, lorafuse_outputs** outputs) {
    return guarded([&] {
        given(outputs, "where the outputs go");
        lorafuse::Runtime& opened = given(runtime, "the runtime")->runtime;
        const std::string role = part == nullptr ? "model" : part;
        lorafuse::Outputs found = opened.run(given(task, "the task"), inputs_of(inputs, count), adapted != 0, role);
        *outputs = new lorafuse_outputs{{found.begin(), found.end()}};
    });
}

int lorafuse_run(lorafuse_runtime* runtime, const char* task, int adapted, const lorafuse_tensor* inputs, size_t count,
                 lorafuse_outputs** outputs) {
    return lorafuse_run_part(runtime, task, nullptr, adapted, inputs, count, outputs);
}

size_t lorafuse_count(const lorafuse_outputs* outputs) { return outputs == nullptr ? 0 : outputs->tensors.size(); }

lorafuse_tensor lorafuse_output(const lorafuse_outputs* outputs, size_t index) {
    if (index >= lorafuse_count(outputs)) return {nullptr, LORAFUSE_FLOAT32, nullptr, 0, nullptr, 0};
    const auto& [name, tensor] = outputs->tensors[index];
    const lorafuse::TensorView& view = tensor.view();
    return {name.c_str(), static_cast<lorafuse_dtype>(view.dtype), view.shape.data(), view.shape.size(), view.data,
            view.bytes};
}

void lorafuse_free(lorafuse_outputs* outputs) { delete outputs; }

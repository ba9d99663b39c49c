#include <cstdint>
#include <mutex>
#include <new>
#include <set>
#include <string>
#include <utility>
#include <variant>
#include <vector>

#include "lorafuse.h"
#include "lorafuse/runtime.hpp"

// Each once, at a place that stays: what a caller was given lives as long as the runtime, whatever is reloaded.
struct Kept {
    std::mutex mutex;
    std::set<std::string> texts;
    std::set<std::vector<std::int64_t>> sizes;
    std::set<std::vector<const char*>> axes;

    const char* text(const std::string& value) {
        const std::lock_guard lock(mutex);
        return texts.insert(value).first->c_str();
    }
};

struct lorafuse_runtime {
    lorafuse::Runtime runtime;
    Kept kept;
};

struct lorafuse_use {
    lorafuse::Task task;
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

// What a call gives; of a refused one, nothing.
template <typename Call>
auto value_of(Call call) noexcept {
    decltype(call()) value{};
    guarded([&] { value = call(); });
    return value;
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
    return {mode,
            backend,
            options->threads,
            options->memory,
            options->onnxruntime == nullptr ? "" : options->onnxruntime,
            options->digest == nullptr ? "" : options->digest};
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

// What a pointer stands for, which is nothing until the call is done.
template <typename T>
void nothing_in(T** made, const char* what) {
    *given(made, what) = nullptr;
}

std::string role_of(const char* part) { return part == nullptr ? "model" : part; }

const char* text_at(lorafuse_runtime& runtime, const std::vector<std::string>& texts, size_t index) {
    return index < texts.size() ? runtime.kept.text(texts[index]) : nullptr;
}

lorafuse_port port_of(lorafuse_runtime& runtime, const lorafuse::Port& port) {
    std::vector<std::int64_t> sizes;
    std::vector<const char*> axes;
    for (const auto& size : port.shape) {
        const auto* axis = std::get_if<std::string>(&size);
        sizes.push_back(axis == nullptr ? std::get<std::int64_t>(size) : -1);
        axes.push_back(axis == nullptr ? nullptr : runtime.kept.text(*axis));
    }
    const char* name = runtime.kept.text(port.name);
    const std::lock_guard lock(runtime.kept.mutex);
    return {name, static_cast<lorafuse_dtype>(port.dtype), runtime.kept.sizes.insert(sizes).first->data(),
            runtime.kept.axes.insert(axes).first->data(), sizes.size()};
}

}  // namespace

const char* lorafuse_error(void) { return last_error.c_str(); }

int lorafuse_open(const char* bundle, const lorafuse_options* options, lorafuse_runtime** runtime) {
    return guarded([&] {
        nothing_in(runtime, "where the runtime goes");
        *runtime = new lorafuse_runtime{lorafuse::Runtime(given(bundle, "the bundle"), options_of(options)), {}};
    });
}

void lorafuse_close(lorafuse_runtime* runtime) { delete runtime; }

const char* lorafuse_digest(lorafuse_runtime* runtime) {
    return value_of([&] {
        lorafuse_runtime& of = *given(runtime, "the runtime");
        return of.kept.text(of.runtime.digest());
    });
}

int lorafuse_reload(lorafuse_runtime* runtime, const char* digest) {
    return guarded([&] { given(runtime, "the runtime")->runtime.reload(digest == nullptr ? "" : digest); });
}

int lorafuse_preload(lorafuse_runtime* runtime, const char* task) {
    return guarded([&] { given(runtime, "the runtime")->runtime.preload(given(task, "the task")); });
}

int lorafuse_evict(lorafuse_runtime* runtime, const char* task) {
    return guarded([&] { given(runtime, "the runtime")->runtime.evict(given(task, "the task")); });
}

const char* lorafuse_task(lorafuse_runtime* runtime, size_t index) {
    return value_of([&] {
        lorafuse_runtime& of = *given(runtime, "the runtime");
        return text_at(of, of.runtime.tasks(), index);
    });
}

const char* lorafuse_label(lorafuse_runtime* runtime, const char* task, size_t index) {
    return value_of([&] {
        lorafuse_runtime& of = *given(runtime, "the runtime");
        return text_at(of, of.runtime.labels(given(task, "the task")), index);
    });
}

lorafuse_port lorafuse_input(lorafuse_runtime* runtime, const char* task, const char* part, size_t index) {
    return value_of([&] {
        lorafuse::Runtime& opened = given(runtime, "the runtime")->runtime;
        const std::vector<lorafuse::Port> ports = opened.inputs(given(task, "the task"), role_of(part));
        return index < ports.size() ? port_of(*runtime, ports[index]) : lorafuse_port{};
    });
}

const char* lorafuse_part(lorafuse_runtime* runtime, const char* task, size_t index) {
    return value_of([&] {
        lorafuse_runtime& of = *given(runtime, "the runtime");
        return text_at(of, of.runtime.parts(given(task, "the task")), index);
    });
}

int lorafuse_begin(lorafuse_runtime* runtime, const char* task, int adapted, lorafuse_use** use) {
    return guarded([&] {
        nothing_in(use, "where the use goes");
        lorafuse::Runtime& opened = given(runtime, "the runtime")->runtime;
        *use = new lorafuse_use{opened.use(given(task, "the task"), adapted != 0)};
    });
}

int lorafuse_run_use(const lorafuse_use* use, const char* part, const lorafuse_tensor* inputs, size_t count,
                     lorafuse_outputs** outputs) {
    return guarded([&] {
        nothing_in(outputs, "where the outputs go");
        const lorafuse::Task& task = given(use, "the use")->task;
        lorafuse::Outputs found = task.run(inputs_of(inputs, count), role_of(part));
        *outputs = new lorafuse_outputs{{found.begin(), found.end()}};
    });
}

void lorafuse_end(lorafuse_use* use) { delete use; }

int lorafuse_run_part(lorafuse_runtime* runtime, const char* task, const char* part, int adapted,
                      const lorafuse_tensor* inputs, size_t count, lorafuse_outputs** outputs) {
    return guarded([&] {
        nothing_in(outputs, "where the outputs go");
        lorafuse::Runtime& opened = given(runtime, "the runtime")->runtime;
        const char* name = given(task, "the task");
        lorafuse::Outputs found = opened.run(name, inputs_of(inputs, count), adapted != 0, role_of(part));
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

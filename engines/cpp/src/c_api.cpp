#include <new>
#include <string>

#include "lorafuse.h"
#include "lorafuse/runtime.hpp"

struct lorafuse_runtime {
    lorafuse::Runtime runtime;
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

const char* given(const char* text, const char* what) {
    if (text == nullptr) throw lorafuse::Error(std::string(what) + " is NULL; give a text");
    return text;
}

lorafuse::Options options_of(const lorafuse_options* options) {
    if (options == nullptr) return {};
    if (options->mode != LORAFUSE_DEDICATED && options->mode != LORAFUSE_RESIDENT) {
        throw lorafuse::Error("mode " + std::to_string(options->mode) +
                              " is not known; expected LORAFUSE_DEDICATED or LORAFUSE_RESIDENT");
    }
    const auto mode = options->mode == LORAFUSE_RESIDENT ? lorafuse::Mode::resident : lorafuse::Mode::dedicated;
    return {mode, options->threads, options->memory, options->onnxruntime == nullptr ? "" : options->onnxruntime};
}

lorafuse::Inputs inputs_of(const lorafuse_tensor* tensors, size_t count) {
    lorafuse::Inputs inputs;
    for (size_t i = 0; i < count; ++i) {
        const lorafuse_tensor& tensor = tensors[i];
        inputs[given(tensor.name, "an input's name")] = {
            static_cast<lorafuse::DType>(tensor.dtype), {tensor.shape, tensor.shape + tensor.rank}, tensor.data, tensor.bytes};
    }
    return inputs;
}

}  // namespace

const char* lorafuse_error(void) { return last_error.c_str(); }

int lorafuse_open(const char* bundle, const lorafuse_options* options, lorafuse_runtime** runtime) {
    return guarded([&] { *runtime = new lorafuse_runtime{lorafuse::Runtime(given(bundle, "the bundle"), options_of(options))}; });
}

void lorafuse_close(lorafuse_runtime* runtime) { delete runtime; }

int lorafuse_run(lorafuse_runtime* runtime, const char* task, int adapted, const lorafuse_tensor* inputs, size_t count,
                 lorafuse_outputs** outputs) {
    return guarded([&] {
        lorafuse::Outputs found = runtime->runtime.run(given(task, "the task"), inputs_of(inputs, count), adapted != 0);
        *outputs = new lorafuse_outputs{{found.begin(), found.end()}};
    });
}

size_t lorafuse_count(const lorafuse_outputs* outputs) { return outputs->tensors.size(); }

lorafuse_tensor lorafuse_output(const lorafuse_outputs* outputs, size_t index) {
    const auto& [name, tensor] = outputs->tensors[index];
    const lorafuse::TensorView& view = tensor.view();
    return {name.c_str(), static_cast<lorafuse_dtype>(view.dtype), view.shape.data(), view.shape.size(), view.data, view.bytes};
}

void lorafuse_free(lorafuse_outputs* outputs) { delete outputs; }

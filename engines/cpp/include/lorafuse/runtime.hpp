// The tasks of a bundle in one process, on ONNX Runtime's CPU provider or TensorRT. C++17; docs/cpp.md has a whole
// program.
//
//     lorafuse::Runtime runtime("bundle");
//     std::vector<std::int64_t> ids{101, 2307, 3185, 102}, mask(4, 1), types(4, 0);
//     auto outputs = runtime.run("movies", {{"input_ids", lorafuse::view(ids, {1, 4})},
//                                           {"attention_mask", lorafuse::view(mask, {1, 4})},
//                                           {"token_type_ids", lorafuse::view(types, {1, 4})}});
//     const float* logits = outputs.at("logits").data<float>();
#pragma once

#include <cstddef>
#include <cstdint>
#include <filesystem>
#include <map>
#include <memory>
#include <stdexcept>
#include <string>
#include <type_traits>
#include <utility>
#include <variant>
#include <vector>

#include "lorafuse/export.h"

namespace lorafuse {

// What went wrong, in one line: the file, the field or tensor, what was expected, and what to do.
// Whatever it quotes of a stranger's file is escaped and can't steer a terminal.
class LORAFUSE_API Error : public std::runtime_error {
public:
    explicit Error(const std::string& message);
};

enum class DType {
    float32,
    float16,
    bfloat16,
    float64,
    int64,
    int32,
    int16,
    int8,
    uint8,
    boolean,
    uint16,
    uint32,
    uint64
};

// The dtype's name as the manifest has it, such as "float32"; and the bytes of one element.
LORAFUSE_API const char* name_of(DType dtype);
LORAFUSE_API std::size_t size_of(DType dtype);

// An array in the caller's memory, row-major and without gaps. It is read during the call and not copied.
struct TensorView {
    DType dtype;
    std::vector<std::int64_t> shape;
    const void* data;
    std::size_t bytes;
};

// The dtype of a C++ type; the two halves have none.
template <typename T>
constexpr DType dtype_of() {
    if constexpr (std::is_same_v<T, float>) return DType::float32;
    else if constexpr (std::is_same_v<T, double>) return DType::float64;
    else if constexpr (std::is_same_v<T, std::int64_t>) return DType::int64;
    else if constexpr (std::is_same_v<T, std::int32_t>) return DType::int32;
    else if constexpr (std::is_same_v<T, std::int16_t>) return DType::int16;
    else if constexpr (std::is_same_v<T, std::int8_t>) return DType::int8;
    else if constexpr (std::is_same_v<T, std::uint64_t>) return DType::uint64;
    else if constexpr (std::is_same_v<T, std::uint32_t>) return DType::uint32;
    else if constexpr (std::is_same_v<T, std::uint16_t>) return DType::uint16;
    else if constexpr (std::is_same_v<T, std::uint8_t>) return DType::uint8;
    else {
        static_assert(std::is_same_v<T, bool>, "a type that no dtype has");
        return DType::boolean;
    }
}

// A view of a vector, which must outlive it; not of a temporary one.
template <typename T>
TensorView view(const std::vector<T>& values, std::vector<std::int64_t> shape) {
    return {dtype_of<T>(), std::move(shape), values.data(), values.size() * sizeof(T)};
}
template <typename T>
TensorView view(const std::vector<T>&& values, std::vector<std::int64_t> shape) = delete;

// An output. It owns its memory, which the backend wrote, and may outlive the runtime.
class Tensor {
public:
    Tensor(TensorView content, std::shared_ptr<void> owner) : content_(std::move(content)), owner_(std::move(owner)) {}

    // As an input of the next run, without a copy. The tensor must outlive the view.
    const TensorView& view() const { return content_; }
    DType dtype() const { return content_.dtype; }
    const std::vector<std::int64_t>& shape() const { return content_.shape; }
    std::size_t count() const { return content_.bytes / size_of(content_.dtype); }

    // The elements. Throws Error where T is not the tensor's dtype; use view().data for those without a C++ type.
    template <typename T>
    const T* data() const {
        if (dtype_of<T>() != content_.dtype) {
            throw Error(std::string("the tensor is ") + name_of(content_.dtype) + ", not " + name_of(dtype_of<T>()));
        }
        return static_cast<const T*>(content_.data);
    }

private:
    TensorView content_;
    std::shared_ptr<void> owner_;
};

using Inputs = std::map<std::string, TensorView>;
using Outputs = std::map<std::string, Tensor>;

// An input of a graph. A dimension is a size or the name of a dynamic axis.
struct Port {
    std::string name;
    DType dtype;
    std::vector<std::variant<std::int64_t, std::string>> shape;
};

// dedicated: a session for each task, as fast as the unadapted model. Sessions share the base's weights.
// resident: one session for the tasks of a graph, which takes a task's tensors with the run: a switch costs nothing,
// and each run what it costs that those weights are not prepacked.
enum class Mode { dedicated, resident };

// onnxruntime: a task's ONNX graph, on ONNX Runtime's CPU provider.
// tensorrt, tensorrt_rtx: the plan that `lorafuse build` made of the task; of the two, the one that this library was
// built with (TENSORRT_ROOT), and in dedicated mode. The runs of a task take turns.
enum class Backend { onnxruntime, tensorrt, tensorrt_rtx };

struct Options {
    Mode mode = Mode::dedicated;
    Backend backend = Backend::onnxruntime;
    // Threads of ONNX Runtime, as many as the machine's cores at most; 0: every core. A bounded session does not spin
    // while it waits.
    int threads = 0;
    // Bytes of weights that tasks may hold beside the base, of plans all; 0: no bound. The longest unused task is given
    // up first.
    std::uint64_t memory = 0;
    // ONNX Runtime's library, by name or path; empty: the one that this library was built for.
    std::string onnxruntime;
    // Pins the bundle to its manifest's SHA-256, "sha256:…" as `lorafuse bundle ls` prints it; empty: any bundle.
    std::string digest;
};

class LoadedTask;

// A task that is loaded, with all its parts, and stays so for as long as this object lives, even where the runtime's
// ends before. While it lives, it counts as in use by the thread that asked for it.
class LORAFUSE_API Task {
public:
    // The outputs of a part by name; a model of one part needs no word for it. Throws Error when the inputs do not fit
    // (names, dtypes and ranks; token ids, masks and lengths beyond what the base takes), or there is no such part.
    Outputs run(const Inputs& inputs, const std::string& part = "model") const;

private:
    friend class Runtime;
    Task(std::shared_ptr<const void> runtime, std::shared_ptr<const LoadedTask> loaded)
        : runtime_(std::move(runtime)), loaded_(std::move(loaded)) {}
    std::shared_ptr<const void> runtime_;  // given back last
    std::shared_ptr<const LoadedTask> loaded_;
};

// Every method may be called from any thread. A task is loaded when it is first asked for. A runtime may end while
// tasks are in use: it never waits for them, and the last of them gives the memory back.
class LORAFUSE_API Runtime {
public:
    // Throws Error when there is no bundle, its manifest is damaged, the machine has fewer cores than `threads`, or the
    // backend's library can't be used.
    explicit Runtime(const std::filesystem::path& bundle, const Options& options = {});
    ~Runtime();
    Runtime(Runtime&&) noexcept;
    Runtime& operator=(Runtime&&) noexcept;

    // The names of the tasks that can be asked for; and of those that are loaded, the longest unused first.
    std::vector<std::string> tasks() const;
    std::vector<std::string> loaded() const;

    // The manifest's SHA-256, "sha256:…", as it was when the runtime was opened, or reloaded last.
    std::string digest() const;

    // A task's class labels in the order of the outputs (none for a regression); the roles of its parts, which of most
    // models is "model" alone; and what a part's graph takes.
    std::vector<std::string> labels(const std::string& task) const;
    std::vector<std::string> parts(const std::string& task) const;
    std::vector<Port> inputs(const std::string& task, const std::string& part = "model") const;

    // Load the task now, so that its first answer need not wait for it. Throws as `use` does.
    void preload(const std::string& task);

    // Give the task's memory back: now, or when those who use it are done. Who asks for it later has it loaded again.
    // Throws Error when there is no such task.
    void evict(const std::string& task);

    // Take the bundle as it is now. What is in use ends on what it began with, and tasks that are as they were stay
    // loaded. `digest` pins what is taken, and must be given where Options::digest was. Throws Error, and goes on as
    // before, when the bundle can't be opened or is another.
    void reload(const std::string& digest = "");

    // The task, kept loaded. Without `adapted`, the base under the task's head. Where other threads hold the memory, it
    // waits. Throws Error when there is no such task, its files are damaged or have changed since the manifest was
    // read, the memory can never hold it, or only this thread's own use could make room.
    Task use(const std::string& task, bool adapted = true);

    // The outputs of a part of the task by name. Throws as `use` does, and as the task's `run`.
    Outputs run(const std::string& task, const Inputs& inputs, bool adapted = true, const std::string& part = "model");

private:
    struct State;
    std::shared_ptr<State> state_;
};

}  // namespace lorafuse

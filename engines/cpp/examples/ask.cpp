// How a C++ program embeds a bundle: it classifies token ids, or generates with a language model.
//
//     lorafuse-ask BUNDLE --task movies --ids 101,2307,3185,102
//     lorafuse-ask BUNDLE --task supersense --ids 1,2,3 --tokens 8 --mode resident
#include <algorithm>
#include <charconv>
#include <cstdio>
#include <iostream>
#include <limits>
#include <numeric>
#include <sstream>
#include <string_view>

#include "lorafuse/runtime.hpp"

namespace {

using lorafuse::Inputs;
using lorafuse::Outputs;
using Ids = std::vector<std::int64_t>;

struct Arguments {
    std::string bundle, task, part = "model";
    Ids ids;
    std::int64_t tokens = 0;
    bool adapted = true, raw = false;
    lorafuse::Options options;
};

constexpr const char* kUsage =
    "usage: lorafuse-ask BUNDLE --task NAME --ids 101,2307,102 [options]\n"
    "Prints the likeliest class and its logit; of a regression, the value; with --tokens, the tokens that a language "
    "model adds.\n"
    "  --tokens N              generate N tokens\n"
    "  --part NAME             of a model that has several\n"
    "  --mode dedicated|resident\n"
    "  --backend onnxruntime|tensorrt|tensorrt-rtx\n"
    "  --threads N             of ONNX Runtime, 1 unless given; 0: every core\n"
    "  --memory BYTES          of weights that tasks may hold\n"
    "  --unadapted             the base under the task's head\n"
    "  --digest sha256:…       refuse any other bundle\n"
    "  --onnxruntime PATH      ONNX Runtime's library\n"
    "  --raw                   every output's bytes, in hex\n";

// What is wrong with the words, and which there are; of many lines, as no lorafuse::Error is.
struct Usage : std::runtime_error {
    explicit Usage(const std::string& wrong) : std::runtime_error(wrong + "\n" + kUsage) {}
};

std::int64_t number_of(const std::string& name, const std::string& text) {
    std::int64_t number = 0;
    const auto [end, error] = std::from_chars(text.data(), text.data() + text.size(), number);
    if (error != std::errc() || end != text.data() + text.size() || number < 0) {
        throw lorafuse::Error(name + " '" + text + "': expected a whole number, 0 or more");
    }
    return number;
}

int threads_of(const std::string& name, const std::string& text) {
    const std::int64_t threads = number_of(name, text);
    if (threads > std::numeric_limits<int>::max())
        throw lorafuse::Error(name + " " + text + ": more than any machine has");
    return static_cast<int>(threads);
}

Ids ids_of(const std::string& text) {
    Ids ids;
    std::stringstream parts(text);
    for (std::string part; std::getline(parts, part, ',');) ids.push_back(number_of("--ids", part));
    return ids;
}

lorafuse::Mode mode_of(const std::string& name) {
    if (name == "dedicated") return lorafuse::Mode::dedicated;
    if (name == "resident") return lorafuse::Mode::resident;
    throw lorafuse::Error("mode '" + name + "' is not known; expected dedicated or resident");
}

lorafuse::Backend backend_of(const std::string& name) {
    if (name == "onnxruntime") return lorafuse::Backend::onnxruntime;
    if (name == "tensorrt") return lorafuse::Backend::tensorrt;
    if (name == "tensorrt-rtx") return lorafuse::Backend::tensorrt_rtx;
    throw lorafuse::Error("backend '" + name + "' is not known; expected onnxruntime, tensorrt or tensorrt-rtx");
}

Arguments arguments_of(int count, char** values) {
    Arguments arguments;
    arguments.options.threads = 1;
    for (int i = 1; i < count; ++i) {
        const std::string name = values[i];
        const auto value = [&]() -> std::string {
            if (++i == count) throw lorafuse::Error(name + " needs a value");
            return values[i];
        };
        if (name == "--task") arguments.task = value();
        else if (name == "--ids") arguments.ids = ids_of(value());
        else if (name == "--part") arguments.part = value();
        else if (name == "--tokens") arguments.tokens = number_of(name, value());
        else if (name == "--mode") arguments.options.mode = mode_of(value());
        else if (name == "--backend") arguments.options.backend = backend_of(value());
        else if (name == "--threads") arguments.options.threads = threads_of(name, value());
        else if (name == "--memory") arguments.options.memory = static_cast<std::uint64_t>(number_of(name, value()));
        else if (name == "--onnxruntime") arguments.options.onnxruntime = value();
        else if (name == "--digest") arguments.options.digest = value();
        else if (name == "--unadapted") arguments.adapted = false;
        else if (name == "--raw") arguments.raw = true;
        else if (arguments.bundle.empty() && name[0] != '-') arguments.bundle = name;
        else throw Usage("'" + name + "' is not known");
    }
    if (arguments.bundle.empty() || arguments.task.empty() || arguments.ids.empty()) {
        throw Usage("give a bundle, a task and ids");
    }
    return arguments;
}

constexpr std::string_view kPast = "past_key_values.";

bool is_cache(const lorafuse::Port& port) { return port.name.compare(0, kPast.size(), kPast) == 0; }

const lorafuse::Tensor& logits_of(const Outputs& outputs) {
    const auto found = outputs.find("logits");
    if (found == outputs.end()) throw lorafuse::Error("the task's outputs are no logits; see them with --raw");
    return found->second;
}

// What one step of a graph is given: the ids of one row, and what it knows of the steps before.
class Row {
public:
    explicit Row(std::vector<lorafuse::Port> ports) : ports_(std::move(ports)) {}

    // The inputs for `ids` behind what came before, whose cache is `past`.
    Inputs inputs(const Ids& ids, const Outputs& past) {
        const auto length = static_cast<std::int64_t>(ids.size());
        ids_ = ids;
        positions_.resize(ids.size());
        std::iota(positions_.begin(), positions_.end(), static_cast<std::int64_t>(mask_.size()));
        mask_.resize(mask_.size() + ids.size(), 1);
        types_.assign(ids.size(), 0);
        Inputs inputs;
        for (const lorafuse::Port& port : ports_) {
            if (port.name == "input_ids") inputs[port.name] = lorafuse::view(ids_, {1, length});
            else if (port.name == "attention_mask")
                inputs[port.name] = lorafuse::view(mask_, {1, static_cast<std::int64_t>(mask_.size())});
            else if (port.name == "token_type_ids") inputs[port.name] = lorafuse::view(types_, {1, length});
            else if (port.name == "position_ids") inputs[port.name] = lorafuse::view(positions_, {1, length});
            else inputs[port.name] = cached(port, past);
        }
        return inputs;
    }

private:
    // The cache that the step before left; before the first, one of no length.
    static lorafuse::TensorView cached(const lorafuse::Port& port, const Outputs& past) {
        if (!is_cache(port)) throw lorafuse::Error("the task takes '" + port.name + "', which token ids don't tell");
        const auto found = past.find("present." + port.name.substr(kPast.size()));
        if (found != past.end()) return found->second.view();
        std::vector<std::int64_t> shape;
        for (const auto& size : port.shape) {
            const auto* axis = std::get_if<std::string>(&size);
            shape.push_back(axis == nullptr ? std::get<std::int64_t>(size) : *axis == "batch" ? 1 : 0);
        }
        return {port.dtype, shape, "", 0};
    }

    std::vector<lorafuse::Port> ports_;
    Ids ids_, mask_, types_, positions_;
};

// The likeliest tokens, one after the other.
Ids generate(const lorafuse::Task& task, const std::string& part, Row row, Ids ids, std::int64_t count) {
    Ids tokens;
    Outputs outputs;
    while (static_cast<std::int64_t>(tokens.size()) < count) {
        outputs = task.run(row.inputs(ids, outputs), part);
        const lorafuse::Tensor& logits = logits_of(outputs);
        const float* end = logits.data<float>() + logits.count();
        const float* last = end - logits.shape().back();
        tokens.push_back(std::max_element(last, end) - last);
        ids = {tokens.back()};
    }
    return tokens;
}

void print_raw(const Outputs& outputs) {
    for (const auto& [name, tensor] : outputs) {
        std::cout << name << ' ';
        const auto* bytes = static_cast<const unsigned char*>(tensor.view().data);
        for (std::size_t i = 0; i < tensor.view().bytes; ++i) std::printf("%02x", bytes[i]);
        std::printf("\n");
        std::fflush(stdout);
    }
}

void answer(const Arguments& arguments) {
    lorafuse::Runtime runtime(arguments.bundle, arguments.options);
    const lorafuse::Task task = runtime.use(arguments.task, arguments.adapted);
    const std::vector<lorafuse::Port> ports = runtime.inputs(arguments.task, arguments.part);
    Row row(ports);
    if (arguments.tokens > 0) {
        if (std::none_of(ports.begin(), ports.end(), is_cache))
            throw lorafuse::Error("task '" + arguments.task + "' generates no tokens");
        std::string text;
        for (const std::int64_t token : generate(task, arguments.part, row, arguments.ids, arguments.tokens))
            text += (text.empty() ? "" : ",") + std::to_string(token);
        std::cout << text << '\n';
        return;
    }
    const Outputs outputs = task.run(row.inputs(arguments.ids, {}), arguments.part);
    if (arguments.raw) return print_raw(outputs);
    const lorafuse::Tensor& logits = logits_of(outputs);
    const float* first = logits.data<float>();
    const float* likeliest = std::max_element(first, first + logits.shape().back());
    const std::vector<std::string> labels = runtime.labels(arguments.task);
    if (!labels.empty()) std::cout << labels.at(static_cast<std::size_t>(likeliest - first)) << ' ';
    std::printf("%.6f\n", static_cast<double>(*likeliest));
}

}  // namespace

int main(int count, char** values) {
    try {
        answer(arguments_of(count, values));
        return 0;
    } catch (const std::exception& error) {
        std::cerr << "lorafuse-ask: " << error.what() << '\n';
        return 3;
    }
}

// What the tests ask of the runtime's parts, one case a line, so that a process answers for many.
#include <algorithm>
#include <atomic>
#include <iostream>
#include <map>
#include <random>
#include <thread>

#include "bundle.hpp"
#include "lorafuse/runtime.hpp"
#include "mapped_file.hpp"
#include "plan.hpp"
#include "safetensors.hpp"
#include "served.hpp"
#include "sha256.hpp"

namespace {

using lorafuse::Inputs;
using lorafuse::Outputs;

std::shared_ptr<const lorafuse::MappedFile> mapped(const std::filesystem::path& path) {
    return std::make_shared<const lorafuse::MappedFile>(lorafuse::OpenedFile(path.parent_path(), path.filename()));
}

void hash(const std::string& path) {
    const auto content = mapped(path);
    const lorafuse::MappedFile& file = *content;
    std::cout << lorafuse::sha256(file.data(), file.size()) << ' '
              << lorafuse::sha256_portable(file.data(), file.size()) << '\n';
}

void tensors(const std::string& path) {
    try {
        const lorafuse::TensorFile file(path, mapped(path));
        std::cout << "whole";
        for (const auto& [name, tensor] : file.tensors()) {
            std::cout << ' ' << name << ' ' << name_of(tensor.dtype) << ' '
                      << lorafuse::sha256(tensor.data, tensor.bytes).substr(0, 16);
            for (const std::int64_t size : tensor.shape) std::cout << ' ' << size;
        }
        std::cout << '\n';
    } catch (const lorafuse::Error& error) {
        std::cout << "refused " << error.what() << '\n';
    }
}

void opened(const std::string& path) {
    try {
        const lorafuse::Bundle bundle(path);
        std::cout << "whole\n";
    } catch (const lorafuse::Error& error) {
        std::cout << error.what() << '\n';
    }
}

// The plan that a library of this version would load of the task on a device of this capability.
void plan(const std::string& path, const std::string& task, bool adapted, const std::string& version, int major,
          int minor) {
    const lorafuse::Bundle bundle(path);
    const auto device = [&] { return lorafuse::Device{"A GPU", major, minor}; };
    try {
        const lorafuse::TaskPart part = bundle.part(bundle.task(task), "model");
        std::cout << lorafuse::plan_of(bundle, part, adapted, {"tensorrt-rtx", version, device}).path.string() << '\n';
    } catch (const lorafuse::Error& error) {
        std::cout << error.what() << '\n';
    }
}

std::vector<std::int64_t> row(std::int64_t value) { return std::vector<std::int64_t>(8, value); }

struct Row {
    std::vector<std::int64_t> ids = row(2307), mask = row(1), types = row(0);
    Inputs inputs() const {
        return {{"input_ids", lorafuse::view(ids, {1, 8})},
                {"attention_mask", lorafuse::view(mask, {1, 8})},
                {"token_type_ids", lorafuse::view(types, {1, 8})}};
    }
};

std::string bytes(const Outputs& outputs) {
    const lorafuse::TensorView& logits = outputs.at("logits").view();
    return {static_cast<const char*>(logits.data), logits.bytes};
}

// Threads that switch at random, with room for `memory` bytes; every answer is that of a runtime without others.
void threads(const std::string& bundle, lorafuse::Options options) {
    options.threads = 1;
    const Row row;
    std::map<std::string, std::string> alone;
    lorafuse::Options unbounded = options;
    unbounded.memory = 0;
    lorafuse::Runtime first(bundle, unbounded);
    for (const std::string& task : first.tasks()) alone[task] = bytes(first.run(task, row.inputs()));
    lorafuse::Runtime runtime(bundle, options);
    std::atomic<int> wrong{0}, answers{0};
    const auto ask = [&](unsigned seed) {
        std::mt19937 chance(seed);
        for (int i = 0; i < 25; ++i, ++answers) {
            const auto& [task, wanted] =
                *std::next(alone.begin(), static_cast<std::ptrdiff_t>(chance() % alone.size()));
            if (bytes(runtime.run(task, row.inputs())) != wanted) ++wrong;
        }
    };
    std::vector<std::thread> asking;
    for (unsigned seed = 0; seed < 4; ++seed) asking.emplace_back(ask, seed);
    for (std::thread& thread : asking) thread.join();
    std::cout << answers << " answers, " << wrong << " wrong, " << runtime.loaded().size() << " loaded\n";
}

// Outputs stay what they are after their runtime is gone, and so do tasks that someone has in hand.
void outlive(const std::string& bundle, const lorafuse::Options& options) {
    const Row row;
    auto runtime = std::make_unique<lorafuse::Runtime>(bundle, options);
    const std::string name = runtime->tasks().front();
    const lorafuse::Task task = runtime->use(name);
    const Outputs kept = runtime->run(name, row.inputs());
    const std::string before = bytes(kept);
    runtime.reset();
    std::cout << (bytes(kept) == before && bytes(task.run(row.inputs())) == before ? "same" : "changed") << '\n';
}

}  // namespace

int main(int count, char** values) {
    const std::string what = count > 1 ? values[1] : "";
    try {
        const std::map<std::string, void (*)(const std::string&)> parts = {
            {"sha256", hash}, {"tensors", tensors}, {"bundles", opened}};
        if (const auto part = parts.find(what); part != parts.end()) {
            std::for_each(values + 2, values + count, part->second);
            return 0;
        }
        if (what == "serve") {
            serve(std::cin, std::cout);
            return 0;
        }
        if (what == "plan" && count == 8) {
            plan(values[2], values[3], std::string(values[4]) == "adapted", values[5], std::stoi(values[6]),
                 std::stoi(values[7]));
            return 0;
        }
        if (count != 5)
            throw lorafuse::Error(
                "usage: probe serve | sha256|tensors|bundles PATH ... | threads|outlive BUNDLE MODE BYTES | plan ...");
        lorafuse::Options options;
        options.mode = std::string(values[3]) == "resident" ? lorafuse::Mode::resident : lorafuse::Mode::dedicated;
        options.memory = std::stoull(values[4]);
        if (what == "threads") threads(values[2], options);
        else outlive(values[2], options);
        return 0;
    } catch (const std::exception& error) {
        std::cerr << "probe: " << error.what() << '\n';
        return 3;
    }
}

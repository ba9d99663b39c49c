#include "served.hpp"

#include <cstdio>
#include <iostream>
#include <map>
#include <optional>
#include <sstream>
#include <vector>

#include "dtype.hpp"
#include "lorafuse/runtime.hpp"

namespace {

using Words = std::vector<std::string>;

std::string hex_of(const lorafuse::TensorView& tensor) {
    std::string text;
    for (std::size_t i = 0; i < tensor.bytes; ++i) {
        char digits[3];
        std::snprintf(digits, sizeof digits, "%02x", static_cast<const unsigned char*>(tensor.data)[i]);
        text += digits;
    }
    return text;
}

std::string said(const lorafuse::Outputs& outputs) {
    std::string text;
    for (const auto& [name, tensor] : outputs) {
        std::string shape;
        for (const std::int64_t size : tensor.shape()) shape += (shape.empty() ? "" : "x") + std::to_string(size);
        text += " " + name + ":" + lorafuse::name_of(tensor.dtype()) + ":" + shape + ":" + hex_of(tensor.view());
    }
    return text;
}

std::string listed(const Words& words) {
    std::string text;
    for (const std::string& word : words) text += " " + word;
    return text;
}

// Inputs, and the memory that they lie in.
struct Given {
    std::vector<std::vector<unsigned char>> memory;
    lorafuse::Inputs inputs;

    Given(const Words& words, std::size_t from) {
        for (std::size_t i = from; i < words.size(); ++i) add(words[i]);
    }

    void add(const std::string& word) {
        std::stringstream parts(word);
        std::string name, dtype, shape, hex, size;
        std::getline(parts, name, ':'), std::getline(parts, dtype, ':'), std::getline(parts, shape, ':');
        std::getline(parts, hex);
        std::vector<std::int64_t> sizes;
        for (std::stringstream all(shape); std::getline(all, size, 'x');) sizes.push_back(std::stoll(size));
        std::vector<unsigned char>& bytes = memory.emplace_back();
        for (std::size_t i = 0; i + 1 < hex.size(); i += 2)
            bytes.push_back(static_cast<unsigned char>(std::stoi(hex.substr(i, 2), nullptr, 16)));
        inputs[name] = {*lorafuse::dtype_named(dtype), sizes, bytes.data(), bytes.size()};
    }
};

lorafuse::Options options_of(const std::string& mode, const std::string& threads = "1", const std::string& memory = "0",
                             const std::string& digest = "-") {
    lorafuse::Options options;
    options.mode = mode == "resident" ? lorafuse::Mode::resident : lorafuse::Mode::dedicated;
    options.threads = std::stoi(threads);
    options.memory = std::stoull(memory);
    options.digest = digest == "-" ? "" : digest;
    return options;
}

// Every answer or refusal of as many opens, and how often it came.
std::string raced(const Words& words) {
    const Given given(words, 5);
    std::map<std::string, int> counts;
    for (int i = std::stoi(words.at(1)); i > 0; --i) {
        try {
            lorafuse::Runtime runtime(words.at(2), options_of(words.at(3)));
            ++counts[said(runtime.run(words.at(4), given.inputs)).substr(1)];
        } catch (const lorafuse::Error& error) {
            ++counts[std::string(error.what()).find("SHA-256") != std::string::npos ? "another" : error.what()];
        }
    }
    std::string text;
    for (const auto& [answer, count] : counts)
        text += (text.empty() ? " " : "\t") + std::to_string(count) + " " + answer;
    return text;
}

class Served {
public:
    std::string answer(const Words& words) {
        const std::string& what = words.at(0);
        if (what == "open") return open(words);
        if (what == "race") return raced(words);
        if (what == "close") return close();
        if (what == "held") return said(held_->run(Given(words, 1).inputs));
        if (what == "release") return held_.reset(), "";
        return of_runtime(words);
    }

private:
    std::string open(const Words& words) {
        close();
        runtime_.emplace(words.at(1), options_of(words.at(2), words.at(3), words.at(4), words.at(5)));
        return "";
    }

    std::string close() {
        runtime_.reset();
        return "";
    }

    std::string of_runtime(const Words& words) {
        const std::string& what = words.at(0);
        lorafuse::Runtime& runtime = runtime_.value();
        if (what == "run") return said(runtime.run(words.at(1), Given(words, 3).inputs, words.at(2) == "adapted"));
        if (what == "use") return held_ = runtime.use(words.at(1)), "";
        if (what == "preload") return runtime.preload(words.at(1)), "";
        if (what == "evict") return runtime.evict(words.at(1)), "";
        if (what == "reload") return runtime.reload(words.at(1) == "-" ? "" : words.at(1)), "";
        if (what == "loaded") return listed(runtime.loaded());
        if (what == "tasks") return listed(runtime.tasks());
        return " " + runtime.digest();
    }

    std::optional<lorafuse::Runtime> runtime_;
    std::optional<lorafuse::Task> held_;
};

}  // namespace

void serve(std::istream& requests, std::ostream& answers) {
    Served served;
    for (std::string line; std::getline(requests, line);) {
        std::stringstream parts(line);
        Words words;
        for (std::string word; parts >> word;) words.push_back(word);
        try {
            const std::string said = served.answer(words);  // before anything is written, for it may throw
            answers << "ok" << said << std::endl;
        } catch (const lorafuse::Error& error) {
            answers << "refused " << error.what() << std::endl;
        }
    }
}

#include "json_reader.hpp"

#include <algorithm>
#include <limits>
#include <nlohmann/json.hpp>
#include <set>
#include <vector>

#include "printable.hpp"

namespace lorafuse {
namespace {

using Json = nlohmann::json;

constexpr std::size_t kDeepest = 64;      // far deeper than anything that is read here
constexpr std::size_t kShownOfName = 40;  // characters, of a name that a stranger chose

[[noreturn]] void malformed(std::size_t byte) {
    throw JsonError("JSON is malformed (byte " + std::to_string(byte) + ")");
}

std::string shown(std::string_view name) { return std::string(beginning(name, kShownOfName)); }

// Looks through a text before it is read, and refuses what the parser would take without a word: of a name that stands
// twice in an object it keeps the last value.
struct Strict : nlohmann::json_sax<Json> {
    bool null() override { return true; }
    bool boolean(bool) override { return true; }
    bool number_integer(number_integer_t) override { return true; }
    bool number_unsigned(number_unsigned_t) override { return true; }
    bool number_float(number_float_t, const string_t&) override { return true; }
    bool string(string_t&) override { return true; }
    bool binary(binary_t&) override { return true; }
    bool start_object(std::size_t) override { return opened(); }
    bool start_array(std::size_t) override { return opened(); }
    bool end_object() override { return closed(); }
    bool end_array() override { return closed(); }

    bool key(string_t& name) override {
        if (!names.back().insert(name).second) throw JsonError("the field '" + shown(name) + "' stands twice");
        return true;
    }

    bool parse_error(std::size_t byte, const std::string&, const Json::exception&) override { malformed(byte); }

    bool opened() {
        if (names.size() == kDeepest) throw JsonError("JSON is nested more than 64 deep");
        names.emplace_back();
        return true;
    }

    bool closed() {
        names.pop_back();
        return true;
    }

    std::vector<std::set<std::string>> names;  // of each object and array around
};

// Of a copy: the text may be a file's, mapped, which can change between the two looks at it.
Json parsed(const std::string& text) {
    // To the parser a zero byte is the end of the text, whatever stands behind it, and a byte order mark is nothing.
    if (const std::size_t zero = text.find('\0'); zero != std::string::npos) malformed(zero);
    if (text.compare(0, 3, "\xef\xbb\xbf") == 0) malformed(0);
    Strict strict;
    Json::sax_parse(text, &strict);
    return Json::parse(text);
}

std::string kind_of(const Json& value) {
    switch (value.type()) {
        case Json::value_t::null: return "null";
        case Json::value_t::object: return "an object";
        case Json::value_t::array: return "a list";
        case Json::value_t::string: return "text";
        case Json::value_t::boolean: return value.get<bool>() ? "true" : "false";
        case Json::value_t::number_integer:
        case Json::value_t::number_unsigned: return value.dump();
        default: return "a number that is not whole, or too large";
    }
}

}  // namespace

std::string JsonReader::place() const {
    std::vector<const JsonReader*> path;
    for (const JsonReader* reader = this; reader->parent_ != nullptr; reader = reader->parent_) path.push_back(reader);
    std::string text;
    for (auto step = path.rbegin(); step != path.rend(); ++step) {
        if ((*step)->name_.data() == nullptr) text += "[" + std::to_string((*step)->index_) + "]";
        else text += (text.empty() ? "" : ".") + shown((*step)->name_);
    }
    return text.empty() ? "the top" : text;
}

void JsonReader::expected(const std::string& what) const {
    throw JsonError("expected " + what + " at " + place() + ", found " + kind_of(value_));
}

void JsonReader::check_fields(std::initializer_list<const char*> required,
                              std::initializer_list<const char*> optional) const {
    if (!value_.is_object()) expected("an object");
    for (const char* field : required) at(field);
    for (const auto& [name, _] : value_.items()) {
        const auto same = [&name = name](const char* field) { return name == field; };
        if (std::any_of(required.begin(), required.end(), same)) continue;
        if (std::none_of(optional.begin(), optional.end(), same))
            throw JsonError("unknown field '" + shown(name) + "' at " + place());
    }
}

bool JsonReader::has(const char* field) const { return value_.contains(field); }

JsonReader JsonReader::at(const char* field) const& {
    if (!value_.is_object()) expected("an object");
    const auto found = value_.find(field);
    if (found == value_.end()) throw JsonError(std::string("the field '") + field + "' is missing at " + place());
    return {*found, this, field};
}

std::string JsonReader::canonical() const { return value_.dump(); }

bool JsonReader::is_null() const { return value_.is_null(); }

bool JsonReader::is_text() const { return value_.is_string(); }

std::string JsonReader::text() const {
    if (!value_.is_string()) expected("text");
    std::string text = value_.get<std::string>();
    if (text.find('\0') != std::string::npos) throw JsonError("text with a zero byte at " + place());
    return text;
}

std::int64_t JsonReader::number() const {
    constexpr auto kLargest = static_cast<std::uint64_t>(std::numeric_limits<std::int64_t>::max());
    if (!value_.is_number_integer()) expected("a whole number");
    if (value_.is_number_unsigned() && value_.get<std::uint64_t>() > kLargest) expected("a number of 63 bits");
    return value_.get<std::int64_t>();
}

bool JsonReader::boolean() const {
    if (!value_.is_boolean()) expected("true or false");
    return value_.get<bool>();
}

std::string JsonReader::one_of(std::initializer_list<const char*> values) const {
    std::string found = text();
    if (std::find(values.begin(), values.end(), found) != values.end()) return found;
    std::string known;
    for (const char* value : values) known += (known.empty() ? "" : ", ") + std::string(value);
    throw JsonError("unknown " + place() + " '" + shown(found) + "'; expected one of " + known);
}

void JsonReader::each(const std::function<void(const JsonReader&)>& visit) const {
    if (!value_.is_array()) expected("a list");
    for (std::size_t i = 0; i < value_.size(); ++i) visit(JsonReader(value_[i], this, {}, i));
}

void JsonReader::each(const std::function<void(const std::string&, const JsonReader&)>& visit) const {
    if (!value_.is_object()) expected("an object");
    for (const auto& [name, element] : value_.items()) visit(name, JsonReader(element, this, name));
}

JsonDocument::JsonDocument(std::string_view text) : json_(std::make_unique<const Json>(parsed(std::string(text)))) {}

JsonDocument::~JsonDocument() = default;

JsonReader JsonDocument::root() const { return {*json_, nullptr, {}}; }

}  // namespace lorafuse

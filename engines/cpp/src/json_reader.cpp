#include "json_reader.hpp"

#include <algorithm>
#include <limits>
#include <nlohmann/json.hpp>

#include "printable.hpp"

namespace lorafuse {
namespace {

using Json = nlohmann::ordered_json;

const char* type_of(const Json& value) {
    switch (value.type()) {
        case Json::value_t::null: return "null";
        case Json::value_t::object: return "object";
        case Json::value_t::array: return "array";
        case Json::value_t::string: return "str";
        case Json::value_t::boolean: return "bool";
        case Json::value_t::number_integer:
        case Json::value_t::number_unsigned: return "int";
        default: return "float";
    }
}

[[noreturn]] void malformed(std::size_t byte) {
    throw JsonError("JSON is malformed (byte " + std::to_string(byte) + ")");
}

}  // namespace

void JsonReader::refuse(const std::string& what) const {
    throw JsonError(place_ == "$" ? what : what + " - at `" + place_ + "`");
}

void JsonReader::expected(const std::string& type) const {
    refuse("Expected `" + type + (nullable_ ? " | null" : "") + "`, got `" + type_of(value_) + "`");
}

void JsonReader::check_fields(std::initializer_list<const char*> required,
                              std::initializer_list<const char*> optional) const {
    if (!value_.is_object()) expected("object");
    const auto known = [&](const std::string& name) {
        const auto same = [&](const char* field) { return name == field; };
        return std::any_of(required.begin(), required.end(), same) ||
               std::any_of(optional.begin(), optional.end(), same);
    };
    for (const auto& [name, _] : value_.items()) {
        if (!known(name)) refuse("Object contains unknown field `" + name + "`");
    }
    for (const char* field : required) check_has(field);
}

void JsonReader::check_has(const char* field) const {
    if (!value_.is_object()) expected("object");
    if (!has(field)) refuse(std::string("Object missing required field `") + field + "`");
}

bool JsonReader::has(const char* field) const { return value_.contains(field); }

JsonReader JsonReader::at(const char* field) const { return {value_.at(field), place_ + "." + field}; }

bool JsonReader::is_null() const { return value_.is_null(); }

JsonReader JsonReader::or_null() const {
    JsonReader reader = *this;
    reader.nullable_ = true;
    return reader;
}

bool JsonReader::is_text() const { return value_.is_string(); }

std::string JsonReader::text() const {
    if (!value_.is_string()) expected("str");
    return value_.get<std::string>();
}

std::int64_t JsonReader::number() const {
    if (!value_.is_number_integer()) expected("int");
    constexpr std::int64_t kLargest = std::numeric_limits<std::int64_t>::max();
    if (value_.is_number_unsigned() && value_.get<std::uint64_t>() > static_cast<std::uint64_t>(kLargest))
        return kLargest;
    return value_.get<std::int64_t>();
}

std::int64_t JsonReader::number_or_text() const {
    if (!value_.is_number_integer()) expected("int | str");
    return number();
}

bool JsonReader::boolean() const {
    if (!value_.is_boolean()) expected("bool");
    return value_.get<bool>();
}

std::string JsonReader::one_of(std::initializer_list<const char*> values) const {
    const std::string found = text();
    if (std::find(values.begin(), values.end(), found) == values.end())
        refuse("Invalid enum value " + in_quotes(found));
    return found;
}

void JsonReader::each(const std::function<void(const JsonReader&)>& visit) const {
    if (!value_.is_array()) expected("array");
    for (std::size_t i = 0; i < value_.size(); ++i)
        visit(JsonReader(value_[i], place_ + "[" + std::to_string(i) + "]"));
}

void JsonReader::each(const std::function<void(const std::string&, const JsonReader&)>& visit) const {
    if (!value_.is_object()) expected("object");
    for (const auto& [name, element] : value_.items()) visit(name, JsonReader(element, place_ + "[...]"));
}

JsonDocument::JsonDocument(std::string_view text) try : json_(std::make_unique<const Json>(Json::parse(text))) {
    // To the parser a zero byte is the end of the text, whatever stands behind it.
    if (const std::size_t zero = text.find('\0'); zero != std::string_view::npos) malformed(zero);
} catch (const Json::parse_error& error) {
    malformed(error.byte);
}

JsonDocument::~JsonDocument() = default;

JsonReader JsonDocument::root() const { return {*json_, "$"}; }

}  // namespace lorafuse

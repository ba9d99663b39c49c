#include "json_reader.hpp"

#include <algorithm>

namespace lorafuse {
namespace {

const char* type_of(const JsonReader::Json& value) {
    switch (value.type()) {
        case JsonReader::Json::value_t::null: return "null";
        case JsonReader::Json::value_t::object: return "object";
        case JsonReader::Json::value_t::array: return "array";
        case JsonReader::Json::value_t::string: return "str";
        case JsonReader::Json::value_t::boolean: return "bool";
        case JsonReader::Json::value_t::number_integer:
        case JsonReader::Json::value_t::number_unsigned: return "int";
        default: return "float";
    }
}

}  // namespace

void JsonReader::refuse(const std::string& what) const { throw JsonError(place_ == "$" ? what : what + " - at `" + place_ + "`"); }

void JsonReader::expected(const std::string& type) const { refuse("Expected `" + type + "`, got `" + type_of(value_) + "`"); }

void JsonReader::check_fields(std::initializer_list<const char*> required, std::initializer_list<const char*> optional) const {
    if (!value_.is_object()) expected("object");
    const auto known = [&](const std::string& name) {
        const auto same = [&](const char* field) { return name == field; };
        return std::any_of(required.begin(), required.end(), same) || std::any_of(optional.begin(), optional.end(), same);
    };
    for (const auto& [name, _] : value_.items()) {
        if (!known(name)) refuse("Object contains unknown field `" + name + "`");
    }
    for (const char* field : required) {
        if (!has(field)) refuse(std::string("Object missing required field `") + field + "`");
    }
}

std::string JsonReader::text() const {
    if (!value_.is_string()) expected("str");
    return value_.get<std::string>();
}

std::int64_t JsonReader::number() const {
    if (!value_.is_number_integer()) expected("int");
    return value_.get<std::int64_t>();
}

bool JsonReader::boolean() const {
    if (!value_.is_boolean()) expected("bool");
    return value_.get<bool>();
}

std::string JsonReader::one_of(std::initializer_list<const char*> values) const {
    const std::string found = text();
    if (std::find(values.begin(), values.end(), found) == values.end()) refuse("Invalid enum value '" + found + "'");
    return found;
}

void JsonReader::each(const std::function<void(const JsonReader&)>& visit) const {
    if (!value_.is_array()) expected("array");
    for (std::size_t i = 0; i < value_.size(); ++i) visit(JsonReader(value_[i], place_ + "[" + std::to_string(i) + "]"));
}

void JsonReader::each(const std::function<void(const std::string&, const JsonReader&)>& visit) const {
    if (!value_.is_object()) expected("object");
    for (const auto& [name, element] : value_.items()) visit(name, JsonReader(element, place_ + "[...]"));
}

}  // namespace lorafuse

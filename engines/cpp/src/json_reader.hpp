// A typed view of JSON that names the place of what does not fit, in the words of the Python reader (msgspec's).
#pragma once

#include <cstdint>
#include <functional>
#include <initializer_list>
#include <nlohmann/json.hpp>
#include <stdexcept>
#include <string>

namespace lorafuse {

// The reason, without the file's name.
class JsonError : public std::runtime_error {
public:
    using std::runtime_error::runtime_error;
};

class JsonReader {
public:
    using Json = nlohmann::ordered_json;
    explicit JsonReader(const Json& value, std::string place = "$") : value_(value), place_(std::move(place)) {}

    // Throws unless it is an object with all the required fields, and no other but the optional ones.
    void check_fields(std::initializer_list<const char*> required, std::initializer_list<const char*> optional = {}) const;

    bool has(const char* field) const { return value_.contains(field); }
    JsonReader at(const char* field) const { return JsonReader(value_.at(field), place_ + "." + field); }
    bool is_null() const { return value_.is_null(); }
    bool is_text() const { return value_.is_string(); }

    std::string text() const;
    std::int64_t number() const;
    bool boolean() const;
    std::string one_of(std::initializer_list<const char*> values) const;
    void each(const std::function<void(const JsonReader&)>& visit) const;                      // of an array
    void each(const std::function<void(const std::string&, const JsonReader&)>& visit) const;  // of an object

private:
    [[noreturn]] void refuse(const std::string& what) const;
    [[noreturn]] void expected(const std::string& type) const;
    const Json& value_;
    std::string place_;
};

}  // namespace lorafuse

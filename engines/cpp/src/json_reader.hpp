// A typed view of JSON that names the place of what does not fit, in the words of the Python reader (msgspec's).
#pragma once

#include <cstdint>
#include <functional>
#include <initializer_list>
#include <memory>
#include <nlohmann/json_fwd.hpp>
#include <stdexcept>
#include <string>
#include <string_view>

namespace lorafuse {

// The reason, without the file's name.
class JsonError : public std::runtime_error {
public:
    using std::runtime_error::runtime_error;
};

// A value in a document, which must outlive it.
class JsonReader {
public:
    // Throws unless it is an object with all the required fields, and no other but the optional ones.
    void check_fields(std::initializer_list<const char*> required,
                      std::initializer_list<const char*> optional = {}) const;

    // Throws unless it is an object with that field.
    void check_has(const char* field) const;

    bool has(const char* field) const;
    JsonReader at(const char* field) const;
    bool is_null() const;
    JsonReader or_null() const;  // the same value, where null would have done too: refusals say so
    bool is_text() const;

    std::string text() const;
    std::int64_t number() const;          // the largest there is, where it is larger
    std::int64_t number_or_text() const;  // a number; what is none is said to be neither
    bool boolean() const;
    std::string one_of(std::initializer_list<const char*> values) const;
    void each(const std::function<void(const JsonReader&)>& visit) const;                      // of an array
    void each(const std::function<void(const std::string&, const JsonReader&)>& visit) const;  // of an object

private:
    friend class JsonDocument;
    JsonReader(const nlohmann::ordered_json& value, std::string place) : value_(value), place_(std::move(place)) {}
    [[noreturn]] void refuse(const std::string& what) const;
    [[noreturn]] void expected(const std::string& type) const;
    const nlohmann::ordered_json& value_;
    std::string place_;
    bool nullable_ = false;
};

class JsonDocument {
public:
    // Throws JsonError when the text is no JSON.
    explicit JsonDocument(std::string_view text);
    ~JsonDocument();
    JsonDocument(const JsonDocument&) = delete;
    JsonDocument& operator=(const JsonDocument&) = delete;
    JsonReader root() const;

private:
    std::unique_ptr<const nlohmann::ordered_json> json_;
};

}  // namespace lorafuse

// A typed view of JSON that names the place of what does not fit. Reading takes time in proportion to the text.
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

// The reason, without the file's name; text of the document in it is as it stands there, not yet printable.
class JsonError : public std::runtime_error {
public:
    using std::runtime_error::runtime_error;
};

// A value in a document. The document, and the reader that this one came from, must outlive it.
class JsonReader {
public:
    // Throws unless it is an object with all the required fields, and no other but the optional ones.
    void check_fields(std::initializer_list<const char*> required,
                      std::initializer_list<const char*> optional = {}) const;

    // Whether it is an object with that field; the field, which must be there.
    bool has(const char* field) const;
    JsonReader at(const char* field) const&;
    JsonReader at(const char* field) const&& = delete;  // would name a place by a reader that is gone

    // The value as JSON, always the same text for the same value.
    std::string canonical() const;

    bool is_null() const;
    bool is_text() const;

    std::string text() const;
    std::int64_t number() const;
    bool boolean() const;
    std::string one_of(std::initializer_list<const char*> values) const;
    void each(const std::function<void(const JsonReader&)>& visit) const;                      // of an array
    void each(const std::function<void(const std::string&, const JsonReader&)>& visit) const;  // of an object

private:
    friend class JsonDocument;
    JsonReader(const nlohmann::json& value, const JsonReader* parent, std::string_view name, std::size_t index = 0)
        : value_(value), parent_(parent), name_(name), index_(index) {}
    [[noreturn]] void expected(const std::string& what) const;
    std::string place() const;

    const nlohmann::json& value_;
    const JsonReader* parent_;  // of the root: none
    std::string_view name_;     // in the parent; none in an array, where the index tells
    std::size_t index_;
};

class JsonDocument {
public:
    // Throws JsonError when the text is no JSON, names a field of an object twice, or is nested too deeply.
    explicit JsonDocument(std::string_view text);
    ~JsonDocument();
    JsonDocument(const JsonDocument&) = delete;
    JsonDocument& operator=(const JsonDocument&) = delete;
    JsonReader root() const;

private:
    std::unique_ptr<const nlohmann::json> json_;
};

}  // namespace lorafuse

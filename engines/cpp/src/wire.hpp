// Protobuf's wire format, as much as a reader of ONNX files needs: a message is fields, each with a number and a type.
//
// Format: https://protobuf.dev/programming-guides/encoding/. Strict: what another parser might read otherwise (a field
// of another type, a number that is too long, a field that may come once and comes twice) is refused. See
// exporter/bundle/wire.py.
#pragma once

#include <cstdint>
#include <functional>
#include <stdexcept>
#include <string>
#include <string_view>
#include <vector>

namespace lorafuse {

// What is wrong with a message, in a few words; text of the message in it is not yet printable.
class WireError : public std::runtime_error {
public:
    using std::runtime_error::runtime_error;
};

// The last three may also come packed.
enum class Wire { number, bytes, four, eight, numbers, fours, eights };

// A field that a kind of message may hold; `several` if it may come more than once.
struct FieldKind {
    std::uint64_t number;
    std::string_view name;
    Wire wire;
    bool several;
};

struct MessageKind {
    std::string_view name;
    std::vector<FieldKind> fields;
};

// A field as it was found: a number, or the bytes of anything else.
struct Field {
    std::string_view name;
    bool is_number;
    std::uint64_t number;
    std::string_view bytes;
};

// Each field of the message, in the file's order. Throws WireError where the bytes are not such a message.
void each_field(std::string_view message, const MessageKind& kind, const std::function<void(const Field&)>& visit);

// The numbers of a field of the kind "numbers": one, or those that are packed.
std::vector<std::uint64_t> numbers_of(const Field& field);

// The text of a field. Throws WireError where it is not UTF-8.
std::string text_of(const Field& field);

}  // namespace lorafuse

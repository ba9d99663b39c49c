#include "wire.hpp"

#include <algorithm>
#include <set>

#include "printable.hpp"

namespace lorafuse {
namespace {

constexpr std::uint64_t kVarint = 0, kEight = 1, kBytes = 2, kFour = 5;

// A number, seven bits a byte and the lowest first, taken from the front of the message.
std::uint64_t varint(std::string_view& message) {
    std::uint64_t found = 0;
    for (unsigned shift = 0; shift <= 63; shift += 7) {
        if (message.empty()) throw WireError("a number ends beyond its message");
        const auto byte = static_cast<unsigned char>(message.front());
        message.remove_prefix(1);
        if (shift == 63 && byte > 1) break;
        found |= static_cast<std::uint64_t>(byte & 0x7f) << shift;
        if (byte < 0x80) return found;
    }
    throw WireError("a number is longer than 64 bits");
}

bool takes(Wire kind, std::uint64_t wire) {
    switch (kind) {
        case Wire::number: return wire == kVarint;
        case Wire::bytes: return wire == kBytes;
        case Wire::four: return wire == kFour;
        case Wire::eight: return wire == kEight;
        case Wire::numbers: return wire == kVarint || wire == kBytes;
        case Wire::fours: return wire == kFour || wire == kBytes;
        case Wire::eights: return wire == kEight || wire == kBytes;
    }
    return false;
}

const FieldKind& kind_of(const MessageKind& kind, std::uint64_t number, std::uint64_t wire) {
    const auto found = std::find_if(kind.fields.begin(), kind.fields.end(), [&](const FieldKind& field) {
        return field.number == number && takes(field.wire, wire);
    });
    if (found != kind.fields.end()) return *found;
    throw WireError("a " + std::string(kind.name) + " has the field " + std::to_string(number) + " of wire type " +
                    std::to_string(wire) + ", which is not known");
}

}  // namespace

void each_field(std::string_view message, const MessageKind& kind, const std::function<void(const Field&)>& visit) {
    std::set<std::uint64_t> seen;
    while (!message.empty()) {
        const std::uint64_t tag = varint(message), wire = tag & 7;
        const FieldKind& field = kind_of(kind, tag >> 3, wire);
        if (!field.several && !seen.insert(field.number).second)
            throw WireError("a " + std::string(kind.name) + " has its " + std::string(field.name) + " twice");
        if (wire == kVarint) {
            visit({field.name, true, varint(message), {}});
            continue;
        }
        const std::uint64_t size = wire == kBytes ? varint(message) : wire == kEight ? 8 : 4;
        if (size > message.size())
            throw WireError("the " + std::string(field.name) + " of a " + std::string(kind.name) + " ends beyond it");
        visit({field.name, false, 0, message.substr(0, size)});
        message.remove_prefix(size);
    }
}

std::vector<std::uint64_t> numbers_of(const Field& field) {
    if (field.is_number) return {field.number};
    std::vector<std::uint64_t> numbers;
    for (std::string_view packed = field.bytes; !packed.empty();) numbers.push_back(varint(packed));
    return numbers;
}

std::string text_of(const Field& field) {
    if (!is_utf8(field.bytes)) throw WireError("a text is not UTF-8");
    return std::string(field.bytes);
}

}  // namespace lorafuse

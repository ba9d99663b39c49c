#include "printable.hpp"

#include <algorithm>
#include <array>
#include <cstdint>
#include <cstdio>

namespace lorafuse {
namespace {

struct Range {
    std::uint32_t first, last;
};

// Unicode's categories Cc, Cf, Co, Cs, Zl, Zp and Zs (but for the space); characters not assigned yet between two of
// them count.
constexpr std::array<Range, 25> kHidden = {
    {{0, 0x1f},          {0x7f, 0xa0},       {0xad, 0xad},       {0x600, 0x605},     {0x61c, 0x61c},
     {0x6dd, 0x6dd},     {0x70f, 0x70f},     {0x890, 0x891},     {0x8e2, 0x8e2},     {0x1680, 0x1680},
     {0x180e, 0x180e},   {0x2000, 0x200f},   {0x2028, 0x202f},   {0x205f, 0x206f},   {0x3000, 0x3000},
     {0xd800, 0xf8ff},   {0xfeff, 0xfeff},   {0xfff9, 0xfffb},   {0x110bd, 0x110bd}, {0x110cd, 0x110cd},
     {0x13430, 0x1343f}, {0x1bca0, 0x1bca3}, {0x1d173, 0x1d17a}, {0xe0001, 0xe007f}, {0xf0000, 0x10ffff}}};

bool is_hidden(std::uint32_t character) {
    return std::any_of(kHidden.begin(), kHidden.end(),
                       [&](const Range& range) { return character >= range.first && character <= range.last; });
}

constexpr std::uint32_t kUndecoded = 0xdc00;  // and the byte: what Python's surrogateescape has for a stray one

bool is_stray(std::uint32_t character) { return character >= kUndecoded && character <= kUndecoded + 0xff; }

// The character at the front, and how many bytes it takes; of a byte that begins no character, a stray one.
std::uint32_t front(std::string_view text, std::size_t& bytes) {
    constexpr std::uint32_t kSmallest[] = {0, 0, 0x80, 0x800, 0x10000};
    const auto lead = static_cast<unsigned char>(text[0]);
    const std::size_t length = lead < 0x80   ? 1
                               : lead < 0xc0 ? 0
                               : lead < 0xe0 ? 2
                               : lead < 0xf0 ? 3
                               : lead < 0xf8 ? 4
                                             : 0;
    bytes = 1;
    if (length == 1) return lead;
    if (length == 0 || length > text.size()) return kUndecoded + lead;
    std::uint32_t character = lead & (0xffu >> (length + 1));
    for (std::size_t i = 1; i < length; ++i) {
        const auto next = static_cast<unsigned char>(text[i]);
        if ((next & 0xc0u) != 0x80u) return kUndecoded + lead;
        character = character << 6 | (next & 0x3fu);
    }
    const bool is_surrogate = character >= 0xd800 && character <= 0xdfff;
    if (character < kSmallest[length] || character > 0x10ffff || is_surrogate) return kUndecoded + lead;
    bytes = length;
    return character;
}

std::string escaped(std::uint32_t character) {
    switch (character) {
        case '\n': return "\\n";
        case '\r': return "\\r";
        case '\t': return "\\t";
        default: break;
    }
    char text[11];
    std::snprintf(text, sizeof text,
                  character < 0x100     ? "\\x%02x"
                  : character < 0x10000 ? "\\u%04x"
                                        : "\\U%08x",
                  character);
    return text;
}

}  // namespace

bool is_utf8(std::string_view text) {
    for (std::size_t bytes = 0; !text.empty(); text.remove_prefix(bytes)) {
        if (is_stray(front(text, bytes))) return false;
    }
    return true;
}

bool is_printable(std::string_view text) { return printable(text) == text; }

std::string printable(std::string_view text) {
    std::string shown;
    for (std::size_t bytes = 0; !text.empty(); text.remove_prefix(bytes)) {
        const std::uint32_t character = front(text, bytes);
        shown += is_hidden(character) ? escaped(character) : std::string(text.substr(0, bytes));
    }
    return shown;
}

std::string_view beginning(std::string_view text, std::size_t characters) {
    std::size_t end = 0;
    for (std::size_t bytes = 0; characters > 0 && end < text.size(); --characters, end += bytes)
        front(text.substr(end), bytes);
    return text.substr(0, end);
}

std::string in_quotes(std::string_view text) { return "'" + printable(text) + "'"; }

}  // namespace lorafuse

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

// The character at the front of valid UTF-8, and how many bytes it takes.
std::uint32_t front(std::string_view text, std::size_t& bytes) {
    const auto lead = static_cast<unsigned char>(text[0]);
    bytes = lead < 0x80 ? 1 : lead < 0xe0 ? 2 : lead < 0xf0 ? 3 : 4;
    bytes = std::min(bytes, text.size());
    std::uint32_t character = bytes == 1 ? lead : lead & (0xffu >> (bytes + 1));
    for (std::size_t i = 1; i < bytes; ++i) character = character << 6 | (static_cast<unsigned char>(text[i]) & 0x3fu);
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

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

// Of Unicode's categories Cc, Cf, Co, Cs, Zl, Zp and Zs (but for the space), the ranges that matter in a terminal.
constexpr std::array<Range, 10> kHidden = {{{0, 0x1f},
                                            {0x7f, 0xa0},
                                            {0xad, 0xad},
                                            {0x2000, 0x200f},
                                            {0x2028, 0x202f},
                                            {0x205f, 0x206f},
                                            {0x3000, 0x3000},
                                            {0xd800, 0xf8ff},
                                            {0xfff0, 0xfffb},
                                            {0xe0000, 0x10ffff}}};

bool is_hidden(std::uint32_t character) {
    return character == 0xfeff || std::any_of(kHidden.begin(), kHidden.end(), [&](const Range& range) {
               return character >= range.first && character <= range.last;
           });
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
    std::snprintf(text, sizeof text, character < 0x100 ? "\\x%02x" : character < 0x10000 ? "\\u%04x" : "\\U%08x", character);
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

std::string in_quotes(std::string_view text) {
    std::string doubled;
    for (const char c : text) doubled += c == '\\' ? "\\\\" : std::string(1, c);
    const char quote = text.find('\'') != std::string_view::npos && text.find('"') == std::string_view::npos ? '"' : '\'';
    return quote + printable(doubled) + quote;
}

}  // namespace lorafuse

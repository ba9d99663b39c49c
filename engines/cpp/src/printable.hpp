// Text that came with a bundle, for a terminal.
#pragma once

#include <string>
#include <string_view>

namespace lorafuse {

// Whether the text is UTF-8, as strict as RFC 3629.
bool is_utf8(std::string_view text);

// Whether the UTF-8 text has only characters that show: no controls, no formats (which can turn a line around), no
// private ones.
bool is_printable(std::string_view text);

// The text with those characters escaped, and bytes that are no UTF-8.
std::string printable(std::string_view text);

// The same in quotes.
std::string in_quotes(std::string_view text);

// The first characters of the UTF-8 text.
std::string_view beginning(std::string_view text, std::size_t characters);

}  // namespace lorafuse

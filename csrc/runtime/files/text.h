// Words of error messages. Text of unknown origin is shown printable and short.
#pragma once

#include <cstdio>
#include <sstream>
#include <string>
#include <string_view>
#include <utility>
#include <vector>

#include "olss_description.h"

namespace olss {

template <typename... Parts>
std::string concat(Parts&&... parts) {
    std::ostringstream text;
    (text << ... << std::forward<Parts>(parts));
    return text.str();
}

template <typename... Parts>
[[noreturn]] void fail(Error::Kind kind, Parts&&... parts) {
    throw Error(kind, concat(std::forward<Parts>(parts)...));
}

// The bytes of the letter of UTF-8 that begins there; 0 where there is none: malformed, longer than need be, a
// surrogate or beyond U+10FFFF.
inline std::size_t letter_size(std::string_view text) {
    const auto byte = [&](std::size_t i) { return static_cast<unsigned char>(text[i]); };
    const unsigned char first = text.empty() ? 0xff : byte(0);
    if (first < 0x80) return 1;
    const std::size_t size = first < 0xc2 ? 0 : first < 0xe0 ? 2 : first < 0xf0 ? 3 : first < 0xf5 ? 4 : 0;
    if (text.size() < size) return 0;
    for (std::size_t i = 1; i < size; ++i)
        if ((byte(i) & 0xc0) != 0x80) return 0;
    const bool bad = size == 0 || (first == 0xe0 && byte(1) < 0xa0) || (first == 0xed && byte(1) > 0x9f) ||
                     (first == 0xf0 && byte(1) < 0x90) || (first == 0xf4 && byte(1) > 0x8f);
    return bad ? 0 : size;
}

// In quotes, whatever is no printable letter escaped, about `width` bytes at most and an ellipsis.
inline std::string quote(std::string_view text, std::size_t width = 80) {
    std::string shown = "'";
    while (!text.empty() && shown.size() <= width) {
        const unsigned char first = static_cast<unsigned char>(text[0]);
        std::size_t size = letter_size(text);
        const bool control =
            first < 0x20 || first == 0x7f || (first == 0xc2 && size == 2 && static_cast<unsigned char>(text[1]) < 0xa0);
        if (size == 0 || control) {
            char escape[8];
            std::snprintf(escape, sizeof escape, "\\x%02x", first);
            shown += escape, size = 1;
        } else {
            shown += text.substr(0, size);
        }
        text.remove_prefix(size);
    }
    return shown + (text.empty() ? "'" : "…'");
}

template <typename Items>
std::string listed(const Items& items, const char* between = ", ") {
    std::ostringstream text;
    const char* before = "";
    for (const auto& item : items) {
        text << before << item;
        before = between;
    }
    return text.str();
}

template <typename Items>
std::string shown(const Items& sizes) {
    return concat("(", listed(sizes), ")");
}

}  // namespace olss

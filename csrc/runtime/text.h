// Words of error messages. Text of unknown origin is shown printable and short.
#pragma once

#include <cstdio>
#include <sstream>
#include <string>
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

// In quotes, control characters escaped, at most `width` bytes and an ellipsis.
inline std::string quoted(const std::string& text, std::size_t width = 80) {
    std::string shown = "'";
    for (unsigned char letter : text.substr(0, width)) {
        char escape[8];
        std::snprintf(escape, sizeof escape, "\\x%02x", letter);
        shown += letter < 0x20 || letter == 0x7f ? escape : std::string(1, static_cast<char>(letter));
    }
    while (text.size() > width && !shown.empty() && (shown.back() & 0xc0) == 0x80) shown.pop_back();
    return shown + (text.size() > width ? "…'" : "'");
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

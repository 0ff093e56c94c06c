#include "json.h"

#include <algorithm>
#include <charconv>
#include <cmath>
#include <unordered_set>

#include "text.h"

namespace olss {

namespace {

// As in olss_fast/_json.py.
constexpr int most_depth = 32;
constexpr std::size_t most_parts = std::size_t{1} << 18;  // 16 MiB of "[[],[],…" would be gigabytes in memory

class Parser {
  public:
    Parser(std::string_view text, const std::string& what) : text_(text), what_(what) {}

    Json document() {
        Json result = value(0);
        skip_space();
        if (at_ != text_.size()) refuse("something follows the value");
        return result;
    }

  private:
    [[noreturn]] void refuse(const std::string& reason) const {
        fail(Error::Kind::file, what_, " is not valid JSON (", reason, " at byte ", at_,
             "); copy or build the file again");
    }

    void skip_space() {
        while (at_ < text_.size() && std::string_view(" \t\n\r").find(text_[at_]) != std::string_view::npos) ++at_;
    }

    char peek() const { return at_ < text_.size() ? text_[at_] : '\0'; }

    bool take(char wanted) {
        skip_space();
        if (at_ >= text_.size() || text_[at_] != wanted) return false;
        ++at_;
        if (wanted == '[' || wanted == '{' || wanted == ',') ++parts_;
        if (parts_ > most_parts) refuse(concat("more than ", most_parts, " parts"));
        return true;
    }

    void expect(char wanted) {
        if (!take(wanted)) refuse(std::string("expected '") + wanted + "'");
    }

    bool take_word(std::string_view word) {
        if (text_.substr(at_, word.size()) != word) return false;
        at_ += word.size();
        return true;
    }

    Json value(int depth) {
        skip_space();
        if (depth >= most_depth && (peek() == '[' || peek() == '{'))
            refuse(concat("nested more than ", most_depth, " deep"));
        if (take('{')) return {object(depth)};
        if (take('[')) return {array(depth)};
        if (peek() == '"') return {string()};
        if (take_word("null")) return {};
        if (take_word("true")) return {true};
        if (take_word("false")) return {false};
        return number();
    }

    Json::Array array(int depth) {
        Json::Array items;
        if (take(']')) return items;
        do items.push_back(value(depth + 1));
        while (take(','));
        expect(']');
        return items;
    }

    Json::Object object(int depth) {
        Json::Object members;
        std::unordered_set<std::string> names;
        if (take('}')) return members;
        do {
            skip_space();
            std::string name = string();
            if (!names.insert(name).second) refuse("the name " + quote(name) + " occurs twice");
            expect(':');
            members.emplace_back(std::move(name), value(depth + 1));
        } while (take(','));
        expect('}');
        return members;
    }

    std::size_t digits() {
        const std::size_t begin = at_;
        while (peek() >= '0' && peek() <= '9') ++at_;
        if (at_ == begin) refuse("expected a value");
        return at_ - begin;
    }

    Json number() {
        const std::size_t begin = at_;
        if (peek() == '-') ++at_;
        const bool zero = peek() == '0';
        if (digits() > 1 && zero) refuse("a number begins with 0");
        bool whole = true;
        if (peek() == '.') whole = false, ++at_, digits();
        if (peek() == 'e' || peek() == 'E') {
            whole = false, ++at_;
            if (peek() == '+' || peek() == '-') ++at_;
            digits();
        }
        return whole ? converted<std::int64_t>(begin) : converted<double>(begin);
    }

    template <typename T>
    Json converted(std::size_t begin) {
        T result{};
        const auto [end, fault] = std::from_chars(text_.data() + begin, text_.data() + at_, result);
        const std::string_view text = text_.substr(begin, at_ - begin);
        // Zero is what is too small for a double; and what -0 is as a whole number, readers do not agree about.
        const bool vanished = result == 0 && text.substr(0, text.find_first_of("eE")).find_first_of("123456789") != text.npos;
        if (fault != std::errc() || end != text_.data() + at_ || vanished || text == "-0") refuse("a number out of range");
        return {result};
    }

    std::string string() {
        if (peek() != '"') refuse("expected a string");
        ++at_;
        std::string result;
        while (peek() != '"') {
            if (static_cast<unsigned char>(peek()) < 0x20) refuse("a string that does not end, or a control character");
            if (peek() == '\\') append(result, escape());
            else copy_letter(result);
        }
        ++at_;
        return result;
    }

    std::uint32_t escape() {
        const char letter = ++at_ < text_.size() ? text_[at_++] : '\0';
        if (letter == 'u') return unicode_escape();
        constexpr std::string_view names = "\"\\/bfnrt", meant = "\"\\/\b\f\n\r\t";
        const std::size_t place = letter ? names.find(letter) : std::string_view::npos;
        if (place == std::string_view::npos) refuse("an unknown escape");
        return static_cast<unsigned char>(meant[place]);
    }

    std::uint32_t unicode_escape() {
        const std::uint32_t first = four_digits();
        if (first < 0xd800 || first > 0xdfff) return first;
        if (first > 0xdbff || !take_word("\\u")) refuse("half a surrogate pair");
        const std::uint32_t second = four_digits();
        if (second < 0xdc00 || second > 0xdfff) refuse("half a surrogate pair");
        return 0x10000 + ((first - 0xd800) << 10) + (second - 0xdc00);
    }

    std::uint32_t four_digits() {
        const std::string_view digits = text_.substr(at_, 4);
        std::uint32_t code = 0;
        const auto [end, fault] = std::from_chars(digits.data(), digits.data() + digits.size(), code, 16);
        if (digits.size() != 4 || fault != std::errc() || end != digits.data() + 4)
            refuse("expected 4 hexadecimal digits");
        at_ += 4;
        return code;
    }

    static void append(std::string& text, std::uint32_t code) {
        const auto tail = [&](int shift) { text += static_cast<char>(0x80 | (code >> shift & 0x3f)); };
        if (code < 0x80) text += static_cast<char>(code);
        else if (code < 0x800) text += static_cast<char>(0xc0 | code >> 6), tail(0);
        else if (code < 0x10000) text += static_cast<char>(0xe0 | code >> 12), tail(6), tail(0);
        else text += static_cast<char>(0xf0 | code >> 18), tail(12), tail(6), tail(0);
    }

    void copy_letter(std::string& result) {
        const std::size_t size = letter_size(text_.substr(at_));
        if (size == 0) refuse("not UTF-8");
        result += text_.substr(at_, size);
        at_ += size;
    }

    std::string_view text_;
    const std::string& what_;
    std::size_t at_ = 0, parts_ = 0;
};

}  // namespace

const Json* Json::find(std::string_view name) const {
    if (const Object* members = as<Object>())
        for (const auto& [each, member] : *members)
            if (each == name) return &member;
    return nullptr;
}

std::string Json::summary() const {
    if (const bool* truth = as<bool>()) return *truth ? "true" : "false";
    if (const std::int64_t* integer = as<std::int64_t>()) return concat(*integer);
    if (const double* number = as<double>()) return concat(*number);
    if (const std::string* text = as<std::string>()) return quote(*text);
    std::vector<std::string> parts;
    const std::size_t most = 8;
    if (const Array* items = as<Array>()) {
        for (std::size_t i = 0; i < std::min(most, items->size()); ++i) parts.push_back((*items)[i].summary());
        return concat("[", listed(parts), items->size() > most ? ", …]" : "]");
    }
    if (const Object* members = as<Object>()) {
        for (std::size_t i = 0; i < std::min(most, members->size()); ++i)
            parts.push_back(concat(quote((*members)[i].first), ": ", (*members)[i].second.summary()));
        return concat("{", listed(parts), members->size() > most ? ", …}" : "}");
    }
    return "null";
}

bool Json::operator==(const Json& other) const {
    const Object *members = as<Object>(), *others = other.as<Object>();
    if (!members || !others) return value == other.value;
    return members->size() == others->size() && std::all_of(members->begin(), members->end(), [&](const auto& each) {
               const Json* there = other.find(each.first);
               return there && each.second == *there;
           });
}

Json parse_json(std::string_view text, const std::string& what) { return Parser(text, what).document(); }

}  // namespace olss

#include "files/npy.h"

#include <algorithm>
#include <charconv>
#include <cstring>
#include <limits>

#include "files/files.h"
#include "files/text.h"

namespace olss {

namespace {

constexpr auto kind = Error::Kind::file;
constexpr std::string_view magic = "\x93NUMPY";
constexpr std::size_t most_header = std::size_t{1} << 16, most_bytes = std::size_t{1} << 34;

struct Type {
    const char *descr, *dtype;
    std::size_t bytes;
};
constexpr Type types[] = {{"<f8", "float64", 8}, {"<f4", "float32", 4}, {"<f2", "float16", 2},
                          {"<i8", "int64", 8},   {"<i4", "int32", 4},   {"<i2", "int16", 2},
                          {"|i1", "int8", 1},    {"|u1", "uint8", 1},   {"|b1", "bool", 1}};

// The header, such as {'descr': '<f4', 'fortran_order': False, 'shape': (2, 3), }
class Header {
  public:
    explicit Header(std::string_view text) : text_(text) {
        expect('{');
        while (!take('}')) {
            const std::string name = string();
            expect(':');
            member(name);
            if (!take(',') && (skip_space(), text_.substr(0, 1) != "}")) refuse();
        }
        skip_space();
        if (!text_.empty() || descr.empty() || !have_order_ || !have_shape_) refuse();
    }

    std::string descr;
    bool fortran_order = false;
    Shape shape;

  private:
    [[noreturn]] static void refuse() { fail(kind, "its header is not what NumPy writes; save the array again"); }

    void skip_space() { text_.remove_prefix(std::min(text_.find_first_not_of(" \n"), text_.size())); }

    bool take(char wanted) {
        skip_space();
        if (text_.empty() || text_.front() != wanted) return false;
        text_.remove_prefix(1);
        return true;
    }

    void expect(char wanted) {
        if (!take(wanted)) refuse();
    }

    bool take_word(std::string_view word) {
        skip_space();
        if (text_.substr(0, word.size()) != word) return false;
        text_.remove_prefix(word.size());
        return true;
    }

    std::string string() {
        expect('\'');
        const std::size_t end = text_.find('\'');
        if (end == std::string_view::npos) refuse();
        std::string result(text_.substr(0, end));
        text_.remove_prefix(end + 1);
        return result;
    }

    void member(const std::string& name) {
        if (name == "descr") {
            skip_space();
            if (text_.substr(0, 1) != "'") fail(kind, "it holds structured data; save a plain array of numbers");
            descr = string();
        } else if (name == "fortran_order") {
            have_order_ = true, fortran_order = take_word("True");
            if (!fortran_order && !take_word("False")) refuse();
        } else if (name == "shape" && !have_shape_) {
            have_shape_ = true, read_shape();
        } else {
            refuse();
        }
    }

    void read_shape() {
        expect('(');
        while (!take(')')) {
            skip_space();
            std::int64_t size = -1;
            const auto [end, fault] = std::from_chars(text_.data(), text_.data() + text_.size(), size);
            if (fault != std::errc() || size < 0 || shape.size() == 32) refuse();
            text_.remove_prefix(static_cast<std::size_t>(end - text_.data()));
            shape.push_back(size);
            if (!take(',') && (skip_space(), text_.substr(0, 1) != ")")) refuse();
        }
    }

    std::string_view text_;
    bool have_order_ = false, have_shape_ = false;
};

const Type& type_of(const std::string& descr) {
    for (const Type& type : types)
        if (descr == type.descr) return type;
    std::vector<std::string> known;
    for (const Type& type : types) known.push_back(type.dtype);
    fail(kind, "it holds numbers of the type ", quote(descr), "; save it as one of ", listed(known));
}

std::string_view header_of(std::string_view file) {
    if (file.size() < 12 || file.substr(0, 6) != magic)
        fail(kind, "it does not begin as a .npy file does; write it with numpy.save");
    const int version = static_cast<unsigned char>(file[6]);
    if (version < 1 || version > 3) fail(kind, "it is of version ", version, " of the format; expected 1, 2 or 3");
    const std::size_t digits = version == 1 ? 2 : 4;
    std::size_t size = 0;
    for (std::size_t i = digits; i-- > 0;) size = size << 8 | static_cast<unsigned char>(file[8 + i]);
    if (size > most_header || 8 + digits + size > file.size())
        fail(kind, "its header should have ", size, " bytes, and the file has ", file.size(), ": truncated?");
    return file.substr(8 + digits, size);
}

std::size_t bytes_needed(const Type& type, const Shape& shape) {
    std::size_t bytes = type.bytes;
    for (std::int64_t size : shape) {
        const std::size_t factor = static_cast<std::size_t>(size);
        if (factor && bytes > most_bytes / factor)
            fail(kind, "its shape is ", shown(shape), "; expected at most ", most_bytes, " bytes");
        bytes *= factor;
    }
    return bytes;
}

}  // namespace

Npy parse_npy(std::string_view file) {
    const std::string_view head = header_of(file);
    const Header header(head);
    const Type& type = type_of(header.descr);
    if (header.fortran_order && header.shape.size() > 1)
        fail(kind, "it is in Fortran order; save numpy.ascontiguousarray(array)");
    const std::string_view data = file.substr(static_cast<std::size_t>(head.data() + head.size() - file.data()));
    const std::size_t needed = bytes_needed(type, header.shape);
    if (data.size() != needed)
        fail(kind, "an array of ", type.dtype, " ", shown(header.shape), " needs ", needed, " bytes, and it has ",
             data.size());
    return {type.dtype, header.shape, std::string(data)};
}

Npy read_npy(const std::string& path) {
    const InputFile file(path);
    if (file.size() > most_bytes)
        fail(kind, quote(path, 200), " has ", file.size(), " bytes; expected at most ", most_bytes);
    Bytes bytes(file.size());
    file.read(0, bytes.data.get(), bytes.size);
    try {
        return parse_npy(bytes.text());
    } catch (const Error& error) {
        fail(kind, quote(path, 200), " is no usable .npy file: ", error.what());
    }
}

std::string npy_file(const Npy& array) {
    const Type* type =
        std::find_if(std::begin(types), std::end(types), [&](const Type& each) { return array.dtype == each.dtype; });
    std::string header = concat("{'descr': '", type->descr, "', 'fortran_order': False, 'shape': (",
                                listed(array.shape), array.shape.size() == 1 ? ",), }" : "), }");
    header.append(63 - (magic.size() + 4 + header.size()) % 64, ' ') += '\n';
    const char prefix[] = {1, 0, static_cast<char>(header.size() & 0xff), static_cast<char>(header.size() >> 8)};
    return concat(magic, std::string_view(prefix, 4), header, array.data);
}

}  // namespace olss

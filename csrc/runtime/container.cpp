#include "container.h"

#include <algorithm>
#include <cctype>
#include <cstring>

#include "parallel.h"
#include "sha256.h"
#include "text.h"

namespace olss {

namespace {

constexpr auto kind = Error::Kind::file;
constexpr std::size_t most_header = std::size_t{16} << 20, piece = std::size_t{4} << 20, most_dimensions = 16;
constexpr std::int64_t most_bytes = std::int64_t{1} << 40;  // of a file
constexpr const char* entry_name = "olss_fast.engine";
constexpr std::int64_t newest_version = 2;
constexpr const char* again = "; copy or build the file again";

struct Dtype {
    const char *file, *torch;
    std::size_t bytes;
};
constexpr Dtype dtypes[] = {{"F64", "float64", 8},   {"F32", "float32", 4}, {"F16", "float16", 2}, {"BF16", "bfloat16", 2},
                            {"I64", "int64", 8},     {"I32", "int32", 4},   {"I16", "int16", 2},   {"I8", "int8", 1},
                            {"U8", "uint8", 1},      {"BOOL", "bool", 1}};

std::size_t bytes_of(const std::string& dtype) {
    for (const Dtype& each : dtypes)
        if (dtype == each.file) return each.bytes;
    return 0;
}

// A list of whole numbers from 0 to the size of the largest file, or false.
bool naturals(const Json* json, Shape& result) {
    const Json::Array* items = json ? json->as<Json::Array>() : nullptr;
    if (!items || items->size() > most_dimensions) return false;
    for (const Json& item : *items) {
        const std::int64_t* number = item.as<std::int64_t>();
        if (!number || *number < 0 || *number > most_bytes) return false;
        result.push_back(*number);
    }
    return true;
}

// bytes * shape[0] * shape[1] …, or false where that is more than a file can hold. Zeros hide no other size.
bool product(std::size_t bytes, const Shape& shape, std::size_t& result) {
    result = 1;
    for (std::int64_t size : shape) {
        const auto factor = static_cast<std::size_t>(std::max<std::int64_t>(1, size));
        if (result > static_cast<std::size_t>(most_bytes) / factor) return false;
        result *= factor;
    }
    result = std::find(shape.begin(), shape.end(), 0) != shape.end() ? 0 : result * bytes;
    return true;
}

bool has_control_characters(std::string_view text) {
    for (std::size_t i = 0; i < text.size(); ++i) {
        const auto byte = static_cast<unsigned char>(text[i]);
        if (byte < 0x20 || byte == 0x7f || (byte == 0xc2 && static_cast<unsigned char>(text[i + 1]) < 0xa0)) return true;
    }
    return false;
}

TableEntry table_entry(const std::string& name, const Json& json, std::size_t expected_begin) {
    TableEntry entry{name, {}, {}, 0, 0};
    const Json* dtype = json.find("dtype");
    Shape offsets;
    const bool described = json.as<Json::Object>() && json.as<Json::Object>()->size() == 3 && dtype &&
                           dtype->as<std::string>() && naturals(json.find("shape"), entry.shape) &&
                           naturals(json.find("data_offsets"), offsets) && offsets.size() == 2;
    if (!described)
        fail(kind, "tensor ", quote(name), " is described by ", json.summary(),
             "; expected dtype, shape and data_offsets [begin, end]", again);
    if (has_control_characters(name))
        fail(kind, "a tensor is named ", quote(name), "; expected a name that can be printed");
    entry.dtype = *dtype->as<std::string>();
    entry.begin = static_cast<std::size_t>(offsets[0]), entry.end = static_cast<std::size_t>(offsets[1]);
    if (!bytes_of(entry.dtype))
        fail(kind, "tensor ", quote(name), " has the dtype ", quote(entry.dtype), ", which is unknown");
    std::size_t size = 0;
    if (!product(bytes_of(entry.dtype), entry.shape, size) || entry.end < entry.begin ||
        entry.end - entry.begin != size)
        fail(kind, "tensor ", quote(name), " of ", entry.dtype, " ", shown(entry.shape), " lies in bytes ", entry.begin,
             " to ", entry.end, ", which do not fit its shape", again);
    if (entry.begin != expected_begin)
        fail(kind, "tensor ", quote(name), " begins at byte ", entry.begin, "; expected ", expected_begin,
             ", where the tensor before it ends", again);
    return entry;
}

std::size_t header_size(const InputFile& file) {
    unsigned char digits[8];
    if (file.size() < 8)
        fail(kind, "it has ", file.size(), " bytes; an engine file begins with 8 bytes of header length", again);
    file.read(0, digits, 8);
    std::uint64_t size = 0;
    for (int i = 7; i >= 0; --i) size = size << 8 | digits[i];
    if (size > most_header || size % 8)
        fail(kind, "its first 8 bytes announce a header of ", size, " bytes; expected a multiple of 8 up to ",
             most_header, "; is it an engine file at all?");
    if (8 + size > file.size())
        fail(kind, "it has ", file.size(), " bytes, but its header should reach to byte ", 8 + size, ": truncated",
             again);
    return static_cast<std::size_t>(size);
}

// Looked at before anything else of the manifest: whatever follows may mean something else in another version.
void check_version(const Json& manifest) {
    const Json* format = manifest.find("format");
    if (!format || !format->as<std::string>() || *format->as<std::string>() != entry_name)
        fail(kind, "its format is ", format ? format->summary() : "missing", "; expected ", quote(entry_name));
    const Json* version = manifest.find("version");
    const std::int64_t* number = version ? version->as<std::int64_t>() : nullptr;
    if (!number || *number < 1)
        fail(kind, "its version is ", version ? version->summary() : "missing", "; expected a positive integer");
    if (*number > newest_version)
        fail(Error::Kind::version, "it was written in version ", *number,
             " of the format, by a newer olss_fast; this runtime reads version ", newest_version,
             "; build the runtime of that olss_fast, or build the engine again with this one");
    if (*number < newest_version)
        fail(Error::Kind::version, "it was written in version ", *number, " of the format, by an older olss_fast; this "
             "runtime reads version ", newest_version, ": build the engine again");
}

const std::string& claimed_digest(const Json& manifest) {
    const Json::Object* members = manifest.as<Json::Object>();
    if (!members || members->empty() || members->front().first != "sha256")
        fail(kind, "the manifest is ", manifest.summary(), "; expected an object whose first member is sha256");
    const std::string* digits = members->front().second.as<std::string>();
    if (!digits || digits->size() != 64 || digits->find_first_not_of("0123456789abcdef") != std::string::npos)
        fail(kind, "its sha256 is ", members->front().second.summary(), "; expected 64 lower-case hexadecimal digits",
             again);
    return *digits;
}

// Reads `size` bytes from `begin` on; those of the header are the ones that were looked at before.
void read_behind(const InputFile& file, const Bytes& head, std::size_t begin, unsigned char* into, std::size_t size) {
    const std::size_t known = begin < head.size ? std::min(size, head.size - begin) : 0;
    if (known) std::memcpy(into, head.data.get() + begin, known);
    file.read(begin + known, into + known, size - known);
}

// SHA-256 of the SHA-256 of each piece of 4 MiB, so that all processors can take part.
std::string digest_of_pieces(const InputFile& file, const Bytes& head) {
    std::vector<Digest> digests((file.size() + piece - 1) / piece);
    in_parallel(digests.size(), [&](std::size_t i) {
        Bytes part(std::min(piece, file.size() - i * piece));
        read_behind(file, head, i * piece, part.data.get(), part.size);
        digests[i] = sha256(part.data.get(), part.size);
    });
    return hexadecimal(sha256(digests.front().data(), digests.size() * sizeof(Digest)));
}

// The digest is that of the file in which its own digits are zeros; they are where they occur first in the header.
void check_digest(const InputFile& file, Bytes& head, const std::string& claimed) {
    const std::size_t place = head.text().substr(8).find(claimed);
    if (place == std::string_view::npos)
        fail(kind, "the digits of its sha256 are written in escapes; expected plain ones", again);
    std::memset(head.data.get() + 8 + place, '0', claimed.size());
    const std::string found = digest_of_pieces(file, head);
    std::memcpy(head.data.get() + 8 + place, claimed.data(), claimed.size());
    if (found != claimed)
        fail(kind, "its content has the digest ", found.substr(0, 12), "… and it says ", claimed.substr(0, 12),
             "…: damaged or altered", again);
}

std::string lower(std::string digits) {
    if (digits.size() != 64 || digits.find_first_not_of("0123456789abcdefABCDEF") != std::string::npos)
        fail(Error::Kind::input, "sha256 is ", quote(digits), "; expected 64 hexadecimal digits, as sha256sum prints them");
    for (char& digit : digits) digit = static_cast<char>(std::tolower(static_cast<unsigned char>(digit)));
    return digits;
}

void check_sha256(const InputFile& file, const Bytes& head, const std::string& expected) {
    Sha256 whole;
    Bytes part(piece);
    for (std::size_t begin = 0; begin < file.size(); begin += piece) {
        const std::size_t size = std::min(piece, file.size() - begin);
        read_behind(file, head, begin, part.data.get(), size);
        whole.add(part.data.get(), size);
    }
    const std::string found = hexadecimal(whole.finish());
    if (found != expected)
        fail(kind, "its sha256 is ", found, "; expected ", expected, ": it is another file than you mean");
}

}  // namespace

std::vector<TableEntry> tensor_table(const Json& header, std::size_t data_size) {
    std::vector<TableEntry> table;
    std::size_t end = 0;
    for (const auto& [name, described] : *header.as<Json::Object>()) {
        if (name == "__metadata__") continue;
        table.push_back(table_entry(name, described, end));
        end = table.back().end;
    }
    if (end != data_size)
        fail(kind, "its tensors need ", end, " bytes after the header and it has ", data_size, ": ",
             end > data_size ? "truncated" : "something was appended", again);
    return table;
}

const std::string& metadata_entry(const Json& header, const std::string& name) {
    const Json* metadata = header.find("__metadata__");
    const Json::Object* entries = metadata ? metadata->as<Json::Object>() : nullptr;
    const std::string* text = entries && entries->size() == 1
                                  ? metadata->find(name) ? metadata->find(name)->as<std::string>() : nullptr
                                  : nullptr;
    if (!text)
        fail(kind, "its __metadata__ is ", metadata ? metadata->summary() : "missing", "; expected the single entry ",
             quote(name), ". Perhaps a model, or another kind of file?");
    return *text;
}

std::string dtype_in_files(const std::string& torch_name) {
    for (const Dtype& each : dtypes)
        if (torch_name == each.torch) return each.file;
    return "";
}

Container::Container(const std::string& path, const std::optional<std::string>& sha256) : bytes_(0) {
    const std::string expected = sha256 ? lower(*sha256) : "";
    const InputFile file(path);
    Bytes head(8 + header_size(file));
    file.read(0, head.data.get(), head.size);
    const Json header = parse_json(head.text().substr(8), "the header");
    manifest_ = parse_json(metadata_entry(header, entry_name), "the manifest");
    check_version(manifest_);
    const std::string claimed = claimed_digest(manifest_);
    const std::vector<TableEntry> table = tensor_table(header, file.size() - head.size);
    check_digest(file, head, claimed);
    if (!expected.empty() && expected != claimed) check_sha256(file, head, expected);

    bytes_ = Bytes(file.size() - head.size);
    file.read(head.size, bytes_.data.get(), bytes_.size);
    for (const TableEntry& entry : table)
        tensors_.push_back({entry.name, entry.dtype, entry.shape, bytes_.data.get() + entry.begin, entry.end - entry.begin});
}

}  // namespace olss

#include "files/container.h"

#include <algorithm>
#include <cstring>

#include "files/parallel.h"
#include "files/sha256.h"
#include "files/text.h"

namespace olss {

namespace {

constexpr auto kind = Error::Kind::file;
constexpr std::size_t piece = std::size_t{16} << 20, block = std::size_t{1} << 20, most_dimensions = 16;
constexpr std::int64_t most_bytes = std::int64_t{1} << 40;  // of any file
constexpr const char* again = "; copy the file again, or make it again";

// Where a tensor lies, counted from the end of the header.
struct TableEntry {
    std::string name, dtype;
    Shape shape;
    std::size_t begin, end;
};

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

// The length of the header, and the header.
Bytes head_of(const Source& source, const Format& format) {
    unsigned char digits[8];
    if (source.size > format.most_bytes)
        fail(kind, "it has ", source.size, " bytes; expected at most ", format.most_bytes);
    if (source.size < 8)
        fail(kind, "it has ", source.size, " bytes; a safetensors file begins with 8 bytes of header length", again);
    source.read(0, digits, 8);
    std::uint64_t size = 0;
    for (int i = 7; i >= 0; --i) size = size << 8 | digits[i];
    if (size > format.most_header || size % 8)
        fail(kind, "its first 8 bytes announce a header of ", size, " bytes; expected a multiple of 8 up to ",
             format.most_header, "; is it a safetensors file at all?");
    if (8 + size > source.size)
        fail(kind, "it has ", source.size, " bytes, but its header should reach to byte ", 8 + size, ": truncated",
             again);
    Bytes head(8 + static_cast<std::size_t>(size));
    source.read(0, head.data.get(), head.size);
    return head;
}

// Looked at before anything else of the entry: whatever follows may mean something else in another version.
void check_version(const Json& entry, const Format& format) {
    const Json* name = entry.find("format");
    if (!name || !name->as<std::string>() || *name->as<std::string>() != format.name)
        fail(kind, "its format is ", name ? name->summary() : "missing", "; expected ", quote(format.name));
    const Json* version = entry.find("version");
    const std::int64_t* number = version ? version->as<std::int64_t>() : nullptr;
    if (!number || *number < 1)
        fail(kind, "its version is ", version ? version->summary() : "missing", "; expected a positive integer");
    if (*number != format.version)
        fail(Error::Kind::version, "it was written in version ", *number, " of the format, by ",
             *number > format.version ? "a newer" : "an older", " olss_fast; this runtime reads version ",
             format.version, ": make the file again with this release, or use the runtime of the one that made it");
}

// The header's only metadata entry, of this format and version.
Json entry_of(const Json& header, const Format& format) {
    const Json* metadata = header.find("__metadata__");
    const Json::Object* entries = metadata ? metadata->as<Json::Object>() : nullptr;
    const Json* text = entries && entries->size() == 1 ? metadata->find(format.name) : nullptr;
    if (!text || !text->as<std::string>())
        fail(kind, "its __metadata__ is ", metadata ? metadata->summary() : "missing", "; expected the single entry ",
             quote(format.name), ". Perhaps a model, or another kind of file?");
    Json entry = parse_json(*text->as<std::string>(), concat("the entry ", quote(format.name)));
    check_version(entry, format);
    return entry;
}

const std::string& claimed_checksum(const Json& entry) {
    const auto& [name, value] = entry.as<Json::Object>()->front();
    if (name != "sha256") fail(kind, "its first member is ", quote(name), "; expected sha256");
    const std::string* digits = value.as<std::string>();
    if (!digits || digits->size() != 64 || digits->find_first_not_of("0123456789abcdef") != std::string::npos)
        fail(kind, "its sha256 is ", value.summary(), "; expected 64 lower-case hexadecimal digits");
    return *digits;
}

// SHA-256 of `size` bytes from `begin` on; those of the header are the ones in `head`, which were looked at before.
Digest sum_of(const Source& source, const Bytes& head, std::size_t begin, std::size_t size) {
    Sha256 total;
    if (begin < head.size) {
        const std::size_t known = std::min(size, head.size - begin);
        total.add(head.data.get() + begin, known);
        begin += known, size -= known;
    }
    Bytes part(std::min(size, block));
    for (const std::size_t end = begin + size; begin < end; begin += part.size) {
        part.size = std::min(part.size, end - begin);
        source.read(begin, part.data.get(), part.size);
        total.add(part.data.get(), part.size);
    }
    return total.finish();
}

// Of the file, or beyond one piece of the sums of its pieces, so that all processors can take part.
std::string checksum(const Source& source, const Bytes& head) {
    std::vector<Digest> sums((source.size + piece - 1) / piece);
    in_parallel(sums.size(), [&](std::size_t i) {
        sums[i] = sum_of(source, head, i * piece, std::min(piece, source.size - i * piece));
    });
    return hexadecimal(sums.size() == 1 ? sums[0] : sha256(sums[0].data(), sums.size() * sizeof(Digest)));
}

// The checksum is that of the file in which its own digits are zeros; they are where they occur first in the header.
void check_checksum(const Source& source, Bytes& head, const std::string& claimed) {
    const std::size_t place = head.text().substr(8).find(claimed);
    if (place == std::string_view::npos)
        fail(kind, "the digits of its sha256 are written in escapes; expected plain ones", again);
    std::memset(head.data.get() + 8 + place, '0', claimed.size());
    const std::string found = checksum(source, head);
    std::memcpy(head.data.get() + 8 + place, claimed.data(), claimed.size());
    if (found != claimed)
        fail(kind, "its content has the SHA-256 ", found.substr(0, 12), "… and it says ", claimed.substr(0, 12),
             "…: damaged or altered", again);
}

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

}  // namespace

Source source_of(const InputFile& file) {
    return {file.size(), [&file](std::size_t begin, void* into, std::size_t count) { file.read(begin, into, count); }};
}

Source source_of(std::string_view bytes) {
    return {bytes.size(), [bytes](std::size_t begin, void* into, std::size_t count) {
                if (count) std::memcpy(into, bytes.data() + begin, count);
            }};
}

std::string dtype_in_files(const std::string& torch_name) {
    for (const Dtype& each : dtypes)
        if (torch_name == each.torch) return each.file;
    return "";
}

Container::Container(const Source& source, const Format& format, const std::string& sha256) : bytes_(0) {
    Bytes head = head_of(source, format);
    const Json header = parse_json(head.text().substr(8), "the header");
    entry_ = entry_of(header, format);
    const std::string claimed = claimed_checksum(entry_);
    const std::vector<TableEntry> table = tensor_table(header, source.size - head.size);
    check_checksum(source, head, claimed);
    if (!sha256.empty() && sha256 != claimed)
        if (const std::string found = hexadecimal(sum_of(source, head, 0, source.size)); found != sha256)
            fail(kind, "its sha256 is ", found, "; expected ", sha256, ": it is another file than you mean");

    bytes_ = Bytes(source.size - head.size);
    source.read(head.size, bytes_.data.get(), bytes_.size);
    for (const TableEntry& each : table)
        tensors_.push_back({each.name, each.dtype, each.shape, bytes_.data.get() + each.begin, each.end - each.begin});
}

}  // namespace olss

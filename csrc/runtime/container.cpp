#include "container.h"

#include <algorithm>
#include <atomic>
#include <cstring>
#include <limits>
#include <thread>

#include "sha256.h"
#include "text.h"

namespace olss {

namespace {

constexpr auto kind = Error::Kind::file;
constexpr std::size_t most_header = std::size_t{16} << 20, piece = std::size_t{4} << 20, most_dimensions = 32;
constexpr const char* entry_name = "olss_fast.engine";
constexpr std::int64_t newest_version = 1;
constexpr const char* again = "; copy or build the file again";

std::size_t bytes_of(const std::string& dtype) {
    static const std::vector<std::pair<const char*, std::size_t>> known = {
        {"F64", 8}, {"F32", 4}, {"F16", 2}, {"BF16", 2}, {"I64", 8},
        {"I32", 4}, {"I16", 2}, {"I8", 1},  {"U8", 1},   {"BOOL", 1}};
    for (const auto& [name, bytes] : known)
        if (dtype == name) return bytes;
    return 0;
}

// A list of whole numbers >= 0, or false.
bool naturals(const Json* json, Shape& result) {
    const Json::Array* items = json ? json->as<Json::Array>() : nullptr;
    if (!items || items->size() > most_dimensions) return false;
    for (const Json& item : *items) {
        const std::int64_t* number = item.as<std::int64_t>();
        if (!number || *number < 0) return false;
        result.push_back(*number);
    }
    return true;
}

// bytes * shape[0] * shape[1] …, or false where that is beyond 64 bits. (Zeros last, so that no other size hides.)
bool product(std::size_t bytes, const Shape& shape, std::size_t& result) {
    result = bytes;
    for (std::int64_t size : shape) {
        const std::size_t factor = std::max<std::size_t>(1, static_cast<std::size_t>(size));
        if (result > std::numeric_limits<std::size_t>::max() / factor) return false;
        result *= factor;
    }
    if (std::find(shape.begin(), shape.end(), 0) != shape.end()) result = 0;
    return true;
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

// SHA-256 of the SHA-256 of each piece of 4 MiB, so that all processors can take part.
std::string digest_of_pieces(const Bytes& bytes) {
    const std::size_t count = (bytes.size + piece - 1) / piece;
    std::vector<Digest> digests(count);
    std::atomic<std::size_t> next{0};
    const auto work = [&] {
        for (std::size_t i; (i = next++) < count;)
            digests[i] = sha256(bytes.data.get() + i * piece, std::min(piece, bytes.size - i * piece));
    };
    std::vector<std::thread> helpers;
    const std::size_t most = std::min<std::size_t>(count, std::max(1u, std::thread::hardware_concurrency()));
    try {
        while (helpers.size() + 1 < most) helpers.emplace_back(work);
    } catch (const std::system_error&) {  // no more threads to be had: those that are there do
    }
    work();
    for (std::thread& helper : helpers) helper.join();
    return hexadecimal(sha256(digests.front().data(), digests.size() * sizeof(Digest)));
}

// The digest is that of the file in which its own digits are zeros; they are where they occur first in the header.
void check_digest(Bytes& bytes, std::size_t header, const std::string& claimed) {
    const std::size_t place = bytes.text().substr(8, header).find(claimed);
    if (place == std::string_view::npos)
        fail(kind, "the digits of its sha256 are written in escapes; expected plain ones", again);
    std::memset(bytes.data.get() + 8 + place, '0', claimed.size());
    const std::string found = digest_of_pieces(bytes);
    if (found != claimed)
        fail(kind, "its content has the digest ", found.substr(0, 12), "… and it says ", claimed.substr(0, 12),
             "…: damaged or altered", again);
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

Container::Container(const std::string& path) : bytes_(0) {
    const InputFile file(path);
    const std::size_t header_bytes = header_size(file), data_begin = 8 + header_bytes;
    Bytes head(data_begin);
    file.read(0, head.data.get(), head.size);
    const Json header = parse_json(head.text().substr(8), "the header");
    manifest_ = parse_json(metadata_entry(header, entry_name), "the manifest");
    check_version(manifest_);
    const std::string claimed = claimed_digest(manifest_);
    const std::vector<TableEntry> table = tensor_table(header, file.size() - data_begin);

    bytes_ = Bytes(file.size());
    std::memcpy(bytes_.data.get(), head.data.get(), head.size);
    file.read(data_begin, bytes_.data.get() + data_begin, bytes_.size - data_begin);
    check_digest(bytes_, header_bytes, claimed);
    for (const TableEntry& entry : table)
        tensors_.push_back({entry.name, entry.dtype, entry.shape, bytes_.data.get() + data_begin + entry.begin,
                            entry.end - entry.begin});
}

}  // namespace olss

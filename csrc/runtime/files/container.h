// The container of engine and plan files (olss_fast/support/container.py): an ordinary safetensors file whose whole content is
// covered by a checksum. Everything throws Error: file, version.
#pragma once

#include <functional>
#include <string>
#include <string_view>
#include <vector>

#include "files/files.h"
#include "files/json.h"
#include "olss_description.h"

namespace olss {

// One kind of file: the name of its entry, the version that is read, and the bounds on its bytes.
struct Format {
    const char* name;
    std::int64_t version;
    std::size_t most_header, most_bytes;
};

// What a container is read from.
struct Source {
    std::size_t size;
    std::function<void(std::size_t begin, void* into, std::size_t count)> read;
};
Source source_of(const InputFile& file);  // the file must outlive the source; so must these bytes
Source source_of(std::string_view bytes);

// A tensor in memory owned elsewhere: C order, little-endian, not aligned.
struct TensorView {
    std::string name, dtype;  // dtype as safetensors names it: "F32"
    Shape shape;
    const unsigned char* data;
    std::size_t size;  // bytes
    std::string_view text() const { return {reinterpret_cast<const char*>(data), size}; }
};

// "float32" -> "F32"; "" where there is none of that name.
std::string dtype_in_files(const std::string& torch_name);

class Container {
  public:
    // Sizes, header, entry, table, and the checksum of all of it are checked before the content is in memory. Nothing of
    // the content has been interpreted. sha256: the expected one, in lower case; "" for any.
    Container(const Source& source, const Format& format, const std::string& sha256 = "");

    const Json& entry() const { return entry_; }
    const std::vector<TensorView>& tensors() const { return tensors_; }

  private:
    Bytes bytes_;
    Json entry_;
    std::vector<TensorView> tensors_;
};

}  // namespace olss

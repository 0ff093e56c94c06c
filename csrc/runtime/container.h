// The container of an engine file: an ordinary safetensors file whose whole content is covered by a digest.
#pragma once

#include <optional>
#include <string>
#include <string_view>
#include <vector>

#include "files.h"
#include "json.h"
#include "olss_description.h"

namespace olss {

// Where a tensor lies in a safetensors file, counted from the end of the header.
struct TableEntry {
    std::string name, dtype;  // dtype as safetensors names it: "F32"
    Shape shape;
    std::size_t begin, end;
};

// A tensor in memory that somebody else owns: C order, little-endian, not aligned.
struct TensorView {
    std::string name, dtype;
    Shape shape;
    const unsigned char* data;
    std::size_t size;  // bytes
};

// The tensors of a header, checked: known dtypes, sizes that fit the shapes, one after the other in the order of the
// table, none beyond `data_size` bytes, nothing between or behind them. Throws Error(file).
std::vector<TableEntry> tensor_table(const Json& header, std::size_t data_size);

// "float32" -> "F32"; "" where there is none of that name.
std::string dtype_in_files(const std::string& torch_name);

// The text of the header's only metadata entry, `name`. Throws Error(file).
const std::string& metadata_entry(const Json& header, const std::string& name);

class Container {
  public:
    // Sizes, header, manifest, table, and the digest of all of it are checked before the content is in memory. Throws
    // Error(file), and Error(input) for a `sha256` that is none. Nothing of the content has been looked at.
    // sha256: that the file ought to have, as sha256sum prints it, in either case of letters.
    Container(const std::string& path, const std::optional<std::string>& sha256);

    const Json& manifest() const { return manifest_; }
    const std::vector<TensorView>& tensors() const { return tensors_; }

  private:
    Bytes bytes_;
    Json manifest_;
    std::vector<TensorView> tensors_;
};

}  // namespace olss

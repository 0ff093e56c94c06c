// Files of unknown origin are read with bounds; files are written whole or not at all. Everything throws Error(file).
#pragma once

#include <cstddef>
#include <memory>
#include <string>
#include <string_view>

namespace olss {

// A regular file (or what a link leads to), open for reading.
class InputFile {
  public:
    explicit InputFile(const std::string& path);
    ~InputFile();
    InputFile(const InputFile&) = delete;
    InputFile& operator=(const InputFile&) = delete;
    std::size_t size() const { return size_; }
    void read(std::size_t offset, void* into, std::size_t count) const;

  private:
    std::string path_;
    int descriptor_ = -1;
    std::size_t size_ = 0;
};

// Bytes in uninitialised memory.
struct Bytes {
    explicit Bytes(std::size_t count) : data(new unsigned char[count]), size(count) {}
    std::string_view text() const { return {reinterpret_cast<const char*>(data.get()), size}; }

    std::unique_ptr<unsigned char[]> data;
    std::size_t size;
};

// Refuses a path that write_atomically would refuse: a folder, a link, a device, or in a folder that is not there.
void check_writable(const std::string& path);

// A temporary file beside `path` is written, flushed and renamed over it: the old file or the new one, never a part.
void write_atomically(const std::string& path, std::string_view data);

// A new private folder, deleted with this object together with the files written into it.
class PrivateFolder {
  public:
    PrivateFolder();
    ~PrivateFolder();
    PrivateFolder(const PrivateFolder&) = delete;
    PrivateFolder& operator=(const PrivateFolder&) = delete;
    // The path of the new file.
    std::string write(const std::string& name, const unsigned char* data, std::size_t size);

  private:
    std::string path_, names_;  // names_: of the files, each followed by a '/', which no name holds
};

}  // namespace olss

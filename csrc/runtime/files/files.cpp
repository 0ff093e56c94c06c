#include "files/files.h"

#include <cerrno>
#include <cstdlib>
#include <cstring>
#include <random>

#include <fcntl.h>
#include <sys/stat.h>
#include <unistd.h>

#include "files/text.h"

namespace olss {

namespace {

std::string advice(int number) {
    switch (number) {
        case ENOSPC:
        case EDQUOT: return "the disk is full; free some space or choose another folder";
        case EACCES:
        case EPERM: return "permission denied; choose a place you may use, or change its permissions";
        case EROFS: return "the file system is read-only; choose another folder";
        case ENOENT: return "no such file or folder; check the path";
        case ENOTDIR: return "a part of the path is a file, not a folder; check the path";
        case ENAMETOOLONG: return "the name is too long; choose a shorter one";
        default: return std::strerror(number);
    }
}

constexpr auto kind = Error::Kind::file;

const char* kind_of(mode_t mode) {
    if (S_ISDIR(mode)) return "a folder";
    return S_ISLNK(mode) ? "a symbolic link" : "a device, pipe or socket";
}

// Closes when it goes out of scope.
struct Descriptor {
    int number;
    ~Descriptor() {
        if (number >= 0) ::close(number);
    }
};

void write_all(int descriptor, const char* data, std::size_t size) {
    while (size > 0) {
        const ssize_t done = ::write(descriptor, data, size);
        if (done < 0 && errno == EINTR) continue;
        if (done < 0) throw errno;
        data += done, size -= static_cast<std::size_t>(done);
    }
}

std::string folder_of(const std::string& path) {
    const std::size_t slash = path.rfind('/');
    return slash == std::string::npos ? "." : path.substr(0, slash + 1);
}

// Make the rename itself survive a power cut; a folder that cannot be opened or flushed leaves the file whole all the
// same.
void flush_folder(const std::string& folder) {
    const Descriptor open{::open(folder.c_str(), O_RDONLY | O_DIRECTORY | O_CLOEXEC)};
    if (open.number >= 0) ::fsync(open.number);
}

void write_new(const std::string& temporary, const std::string& path, std::string_view data) {
    const Descriptor open{::open(temporary.c_str(), O_WRONLY | O_CREAT | O_EXCL | O_CLOEXEC, 0666)};
    if (open.number < 0) throw errno;
    try {
        write_all(open.number, data.data(), data.size());
        if (::fsync(open.number) != 0 || ::rename(temporary.c_str(), path.c_str()) != 0) throw errno;
    } catch (int) {
        ::unlink(temporary.c_str());
        throw;
    }
}

}  // namespace

InputFile::InputFile(const std::string& path) : path_(path) {
    // Opening a pipe would wait for ever without O_NONBLOCK, which means nothing to a regular file.
    descriptor_ = ::open(path.c_str(), O_RDONLY | O_NONBLOCK | O_CLOEXEC);
    if (descriptor_ < 0) fail(kind, "cannot read ", quote(path, 200), ": ", advice(errno));
    struct stat status;
    const int result = ::fstat(descriptor_, &status);
    if (result == 0 && S_ISREG(status.st_mode)) {
        size_ = static_cast<std::size_t>(status.st_size);
        return;
    }
    const std::string reason =
        result != 0 ? advice(errno) : concat("it is ", kind_of(status.st_mode), "; give the path of a file");
    ::close(descriptor_);
    fail(kind, "cannot read ", quote(path, 200), ": ", reason);
}

InputFile::~InputFile() { ::close(descriptor_); }

void InputFile::read(std::size_t offset, void* into, std::size_t count) const {
    char* next = static_cast<char*>(into);
    while (count > 0) {
        const ssize_t done = ::pread(descriptor_, next, count, static_cast<off_t>(offset));
        if (done < 0 && errno == EINTR) continue;
        if (done < 0) fail(kind, "cannot read ", quote(path_, 200), ": ", advice(errno));
        if (done == 0) fail(kind, "cannot read ", quote(path_, 200), ": it shrank while it was read; try again");
        next += done, offset += static_cast<std::size_t>(done), count -= static_cast<std::size_t>(done);
    }
}

void check_writable(const std::string& path) {
    const std::string folder = folder_of(path);
    struct stat status;
    if (path.empty() || ::stat(folder.c_str(), &status) != 0 || !S_ISDIR(status.st_mode))
        fail(kind, "cannot write to ", quote(path, 200), ": there is no folder ", quote(folder, 200),
             "; create it first");
    if (::lstat(path.c_str(), &status) == 0 && !S_ISREG(status.st_mode))
        fail(kind, "cannot write to ", quote(path, 200), ": it is ", kind_of(status.st_mode),
             "; give the path of a file, or of one to be created");
    if (::access(folder.c_str(), W_OK) != 0) fail(kind, "cannot write to ", quote(path, 200), ": ", advice(errno));
}

void write_atomically(const std::string& path, std::string_view data) {
    check_writable(path);
    std::random_device random;
    const std::string temporary =
        concat(folder_of(path) == "." ? "" : folder_of(path), ".", std::hex, random(), random(), ".tmp");
    try {
        write_new(temporary, path, data);
    } catch (int number) {
        fail(kind, "cannot write ", data.size(), " bytes to ", quote(path, 200), ": ", advice(number));
    }
    flush_folder(folder_of(path));
}

PrivateFolder::PrivateFolder() {
    const char* root = std::getenv("TMPDIR");
    path_ = concat(root && *root ? root : "/tmp", "/olss-XXXXXX");
    if (!::mkdtemp(path_.data()))  // which makes it with mode 0700
        fail(kind, "cannot make a temporary folder ", quote(path_, 200), ": ", advice(errno),
             "; TMPDIR chooses another place");
}

PrivateFolder::~PrivateFolder() {
    for (std::size_t begin = 0, end; (end = names_.find('/', begin)) != std::string::npos; begin = end + 1)
        ::unlink((path_ + "/" + names_.substr(begin, end - begin)).c_str());
    ::rmdir(path_.c_str());
}

std::string PrivateFolder::write(const std::string& name, const unsigned char* data, std::size_t size) {
    const std::string path = path_ + "/" + name;
    const Descriptor open{::open(path.c_str(), O_WRONLY | O_CREAT | O_EXCL | O_CLOEXEC, 0600)};
    try {
        if (open.number < 0) throw errno;
        names_ += name + "/";
        write_all(open.number, reinterpret_cast<const char*>(data), size);
    } catch (int number) {
        fail(kind, "cannot write ", size, " bytes to ", quote(path, 200), ": ", advice(number),
             "; TMPDIR chooses another place");
    }
    return path;
}

}  // namespace olss

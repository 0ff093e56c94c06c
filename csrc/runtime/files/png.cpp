#include "files/png.h"

#include <algorithm>
#include <array>
#include <cmath>

namespace olss {

namespace {

constexpr std::int64_t gap = 2;

char pixel(double value) {
    const double clamped = std::isnan(value) ? 0.0 : std::clamp(value, -1.0, 1.0);
    return static_cast<char>(static_cast<unsigned char>(std::nearbyint(clamped * 127.5 + 127.5)));
}

std::string big_endian(std::uint32_t number) {
    return {static_cast<char>(number >> 24), static_cast<char>(number >> 16), static_cast<char>(number >> 8),
            static_cast<char>(number)};
}

// CRC-32 of ISO 3309, which ends every chunk.
std::uint32_t crc(const std::string& data) {
    static const std::array<std::uint32_t, 256> table = [] {
        std::array<std::uint32_t, 256> made;
        for (std::uint32_t i = 0; i < 256; ++i) {
            made[i] = i;
            for (int bit = 0; bit < 8; ++bit) made[i] = made[i] & 1 ? 0xedb88320u ^ made[i] >> 1 : made[i] >> 1;
        }
        return made;
    }();
    std::uint32_t value = 0xffffffffu;
    for (unsigned char byte : data) value = table[(value ^ byte) & 0xff] ^ value >> 8;
    return ~value;
}

std::uint32_t adler(const std::string& data) {
    std::uint32_t low = 1, high = 0;
    for (unsigned char byte : data) low = (low + byte) % 65521, high = (high + low) % 65521;
    return high << 16 | low;
}

std::string chunk(const std::string& type, const std::string& data) {
    return big_endian(static_cast<std::uint32_t>(data.size())) + type + data + big_endian(crc(type + data));
}

// A zlib stream (RFC 1950) of stored blocks (RFC 1951, 3.2.4).
std::string stored(const std::string& data) {
    constexpr std::size_t most = 65535;
    std::string stream = "\x78\x01";
    for (std::size_t begin = 0; begin < data.size(); begin += most) {
        const std::size_t size = std::min(most, data.size() - begin);
        stream += begin + size == data.size() ? '\1' : '\0';
        for (const std::size_t length : {size, ~size})
            (stream += static_cast<char>(length)) += static_cast<char>(length >> 8);
        stream.append(data, begin, size);
    }
    return stream + big_endian(adler(data));
}

}  // namespace

Image grid_of(const double* images, std::int64_t count, std::int64_t channels, std::int64_t height,
              std::int64_t width) {
    const auto columns = static_cast<std::int64_t>(std::ceil(std::sqrt(static_cast<double>(count))));
    const std::int64_t lines = (count + columns - 1) / columns;
    Image sheet{lines * (height + gap) - gap, columns * (width + gap) - gap, channels, {}};
    sheet.pixels.assign(static_cast<std::size_t>(sheet.height * sheet.width * channels), '\xff');
    for (std::int64_t i = 0; i < count; ++i) {
        const std::int64_t top = i / columns * (height + gap), left = i % columns * (width + gap);
        for (std::int64_t c = 0; c < channels; ++c)
            for (std::int64_t y = 0; y < height; ++y)
                for (std::int64_t x = 0; x < width; ++x)
                    sheet.pixels[static_cast<std::size_t>(((top + y) * sheet.width + left + x) * channels + c)] =
                        pixel(*images++);
    }
    return sheet;
}

std::string png_file(const Image& image) {
    const std::string head = big_endian(static_cast<std::uint32_t>(image.width)) +
                             big_endian(static_cast<std::uint32_t>(image.height)) + '\x08' +
                             (image.channels == 3 ? '\x02' : '\0') + std::string(3, '\0');
    const auto line = static_cast<std::size_t>(image.width * image.channels);
    std::string lines;  // each after a byte that says: not filtered
    for (std::size_t begin = 0; begin < image.pixels.size(); begin += line)
        (lines += '\0').append(image.pixels, begin, line);
    return "\x89PNG\r\n\x1a\n" + chunk("IHDR", head) + chunk("IDAT", stored(lines)) + chunk("IEND", "");
}

}  // namespace olss

#include "run/values.h"

#include <cstring>

#include <ATen/ops/empty.h>
#include <ATen/ops/eq.h>
#include <ATen/ops/isfinite.h>

#include "run/arguments.h"
#include "files/files.h"
#include "files/npy.h"
#include "files/png.h"
#include "run/request.h"
#include "run/tensors.h"
#include "files/text.h"

namespace olss {

namespace {

constexpr auto kind = Error::Kind::input;

bool ends_with(const std::string& text, const std::string& end) {
    return text.size() >= end.size() && text.compare(text.size() - end.size(), end.size(), end) == 0;
}

at::Tensor tensor_of(const Npy& array) {
    const at::Tensor tensor = at::empty(array.shape, dtype_named(array.dtype));
    if (!array.data.empty()) std::memcpy(tensor.mutable_data_ptr(), array.data.data(), array.data.size());
    return tensor;
}

template <typename Number>
at::Tensor tensor_of(const std::vector<Number>& numbers, at::ScalarType dtype) {
    const at::Tensor tensor = at::empty({static_cast<std::int64_t>(numbers.size())}, dtype);
    std::memcpy(tensor.mutable_data_ptr(), numbers.data(), numbers.size() * sizeof(Number));
    return tensor;
}

// Throws unless `dtype` can represent every value.
at::Tensor cast(const at::Tensor& values, at::ScalarType dtype, const std::string& what) {
    const at::Tensor result = values.to(dtype);
    const bool same = at::isFloatingType(dtype) ? at::isfinite(result).all().item<bool>()
                                                : at::eq(result.to(values.scalar_type()), values).all().item<bool>();
    // A floating-point value beyond an integer type is undefined there, and might come back as itself.
    const bool small =
        !values.is_floating_point() || at::isFloatingType(dtype) || values.abs().lt(9e18).all().item<bool>();
    if (!same || !small)
        fail(kind, what, " holds values that do not fit ", name_of(dtype),
             ": written with a fraction, too large, or not finite");
    return result;
}

bool fills(const at::Tensor& values, at::IntArrayRef shape, bool any_shape) {
    return any_shape ? values.numel() == c10::multiply_integers(shape) : values.sizes() == shape;
}

}  // namespace

at::Tensor parse_value(const Input& input, const std::string& text, std::int64_t samples, const std::string& option) {
    const std::string what = concat(option, " ", input.name, "=", text.substr(0, 60));
    const at::ScalarType dtype = dtype_named(input.dtype);
    const bool file = text.front() == '@', whole = !at::isFloatingType(dtype);
    const at::Tensor raw = file    ? tensor_of(read_npy(text.substr(1)))
                           : whole ? tensor_of(parse_numbers<std::int64_t>(text, what), at::kLong)
                                   : tensor_of(parse_numbers<double>(text, what), at::kDouble);
    const at::Tensor values = cast(raw, dtype, what);
    const Shape all = shape_of(input, samples), row = shape_of(input, 1);
    // Numbers of the command line have no shape: their count decides.
    if (values.numel() == 1) return values.reshape({}).expand(all).contiguous();
    if (fills(values, all, !file)) return values.reshape(all);
    if (input.per_sample && (fills(values, row, !file) || fills(values, input.shape, !file)))
        return values.reshape(row).expand(all).contiguous();
    fail(kind, what, " has ", file ? "the shape " + shown(values.sizes()) : concat(values.numel(), " numbers"),
         "; expected one number, or ", shown(all), input.per_sample ? ", or " + shown(row) + " for every sample" : "");
}

void check_out(const std::string& path, const Profile& profile) {
    const bool picture = ends_with(path, ".png");
    if (!picture && !ends_with(path, ".npy"))
        fail(kind, "--out is ", quote(path, 200), "; expected a name that ends in .npy or .png");
    const std::size_t axes = profile.min.size();
    const auto fits = [&](std::int64_t channels) { return profile.min[1] <= channels && channels <= profile.max[1]; };
    if (picture && (axes != 4 || !(fits(1) || fits(3))))
        fail(kind, "a .png holds grey or RGB pictures, and this engine's samples are ", text_of(profile),
             "; write .npy");
    check_writable(path);
}

void write_samples(const at::Tensor& samples, const std::string& path) {
    if (ends_with(path, ".png")) {
        if (samples.dim() != 4 || (samples.size(1) != 1 && samples.size(1) != 3))
            fail(kind, "a .png holds grey or RGB pictures, and the samples have shape ", shown(samples.sizes()),
                 "; write .npy");
        const at::Tensor values = samples.to(at::kDouble).contiguous();
        write_atomically(path, png_file(grid_of(values.const_data_ptr<double>(), values.size(0), values.size(1),
                                                values.size(2), values.size(3))));
        return;
    }
    // NumPy has no bfloat16; float32 holds each of its values.
    const at::Tensor values = (samples.scalar_type() == at::kBFloat16 ? samples.to(at::kFloat) : samples).contiguous();
    Npy array{name_of(values.scalar_type()), values.sizes().vec(), {}};
    array.data.assign(static_cast<const char*>(values.const_data_ptr()), values.nbytes());
    write_atomically(path, npy_file(array));
}

}  // namespace olss

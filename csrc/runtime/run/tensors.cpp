#include "run/tensors.h"

#include <cstring>

#include <ATen/ops/empty.h>
#include <ATen/ops/empty_strided.h>
#include <c10/core/ScalarType.h>

#include "files/text.h"

namespace olss {

namespace {

struct Name {
    const char *torch, *file;  // in torch and in a safetensors file
    at::ScalarType dtype;
};
constexpr Name names[] = {{"float64", "F64", at::kDouble}, {"float32", "F32", at::kFloat},
                          {"float16", "F16", at::kHalf},   {"bfloat16", "BF16", at::kBFloat16},
                          {"int64", "I64", at::kLong},     {"int32", "I32", at::kInt},
                          {"int16", "I16", at::kShort},    {"int8", "I8", at::kChar},
                          {"uint8", "U8", at::kByte},      {"bool", "BOOL", at::kBool}};

}  // namespace

at::ScalarType dtype_named(const std::string& name) {
    for (const Name& each : names)
        if (name == each.torch || name == each.file) return each.dtype;
    fail(Error::Kind::internal, "there is no dtype ", quote(name));
}

std::string name_of(at::ScalarType dtype) {
    for (const Name& each : names)
        if (dtype == each.dtype) return each.torch;
    return c10::toString(dtype);
}

at::Tensor copied(const TensorView& view, const Shape* strides) {
    const at::Tensor plain = at::empty(view.shape, dtype_named(view.dtype));
    if (view.size > 0) std::memcpy(plain.mutable_data_ptr(), view.data, view.size);
    if (!strides) return plain;
    return at::empty_strided(view.shape, *strides, plain.options()).copy_(plain);
}

}  // namespace olss

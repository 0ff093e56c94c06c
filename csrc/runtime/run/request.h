// Checks of a run's inputs against those an engine was built for. Compiled code checks nothing itself.
#pragma once

#include <vector>

#include "olss.h"

namespace olss {

// Everything here throws Error(input).

// Rank, sizes, dtype, device, memory order and values of the noise.
void check_noise(const Description& engine, const at::Tensor& noise);

// "1…16 × 1 × 32 × 32": the shapes of noise that fit.
std::string text_of(const Profile& profile);
void check_shape(const Profile& profile, at::IntArrayRef shape);

// The index of the requested plan.
std::size_t chosen_plan(const Description& engine, const std::optional<std::int64_t>& steps,
                        const std::optional<std::string>& plan);

// The guidance scale; only 1 for an engine without guidance.
double chosen_guidance(const Description& engine, const std::optional<double>& guidance_scale);

// The names are those of the engine's inputs: none is missing, none unknown. `what` names the map.
template <typename Values>
void check_names(const Description& engine, const std::map<std::string, Values>& given, const char* what);

// The tensors after x and time, in the code's order: of both halves, unconditional first, where the engine is doubled.
// `defaults` are the engine's own unconditional arguments.
std::vector<at::Tensor> network_inputs(const Description& engine, const Request& request,
                                       const std::map<std::string, at::Tensor>& defaults);

// The shape of an input for that many samples.
Shape shape_of(const Input& input, std::int64_t samples);

}  // namespace olss

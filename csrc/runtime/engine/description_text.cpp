#include "engine/description_text.h"

#include "files/text.h"

namespace olss {

namespace {

std::string line(const std::string& name, const std::string& value) {
    return name + std::string(name.size() < 16 ? 16 - name.size() : 1, ' ') + value + "\n";
}

std::string line_of(const Input& input) {
    std::vector<std::string> axes;
    if (input.per_sample) axes.push_back("batch");
    for (std::int64_t size : input.shape) axes.push_back(concat(size));
    return line("input", concat(quote(input.name), " ", input.dtype, " ", shown(axes)));
}

std::string line_of(const PlanEntry& plan) {
    return line("plan", concat(quote(plan.name), ": ", plan.nfe, " network evaluations",
                               plan.branches == 2 ? ", two branches" : "",
                               plan.noises ? concat(", ", plan.noises, " fresh noises") : ""));
}

}  // namespace

std::string text_of(const Description& engine, const std::vector<std::string>& reasons) {
    std::string text = engine.notice + "\n\n";
    text += line("network", concat(quote(engine.network), ", ", engine.dtype));
    text += line("noise", concat("min ", shown(engine.profile.min), ", opt ", shown(engine.profile.opt), ", max ",
                                 shown(engine.profile.max), ", multiples of ", shown(engine.profile.multiple)));
    text += line("guidance", engine.doubled ? concat("scale ", engine.guidance_scale, " unless told") : "none");
    for (const Input& each : engine.inputs) text += line_of(each);
    for (const PlanEntry& each : engine.plans) text += line_of(each);
    for (const auto& [name, value] : engine.fixed) text += line("fixed", concat(quote(name), " = ", quote(value)));
    text += line("machine", concat(engine.machine.device, ", ", quote(engine.machine.name), ", ", engine.machine.system,
                                   " ", engine.machine.architecture));
    for (const auto& [name, value] : engine.built_with)
        if (!value.empty()) text += line("built with", concat(name, " ", quote(value)));
    for (const auto& [name, value] : engine.measured) text += line("measured", concat(name, " ", value));
    for (const auto& [name, value] : engine.hashes) text += line("sha256", concat(name, " ", quote(value)));
    text += line("fits here", reasons.empty() ? "yes" : "no");
    for (const std::string& reason : reasons) text += line("", reason);
    return text;
}

}  // namespace olss

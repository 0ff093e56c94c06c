// An engine file, verified and parsed without torch. None of its code has been loaded.
#pragma once

#include <memory>
#include <optional>
#include <string>
#include <vector>

#include "files/container.h"
#include "engine/plan.h"

namespace olss {

struct EngineFile {
    // sha256: the expected one, as sha256sum prints it. Throws Error: file, version, input.
    explicit EngineFile(const std::string& path, const std::optional<std::string>& sha256 = std::nullopt);

    Description description;
    std::vector<Plan> plans;                               // as in description.plans
    std::vector<TensorView> weights, code, unconditional;  // names without the folder

  private:
    std::shared_ptr<const Container> container_;  // which owns the views' memory
};

}  // namespace olss

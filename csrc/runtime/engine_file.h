// An engine file, verified and understood as far as that goes without torch. None of its code has been loaded.
#pragma once

#include <memory>
#include <string>
#include <vector>

#include "container.h"
#include "plan.h"

namespace olss {

struct EngineFile {
    explicit EngineFile(const std::string& path);  // throws Error: file, version

    Description description;
    std::vector<Plan> plans;                               // as in description.plans
    std::vector<TensorView> weights, code, unconditional;  // names without the folder

  private:
    std::shared_ptr<const Container> container_;  // which owns what the views show
};

}  // namespace olss

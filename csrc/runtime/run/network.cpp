#include "run/network.h"

#include <algorithm>
#include <thread>
#include <unordered_map>

#include "run/tensors.h"
#include "files/text.h"
#include "translate.h"

namespace olss {

namespace {

constexpr auto kind = Error::Kind::file;

std::unique_ptr<torch::inductor::AOTIModelContainerRunnerCpu> mapped(const EngineFile& file, std::size_t runs_at_once) {
    PrivateFolder folder;
    std::string library;
    for (const TensorView& each : file.code) {
        if (each.name == "weights.json") continue;
        const std::string path = folder.write(each.name, each.data, each.size);
        if (each.name == "network.so") library = path;
    }
    const std::size_t runs = runs_at_once ? runs_at_once : std::max(1u, std::thread::hardware_concurrency());
    return guarded(kind,
                   "the engine's code cannot be loaded (if programs may not run in the folder for temporary files, "
                   "name another with TMPDIR)",
                   [&] { return std::make_unique<torch::inductor::AOTIModelContainerRunnerCpu>(library, runs); });
}

// A weight's name in the file and in the network's state_dict, from its name in the code.
std::string weight_name(const std::string& fqn) { return fqn.rfind("network.", 0) == 0 ? fqn.substr(8) : fqn; }

}  // namespace

CompiledNetwork::CompiledNetwork(const EngineFile& file, std::size_t runs_at_once)
    : runner_(mapped(file, runs_at_once)) {
    std::map<std::string, const TensorView*> views;
    for (const TensorView& each : file.weights) views[each.name] = &each;
    const std::unordered_map<std::string, std::string> names = runner_->getConstantNamesToOriginalFQNs();
    const std::unordered_map<std::string, std::int32_t> dtypes = runner_->getConstantNamesToDtypes();
    std::unordered_map<std::string, at::Tensor> constants;
    for (const auto& [inner, fqn] : names) {
        const std::string name = weight_name(fqn);
        const auto view = views.find(name);
        if (view == views.end())
            fail(kind, "the engine's code reads a weight ", quote(name),
                 " that is not in the file; build the engine again");
        const auto strides = file.description.strides.find(name);
        at::Tensor& weight = weights_[name];
        if (!weight.defined())
            weight = copied(*view->second, strides == file.description.strides.end() ? nullptr : &strides->second);
        if (const auto dtype = dtypes.find(inner);
            dtype != dtypes.end() && dtype->second != static_cast<std::int32_t>(weight.scalar_type()))
            fail(kind, "weight ", quote(name), " is ", name_of(weight.scalar_type()),
                 ", and the engine's code expects another dtype; build the engine again");
        constants[inner] = weight;
    }
    guarded(kind, "the engine's weights do not fit its code", [&] {
        runner_->update_constant_buffer(constants, /*use_inactive=*/false, /*validate_full_updates=*/true,
                                        /*user_managed=*/true);
    });
}

at::Tensor CompiledNetwork::operator()(std::vector<at::Tensor> inputs) const {
    const std::vector<at::Tensor> outputs =
        guarded(Error::Kind::network, "the network failed (is an index, such as a class, beyond its table?)",
                [&] { return runner_->boxed_run(std::move(inputs)); });
    if (outputs.size() != 1)
        fail(Error::Kind::network, "the network returned ", outputs.size(), " tensors; expected one");
    return outputs.front();
}

}  // namespace olss

#include "engine_file.h"

#include <algorithm>
#include <cctype>

#include "manifest.h"
#include "sha256.h"
#include "text.h"

namespace olss {

namespace {

constexpr auto kind = Error::Kind::file;

const TensorView* named(const std::vector<TensorView>& views, const std::string& name) {
    const auto found =
        std::find_if(views.begin(), views.end(), [&](const TensorView& each) { return each.name == name; });
    return found == views.end() ? nullptr : &*found;
}

// A plain file name: no folder, no hidden file.
bool is_plain(const std::string& name) {
    const auto allowed = [](unsigned char letter) { return letter < 0x80 && (std::isalnum(letter) || letter == '_'); };
    const auto inside = [&](unsigned char letter) { return allowed(letter) || letter == '.' || letter == '-'; };
    return !name.empty() && name.size() <= 201 && allowed(name.front()) &&
           std::all_of(name.begin(), name.end(), inside);
}

bool is_bytes(const TensorView& view) { return view.dtype == "U8" && view.shape.size() == 1; }

void check_code(const std::vector<TensorView>& code) {
    for (const TensorView& each : code)
        if (!is_plain(each.name) || !is_bytes(each))
            fail(kind, "its code holds ", quote(each.name), " of ", each.dtype, " ", shown(each.shape),
                 "; expected bytes under a plain file name");
    if (!named(code, "network.so")) fail(kind, "it holds no code/network.so");
}

Plan plan_of(const PlanEntry& entry, const std::vector<TensorView>& files, bool doubled) {
    const TensorView* file = named(files, entry.name);
    if (!file || !is_bytes(*file)) fail(kind, "it names a plan ", quote(entry.name), " and holds no such bytes");
    if (hexadecimal(sha256(file->data, file->size)) != entry.sha256)
        fail(kind, "the plan ", quote(entry.name),
             " is not the one that the manifest names: its SHA-256 is another; build the engine again");
    const Plan plan = parse_plan(*file);
    if (plan.nfe != entry.nfe || plan.branches != entry.branches || plan.noises() != entry.noises)
        fail(kind, "the plan ", quote(entry.name), " has ", plan.nfe, " evaluations, ", plan.branches, " branches and ",
             plan.noises(), " noises; the manifest says ", entry.nfe, ", ", entry.branches, " and ", entry.noises);
    if (plan.branches == 2 && !doubled)
        fail(kind, "the plan ", quote(entry.name),
             " keeps both halves of a guided pair apart, and the engine has no such pair");
    return plan;
}

}  // namespace

EngineFile::EngineFile(const std::string& path) {
    try {
        container_ = std::make_shared<const Container>(path);
        description = description_of(container_->manifest());
        std::vector<TensorView> plan_files;
        const std::vector<std::pair<std::string, std::vector<TensorView>*>> folders = {
            {"weights/", &weights}, {"code/", &code}, {"unconditional/", &unconditional}, {"plans/", &plan_files}};
        for (TensorView view : container_->tensors()) {
            const auto folder = std::find_if(folders.begin(), folders.end(), [&](const auto& each) {
                return view.name.size() > each.first.size() && view.name.rfind(each.first, 0) == 0;
            });
            if (folder == folders.end())
                fail(kind, "it holds the tensor ", quote(view.name),
                     "; expected weights/…, code/…, plans/… and unconditional/… alone");
            view.name.erase(0, folder->first.size());
            folder->second->push_back(std::move(view));
        }
        check_code(code);
        if (plan_files.size() != description.plans.size())
            fail(kind, "it holds ", plan_files.size(), " plans and names ", description.plans.size());
        for (const PlanEntry& entry : description.plans)
            plans.push_back(plan_of(entry, plan_files, description.doubled));
        if (!description.doubled && !unconditional.empty())
            fail(kind, "it holds unconditional arguments, and has no guidance");
    } catch (const Error& error) {
        fail(error.kind(), quote(path, 200), " is no usable engine file: ", error.what());
    }
}

}  // namespace olss

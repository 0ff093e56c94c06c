#include "engine/engine_file.h"

#include <algorithm>
#include <cctype>

#include "engine/layout.h"
#include "engine/manifest.h"
#include "files/parallel.h"
#include "files/sha256.h"
#include "files/text.h"

namespace olss {

namespace {

constexpr auto kind = Error::Kind::file;
constexpr Format format{"olss_fast.engine", 2, std::size_t{16} << 20, std::size_t{1} << 40};

std::string lower(std::string digits) {
    if (digits.size() != 64 || digits.find_first_not_of("0123456789abcdefABCDEF") != std::string::npos)
        fail(Error::Kind::input, "sha256 is ", quote(digits), "; expected 64 hexadecimal digits, as sha256sum prints them");
    for (char& digit : digits) digit = static_cast<char>(std::tolower(static_cast<unsigned char>(digit)));
    return digits;
}

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
    for (const char* needed : {"network.so", "weights.json"})
        if (!named(code, needed)) fail(kind, "it holds no code/", needed, "; build it again");
}

// SHA-256 over names, dtypes, shapes and the SHA-256 of the values (olss_fast.engine.weights.hash_weights).
std::string hash_of_weights(std::vector<TensorView> weights) {
    const auto by_name = [](const TensorView& a, const TensorView& b) { return a.name < b.name; };
    std::sort(weights.begin(), weights.end(), by_name);
    std::vector<std::string> values(weights.size());
    in_parallel(weights.size(), [&](std::size_t i) { values[i] = hexadecimal(sha256(weights[i].data, weights[i].size)); });
    Sha256 total;
    for (std::size_t i = 0; i < weights.size(); ++i)
        total.add(concat(weights[i].name, " ", weights[i].dtype, " [", listed(weights[i].shape), "] ", values[i], "\n"));
    return hexadecimal(total.finish());
}

// SHA-256 over names and content (olss_fast.engine.compiled.hash_code).
std::string hash_of_code(std::vector<TensorView> code) {
    std::sort(code.begin(), code.end(), [](const TensorView& a, const TensorView& b) { return a.name < b.name; });
    Sha256 total;
    for (const TensorView& each : code) {
        total.add(concat(each.name, " ", each.size, "\n"));
        total.add(each.data, each.size);
    }
    return hexadecimal(total.finish());
}

void check_hash(const std::string& what, const std::string& found, const Description& description) {
    const std::string& claimed = description.hashes.at(what);
    if (found != claimed)
        fail(kind, "the hash of its ", what, " is ", found.substr(0, 12), "… and it says ", quote(claimed, 16),
             ": altered; build it again");
}

void check_truths(const std::vector<TensorView>& views) {
    for (const TensorView& each : views)
        if (each.dtype == "BOOL" && std::any_of(each.data, each.data + each.size, [](unsigned char b) { return b > 1; }))
            fail(kind, "tensor ", quote(each.name), " of dtype BOOL holds another byte than 0 and 1");
}

// The default arguments of the unconditional half are inputs, of one row where they belong to the samples.
void check_unconditional(const Description& engine, const std::vector<TensorView>& views) {
    if (!engine.doubled && !views.empty()) fail(kind, "it holds unconditional arguments, and has no guidance");
    for (const TensorView& view : views) {
        const auto input = std::find_if(engine.inputs.begin(), engine.inputs.end(),
                                        [&](const Input& each) { return each.name == view.name; });
        Shape shape = input == engine.inputs.end() ? Shape{} : input->shape;
        if (input != engine.inputs.end() && input->per_sample) shape.insert(shape.begin(), 1);
        if (input == engine.inputs.end() || view.dtype != dtype_in_files(input->dtype) || view.shape != shape)
            fail(kind, "the unconditional argument ", quote(view.name), " of ", view.dtype, " ", shown(view.shape),
                 " is none of the engine's inputs, or of another dtype or shape; build the engine again");
    }
}

Plan plan_of(const PlanEntry& entry, const std::vector<TensorView>& files, bool doubled) {
    const TensorView* file = named(files, entry.name);
    if (!file || !is_bytes(*file)) fail(kind, "it names a plan ", quote(entry.name), " but holds no bytes under that name");
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

EngineFile::EngineFile(const std::string& path, const std::optional<std::string>& sha256) {
    try {
        const std::string expected = sha256 ? lower(*sha256) : "";
        const InputFile file(path);
        container_ = std::make_shared<const Container>(source_of(file), format, expected);
        description = description_of(container_->entry());
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
        check_hash("weights", hash_of_weights(weights), description);
        check_hash("code", hash_of_code(code), description);
        check_code(code);
        check_compiled_for(*named(code, "weights.json"), container_->entry(), weights, description.strides);
        check_truths(weights), check_truths(unconditional);
        if (plan_files.size() != description.plans.size())
            fail(kind, "it holds ", plan_files.size(), " plans and names ", description.plans.size());
        for (const PlanEntry& entry : description.plans)
            plans.push_back(plan_of(entry, plan_files, description.doubled));
        check_unconditional(description, unconditional);
    } catch (const Error& error) {
        if (error.kind() == Error::Kind::input) throw;
        fail(error.kind(), quote(path, 200), " is no usable engine file: ", error.what());
    }
}

}  // namespace olss

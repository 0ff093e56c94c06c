// A program against the C++ runtime's headers, for tests/engine/test_runtime.py.
//
//   use-runtime weights ENGINE OUT   samples before and after update_weights, and while it happens, as OUT/*.npy
//   use-runtime misuse ENGINE        each bad request of the "guided" engine: name, kind of the error, message
//   use-runtime picture IN.npy OUT   samples as a file
#include <cstring>
#include <functional>
#include <iostream>
#include <limits>
#include <thread>

#include <ATen/ops/empty.h>
#include <ATen/ops/full.h>
#include <ATen/ops/ones.h>
#include <ATen/ops/randn.h>
#include <ATen/ops/zeros.h>

#include "files/npy.h"
#include "olss.h"
#include "run/values.h"

namespace {

at::Tensor from_npy(const std::string& path) {
    const olss::Npy array = olss::read_npy(path);
    const at::Tensor tensor = at::empty(array.shape, array.dtype == "float64" ? at::kDouble : at::kFloat);
    std::memcpy(tensor.mutable_data_ptr(), array.data.data(), array.data.size());
    return tensor;
}

olss::Request guided_request() {
    olss::Request request;
    request.noise = at::randn({2, 2, 12, 8}, olss::seeded(1));
    request.conditioning["labels"] = at::full({2}, 1, at::kLong);
    return request;
}

void weights(const std::string& path, const std::string& out) {
    olss::Engine engine = olss::Engine::load(path, {/*runs_at_once=*/2});
    const olss::Request request = guided_request();
    olss::write_samples(engine.run(request), out + "/before.npy");
    std::vector<std::thread> threads;  // which may see the old weights or the new ones, and nothing between
    std::vector<at::Tensor> during(4);
    for (at::Tensor& each : during) threads.emplace_back([&] { each = engine.run(request); });
    engine.update_weights({{"last.weight", at::full({2, 4, 3, 3}, 0.25)},
                           {"last.bias", at::full({2}, 0.5, at::kDouble)},
                           {"idle.bias", at::ones({2})}});
    for (std::thread& thread : threads) thread.join();
    for (std::size_t i = 0; i < during.size(); ++i)
        olss::write_samples(during[i], out + "/during" + std::to_string(i) + ".npy");
    olss::write_samples(engine.run(request), out + "/after.npy");
    for (const auto& [name, value] :
         std::map<std::string, at::Tensor>{{"nothing", at::ones({2})},
                                           {"last.bias", at::ones({3})},
                                           {"last.weight", at::ones({2, 4, 3, 3}, at::kLong)},
                                           {"into.bias", {}}}) {
        try {
            engine.update_weights({{"time.bias", at::zeros({4})}, {name, value}});
        } catch (const olss::Error& error) {
            std::cout << static_cast<int>(error.kind()) << " " << error.what() << "\n";
        }
    }
    olss::write_samples(engine.run(request), out + "/refused.npy");
}

void misuse(const std::string& path) {
    const olss::Engine engine = olss::Engine::load(path, {});
    const std::map<std::string, std::function<void(olss::Request&)>> faults = {
        {"no noise", [](olss::Request& r) { r.noise = at::Tensor(); }},
        {"rank", [](olss::Request& r) { r.noise = r.noise[0]; }},
        {"batch", [](olss::Request& r) { r.noise = at::randn({5, 2, 12, 8}); }},
        {"empty batch", [](olss::Request& r) { r.noise = at::randn({0, 2, 12, 8}); }},
        {"multiple", [](olss::Request& r) { r.noise = at::randn({2, 2, 12, 10}); }},
        {"dtype", [](olss::Request& r) { r.noise = r.noise.to(at::kDouble); }},
        {"strides", [](olss::Request& r) { r.noise = at::randn({2, 2, 8, 12}).transpose(2, 3); }},
        {"NaN", [](olss::Request& r) { r.noise[1][0][0][0] = std::numeric_limits<double>::quiet_NaN(); }},
        {"missing", [](olss::Request& r) { r.conditioning.clear(); }},
        {"unknown", [](olss::Request& r) { r.conditioning["more"] = at::ones({2}); }},
        {"labels dtype", [](olss::Request& r) { r.conditioning["labels"] = at::ones({2}, at::kInt); }},
        {"labels shape", [](olss::Request& r) { r.conditioning["labels"] = at::ones({1}, at::kLong); }},
        {"labels range", [](olss::Request& r) { r.conditioning["labels"] = at::full({2}, 77, at::kLong); }},
        {"labels undefined", [](olss::Request& r) { r.conditioning["labels"] = at::Tensor(); }},
        {"unconditional unknown", [](olss::Request& r) { r.unconditional["more"] = at::ones({2}); }},
        {"unconditional shape", [](olss::Request& r) { r.unconditional["labels"] = at::ones({3}, at::kLong); }},
        {"steps", [](olss::Request& r) { r.steps = 99; }},
        {"plan", [](olss::Request& r) { r.plan = "none"; }},
        {"both", [](olss::Request& r) { r.plan = "two", r.steps = 2; }},
        {"guidance", [](olss::Request& r) { r.guidance_scale = std::numeric_limits<double>::infinity(); }},
        {"overflow", [](olss::Request& r) { r.guidance_scale = 1e38; }},
    };
    for (const auto& [name, spoil] : faults) {
        olss::Request request = guided_request();
        spoil(request);
        try {
            engine.run(request);
            std::cout << name << "|ran|\n";
        } catch (const olss::Error& error) {
            std::cout << name << "|" << static_cast<int>(error.kind()) << "|" << error.what() << "\n";
        }
    }
}

}  // namespace

int main(int count, char** words) {
    const std::string what = count > 2 ? words[1] : "";
    if (what == "weights") weights(words[2], words[3]);
    else if (what == "misuse") misuse(words[2]);
    else if (what == "picture") olss::write_samples(from_npy(words[2]), words[3]);
    else return 1;
}

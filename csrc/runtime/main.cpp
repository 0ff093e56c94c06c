// olss-run: samples with an engine file. See `usage` in arguments.cpp.
#include <chrono>
#include <cstdio>
#include <cstdlib>
#include <exception>
#include <iostream>
#include <thread>

#include <ATen/Parallel.h>
#include <ATen/ops/equal.h>
#include <ATen/ops/randn.h>

#include "run/arguments.h"
#include "engine/description_text.h"
#include "engine/engine_file.h"
#include "olss.h"
#include "run/request.h"
#include "run/tensors.h"
#include "files/text.h"
#include "translate.h"
#include "run/values.h"

namespace {

using namespace olss;
using Clock = std::chrono::steady_clock;

double seconds_since(Clock::time_point begin) { return std::chrono::duration<double>(Clock::now() - begin).count(); }

// The shape of the noise: as given, else the only one in the engine's profile.
Shape noise_shape(const Profile& profile, const Arguments& arguments) {
    Shape shape{arguments.count};
    if (arguments.shape) shape.insert(shape.end(), arguments.shape->begin(), arguments.shape->end());
    for (std::size_t i = 1; !arguments.shape && i < profile.min.size(); ++i) {
        if (profile.min[i] != profile.max[i])
            fail(Error::Kind::input, "this engine takes noise of ", text_of(profile),
                 "; choose with --shape, as in --shape ",
                 listed(Shape(profile.opt.begin() + 1, profile.opt.end()), ","));
        shape.push_back(profile.min[i]);
    }
    check_shape(profile, shape);
    return shape;
}

std::map<std::string, at::Tensor> tensors_of(const Description& engine,
                                             const std::map<std::string, std::string>& values, std::int64_t samples,
                                             const std::string& option) {
    std::map<std::string, at::Tensor> result;
    for (const Input& each : engine.inputs)
        if (const auto value = values.find(each.name); value != values.end())
            result[each.name] = parse_value(each, value->second, samples, option);
    return result;
}

// Checks everything about a request before any code of the engine is loaded.
Request request_of(const Description& engine, const Arguments& arguments) {
    Request request;
    const Shape shape = noise_shape(engine.profile, arguments);
    check_out(arguments.out, engine.profile);
    check_names(engine, arguments.set, "--set");
    std::map<std::string, std::string> without =
        arguments.set;  // whose names are known; the engine has a value for others
    for (const auto& [name, value] : arguments.unconditional) without[name] = value;
    check_names(engine, without, "--unconditional");
    if (!engine.doubled && !arguments.unconditional.empty())
        fail(Error::Kind::input, "--unconditional was given, but this engine is built without guidance");
    request.steps = arguments.steps, request.plan = arguments.plan, request.guidance_scale = arguments.guidance_scale;
    chosen_plan(engine, request.steps, request.plan), chosen_guidance(engine, request.guidance_scale);
    request.conditioning = tensors_of(engine, arguments.set, arguments.count, "--set");
    request.unconditional = tensors_of(engine, arguments.unconditional, arguments.count, "--unconditional");
    request.generator = seeded(static_cast<std::uint64_t>(arguments.seed));
    request.noise = at::randn(shape, request.generator, at::kFloat).to(dtype_named(engine.dtype));
    return request;
}

// One run with a copy of the request's generator.
at::Tensor run(const Engine& engine, Request request) {
    request.generator = request.generator.clone();
    return engine.run(request);
}

// Runs `repeat` times in each of `at_once` threads; every result must have the bits of the first.
at::Tensor run_often(const Engine& engine, const Request& request, const Arguments& arguments) {
    const at::Tensor first = run(engine, request);
    std::vector<std::string> faults(static_cast<std::size_t>(arguments.at_once));
    const auto work = [&, threads_of_one = at::get_num_threads()](std::string& fault) {
        try {
            at::set_num_threads(threads_of_one);  // a thread-local setting, which may change rounding
            for (std::int64_t i = 0; i < arguments.repeat; ++i)
                if (!at::equal(run(engine, request), first))
                    fail(Error::Kind::internal, "two runs of the same request differ");
        } catch (const std::exception& error) {
            fault = error.what();
        }
    };
    const auto begin = Clock::now();
    std::vector<std::thread> threads;
    for (std::string& fault : faults) threads.emplace_back(work, std::ref(fault));
    for (std::thread& thread : threads) thread.join();
    for (const std::string& fault : faults)
        if (!fault.empty()) throw Error(Error::Kind::internal, fault);
    const double seconds = seconds_since(begin), runs = static_cast<double>(arguments.repeat * arguments.at_once);
    std::printf("%.0f runs, %.2f ms a run, %.1f samples a second, all of the same bits\n", runs, seconds * 1e3 / runs,
                runs * static_cast<double>(arguments.count) / seconds);
    return first;
}

void run_program(const Arguments& arguments) {
    if (arguments.engine.empty()) fail(Error::Kind::input, "no engine was given; see olss-run --help");
    if (!arguments.describe && arguments.out.empty())
        fail(Error::Kind::input, "--out is missing: where should the samples go? See olss-run --help");
    const auto begin = Clock::now();
    EngineFile file(arguments.engine, arguments.sha256);
    if (arguments.describe) {
        std::fputs(text_of(file.description, mismatches(file.description)).c_str(), stdout);
        return;
    }
    if (arguments.threads) at::set_num_threads(static_cast<int>(arguments.threads));
    const Request request = request_of(file.description, arguments);
    const Engine engine = Engine::load(std::move(file));
    const double loaded = seconds_since(begin);
    const auto sampling = Clock::now();
    const bool once = arguments.repeat == 1 && arguments.at_once == 1;
    const at::Tensor samples = once ? run(engine, request) : run_often(engine, request, arguments);
    const double sampled = seconds_since(sampling);
    write_samples(samples, arguments.out);
    std::printf("%s: %lld samples of %s; %.3f s to load, %.3f s to sample\n", arguments.out.c_str(),
                static_cast<long long>(arguments.count), shown(samples.sizes().slice(1)).c_str(), loaded, sampled);
}

// Compiled code that throws inside a parallel region (an index beyond its table) ends the program: with one line, too.
[[noreturn]] void end_with_one_line() {
    try {
        if (const std::exception_ptr error = std::current_exception()) std::rethrow_exception(error);
    } catch (const std::exception& error) {
        std::fprintf(stderr, "olss-run: the network failed: %s\n", first_words(error.what()).c_str());
    } catch (...) {}
    std::_Exit(2);
}

}  // namespace

int main(int count, char** words) {
    std::set_terminate(end_with_one_line);
    // Compiled code writes what goes wrong to std::cerr, stack and all, before it throws: one line is enough.
    std::cerr.rdbuf(nullptr);
    try {
        guarded(Error::Kind::internal, "it failed", [&] {
            const Arguments arguments = parse_arguments({words + 1, words + count});
            if (arguments.help) std::fputs(usage, stdout);
            else if (arguments.version) std::puts("olss-run " OLSS_VERSION);
            else run_program(arguments);
        });
    } catch (const Error& error) {
        std::fprintf(stderr, "olss-run: %s\n", first_words(error.what()).c_str());
        return 2;
    }
    return 0;
}

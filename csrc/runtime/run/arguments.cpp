#include "run/arguments.h"

#include <charconv>
#include <cmath>
#include <functional>
#include <limits>
#include <set>

#include "files/text.h"

namespace olss {

namespace {

constexpr auto kind = Error::Kind::input;
constexpr std::int64_t largest = std::numeric_limits<std::int64_t>::max();

std::int64_t parse_integer(const std::string& text, const std::string& option, std::int64_t least,
                           std::int64_t most = largest) {
    const std::vector<std::int64_t> numbers = parse_numbers<std::int64_t>(text, option);
    if (numbers.size() != 1 || numbers[0] < least || numbers[0] > most)
        fail(kind, option, " is ", quote(text), "; expected a whole number of at least ", least,
             most < largest ? concat(" and at most ", most) : "");
    return numbers[0];
}

double parse_double(const std::string& text, const std::string& option) {
    const std::vector<double> numbers = parse_numbers<double>(text, option);
    if (numbers.size() != 1) fail(kind, option, " is ", quote(text), "; expected one number");
    return numbers[0];
}

void parse_assignment(const std::string& text, const std::string& option, std::map<std::string, std::string>& into) {
    const std::size_t place = text.find('=');
    if (place == std::string::npos || place == 0 || place + 1 == text.size())
        fail(kind, option, " is ", quote(text), "; expected NAME=VALUE, as in ", option, " class_labels=3");
    if (!into.emplace(text.substr(0, place), text.substr(place + 1)).second)
        fail(kind, option, " was given twice for ", quote(text.substr(0, place)));
}

Shape parse_shape(const std::string& text) {
    const Shape shape = parse_numbers<std::int64_t>(text, "--shape");
    for (std::int64_t size : shape)
        if (size < 1) fail(kind, "--shape is ", quote(text), "; expected sizes of at least 1, as in --shape 1,32,32");
    return shape;
}

}  // namespace

const char* const usage = R"(olss-run ENGINE [options] --out FILE.npy | FILE.png
olss-run ENGINE --describe

Samples with an engine file. THE FILE'S MACHINE CODE IS RUN: use only what comes from somebody you trust.

  --steps N               the plan of N network evaluations; default: the engine's first plan
  --plan NAME             the plan of that name
  --seed S                of the noise, and of the fresh noises of a stochastic plan; default 0
  --count B               samples; default 1
  --shape 1,32,32         of one sample, where the engine takes several
  --set NAME=VALUE        an argument of the network: a number, which stands for every sample, numbers 3,7,…, or
                          @FILE.npy; may be repeated, once for each argument
  --unconditional NAME=VALUE   the same for the unconditional half of a guided pair; default: the engine's
  --guidance-scale G      default: the engine's
  --threads N             threads of one run; default: torch's
  --out FILE              .npy: the samples; .png: all of them in one picture
  --repeat N, --at-once T  run N times in each of T threads, compare the results, and print times
  --sha256 DIGITS         that the file ought to have, as sha256sum prints it
  --describe              what the engine is, and whether it fits this machine
  --help, --version

olss-run demo.olss --steps 5 --seed 1 --count 4 --set class_labels=3 --out image.png
)";

template <typename Number>
std::vector<Number> parse_numbers(const std::string& text, const std::string& what) {
    std::vector<Number> numbers;
    const char *next = text.data(), *const end = text.data() + text.size();
    while (true) {
        Number number{};
        const auto [stop, fault] = std::from_chars(next, end, number);
        bool good = fault == std::errc() && (stop == end || *stop == ',');
        if constexpr (std::is_floating_point_v<Number>) good = good && std::isfinite(number);
        if (!good)
            fail(kind, what, " is ", quote(text), "; expected ",
                 std::is_integral_v<Number> ? "whole numbers" : "numbers", " with commas between them");
        numbers.push_back(number);
        if (stop == end) return numbers;
        next = stop + 1;
    }
}

template std::vector<std::int64_t> parse_numbers(const std::string&, const std::string&);
template std::vector<double> parse_numbers(const std::string&, const std::string&);

Arguments parse_arguments(const std::vector<std::string>& words) {
    Arguments result;
    using Take = std::function<void(const std::string&)>;
    const std::map<std::string, bool*> flags = {{"--describe", &result.describe},
                                                {"--help", &result.help},
                                                {"-h", &result.help},
                                                {"--version", &result.version}};
    const std::map<std::string, Take> options = {
        {"--steps", [&](const std::string& text) { result.steps = parse_integer(text, "--steps", 1); }},
        {"--plan", [&](const std::string& text) { result.plan = text; }},
        {"--seed", [&](const std::string& text) { result.seed = parse_integer(text, "--seed", 0); }},
        {"--count", [&](const std::string& text) { result.count = parse_integer(text, "--count", 1); }},
        {"--threads", [&](const std::string& text) { result.threads = parse_integer(text, "--threads", 1, 4096); }},
        {"--repeat", [&](const std::string& text) { result.repeat = parse_integer(text, "--repeat", 1); }},
        {"--at-once", [&](const std::string& text) { result.at_once = parse_integer(text, "--at-once", 1, 1024); }},
        {"--guidance-scale",
         [&](const std::string& text) { result.guidance_scale = parse_double(text, "--guidance-scale"); }},
        {"--shape", [&](const std::string& text) { result.shape = parse_shape(text); }},
        {"--sha256", [&](const std::string& text) { result.sha256 = text; }},
        {"--out", [&](const std::string& text) { result.out = text; }},
        {"--set", [&](const std::string& text) { parse_assignment(text, "--set", result.set); }},
        {"--unconditional",
         [&](const std::string& text) { parse_assignment(text, "--unconditional", result.unconditional); }}};
    std::set<std::string> seen;
    for (std::size_t i = 0; i < words.size(); ++i) {
        const std::string& word = words[i];
        const std::size_t equals = word.rfind("--", 0) == 0 ? word.find('=') : std::string::npos;
        const std::string name = word.substr(0, equals);  // --option VALUE or --option=VALUE
        if (const auto flag = flags.find(word); flag != flags.end()) {
            *flag->second = true;
        } else if (const auto option = options.find(name); option != options.end()) {
            if (name != "--set" && name != "--unconditional" && !seen.insert(name).second)
                fail(kind, name, " was given twice");
            if (equals == std::string::npos && i + 1 == words.size())
                fail(kind, name, " needs a value; see olss-run --help");
            option->second(equals == std::string::npos ? words[++i] : word.substr(equals + 1));
        } else if (word.rfind('-', 0) == 0) {
            fail(kind, "there is no option ", quote(word), "; see olss-run --help");
        } else if (result.engine.empty()) {
            result.engine = word;
        } else {
            fail(kind, "two engines came, ", quote(result.engine), " and ", quote(word), "; expected one");
        }
    }
    return result;
}

}  // namespace olss

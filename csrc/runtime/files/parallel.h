// Work for all processors.
#pragma once

#include <algorithm>
#include <atomic>
#include <exception>
#include <mutex>
#include <system_error>
#include <thread>
#include <vector>

namespace olss {

// work(i) for each i < count, in any order and several at a time. An exception is rethrown when all have ended.
template <typename Work>
void in_parallel(std::size_t count, Work work) {
    std::atomic<std::size_t> next{0};
    std::exception_ptr fault;
    std::mutex lock;
    const auto some = [&] {
        try {
            for (std::size_t i; (i = next++) < count;) work(i);
        } catch (...) {
            const std::lock_guard<std::mutex> guard(lock);
            fault = std::current_exception();
            next = count;
        }
    };
    std::vector<std::thread> helpers;
    const std::size_t most = std::min<std::size_t>(count, std::max(1u, std::thread::hardware_concurrency()));
    try {
        while (helpers.size() + 1 < most) helpers.emplace_back(some);
    } catch (const std::system_error&) {  // no more threads available: continue with fewer
    }
    some();
    for (std::thread& helper : helpers) helper.join();
    if (fault) std::rethrow_exception(fault);
}

}  // namespace olss

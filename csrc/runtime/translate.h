// Every exception becomes an Error with its message.
#pragma once

#include <exception>
#include <new>
#include <utility>

#include <c10/util/Exception.h>

#include "files/text.h"

namespace olss {

// What went wrong in one line, without the stack that torch and compiled code append.
inline std::string first_words(std::string text) {
    text.erase(std::min(text.find("Exception raised from"), text.size()));
    std::string result;
    for (const char letter : text) {
        const char plain = letter == '\n' ? ' ' : letter;
        if (plain != ' ' || (!result.empty() && result.back() != ' ')) result += plain;
    }
    while (!result.empty() && result.back() == ' ') result.pop_back();
    return result.substr(0, 600);
}

// The result of `work()`. Whatever it throws leaves as an Error: its own ones as they are, others of `kind` with `what`
// before their message.
template <typename Work>
auto guarded(Error::Kind kind, const char* what, Work&& work) -> decltype(work()) {
    try {
        return std::forward<Work>(work)();
    } catch (const Error&) {
        throw;
    } catch (const std::bad_alloc&) {
        fail(Error::Kind::internal, what, ": out of memory");
    } catch (const c10::Error& error) {
        fail(kind, what, ": ", first_words(error.what_without_backtrace()));
    } catch (const std::exception& error) {
        fail(kind, what, ": ", first_words(error.what()));
    } catch (...) {
        fail(kind, what, ": an exception of an unknown type");
    }
}

}  // namespace olss

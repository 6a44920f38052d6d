#pragma once

#include <c10/util/Exception.h>

#include <functional>
#include <string>

namespace cctorch {

// The message of the c10::Error that `call` throws; empty where it throws none.
inline std::string refusal(const std::function<void()>& call) {
  try {
    call();
  } catch (const c10::Error& error) {
    return error.what_without_backtrace();
  }
  return "";
}

}  // namespace cctorch

#pragma once

#include <ATen/core/Tensor.h>
#include <ATen/core/dispatch/Dispatcher.h>

#include <array>
#include <tuple>
#include <vector>

namespace cctorch {

// So many lists of tensors, as a tuple.
template <size_t count>
using Lists = decltype(std::tuple_cat(std::array<std::vector<at::Tensor>, count>()));

// The operator cctorch::NAME, for a call through the dispatcher.
template <typename Signature>
c10::TypedOperatorHandle<Signature> find_operator(const char* name, const char* overload = "") {
  return c10::Dispatcher::singleton().findSchemaOrThrow(name, overload).typed<Signature>();
}

// The one of several functions of a name that has this signature.
template <typename Signature>
constexpr Signature* overload(Signature* function) {
  return function;
}

}  // namespace cctorch

#pragma once

#include <ATen/core/dispatch/Dispatcher.h>

namespace cctorch {

// The operator cctorch::NAME, for a call through the dispatcher.
template <typename Signature>
c10::TypedOperatorHandle<Signature> find_operator(const char* name) {
  return c10::Dispatcher::singleton().findSchemaOrThrow(name, "").typed<Signature>();
}

}  // namespace cctorch

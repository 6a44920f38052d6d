#pragma once

#include <cctorch/regularize.h>

namespace cctorch::regularize {

template <class T>
T read(const State& state, const std::string& key) {
  const auto entry = state.find(key);
  TORCH_CHECK_VALUE(entry != state.end(), "regularize: the state has no entry '", key,
                    "'; was it saved by another regularizer or schedule?");
  const T* value = std::get_if<T>(&entry->second);
  TORCH_CHECK_VALUE(value, "regularize: entry '", key,
                    "' of the state is of another type; was it saved by another regularizer or schedule?");
  return *value;
}

inline void insert(State& state, const std::string& prefix, const State& part) {
  for (const auto& [key, value] : part) state.emplace(prefix + key, value);
}

// The entries under `prefix`, without it.
inline State extract(const State& state, const std::string& prefix) {
  State part;
  for (const auto& [key, value] : state) {
    if (key.starts_with(prefix)) part.emplace(key.substr(prefix.size()), value);
  }
  return part;
}

}  // namespace cctorch::regularize

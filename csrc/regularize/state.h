#pragma once

#include <cctorch/regularizers.h>

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

// A regularizer's kind as `key`, and its entries under "key.".
inline void insert(State& state, const std::string& key, const Regularizer& regularizer) {
  state.emplace(key, kind(regularizer));
  insert(state, key + ".", regularizer.state_dict());
}

inline void restore(const State& state, const std::string& key, Regularizer& regularizer) {
  const auto saved = read<std::string>(state, key), own = kind(regularizer);
  TORCH_CHECK_VALUE(saved == own, "regularize: the state is of the regularizer ", saved, ", expected one of ", own,
                    ": make the same one again to go on, or start without the state");
  regularizer.load_state_dict(extract(state, key + "."));
}

}  // namespace cctorch::regularize

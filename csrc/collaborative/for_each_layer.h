#pragma once

#include <cctorch/collaborative.h>

#include <functional>
#include <string_view>
#include <vector>

namespace cctorch::collaborative {

// Layers are independent of each other: each thread takes one at a time. A wide one that would keep its thread busy
// when the others have long been done is left all threads instead.
void for_each_layer(const std::vector<Layer>& layers, std::string_view stage, const Options& options,
                    const Progress& progress, const std::function<void(size_t layer)>& function);

}  // namespace cctorch::collaborative

#pragma once

#include <c10/core/Stream.h>
#include <cctorch/collaborative.h>

#include <functional>
#include <optional>
#include <string_view>
#include <vector>

namespace cctorch::collaborative {

// One for each wide layer whose weight is on a GPU, where it is worked on beside the others. What the device was given
// so far is done then. A layer's tensors outlive a pass over the layers, so all passes take the same streams.
using Streams = std::vector<std::optional<c10::Stream>>;
Streams streams_of(const std::vector<Layer>& layers, const Options& options);

// Layers are independent of each other: each thread takes one at a time. A wide one that would keep its processor
// thread busy when the others have long been done is left all threads instead.
void for_each_layer(const std::vector<Layer>& layers, const Streams& streams, std::string_view stage,
                    const Options& options, const Progress& progress,
                    const std::function<void(size_t layer)>& function);

}  // namespace cctorch::collaborative

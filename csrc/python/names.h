#pragma once

#include <c10/util/Exception.h>
#include <cctorch/plan.h>

#include <array>
#include <string>
#include <string_view>
#include <utility>

namespace cctorch::python {

// Enumerations are plain strings in Python: "conv2d", "exact".
template <class Enum, size_t count>
using Names = std::array<std::pair<std::string_view, Enum>, count>;

template <class Enum, size_t count>
Enum parse(const Names<Enum, count>& names, const char* argument, const std::string& text) {
  std::string expected;
  for (const auto& [name, value] : names) {
    if (name == text) return value;
    expected += (expected.empty() ? "'" : ", '") + std::string(name) + "'";
  }
  TORCH_CHECK_VALUE(false, argument, " = '", text, "', expected one of ", expected);
}

template <class Enum, size_t count>
std::string_view name_of(const Names<Enum, count>& names, Enum value) {
  for (const auto& [name, candidate] : names) {
    if (candidate == value) return name;
  }
  TORCH_INTERNAL_ASSERT(false, "enumeration value without a name");
}

inline constexpr Names<LowRankLayout, 3> layout_names{
    {{"channel", LowRankLayout::channel}, {"spatial", LowRankLayout::spatial}, {"tucker", LowRankLayout::tucker}}};

}  // namespace cctorch::python

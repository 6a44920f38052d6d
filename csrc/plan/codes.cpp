#include <ATen/TensorOperators.h>
#include <ATen/ops/empty.h>
#include <ATen/ops/equal.h>
#include <ATen/ops/zeros.h>
#include <c10/util/Exception.h>
#include <cctorch/codes.h>

#include <algorithm>
#include <iterator>
#include <utility>
#include <vector>

namespace cctorch {
namespace {

constexpr int64_t byte_bits = 8;
constexpr auto codes_suffix = ".codes", scales_suffix = ".scales", grid_suffix = ".grid";

int64_t packed_bytes(int64_t count, int64_t bits) { return (count * bits + byte_bits - 1) / byte_bits; }

void check_bits(const std::string& name, int64_t bits) {
  TORCH_CHECK_VALUE(bits >= 2 && bits <= 16, "codes: '", name, "' has ", bits, " bits, expected 2 to 16");
}

// `codes` is int64, contiguous and on the CPU; each fits into `bits`.
at::Tensor packed(const at::Tensor& codes, int64_t bits) {
  at::Tensor bytes = at::zeros({packed_bytes(codes.numel(), bits)}, at::kByte);
  const auto* const from = codes.const_data_ptr<int64_t>();
  auto* to = bytes.mutable_data_ptr<uint8_t>();
  const uint64_t mask = (uint64_t{1} << bits) - 1;
  uint64_t waiting = 0;
  int64_t held = 0;
  for (int64_t i = 0; i < codes.numel(); ++i) {
    waiting |= (static_cast<uint64_t>(from[i]) & mask) << held;
    for (held += bits; held >= byte_bits; held -= byte_bits, waiting >>= byte_bits) *to++ = waiting & 0xff;
  }
  if (held > 0) *to = waiting & 0xff;
  return bytes;
}

at::Tensor unpacked(const at::Tensor& bytes, int64_t bits, at::IntArrayRef shape) {
  at::Tensor codes = at::empty(shape, at::kShort);
  const auto* from = bytes.const_data_ptr<uint8_t>();
  auto* const to = codes.mutable_data_ptr<int16_t>();
  const uint64_t mask = (uint64_t{1} << bits) - 1;
  const int64_t sign = int64_t{1} << (bits - 1);
  uint64_t waiting = 0;
  int64_t held = 0;
  for (int64_t i = 0; i < codes.numel(); ++i) {
    for (; held < bits; held += byte_bits) waiting |= static_cast<uint64_t>(*from++) << held;
    const auto code = static_cast<int64_t>(waiting & mask);
    to[i] = static_cast<int16_t>((code ^ sign) - sign);
    waiting >>= bits;
    held -= bits;
  }
  return codes;
}

at::Tensor along_rows(const at::Tensor& scales, int64_t dimensions) {
  std::vector<int64_t> shape(dimensions, 1);
  shape[0] = -1;
  return scales.view(shape);
}

void check_scales(const std::string& name, const at::Tensor& scales, int64_t rows) {
  const auto type = scales.scalar_type();
  TORCH_CHECK_VALUE((type == at::kFloat || type == at::kDouble) && scales.dim() == 1 && scales.size(0) == rows,
                    "codes: '", name, "' has scales of ", type, " and shape ", scales.sizes(),
                    ", expected float32 or float64 and ", rows, " of them");
  TORCH_CHECK_VALUE(scales.isfinite().logical_and_(scales > 0).all().item<bool>(), "codes: '", name,
                    "' has a scale that is not positive and finite");
}

// Of the grid that a file has: shape, behind the bits. Checks that there are bytes for so many codes, and no more.
std::vector<int64_t> checked_shape(const std::string& name, const at::Tensor& codes, const at::Tensor& grid) {
  TORCH_CHECK_VALUE(codes.scalar_type() == at::kByte && codes.dim() == 1 && grid.scalar_type() == at::kLong &&
                        grid.dim() == 1 && grid.size(0) >= 2,
                    "codes: '", name, "' has codes of ", codes.scalar_type(), " and shape ", codes.sizes(),
                    " and a grid of ", grid.scalar_type(), " and shape ", grid.sizes(),
                    ", expected a list of uint8, and one of int64: bits and a shape");
  const auto bits = grid[0].item<int64_t>();
  check_bits(name, bits);
  const at::Tensor sides = grid.slice(0, 1).contiguous();
  std::vector<int64_t> shape(sides.const_data_ptr<int64_t>(), sides.const_data_ptr<int64_t>() + sides.numel());
  // A side of 0 too has strides beside it, which must not overflow.
  int64_t product = bits;
  bool fits = true, none = false;
  for (const int64_t side : shape) {
    fits = fits && side >= 0 && !__builtin_mul_overflow(product, std::max<int64_t>(side, 1), &product);
    none = none || side == 0;
  }
  fits = fits && product <= INT64_MAX - byte_bits;
  const int64_t count = none ? 0 : product / bits;
  TORCH_CHECK_VALUE(fits && codes.numel() == packed_bytes(count, bits), "codes: '", name, "' has ", codes.numel(),
                    " bytes of codes, which is not what ", bits, " bits and the shape ", at::IntArrayRef(shape),
                    " take");
  return shape;
}

at::Tensor decoded(const std::string& name, at::Tensor codes, at::Tensor scales, at::Tensor grid) {
  for (at::Tensor* const part : {&codes, &scales, &grid}) *part = part->detach().cpu().contiguous();
  const std::vector<int64_t> shape = checked_shape(name, codes, grid);
  check_scales(name, scales, shape[0]);
  return unpacked(codes, grid[0].item<int64_t>(), shape)
      .to(scales.scalar_type())
      .mul_(along_rows(scales, std::ssize(shape)));
}

}  // namespace

void encode_weight(Safetensors::Tensors& state, const std::string& name, const at::Tensor& scales, int64_t bits) {
  const auto found = state.find(name);
  TORCH_CHECK_VALUE(found != state.end() && found->second.defined(), "codes: the state has no '", name, "'");
  const at::Tensor weight = found->second.detach().cpu();
  TORCH_CHECK_VALUE(weight.is_floating_point() && weight.dim() > 0, "codes: '", name, "' is of ", weight.scalar_type(),
                    " and shape ", weight.sizes(), ", expected a floating-point tensor with a dimension");
  check_bits(name, bits);
  const at::Tensor steps = scales.detach().cpu().contiguous();
  check_scales(name, steps, weight.size(0));
  const at::Tensor wide = along_rows(steps, weight.dim());
  const int64_t limit = int64_t{1} << (bits - 1);
  // Clamped in floating point, in which infinities and NaN have a place.
  const at::Tensor codes = weight.to(at::kDouble).div(wide).round_().clamp_(-limit, limit - 1).nan_to_num_();
  TORCH_CHECK_VALUE(at::equal((codes.to(steps.scalar_type()) * wide).to(weight.scalar_type()), weight), "codes: '",
                    name, "' has a value that is no whole number of ", bits, " bits times its scale");
  std::vector<int64_t> grid{bits};
  grid.insert(grid.end(), weight.sizes().begin(), weight.sizes().end());
  at::Tensor described = at::empty({static_cast<int64_t>(grid.size())}, at::kLong);
  std::ranges::copy(grid, described.mutable_data_ptr<int64_t>());
  const at::Tensor bytes = packed(codes.to(at::kLong).contiguous(), bits);
  state.erase(found);
  state[name + codes_suffix] = bytes;
  state[name + scales_suffix] = steps;
  state[name + grid_suffix] = described;
}

Safetensors::Tensors decode_weights(Safetensors::Tensors state) {
  std::vector<std::string> names;
  for (const auto& [key, tensor] : state) {
    if (!key.ends_with(codes_suffix)) continue;
    const std::string name = key.substr(0, key.size() - std::string_view(codes_suffix).size());
    if (state.contains(name + scales_suffix) && state.contains(name + grid_suffix)) names.push_back(name);
  }
  for (const std::string& name : names) {
    TORCH_CHECK_VALUE(!state.contains(name), "codes: the state has '", name, "' twice, as codes and as it is");
    const auto take = [&](const std::string& key) {
      at::Tensor tensor = std::move(state.extract(key).mapped());
      TORCH_CHECK_VALUE(tensor.defined(), "codes: '", key, "' is undefined");
      return tensor;
    };
    at::Tensor codes = take(name + codes_suffix), scales = take(name + scales_suffix), grid = take(name + grid_suffix);
    state[name] = decoded(name, std::move(codes), std::move(scales), std::move(grid));
  }
  return state;
}

}  // namespace cctorch

// Quantized weights as codes of few bits.
#include <ATen/ATen.h>
#include <cctorch/codes.h>
#include <gtest/gtest.h>

#include <cmath>
#include <limits>
#include <string>
#include <vector>

#include "tests/cpp/refusal.h"

namespace cctorch {
namespace {

// Rows of whole numbers that `bits` can hold, the smallest and the largest among them, and a scale for each.
struct Weight {
  at::Tensor codes, scales, values;
};

Weight random_weight(int64_t bits, at::IntArrayRef shape, at::ScalarType scale = at::kFloat,
                     at::ScalarType type = at::kFloat) {
  const int64_t limit = int64_t{1} << (bits - 1);
  Weight weight;
  weight.codes = at::randint(-limit, limit, shape, at::kLong);
  if (weight.codes.numel() > 1) {
    weight.codes.view(-1)[0] = -limit;
    weight.codes.view(-1)[-1] = limit - 1;
  }
  weight.scales = at::rand({shape[0]}, at::kDouble).add_(0.01).to(scale);
  std::vector<int64_t> rows(shape.size(), 1);
  rows[0] = shape[0];
  weight.values = (weight.codes.to(scale) * weight.scales.view(rows)).to(type);
  return weight;
}

// Bit by bit: what the bytes say, without any of the arithmetic of the packing.
std::vector<int64_t> bit_by_bit(const at::Tensor& bytes, int64_t bits, int64_t count) {
  const auto bit = [&](int64_t at) { return (bytes[at / 8].item<int64_t>() >> (at % 8)) & 1; };
  std::vector<int64_t> codes;
  for (int64_t i = 0; i < count; ++i) {
    int64_t code = 0;
    for (int64_t b = 0; b < bits; ++b) code += (b + 1 == bits ? -1 : 1) * (bit(i * bits + b) << b);
    codes.push_back(code);
  }
  return codes;
}

TEST(Codes, AreTwosComplementOneBehindAnother) {
  for (int64_t bits = 2; bits <= 16; ++bits) {
    const Weight weight = random_weight(bits, {5, 7});
    Safetensors::Tensors state = {{"w", weight.values}};
    encode_weight(state, "w", weight.scales, bits);
    ASSERT_EQ(state.size(), 3U);
    const at::Tensor& bytes = state.at("w.codes");
    EXPECT_EQ(bytes.numel(), (35 * bits + 7) / 8);
    const std::vector<int64_t> read = bit_by_bit(bytes, bits, 35);
    EXPECT_TRUE(at::equal(at::tensor(read, at::kLong).view({5, 7}), weight.codes)) << bits;
    EXPECT_TRUE(at::equal(state.at("w.grid"), at::tensor({bits, int64_t{5}, int64_t{7}}, at::kLong)));
  }
}

TEST(Codes, ComeBackAsTheyWere) {
  const std::vector<std::vector<int64_t>> shapes = {{4, 3, 3, 3}, {1}, {1, 1}, {0, 4}, {4, 0}, {17}, {3, 5, 2}};
  for (const auto type : {at::kFloat, at::kDouble, at::kHalf, at::kBFloat16}) {
    for (const auto& shape : shapes) {
      for (const int64_t bits : {2, 3, 8}) {
        const Weight weight = random_weight(bits, shape, type == at::kDouble ? at::kDouble : at::kFloat, type);
        const at::Tensor before = weight.values.clone(), other = at::rand({2});
        Safetensors::Tensors state = {{"a.w", weight.values}, {"b", other}};
        encode_weight(state, "a.w", weight.scales, bits);
        EXPECT_TRUE(at::equal(weight.values, before));
        const Safetensors::Tensors read = decode_weights(from_safetensors(to_safetensors({state, {}})).tensors);
        ASSERT_EQ(read.size(), 2U);
        EXPECT_TRUE(at::equal(read.at("b"), other));
        EXPECT_EQ(read.at("a.w").scalar_type(), weight.scales.scalar_type());
        EXPECT_TRUE(at::equal(read.at("a.w").to(type), before)) << at::IntArrayRef(shape) << type;
      }
    }
  }
}

TEST(Codes, OfAWeightThatIsNotContiguous) {
  const Weight weight = random_weight(4, {6, 4, 3, 3});
  Safetensors::Tensors state = {{"w", weight.values.contiguous(at::MemoryFormat::ChannelsLast)}};
  encode_weight(state, "w", at::stack({weight.scales, weight.scales}, 1).select(1, 0), 4);
  EXPECT_TRUE(at::equal(decode_weights(state).at("w"), weight.values));
}

TEST(Codes, OfNothingChangeNothing) {
  const Safetensors::Tensors state = {{"w.codes", at::rand({2})}, {"w.grid", at::rand({3})}, {"v", at::rand({1})}};
  const Safetensors::Tensors read = decode_weights(state);
  ASSERT_EQ(read.size(), 3U);
  for (const auto& [name, tensor] : state) EXPECT_TRUE(read.at(name).is_same(tensor)) << name;
}

TEST(Codes, WhatIsOnNoGridIsRefusedAndStays) {
  const Weight weight = random_weight(4, {3, 4});
  const auto refused = [&](const at::Tensor& values, const at::Tensor& scales, int64_t bits,
                           const std::string& message) {
    Safetensors::Tensors state = {{"w", values}};
    const std::string found = refusal([&] { encode_weight(state, "w", scales, bits); });
    EXPECT_NE(found.find(message), std::string::npos) << found;
    ASSERT_EQ(state.size(), 1U);
    EXPECT_TRUE(state.at("w").is_same(values));
  };
  const std::string off = "'w' has a value that is no whole number of 4 bits times its scale";
  at::Tensor shifted = weight.values.clone();
  shifted[1][2] = std::nextafter(shifted[1][2].item<float>(), 1e9F);
  refused(shifted, weight.scales, 4, off);
  at::Tensor beyond = weight.values.clone();
  beyond[2][0] = weight.scales[2] * 8;  // the largest is 7
  refused(beyond, weight.scales, 4, off);
  for (const float value : {std::numeric_limits<float>::quiet_NaN(), std::numeric_limits<float>::infinity()}) {
    at::Tensor broken = weight.values.clone();
    broken[0][1] = value;
    refused(broken, weight.scales, 4, off);
  }
  refused(weight.values, weight.scales, 1, "'w' has 1 bits, expected 2 to 16");
  refused(weight.values, weight.scales, 17, "'w' has 17 bits, expected 2 to 16");
  refused(weight.values, weight.scales.slice(0, 1), 4, "expected float32 or float64 and 3 of them");
  refused(weight.values, weight.scales.to(at::kHalf), 4, "expected float32 or float64 and 3 of them");
  refused(weight.values, weight.scales * 0, 4, "'w' has a scale that is not positive and finite");
  refused(at::ones({3}, at::kLong), weight.scales, 4, "'w' is of Long");
  refused(at::rand({}), weight.scales, 4, "expected a floating-point tensor with a dimension");
  Safetensors::Tensors state;
  EXPECT_NE(refusal([&] { encode_weight(state, "w", weight.scales, 4); }).find("the state has no 'w'"),
            std::string::npos);
}

TEST(Codes, ThatDoNotFitTheirGridAreRefused) {
  const Weight weight = random_weight(4, {3, 4});
  Safetensors::Tensors whole = {{"w", weight.values}};
  encode_weight(whole, "w", weight.scales, 4);
  const auto refused = [&](const std::string& part, const at::Tensor& value, const std::string& message) {
    Safetensors::Tensors state = whole;
    state[part] = value;
    const std::string found = refusal([&] { decode_weights(state); });
    EXPECT_NE(found.find(message), std::string::npos) << found;
  };
  const auto grid = [](const std::vector<int64_t>& values) { return at::tensor(values, at::kLong); };
  const std::string bytes = "'w' has 6 bytes of codes, which is not what";
  refused("w.grid", grid({4, 3, 5}), bytes);
  refused("w.grid", grid({4, 3, 2}), bytes);
  refused("w.grid", grid({4, -3, -4}), bytes);
  refused("w.grid", grid({4, 0, 4}), bytes);
  refused("w.grid", grid({4, int64_t{1} << 32, int64_t{1} << 32}), bytes);
  refused("w.grid", grid({4, 0, INT64_MAX, INT64_MAX}), bytes);
  refused("w.grid", grid({4, 6, 2}), "'w' has scales of Float and shape [3], expected float32 or float64 and 6");
  refused("w.grid", grid({0, 3, 4}), "'w' has 0 bits, expected 2 to 16");
  refused("w.grid", grid({INT64_MIN, 3, 4}), "bits, expected 2 to 16");
  refused("w.grid", grid({4}), "a grid of Long and shape [1]");
  refused("w.grid", at::ones({3}), "a grid of Float");
  refused("w.codes", whole.at("w.codes").to(at::kInt), "has codes of Int");
  refused("w.codes", whole.at("w.codes").view({2, 3}), "and shape [2, 3]");
  refused("w.scales", weight.scales * std::numeric_limits<float>::infinity(), "a scale that is not positive");
  refused("w.scales", at::Tensor(), "'w.scales' is undefined");
  refused("w", weight.values, "the state has 'w' twice");
}

}  // namespace
}  // namespace cctorch

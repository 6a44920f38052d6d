#include <ATen/ATen.h>
#include <cctorch/repair.h>
#include <gtest/gtest.h>

#include <algorithm>
#include <array>
#include <barrier>
#include <thread>
#include <vector>

namespace cctorch::repair {
namespace {

struct Case {
  Window window;
  int64_t height, width;
};

const std::vector<Case> cases{
    {{{3, 3}, {1, 1}, {1, 1}, {1, 1}}, 6, 5}, {{{3, 2}, {2, 1}, {1, 0}, {1, 1}}, 7, 6},
    {{{3, 3}, {2, 2}, {2, 2}, {2, 2}}, 8, 9}, {{}, 4, 4},
    {{{1, 1}, {2, 2}, {0, 0}, {1, 1}}, 5, 5},
};

at::Tensor unfold(const at::Tensor& x, const Window& window) {
  return at::im2col(x, window.kernel, window.dilation, window.padding, window.stride);  // B x P x positions
}

// Columns of image i at the positions that a loop over the definition gives.
at::Tensor sampled(const at::Tensor& columns, int64_t step, int64_t first_image) {
  const int64_t positions = columns.size(2);
  step = std::min(step, positions);
  std::vector<at::Tensor> samples;
  for (int64_t image = 0; image < columns.size(0); ++image) {
    for (int64_t sample = 0; sample < positions / step; ++sample) {
      samples.push_back(columns[image].select(1, (first_image + image) % step + sample * step));
    }
  }
  return at::stack(samples, 1);
}

TEST(RepairSamples, AreThoseOfTheUnfoldedInput) {
  at::manual_seed(0);
  for (const Case& c : cases) {
    const at::Tensor x = at::randn({5, 3, c.height, c.width}, at::kDouble);
    const at::Tensor columns = unfold(x, c.window);
    for (const int64_t step : {1, 3, 4, 1000}) {
      EXPECT_TRUE(at::equal(input_samples(x, c.window, step, 2), sampled(columns, step, 2))) << step;
    }
    EXPECT_TRUE(
        at::equal(input_samples(x.contiguous(at::MemoryFormat::ChannelsLast), c.window, 3), sampled(columns, 3, 0)));
  }
}

TEST(RepairSamples, OfTheOutputAreInTheSameOrder) {
  at::manual_seed(0);
  for (const Case& c : cases) {
    const at::Tensor x = at::randn({7, 3, c.height, c.width}, at::kDouble);
    const at::Tensor weight = at::randn({4, 3, c.window.kernel[0], c.window.kernel[1]}, at::kDouble);
    const at::Tensor y = at::conv2d(x, weight, {}, c.window.stride, c.window.padding, c.window.dilation);
    for (const int64_t step : {1, 3, 8}) {
      const at::Tensor made = at::mm(weight.flatten(1), input_samples(x, c.window, step, 1));
      EXPECT_TRUE(at::allclose(made, output_samples(y, step, 1), 1e-12, 1e-12));
    }
  }
}

TEST(RepairMoments, AreThoseOfAllSamplesTogether) {
  at::manual_seed(0);
  const Window window{{3, 3}, {1, 1}, {1, 1}, {1, 1}};
  const at::Tensor x = at::randn({6, 2, 5, 5}, at::kDouble) + 3;
  const at::Tensor y = at::randn({4, 6 * 12}, at::kDouble) - 5;
  const at::Tensor columns = sampled(unfold(x, window), 2, 0);
  const at::Tensor x_mean = columns.mean(1, true), y_mean = y.mean(1, true);
  for (const int64_t bytes : {1, 20000, 1 << 20}) {  // one image at a time, some, all
    Moments moments(18, 4);
    moments.add_conv2d(x, y, window, 2, 0, bytes);
    EXPECT_EQ(moments.samples(), 72);
    EXPECT_TRUE(at::allclose(moments.input_mean(), x_mean.squeeze(1), 1e-12));
    EXPECT_TRUE(at::allclose(moments.output_mean(), y_mean.squeeze(1), 1e-12));
    EXPECT_TRUE(at::allclose(moments.input_moment(), at::mm(columns - x_mean, (columns - x_mean).t()), 1e-10, 1e-10));
    EXPECT_TRUE(at::allclose(moments.cross_moment(), at::mm(y - y_mean, (columns - x_mean).t()), 1e-10, 1e-10));
    EXPECT_TRUE(at::allclose(moments.output_square(), (y - y_mean).square().sum(1), 1e-10));
  }
}

TEST(RepairMoments, OfSeveralProcessesAreThoseOfAllTheirSamples) {
  at::manual_seed(0);
  const Window window{{3, 3}, {1, 1}, {1, 1}, {1, 1}};
  const at::Tensor x = at::randn({7, 2, 5, 5}, at::kDouble) + 3, y = at::randn({4, 7 * 12}, at::kDouble) - 5;
  Moments whole(18, 4);
  whole.add_conv2d(x, y, window, 2);
  // Shares of 3 and 4 images, and a process without any.
  const std::vector<int64_t> begins{0, 3, 7, 7};
  std::array<Moments, 3> parts{Moments(18, 4), Moments(18, 4), Moments(18, 4)};
  for (int64_t i = 0; i < 2; ++i) {
    const int64_t begin = begins[i], end = begins[i + 1];
    parts[i].add_conv2d(x.slice(0, begin, end), y.slice(1, 12 * begin, 12 * end), window, 2, begin);
  }
  std::array<at::Tensor, 3> given;
  std::barrier everyone(3);
  const auto run = [&](size_t process) {
    parts[process].all_reduce([&](const at::Tensor& sums) {
      given[process] = sums.clone();
      everyone.arrive_and_wait();
      sums.copy_(given[0] + given[1] + given[2]);
      everyone.arrive_and_wait();
    });
  };
  std::vector<std::jthread> threads;
  for (size_t process = 0; process < 3; ++process) threads.emplace_back(run, process);
  threads.clear();
  for (const Moments& part : parts) {
    EXPECT_EQ(part.samples(), whole.samples());
    EXPECT_TRUE(at::allclose(part.input_mean(), whole.input_mean(), 1e-12));
    EXPECT_TRUE(at::allclose(part.output_mean(), whole.output_mean(), 1e-12));
    EXPECT_TRUE(at::allclose(part.input_moment(), whole.input_moment(), 1e-10, 1e-10));
    EXPECT_TRUE(at::allclose(part.cross_moment(), whole.cross_moment(), 1e-10, 1e-10));
    EXPECT_TRUE(at::allclose(part.output_square(), whole.output_square(), 1e-10));
  }
}

TEST(RepairMoments, OfHalfPrecisionSamplesAreTakenInFloat) {
  at::manual_seed(0);
  const at::Tensor x = (at::randn({3, 400}) + 100).to(at::kHalf), y = at::randn({2, 400}).to(at::kHalf);
  Moments moments(3, 2);
  moments.add(x, y);
  const at::Tensor exact = x.to(at::kDouble);
  const at::Tensor central = exact - exact.mean(1, true);
  EXPECT_TRUE(at::allclose(moments.input_moment(), at::mm(central, central.t()), 1e-4, 1e-3));
}

TEST(RepairMoments, RefuseSamplesThatDoNotMatch) {
  Moments moments(9, 2);
  EXPECT_THROW(moments.add(at::zeros({9, 5}), at::zeros({2, 6})), c10::Error);
  EXPECT_THROW(moments.add(at::zeros({8, 5}), at::zeros({2, 5})), c10::Error);
  const Window window{{3, 3}};
  EXPECT_THROW(moments.add_conv2d(at::zeros({2, 1, 4, 4}), at::zeros({2, 7}), window, 1), c10::Error);
  EXPECT_THROW(moments.add_conv2d(at::zeros({2, 1, 2, 2}), at::zeros({2, 8}), window, 1), c10::Error);
  EXPECT_THROW(moments.add_conv2d(at::zeros({2, 1, 4, 4}), at::zeros({2, 8}), window, 0), c10::Error);
  EXPECT_THROW(moments.add_conv2d(at::zeros({2, 1, 4, 4}), at::zeros({2, 8}), window, 1, -1), c10::Error);
  // No stride ended the process: a division by 0.
  EXPECT_THROW(input_samples(at::zeros({2, 1, 4, 4}), {.stride = {0, 1}}, 1), c10::Error);
  EXPECT_THROW(input_samples(at::zeros({2, 1, 4, 4}), {.kernel = {0, 3}}, 1), c10::Error);
  EXPECT_EQ(moments.samples(), 0);
}

}  // namespace
}  // namespace cctorch::repair

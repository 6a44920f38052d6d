#include "csrc/collaborative/for_each_layer.h"

#include <ATen/Parallel.h>
#include <gtest/gtest.h>

#include <mutex>
#include <set>
#include <stdexcept>

namespace cctorch::collaborative {
namespace {

std::vector<Layer> layers_of(const std::vector<int64_t>& sizes) {
  std::vector<Layer> layers;
  for (const int64_t size : sizes) {
    layers.push_back({LayerSpec{"layer", LayerKind::linear, size, size, 1, 1, 1}, {}, {}});
  }
  return layers;
}

// Which layers ran alone, with all threads; every layer once.
std::set<size_t> alone(const std::vector<int64_t>& sizes, const Options& options) {
  std::mutex mutex;
  std::multiset<size_t> all;
  std::set<size_t> outside;
  std::vector<int64_t> reported;
  const Progress progress = [&](std::string_view, int64_t done, int64_t) { reported.push_back(done); };
  for_each_layer(layers_of(sizes), Streams(sizes.size()), "stage", options, progress, [&](size_t layer) {
    const std::scoped_lock lock(mutex);
    all.insert(layer);
    if (!at::in_parallel_region()) outside.insert(layer);
  });
  EXPECT_EQ(all.size(), sizes.size());
  EXPECT_EQ(std::set<size_t>(all.begin(), all.end()).size(), sizes.size());
  for (size_t i = 0; i < reported.size(); ++i) EXPECT_EQ(reported[i], static_cast<int64_t>(i));
  EXPECT_EQ(reported.size(), sizes.size() + 1);
  return outside;
}

class ForEachLayer : public testing::Test {
 protected:
  void SetUp() override { at::set_num_threads(2); }
  void TearDown() override { at::set_num_threads(threads_); }

 private:
  int threads_ = at::get_num_threads();
};

TEST_F(ForEachLayer, LeavesAllThreadsToAWideOneThatOutlastsTheOthers) {
  EXPECT_EQ(alone({64, 4096, 64, 2048, 64, 64}, Options{}), (std::set<size_t>{1, 3}));
  EXPECT_EQ(alone({2048, 2048, 64}, Options{}), std::set<size_t>{});
  EXPECT_EQ(alone({64, 128, 64, 64, 64, 64}, Options{}), std::set<size_t>{});  // not wide
}

TEST_F(ForEachLayer, PassesOnWhatAFunctionThrows) {
  for (const size_t bad : {0, 2}) {
    const auto work = [&](size_t layer) {
      if (layer == bad) throw std::runtime_error("stop");
    };
    EXPECT_THROW(for_each_layer(layers_of({4096, 64, 64}), Streams(3), "stage", Options{}, {}, work),
                 std::runtime_error);
  }
}

}  // namespace
}  // namespace cctorch::collaborative

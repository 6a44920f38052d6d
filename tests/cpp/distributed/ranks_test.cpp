#include <cctorch/distributed.h>
#include <gtest/gtest.h>
#include <torch/types.h>

#include <cstdlib>
#include <stdexcept>
#include <string>

#include "tests/cpp/distributed/ranks_in_threads.h"
#include "tests/cpp/refusal.h"

namespace cctorch::distributed {
namespace {

TEST(Ranks, AloneNothingHappens) {
  const Ranks alone;
  at::Tensor x = torch::arange(3, torch::kDouble);
  alone.sum_(x);
  alone.broadcast_(x);
  EXPECT_TRUE(x.equal(torch::arange(3, torch::kDouble)));
  EXPECT_TRUE(alone.gather(x).equal(x.unsqueeze(0)));
  EXPECT_EQ(alone.on_main([] { return "result"; }), "result");
  EXPECT_EQ(alone.slice(7), std::pair(int64_t{0}, int64_t{7}));
  EXPECT_TRUE(alone.is_main());
}

TEST(Ranks, SumsGathersAndBroadcasts) {
  on_ranks(3, [](const Ranks& ranks) {
    const auto own = static_cast<double>(ranks.rank());
    at::Tensor sum = torch::full({2, 3}, own + 1, torch::kDouble);
    ranks.sum_(sum);
    EXPECT_TRUE(sum.equal(torch::full({2, 3}, 6, torch::kDouble)));
    EXPECT_TRUE(ranks.gather(torch::full({2}, own)).equal(torch::arange(3, torch::kFloat).unsqueeze(1).expand({3, 2})));
    // Rank 0's layout differs from that of the others.
    const at::Tensor wanted = torch::arange(24, torch::kFloat).view({1, 2, 3, 4});
    at::Tensor sent = ranks.is_main() ? wanted.contiguous(at::MemoryFormat::ChannelsLast) : torch::zeros({1, 2, 3, 4});
    ranks.broadcast_(sent);
    EXPECT_TRUE(sent.equal(wanted));
  });
}

TEST(Ranks, SlicesCoverAllItemsOnce) {
  on_ranks(3, [](const Ranks& ranks) {
    for (const int64_t items : {0, 1, 2, 3, 10}) {
      const auto [begin, length] = ranks.slice(items);
      at::Tensor taken = torch::zeros({items}, torch::kLong);
      taken.narrow(0, begin, length).fill_(1);
      ranks.sum_(taken);
      EXPECT_TRUE(taken.eq(1).all().item<bool>()) << items;
    }
  });
}

TEST(Ranks, WhatRankZeroReturnsOrThrowsReachesAll) {
  on_ranks(3, [](const Ranks& ranks) {
    int calls = 0;
    const std::string text = "a text\nof " + std::string(2000, 'x');
    EXPECT_EQ(ranks.on_main([&] { return ++calls, text; }), text);
    EXPECT_EQ(calls, ranks.is_main() ? 1 : 0);
    EXPECT_EQ(ranks.on_main([] { return ""; }), "");
    std::string error;
    try {
      ranks.on_main([]() -> std::string { throw std::runtime_error("no disk"); });
    } catch (const std::runtime_error& thrown) {
      error = "itself";
    } catch (const c10::Error& thrown) {
      error = thrown.what_without_backtrace();
    }
    EXPECT_EQ(error, ranks.is_main() ? "itself" : "rank 0: no disk");
  });
}

TEST(Ranks, AnAbsentRankIsAnErrorForTheOthers) {
  const auto one_leaves = [] {
    on_ranks(2, [](const Ranks& ranks) {
      if (!ranks.is_main()) ranks.sum_(torch::ones({1}));
    });
  };
  EXPECT_THROW(one_leaves(), std::exception);
}

TEST(Ranks, EnvironmentIsChecked) {
  unsetenv("WORLD_SIZE");
  EXPECT_EQ(Ranks::from_environment(at::kCPU).count(), 1);
  setenv("WORLD_SIZE", "2", 1);
  unsetenv("RANK");
  EXPECT_NE(refusal([] { Ranks::from_environment(at::kCPU); }).find("WORLD_SIZE is set, but not RANK"),
            std::string::npos);
  for (const char* rank : {"2", "-1", "x", ""}) {
    setenv("RANK", rank, 1);
    EXPECT_NE(refusal([] { Ranks::from_environment(at::kCPU); }).find("expected a number from 0 to 1"),
              std::string::npos);
  }
  unsetenv("RANK");
  unsetenv("WORLD_SIZE");
}

}  // namespace
}  // namespace cctorch::distributed

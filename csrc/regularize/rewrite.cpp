#include "csrc/regularize/rewrite.h"

#include <ATen/ops/empty_like.h>

#include <algorithm>
#include <cstring>
#include <numeric>

#include "csrc/largest_first.h"
#include "csrc/regularize/norms.h"

namespace cctorch::regularize {

namespace {

struct Job {
  const Rewrite* rewrite;
  at::ScalarType type;
  int64_t numel;
  const char* from;
  char* to;
};

// Some pieces of one job.
struct Task {
  const Job* job;
  int64_t begin, end;
};

constexpr int64_t kPerTask = 16384;

// Where `from` is `to`, a piece is made in a thread's cache, compared with what it was, and then written. Returns by
// how much it moved, squared.
double run(const Task& task) {
  thread_local std::vector<char> cache;
  const Job& job = *task.job;
  const auto width = static_cast<int64_t>(c10::elementSize(job.type));
  const bool in_place = job.from == job.to;
  if (in_place) cache.resize(std::max<size_t>(cache.size(), std::min(job.rewrite->size, job.numel) * width));
  double moved = 0;
  for (int64_t begin = task.begin; begin < task.end; begin += job.rewrite->size) {
    const int64_t size = std::min(job.rewrite->size, task.end - begin);
    const char* from = job.from + begin * width;
    char* to = job.to + begin * width;
    const auto known = job.rewrite->piece(from, in_place ? cache.data() : to, begin, size);
    const bool stays = known == 0.0;
    if (in_place && !stays) {
      moved += known ? *known : squared_distance(job.type, from, cache.data(), size);
      std::memcpy(to, cache.data(), size * width);
    } else if (!in_place && stays) {
      std::memcpy(to, from, size * width);
    }
  }
  return moved;
}

double run_all(const std::vector<Job>& jobs) {
  std::vector<Task> tasks;
  std::vector<double> costs;
  for (const Job& job : jobs) {
    const int64_t size = job.rewrite->size;
    const int64_t step = std::max<int64_t>(1, kPerTask / size) * size;
    for (int64_t begin = 0; begin < job.numel; begin += step) {
      tasks.push_back({&job, begin, std::min(begin + step, job.numel)});
      costs.push_back(static_cast<double>(tasks.back().end - begin));
    }
  }
  std::vector<double> moved(tasks.size());
  largest_first(costs, [&](size_t i) { moved[i] = run(tasks[i]); });
  return std::accumulate(moved.begin(), moved.end(), 0.0);
}

}  // namespace

void finish(Weight& weight) {
  if (weight.rewrite.size == 0) return;
  const at::Tensor to = at::empty_like(weight.value);
  run_all({{&weight.rewrite, weight.value.scalar_type(), weight.value.numel(),
            static_cast<const char*>(weight.value.const_data_ptr()), static_cast<char*>(to.mutable_data_ptr())}});
  weight.value = to;
  weight.rewrite = {};
}

double rewrite_in_place(const std::vector<Weight>& weights, const NamedParameters& parameters) {
  std::vector<Job> jobs;
  for (size_t i = 0; i < weights.size(); ++i) {
    if (weights[i].rewrite.size == 0) continue;
    const at::Tensor& parameter = parameters[i].second;
    auto* memory = static_cast<char*>(parameter.mutable_data_ptr());
    jobs.push_back({&weights[i].rewrite, parameter.scalar_type(), parameter.numel(), memory, memory});
    // As an operator does, for autograd to find that a value it had saved was changed.
    if (!parameter.is_inference()) parameter.unsafeGetTensorImpl()->bump_version();
  }
  return run_all(jobs);
}

}  // namespace cctorch::regularize

#include "training.h"

#include <fmt/format.h>
#include <torch/cuda.h>
#include <torch/types.h>

#include <algorithm>
#include <chrono>
#include <cmath>
#include <memory>
#include <numbers>
#include <optional>
#include <stdexcept>
#include <vector>

#include "progress.h"

namespace {

constexpr double pixel_mean = 0.2860, pixel_deviation = 0.3530;
constexpr int64_t margin = 2;

// channels_last is the layout that CPU convolutions are fastest in.
at::Tensor normalized(const at::Tensor& pixels) {
  const at::Tensor scaled = (pixels.to(at::kFloat) / 255 - pixel_mean) / pixel_deviation;
  return scaled.unsqueeze(1).contiguous(at::MemoryFormat::ChannelsLast);
}

// Each image moved by up to `margin` pixels over a black border, and mirrored in half of the cases.
at::Tensor augmented(const at::Tensor& pixels) {
  const int64_t count = pixels.size(0), height = pixels.size(1), width = pixels.size(2);
  const auto integers = pixels.options().dtype(at::kLong);
  const at::Tensor rows = at::arange(height, integers) + at::randint(2 * margin + 1, {count, 1}, integers);
  const at::Tensor columns = at::arange(width, integers).expand({count, width});
  const at::Tensor mirrored = at::randint(2, {count, 1}, integers).to(at::kBool);
  const at::Tensor shifted =
      at::where(mirrored, width - 1 - columns, columns) + at::randint(2 * margin + 1, {count, 1}, integers);
  const at::Tensor bordered = at::constant_pad_nd(pixels, {margin, margin, margin, margin});
  const at::Tensor image = at::arange(count, integers).view({count, 1, 1});
  return bordered.index({image, rows.unsqueeze(2), shifted.unsqueeze(1)});
}

double one_cycle(double peak, int64_t step, int64_t steps) {
  constexpr double rising = 0.3;
  const double position = (static_cast<double>(step) + 1.0) / static_cast<double>(steps);
  if (position < rising) return peak * position / rising;
  return peak * 0.5 * (1.0 + std::cos(std::numbers::pi * (position - rising) / (1.0 - rising)));
}

double seconds() { return std::chrono::duration<double>(std::chrono::steady_clock::now().time_since_epoch()).count(); }

}  // namespace

void train(ResNet& model, torch::optim::SGD& optimizer, const Images& images, const Schedule& schedule) {
  const int64_t count = images.pixels.size(0);
  const int64_t batch = std::min(schedule.batch, count);
  const int64_t steps = count / batch;
  for (int64_t epoch = 0; epoch < schedule.epochs; ++epoch) {
    model->train();
    Progress progress(fmt::format("{}, epoch {}/{}", schedule.label, epoch + 1, schedule.epochs), steps);
    const at::Tensor order = at::randperm(count, images.labels.options());
    at::Tensor total = at::zeros({}, images.pixels.options().dtype(at::kFloat));
    double mean_loss = 0.0;
    for (int64_t step = 0; step < steps; ++step) {
      for (torch::optim::OptimizerParamGroup& group : optimizer.param_groups()) {
        group.options().set_lr(one_cycle(schedule.peak_lr, epoch * steps + step, schedule.epochs * steps));
      }
      const at::Tensor chosen = order.narrow(0, step * batch, batch);
      const at::Tensor scores = model->forward(normalized(augmented(images.pixels.index_select(0, chosen))));
      const at::Tensor loss = at::cross_entropy_loss(scores, images.labels.index_select(0, chosen));
      optimizer.zero_grad();
      loss.backward();
      optimizer.step();
      total += loss.detach();
      if (step % 10 == 9 || step + 1 == steps) {
        mean_loss = total.item<double>() / static_cast<double>(step + 1);
        if (!std::isfinite(mean_loss)) {
          throw std::runtime_error(fmt::format("{}: the loss is not finite in epoch {}, step {}: lower --lr",
                                               schedule.label, epoch + 1, step + 1));
        }
      }
      progress.update(step + 1, fmt::format("loss {:.3f}", mean_loss));
    }
  }
}

double accuracy(ResNet& model, const Images& images, int64_t batch) {
  const torch::NoGradGuard no_grad;
  model->eval();
  at::Tensor correct = at::zeros({}, images.labels.options());
  for (int64_t start = 0; start < images.labels.size(0); start += batch) {
    const int64_t length = std::min(batch, images.labels.size(0) - start);
    const at::Tensor scores = model->forward(normalized(images.pixels.narrow(0, start, length)));
    correct += scores.argmax(1).eq(images.labels.narrow(0, start, length)).sum();
  }
  return 100.0 * correct.item<double>() / static_cast<double>(images.labels.size(0));
}

cctorch::collaborative::NextLoss losses(ResNet& model, const Images& images, int64_t batch) {
  const int64_t count = images.labels.size(0);
  const auto progress = std::make_shared<Progress>("gradients", (count + batch - 1) / batch);
  return [=, start = int64_t{0}]() mutable -> std::optional<cctorch::collaborative::BatchLoss> {
    if (start > 0) progress->update((start + batch - 1) / batch);
    if (start >= count) return std::nullopt;
    const int64_t length = std::min(batch, count - start);
    const at::Tensor scores = model->forward(normalized(images.pixels.narrow(0, start, length)));
    const at::Tensor loss = at::cross_entropy_loss(scores, images.labels.narrow(0, start, length));
    start += length;
    return cctorch::collaborative::BatchLoss{loss, length};
  };
}

void reestimate(ResNet& model, const Images& images, int64_t batch, int64_t limit) {
  const int64_t count = std::min(limit, images.pixels.size(0));
  cctorch::reestimate_batch_norm(*model, [&, start = int64_t{0}]() mutable {
    if (start >= count) return false;
    model->forward(normalized(images.pixels.narrow(0, start, std::min(batch, count - start))));
    start += batch;
    return true;
  });
}

double latency(ResNet& model, const Images& images, int64_t batch) {
  const torch::NoGradGuard no_grad;
  model->eval();
  const at::Tensor x = normalized(images.pixels.narrow(0, 0, std::min(batch, images.pixels.size(0))));
  std::vector<double> times;
  constexpr int warm_up = 3, repeats = 15;
  for (int i = 0; i < warm_up + repeats; ++i) {
    const double start = seconds();
    model->forward(x);
    if (x.is_cuda()) torch::cuda::synchronize();
    if (i >= warm_up) times.push_back(seconds() - start);
  }
  std::nth_element(times.begin(), times.begin() + repeats / 2, times.end());
  return times[repeats / 2];
}

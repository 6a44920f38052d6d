#include "training.h"

#include <fmt/format.h>
#include <torch/cuda.h>
#include <torch/types.h>
#include <torch/utils.h>

#include <algorithm>
#include <chrono>
#include <cmath>
#include <memory>
#include <numbers>
#include <optional>
#include <stdexcept>
#include <string>
#include <vector>

#include "progress.h"

namespace {

constexpr double pixel_mean = 0.2860, pixel_deviation = 0.3530;
constexpr int64_t margin = 2;

// In the model's type; channels_last is the layout that CPU convolutions are fastest in.
at::Tensor normalized(const ResNet& model, const at::Tensor& pixels) {
  const at::Tensor scaled = (pixels.to(model->parameters().front().scalar_type()) / 255 - pixel_mean) / pixel_deviation;
  return scaled.unsqueeze(1).contiguous(at::MemoryFormat::ChannelsLast);
}

// How each image of a batch is moved, by up to `margin` pixels over a black border, and in half of the cases mirrored.
struct Augmentation {
  at::Tensor rows, columns, mirrored;

  // Drawn for the whole batch on every rank, so that it does not depend on their number.
  static Augmentation draw(int64_t images, const at::TensorOptions& options) {
    const auto integers = options.dtype(at::kLong);
    return {at::randint(2 * margin + 1, {images, 1}, integers), at::randint(2 * margin + 1, {images, 1}, integers),
            at::randint(2, {images, 1}, integers).to(at::kBool)};
  }

  Augmentation narrow(int64_t begin, int64_t length) const {
    return {rows.narrow(0, begin, length), columns.narrow(0, begin, length), mirrored.narrow(0, begin, length)};
  }
};

at::Tensor augmented(const at::Tensor& pixels, const Augmentation& moved) {
  const int64_t count = pixels.size(0), height = pixels.size(1), width = pixels.size(2);
  const auto integers = pixels.options().dtype(at::kLong);
  const at::Tensor rows = at::arange(height, integers) + moved.rows;
  const at::Tensor columns = at::arange(width, integers).expand({count, width});
  const at::Tensor shifted = at::where(moved.mirrored, width - 1 - columns, columns) + moved.columns;
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

Images slice(const Images& images, const Ranks& ranks) {
  const auto [begin, length] = ranks.slice(images.labels.size(0));
  return {images.pixels.narrow(0, begin, length), images.labels.narrow(0, begin, length)};
}

// Of one step: forward and backward pass over this rank's slice of the batch. Returns its part of the mean loss.
at::Tensor pass(ResNet& model, cctorch::distributed::DataParallel& parallel, const Images& images,
                const at::Tensor& chosen, const Ranks& ranks) {
  const int64_t batch = chosen.size(0);
  const auto [begin, length] = ranks.slice(batch);
  const at::Tensor own = chosen.narrow(0, begin, length);
  const auto moved = Augmentation::draw(batch, images.pixels.options()).narrow(begin, length);
  const at::Tensor scores = model->forward(normalized(model, augmented(images.pixels.index_select(0, own), moved)));
  const at::Tensor loss =
      length > 0 ? at::cross_entropy_loss(scores, images.labels.index_select(0, own)) : scores.sum();
  const double share = static_cast<double>(length) / static_cast<double>(batch);
  parallel.backward(loss, share);
  return loss.detach() * share;
}

double train_epoch(ResNet& model, torch::optim::SGD& optimizer, const Images& images, const Schedule& schedule,
                   int64_t epoch, const Ranks& ranks) {
  const int64_t count = images.pixels.size(0);
  const int64_t batch = std::min(schedule.batch, count);
  const int64_t steps = count / batch;
  torch::manual_seed(schedule.seed + static_cast<uint64_t>(epoch));
  // Of this epoch alone: after its first step it adds up in another order, which three ranks or more can see, and an
  // epoch that a run goes on with has to be what it would have been.
  cctorch::distributed::DataParallel parallel(*model, ranks);
  model->train();
  Progress progress(fmt::format("{}, epoch {}/{}", schedule.label, epoch + 1, schedule.epochs), steps);
  const at::Tensor order = at::randperm(count, images.labels.options());
  at::Tensor total = at::zeros({}, images.pixels.options().dtype(at::kDouble));
  double mean_loss = 0.0;
  for (int64_t step = 0; step < steps; ++step) {
    for (torch::optim::OptimizerParamGroup& group : optimizer.param_groups()) {
      group.options().set_lr(one_cycle(schedule.peak_lr, epoch * steps + step, schedule.epochs * steps));
    }
    optimizer.zero_grad();
    total += pass(model, parallel, images, order.narrow(0, step * batch, batch), ranks);
    optimizer.step();
    if (step % 10 == 9 || step + 1 == steps) {
      mean_loss = ranks.gather(total).sum().item<double>() / static_cast<double>(step + 1);
      if (!std::isfinite(mean_loss)) {
        throw std::runtime_error(fmt::format("{}: the loss is not finite in epoch {}, step {}: lower --lr",
                                             schedule.label, epoch + 1, step + 1));
      }
    }
    progress.update(step + 1, fmt::format("loss {:.3f}", mean_loss));
  }
  return mean_loss;
}

}  // namespace

void train(ResNet& model, torch::optim::SGD& optimizer, const Images& images, const Schedule& schedule, int64_t done,
           const Ranks& ranks, const std::function<void(double)>& after_epoch) {
  for (int64_t epoch = done; epoch < schedule.epochs; ++epoch) {
    after_epoch(train_epoch(model, optimizer, images, schedule, epoch, ranks));
  }
}

double accuracy(ResNet& model, const Images& images, int64_t batch, const Ranks& ranks) {
  const torch::NoGradGuard no_grad;
  model->eval();
  const auto [pixels, labels] = slice(images, ranks);
  at::Tensor correct = at::zeros({}, labels.options());
  for (int64_t start = 0; start < labels.size(0); start += batch) {
    const int64_t length = std::min(batch, labels.size(0) - start);
    const at::Tensor scores = model->forward(normalized(model, pixels.narrow(0, start, length)));
    correct += scores.argmax(1).eq(labels.narrow(0, start, length)).sum();
  }
  return 100.0 * ranks.gather(correct).sum().item<double>() / static_cast<double>(images.labels.size(0));
}

cctorch::collaborative::NextLoss losses(ResNet& model, const Images& images, int64_t batch, const Ranks& ranks) {
  const Images own = slice(images, ranks);
  const int64_t count = own.labels.size(0);
  const auto progress = std::make_shared<Progress>("gradients", (count + batch - 1) / batch);
  return [=, start = int64_t{0}]() mutable -> std::optional<cctorch::collaborative::BatchLoss> {
    if (start > 0) progress->update((start + batch - 1) / batch);
    if (start >= count) return std::nullopt;
    const int64_t length = std::min(batch, count - start);
    const at::Tensor scores = model->forward(normalized(model, own.pixels.narrow(0, start, length)));
    const at::Tensor loss = at::cross_entropy_loss(scores, own.labels.narrow(0, start, length));
    start += length;
    return cctorch::collaborative::BatchLoss{loss, length};
  };
}

void reestimate(ResNet& model, const Images& images, int64_t batch, int64_t limit, const Ranks& ranks) {
  const int64_t count = std::min(limit, images.pixels.size(0));
  const auto next = [&, start = int64_t{0}]() mutable {
    if (start >= count) return false;
    const auto [begin, length] = ranks.slice(std::min(batch, count - start));
    model->forward(normalized(model, images.pixels.narrow(0, start + begin, length)));
    start += batch;
    return true;
  };
  cctorch::reestimate_batch_norm(*model, next, ranks);
}

void repair(ResNet& model, ResNet& dense, const cctorch::CompressionPlan& plan, const Images& images, int64_t batch,
            int64_t limit, const Ranks& ranks) {
  const int64_t count = std::min(limit, images.pixels.size(0));
  const auto [begin, length] = ranks.slice(count);
  const at::Tensor pixels = images.pixels.narrow(0, begin, length);
  const auto next = [&, start = int64_t{0}]() mutable {
    if (start >= length) return false;
    dense->forward(normalized(dense, pixels.narrow(0, start, std::min(batch, length - start))));
    start += batch;
    return true;
  };
  const auto forward = [&] { model->forward(normalized(model, pixels)); };
  const auto repaired = cctorch::repair::repair(*model, forward, *dense, next, plan, length, {}, ranks);
  for (const std::string& warning : repaired.warnings) fmt::print("warning: {}\n", warning);
}

double latency(ResNet& model, const Images& images, int64_t batch) {
  const torch::NoGradGuard no_grad;
  model->eval();
  const at::Tensor x = normalized(model, images.pixels.narrow(0, 0, std::min(batch, images.pixels.size(0))));
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

#include <cctorch/cctorch.h>
#include <fmt/format.h>
#include <torch/cuda.h>
#include <torch/serialize.h>
#include <torch/utils.h>

#include <cstdint>
#include <exception>
#include <filesystem>
#include <fstream>
#include <iterator>
#include <stdexcept>
#include <string>
#include <vector>

#include "fashion_mnist.h"
#include "options.h"
#include "progress.h"
#include "resnet.h"
#include "training.h"

namespace fs = std::filesystem;

namespace {

constexpr int64_t classes = 10;

struct Measurements {
  double top1 = 0.0, latency_1 = 0.0, latency_128 = 0.0;
  int64_t parameters = 0, macs = 0, bytes = 0;
};

at::Device choose_device(const std::string& name) {
  const bool available = torch::cuda::is_available();
  if (name == "cuda" && !available)
    throw std::invalid_argument("--device cuda: no GPU can be used, expected auto or cpu");
  return name == "cpu" || !available ? at::Device(at::kCPU) : at::Device(at::kCUDA);
}

void to_channels_last(ResNet& model) {
  for (at::Tensor& parameter : model->parameters()) {
    if (parameter.dim() == 4) parameter.set_data(parameter.contiguous(at::MemoryFormat::ChannelsLast));
  }
}

ResNet new_model(const Options& options, const at::Device& device) {
  ResNet model(options.blocks, classes);
  model->to(device);
  to_channels_last(model);
  return model;
}

FashionMnist load_data(const Options& options, const at::Device& device) {
  std::string folder = options.data;
  if (options.synthetic) {
    folder = (fs::path(options.out) / "synthetic").string();
    write_synthetic(folder, 1280, 640);
  }
  FashionMnist data = read_fashion_mnist(folder, options.limit);
  for (Images* images : {&data.train, &data.test}) {
    images->pixels = images->pixels.to(device);
    images->labels = images->labels.to(device);
  }
  return data;
}

Measurements measure(ResNet& model, const Images& images, int64_t macs, const fs::path& checkpoint) {
  torch::save(model, checkpoint.string());
  Measurements measured{.top1 = accuracy(model, images, 256),
                        .latency_1 = latency(model, images, 1),
                        .latency_128 = latency(model, images, 128),
                        .macs = macs,
                        .bytes = static_cast<int64_t>(fs::file_size(checkpoint))};
  for (const at::Tensor& parameter : model->parameters()) measured.parameters += parameter.numel();
  return measured;
}

struct Search {
  cctorch::CompressionPlan plan;
  int64_t nominal_macs = 0;
};

Search search(ResNet& model, const Images& images, const std::vector<cctorch::LayerSpec>& specs,
              const Options& options) {
  const auto layers = cctorch::collaborative::mean_gradients(*model, cctorch::collaborative::participants(specs),
                                                             losses(model, images, options.batch));
  cctorch::collaborative::Options solver;
  solver.target = options.target;
  const auto graph = model->channel_graph();
  const cctorch::collaborative::Search search(layers, cctorch::dense_macs(specs), solver);
  auto solution = search.at_final(options.target, specs, graph);
  for (const std::string& warning : solution.warnings) fmt::print("warning: {}\n", warning);
  fmt::print("search: rate optimization {:.2f} s, heuristic {:.2f} s\n", solution.curve_seconds,
             solution.heuristic_seconds);
  const int64_t nominal_macs = cctorch::nominal_macs(specs, solution.plan);
  graph.resolve(solution.plan);
  cctorch::drop_idle_ranks(specs, solution.plan);
  return {std::move(solution.plan), nominal_macs};
}

void check_target(int64_t dense_macs, int64_t final_macs, double target) {
  const double removed = 1.0 - static_cast<double>(final_macs) / static_cast<double>(dense_macs);
  if (removed >= target - 0.01) return;
  throw std::runtime_error(
      fmt::format("the plan removes {:.1f} % of the multiply-accumulates, expected {:.1f} %: lower "
                  "--target",
                  100 * removed, 100 * target));
}

void write_text(const fs::path& path, const std::string& text) {
  const fs::path partial = path.string() + ".part";
  std::ofstream(partial) << text;
  if (!fs::exists(partial) || fs::file_size(partial) != text.size()) {
    throw std::runtime_error(fmt::format("{}: cannot be written; is the disk full?", path.string()));
  }
  fs::rename(partial, path);
}

// The two files are all that is needed: a fresh dense network, the plan, the tensors.
double reloaded_accuracy(const Options& options, const at::Device& device, const Images& images) {
  std::ifstream file(fs::path(options.out) / "plan.json");
  const std::string json{std::istreambuf_iterator<char>(file), {}};
  ResNet model = new_model(options, device);
  cctorch::apply(*model, cctorch::CompressionPlan::from_json(json));
  torch::load(model, (fs::path(options.out) / "compressed.pt").string(), device);
  to_channels_last(model);
  return accuracy(model, images, 256);
}

void print_table(const Measurements& before, const Measurements& after, double uncorrected, double reestimated) {
  const auto row = [](const char* name, double from, double to, int digits) {
    fmt::print("{:<24} {:>12.{}f} {:>12.{}f} {:>8.2f}\n", name, from, digits, to, digits, to / from);
  };
  fmt::print("\n{:<24} {:>12} {:>12} {:>8}\n", "", "before", "after", "ratio");
  row("top-1 [%]", before.top1, after.top1, 2);
  row("parameters [k]", 1e-3 * before.parameters, 1e-3 * after.parameters, 1);
  row("MACs [M]", 1e-6 * before.macs, 1e-6 * after.macs, 2);
  row("size on disk [kB]", 1e-3 * before.bytes, 1e-3 * after.bytes, 1);
  row("latency, batch 1 [ms]", 1e3 * before.latency_1, 1e3 * after.latency_1, 2);
  row("latency, batch 128 [ms]", 1e3 * before.latency_128, 1e3 * after.latency_128, 2);
  fmt::print("top-1 right after compression: {:.2f} %, {:.2f} % with BatchNorm re-estimated\n", uncorrected,
             reestimated);
}

void run(const Options& options) {
  const at::Device device = choose_device(options.device);
  const fs::path out = options.out;
  fs::create_directories(out);
  torch::manual_seed(options.seed);
  const FashionMnist data = load_data(options, device);
  ResNet model = new_model(options, device);
  fmt::print("ResNet-{} on {}: {} training images, {} test images\n", 6 * options.blocks + 2, device.str(),
             data.train.labels.size(0), data.test.labels.size(0));

  torch::optim::SGD optimizer(model->parameters(),
                              torch::optim::SGDOptions(options.lr).momentum(0.9).nesterov(true).weight_decay(5e-4));
  train(model, optimizer, data.train, {"training", options.epochs, options.batch, options.lr});

  const auto specs = cctorch::layer_specs(
      *model, [&] { accuracy(model, {data.test.pixels.narrow(0, 0, 1), data.test.labels.narrow(0, 0, 1)}, 1); });
  const Measurements before = measure(model, data.test, cctorch::dense_macs(specs), out / "dense.pt");

  const auto [plan, nominal_macs] = search(model, data.train, specs, options);
  check_target(before.macs, cctorch::final_macs(specs, plan), options.target);
  cctorch::apply(*model, plan, &optimizer);
  const double uncorrected = accuracy(model, data.test, 256);
  reestimate(model, data.train, options.batch, 4000);
  const double reestimated = accuracy(model, data.test, 256);
  train(model, optimizer, data.train, {"fine-tuning", options.finetune_epochs, options.batch, 0.5 * options.lr});

  const Measurements after = measure(model, data.test, cctorch::final_macs(specs, plan), out / "compressed.pt");
  write_text(out / "plan.json", plan.to_json());
  const double reloaded = reloaded_accuracy(options, device, data.test);
  if (reloaded != after.top1) {
    throw std::runtime_error(
        fmt::format("reloaded from {}: top-1 {} %, expected {} %", out.string(), reloaded, after.top1));
  }
  write_text(out / "summary.json",
             fmt::format("{{\"top1_before\": {}, \"top1_compressed\": {}, \"top1_reestimated\": "
                         "{}, \"top1_after\": {}, \"macs_before\": {}, "
                         "\"macs_nominal\": {}, \"macs_after\": {}}}\n",
                         before.top1, uncorrected, reestimated, after.top1, before.macs, nominal_macs, after.macs));
  print_table(before, after, uncorrected, reestimated);
  fmt::print("written to {}: plan.json, dense.pt, compressed.pt (reloaded: same top-1), summary.json\n", out.string());
}

}  // namespace

int main(int argc, char** argv) {
  cctorch::keep_freed_memory();
  try {
    const Options options = parse_options({argv + 1, argv + argc});
    if (options.help) {
      fmt::print("{}", help_text());
    } else {
      run(options);
    }
    return 0;
  } catch (const std::invalid_argument& error) {
    fmt::print(stderr, "train_resnet: {}\n", error.what());
    return 2;
  } catch (const c10::Error& error) {
    fmt::print(stderr, "train_resnet: {}\n", error.what_without_backtrace());
  } catch (const std::exception& error) {
    fmt::print(stderr, "train_resnet: {}\n", error.what());
  }
  return 1;
}

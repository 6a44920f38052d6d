#include <cctorch/cctorch.h>
#include <fmt/format.h>
#include <fmt/ranges.h>
#include <torch/cuda.h>
#include <torch/serialize.h>
#include <torch/utils.h>

#include <cstdint>
#include <cstdio>
#include <cstdlib>
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

// Where torchrun starts several processes on a machine, each has a GPU of its own.
at::Device choose_device(const std::string& name) {
  const bool available = torch::cuda::is_available();
  if (name == "cuda" && !available)
    throw std::invalid_argument("--device cuda: no GPU can be used, expected auto or cpu");
  if (name == "cpu" || !available) return at::kCPU;
  const char* const local_rank = std::getenv("LOCAL_RANK");
  const int index = local_rank ? std::atoi(local_rank) : 0;
  if (index >= static_cast<int>(torch::cuda::device_count())) {
    throw std::invalid_argument(
        fmt::format("torchrun --nproc-per-node: rank {} of this machine has no GPU, expected at most {} processes, or "
                    "--device cpu",
                    index, torch::cuda::device_count()));
  }
  return {at::kCUDA, static_cast<at::DeviceIndex>(index)};
}

void to_channels_last(ResNet& model) {
  for (at::Tensor& parameter : model->parameters()) {
    if (parameter.dim() == 4) parameter.set_data(parameter.contiguous(at::MemoryFormat::ChannelsLast));
  }
}

ResNet new_model(const Options& options, const at::Device& device) {
  ResNet model(options.blocks, classes);
  model->to(device, options.float64 ? at::kDouble : at::kFloat);
  to_channels_last(model);
  return model;
}

FashionMnist load_data(const Options& options, const at::Device& device, const Ranks& ranks) {
  const std::string folder = ranks.on_main([&] {
    if (!options.synthetic) return options.data;
    const std::string synthetic = (fs::path(options.out) / "synthetic").string();
    write_synthetic(synthetic, 1280, 640);
    return synthetic;
  });
  FashionMnist data = read_fashion_mnist(folder, options.limit);
  for (Images* images : {&data.train, &data.test}) {
    images->pixels = images->pixels.to(device);
    images->labels = images->labels.to(device);
  }
  return data;
}

// Rank 0 writes and takes the times; the accuracy is over all ranks.
Measurements measure(ResNet& model, const Images& images, int64_t macs, const fs::path& checkpoint,
                     const Ranks& ranks) {
  Measurements measured{.top1 = accuracy(model, images, 256, ranks), .macs = macs};
  for (const at::Tensor& parameter : model->parameters()) measured.parameters += parameter.numel();
  ranks.on_main([&] {
    torch::save(model, checkpoint.string());
    measured.bytes = static_cast<int64_t>(fs::file_size(checkpoint));
    measured.latency_1 = latency(model, images, 1);
    measured.latency_128 = latency(model, images, 128);
    return "";
  });
  return measured;
}

struct Search {
  cctorch::CompressionPlan plan;
  int64_t nominal_macs = 0;
};

Search solve(const std::vector<cctorch::collaborative::Layer>& layers, const cctorch::ChannelGraph& graph,
             const std::vector<cctorch::LayerSpec>& specs, const Options& options) {
  cctorch::collaborative::Options solver;
  solver.target = options.target;
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

// The gradients are those over all ranks; rank 0 searches, and all get its plan.
Search search(ResNet& model, const Images& images, const std::vector<cctorch::LayerSpec>& specs, const Options& options,
              const Ranks& ranks) {
  const auto layers = cctorch::collaborative::mean_gradients(*model, cctorch::collaborative::participants(specs),
                                                             losses(model, images, options.batch, ranks), ranks);
  Search found;
  const std::string plan = ranks.on_main([&] {
    found = solve(layers, model->channel_graph(), specs, options);
    return found.plan.to_json();
  });
  found.plan = cctorch::CompressionPlan::from_json(plan);
  return found;
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

// The two files are all that is needed: a fresh dense network, the plan, the tensors. Rank 0 has them.
double reloaded_accuracy(const Options& options, const at::Device& device, const Images& images, const Ranks& ranks) {
  const std::string json = ranks.on_main([&] {
    std::ifstream file(fs::path(options.out) / "plan.json");
    return std::string{std::istreambuf_iterator<char>(file), {}};
  });
  ResNet model = new_model(options, device);
  cctorch::apply(*model, cctorch::CompressionPlan::from_json(json));
  ranks.on_main([&] {
    torch::load(model, (fs::path(options.out) / "compressed.pt").string(), device);
    to_channels_last(model);
    return "";
  });
  cctorch::distributed::broadcast_state(*model, ranks);
  return accuracy(model, images, 256, ranks);
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

void write_results(const fs::path& out, const cctorch::CompressionPlan& plan, const std::string& summary) {
  write_text(out / "plan.json", plan.to_json());
  write_text(out / "summary.json", summary);
}

void run(const Options& options, const at::Device& device, const Ranks& ranks) {
  const fs::path out = options.out;
  torch::manual_seed(options.seed);
  const FashionMnist data = load_data(options, device, ranks);
  // Anew: making data has drawn random numbers on rank 0 alone.
  torch::manual_seed(options.seed);
  ResNet model = new_model(options, device);
  model->synchronize(ranks);
  fmt::print("ResNet-{} on {}, {} rank(s): {} training images, {} test images\n", 6 * options.blocks + 2, device.str(),
             ranks.count(), data.train.labels.size(0), data.test.labels.size(0));

  torch::optim::SGD optimizer(model->parameters(),
                              torch::optim::SGDOptions(options.lr).momentum(0.9).nesterov(true).weight_decay(5e-4));
  auto epochs = train(model, optimizer, data.train, {"training", options.epochs, options.batch, options.lr}, ranks);

  const auto specs = cctorch::layer_specs(
      *model, [&] { accuracy(model, {data.test.pixels.narrow(0, 0, 1), data.test.labels.narrow(0, 0, 1)}, 1, {}); });
  const Measurements before = measure(model, data.test, cctorch::dense_macs(specs), out / "dense.pt", ranks);

  const auto [plan, nominal_macs] = search(model, data.train, specs, options, ranks);
  check_target(before.macs, cctorch::final_macs(specs, plan), options.target);
  cctorch::apply(*model, plan, &optimizer);
  cctorch::distributed::assert_identical("the compressed layers", *model, ranks);
  const double uncorrected = accuracy(model, data.test, 256, ranks);
  reestimate(model, data.train, options.batch, 4000, ranks);
  const double reestimated = accuracy(model, data.test, 256, ranks);
  const auto finetuned = train(model, optimizer, data.train,
                               {"fine-tuning", options.finetune_epochs, options.batch, 0.5 * options.lr}, ranks);
  epochs.insert(epochs.end(), finetuned.begin(), finetuned.end());

  const Measurements after = measure(model, data.test, cctorch::final_macs(specs, plan), out / "compressed.pt", ranks);
  const std::string summary = fmt::format(
      "{{\"top1_before\": {}, \"top1_compressed\": {}, \"top1_reestimated\": {}, \"top1_after\": {}, "
      "\"macs_before\": {}, \"macs_nominal\": {}, \"macs_after\": {}, \"losses\": [{}]}}\n",
      before.top1, uncorrected, reestimated, after.top1, before.macs, nominal_macs, after.macs,
      fmt::join(epochs, ", "));
  ranks.on_main([&, &plan = plan] {
    write_results(out, plan, summary);
    return "";
  });
  const double reloaded = reloaded_accuracy(options, device, data.test, ranks);
  if (reloaded != after.top1) {
    throw std::runtime_error(
        fmt::format("reloaded from {}: top-1 {} %, expected {} %", out.string(), reloaded, after.top1));
  }
  print_table(before, after, uncorrected, reestimated);
  fmt::print("written to {}: plan.json, dense.pt, compressed.pt (reloaded: same top-1), summary.json\n", out.string());
}

// Rank 0 alone writes the files and the progress.
void run_on_ranks(const Options& options, Ranks& ranks) {
  const at::Device device = choose_device(options.device);
  ranks = Ranks::from_environment(device);
  if (!ranks.is_main() && std::freopen("/dev/null", "w", stdout) == nullptr)
    throw std::runtime_error("/dev/null: cannot be written");
  ranks.on_main([&] {
    fs::create_directories(options.out);
    return "";
  });
  run(options, device, ranks);
}

}  // namespace

int main(int argc, char** argv) {
  cctorch::keep_freed_memory();
  // Outlives an error: a process group that ends waits for the others, which wait for what this rank will never send.
  Ranks ranks;
  int code = 1;
  try {
    const Options options = parse_options({argv + 1, argv + argc});
    if (options.help) {
      fmt::print("{}", help_text());
    } else {
      run_on_ranks(options, ranks);
    }
    return 0;
  } catch (const std::invalid_argument& error) {
    fmt::print(stderr, "train_resnet: {}\n", error.what());
    code = 2;
  } catch (const c10::Error& error) {
    fmt::print(stderr, "train_resnet: {}\n", error.what_without_backtrace());
  } catch (const std::exception& error) {
    fmt::print(stderr, "train_resnet: {}\n", error.what());
  }
  if (ranks.count() == 1) return code;
  std::fflush(nullptr);
  std::_Exit(code);
}

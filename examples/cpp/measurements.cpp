#include "measurements.h"

#include <fmt/format.h>

#include "files.h"

Measurements measure(ResNet& model, const Images& images, int64_t macs, const cctorch::Safetensors::Tensors& state,
                     const std::filesystem::path& file, const Ranks& ranks) {
  Measurements measured{.top1 = accuracy(model, images, 256, ranks), .macs = macs};
  for (const at::Tensor& parameter : model->parameters()) measured.parameters += parameter.numel();
  ranks.on_main([&] {
    const std::string bytes = cctorch::to_safetensors({.tensors = state, .metadata = {}});
    write_file(file, bytes);
    measured.bytes = static_cast<int64_t>(bytes.size());
    measured.latency_1 = latency(model, images, 1);
    measured.latency_128 = latency(model, images, 128);
    return "";
  });
  return measured;
}

void print_table(const Measurements& before, const Measurements& after) {
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
}

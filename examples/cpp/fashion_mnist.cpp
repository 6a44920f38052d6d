#include "fashion_mnist.h"

#include <ATen/ATen.h>
#include <fmt/format.h>

#include <algorithm>
#include <cstdio>
#include <cstring>
#include <filesystem>
#include <memory>
#include <stdexcept>
#include <vector>

#include "files.h"

namespace {

namespace fs = std::filesystem;

constexpr const char* debian_folder = "/usr/share/datasets/fashion-mnist";
constexpr int64_t side = 28;
constexpr int64_t classes = 10;

std::string quoted(const fs::path& path) {
  std::string text = "'";
  for (const char c : path.string()) text += c == '\'' ? std::string("'\\''") : std::string(1, c);
  return text + "'";
}

std::string read_bytes(const fs::path& path) {
  const bool packed = path.extension() == ".gz";
  const std::string command = (packed ? "gzip -dc -- " : "cat -- ") + quoted(path);
  FILE* const pipe = popen(command.c_str(), "r");
  if (pipe == nullptr)
    throw std::runtime_error(fmt::format("{}: cannot run gzip: {}", path.string(), std::strerror(errno)));
  std::string bytes;
  std::vector<char> block(1 << 20);
  for (size_t got; (got = std::fread(block.data(), 1, block.size(), pipe)) > 0;) bytes.append(block.data(), got);
  if (pclose(pipe) != 0) throw std::runtime_error(fmt::format("{}: cannot be read; download it again", path.string()));
  return bytes;
}

int64_t big_endian(const std::string& bytes, size_t offset) {
  int64_t value = 0;
  for (size_t i = 0; i < 4; ++i) value = value << 8 | static_cast<unsigned char>(bytes[offset + i]);
  return value;
}

// The idx format: 0, 0, element type (8: uint8), number of dimensions, each size as 32 bits big-endian, then the
// elements.
at::Tensor read_idx(const fs::path& folder, const std::string& name, int64_t dimensions) {
  fs::path path = folder / name;
  if (!fs::exists(path)) path = folder / (name + ".gz");
  if (!fs::exists(path)) {
    throw std::runtime_error(fmt::format(
        "{}: no such file, with or without .gz; install Debian's dataset-fashion-mnist (apt install "
        "dataset-fashion-mnist), or download the four files from https://github.com/zalandoresearch/fashion-mnist into "
        "a folder and name it with --data",
        path.string()));
  }
  const std::string bytes = read_bytes(path);
  const size_t header = 4 + 4 * static_cast<size_t>(dimensions);
  if (bytes.size() < header || bytes[0] != 0 || bytes[1] != 0 || bytes[2] != 8 || bytes[3] != dimensions) {
    throw std::runtime_error(fmt::format("{}: not an idx file of {} dimensions of uint8", path.string(), dimensions));
  }
  const int64_t count = big_endian(bytes, 4);
  std::vector<int64_t> sizes = {count};
  for (int64_t d = 1; d < dimensions; ++d) {
    sizes.push_back(big_endian(bytes, 4 + 4 * static_cast<size_t>(d)));
    if (sizes.back() != side) {
      throw std::runtime_error(
          fmt::format("{}: images of another size than {} x {}, those of Fashion-MNIST: download "
                      "it again, or name another folder with --data",
                      path.string(), side, side));
    }
  }
  const int64_t elements = dimensions == 1 ? count : count * side * side;
  if (bytes.size() != header + static_cast<size_t>(elements)) {
    throw std::runtime_error(fmt::format("{}: {} bytes, expected {}: the file is truncated, download it again",
                                         path.string(), bytes.size(), header + static_cast<size_t>(elements)));
  }
  at::Tensor tensor = at::empty(sizes, at::kByte);
  std::memcpy(tensor.data_ptr(), bytes.data() + header, static_cast<size_t>(elements));
  return tensor;
}

Images read_set(const fs::path& folder, const std::string& set, int64_t limit) {
  Images images{read_idx(folder, set + "-images-idx3-ubyte", 3), read_idx(folder, set + "-labels-idx1-ubyte", 1)};
  if (images.pixels.size(0) != images.labels.size(0) || images.pixels.size(0) == 0) {
    throw std::runtime_error(fmt::format("{}: {} {} images, but {} labels", folder.string(), images.pixels.size(0), set,
                                         images.labels.size(0)));
  }
  // A GPU would end the process at one that has no score.
  if (const int64_t largest = images.labels.max().item<int64_t>(); largest >= classes) {
    throw std::runtime_error(fmt::format("{}: a {} label is {}, expected 0 to {}: download the labels again",
                                         folder.string(), set, largest, classes - 1));
  }
  const int64_t count = limit > 0 ? std::min(limit, images.pixels.size(0)) : images.pixels.size(0);
  return {images.pixels.narrow(0, 0, count), images.labels.narrow(0, 0, count).to(at::kLong)};
}

void write_idx(const fs::path& path, const at::Tensor& tensor) {
  std::string bytes = {0, 0, 8, static_cast<char>(tensor.dim())};
  for (const int64_t size : tensor.sizes()) {
    for (int shift = 24; shift >= 0; shift -= 8) bytes.push_back(static_cast<char>(size >> shift & 0xff));
  }
  const at::Tensor elements = tensor.contiguous();
  bytes.append(static_cast<const char*>(elements.data_ptr()), static_cast<size_t>(elements.numel()));
  write_file(path, bytes);
}

void write_synthetic_set(const fs::path& folder, const std::string& set, int64_t count, const at::Tensor& patterns) {
  const at::Tensor labels = at::randint(classes, {count}, at::kLong);
  const at::Tensor noise = at::randn({count, side, side}) * 40;
  const at::Tensor pixels = (patterns.index_select(0, labels) + noise).clamp(0, 255).to(at::kByte);
  write_idx(folder / (set + "-images-idx3-ubyte"), pixels);
  write_idx(folder / (set + "-labels-idx1-ubyte"), labels.to(at::kByte));
}

}  // namespace

FashionMnist read_fashion_mnist(const std::string& folder, int64_t limit) {
  const fs::path path = folder.empty() ? fs::path(debian_folder) : fs::path(folder);
  return {read_set(path, "train", limit), read_set(path, "t10k", limit)};
}

void write_synthetic(const std::string& folder, int64_t train_images, int64_t test_images) {
  fs::create_directories(folder);
  const at::Tensor coarse = at::rand({classes, 1, 7, 7}) * 255;
  const at::Tensor patterns = at::upsample_nearest2d(coarse, {side, side}).squeeze(1);
  write_synthetic_set(folder, "train", train_images, patterns);
  write_synthetic_set(folder, "t10k", test_images, patterns);
}

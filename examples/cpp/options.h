#pragma once

#include <cstdint>
#include <map>
#include <string>
#include <vector>

struct Options {
  std::string data;  // empty: where Debian's dataset-fashion-mnist puts it
  std::string out = "runs/cpp";
  std::string device = "auto";
  std::string layout = "channel";
  int64_t epochs = 3;
  int64_t finetune_epochs = 2;
  int64_t bits = 0;  // of a weight in the end, 0 for float
  int64_t quantize_epochs = 1;
  int64_t blocks = 3;
  int64_t batch = 128;
  int64_t limit = 0;  // training and test images, 0 for all
  int64_t seed = 0;
  double target = 0.5;
  double lr = 0.1;
  bool float64 = false;
  bool synthetic = false;
  bool help = false;
};

// Throws std::invalid_argument naming the option, its value and what was expected.
Options parse_options(const std::vector<std::string>& arguments);

// Names and values of those that decide what comes out: all but --out and --help.
std::map<std::string, std::string> settings(const Options& options);

std::string help_text();

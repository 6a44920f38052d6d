#pragma once

#include <chrono>
#include <cstdint>
#include <string>

// "label  12/469  note  ETA 0:34": rewritten in place on a terminal, elsewhere a line every ten seconds and at the end.
class Progress {
 public:
  Progress(std::string label, int64_t total);
  void update(int64_t done, const std::string& note = "");

 private:
  using Clock = std::chrono::steady_clock;

  std::string label_;
  int64_t total_;
  bool terminal_;
  Clock::time_point start_, printed_;
};

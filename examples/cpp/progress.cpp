#include "progress.h"

#include <fmt/format.h>
#include <unistd.h>

#include <cstdio>
#include <utility>

namespace {

std::string minutes(double seconds) {
  const auto whole = static_cast<int64_t>(seconds + 0.5);
  return fmt::format("{}:{:02}", whole / 60, whole % 60);
}

}  // namespace

Progress::Progress(std::string label, int64_t total)
    : label_(std::move(label)),
      total_(total),
      terminal_(isatty(STDOUT_FILENO) == 1),
      start_(Clock::now()),
      printed_(start_) {}

void Progress::update(int64_t done, const std::string& note) {
  const auto now = Clock::now();
  const bool last = done >= total_;
  const double pause = terminal_ ? 0.2 : 10.0;
  if (!last && std::chrono::duration<double>(now - printed_).count() < pause) return;
  printed_ = now;
  const double elapsed = std::chrono::duration<double>(now - start_).count();
  const std::string time =
      last ? "took " + minutes(elapsed)
           : "ETA " + minutes(elapsed / static_cast<double>(done) * static_cast<double>(total_ - done));
  fmt::print("{}{:<22} {:>5}/{}  {}  {}{}", terminal_ ? "\r\x1b[K" : "", label_, done, total_, note, time,
             terminal_ && !last ? "" : "\n");
  std::fflush(stdout);
}

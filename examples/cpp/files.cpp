#include "files.h"

#include <fcntl.h>
#include <fmt/format.h>
#include <sys/file.h>
#include <unistd.h>

#include <cerrno>
#include <cstdio>
#include <cstring>
#include <fstream>
#include <iterator>
#include <stdexcept>
#include <system_error>

namespace fs = std::filesystem;

namespace {

bool write_all(int descriptor, std::string_view content) {
  while (!content.empty()) {
    const ssize_t written = ::write(descriptor, content.data(), content.size());
    if (written < 0 && errno == EINTR) continue;
    if (written < 0) return false;
    content.remove_prefix(static_cast<size_t>(written));
  }
  return ::fsync(descriptor) == 0;
}

bool sync_folder(const fs::path& folder) {
  const int descriptor = ::open(folder.c_str(), O_RDONLY | O_DIRECTORY);
  if (descriptor < 0) return false;
  const bool synced = ::fsync(descriptor) == 0;
  return ::close(descriptor) == 0 && synced;
}

}  // namespace

std::string read_file(const fs::path& path) {
  std::ifstream file;
  if (!fs::is_directory(path)) file.open(path, std::ios::binary);
  std::string content;
  if (file.is_open()) content.assign(std::istreambuf_iterator<char>(file), {});
  if (!file.is_open() || !file) throw std::runtime_error(fmt::format("{}: cannot be read", path.string()));
  return content;
}

void write_file(const fs::path& path, std::string_view content) {
  const fs::path partial = path.string() + ".part";
  const int descriptor = ::open(partial.c_str(), O_WRONLY | O_CREAT | O_TRUNC | O_CLOEXEC, 0666);
  bool written = descriptor >= 0 && write_all(descriptor, content);
  int error = errno;
  if (descriptor >= 0) written = ::close(descriptor) == 0 && written;
  if (written) {
    const fs::path folder = path.has_parent_path() ? path.parent_path() : fs::path(".");
    written = std::rename(partial.c_str(), path.c_str()) == 0 && sync_folder(folder);
    error = errno;
  }
  if (written) return;
  std::error_code ignored;
  fs::remove(partial, ignored);
  throw std::runtime_error(fmt::format("{}: {} bytes cannot be written: {}; free some space or name another --out",
                                       path.string(), content.size(), std::strerror(error)));
}

FolderLock::FolderLock(const fs::path& folder)
    : descriptor_(::open((folder / ".lock").c_str(), O_RDWR | O_CREAT | O_CLOEXEC, 0666)) {
  const bool locked = descriptor_ >= 0 && ::flock(descriptor_, LOCK_EX | LOCK_NB) == 0;
  if (locked) return;
  const int error = errno;
  if (descriptor_ >= 0) ::close(descriptor_);
  if (error != EWOULDBLOCK)
    throw std::runtime_error(fmt::format("{}: cannot be locked: {}", folder.string(), std::strerror(error)));
  throw std::invalid_argument(
      fmt::format("{} is being written by another process: wait for its end, or name another --out", folder.string()));
}

FolderLock::~FolderLock() { ::close(descriptor_); }

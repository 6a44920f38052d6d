#pragma once

#include <filesystem>
#include <string>
#include <string_view>

// Throws std::runtime_error naming the file.
std::string read_file(const std::filesystem::path& path);

// Replaces `path` by `content`, which is on the disk when this returns: whatever happens meanwhile, the file is either
// the old one or the new one. Throws std::runtime_error naming the file; the old one is then intact.
void write_file(const std::filesystem::path& path, std::string_view content);

// Keeps other processes out of a folder while it lives, also those of `cctorch run`. The lock goes with the process, by
// whatever it ends. Throws std::invalid_argument naming the folder where another process has it.
class FolderLock {
 public:
  explicit FolderLock(const std::filesystem::path& folder);
  ~FolderLock();
  FolderLock(const FolderLock&) = delete;
  FolderLock& operator=(const FolderLock&) = delete;

 private:
  int descriptor_;
};

#pragma once

#include <filesystem>
#include <string>
#include <string_view>

// Throws std::runtime_error naming the file.
std::string read_file(const std::filesystem::path& path);

// Replaces `path` by `content`, which is on the disk when this returns: whatever happens meanwhile, the file is either
// the old one or the new one. Throws std::runtime_error naming the file; the old one is then intact.
void write_file(const std::filesystem::path& path, std::string_view content);

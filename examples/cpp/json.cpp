#include "json.h"

#include <fmt/format.h>

#include <charconv>
#include <stdexcept>
#include <system_error>

std::string json_text(std::string_view text) {
  std::string json = "\"";
  for (const char c : text) {
    if (static_cast<unsigned char>(c) < 0x20) {
      json += fmt::format("\\u{:04x}", c);
      continue;
    }
    if (c == '"' || c == '\\') json += '\\';
    json += c;
  }
  return json + '"';
}

std::string JsonReader::text() {
  expect('"');
  std::string value;
  while (!accept('"')) {
    const char c = next();
    value += c == '\\' ? escaped() : c;
  }
  return value;
}

std::vector<int64_t> JsonReader::numbers() {
  std::vector<int64_t> values;
  expect('[');
  if (accept(']')) return values;
  do {
    values.push_back(number());
  } while (accept(','));
  expect(']');
  return values;
}

void JsonReader::end() {
  while (accept(' ')) continue;
  if (at_ != text_.size()) throw std::runtime_error(fmt::format("JSON: expected its end at byte {}", at_));
}

bool JsonReader::accept(char c) {
  const bool found = at_ < text_.size() && text_[at_] == c;
  if (found) ++at_;
  return found;
}

void JsonReader::expect(char c) {
  if (!accept(c)) throw std::runtime_error(fmt::format("JSON: expected {} at byte {}", c, at_));
}

char JsonReader::next() {
  if (at_ == text_.size()) throw std::runtime_error("JSON: it ends within a text");
  return text_[at_++];
}

// What json_text writes behind a backslash.
char JsonReader::escaped() {
  if (!accept('u')) return next();
  const std::string_view digits = text_.substr(at_, 4);
  unsigned code = 0;
  const auto [end, error] = std::from_chars(digits.data(), digits.data() + digits.size(), code, 16);
  if (error != std::errc() || end != digits.data() + 4 || code >= 0x20)
    throw std::runtime_error(fmt::format("JSON: expected four digits below 0020 at byte {}", at_));
  at_ += 4;
  return static_cast<char>(code);
}

int64_t JsonReader::number() {
  int64_t value = 0;
  const auto [end, error] = std::from_chars(text_.data() + at_, text_.data() + text_.size(), value);
  if (error != std::errc() || value < 0)
    throw std::runtime_error(fmt::format("JSON: expected a whole number of at least 0 at byte {}", at_));
  at_ = static_cast<size_t>(end - text_.data());
  return value;
}

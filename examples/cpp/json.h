#pragma once

#include <cstdint>
#include <string>
#include <string_view>
#include <vector>

// As much of JSON as the header of a safetensors file is made of: objects, texts, lists of whole numbers; no blanks.
std::string json_text(std::string_view text);

// Reads from the beginning to the end. Every method throws std::runtime_error where something else follows.
class JsonReader {
 public:
  explicit JsonReader(std::string_view text) : text_(text) {}

  // Calls visit(key), which reads the value.
  template <typename Visit>
  void object(const Visit& visit) {
    expect('{');
    do {
      const std::string key = text();
      expect(':');
      visit(key);
    } while (accept(','));
    expect('}');
  }

  std::string text();
  std::vector<int64_t> numbers();  // none is negative
  void end();                      // nothing but spaces

 private:
  bool accept(char c);
  void expect(char c);
  char next();
  char escaped();
  int64_t number();

  std::string_view text_;
  size_t at_ = 0;
};

#include <ATen/ops/empty.h>
#include <c10/util/Exception.h>
#include <cctorch/safetensors.h>
#include <fmt/format.h>

#include <algorithm>
#include <array>
#include <cstdint>
#include <cstring>
#include <nlohmann/json.hpp>
#include <set>
#include <string>
#include <utility>
#include <vector>

// The file: eight bytes, how long the header is; the header, which is JSON; the tensors' bytes.
namespace cctorch {
namespace {

using nlohmann::json;

constexpr size_t length_bytes = sizeof(uint64_t), checksum_digits = 16;
constexpr auto metadata_key = "__metadata__";
constexpr std::array<std::pair<std::string_view, at::ScalarType>, 10> dtypes = {{{"F64", at::kDouble},
                                                                                 {"F32", at::kFloat},
                                                                                 {"F16", at::kHalf},
                                                                                 {"BF16", at::kBFloat16},
                                                                                 {"I64", at::kLong},
                                                                                 {"I32", at::kInt},
                                                                                 {"I16", at::kShort},
                                                                                 {"I8", at::kChar},
                                                                                 {"U8", at::kByte},
                                                                                 {"BOOL", at::kBool}}};

template <typename... Parts>
[[noreturn]] void refuse(const Parts&... parts) {
  TORCH_CHECK_VALUE(false, "safetensors: ", parts...);
}

std::string_view name_of(const std::string& tensor, at::ScalarType type) {
  const auto* found = std::ranges::find(dtypes, type, &decltype(dtypes)::value_type::second);
  if (found == dtypes.end()) refuse("'", tensor, "' is of ", type, ", which the format has no name for; convert it");
  return found->first;
}

at::ScalarType type_of(const std::string& tensor, const std::string& name) {
  const auto* found = std::ranges::find(dtypes, name, &decltype(dtypes)::value_type::first);
  if (found == dtypes.end()) refuse("'", tensor, "' is of type '", name, "', which is none that is known here");
  return found->second;
}

// Where the digits of the checksum begin in a header or file; npos without one. No text can look like a key: the
// quotation marks in it stand behind backslashes.
size_t checksum_place(std::string_view text) {
  const auto key = fmt::format("\"{}\":\"", safetensors_checksum);
  const size_t at = text.find(key);
  return at == std::string_view::npos ? at : at + key.size();
}

// FNV-1a of what is before and behind the digits.
std::string checksum(std::string_view file, size_t place) {
  uint64_t hash = 0xcbf29ce484222325;
  for (const auto part : {file.substr(0, place), file.substr(place + checksum_digits)}) {
    for (const char c : part) hash = (hash ^ static_cast<unsigned char>(c)) * 0x100000001b3;
  }
  return fmt::format("{:016x}", hash);
}

// A tensor as the header describes it, within the bytes behind the header.
struct Entry {
  std::string name;
  at::ScalarType type;
  std::vector<int64_t> shape;
  int64_t begin, end;
};

std::vector<int64_t> numbers(const std::string& tensor, const json& list) {
  std::vector<int64_t> values;
  if (!list.is_array()) refuse("'", tensor, "' has ", list.dump(), ", expected a list of numbers");
  for (const json& number : list) {
    // What is beyond uint64 is a floating-point number to the parser.
    if (!number.is_number_unsigned() || number.get<uint64_t>() > INT64_MAX) {
      refuse("'", tensor, "' has ", list.dump(), ", expected whole numbers that are not negative");
    }
    values.push_back(number.get<int64_t>());
  }
  return values;
}

Entry entry_of(const std::string& name, const json& header) {
  const auto offsets = numbers(name, header.at("data_offsets"));
  if (offsets.size() != 2) refuse("'", name, "' has ", offsets.size(), " offsets, expected 2");
  return {name, type_of(name, header.at("dtype").get<std::string>()), numbers(name, header.at("shape")), offsets[0],
          offsets[1]};
}

int64_t bytes_of(const Entry& entry) {
  // Sides of 0 too have strides beside them, which must not overflow.
  auto bytes = static_cast<int64_t>(c10::elementSize(entry.type));
  for (const int64_t side : entry.shape) {
    if (__builtin_mul_overflow(bytes, std::max<int64_t>(side, 1), &bytes)) {
      refuse("'", entry.name, "' has shape ", at::IntArrayRef(entry.shape));
    }
  }
  return std::ranges::find(entry.shape, 0) == entry.shape.end() ? bytes : 0;
}

at::Tensor tensor_of(const Entry& entry, std::string_view data) {
  const std::string_view bytes = data.substr(entry.begin, entry.end - entry.begin);
  at::Tensor tensor = at::empty(entry.shape, entry.type);
  if (!bytes.empty()) std::memcpy(tensor.mutable_data_ptr(), bytes.data(), bytes.size());
  const auto is_bool = [](char c) { return c == 0 || c == 1; };
  if (entry.type == at::kBool && !std::ranges::all_of(bytes, is_bool)) {
    refuse("'", entry.name, "' has a bool that is neither 0 nor 1");
  }
  return tensor;
}

json header_of(std::string_view text) {
  std::set<std::string> names;
  return json::parse(text, [&](int depth, json::parse_event_t event, const json& parsed) {
    const bool again = depth == 1 && event == json::parse_event_t::key && !names.insert(parsed).second;
    if (again) refuse("'", parsed.get<std::string>(), "' is there twice");
    return true;
  });
}

Safetensors content_of(const json& header, std::string_view data) {
  if (!header.is_object()) refuse("the header is no JSON object");
  Safetensors content;
  std::vector<Entry> entries;
  for (const auto& [name, value] : header.items()) {
    if (name == metadata_key) {
      value.get_to(content.metadata);
    } else {
      entries.push_back(entry_of(name, value));
    }
  }
  std::ranges::stable_sort(entries, {}, [](const Entry& entry) { return std::pair(entry.begin, entry.end); });
  int64_t used = 0;
  for (const Entry& entry : entries) {
    const int64_t bytes = bytes_of(entry), left = static_cast<int64_t>(data.size()) - used;
    if (bytes > left || entry.begin != used || entry.end != used + bytes) {
      refuse("'", entry.name, "' is at bytes ", entry.begin, " to ", entry.end, ", expected ", bytes, " from byte ",
             used, " of ", data.size());
    }
    content.tensors[entry.name] = tensor_of(entry, data);
    used += bytes;
  }
  if (used != static_cast<int64_t>(data.size())) refuse(data.size() - used, " bytes are of no tensor");
  return content;
}

}  // namespace

std::string to_safetensors(const Safetensors& content) try {
  std::vector<std::pair<std::string, at::Tensor>> tensors;
  for (const auto& [name, tensor] : content.tensors) {
    if (!tensor.defined() || tensor.layout() != at::kStrided || tensor.is_meta())
      refuse("'", name, "' is undefined, sparse or without values, expected a dense tensor");
    tensors.emplace_back(name, tensor.detach().cpu().contiguous());
  }
  // Wide elements first: then each one lies at a multiple of its size.
  std::ranges::stable_sort(tensors, std::greater<>(), [](const auto& named) { return named.second.element_size(); });
  json header = {{metadata_key, content.metadata}};
  header[metadata_key][std::string(safetensors_checksum)] = std::string(checksum_digits, '0');
  std::string data;
  for (const auto& [name, tensor] : tensors) {
    if (name == metadata_key) refuse("'", name, "' cannot be the name of a tensor");
    const size_t begin = data.size();
    data.append(static_cast<const char*>(tensor.const_data_ptr()), tensor.nbytes());
    header[name] = {{"dtype", name_of(name, tensor.scalar_type())},
                    {"shape", tensor.sizes().vec()},
                    {"data_offsets", {begin, data.size()}}};
  }
  std::string text = header.dump();
  text.resize((text.size() + 7) / 8 * 8, ' ');
  const uint64_t length = text.size();
  std::string file(reinterpret_cast<const char*>(&length), length_bytes);
  file.append(text).append(data);
  const size_t place = length_bytes + checksum_place(text);
  return file.replace(place, checksum_digits, checksum(file, place));
} catch (const json::exception& error) {
  refuse("a name or a text is not UTF-8: ", error.what());
}

Safetensors from_safetensors(std::string_view file) {
  uint64_t length = 0;
  if (file.size() < length_bytes) refuse(file.size(), " bytes are no file of this format");
  std::memcpy(&length, file.data(), length_bytes);
  if (length > file.size() - length_bytes) refuse("a header of ", length, " bytes in a file of ", file.size());
  const std::string_view text = file.substr(length_bytes, length);
  try {
    Safetensors content = content_of(header_of(text), file.substr(length_bytes + length));
    const auto found = content.metadata.find(std::string(safetensors_checksum));
    if (found != content.metadata.end()) {
      const size_t place = checksum_place(text);
      const bool written = place != std::string_view::npos && found->second == text.substr(place, checksum_digits);
      if (!written || found->second != checksum(file, length_bytes + place))
        refuse("the bytes are not what was written");
    }
    return content;
  } catch (const json::exception& error) {
    refuse("the header is truncated or malformed: ", error.what());
  }
}

}  // namespace cctorch

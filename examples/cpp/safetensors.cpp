#include "safetensors.h"

#include <ATen/ops/empty.h>
#include <fmt/format.h>
#include <fmt/ranges.h>

#include <array>
#include <cstdint>
#include <cstring>
#include <stdexcept>
#include <utility>
#include <vector>

#include "json.h"

// The file: eight bytes, how long the header is; the header, which is JSON; the tensors' bytes.
namespace {

// What each header begins with; the checksum follows, of all but itself. It finds damage, not intent.
constexpr std::string_view opening = R"({"__metadata__":{"checksum":")";
constexpr size_t length_bytes = sizeof(uint64_t), checksum_digits = 16;
constexpr size_t checksum_at = length_bytes + opening.size();

constexpr std::array<std::pair<std::string_view, at::ScalarType>, 3> dtypes = {
    {{"F32", at::kFloat}, {"F64", at::kDouble}, {"I64", at::kLong}}};

[[noreturn]] void refuse(const std::string& what) { throw std::runtime_error("safetensors: " + what); }

std::string_view name_of(at::ScalarType dtype) {
  for (const auto& [name, known] : dtypes)
    if (known == dtype) return name;
  refuse(fmt::format("a tensor of {}, expected float32, float64 or int64", c10::toString(dtype)));
}

at::ScalarType dtype_of(std::string_view name) {
  for (const auto& [known, dtype] : dtypes)
    if (known == name) return dtype;
  refuse(fmt::format("a tensor of {}, expected F32, F64 or I64", name));
}

// FNV-1a.
std::string checksum(std::string_view file) {
  uint64_t hash = 0xcbf29ce484222325;
  for (size_t i = 0; i < file.size(); ++i) {
    if (i == checksum_at) i += checksum_digits;
    if (i < file.size()) hash = (hash ^ static_cast<unsigned char>(file[i])) * 0x100000001b3;
  }
  return fmt::format("{:016x}", hash);
}

int64_t bytes_of(const std::vector<int64_t>& shape, at::ScalarType dtype) {
  auto bytes = static_cast<int64_t>(c10::elementSize(dtype));
  for (const int64_t side : shape)
    if (__builtin_mul_overflow(bytes, side, &bytes)) refuse(fmt::format("a tensor of {}", fmt::join(shape, " x ")));
  return bytes;
}

// The next one of the header. Tensors follow each other in `data`, of which `used` bytes are behind us.
at::Tensor read_tensor(JsonReader& header, std::string_view data, int64_t& used) {
  std::string dtype;
  std::vector<int64_t> shape, offsets;
  header.object([&](const std::string& key) {
    if (key == "dtype")
      dtype = header.text();
    else
      (key == "shape" ? shape : offsets) = header.numbers();
  });
  const at::ScalarType type = dtype_of(dtype);
  const int64_t bytes = bytes_of(shape, type), left = static_cast<int64_t>(data.size()) - used;
  if (bytes > left || offsets != std::vector{used, used + bytes}) {
    refuse(fmt::format("a tensor of {} {} at bytes {}, expected {} bytes from byte {} of {}", fmt::join(shape, " x "),
                       dtype, fmt::join(offsets, " to "), bytes, used, data.size()));
  }
  at::Tensor tensor = at::empty(shape, type);
  if (bytes > 0) std::memcpy(tensor.data_ptr(), data.data() + used, static_cast<size_t>(bytes));
  used += bytes;
  return tensor;
}

// Of a whole file, which begins with `opening`. Returns header and tensors.
std::pair<std::string_view, std::string_view> parts(std::string_view file) {
  if (file.size() < checksum_at + checksum_digits || file.substr(length_bytes, opening.size()) != opening)
    refuse("not a file of this program");
  if (file.substr(checksum_at, checksum_digits) != checksum(file)) refuse("not what was written");
  uint64_t length = 0;
  std::memcpy(&length, file.data(), length_bytes);
  if (length > file.size() - length_bytes) refuse(fmt::format("a header of {} bytes", length));
  return {file.substr(length_bytes, length), file.substr(length_bytes + length)};
}

}  // namespace

std::string to_safetensors(const Archive& archive) {
  std::string header{opening}, data;
  header += std::string(checksum_digits, '0') + '"';
  for (const auto& [name, text] : archive.texts) header += fmt::format(",{}:{}", json_text(name), json_text(text));
  header += '}';
  for (const auto& [name, tensor] : archive.tensors) {
    const at::Tensor values = tensor.detach().cpu().contiguous();
    const size_t begin = data.size();
    data.append(static_cast<const char*>(values.const_data_ptr()), values.nbytes());
    header += fmt::format(R"(,{}:{{"dtype":"{}","shape":[{}],"data_offsets":[{},{}]}})", json_text(name),
                          name_of(values.scalar_type()), fmt::join(values.sizes(), ","), begin, data.size());
  }
  header += '}';
  header.resize((header.size() + 7) / 8 * 8, ' ');  // the tensors begin at a multiple of eight bytes
  const uint64_t length = header.size();
  std::string file(reinterpret_cast<const char*>(&length), length_bytes);
  file += header + data;
  return file.replace(checksum_at, checksum_digits, checksum(file));
}

Archive from_safetensors(std::string_view file) {
  const auto [text, data] = parts(file);
  Archive archive;
  JsonReader header(text);
  int64_t used = 0;
  header.object([&, data = data](const std::string& name) {
    if (name == "__metadata__") {
      header.object([&](const std::string& key) { archive.texts[key] = header.text(); });
    } else {
      archive.tensors[name] = read_tensor(header, data, used);
    }
  });
  header.end();
  if (used != static_cast<int64_t>(data.size())) refuse(fmt::format("{} bytes of no tensor", data.size() - used));
  archive.texts.erase("checksum");
  return archive;
}

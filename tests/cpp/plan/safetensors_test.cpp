// Files that anybody may have written.
#include <ATen/ATen.h>
#include <c10/util/Exception.h>
#include <cctorch/safetensors.h>
#include <fmt/format.h>
#include <gtest/gtest.h>

#include <cstdint>
#include <cstring>
#include <string>
#include <string_view>

namespace cctorch {
namespace {

constexpr std::string_view opening = R"({"__metadata__":{"cctorch_checksum":")";

// FNV-1a, of all but itself: what the reader takes for intact.
std::string with_checksum(std::string file) {
  const size_t at = sizeof(uint64_t) + opening.size();
  const std::string hashed = file.substr(0, at) + file.substr(at + 16);
  uint64_t hash = 14695981039346656037u;
  for (const char c : hashed) hash = (hash ^ static_cast<unsigned char>(c)) * 1099511628211u;
  return file.replace(at, 16, fmt::format("{:016x}", hash));
}

std::string file(const std::string& entries, const std::string& data) {
  const std::string header = std::string(opening) + std::string(16, '0') + R"("})" + entries + "}";
  const uint64_t length = header.size();
  return with_checksum(std::string(reinterpret_cast<const char*>(&length), sizeof(length)) + header + data);
}

std::string tensor(const std::string& dtype, const std::string& shape, const std::string& offsets, char name = 'w') {
  return fmt::format(R"(,"{}":{{"dtype":"{}","shape":[{}],"data_offsets":[{}]}})", name, dtype, shape, offsets);
}

TEST(Safetensors, WhatIsWrittenIsRead) {
  Safetensors::Tensors tensors = {{"empty", at::zeros({0, 3})}, {"columns", at::arange(6).view({2, 3}).t()}};
  for (const auto type : {at::kDouble, at::kFloat, at::kHalf, at::kBFloat16, at::kLong, at::kInt, at::kShort, at::kChar,
                          at::kByte, at::kBool}) {
    tensors[c10::toString(type)] = at::tensor({0.0, 1.0, 3.5}, at::kDouble).to(type);
  }
  const Safetensors content{.tensors = tensors,
                            .metadata = {{"quotes", "a \"b\" \\ c"}, {"lines", "1\n2\t\x01 \xc3\xa9"}, {"none", ""}}};
  Safetensors read = from_safetensors(to_safetensors(content));
  EXPECT_EQ(read.metadata.erase(std::string(safetensors_checksum)), 1);
  EXPECT_EQ(read.metadata, content.metadata);
  ASSERT_EQ(read.tensors.size(), tensors.size());
  for (const auto& [name, values] : tensors) {
    EXPECT_EQ(read.tensors.at(name).scalar_type(), values.scalar_type()) << name;
    EXPECT_TRUE(at::equal(read.tensors.at(name), values)) << name;
  }
}

TEST(Safetensors, FilesOfPythonsPackageAreRead) {
  const std::string header = R"({"__metadata__":{"k":"v"},"scale":{"dtype":"F16","shape":[2,1],"data_offsets":[0,4]},)"
                             R"("counts":{"dtype":"I8","shape":[3],"data_offsets":[4,7]},)"
                             R"("on":{"dtype":"BOOL","shape":[2],"data_offsets":[7,9]}}   )";
  const std::string data("\x00\x3e\x00\xc0\x03\xff\x07\x01\x00", 9);
  const uint64_t length = 200;
  ASSERT_EQ(header.size(), length);
  const Safetensors read = from_safetensors(std::string(reinterpret_cast<const char*>(&length), 8) + header + data);
  EXPECT_EQ(read.metadata, (std::map<std::string, std::string>{{"k", "v"}}));
  ASSERT_EQ(read.tensors.size(), 3);
  EXPECT_TRUE(at::equal(read.tensors.at("scale"), at::tensor({1.5, -2.0}).to(at::kHalf).view({2, 1})));
  EXPECT_TRUE(at::equal(read.tensors.at("counts"), at::tensor({3, -1, 7}).to(at::kChar)));
  EXPECT_TRUE(at::equal(read.tensors.at("on"), at::tensor({1, 0}).to(at::kBool)));
}

TEST(Safetensors, TheTestsFilesAreRead) {
  const float values[] = {1, 2};
  const auto read = from_safetensors(file(tensor("F32", "2", "0,8"), {reinterpret_cast<const char*>(values), 8}));
  EXPECT_TRUE(at::equal(read.tensors.at("w"), at::tensor({1.0f, 2.0f})));
}

// Also where the checksum itself is lost: whoever wrote the file misses it.
TEST(Safetensors, AnyOtherByteIsRefused) {
  const std::string good = to_safetensors({.tensors = {{"w", at::ones({2, 2})}}, .metadata = {{"a", "b"}}});
  const std::string name(safetensors_checksum);
  const size_t key = good.find(name);
  for (size_t i = 0; i < good.size(); ++i) {
    std::string bad = good;
    bad[i] = static_cast<char>(bad[i] ^ 1);
    if (key <= i && i < key + name.size()) {
      EXPECT_FALSE(from_safetensors(bad).metadata.contains(name)) << i;
    } else {
      EXPECT_THROW(from_safetensors(bad), c10::ValueError) << i;
    }
    EXPECT_THROW(from_safetensors(good.substr(0, i)), c10::ValueError) << i;
  }
  EXPECT_THROW(from_safetensors(good + "x"), c10::ValueError);
}

// Files whose checksum is right: made with intent.
TEST(Safetensors, SizesThatLieAreRefused) {
  const std::string data(16, '\0');
  for (const std::string& entries : {
           tensor("F32", "1000000", "0,4000000"),         // more than there is
           tensor("F32", "1000000", "0,16"),              // more than its bytes
           tensor("F32", "4611686018427387908", "0,16"),  // 2^62 + 4: 16 bytes, if they overflow
           tensor("F32", "4294967296,4294967296", "0,0", 'v') + tensor("F32", "4", "0,16"),    // 2^64, likewise
           tensor("F32", "9223372036854775807", "0,16"),                                       //
           tensor("F32", "99999999999999999999", "0,16"),                                      // no int64
           tensor("F32", "-4", "0,16"),                                                        //
           tensor("F32", "4", "16,0"),                                                         //
           tensor("F32", "4", "4,20"),                                                         // beyond the end
           tensor("F32", "4", "0"),                                                            //
           tensor("F32", "2", "0,8"),                                                          // bytes of nobody
           tensor("F32", "2", "0,8") + tensor("F32", "2", "0,8", 'v'),                         // the same bytes twice
           tensor("F32", "0", "0,0") + tensor("F32", "4", "0,16"),                             // the same name twice
           tensor("Q8", "16", "0,16"),                                                         //
           tensor("F32", "4.0", "0,16"),                                                       //
           tensor("BOOL", "16", "0,16") + R"(,"__metadata__":{"a":1})",                        // no text
           tensor("F32", "0,4611686018427387904,4", "0,0", 'v') + tensor("F32", "4", "0,16"),  // strides that overflow
           std::string(R"(,"w":{"dtype":"F32","shape":[4],"data_offsets":{"a":0,"b":16}})"),
           std::string(R"(,"w":{"dtype":"F32")"),          //
           std::string(R"(,"w":"os.system")"),             //
           std::string(R"(,"w)"),                          //
           std::string(R"(,"\u12":"")"),                   //
           tensor("F32", "4", "0,16") + R"(} {"more":1)",  // behind the end
           std::string(100000, '{'),                       //
           std::string(""),                                // no tensor, and yet 16 bytes
       }) {
    EXPECT_THROW(from_safetensors(file(entries, data)), c10::ValueError) << entries.substr(0, 80);
  }
  for (const uint64_t length : {file("", "").size() - 7, ~uint64_t{0} - 4}) {  // of the header: one more than there is
    std::string long_header = file("", "");
    std::memcpy(long_header.data(), &length, sizeof(length));
    EXPECT_THROW(from_safetensors(with_checksum(long_header)), c10::ValueError) << length;
  }
  EXPECT_THROW(from_safetensors(""), c10::ValueError);
}

TEST(Safetensors, WhatIsNoBoolOrNoObjectIsRefused) {
  EXPECT_THROW(from_safetensors(file(tensor("BOOL", "2", "0,2"), "\1\2")), c10::ValueError);
  for (const std::string header : {"null", "[]", "7", "{\"__metadata__\":{\"a\":{}}}"}) {
    const uint64_t length = header.size();
    EXPECT_THROW(from_safetensors(std::string(reinterpret_cast<const char*>(&length), sizeof(length)) + header),
                 c10::ValueError)
        << header;
  }
}

TEST(Safetensors, WhatTheFormatCannotSayIsNotWritten) {
  EXPECT_THROW(to_safetensors({.tensors = {{"w", at::ones({2}, at::kComplexFloat)}}, .metadata = {}}), c10::ValueError);
  EXPECT_THROW(to_safetensors({.tensors = {{"__metadata__", at::ones({2})}}, .metadata = {}}), c10::ValueError);
  EXPECT_THROW(to_safetensors({.tensors = {{"\xff", at::ones({2})}}, .metadata = {}}), c10::ValueError);
  EXPECT_THROW(to_safetensors({.tensors = {{"w", at::Tensor()}}, .metadata = {}}), c10::ValueError);
  EXPECT_THROW(to_safetensors({.tensors = {{"w", at::ones({2}).to_sparse()}}, .metadata = {}}), c10::ValueError);
}

}  // namespace
}  // namespace cctorch

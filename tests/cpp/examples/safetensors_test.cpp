// examples/cpp reads files that anybody may have written.
#include "examples/cpp/safetensors.h"

#include <ATen/ATen.h>
#include <fmt/format.h>
#include <gtest/gtest.h>

#include <cstdint>
#include <cstring>
#include <stdexcept>
#include <string>
#include <string_view>

namespace {

constexpr std::string_view opening = R"({"__metadata__":{"checksum":")";

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

std::string tensor(const std::string& dtype, const std::string& shape, const std::string& offsets) {
  return fmt::format(R"(,"w":{{"dtype":"{}","shape":[{}],"data_offsets":[{}]}})", dtype, shape, offsets);
}

TEST(Safetensors, WhatIsWrittenIsRead) {
  const Archive archive{.tensors = {{"empty", at::zeros({0, 3})},
                                    {"halves", at::arange(6, at::kFloat).view({2, 3}).t() / 2},
                                    {"number", at::tensor(int64_t{1} << 60)},
                                    {"wide", at::tensor({1e300, -0.0}, at::kDouble)}},
                        .texts = {{"quotes", "a \"b\" \\ c"}, {"lines", "1\n2\t\x01 \xc3\xa9"}, {"none", ""}}};
  const Archive read = from_safetensors(to_safetensors(archive));
  EXPECT_EQ(read.texts, archive.texts);
  ASSERT_EQ(read.tensors.size(), archive.tensors.size());
  for (const auto& [name, values] : archive.tensors) {
    EXPECT_EQ(read.tensors.at(name).scalar_type(), values.scalar_type()) << name;
    EXPECT_TRUE(at::equal(read.tensors.at(name), values)) << name;
  }
}

TEST(Safetensors, TheTestsFilesAreRead) {
  const float values[] = {1, 2};
  const auto read = from_safetensors(file(tensor("F32", "2", "0,8"), {reinterpret_cast<const char*>(values), 8}));
  EXPECT_TRUE(at::equal(read.tensors.at("w"), at::tensor({1.0f, 2.0f})));
}

TEST(Safetensors, AnyOtherByteIsRefused) {
  const std::string good = to_safetensors({.tensors = {{"w", at::ones({2, 2})}}, .texts = {{"a", "b"}}});
  for (size_t i = 0; i < good.size(); ++i) {
    std::string bad = good;
    bad[i] = static_cast<char>(bad[i] ^ 1);
    EXPECT_THROW(from_safetensors(bad), std::runtime_error) << i;
    EXPECT_THROW(from_safetensors(good.substr(0, i)), std::runtime_error) << i;
  }
  EXPECT_THROW(from_safetensors(good + "x"), std::runtime_error);
}

// Files whose checksum is right: made with intent.
TEST(Safetensors, SizesThatLieAreRefused) {
  const std::string data(16, '\0');
  for (const std::string& entries : {
           tensor("F32", "1000000", "0,4000000"),         // more than there is
           tensor("F32", "1000000", "0,16"),              // more than its bytes
           tensor("F32", "4611686018427387908", "0,16"),  // 2^62 + 4: 16 bytes, if they overflow
           tensor("F32", "4294967296,4294967296", "0,0") + tensor("F32", "4", "0,16"),  // 2^64, likewise
           tensor("F32", "9223372036854775807", "0,16"),                                //
           tensor("F32", "99999999999999999999", "0,16"),                               // no int64
           tensor("F32", "-4", "0,16"),                                                 //
           tensor("F32", "4", "16,0"),                                                  //
           tensor("F32", "4", "4,20"),                                                  // beyond the end
           tensor("F32", "4", "0"),                                                     //
           tensor("F32", "2", "0,8"),                                                   // bytes of nobody
           tensor("F32", "2", "0,8") + tensor("F32", "2", "0,8"),                       // the same bytes twice
           tensor("Q8", "16", "0,16"),                                                  //
           tensor("F32", "4.0", "0,16"),                                                //
           std::string(R"(,"w":{"dtype":"F32")"),                                       //
           std::string(R"(,"w":"os.system")"),                                          //
           std::string(R"(,"w)"),                                                       //
           std::string(R"(,"\u12":"")"),                                                //
           tensor("F32", "4", "0,16") + R"(} {"more":1)",                               // behind the end
           std::string(100000, '{'),                                                    //
           std::string(""),                                                             // no tensor, and yet 16 bytes
       }) {
    EXPECT_THROW(from_safetensors(file(entries, data)), std::runtime_error) << entries.substr(0, 80);
  }
  for (const uint64_t length : {file("", "").size() - 7, ~uint64_t{0} - 4}) {  // of the header: one more than there is
    std::string long_header = file("", "");
    std::memcpy(long_header.data(), &length, sizeof(length));
    EXPECT_THROW(from_safetensors(with_checksum(long_header)), std::runtime_error) << length;
  }
  EXPECT_THROW(from_safetensors(""), std::runtime_error);
}

TEST(Safetensors, OtherTypesAreNotWritten) {
  EXPECT_THROW(to_safetensors({.tensors = {{"w", at::ones({2}, at::kBool)}}, .texts = {}}), std::runtime_error);
}

}  // namespace

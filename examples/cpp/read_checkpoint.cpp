// Reads a compressed checkpoint (docs/checkpoints.md) with nothing but the HDF5 library and the filter plugins of
// Python's hdf5plugin, and prints of each tensor NAME its shape, the sums of its values and of their squares, and the
// number of zeros.
//
//   HDF5_PLUGIN_PATH=$(python -c "import hdf5plugin; print(hdf5plugin.PLUGINS_PATH)") read_checkpoint model.h5 NAME...
#include <hdf5.h>

#include <cstdint>
#include <cstdio>
#include <cstring>
#include <stdexcept>
#include <string>
#include <vector>

namespace {

// Ends what HDF5 opened.
class Handle {
 public:
  Handle(hid_t id, herr_t (*close)(hid_t), const std::string& what) : id_(id), close_(close) {
    if (id < 0) throw std::runtime_error("can't open " + what);
  }
  ~Handle() { close_(id_); }
  Handle(const Handle&) = delete;
  Handle& operator=(const Handle&) = delete;
  operator hid_t() const { return id_; }

 private:
  hid_t id_;
  herr_t (*close_)(hid_t);
};

template <typename T>
std::vector<T> read(hid_t file, const std::string& path, hid_t type) {
  const Handle dataset(H5Dopen2(file, path.c_str(), H5P_DEFAULT), H5Dclose, path);
  const Handle space(H5Dget_space(dataset), H5Sclose, path);
  std::vector<T> values(H5Sget_simple_extent_npoints(space));
  if (H5Dread(dataset, type, H5S_ALL, H5S_ALL, H5P_DEFAULT, values.data()) < 0)
    throw std::runtime_error("can't read " + path + ": is HDF5_PLUGIN_PATH the folder of hdf5plugin's filters?");
  return values;
}

// The dataset's own, unless an attribute says otherwise.
std::vector<int64_t> shape_of(hid_t file, const std::string& path) {
  const Handle dataset(H5Dopen2(file, path.c_str(), H5P_DEFAULT), H5Dclose, path);
  if (H5Aexists(dataset, "shape") <= 0) {
    const Handle space(H5Dget_space(dataset), H5Sclose, path);
    std::vector<hsize_t> sides(H5Sget_simple_extent_ndims(space));
    H5Sget_simple_extent_dims(space, sides.data(), nullptr);
    return {sides.begin(), sides.end()};
  }
  const Handle attribute(H5Aopen(dataset, "shape", H5P_DEFAULT), H5Aclose, path);
  const Handle space(H5Aget_space(attribute), H5Sclose, path);
  std::vector<int64_t> shape(H5Sget_simple_extent_npoints(space));
  H5Aread(attribute, H5T_NATIVE_INT64, shape.data());
  return shape;
}

// Of PyTorch's types that HDF5 lacks, whose bits are stored as unsigned integers; empty for the dataset's own.
std::string bits_of(hid_t file, const std::string& path) {
  const Handle dataset(H5Dopen2(file, path.c_str(), H5P_DEFAULT), H5Dclose, path);
  if (H5Aexists(dataset, "dtype") <= 0) return "";
  const Handle attribute(H5Aopen(dataset, "dtype", H5P_DEFAULT), H5Aclose, path);
  const Handle type(H5Aget_type(attribute), H5Tclose, path);
  std::string name(H5Tget_size(type), '\0');
  if (H5Tis_variable_str(type) != 0 || H5Aread(attribute, type, name.data()) < 0)
    throw std::runtime_error("can't read the type of " + path);
  return name.substr(0, name.find('\0'));
}

// bfloat16 is the upper half of float32.
double from_bfloat16(double bits) {
  const uint32_t word = static_cast<uint32_t>(bits) << 16;
  float value;
  std::memcpy(&value, &word, sizeof value);
  return value;
}

bool exists(hid_t file, const std::string& group, const std::string& name) {
  return H5Lexists(file, group.c_str(), H5P_DEFAULT) > 0 &&
         H5Lexists(file, (group + "/" + name).c_str(), H5P_DEFAULT) > 0;
}

// HDF5 converts any type of number. Values that are zero may be left out, and are marked in a map of bits.
std::vector<double> tensor(hid_t file, const std::string& name, const std::vector<int64_t>& shape) {
  std::vector<double> stored = read<double>(file, "tensors/" + name, H5T_NATIVE_DOUBLE);
  const std::string bits = bits_of(file, "tensors/" + name);
  if (bits == "bfloat16") {
    for (double& value : stored) value = from_bfloat16(value);
  } else if (bits != "" && bits != "bool") {
    throw std::runtime_error(name + " is " + bits + ", which this program does not decode");
  }
  if (!exists(file, "zeros", name)) return stored;
  const std::vector<uint8_t> zeros = read<uint8_t>(file, "zeros/" + name, H5T_NATIVE_UINT8);
  size_t size = 1, next = 0;
  for (const int64_t side : shape) size *= side;
  std::vector<double> values(size, 0.0);
  for (size_t i = 0; i < size; ++i)
    if (!(zeros.at(i / 8) >> (7 - i % 8) & 1)) values[i] = stored.at(next++);
  return values;
}

void print(hid_t file, const std::string& name) {
  const std::vector<int64_t> shape = shape_of(file, "tensors/" + name);
  double sum = 0, squares = 0;
  size_t zeros = 0;
  for (const double value : tensor(file, name, shape)) {
    sum += value;
    squares += value * value;
    zeros += value == 0;
  }
  std::printf("%s", name.c_str());
  for (const int64_t side : shape) std::printf(" %lld", static_cast<long long>(side));
  std::printf(": sum %.17g, squares %.17g, zeros %zu\n", sum, squares, zeros);
}

}  // namespace

int main(int count, char** arguments) {
  if (count < 3) {
    std::fprintf(stderr, "usage: read_checkpoint FILE NAME...\n");
    return 2;
  }
  try {
    const Handle file(H5Fopen(arguments[1], H5F_ACC_RDONLY, H5P_DEFAULT), H5Fclose, arguments[1]);
    for (int i = 2; i < count; ++i) print(file, arguments[i]);
  } catch (const std::exception& error) {
    std::fprintf(stderr, "read_checkpoint: %s\n", error.what());
    return 1;
  }
}

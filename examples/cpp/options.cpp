#include "options.h"

#include <fmt/format.h>

#include <algorithm>
#include <charconv>
#include <cmath>
#include <functional>
#include <limits>
#include <stdexcept>
#include <type_traits>

namespace {

[[noreturn]] void refuse(const std::string& name, const std::string& value, const std::string& expected) {
  throw std::invalid_argument(fmt::format("{} {}: expected {} (see --help)", name, value, expected));
}

template <typename Number>
Number parse(const std::string& name, const std::string& value, Number least, Number most) {
  Number number{};
  const auto [end, error] = std::from_chars(value.data(), value.data() + value.size(), number);
  const bool whole = error == std::errc() && end == value.data() + value.size();
  if (!whole || !(number >= least && number <= most)) {
    const std::string number_of = std::is_integral_v<Number> ? "a whole number" : "a number";
    const bool bounded = most < std::numeric_limits<Number>::max();
    refuse(name, value,
           bounded ? fmt::format("{} from {} to {}", number_of, least, most)
                   : fmt::format("{} of at least {}", number_of, least));
  }
  return number;
}

using Setter = std::function<void(Options&, const std::string& name, const std::string& value)>;

// How the value of an option is read from the command line, and how it is written there.
struct Value {
  Setter set;
  std::function<std::string(const Options&)> get;
};

struct Flag {
  std::string name, placeholder, help;  // a switch has no placeholder
  Value value;
};

template <typename Member>
auto getter(Member Options::* member) {
  return [=](const Options& options) { return fmt::format("{}", options.*member); };
}

Value text(std::string Options::* member) {
  return {[=](Options& options, const std::string& name, const std::string& value) {
            if (value.empty()) refuse(name, "''", "a folder");
            options.*member = value;
          },
          getter(member)};
}

Value count(int64_t Options::* member, int64_t least) {
  return {[=](Options& options, const std::string& name, const std::string& value) {
            options.*member = parse<int64_t>(name, value, least, std::numeric_limits<int64_t>::max());
          },
          getter(member)};
}

Value number(double Options::* member, double least, double most) {
  return {[=](Options& options, const std::string& name, const std::string& value) {
            options.*member = parse<double>(name, value, least, most);
          },
          getter(member)};
}

Value turn_on(bool Options::* member) {
  return {[=](Options& options, const std::string&, const std::string&) { options.*member = true; }, getter(member)};
}

void set_device(Options& options, const std::string& name, const std::string& value) {
  if (value != "auto" && value != "cpu" && value != "cuda") refuse(name, value, "auto, cpu or cuda");
  options.device = value;
}

void set_layout(Options& options, const std::string& name, const std::string& value) {
  if (value != "channel" && value != "spatial") refuse(name, value, "channel or spatial");
  options.layout = value;
}

void set_bits(Options& options, const std::string& name, const std::string& value) {
  options.bits = value == "0" ? 0 : parse<int64_t>(name, value, 2, 16);
}

const std::vector<Flag>& flags() {
  static const std::vector<Flag> all = {
      {"--data", "DIR", "folder of the four Fashion-MNIST idx files, .gz or unpacked", text(&Options::data)},
      {"--out", "DIR", "where the network, its plan, the summary and the checkpoint go", text(&Options::out)},
      {"--epochs", "N", "epochs of the dense network", count(&Options::epochs, 1)},
      {"--finetune-epochs", "N", "epochs of the compressed network", count(&Options::finetune_epochs, 0)},
      {"--bits",
       "N",
       "bits of a weight, trained with LSQ; 8 or more in the first and last layer; 0 for float",
       {set_bits, getter(&Options::bits)}},
      {"--quantize-epochs", "N", "epochs of the network with weights of few bits", count(&Options::quantize_epochs, 0)},
      {"--target", "C", "fraction of the multiply-accumulates to remove", number(&Options::target, 0.01, 0.95)},
      {"--layout",
       "NAME",
       "of factored convolutions: channel, k x k then 1 x 1, or spatial, 1 x k then k x 1",
       {set_layout, getter(&Options::layout)}},
      {"--blocks", "N", "blocks in each of the three stages: 3 makes a ResNet-20", count(&Options::blocks, 1)},
      {"--batch", "N", "images in a batch", count(&Options::batch, 2)},
      {"--lr", "X", "peak learning rate of the one-cycle schedule", number(&Options::lr, 1e-6, 10.0)},
      {"--limit", "N", "use only the first N images of each set; 0 for all", count(&Options::limit, 0)},
      {"--seed", "N", "seed of initialization, order and augmentation", count(&Options::seed, 0)},
      {"--device", "NAME", "auto, cpu or cuda", {set_device, getter(&Options::device)}},
      {"--float64", "", "compute in float64: slow, and numbers of ranks can be compared", turn_on(&Options::float64)},
      {"--synthetic", "", "make a small data set in DIR of --out and use it", turn_on(&Options::synthetic)},
      {"--help", "", "print this", turn_on(&Options::help)},
  };
  return all;
}

}  // namespace

Options parse_options(const std::vector<std::string>& arguments) {
  Options options;
  for (size_t i = 0; i < arguments.size(); ++i) {
    const size_t equals = arguments[i].find('=');
    const std::string name = arguments[i].substr(0, equals);
    const auto flag = std::find_if(flags().begin(), flags().end(), [&](const Flag& f) { return f.name == name; });
    if (flag == flags().end()) throw std::invalid_argument(fmt::format("{}: no such option (see --help)", name));
    std::string value;
    if (!flag->placeholder.empty()) {
      const bool attached = equals != std::string::npos;
      if (!attached && i + 1 == arguments.size()) refuse(name, "", "a value: " + flag->help);
      value = attached ? arguments[i].substr(equals + 1) : arguments[++i];
    } else if (equals != std::string::npos) {
      refuse(name, arguments[i].substr(equals + 1), "no value");
    }
    flag->value.set(options, name, value);
  }
  if (options.synthetic && !options.data.empty())
    refuse("--data", options.data, "no --synthetic beside it, which makes data of its own");
  if (options.bits == 0 && options.quantize_epochs != Options().quantize_epochs)
    refuse("--quantize-epochs", fmt::format("{}", options.quantize_epochs), "--bits beside it");
  return options;
}

std::map<std::string, std::string> settings(const Options& options) {
  std::map<std::string, std::string> values;
  for (const Flag& flag : flags()) values[flag.name] = flag.value.get(options);
  values.erase("--out");
  values.erase("--help");
  return values;
}

std::string help_text() {
  std::string text =
      "Trains a ResNet on Fashion-MNIST, compresses it by Collaborative Compression, fine-tunes it,\n"
      "quantizes it where that is asked for, and compares.\n\n"
      "  train_resnet                                    ResNet-20, half of the multiply-accumulates removed\n"
      "  train_resnet --target 0.7 --finetune-epochs 5   remove more, and give it longer to recover\n"
      "  train_resnet --bits 4                           then train with weights of 4 bits, and store their codes\n"
      "  train_resnet --synthetic --blocks 1 --batch 32  a try of a few seconds, without any data\n"
      "  torchrun --no-python --nproc-per-node 2 train_resnet   data parallel: --batch is that of all ranks\n\n"
      "Stopped, it goes on after its last epoch when the same command is given again.\n\n"
      "Options:\n";
  for (const Flag& flag : flags()) {
    text += fmt::format("  {:<22} {}\n", flag.name + " " + flag.placeholder, flag.help);
  }
  const Options defaults;
  text += fmt::format(
      "\nDefaults: --epochs {} --finetune-epochs {} --bits {} --quantize-epochs {} --target {} --blocks {} "
      "--batch {} --lr {} --out {}.\n",
      defaults.epochs, defaults.finetune_epochs, defaults.bits, defaults.quantize_epochs, defaults.target,
      defaults.blocks, defaults.batch, defaults.lr, defaults.out);
  return text;
}

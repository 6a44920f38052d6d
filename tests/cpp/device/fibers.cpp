#include "tests/cpp/device/fibers.h"

#include <ucontext.h>

#include <algorithm>
#include <exception>
#include <map>
#include <memory>
#include <numeric>
#include <random>
#include <string>
#include <vector>

#if defined(__SANITIZE_ADDRESS__)
#include <sanitizer/asan_interface.h>
#include <sanitizer/common_interface_defs.h>
#endif

namespace cctorch::device {
namespace {

constexpr size_t kStackBytes = 128 << 10;

// AddressSanitizer has to know which stack is in use.
struct StackBounds {
  const void* bottom = nullptr;
  size_t size = 0;
};

void before_switch([[maybe_unused]] void** fake_stack, [[maybe_unused]] const StackBounds& to) {
#if defined(__SANITIZE_ADDRESS__)
  __sanitizer_start_switch_fiber(fake_stack, to.bottom, to.size);
#endif
}

void after_switch([[maybe_unused]] void* fake_stack, [[maybe_unused]] StackBounds* from) {
#if defined(__SANITIZE_ADDRESS__)
  __sanitizer_finish_switch_fiber(fake_stack, from ? &from->bottom : nullptr, from ? &from->size : nullptr);
#endif
}

void forget_frames([[maybe_unused]] char* stack) {
#if defined(__SANITIZE_ADDRESS__)
  __asan_unpoison_memory_region(stack, kStackBytes);
#endif
}

enum class State { kReady, kAtBlock, kAtWarp, kAtOtherBlock, kReturned };

struct Fiber {
  State state;
  std::source_location where;
  ucontext_t context;
  std::unique_ptr<char[]> stack = std::make_unique_for_overwrite<char[]>(kStackBytes);
  void* fake_stack;
  // Two, because a lane may post again before a slower one has read; it cannot post a third time.
  uint64_t posted[2];
  unsigned exchanges;
};

// 0, 1, ... in the order of the seed.
std::vector<unsigned> order(unsigned count, uint32_t seed, std::mt19937& random) {
  std::vector<unsigned> indices(count);
  std::iota(indices.begin(), indices.end(), 0u);
  if (seed == 1) std::reverse(indices.begin(), indices.end());
  if (seed > 1) std::shuffle(indices.begin(), indices.end(), random);
  return indices;
}

class Block {
 public:
  Block(unsigned threads, uint32_t seed) : fibers_(threads), seed_(seed), random_(seed) {}

  void run(const std::function<void()>& body);
  void wait(State state, const std::source_location& where);
  Fiber& current() { return fibers_[threadIdx.x]; }
  Fiber& of_lane(unsigned lane) { return fibers_[threadIdx.x / kWarp * kWarp + lane]; }

 private:
  static void enter();
  void start(Fiber& fiber);
  void resume(Fiber& fiber);
  bool release(size_t first, size_t count, State state);
  void run_warp(unsigned first);
  std::string describe() const;

  std::vector<Fiber> fibers_;
  uint32_t seed_;
  std::mt19937 random_;
  const std::function<void()>* body_ = nullptr;
  ucontext_t scheduler_;
  StackBounds scheduler_stack_;
  std::exception_ptr error_;
};

Block* running = nullptr;

void Block::enter() {
  Block& block = *running;
  after_switch(nullptr, &block.scheduler_stack_);
  try {
    (*block.body_)();
  } catch (...) {
    block.error_ = std::current_exception();
  }
  block.current().state = State::kReturned;
  before_switch(nullptr, block.scheduler_stack_);
  setcontext(&block.scheduler_);
}

void Block::start(Fiber& fiber) {
  forget_frames(fiber.stack.get());
  fiber.state = State::kReady;
  fiber.exchanges = 0;
  fiber.fake_stack = nullptr;
  getcontext(&fiber.context);
  fiber.context.uc_stack.ss_sp = fiber.stack.get();
  fiber.context.uc_stack.ss_size = kStackBytes;
  fiber.context.uc_link = nullptr;
  makecontext(&fiber.context, &Block::enter, 0);
}

void Block::resume(Fiber& fiber) {
  void* fake_stack = nullptr;
  before_switch(&fake_stack, {fiber.stack.get(), kStackBytes});
  swapcontext(&scheduler_, &fiber.context);
  after_switch(fake_stack, nullptr);
}

void Block::wait(State state, const std::source_location& where) {
  Fiber& fiber = current();
  fiber.state = state;
  fiber.where = where;
  before_switch(&fiber.fake_stack, scheduler_stack_);
  swapcontext(&fiber.context, &scheduler_);
  after_switch(fiber.fake_stack, &scheduler_stack_);
}

// Lets the fibers go on if all of them wait in one place.
bool Block::release(size_t first, size_t count, State state) {
  const auto begin = fibers_.begin() + first;
  const bool together = std::all_of(begin, begin + count, [&](const Fiber& fiber) {
    return fiber.state == state && fiber.where.line() == begin->where.line() &&
           std::strcmp(fiber.where.file_name(), begin->where.file_name()) == 0;
  });
  if (together) std::for_each(begin, begin + count, [](Fiber& fiber) { fiber.state = State::kReady; });
  return together;
}

// Until its threads have returned or wait for the block: a warp runs ahead of the others as far as it can.
void Block::run_warp(unsigned first) {
  do {
    for (const unsigned lane : order(kWarp, seed_, random_)) {
      threadIdx = {first + lane};
      if (current().state == State::kReady) resume(current());
    }
  } while (release(first, kWarp, State::kAtWarp));
}

std::string Block::describe() const {
  std::map<std::string, unsigned> places;
  for (const Fiber& fiber : fibers_) {
    const char* barrier = fiber.state == State::kAtBlock  ? "the block at "
                          : fiber.state == State::kAtWarp ? "their warp at "
                                                          : "another block at ";
    ++places[fiber.state == State::kReturned ? "have returned"
                                             : "wait for " + (barrier + std::string(fiber.where.file_name())) + ":" +
                                                   std::to_string(fiber.where.line())];
  }
  std::string text = "block " + std::to_string(blockIdx.x) + " is stuck:";
  for (const auto& [place, count] : places) text += " " + std::to_string(count) + " threads " + place + ";";
  return text;
}

void Block::run(const std::function<void()>& body) {
  body_ = &body;
  running = this;
  for (Fiber& fiber : fibers_) start(fiber);
  do {
    for (const unsigned warp : order(fibers_.size() / kWarp, seed_, random_)) run_warp(warp * kWarp);
  } while (release(0, fibers_.size(), State::kAtBlock));
  if (error_) std::rethrow_exception(error_);
  const bool finished =
      std::all_of(fibers_.begin(), fibers_.end(), [](const Fiber& fiber) { return fiber.state == State::kReturned; });
  if (!finished) throw Stuck(describe());
}

}  // namespace

void launch(unsigned blocks, unsigned threads, uint32_t seed, size_t shared_bytes,
            const std::function<void(void* shared)>& body) {
  if (threads == 0 || threads % kWarp != 0) throw std::invalid_argument("launch: a block is a number of whole warps");
  gridDim = {blocks};
  blockDim = {threads};
  Block block(threads, seed);
  std::mt19937 random(seed);
  for (const unsigned index : order(blocks, seed, random)) {
    blockIdx = {index};
    // Of the exact size, so that AddressSanitizer sees what lies outside.
    const auto shared = std::make_unique_for_overwrite<char[]>(shared_bytes);
    std::memset(shared.get(), 0xa5, shared_bytes);
    block.run([&] { body(shared.get()); });
  }
}

void wait_for_block(const std::source_location& where) { running->wait(State::kAtBlock, where); }

void wait_for_other_block(const std::source_location& where) { running->wait(State::kAtOtherBlock, where); }

uint64_t exchange(uint64_t value, unsigned source, const std::source_location& where) {
  const unsigned slot = running->current().exchanges++ % 2;
  running->current().posted[slot] = value;
  running->wait(State::kAtWarp, where);
  return running->of_lane(source).posted[slot];
}

}  // namespace cctorch::device

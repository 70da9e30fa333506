// Threads of a cluster as fibers of one OS thread. A sweep visits the fibers of half of the warps, in random order; a
// fiber runs until it must wait. A sweep of all in which nothing moved is a deadlock.
#pragma once

#include <csetjmp>
#include <ucontext.h>

#include <functional>

namespace cpo::cuda {

inline uint64_t host_seed = 0;

struct Fiber : HostThread {
  static constexpr size_t kStack = 64 * 1024;
  jmp_buf state;
  ucontext_t context;  // of its first start; later switches use setjmp, which makes no system call
  bool started = false, done = true;
  std::unique_ptr<unsigned char[]> stack{new unsigned char[kStack]};
};

// All fibers live on: a new one costs two system calls.
struct Fibers {
  std::vector<std::unique_ptr<Fiber>> all;
  Fiber* current = nullptr;
  jmp_buf scheduler;
  ucontext_t start;
  std::function<void()> body;
  std::mt19937_64 random;
  long moves = 0;  // barriers that opened and fibers that ended

  static Fibers& get() {
    static Fibers fibers;
    return fibers;
  }
  static void yield() {
    Fibers& fibers = get();
    if (!_setjmp(fibers.current->state)) _longjmp(fibers.scheduler, 1);
  }
  static void entry() {
    for (;;) {
      get().body();
      get().current->done = true;
      ++get().moves;
      yield();
    }
  }
  void resume(Fiber& fiber) {
    current = &fiber;
    if (_setjmp(scheduler)) return;
    if (fiber.started) _longjmp(fiber.state, 1);
    fiber.started = true;
    getcontext(&fiber.context);
    fiber.context.uc_stack.ss_sp = fiber.stack.get();
    fiber.context.uc_stack.ss_size = Fiber::kStack;
    fiber.context.uc_link = nullptr;
    makecontext(&fiber.context, entry, 0);
    setcontext(&fiber.context);
  }
  void run(int count) {
    std::vector<int> order(count);
    std::iota(order.begin(), order.end(), 0);
    bool everyone = false;
    while (!order.empty()) {
      for (size_t i = order.size(); i > 1; --i) std::swap(order[i - 1], order[random() % i]);
      const uint64_t warps = everyone ? ~uint64_t(0) : random();
      const long before = moves;
      size_t left = 0;
      for (const int i : order) {
        if (warps >> (i / kWarp % 64) & 1) resume(*all[i]);
        if (!all[i]->done) order[left++] = i;
      }
      order.resize(left);
      if (moves == before && everyone) {
        host_fail("deadlock: threads wait at different barriers, or some have returned");
      }
      everyone = moves == before;
    }
  }
};

inline HostThread& self() { return *Fibers::get().current; }

struct HostBarrier {
  int expected = 0, arrived = 0;
  long opened = 0;

  // The ticket that wait() takes.
  long arrive() {
    const long ticket = opened;
    if (++arrived == expected) {
      arrived = 0;
      ++opened;
      ++Fibers::get().moves;
    }
    return ticket;
  }
  void wait(long ticket) {
    while (opened == ticket) Fibers::yield();
  }
};

template <typename Cluster, typename Body>
void run_grid(Cluster& cluster, const Body& body) {
  Fibers& fibers = Fibers::get();
  const int block = cluster.shape.block, count = block * cluster.shape.cluster;
  while (int(fibers.all.size()) < count) fibers.all.emplace_back(new Fiber);
  fibers.random.seed(host_seed);
  fibers.body = body;
  for (int64_t first = 0; first < cluster.shape.grid; first += cluster.shape.cluster) {
    cluster.begin(first);
    for (int i = 0; i < count; ++i) {
      static_cast<HostThread&>(*fibers.all[i]) = {i % block, &cluster.blocks[i / block], -1, 0};
      fibers.all[i]->done = false;
    }
    fibers.run(count);
  }
}

}  // namespace cpo::cuda

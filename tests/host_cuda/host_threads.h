// Threads of a cluster as real threads, which the sanitizers understand.
#pragma once

#include <condition_variable>
#include <mutex>
#include <thread>

namespace cpo::cuda {

inline thread_local HostThread host_thread;
inline HostThread& self() { return host_thread; }

struct HostBarrier {
  int expected = 0, arrived = 0;
  long opened = 0;
  std::mutex mutex;
  std::condition_variable open;

  // The ticket that wait() takes.
  long arrive() {
    const std::lock_guard<std::mutex> lock(mutex);
    const long ticket = opened;
    if (++arrived == expected) {
      arrived = 0;
      ++opened;
      open.notify_all();
    }
    return ticket;
  }
  void wait(long ticket) {
    std::unique_lock<std::mutex> lock(mutex);
    open.wait(lock, [&] { return opened != ticket; });
  }
};

template <typename Cluster, typename Body>
void run_grid(Cluster& cluster, const Body& body) {
  const int block = cluster.shape.block, count = block * cluster.shape.cluster;
  HostBarrier all;  // between one cluster of blocks and the next
  all.expected = count;
  std::vector<std::thread> threads;
  for (int i = 0; i < count; ++i) {
    threads.emplace_back([&, i] {
      for (int64_t first = 0; first < cluster.shape.grid; first += cluster.shape.cluster) {
        if (i == 0) cluster.begin(first);
        all.wait(all.arrive());
        host_thread = {i % block, &cluster.blocks[i / block], -1, 0};
        body();
        all.wait(all.arrive());
      }
    });
  }
  for (std::thread& thread : threads) thread.join();
}

}  // namespace cpo::cuda

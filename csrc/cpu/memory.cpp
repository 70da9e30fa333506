// Large results in pages of 2 MB.
#include "../common.h"

#ifdef __linux__
#include <sys/mman.h>
#endif

namespace cpo {

void prefer_huge_pages(void* data, int64_t bytes, int64_t bytes_of_block) {
#ifdef __linux__
  constexpr uintptr_t kPage = uintptr_t(1) << 21;
  if (bytes_of_block < kHugeBytes) return;
  const uintptr_t begin = reinterpret_cast<uintptr_t>(data);
  const uintptr_t low = (begin + kPage - 1) / kPage * kPage, high = (begin + uintptr_t(bytes)) / kPage * kPage;
  if (low >= high) return;
  madvise(reinterpret_cast<void*>(low), high - low, MADV_HUGEPAGE);  // a system without them refuses, which is no error
#else
  (void)data, (void)bytes, (void)bytes_of_block;
#endif
}

}  // namespace cpo

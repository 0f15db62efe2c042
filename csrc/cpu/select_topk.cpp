// The k candidates of greatest value, by radix selection: finds the k-th greatest key eight bits at a time, from the top.
#include <array>
#include <vector>

#include "kernels.h"
#include "math/order_key.h"

namespace kcd::cpu {
namespace {

template <class Value>
void select_topk_impl(const Value* value, const uint8_t* candidate, int64_t rows, int64_t k, uint8_t* selected) {
  using Key = decltype(order_key(Value{}));
  constexpr int kBits = 8 * sizeof(Key);
  std::vector<Key> key(static_cast<size_t>(rows));
  for (int64_t i = 0; i < rows; ++i) key[i] = candidate[i] ? order_key(value[i]) : 0;   // 0: below the key of every value

  Key prefix = 0;     // the digits of the k-th greatest key found so far
  int64_t left = k;   // its rank among the keys that share them
  for (int shift = kBits - 8; shift >= 0 && k > 0; shift -= 8) {
    std::array<int64_t, 256> count{};
    const Key prefix_mask = shift == kBits - 8 ? 0 : ~Key{0} << (shift + 8);
    for (int64_t i = 0; i < rows; ++i)
      if ((key[i] & prefix_mask) == prefix) ++count[(key[i] >> shift) & 255];
    int digit = 255;
    while (count[digit] < left) left -= count[digit--];
    prefix |= static_cast<Key>(digit) << shift;
  }
  // Of the rows whose key equals the threshold, the `left` lowest are selected.
  for (int64_t i = 0; i < rows; ++i) {
    const bool equal = k > 0 && key[i] == prefix;
    selected[i] = k > 0 && (key[i] > prefix || (equal && left > 0));
    left -= equal;
  }
}

}   // namespace

void select_topk(const float* value, const uint8_t* candidate, int64_t rows, int64_t k, uint8_t* selected) {
  select_topk_impl(value, candidate, rows, k, selected);
}
void select_topk(const double* value, const uint8_t* candidate, int64_t rows, int64_t k, uint8_t* selected) {
  select_topk_impl(value, candidate, rows, k, selected);
}

}   // namespace kcd::cpu

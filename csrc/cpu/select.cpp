// The k candidates of greatest value by radix selection: the k-th greatest key is found eight bits at a time, from the top.
#include <array>
#include <vector>

#include "kernels.h"
#include "math/order_key.h"

namespace kcd::cpu {
namespace {

template <class Value>
void select_impl(const Value* value, const uint8_t* candidate, int64_t rows, int64_t k, uint8_t* selected) {
  using Key = decltype(order_key(Value{}));
  constexpr int kBits = 8 * sizeof(Key);
  std::vector<Key> key(static_cast<size_t>(rows));
  for (int64_t i = 0; i < rows; ++i) key[i] = candidate[i] ? order_key(value[i]) : 0;   // 0: below every value's key

  Key prefix = 0;     // the digits of the k-th greatest key found so far
  int64_t left = k;   // its rank among the keys that share them
  for (int shift = kBits - 8; shift >= 0 && k > 0; shift -= 8) {
    std::array<int64_t, 256> count{};
    const Key known = shift == kBits - 8 ? 0 : ~Key{0} << (shift + 8);
    for (int64_t i = 0; i < rows; ++i)
      if ((key[i] & known) == prefix) ++count[(key[i] >> shift) & 255];
    int digit = 255;
    while (count[digit] < left) left -= count[digit--];
    prefix |= static_cast<Key>(digit) << shift;
  }
  // `left` rows with exactly the threshold's key still fit: the lowest ones.
  for (int64_t i = 0; i < rows; ++i) {
    const bool equal = k > 0 && key[i] == prefix;
    selected[i] = k > 0 && (key[i] > prefix || (equal && left > 0));
    left -= equal;
  }
}

}   // namespace

void select(const float* value, const uint8_t* candidate, int64_t rows, int64_t k, uint8_t* selected) {
  select_impl(value, candidate, rows, k, selected);
}
void select(const double* value, const uint8_t* candidate, int64_t rows, int64_t k, uint8_t* selected) {
  select_impl(value, candidate, rows, k, selected);
}

}   // namespace kcd::cpu

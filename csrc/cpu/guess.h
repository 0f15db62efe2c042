// Which rows will be selected, before all values are known.
#pragma once
#include "math/portable.h"

namespace kcd {
namespace {

// Follows the value above which a share of the rows lies, one row at a time (Robbins and Monro's stochastic approximation of a
// quantile): t += a ([v > t] - share), a = 3 E|v - t| / n, since 3 E|v - t| is about the inverse of a bell's density there.  A
// guess decides what is written when, never what is written in the end.
template <class Real>
class Guess {
 public:
  explicit Guess(double share) : share_(static_cast<Real>(share)) {}

  // Whether a row of this value will be selected; NaN ranks first.
  KCD_MEMBER bool selected(Real value) {
    const bool above = !(value <= threshold_), guess = above || seen_ < kLearning || share_ >= 1;
    if (value - value != 0) return true;   // nothing is learned from what is infinite or not a number
    if (seen_ == 0) threshold_ = value;
    seen_ += seen_ < kMemory;
    const Real distance = value > threshold_ ? value - threshold_ : threshold_ - value;
    spread_ += (distance - spread_) / static_cast<Real>(seen_);
    threshold_ += 3 * spread_ / static_cast<Real>(seen_) * ((above ? Real(1) : Real(0)) - share_);
    return guess;
  }

 private:
  static constexpr int kLearning = 16, kMemory = 256;   // rows
  Real share_, threshold_ = 0, spread_ = 0;
  int seen_ = 0;
};

}   // namespace
}   // namespace kcd

// Predicts which rows will be selected, before all values are known.
#pragma once
#include "math/portable.h"

namespace kcd {
namespace {

// Tracks the value that a given fraction of the rows exceeds, one row at a time: Robbins and Monro's stochastic approximation of a
// quantile, t += a ([v > t] - fraction) with a = 3 E|v - t| / n.  (3 E|v - t| approximates the inverse density of a bell curve
// there.)  A prediction decides when the gradient of a row is written, never what it contains.
template <class Real>
class SelectionPredictor {
 public:
  explicit SelectionPredictor(double selected_fraction) : selected_fraction_(static_cast<Real>(selected_fraction)) {}

  // Returns whether a row of this value will probably be selected, and learns from the value.  NaN ranks first.
  KCD_MEMBER bool predict(Real value) {
    const bool above = !(value <= threshold_), selected = above || seen_ < kWarmUp || selected_fraction_ >= 1;
    if (value - value != 0) return true;   // infinities and NaN would spoil the threshold
    if (seen_ == 0) threshold_ = value;
    seen_ += seen_ < kWindow;
    const Real distance = value > threshold_ ? value - threshold_ : threshold_ - value;
    spread_ += (distance - spread_) / static_cast<Real>(seen_);
    threshold_ += 3 * spread_ / static_cast<Real>(seen_) * ((above ? Real(1) : Real(0)) - selected_fraction_);
    return selected;
  }

 private:
  static constexpr int kWarmUp = 16, kWindow = 256;   // rows
  Real selected_fraction_, threshold_ = 0, spread_ = 0;
  int seen_ = 0;
};

}   // namespace
}   // namespace kcd

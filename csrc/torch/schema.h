// The names and schemas of the operators.  kcd_ext/ops.py registers the derivative.
#pragma once

#define KCD_LOSS_OPTIONS \
  "float temperature, float kd_weight, float ce_weight, float label_smoothing, int ignore_index, int reduction, float ranks"
#define KCD_BACKWARD_SCHEMA(student, result) \
  "(Tensor grad_output, " student            \
  " student, Tensor teacher, Tensor labels, Tensor row_weight, Tensor rows, Tensor state, " KCD_LOSS_OPTIONS ") -> " result

// - kernels.h describes the layout of `state`.
// - An empty tensor of dtype bool stands for an absent tensor.
// - `labels` of dtype int64 are class indices (...), of a floating-point dtype probabilities (..., C).
// - `gradient` of condensed_kd is the gradient of the loss for an incoming gradient of 1.  Only the CPU supports `with_gradient`;
//   without it, `gradient` is empty.
//
// Files in cpu/ and cuda/ have the operators' names.  condensed_kd is row_stats, select_topk and reduce_rows in one call: CPUs run
// it in torch/cpu_condensed_kd.cpp, GPUs in cuda/launch.cu (launch_row_stats with a FusedLoss).  condensed_kd_backward_ shares the
// files of condensed_kd_backward.
#define KCD_OPERATORS(X)                                                                                                    \
  X(condensed_kd,                                                                                                           \
    "(Tensor student, Tensor teacher, Tensor labels, Tensor score, Tensor row_weight, Tensor rows, float keep_fraction, "   \
    "int keep_count, int value, " KCD_LOSS_OPTIONS ", bool with_gradient) -> (Tensor loss, Tensor state, Tensor gradient)") \
  X(condensed_kd_backward, KCD_BACKWARD_SCHEMA("Tensor", "Tensor gradient"))                                                \
  X(condensed_kd_backward_, KCD_BACKWARD_SCHEMA("Tensor(a!)", "()"))                                                        \
  X(row_stats,                                                                                                              \
    "(Tensor student, Tensor teacher, Tensor labels, Tensor score, Tensor rows, float temperature, int value, "             \
    "int ignore_index, float label_smoothing) -> (Tensor state, Tensor cross_entropy, Tensor candidate)")                   \
  X(select_topk, "(Tensor value, Tensor candidate, float keep_fraction, int keep_count) -> Tensor selected")                \
  X(reduce_rows,                                                                                                            \
    "(Tensor student, Tensor labels, Tensor row_weight, Tensor state, Tensor cross_entropy, " KCD_LOSS_OPTIONS ") -> Tensor loss")

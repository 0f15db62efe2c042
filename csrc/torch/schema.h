// The operators' names and schemas.
#pragma once

#define KCD_LOSS_OPTIONS "float temperature, float kd_weight, float ce_weight, int ignore_index, int reduction, float ranks"
#define KCD_FORWARD_SCHEMA(more)                                                                                        \
  "(Tensor student, Tensor teacher, Tensor labels, Tensor score, Tensor row_weight, Tensor rows, float keep_fraction, " \
  "int keep_count, int value, " KCD_LOSS_OPTIONS                                                                        \
  ") -> (Tensor loss, Tensor value, Tensor stats, Tensor selected, Tensor counts" more ")"
#define KCD_BACKWARD_SCHEMA(student, result)                                                   \
  "(Tensor grad_output, " student                                                              \
  " student, Tensor teacher, Tensor labels, Tensor row_weight, Tensor rows, Tensor selected, " \
  "Tensor stats, Tensor counts, " KCD_LOSS_OPTIONS ") -> " result

// name, kernel, schema.  Each direction has two names: condensed_kd and condensed_kd_backward carry the derivatives that
// kcd_ext/ops.py registers, for torch.compile and for whoever calls torch.ops.kcd_ext himself; condensed_kd_forward and
// condensed_kd_gradient carry none, and spare the eager path the Python in which torch.library wraps a derivative.  On CUDA the
// former two have no kernel here: ops.py registers one, which calls the latter two.
#define KCD_OPERATORS(X)                                                                                                  \
  X(condensed_kd, condensed_kd, KCD_FORWARD_SCHEMA(""))                                                                   \
  X(condensed_kd_forward, condensed_kd_forward, KCD_FORWARD_SCHEMA(""))                                                   \
  X(condensed_kd_with_gradient, condensed_kd_with_gradient, KCD_FORWARD_SCHEMA(", Tensor gradient"))                      \
  X(condensed_kd_backward, condensed_kd_backward, KCD_BACKWARD_SCHEMA("Tensor", "Tensor gradient"))                       \
  X(condensed_kd_gradient, condensed_kd_gradient, KCD_BACKWARD_SCHEMA("Tensor", "Tensor gradient"))                       \
  X(condensed_kd_gradient_, condensed_kd_gradient_, KCD_BACKWARD_SCHEMA("Tensor(a!)", "()"))                              \
  X(row_stats, row_stats,                                                                                                 \
    "(Tensor student, Tensor teacher, Tensor labels, Tensor score, Tensor rows, float temperature, int value, "           \
    "int ignore_index) -> (Tensor value, Tensor stats, Tensor cross_entropy, Tensor candidate)")                          \
  X(select_topk, select_topk, "(Tensor value, Tensor candidate, float keep_fraction, int keep_count) -> Tensor selected") \
  X(reduce_rows, reduce_rows,                                                                                             \
    "(Tensor student, Tensor labels, Tensor row_weight, Tensor selected, Tensor stats, Tensor cross_entropy, "            \
    "Tensor counts, " KCD_LOSS_OPTIONS ") -> Tensor loss")

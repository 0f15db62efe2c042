"""Names in the figures, shared by the measuring loop and by the report, which runs without torch."""

FORWARD, BOTH = "forward", "forward + backward"
OURS, OURS_INPLACE, EAGER, COMPILE = "kcd_ext", "kcd_ext in place", "eager", "compile"
LIGER = ("Liger KL", "Liger JSD")
LEAST = "student.sum()"
MEASURED, NOT_REACHED, OUT_OF_MEMORY = "measured", "not reached", "out of memory"

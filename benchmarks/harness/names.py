"""What the figures are called: in the loop that takes them, and in the report that reads them without torch."""

FORWARD, BOTH = "forward", "forward + backward"
OWN, OWN_INPLACE, EAGER, COMPILE = "kcd_ext", "kcd_ext in place", "eager", "compile"
LIGER = ("Liger KL", "Liger JSD")
LEAST = "student.sum()"
MEASURED, NOT_REACHED, OUT_OF_MEMORY = "measured", "not reached", "out of memory"

"""The whole job, forward and backward, against PyTorch: python benchmarks/run.py [--threads 2] [--shapes 64x100 4096x1000 ...]

The job: KL at temperature 4, the student's entropy, the top 70 % of the rows by it, the mean of their KL, the gradient.
Medians over rounds in which the candidates take turns, in one process; the spread is the middle half of the rounds.  Beside
the times stands the floor: the bytes that must move (student and teacher read once, the gradient written once) over the
bandwidth that a triad of arrays of the same size reaches right after.
"""

import argparse
import json
import pathlib
import statistics
import time

import torch
import torch.nn.functional as F

import kcd_ext
from kcd_ext.ops import build_info

TEMPERATURE, KEEP = 4.0, 0.7
SHAPES = ("64x100", "256x100", "256x1000", "4096x1000", "1024x32000", "4096x1000:bfloat16")


def eager(student, teacher):
    """The job as one writes it in PyTorch."""
    log_q, p = F.log_softmax(student / TEMPERATURE, 1), F.softmax(teacher / TEMPERATURE, 1)
    kl = F.kl_div(log_q, p, reduction="none").sum(1)
    with torch.no_grad():
        log_pi = F.log_softmax(student, 1)
        entropy = -(log_pi.exp() * log_pi).sum(1)
        rows = entropy.topk(max(1, int(KEEP * len(entropy)))).indices
    return kl[rows].mean() * TEMPERATURE**2


def ours(student, teacher):
    """The job as one call."""
    return kcd_ext.condensed_kd_loss(student, teacher, temperature=TEMPERATURE, keep=KEEP)


def seconds(function, *arguments):
    """Forward and both directions, once."""
    arguments[0].grad = None
    start = time.perf_counter()
    loss = function(*arguments)
    forward = time.perf_counter() - start
    loss.backward()
    return forward, time.perf_counter() - start


def measure(rows, classes, dtype, budget):
    """Times of every candidate over interleaved rounds, and of the triad, in seconds."""
    student, teacher = torch.randn(rows, classes).to(dtype).requires_grad_(), torch.randn(rows, classes).to(dtype)
    candidates = {"kcd_ext": ours, "eager": eager, "compile": torch.compile(eager, dynamic=False)}
    want = eager(student.detach().double(), teacher.double()).item()
    for name, function in candidates.items():
        for _ in range(3):  # compiles, warms up
            seconds(function, student, teacher)
        tolerance = (
            1e-4 if dtype == torch.float32 or name == "kcd_ext" else 0.1
        )  # eager half precision rounds every step
        assert abs(function(student, teacher).item() - want) <= tolerance * abs(want), name
    times = {name: ([], []) for name in candidates}
    names = list(candidates)
    end = time.perf_counter() + budget
    while time.perf_counter() < end or len(times["eager"][0]) < 7:
        names.append(names.pop(0))  # everyone follows everyone
        for name in names:
            forward, both = seconds(candidates[name], student, teacher)
            times[name][0].append(forward)
            times[name][1].append(both)
    return times, triad(rows, classes, dtype)


def triad(rows, classes, dtype):
    """Seconds to read two arrays of the logits' size and write one, over and over."""
    a, b, c = (torch.ones(rows, classes, dtype=dtype) for _ in range(3))
    times = []
    for _ in range(15):
        start = time.perf_counter()
        torch.add(a, b, out=c)
        times.append(time.perf_counter() - start)
    return times


def summary(samples):
    """Median and the middle half, in microseconds."""
    low, median, high = statistics.quantiles(samples, n=4)
    return {"median_us": round(median * 1e6, 1), "low_us": round(low * 1e6, 1), "high_us": round(high * 1e6, 1)}


def main():
    """Prints a Markdown table; writes JSON where --output says."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--threads", type=int, default=torch.get_num_threads())
    parser.add_argument("--shapes", nargs="+", default=SHAPES, metavar="ROWSxCLASSES[:DTYPE]")
    parser.add_argument("--seconds", type=float, default=4.0, help="how long each shape is measured")
    parser.add_argument("--output", type=pathlib.Path, help="a JSON file")
    options = parser.parse_args()
    torch.set_num_threads(options.threads)
    torch.manual_seed(0)
    sets = build_info["instruction_set_in_use"]
    print(
        f"kcd_ext {kcd_ext.__version__} ({sets}), torch {torch.__version__}, {options.threads} threads; forward + backward, µs\n"
    )
    print(
        "| rows × classes | kcd_ext | middle half | eager | torch.compile | × eager | × compile | floor (bytes) | of the floor |"
    )
    print("| --- | --- | --- | --- | --- | --- | --- | --- | --- |")
    results = []
    for shape in options.shapes:
        size, _, dtype_name = shape.partition(":")
        rows, classes = map(int, size.split("x"))
        dtype = getattr(torch, dtype_name or "float32")
        times, triad_seconds = measure(rows, classes, dtype, options.seconds)
        result = {"rows": rows, "classes": classes, "dtype": str(dtype).removeprefix("torch.")}
        for name, (forward, both) in times.items():
            result[name] = {"forward": summary(forward), "forward_backward": summary(both)}
        floor = statistics.median(triad_seconds) * 1e6  # it moves just these bytes: two arrays read, one written
        result["triad_us"] = round(floor, 1)
        us = {name: result[name]["forward_backward"]["median_us"] for name in times}
        own = result["kcd_ext"]["forward_backward"]
        print(
            f"| {rows} × {classes} {result['dtype']} | {us['kcd_ext']:.0f} | {own['low_us']:.0f}–{own['high_us']:.0f} |"
            f" {us['eager']:.0f} | {us['compile']:.0f} | {us['eager'] / us['kcd_ext']:.1f} | {us['compile'] / us['kcd_ext']:.1f} |"
            f" {floor:.0f} | {floor / us['kcd_ext']:.0%} |",
            flush=True,
        )
        results.append(result)
    if options.output:
        facts = {
            "torch": torch.__version__,
            "kcd_ext": build_info,
            "threads": options.threads,
            "temperature": TEMPERATURE,
            "keep": KEEP,
        }
        options.output.write_text(json.dumps({**facts, "results": results}, indent=1) + "\n")


if __name__ == "__main__":
    main()

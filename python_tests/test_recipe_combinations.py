"""Options of the recipe together with methods and selections: a stopped and resumed run equals an uninterrupted one."""

import pytest
import torch
from small_runs import OPTIONS, StopError, assert_same, final, images, network, stop_after

from kcd_ext.training import Condense, Recipe, cache_teacher, distill

pytestmark = [
    pytest.mark.slow,
    pytest.mark.usefixtures("one_thread"),
    pytest.mark.filterwarnings("ignore:the teacher's accuracy"),
]
AVERAGED = {"optimizer": "adamw", "schedule": "cosine", "warmup_epochs": 1, "ema": 0.9, "clip_norm": 1.0}
BEST = {"keep_best": True, "patience": 5}
CASES = {
    "kc-kd": ("kd", Condense(0.5, stages=2), AVERAGED | BEST),
    "importance": ("kd", Condense(0.5, selection="importance"), AVERAGED | {"mixup": 0.3, "label_smoothing": 0.1}),
    "infobatch": ("kd", Condense(0.5, selection="infobatch"), AVERAGED | {"cutmix": 1.0, "gradient_accumulation": 3}),
    "kl": ("kd", Condense(0.5, stages=2, value="kl"), BEST | {"ema": 0.9, "mixup": 0.3, "cutmix": 1.0}),
    "sum": ("kd+at", Condense(0.5, stages=2), AVERAGED | BEST | {"label_smoothing": 0.1}),
    "fitnet": ("fitnet", None, AVERAGED | BEST),
    "reviewkd": ("reviewkd", Condense(0.5, stages=2), AVERAGED),
    "crd": ("crd", Condense(0.5, selection="random"), AVERAGED | BEST),
    "iekd": ("iekd", None, AVERAGED | {"label_smoothing": 0.1, "precision": "bfloat16"}),
    "sskd": ("sskd", None, BEST | {"ema": 0.9, "clip_norm": 0.5}),
    "pwkd": ("pwkd", None, BEST | {"ema": 0.9, "optimizer": "adamw", "clip_norm": 0.5, "label_smoothing": 0.1}),
    "cache": ("dist", Condense(0.5, stages=2, epsilon=0.0), AVERAGED | BEST | {"label_smoothing": 0.1}),
}


def train(case, folder, **options):
    """Run a case with a teacher that is never trained. Return the student."""
    method, condense, changes = CASES[case]
    base = {"epochs": 8, "batch_size": 8, "lr": 0.01, "device": "cpu", "seed": 3}
    recipe = Recipe(method, OPTIONS.get(method, {}), condense, **base | changes)
    student, teacher, train, test = network(1), network(2, width=10).eval(), images(69), images(30, seed=1)
    if case == "cache":
        teacher = cache_teacher(teacher, train, test, folder.parent / "cache", views=3, seed=3, device="cpu")
    distill(student, teacher, train, test, recipe, val=images(23, seed=1), output=folder, **options)
    return student


@pytest.mark.parametrize("case", CASES)
def test_run_with_many_options_resumes_bit_for_bit(case, tmp_path):
    whole = train(case, tmp_path / "whole")
    for _ in range(2):
        torch.manual_seed(torch.seed())
        with pytest.raises(StopError):
            train(case, tmp_path / "stopped", resume=True, progress=stop_after(2))
    resumed = train(case, tmp_path / "stopped", resume=True)
    assert_same(final(tmp_path / "stopped"), final(tmp_path / "whole"))
    assert_same(dict(resumed.state_dict()), dict(whole.state_dict()))

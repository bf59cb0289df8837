"""A run's log lines."""

from __future__ import annotations

import math
from dataclasses import replace

import pytest

from megatron_dwm.runtime.device import peak_flops
from megatron_dwm.runtime.log_line import LogLine, LossWindow, Speed, validation_line

LINE = LogLine(
    iteration=100,
    train_iters=500,
    consumed_samples=25600,
    skipped_samples=0,
    seconds_per_iteration=1.23456,
    throughput=None,
    joules=None,
    learning_rate=1.5e-4,
    global_batch_size=256,
    losses={"lm loss": 6.7890123},
    loss_scale=1.0,
    grad_norm=1.2345,
    num_zeros=None,
    params_norm=None,
    skipped_iterations=0,
    nan_iterations=0,
)


def test_the_line_ends_with_what_is_ours():
    plain = str(LINE).split("]", 1)[1]
    assert plain == (
        " iteration      100/     500 | consumed samples:        25600 | elapsed time per iteration (ms): 1234.6 | "
        "learning rate: 1.500000E-04 | global batch size:   256 | lm loss: 6.789012E+00 | loss scale: 1.0 | "
        "grad norm: 1.234 | number of skipped iterations:   0 | number of nan iterations:   0 |"
    )
    with_energy = str(replace(LINE, joules=617.28)).split("]", 1)[1]
    assert "(ms): 1234.6 | energy per GPU (J/iter/GPU): 617.3 | power per GPU (W/GPU): 500.0 | learning" in with_energy
    weighted = replace(LINE, extra={"dwm stage": 2, "dwm effective sample size": 0.87654})
    assert str(weighted).split("]", 1)[1] == plain + " dwm stage: 2 | dwm effective sample size: 0.8765 |"


def test_the_speed_is_told_also_of_a_slow_run():
    speed = Speed(tokens_per_second=1234.5, tflops=0.001234, peak_tflops=0.01, seconds_left=93784.4)
    line = str(replace(LINE, extra=speed.figures()))
    assert line.endswith(" tokens/s/GPU: 1234 | TFLOP/s/GPU: 0.001234 | MFU: 12.3% | time left: 1d 02:03:04 |")
    assert "MFU" not in replace(speed, peak_tflops=None).figures()


@pytest.mark.parametrize(
    ("device", "tflops"), [("NVIDIA H100 80GB HBM3", 989), ("NVIDIA H100 PCIe", 756), ("NVIDIA A100-SXM4-80GB", 312)]
)
def test_a_devices_peak_is_known_by_its_name(device: str, tflops: int):
    assert peak_flops(device) == tflops * 1e12
    assert peak_flops("a CPU") is None


def test_a_window_averages_the_steps_that_were_made():
    window = LossWindow()
    window.add({"lm loss": 4.0}, skipped=False)
    window.add({"lm loss": math.inf}, skipped=True)
    window.add({"lm loss": 9.0}, skipped=True)
    window.add({"lm loss": 2.0}, skipped=False)
    assert window.averages() == {"lm loss": 3.0}
    assert (window.iterations, window.skipped, window.nan) == (4, 2, 1)


def test_the_rule_is_as_long_as_the_line_and_one_more():
    rule, text, last = validation_line("iteration 7", 1.0).splitlines()
    assert rule == last == "-" * (len(text) + 1)
    assert "lm loss PPL: 2.718282E+00" in text
    assert validation_line("iteration 7", 1.0, "2", "wiki").splitlines()[1] == (
        " validation-2 loss at iteration 7 | lm loss value: 1.000000E+00 | lm loss PPL: 2.718282E+00 | dwm set: wiki | "
    )


def test_a_perplexity_does_not_overflow():
    assert "lm loss value: 1.000000E+03 | lm loss PPL: 4.851652E+08" in validation_line("iteration 7", 1000.0)

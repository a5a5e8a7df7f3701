"""On a GPU: the checks of bench.gpu, which say the same of CUDA as the other tests say of a CPU."""
import json
from pathlib import Path

import pytest
import torch

from bench import gpu_checks
from bench.gpu import Report

pytestmark = pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")


def check(stage, folder: Path, *promised: str, tiny: bool = False) -> list[dict]:
    """Run a stage and return its rows, none of which may fail. promised: beginnings of rows that have to be
    among those that passed."""
    stage(Report(folder / "rows.jsonl"), "cuda", tiny)
    rows = [json.loads(line) for line in (folder / "rows.jsonl").read_text().splitlines()]
    assert [row for row in rows if row["passed"] is False] == []
    passed = [row["name"] for row in rows if row["passed"]]
    assert [name for name in promised if not any(each.startswith(name) for each in passed)] == []
    return rows


def test_flash_attention_is_what_a_run_in_bf16_uses(tmp_path):
    check(gpu_checks.versions, tmp_path, "varlen_attn is used: Llama", "varlen_attn is used: Qwen3")


def test_logits_loss_and_gradients_in_fp32_are_those_of_the_cpu(tmp_path):
    check(gpu_checks.fp32, tmp_path, "Llama: gradients", "Qwen2: gradients", "Qwen3: gradients")


def test_flash_attention_sees_the_past_of_its_own_document_only(tmp_path):
    check(gpu_checks.attention, tmp_path, "flash, head size 128, group 8", "flash: a leak",
          "flash: a dropped")


def test_a_step_in_bf16_does_not_depend_on_packing_recomputation_compilation_or_chunks(tmp_path):
    check(gpu_checks.bf16, tmp_path, "unpacked: gradient", "recompute: gradient", "compiled: gradient",
          "chunks of", "a leak")


def test_the_host_waits_for_the_device_once_a_step(tmp_path):
    check(gpu_checks.syncs, tmp_path, "plain: waits", "--neftune-alpha 5: waits")


def test_a_deterministic_run_that_is_killed_and_resumed_is_the_uninterrupted_one_bit_for_bit(tmp_path):
    check(gpu_checks.quickstart, tmp_path, "deterministic: resumed equals uninterrupted", tiny=True)


def test_greedy_answers_are_those_of_the_cpu(tmp_path):
    check(gpu_checks.generation, tmp_path, "Llama: answers as on the CPU", "Qwen2: answers as on the CPU",
          "Qwen3: answers as on the CPU")

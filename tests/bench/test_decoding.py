"""Decoding: what the cache holds by hand."""

import pytest
import torch

import hybridlib as hl
from hybridlib.bench import decoding
from hybridlib.bench.timing import Bench


def test_decoding_of_the_teacher_holds_keys_and_values_of_every_token(bench, teacher):
    row = decoding.time_decoding(bench, teacher, context=8, batch=2, new_tokens=4)
    config = teacher.model.config
    held = 2 * config.num_hidden_layers * 2 * config.num_key_value_heads * 8 * 4 * (8 + 4 - 1)  # the last is not read
    assert row["reason"] is None and (row["full_attention"], row["linear_attention"]) == (held, 0)
    assert row["tokens_per_second"] > 0 and row["mixer"] is None and row["gpu_tokens_per_second"] is None


def test_decoding_of_a_hybrid_holds_states_that_do_not_grow(bench, teacher):
    rows = [decoding.time_decoding(bench, teacher, share=share, context=context, new_tokens=3)
            for share in (0.34, 0) for context in (8, 16)]
    assert [row["reason"] for row in rows] == [None] * 4
    assert rows[0]["full_attention"] < rows[1]["full_attention"] and rows[2]["full_attention"] == 0
    assert rows[0]["linear_attention"] == rows[1]["linear_attention"] > 0
    assert rows[3]["linear_attention"] == rows[0]["linear_attention"] * 3 // 2


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")
@pytest.mark.parametrize("share", [1, 0.34, 0])
def test_decoding_on_a_gpu_is_also_timed_without_its_launches(tmp_path, tiny_teacher, share):
    teacher = hl.Teacher(tiny_teacher().cuda(), None, "tiny", "r1")
    row = decoding.time_decoding(Bench(hl.Ledger(tmp_path)), teacher, share=share, context=8, new_tokens=4)
    assert row["reason"] is None and "graph_reason" not in row
    assert row["gpu_tokens_per_second"] > row["tokens_per_second"]

"""Tests of what train.py does for a GPU and for several processes, without a GPU. No network."""

import importlib.util
import json
import math
import subprocess
import sys
import threading
import types
from datetime import timedelta

import numpy as np
import pytest
import torch

import train as T
from muon import polar_express
from prepare_fineweb import UserError
from test_model import HERE, SMALL, Quiet, close, data, log_of, start, train_fully, weights

# ------------------------------------------------------------------------------------- 1 bfloat16


@pytest.fixture
def device(monkeypatch):
    """device(name, has_bfloat16): torch answers as on such a device; emulation is always there."""

    def device(name, has_bfloat16=True):
        monkeypatch.setattr(T, "choose_device", lambda asked: name)
        monkeypatch.setattr(
            torch.cuda,
            "is_bf16_supported",
            lambda including_emulation=True: has_bfloat16 or including_emulation,
        )
        monkeypatch.setattr(torch.cuda, "get_device_name", lambda: "Tesla T4")
        monkeypatch.setattr(importlib.util, "find_spec", lambda name: name)
        monkeypatch.setattr(T.shutil, "which", lambda name: name)
        monkeypatch.setattr(T.os.path, "exists", lambda path: True)

    return device


@pytest.mark.parametrize(
    "name, has_bfloat16, dtype, compile, lines",
    [
        ("cuda", True, "bfloat16", True, []),
        (
            *("cuda", False, "float32", True),
            ["Tesla T4 has no bfloat16: dtype=float32, muon_dtype=float32"],
        ),
        ("mps", True, "float32", False, []),
        ("cpu", True, "float32", False, []),
    ],
)
def test_auto_is_bfloat16_only_where_the_device_computes_in_it(
    name, has_bfloat16, dtype, compile, lines, device, capsys
):
    device(name, has_bfloat16)
    config = T.resolve({})[1]
    assert (config.dtype, config.muon_dtype, config.compile) == (dtype, dtype, compile)
    assert capsys.readouterr().out.splitlines() == lines


@pytest.mark.parametrize("dtype", ["bfloat16", "pure_bfloat16"])
def test_bfloat16_is_not_compiled_for_a_card_that_emulates_it(dtype, device):
    device("cuda", has_bfloat16=False)
    with pytest.raises(UserError, match=f"--dtype={dtype}: .*Tesla T4.*--compile=false") as error:
        T.resolve(dict(dtype=dtype))
    assert "\n" not in str(error.value)
    assert T.resolve(dict(dtype=dtype, compile=False))[1].dtype == dtype
    device("cuda", has_bfloat16=True)
    assert T.resolve(dict(dtype=dtype))[1].compile


# ---------------------------------------------------------------------------------- 2 pinned memory


@pytest.mark.parametrize("name", ["cuda", "mps", "cpu"])
def test_a_batch_for_cuda_is_copied_from_pinned_memory_without_waiting(name, monkeypatch):
    pinned = []
    copies = []

    def pin_memory(tensor):
        pinned.append(tensor.data_ptr())
        return tensor

    def to(tensor, device, non_blocking=False):
        copies.append((tensor.data_ptr(), device, non_blocking))
        return tensor

    monkeypatch.setattr(torch.Tensor, "pin_memory", pin_memory)
    monkeypatch.setattr(torch.Tensor, "to", to)
    windows = np.arange(6, dtype=np.uint16).reshape(2, 3)
    config = types.SimpleNamespace(device=name, mask_documents=False)
    idx, targets, docs = T.to_batch(windows, 256, config)
    assert idx.tolist() == [[0, 1], [3, 4]]
    assert targets.tolist() == [[1, 2], [4, 5]]
    assert [copy[1:] for copy in copies] == [(name, name == "cuda")]
    assert pinned == [copy[0] for copy in copies if name == "cuda"]

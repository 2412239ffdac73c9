"""
What the tests of this folder share.

One thread for them and for every process that they start: threads that wait for a core spin.
"""

import os
import sys

os.environ["OMP_NUM_THREADS"] = "1"  # before torch is imported

import pytest
import torch

torch.set_num_threads(1)
HERE = os.path.dirname(os.path.abspath(__file__))
sys.path[:0] = [HERE, os.path.join(HERE, "..")]

from prepare_fineweb import write_meta, write_shard


def pytest_configure(config):
    config.addinivalue_line("markers", "slow: takes seconds")


@pytest.fixture
def call(monkeypatch):
    """call(main, *argv): what main() of a script returns for a command line."""

    def call(main, *argv):
        monkeypatch.setattr(sys, "argv", ["script.py", *map(str, argv)])
        return main()

    return call


@pytest.fixture(scope="session")
def write_data():
    """write_data(folder, tokens): shards of the tokenizer "bytes", the same for both splits."""

    def write_data(folder, tokens):
        os.makedirs(folder, exist_ok=True)
        for split in ("train", "val"):
            write_shard(os.path.join(folder, f"text_{split}_000000.bin"), tokens)
        write_meta(folder, dict(tokenizer="bytes"))
        return str(folder)

    return write_data

"""One thread for the tests of this folder and for every process that they start: threads that wait for a core spin."""
import os

os.environ["OMP_NUM_THREADS"] = "1"
import torch

torch.set_num_threads(1)

from __future__ import annotations

import os
import random
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import HealthCheck, settings

REPOSITORY = Path(__file__).resolve().parent.parent
SHARED = REPOSITORY.parent / "shared"

# Few examples, the same ones every time, unless HYPOTHESIS_PROFILE=long asks for many new ones.
EVERY = {"deadline": None, "suppress_health_check": list(HealthCheck)}
settings.register_profile("short", max_examples=20, derandomize=True, database=None, **EVERY)
settings.register_profile("long", max_examples=2000, **EVERY)
settings.load_profile(os.environ.get("HYPOTHESIS_PROFILE", "short"))


def pytest_addoption(parser: pytest.Parser) -> None:
    parser.addoption("--slow", action="store_true", help="also run the tests marked slow, which take minutes")


def pytest_configure(config: pytest.Config) -> None:
    # More threads than cores (or than the user grants) make small tensors slower, not faster; beside other test processes one is right.
    if "PYTEST_XDIST_WORKER" in os.environ:
        os.environ["OMP_NUM_THREADS"] = "1"  # of the processes that tests start
        torch.set_num_threads(1)
    elif "OMP_NUM_THREADS" not in os.environ:
        torch.set_num_threads(min(torch.get_num_threads(), 2))


def pytest_collection_modifyitems(config: pytest.Config, items: list[pytest.Item]) -> None:
    skip_slow = pytest.mark.skip(reason="takes minutes: run pytest --slow")
    skip_gpu = pytest.mark.skip(reason="needs a CUDA device")
    for item in items:
        if item.get_closest_marker("slow") and not config.getoption("--slow"):
            item.add_marker(skip_slow)
        if item.get_closest_marker("gpu") and not torch.cuda.is_available():
            item.add_marker(skip_gpu)


@pytest.fixture(autouse=True)
def _seeds() -> None:
    """Every test starts from the same state of the global generators, whatever ran before it."""
    random.seed(0)
    np.random.seed(0)  # noqa: NPY002  the global generator is what other libraries draw from
    torch.manual_seed(0)


@pytest.fixture(scope="session")
def repository() -> Path:
    """Root of the checkout."""
    return REPOSITORY


@pytest.fixture(scope="session")
def shared_data() -> Path:
    """Real data kept beside the checkout; most checkouts have none."""
    if not (SHARED / "data").is_dir():
        pytest.skip("real data are not beside this checkout (../shared/data)")
    return SHARED / "data"


@pytest.fixture(scope="session")
def cifar100_root(shared_data: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder from which torchvision reads the real CIFAR-100, unpacked once a session."""
    root = tmp_path_factory.mktemp("cifar100")
    command = [sys.executable, str(SHARED / "tools" / "unpack_cifar100.py"), str(root)]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    if done.returncode != 0:
        pytest.skip(f"CIFAR-100 cannot be unpacked: {done.stderr.strip()[-200:]}")
    return root
